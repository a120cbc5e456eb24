"""`check` and `doctor`: inspect everything that a run needs before it starts. They write nothing."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from cropi.artifacts import is_finished
from cropi.config import Config
from cropi.console import duration
from cropi.curriculum.curriculum import FIRST_ROUND, ROUND_STEPS
from cropi.errors import DataError
from cropi.functional.ranking import selection_size
from cropi.gradients.groups import Group, surrogate_settings
from cropi.gradients.reference import trainable_parameters
from cropi.gradients.score_shards import make_scorer
from cropi.policy import Policy, load_policy
from cropi.prompt_text import last_turn
from cropi.prompts import checked_prompts
from cropi.prompts.encoding import chat_warnings
from cropi.rewards.verdicts import CORRECT, UNPARSEABLE_ANSWER, Judge, Judgement, answered, reward
from cropi.rollouts.generation import Sampling, TransformersGenerator
from cropi.rollouts.shards import Shard, behaviour_logprobs, plan, read_trajectories
from cropi.run_folder import environment
from cropi.stages.evaluate import questions, unreadable
from cropi.stages.run import Setup

SAMPLE_PROMPTS = 8
SHOWN_INPUT = 1000  # characters
OF_EACH_VERDICT = 2


@dataclass(frozen=True)
class CheckResult:
    """Findings and estimates of `check`."""

    prompts: dict[str, int]  # by set
    leakage: dict[str, dict[str, int]]  # held-out prompts that are also in another role, by kind and sets
    parameters: int
    gold_against_itself: dict[str, int]  # verdicts; anything but `correct` points at the verifier or the data
    verdicts: dict[str, int]  # of the sampled completions
    groups: int  # that were sampled
    mixed_groups: int  # of them
    model_input: str  # a prompt as the policy gets it, special tokens included
    tokens: dict[str, float]  # lengths, and the share of completions that was cut off
    samples: list[dict[str, Any]]  # two completions of each verdict
    estimates: dict[str, float]
    warnings: list[str]

    def as_json(self) -> dict[str, Any]:
        return vars(self)

    def as_text(self) -> str:
        lines = ["prompts            " + _listed(self.prompts)]
        lines.append("leakage            " + _listed({kind: sum(sets.values()) for kind, sets in self.leakage.items()}))
        lines.append(f"parameters         {self.parameters:,}")
        lines.append("gold vs itself     " + _listed(self.gold_against_itself))
        lines.append("completions        " + _listed(self.verdicts))
        lines.append(f"groups             {self.mixed_groups} of {self.groups} mixed")
        lines.append("tokens             " + ", ".join(f"{name} {value:g}" for name, value in self.tokens.items()))
        lines.append(f"the model gets     {self.model_input[:SHOWN_INPUT]!r}")
        lines += [
            f"  {s['verdict']:<18} {s['prompt'][-48:]!r} -> {s['completion'][-48:]!r}, recorded: {s['answer'][-24:]!r}"
            for s in self.samples
        ]
        lines.append("estimates, extrapolated from this sample on this machine (a factor of two either way):")
        lines += [f"  {name:<27} {_shown(name, value)}" for name, value in self.estimates.items()]
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join(lines)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _shown(name: str, value: float) -> str:
    if name.endswith("_s"):
        return duration(value)
    return f"{value / 2**30:.1f} GiB" if name.endswith("_bytes") else f"{value:,.0f}"


def check_run(config: Config) -> CheckResult:
    """Load the data and the policy, judge sampled completions of real rows, and estimate tokens, time and memory.

    Raises the errors that a run would raise over its config, data and policy.
    """
    setup = Setup.of(config)
    policy, settings, judge = setup.policy, setup.settings, setup.judge
    prompts, leakage, warnings = checked_prompts(config)
    warnings += chat_warnings(policy.tokenizer, config.prompts.chat, (row["messages"] for row in prompts))
    shards, _ = plan(config, policy, prompts)
    tests = questions(config, policy, [row for row in prompts if row["set"].startswith("test/")])
    against_itself = judge([answered(config.verifier.completion_with(row["answer"]), row) for row in prompts])
    gold = Counter(judgement.verdict for judgement in against_itself)
    _require_readable_tests(prompts, against_itself)
    failure = next((judgement.note for judgement in against_itself if judgement.note), None)
    if not gold[CORRECT] and failure is not None:
        raise DataError(
            f"the verifier fails on the recorded answers themselves: {failure}",
            where="verifier",
            fix="correct it; try it with `cropi verify`.",
        )
    if not gold[CORRECT]:
        raise DataError(
            f"the verifier judges none of the recorded answers right against itself ({dict(gold)})",
            where="verifier",
            fix="choose another verifier or other settings, or correct the answers.",
        )
    sample = _sample(config, policy, [shard for shard in shards if shard.set == "train"], judge)
    verdicts = Counter(judgement.verdict for group in sample.judged for judgement in group)
    rewards = [{judgement.reward for judgement in group} for group in sample.judged]
    return CheckResult(
        prompts=dict(Counter(row["set"] for row in prompts)),
        leakage=leakage.as_json(),
        parameters=sum(p.numel() for p in trainable_parameters(policy.model).values()),
        gold_against_itself=dict(gold),
        verdicts=dict(verdicts),
        groups=len(rewards),
        mixed_groups=sum(len(group) > 1 for group in rewards),
        model_input=policy.tokenizer.decode(sample.prompt_ids),
        tokens=_lengths(shards, sample),
        samples=sample.shown(),
        estimates=_estimate(config, settings, policy, shards, sample, len(tests)),
        warnings=[*warnings, *_token_warnings(policy, shards), *_warnings(gold, verdicts, any(map(any, rewards)))],
    )


def _require_readable_tests(prompts: Sequence[Mapping[str, Any]], judged: Sequence[Judgement]) -> None:
    """DataError for a test set without a readable gold answer."""
    readable: dict[str, bool] = {}
    for row, judgement in zip(prompts, judged, strict=True):
        readable[row["set"]] = readable.get(row["set"], False) or reward(judgement.verdict) is not None
    for name in (name for name, found in readable.items() if name.startswith("test/") and not found):
        raise unreadable(name.removeprefix("test/"))


def _warnings(gold: Counter[str], verdicts: Counter[str], rewarded: bool) -> list[str]:
    found = []
    if gold[CORRECT] < gold.total():
        found.append(f"{gold.total() - gold[CORRECT]} recorded answers are not judged right against themselves")
    if not rewarded:
        found.append("no sampled completion is rewarded: the problems are too hard, or verifier and format do not fit")
    if verdicts[UNPARSEABLE_ANSWER] > verdicts.total() / 2:
        found.append("most completions hold no answer in the form that the verifier looks for")
    return found


def _token_warnings(policy: Policy, shards: Sequence[Shard]) -> list[str]:
    """Warn of a text that brings the token of its beginning along, when the tokenizer writes one as well."""
    bos = policy.tokenizer.bos_token_id
    double = sum(ids[:2] == [bos, bos] for shard in shards for ids in shard.prompt_ids)
    return (
        [f"{double} prompts begin with two {policy.tokenizer.bos_token}: remove it from their text"] if double else []
    )


def _lengths(shards: Sequence[Shard], sample: _Sample) -> dict[str, float]:
    prompts = sorted(len(ids) for shard in shards for ids in shard.prompt_ids)
    completions = sorted(sample.lengths)
    return {
        "prompt median": prompts[len(prompts) // 2],
        "prompt longest": prompts[-1],
        "completion median": completions[len(completions) // 2],
        "completion longest": completions[-1],
        "share cut off": round(sample.cut_off, 3),
    }


@dataclass(frozen=True)
class _Sample:
    rows: Sequence[Any]
    prompt_ids: list[int]  # of the first
    texts: list[list[str]]  # by prompt
    judged: list[list[Judgement]]
    lengths: list[int]  # of completions, in tokens
    cut_off: float  # share of completions without an end
    generate_s: float  # of a completion, in a batch of this sample's size
    gradient_s: float  # of a group

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def shown(self) -> list[dict[str, Any]]:
        """Completions of each verdict, the first ones of different prompts."""
        found: dict[str, dict[str, dict[str, Any]]] = {}
        for row, texts, judged in zip(self.rows, self.texts, self.judged, strict=True):
            for text, judgement in zip(texts, judged, strict=True):
                shown = {"prompt": last_turn(row["messages"]), "answer": row["answer"], "completion": text}
                shown |= {"verdict": judgement.verdict, "reward": judgement.reward}
                found.setdefault(judgement.verdict, {}).setdefault(row["prompt_id"], shown)
        return [sample for known in found.values() for sample in list(known.values())[:OF_EACH_VERDICT]]


def completions_of(
    config: Config, table: Sequence[Mapping[str, Any]], prompts: int
) -> tuple[list[Mapping[str, Any]], list[str], str]:
    """(rows of the prompt table, a completion of each, their origin).

    The completions are the run's stored trajectories. If there are none, `num_generations` are sampled for each of
    `prompts` training prompts, spread over the pool.
    """
    folder = config.folder / "trajectories"
    if is_finished(folder) and config.select.strategy.collects:
        known = {row["prompt_id"]: row for row in table if row["set"] == "train"}
        stored = read_trajectories(folder)["train"].select(["prompt_id", "completion"]).to_pylist()
        kept = [row for row in stored if row["prompt_id"] in known]
        return [known[row["prompt_id"]] for row in kept], [row["completion"] for row in kept], "collected by the run"
    policy = load_policy(config.policy)
    shards, _ = plan(config, policy, table)
    pairs = _spread([shard for shard in shards if shard.set == "train"], prompts)
    rows, _, completions = _drawn(config, policy, pairs)
    return rows, policy.tokenizer.batch_decode(completions, skip_special_tokens=True), "sampled now"


def _spread(shards: Sequence[Shard], count: int) -> list[tuple[Any, list[int]]]:
    """`count` prompts, evenly spaced over the shards, with their token ids."""
    pairs = [pair for shard in shards for pair in zip(shard.prompts, shard.prompt_ids, strict=True)]
    count = min(count, len(pairs))
    return [pairs[number * len(pairs) // count] for number in range(count)]


def _drawn(
    config: Config, policy: Policy, pairs: Sequence[tuple[Any, list[int]]]
) -> tuple[list[Mapping[str, Any]], list[list[int]], list[list[int]]]:
    """(rows, prompts, completions as token ids), `num_generations` of each prompt."""
    settings = config.collect
    repeated = [pair for pair in pairs for _ in range(settings.num_generations)]
    ids = [prompt_ids for _, prompt_ids in repeated]
    sampling = Sampling(settings.max_completion_length, settings.temperature)
    completions = TransformersGenerator(policy, settings.batch_size)(ids, sampling, seed=config.seed)
    return [row for row, _ in repeated], ids, completions


def _sample(config: Config, policy: Policy, shards: Sequence[Shard], judge: Judge) -> _Sample:
    """Sample groups of prompts spread over the pool; measure generation and the gradient of one group."""
    pairs = _spread(shards, SAMPLE_PROMPTS)
    count, settings = config.collect.num_generations, config.collect
    start = time.perf_counter()
    rows, ids, completions = _drawn(config, policy, pairs)
    generate_s = (time.perf_counter() - start) / len(ids)
    # The rewards are made up: they do not change the cost of a gradient.
    logprobs = behaviour_logprobs(policy, ids[:count], completions[:count], settings.temperature, settings.batch_tokens)
    group = Group("check", ids[0], completions[:count], [float(k % 2) for k in range(count)], logprobs)
    surrogate = surrogate_settings(config, "grpo", "group")
    scorer = make_scorer(config, policy.model, surrogate)
    scorer.aim({"check": [group]})
    start = time.perf_counter()
    scorer([group])
    gradient_s = time.perf_counter() - start
    texts = policy.tokenizer.batch_decode(completions, skip_special_tokens=True)
    by_prompt = [texts[n : n + count] for n in range(0, len(texts), count)]
    found = judge([answered(text, row) for text, row in zip(texts, rows, strict=True)])
    judged = [found[n : n + count] for n in range(0, len(found), count)]
    ended = sum(bool(completion) and completion[-1] in policy.eos_ids for completion in completions)
    cut_off, lengths = 1 - ended / len(completions), list(map(len, completions))
    return _Sample([row for row, _ in pairs], ids[0], by_prompt, judged, lengths, cut_off, generate_s, gradient_s)


def _estimate(
    config: Config, settings: Any, policy: Policy, shards: Sequence[Shard], sample: _Sample, tests: int
) -> dict[str, float]:
    """Extrapolate the cost of the run. Names end in their unit (`_s`: seconds)."""
    count = config.collect.num_generations
    collects = config.select.strategy.collects
    trajectories = sum(len(shard.prompts) * shard.samples for shard in shards) if collects else 0
    mean_completion = sample.tokens / (len(sample.rows) * count)
    per_step = settings.generation_batch_size / settings.steps_per_generation * settings.gradient_accumulation_steps
    steps = config.train.steps
    scored = config.select.strategy.reads_scores
    evaluations = steps // config.evaluate_every
    before = {
        "trajectories": trajectories,
        "collect_tokens": trajectories * mean_completion,
        "collect_s": trajectories * sample.generate_s,
        "score_per_stage_s": trajectories / count * sample.gradient_s if scored else 0.0,
    }
    if config.select.strategy.chooses_online:
        completions = _validation_completions(steps, settings) if config.select.strategy.reads_influence else 0
        before = {
            "representation_tokens": _represented_tokens(config, shards),
            "validation_completions": completions,
            "validation_tokens": completions * mean_completion,
            "validation_s": completions * (sample.generate_s + sample.gradient_s / count),
        }
    strategy, selected = config.select.strategy, {}
    if not (strategy.chooses_online or strategy.takes_all):
        pool = sum(len(shard.prompts) for shard in shards if shard.set == "train")
        used = config.train.steps_per_stage * per_step / settings.num_generations
        selected = {
            "selected_prompts_per_stage": selection_size(config.select.fraction, pool),
            "drawn_prompts_per_stage": used,
        }
    during = {
        "train_tokens": steps * per_step * mean_completion,
        "train_s": steps * per_step * (sample.generate_s + sample.gradient_s / count),
        "evaluate_s": evaluations * tests * (1 + config.evaluate.samples) * sample.generate_s,
    }
    return {
        **before,
        **selected,
        **during,
        **_whole(config, before, during),
        "model_and_optimiser_bytes": _bytes_to_train(config, policy),
        "free_memory_bytes": _free_memory(policy),
        "free_disk_bytes": shutil.disk_usage(_existing(config.folder)).free,
    }


def _whole(config: Config, before: Mapping[str, float], during: Mapping[str, float]) -> dict[str, float]:
    """The whole run beside plain GRPO, which only trains and evaluates."""
    strategy = config.select.strategy
    scorings = sum(strategy.scored_stage(stage) == stage for stage in range(config.train.stages))
    extra = before.get("collect_s", 0.0) + before.get("validation_s", 0.0)
    extra += scorings * before.get("score_per_stage_s", 0.0)
    tokens = before.get("collect_tokens", 0.0) + before.get("validation_tokens", 0.0)
    plain_s = during["train_s"] + during["evaluate_s"]
    return {
        "whole_run_tokens": during["train_tokens"] + tokens,
        "plain_grpo_tokens": during["train_tokens"],
        "whole_run_s": plain_s + extra,
        "plain_grpo_s": plain_s,
    }


def _represented_tokens(config: Config, shards: Sequence[Shard]) -> int:
    """Tokens of the prompts of the pool and the validation sets, if the strategy reads their hidden states."""
    read = [shard for shard in shards if config.select.strategy.reads_representations]
    return sum(len(ids) for shard in read for ids in shard.prompt_ids)


def _validation_completions(steps: int, settings: Any) -> int:
    """Completions of the validation prompts: the steps between two rounds double."""
    rounds = ((steps - 1) // FIRST_ROUND + 1).bit_length()
    return rounds * round(ROUND_STEPS * settings.generation_batch_size)


def _bytes_to_train(config: Config, policy: Policy) -> int:
    """Bytes of trained weights, their gradient and two moments, the base policy, and in bfloat16 a copy for sampling.

    With LoRA: the same of the adapters, in float32, and the frozen weights.
    """
    trained = sum(p.numel() for p in trainable_parameters(policy.model).values())
    if config.policy.lora is not None:
        return 16 * trained + sum(p.nbytes for p in policy.model.parameters() if not p.requires_grad)
    each = 4 * (4 if config.policy.trained_in == "float32" else 2)
    each += 4 if config.policy.dtype == "float32" else 2
    each += 2 if config.policy.dtype == "bfloat16" and config.policy.trained_in == "float32" else 0
    return trained * each


def _free_memory(policy: Policy) -> int:
    """Bytes that the policy's device has left now."""
    return torch.cuda.mem_get_info()[0] if policy.device.type == "cuda" else psutil.virtual_memory().available


def _existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def hardware() -> dict[str, str]:
    """Versions and hardware, without anything that identifies a person."""
    return environment() | {
        "torch threads": str(torch.get_num_threads()),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "free disk here": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB",
    }
