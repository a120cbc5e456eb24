"""`evaluate`: one row per test prompt, and accuracy by test set."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cropi.artifacts import EVALUATION, read_table
from cropi.config import EvaluateConfig
from cropi.console import warn
from cropi.errors import DataError
from cropi.functional.bootstrap import Interval, bootstrap_mean
from cropi.rewards.verdicts import Answered, Judge, answered, reward
from cropi.seeds import derived_seed
from cropi.workspace import evaluation_files, keep_evaluation
from cropi.world import ALONE, World

# (prompts as token ids, temperature or None for greedy, seed) -> completions as text
Generate = Callable[[Sequence[list[int]], float | None, int], list[str]]


@dataclass(frozen=True)
class Question:
    """One test question."""

    set: str
    row: Mapping[str, Any]  # of the prompt table
    prompt_ids: list[int]


def evaluate(
    prompts: Sequence[Question],
    generate: Generate,
    judge: Judge,
    config: EvaluateConfig,
    *,
    step: int,
    seed: int,
    folder: Path,
    block: int,
    lockstep: AbstractContextManager[None] = nullcontext(),  # noqa: B008
    world: World = ALONE,
    settings: Mapping[str, Any] | None = None,
) -> pa.Table:
    """Judge greedy and sampled completions of all test prompts and write `step-NNNNNN.parquet`.

    Questions are asked in blocks of `block`, the longest first, which are divided among the processes of `world`; what
    these do by themselves stands inside `lockstep`. The same seed draws the same completions from the same policy, so
    two policies are compared on the same questions and random numbers. Prompts whose gold answer cannot be read are
    left out of the file. `settings` go into the manifest.
    """
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place].prompt_ids))
    blocks = [order[start : start + block] for start in range(0, len(order), block)]
    own: dict[int, dict[str, Any] | None] = {}
    with lockstep:
        for number in world.share(range(len(blocks))):
            asked = [prompts[place] for place in blocks[number]]
            answers = _ask(asked, generate, judge, config, step, derived_seed(seed, number))
            own |= dict(zip(blocks[number], answers, strict=True))
    found = {place: row for part in world.gather(own) for place, row in part.items()}
    rows = [row for place in range(len(prompts)) if (row := found[place]) is not None]
    _refuse_empty(prompts, rows)
    if world.is_main:
        keep_evaluation(folder, step, rows, settings or {})
    return pa.Table.from_pylist(rows, schema=EVALUATION)


def _ask(
    prompts: Sequence[Question], generate: Generate, judge: Judge, config: EvaluateConfig, step: int, seed: int
) -> list[dict[str, Any] | None]:
    """A row for every question; None where the gold answer cannot be read."""
    texts = generate([prompt.prompt_ids for prompt in prompts], None, seed)
    sampled: list[list[float]] = [[] for _ in prompts]
    drawn: list[Answered] = []
    if config.samples:
        repeated = [prompt.prompt_ids for prompt in prompts for _ in range(config.samples)]
        texts_sampled = generate(repeated, config.temperature, seed)
        drawn = [answered(text, prompts[index // config.samples].row) for index, text in enumerate(texts_sampled)]
    judged = judge([*(answered(text, prompt.row) for text, prompt in zip(texts, prompts, strict=True)), *drawn])
    for index, judgement in enumerate(judged[len(prompts) :]):
        sampled[index // config.samples].append(reward(judgement.verdict) or 0.0)
    rows: list[dict[str, Any] | None] = []
    for prompt, text, values, judgement in zip(prompts, texts, sampled, judged, strict=False):
        row = {
            "set": prompt.set,
            "prompt_id": prompt.row["prompt_id"],
            "source": prompt.row["source"],
            "step": step,
            "greedy": reward(judgement.verdict),
            "sampled": float(np.mean(values)) if values else None,
            "samples": len(values),
            "completion": text,
            "verdict": judgement.verdict,
        }
        rows.append(None if row["greedy"] is None else row)
    return rows


def _refuse_empty(prompts: Sequence[Question], rows: Sequence[Mapping[str, Any]]) -> None:
    judged = {row["set"] for row in rows}
    for name in dict.fromkeys(prompt.set for prompt in prompts):
        if name not in judged:
            raise unreadable(name)
    if len(rows) < len(prompts):
        warn(f"{len(prompts) - len(rows)} test prompts have answers that the verifier cannot read and are left out")


def unreadable(name: str) -> DataError:
    """The error for a test set without any answer that the verifier can read."""
    return DataError(
        "the verifier can read none of the recorded answers of this test set",
        where=f"prompts.test.{name}",
        fix="choose another verifier, or mend the answers.",
    )


def accuracy(table: pa.Table, config: EvaluateConfig, *, seed: int) -> dict[str, dict[str, Interval]]:
    """Accuracy by test set: `greedy`, and `sampled` (avg@n) where there are samples, each with a bootstrap interval."""
    result: dict[str, dict[str, Interval]] = {}
    for name in dict.fromkeys(table.column("set").to_pylist()):
        rows = [row for row in table.to_pylist() if row["set"] == name]
        columns = {"greedy": [row["greedy"] for row in rows]}
        if all(row["sampled"] is not None for row in rows):
            columns["sampled"] = [row["sampled"] for row in rows]
        result[name] = {
            column: bootstrap_mean(np.array(values), redraws=config.bootstrap, confidence=config.confidence, seed=seed)
            for column, values in columns.items()
        }
    return result


def read_evaluations(folder: Path) -> dict[int, pa.Table]:
    """Tables by optimiser step, in ascending order."""
    return {step: read_table(path, EVALUATION) for step, path in evaluation_files(folder).items()}


def as_plain(accuracies: Mapping[str, Mapping[str, Interval]]) -> dict[str, Any]:
    """Accuracies as JSON values."""
    return {name: {kind: vars(interval) for kind, interval in kinds.items()} for name, kinds in accuracies.items()}
