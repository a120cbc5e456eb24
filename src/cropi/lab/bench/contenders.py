"""Our own contenders: the influence engine as a user runs it, and the floors under it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cropi import __version__
from cropi.functional.projection import SparseProjection
from cropi.gradients.capture import NullReader
from cropi.gradients.engine import Engine, segment_of
from cropi.gradients.groups import Group
from cropi.gradients.influence_scorer import BLOCK, Scorer
from cropi.gradients.packing import Segment
from cropi.gradients.surrogate_weights import SurrogateSettings
from cropi.lab.bench.peers.wire import Engine as Contending
from cropi.lab.bench.peers.wire import Measurement, Part, Task, WeightedGroup
from cropi.lab.bench.profile import time_shares

SETS = 2
"""Validation sets: validation prompts take turns."""

BY_WEIGHT = SurrogateSettings(normalizer="constant", max_completion_length=1, advantage_std=False)
"""A_k / Z_k = (reward_k - mean) / K."""

SCORERS: dict[str, dict[str, Any]] = {
    "exact": {"estimator": "exact"},
    "exact-cosine": {"estimator": "exact", "score": "cosine"},
    "sketch": {"estimator": "sketch"},
    "sketch-uniform": {"estimator": "sketch", "projection": SparseProjection(mask="uniform", keep_fraction=0.1)},
    "reference": {"estimator": "reference"},
}


def contender(task: Task) -> Contending:
    """The contender that the task's options name, its model loaded."""
    from cropi.lab.bench.plain import Generation, Stock, Training

    torch.set_num_threads(task.threads)
    match task.options["contender"]:
        case "forward":
            return Floor(task, backward=False)
        case "floor":
            return Floor(task, backward=True)
        case "stock":
            return Stock(task)
        case "generate":
            return Generation(task)
        case "train":
            return Training(task)
        case name:
            return Influence(task, SCORERS[name])


def load_model(task: Task, **settings: Any) -> nn.Module:
    """The task's policy on its device, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    if task.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is available")
    settings |= {"dtype": getattr(torch, task.dtype), "trust_remote_code": False}
    model: Any = AutoModelForCausalLM.from_pretrained(task.model, **settings)
    return model.to(task.device).eval()


def as_group(group: WeightedGroup) -> Group:
    """The group to which `BY_WEIGHT` gives the very weights: rewards are (K + 1) times these, and an empty completion,
    which adds nothing, makes their mean zero."""
    rewards = [weight * (len(group.weights) + 1) for weight in group.weights]
    return Group(group.prompt_id, group.prompt_ids, [*group.completions, []], [*rewards, -sum(rewards)], None)


def segments_of(groups: Sequence[Group]) -> list[Segment]:
    """What has to be computed of some groups."""
    found = [segment_of(index, group, BY_WEIGHT) for index, group in enumerate(groups)]
    return [segment for segment in found if segment is not None]


class Meter:
    """Seconds, and tokens that go through a model, padding included, of the parts of a run."""

    def __init__(self, model: nn.Module) -> None:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        self._on_gpu = embeddings.weight.is_cuda
        self._tokens = 0
        self._parts: dict[str, Part] = {}
        embeddings.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._tokens += args[0].numel()

    def begin(self) -> None:
        """Forget the run before."""
        self._parts = {}
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block, to the end of what it left the GPU to do."""
        tokens, started = self._tokens, self._now()
        yield
        self._parts[name] = Part(self._now() - started, self._tokens - tokens)

    def _now(self) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def measurement(self) -> Measurement:
        """The run so far."""
        parts = self._parts.values()
        peak = torch.cuda.max_memory_allocated() / (1 << 20) if self._on_gpu else None
        return Measurement(sum(p.seconds for p in parts), sum(p.tokens_computed for p in parts), peak, self._parts)


class Unscored:
    """A contender that scores nothing."""

    version = f"cropi {__version__}"

    def scores_N(self) -> np.ndarray:
        raise ValueError("a floor scores nothing")


class Floor(Unscored):
    """Our packs through the model with nobody reading, forward alone or with the backward pass through activations."""

    def __init__(self, task: Task, *, backward: bool) -> None:
        model = load_model(task)
        self._engine = Engine(model, BY_WEIGHT, task.batch_tokens)
        self._groups, self._backward = [as_group(group) for group in task.groups], backward
        self._meter = Meter(model)

    def run(self) -> Measurement:
        """Train prompts, in the blocks that a scorer takes."""
        self._meter.begin()
        with self._meter.part("train"):
            self._pass()
        return self._meter.measurement()

    def profile(self) -> dict[str, float]:
        """Where the time of a run goes."""
        return time_shares(self._pass)

    def _pass(self) -> None:
        for start in range(0, len(self._groups), BLOCK):
            segments = segments_of(self._groups[start : start + BLOCK])
            if self._backward:
                self._engine.run(segments, NullReader())
            else:
                self._engine.forward_only(segments)


class Influence:
    """A `Scorer` aimed at the validation sets and asked about the train prompts, block by block, as `score` does."""

    version = f"cropi {__version__}"

    def __init__(self, task: Task, settings: dict[str, Any]) -> None:
        self._model, self._settings, self._task = load_model(task), settings, task
        self._groups = [as_group(group) for group in task.groups]
        validation = [as_group(group) for group in task.validation]
        self._validation = {str(v): validation[v::SETS] for v in range(SETS)}
        self._new_scorer()  # checks the architecture
        self._meter = Meter(self._model)

    def _new_scorer(self) -> Scorer:
        return Scorer(self._model, BY_WEIGHT, batch_tokens=self._task.batch_tokens, **self._settings)

    def run(self) -> Measurement:
        """Directions and scores, by a scorer of its own: making one belongs to starting up, and is not timed."""
        scorer = self._new_scorer()
        self._meter.begin()
        with self._meter.part("validation"):
            scorer.aim(self._validation)
        with self._meter.part("train"):
            self._products_NV = self._score(scorer)
        return self._meter.measurement()

    def profile(self) -> dict[str, float]:
        """Where the time of scoring the train prompts goes."""
        scorer = self._new_scorer()
        scorer.aim(self._validation)
        return time_shares(lambda: self._score(scorer))

    def _score(self, scorer: Scorer) -> np.ndarray:
        starts = range(0, len(self._groups), BLOCK)
        return np.concatenate([scorer(self._groups[start : start + BLOCK]).products_NV for start in starts])

    def scores_N(self) -> np.ndarray:
        """From <g_i, mean of set v>, the product with the mean over the prompts of all sets."""
        sizes_V = np.array([len(groups) for groups in self._validation.values()])
        return self._products_NV @ (sizes_V / sizes_V.sum())
