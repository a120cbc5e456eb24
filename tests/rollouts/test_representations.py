"""Where the policy sees prompts: against one forward pass each, written out."""

import json
from pathlib import Path

import numpy as np
import torch
from tests.runs import SMALL

from cropi.config import PolicyConfig
from cropi.loading import load_config
from cropi.policy import load_policy
from cropi.prompts import load_prompts
from cropi.rollouts.representations import read_representations, represent


def test_representations_are_mean_hidden_states_of_each_prompt_alone(tmp_path: Path) -> None:
    policy = load_policy(PolicyConfig(path="builtin", cpu_threads=1))
    config = load_config("quickstart", [*SMALL, "collect.batch_tokens=64"])
    prompts = load_prompts(config)
    counts, details = represent(config, policy, prompts, tmp_path)
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
