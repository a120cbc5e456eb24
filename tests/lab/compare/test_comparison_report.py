"""The report of a comparison: numbers by hand and as in compare.json, names that are no markup, what is missing."""

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tests.lab.compare.comparisons import NEVER, QUICK, SLOW, compared, one_seed_in, rows, tables, text_of
from tests.report.test_report import Outline, checked, plain_tokens
from tests.runs import cropi_error

from cropi.artifacts import write_json
from cropi.lab.compare.comparison_summary import summarise
from cropi.lab.compare.paired_runs import Comparison
from cropi.lab.compare.report.accuracy_bands import bands, population_bands, spread
from cropi.lab.compare.report.comparison_figures import styles
from cropi.lab.compare.report.comparison_page import headline, sections, terminal_text, write_comparison_report
from cropi.lab.compare.report.comparison_tables import accuracies, cost_to_target, costs, speedups
from cropi.lab.compare.report.method_notes import limits, provenance

HOSTILE = "<script>alert(1)</script>|`tick` $x$ [a](http://b.c)"
INSIDE = "a`<b>x</b>`[a](http://b.c)"  # markup between the backticks of a name


@pytest.fixture
def one_seed(tmp_path: Path) -> Comparison:
    return one_seed_in(tmp_path)


@pytest.fixture(scope="module")
def two_scenarios(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Two scenarios, two seeds, and three strategies, of which two are references."""
    curves = {"full": SLOW, "quick": QUICK, "random": (0, 1, 1)}
    found = [
        rows(scenario, name, seed, curve, 3.0 if name == "quick" else 0.0)
        for scenario in ("a", "b")
        for seed in (0, 1)
        for name, curve in curves.items()
    ]
    return compared(tmp_path_factory.mktemp("two"), *found, references=["full", "random"])


# -- numbers -----------------------------------------------------------------------------------------------------------


def main(comparison: Comparison, name: str) -> Comparison:
    return replace(comparison, main=name)


def test_the_headline_and_the_three_numbers_by_hand(one_seed: Comparison) -> None:
    """One seed, and few questions: only the estimates are certain. 8 / 2 steps; 8 / (3 + 2) of all that is paid."""
    quick = main(one_seed, "quick")
    said = headline(quick)
    assert re.findall(r"(\d+\.\d+) \[\S+ \S+\]× fewer (\w+)", said) == [
        *(("4.00", "steps"), ("1.60", "FLOPs"), ("1.60", "seconds"))
    ]
    assert len(re.findall(r"[.] |[.]$", said)) == 3
    assert "One seed" in said
    table = cost_to_target(quick)
    assert [row[:3] for row in table.rows] == [["steps", "8", "2"], ["FLOPs", "8", "5"], ["seconds", "8.0 s", "5.0 s"]]
    assert [row[3].split()[0] for row in table.rows] == ["4.00", "1.60", "1.60"]
    assert "| steps " in terminal_text(quick)
    assert cost_to_target(main(one_seed, "full")) is None
    assert "| less full " in terminal_text(quick)  # of three strategies


def test_a_ratio_of_one_drawn_scenario_has_no_interval_and_says_on_what_it_stands(tmp_path: Path) -> None:
    curves = {"drawn-0": (SLOW, QUICK), "drawn-1": ((2, 2, 2), SLOW), "drawn-2": ((2, 2, 2), QUICK)}
    found = [rows(s, name, 0, c) for s, both in curves.items() for name, c in zip(("full", "x"), both, strict=True)]
    told = main(compared(tmp_path, *found), "x")
    assert "4.00 [–]× fewer steps" in headline(told)
    assert headline(told).endswith("A speed-up is known in 1 of 3 scenarios.")
    assert "nan" not in text_of(told)
    (suite, _) = tables(speedups(told))
    assert suite.rows[1][1] == "4.00 [–]"


def test_runs_that_are_set_aside_are_not_counted_among_those_without_a_gain(tmp_path: Path) -> None:
    comparison = compared(tmp_path, *(rows(s, n, 0, SLOW) for s in "abc" for n in ("full", "x")))
    summary = summarise(comparison.traces, aside=["c"])
    (suite, _) = tables(speedups(replace(comparison, summary=summary)))
    assert [row[-1] for row in suite.rows] == ["0 % of 2"] * 2


def test_strategies_that_share_no_scenario_are_told_by_scenario(tmp_path: Path) -> None:
    found = [rows(scenario, "full", 0, SLOW) for scenario in "ab"]
    comparison = compared(tmp_path, *found, rows("a", "x", 0, QUICK), rows("b", "y", 0, QUICK))
    assert headline(comparison).startswith("No scenario has runs of all strategies")
    assert "2 scenarios wait for some strategy" in terminal_text(comparison)
    assert [row[:2] for row in tables(speedups(comparison))[0].rows][1] == ["a", "x"]
    text_of(comparison)


@pytest.mark.parametrize("option", ["--main", "--reference", "--aside"])
def test_a_name_that_is_not_in_the_table_is_refused(one_seed: Comparison, option: str) -> None:
    where = one_seed.folder
    said = cropi_error("compare", "--results", "results.parquet", option, "quikc", cwd=where).stderr
    assert f"{option}: 'quikc' is none of the" in said
    assert "Fix: name one of: " in said
    assert not (where / "compare.json").exists()


def test_a_scenario_to_set_aside_is_looked_up_before_anything_runs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("cropi.lab.compare.run_comparison.execute", lambda *_, **__: pytest.fail("it ran"))
    asked = ["--strategies", "full", "--seeds", "0", "--folder", "out", "--aside", "homogenous"]
    said = cropi_error("compare", "quickstart", *asked, cwd=tmp_path).stderr
    assert "--aside: 'homogenous' is none of the scenarios" in said


def test_differences_are_from_each_reference(two_scenarios: Comparison) -> None:
    found = {t.caption.split(",")[0]: t for t in tables(accuracies(two_scenarios)) if t.left == 1}
    assert {row[0] for row in found["Difference from `random`"].rows} == {"full", "quick"}
    (row,) = [row for row in found["Difference from `full`"].rows if row[0] == "quick"]
    assert [cell.split()[0] for cell in row[1:4]] == ["+0.500", "0.000", "+0.500"]


def test_costs_by_hand(one_seed: Comparison) -> None:
    (table,) = tables(costs(one_seed))
    cells = {row[0]: row[1:] for row in table.rows}
    # collect, score, select, train, total, rest / train, tokens, FLOPs
    assert cells["quick"] == ["3.0", "0", "0", "8.0", "11.0", "37.5 %", "11", "11"]
    assert cells["full"] == ["0", "0", "0", "8.0", "8.0", "0.0 %", "8", "8"]


def test_a_curve_over_costs_waits_for_what_is_paid_ahead(one_seed: Comparison) -> None:
    """quick: flat to 3, up to 4 of 4 at 3 + 4, then flat to 11."""
    weights_GE = spread(np.array([0.0, 2.0, 3.0, 5.0, 7.0, 11.0]), np.array([0.0, 3, 3]), np.array([0.0, 4, 8]))
    assert weights_GE @ np.array([0.0, 1.0, 1.0]) == pytest.approx([0, 0, 0, 0.5, 1, 1])
    assert weights_GE.sum(axis=1) == pytest.approx(np.ones(6))
    found = bands(one_seed, "a", ("steps", "flops"))
    assert found["steps"]["quick"].mean.tolist() == [0.0, 1.0, 1.0]
    flops = found["flops"]["quick"]
    assert (flops.at[0], flops.at[-1]) == (0.0, 11.0)
    assert flops.mean == pytest.approx(np.interp(flops.at, [0, 3, 7, 11], [0, 0, 1, 1]))
    assert (flops.low <= flops.mean).all()
    assert (flops.mean <= flops.high).all()


# -- what is said ------------------------------------------------------------------------------------------------------


def test_a_run_that_never_arrives_is_marked_as_a_bound(one_seed: Comparison) -> None:
    (table,) = tables(speedups(one_seed))
    cells = {row[0]: row for row in table.rows}
    assert all(cell.startswith("< 1.00 [") for cell in cells["never"][1:5])
    assert cells["never"][5] == "0 %"
    assert not any("<" in cell for name in ("full", "quick") for cell in cells[name])
    said = headline(main(one_seed, "never"))
    assert "never reached the final accuracy of `full` in 100 % of its runs" in said
    assert "at most 1.00 [" in said


def test_strategies_on_fewer_seeds_are_named(tmp_path: Path) -> None:
    runs = [rows("a", "full", seed, SLOW) for seed in (0, 1)] + [rows("a", "late", 1, QUICK)]
    found = compared(tmp_path, *runs)
    assert tables(limits(found))[0].rows == [["a", "late", "1", "2"]]
    assert "seeds of each: 1 to 2" in headline(replace(found, main="full"))


def test_without_full_there_is_no_speed_up(tmp_path: Path) -> None:
    found = compared(tmp_path, rows("a", "x", 0, QUICK), rows("a", "y", 0, NEVER))
    assert "no speed-up" in headline(found)
    assert tables(speedups(found)) == []
    assert len(sections(found)) == 9


def test_references_alone_and_full_alone(tmp_path: Path) -> None:
    runs = rows("a", "full", 0, SLOW), rows("a", "random", 0, QUICK)
    assert compared(tmp_path / "two", *runs, references=["full", "random"]).main == "random"
    worse = rows("a", "x", 0, NEVER)
    assert compared(tmp_path / "three", *runs, worse, references=["full", "random"]).main == "x"
    assert "nothing to compare" in headline(compared(tmp_path / "one", runs[0]))


# -- files -------------------------------------------------------------------------------------------------------------


def test_names_cannot_become_markup(tmp_path: Path) -> None:
    found = compared(
        tmp_path, rows(HOSTILE, "full", 0, SLOW), rows(HOSTILE, f"{INSIDE}\n# x", 0, QUICK), rows("b", "full", 0, SLOW)
    )
    markdown = text_of(found)
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    outline = checked(page)
    assert "b" not in outline.tags
    assert "<script>alert(1)</script>" in outline.text
    tokens, inline = plain_tokens(markdown)
    headings = [after.content for t, after in itertools.pairwise(tokens) if t.type == "heading_open"]
    assert len(headings) == 10
    assert HOSTILE in {token.content for token in inline if token.type == "text"}


def test_raw_results_are_enough(one_seed: Comparison) -> None:
    text, page = text_of(one_seed), one_seed.folder / "compare.html"
    assert text.count("The folders of the runs are not here, so this part is left out.") == 1
    assert "cropi compare a --strategies full,quick,never --seeds 0 --folder DIR" in text
    before = page.read_bytes()
    write_comparison_report(one_seed)
    assert page.read_bytes() == before


def test_the_page_and_its_twin_have_the_same_tables(two_scenarios: Comparison) -> None:
    markdown = text_of(two_scenarios)
    page = (two_scenarios.folder / "compare.html").read_text(encoding="utf-8")
    assert len(re.findall(r"^\|(?: :?-+:? \|)+$", markdown, flags=re.MULTILINE)) == page.count("<table>") > 8
    assert Outline(page).tags.count("svg") == 5


@pytest.mark.slow
def test_the_page_of_many_scenarios_and_strategies_stays_below_two_megabytes(tmp_path: Path) -> None:
    names = ["full", *(f"strategy-{number}" for number in range(7))]
    runs = [rows(f"scenario-{n}", name, 0, QUICK if n % 2 else SLOW) for n in range(20) for name in names]
    text_of(compared(tmp_path, *runs))
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert len(page.encode()) < 2_000_000
    assert "The other 8 scenarios are only in the tables." in page


def test_nothing_finished_is_no_error(tmp_path: Path) -> None:
    assert "No run is finished yet." in text_of(compared(tmp_path))


def test_strategies_are_named_with_what_they_change(one_seed: Comparison) -> None:
    patches = {"full": {"select": {"strategy": {"type": "full"}}}, "quick": {"select": {"fraction": 0.5}}}
    write_json(one_seed.folder / "plan.json", {"strategies": {"full": patches["quick"]}})
    assert tables(provenance(one_seed))[0].rows[0] == ["full", "–", '{"select": {"fraction": 0.5}}']
    write_json(one_seed.folder / "plan.json", {"strategies": patches})
    rows_of = {row[0]: row[1:] for row in tables(provenance(one_seed))[0].rows}
    assert rows_of["full"][0] == "every prompt, every stage"
    assert rows_of["quick"] == ["–", '{"select": {"fraction": 0.5}}']


def test_the_page_begins_with_three_ratios_and_the_curve(one_seed: Comparison) -> None:
    """8 / 2 steps and 8 / 5 of what is paid, as in the headline; a run that never arrives has bounds."""
    numbers, curve, *_ = sections(main(one_seed, "quick"))[0].blocks
    assert [(label, value) for label, value, _ in numbers.numbers] == [
        *(("fewer steps", "4.00×"), ("fewer FLOPs", "1.60×"), ("fewer seconds", "1.60×"))
    ]
    assert numbers.numbers[0][2].endswith("2 against 8")
    (chart,) = curve.charts
    assert {line.name: line.y for line in chart.lines}["quick"] == [0.0, 1.0, 1.0]
    assert chart.rules == [0.5]
    bounds = sections(main(one_seed, "never"))[0].blocks[0].numbers
    assert all(value == "≤ 1.00×" for _, value, _ in bounds)


# -- looks -------------------------------------------------------------------------------------------------------------


def test_eight_strategies_have_eight_colours_and_more_are_still_told_apart() -> None:
    names = ["full", "random", "influence", *(f"s{n}" for n in range(13))]
    looks = styles(names)
    assert list(looks) == names
    assert len({looks[name]["color"] for name in names[:8]}) == 8
    assert len({(look["color"], str(look["linestyle"])) for look in looks.values()}) == 16
    assert styles(names[:5])["s1"] == looks["s1"]


def test_the_curve_over_drawn_scenarios_is_their_mean_and_only_they_are_redrawn(tmp_path: Path) -> None:
    curves = (0, 4, 4), (0, 0, 4), (0, 2, 2)
    runs = [rows(f"drawn-{n}", name, 0, own) for n, own in enumerate(curves) for name in ("full", "x")]
    comparison = compared(tmp_path, *runs)
    band = population_bands(comparison, ["steps"])["steps"]["x"]
    assert band.at.tolist() == [0, 4, 8]
    assert band.mean.tolist() == pytest.approx([0, 0.5, 2.5 / 3])
    assert band.low.tolist() == pytest.approx([0, 0, 0.5])  # of pairs of three scenarios: the worst one twice
    assert band.high.tolist() == pytest.approx([0, 1, 1])
    curves_by_flops = population_bands(comparison, ["flops"])["flops"]["full"]
    assert curves_by_flops.at[-1] == 8
    assert curves_by_flops.mean[-1] == pytest.approx(2.5 / 3)
