"""Statistics of a table of results, by hand."""

import math
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.lab.compare import comparisons

from cropi.errors import ArtifactError, ConfigError
from cropi.lab.compare.comparison_summary import summarise
from cropi.lab.compare.paired_runs import Traces, best_strategy, read_traces
from cropi.lab.compare.result_table import RESULTS

# Every seed has the same questions.
rows = partial(comparisons.rows, questions="q")


def table(*runs: list[dict[str, Any]]) -> Traces:
    return read_traces(pa.Table.from_pylist([row for run in runs for row in run], schema=RESULTS))


def entry(summary: dict[str, Any], strategy: str, scenario: str = "a") -> dict[str, Any]:
    (found,) = [e for e in summary["entries"] if (e["scenario"], e["strategy"]) == (scenario, strategy)]
    return found


def test_one_seed_by_hand():
    summary = summarise(
        table(
            rows("a", "full", 0, (0, 1, 2)),
            rows("a", "quick", 0, (0, 4, 4), collected=3.0, other=(1, 2, 0)),
            rows("a", "slow", 0, (0, 0, 1)),
        )
    )
    quick, slow = entry(summary, "quick"), entry(summary, "slow")
    # full comes to 2 of 4 at step 8; quick from 0 to 4 of 4 in 4 steps, so at step 2, with 3 paid ahead.
    assert quick["speedup"]["steps"]["mean"] == pytest.approx(8 / 2)
    for measure in ("tokens", "flops", "seconds"):
        assert quick["speedup"][measure]["mean"] == pytest.approx(8 / 5)
    goal = quick["to"]["target"]
    assert (goal["reached"], goal["no_gain"], quick["seeds"]) == (1.0, 0.0, 1)
    assert (goal["steps"]["mean"], goal["flops"]["mean"]) == (2.0, 5.0)
    # slow never does: 8 / 8 at the most.
    assert slow["speedup"]["steps"]["mean"] == pytest.approx(1.0)
    assert (slow["to"]["target"]["reached"], slow["to"]["target"]["steps"]["mean"]) == (0.0, 8.0)
    # Over steps: (0 / 2 + 1 + 1 / 2) / 2. Over operations, up to full's 8: flat for 3, up for 4, flat for 1.
    assert quick["area"]["steps"]["mean"] == pytest.approx(0.75)
    assert quick["area"]["flops"]["mean"] == pytest.approx((0 + 4 / 2 + 1) / 8)
    assert quick["final"]["targeted"]["mean"] == 1.0
    assert quick["final"]["untargeted"]["mean"] == 0.0
    # full's area: (0 / 2 + 1 / 4 + (2 / 4) / 2) / 2
    assert quick["against"]["full"]["area"]["steps"]["mean"] == pytest.approx(0.75 - 0.25)
    assert quick["against"]["full"]["final"]["untargeted"]["mean"] == -0.5
    itself = entry(summary, "full")
    assert {tuple(itself["speedup"][m].values()) for m in itself["speedup"]} == {(1.0, 1.0, 1.0)}
    assert tuple(itself["against"]["full"]["area"]["steps"].values()) == (0.0, 0.0, 0.0)


def test_seeds_and_scenarios_have_geometric_means():
    quick, slow = (0, 4, 4), (0, 1, 2)  # to 2 of 4 in 2 steps and in 8
    found = []
    for scenario, curves in {"a": (quick, slow), "b": (quick, quick)}.items():
        for seed, curve in enumerate(curves):
            found += [rows(scenario, "full", seed, slow), rows(scenario, "x", seed, curve)]
    summary = summarise(table(*found))
    assert entry(summary, "x", "a")["speedup"]["steps"]["mean"] == pytest.approx(2.0)  # of 4 and 1
    assert entry(summary, "x", "b")["speedup"]["steps"]["mean"] == pytest.approx(4.0)
    suite = entry(summary, "x", "suite")
    assert suite["speedup"]["steps"]["mean"] == pytest.approx(math.sqrt(8))
    assert (suite["scenarios"], suite["seeds"]) == (2, 4)
    assert suite["area"]["steps"]["mean"] == pytest.approx((0.75 + 0.25 + 0.75 + 0.75) / 4)
    without = entry(summarise(table(*found), aside=["b"]), "x", "suite")
    assert (suite["counted"], without["counted"], without["seeds"]) == (4, 2, 4)
    assert without["speedup"]["steps"]["mean"] == pytest.approx(2.0)
    assert without["to"]["target"] == entry(summary, "x", "a")["to"]["target"]
    assert without["area"] == suite["area"]  # accuracies count everywhere
    assert summarise(table(*found), aside=["c"])["aside"] == []  # not finished yet


def test_runs_without_a_gain_are_counted_and_left_out():
    found = []
    for scenario, gains in {"a": (True, False), "b": (False, False), "c": (True, True)}.items():
        for seed, gain in enumerate(gains):
            found += [rows(scenario, "full", seed, (0, 1, 2) if gain else (2, 2, 2))]
            found += [rows(scenario, "x", seed, (0, 4, 4))]  # where full gains, 4 times sooner
    summary = summarise(table(*found))
    for scenario, share in {"a": 0.5, "b": 1.0, "c": 0.0, "suite": 0.5}.items():
        own = entry(summary, "x", scenario)
        assert own["to"]["target"]["no_gain"] == share
        assert own["speedup"].get("steps", {"mean": None})["mean"] == (pytest.approx(4.0) if share < 1 else None)
    assert entry(summary, "x", "suite")["to"]["target"]["reached"] == 1.0


def drawn_areas(*areas: int) -> list[list[dict[str, Any]]]:
    """Drawn scenarios with one seed, in which x has so many quarters of a question more than full, all along."""
    found = []
    for number, area in enumerate(areas):
        found += [rows(f"drawn-{number}", "full", 0, (0, 1, 2), questions=f"q{number}")]
        found += [rows(f"drawn-{number}", "x", 0, (area, 1 + area, 2 + area), questions=f"q{number}")]
    return found


def test_over_drawn_scenarios_the_worst_tenth_is_named_and_only_scenarios_are_redrawn():
    summary = summarise(table(*drawn_areas(*[0] + [1] * 14)))
    area = entry(summary, "x", "suite")["against"]["full"]["area"]
    assert area["flops"]["mean"] == pytest.approx(14 / 15 / 4)
    assert area["worst_tenth"]["mean"] == pytest.approx((0 + 1 / 2) / 4 / 1.5)  # the lowest and half of the next
    alike = entry(summarise(table(*drawn_areas(1, 1, 1))), "x", "suite")["against"]["full"]["area"]
    assert (alike["flops"]["low"], alike["flops"]["high"]) == pytest.approx((0.25, 0.25))
    assert "worst_tenth" not in entry(summary, "x", "drawn-0")["against"]["full"]["area"]


def test_the_interval_over_drawn_scenarios_is_that_of_their_spread():
    values = [number % 3 for number in range(30)]
    area = entry(summarise(table(*drawn_areas(*values))), "x", "suite")["against"]["full"]["area"]["flops"]
    assert area["mean"] == pytest.approx(1 / 4)
    half = 1.96 * np.std(np.array(values) / 4, ddof=1) / np.sqrt(30)
    assert (area["high"] - area["low"]) / 2 == pytest.approx(half, rel=0.1)


def test_drawn_scenarios_count_once_every_strategy_has_ended():
    found = drawn_areas(1, 0, 1)
    found += [rows(f"drawn-{number}", "y", 0, (0, 4, 4), questions=f"q{number}") for number in (0, 1)]
    summary = summarise(table(*found))
    assert (summary["unfinished"], summary["population"]) == (["drawn-2"], True)
    for strategy in ("full", "x", "y"):
        assert entry(summary, strategy, "suite")["scenarios"] == 2
    assert entry(summary, "x", "suite")["against"]["full"]["area"]["flops"]["mean"] == pytest.approx(1 / 8)


def test_over_a_suite_all_strategies_are_compared_on_the_scenarios_they_share():
    """x is far ahead on a and level on b, which y has not run."""
    found = [rows(scenario, "full", 0, (0, 1, 2)) for scenario in "ab"]
    found += [rows("a", "x", 0, (0, 4, 4)), rows("b", "x", 0, (0, 1, 2)), rows("a", "y", 0, (0, 4, 4))]
    summary = summarise(table(*found))
    assert summary["unfinished"] == ["b"]
    for strategy in ("x", "y"):
        suite = entry(summary, strategy, "suite")
        assert suite["scenarios"] == 1
        assert suite["area"] == entry(summary, strategy, "a")["area"]
    assert entry(summary, "x", "b")["final"]["targeted"]["mean"] == 0.5  # in the rows by scenario


def test_strategies_that_share_no_scenario_are_not_compared():
    found = [rows(scenario, "full", 0, (0, 1, 2)) for scenario in "ab"]
    summary = summarise(table(*found, rows("a", "x", 0, (0, 4, 4)), rows("b", "y", 0, (0, 4, 4))), ["x", "y"])
    assert not [each for each in summary["entries"] if each["scenario"] == "suite"]
    assert (summary["best_reference"], best_strategy(summary)) == (None, None)


def test_one_value_has_no_interval():
    """Of three drawn scenarios, and of three seeds, `full` gains in one."""
    gains = [(0, 1, 2), (2, 2, 2), (2, 2, 2)]
    drawn = [rows(f"drawn-{n}", name, 0, gains[n]) for n in range(3) for name in ("full", "x")]
    seeds = [rows("a", name, n, gains[n]) for n in range(3) for name in ("full", "x")]
    for own in (entry(summarise(table(*drawn)), "x", "suite"), entry(summarise(table(*seeds)), "x", "a")):
        assert own["speedup"]["steps"] == {"mean": pytest.approx(1.0), "low": None, "high": None}
        assert own["to"]["target"]["steps"] == {"mean": pytest.approx(8.0), "low": None, "high": None}
        assert own["gaining"] == 1
        assert own["area"]["steps"]["low"] < own["area"]["steps"]["high"]  # of three
    assert entry(summarise(table(*seeds[:2])), "x", "a")["speedup"]["steps"]["low"] is not None  # over questions


def test_costs_to_fixed_levels():
    found = [rows("a", "full", s, (0, 1, 2)) for s in (0, 1)]
    found += [rows("a", "x", s, (0, 4, 4) if s else (0, 2, 2), collected=3.0) for s in (0, 1)]
    summary = summarise(table(*found), levels=[0.25, 0.75])
    # x comes to 0.25 after 2 steps and after 1, to 0.75 never (8 steps) and after 3; 3 are paid ahead.
    low, high = (entry(summary, "x")["to"][level] for level in ("0.25", "0.75"))
    assert (low["reached"], low["steps"]["mean"], low["tokens"]["mean"]) == (1.0, 1.5, 4.5)
    assert (high["reached"], high["steps"]["mean"], high["seconds"]["mean"]) == (0.5, 5.5, 8.5)
    assert entry(summary, "full")["to"]["0.25"]["steps"]["mean"] == 4.0
    assert entry(summary, "full")["to"]["0.75"]["reached"] == 0.0


def test_a_strategy_is_compared_on_the_seeds_it_shares():
    found = [rows("a", "full", s, (0, 1, 2)) for s in (0, 1, 2)]
    found += [rows("a", "x", s, (0, 4, 4) if s else (0, 0, 0)) for s in (0, 1, 2)]
    found += [rows("a", "late", 2, (0, 4, 4)), rows("a", "other", 7, (0, 4, 4))]
    summary = summarise(table(*found))
    assert [entry(summary, name)["seeds"] for name in ("full", "x", "late")] == [3, 3, 1]
    assert entry(summary, "late")["speedup"]["steps"]["mean"] == pytest.approx(4.0)
    assert [e["strategy"] for e in summary["entries"] if e["scenario"] == "a"] == ["full", "x", "late"]
    assert "other" in summary["strategies"]


def test_the_same_questions_in_several_seeds_are_redrawn_together():
    """With all seeds alike only the questions vary: four shared ones leave more doubt than eight different ones."""

    def width(names: tuple[str, str]) -> float:
        found = [rows("a", "full", seed, (0, 2, 2), questions=names[seed]) for seed in (0, 1)]
        interval = entry(summarise(table(*found)), "full")["final"]["targeted"]
        return float(interval["high"] - interval["low"])

    assert width(("q", "q")) == pytest.approx(1.0)  # of four questions: none right to all right, beyond 95 %
    found = [rows("a", "full", seed, (0, 2, 2), questions=f"q{seed}") for seed in range(12)]
    shared = [rows("a", "full", seed, (0, 2, 2), questions="q") for seed in range(12)]
    own, together = (entry(summarise(table(*runs)), "full")["final"]["targeted"] for runs in (found, shared))
    assert own["high"] - own["low"] < 0.6 * (together["high"] - together["low"])


def test_runs_that_are_not_paired_are_refused():
    with pytest.raises(ArtifactError, match="not paired"):
        summarise(table(rows("a", "full", 0, (0, 1, 2)), rows("a", "x", 0, (0, 1, 2), questions="p")))
    with pytest.raises(ArtifactError, match="not paired"):
        summarise(table(rows("a", "full", 0, (0, 1, 2)), rows("a", "x", 0, (0, 1, 2), steps=(0, 2, 8))))


def test_references_are_chosen_by_name_and_the_best_is_named():
    found = [rows("a", "full", 0, (0, 1, 2)), rows("a", "x", 0, (0, 4, 4)), rows("a", "y", 0, (0, 0, 1))]
    summary = summarise(table(*found), ["y", "full"])
    assert summary["references"] == ["y", "full"]
    assert summary["best_reference"] == "full"
    assert entry(summary, "x")["against"]["y"]["final"]["targeted"]["mean"] == 0.75
    with pytest.raises(ConfigError, match="no run of 'z'"):
        summarise(table(*found), ["z"])


def test_without_full_there_are_no_speed_ups():
    summary = summarise(table(rows("a", "x", 0, (0, 4, 4)), rows("a", "y", 0, (0, 0, 1))))
    assert (summary["references"], summary["best_reference"]) == ([], None)
    assert entry(summary, "x")["speedup"] == {}
    assert list(entry(summary, "x")["area"]) == ["steps"]
