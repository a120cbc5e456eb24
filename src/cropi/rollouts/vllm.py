"""Completions from vLLM in this process."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from typing import Any

from cropi.config import PolicyConfig
from cropi.errors import PolicyError
from cropi.policy import Policy, policy_location
from cropi.rollouts.generation import Sampling, until_end
from cropi.seeds import derived_seed

SEEDS = 2**31


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
        """Return one completion per prompt, in order: token ids up to and including the first end-of-sequence token."""
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
