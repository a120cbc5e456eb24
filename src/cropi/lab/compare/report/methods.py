"""How a comparison was made: what is shared and charged, definitions, limits, and where the numbers come from."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from cropi.artifacts import read_sealed
from cropi.lab.compare.report.labels import code
from cropi.lab.compare.report.runs_data import Comparison
from cropi.loading import recipe_names, suite_names
from cropi.presets import presets
from cropi.report.blocks import Block, Code, Table, Text
from cropi.report.wording import ABSENT, count, percent


def method(comparison: Comparison) -> list[Block]:
    """Shared, charged, target, censoring, intervals."""
    summary = comparison.summary
    target, level = code(summary["target"]), percent(summary["confidence"])
    return [
        Text(
            "Paired runs: all strategies of a scenario and seed start from the same policy, pool, stored trajectories "
            "and test questions, train for the same number of steps and are evaluated at the same ones."
        ),
        Text(
            "Charged: collecting the stored trajectories, in full and before its first step, to every strategy that "
            "reads them; fresh trajectories, scores and selection before the first step of the stage they are for; "
            "training with its rollouts, dropped ones too, as it goes. Not charged: evaluation, which decides nothing "
            "and is the same for all."
        ),
        Text(
            "FLOPs: 2 P a token and forward pass, with P the parameters in matrix products. Generation takes 1 forward "
            "pass a token, collection 2, training generation and 3 more for every pass over a batch; scores by their "
            "estimator. Tokens are those generated."
        ),
        Text(
            "Accuracy: mean over the questions of a test set, of the share of right answers among those sampled "
            "(evaluate.samples), or of the greedy answer where none are; targeted: mean over the targeted sets, "
            "untargeted: over the others. Area: mean targeted accuracy over the run."
        ),
        Text(
            f"Target: {target}'s own targeted accuracy at its last step, of the same seed. The time to it is where a "
            "curve first gets there, by a straight line between evaluations; what is paid ahead is paid in full, and "
            "no time is shorter than one step. Speed-up: that time of "
            f"{target} over the strategy's, geometric mean over seeds, then over scenarios with the same weight."
        ),
        Text(
            "Censoring: a run that never reaches the target is given the time of its end. Its ratio is too high, so "
            f"the mean is an upper bound, marked `<`, and so are both ends of its interval. Where {target} ends no "
            "higher than the base policy there is nothing to reach sooner: ratio 1 for all." + _aside(summary["aside"])
        ),
        Text(
            f"Intervals: {level}, percentiles of {count(summary['redraws'])} redraws of seeds and of questions within "
            "test sets, the same redraw for all strategies. Of S seeds S − 1 are redrawn (Rao and Wu 1988); questions "
            "that seeds have in common are redrawn together. Over the suite they hold for these scenarios, not for a "
            "population of scenarios. They are not corrected for the number of strategies."
        ),
    ]


def _aside(names: Sequence[str]) -> str:
    if not names:
        return ""
    return (
        f" Costs and speed-ups over the suite leave out {', '.join(map(code, names))}, where nothing is to be gained."
    )


def limits(comparison: Comparison) -> list[Block]:
    """What the numbers cannot say."""
    references = comparison.summary["references"]
    best = comparison.summary["best_reference"]
    texts = [
        "Few seeds give wide intervals, and percentiles of a handful are somewhat too narrow. Numbers on seeds on "
        "which something was chosen are too good: report on fresh ones.",
        "Times lie between evaluations: how often those are made is their resolution. Seconds depend on the machine "
        "and on how many runs share it; FLOPs leave out padding, attention scores and the optimiser.",
    ]
    if best is not None and len(references) > 1:
        texts.append(
            f"{code(best)} is called the best reference because its area is the largest here: chosen on the same data, "
            "which favours the reference."
        )
    if (step := comparison.summary["up_to_step"]) is not None:
        texts.append(
            f"What is called the end here is step {step}: runs that go further are cut there, and those that have not "
            "come to their end are among them."
        )
    short = _short(comparison)
    if short:
        texts.append(
            "Compared on fewer seeds than there are, because some runs have not finished: see the table below."
        )
    rows = [[scenario, name, str(own), str(most)] for scenario, name, own, most in short]
    header = ["scenario", "strategy", "seeds", "of"]
    table: list[Block] = [Table("Strategies on fewer seeds.", header, rows, left=2)] if rows else []
    return [*(Text(text) for text in texts), *table]


def _short(comparison: Comparison) -> list[tuple[str, str, int, int]]:
    return [
        (scenario, name, own, len(comparison.traces[scenario]))
        for scenario in comparison.scenarios
        for name in comparison.summary["strategies"]
        if (own := len(comparison.seeds(scenario, name))) < len(comparison.traces[scenario])
    ]


# -- provenance --------------------------------------------------------------------------------------------------------


def provenance(comparison: Comparison) -> list[Block]:
    """Strategies as patches, raw results, machine and versions, and the command."""
    table = comparison.folder / "results.parquet"
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    plan = _plan(comparison)
    blocks: list[Block] = [
        Text(
            "Raw results, one row per scenario, strategy, seed, step and test set with verdicts and costs: "
            f"`results.parquet` beside this page (SHA-256 `{digest[:16]}…`). All statistics: `compare.json`."
        ),
        Code("the runs again, or more of them", _command(comparison)),
        Text(
            "Settings given as key=value and paths of YAML files are not part of this command; `plan.json` holds every "
            "setting of scenarios and strategies, and `config.json` in the folder of a run all of its own."
        ),
        Code("the statistics alone, from the raw results", "cropi compare --results results.parquet --json"),
    ]
    if plan is not None:
        blocks.append(_strategies(comparison, plan))
    return [*blocks, _runs(comparison), _machine(comparison)]


def _command(comparison: Comparison) -> str:
    seeds = sorted({seed for found in comparison.traces.values() for seed in found})
    span = f"{seeds[0]}-{seeds[-1]}" if seeds == list(range(seeds[0], seeds[-1] + 1)) else ",".join(map(str, seeds))
    recipes = {name.split("/")[-1]: name for name in recipe_names()}
    names = [recipes.get(name, name) for name in comparison.traces]
    configs = ["suite"] if set(names) == set(suite_names()) else names
    words = ["cropi", "compare", *configs, "--strategies", ",".join(comparison.summary["strategies"])]
    return shlex.join([*words, "--seeds", span, "--folder", "DIR"])


def _plan(comparison: Comparison) -> Mapping[str, Any] | None:
    """plan.json; None where it is not among what was kept."""
    path = comparison.folder / "plan.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))["strategies"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _strategies(comparison: Comparison, patches: Mapping[str, Any]) -> Table:
    named, rows = presets(), []
    for name in comparison.summary["strategies"]:
        patch = patches.get(name)
        known = named.get(name)
        about = known["about"] if known and known["config"] == patch else ABSENT
        rows.append([name, about, ABSENT if patch is None else json.dumps(patch, ensure_ascii=False)])
    return Table("Strategies: what each changes in a config.", ["strategy", "what it is", "patch"], rows, left=3)


def _runs(comparison: Comparison) -> Table:
    rows = []
    for scenario, seeds in comparison.traces.items():
        found = [trace for own in seeds.values() for trace in own.values()]
        steps = sorted({int(trace.steps[-1]) for trace in found})
        evaluations = sorted({len(trace.steps) for trace in found})
        questions = {name: len(values[0]) for name, values in found[0].correct.items()}
        tests = [
            f"{name} ({size}{', targeted' if comparison.targeted[scenario][name] else ''})"
            for name, size in questions.items()
        ]
        seeds_text, counts = ", ".join(map(str, sorted(seeds))), (steps, evaluations)
        numbers = [", ".join(map(str, values)) for values in counts]
        rows.append([scenario, seeds_text, ", ".join(tests), *numbers, str(len(found))])
    header = ["scenario", "seeds", "test sets (questions)", "steps", "evaluations", "runs"]
    return Table("What has been run.", header, rows, left=3)


def _machine(comparison: Comparison) -> Block:
    """Versions of all runs, each value once."""
    values: dict[str, dict[str, int]] = {}
    folders = [
        comparison.run(scenario, seed, strategy)
        for scenario, seeds in comparison.traces.items()
        for seed, own in seeds.items()
        for strategy in own
    ]
    for path in [folder / "environment.json" for folder in (comparison.folder, *folders) if folder]:
        if path.is_file():
            for key, value in read_sealed(path).items():
                seen = values.setdefault(key, {})
                seen[str(value)] = seen.get(str(value), 0) + 1
    if not values:
        return Text("Machine and versions stand in the folders of the runs, which are not here.")
    rows = [
        [
            key,
            ", ".join(
                f"{value} ({number} of {sum(seen.values())} runs)" if len(seen) > 1 else value
                for value, number in seen.items()
            ),
        ]
        for key, seen in values.items()
    ]
    return Table("Machine and versions.", ["what", "version"], rows, left=2, collapsed=True)
