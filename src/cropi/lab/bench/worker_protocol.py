"""The protocol of the benchmark and its workers: one JSON object a line on standard input and output.

The benchmark asks a worker to `prepare` once (imports and model load), then to `run` several times, for the `scores` of
the last run, and to `quit`. The answer to a question that fails is {"ok": false, "error": one line}.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import torch


@dataclass(frozen=True)
class WeightedGroup:
    """The trajectories of a prompt, whose gradient is sum_k weights_k sum_t grad log pi(x_{k,t})."""

    prompt_id: str
    prompt_ids: list[int]
    completions: list[list[int]]
    weights: list[float]

    @property
    def has_signal(self) -> bool:
        return any(self.weights)


@dataclass(frozen=True)
class Task:
    """The content of a `prepare` question."""

    model: str
    groups: list[WeightedGroup]
    validation: list[WeightedGroup]
    dtype: str = "float32"
    device: str = "cpu"
    batch_tokens: int = 1024
    threads: int = 1
    contender: str = ""


@dataclass(frozen=True)
class Part:
    """A part of a run with its own time."""

    seconds: float
    tokens_computed: int


@dataclass(frozen=True)
class Measurement:
    """One run: seconds of the computation, tokens that went through the model (padding included)."""

    seconds: float
    tokens_computed: int
    peak_gpu_mb: float | None
    parts: dict[str, Part] = field(default_factory=dict)
    """By name, if the engine times them separately."""


class Engine(Protocol):
    """A contender with its model loaded."""

    def run(self) -> Measurement:
        """Compute the features of all train and validation prompts, and keep them."""

    def scores_N(self) -> np.ndarray:
        """Dot product of each train prompt's feature with the mean of all validation prompts', from the last run."""


def serve(load: Callable[[Task], Engine]) -> None:
    """Answer questions until `quit` or the end of input."""
    answers = _claim_stdout()
    engine: Engine | None = None
    for line in sys.stdin:
        question = json.loads(line)
        if question["op"] == "quit":
            return
        try:
            if question["op"] == "prepare":
                engine, answer = _prepare(load, question)
            else:
                assert engine is not None, "not prepared"
                answer = _answer(engine, question)
        except Exception as error:  # the benchmark reports it
            answer = {"ok": False, "error": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(answer), file=answers, flush=True)


def _claim_stdout() -> TextIO:
    """Take standard output for answers, and send what libraries print there, from C too, to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def _prepare(load: Callable[[Task], Engine], question: Mapping[str, Any]) -> tuple[Engine, dict[str, Any]]:
    task = Task(
        **{key: value for key, value in question.items() if key not in {"op", "groups", "validation"}},
        groups=read_groups(Path(question["groups"])),
        validation=read_groups(Path(question["validation"])),
    )
    return load(task), {"ok": True}


def _answer(engine: Engine, question: Mapping[str, Any]) -> dict[str, Any]:
    match question["op"]:
        case "run":
            measured = engine.run()
            _release_gpu()
            return {
                "seconds": measured.seconds,
                "tokens_computed": measured.tokens_computed,
                "peak_rss_mb": _peak_rss_mb(),
                "peak_gpu_mb": measured.peak_gpu_mb,
                "parts": {name: asdict(part) for name, part in measured.parts.items()},
            }
        case "scores":
            with Path(question["path"]).open("wb") as file:
                np.save(file, engine.scores_N().astype(np.float64))
            return {"ok": True}
        case unknown:
            raise ValueError(f"no such question: {unknown}")


def _release_gpu() -> None:
    """Free PyTorch's cached GPU memory: other workers share the GPU."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def read_groups(path: Path) -> list[WeightedGroup]:
    """Groups from a JSONL file, in its order."""
    keys = WeightedGroup.__dataclass_fields__
    with path.open(encoding="utf-8") as file:
        return [WeightedGroup(**{key: row[key] for key in keys}) for row in map(json.loads, file)]


def _peak_rss_mb() -> float:
    """Peak resident memory of this program.

    On Linux `ru_maxrss` also remembers the process that started this one, so the kernel's own mark of this program's
    memory goes first.
    """
    status = Path("/proc/self/status")
    if status.exists():
        marks = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if marks:
            return int(marks[0]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1 << 20 if sys.platform == "darwin" else 1024)
