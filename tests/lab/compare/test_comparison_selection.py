"""What a comparison's report says of the selections: shares and similarity by hand."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.lab.compare.comparisons import one_seed_in, read, text_of

from cropi.artifacts import PROMPTS, SELECTION, finish, write_sealed, write_table
from cropi.errors import ArtifactError
from cropi.lab.compare.report.page import make_comparison_report
from cropi.lab.compare.report.selected import Encoder, read_chosen, similarities, source_shares

# Two sources; the validation prompts are those of `one`, word for word.
POOL = {"p0": ("one", "red green"), "p1": ("one", "red green"), "p2": ("two", "blue"), "p3": ("two", "black")}
TAKEN = {"full": [set(POOL)] * 2, "quick": [{"p0", "p2"}, {"p0", "p1"}]}
VECTORS = {"red green": [2.0, 0.0], "blue": [3.0, 4.0], "black": [0.0, 1.0]}


@pytest.fixture
def with_runs(tmp_path: Path) -> Path:
    one_seed = one_seed_in(tmp_path)
    for strategy, stages in TAKEN.items():
        folder = one_seed / "a" / "seed-0" / strategy
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


def test_shares_by_source_and_stage(with_runs: Path) -> None:
    shares = source_shares(read_chosen(read(with_runs), "a"))
    assert (shares.sources, shares.pool.tolist()) == (["one", "two"], [0.5, 0.5])
    assert list(shares.strategies) == ["quick"]  # full takes everything
    assert shares.strategies["quick"].tolist() == [[0.5, 1.0], [0.5, 0.0]]


def test_of_many_sources_the_small_ones_are_put_together(with_runs: Path) -> None:
    chosen = read_chosen(read(with_runs), "a")
    ids = [f"q{n:02}" for n in range(30)]
    pool = type(chosen.pools[0])(dict.fromkeys(ids, "x"), {i: f"s{i}" for i in ids}, {})
    shares = source_shares(type(chosen)({0: pool}, {"quick": {0: [frozenset(ids[25:])]}}))
    assert shares.sources[-1] == "11 other sources"
    assert {f"s{i}" for i in ids[25:]} < set(shares.sources)
    assert len(shares.sources) == 20
    assert shares.pool.sum() == pytest.approx(1.0)
    assert shares.strategies["quick"][-1, 0] == 0.0


def test_similarity_by_words_and_by_an_encoder(with_runs: Path) -> None:
    chosen = read_chosen(read(with_runs), "a")
    (found,) = similarities(chosen, None)
    # Equal texts have cosine 1, texts without a word in common 0.
    assert (found.validation_set, found.pool.tolist()) == ("alpha", pytest.approx([0.5]))
    assert found.strategies["quick"].tolist() == [pytest.approx([0.5, 1.0])]
    asked: list[str] = []

    def encode(texts: Sequence[str]) -> np.ndarray:
        asked.extend(texts)
        return np.array([VECTORS[text] for text in texts])

    (found,) = similarities(chosen, Encoder("toy", encode))
    # Cosines with (1, 0): 1, 1, 3 / 5 and 0.
    assert found.pool.tolist() == pytest.approx([(1 + 1 + 0.6 + 0) / 4])
    assert found.strategies["quick"].tolist() == [pytest.approx([0.8, 1.0])]
    assert set(asked) == set(VECTORS)


def test_selections_are_reported(with_runs: Path) -> None:
    make_comparison_report(with_runs, encoder=Encoder("toy", lambda texts: np.array([VECTORS[t] for t in texts])))
    text = (with_runs / "compare.md").read_text(encoding="utf-8")
    assert "| a | one | quick | 50.0 | 50.0 | 100.0 | 75.0 |" in text
    assert "| a | alpha | quick | 0.650 | 0.800 | 1.000 | +0.250 |" in text
    assert "embeddings of `toy`" in text
    assert "| cpus | 4 (1 of 2 runs), 8 (1 of 2 runs) |" in text
    assert "are not here" not in text
    assert "TF-IDF" in text_of(with_runs)


def test_a_damaged_selection_is_named(with_runs: Path) -> None:
    path = with_runs / "a/seed-0/quick/selections/stage-001/selection.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match=r"selection\.parquet"):
        make_comparison_report(with_runs)
