"""A small finished run, fabricated by hand through the public writers."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.runs import trajectory

from cropi.artifacts import (
    NO_SIGNAL,
    OK,
    PROMPTS,
    SELECTION,
    TRAJECTORIES,
    TRUNCATED,
    count_status,
    finish,
    write_table,
)
from cropi.config import Config
from cropi.config.loading import validate_config
from cropi.run_folder import RunFolder
from cropi.run_tables import keep_evaluation, scores_schema
from cropi.stages.collect import _found, _summed
from cropi.streams import append_jsonl

BUILTIN = {"type": "builtin", "families": ["sum"], "count": 4}
SOURCES = ("sum", "swaps", "sort")
VALIDATION = ("alpha", "beta")

# Right and wrong answers by test set: `near` and `far` are targeted. Means of means: (near + far) / 2.
# The base policy starts at 0.125; training ends at 1.
BASE = {"near": "1000", "far": "00", "other": "10"}
WINNING = {2: ("1100", "10", "10"), 4: ("1110", "10", "10"), 6: ("1111", "10", "10"), 8: ("1111", "11", "10")}


@dataclass
class Fabrication:
    """Everything that can be varied about the fabricated run."""

    strategy: str = "influence"
    evaluations: Mapping[int, tuple[str, str, str]] = field(default_factory=lambda: WINNING)
    base: Mapping[str, str] | None = field(default_factory=lambda: dict(BASE))
    settings: Mapping[str, Any] = field(default_factory=dict)
    prompts: int = 12
    stages_scored: int = 2
    stages_selected: int = 2
    collected: bool = True
    trained: bool = True
    errors: bool = True  # whether standard errors were measured
    source_names: tuple[str, ...] = SOURCES
    prompt_text: str = "what is 1 + 1 ?"
    completion_text: str = "the answer is 2"


def make_config(folder: Path, made: Fabrication) -> Config:
    sources = {"sources": [BUILTIN]}
    test = {"near": sources, "far": sources, "other": {"targeted": False, **sources}}
    values: dict[str, Any] = {
        "name": "small",
        "run_dir": str(folder),
        "seed": 3,
        "policy": {"path": "builtin"},
        "prompts": {"train": [BUILTIN], "validation": {name: [BUILTIN] for name in VALIDATION}, "test": test},
        "verifier": {"type": "exact"},
        "collect": {"num_generations": 4, "max_completion_length": 8},
        "select": {"strategy": {"type": made.strategy}, "fraction": 0.25},
        "train": {"stages": 2, "steps_per_stage": 4},
        "evaluate": {"every": 2},
    }
    return validate_config(values | made.settings, "test")


def write_evaluation(folder: Path, step: int, answers: Mapping[str, str], completion: str = "2") -> None:
    rows = [
        {"set": name, "prompt_id": f"{name}-{number}", "source": "sum", "step": step, "greedy": float(right)}
        | {"sampled": None, "samples": 0, "completion": completion, "verdict": "correct" if right == "1" else "wrong"}
        for name, marks in answers.items()
        for number, right in enumerate(marks)
    ]
    keep_evaluation(folder, step, rows, {})


def train_rows(made: Fabrication) -> list[dict[str, Any]]:
    names, text = made.source_names, json.dumps(made.prompt_text)
    return [
        {"prompt_id": f"p{n:03}", "set": "train", "source": names[n % len(names)], "messages": text, "answer": "2"}
        for n in range(made.prompts)
    ]


def write_prompts(space: RunFolder, made: Fabrication) -> None:
    rows = train_rows(made)
    rows += [{**rows[0], "prompt_id": f"v-{name}", "set": f"validation/{name}"} for name in VALIDATION]
    write_table(space.prompts / "prompts.parquet", rows, PROMPTS)
    finish(space.prompts, "prompts", inputs={}, counts={"train": made.prompts})


def write_trajectories(space: RunFolder, made: Fabrication) -> None:
    """Four per prompt. Every third prompt is solved always: no signal. One completion of p000 is truncated."""
    rows = []
    for number, prompt in enumerate(train_rows(made)):
        for sample in range(4):
            right = number % 3 == 2 or sample < 2
            told = {"completion": made.completion_text, "verdict": "correct" if right else "wrong"}
            told |= {"completion_ids": [3, 4, 5], "behaviour_logprobs": [-0.5] * 3, "reward": float(right)}
            status = TRUNCATED if (number, sample) == (0, 3) else OK
            rows.append(trajectory(prompt["prompt_id"], sample=sample, prompt_ids=[1, 2], status=status, **told))
    write_table(space.trajectories / "part-train-00000.parquet", rows, TRAJECTORIES)
    counts = {"ok": len(rows) - 1, "prompt_too_long": 1, "truncated": 1}
    finish(space.trajectories, "trajectories", inputs={}, counts=counts, details=_summed([_found(rows)])[1])
    append_jsonl(space.folder / "ledger.jsonl", charge("collect", None, 10.0, tokens=144))


def charge(phase: str, stage: int | None, seconds: float, **more: int) -> dict[str, Any]:
    return {"phase": phase, "stage": stage, **more, "seconds": seconds}


def influence_of(number: int, stage: int, name: str) -> float:
    return math.sin(1.0 + number * 1.7 + stage + len(name)) * 10**-stage


def standard_error(stage: int, name: str) -> float:
    return {"alpha": 0.25, "beta": 0.5}[name] * 10**-stage


def reliability_of(made: Fabrication) -> dict[str, Any] | None:
    """Eight of twelve prompts have signal and three are selected: chance gives 3/8."""
    if not made.errors:
        return None
    return {"reliability": {"alpha": 0.5, "beta": 0.25}, "expected_overlap": 0.6, "chance": 0.375}


def drift_of(stage: int) -> dict[str, float]:
    return {"ratio_ess": 1 - 0.25 * stage, "clip_share": 0.125 * stage, "kl": 0.02 * stage}


def write_scores(space: RunFolder, made: Fabrication, stage: int) -> None:
    rows = []
    for number, prompt in enumerate(train_rows(made)):
        signal = number % 3 != 2
        chance = (1 / (number + 1) if signal else 0.0) if made.errors else None
        row = {"prompt_id": prompt["prompt_id"], "source": prompt["source"], "status": OK if signal else NO_SIGNAL}
        row |= {"pass_rate": 0.5 if signal else 1.0, "completion_tokens": 12, "feature_norm": 1.0}
        row |= drift_of(stage) if signal else dict.fromkeys(drift_of(stage))
        row |= {"top_probability": chance}
        for name in VALIDATION:
            row[f"influence/{name}"] = influence_of(number, stage, name) if signal else 0.0
            row[f"standard_error/{name}"] = standard_error(stage, name) if signal and made.errors else None
        rows.append(row)
    folder = space.stages.scores(stage)
    write_table(folder / "scores.parquet", rows, scores_schema(VALIDATION))
    details = {"reliability": reliability_of(made), "direction_reliability": {"alpha": 0.9, "beta": None}}
    details |= {"drift": drift_of(stage)}
    finish(folder, "scores", inputs={}, counts=count_status(row["status"] for row in rows), details=details)
    append_jsonl(space.folder / "ledger.jsonl", charge("score", stage, 3.0, tokens=100))


def write_selection(space: RunFolder, made: Fabrication, stage: int) -> None:
    """A quarter of the pool (all of it for `full`), taken in the pool's order from a place that moves on by stage."""
    prompts, strategy = train_rows(made), made.strategy
    scored = VALIDATION if strategy == "influence" else ()
    size = len(prompts) if strategy == "full" else len(prompts) // 4
    first = stage * (size // 3) if strategy == "influence" else 0
    order = [*prompts[first:], *prompts[:first]]
    rows = [
        {"prompt_id": prompt["prompt_id"], "source": prompt["source"], "selected": place < size, "rank": place + 1}
        | {"score": 1 / (place + 1), "scores": [(name, influence_of(place, stage, name)) for name in scored]}
        | {"pass_rate": 0.5, "status": OK, "reason": f"{strategy}: #{place + 1}" if place < size else None}
        for place, prompt in enumerate(order)
    ]
    details = {"asked_for": size, "strategy": strategy, "stage": stage}
    folder = space.stages.selection(stage)
    write_table(folder / "selection.parquet", rows, SELECTION)
    finish(folder, "selection", inputs={}, counts={"selected": size, "left_out": len(rows) - size}, details=details)
    append_jsonl(space.folder / "ledger.jsonl", charge("select", stage, 0.5))


def write_training(space: RunFolder, made: Fabrication) -> None:
    """Eight steps of 2 s and 30 tokens; evaluations of 1.5 s each."""
    for step in range(1, 9):
        append_jsonl(space.stages.steps, {"step": step, "seconds": 2.0})
        row = {"step": step - 1, "prompt_ids": ["p000"], "rewards": [1.0], "verdicts": {"correct": 1}, "tokens": 30}
        append_jsonl(space.stages.rewards, row)
    for step, marks in made.evaluations.items():
        write_evaluation(space.stages.evaluations, step, dict(zip(("near", "far", "other"), marks, strict=True)))
        append_jsonl(space.folder / "ledger.jsonl", charge("evaluate", step // 4, 1.5))


def fabricate_in(folder: Path, made: Fabrication) -> RunFolder:
    space = RunFolder(make_config(folder, made))
    space.lock()
    space.unlock()
    if made.collected:
        write_prompts(space, made)
        write_trajectories(space, made)
    if made.base is not None:
        write_evaluation(space.stages.evaluations, 0, made.base)
        append_jsonl(space.folder / "ledger.jsonl", charge("evaluate", None, 4.0))
    if space.config.select.strategy.reads_scores:
        for stage in range(made.stages_scored):
            write_scores(space, made, stage)
    for stage in range(made.stages_selected):
        write_selection(space, made, stage)
    if made.trained:
        write_training(space, made)
    return space


Fabricate = Callable[..., RunFolder]


@pytest.fixture
def fabricate(tmp_path: Path) -> Fabricate:
    """Makes the run, with `Fabrication`'s fields as keywords."""
    return lambda **changes: fabricate_in(tmp_path, Fabrication(**changes))


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run as it stands by default, for tests that only read it."""
    return fabricate_in(tmp_path_factory.mktemp("finished"), Fabrication())
