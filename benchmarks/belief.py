"""How well the belief of finished runs foretold what training observed next, and how well it finds wrong answers.

    python benchmarks/belief.py runs/quickstart ...

Every step's slopes are predicted from those of earlier steps, as the belief would have had it then. The error of an
observation that is still to come is taken as the mean of those before. The constant model is a normal distribution with
the mean and variance of all earlier slopes. It needs the checkpoint of the run's end.
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


def foretold(belief: InfluenceBelief, seen_O4: np.ndarray, pool: int) -> list[tuple[float, float, float]]:
    """By observation: its slope less the predicted mean over the deviation, and both models' log densities."""
    found = list[tuple[float, float, float]]()
    for step in np.unique(seen_O4[:, 3]):
        now = seen_O4[(seen_O4[:, 3] == step) & (seen_O4[:, 0] < pool)]
        before = seen_O4[seen_O4[:, 3] < step]
        posterior = belief.posterior() if step >= FIRST_STEP and len(now) else None
        if posterior is not None:
            places, slopes = now[:, 0].astype(int), now[:, 1]
            variances = posterior.variances()[places] + before[:, 2].mean()
            gaps = slopes - posterior.means()[places]
            constant = before[before[:, 0] < pool][:, 1]
            logs = [_log(gaps, variances), _log(slopes - constant.mean(), np.full(len(now), constant.var()))]
            found += zip(gaps / np.sqrt(variances), *logs, strict=True)
        for point, slope, error, at in seen_O4[seen_O4[:, 3] == step]:
            belief.observe(int(point), slope, error, int(at))
    return found


def _log(gaps: np.ndarray, variances: np.ndarray) -> np.ndarray:
    found: np.ndarray = -0.5 * (gaps**2 / variances + np.log(2 * np.pi * variances))
    return found


def wrong_answers(config: dict[str, Any]) -> dict[str, bool]:
    """Whether the recorded answer is wrong, by prompt id of the built-in part of the pool; rule-like ones left out."""
    known = dict[str, bool]()
    for source in config["prompts"]["train"]:
        if source["type"] != "builtin" or source.get("label_rule") == "stop_early":
            continue
        options = {"seed": config["seed"]} if source.get("seed") is None else {"seed": source["seed"]}
        options |= {name: source.get(name) or 0 for name in ("count", "label_noise", "hint", "distractors")}
        for family in source["families"]:
            level = difficulty(family, min_length=source.get("min_length"), max_length=source.get("max_length"))
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
    print("| run | observations | within 50 % | within 90 % | log density | constant's | wrong: AUC trained on | all |")
    print("|---|---|---|---|---|---|---|---|")
    for run in parser.parse_args(arguments).runs:
        curriculum, state, ids = finished(run)
        rows = list[tuple[float, float, float]]()
        for name, belief in curriculum._influence.items():
            rows += foretold(belief, state[f"influence/{name}/seen"], len(ids))
        z, log, constant = np.array(rows).T
        inside = [float((abs(z) < quantile).mean()) for quantile in QUANTILES]
        line = f"| {run.name} | {len(z)} | {inside[0]:.3f} | {inside[1]:.3f} | {log.mean():.3f} | {constant.mean():.3f} "
        known = wrong_answers(json.loads((run / "config.json").read_text(encoding="utf-8")))
        for group in _rewards(run):
            curriculum._rewards.observe(ids.index(group[0]), np.array(group[2], dtype=float), group[1])
        labelled = np.array([prompt_id in known for prompt_id in ids])
        wrong = np.array([known.get(prompt_id, False) for prompt_id in ids])
        scores, seen = curriculum._rewards.wrong_labels(len(ids)), state["times"] > 0
        parts = [area(scores[which], wrong[which]) for which in (labelled & seen, labelled)]
        print(line + f"| {parts[0]:.3f} | {parts[1]:.3f} |", flush=True)


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
