"""Scores of a policy whose parameters are sharded over processes are those of the whole policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from tests.gradients.architectures import BUILDERS, SETTINGS, draw_group
from tests.gradients.ranks import as_accelerate_does, by_blocks, by_modules, whole_numbers
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from cropi.errors import PolicyError
from cropi.functional.projection import SparseProjection
from cropi.gradients.capture import FactorReader
from cropi.gradients.engine import Engine, segment_of
from cropi.gradients.groups import Group
from cropi.gradients.influence_scorer import Scorer, ScorerOptions, score_by_halves
from cropi.gradients.packing import Span
from cropi.policy import weights_identity

TRAIN = [draw_group(2 + n, [3 + n, 9 - n, 5], seed=80 + n, on_policy=n == 2) for n in range(5)]
VALIDATION = {
    "three": [draw_group(5, [7, 4, 6], seed=50 + n) for n in range(3)],
    "one": [draw_group(4, [3, 8], seed=60)],
}
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


@dataclass(frozen=True)
class Question:
    """A policy, how it is sharded, and what is asked of it."""

    policy: str
    style: Callable[..., Any] = by_blocks
    estimator: str = "sketch"
    score: str = "dot"
    first: int = 4
    """How many of the train groups the first process has; the last one has the others."""
    errors: bool = False
    batch_tokens: int = 40
    scorer: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


QUESTIONS = {
    "llama_accelerate": Question("llama", as_accelerate_does, score="cosine", errors=True),
    "llama_modules": Question("llama", by_modules, score="cosine", first=2),
    "tied_accelerate": Question("llama_tied", as_accelerate_does, estimator="exact", first=5),
    "qwen2": Question("qwen2", as_accelerate_does, scorer={"validation_mean": "normalized"}),
    "gpt_neox": Question("gpt_neox", as_accelerate_does, score="gain", batch_tokens=1000),
    "lora": Question("llama_lora", score="cosine", errors=True, first=0),
    "uniform": Question("qwen2", scorer={"projection": SparseProjection(dim=128, keep_fraction=0.3, mask="uniform")}),
}


def scorer_of(question: Question, model: nn.Module) -> Scorer:
    options = {"projection": SparseProjection(dim=128, keep_fraction=0.3)} | question.scorer
    settings = dataclasses.replace(SETTINGS, **question.settings)
    names: dict[str, Any] = {"estimator": question.estimator, "score": question.score}
    return Scorer(model, settings, ScorerOptions(batch_tokens=question.batch_tokens, **names, **options))


def answer(question: Question, model: nn.Module, groups: Sequence[Group]) -> dict[str, Any]:
    scorer = scorer_of(question, model)
    scorer.aim(VALIDATION)
    scored = score_by_halves(scorer, groups) if question.errors else scorer(groups)
    return {
        "values": scorer.values(scored),
        "errors": scored.errors_NV,
        "norms": scored.norms_N,
        "features": scored.features_ND,
        "facts": np.array([one.columns for one in scored.ratios]).reshape(-1, 3),
        "cosines": scorer.direction_cosines(),
        "reliability": list(scorer.direction_reliability.values()),
    }


def share(question: Question, mesh: DeviceMesh) -> Sequence[Group]:
    return TRAIN if mesh.size() == 1 else TRAIN[question.first :] if mesh.get_rank() else TRAIN[: question.first]


def ask(question: Question, mesh: DeviceMesh) -> dict[str, Any]:
    """In one of the processes."""
    return answer(question, question.style(BUILDERS[question.policy](), mesh), share(question, mesh))


def joined(parts: Sequence[dict[str, Any]], key: str) -> Any:
    """Of several processes, in order."""
    found = [part[key] for part in parts if part[key] is not None]
    return torch.cat(found) if isinstance(found[0], Tensor) else np.concatenate(found)


# What is asked of two processes.


def blocks_of_any_number(mesh: DeviceMesh) -> np.ndarray:
    """The first process asks three times, with no group once, the second not at all."""
    scorer = scorer_of(QUESTIONS["qwen2"], by_blocks(BUILDERS["qwen2"](), mesh))
    scorer.aim(VALIDATION)
    calls = [] if mesh.get_rank() else [TRAIN[:2], [], TRAIN[2:]]
    with scorer.lockstep():
        return np.concatenate([np.zeros((0, 2)), *(scorer.values(scorer(groups)) for groups in calls)])


def copied_and_sharded(mesh: DeviceMesh) -> dict[str, Any]:
    """Hybrid sharding: every process has all of the parameters, in parts of one, and need not wait for another."""
    question = QUESTIONS["llama_modules"]
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "parts"))
    return answer(question, by_blocks(BUILDERS["llama"](), mesh), TRAIN[:4] if mesh.get_coordinate()[0] else TRAIN[4:])


def identity(style: Callable[..., Any], mesh: DeviceMesh) -> str:
    return weights_identity(style(BUILDERS["qwen2"](), mesh))


def aim_in_lockstep(mesh: DeviceMesh) -> str:
    scorer = scorer_of(QUESTIONS["llama_modules"], by_blocks(BUILDERS["llama"](), mesh))
    with pytest.raises(ValueError, match="inside lockstep") as caught, scorer.lockstep():
        scorer.aim(VALIDATION)
    return str(caught.value)


class Watch(FactorReader):
    """Notes how many numbers of the parameters are in memory while gradients come in."""

    def __init__(self, model: nn.Module) -> None:
        self._model, self.seen = model, list[int]()

    def linear(self, name: str, inputs_TI: Tensor, grads_TO: Tensor, spans: Sequence[Span]) -> None:
        self.seen.append(whole_numbers(self._model))


def memory(style: Callable[..., Any], mesh: DeviceMesh) -> dict[str, Any]:
    model = BUILDERS["llama"]()
    parameters = sum(p.numel() for p in model.parameters())
    layer = sum(p.numel() for p in model.base_model.layers[0].parameters())
    model = style(model, mesh)
    segment = segment_of(0, TRAIN[0], SETTINGS)
    watch, forward = Watch(model), list[int]()
    engine = Engine(model, SETTINGS, batch_tokens=40)
    after_init = whole_numbers(model)
    for block in model.base_model.layers:
        block.mlp.register_forward_hook(lambda *_: forward.append(whole_numbers(model)))
    engine.run([segment], watch)
    with torch.no_grad():
        engine.forward_only([segment])
    return {
        "parameters": parameters,
        "layer": layer,
        "layers": len(model.base_model.layers),
        "outside": [after_init, whole_numbers(model)],
        "after_layers": forward,
        "inside": forward + watch.seen,
        "sharded": all(isinstance(p, DTensor) for p in model.parameters()),
    }


def training_after_scoring(
    style: Callable[..., Any], policy: str, precision: MixedPrecisionPolicy | None, mesh: DeviceMesh
) -> dict[str, Tensor]:
    """Gradients of a training step, whole."""
    model = BUILDERS[policy]()
    model = style(model if precision is None else model.float(), mesh, precision).train()
    scorer = scorer_of(QUESTIONS["llama_modules"], model)
    scorer.aim(VALIDATION)
    scorer(TRAIN if mesh.get_rank() else [])
    assert model.training
    loss_of(model).backward()
    return {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}


def loss_of(model: Any) -> Tensor:
    ids = torch.tensor([TRAIN[0].prompt_ids + TRAIN[0].completions[0]])
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def in_bfloat16(style: Callable[..., Any], mesh: DeviceMesh) -> dict[str, Any]:
    question = Question("qwen2", score="cosine")
    return answer(question, style(BUILDERS["qwen2"]().float(), mesh, BFLOAT16), share(question, mesh))


STYLES = {"blocks": by_blocks, "accelerate": as_accelerate_does, "modules": by_modules}
TRAINED = [("llama", "modules", by_modules), ("qwen2", "accelerate", as_accelerate_does)]
CASES: dict[str, Callable[[DeviceMesh], Any]] = {
    **{f"score/{name}": partial(ask, question) for name, question in QUESTIONS.items()},
    "calls": blocks_of_any_number,
    "aim": aim_in_lockstep,
    "hybrid": copied_and_sharded,
    **{f"identity/{name}": partial(identity, style) for name, style in STYLES.items()},
    **{f"memory/{name}": partial(memory, style) for name, style in STYLES.items()},
    **{f"bfloat16/{name}": partial(in_bfloat16, style) for name, style in STYLES.items()},
    **{
        f"training/{policy}/{name}/{kind}": partial(training_after_scoring, style, policy, precision)
        for policy, name, style in TRAINED
        for kind, precision in (("float64", None), ("mixed", BFLOAT16))
    },
}


Found = Callable[[str], list[Any]]


@pytest.mark.parametrize("name", QUESTIONS)
def test_two_processes_find_what_one_does(name: str, of_two: Found) -> None:
    question, parts = QUESTIONS[name], of_two(f"score/{name}")
    expected = answer(question, BUILDERS[question.policy](), TRAIN)
    assert len(parts[0]["values"]) == question.first
    for key in ("values", "norms", "facts", "errors", "features"):
        if expected[key] is not None:
            np.testing.assert_allclose(joined(parts, key), expected[key], rtol=1e-7, atol=1e-9, err_msg=key)
    for part in parts:
        np.testing.assert_allclose(part["cosines"], expected["cosines"], rtol=1e-9)
        np.testing.assert_allclose(part["reliability"], expected["reliability"], rtol=1e-7)


def test_processes_may_ask_any_number_of_times(of_two: Found) -> None:
    question = QUESTIONS["qwen2"]
    expected = answer(question, BUILDERS["qwen2"](), TRAIN)["values"]
    first, second = of_two("calls")
    np.testing.assert_allclose(first, expected, rtol=1e-7)
    assert second.shape == (0, 2)


def test_copies_of_sharded_parameters_go_their_own_way(of_two: Found) -> None:
    expected = answer(QUESTIONS["llama_modules"], BUILDERS["llama"](), TRAIN)["values"]
    first, second = of_two("hybrid")
    np.testing.assert_allclose(np.concatenate([second["values"], first["values"]]), expected, rtol=1e-7)


def test_directions_are_not_made_in_lockstep(of_two: Found) -> None:
    of_two("aim")


@pytest.mark.parametrize("style", STYLES)
def test_a_sharded_policy_has_the_identity_of_the_whole(style: str, of_two: Found) -> None:
    assert set(of_two(f"identity/{style}")) == {weights_identity(BUILDERS["qwen2"]())}


@pytest.mark.parametrize("style", STYLES)
def test_only_what_runs_is_whole(style: str, of_two: Found) -> None:
    for seen in of_two(f"memory/{style}"):
        half = seen["parameters"] / 2
        assert seen["sharded"]
        assert max(seen["outside"]) == pytest.approx(half, rel=0.02)
        # A layer that runs, and what does not belong to any layer, are whole. Of the other layers there are parts.
        others = (seen["layers"] - 1) * seen["layer"] / 2
        assert max(seen["inside"]) <= seen["parameters"] - others * 0.98
        assert len(seen["inside"]) > 2 * seen["layers"]
        if style == "modules":  # norms among them, whose weights the engine replaces while they run
            assert set(seen["after_layers"]) == set(seen["outside"])


@pytest.mark.parametrize("style", STYLES)
def test_mixed_precision_is_close_to_a_policy_in_bfloat16(style: str, of_two: Found) -> None:
    model = BUILDERS["qwen2"]().float()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    question = Question("qwen2", score="cosine")
    expected = answer(question, model, TRAIN)
    parts = of_two(f"bfloat16/{style}")
    np.testing.assert_allclose(joined(parts, "values"), expected["values"], atol=0.02)
    exact = answer(question, BUILDERS["qwen2"](), TRAIN)
    assert np.abs(joined(parts, "values") - exact["values"]).max() > 1e-5  # it did compute in bfloat16
    features = joined(parts, "features")
    assert float((features - expected["features"]).norm() / expected["features"].norm()) < 0.05


@pytest.mark.parametrize(("policy", "style"), [case[:2] for case in TRAINED])
def test_scoring_leaves_a_policy_that_trains_as_before(policy: str, style: str, of_two: Found) -> None:
    model = BUILDERS[policy]().train()
    loss_of(model).backward()
    for gradients in of_two(f"training/{policy}/{style}/float64"):
        assert gradients.keys() == {name for name, _ in model.named_parameters()}
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad)
    for gradients in of_two(f"training/{policy}/{style}/mixed"):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad.float(), rtol=0.1, atol=0.1)


EVERY = [(policy, "blocks") for policy in BUILDERS]
SOME = [(policy, style) for policy in ("llama", "qwen2", "llama_lora") for style in ("accelerate", "modules")]


@pytest.mark.parametrize(("policy", "style"), EVERY + SOME)
def test_one_process_finds_the_same_bits(policy: str, style: str, alone: DeviceMesh) -> None:
    question = Question(policy, STYLES[style], score="cosine")
    whole, sharded = answer(question, BUILDERS[policy](), TRAIN), ask(question, alone)
    for key in ("values", "norms", "features", "cosines"):
        assert np.array_equal(sharded[key], whole[key]), key


def test_the_reference_estimator_refuses_sharded_parameters(alone: DeviceMesh) -> None:
    with pytest.raises(PolicyError, match="use sketch or exact"):
        Scorer(by_blocks(BUILDERS["llama"](), alone), SETTINGS, ScorerOptions(estimator="reference"))


def test_running_out_of_memory_is_an_error(alone: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes would wait for ever for the pass that was broken off."""
    engine = Engine(by_blocks(BUILDERS["llama"](), alone), SETTINGS, batch_tokens=40)

    class Greedy(FactorReader):
        def linear(self, *_: Any) -> None:
            raise torch.OutOfMemoryError

    segments = [segment_of(0, group, SETTINGS) for group in TRAIN]
    with pytest.raises(PolicyError, match=r"(?s)score.batch_tokens.*set it to 20 or less"):
        engine.run([segment for segment in segments if segment], Greedy())
