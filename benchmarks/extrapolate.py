"""The tables of research/extrapolation.md: what selection costs beside training on policies, pools and GPUs not measured.

python benchmarks/extrapolate.py                                    print them
python benchmarks/extrapolate.py --write                            put them into the page
python benchmarks/extrapolate.py --set gpu=A100 --set completion_tokens=4000        with other assumptions
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, replace
from typing import Any

from costs_at_scale import (
    ACCELERATORS,
    MODELS,
    PLANS,
    ROOT,
    Assumptions,
    Model,
    break_even,
    measured,
    operations,
    parameters,
    sampled_share,
    scorings,
    seconds,
    settings,
    step_completions,
    steps,
)

PAGE = ROOT / "research" / "extrapolation.md"
BEGIN, END = "<!-- computed: python benchmarks/extrapolate.py --write -->", "<!-- end of what is computed -->"

POOLS = (10_000, 100_000, 1_000_000, 10_000_000)
GPUS = (8, 64, 1024)
FEWER_STEPS = (1.5, 2.66, 5.0, 10.0)
PAPER_POOL = 55_000
PAPER_SECONDS = {"selection": 2776, "training": 3584}  # of a stage with 1.5B on 8 GPUs, unnamed (arXiv 2510.26491)
TOKEN_BYTES = 12  # of a stored completion's token at most: id, log-prob, and four letters of text

WHY = {
    "gpu": "data sheet: {flops:.0f} TFLOP/s in dense bfloat16, {bandwidth:.2f} TB/s",
    "training_mfu": "share of these in updates, in scoring and in other passes without generation",
    "generation_mfu": "the same of generation, with sequences enough to fill the batch",
    "bandwidth_use": "share of the memory's bandwidth in decoding: every token of the longest completion of a step "
    "takes a reading of all weights, on however many GPUs",
    "prompt_tokens": "mean",
    "completion_tokens": "mean; the longest of a step is as long as the recipe allows",
    "without_signal": "share of the prompts whose rewards are all equal: not scored",
}
RANGES: dict[str, tuple[float, float]] = {
    "training_mfu": (0.25, 0.55),
    "generation_mfu": (0.05, 0.2),
    "bandwidth_use": (0.3, 0.9),
    "prompt_tokens": (60, 500),
    "completion_tokens": (200, 4000),
    "without_signal": (0.2, 0.7),
    "over_floor": (1.0, 1.6),
}


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(
        ["| " + " | ".join(header) + " |", "|---" * len(header) + "|", *("| " + " | ".join(row) + " |" for row in rows)]
    )


def number(value: float) -> str:
    """Three digits: plain up to a million, with a power of ten beyond."""
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        digits = f"{value:.3g}"
        return f"{float(digits):,.0f}" if "e" in digits or abs(value) >= 1000 else digits
    mantissa, power = f"{value:.2e}".split("e")
    return f"{mantissa}·10^{int(power)}"


def share(value: float) -> str:
    return f"{float(f'{100 * value:.2g}'):g} %" if value < 10 else f"{value:,.0f} ×"


def rates() -> str:
    known = measured()
    engine = "[10m-realistic](figures/bench/10m-realistic.json), 10.6 M parameters, one CPU thread, float32"
    scale = "[scale](figures/scale.json), one core of a shared machine, processor time"

    def each(strategy: str) -> str:
        pool, took = max(known.select_s[strategy].items())
        return f"{number(took / pool * 1e6)} µs at {pool:,}"

    floors = f"{known.over_floor['structured']:.2f}; {known.over_floor['uniform']:.2f}"
    rows = [
        ["scoring, seconds over the floor's: structured; uniform mask", floors, engine],
        ["write, finish, open and score a feature", f"{number(known.store_s * 1e3)} ms", scale],
        ["bytes of a feature and its row", number(known.store_bytes), scale],
        ["fuse, select and write: a prompt", each("influence"), scale],
        ["the same by `pooled`", each("pooled"), scale],
        ["bytes of a prompt in a selection", number(known.select_bytes), scale],
    ]
    return table(["measured", "", "on"], rows)


def assumed(a: Assumptions) -> str:
    gpu = a.accelerator
    facts = {"flops": gpu.flops / 1e12, "bandwidth": gpu.bandwidth / 1e12}
    return table(
        ["assumed", "", "meaning"], ([f"`{name}`", f"{getattr(a, name)}", WHY[name].format(**facts)] for name in WHY)
    )


def recipes() -> str:
    rows = []
    for model in MODELS:
        config, (of_matrices, _) = settings(model, "all"), parameters(model)
        rows.append(
            [
                model.name,
                model.shape.summary,
                number(of_matrices / 1e9) + " · 10^9",
                f"`{model.recipe}`",
                str(config.collect.num_generations),
                str(config.train.stages),
                f"{steps(config):,} × {step_completions(config):,}",
                f"{config.collect.max_completion_length:,}",
                f"{len(config.prompts.validation)} × {config.score.max_validation_prompts}",
                str(model.replica),
            ]
        )
    header = ["policy", "shape", "parameters in matrix products", "settings of", "K", "stages", "steps × completions"]
    return table([*header, "longest completion", "validation sets × prompts", "GPUs that hold it"], rows)


def of_one(a: Assumptions) -> str:
    """What one prompt and one step take."""
    rows = []
    for model in MODELS:
        for plan in PLANS:
            config, (of_matrices, _) = settings(model, plan), parameters(model)
            none, some = (operations(config, of_matrices, count, a) for count in (0, 1000))
            score = (some.score_pool - none.score_pool) / 1000 / scorings(config)
            collect, step = (some.collect - none.collect) / 1000, some.train / steps(config)
            row = [model.name, plan, number(collect), number(score), str(scorings(config))]
            rows.append([*row, number(none.score_validation / scorings(config)), number(step)])
    header = ["policy", "plan", "collect a prompt", "score a prompt, once", "scorings"]
    return table([*header, "validation gradients, once", "a training step"], rows)


def amounts(a: Assumptions) -> str:
    """FLOPs and bytes of whole runs."""
    known, rows = measured(), []
    for model in MODELS:
        config, (of_matrices, _) = settings(model, "all"), parameters(model)
        for pool in POOLS:
            done = operations(config, of_matrices, pool, a)
            sampled = pool * sampled_share(config)
            tokens = sampled * config.collect.num_generations * a.completion_tokens
            row = [model.name, f"{pool:,}", number(done.collect), number(done.score), number(done.train)]
            sizes = (tokens * TOKEN_BYTES, sampled * known.store_bytes, pool * known.select_bytes)
            rows.append([*row, *(number(size / 1e9) for size in sizes)])
    header = ["policy", "prompts", "collect, FLOPs", "score, FLOPs", "train, FLOPs", "trajectories, GB"]
    return table([*header, "features of a stage, GB", "selection of a stage, GB"], rows)


def grid(model: Model, plan: str, a: Assumptions) -> str:
    """Seconds of whole runs, and shares."""
    rows = []
    for pool in POOLS:
        for gpus in GPUS:
            s = seconds(model, plan, pool, gpus, a)
            cells = (number(value) for value in (s.collect, s.score, s.store, s.select, s.train))
            rows.append([f"{pool:,}", f"{gpus:,}", *cells, share(s.share), share(s.whole_share)])
    header = ["prompts", "GPUs", "collect, s", "score, s", "store, s", "fuse + select, s", "train, s"]
    return table([*header, "score + store + select / train", "with collection"], rows)


def shares(plan: str, a: Assumptions) -> str:
    """Everything charged over training, and in brackets without selection."""

    def cell(model: Model, pool: float, gpus: int) -> str:
        s = seconds(model, plan, pool, gpus, a)
        return f"{share(s.whole_share)} ({share(s.split_share)})"

    rows = [
        [model.name, f"{pool:,}", *(cell(model, pool, gpus) for gpus in GPUS)] for model in MODELS for pool in POOLS
    ]
    return table(["policy", "prompts", *(f"{gpus:,} GPUs" for gpus in GPUS)], rows)


def in_step(a: Assumptions) -> str:
    """Shares of a training that grows with the pool: those of the paper's pool, whatever the size."""
    rows = [
        [model.name, plan, *(share(seconds(model, plan, PAPER_POOL, gpus, a).whole_share) for gpus in GPUS)]
        for model in MODELS
        for plan in PLANS
    ]
    config = settings(MODELS[0], "all")
    chosen = config.select.fraction * PAPER_POOL
    passes = config.train.steps_per_stage * step_completions(config) / config.collect.num_generations / chosen
    text = (
        f"The recipes pass {passes:.3g} times over the selection of a stage from {PAPER_POOL:,} prompts. A training "
        "that does so for a pool of any size keeps about this share, collection included (`cropi`: as long as its "
        "neighbours do not weigh):"
    )
    return f"{text}\n\n{table(['policy', 'plan', *(f'{gpus:,} GPUs' for gpus in GPUS)], rows)}"


def limits(a: Assumptions) -> str:
    """The largest pool for which selection pays."""
    rows = []
    kinds = [(plan, plan, True) for plan in PLANS] + [("cropi, neighbours not counted", "cropi", False)]
    for model in MODELS:
        for label, plan, selecting in kinds:
            for gpus in GPUS:
                pools = (break_even(model, plan, gpus, a, fewer, selecting=selecting) for fewer in FEWER_STEPS)
                rows.append([model.name, label, f"{gpus:,}", *(number(pool) if pool else "never" for pool in pools)])
    return table(["policy", "plan", "GPUs", *(f"{fewer:g} times fewer steps" for fewer in FEWER_STEPS)], rows)


def sensitivity(a: Assumptions, model: Model, gpus: int) -> str:
    usual = seconds(model, "all", PAPER_POOL, gpus, a).whole_share
    found = []
    for name, (low, high) in RANGES.items():
        ends = []
        for value in (low, high):
            changed: Any = {name: type(getattr(a, name) or value)(value)}
            other = replace(a, **changed)
            ends.append(
                (seconds(model, "all", PAPER_POOL, gpus, other).whole_share,
                 break_even(model, "all", gpus, other, FEWER_STEPS[1]))
            )  # fmt: skip
        found.append((max(end[0] for end in ends) / min(end[0] for end in ends), name, (low, high), ends))
    found.sort(reverse=True)
    rows = [
        [f"`{name}`", f"{low:g} to {high:g}", *(share(end[0]) for end in ends), *(number(end[1]) for end in ends)]
        for _, name, (low, high), ends in found
    ]
    pays = break_even(model, "all", gpus, a, FEWER_STEPS[1])
    heading = (
        f"{model.name}, {PAPER_POOL:,} prompts as in the paper, {gpus} GPUs, plan `all`: the share, collection "
        f"included, is {share(usual)}; selection pays up to {number(pays)} prompts if it saves "
        f"{FEWER_STEPS[1]:g} times the steps. `{found[0][1]}` and `{found[1][1]}` move the share most:"
    )
    names = [f"share at the {end}" for end in ("lower", "upper")] + [f"pays up to, {end}" for end in ("lower", "upper")]
    return f"{heading}\n\n{table(['assumption', 'from, to', *names], rows)}"


def short(a: Assumptions) -> str:
    """The tables in a few sentences."""
    few, many, claimed, largest = GPUS[0], GPUS[-1], FEWER_STEPS[1], POOLS[-1]
    known = measured()

    def each(text: Callable[[Model], str]) -> str:
        return ", ".join(f"{text(model)} ({model.name})" for model in MODELS)

    def cost(plan: str, gpus: int) -> str:
        return each(lambda model: share(seconds(model, plan, PAPER_POOL, gpus, a).whole_share))

    def limit(plan: str, gpus: int, *, selecting: bool = True) -> str:
        return each(lambda model: number(break_even(model, plan, gpus, a, claimed, selecting=selecting)))

    features = largest * known.store_bytes / 1e12
    lines = [
        f"At the paper's pool ({PAPER_POOL:,}) and length of training, `all` adds to training on {few} GPUs "
        f"{cost('all', few)}; on {many:,} GPUs {cost('all', many)}. `cropi` adds {cost('cropi', few)} on {few}.",
        f"If it needs {claimed:g} times fewer steps, `all` pays on {few} GPUs up to pools of {limit('all', few)}; "
        f"on {many:,} GPUs up to {limit('all', many)}. Beyond, training has to grow with the pool, or less of it has "
        "to be sampled.",
        f"`cropi` pays on {few} GPUs up to {limit('cropi', few)}; without the time of its selection, which one core "
        f"makes, up to {limit('cropi', few, selecting=False)}.",
        f"For {largest:,} prompts, features of one stage are {features:.2g} TB, and the store takes "
        f"{number(largest * known.store_s / GPUS[1])} s on {GPUS[1]} cores; fusing and selecting takes "
        f"{number(known.selecting('influence', largest))} s on one.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def check(a: Assumptions) -> str:
    """The paper's own stage, by this calculation."""
    model, rows = MODELS[0], []
    for gpu in ACCELERATORS:
        other = replace(a, gpu=gpu)
        config = settings(model, "published")
        s = seconds(model, "published", PAPER_POOL, 8, other)
        stages = config.train.stages
        rows.append([gpu, number(s.train / stages), number(s.score / stages), share(s.score / s.train)])
    selection, training = PAPER_SECONDS["selection"], PAPER_SECONDS["training"]
    rows.append(["the paper, GPUs unnamed", number(training), number(selection), share(selection / training)])
    return table(["1.5B, a stage on 8 GPUs", "train, s", "score, s", "share"], rows)


def page(a: Assumptions) -> str:
    """All that is computed."""
    plans = "\n".join(f"- `{plan.name}`: {plan.about}." for plan in PLANS.values())
    whole = f"Plan `all`; training does not grow with the pool. Trajectories: {TOKEN_BYTES} bytes a token at most."
    sections = {
        "In short": [short(a)],
        "Measured": [rates()],
        "Assumed": [assumed(a), recipes(), plans],
        "FLOPs of one prompt, and of one step": [of_one(a)],
        "FLOPs and bytes of a whole run": [whole, amounts(a)],
        "Seconds of a whole run": [f"Plan `all`, {model.name}:\n\n{grid(model, 'all', a)}" for model in MODELS],
        "Everything charged, by plan `cropi`": [
            "In brackets: without the time of selection.",
            shares("cropi", a),
        ],
        "If training grows with the pool": [in_step(a)],
        "Up to which pool selection pays": [limits(a)],
        "What the assumptions do": [sensitivity(a, MODELS[1], 64)],
        "Against the paper's own seconds": [check(a)],
    }
    return "\n\n".join("\n\n".join([f"## {title}", *parts]) for title, parts in sections.items())


def written(text: str, computed: str) -> str:
    """The page with the computed part in its place."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{computed}\n\n{END}{after}"


def assumptions(changes: Sequence[str]) -> Assumptions:
    """The usual ones with `name=value` laid over them."""
    kinds = {"gpu": str, "prompt_tokens": int, "completion_tokens": int}
    values: dict[str, Any] = {}
    for change in changes:
        name, _, value = change.partition("=")
        if name not in {field.name for field in fields(Assumptions)} or (name == "gpu" and value not in ACCELERATORS):
            sys.exit(f"{change}: assumptions are {', '.join(field.name for field in fields(Assumptions))}")
        values[name] = kinds.get(name, float)(value)
    return Assumptions(**values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into research/extrapolation.md")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="another assumption")
    arguments = parser.parse_args()
    computed = page(assumptions(arguments.set))
    if not arguments.write:
        print(computed)
    elif arguments.set:
        sys.exit("the page is written with the usual assumptions: leave --set out")
    else:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), computed), encoding="utf-8")


if __name__ == "__main__":
    main()
