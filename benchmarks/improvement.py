"""Does influence predict improvement? Scores of stored trajectories beside what steps on the chosen prompts really do.

A pool as in the quickstart (all families, half of the answers wrong), two target families. At the built-in policy, and
again after some training on random prompts with the trajectories of the start: score every prompt in every way, draw
many subsets, make the update that training on each would make from fresh completions, take it at several sizes, and
measure how the mean reward on the validation prompts and on others of their families changes. `--stage-steps` trains on
some subsets for real.

    python benchmarks/improvement.py --seeds 1 --out research/figures/improvement.json
    python benchmarks/improvement_report.py research/figures/improvement.json research/figures/improvement.svg

With `--raw FOLDER` one file per seed and checkpoint is kept there, and what is there is not made again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import measured_improvement as audit
import numpy as np
import torch

from cropi.builtin import FAMILIES, generate
from cropi.config import PolicyConfig, VerificationConfig
from cropi.gradients.engine import Engine
from cropi.gradients.groups import Group
from cropi.gradients.surrogate_weights import SurrogateSettings
from cropi.lab.audit.run_audit import Prompt, sample_groups
from cropi.lab.bench.machine import describe
from cropi.policy import Policy, load_policy
from cropi.prompt_encoding import encode_prompts
from cropi.rewards.pool import judge_of
from cropi.rewards.verifiers.exact_text import ExactVerifier
from cropi.rollouts.generation import Sampling
from cropi.rollouts.shards import behaviour_logprobs
from cropi.seeds import derived_seed

TARGETS = ("sum", "machine")
LENGTH, TRAJECTORIES, VALIDATION_TRAJECTORIES, SAMPLES = 32, 8, 16, 24
VALIDATION_PROMPTS, HELD_OUT_PROMPTS = 24, 24  # of each target
BATCH, LEARNING_RATE, CLIP = 16, 5e-5, 1.0  # of the quickstart's trainer; CLIP is TRL's max_grad_norm
WARM_STEPS, SUBSET = 16, 32
STAGE_SUBSETS = 8  # random ones and mixtures to train on, each
ADAM_STEPS = (5e-5, 2e-4)  # one training step, and as far as four
RANDOM, MIXTURES = 16, 24
SURROGATE = SurrogateSettings("constant", LENGTH)  # TRL's dr_grpo with its default scale_rewards
JUDGE = judge_of(ExactVerifier(type="exact", marker="answer"), VerificationConfig())
DECILES = {  # whose top and bottom tenth are subsets
    "constant std dot",
    "constant std cosine",
    "constant std gain",
    "constant std dot adam",
    "constant std cosine adam",
    "constant std gain adam",
    "sequence std dot",
    "sequence std cosine",
    "constant std norm",
    "learnability",
    "family mean",
}
ALL_TENTHS = "constant std dot"


@dataclass(frozen=True)
class Subset:
    """Rows of the pool that are trained on together."""

    name: str
    design: str
    rows: list[int]


def prompts_of(policy: Policy, rows: Sequence[dict[str, Any]]) -> list[Prompt]:
    encoded = encode_prompts(policy.tokenizer, [row["prompt"] for row in rows])
    return [
        Prompt(row["prompt_id"], ids, {"source": "", "messages": "", **row})
        for row, ids in zip(rows, encoded, strict=True)
    ]


def draw(policy: Policy, prompts: Sequence[Prompt], count: int, seed: int, label: str) -> list[Group]:
    """Fresh groups of the policy as it is."""
    return sample_groups(policy, prompts, count, Sampling(LENGTH, 1.0), JUDGE, batch_size=512, seed=seed, label=label)


def stored(policy: Policy, groups: Sequence[Group]) -> list[Group]:
    """The same with the log-probs of their policy, to be used at other weights."""
    return [
        replace(
            g,
            behaviour_logprobs=behaviour_logprobs(
                policy, [g.prompt_ids] * len(g.completions), g.completions, 1.0, 4096
            ),
        )
        for g in groups
    ]


def train(policy: Policy, prompts: Sequence[Prompt], steps: int, seed: int, state: Any = None) -> Any:
    """On-policy steps of AdamW as TRL's `dr_grpo` takes them, at a constant rate; returns the optimizer's state."""
    engine = Engine(policy.model, SURROGATE)
    optimizer = torch.optim.AdamW(engine.parameters.values(), lr=LEARNING_RATE, weight_decay=0.0, maximize=True)
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state))
    generator = np.random.default_rng(derived_seed(seed, "order"))
    order: list[int] = []
    for step in range(steps):
        while len(order) < BATCH:
            order += generator.permutation(len(prompts)).tolist()
        batch, order = [prompts[row] for row in order[:BATCH]], order[BATCH:]
        gradient = audit.mean_gradient(engine, draw(policy, batch, TRAJECTORIES, seed, f"train/{step}"), SURROGATE)
        for name, parameter in engine.parameters.items():
            parameter.grad = gradient[name]
        torch.nn.utils.clip_grad_norm_(engine.parameters.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return optimizer.state_dict()


@dataclass
class Cell:
    """One seed at one checkpoint."""

    policy: Policy
    rows: list[dict[str, Any]]
    pool: list[Prompt]
    train: list[Group]
    validation: dict[str, list[Group]]
    targets: dict[str, list[Prompt]]
    """Prompts by `validation/NAME` and `held-out/NAME`."""
    state: Any
    seed: int
    trained: bool


def set_up(per_family: int, seed: int, trained: bool) -> Cell:
    policy = load_policy(PolicyConfig(path="builtin"))
    drawn = derived_seed(seed, "pool")
    rows = [
        row
        for family in sorted(FAMILIES)
        for row in generate(family, split="train", count=per_family, seed=drawn, label_noise=0.5)
    ]
    pool = prompts_of(policy, rows)
    splits = (("validation", "validation", VALIDATION_PROMPTS), ("held-out", "test", HELD_OUT_PROMPTS))
    targets = {
        f"{kind}/{name}": prompts_of(policy, generate(name, split=split, count=count, seed=drawn))
        for kind, split, count in splits
        for name in TARGETS
    }
    groups = stored(policy, draw(policy, pool, TRAJECTORIES, seed, "pool"))
    validation = {
        name: stored(policy, draw(policy, targets[f"validation/{name}"], VALIDATION_TRAJECTORIES, seed, name))
        for name in TARGETS
    }
    state = train(policy, pool, WARM_STEPS, derived_seed(seed, "warm")) if trained else None
    return Cell(policy, rows, pool, groups, validation, targets, state, seed, trained)


def second_moment(cell: Cell, engine: Engine) -> audit.Direction:
    """Adam's v, from the gradients of random batches of the pool's stored trajectories."""
    order = np.random.default_rng(derived_seed(cell.seed, "moment")).permutation(len(cell.train))
    batches = [[cell.train[row] for row in order[start : start + BATCH]] for start in range(0, len(order), BATCH)]
    return audit.second_moment([audit.mean_gradient(engine, batch, SURROGATE) for batch in batches])


def score_table(cell: Cell, scores: audit.PromptScores) -> dict[str, np.ndarray]:
    """(N, V) by name."""
    table = {kind.name: scores.values(kind) for kind in audit.kinds()}
    table["learnability"] = np.repeat(scores.learnability()[:, None], len(TARGETS), axis=1)
    sources = np.array([row["source"] for row in cell.rows])
    dots_NV = table["constant std dot"]
    table["family mean"] = np.array([dots_NV[sources == source].mean(axis=0) for source in sources])
    return table


def subsets(cell: Cell, table: dict[str, np.ndarray]) -> list[Subset]:
    generator = np.random.default_rng(derived_seed(cell.seed, "subsets"))
    count = len(cell.rows)
    found = [
        Subset(f"random {n}", "random", generator.choice(count, SUBSET, replace=False).tolist()) for n in range(RANDOM)
    ]
    sources = np.array([sorted(FAMILIES).index(row["source"]) for row in cell.rows])
    wrong = np.array([row["mislabelled"] for row in cell.rows])
    for n in range(MIXTURES):
        shares, right = generator.dirichlet(np.full(len(FAMILIES), 0.3)), generator.random()
        weights = (shares[sources] + 1e-3) * np.where(wrong, 1 - right, right)
        chosen = generator.choice(count, SUBSET, replace=False, p=weights / weights.sum())
        found.append(Subset(f"mixture {n}", "mixture", chosen.tolist()))
    ties = generator.permutation(count)
    for name in sorted(DECILES):
        values = table[name].mean(axis=1)
        order = ties[np.argsort(-values[ties], kind="stable")]
        tenths = [order[start : start + SUBSET] for start in range(0, count - SUBSET + 1, SUBSET)]
        kept = range(len(tenths)) if name == ALL_TENTHS else (0, len(tenths) - 1)
        found += [Subset(f"{name}, tenth {n + 1}", f"tenth {n + 1}/{len(tenths)}", tenths[n].tolist()) for n in kept]
    return found


def sampled(cell: Cell, count: int) -> np.ndarray:
    """Mean rewards (prompts of all targets in turn) by sampling, with the same random numbers at any weights."""
    groups = [
        draw(cell.policy, prompts, count, cell.seed, f"measured/{name}") for name, prompts in cell.targets.items()
    ]
    return np.array([[group.pass_rate for group in of_target] for of_target in groups])


def gradients(cell: Cell, engine: Engine, chosen: Sequence[Subset], label: str) -> list[audit.Direction]:
    """The update's gradient of each subset, of fresh completions."""
    found = []
    for subset in chosen:
        prompts = [cell.pool[row] for row in subset.rows]
        fresh = draw(cell.policy, prompts, TRAJECTORIES, cell.seed, f"{label}/{subset.name}")
        found.append(audit.mean_gradient(engine, fresh, SURROGATE))
    return found


def measure(cell: Cell, stage_steps: int, adam_steps: Sequence[float]) -> dict[str, Any]:
    clock, engine = Clock(), Engine(cell.policy.model, SURROGATE)
    moment = second_moment(cell, engine)
    diagonal = audit.preconditioner(moment)
    scores = audit.PromptScores(engine, cell.train, cell.validation, SURROGATE, diagonal)
    table = score_table(cell, scores)
    clock("scores")
    chosen = subsets(cell, table)
    asked = cell.targets.items()
    samples = {name: draw(cell.policy, some, SAMPLES, cell.seed, f"objective/{name}") for name, some in asked}
    objective = audit.Objective(cell.policy.model, samples)
    slopes = [audit.reward_gradient(engine, groups) for groups in samples.values()]
    clock("objective")
    first = gradients(cell, engine, chosen, "update")
    blind = [subset for subset in chosen if subset.design in {"random", "mixture"}]
    second = gradients(cell, engine, blind, "again")
    clock("updates")
    adam = [audit.adam_update(gradient, moment) for gradient in first]
    longer = np.mean([audit.inner(a, a) ** 0.5 for a in adam]) / np.mean([audit.inner(g, g) ** 0.5 for g in first])
    # of the mean reward, in its own units: see `reward_gradient`
    factor = LENGTH * VALIDATION_TRAJECTORIES / (VALIDATION_TRAJECTORIES - 1)
    directions = scores.directions[("constant", False)]
    result: dict[str, Any] = {
        "subsets": [{"name": s.name, "design": s.design, "facts": facts_of(cell, s)} for s in chosen],
        "scores": {
            name: [values_NV[s.rows].mean(axis=0).tolist() for s in chosen] for name, values_NV in table.items()
        },
        "objective": objective.names,
        "start": {name: float(np.mean([g.pass_rate for g in groups])) for name, groups in samples.items()},
        "sgd_per_adam": float(longer),
        "reward_units": factor,
        "first_order": {
            kind: {
                "sample": [[audit.inner(u, s) for s in slopes] for u in updates],
                "stored": [[factor * audit.inner(u, d) for d in directions] for u in updates],
            }
            for kind, updates in (
                ("sgd", first),
                ("adam", adam),
                ("sgd again", second),
                ("adam again", [audit.adam_update(gradient, moment) for gradient in second]),
            )
        },
        "moves": [],
        "prompts": prompt_level(cell, table, engine, slopes, diagonal) if not cell.trained else None,
    }
    clock("first order")
    for rate in adam_steps:
        for kind, updates, step in (("sgd", first, rate * longer), ("adam", adam, rate)):
            result["moves"].append({"kind": kind, "rate": rate, "step": step} | steps(engine, objective, updates, step))
    clock("moves")
    result["sampled"] = compare_with_sampling(cell, engine, adam, chosen, adam_steps[-1])
    clock("sampled")
    result["stage"] = stages(cell, chosen, stage_steps) if stage_steps else None
    clock("stage")
    return result | {"seconds": clock.seconds}


class Clock:
    """CPU seconds by part."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.process_time()

    def __call__(self, part: str) -> None:
        now = time.process_time()
        self.seconds[part], self._last = now - self._last, now
        print(f"  {part}: {self.seconds[part]:.0f} s of CPU", flush=True)


def facts_of(cell: Cell, subset: Subset) -> dict[str, float]:
    rows = [cell.rows[row] for row in subset.rows]
    groups = [cell.train[row] for row in subset.rows]
    return {
        "target": float(np.mean([row["source"] in TARGETS for row in rows])),
        "mislabelled": float(np.mean([row["mislabelled"] for row in rows])),
        "no_signal": float(np.mean([group.status != "ok" for group in groups])),
        "tokens": float(np.mean([group.completion_tokens / len(group.completions) for group in groups])),
    }


def steps(
    engine: Engine, objective: audit.Objective, updates: Sequence[audit.Direction], step: float
) -> dict[str, Any]:
    found = []
    for update in updates:
        with audit.moved(engine.parameters, update, step):
            found.append(objective.change())
    return {
        "changes": [change.values_V.tolist() for change in found],
        "errors": [change.errors_V.tolist() for change in found],
        "effective_share": [change.effective_share for change in found],
    }


def prompt_level(
    cell: Cell,
    table: dict[str, np.ndarray],
    engine: Engine,
    slopes: Sequence[audit.Direction],
    diagonal: audit.Direction,
) -> dict[str, Any]:
    """Single prompts: their scores beside <fresh gradient, slope of the objective>, of 8 and of 56 completions."""
    generator = np.random.default_rng(derived_seed(cell.seed, "single"))
    rows = sorted(generator.choice(len(cell.pool), min(len(cell.pool), 96), replace=False).tolist())
    fresh = draw(cell.policy, [cell.pool[row] for row in rows], 8 * TRAJECTORIES, cell.seed, "single")
    found: dict[str, list[Any]] = {"few": [], "many": [], "many adam": []}
    for group in fresh:
        few = replace(group, completions=group.completions[:TRAJECTORIES], rewards=group.rewards[:TRAJECTORIES])
        rest = replace(group, completions=group.completions[TRAJECTORIES:], rewards=group.rewards[TRAJECTORIES:])
        many = audit.mean_gradient(engine, [rest], SURROGATE)
        found["many"].append([audit.inner(many, s) for s in slopes])
        scaled = audit.preconditioned(many, diagonal)
        found["many adam"].append([audit.inner(scaled, s) for s in slopes])
        found["few"].append([audit.inner(audit.mean_gradient(engine, [few], SURROGATE), s) for s in slopes])
    return found | {"scores": {name: values_NV[rows].tolist() for name, values_NV in table.items()}}


def compare_with_sampling(
    cell: Cell, engine: Engine, updates: Sequence[audit.Direction], chosen: Sequence[Subset], step: float
) -> dict[str, Any]:
    """The change by plain sampling of new completions for a few subsets, as a check of the importance weights."""
    rows = [
        n
        for n, subset in enumerate(chosen)
        if subset.name in {"random 0", "mixture 0"} or subset.design.startswith("tenth 1/")
    ][:6]
    before, found = sampled(cell, SAMPLES), []
    for row in rows:
        with audit.moved(engine.parameters, updates[row], step):
            found.append(sampled(cell, SAMPLES) - before)
    return {"subsets": rows, "changes": [gains.mean(axis=1).tolist() for gains in found], "step": step}


def stages(cell: Cell, chosen: Sequence[Subset], count: int) -> dict[str, Any]:
    """Train on subsets for real: `count` steps of AdamW, then the mean reward by sampling."""
    wanted = {f"{design} {n}" for design in ("random", "mixture") for n in range(STAGE_SUBSETS)}
    rows = [n for n, s in enumerate(chosen) if s.name in wanted or s.design.startswith("tenth 1/")]
    start = copy.deepcopy(cell.policy.model.state_dict())
    before, found = sampled(cell, SAMPLES), []
    for row in rows:
        train(
            cell.policy, [cell.pool[n] for n in chosen[row].rows], count, derived_seed(cell.seed, "stage"), cell.state
        )
        found.append((sampled(cell, SAMPLES) - before).mean(axis=1).tolist())
        cell.policy.model.load_state_dict(start)
    return {"steps": count, "subsets": rows, "changes": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--per-family", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--stage-steps", type=int, default=4)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--raw", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = []
    for seed in range(options.seeds):
        for trained in (False, True):
            label = f"seed-{seed}-{'trained' if trained else 'start'}"
            path = None if options.raw is None else options.raw / f"{label}.json"
            if path is not None and path.is_file():
                cells.append(json.loads(path.read_text(encoding="utf-8")))
                continue
            print(label, flush=True)
            cell = set_up(options.per_family, seed, trained)
            found = {"seed": seed, "trained": trained} | measure(cell, options.stage_steps, ADAM_STEPS)
            cells.append(found)
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps(found) + "\n", encoding="utf-8")
    shorter = json.loads(json.dumps(cells), parse_float=lambda digits: float(f"{float(digits):.5g}"))
    facts = {"environment": describe("cpu", 1), "options": {"per_family": options.per_family, "seeds": options.seeds}}
    options.out.write_text(json.dumps(facts | {"cells": shorter}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
