"""Influence in the packed step of the SmolLM2 example, and its runs, on the built-in policy and random ones."""

import json
import sys
from pathlib import Path
from typing import Any

import compare
import compare_table
import numpy as np
import pytest
import torch
from grpo import Group, Policy
from influence import SET, PackedPass, read
from tests.examples.sampled_groups import groups_of
from tests.gradients.test_reading import directions_for, inner

from cropi.functional.surrogate import group_advantages
from cropi.gradients.direction import DirectionSketch
from cropi.gradients.groups import SurrogateSettings
from cropi.gradients.training_influence import Reader
from cropi.lab.compare.comparison_summary import summarise
from cropi.lab.compare.paired_runs import read_traces
from cropi.lab.compare.result_table import read_results
from cropi.rollouts.generation import Sampling
from cropi.stages.validation_pass import SampledGroup, ValidationPass, ValidationPrompt

LONGEST = 12


@pytest.fixture
def policy(folder: Path) -> Policy:
    return Policy(folder, learning_rate=1e-3, longest=LONGEST, seed=0, bf16=False)


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
    groups, directions = groups_of(policy, 3), directions_for(policy.model, rank=3)
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
            gradients = {name: parameter.grad for name, parameter in policy.model.named_parameters()}
            expected_products = [inner(direction, gradients) for direction in directions]
            assert found[n][half] == pytest.approx(expected_products, rel=1e-3, abs=1e-5)
    assert [bool(found[n].any()) for n in range(len(groups))] == [group.is_mixed for group in groups]


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


# Whole runs


def arguments_of(folder: Path, data: Path, output: Path, way: str, **changed: Any) -> list[str]:
    settings = {"model": folder, "data": data, "output": output, "way": way, "seed": 7, "prompts": 4, "steps": 4}
    settings |= {"longest": 6, "every": 2} | changed
    return ["compare.py", *(f"--{name}={value}" for name, value in settings.items())]


def log_of(output: Path, way: str) -> list[dict[str, Any]]:
    lines = (output / "niche" / f"{way}-7" / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


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
        assert validation["completions"] == 2 * 4 * 8
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
