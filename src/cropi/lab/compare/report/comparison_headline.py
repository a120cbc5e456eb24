"""The headline of a comparison: at most two sentences."""

from __future__ import annotations

from cropi.lab.compare.paired_runs import Comparison, interval
from cropi.lab.compare.report.ratio_format import UNITS, censored, ratio_interval, reached
from cropi.report.wording import code, listed, percent

HEADLINE_MEASURES = ("steps", "flops", "seconds")


def headline(comparison: Comparison) -> str:
    """Say how much sooner the main strategy reaches the target's accuracy, and how sure that is."""
    main, entries = comparison.main, comparison.entries(comparison.scope)
    if main is None or main not in entries:
        names = listed([code(name) for name in comparison.strategies])
        return f"Only {names}: there is nothing to compare."
    entry, target = entries[main], code(comparison.summary["target"])
    known = {m: found for m in HEADLINE_MEASURES if (found := interval(entry["speedup"].get(m))) is not None}
    if not known:
        return f"{target} was not run, so there is no target and no speed-up."
    ratios = listed([f"{ratio_interval(found)} times as fast in {UNITS[measure]}" for measure, found in known.items()])
    if censored(entry):
        missed = percent(1 - (reached(entry) or 0.0))
        return (
            f"{code(main)} never reached the final accuracy of {target} in {missed} of its runs. It is at most "
            f"{ratios}."
        )
    return (
        f"{code(main)} reaches the final accuracy of {target} {ratios}, rollouts and scoring included. "
        f"{_certainty(comparison)}"
    )


def _certainty(comparison: Comparison) -> str:
    level = percent(comparison.summary["confidence"])
    counts = [entry["seeds"] for name in comparison.scenarios for entry in comparison.entries(name).values()]
    if max(counts) == 1:
        return f"One seed: the {level} intervals cover the choice of questions, not of seeds."
    span = str(min(counts)) if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"
    return f"Scenarios: {len(comparison.scenarios)}; seeds of each: {span}; {level} intervals over seeds and questions."
