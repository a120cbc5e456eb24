"""`cropi bench share`: what scoring and selecting cost beside training, at the size of the paper's experiment."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from cropi.config import FusionConfig
from cropi.curriculum.choose import choose
from cropi.curriculum.strategies import InfluenceStrategy
from cropi.curriculum.strategy import Candidates
from cropi.errors import UserError
from cropi.lab.bench.results import plain, spread

PROMPTS, TRAJECTORIES = 55_000, 8
STEPS, STEP_PROMPTS = 200, 128
"""A stage of the paper: all prompts scored once, then so many GRPO steps of so many prompts."""
VALIDATION_SETS, VALIDATION_PROMPTS = 2, 100
FRACTION = 0.1

NEEDED = ("sketch", "generate", "train")


def read_result(path: Path) -> dict[str, Any]:
    """The JSON of a measurement. UserError where it is none, or lacks what a share is made of."""
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot be read: {error}", where=str(path), fix="give a file of `bench engine --out`."
        ) from None
    if not isinstance(result, dict) or result.get("kind") != "engine" or result["workload"]["name"] != "realistic":
        raise UserError(
            "holds no measurement on the workload realistic",
            where=str(path),
            fix=f"make one: cropi bench engine --contenders {','.join(NEEDED)} --out FILE.",
        )
    return result


def bench_share(result: dict[str, Any], budget_fraction: float) -> dict[str, Any]:
    """From measured rates to seconds at the paper's size, and their ratio, round by round.

    A token given is one of a trajectory, its prompt's included. Rates are those of the measured policy and machine.
    """
    rows, work = {row["name"]: row for row in result["contenders"] if row["status"] == "ok"}, result["workload"]
    lacking = [name for name in NEEDED if name not in rows]
    if lacking:
        errors = [f"{row['name']}: {row['error']}" for row in result["contenders"] if row["error"]]
        raise UserError(
            f"a share needs measurements of {', '.join(NEEDED)}; there is none of {', '.join(lacking)}",
            fix="; ".join(errors) or f"measure with --contenders {','.join(NEEDED)}.",
        )
    rounds = [{name: rows[name]["rounds"][r] for name in NEEDED} for r in range(result["settings"]["rounds"])]
    amounts, select_s = _amounts(work), selection_seconds()
    taken = [_seconds(answers, amounts, work) | {"selection": select_s} for answers in rounds]
    variants = {"all prompts scored": 1.0, f"with {budget_fraction:.0%} of the scoring cost": budget_fraction}
    terms = []
    for name, (amount, unit) in amounts.items():
        found = spread([values[name] for values in taken])
        assert found is not None
        terms.append(
            {
                "name": name,
                "amount": f"{amount:,.0f} {unit}",
                "rate": f"{amount / found.median:,.0f} /s",
                "seconds": plain(found),
            }
        )
    return {
        "kind": "share",
        "heading": f"{result['policy']['shape']}, {result['environment']['gpu'] or result['environment']['cpu']}, "
        f"{result['settings']['dtype']}: one stage of {PROMPTS:,} prompts x {TRAJECTORIES} trajectories scored and "
        f"{STEPS} GRPO steps of {STEP_PROMPTS} x {TRAJECTORIES}",
        "budget_fraction": budget_fraction,
        "terms": terms,
        "share_of_training": {
            name: plain(spread([_scoring(v, part) / (v["sampling"] + _updating(v)) for v in taken]))
            for name, part in variants.items()
        },
        "share_of_updates": {
            name: plain(spread([_scoring(v, part) / _updating(v) for v in taken])) for name, part in variants.items()
        },
        "assumptions": _assumptions(work),
        "settings": result["settings"],
        "environment": result["environment"],
    }


def _amounts(work: dict[str, Any]) -> dict[str, tuple[float, str]]:
    """How much of each term a stage of the paper takes, and the unit."""
    completion = work["mean_completion_tokens"]
    length = work["mean_prompt_tokens"] + completion
    trajectories = STEPS * STEP_PROMPTS * TRAJECTORIES
    return {
        "sampling": (trajectories * completion, "tokens sampled"),
        "updates": (trajectories * length, "tokens given"),
        "optimiser steps": (STEPS, "steps"),
        "scoring, train": (PROMPTS * TRAJECTORIES * length, "tokens given"),
        "scoring, validation": (VALIDATION_SETS * VALIDATION_PROMPTS * TRAJECTORIES * length, "tokens given"),
        "selection": (PROMPTS, "prompts"),
    }


def _seconds(answers: dict[str, Any], amounts: dict[str, tuple[float, str]], work: dict[str, Any]) -> dict[str, float]:
    """Seconds of each term but selection, at the rates of one round."""
    sketch, train, sampled = answers["sketch"]["parts"], answers["train"]["parts"], answers["generate"]
    per_unit = {
        "sampling": sampled["seconds"] / sampled["tokens_computed"],
        "updates": train["gradients"]["seconds"] / train["gradients"]["tokens_computed"],
        "optimiser steps": train["step"]["seconds"],
        "scoring, train": sketch["train"]["seconds"] / work["tokens_given_train"],
        "scoring, validation": sketch["validation"]["seconds"] / work["tokens_given_validation"],
    }
    return {name: amounts[name][0] * rate for name, rate in per_unit.items()}


def _scoring(taken: dict[str, float], part: float) -> float:
    return part * taken["scoring, train"] + taken["scoring, validation"] + taken["selection"]


def _updating(taken: dict[str, float]) -> float:
    return taken["updates"] + taken["optimiser steps"]


def _assumptions(work: dict[str, Any]) -> list[str]:
    return [
        f"Assumed: prompts of {work['mean_prompt_tokens']:.0f} tokens and completions of "
        f"{work['mean_completion_tokens']:.0f} on average, in scoring and in training alike;",
        f"{work['zero_share']:.0%} of the prompts without signal, which scoring skips and training does not;",
        f"{VALIDATION_SETS} validation sets of {VALIDATION_PROMPTS} prompts with signal; the best {FRACTION:.0%} kept.",
        "Sampling with transformers, batches of 64; an inference server would be faster, hence the second share.",
        "Updates take one forward and one full backward pass, no reference model. Not counted: the trajectories that",
        "are scored (sampled once before all stages), verifying, loading and saving.",
    ]


def selection_seconds() -> float:
    """Seconds to fuse two rankings of so many prompts and to choose from them: measured, with made-up scores."""
    generator = np.random.default_rng(0)
    ids = [f"{row:08x}" for row in range(PROMPTS)]
    rates_N = generator.random(PROMPTS)
    candidates = Candidates(
        prompt_ids=ids,
        sources=["pool"] * PROMPTS,
        statuses=["ok"] * PROMPTS,
        pass_rates_N=rates_N,
        variances_N=rates_N * (1 - rates_N),
        training_variances={},
        influence={f"set {v}": generator.standard_normal(PROMPTS) for v in range(VALIDATION_SETS)},
        stage=0,
        seed=0,
    )
    strategy = InfluenceStrategy(type="influence")
    size = round(FRACTION * PROMPTS)
    started = time.perf_counter()
    choose(candidates, strategy.rank(candidates, size, FusionConfig()), size)
    return time.perf_counter() - started
