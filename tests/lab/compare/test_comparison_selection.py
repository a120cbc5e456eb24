"""Shares and similarity of the selections in a comparison's report, by hand."""

import json
from pathlib import Path

import pytest
from tests.lab.compare.comparisons import one_seed_in, text_of

from cropi.artifacts import PROMPTS, SELECTION, finish, write_sealed, write_table
from cropi.errors import ArtifactError
from cropi.lab.compare.paired_runs import Comparison
from cropi.lab.compare.report.compared_selections import read_chosen, similarities, source_shares
from cropi.lab.compare.report.comparison_page import write_comparison_report

# Two sources; the validation prompts are those of `one`, word for word.
POOL = {"p0": ("one", "red green"), "p1": ("one", "red green"), "p2": ("two", "blue"), "p3": ("two", "black")}
TAKEN = {"full": [set(POOL)] * 2, "quick": [{"p0", "p2"}, {"p0", "p1"}]}


@pytest.fixture
def with_runs(tmp_path: Path) -> Comparison:
    one_seed = one_seed_in(tmp_path)
    for strategy, stages in TAKEN.items():
        folder = tmp_path / "a" / "seed-0" / strategy
        prompts = [
            {"prompt_id": i, "set": "train", "source": source, "messages": json.dumps(text), "answer": ""}
            for i, (source, text) in POOL.items()
        ]
        prompts.append({**prompts[0], "prompt_id": "v", "set": "validation/alpha"})
        write_table(folder / "prompts" / "prompts.parquet", prompts, PROMPTS)
        finish(folder / "prompts", "prompts", inputs={}, counts={})
        write_sealed(folder / "environment.json", {"cropi": "1.2.3", "cpus": "4" if strategy == "full" else "8"})
        for stage, taken in enumerate(stages):
            chosen = [
                {"prompt_id": i, "source": source, "selected": i in taken, "rank": 1, "score": 0.0, "scores": []}
                | {"pass_rate": 0.5, "status": "ok", "reason": None}
                for i, (source, _) in POOL.items()
            ]
            path = folder / "selections" / f"stage-{stage:03}"
            write_table(path / "selection.parquet", chosen, SELECTION)
            finish(path, "selection", inputs={}, counts={})
    return one_seed


def test_shares_by_source_and_stage(with_runs: Comparison) -> None:
    shares = source_shares(read_chosen(with_runs, "a"))
    assert (shares.sources, shares.pool.tolist()) == (["one", "two"], [0.5, 0.5])
    assert list(shares.strategies) == ["quick"]  # full takes everything
    assert shares.strategies["quick"].tolist() == [[0.5, 1.0], [0.5, 0.0]]


def test_of_many_sources_the_small_ones_are_put_together(with_runs: Comparison) -> None:
    chosen = read_chosen(with_runs, "a")
    ids = [f"q{n:02}" for n in range(30)]
    pool = type(chosen.pools[0])(dict.fromkeys(ids, "x"), {i: f"s{i}" for i in ids}, {})
    shares = source_shares(type(chosen)({0: pool}, {"quick": {0: [frozenset(ids[25:])]}}))
    assert shares.sources[-1] == "11 other sources"
    assert {f"s{i}" for i in ids[25:]} < set(shares.sources)
    assert len(shares.sources) == 20
    assert shares.pool.sum() == pytest.approx(1.0)
    assert shares.strategies["quick"][-1, 0] == 0.0


def test_similarity_by_words(with_runs: Comparison) -> None:
    chosen = read_chosen(with_runs, "a")
    (found,) = similarities(chosen)
    # Equal texts have cosine 1, texts without a word in common 0.
    assert (found.validation_set, found.pool.tolist()) == ("alpha", pytest.approx([0.5]))
    assert found.strategies["quick"].tolist() == [pytest.approx([0.5, 1.0])]


def test_selections_are_reported(with_runs: Comparison) -> None:
    text = text_of(with_runs)
    assert "| a | one | quick | 50.0 | 50.0 | 100.0 | 75.0 |" in text
    assert "| a | alpha | quick | 0.500 | 0.500 | 1.000 | +0.250 |" in text
    assert "| cpus | 4 (1 of 2 runs), 8 (1 of 2 runs) |" in text
    assert "are not here" not in text


def test_a_damaged_selection_is_named(with_runs: Comparison) -> None:
    path = with_runs.folder / "a/seed-0/quick/selections/stage-001/selection.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"selection\.parquet"):
        write_comparison_report(with_runs)
