"""From the table of a comparison to what it shows: plain JSON values, with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from cropi.errors import ArtifactError, ConfigError
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
)
from cropi.lab.compare.results import COSTS
from cropi.seeds import derived_seed

TARGET = "full"  # its own final accuracy is what the others are to reach
SUITE = "suite"  # all scenarios together
MEASURES = ("steps", "tokens", "flops", "seconds")
AREAS = ("steps", "flops")
KINDS = ("targeted", "untargeted")
COMPARED = ("area", "final")  # quantities of which differences from the references are taken
SHARES = ("reached", "no_gain")  # of runs
REDRAWS, CONFIDENCE = 2000, 0.95

Draws = dict[str, np.ndarray]  # quantity -> estimate and redraws (R,)


@dataclass(frozen=True)
class _Test:
    """One test set of one seed: verdicts (evaluations, questions) by strategy."""

    targeted: bool
    questions: str
    correct: Mapping[str, np.ndarray]


@dataclass(frozen=True)
class _Seed:
    """One scenario and seed: steps, test sets, and by strategy the costs (ahead, running) of every measure."""

    steps: np.ndarray
    tests: Mapping[str, _Test]
    costs: Mapping[str, Mapping[str, np.ndarray]]

    @property
    def strategies(self) -> list[str]:
        return list(self.costs)


def summarise(
    table: pa.Table,
    references: Sequence[str] | None = None,
    levels: Sequence[float] = (),
    aside: Sequence[str] = (),
    up_to_step: int | None = None,
) -> dict[str, Any]:
    """What a comparison shows, by scenario and over all of them (`suite`). See docs/compare.md.

    `levels`: targeted accuracies, beside that of `full`, to which costs are wanted. `references`: strategies from which
    differences are taken; `full` where it is there. A strategy is compared with them on the seeds that all of them have
    finished. `aside`: scenarios whose costs and speed-ups do not count over the suite, because there is nothing to gain
    in them; their accuracies do. `up_to_step`: noted, where the table holds what runs had reached by then. ConfigError
    for a reference or scenario of which there is no run.
    """
    seeds = _read(table)
    for name in aside:
        if name not in seeds:
            raise ConfigError(
                f"there is no scenario {name!r}", where="--aside", fix=f"name one of: {', '.join(seeds)}."
            )
    strategies = list(dict.fromkeys(table.column("strategy").to_pylist()))
    references = _references(references, strategies)
    entries: list[dict[str, Any]] = []
    by_strategy: dict[str, dict[str, tuple[int, Draws]]] = {}
    for scenario, found in seeds.items():
        for strategy, (count, draws) in _scenario(scenario, found, strategies, references, levels).items():
            facts = {"scenario": scenario, "strategy": strategy, "seeds": count}
            entries.append(facts | _shown(draws, references))
            by_strategy.setdefault(strategy, {})[scenario] = count, draws
    entries += [_suite(name, by_strategy[name], references, aside) for name in strategies if name in by_strategy]
    return {
        "target": TARGET,
        "references": references,
        "best_reference": _best(references, entries),
        "redraws": REDRAWS,
        "confidence": CONFIDENCE,
        "scenarios": list(seeds),
        "aside": list(aside),
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
    areas = {e["strategy"]: e["area"]["steps"]["mean"] for e in entries if e["scenario"] == SUITE}
    return max((name for name in references if name in areas), key=lambda name: areas[name], default=None)


# -- the table as arrays -----------------------------------------------------------------------------------------------


def _read(table: pa.Table) -> dict[str, dict[int, _Seed]]:
    """Arrays by scenario and seed. ArtifactError where strategies of a seed differ in steps or questions."""
    rows: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        rows.setdefault((row["scenario"], row["seed"]), []).append(row)
    found: dict[str, dict[int, _Seed]] = {}
    for (scenario, seed), own in rows.items():
        found.setdefault(scenario, {})[seed] = _seed(own, f"{scenario}, seed {seed}")
    return found


def _seed(rows: Sequence[Mapping[str, Any]], where: str) -> _Seed:
    by_run: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["step"]):
        by_run.setdefault((row["strategy"], row["set"]), []).append(row)
    steps = {tuple(row["step"] for row in own) for own in by_run.values()}
    questions = {(row["set"], row["targeted"], row["questions"]) for row in rows}
    sets = {name for name, _, _ in questions}
    if len(steps) > 1 or len(questions) > len(sets):
        raise ArtifactError(
            "strategies were evaluated at other steps or on other questions: they are not paired",
            where=where,
            fix="make these runs anew in a folder of their own.",
        )
    names = dict.fromkeys(row["strategy"] for row in rows)
    tests = {
        name: _Test(targeted, digest, {s: np.array([r["correct"] for r in by_run[s, name]], float) for s in names})
        for name, targeted, digest in sorted(questions)
    }
    first = min(sets)
    return _Seed(np.array(steps.pop()), tests, {s: _measures(by_run[s, first]) for s in names})


def _measures(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Costs (ahead of the steps, running along with them) of every measure at every evaluation."""

    def column(*names: str) -> np.ndarray:
        return np.array([sum(row[name] for name in names) for row in rows], float)

    nothing = np.zeros(len(rows))
    return {
        "steps": np.stack([nothing, column("step")]),
        "tokens": np.stack([column("collect_tokens"), column("train_tokens")]),
        "flops": np.stack([column("collect_flops", "score_flops"), column("train_flops")]),
        "seconds": np.stack([column(*COSTS[:-1]), column(COSTS[-1])]),
    }


# -- one scenario ------------------------------------------------------------------------------------------------------


def _scenario(
    scenario: str,
    seeds: Mapping[int, _Seed],
    strategies: Sequence[str],
    references: Sequence[str],
    levels: Sequence[float],
) -> dict[str, tuple[int, Draws]]:
    """Of every strategy the number of seeds that it shares with target and references, and its draws on them."""
    with_target = any(TARGET in seed.strategies for seed in seeds.values())
    needed = {*references, *([TARGET] if with_target else [])}
    groups: dict[tuple[int, ...], list[str]] = {}
    for strategy in strategies:
        shared = tuple(s for s, seed in sorted(seeds.items()) if {strategy, *needed} <= set(seed.strategies))
        if shared:
            groups.setdefault(shared, []).append(strategy)
    found: dict[str, tuple[int, Draws]] = {}
    for shared, names in groups.items():
        arms = [*names, *sorted(needed - set(names))]
        generator = np.random.default_rng(derived_seed(0, "compare", scenario, *shared))
        draws = _paired([seeds[s] for s in shared], arms, references, levels, generator)
        found |= {name: (len(shared), draws[name]) for name in names}
    return {name: found[name] for name in strategies if name in found}


def _paired(
    seeds: Sequence[_Seed],
    arms: Sequence[str],
    references: Sequence[str],
    levels: Sequence[float],
    generator: np.random.Generator,
) -> dict[str, Draws]:
    """The same redraws of seeds and questions for all arms. Draws by arm; `NAME - REFERENCE` are differences."""
    counts_RS = seed_counts(len(seeds), REDRAWS, generator)
    questions: dict[str, np.ndarray] = {}  # the same questions in several seeds are redrawn together
    found = []
    for seed in seeds:
        curves = _curves(seed, arms, questions, generator)
        found.append(_levels(seed, arms, curves) | _times(seed, arms, curves, levels))
    names = [name for name in found[0] if all(name in own for own in found)]
    means = {name: mean_over_seeds(np.stack([own[name] for own in found], axis=1), counts_RS) for name in names}
    draws: dict[str, Draws] = {}
    for place, arm in enumerate(arms):
        draws[arm] = {name: values_RA[:, place] for name, values_RA in means.items()}
        for reference in references:
            other = arms.index(reference)
            for name, values_RA in means.items():
                if name.partition("/")[0] in COMPARED:
                    draws[arm][f"{name} - {reference}"] = values_RA[:, place] - values_RA[:, other]
    return draws


def _curves(
    seed: _Seed, arms: Sequence[str], questions: dict[str, np.ndarray], generator: np.random.Generator
) -> dict[str, np.ndarray]:
    """Accuracy (R, A, E) over the targeted sets and over the others, each set with the same weight."""
    curves: dict[str, list[np.ndarray]] = {}
    for name, test in seed.tests.items():
        correct_AEQ = np.stack([test.correct[arm] for arm in arms])
        key = f"{name}/{test.questions}"
        if key not in questions:
            count = correct_AEQ.shape[-1]
            questions[key] = redraw_counts(count, count, REDRAWS, generator)
        kind = KINDS[0] if test.targeted else KINDS[1]
        curves.setdefault(kind, []).append(accuracy_curves(correct_AEQ, questions[key]))
    return {kind: np.mean(values, axis=0) for kind, values in curves.items()}


def _levels(seed: _Seed, arms: Sequence[str], curves: Mapping[str, np.ndarray]) -> Draws:
    """Final accuracies and areas under the targeted curve (R, A)."""
    found = {f"final/{kind}": curve_RAE[..., -1] for kind, curve_RAE in curves.items()}
    if "targeted" not in curves:
        return found
    for measure in AREAS:
        reference = seed.costs[TARGET] if TARGET in arms else None
        if measure != "steps" and reference is None:
            continue
        limit = seed.steps[-1] if reference is None else reference[measure][:, -1].sum()
        costs = [seed.costs[arm][measure] for arm in arms]
        weights_AE = np.stack([area_weights(ahead_E, running_E, float(limit)) for ahead_E, running_E in costs])
        found[f"area/{measure}"] = np.einsum("rae,ae->ra", curves["targeted"], weights_AE)
    return found


def _times(seed: _Seed, arms: Sequence[str], curves: Mapping[str, np.ndarray], levels: Sequence[float]) -> Draws:
    """By measure (R, A): costs up to the levels and up to the target, and log speed-ups against the target's arm."""
    if "targeted" not in curves:
        return {}
    curves_RAE, found = curves["targeted"], Draws()
    costs = {measure: np.stack([seed.costs[arm][measure] for arm in arms], axis=1) for measure in MEASURES}
    goals = {f"{level:g}": np.full(len(curves_RAE), level) for level in levels}
    if TARGET in arms:
        place = arms.index(TARGET)
        goals["target"] = curves_RAE[:, place, -1]
    for name, levels_R in goals.items():
        places_RA = first_crossings(curves_RAE, levels_R)
        found[f"to {name}/reached"] = 1.0 - np.isnan(places_RA)
        found |= {f"to {name}/{measure}": restricted_costs(places_RA, costs[measure]) for measure in MEASURES}
        if name != "target":
            continue
        one_step = 1 / float(seed.steps[1] - seed.steps[0])
        theirs_R = places_RA[:, place]
        found["to target/no_gain"] = np.repeat((theirs_R == 0)[:, None], len(arms), axis=1).astype(float)
        for measure, costs_AE in costs.items():
            speedup_RA = log_speedups(places_RA, theirs_R, costs_AE, costs_AE[:, place], one_step)
            found[f"speedup/{measure}"] = speedup_RA
    return found


# -- what is shown -----------------------------------------------------------------------------------------------------


def _suite(
    strategy: str, found: Mapping[str, tuple[int, Draws]], references: Sequence[str], aside: Sequence[str]
) -> dict[str, Any]:
    """Means over the scenarios that a strategy has been run on (of speed-ups: geometric)."""
    counted = [draws for scenario, (_, draws) in found.items() if scenario not in aside]
    everything = [draws for _, draws in found.values()]
    means = {}
    for name in everything[0]:
        over = counted if name.partition("/")[0] not in COMPARED else everything
        if over and all(name in own for own in over):
            means[name] = np.mean([own[name] for own in over], axis=0)
    facts = {
        "scenario": SUITE,
        "strategy": strategy,
        "scenarios": len(found),
        "seeds": sum(n for n, _ in found.values()),
    }
    return facts | _shown(means, references)


def _shown(draws: Draws, references: Sequence[str]) -> dict[str, Any]:
    """Intervals by quantity; shares as they are. Speed-ups leave their logarithms here."""
    result: dict[str, Any] = {"speedup": {}, "to": {}, "area": {}, "final": {}}
    result["against"] = {reference: {"area": {}, "final": {}} for reference in references}
    for name, values_R in draws.items():
        quantity, _, reference = name.partition(" - ")
        group, key = quantity.split("/")
        shown = np.exp(values_R) if group == "speedup" else values_R
        value = float(shown[0]) if key in SHARES else vars(percentile_interval(shown, CONFIDENCE))
        where = result["against"][reference] if reference else result
        if group.startswith("to "):
            where["to"].setdefault(group.removeprefix("to "), {})[key] = value
        else:
            where[group][key] = value
    return result
