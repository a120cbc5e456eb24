"""`check` and `doctor`: look at everything a run will need before it starts, and write nothing."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cropi.config import Config, InfluenceStrategy
from cropi.console import duration
from cropi.errors import DataError
from cropi.gradients.groups import Group
from cropi.gradients.reference import prompt_gradient, trainable_parameters
from cropi.gradients.scoring import surrogate_settings
from cropi.policy import Policy, load_policy
from cropi.prompts import load_prompts
from cropi.rewards.verifiers import CORRECT, verifier
from cropi.rollouts.collect import Shard, behaviour_logprobs, plan
from cropi.rollouts.generation import Sampling, TransformersGenerator
from cropi.training.settings import grpo_config
from cropi.workspace import environment

SAMPLE_PROMPTS = 8


@dataclass(frozen=True)
class CheckResult:
    """What `check` found and what it expects."""

    prompts: dict[str, int]  # by set
    parameters: int
    gold_against_itself: dict[str, int]  # verdicts; anything but `correct` points at the verifier or the data
    samples: list[dict[str, str]]  # real completions of real rows
    estimates: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        return vars(self)

    def as_text(self) -> str:
        lines = ["prompts          " + ", ".join(f"{name} {count}" for name, count in self.prompts.items())]
        lines.append(f"parameters       {self.parameters:,}")
        lines.append("gold vs itself   " + ", ".join(f"{v} {n}" for v, n in self.gold_against_itself.items()))
        lines += [
            f"  {s['verdict']:<19} {s['prompt'][:48]!r} -> {s['completion'][:48]!r} (gold {s['answer']!r})"
            for s in self.samples
        ]
        for name, value in self.estimates.items():
            shown = duration(value) if name.endswith("_s") else f"{value:,.0f}"
            lines.append(f"{name:<32} {shown}")
        return "\n".join(lines)


def check_run(config: Config) -> CheckResult:
    """Load the data and the policy, judge sampled completions of real rows, and estimate tokens, time and memory.

    Times are extrapolated from this sample on this machine; they are good to a factor of about two.
    """
    prompts = load_prompts(config)
    policy = load_policy(config.policy)
    settings = grpo_config(config, config.folder, policy.model.device)
    shards, _ = plan(config, policy, prompts)
    verify = verifier(config.verifier)
    gold = Counter(verify(_written_gold(config, row["answer"]), row["answer"]) for row in prompts)
    train = [shard for shard in shards if shard.set == "train"]
    if not gold[CORRECT]:
        raise DataError(
            f"the verifier judges none of the recorded answers right against itself ({dict(gold)})",
            where="verifier",
            fix="choose another verifier or other settings of it, or mend the answers.",
        )
    sample = _sample(config, policy, train)
    estimates = _estimate(config, settings, policy, shards, sample)
    shown = [
        {"prompt": row["messages"], "answer": row["answer"], "completion": text, "verdict": verify(text, row["answer"])}
        for row, text in zip(sample.rows, sample.texts, strict=True)
    ]
    parameters = sum(p.numel() for p in trainable_parameters(policy.model).values())
    return CheckResult(dict(Counter(r["set"] for r in prompts)), parameters, dict(gold), shown, estimates)


def _written_gold(config: Config, answer: str) -> str:
    """The gold answer as a completion would give it."""
    marker = getattr(config.verifier, "marker", None)
    if marker is not None:
        return f"{marker} {answer}"
    return answer if config.verifier.type != "gsm8k" or "####" in answer else f"#### {answer}"


@dataclass(frozen=True)
class _Sample:
    rows: Sequence[Any]
    texts: list[str]
    tokens: int
    prompt_tokens: int
    generate_s: float
    gradient_s: float  # of a whole group


def _sample(config: Config, policy: Policy, shards: Sequence[Shard]) -> _Sample:
    """A few completions of prompts spread over the pool, and what a gradient of them costs."""
    pairs = [pair for shard in shards for pair in zip(shard.prompts, shard.prompt_ids, strict=True)]
    pairs = pairs[:: max(1, len(pairs) // SAMPLE_PROMPTS)][:SAMPLE_PROMPTS]
    generate = TransformersGenerator(policy, config.collect.batch_size)
    sampling = Sampling(config.collect.max_completion_length, config.collect.temperature, config.collect.top_p)
    ids = [prompt_ids for _, prompt_ids in pairs]
    start = time.perf_counter()
    completions = generate(ids, sampling, seed=config.seed)
    generate_s = time.perf_counter() - start
    logprobs = behaviour_logprobs(policy, ids, completions, config.collect.temperature, config.score.batch_tokens)
    # The group and its rewards are made up: a gradient costs the same whichever they are.
    count = config.collect.num_generations
    rows = [row % len(completions) for row in range(count)]
    rewards = [float(row % 2) for row in range(count)]
    group = Group("check", ids[0], [completions[row] for row in rows], rewards, [logprobs[row] for row in rows])
    start = time.perf_counter()
    prompt_gradient(policy.model, group, surrogate_settings(config, "grpo", "group"))
    gradient_s = time.perf_counter() - start
    tokens = sum(len(c) for c in completions)
    texts = policy.tokenizer.batch_decode(completions, skip_special_tokens=True)
    return _Sample([row for row, _ in pairs], texts, tokens, sum(map(len, ids)), generate_s, gradient_s)


def _estimate(
    config: Config, settings: Any, policy: Policy, shards: Sequence[Shard], sample: _Sample
) -> dict[str, float]:
    mean_completion = sample.tokens / len(sample.rows)
    trajectories = sum(len(shard.prompts) * shard.samples for shard in shards)
    batch = min(config.collect.batch_size, trajectories)
    # A batch costs about as much as the sample did until the device is full, hence the square root.
    collect_s = sample.generate_s * trajectories / batch * (batch / len(sample.rows)) ** 0.5
    per_step = settings.generation_batch_size // settings.steps_per_generation * settings.gradient_accumulation_steps
    scored = any(isinstance(strategy, InfluenceStrategy) for strategy in config.arms.values())
    parameters = sum(p.numel() for p in trainable_parameters(policy.model).values())
    return {
        "trajectories": trajectories,
        "collect_tokens": trajectories * mean_completion,
        "collect_s": collect_s,
        "score_s_per_stage": trajectories / config.collect.num_generations * sample.gradient_s if scored else 0.0,
        "train_completions_per_step": per_step,
        "train_steps_per_arm": config.train.stages * config.train.steps_per_stage,
        "train_tokens_per_arm": config.train.stages * config.train.steps_per_stage * per_step * mean_completion,
        "model_and_optimiser_bytes": parameters * (4 * 4 if config.policy.dtype == "float32" else 4 * 2),
        "free_disk_bytes": shutil.disk_usage(_existing(config.folder)).free,
    }


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def hardware() -> dict[str, str]:
    """Versions and hardware, nothing that identifies a person."""
    return environment() | {
        "torch threads": str(torch.get_num_threads()),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "free disk here": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB",
    }
