"""Batched sampling: with transformers, or with vLLM in this process."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from cropi.config import PolicyConfig
from cropi.console import warn
from cropi.errors import PolicyError
from cropi.fsdp import in_lockstep, is_sharded
from cropi.policy import Policy, evaluating, is_out_of_memory, policy_location, shared_prefixes
from cropi.seeds import derived_seed


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters. `temperature` None is greedy decoding."""

    max_completion_length: int
    temperature: float | None


class Generator(Protocol):
    """Draws one completion per prompt, in order: token ids up to and including the first end-of-sequence token."""

    def __call__(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[list[int]]: ...


class TransformersGenerator:
    """Draws completions with `model.generate`; completions of one prompt share its forward pass.

    After an out-of-memory error it keeps using the halved batch size. If parameters are sharded over processes, all
    processes must call it, each for its own prompts: once, or any number of times inside `in_lockstep`.
    """

    def __init__(self, policy: Policy, batch_size: int) -> None:
        self._policy, self._batch_size = policy, batch_size

    def __call__(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[list[int]]:
        """Batches take prompts in order of length to reduce padding. The caller's random state is unchanged, so the
        same seed and prompts give the same completions anywhere, unless memory ran out."""
        order = sorted(range(len(prompts)), key=lambda row: -len(prompts[row]))
        completions: list[list[int]] = [[] for _ in prompts]
        devices = [self._policy.device] if self._policy.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), in_lockstep(self._policy.model):
            torch.manual_seed(seed)
            start = 0
            while start < len(order):
                rows = order[start : start + self._batch_size]
                drawn = self._within_memory([prompts[row] for row in rows], sampling)
                if drawn is None:
                    continue
                for row, completion in zip(rows, drawn, strict=True):
                    completions[row] = completion
                start += len(rows)
        return completions

    def _within_memory(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]] | None:
        """Return the batch's completions, or None after an out-of-memory error halved the batch size."""
        try:
            return self._generate(prompts, sampling)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or self._batch_size == 1:
                raise
            if is_sharded(self._policy.model):  # the other processes are inside a pass that cannot be repeated
                raise PolicyError(
                    f"out of memory while generating {len(prompts)} completions at once with sharded parameters",
                    where="collect.batch_size",
                    fix=f"set it to {len(prompts) // 2 or 1} or less.",
                ) from error
            self._batch_size = max(1, min(self._batch_size, len(prompts)) // 2)
        warn(f"out of memory while generating; the batch size is now {self._batch_size}")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    @torch.no_grad()
    def _generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[list[int]]:
        from transformers import GenerationConfig

        model, tokenizer, eos_ids = self._policy.model, self._policy.tokenizer, self._policy.eos_ids
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[tokenizer.pad_token_id] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        chosen = (
            {"do_sample": False}
            if sampling.temperature is None
            else {"do_sample": True, "temperature": sampling.temperature, "top_p": 1.0, "top_k": 0}
        )
        generation_config = GenerationConfig(
            max_new_tokens=sampling.max_completion_length,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=eos_ids,
            bos_token_id=tokenizer.bos_token_id,
            disable_compile=True,
            **chosen,
        )
        # The model's own generation config may hold sampling settings (such as a repetition penalty) under which the
        # stored log-probs would not be the sampler's, so it is replaced for the call.
        shipped, model.generation_config = model.generation_config, generation_config
        try:
            with evaluating(model):
                output = model.generate(
                    input_ids=ids.to(model.device),
                    attention_mask=mask.to(model.device),
                    generation_config=generation_config,
                    synced_gpus=False,  # see `in_lockstep`
                    **shared_prefixes(model, ids.to(model.device), mask.to(model.device)),
                )
        finally:
            model.generation_config = shipped
        return [until_end(row, eos_ids) for row in output[:, width:].tolist()]


def until_end(tokens: Sequence[int], eos_ids: Sequence[int]) -> list[int]:
    """Cut tokens after the first end-of-sequence token."""
    first = next((place for place, token in enumerate(tokens) if token in eos_ids), len(tokens))
    return list(tokens[: first + 1])


def longest_first(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Divide rows into batches of at most `batch_tokens` padded tokens, the longest rows first."""
    order, batches = sorted(range(len(lengths)), key=lambda row: -lengths[row]), []
    while order:
        size = max(1, batch_tokens // lengths[order[0]])
        batches.append(order[:size])
        order = order[size:]
    return batches


# -- vLLM ----------------------------------------------------------------------------------------------------------

SEEDS = 2**31  # that vLLM and servers take


class VllmGenerator:
    """Draws completions from a vLLM engine with the base policy's weights; the first call starts it.

    Every completion has its own seed and ends at the policy's end-of-sequence tokens. The model's own generation config
    is ignored.

    Raises PolicyError if vLLM is not installed or refuses the model or its options.
    """

    def __init__(self, policy: Policy, weights: PolicyConfig, options: Mapping[str, Any]) -> None:
        self._policy, self._weights, self._options = policy, weights, options
        self._engine: Any = None

    def __call__(self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, seed: int) -> list[list[int]]:
        if self._engine is None:
            self._engine = self._started()
        from vllm import SamplingParams

        eos = self._policy.eos_ids
        parameters = [
            SamplingParams(
                max_tokens=sampling.max_completion_length,
                temperature=0.0 if sampling.temperature is None else sampling.temperature,
                top_p=1.0,
                top_k=-1,
                seed=derived_seed(seed, number) % SEEDS,
                stop_token_ids=eos,
                detokenize=False,
            )
            for number in range(len(prompts))
        ]
        inputs = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        try:
            outputs = self._engine.generate(inputs, parameters, use_tqdm=False)
        except Exception as error:  # the engine raises many kinds
            raise _refused("vLLM failed while it generated", error) from None
        return [until_end(output.outputs[0].token_ids, eos) for output in outputs]

    def close(self) -> None:
        """Free the engine's memory for scoring and training."""
        if self._engine is not None:
            self._engine = None
            gc.collect()

    def _started(self) -> Any:
        try:
            from vllm import LLM
        except ImportError:
            raise PolicyError("vLLM is not installed", where="collect.vllm", fix="pip install 'cropi[vllm]'.") from None
        location = policy_location(self._weights)
        settings: dict[str, Any] = {
            "model": location,
            "tokenizer": location,
            "revision": self._weights.revision,
            "dtype": self._weights.dtype,
            "gpu_memory_utilization": 0.7,  # the policy's own weights stay beside the engine
            "generation_config": "vllm",
            "enable_prefix_caching": True,
            "trust_remote_code": False,
        }
        try:
            return LLM(**settings | dict(self._options))
        except Exception as error:  # the engine raises many kinds
            raise _refused("vLLM did not start", error) from None


def _refused(what: str, error: Exception) -> PolicyError:
    return PolicyError(
        f"{what}: {' '.join(str(error).split())[:300]}",
        where="collect.vllm",
        fix="correct its settings, or remove the table to generate with transformers.",
    )
