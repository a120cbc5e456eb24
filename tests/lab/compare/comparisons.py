"""Small comparisons by hand, for the tests of their report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cropi.artifacts import write_table
from cropi.lab.compare.comparison_summary import summarise
from cropi.lab.compare.paired_runs import Comparison, best_strategy, read_traces
from cropi.lab.compare.report.comparison_page import write_comparison_report
from cropi.lab.compare.result_table import COSTS, FLOPS, RESULTS, TOKENS, read_results
from cropi.report.blocks import Table

SLOW, QUICK, NEVER = (0, 1, 2), (0, 4, 4), (0, 0, 1)


def rows(
    scenario: str,
    strategy: str,
    seed: int,
    curve: tuple[int, int, int],
    collected: float = 0.0,
    *,
    questions: str | None = None,
    steps: tuple[int, ...] = (0, 4, 8),
    other: tuple[int, int, int] = (1, 1, 1),
) -> list[dict[str, Any]]:
    """A run with four targeted questions, of which so many are solved, and two others. A step costs 1 of all."""
    found = []
    for step, right, rest in zip(steps, curve, other, strict=True):
        ahead = collected if step else 0.0
        charged = dict.fromkeys((*COSTS, *TOKENS, *FLOPS), 0)
        charged |= {"collect_seconds": ahead, "collect_tokens": int(ahead), "collect_flops": ahead}
        charged |= {"train_seconds": step, "train_tokens": step, "train_flops": step, "flops": ahead + step}
        for name, targeted, size, solved in (("near", True, 4, right), ("far", False, 2, rest)):
            own = {"scenario": scenario, "strategy": strategy, "seed": seed, "step": step, "set": name}
            own |= {"targeted": targeted, "questions": questions or f"{seed}"}
            found.append(own | {"correct": [1.0] * solved + [0.0] * (size - solved)} | charged)
    return found


def compared(folder: Path, *runs: list[dict[str, Any]], references: Sequence[str] | None = None) -> Comparison:
    """A comparison of these runs, whose table lies in a folder."""
    write_table(folder / "results.parquet", [row for run in runs for row in run], RESULTS)
    traces = read_traces(read_results(folder / "results.parquet"))
    summary = summarise(traces, references, [0.25])
    return Comparison(folder, summary, traces, best_strategy(summary))


def one_seed_in(folder: Path) -> Comparison:
    """`full` comes to 2 of 4 at step 8; `quick` at step 2, with 3 paid ahead; `never` does not."""
    runs = (rows("a", "full", 0, SLOW), rows("a", "quick", 0, QUICK, 3.0), rows("a", "never", 0, NEVER))
    return compared(folder, *runs)


def tables(blocks: Sequence[Any]) -> list[Table]:
    found = [block for block in blocks if isinstance(block, Table)]
    assert all(len(row) == len(table.header) for table in found for row in table.rows)
    return found


def text_of(comparison: Comparison) -> str:
    write_comparison_report(comparison)
    return (comparison.folder / "compare.md").read_text(encoding="utf-8")
