"""The contenders, each in a process of its own: the influence engine as `score` uses it, and floors."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cropi.functional.projection import SparseProjection
from cropi.gradients.capture import FactorReader
from cropi.gradients.engine import Engine, segments_of
from cropi.gradients.groups import Group, SurrogateSettings
from cropi.gradients.influence_scorer import BLOCK, Scorer, ScorerOptions
from cropi.lab.bench.contender_task import Engine as Contending
from cropi.lab.bench.contender_task import Measurement, Part, Task, WeightedGroup

SETS = 2
"""Validation sets: validation prompts take turns."""

BY_WEIGHT = SurrogateSettings(normalizer="constant", max_completion_length=1, advantage_std=False)
"""A_k / Z_k = (reward_k - mean) / K."""

LOGITS_AT_ONCE = 1 << 31
"""Of a batch, whatever its tokens: 8 GiB in float32."""

OPTIONS: dict[str, dict[str, Any]] = {
    "exact": {"estimator": "exact"},
    "exact-cosine": {"estimator": "exact", "score": "cosine"},
    "sketch": {"estimator": "sketch"},
    "sketch-uniform": {"estimator": "sketch", "projection": SparseProjection(mask="uniform", keep_fraction=0.1)},
    "reference": {"estimator": "reference"},
}


_loaded: list[Contending] = []  # in this process


def prepare(task: Task) -> None:
    """Load the contender of this process."""
    _loaded[:] = [contender(task)]


def run() -> dict[str, Any]:
    """Measure the contender of this process, and the peak memory of the process."""
    measured = _loaded[0].run()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # other contenders share the GPU
    return asdict(measured) | {"peak_rss_mb": _peak_rss_mb()}


def scores() -> np.ndarray:
    """The scores of the last run."""
    return _loaded[0].scores_N()


def _peak_rss_mb() -> float:
    """Peak resident memory of this process.

    On Linux `ru_maxrss` also remembers the process that started this one, so the kernel's own mark of this program's
    memory goes first.
    """
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    if marks := [line.split()[1] for line in lines if line.startswith("VmHWM:")]:
        return int(marks[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1024)


def contender(task: Task) -> Contending:
    """Load the contender that the task's options name."""
    torch.set_num_threads(task.threads)
    match task.contender:
        case "forward":
            return Floor(task, backward=False)
        case "floor":
            return Floor(task, backward=True)
        case "stock":
            return Stock(task)
        case name:
            return Influence(task, OPTIONS[name])


def load_model(task: Task, **settings: Any) -> Any:
    """The task's policy on its device, in evaluation mode."""
    from transformers import AutoModelForCausalLM

    if task.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device is available")
    settings |= {"dtype": getattr(torch, task.dtype), "trust_remote_code": False}
    model = AutoModelForCausalLM.from_pretrained(task.model, **settings)
    return model.to(task.device).eval()


def as_group(group: WeightedGroup) -> Group:
    """The group to which `BY_WEIGHT` gives the very weights: rewards are (K + 1) times these, and an empty completion,
    which adds nothing, makes their mean zero."""
    rewards = [weight * (len(group.weights) + 1) for weight in group.weights]
    return Group(group.prompt_id, group.prompt_ids, [*group.completions, []], [*rewards, -sum(rewards)], None)


class Meter:
    """Meter for the parts of a run: seconds, and tokens through the model, padding included."""

    def __init__(self, model: nn.Module) -> None:
        embeddings = model.get_input_embeddings()  # type: ignore[operator]
        self._on_gpu = embeddings.weight.is_cuda
        self._tokens = 0
        self._parts: dict[str, Part] = {}
        embeddings.register_forward_pre_hook(self._count)

    def _count(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self._tokens += args[0].numel()

    def begin(self) -> None:
        """Start a new run."""
        self._parts = {}
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block, including the work it queued on the GPU."""
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

    def scores_N(self) -> np.ndarray:
        raise ValueError("a floor scores nothing")


class Floor(Unscored):
    """Pass our packs through the model without reading gradients: forward alone, or also backward to activations."""

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

    def _pass(self) -> None:
        for start in range(0, len(self._groups), BLOCK):
            segments = segments_of(self._groups[start : start + BLOCK], BY_WEIGHT)
            if self._backward:
                self._engine.run(segments, FactorReader())
            else:
                self._engine.forward_only(segments)


class Stock(Unscored):
    """Forward and backward to the embeddings' output, weights frozen."""

    def __init__(self, task: Task) -> None:
        self._model = load_model(task, attn_implementation="sdpa").requires_grad_(False)
        rows_BT = equal_rows(task)
        tokens = min(task.batch_tokens, LOGITS_AT_ONCE // self._model.config.vocab_size)
        self._batches: list[Tensor] = list(rows_BT.split(max(1, tokens // rows_BT.shape[1])))
        self._meter = Meter(self._model)

    def run(self) -> Measurement:
        """All rows, as many at once as `batch_tokens` allows."""
        self._meter.begin()
        with self._meter.part("train"):
            for rows_BT in self._batches:
                embedded = self._model.get_input_embeddings()(rows_BT).requires_grad_()
                self._loss(rows_BT, embedded).backward()
        return self._meter.measurement()

    def _loss(self, rows_BT: Tensor, embedded_BTD: Tensor) -> Tensor:
        """Cross-entropy summed over all tokens that have one before them."""
        logits_BTV = self._model(use_cache=False, inputs_embeds=embedded_BTD).logits[:, :-1]
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), rows_BT[:, 1:].flatten(), reduction="sum")


def equal_rows(task: Task) -> Tensor:
    """(rows, length) token ids: as many tokens as the packed train prompts have, in rows of their trajectories' mean
    length. The tokens are the trajectories', one after another."""
    segments = segments_of([as_group(group) for group in task.groups], BY_WEIGHT)
    sequences = [segment.prompt_ids + ids for segment in segments for ids in segment.completions]
    length = round(sum(map(len, sequences)) / len(sequences))
    rows = max(1, round(sum(segment.tokens for segment in segments) / length))
    stream = torch.tensor([i for sequence in sequences for i in sequence], device=task.device)
    return stream[: min(rows, len(stream) // length) * length].view(-1, length)


class Influence:
    """A `Scorer` aimed at the validation sets that scores the train prompts block by block, as `score` does."""

    def __init__(self, task: Task, settings: dict[str, Any]) -> None:
        self._model, self._settings, self._task = load_model(task), settings, task
        self._groups = [as_group(group) for group in task.groups]
        validation = [as_group(group) for group in task.validation]
        self._validation = {str(v): validation[v::SETS] for v in range(SETS)}
        self._new_scorer()  # checks the architecture
        self._meter = Meter(self._model)

    def _new_scorer(self) -> Scorer:
        options = ScorerOptions(batch_tokens=self._task.batch_tokens, **self._settings)
        return Scorer(self._model, BY_WEIGHT, options)

    def run(self) -> Measurement:
        """Compute directions and scores with a new scorer; making it is not timed."""
        scorer = self._new_scorer()
        self._meter.begin()
        with self._meter.part("validation"):
            scorer.aim(self._validation)
        with self._meter.part("train"):
            starts = range(0, len(self._groups), BLOCK)
            blocks = [scorer(self._groups[start : start + BLOCK]).products_NV for start in starts]
            self._products_NV = np.concatenate(blocks)
        return self._meter.measurement()

    def scores_N(self) -> np.ndarray:
        """From <g_i, mean of set v>, the product with the mean over the prompts of all sets."""
        sizes_V = np.array([len(groups) for groups in self._validation.values()])
        return self._products_NV @ (sizes_V / sizes_V.sum())
