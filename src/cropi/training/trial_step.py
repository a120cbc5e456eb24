"""One trial step of training with the built-in policy.

TRL and torch check some settings only when they use them; the trial finds these errors before a run spends anything.
"""

from __future__ import annotations

import random
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import datasets
import numpy as np
import torch
from transformers import PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from cropi.config import BUILTIN_POLICY, PolicyConfig
from cropi.errors import ConfigError
from cropi.policy import load_policy

# Settings with effects outside this process, slow ones, and those that depend on the policy.
LEFT_OUT = {
    "deepspeed",
    "generation_batch_size",
    "log_completions",
    "log_completions_hub_repo",
    "optim_target_modules",
    "push_to_hub",
    "router_aux_loss_coef",
    "save_steps",
    "steps_per_generation",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "transformers_continuous_batching_config",
    "use_transformers_continuous_batching",
    "use_transformers_paged",
    "use_vllm",
}


def try_one_step(options: Mapping[str, Any], device: torch.device) -> None:
    """Raise ConfigError if a training step with these GRPOConfig settings fails or its weights are not finite."""
    kept = {name: value for name, value in options.items() if name not in LEFT_OUT}
    generations = options["num_generations"]
    small = {
        "seed": 0,
        "data_seed": 0,
        "max_steps": 1,
        "max_completion_length": 2,
        "per_device_train_batch_size": generations,
        "gradient_accumulation_steps": 1,
        "steps_per_generation": 1,
        "report_to": [],
        "save_strategy": "no",
    }
    problem = _problem(_Options(kept | small), device.type)
    if problem:
        raise ConfigError(
            f"a step of training fails with these settings: {problem}", where="trainer", fix="correct what it names."
        )


class _Options(dict[str, Any]):
    """Settings that can be a cache key."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(repr(self))


@cache
def _problem(options: _Options, device: str) -> str:
    """Return the error of one training step, or an empty text. A process tries the same settings once."""
    policy = load_policy(PolicyConfig(path=BUILTIN_POLICY, device=device))  # type: ignore[arg-type]
    with _without_side_effects(), tempfile.TemporaryDirectory() as folder:
        try:
            trainer = GRPOTrainer(
                model=policy.model,
                reward_funcs=_alternating,
                args=GRPOConfig(**options | {"output_dir": folder}),
                train_dataset=datasets.Dataset.from_list([{"prompt": "1 2"}] * 2),
                processing_class=policy.tokenizer,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
        except Exception as error:  # TRL, transformers and torch raise many kinds, each for a setting
            return f"{type(error).__name__}: " + " ".join(str(error).split())[:400]
    finite = all(bool(weight.isfinite().all()) for weight in policy.model.parameters())
    return "" if finite and trainer.state.global_step == 1 else "it leaves weights that are not finite"


def _alternating(completions: Sequence[Any], **_: Any) -> list[float]:
    """Rewards that differ within every group."""
    return [float(number % 2) for number in range(len(completions))]


@contextmanager
def _without_side_effects() -> Iterator[None]:
    """Restore random states, and ignore warnings: training itself shows them."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
