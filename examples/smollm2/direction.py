"""Measure what a validation direction costs: its agreement with itself against the number of completions.

`measure` samples completions of every validation prompt from a policy, or re-weights those of an earlier policy by each
token's importance ratio. It keeps a sketch of every completion's gradient of log pi. `table` draws subsets of the
completions and prints what each source gives.

The sketch is, for each linear layer, the sum over a completion's own tokens of (P g)(Q a)^T: a is the layer's input, g
the gradient at its output, P and Q are Gaussian with 16 rows. Inner products of sketches estimate those of gradients
without bias. Gradients that flow through the prompt's tokens cannot be told apart by completion and are left out; the
table gives the share of the squared norm that own tokens hold. Dense means over eighths of the prompts serve the ranks.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from grpo import Group, Packed, Policy, Question, Row, log_probs, pack
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from cropi.functional.ranking import spearman_brown
from cropi.lab.audit.agreement import spearman

SKETCH = 16  # columns of P and Q
TOGETHER = 16  # completions that share one pass
FOLDS = 8
RANKS = (1, 2, 4, 8, 16, 64)
DRAWS = 200  # subsets of each size
Draw = Callable[[int, Any], Any]
AUDITED = {"two-step": 32, "one-step": 24, "divisors": 8}  # pool prompts whose influence is compared between sources


class Sketcher:
    """Sketch the gradient of each linear layer, summed over the tokens of each branch."""

    def __init__(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        self.layers = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"]

        def projection(width: int) -> Tensor:
            return torch.randn(width, SKETCH, generator=generator) / SKETCH**0.5

        self.projections = [(projection(m.in_features), projection(m.out_features)) for m in self.layers]

    @contextmanager
    def reading(self, packed: Packed) -> Iterator[Tensor]:
        """Encloses a forward and backward pass; yields U x branches x layers x 256; branch 0 is the prompt."""
        rows = len(packed.ids_UL)
        branches = int(packed.branch_UL.max()) + 1
        place = (torch.arange(rows)[:, None] * branches + packed.branch_UL.clamp(min=0)).flatten()
        found = torch.zeros(rows * branches, len(self.layers), SKETCH * SKETCH)
        inputs: dict[int, Tensor] = {}

        def keep(n: int) -> Callable[..., None]:
            def hook(module: nn.Module, given: Any, output: Tensor) -> None:
                with torch.autocast("cpu", enabled=False):
                    inputs[n] = given[0].detach().float().flatten(0, 1) @ self.projections[n][0]
                output.register_hook(lambda gradient: meet(n, gradient))

            return hook

        def meet(n: int, gradient: Tensor) -> None:
            with torch.autocast("cpu", enabled=False):
                own = gradient.float().flatten(0, 1) @ self.projections[n][1]
            outer = (own[:, :, None] * inputs.pop(n)[:, None, :]).flatten(1)
            found[:, n].index_add_(0, place, outer)  # padding has no gradient

        hooks = [layer.register_forward_hook(keep(n)) for n, layer in enumerate(self.layers)]
        try:
            yield found.view(rows, branches, len(self.layers), -1)
        finally:
            for hook in hooks:
                hook.remove()


def centred(rewards: Sequence[float]) -> list[float]:
    """r - mean of the others: REINFORCE with a leave-one-out baseline."""
    total, count = sum(rewards), len(rewards)
    return [reward - (total - reward) / (count - 1) for reward in rewards]


def measure(
    policy: Policy, groups: list[Group], behaviour: dict[int, Any] | None, folds: int
) -> tuple[dict[str, Any], list[Any]]:
    """Sketches (prompts x completions x size), log-probabilities, and dense gradients of `folds` parts."""
    sketcher = Sketcher(policy.model)
    count = len(groups[0].completions)
    size = len(sketcher.layers) * SKETCH * SKETCH
    scores = np.zeros((len(groups), count, size), np.float16)
    kept: dict[int, Any] = {}
    norms = np.zeros(2)
    dense: list[Any] = []
    for n, group in enumerate(groups):
        kept[n] = []
        weights = centred(group.rewards)
        parts = range(0, count, TOGETHER) if any(weights) else ()  # without mixed rewards there is no gradient
        whole = torch.zeros(2, size)
        for start in parts:
            part = slice(start, start + TOGETHER)
            packed = pack([Row(group.question.prompt, group.completions[part], weights[part])])
            with sketcher.reading(packed) as found, torch.autocast("cpu", torch.bfloat16):
                logs = log_probs(policy.model, packed)
                own = logs.detach()
                if behaviour is not None:
                    own = (own - torch.tensor(behaviour[n][start // TOGETHER])).exp()
                kept[n].append(logs.tolist())
                factor = packed.weights_T * own if behaviour is not None else packed.weights_T
                (factor * logs).sum().backward()
            sketch = found[0].flatten(1)
            whole += torch.stack([sketch.sum(0), sketch[1:].sum(0)])
            inverse = torch.tensor([1 / w if abs(w) > 1e-6 else 0.0 for w in weights[part]])
            scores[n, part] = (sketch[1:] * inverse[:, None]).numpy()
        norms += whole.square().sum(1).numpy()
        if folds and (n + 1) % (len(groups) // folds) == 0:
            dense.append([as_dense(layer) for layer in sketcher.layers])
            policy.model.zero_grad()
        print(f"{n + 1} of {len(groups)} prompts", end="\r", flush=True)
    policy.model.zero_grad()
    rewards = np.array([group.rewards for group in groups], np.float32)
    return {"scores": scores, "rewards": rewards, "own_share": norms[1:] / norms[:1], "kept": kept}, dense


def as_dense(layer: nn.Linear) -> Tensor:
    found = layer.weight.grad
    return (torch.zeros_like(layer.weight) if found is None else found).to(torch.bfloat16)


def rank_agreement(dense: list[Any]) -> dict[str, list[float]]:
    """(inner product of each eighth with the mean of the others at a rank) for each rank, and whole."""
    found: dict[str, list[float]] = {str(rank): [0.0] * FOLDS for rank in (*RANKS, "full")}
    for layer in range(len(dense[0])):
        parts = torch.stack([fold[layer].float() for fold in dense])
        total = parts.sum(0)
        for n, part in enumerate(parts):
            others = (total - part) / (FOLDS - 1)
            found["full"][n] += float((part * others).sum())
            u, s, v = torch.svd_lowrank(others, q=max(RANKS) + 8)
            for rank in RANKS:
                found[str(rank)][n] += float((part * (u[:, :rank] * s[:rank] @ v[:, :rank].T)).sum())
    return found


# The table


def gradients(scores: Any, rewards: Any, taken: list[Any]) -> Any:
    """Each prompt's gradient from the completions `taken` of it, prompts x size."""
    rows = []
    for own, graded, places in zip(scores, rewards, taken, strict=True):
        weights = centred(graded[places].tolist()) if len(places) > 1 else [0.0] * len(places)
        rows.append(np.array(weights) @ own[places].astype(np.float32) / max(len(places), 1))
    return np.stack(rows)


def agreement(products: Any) -> float:
    """Standard errors by which each prompt's gradient agrees with the others', from their inner products."""
    influence = products.sum(1) - np.diag(products)
    error = influence.std(ddof=1) / math.sqrt(len(influence))
    return float(influence.mean() / error) if error else 0.0


class Measured:
    """Sketches and rewards of one source, and where its completions stand in the common table of inner products."""

    def __init__(self, rewards: Any, rows: Any) -> None:
        self.rewards, self.rows = rewards, rows

    def part(self, of: slice) -> "Measured":
        return Measured(self.rewards[:, of], self.rows[:, of])

    def weights(self, taken: list[Any], size: int) -> Any:
        """The weight of each completion of the table in each prompt's gradient, prompts x size."""
        found = np.zeros((len(taken), size), np.float32)
        for n, places in enumerate(taken):
            if len(places) > 1:
                found[n, self.rows[n, places]] = np.array(centred(self.rewards[n, places].tolist())) / len(places)
        return found

    def all(self, size: int) -> Any:
        return self.weights([np.arange(self.rewards.shape[1])] * len(self.rewards), size)


class Products:
    """Inner products between the sketches of all completions."""

    def __init__(self, scores: Sequence[Any]) -> None:
        rows = torch.from_numpy(np.concatenate(scores))
        self.table = np.concatenate([(block.float() @ rows.float().T).numpy() for block in rows.split(1024)])

    @property
    def size(self) -> int:
        return len(self.table)

    def between(self, weights: Any) -> Any:
        """Inner products of the combined gradients, prompts x prompts."""
        used = weights.any(0).nonzero()[0]
        return weights[:, used] @ self.table[np.ix_(used, used)] @ weights[:, used].T

    def cosine(self, first: Any, second: Any) -> float:
        lengths = float(first @ (self.table @ first)) * float(second @ (self.table @ second))
        return float(first @ (self.table @ second)) / lengths**0.5 if lengths else 0.0


def equal(count: int, prompts: int, available: int, generator: Any) -> list[Any]:
    """`count` completions spread evenly over the prompts in random order, at least two of each that is taken."""
    each, extra = divmod(count, prompts)
    order = generator.permutation(prompts)
    sizes = np.full(prompts, each)
    sizes[order[:extra]] += 1
    if each < 2:
        sizes = np.zeros(prompts, int)
        sizes[order[: count // 2]] = 2
    return [generator.permutation(available)[:size] for size in sizes]


def by_spread(count: int, spread: Any, available: int, generator: Any) -> list[Any]:
    """Neyman's allocation: completions in proportion to `spread`, at least two where any."""
    sizes = np.minimum(np.round(count * spread / spread.sum()), available).astype(int)
    return [generator.permutation(available)[: size if size > 1 else 0] for size in sizes]


def audit(fresh: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Influence of the pool prompts from one source's completions beside that from fresh ones, over mixed prompts.

    The ceiling is the agreement of two disjoint halves of the fresh completions, stepped up to all (Spearman-Brown).
    """
    prompts, available = fresh["pool_rewards"].shape
    every, even, odd = (np.arange(start, available, step) for start, step in ((0, 1), (0, 2), (1, 2)))

    def influence(data: dict[str, Any], places: Any, target: Any) -> Any:
        return gradients(data["pool_scores"], data["pool_rewards"], [places] * prompts) @ target

    size = fresh["rewards"].shape[1]
    directions = [
        gradients(data["scores"], data["rewards"], [places] * len(data["rewards"])).mean(0)
        for data, places in ((fresh, np.arange(0, size, 2)), (fresh, np.arange(1, size, 2)), (other, np.arange(size)))
    ]
    mixed = (np.ptp(fresh["pool_rewards"], axis=1) > 0) & (np.ptp(other["pool_rewards"], axis=1) > 0)
    halves_agree = spearman(influence(fresh, even, directions[0])[mixed], influence(fresh, odd, directions[1])[mixed])
    reference = influence(fresh, every, sum(directions[:2]))[mixed]
    return {
        "prompts": int(mixed.sum()),
        "halves": round(halves_agree, 3),
        "ceiling": round(spearman_brown(halves_agree), 3),
        "stored_prompts_fresh_direction": round(
            spearman(influence(other, every, sum(directions[:2]))[mixed], reference), 3
        ),
        "stored_both": round(spearman(influence(other, every, directions[2])[mixed], reference), 3),
    }


def sources(fresh: Measured, earlier: Measured, stored: Measured | None, products: Products) -> dict[str, Draw]:
    """Ways to weight `count` completions for the gradients of one policy: name -> f(count, generator)."""
    prompts, available = fresh.rewards.shape
    passing = earlier.rewards.mean(1)
    even, odd = (earlier.part(slice(start, None, 2)).all(products.size) for start in (0, 1))
    noise = np.sqrt(np.maximum(np.diag(products.between(even - odd)), 0))

    def of(data: Measured, allocate: Callable[[int, Any], list[Any]]) -> Draw:
        return lambda count, generator: data.weights(allocate(count, generator), products.size)

    found = {
        "fresh, equally": of(fresh, lambda count, g: equal(count, prompts, available, g)),
        "fresh, by p(1 - p)": of(fresh, lambda c, g: by_spread(c, np.sqrt(passing * (1 - passing)), available, g)),
        "fresh, by uncertainty": of(fresh, lambda count, g: by_spread(count, noise, available, g)),
    }
    if stored is not None:
        found["stored, re-weighted"] = of(stored, lambda count, g: equal(count, prompts, available, g))
    return found


def rows_of(name: str, draw: Draw, reference: Any, counts: Sequence[int], products: Products) -> list[dict[str, Any]]:
    """One line for each number of completions."""
    lines = []
    for count in counts:
        generator = np.random.default_rng([count, 0])
        drawn = [draw(count, generator) for _ in range(DRAWS)]
        agreed = [agreement(products.between(weights)) for weights in drawn]
        likeness = [products.cosine(weights.mean(0), reference) for weights in drawn]
        lines.append(
            {
                "source": name,
                "completions": count,
                "agreement": [round(float(q), 2) for q in np.quantile(agreed, [0.5, 0.1, 0.9])],
                "above_3": round(float(np.mean(np.array(agreed) >= 3)), 3),
                "cosine": [round(float(q), 3) for q in np.quantile(likeness, [0.5, 0.1, 0.9])],
            }
        )
    return lines


def averaged(policies: Sequence[Measured], size: int) -> Draw:
    """The mean over policies of each prompt's gradient, an equal part of the completions from each."""

    def draw(count: int, generator: Any) -> Any:
        prompts = len(policies[0].rewards)
        available = min(policy.rewards.shape[1] for policy in policies)
        each = count // len(policies)
        return np.mean([p.weights(equal(each, prompts, available, generator), size) for p in policies], 0)

    return draw


def whole(data: Measured, first: Measured, own_share: float, products: Products) -> dict[str, Any]:
    """All completions of a policy: agreement, pass rate, and the cosine to the direction of the first policy."""
    weights = data.all(products.size)
    return {
        "source": "all fresh",
        "completions": int(data.rewards.size),
        "agreement": [round(agreement(products.between(weights)), 2)],
        "pass_rate": round(float(data.rewards.mean()), 4),
        "own_share": round(own_share, 3),
        "cosine_to_first": round(products.cosine(weights.mean(0), first.all(products.size).mean(0)), 3),
    }


def rank_lines(path: Path) -> list[dict[str, Any]]:
    lines = []
    for rank, values in json.loads(path.read_text(encoding="utf-8")).items():
        own = np.array(values)
        error = float(own.std(ddof=1) / math.sqrt(len(own)))
        lines.append(
            {"source": f"rank {rank}", "agreement": [round(float(own.mean()) / error, 2)], "inner": float(own.mean())}
        )
    return lines


def table(folder: Path, counts: Sequence[int]) -> list[dict[str, Any]]:
    """All lines. Estimates draw from the first half of each prompt's completions; the reference is the second half."""
    steps = sorted(int(path.stem[6:]) for path in folder.glob("fresh-*.safetensors"))
    paths = [folder / f"{kind}-{step}.safetensors" for kind in ("fresh", "stored") for step in steps]
    loaded = {path.stem: load_file(path) for path in paths if path.exists()}
    products = Products([data["scores"].reshape(-1, data["scores"].shape[-1]) for data in loaded.values()])
    measured: dict[str, Measured] = {}
    start = 0
    for name, data in loaded.items():
        places = np.arange(start, start + data["rewards"].size).reshape(data["rewards"].shape)
        measured[name] = Measured(data["rewards"], places)
        start += data["rewards"].size
    lines: list[dict[str, Any]] = []
    for n, step in enumerate(steps):
        fresh = [measured[f"fresh-{other}"] for other in steps[: n + 1]]
        halves = [data.part(slice(data.rewards.shape[1] // 2)) for data in fresh]
        reference = fresh[n].part(slice(fresh[n].rewards.shape[1] // 2, None)).all(products.size).mean(0)
        stored = measured.get(f"stored-{step}")
        ways = sources(halves[n], halves[max(n - 1, 0)], stored, products)
        if n:
            ways["evaluations so far, averaged"] = averaged(halves, products.size)
            ways[f"fresh of step {steps[n - 1]}, not renewed"] = averaged(halves[n - 1 : n], products.size)
        found = [line for way, draw in ways.items() for line in rows_of(way, draw, reference, counts, products)]
        own_share = float(loaded[f"fresh-{step}"]["own_share"][0])
        found += [whole(fresh[n], fresh[0], own_share, products), *rank_lines(folder / f"fresh-{step}.ranks.json")]
        if stored is not None:
            compared = audit(loaded[f"fresh-{step}"], loaded[f"stored-{step}"])
            found.append({"source": "audit, stored against fresh"} | compared)
        lines += [{"step": step} | line for line in found]
    return lines


def audited(pool: Sequence[Question]) -> list[Question]:
    """A fixed sample of pool prompts, half of them relevant, whose influence is compared between sources."""
    chosen: list[Question] = []
    for kind, count in AUDITED.items():
        members = [question for question in pool if question.source == kind]
        chosen += [members[n] for n in np.random.default_rng(3).permutation(len(members))[:count]]
    return chosen


def measure_policy(arguments: argparse.Namespace) -> None:
    """Sample or re-weight completions of the validation prompts and of some pool prompts, and keep their sketches."""
    folder = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{'stored' if arguments.stored else 'fresh'}-{arguments.step}"
    if (folder / f"{name}.ranks.json").exists():
        return
    policy = Policy(arguments.model, learning_rate=0.0, longest=48, seed=arguments.step)
    questions = {
        "validation": (policy.questions(arguments.data / "validation.jsonl"), arguments.samples),
        "pool": (audited(policy.questions(arguments.data / "niche" / "train.jsonl")), TOGETHER),
    }
    sampled = folder / ("fresh-0.json" if arguments.stored else f"{name}.json")
    if not sampled.exists():
        drawn = {part: policy.sample(*of) for part, of in questions.items()}
        text = {part: {"groups": [(g.completions, g.rewards) for g in groups]} for part, groups in drawn.items()}
        sampled.write_text(json.dumps(text), encoding="utf-8")
    kept = json.loads(sampled.read_text(encoding="utf-8"))
    arrays: dict[str, Any] = {}
    for part, (own, count) in questions.items():
        groups = [Group(q, c[:count], r[:count]) for q, (c, r) in zip(own, kept[part]["groups"], strict=True)]
        behaviour = dict(enumerate(kept[part]["log_probs"])) if arguments.stored else None
        found, dense = measure(policy, groups, behaviour, FOLDS if part == "validation" else 0)
        logs = found.pop("kept")
        if not arguments.stored:
            kept[part]["log_probs"] = [logs[n] for n in range(len(groups))]
        arrays |= {key if part == "validation" else f"pool_{key}": value for key, value in found.items()}
        if part == "validation":
            ranks = rank_agreement(dense)
    if not arguments.stored:
        sampled.write_text(json.dumps(kept), encoding="utf-8")
    save_file(arrays, folder / f"{name}.safetensors")
    (folder / f"{name}.ranks.json").write_text(json.dumps(ranks), encoding="utf-8")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("measure")
    one.add_argument("--model", type=Path, required=True, help="folder of a policy")
    one.add_argument("--data", type=Path, required=True, help="folder written by pool.py")
    one.add_argument("--output", type=Path, required=True)
    one.add_argument("--step", type=int, required=True, help="how many steps this policy was trained")
    one.add_argument("--samples", type=int, default=64, help="completions of each prompt (default: 64)")
    one.add_argument("--stored", action="store_true", help="re-weight the completions of step 0")
    two = commands.add_parser("table")
    two.add_argument("--output", type=Path, required=True)
    two.add_argument("--counts", type=int, nargs="+", default=[128, 256, 328, 512, 656, 1024, 1312, 2048])
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(1)
    if arguments.command == "table":
        lines = table(arguments.output, arguments.counts)
        for line in lines:
            print(json.dumps(line))
        (arguments.output / "table.json").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
        return
    measure_policy(arguments)


if __name__ == "__main__":
    main()
