"""Generation and collection with a real model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runs import SMALL

from cropi.artifacts import TRAJECTORIES, read_table
from cropi.config import Config, PolicyConfig
from cropi.config.loading import load_config
from cropi.errors import ArtifactError, DataError
from cropi.policy import Policy, completion_logprobs, load_policy
from cropi.prompts import checked_prompts
from cropi.rewards.pool import judge_of
from cropi.rollouts import generation
from cropi.rollouts.generation import Sampling, TransformersGenerator
from cropi.rollouts.shards import behaviour_logprobs, plan, read_trajectories
from cropi.stages.collect import sample_prompts
from cropi.streams import Ledger

JUDGE = judge_of(load_config("quickstart").verifier, load_config("quickstart").verification)

PROMPTS = ["sum mod 7 : 3 5 6 =", "parity : 1 0 1 1 0 1 =", "sum mod 7 : 1 1 ="]
SAMPLING = Sampling(max_completion_length=12, temperature=1.0)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(PolicyConfig(path="builtin", cpu_threads=1))


def ids(policy: Policy) -> list[list[int]]:
    return policy.tokenizer(PROMPTS)["input_ids"]


def test_same_seed_same_completions_and_the_callers_state_is_kept(policy: Policy) -> None:
    state = torch.random.get_rng_state()
    generate = TransformersGenerator(policy, 8)
    first, second = (generate(ids(policy) * 4, SAMPLING, seed=5) for _ in range(2))
    assert first == second
    assert generate(ids(policy) * 4, SAMPLING, seed=6) != first
    assert torch.equal(torch.random.get_rng_state(), state)


def test_out_of_memory_halves_the_batch(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = generation.TransformersGenerator._generate

    def tight(self: TransformersGenerator, prompts: list[list[int]], sampling: Sampling) -> list[list[int]]:
        sizes.append(len(prompts))
        if len(prompts) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, prompts, sampling)

    monkeypatch.setattr(generation.TransformersGenerator, "_generate", tight)
    completions = TransformersGenerator(policy, 8)(ids(policy) * 4, SAMPLING, seed=0)
    assert all(completions)
    assert sizes[:3] == [8, 4, 2]
    monkeypatch.setattr(
        generation.TransformersGenerator, "_generate", lambda *_: (_ for _ in ()).throw(RuntimeError("x"))
    )
    with pytest.raises(RuntimeError, match="x"):
        TransformersGenerator(policy, 8)(ids(policy), SAMPLING, seed=0)


@torch.no_grad()
def test_log_probs_are_those_of_a_loop_without_padding(policy: Policy) -> None:
    completions = [[5, 6, 7, 1], [8, 1], [9, 10, 11]]
    batched, mask_KT = completion_logprobs(policy.model, ids(policy), completions, temperature=0.7)
    assert mask_KT.sum(dim=1).tolist() == [4, 2, 3]
    for row, (prompt, completion) in enumerate(zip(ids(policy), completions, strict=True)):
        logits = policy.model(input_ids=torch.tensor([prompt + completion])).logits[0].double() / 0.7
        for t, token in enumerate(completion):
            expected = torch.log_softmax(logits[len(prompt) + t - 1], dim=-1)[token]
            assert float(batched[row, t]) == pytest.approx(float(expected), abs=2e-5)
    assert float(batched[~mask_KT].abs().sum()) == 0
    stored = behaviour_logprobs(policy, ids(policy), completions, 0.7, batch_tokens=1)
    assert [len(row) for row in stored] == [4, 2, 3]
    assert stored[0] == pytest.approx(batched[0, :4].tolist(), abs=2e-5)


def small() -> Config:
    return load_config("quickstart", SMALL)


def test_collection_stores_what_it_says_and_resumes_at_any_shard(policy: Policy, tmp_path: Path) -> None:
    prompts = checked_prompts(small()).rows
    counts, details = sample_prompts(small(), policy, JUDGE, Ledger(tmp_path / "ledger.jsonl"), prompts, tmp_path)
    table = read_trajectories(tmp_path)
    rows = table["train"].to_pylist()
    assert sorted(table) == ["train", "validation/sum"]
    assert len(rows) == 48 * 8
    assert sum(counts.values()) == 48 * 8 + 6 * 8
    answers = {row["prompt_id"]: row for row in prompts}
    for row in rows:
        assert len(row["behaviour_logprobs"]) == len(row["completion_ids"])
        assert max(row["behaviour_logprobs"]) <= 0
        assert row["reward"] == float(
            row["completion"].rpartition("answer")[2].split() == answers[row["prompt_id"]]["answer"].split()
        )
        assert policy.tokenizer.decode(row["prompt_ids"]) == json.loads(answers[row["prompt_id"]]["messages"])
    assert details["generated_tokens"] == sum(len(r["completion_ids"]) for t in table.values() for r in t.to_pylist())

    parts = sorted(tmp_path.glob("part-*.parquet"))
    before = {part.name: part.read_bytes() for part in parts}
    parts[1].unlink()
    sample_prompts(small(), policy, JUDGE, Ledger(tmp_path / "ledger.jsonl"), prompts, tmp_path)
    assert {part.name: part.read_bytes() for part in sorted(tmp_path.glob("part-*.parquet"))} == before


def test_a_shard_of_other_prompts_is_refused(policy: Policy, tmp_path: Path) -> None:
    prompts = checked_prompts(small()).rows
    sample_prompts(small(), policy, JUDGE, Ledger(tmp_path / "ledger.jsonl"), prompts, tmp_path)
    part = sorted(tmp_path.glob("part-train-*.parquet"))[0]
    (tmp_path / sorted(tmp_path.glob("part-train-*.parquet"))[1].name).write_bytes(part.read_bytes())
    with pytest.raises(ArtifactError, match="other prompts"):
        sample_prompts(small(), policy, JUDGE, Ledger(tmp_path / "ledger.jsonl"), prompts, tmp_path)
    assert read_table(part, TRAJECTORIES).num_rows == 16 * 8


def test_prompts_beyond_where_rotary_positions_change_are_left_out_of_a_run_that_scores() -> None:
    config = load_config("quickstart", SMALL)
    policy = load_policy(config.policy)
    prompts = checked_prompts(config).rows
    lengths = [len(ids) for shard in plan(config, policy, prompts)[0] for ids in shard.prompt_ids]
    rotary: Any = policy.model.get_submodule("model.rotary_emb")
    rotary.rope_type, bound = "dynamic", max(lengths) - 1 + config.collect.max_completion_length
    rotary.original_max_seq_len = bound
    shards, too_long = plan(config, policy, prompts)
    assert len(too_long) == lengths.count(max(lengths))
    assert sum(len(shard.prompts) for shard in shards) == len(lengths) - len(too_long)
    by_length = load_config("quickstart", [*SMALL, "select.strategy={type: random}"])
    assert plan(by_length, policy, prompts)[1] == []
    rotary.original_max_seq_len = config.collect.max_completion_length
    with pytest.raises(DataError, match="rotary positions"):
        plan(config, policy, prompts)


def test_a_strategy_that_reads_no_trajectories_collects_none(policy: Policy, tmp_path: Path) -> None:
    config = load_config("quickstart", [*SMALL, "select.strategy=similarity"])
    prompts = checked_prompts(config).rows
    endless = prompts[0] | {"messages": json.dumps("sum mod 7 : " + "3 " * 4000 + "=")}
    ledger = Ledger(tmp_path / "ledger.jsonl")
    counts, details = sample_prompts(config, policy, JUDGE, ledger, [endless, *prompts[1:]], tmp_path)
    assert counts == {"prompt_too_long": 1}
    assert details["too_long"] == [prompts[0]["prompt_id"]]
    assert not list(tmp_path.glob("part-*"))
    assert not ledger.entries()
