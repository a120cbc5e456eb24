"""Shares of the selections in a comparison's report, by hand."""

from pathlib import Path

import pytest
from tests.lab.compare.comparisons import one_seed_in, text_of

from cropi.artifacts import SELECTION, finish, write_sealed, write_table
from cropi.errors import ArtifactError
from cropi.lab.compare.paired_runs import Comparison
from cropi.lab.compare.report.compared_selections import compared_sources, selected_by_strategy
from cropi.lab.compare.report.comparison_page import write_comparison_report

POOL = {"p0": "one", "p1": "one", "p2": "two", "p3": "two"}
TAKEN = {"full": [set(POOL)] * 2, "quick": [{"p0", "p2"}, {"p0", "p1"}]}


@pytest.fixture
def with_runs(tmp_path: Path) -> Comparison:
    one_seed = one_seed_in(tmp_path)
    for strategy, stages in TAKEN.items():
        folder = tmp_path / "a" / "seed-0" / strategy
        write_sealed(folder / "environment.json", {"cropi": "1.2.3", "cpus": "4" if strategy == "full" else "8"})
        for stage, taken in enumerate(stages):
            chosen = [
                {"prompt_id": i, "source": source, "selected": i in taken, "rank": 1, "score": 0.0, "scores": []}
                | {"pass_rate": 0.5, "status": "ok", "reason": None}
                for i, source in POOL.items()
            ]
            path = folder / "selections" / f"stage-{stage:03}"
            write_table(path / "selection.parquet", chosen, SELECTION)
            finish(path, "selection", inputs={}, counts={})
    return one_seed


def test_sources_by_strategy_and_stage(with_runs: Comparison) -> None:
    found = selected_by_strategy(with_runs, "a")
    assert found["quick"] == {"pool": {"one": 2, "two": 2}, "stage 0": {"one": 1, "two": 1}, "stage 1": {"one": 2}}
    columns = compared_sources(found)
    assert columns == {"pool": {"one": 2, "two": 2}, "quick": {"one": 3, "two": 1}}  # full takes everything
    assert compared_sources({"full": found["full"]}) == {}


def test_selections_are_reported(with_runs: Comparison) -> None:
    text = text_of(with_runs)
    assert "| one | 2 (50 %) | 3 (75 %) |" in text
    assert "| cpus | 4 (1 of 2 runs), 8 (1 of 2 runs) |" in text
    assert "are not here" not in text


def test_a_damaged_selection_is_named(with_runs: Comparison) -> None:
    path = with_runs.folder / "a/seed-0/quick/selections/stage-001/selection.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"selection\.parquet"):
        write_comparison_report(with_runs)
