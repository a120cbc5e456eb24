"""Method of a comparison: definitions, limits, and the origin of the numbers."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping
from typing import Any

from cropi.artifacts import read_sealed
from cropi.config.loading import presets, recipe_names, suite_names
from cropi.lab.compare.comparison_summary import MIN_GAIN
from cropi.lab.compare.paired_runs import Comparison
from cropi.report.blocks import Block, Code, Table, Text
from cropi.report.wording import ABSENT, count, percent

DEFINITIONS = {
    "pairing": "All strategies of a scenario and seed share the first policy, the pool, the stored trajectories and "
    "the test questions. They train for as many steps and are evaluated at the same ones.",
    "cost": "Stored trajectories count in full before the first step, for every strategy that reads them. Scores, "
    "selections and validation completions count when they are made. Training counts with its rollouts, dropped ones "
    "too. Evaluation does not count.",
    "FLOPs": "2 P a token and forward pass, with P the parameters in matrix products. Generation takes 1 forward pass "
    "a token, collection 2. Training takes 1 for generation and 3 for every pass over a batch. Scoring depends on the "
    "estimator.",
    "accuracy": "Share of right answers: among the samples (evaluate.samples), or of the greedy ones. Targeted: mean "
    "over the targeted test sets. Untargeted: over the others.",
    "area": "Mean targeted accuracy over the run: by FLOPs, up to full's total, or by steps.",
    "target": "The targeted accuracy of full at its last step, of the same seed.",
    "speed-up": "Cost of full to the target divided by that of the strategy. Geometric mean over seeds, then over "
    "scenarios with equal weights. A curve is a straight line between evaluations. No cost is below one step.",
    "upper bound (<)": "A run that never reaches the target counts with its total cost. Its ratio is then too high, "
    "and so are both ends of the interval.",
    "no gain": f"Runs in which full ends less than {MIN_GAIN} above the base policy have no speed-up. They are "
    "counted, and left out of speed-ups and costs to the target. Areas and final accuracies include them.",
    "worst tenth": "Over drawn scenarios: mean difference of area by FLOPs over the tenth of them where it is lowest.",
    "intervals": "Percentiles of redraws of seeds and of questions within test sets, the same for all strategies. Of S "
    "seeds, S - 1 are redrawn (Rao and Wu 1988). Questions that seeds share are redrawn together. The intervals hold "
    "for these scenarios. If all scenarios are drawn at random, C - 1 of C are redrawn instead. Intervals over all "
    "scenarios then hold for the population. They are not corrected for the number of strategies.",
}
LIMITS = (
    "Few seeds give wide intervals, and percentiles of a handful are too narrow.",
    "Numbers on seeds on which something was chosen are too good. Without --main, the headline is about the strategy "
    "with the largest area on these runs. Confirm it on fresh seeds. The best reference is chosen in the same way.",
    "The interval between evaluations is the resolution of all costs.",
    "Seconds depend on the machine and on how many runs share it. FLOPs leave out padding, attention scores and the "
    "optimiser.",
)


def method(comparison: Comparison) -> list[Block]:
    """Definitions, with this comparison's settings."""
    summary = comparison.summary
    settings = {
        "target strategy": summary["target"],
        "references": ", ".join(summary["references"]) or ABSENT,
        "best reference, by area": summary["best_reference"] or ABSENT,
        "scenarios left out of the suite's speed-up": ", ".join(summary["aside"]) or ABSENT,
        "cut at step": ABSENT if summary["up_to_step"] is None else str(summary["up_to_step"]),
        "redraws": count(summary["redraws"]),
        "confidence": percent(summary["confidence"]),
    }
    return [
        Table("Definitions.", ["term", "meaning"], list(DEFINITIONS.items()), left=2),
        Table("Settings of the statistics.", ["setting", "value"], list(settings.items()), left=2),
    ]


def limits(comparison: Comparison) -> list[Block]:
    """Limits of the numbers, and strategies with fewer seeds."""
    rows = [
        [scenario, name, str(own), str(len(comparison.traces[scenario]))]
        for scenario in comparison.scenarios
        for name in comparison.summary["strategies"]
        if (own := len(comparison.seeds(scenario, name))) < len(comparison.traces[scenario])
    ]
    unfinished = comparison.summary["unfinished"]
    left_out = (
        [Text(f"Left out of the means until all strategies have ended: {', '.join(unfinished)}.")] if unfinished else []
    )
    caption = "Strategies compared on fewer seeds than there are, because some runs have not finished."
    table: list[Block] = [Table(caption, ["scenario", "strategy", "seeds", "of"], rows, left=2)] if rows else []
    return [*(Text(text) for text in LIMITS), *left_out, *table]


def provenance(comparison: Comparison) -> list[Block]:
    """The command, raw results, strategies as patches, machine and versions."""
    table = comparison.folder / "results.parquet"
    digest = hashlib.sha256(table.read_bytes()).hexdigest()
    plan = _plan(comparison)
    blocks: list[Block] = [
        Text(
            "Raw results, with verdicts and costs of every evaluation: `results.parquet` "
            f"beside this page (SHA-256 `{digest[:16]}…`). Statistics: `compare.json`. Settings: `plan.json`."
        ),
        Code("the runs again, without key=value settings and YAML files", _command(comparison)),
        Code("the statistics alone, from the raw results", "cropi compare --results results.parquet --json"),
    ]
    if plan is not None:
        blocks.append(_strategies(comparison, plan))
    return [*blocks, _runs(comparison), _machine(comparison)]


def _command(comparison: Comparison) -> str:
    seeds = sorted({seed for found in comparison.traces.values() for seed in found})
    in_a_row = len(seeds) > 1 and seeds == list(range(seeds[0], seeds[-1] + 1))
    span = f"{seeds[0]}-{seeds[-1]}" if in_a_row else ",".join(map(str, seeds))
    recipes = {name.split("/")[-1]: name for name in recipe_names()}
    names = [recipes.get(name, name) for name in comparison.traces]
    configs = ["suite"] if set(names) == set(suite_names()) else names
    words = ["cropi", "compare", *configs, "--strategies", ",".join(comparison.summary["strategies"])]
    return shlex.join([*words, "--seeds", span, "--folder", "DIR"])


def _plan(comparison: Comparison) -> Mapping[str, Any] | None:
    """Strategies of plan.json; None if it was not kept."""
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
            f"{name} ({size}{', targeted' if found[0].targeted[name] else ''})" for name, size in questions.items()
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
        return Text("Machine and versions: see the folders of the runs, which are not here.")
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
