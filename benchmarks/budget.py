"""What a scoring budget costs and loses: tokens computed, rank correlation and precision@10 % against exact influence.

Groups are real: the built-in policy's own completions on problems of all families, half of the answers wrong. Every
trajectory's part of every inner product is sketched once and looked up afterwards: influence is a sum of them, so any
setting and any seed of the sub-sample costs nothing more, and one setting is run for real to check it. Re-scoring is
measured after Adam steps on what the base policy would have selected, with the trajectories of the base policy.

A second draw of trajectories for the same prompts shows what a score of 8 trajectories can mean at most.

    python benchmarks/budget.py --prompts 1440 --seeds 10 --out budget.json
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cropi.gradients.budget import BudgetedScores, BudgetSettings, Cut, budgeted

from cropi.builtin import FAMILIES, generate
from cropi.config import PolicyConfig
from cropi.functional.agreement import spearman
from cropi.functional.bootstrap import bootstrap_mean
from cropi.functional.ranking import selection_size
from cropi.gradients.groups import Group
from cropi.gradients.influence_scorer import BLOCK, Scored, Scorer, ScorerOptions
from cropi.gradients.reference import prompt_gradient, trainable_parameters
from cropi.gradients.surrogate_weights import SurrogateSettings
from cropi.lab.bench.machine import describe
from cropi.policy import Policy, completion_logprobs, encode_prompts, load_policy
from cropi.rewards.verdicts import Answered, reward
from cropi.rewards.verifiers.exact_text import ExactVerifier
from cropi.rollouts.generation import Sampling, TransformersGenerator

TARGETS = ("sum", "machine")  # one validation set each
VALIDATION_PROMPTS, VALIDATION_TRAJECTORIES = 24, 16
TRAJECTORIES, LENGTH = 8, 32
SURROGATE = SurrogateSettings("constant", LENGTH)
FRACTION = 0.1
CHECKED = (4, 0.2)

BUDGETS: list[tuple[int, float | None]] = [
    *((count, None) for count in (2, 3, 4, 6)),
    *((2, share) for share in (0.2, 0.3, 0.4)),
    *((3, share) for share in (0.2, 0.3)),
    *((4, share) for share in (0.15, 0.2, 0.3)),
]
STEPS, LEARNING_RATE, BATCH = (2, 4, 8, 16), 5e-5, 16


class LookUp(Scorer):
    """Adds up what each trajectory is known to contribute, and counts the tokens that computing it would take."""

    def __init__(self, parts: Mapping[str, np.ndarray]) -> None:
        self.estimator, self.score, self._parts = "sketch", "dot", parts

    def __call__(self, groups: Sequence[Group], *, factors: Any = None, advance: Any = None) -> Scored:
        factors = [[1.0] * len(group.completions) for group in groups] if factors is None else factors
        sums = [np.array(f) @ self._parts[group.prompt_id] for group, f in zip(groups, factors, strict=True)]
        tokens = sum(
            len(group.prompt_ids) + sum(len(c) - 1 for c, x in zip(group.completions, f, strict=True) if x)
            for group, f in zip(groups, factors, strict=True)
        )
        products_NV = np.array(sums).reshape(len(groups), len(TARGETS))
        return Scored(products_NV, np.ones(len(groups)), np.ones(len(groups)), None, tokens)

    def values(self, scored: Scored) -> np.ndarray:
        return scored.products_NV


def draw(policy: Policy, rows: Sequence[dict[str, Any]], count: int, seed: int) -> list[Group]:
    """`count` trajectories for each row."""
    verify = ExactVerifier(type="exact", marker="answer").load()
    prompts = encode_prompts(policy.tokenizer, [row["prompt"] for row in rows])
    repeated = [ids for ids in prompts for _ in range(count)]
    completions = TransformersGenerator(policy, 512)(repeated, Sampling(LENGTH, 1.0), seed=seed)
    texts = policy.tokenizer.batch_decode(completions, skip_special_tokens=True)
    groups = []
    for n, row in enumerate(rows):
        mine = slice(n * count, (n + 1) * count)
        rewards = [reward(verify(Answered(text, row["answer"]))) or 0.0 for text in texts[mine]]
        with torch.no_grad():
            found_KT, _ = completion_logprobs(policy.model, repeated[mine], completions[mine], temperature=1.0)
        logprobs = [found_KT[k, : len(c)].tolist() for k, c in enumerate(completions[mine])]
        groups.append(Group(row["prompt_id"], prompts[n], completions[mine], rewards, logprobs))
    return groups


def scores_of(scorer: Scorer, groups: Sequence[Group]) -> np.ndarray:
    blocks = [scorer(groups[start : start + BLOCK]).products_NV for start in range(0, len(groups), BLOCK)]
    return np.concatenate(blocks)


def parts_of(scorer: Scorer, groups: Sequence[Group]) -> dict[str, np.ndarray]:
    """What each trajectory contributes to its group's inner products, (K, V) by prompt id."""
    one_KK, parts, step = np.eye(TRAJECTORIES).tolist(), {}, BLOCK // TRAJECTORIES
    for start in range(0, len(groups), step):
        block = groups[start : start + step]
        alone = [group for group in block for _ in range(TRAJECTORIES)]
        found = scorer(alone, factors=one_KK * len(block)).products_NV.reshape(len(block), TRAJECTORIES, -1)
        parts |= {group.prompt_id: part_KV for group, part_KV in zip(block, found, strict=True)}
    return parts


def train(policy: Policy, groups: Sequence[Group], steps: int) -> Iterator[int]:
    """Adam up the mean surrogate of some groups, over and over; yields the number of steps taken after each."""
    parameters = trainable_parameters(policy.model)
    optimizer = torch.optim.Adam(parameters.values(), lr=LEARNING_RATE, maximize=True)
    generator = np.random.default_rng(0)
    for step in range(1, steps + 1):
        batch = [groups[row] for row in generator.choice(len(groups), min(BATCH, len(groups)), replace=False)]
        found = [prompt_gradient(policy.model, group, SURROGATE).gradients for group in batch]
        for name, parameter in parameters.items():
            parameter.grad = torch.stack([gradients[name] for gradients in found]).mean(dim=0)
        optimizer.step()
        optimizer.zero_grad()
        yield step


class Ruler:
    """Measures settings against the exact scores at one policy."""

    def __init__(self, groups: Sequence[Group], exact_NV: np.ndarray) -> None:
        self.exact_NV, size = exact_NV, selection_size(FRACTION, len(groups))
        self.cut = Cut([g.prompt_id for g in groups], np.ones(len(groups), dtype=bool), size)
        self.selected = self.cut.above(exact_NV)
        self.tokens = sum(len(g.prompt_ids) + sum(len(c) - 1 for c in g.completions) for g in groups)

    def row(self, name: str, found: Sequence[BudgetedScores], other: Ruler | None = None) -> dict[str, Any]:
        """One row of the table: means over the seeds."""
        chosen = [set(self.cut.above(scores.values_NV)) for scores in found]
        hits_N = np.array([np.mean([row in rows for rows in chosen]) for row in self.selected])
        interval = bootstrap_mean(hits_N, redraws=2000, confidence=0.95, seed=0)
        row = {
            "name": name,
            "tokens": float(np.mean([scores.tokens_computed for scores in found])) / self.tokens,
            "scored": float(np.mean([np.mean([how != "predicted" for how in scores.how]) for scores in found])),
            "full": float(np.mean([np.mean([how == "full" for how in scores.how]) for scores in found])),
            "spearman": float(np.mean([self.correlation(scores.values_NV) for scores in found])),
            "precision": interval.mean,
            "interval": [interval.low, interval.high],
            "precision_worst": min(len(rows & set(self.selected)) / len(self.selected) for rows in chosen),
        }
        return row | ({} if other is None else {"other_draw": other.precision([s.values_NV for s in found], self)})

    def correlation(self, values_NV: np.ndarray) -> float:
        return float(np.mean([spearman(values_NV[:, v], self.exact_NV[:, v]) for v in range(len(TARGETS))]))

    def precision(self, found: Sequence[np.ndarray], whose: Ruler) -> float:
        """Mean precision@10 % of another pool's scores, among the prompts in both."""
        shared = sorted(set(self.cut.ids) & set(whose.cut.ids))
        cut = Cut(shared, np.ones(len(shared), dtype=bool), selection_size(FRACTION, len(shared)))
        mine, theirs = ([{i: n for n, i in enumerate(ruler.cut.ids)}[i] for i in shared] for ruler in (self, whose))
        best = set(cut.above(self.exact_NV[mine]))
        return float(np.mean([len(best & set(cut.above(values_NV[theirs]))) / cut.places for values_NV in found]))


def plain(count: int | None, share: float | None, *, rescore: bool = False) -> BudgetSettings:
    return BudgetSettings(count, share, rescore=rescore, fraction=FRACTION)


def name_of(count: int | None, share: float | None) -> str:
    return f"{count} of {TRAJECTORIES}" + ("" if share is None else f", then all for {share:.0%}")


def at_the_base(groups: list[Group], other: Ruler, ruler: Ruler, look_up: LookUp, seeds: range) -> list[dict[str, Any]]:
    rows = [ruler.row("all 8", [budgeted(look_up, groups, plain(None, None), seed=0)], other)]
    for count, share in BUDGETS:
        found = [budgeted(look_up, groups, plain(count, share), seed=seed) for seed in seeds]
        rows.append(ruler.row(name_of(count, share), found, other))
    return rows


def after_steps(
    steps: int, groups: list[Group], ruler: Ruler, now: LookUp, before: LookUp, seeds: range
) -> list[dict[str, Any]]:
    """Old scores as they are, then re-scoring alone and together with the checked budget."""
    full_NV = budgeted(before, groups, plain(None, None), seed=0).values_NV
    nothing = np.full(len(groups), np.nan)
    old = BudgetedScores(full_NV, ["predicted"] * len(groups), nothing, nothing, 0, 0)
    found: dict[str, list[BudgetedScores]] = {
        f"{steps} steps, old scores": [old],
        f"{steps} steps, all 8": [budgeted(now, groups, plain(None, None), seed=0)],
        f"{steps} steps, re-score": [],
        f"{steps} steps, re-score, {name_of(*CHECKED)}": [],
    }
    alone, both = list(found)[2:]
    for seed in seeds:
        found[alone].append(budgeted(now, groups, plain(None, None, rescore=True), full_NV, seed=seed, stage=1))
        cheap_NV = budgeted(before, groups, plain(*CHECKED), seed=seed).values_NV
        found[both].append(budgeted(now, groups, plain(*CHECKED, rescore=True), cheap_NV, seed=seed, stage=1))
    return [ruler.row(name, scores) for name, scores in found.items()]


def check(scorer: Scorer, groups: list[Group], look_up: LookUp) -> dict[str, float]:
    """Run one setting and the full sketch for real: the look-up must agree. Returns CPU seconds."""
    seconds = {}
    for name, settings in (("full", plain(None, None)), (name_of(*CHECKED), plain(*CHECKED))):
        started = time.process_time()
        real = budgeted(scorer, groups, settings, seed=0)
        seconds[name] = time.process_time() - started
        looked_up = budgeted(look_up, groups, settings, seed=0)
        assert real.tokens_computed == looked_up.tokens_computed
        np.testing.assert_allclose(
            real.values_NV, looked_up.values_NV, atol=1e-4 * float(np.abs(looked_up.values_NV).max())
        )
    return seconds


def aimed(policy: Policy, estimator: Any, validation: Mapping[str, list[Group]]) -> Scorer:
    scorer = Scorer(policy.model, SURROGATE, ScorerOptions(estimator=estimator))
    scorer.aim(validation)
    return scorer


def mixed(groups: Sequence[Group]) -> list[Group]:
    return [group for group in groups if group.status == "ok"]


def measure(prompts: int, seeds: range) -> dict[str, Any]:
    policy = load_policy(PolicyConfig(path="builtin"))
    per_family = -(-prompts // len(FAMILIES))
    rows = [
        row for f in sorted(FAMILIES) for row in generate(f, split="train", count=per_family, seed=1, label_noise=0.5)
    ]
    groups, again = (mixed(draw(policy, rows, TRAJECTORIES, seed)) for seed in (1, 2))
    validation = {
        name: mixed(draw(policy, problems, VALIDATION_TRAJECTORIES, 3))
        for name in TARGETS
        for problems in [generate(name, split="validation", count=VALIDATION_PROMPTS, seed=2)]
    }
    exact, sketch = (aimed(policy, estimator, validation) for estimator in ("exact", "sketch"))
    ruler, other = Ruler(groups, scores_of(exact, groups)), Ruler(again, scores_of(exact, again))
    before = LookUp(parts_of(sketch, groups))
    seconds = check(sketch, groups, before)
    table = at_the_base(groups, other, ruler, before, seeds)
    for step in train(policy, [groups[row] for row in ruler.selected], max(STEPS)):
        if step in STEPS:
            now = Ruler(groups, scores_of(aimed(policy, "exact", validation), groups))
            look_up = LookUp(parts_of(aimed(policy, "sketch", validation), groups))
            table += after_steps(step, groups, now, look_up, before, seeds)
    return {"groups": len(groups), "other_draw": other.precision([ruler.exact_NV], ruler), "seconds": seconds} | {
        "shared": len(set(ruler.cut.ids) & set(other.cut.ids)),
        "rows": table,
    }


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['groups']} mixed groups; CPU seconds for real: {result['seconds']}")
    print(f"other draw: {result['shared']} groups mixed in both, exact against exact {result['other_draw']:.2f}\n")
    print("| budget | tokens | scored | in full | Spearman | precision@10 % | worst seed | other draw |")
    print("|---|---|---|---|---|---|---|---|")
    for row in result["rows"]:
        low, high = row["interval"]
        other = f"{row['other_draw']:.2f}" if "other_draw" in row else ""
        print(
            f"| {row['name']} | {row['tokens']:.2f} | {row['scored']:.0%} | {row['full']:.0%} "
            f"| {row['spearman']:.3f} | {row['precision']:.3f} ({low:.2f}–{high:.2f}) "
            f"| {row['precision_worst']:.2f} | {other} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=1440)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    result = measure(options.prompts, range(options.seeds))
    show(result)
    print(f"\n{time.perf_counter() - started:.0f} s")
    if options.out:
        facts = {"environment": describe("cpu", 1), "options": {"prompts": options.prompts, "seeds": options.seeds}}
        options.out.write_text(json.dumps(facts | result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
