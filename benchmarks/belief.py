"""How well the belief of finished runs foretold what training observed next, and how well it finds wrong answers.

    python benchmarks/belief.py runs/quickstart ...

Every step's slopes are predicted from those of earlier steps, as the belief would have had it then, and with the errors
that it would then have given them. The constant model is a normal distribution with the mean and variance of all
earlier slopes. Then the areas under the curve of wrong answers: of prompts trained on, and of all. The last columns,
for built-in problems, are the areas of relevant prompts by expected slope after some steps, mean over the validation
sets: relevant are right answers of the styles that a set has. It needs the checkpoint of the run's end.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from mislabelled import read_config, wrong_answers

from cropi.builtin.families import STYLES
from cropi.curriculum.belief import InfluenceBelief, kernel_features, likeness
from cropi.curriculum.reward_belief import RewardBelief
from cropi.functional.points import principal_points
from cropi.prompts import checked_prompts
from cropi.stages.collect import read_representations
from cropi.stages.online_loop import load_state
from cropi.streams import read_jsonl

FIRST_STEP = 16
QUANTILES = (0.6745, 1.6449)  # of 50 and 90 %
TIMES = (12, 24, 48, 95)
COLUMNS = ("run", "n", "50 %", "90 %", "log density", "constant's", "AUC", "all", *(f"relevant, {at}" for at in TIMES))


def start_of(run: Path) -> tuple[dict[str, InfluenceBelief], RewardBelief, list[str]]:
    """The beliefs that a run began with, of influence by validation set and of rewards; and the pool's prompt ids."""
    known = read_representations(run / "representations")
    ids: dict[str, list[str]] = {}
    for name, prompt_id in known:
        ids.setdefault(name, []).append(prompt_id)
    ids["train"].sort()
    sets = sorted(set(ids) - {"train"})
    states = [np.stack([known[name, each] for each in ids[name]]) for name in ("train", *sets)]
    points = principal_points(*states)
    features, pool = kernel_features(points, len(states[0])), len(states[0])
    beliefs = {}
    for name, (start, stop) in zip(sets, pairwise(np.cumsum([len(part) for part in states])), strict=True):
        alike = likeness(points[:pool], points[start:stop])
        beliefs[name.removeprefix("validation/")] = InfluenceBelief(features[:pool], features[start:stop], alike)
    return beliefs, RewardBelief(features), ids["train"]


def foretold(belief: InfluenceBelief, seen_O5: np.ndarray, pool: int) -> list[tuple[float, ...]]:
    """By observation: the slope less its predicted mean, its predicted variance, and the same of the constant model."""
    found = list[tuple[float, ...]]()
    for step in np.unique(seen_O5[:, 4]):
        at_once = seen_O5[seen_O5[:, 4] == step]
        now, before = at_once[at_once[:, 0] < pool], seen_O5[seen_O5[:, 4] < step]
        constant = before[before[:, 0] < pool][:, 1]
        posterior = belief.posterior() if step >= FIRST_STEP and len(now) and len(constant) > 1 else None
        if posterior is not None:
            places, slopes, many = now[:, 0].astype(int), now[:, 1], np.ones(len(now))
            variances = posterior.variances()[places]
            gaps = slopes - posterior.means()[places]
            found += zip(
                gaps, variances + before[:, 3].mean(), slopes - constant.mean(), constant.var() * many, strict=True
            )
        for point, slope, half_difference, error, at in at_once:
            belief.observe(int(point), slope, error, int(at), half_difference)
    return found


def _log(gaps: np.ndarray, variances: np.ndarray) -> float:
    return float(-0.5 * (gaps**2 / variances + np.log(2 * np.pi * variances)).mean())


def predictive(rows: list[tuple[float, ...]]) -> str:
    """Coverage, and mean log densities."""
    gaps, variances, constant_gaps, constant_variances = np.array(rows).T
    inside = [float((abs(gaps) < quantile * np.sqrt(variances)).mean()) for quantile in QUANTILES]
    logs = _log(gaps, variances), _log(constant_gaps, constant_variances)
    return " | ".join([str(len(gaps)), *(f"{value:.3f}" for value in (*inside, *logs))])


def area(scores: np.ndarray, wrong: np.ndarray) -> float:
    """Area under the curve: the share of pairs of a wrong and a right answer that are in order; ties count half."""
    if wrong.all() or not wrong.any():
        return float("nan")
    gaps = scores[wrong][:, None] - scores[~wrong]
    return float((gaps > 0).mean() + (gaps == 0).mean() / 2)


def relevant(run: Path, ids: Sequence[str], name: str) -> np.ndarray:
    """Whether each prompt has a right answer and a style of a validation set's families."""
    config = read_config(run)
    families = [family for source in config.prompts.validation[name] for family in getattr(source, "families", ())]
    styles = {STYLES[family] for family in families}
    source = {row["prompt_id"]: row["source"] for row in checked_prompts(config).rows if row["set"] == "train"}
    wrong = wrong_answers(config, rules=False)
    return np.array([STYLES.get(source[each]) in styles and not wrong.get(each, False) for each in ids])


def standing_out(belief: InfluenceBelief, seen_O5: np.ndarray, relevant_N: np.ndarray) -> list[float]:
    """Area under the curve of the relevant prompts by expected slope, at the end of some steps."""
    found, since = list[float](), -1
    for until in TIMES:
        for point, slope, half_difference, error, at in seen_O5[(since < seen_O5[:, 4]) & (seen_O5[:, 4] <= until)]:
            belief.observe(int(point), slope, error, int(at), half_difference)
        belief.age_to(until)
        posterior, since = belief.posterior(), until
        found.append(float("nan") if posterior is None else area(posterior.means(), relevant_N))
    return found


def last_state(run: Path) -> dict[str, Any]:
    """The curriculum's state at the run's last checkpoint."""
    last = max((run / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    state: dict[str, Any] = load_state(last)["curriculum"]
    return state


def trained_on(run: Path) -> list[tuple[str, int, list[float]]]:
    """Prompt id, step and rewards of every group that was trained on."""
    found: dict[tuple[int, str], list[float]] = {}
    for row in read_jsonl(run / "rewards.jsonl"):
        for prompt_id, reward in zip(row["prompt_ids"], row["rewards"], strict=True):
            if reward is not None:
                found.setdefault((row["step"], prompt_id), []).append(reward)
    return [(prompt_id, step, rewards) for (step, prompt_id), rewards in found.items()]


def table_row(run: Path) -> str:
    influence, rewards, ids = start_of(run)
    state = last_state(run)
    rows = list[tuple[float, ...]]()
    for name, belief in influence.items():
        rows += foretold(belief, state[f"influence/{name}/seen"], len(ids))
    for prompt_id, step, seen in trained_on(run):
        rewards.observe(ids.index(prompt_id), np.array(seen, dtype=float), step)
    known = wrong_answers(read_config(run), rules=False)
    labelled = np.array([prompt_id in known for prompt_id in ids])
    wrong = np.array([known.get(prompt_id, False) for prompt_id in ids])
    scores = rewards.wrong_labels(len(ids))
    parts = [area(scores[which], wrong[which]) for which in (labelled & (state["times"] > 0), labelled)]
    seen = {name: state[f"influence/{name}/seen"] for name in influence}
    out = [standing_out(belief, seen[name], relevant(run, ids, name)) for name, belief in start_of(run)[0].items()]
    areas = " | ".join(f"{value:.3f}" for value in (*parts, *np.mean(out, axis=0)))
    return f"| {run.name} | {predictive(rows)} | {areas} |"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for run in parser.parse_args(arguments).runs:
        print(table_row(run), flush=True)


if __name__ == "__main__":
    main()
