"""How well the belief of finished runs foretold what training observed next, and how well it finds wrong answers.

    python benchmarks/belief.py runs/quickstart ...

Every step's slopes are predicted from those of earlier steps, as the belief would have had it then. The error of an
observation that is still to come is taken as the mean of those before. The constant model is a normal distribution
with the mean and variance of all earlier slopes. `factor` multiplies all errors; the three columns after it are with
the one that predicts best. The last two are the areas under the curve of wrong answers: of prompts trained on, and of
all. It needs the checkpoint of the run's end.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from cropi.builtin import difficulty, generate
from cropi.curriculum.belief import InfluenceBelief
from cropi.curriculum.curriculum import Curriculum
from cropi.functional.principal_points import principal_points
from cropi.rollouts.representations import read_representations
from cropi.training.curriculum_state import load_state

FIRST_STEP = 16
QUANTILES = (0.6745, 1.6449)  # of 50 and 90 %
FACTORS = tuple(2.0**power for power in range(-6, 4))
COLUMNS = (
    "run",
    "n",
    "50 %",
    "90 %",
    "log density",
    "constant's",
    "factor",
    "50 %",
    "90 %",
    "log density",
    "AUC",
    "all",
)


def finished(run: Path) -> tuple[Curriculum, dict[str, Any], list[str]]:
    """The curriculum of a run as it was built, its state at the end, and the prompt ids of the pool."""
    last = max((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    known = read_representations(run / "representations")
    rows = pq.read_table(run / "prompts" / "prompts.parquet").to_pylist()
    sets = sorted({row["set"] for row in rows if row["set"].startswith("validation/")})
    members = {name: [row["prompt_id"] for row in rows if row["set"] == name] for name in ("train", *sets)}
    members["train"].sort()
    states = {name: np.stack([known[name, each] for each in ids]) for name, ids in members.items()}
    points = principal_points(states.pop("train"), *states.values())
    pool_NE, *others = np.split(points, np.cumsum([len(members["train"]), *map(len, states.values())])[:-1])
    validation = {name.removeprefix("validation/"): own for name, own in zip(sets, others, strict=True)}
    return Curriculum(pool_NE, validation, seed=0), load_state(last)["curriculum"], members["train"]


def foretold(belief: InfluenceBelief, seen_O5: np.ndarray, pool: int) -> list[tuple[float, ...]]:
    """By observation: the slope less its predicted mean, the predicted variances of slope and error, and what the
    constant model says: the slope less its mean, and the variance.
    """
    found = list[tuple[float, ...]]()
    for step in np.unique(seen_O5[:, 4]):
        at_once = seen_O5[seen_O5[:, 4] == step]
        now, before = at_once[at_once[:, 0] < pool], seen_O5[seen_O5[:, 4] < step]
        constant = before[before[:, 0] < pool][:, 1]
        posterior = belief.posterior() if step >= FIRST_STEP and len(now) and len(constant) > 1 else None
        if posterior is not None:
            places, slopes, many = now[:, 0].astype(int), now[:, 1], np.ones(len(now))
            variances = posterior.variances()[places]
            gaps, errors = slopes - posterior.means()[places], before[:, 3].mean() * many
            found += zip(gaps, variances, errors, slopes - constant.mean(), constant.var() * many, strict=True)
        for point, slope, half_difference, error, at in at_once:
            belief.observe(int(point), slope, error, int(at), half_difference)
    return found


def _log(gaps: np.ndarray, variances: np.ndarray) -> float:
    return float(-0.5 * (gaps**2 / variances + np.log(2 * np.pi * variances)).mean())


def predictive(rows: list[tuple[float, ...]]) -> str:
    """Coverage, mean log densities, and the factor of all errors that would have predicted best."""
    gaps, variances, errors, constant_gaps, constant_variances = np.array(rows).T
    inside = [float((abs(gaps) < quantile * np.sqrt(variances + errors)).mean()) for quantile in QUANTILES]
    factor = max(FACTORS, key=lambda factor: _log(gaps, variances + factor * errors))
    logs = [_log(gaps, variances + errors), _log(constant_gaps, constant_variances)]
    logs.append(_log(gaps, variances + factor * errors))
    scaled = [float((abs(gaps) < q * np.sqrt(variances + factor * errors)).mean()) for q in QUANTILES]
    cells = [str(len(gaps)), *(f"{value:.3f}" for value in (*inside, *logs[:2])), f"{factor:.2f}"]
    return " | ".join([*cells, *(f"{value:.3f}" for value in (*scaled, logs[2]))])


def wrong_answers(config: dict[str, Any]) -> dict[str, bool]:
    """Whether the recorded answer is wrong, by prompt id of the built-in part of the pool; rule-like ones left out."""
    known = dict[str, bool]()
    for source in config["prompts"]["train"]:
        if source["type"] != "builtin" or source.get("label_rule") == "stop_early":
            continue
        options = {"seed": config["seed"]} if source.get("seed") is None else {"seed": source["seed"]}
        options |= {name: source.get(name) or 0 for name in ("count", "label_noise", "distractors")}
        for family in source["families"]:
            lengths = {name: source.get(name) for name in ("min_length", "max_length")}
            level = difficulty(family, **lengths, hint=source.get("hint") or 0.0)
            rows = generate(family, split="train", level=level, **options)
            known |= {row["prompt_id"]: row["mislabelled"] for row in rows}
    return known


def area(scores: np.ndarray, wrong: np.ndarray) -> float:
    """Area under the curve: the share of pairs of a wrong and a right answer that are in order; ties count half."""
    if wrong.all() or not wrong.any():
        return float("nan")
    gaps = scores[wrong][:, None] - scores[~wrong]
    return float((gaps > 0).mean() + (gaps == 0).mean() / 2)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for run in parser.parse_args(arguments).runs:
        curriculum, state, ids = finished(run)
        rows = list[tuple[float, ...]]()
        for name, belief in curriculum._influence.items():
            rows += foretold(belief, state[f"influence/{name}/seen"], len(ids))
        known = wrong_answers(json.loads((run / "config.json").read_text(encoding="utf-8")))
        for group in _rewards(run):
            curriculum._rewards.observe(ids.index(group[0]), np.array(group[2], dtype=float), group[1])
        labelled = np.array([prompt_id in known for prompt_id in ids])
        wrong = np.array([known.get(prompt_id, False) for prompt_id in ids])
        scores, seen = curriculum._rewards.wrong_labels(len(ids)), state["times"] > 0
        parts = [area(scores[which], wrong[which]) for which in (labelled & seen, labelled)]
        print(f"| {run.name} | {predictive(rows)} | {parts[0]:.3f} | {parts[1]:.3f} |", flush=True)


def _rewards(run: Path) -> list[tuple[str, int, list[float]]]:
    """Prompt id, step and rewards of every group that was trained on."""
    found: dict[tuple[int, str], list[float]] = {}
    for line in (run / "rewards.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        for prompt_id, reward in zip(row["prompt_ids"], row["rewards"], strict=True):
            if reward is not None:
                found.setdefault((row["step"], prompt_id), []).append(reward)
    return [(prompt_id, step, rewards) for (step, prompt_id), rewards in found.items()]


if __name__ == "__main__":
    main()
