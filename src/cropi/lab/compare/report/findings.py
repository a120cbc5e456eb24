"""What a comparison shows, in a few sentences, whichever way it went."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cropi.functional.bootstrap import Interval
from cropi.lab.compare.report.labels import UNITS, censored, code, gap, no_gain, part, ratio_interval, reached
from cropi.lab.compare.report.runs_data import Comparison, interval
from cropi.report.wording import count, listed, percent

FEW_SEEDS = 5
LEAD_MEASURES = ("steps", "flops", "seconds")


def lead(comparison: Comparison) -> str:
    """The paragraph that a hurried reader reads."""
    main = comparison.main
    if main is None or main not in comparison.entries(comparison.scope):
        names = listed([code(name) for name in comparison.strategies])
        return f"Only {names}: there is nothing to compare. {_size(comparison)}"
    entry = comparison.entries(comparison.scope)[main]
    sentences = [_speed(comparison, main, entry), _area(comparison, main, entry), _size(comparison)]
    return " ".join(sentence for sentence in sentences if sentence)


def caveats(comparison: Comparison) -> str:
    """What a sceptical reader has to know beside the first paragraph."""
    main = comparison.main
    entry = comparison.entries(comparison.scope).get(main) if main else None
    sentences = [_by_scenario(comparison, main), _chosen(comparison, main), _seeds(comparison)]
    if main and entry is not None:
        sentences.insert(0, _untargeted(comparison, main, entry))
        sentences += [_nothing_to_gain(comparison, entry), _incomplete(comparison, main, entry)]
    level = percent(comparison.summary["confidence"])
    redraws = count(comparison.summary["redraws"])
    sentences.append(f"In brackets: {level} intervals from {redraws} paired redraws of seeds and questions.")
    return " ".join(sentence for sentence in sentences if sentence)


def _speed(comparison: Comparison, main: str, entry: Mapping[str, Any]) -> str:
    target = code(comparison.summary["target"])
    found = {m: value for m in LEAD_MEASURES if (value := interval(entry["speedup"].get(m))) is not None}
    if not found:
        return f"{target} is not there to be compared with: no speed-up is given."
    most = "at most " if censored(entry) else ""
    parts = [f"{ratio_interval(value)} times the {UNITS[measure]}" for measure, value in found.items()]
    text = f"To its own final targeted accuracy {target} needs {most}{listed(parts)} of {code(main)}"
    if not censored(entry):
        return f"{text}. {_told_apart(found)}"
    share = part(1 - (reached(entry) or 0.0))
    below = [UNITS[m] for m, value in found.items() if value.high < 1]
    slower = f", but they do show that it is slower in {listed(below)}" if below else ""
    return (
        f"{text}, which never got there in {share} of its runs. These ratios and the ends of their intervals are upper "
        f"bounds: they show no gain by themselves{slower}."
    )


def _told_apart(found: Mapping[str, Interval]) -> str:
    """Where the intervals stand to 1."""
    faster = [UNITS[m] for m, value in found.items() if value.low > 1]
    slower = [UNITS[m] for m, value in found.items() if value.high < 1]
    neither = [UNITS[m] for m in found if UNITS[m] not in (*faster, *slower)]
    if len(faster) == len(found):
        return "All of these intervals lie above 1."
    parts = [f"above 1 in {listed(faster)}"] if faster else []
    parts += [f"below 1, so it is slower, in {listed(slower)}"] if slower else []
    parts += [f"around 1, so no difference is shown, in {listed(neither)}"] if neither else []
    return f"The interval lies {'; '.join(parts)}."


def _area(comparison: Comparison, main: str, entry: Mapping[str, Any]) -> str:
    """Against the best reference."""
    references, best = comparison.summary["references"], comparison.summary["best_reference"]
    found = interval(entry["against"].get(best, {}).get("area", {}).get("steps"))
    if found is None or best == main:
        return ""
    which = f", the best of {len(references)} references" if len(references) > 1 else ""
    text = f"Against {code(best)}{which}, its mean targeted accuracy over the steps differs by {gap(found)}"
    return f"{text}{_told(found)}."


def _untargeted(comparison: Comparison, main: str, entry: Mapping[str, Any]) -> str:
    """Against the target's arm, or the best reference."""
    target, best = comparison.summary["target"], comparison.summary["best_reference"]
    other = target if target in comparison.summary["references"] else best
    found = interval(entry["against"].get(other, {}).get("final", {}).get("untargeted"))
    if found is None or other == main:
        return ""
    names = f"{code(main)} at the end differs from that of {code(other)}"
    return f"Untargeted accuracy of {names} by {gap(found)}{_told(found)}."


def _told(found: Interval) -> str:
    return "" if found.low > 0 or found.high < 0 else ", an interval that holds 0: no difference is shown"


def _size(comparison: Comparison) -> str:
    runs = sum(len(found) for seeds in comparison.traces.values() for found in seeds.values())
    scenarios, strategies = _plural(len(comparison.scenarios), "scenario"), len(comparison.strategies)
    return (
        f"{scenarios}, {_seed_range(comparison)}, {_plural(strategies, 'strategy')}, {_plural(runs, 'run')}; "
        "trajectories, scores, selection and training are charged, evaluation is not."
    )


def _plural(number: int, word: str) -> str:
    many = f"{word[:-1]}ies" if word.endswith("y") else f"{word}s"
    return f"{number:,} {word if number == 1 else many}"


def _counts(comparison: Comparison) -> list[int]:
    """Seeds of every strategy on every scenario."""
    return [entry["seeds"] for name in comparison.scenarios for entry in comparison.entries(name).values()]


def _seed_range(comparison: Comparison) -> str:
    low, high = min(_counts(comparison)), max(_counts(comparison))
    return f"{_plural(low, 'seed')} each" if low == high else f"{low} to {high} seeds each"


def _seeds(comparison: Comparison) -> str:
    fewest = min(_counts(comparison))
    if fewest == 1:
        return "One seed: where nothing else is redrawn, the intervals cover the choice of questions, not of seeds."
    if fewest < FEW_SEEDS:
        return f"{fewest} seeds are few: the intervals are rough, and percentiles of a handful come out too narrow."
    return ""


def _by_scenario(comparison: Comparison, main: str | None) -> str:
    """How often the speed-up in FLOPs is told apart from 1."""
    if main is None or len(comparison.scenarios) < 2:
        return ""
    entries = [found[main] for name in comparison.scenarios if main in (found := comparison.entries(name))]
    known = [(value, censored(e)) for e in entries if (value := interval(e["speedup"].get("flops"))) is not None]
    if not known:
        return ""
    above = sum(value.low > 1 and not bound for value, bound in known)
    below = sum(value.high < 1 for value, _ in known)
    return (
        f"By scenario, the speed-up of {code(main)} in FLOPs has an interval above 1 on {above} of {len(known)}, below "
        f"1 on {below}, and shows no difference on {len(known) - above - below} (upper bounds count there)."
    )


def _chosen(comparison: Comparison, main: str | None) -> str:
    known = (comparison.summary["target"], *comparison.summary["references"])
    others = [name for name in comparison.strategies if name not in known]
    if main not in others or comparison.chosen_before or len(others) < 2:
        return ""
    return (
        f"{code(main)} is the best of {len(others)} strategies by area on these very runs, which favours it: confirm "
        "it on other seeds."
    )


def _nothing_to_gain(comparison: Comparison, entry: Mapping[str, Any]) -> str:
    share = no_gain(entry)
    if not share:
        return ""
    target = code(comparison.summary["target"])
    return f"In {part(share)} of the runs {target} ends no higher than the base policy: the ratio is 1 there."


def _incomplete(comparison: Comparison, main: str, entry: Mapping[str, Any]) -> str:
    done = entry.get("scenarios", 1)
    if done == len(comparison.scenarios):
        return ""
    return f"{code(main)} has been run on {done} of {len(comparison.scenarios)} scenarios only."
