"""Where the policy sees prompts: against one forward pass each, written out."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.runs import SMALL

from cropi.artifacts import REPRESENTATIONS, write_table
from cropi.config import PolicyConfig
from cropi.config.loading import load_config
from cropi.errors import ArtifactError
from cropi.policy import load_policy
from cropi.prompts import checked_prompts
from cropi.prompts.encoding import encode_rows
from cropi.stages import collect
from cropi.stages.collect import read_representations, represent


def test_representations_are_mean_hidden_states_of_each_prompt_alone(tmp_path: Path) -> None:
    policy = load_policy(PolicyConfig(path="builtin", cpu_threads=1))
    config = load_config("quickstart", [*SMALL, "collect.batch_tokens=64"])
    prompts = checked_prompts(config).rows
    encode = partial(encode_rows, policy.tokenizer, config.prompts)
    counts, details = represent(config, policy, prompts, tmp_path, encode)
    found = read_representations(tmp_path)
    wanted = [row for row in prompts if not row["set"].startswith("test/")]
    assert set(found) == {(row["set"], row["prompt_id"]) for row in wanted}
    assert counts == {"train": 48, "validation/sum": 6}
    tokens = 0
    for row in wanted:
        ids = policy.tokenizer(json.loads(row["messages"]))["input_ids"]
        tokens += len(ids)
        with torch.no_grad():
            hidden = policy.model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        np.testing.assert_allclose(
            found[row["set"], row["prompt_id"]], hidden[0].mean(dim=0).numpy(), rtol=1e-3, atol=1e-5
        )
    assert details["prompt_tokens"] == tokens


def test_rows_are_written_in_batches_and_must_be_of_one_length(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = load_policy(PolicyConfig(path="builtin", cpu_threads=1))
    config = load_config("quickstart", SMALL)
    encode = partial(encode_rows, policy.tokenizer, config.prompts)
    represent(config, policy, checked_prompts(config).rows, tmp_path, encode)
    whole = read_representations(tmp_path)
    monkeypatch.setattr(collect, "ROWS", 5)
    represent(config, policy, checked_prompts(config).rows, tmp_path, encode)
    found = read_representations(tmp_path)
    assert list(found) == list(whole)
    assert all(np.array_equal(found[key], whole[key]) for key in whole)
    rows = [{"set": "train", "prompt_id": str(n), "representation": [0.0] * n} for n in (1, 2)]
    write_table(tmp_path / "representations.parquet", rows, REPRESENTATIONS)
    with pytest.raises(ArtifactError, match="differ in length"):
        read_representations(tmp_path)
