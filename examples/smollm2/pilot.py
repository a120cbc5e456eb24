"""Train SmolLM2 on a pool by GRPO, with one way of choosing prompts, in parts that can be resumed.

`--choose` takes `relevant` (a perfect choice: the two-step problems with right answers), `full` (the whole pool,
shuffled), `random` (a random tenth) or `likeness`: likeness to the validation prompts times learnability p (1 - p),
with p from training's own rewards, smoothed over similar prompts. A run writes `log.jsonl` with a line for each step
and each evaluation, `state.pt` and, with `--keep`, weights. The same command goes on where it was stopped.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from grpo import Group, Policy, Question

from cropi.functional.points import principal_points

HALF_LIFE = 16  # steps after which a group's rewards count half
COOL = 4  # steps before a prompt may come again
HIDDEN = ("by_question", "groups", "influence")  # of a line of the log, when it is printed


class Choice(Protocol):
    def next(self, step: int, count: int) -> list[int]: ...

    def observe(self, step: int, places: Sequence[int], groups: Sequence[Group]) -> None: ...


class Shuffled:
    """Prompts of a subset in random order, each once an epoch."""

    def __init__(self, places: Sequence[int], seed: int) -> None:
        self.places, self.seed = list(places), seed

    def next(self, step: int, count: int) -> list[int]:
        found: list[int] = []
        for position in range(step * count, (step + 1) * count):
            epoch, place = divmod(position, len(self.places))
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.places))
            found.append(self.places[order[place]])
        return found

    def observe(self, step: int, places: Sequence[int], groups: Sequence[Group]) -> None:
        pass


class Likeness:
    """Likeness to the validation prompts x learnability from training's rewards."""

    def __init__(self, pool: Any, validation: Any) -> None:
        points = principal_points(pool, validation)
        points, targets = points[: len(pool)], points[len(pool) :]
        squares = distances(points, points)
        nearest = np.sqrt(squares + np.diag(np.full(len(points), np.inf))).min(1)
        width = 2 * 4 * np.median(nearest) ** 2
        self.kernel = np.exp(-squares / width)
        self.likeness = np.exp(-distances(points, targets) / width).max(1)
        self.seen: list[tuple[int, int, float, int]] = []  # step, place, successes, completions
        self.last = np.full(len(points), -(10**9))

    def next(self, step: int, count: int) -> list[int]:
        right, tried = np.zeros(len(self.last)), np.zeros(len(self.last))
        for seen, place, successes, completions in self.seen:
            fresh = 0.5 ** ((step - seen) / HALF_LIFE)
            right[place] += fresh * successes
            tried[place] += fresh * completions
        used = self.kernel * (tried > 0)
        prior = 2 * (used @ right + 0.5e-3) / (used @ tried + 1e-3)
        a, b = right + prior, tried - right + 2 - prior
        gain = self.likeness * a * b / ((a + b) * (a + b + 1))
        gain[self.last >= step - COOL] = -np.inf
        return [int(n) for n in np.lexsort((np.arange(len(gain)), -gain))[:count]]

    def observe(self, step: int, places: Sequence[int], groups: Sequence[Group]) -> None:
        for place, group in zip(places, groups, strict=True):
            self.seen.append((step, place, sum(group.rewards), len(group.rewards)))
            self.last[place] = step


def distances(first: Any, second: Any) -> Any:
    return np.maximum((first**2).sum(1)[:, None] + (second**2).sum(1) - 2 * first @ second.T, 0)


@torch.inference_mode()
def representations(policy: Policy, questions: Sequence[Question], batch: int = 64, depth: float = 1.0) -> Any:
    """Mean hidden state of each prompt's tokens at a depth from 0 to 1, the last layer; questions x width."""
    order = sorted(range(len(questions)), key=lambda n: len(questions[n].prompt))
    found: list[Any] = [None] * len(questions)
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        width = len(questions[part[-1]].prompt)
        ids = torch.tensor([[*questions[n].prompt, *[0] * (width - len(questions[n].prompt))] for n in part])
        mask = torch.tensor([[1] * len(questions[n].prompt) + [0] * (width - len(questions[n].prompt)) for n in part])
        layers = policy.sampler.model(
            input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True
        ).hidden_states
        hidden = layers[min(round(depth * len(layers)), len(layers) - 1)].float()
        means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        for n, mean in zip(part, means.numpy(), strict=True):
            found[n] = mean
    return np.stack(found)


def choice_of(arguments: argparse.Namespace, policy: Policy, pool: list[Question]) -> Choice:
    relevant = [n for n, question in enumerate(pool) if question.source == "two-step"]
    if arguments.choose == "relevant":
        return Shuffled(relevant, arguments.seed)
    if arguments.choose == "full":
        return Shuffled(range(len(pool)), arguments.seed)
    if arguments.choose == "random":
        subset = np.random.default_rng([arguments.seed, 1]).permutation(len(pool))[: len(pool) // 10]
        return Shuffled(subset.tolist(), arguments.seed)
    kept = arguments.output / "representations.npy"
    if not kept.exists():
        validation = policy.questions(arguments.data / "validation.jsonl")
        np.save(kept, representations(policy, [*pool, *validation]))
    vectors = np.load(kept, allow_pickle=False)
    return Likeness(vectors[: len(pool)], vectors[len(pool) :])


def evaluate(policy: Policy, data: Path, step: int, samples: int) -> dict[str, Any]:
    """Held-out accuracy by kind at T = 1, and greedy on targeted problems. Every run draws with the same seed."""
    found: dict[str, Any] = {"evaluated": step}
    for name in ("targeted", "untargeted"):
        questions = policy.questions(data / f"test-{name}.jsonl")
        generator = torch.Generator().manual_seed(10_000 + step)
        groups = policy.sample(questions, samples if name == "targeted" else 1, generator=generator)
        found[name] = {}
        for kind in dict.fromkeys(question.source for question in questions):
            own = [group.pass_rate for group in groups if group.question.source == kind]
            found[name][kind] = round(sum(own) / len(own), 4)
        if name == "targeted":
            found["by_question"] = [group.pass_rate for group in groups]
            found["greedy"] = round(float(np.mean([g.pass_rate for g in policy.sample(questions, 0)])), 4)
    return found


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder written by warm_start.py")
    parser.add_argument("--data", type=Path, required=True, help="folder written by pool.py")
    parser.add_argument("--pool", default="niche", help="niche, mislabelled or homogeneous (default: niche)")
    parser.add_argument("--choose", choices=("relevant", "full", "random", "likeness"), required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--seed", type=int, default=100, help="default: 100")
    parser.add_argument("--steps", type=int, default=64, help="default: 64")
    parser.add_argument("--prompts", type=int, default=16, help="of a step, 8 completions each (default: 16)")
    parser.add_argument("--learning-rate", type=float, default=3e-5, help="default: 3e-5")
    parser.add_argument("--longest", type=int, default=48, help="tokens of a completion (default: 48)")
    parser.add_argument("--every", type=int, default=16, help="steps between evaluations (default: 16)")
    parser.add_argument("--samples", type=int, default=2, help="of a targeted question (default: 2)")
    parser.add_argument("--save-every", type=int, default=8, help="default: 8")
    parser.add_argument("--keep", type=int, nargs="*", default=[], help="steps whose weights are kept")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop and save after these minutes")
    return parser.parse_args()


class Run:
    """A run's folder: what was logged, and the state to go on from."""

    def __init__(self, folder: Path, policy: Policy) -> None:
        self.folder, self.policy = folder, policy
        folder.mkdir(parents=True, exist_ok=True)
        self.step, self.lines = 0, list[dict[str, Any]]()
        self.more: dict[str, Any] = {}  # `more`: what else the state has
        if (folder / "state.pt").exists():
            state = torch.load(folder / "state.pt", weights_only=True)
            policy.load(state)
            self.step = int(state["step"])
            self.lines, self.more = [json.loads(line) for line in state["log"]], state.get("more", {})

    def save(self) -> None:
        log = [json.dumps(line) for line in self.lines]
        (self.folder / "log.jsonl").write_text("".join(line + "\n" for line in log), encoding="utf-8")
        torch.save(self.policy.state() | {"step": self.step, "log": log, "more": self.more}, self.folder / "state.tmp")
        (self.folder / "state.tmp").replace(self.folder / "state.pt")

    def write(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        print(
            json.dumps({name: value for name, value in line.items() if name not in HIDDEN}),
            flush=True,
        )


def train(arguments: argparse.Namespace, run: Run, choice: Choice, pool: list[Question]) -> None:
    policy, started = run.policy, time.monotonic()
    for line in run.lines:  # what the choice had seen
        if "groups" in line:
            groups = [Group(pool[n], [], rewards) for n, rewards in line["groups"]]
            choice.observe(line["step"], [n for n, _ in line["groups"]], groups)
    while True:
        if run.step % arguments.every == 0 and not any(line.get("evaluated") == run.step for line in run.lines):
            run.write(evaluate(policy, arguments.data, run.step, arguments.samples))
            run.save()
        if run.step in arguments.keep:
            policy.sampler.save_pretrained(run.folder / f"step-{run.step}")
            policy.tokenizer.save_pretrained(run.folder / f"step-{run.step}")
        if run.step >= arguments.steps:
            return
        if time.monotonic() - started > 60 * arguments.minutes:
            run.save()
            return
        clock = [time.perf_counter()]
        places = choice.next(run.step, arguments.prompts)
        groups = policy.sample([pool[n] for n in places], 8)
        clock.append(time.perf_counter())
        norm = policy.step(groups)
        clock.append(time.perf_counter())
        choice.observe(run.step, places, groups)
        run.write(
            {
                "step": run.step,
                "reward": round(float(np.mean([group.pass_rate for group in groups])), 4),
                "mixed": sum(0 < group.pass_rate < 1 for group in groups),
                "sources": dict(Counter(group.question.source for group in groups)),
                "norm": round(norm, 4),
                "tokens": sum(len(completion) for group in groups for completion in group.completions),
                "prompt_tokens": sum(len(group.question.prompt) for group in groups),
                "seconds": [round(clock[1] - clock[0], 2), round(clock[2] - clock[1], 2)],
                "groups": [(n, group.rewards) for n, group in zip(places, groups, strict=True)],
            }
        )
        run.step += 1
        if run.step % arguments.save_every == 0:
            run.save()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    policy = Policy(
        arguments.model, learning_rate=arguments.learning_rate, longest=arguments.longest, seed=arguments.seed
    )
    run = Run(arguments.output, policy)
    pool = policy.questions(arguments.data / arguments.pool / "train.jsonl")
    train(arguments, run, choice_of(arguments, policy, pool), pool)


if __name__ == "__main__":
    main()
