"""Train SmolLM2 on a pool by GRPO with one of cropi's ways of choosing prompts, and charge everything.

`--way`: `full` (the whole pool, shuffled), `random` (a random tenth), `learnability` (p (1 - p) from training's
rewards), `similarity-learnability`, `bmc-t`, `cropi`, or `relevant`, a perfect choice. Choosers, directions and reading
are cropi's. As in its trainer, the batch of a step is chosen before the rewards of the step in front of it are known,
and due validation prompts are sampled before that. A run writes `log.jsonl` with a line for each evaluation, validation
round and step. The same command goes on after the newest evaluation.

Costs are `passes`: forward passes of one token through all matrices, by the formula of `cropi.report.costs`, for which
every completion has a copy of its prompt, plus the products of sketching and reading.
"""

import argparse
import json
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grpo import Policy, Question
from influence import SET, Influence
from pilot import Run, Shuffled, representations

from cropi.curriculum.belief import kernel_features
from cropi.curriculum.chooser import Choice, Pool, PromptChooser, RewardChooser, rested
from cropi.curriculum.curriculum import Curriculum
from cropi.curriculum.reward_belief import RewardBelief
from cropi.curriculum.strategies.bmc import BmcStrategy
from cropi.curriculum.strategies.cropi import CropiStrategy
from cropi.curriculum.strategies.similarity_learnability import COOLDOWN, SimilarityLearnabilityStrategy
from cropi.functional.points import principal_points
from cropi.gradients.layer_taps import matrix_parameters
from cropi.seeds import derived_seed

GENERATIONS = 8
STRATEGIES: dict[str, Any] = {
    "similarity-learnability": SimilarityLearnabilityStrategy(type="similarity_learnability"),
    "bmc-t": BmcStrategy(type="bmc", utility=0.25, visit_all_first=False),  # a pass over the pool would take 100 steps
    "cropi": CropiStrategy(type="cropi"),
}
WAYS = ("full", "random", "learnability", *STRATEGIES, "relevant")


class Fixed:
    """Prompts of a subset, shuffled; learns nothing."""

    def __init__(self, places: Sequence[int], seed: int) -> None:
        self.order = Shuffled(places, seed)

    def next(self, count: int, step: int) -> list[Choice]:
        return [Choice(place, "uniform", "") for place in self.order.next(step, count)]

    def observe(self, *_: Any, **__: Any) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Any) -> None: ...


class Learnability(RewardChooser):
    """The prompts of the largest E[p (1 - p)], with the belief and the rest of `SimilarityLearnability`."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool)
        self.rewards = RewardBelief(kernel_features(principal_points(pool.states_NE), len(pool)))

    def choose(self, count: int, step: int, generator: np.random.Generator) -> list[Choice]:
        self.rewards.age_to(step)
        free_N = rested(self.last_N, step, COOLDOWN, count)
        ties_N = generator.permutation(len(free_N))  # at first all are equal
        scores_N = np.where(free_N, self.rewards.variances(), -1.0)
        return [Choice(int(n), "learnability", "") for n in np.lexsort((ties_N, -scores_N))[:count]]

    def learn(self, place: int, rewards: Any, step: int) -> None:
        self.rewards.observe(place, rewards, step)

    def beliefs(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {f"rewards/{k}": v for k, v in self.rewards.state().items()}

    def load_state_dict(self, state: Any) -> None:
        super().load_state_dict(state)
        known = {k.removeprefix("rewards/"): v for k, v in state.items() if k.startswith("rewards/")}
        self.rewards.restore(known)


def represented(arguments: argparse.Namespace, policy: Policy, questions: list[Question], depth: float) -> Any:
    """Representations by the base policy; runs beside each other share the file."""
    path = arguments.output.parent / f"representations-{arguments.pool}-{depth:g}.npy"
    if not path.exists():
        written = path.with_name(f"{os.getpid()}-{path.name}")
        np.save(written, representations(policy, questions, depth=depth))
        written.replace(path)
    return np.load(path, allow_pickle=False)


def chooser_of(
    arguments: argparse.Namespace, policy: Policy, pool: list[Question], validation: list[Question]
) -> tuple[Any, int]:
    """The chooser, and the tokens that were represented for it."""
    way, seed = arguments.way, arguments.seed
    if way in ("full", "random", "relevant"):
        places = {
            "full": np.arange(len(pool)),
            "random": np.random.default_rng([seed, 1]).permutation(len(pool))[: len(pool) // 10],
            "relevant": np.flatnonzero([question.source == SET for question in pool]),
        }[way]
        return Fixed(places.tolist(), seed), 0
    strategy = STRATEGIES.get(way)
    questions = [*pool, *(validation if strategy else [])]
    depth = strategy.represented_depth if strategy else 1.0
    states = represented(arguments, policy, [*pool, *validation], depth)
    facts = Pool(
        [f"{n:06d}" for n in range(len(pool))],
        derived_seed(seed, "curriculum"),
        generations=GENERATIONS,
        batch=arguments.prompts,
        states_NE=states[: len(pool)],
        validation_states={SET: states[len(pool) :]},
    )
    chooser = strategy.chooser(facts) if strategy else Learnability(facts)
    return chooser, sum(len(question.prompt) for question in questions)


def evaluate(policy: Policy, data: Path, step: int) -> dict[str, Any]:
    """Share of right answers at T = 1 by kind and question: two samples if targeted. All runs draw with one seed."""
    by_question: dict[str, list[float]] = {}
    for name, samples in (("targeted", 2), ("untargeted", 1)):
        generator = torch.Generator().manual_seed(10_000 + step)
        for group in policy.sample(policy.questions(data / f"test-{name}.jsonl"), samples, generator=generator):
            key = SET if name == "targeted" else f"untargeted {group.question.source}"
            by_question.setdefault(key, []).append(group.pass_rate)
    means = {kind: round(float(np.mean(own)), 4) for kind, own in by_question.items()}
    return {"evaluated": step, "accuracy": means, "by_question": by_question}


class Comparison:
    """One way of choosing at work: the chooser, its influence, and the batches that were chosen ahead."""

    def __init__(
        self, arguments: argparse.Namespace, run: Run, pool: list[Question], chooser: PromptChooser, influence: Any
    ) -> None:
        self.arguments, self.run, self.policy, self.pool = arguments, run, run.policy, pool
        self.chooser, self.influence = chooser, influence
        self.ahead: dict[int, list[Choice]] = {}
        if run.more:
            chooser.load_state_dict({k: v.numpy() for k, v in run.more["chooser"].items()})
            self.ahead = {step: [Choice(*each) for each in own] for step, own in run.more["ahead"].items()}
            if influence is not None:
                influence.load(run.more["influence"])

    def save(self) -> None:
        self.run.more = {
            "chooser": {k: torch.from_numpy(np.array(v)) for k, v in self.chooser.state_dict().items()},
            "ahead": {step: [[c.place, c.source, c.validation_set] for c in own] for step, own in self.ahead.items()},
            "influence": None if self.influence is None else self.influence.state(),
        }
        self.run.save()

    def train(self) -> None:
        run, started = self.run, time.monotonic()
        while True:
            if run.step % self.arguments.every == 0 and not any(e.get("evaluated") == run.step for e in run.lines):
                run.write(evaluate(self.policy, self.arguments.data, run.step))
                self.save()
            if run.step >= self.arguments.steps:
                (run.folder / "state.pt").unlink()  # 1.6 GB
                return
            if time.monotonic() - started > 60 * self.arguments.minutes:
                self.save()
                return
            self.step(run.step)
            run.step += 1

    def step(self, step: int) -> None:
        clock, count = [time.perf_counter()], self.arguments.prompts
        if self.influence is not None and (line := self.influence.renew(step)) is not None:
            clock.append(time.perf_counter())
            self.run.write(line | {"seconds": {"collect": round(clock[-1] - clock[-2], 2)}})
        for batch in (0, 1) if step == 0 else (step + 1,):
            if batch < self.arguments.steps:
                self.ahead[batch] = self.chooser.next(count, batch)
        chosen = self.ahead.pop(step)
        clock.append(time.perf_counter())
        groups = self.policy.sample([self.pool[choice.place] for choice in chosen], GENERATIONS)
        clock.append(time.perf_counter())
        found, reading = ({}, 0.0) if self.influence is None else self.influence.accumulate(groups)
        if self.influence is None:
            self.policy.accumulate(groups)
        norm = self.policy.update()
        clock.append(time.perf_counter())
        for n, (choice, group) in enumerate(zip(chosen, groups, strict=True)):
            own = {SET: found[n].tolist()} if n in found else None
            self.chooser.observe(choice, group.rewards, step=step, group=f"{step}-{n}", influence=own)
        generated = sum(len(completion) for group in groups for completion in group.completions)
        prompts = GENERATIONS * sum(len(group.question.prompt) for group in groups)
        seconds = np.round(np.diff(clock[-3:]), 2).tolist()
        line = {
            "step": step,
            "reward": round(float(np.mean([group.pass_rate for group in groups])), 4),
            "mixed": sum(group.is_mixed for group in groups),
            "sources": dict(Counter(group.question.source for group in groups)),
            "why": dict(Counter(choice.source for choice in chosen)),
            "norm": round(norm, 4),
            "train_tokens": generated,
            "passes": {"train": (1 + 3) * (generated + prompts) + reading},
            "seconds": {"sample": seconds[0], "differentiate": seconds[1]},
            "groups": [(choice.place, group.rewards) for choice, group in zip(chosen, groups, strict=True)],
        }
        if found:
            line["influence"] = [float(f"{found[n].sum(0).mean():.4g}") for n in range(len(groups))]
        if isinstance(self.chooser, Curriculum):
            line["metrics"] = {k: round(v, 4) for k, v in self.chooser.metrics().items() if abs(v) < float("inf")}
            if self.influence.checked:
                line |= {"share_read": round(self.influence.share_read, 4), "unread": self.influence.unread}
        self.run.write(line)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder written by warm_start.py")
    parser.add_argument("--data", type=Path, required=True, help="folder written by pool.py")
    parser.add_argument(
        "--pool", default="niche", choices=("niche", "mislabelled", "homogeneous"), help="default: niche"
    )
    parser.add_argument("--way", choices=WAYS, required=True, help="of choosing prompts")
    parser.add_argument("--output", type=Path, required=True, help="folder of runs; this one's is POOL/WAY-SEED in it")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--steps", type=int, default=64, help="default: 64")
    parser.add_argument("--prompts", type=int, default=32, help="of a step, 8 completions each (default: 32)")
    parser.add_argument("--learning-rate", type=float, default=3e-5, help="default: 3e-5")
    parser.add_argument("--longest", type=int, default=48, help="tokens of a completion (default: 48)")
    parser.add_argument("--every", type=int, default=8, help="steps between evaluations, and saves (default: 8)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop and save after these minutes")
    return parser.parse_args()


def is_finished(folder: Path, steps: int) -> bool:
    log = folder / "log.jsonl"
    return log.exists() and any(
        json.loads(line).get("evaluated") == steps for line in log.read_text(encoding="utf-8").splitlines()
    )


def main() -> None:
    arguments = parse_arguments()
    arguments.output = arguments.output / arguments.pool / f"{arguments.way}-{arguments.seed}"
    if is_finished(arguments.output, arguments.steps):
        return
    torch.set_num_threads(1)
    policy = Policy(
        arguments.model, learning_rate=arguments.learning_rate, longest=arguments.longest, seed=arguments.seed
    )
    pool = policy.questions(arguments.data / arguments.pool / "train.jsonl")
    validation = policy.questions(arguments.data / "validation.jsonl")
    arguments.output.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    chooser, tokens = chooser_of(arguments, policy, pool, validation)  # by the base policy, before a state is loaded
    run = Run(arguments.output, policy)
    if not run.lines:
        settings = {
            name: getattr(arguments, name) for name in ("steps", "prompts", "learning_rate", "longest", "every")
        }
        run.write({"settings": settings, "matrix_parameters": matrix_parameters(policy.model)})
        seconds = round(time.perf_counter() - started, 2)
        run.write({"represented": tokens, "passes": {"score": tokens}, "seconds": {"score": seconds}})
    of_cropi = isinstance(chooser, Curriculum)
    influence = Influence(policy, validation, chooser, arguments.seed) if of_cropi else None
    Comparison(arguments, run, pool, chooser, influence).train()


if __name__ == "__main__":
    main()
