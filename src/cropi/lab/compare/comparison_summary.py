"""Speed-ups, areas and accuracies of the strategies of a comparison, with intervals, as plain JSON."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cropi.errors import ConfigError
from cropi.lab.compare.curve_statistics import (
    accuracy_curves,
    area_weights,
    first_crossings,
    log_speedups,
    mean_over_seeds,
    percentile_interval,
    redraw_counts,
    restricted_costs,
    seed_counts,
    worst_tenth,
)
from cropi.lab.compare.drawn import seed_of
from cropi.lab.compare.paired_runs import MEASURES, SUITE, Trace, Traces, area_of
from cropi.seeds import derived_seed

TARGET = "full"  # its own final accuracy is what the others are to reach
AREAS = ("steps", "flops")
KINDS = ("targeted", "untargeted")
COMPARED = ("area", "final")  # quantities of which differences from the references are taken
SHARES = ("reached", "no_gain")  # of runs
NEED_GAIN = ("speedup/", "to target/")
MIN_GAIN = 0.05  # of the target strategy's accuracy over a run; with less of it a speed-up means nothing
REDRAWS, CONFIDENCE = 2000, 0.95

Draws = dict[str, np.ndarray]  # quantity -> estimate and redraws (R,)
Seed = Mapping[str, Trace]  # by strategy


def summarise(
    traces: Traces,
    references: Sequence[str] | None = None,
    levels: Sequence[float] = (),
    aside: Sequence[str] = (),
    up_to_step: int | None = None,
) -> dict[str, Any]:
    """Summarise a comparison by scenario and over all scenarios (`suite`). See docs/compare.md.

    `references`: strategies to take differences from; `full` by default. A strategy is compared with them on the seeds
    that all of them have finished. `levels`: further targeted accuracies to give costs for. `aside`: scenarios without
    anything to gain, whose speed-ups do not count over the suite. The suite is the scenarios that all strategies share,
    so that all are compared on the same ones; there are no means over it if they share none. Drawn scenarios count once
    all strategies have ended. ConfigError for an unknown reference.
    """
    strategies = list(dict.fromkeys(name for seeds in traces.values() for own in seeds.values() for name in own))
    references, every = _references(references, strategies), list(traces)
    if _all_drawn(traces):
        traces = _balanced(traces, strategies)
    entries: list[dict[str, Any]] = []
    by_strategy: dict[str, dict[str, tuple[int, Draws]]] = {}
    for scenario, found in traces.items():
        for strategy, (count, draws) in _scenario(scenario, found, strategies, references, levels).items():
            gaining = round(count * (1 - draws["to target/no_gain"][0])) if "to target/no_gain" in draws else 0
            facts = {"scenario": scenario, "strategy": strategy, "seeds": count, "counted": count, "gaining": gaining}
            entries.append(facts | _shown(draws, references, alone=gaining == 1 < count))
            by_strategy.setdefault(strategy, {})[scenario] = count, draws
    shared = [name for name in traces if all(name in own for own in by_strategy.values())]
    for strategy in (name for name in strategies if shared and name in by_strategy):
        own = {scenario: by_strategy[strategy][scenario] for scenario in shared}
        entries.append(_suite(strategy, own, references, aside))
    return {
        "target": TARGET,
        "references": references,
        "best_reference": _best(references, entries),
        "redraws": REDRAWS,
        "confidence": CONFIDENCE,
        "scenarios": every,
        "population": len(traces) > 1 and _all_drawn(traces),
        "unfinished": [name for name in every if name not in shared],
        "aside": [name for name in aside if name in every],
        "up_to_step": up_to_step,
        "strategies": strategies,
        "entries": entries,
    }


def _references(asked: Sequence[str] | None, strategies: Sequence[str]) -> list[str]:
    if asked is None:
        return [TARGET] if TARGET in strategies else []
    for name in asked:
        if name not in strategies:
            raise ConfigError(
                f"there is no run of {name!r}", where="--reference", fix=f"name one of: {', '.join(strategies)}."
            )
    return list(asked)


def _best(references: Sequence[str], entries: Sequence[Mapping[str, Any]]) -> str | None:
    """The reference with the largest area over the suite."""
    areas = {e["strategy"]: area_of(e) for e in entries if e["scenario"] == SUITE}
    return max((name for name in references if name in areas), key=lambda name: areas[name], default=None)


def _all_drawn(scenarios: Iterable[str]) -> bool:
    return all(seed_of(scenario) is not None for scenario in scenarios)


def _balanced(traces: Traces, strategies: Sequence[str]) -> Traces:
    """The scenarios and seeds with a run of every strategy."""
    found = {
        scenario: {seed: own for seed, own in seeds.items() if set(own) == set(strategies)}
        for scenario, seeds in traces.items()
    }
    return {scenario: seeds for scenario, seeds in found.items() if seeds}


# -- one scenario ------------------------------------------------------------------------------------------------------


def _scenario(
    scenario: str,
    seeds: Mapping[int, Seed],
    strategies: Sequence[str],
    references: Sequence[str],
    levels: Sequence[float],
) -> dict[str, tuple[int, Draws]]:
    """By strategy: the number of seeds that target and references share with it, and its draws on them."""
    with_target = any(TARGET in seed for seed in seeds.values())
    needed = {*references, *([TARGET] if with_target else [])}
    groups: dict[tuple[int, ...], list[str]] = {}
    for strategy in strategies:
        shared = tuple(s for s, seed in sorted(seeds.items()) if {strategy, *needed} <= set(seed))
        if shared:
            groups.setdefault(shared, []).append(strategy)
    found: dict[str, tuple[int, Draws]] = {}
    for shared, names in groups.items():
        paired = [*names, *sorted(needed - set(names))]
        generator = np.random.default_rng(derived_seed(0, "compare", scenario, *shared))
        draws = _paired([seeds[s] for s in shared], paired, references, levels, generator)
        found |= {name: (len(shared), draws[name]) for name in names}
    return {name: found[name] for name in strategies if name in found}


def _paired(
    seeds: Sequence[Seed],
    strategies: Sequence[str],
    references: Sequence[str],
    levels: Sequence[float],
    generator: np.random.Generator,
) -> dict[str, Draws]:
    """Draws by strategy, from the same redraws of seeds and questions. `NAME - REFERENCE` are differences."""
    counts_RS = seed_counts(len(seeds), REDRAWS, generator)
    questions: dict[str, np.ndarray] = {}  # the same questions in several seeds are redrawn together
    found = []
    for seed in seeds:
        curves = _curves(seed, strategies, questions, generator)
        found.append(_levels(seed, strategies, curves) | _times(seed, strategies, curves, levels))
    means = {name: _over_seeds([own[name] for own in found if name in own], counts_RS) for name in _names(found)}
    draws: dict[str, Draws] = {}
    for place, strategy in enumerate(strategies):
        draws[strategy] = {name: values_RA[:, place] for name, values_RA in means.items()}
        for reference in references:
            other = strategies.index(reference)
            for name, values_RA in means.items():
                if name.partition("/")[0] in COMPARED:
                    draws[strategy][f"{name} - {reference}"] = values_RA[:, place] - values_RA[:, other]
    return draws


def _names(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The quantities that all have. Those that need a gain are left out where there is none."""
    every = dict.fromkeys(name for own in found for name in own)
    return [name for name in every if name.startswith(NEED_GAIN) or all(name in own for own in found)]


def _over_seeds(values: Sequence[np.ndarray], counts_RS: np.ndarray) -> np.ndarray:
    """Mean over the seeds that have a value. If some have none, the others are redrawn by themselves."""
    if len(values) < counts_RS.shape[1]:
        generator = np.random.default_rng(derived_seed(0, "gaining", len(values)))
        counts_RS = seed_counts(len(values), len(counts_RS) - 1, generator)
    return mean_over_seeds(np.stack(values, axis=1), counts_RS)


def _curves(
    seed: Seed, strategies: Sequence[str], questions: dict[str, np.ndarray], generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """Accuracy (R, A, E) over the targeted sets and over the others, each set with the same weight."""
    curves: dict[str, list[np.ndarray]] = {}
    first = seed[strategies[0]]
    for name in sorted(first.questions):
        correct_AEQ = np.stack([seed[strategy].correct[name] for strategy in strategies])
        key = f"{name}/{first.questions[name]}"
        if key not in questions:
            count = correct_AEQ.shape[-1]
            questions[key] = redraw_counts(count, count, REDRAWS, generator)
        kind = KINDS[0] if first.targeted[name] else KINDS[1]
        curves.setdefault(kind, []).append(accuracy_curves(correct_AEQ, questions[key]))
    return {kind: np.mean(values, axis=0) for kind, values in curves.items()}


def _levels(seed: Seed, strategies: Sequence[str], curves: Mapping[str, np.ndarray]) -> Draws:
    """Final accuracies and areas under the targeted curve (R, A)."""
    found = {f"final/{kind}": curve_RAE[..., -1] for kind, curve_RAE in curves.items()}
    if "targeted" not in curves:
        return found
    for measure in AREAS:
        reference = seed[TARGET].paid(measure) if TARGET in strategies else None
        if measure != "steps" and reference is None:
            continue
        limit = seed[strategies[0]].steps[-1] if reference is None else reference[0][-1] + reference[1][-1]
        costs = [seed[strategy].paid(measure) for strategy in strategies]
        weights_AE = np.stack([area_weights(ahead_E, running_E, float(limit)) for ahead_E, running_E in costs])
        found[f"area/{measure}"] = np.einsum("rae,ae->ra", curves["targeted"], weights_AE)
    return found


def _times(seed: Seed, strategies: Sequence[str], curves: Mapping[str, np.ndarray], levels: Sequence[float]) -> Draws:
    """By measure (R, A): costs up to the levels and up to the target, and log speed-ups against the target strategy.

    Where the target strategy gains less than `MIN_GAIN` there is no target, and this is all that is said.
    """
    if "targeted" not in curves:
        return {}
    curves_RAE, found = curves["targeted"], Draws()
    costs = {
        measure: np.stack([np.stack(seed[strategy].paid(measure)) for strategy in strategies], axis=1)
        for measure in MEASURES
    }
    goals = {f"{level:g}": np.full(len(curves_RAE), level) for level in levels}
    if TARGET in strategies:
        place = strategies.index(TARGET)
        little = float(curves_RAE[0, place, -1] - curves_RAE[0, place, 0]) < MIN_GAIN
        found["to target/no_gain"] = np.full((len(curves_RAE), len(strategies)), float(little))
        goals |= {} if little else {"target": curves_RAE[:, place, -1]}
    for name, levels_R in goals.items():
        places_RA = first_crossings(curves_RAE, levels_R)
        found[f"to {name}/reached"] = 1.0 - np.isnan(places_RA)
        found |= {f"to {name}/{measure}": restricted_costs(places_RA, costs[measure]) for measure in MEASURES}
        if name != "target":
            continue
        steps = seed[TARGET].steps
        one_step = 1 / float(steps[1] - steps[0])
        theirs_R = places_RA[:, place]
        for measure, costs_AE in costs.items():
            speedup_RA = log_speedups(places_RA, theirs_R, costs_AE, costs_AE[:, place], one_step)
            found[f"speedup/{measure}"] = speedup_RA
    return found


# -- all scenarios -----------------------------------------------------------------------------------------------------


def _suite(
    strategy: str, found: Mapping[str, tuple[int, Draws]], references: Sequence[str], aside: Sequence[str]
) -> dict[str, Any]:
    """Means over scenarios (of speed-ups: geometric).

    Drawn scenarios stand for a population: if all are drawn, the scenarios are redrawn, and intervals are about it.
    """
    kept = [each for scenario, each in found.items() if scenario not in aside]
    counted = [draws for _, draws in kept]
    everything = [draws for _, draws in found.values()]
    means: Draws = {}
    for name in _names(everything):
        over = counted if name.partition("/")[0] not in COMPARED else everything
        values = [own[name] for own in over if name in own]
        if values and _all_drawn(found):
            means |= _over_population(name, np.array([values_R[0] for values_R in values]))
        elif values:
            means[name] = np.mean(values, axis=0)
    facts = {
        "scenario": SUITE,
        "strategy": strategy,
        "scenarios": len(found),
        "seeds": sum(n for n, _ in found.values()),
        "counted": sum(n for n, _ in kept),  # runs that speed-ups and `no_gain` are about
        "gaining": sum("speedup/steps" in draws for draws in counted),  # scenarios that have a speed-up
    }
    return facts | _shown(means, references)


def _over_population(name: str, values_C: np.ndarray) -> Draws:
    """Mean over C drawn scenarios, redrawn C - 1 at a time, as seeds are; of differences of area the worst tenth, too.

    How scenarios vary includes the doubt about each, so seeds and questions are not redrawn as well.
    """
    generator = np.random.default_rng(derived_seed(0, "scenarios", len(values_C)))
    counts_RC = seed_counts(len(values_C), REDRAWS, generator).astype(float)
    if len(values_C) < 2:
        counts_RC[1:] = math.nan  # one scenario does not say how they vary
    found = {name: counts_RC @ values_C / counts_RC.sum(axis=1)}
    if name.startswith("area/flops - "):
        found[name.replace("flops", "worst_tenth")] = worst_tenth(values_C, counts_RC)
    return found


# -- output -----------------------------------------------------------------------------------------------------------


def _shown(draws: Draws, references: Sequence[str], *, alone: bool = False) -> dict[str, Any]:
    """Intervals by quantity; shares as they are. Speed-ups leave their logarithms here.

    Bounds are None where there are not two values to redraw; `alone`: those of what needs a gain, that one seed has.
    """
    result: dict[str, Any] = {"speedup": {}, "to": {}, "area": {}, "final": {}}
    result["against"] = {reference: {"area": {}, "final": {}} for reference in references}
    for name, values_R in draws.items():
        quantity, _, reference = name.partition(" - ")
        group, key = quantity.split("/")
        shown = np.exp(values_R) if group == "speedup" else values_R
        value: Any = float(shown[0])
        if key not in SHARES:
            value = vars(percentile_interval(shown, CONFIDENCE))
            if (alone and name.startswith(NEED_GAIN)) or math.isnan(value["low"]):
                value = value | {"low": None, "high": None}
        where = result["against"][reference] if reference else result
        if group.startswith("to "):
            where["to"].setdefault(group.removeprefix("to "), {})[key] = value
        else:
            where[group][key] = value
    return result
