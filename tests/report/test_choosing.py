"""The report of a run whose batches are chosen by influence, from tables made by hand."""

import pyarrow as pa
import pytest
from tests.report.test_figures import parsed
from tests.report.test_report import cells, section_text, written

from cropi.artifacts import finish, write_table
from cropi.report.choosing import beliefs_by_kind, cost_rows, places_by_kind
from cropi.report.costs import charges
from cropi.report.explanations import as_text, explanations
from cropi.run_tables import beliefs_schema
from cropi.streams import append_jsonl

KIND_OF = {"a": "sum", "b": "sum", "c": "<b>&"}


def beliefs(*rows):
    names = ("prompt_id", "times_drawn", "pass_rate", "influence/alpha", "standard_error/alpha")
    return [dict(zip(names, row, strict=True)) for row in rows]


def table(*rows):
    return pa.Table.from_pylist(beliefs(*rows), schema=beliefs_schema(["alpha", "beta"]))


@pytest.fixture
def space(fabricate):
    """Two stages of four steps; p000, p003, p006 and p009 are of the first source, which is not to become markup."""
    space = fabricate(strategy="cropi", evaluations={}, trained=False, source_names=("<b>x</b>", "swaps", "sort"))
    for stage in range(2):
        rows = beliefs(*((f"p{n:03}", n, 0.25, 1.0 + n + stage, 0.5) for n in range(12)))
        folder = space.stages.beliefs(stage)
        write_table(folder / "beliefs.parquet", rows, beliefs_schema(["alpha", "beta"]))
        finish(folder, "beliefs", inputs={}, counts={"prompts": 12})
        line = {"batch": stage, "step": 4 * stage, "stage": stage, "asked_at": 4 * stage}
        line |= {"prompt_ids": ["p000", "p001", "p000"], "why": ["mean alpha", "uniform", "draw alpha"]}
        append_jsonl(space.stages.choices, line)
    gain = {"curriculum/gain": 1.5, "curriculum/gain_low": 1.25, "curriculum/gain_high": 2.0}
    append_jsonl(space.stages.metrics, {"curriculum/share_read": 0.75, "step": 4})
    append_jsonl(space.stages.metrics, {**gain, "curriculum/share_read": 0.875, "step": 8})
    spend(space)
    return space


def spend(space):
    """Training: 10 s, 100 tokens, and 40 passes of a token of reading. Beside it: 1 s + 2 s + 0.5 s of the ledger, and
    2 x 0.5 s of the selections.
    """
    append_jsonl(space.stages.steps, {"step": 1, "seconds": 10.0, "read_passes": 40.0})
    batch = {"step": 0, "prompt_ids": ["p000"], "rewards": [1.0], "verdicts": {}, "tokens": 60, "prompt_tokens": 40}
    append_jsonl(space.stages.rewards, batch)
    own = {"phase": "collect", "stage": 0, "step": 0, "passes": 1, "tokens": 30, "prompt_tokens": 10, "seconds": 1.0}
    append_jsonl(space.stages.ledger, own)
    own = {"phase": "score", "stage": 0, "step": 0, "computed_tokens": 0, "validation_tokens": 20, "seconds": 2.0}
    append_jsonl(space.stages.ledger, own)
    append_jsonl(space.stages.ledger, {"phase": "score", "stage": None, "forward_tokens": 8, "seconds": 0.5})


def test_beliefs_are_means_over_the_prompts_of_a_kind():
    found = beliefs_by_kind(
        {3: table(("a", 1, 0.5, 1.0, 0.25), ("b", 0, 0.5, 2.0, 0.75), ("c", 0, 0.5, -1.0, 1.0))}, KIND_OF
    )
    assert list(found) == ["alpha"]  # of beta nothing is believed
    assert found["alpha"]["sum"] == {3: (1.5, 0.5)}
    assert found["alpha"]["<b>&"] == {3: (-1.0, 1.0)}


def test_places_count_a_prompt_as_often_as_it_was_drawn():
    choices = [{"stage": 0, "prompt_ids": ["a", "a", "c"]}, {"stage": 1, "prompt_ids": ["b"]}]
    pool, first, second = places_by_kind(choices, KIND_OF).values()
    assert (pool, first, second) == ({"sum": 2, "<b>&": 1}, {"sum": 2, "<b>&": 1}, {"sum": 1})


def test_the_section(space):
    files, title = written(space), "Belief, choice and their cost"
    text, rows = section_text(files["report.md"], title), cells(files["report.md"], section=title)
    assert "At step 8 a chosen prompt helps 1.50 times as much as a random one (95 % interval: 1.25 to 2.00)." in text
    # of the first source n = 0, 3, 6, 9: mean 4.5, plus 1, and in stage 1 another 1
    assert ["<b>x</b>", "alpha", "5.5 ± 0.5", "6.5 ± 0.5"] in rows
    assert ["<b>x</b>", "4 (33 %)", "2 (67 %)", "2 (67 %)"] in rows
    assert ["largest expected gain on alpha", "2", "33.3 %"] in rows
    assert ["share of the squared gradient that is read", "0.875"] in rows
    assert "<b>" not in files["report.html"]
    for name in ("beliefs", "gain"):
        assert f'id="{name}-' in files["report.html"]
    for svg in files["report.html"].split("<svg")[1:]:
        parsed("<svg" + svg.split("</svg>")[0] + "</svg>")


def test_cost_beside_training(space):
    rows = cost_rows(charges(space.config, space.stages))
    # training: 100 tokens generated and 3 x 100 (beta 0) trained on
    assert rows == [
        ["validation completions", "1.0", "10.0 %", "10.0 %"],
        ["validation gradients", "2.0", "20.0 %", "10.0 %"],
        ["representations", "0.50", "5.0 %", "2.0 %"],
        ["reading", "0.00", "0.0 %", "10.0 %"],
        ["choosing", "1.0", "10.0 %", "0.0 %"],
        ["all", "4.5", "45.0 %", "32.0 %"],
    ]


def test_a_run_that_has_only_begun_is_reported(fabricate):
    text = written(fabricate(strategy="cropi", evaluations={}, trained=False, collected=False))["report.md"]
    assert "Belief, choice and their cost" in section_text(text, "Not there yet")


def test_a_gain_without_bounds_is_unknown(space):
    append_jsonl(space.stages.metrics, {"curriculum/gain": -3.0, "step": 9})
    text = section_text(written(space)["report.md"], "Belief, choice and their cost")
    assert "At step 9 the help of random prompts cannot be told from zero." in text
    assert "3.00" not in text


def test_a_prompt_is_explained(space):
    first, second = explanations(space.config, space, ["p000", "p002"])
    facts = first.stages[1]
    assert facts.drawn == {"largest expected gain on alpha": 1, "drawn from the belief on alpha": 1}
    assert (facts.pass_rate, facts.rank, facts.top_probability) == (0.25, None, None)
    influence = facts.influence["alpha"]
    assert (influence.value, influence.standard_error, influence.rank) == (2.0, 0.5, 12)
    assert set(facts.influence) == {"alpha"}
    assert second.stages[1].outcome == "not drawn"
    text = as_text([first])
    assert "2 ± 0.5 #12" in text
    assert "drawn 2 × (1 largest expected gain on alpha, 1 drawn from the belief on alpha)" in text
    assert "P(best)  " not in text
