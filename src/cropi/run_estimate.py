"""The cost of a run in tokens, seconds, money and memory, extrapolated from a sample that `check` has taken."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cropi.config import Config
from cropi.curriculum.curriculum import ROUND_STEPS, steps_to_next_round
from cropi.functional.ranking import selection_size
from cropi.gradients.engine import free_bytes
from cropi.gradients.reference import trainable_parameters
from cropi.policy import Policy
from cropi.rollouts.shards import Shard
from cropi.run_folder import nearest_existing

LOGITS = 3  # copies of a completion's logits: as they are, divided by the temperature, and their gradient


@dataclass(frozen=True)
class Pace:
    """Measured on a sample of groups."""

    completion_tokens: float  # mean
    generate_s: float  # of a completion, in a batch of the sample's size
    gradient_s: float  # of a group


def estimate(
    config: Config, settings: Any, policy: Policy, shards: Sequence[Shard], pace: Pace, tests: int
) -> dict[str, float]:
    """Extrapolate the cost of the run. Names end in their unit (`_s`: seconds)."""
    count = config.collect.num_generations
    collects = config.select.strategy.collects
    trajectories = sum(len(shard.prompts) * shard.samples for shard in shards) if collects else 0
    mean_completion = pace.completion_tokens
    per_step = settings.generation_batch_size / settings.steps_per_generation * settings.gradient_accumulation_steps
    steps = config.train.steps
    scored = config.select.strategy.reads_scores
    evaluations = steps // config.evaluate_every
    before = {
        "trajectories": trajectories,
        "collect_tokens": trajectories * mean_completion,
        "collect_s": trajectories * pace.generate_s,
        "score_per_stage_s": trajectories / count * pace.gradient_s if scored else 0.0,
    }
    if config.select.strategy.chooses_online:
        completions = _validation_completions(steps, settings) if config.select.strategy.reads_influence else 0
        before = {
            "representation_tokens": _represented_tokens(config, shards),
            "validation_completions": completions,
            "validation_tokens": completions * mean_completion,
            "validation_s": completions * (pace.generate_s + pace.gradient_s / count),
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
        "train_s": steps * per_step * (pace.generate_s + pace.gradient_s / count),
        "evaluate_s": evaluations * tests * (1 + config.evaluate.samples) * pace.generate_s,
    }
    return {
        **before,
        **selected,
        **during,
        **_whole(config, before, during),
        **_memory(config, settings, policy, shards),
        "free_disk_bytes": shutil.disk_usage(nearest_existing(config.folder)).free,
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
    """Completions of the validation prompts in all rounds."""
    rounds = step = 0
    while step < steps:
        rounds += 1
        step += steps_to_next_round(rounds)
    used = settings.steps_per_generation * settings.num_iterations / settings.gradient_accumulation_steps
    return rounds * round(ROUND_STEPS * settings.generation_batch_size / used)


def _memory(config: Config, settings: Any, policy: Policy, shards: Sequence[Shard]) -> dict[str, float]:
    """Bytes at the largest batch, all sequences as long as they may be. Sampling and training follow each other."""
    longest = max((ids for shard in shards for ids in shard.prompt_ids), key=len)
    answer = config.collect.max_completion_length
    saved, cached = _bytes_per_token(policy, longest)
    model = policy.model.config.get_text_config()
    width, layers = model.hidden_size * _size(policy), model.num_hidden_layers
    if settings.gradient_checkpointing:  # inputs of all layers are kept, and one layer is computed again
        saved = width * layers + saved / layers
    rows, length = settings.per_device_train_batch_size, len(longest) + answer
    activations = rows * (length * saved + LOGITS * answer * model.vocab_size * _size(policy))
    cache = settings.generation_batch_size * length * cached
    fixed = _bytes_to_train(config, policy)
    held = sum(p.nbytes for p in policy.model.parameters())  # by the policy that `check` has loaded
    return {
        "model_and_optimiser_bytes": fixed,
        "activations_bytes": activations,
        "kv_cache_bytes": cache,
        "most_at_once_bytes": fixed + max(activations, cache),
        "free_memory_bytes": free_bytes(policy.device) + held,
    }


def _size(policy: Policy) -> int:
    return next(policy.model.parameters()).element_size()


def _bytes_per_token(policy: Policy, ids: Sequence[int]) -> tuple[float, float]:
    """(bytes that a forward pass keeps for the backward pass, without logits; bytes of the key-value cache)."""
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.tensor([list(ids)], device=policy.device)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        alive = policy.model(input_ids=tokens, logits_to_keep=1, use_cache=False)  # its storages stay apart
    with torch.no_grad():
        cache = policy.model(input_ids=tokens, logits_to_keep=1, use_cache=True)
    del alive
    layers = getattr(getattr(cache, "past_key_values", None), "layers", ())  # state space models have no such cache
    states = (value for layer in layers for value in vars(layer).values() if isinstance(value, torch.Tensor))
    return sum(kept.values()) / len(ids), sum(state.nbytes for state in states) / len(ids)


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
