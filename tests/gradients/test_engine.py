"""The engine as a guest of the model: what it leaves behind, what it does when memory runs out, and what it computes at
all."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import pytest
import torch
from tests.gradients.architectures import (
    GROUPS,
    SETTINGS,
    dense_gradients,
    draw_group,
    relative_gap,
    segments,
    tiny,
    tiny_lora,
)
from tests.gradients.footprint import check_unchanged, state
from torch import Tensor, nn

from cropi.errors import PolicyError
from cropi.functional.projection import SparseProjection
from cropi.gradients import engine as engine_module
from cropi.gradients.capture import FactorReader
from cropi.gradients.engine import Engine, Work, segment_of
from cropi.gradients.exact import DenseReader, ExactReader
from cropi.gradients.groups import Group
from cropi.gradients.influence_scorer import Scorer, ScorerOptions
from cropi.gradients.reference import trainable_parameters
from cropi.gradients.sketch import SketchReader, UniformMap

MANY = [draw_group(5, [8, 6, 7], seed=40 + number) for number in range(4)]
"""Each 23 tokens."""


def half_frozen() -> nn.Module:
    """Only some weights are trained: a bias without its weight, a norm, the head."""
    model = tiny("qwen2", tie_word_embeddings=False)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or "norm" in name or "lm_head" in name)
    return model


def in_training() -> nn.Module:
    """In training mode, with gradients that an optimizer is still to use."""
    model = tiny("gemma3").train()
    for parameter in list(model.parameters())[::2]:
        parameter.grad = torch.randn_like(parameter)
    return model


def partly_in_training() -> nn.Module:
    """A part may be in evaluation mode, so that its dropout is off."""
    model = tiny("gemma3").train()
    model.model.layers[0].mlp.eval()
    return model


class ScaleAndShift(nn.Module):
    """A norm of one's own, of which only the scale is trained."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(size, dtype=torch.float64) + 0.5)
        self.shift = nn.Parameter(torch.rand(size, dtype=torch.float64), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.scale * hidden / hidden.norm(dim=-1, keepdim=True) + self.shift


def norm_trained_in_part() -> nn.Module:
    """Its parameters keep their order while one of them is replaced."""
    model = tiny("llama")
    model.model.norm = ScaleAndShift(16)
    return model


def checkpointed() -> nn.Module:
    """As a trainer leaves it that saves memory."""
    model = tiny("llama").train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    return model


GUESTS: dict[str, Callable[[], Any]] = {
    "llama": lambda: tiny("llama"), "eager": lambda: tiny("gemma2"), "half frozen": half_frozen,
    "in training": in_training, "partly in training": partly_in_training, "adapters": tiny_lora,
    "a norm trained in part": norm_trained_in_part, "checkpointed": checkpointed,
}  # fmt: skip


@pytest.fixture(params=GUESTS)
def model(request: pytest.FixtureRequest) -> Any:
    return GUESTS[request.param]()


def test_precision_that_a_trainer_wraps_around_a_model_is_left_out() -> None:
    """As accelerate does: the forward pass of the object, not of its class."""
    plain, wrapped = tiny("llama").float(), tiny("llama").float()
    wrapped.forward = torch.autocast("cpu", torch.bfloat16)(wrapped.forward)
    scorers = [
        Scorer(model, SETTINGS, ScorerOptions(projection=SparseProjection(dim=64))) for model in (plain, wrapped)
    ]
    for scorer in scorers:
        scorer.aim({"all": GROUPS})
    assert torch.equal(*(scorer.features_VD for scorer in scorers))
    assert "forward" in wrapped.__dict__


def test_the_model_is_left_as_it_was_found(model: Any) -> None:
    before = state(model)
    engine = Engine(model, SETTINGS, 40)
    check_unchanged(model, before)
    engine.run(segments(GROUPS), DenseReader(engine.parameters, engine.vocabulary))
    check_unchanged(model, before)
    engine.forward_only(segments(GROUPS))
    check_unchanged(model, before)


def test_what_was_frozen_since_stays_frozen() -> None:
    model = tiny("llama")
    engine = Engine(model, SETTINGS, 40)
    model.model.embed_tokens.weight.requires_grad_(False)
    before = state(model)
    engine.run(segments(GROUPS), FactorReader())
    check_unchanged(model, before)


class Failing(FactorReader):
    """Raises when told of the n-th thing of a kind."""

    def __init__(self, kind: str) -> None:
        def fail(*_: Any) -> None:
            raise KeyError(kind)

        setattr(self, kind, fail)


@pytest.mark.parametrize("kind", ["begin", "linear", "rows", "vector", "commit"])
@pytest.mark.parametrize("guest", ["llama", "in training", "half frozen"])
def test_so_it_is_after_an_error_in_the_middle(guest: str, kind: str) -> None:
    model = GUESTS[guest]()
    engine = Engine(model, SETTINGS, 40)
    before = state(model)
    reader = Failing(kind)
    if kind == "rows" and guest == "half frozen":  # its embedding is not trained
        engine.run(segments(GROUPS), reader)
    else:
        with pytest.raises(KeyError, match=kind):
            engine.run(segments(GROUPS), reader)
    check_unchanged(model, before)


def test_so_it_is_after_an_error_of_the_model_itself() -> None:
    model = tiny("gemma3")
    engine = Engine(model, SETTINGS, 40)
    before = state(model)
    group = Group("p", [3, 4], [[5, 999, 6], [7]], [1.0, 0.0], None)  # a token that does not exist
    with pytest.raises(IndexError):
        engine.run([segment_of(0, group, SETTINGS)], DenseReader(engine.parameters, engine.vocabulary))
    check_unchanged(model, before)


def test_dropout_is_off() -> None:
    model = tiny("gpt_neox", attention_dropout=0.5, hidden_dropout=0.5).train()
    quiet = dense_gradients(copy.deepcopy(model).eval())
    assert all(torch.equal(gradient, quiet[name]) for name, gradient in dense_gradients(model).items())


# Running out of memory.


class Limited:
    """A reader that runs out of memory at one of its calls, wherever `fails` says so of the packs' tokens so far."""

    def __init__(
        self,
        reader: Any,
        fails: Callable[[list[int]], bool] = lambda packs: False,
        kind: str = "linear",
        error: type[Exception] = torch.OutOfMemoryError,
    ) -> None:
        self.reader, self.fails, self.kind, self.error = reader, fails, kind, error
        self.row_bytes = reader.row_bytes
        self.packs: list[int] = []

    def __getattr__(self, kind: str) -> Any:
        def call(*args: Any) -> Any:
            if kind == "begin":
                self.packs.append(sum(segment.tokens for segment in args[0]))
            if f"before {kind}" == self.kind and self.fails(self.packs):
                raise self.error("DefaultCPUAllocator: not enough memory")
            result = getattr(self.reader, kind)(*args)
            if kind == self.kind and self.fails(self.packs):
                raise self.error("DefaultCPUAllocator: not enough memory")
            return result

        return call


def larger_than(most: int) -> Callable[[list[int]], bool]:
    return lambda packs: packs[-1] > most


def readers(model: Any) -> dict[str, Callable[[], Any]]:
    parameters = trainable_parameters(model)
    direction = {name: torch.ones_like(p, requires_grad=False) for name, p in parameters.items()}
    sketch = UniformMap(SparseProjection(64, 0.5, mask="uniform"), parameters)
    return {
        "dense": lambda: DenseReader(parameters, Engine(model, SETTINGS, 1000).vocabulary),
        "exact": lambda: ExactReader([direction], len(MANY)),
        "norms": lambda: ExactReader([direction], len(MANY), norms=True),
        "sketch": lambda: SketchReader(sketch, len(MANY), torch.float64),
    }


def result(reader: Any) -> Tensor:
    match reader:
        case DenseReader():
            return torch.cat([gradient.reshape(-1) for gradient in reader.gradients.values()])
        case ExactReader():
            return torch.cat([reader.products_NV, reader.squares_N[:, None]], dim=1)
        case _:
            return reader.features_ND


def run_limited(reader: Limited, which: str, budget: int, **options: Any) -> tuple[Engine, Work]:
    """Run to the end through a reader that runs out of memory: the result is that of a run with plenty."""
    model = tiny("gpt_neox")
    plain = readers(model)[which]()
    expected = Engine(model, SETTINGS, 1000).run(segments(MANY), plain, divisible=which != "norms")
    engine = Engine(model, SETTINGS, budget)
    work = engine.run(segments(MANY), reader, divisible=which != "norms", **options)
    assert relative_gap(result(reader.reader), result(plain)) < 1e-12
    for row, moments in expected.ratios.items():  # what is thrown away does not count
        assert astuple(work.ratios[row]) == pytest.approx(astuple(moments))
    return engine, work


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("before begin", torch.OutOfMemoryError), ("begin", torch.OutOfMemoryError),
        ("linear", torch.OutOfMemoryError), ("rows", MemoryError), ("vector", RuntimeError),
    ],
)  # fmt: skip
@pytest.mark.parametrize("which", ["dense", "exact", "norms", "sketch"])
def test_running_out_of_memory_halves_the_packs_and_changes_no_result(which, kind, error, capsys):
    reader, told = Limited(readers(tiny("gpt_neox"))[which](), larger_than(30), kind, error), list[int]()
    engine, _ = run_limited(reader, which, 92, after=lambda members: told.append(len(members)))
    assert reader.packs[:3] == [92, 46, 23]
    assert engine.budget == 23
    assert sum(told) == len(MANY)
    warnings = [line for line in capsys.readouterr().err.splitlines() if "out of memory" in line]
    assert [tokens in line for line, tokens in zip(warnings, ("46 tokens", "23 tokens"), strict=True)] == [True] * 2


@pytest.mark.parametrize("which", ["dense", "exact", "sketch"])
def test_a_group_that_does_not_fit_is_divided_among_its_trajectories(which: str) -> None:
    run_limited(Limited(readers(tiny("gpt_neox"))[which](), larger_than(12)), which, 1000)


@pytest.mark.parametrize(
    ("which", "packs"), [("dense", [46, 46, 23, 23, 23, 23]), ("exact", [46, 46, 23, 23]), ("sketch", [46, 46, 23, 23])]
)
def test_running_out_of_memory_late_restarts_sums_and_goes_on_with_rows(which: str, packs: list[int]) -> None:
    reader = Limited(readers(tiny("gpt_neox"))[which](), lambda packs: len(packs) == 2, "rows")
    run_limited(reader, which, 46)
    assert reader.packs == packs


def test_what_is_undone_needs_no_memory_and_holds_none_of_the_pack() -> None:
    parameters = trainable_parameters(model := tiny("gpt_neox"))
    reader = Limited(DenseReader(parameters, set()), larger_than(30))
    before = [gradient.data_ptr() for gradient in reader.reader.gradients.values()]
    undone: list[BaseException | None] = []
    own = reader.reader.undo
    reader.undo = lambda: undone.append(sys.exception()) or own()
    Engine(model, SETTINGS, 46).run(segments(MANY), reader)
    assert undone == [None]  # an exception in hand keeps the pack's activations, by its traceback
    assert [gradient.data_ptr() for gradient in reader.reader.gradients.values()] == before


@pytest.mark.parametrize(("divisible", "what"), [(False, "3 trajectories of one prompt"), (True, "one trajectory")])
def test_what_cannot_be_divided_is_an_error(divisible: bool, what: str) -> None:
    model = tiny("gpt_neox")
    part = segments(MANY[:1])[0]
    engine = Engine(model, SETTINGS, 1000)
    before = state(model)
    with pytest.raises(PolicyError, match=f"(?s)device cpu: out of memory while scoring {what}.*Fix: free memory"):
        engine.run(
            [part.alone()[0] if divisible else part], Limited(FactorReader(), larger_than(0)), divisible=divisible
        )
    assert engine.budget == 1000
    check_unchanged(model, before)


def test_other_errors_are_not_taken_for_a_lack_of_memory() -> None:
    model = tiny("gpt_neox")

    class Broken(FactorReader):
        def linear(self, *_: Any) -> None:
            raise RuntimeError("shapes differ")

    engine = Engine(model, SETTINGS, 1000)
    with pytest.raises(RuntimeError, match="shapes differ"):
        engine.run(segments(MANY), Broken())
    assert engine.budget == 1000


def test_readers_that_hold_much_per_row_get_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for rows, packs in ((4, [92]), (2, [46, 46]), (1, [23] * 4), (0, [23] * 4)):
        reader = Limited(readers(tiny("gpt_neox"))["sketch"]())
        monkeypatch.setitem(engine_module.STAGED_BYTES, "cpu", rows * reader.row_bytes)
        run_limited(reader, "sketch", 1000)
        assert reader.packs == packs
        found.append(result(reader.reader))
    assert all(relative_gap(features, found[0]) < 1e-12 for features in found[1:])


def test_the_budget_follows_from_memory_where_none_is_given() -> None:
    assert 256 <= Engine(tiny("gpt_neox"), SETTINGS).budget <= 2048


# What is computed.


def tokens_seen(model: Any) -> list[int]:
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    return seen


MIXED = [
    Group("equal", [3, 4, 5], [[6, 7], [8]], [1.0, 1.0], None),
    Group("one in the middle", [3, 4, 5], [[6, 7], [8, 9, 10, 11], [9]], [1.0, 0.5, 0.0], None),
    Group("empty", [3, 4], [[], []], [1.0, 0.0], None),
    Group("one empty", [3, 4], [[5, 6, 7], []], [1.0, 0.0], None),
    Group("all", [3], [[5, 6, 7], [8, 9]], [1.0, 0.0], None),
]
KEPT = [(3, [2, 1]), (2, [3]), (1, [3, 2])]
"""Prompt and completion lengths of what has to be computed of these groups."""


def test_nothing_without_an_advantage_reaches_the_model() -> None:
    model = tiny("gpt_neox")
    engine = Engine(model, SETTINGS, 1000)
    seen = tokens_seen(model)
    work = engine.run(segments(MIXED), DenseReader(engine.parameters, engine.vocabulary))
    expected = sum(prompt + sum(length - 1 for length in lengths) for prompt, lengths in KEPT)
    assert work.tokens == sum(seen) == expected
    assert {row: moments.tokens for row, moments in work.ratios.items()} == {1: 3, 3: 3, 4: 5}
    assert work.of(0).effective_share == 1.0
    seen.clear()
    assert engine.run(segments(MIXED[:1]), FactorReader()).tokens == 0
    assert not seen


def test_a_prompt_is_computed_once_for_all_its_trajectories_unless_it_is_divided() -> None:
    model = tiny("gpt_neox")
    for budget, expected in ((1000, 23), (1, 15 + 3 * 5 + 3)):
        engine = Engine(model, SETTINGS, budget)
        seen = tokens_seen(model)
        work = engine.run(segments(MANY[:1]), FactorReader())
        assert work.tokens == sum(seen) == expected, budget


def test_factors_weigh_trajectories_and_leave_out_those_of_zero() -> None:
    model = tiny("gpt_neox")
    engine = Engine(model, SETTINGS, 1000)
    whole = segment_of(0, MANY[0], SETTINGS)
    part = segment_of(0, MANY[0], SETTINGS, [2.0, 0.0, -1.0])
    assert segment_of(0, MANY[0], SETTINGS, [0.0] * 3) is None
    assert part.scales == [2 * whole.scales[0], -whole.scales[2]]
    assert part.completions == [whole.completions[0], whole.completions[2]]
    gradients = []
    for piece in (part, whole.alone()[0], whole.alone()[2]):
        reader = DenseReader(engine.parameters, engine.vocabulary)
        engine.run([piece], reader)
        gradients.append(reader.gradients)
    for name, gradient in gradients[0].items():
        assert relative_gap(gradient, 2 * gradients[1][name] - gradients[2][name]) < 1e-12


def test_a_forward_pass_alone_gives_the_same_ratios() -> None:
    engine = Engine(tiny("gpt_neox"), SETTINGS, 25)
    full, alone = engine.run(segments(GROUPS), FactorReader()), engine.forward_only(segments(GROUPS))
    assert full.tokens == alone.tokens
    assert full.ratios.keys() == alone.ratios.keys()
    for row, moments in full.ratios.items():
        assert astuple(alone.ratios[row]) == pytest.approx(astuple(moments), rel=1e-12)
