"""What selection costs beside training where nobody has measured it: larger policies, larger pools, more GPUs.

FLOPs are those of `cropi.report.flops`, the formula that charges a run by its ledger, given the lines that such a
run would write: amounts follow from a recipe's settings and the assumed lengths. Seconds follow from FLOPs by assumed
utilisations, corrected by what was measured: scoring by the engine's seconds over its floor's, the store and selection
by their seconds and bytes for a prompt. benchmarks/extrapolate.py makes the page of it.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from scale import grouped

from cropi.config import Config, PooledStrategy
from cropi.lab.bench.shapes import SHAPES, Shape
from cropi.loading import load_config
from cropi.presets import preset
from cropi.report.flops import flops, score_multiple

Line = Mapping[str, Any]  # of a ledger
FLOOR = 2  # forward passes of scoring's floor: forward, and backward through activations

ROOT = Path(__file__).resolve().parents[1]
SCALE = ROOT / "research" / "figures" / "scale.json"
ENGINE = ROOT / "research" / "figures" / "bench" / "10m-realistic.json"

LLAMA_70B = Shape(
    "llama",
    "Llama-3.1-70B",
    {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
)


@dataclass(frozen=True)
class Accelerator:
    """Of a data sheet: dense bfloat16 operations and bytes of memory read, both per second."""

    flops: float
    bandwidth: float


ACCELERATORS = {"H100": Accelerator(989e12, 3.35e12), "A100": Accelerator(312e12, 2.0e12)}


@dataclass(frozen=True)
class Assumptions:
    """Everything that is not measured and not a setting of the recipe."""

    gpu: str = "H100"
    training_mfu: float = 0.4  # of updates and of passes without generation
    generation_mfu: float = 0.1  # where there are sequences enough
    bandwidth_use: float = 0.6  # of decoding, which reads all weights for every token
    prompt_tokens: int = 120
    completion_tokens: int = 600  # the mean; the longest of a step is as long as the recipe allows
    without_signal: float = 0.45  # of the prompts: all K rewards equal, hence not scored
    over_floor: float | None = None  # of scoring; None: as measured

    @property
    def accelerator(self) -> Accelerator:
        return ACCELERATORS[self.gpu]


@dataclass(frozen=True, eq=False)
class Model:
    """A policy, the recipe that it is trained by, and how many GPUs hold its weights while it generates."""

    name: str
    recipe: str
    shape: Shape
    replica: int


MODELS = (
    Model("1.5B", "paper-1.5b", SHAPES["qwen2.5-1.5b"], 1),
    Model("7B", "paper-7b", SHAPES["qwen2.5-7b"], 1),
    Model("70B", "paper-7b", LLAMA_70B, 8),
)


@dataclass(frozen=True)
class Plan:
    """A way to select: settings laid over the recipe."""

    name: str
    about: str
    overrides: tuple[str, ...]


def _preset_overrides(name: str) -> tuple[str, ...]:
    tables = preset(name, "benchmarks/extrapolate.py")
    return tuple(f"{table}.{key}={json.dumps(value)}" for table, own in tables.items() for key, value in own.items())


STRUCTURED = 'score.projection={"mask": "structured"}'
STORED = "score.store=bfloat16"
PLANS = {
    "all": Plan(
        "all",
        "every prompt sampled once and scored at every stage, by our structured sketch, features stored",
        (STRUCTURED, STORED),
    ),
    "published": Plan("published", "the same by the paper's uniform mask of 10 %", (STORED,)),
    "cropi": Plan(
        "cropi",
        "the preset `cropi`: an eighth sampled with K = 4, scored once, the most promising screened at every stage, "
        "neighbours told on one core",
        (STRUCTURED, "score.score=dot", *_preset_overrides("cropi")),
    ),
}


@dataclass(frozen=True)
class Measured:
    """What was measured, all of it on one core of a CPU: processor seconds, since the machine was shared."""

    over_floor: dict[str, float]  # seconds of scoring over those of forward + activation backward, by mask
    select_s: dict[str, dict[int, float]]  # of a stage's selection and its files, by strategy and size of the pool
    select_bytes: float  # of a prompt
    store_s: float  # write, finish, open and score the feature of one prompt
    store_bytes: float  # of a prompt

    def selecting(self, strategy: str, prompts: float) -> float:
        """Seconds at a pool of any size: on the line through the logarithms of the two nearest that were measured, and
        beyond them with that line's slope."""
        known = self.select_s[strategy]
        pairs = list(itertools.pairwise(sorted(known)))
        low, high = next((pair for pair in pairs if prompts <= pair[1]), pairs[-1])
        slope = math.log(known[high] / known[low]) / math.log(high / low)
        return known[low] * (prompts / low) ** slope


@cache
def measured(engine: Path = ENGINE, scale: Path = SCALE) -> Measured:
    """From the committed files."""
    contenders = {row["name"]: row for row in json.loads(engine.read_text(encoding="utf-8"))["contenders"]}
    results = json.loads(scale.read_text(encoding="utf-8"))

    def medians(kind: str, name: str) -> dict[int, float]:
        return {size: statistics.median(values) for size, values in grouped(results, kind, name).items()}

    def of_one(kind: str, name: str) -> float:
        found = medians(kind, name)
        return found[max(found)] / max(found)

    masks = {"structured": "sketch", "uniform": "sketch-uniform"}
    return Measured(
        over_floor={mask: contenders[name]["ratio_to_floor"]["median"] for mask, name in masks.items()},
        select_s={"influence": medians("select", "cpu_s"), "pooled": medians("pooled", "cpu_s")},
        select_bytes=of_one("select", "stored_bytes"),
        store_s=of_one("store", "cpu_s"),
        store_bytes=of_one("store", "stored_bytes"),
    )


@cache
def parameters(model: Model) -> tuple[int, int]:
    """Of matrix products, as runs are charged by them, and all."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from cropi.lab.compare.worker import matrix_parameters

    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.for_model(model.shape.model_type, **model.shape.settings))
    return matrix_parameters(made), sum(p.numel() for p in made.parameters())


@cache
def settings(model: Model, plan: str) -> Config:
    """The recipe with the plan's settings laid over it."""
    return load_config(model.recipe, list(PLANS[plan].overrides))


@dataclass(frozen=True)
class Operations:
    """FLOPs of a run by what they are used for. Generation and the rest run at different rates."""

    collect_generate: float
    collect_read: float  # behaviour log-probs, and representations of prompts
    score_pool: float
    score_validation: float
    train_generate: float
    train_update: float

    @property
    def collect(self) -> float:
        return self.collect_generate + self.collect_read

    @property
    def score(self) -> float:
        return self.score_pool + self.score_validation

    @property
    def train(self) -> float:
        return self.train_generate + self.train_update


def operations(config: Config, matrix_parameters: int, prompts: float, a: Assumptions) -> Operations:
    """What a run with a pool of so many prompts would be charged with, by the lines of its ledger."""
    lines = ledger(config, prompts, a)

    def charged(collected: Sequence[Line] = (), scored: Sequence[Line] = (), batches: Sequence[Line] = ()) -> float:
        return flops(config, matrix_parameters, collected, scored, batches).total

    train_generate = charged([lines.batch])
    return Operations(
        collect_generate=charged(lines.generated),
        collect_read=charged(lines.read),
        score_pool=charged(scored=[{**line, "validation_tokens": 0} for line in lines.scored]),
        score_validation=charged(scored=[{**line, "computed_tokens": 0} for line in lines.scored]),
        train_generate=train_generate,
        train_update=charged(batches=[lines.batch]) - train_generate,
    )


@dataclass(frozen=True)
class Ledger:
    """The lines that a run would write, as few as they can be."""

    generated: list[Line]
    read: list[Line]  # passes over tokens that are there
    scored: list[Line]
    batch: Line  # all of training


def ledger(config: Config, prompts: float, a: Assumptions) -> Ledger:
    """Collection once, scoring at the stages of the strategy, training as the recipe has it."""
    collect, strategy = config.collect, config.select.strategy
    sampled = prompts * sampled_share(config)
    aimed_at = len(config.prompts.validation) * config.score.max_validation_prompts

    def completions(count: float) -> Line:
        return {"passes": 1, "tokens": count * a.completion_tokens, "prompt_tokens": count * a.prompt_tokens}

    def shared(groups: float, size: int) -> float:
        """Tokens computed of groups whose prompt is computed once, for errors by halves twice. A completion's last
        token, which predicts nothing, never is."""
        return groups * ((1 + strategy.pools) * a.prompt_tokens + size * (a.completion_tokens - 1))

    stored = completions(sampled * collect.num_generations + aimed_at * collect.validation_num_generations)
    generated, read = [stored], [stored] if collect.logprobs else []
    if isinstance(strategy, PooledStrategy):
        read.append({"passes": 1, "tokens": 0, "prompt_tokens": prompts * a.prompt_tokens})  # representations
        looked_at = min(strategy.screen, 2 * config.select.fraction) * prompts  # at the most
        generated.append(completions(config.train.stages * looked_at * strategy.screen_generations))
    scored = {
        "computed_tokens": shared(sampled * (1 - a.without_signal), collect.num_generations),
        "validation_tokens": shared(aimed_at, collect.validation_num_generations),
    }
    return Ledger(generated, read, [scored] * scorings(config), completions(steps(config) * step_completions(config)))


def sampled_share(config: Config) -> float:
    """Of the pool."""
    return min(1.0, config.collect.fraction + config.collect.nearby)


def scorings(config: Config) -> int:
    """Stages that begin with a scoring of their own."""
    return len({config.select.strategy.scored_stage(stage) for stage in range(config.train.stages)})


def steps(config: Config) -> int:
    """Optimiser steps of the whole training."""
    return config.train.stages * config.train.steps_per_stage


def step_completions(config: Config) -> int:
    """Completions of an optimiser step."""
    return int(config.trainer["per_device_train_batch_size"]) * int(config.trainer["gradient_accumulation_steps"])


@dataclass(frozen=True)
class Seconds:
    """Of a whole run, by phase."""

    collect: float
    score: float
    store: float
    select: float
    train: float

    @property
    def share(self) -> float:
        """Scoring, storing and selecting over training."""
        return (self.score + self.store + self.select) / self.train

    @property
    def whole_share(self) -> float:
        """The same with collection: y of the speed-up x / (1 + y), see research/paper.md."""
        return self.share + self.collect / self.train

    @property
    def split_share(self) -> float:
        """Of that what is split over the GPUs: all but selection."""
        return self.whole_share - self.select / self.train


def seconds(model: Model, plan: str, prompts: float, gpus: float, a: Assumptions) -> Seconds:
    """A run's seconds. All but selection and the time that the longest completion takes is split over the GPUs."""
    config, (of_matrices, of_all), known = settings(model, plan), parameters(model), measured()
    done, gpu = operations(config, of_matrices, prompts, a), a.accelerator
    generating, computing = gpus * gpu.flops * a.generation_mfu, gpus * gpu.flops * a.training_mfu
    over_floor = known.over_floor[config.score.projection.mask] if a.over_floor is None else a.over_floor
    multiple = score_multiple(config.score, len(config.prompts.validation))
    pool = done.score_pool * FLOOR / multiple * over_floor
    rows = prompts * sampled_share(config) * scorings(config) * (config.score.store != "none")
    return Seconds(
        collect=done.collect_generate / generating + done.collect_read / computing,
        score=(pool + done.score_validation) / computing,
        store=rows * known.store_s / gpus,
        select=config.train.stages * known.selecting(config.select.strategy.type, prompts),
        train=max(done.train_generate / generating, steps(config) * longest_s(model, config, of_all, a))
        + done.train_update / computing,
    )


def longest_s(model: Model, config: Config, all_parameters: int, a: Assumptions) -> float:
    """Seconds of the longest completion of a step: a token takes a reading of all weights, in bfloat16."""
    length = max(config.collect.max_completion_length, a.completion_tokens)
    return length * 2 * all_parameters / (a.accelerator.bandwidth * a.bandwidth_use * model.replica)


def break_even(
    model: Model, plan: str, gpus: float, a: Assumptions, fewer_steps: float, *, selecting: bool = True
) -> float:
    """The pool at which x / (1 + y) = 1, x being how many times fewer steps are needed. 0: not at any size.

    Without `selecting`, as if selection took no time.
    """

    def pays(pool: float) -> bool:
        s = seconds(model, plan, pool, gpus, a)
        return (s.whole_share if selecting else s.split_share) <= fewer_steps - 1

    low, high = 1.0, 1e12
    if not pays(low):
        return 0.0
    while high / low > 1.001:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if pays(middle) else (low, middle)
    return low
