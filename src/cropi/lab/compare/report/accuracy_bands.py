"""Accuracy curves of a comparison with bands, over steps and over costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from cropi.lab.compare.curve_statistics import accuracy_curves, redraw_counts, seed_counts
from cropi.lab.compare.paired_runs import Comparison
from cropi.seeds import derived_seed

POINTS = 32  # of a curve over costs, which differ by seed


@dataclass(frozen=True)
class Band:
    """Mean targeted accuracy over seeds with its percentiles, at steps or costs `at`."""

    at: Float[np.ndarray, " G"]
    mean: Float[np.ndarray, " G"]
    low: Float[np.ndarray, " G"]
    high: Float[np.ndarray, " G"]


def bands(comparison: Comparison, scenario: str, measures: Iterable[str]) -> dict[str, dict[str, Band]]:
    """Bands by measure and strategy; none if no test set is targeted.

    Over costs, accuracy is flat while something is paid ahead and then a straight line to the next evaluation; a curve
    ends where the cheapest of its runs does. Redrawn are seeds, and questions within test sets: those that seeds have
    in common together, as in the tables.
    """
    if not _targeted_sets(comparison, scenario):
        return {}
    curves = _accuracies(comparison, scenario)
    names = [name for name in comparison.strategies if comparison.seeds(scenario, name)]
    return {
        measure: {name: _band(comparison, scenario, name, curves, measure) for name in names} for measure in measures
    }


def _targeted_sets(comparison: Comparison, scenario: str) -> list[str]:
    traces = [trace for own in comparison.traces.get(scenario, {}).values() for trace in own.values()]
    return [name for name, targeted in traces[0].targeted.items() if targeted] if traces else []


def _accuracies(comparison: Comparison, scenario: str) -> dict[tuple[int, str], Float[np.ndarray, "R E"]]:
    """Mean over the targeted sets by seed and strategy, with the same redraws of questions for all strategies."""
    names = _targeted_sets(comparison, scenario)
    drawn: dict[tuple[str, str], np.ndarray] = {}
    found: dict[tuple[int, str], np.ndarray] = {}
    for seed, traces in comparison.traces[scenario].items():
        by_set = []
        for name in names:
            correct_AEQ = np.stack([trace.correct[name] for trace in traces.values()])
            key = name, next(iter(traces.values())).questions[name]
            if key not in drawn:
                generator = np.random.default_rng(derived_seed(0, "curves", scenario, *key))
                count = correct_AEQ.shape[-1]
                drawn[key] = redraw_counts(count, count, comparison.summary["redraws"], generator)
            by_set.append(accuracy_curves(correct_AEQ, drawn[key]))
        mean_RAE = np.mean(by_set, axis=0)
        found |= {(seed, strategy): mean_RAE[:, place] for place, strategy in enumerate(traces)}
    return found


def _band(
    comparison: Comparison,
    scenario: str,
    strategy: str,
    curves: Mapping[tuple[int, str], Float[np.ndarray, "R E"]],
    measure: str,
) -> Band:
    seeds, traces = comparison.seeds(scenario, strategy), comparison.own_traces(scenario, strategy)
    at_G, weights = _grid([trace.paid(measure) for trace in traces], traces[0].steps, measure)
    values = [curves[seed, strategy] @ weights_GE.T for seed, weights_GE in zip(seeds, weights, strict=True)]
    return _redrawn(comparison, at_G, np.stack(values), derived_seed(0, "curves", scenario, *seeds))


def population_bands(comparison: Comparison, measures: Iterable[str]) -> dict[str, dict[str, Band]]:
    """Bands by measure and strategy over the first seeds of all scenarios, which alone are redrawn: C - 1 of C."""
    scenarios = comparison.scenarios
    curves = {name: _accuracies(comparison, name) for name in scenarios}
    found: dict[str, dict[str, Band]] = {measure: {} for measure in measures}
    for strategy in comparison.strategies:
        traces = [comparison.own_traces(name, strategy)[0] for name in scenarios]
        means = [curves[name][comparison.seeds(name, strategy)[0], strategy][:1] for name in scenarios]
        for measure, own in found.items():
            at_G, weights = _grid([trace.paid(measure) for trace in traces], traces[0].steps, measure)
            values = np.stack([mean_E @ weights_GE.T for mean_E, weights_GE in zip(means, weights, strict=True)])
            repeated = np.repeat(values, comparison.summary["redraws"] + 1, axis=1)
            own[strategy] = _redrawn(comparison, at_G, repeated, derived_seed(0, "curves", "population"))
    return found


def _grid(
    paid: Sequence[tuple[np.ndarray, np.ndarray]], steps_E: np.ndarray, measure: str
) -> tuple[Float[np.ndarray, " G"], list[Float[np.ndarray, "G E"]]]:
    """Steps or costs up to the cheapest run's, and by run the weights of its evaluations there."""
    if measure == "steps":
        return steps_E.astype(float), [np.eye(len(steps_E)) for _ in paid]
    at_G = np.linspace(0.0, min(float(ahead_E[-1] + along_E[-1]) for ahead_E, along_E in paid), POINTS)
    return at_G, [spread(at_G, *costs) for costs in paid]


def _redrawn(
    comparison: Comparison, at_G: Float[np.ndarray, " G"], values_SRG: Float[np.ndarray, "S R G"], seed: int
) -> Band:
    """The mean over runs with its interval; redraw 0 is of all as they are."""
    counts_RS = seed_counts(len(values_SRG), comparison.summary["redraws"], np.random.default_rng(seed))
    mean_RG = np.einsum("srg,rs->rg", values_SRG, counts_RS / counts_RS.sum(axis=1, keepdims=True))
    tail = (1 - comparison.summary["confidence"]) / 2
    low_G, high_G = np.quantile(mean_RG[1:], [tail, 1 - tail], axis=0)
    return Band(at_G, mean_RG[0], low_G, high_G)


def spread(
    at_G: Float[np.ndarray, " G"], ahead_E: Float[np.ndarray, " E"], along_E: Float[np.ndarray, " E"]
) -> Float[np.ndarray, "G E"]:
    """w with accuracy at a cost = sum_e w_e accuracy_e: flat while something is paid ahead, then a straight line."""
    corners = np.concatenate([[0.0], np.stack([ahead_E[1:] + along_E[:-1], ahead_E[1:] + along_E[1:]], axis=1).ravel()])
    last = len(along_E) - 1
    owner = np.concatenate([[0], np.stack([np.arange(last), np.arange(1, last + 1)], axis=1).ravel()])
    return np.stack([np.interp(at_G, corners, (owner == e).astype(float)) for e in range(last + 1)], axis=1)
