"""`check` and `doctor`: inspect everything that a run needs before it starts. They write nothing."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cropi.artifacts import is_finished
from cropi.config import Config
from cropi.console import duration
from cropi.errors import ConfigError, DataError
from cropi.gradients.groups import Group, surrogate_settings
from cropi.gradients.reference import trainable_parameters
from cropi.gradients.score_shards import make_scorer
from cropi.policy import Policy, load_policy
from cropi.prompt_text import last_turn
from cropi.prompts import checked_prompts, require_pairs
from cropi.prompts.encoding import chat_warnings
from cropi.rewards.pool import judge_of
from cropi.rewards.verifier import (
    CORRECT,
    UNPARSEABLE_ANSWER,
    GradeError,
    Judge,
    Judgement,
    ScoringVerifier,
    answered,
    reward,
)
from cropi.rollouts.generation import Sampling, TransformersGenerator
from cropi.rollouts.shards import Shard, behaviour_logprobs, plan, read_trajectories
from cropi.run_estimate import Pace, estimate
from cropi.run_folder import RunFolder, environment
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
    if name.endswith("_bytes"):
        return f"{value / 2**30:.1f} GiB" if value >= 2**30 else f"{value / 2**20:.1f} MiB"
    return f"{value:,.2f}" if name.endswith("_dollars") else f"{value:,.0f}"


def check_run(config: Config, dollars_per_hour: float | None = None) -> CheckResult:
    """Load the data and the policy, judge sampled completions of real rows, and estimate tokens, time and memory.

    Raises the errors that a run would raise over its config, data and policy.
    """
    setup = Setup.of(config)
    policy, settings, judge = setup.policy, setup.settings, setup.judge
    prompts, leakage, warnings = checked_prompts(config)
    require_pairs(config, prompts)
    warnings += _claim_warnings(config)
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
    estimates = estimate(config, settings, policy, shards, sample.pace, len(tests))
    if dollars_per_hour is not None:
        spent = {name: estimates[f"{name}_s"] / 3600 * dollars_per_hour for name in ("whole_run", "plain_grpo")}
        estimates |= {f"{name}_dollars": dollars for name, dollars in spent.items()}
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
        estimates=estimates,
        warnings=[
            *warnings,
            *_token_warnings(policy, shards),
            *_warnings(gold, verdicts, any(map(any, rewards))),
            *_unused_grades(config, sample),
            *_unaffordable(estimates),
        ],
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


def _unused_grades(config: Config, sample: _Sample) -> list[str]:
    """Name the values of a reward function that training does not get, since only its verdicts count."""
    verifier = config.verifier
    if not isinstance(verifier, ScoringVerifier) or verifier.graded:
        return []
    # Graded rewards need a threshold of theirs; only the grades are read, so any will do.
    graded = judge_of(verifier.model_copy(update={"graded": True, "threshold": 0.5}), config.verification)
    rows = [answered(text, row) for row, texts in zip(sample.rows, sample.texts, strict=True) for text in texts]
    judged = graded(rows)
    outside = next((j.note for j in judged if j.note.startswith(GradeError.__name__)), None)
    between = sorted({j.grade for j in judged if j.grade is not None and 0 < j.grade < 1})
    gets = f"training gets 1 from {verifier.threshold:g} on, else 0"
    if outside is not None:
        return [f"{outside.removeprefix(f'{GradeError.__name__}: ')}: {gets}. To use it, scale it and set graded: true"]
    return (
        [f"rewards lie between 0 and 1, as {between[0]:.3g}, but {gets}: set verifier.graded: true"] if between else []
    )


def _claim_warnings(config: Config) -> list[str]:
    """Say that the name is that of a run with other settings, which `run` refuses."""
    try:
        RunFolder(config)
    except ConfigError as error:
        return [f"{error.where}: {error.what}. Give the new run another name (name=...)"]
    return []


def _unaffordable(estimates: Mapping[str, float]) -> list[str]:
    """Say what does not fit: memory, or a stage's steps and its selection."""
    found = []
    needed, free = estimates["most_at_once_bytes"], estimates["free_memory_bytes"]
    if needed > free:
        smaller = "trainer.per_device_train_batch_size or collect.max_completion_length"
        found.append(f"about {needed / 2**30:.0f} GiB may be needed, and {free / 2**30:.0f} are free: lower {smaller}")
    selected, used = (estimates.get(f"{what}_prompts_per_stage", 0) for what in ("selected", "drawn"))
    if used < selected:
        wants = "raise train.steps_per_stage or lower select.fraction"
        found.append(f"of {selected:,.0f} prompts that a stage selects, its steps can use {used:,.0f}: {wants}")
    return found


def _token_warnings(policy: Policy, shards: Sequence[Shard]) -> list[str]:
    """Warn of texts that bring the token of their beginning along, and of texts that the tokenizer does not know."""
    tokenizer, prompts = policy.tokenizer, [ids for shard in shards for ids in shard.prompt_ids]
    double = sum(ids[:2] == [tokenizer.bos_token_id] * 2 for ids in prompts)
    unread = sum(ids.count(tokenizer.unk_token_id) > len(ids) / 2 for ids in prompts)
    found = {
        f"{double} prompts begin with two {tokenizer.bos_token}: remove it from their text": double,
        f"{unread} prompts are mostly {tokenizer.unk_token} to the policy, which cannot read them": unread,
    }
    return [text for text, count in found.items() if count]


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
    pace: Pace

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
    pace = Pace(sum(lengths) / len(lengths), generate_s, gradient_s)
    return _Sample([row for row, _ in pairs], ids[0], by_prompt, judged, lengths, cut_off, pace)


def hardware() -> dict[str, str]:
    """Versions and hardware, without anything that identifies a person."""
    return environment() | {
        "torch threads": str(torch.get_num_threads()),
        "cuda": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB",
        "free disk here": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB",
    }
