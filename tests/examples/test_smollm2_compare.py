"""Influence in the packed step of the SmolLM2 example, and its runs, on the built-in policy and random ones."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.conftest import tiny_llama
from transformers import AutoTokenizer

from cropi.builtin import POLICY_DIR, generate

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples" / "smollm2"))

import compare
import compare_table
from grpo import Group, Policy, Question
from influence import SET, PackedPass, halves, read

from cropi.functional.surrogate import group_advantages
from cropi.gradients.direction import DirectionSketch
from cropi.gradients.groups import SurrogateSettings
from cropi.gradients.training_influence import Direction, LowRank, Reader
from cropi.lab.compare.comparison_summary import summarise
from cropi.lab.compare.paired_runs import read_traces
from cropi.lab.compare.result_table import read_results
from cropi.rollouts.generation import Sampling
from cropi.stages.validation_pass import SampledGroup, ValidationPass, ValidationPrompt

LONGEST = 12


def rows(count: int) -> list[dict[str, str]]:
    families = ("sum", "parity", "machine")
    return [row for family in families for row in generate(family, split="train", count=count, seed=0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random policy with tied embeddings."""
    tokenizer = AutoTokenizer.from_pretrained(POLICY_DIR)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 2048}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.02}
    model = tiny_llama(dtype=torch.float32, **sizes, bos_token_id=1, eos_token_id=2, pad_token_id=None)
    folder = tmp_path_factory.mktemp("policy")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def policy(folder: Path) -> Policy:
    return Policy(folder, learning_rate=1e-3, longest=LONGEST, seed=0, bf16=False)


def groups_of(policy: Policy, count: int, completions: int = 8) -> list[Group]:
    """Groups of several lengths; every third has equal rewards."""
    prompts = [policy.tokenizer(row["prompt"])["input_ids"] for row in rows(count)]
    sampled = policy.sample([Question("", "0", "", tuple(prompt)) for prompt in prompts], completions)
    return [
        replace(group, rewards=[float((n + k) % 3 == 0 and n % 3 > 0) for k in range(completions)])
        for n, group in enumerate(sampled)
    ]


def directions_of(model: Any) -> list[Direction]:
    generator = torch.Generator().manual_seed(1)

    def of(parameter: torch.Tensor) -> Any:
        if parameter.ndim == 1:
            return torch.randn(parameter.shape, generator=generator)
        left, right = ((parameter.shape[0], 3), (3, parameter.shape[1]))
        return LowRank(torch.randn(left, generator=generator), torch.randn(right, generator=generator))

    return [{name: of(p) for name, p in model.named_parameters()} for _ in range(2)]


def against(model: Any, direction: Direction) -> float:
    """<gradient of all parameters, direction>."""
    total = 0.0
    for name, parameter in model.named_parameters():
        part = direction[name]
        dense = part.left @ part.right if isinstance(part, LowRank) else part
        total += float((parameter.grad * dense).sum())
    return total


def surrogate(model: Any, group: Group, places: list[int]) -> torch.Tensor:
    """- sum_k A_k sum_t log pi / (K L) over some completions, one unpadded pass each."""
    weights, total = group_advantages(np.array(group.rewards)), torch.zeros(())
    for k in places:
        ids = torch.tensor([[*group.question.prompt, *group.completions[k]]])
        logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        own = logs.gather(1, ids[0, 1:, None])[-len(group.completions[k]) :]
        total = total - float(weights[k]) * own.sum()
    return total / (len(group.rewards) * LONGEST)


def test_halves_of_groups_are_read_as_autograd_has_them(policy: Policy) -> None:
    """Every parameter, the tied head included; and the gradient that is left is that of the step without reading."""
    groups, directions = groups_of(policy, 3), directions_of(policy.model)
    policy.accumulate(groups)
    expected_gradient = [p.grad.clone() for p in policy.model.parameters()]
    policy.optimizer.zero_grad()
    reader = Reader(policy.model, directions)
    found = read(policy, groups, reader, policy.model)
    for parameter, expected in zip(policy.model.parameters(), expected_gradient, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7)
    wrong, share = reader.exclude_unfaithful()
    assert wrong == []
    assert share == pytest.approx(1.0, abs=1e-6)
    for n, group in enumerate(groups):
        order = sorted(range(8), key=lambda k: (group.rewards[k], k))
        for half in (0, 1):
            policy.optimizer.zero_grad(set_to_none=False)
            surrogate(policy.model, group, order[half::2]).backward()
            expected_products = [against(policy.model, direction) for direction in directions]
            assert found[n][half] == pytest.approx(expected_products, rel=1e-3, abs=1e-5)
    assert [bool(found[n].any()) for n in range(len(groups))] == [group.is_mixed for group in groups]


def test_without_rows_the_tied_head_would_not_be_read(policy: Policy) -> None:
    """Why `log_probs` has `by_row`."""
    group = next(group for group in groups_of(policy, 3) if group.is_mixed)
    reader = Reader(policy.model, directions_of(policy.model))
    with reader.reading(torch.arange(1), policy.model):
        policy.backward([group.row], 1.0)
    reader.exclude_unfaithful()
    assert "model.embed_tokens.weight" not in reader.read_parameters


def test_the_packed_pass_is_cropi_s(policy: Policy) -> None:
    """Sketches, directions and influence of members: halves of groups in a row against a row for each completion."""
    members = [
        SampledGroup(n, group.question.prompt, group.completions, group.rewards)
        for n, group in enumerate(groups_of(policy, 4, completions=6))
    ]
    found = []
    for kind in (ValidationPass, PackedPass):
        one = kind(
            {SET: [ValidationPrompt({}, member.tokens) for member in members]},
            sampling=Sampling(LONGEST, 1.0),
            surrogate=SurrogateSettings("constant", LONGEST),
            batch_tokens=300,
            seed=lambda *_: 0,
        )
        if isinstance(one, PackedPass):
            one.bf16 = False
        one.differentiate(policy.model, {SET: members})  # members of the first round give nothing
        given, tokens, _ = one.differentiate(policy.model, {SET: members})
        found.append((given[SET], tokens, one.directions[SET].norm, one.sketches[SET].sums()))
    (own, tokens, norm, sums), (packed, packed_tokens, packed_norm, packed_sums) = found
    assert own.keys() == packed.keys() == {n for n, member in enumerate(members) if n % 3}
    for member, values in own.items():
        assert packed[member] == pytest.approx(values, rel=1e-3, abs=1e-6)
    assert packed_tokens == tokens
    assert packed_norm == pytest.approx(norm, rel=1e-3)
    for name, value in sums.items():
        torch.testing.assert_close(packed_sums[name], value, rtol=1e-3, atol=1e-6)
    assert isinstance(one.sketches[SET], DirectionSketch)


def test_halves_have_better_and_worse_completions() -> None:
    rewards = [1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    first, second = halves(3, (1, 2), [[k] for k in range(8)], rewards)
    assert {len(first.completions), len(second.completions)} == {4}
    assert sum(first.weights) + sum(second.weights) == pytest.approx(0, abs=1e-9)
    assert min(max(first.weights), max(second.weights)) > 0 > max(min(first.weights), min(second.weights))
    assert first.length == 12


# Whole runs


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pools of four kinds, whose targeted one is 'sum'."""
    folder = tmp_path_factory.mktemp("data")
    families = {"sum": SET, "parity": "letters", "machine": "divisors"}

    def write(name: str, split: str, count: int, kinds: list[str]) -> None:
        lines = [
            json.dumps({"question": row["prompt"], "answer": row["answer"], "source": families[family]})
            for family in kinds
            for row in generate(family, split=split, count=count, seed=0)
        ]
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    write("niche/train.jsonl", "train", 12, [*families])
    write("validation.jsonl", "validation", 6, ["sum"])
    write("test-targeted.jsonl", "test", 3, ["sum"])
    write("test-untargeted.jsonl", "test", 3, ["parity", "machine"])
    return folder


def arguments_of(folder: Path, data: Path, output: Path, way: str, **changed: Any) -> list[str]:
    settings = {"model": folder, "data": data, "output": output, "way": way, "seed": 7, "prompts": 4, "steps": 4}
    settings |= {"longest": 6, "every": 2} | changed
    return ["compare.py", *(f"--{name}={value}" for name, value in settings.items())]


def log_of(output: Path, way: str) -> list[dict[str, Any]]:
    lines = (output / "niche" / f"{way}-7" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.fixture
def easy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rewards that a random policy gets, and prompts without a chat template."""
    monkeypatch.setattr("grpo.is_correct", lambda text, answer: len(text) % 2 == 0)
    monkeypatch.setattr(Policy, "questions", questions)


def questions(policy: Policy, path: Path) -> list[Question]:
    found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    prompts = [tuple(policy.tokenizer(row["question"])["input_ids"]) for row in found]
    return [Question(r["question"], r["answer"], r["source"], p) for r, p in zip(found, prompts, strict=True)]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: Any, **changed: Any) -> None:
    monkeypatch.setattr(sys, "argv", arguments_of(*arguments, **changed))
    compare.main()


@pytest.mark.parametrize(
    "way",
    [
        *(pytest.param(way, marks=pytest.mark.slow) for way in ("learnability", "bmc-t")),
        "similarity-learnability",
        "cropi",
    ],
)
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(way, folder, data, tmp_path, easy, monkeypatch):
    """Killed in step 3, after a save at 2 with a batch that was chosen ahead."""
    run(monkeypatch, folder, data, tmp_path / "whole", way)
    step = compare.Comparison.step

    def killed(own: Any, number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt
        step(own, number)

    monkeypatch.setattr(compare.Comparison, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, folder, data, tmp_path / "parts", way)
    monkeypatch.setattr(compare.Comparison, "step", step)
    run(monkeypatch, folder, data, tmp_path / "parts", way)
    whole = log_of(tmp_path / "whole", way)
    assert log_of(tmp_path / "parts", way) == whole
    steps = [line for line in whole if "step" in line]
    assert [line["step"] for line in steps] == [0, 1, 2, 3]
    assert not (tmp_path / "whole" / "niche" / f"{way}-7" / "state.pt").exists()
    if way == "cropi":
        (validation,) = (line for line in whole if "validation" in line)
        assert validation["completions"] == 3 * 4 * 8
        assert steps[-1]["share_read"] == pytest.approx(1.0, abs=0.01)
        assert any(line["influence"] != [0.0] * 4 for line in steps)
        assert steps[0]["passes"]["train"] > 4 * steps[0]["train_tokens"]


def test_the_table_is_one_of_cropi_compare(folder, data, tmp_path, easy, monkeypatch, capsys):
    for way in ("full", "relevant", "cropi"):
        run(monkeypatch, folder, data, tmp_path, way)
    run(monkeypatch, folder, data, tmp_path, "full")  # finished: nothing is done
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["compare_table.py", str(tmp_path)])
    compare_table.main()
    shown = {line["way"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    assert shown["relevant"]["relevant_share"] == 1.0
    assert shown["cropi"]["passes_relative_to_training"].keys() == {"collect", "score"}
    table = read_results(tmp_path / "results.parquet")
    first, *_, last = (row for row in table.to_pylist() if row["strategy"] == "cropi" and row["targeted"])
    assert (first["step"], first["flops"], last["step"]) == (0, 0, 4)
    assert last["flops"] == pytest.approx(sum(last[f"{phase}_flops"] for phase in ("collect", "score", "train")))
    summary = summarise(read_traces(table))
    areas = {e["strategy"]: e["area"]["flops"]["mean"] for e in summary["entries"] if e["scenario"] == "niche"}
    assert areas.keys() == {"full", "relevant", "cropi"}
