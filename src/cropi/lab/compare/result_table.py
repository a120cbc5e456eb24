"""The table of results of a comparison: verdicts and cumulative costs of every run at every evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from cropi.artifacts import read_sealed, read_table, write_table
from cropi.errors import ArtifactError, ConfigError
from cropi.lab.compare.comparison_plan import BEGUN, Plan, Run
from cropi.report.costs import Charges, charges
from cropi.report.reading import Answers, read_answers
from cropi.run_folder import StagePaths

RESULTS_FILE = "results.parquet"

COSTS = ("collect_seconds", "score_seconds", "select_seconds", "train_seconds")  # cumulative, as all that follow
TOKENS = ("collect_tokens", "score_tokens", "train_tokens")  # generated; of score: computed
FLOPS = ("collect_flops", "score_flops", "train_flops", "flops")  # the last: their sum

RESULTS = pa.schema(
    [
        ("scenario", pa.string()),
        ("strategy", pa.string()),
        ("seed", pa.int64()),
        ("step", pa.int32()),
        ("set", pa.string()),
        ("targeted", pa.bool_()),
        ("questions", pa.string()),  # digest of their ids: the same for all strategies of a seed
        ("correct", pa.list_(pa.float32())),  # by question, in ascending order of prompt id: see `_by_set`
        *((name, pa.float64()) for name in COSTS),
        *((name, pa.int64()) for name in TOKENS),
        *((name, pa.float64()) for name in FLOPS),
    ]
)


def write_results(plan: Plan) -> None:
    """Write `results.parquet` of all finished runs of a folder, in the plan's order."""
    write_table(plan.folder / RESULTS_FILE, _rows(run for run in plan.all if run.finished), RESULTS)


def write_results_up_to(step: int, source: Plan | Path) -> Path:
    """Write the results of all runs, finished or not, up to a step to a folder `step-N`. Returns that folder.

    `source` is the plan of a comparison's folder, or a table of such results; the new folder is made beside it. Rows
    after the step are left out, and with them runs that were not evaluated at it. ConfigError where no run was.
    """
    if isinstance(source, Plan):
        rows, beside = list(_rows(run for run in source.all if run.begun)), source.folder
    else:
        rows, beside = read_results(source).to_pylist(), source.parent
    evaluated = {_run_of(row) for row in rows if row["step"] == step}
    if not evaluated:
        steps = ", ".join(str(known) for known in sorted({row["step"] for row in rows} - {0})) or "none yet"
        raise ConfigError(
            f"no run was evaluated after {step} steps", where="--up-to-step", fix=f"name one of these: {steps}."
        )
    kept = [row for row in rows if row["step"] <= step and _run_of(row) in evaluated]
    folder = beside / f"step-{step}"
    write_table(folder / RESULTS_FILE, kept, RESULTS)
    return folder


def _run_of(row: Mapping[str, Any]) -> tuple[str, str, int]:
    return row["scenario"], row["strategy"], row["seed"]


def _rows(runs: Iterable[Run]) -> Iterator[dict[str, Any]]:
    for run in runs:
        yield from run_rows(run)


def read_results(path: Path) -> pa.Table:
    """Read the table of a comparison. ArtifactError if there is none, or if it is another table."""
    if not path.is_file():
        raise ArtifactError("there is no such file", where=str(path), fix="name the results.parquet of a comparison.")
    try:
        return read_table(path, RESULTS)
    except ArtifactError as error:
        fix = "make it anew by the same `cropi compare`, without --results."
        raise ArtifactError(error.what, where=str(path), fix=fix) from None


def run_rows(run: Run) -> Iterator[dict[str, Any]]:
    """Rows of a run whose training has begun: one for every evaluation and test set."""
    folder, config = run.config.folder, run.config
    parameters = int(read_sealed(folder / BEGUN)["matrix_parameters"])
    paths = StagePaths(folder)
    charged = charges(config, paths)
    for step, found in read_answers(paths.evaluations).items():
        costs = dict.fromkeys((*COSTS, *TOKENS, *FLOPS), 0) if step == 0 else _costs(charged.up_to(step), parameters)
        for test, values in _by_set(found, config.prompts.test):
            own = {"scenario": run.scenario, "strategy": run.strategy, "seed": run.seed, "step": step, "set": test}
            yield own | {
                "targeted": config.prompts.test[test].targeted,
                "questions": hashlib.sha256("\n".join(values).encode()).hexdigest()[:16],
                "correct": list(values.values()),
                **costs,
            }


def _costs(charged: Charges, parameters: int) -> dict[str, float]:
    cost, operations = charged.cost(), charged.flops(parameters)
    return {
        "collect_seconds": cost.collect or 0.0,
        "score_seconds": cost.score or 0.0,
        "select_seconds": cost.select or 0.0,
        "train_seconds": cost.train or 0.0,
        "collect_tokens": cost.collect_tokens or 0,
        "score_tokens": charged.computed_tokens(),
        "train_tokens": cost.train_tokens or 0,
        "collect_flops": operations.collect,
        "score_flops": operations.score,
        "train_flops": operations.train,
        "flops": operations.total,
    }


def _by_set(answers: Answers, tests: Iterable[str]) -> Iterator[tuple[str, dict[str, float]]]:
    """Verdicts by prompt id of each test set, in the config's order.

    avg@n, the share of n sampled completions that are right, where there are samples: it is what training maximises,
    and moves where greedy verdicts wait and jump. Else the greedy verdicts.
    """
    for name in tests:
        if name in answers.greedy:
            yield name, dict(sorted((answers.sampled.get(name) or answers.greedy[name]).items()))
