"""Training under DeepSpeed's ZeRO: stages 1 and 2 leave every process the whole weights, 3 divides them, too."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from trl import GRPOTrainer
from trl.models.utils import add_hooks, remove_hooks

ZERO = "zero_optimization"
HALF = {"bf16.enabled": torch.bfloat16, "fp16.enabled": torch.float16}
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def is_zero3(trainer: GRPOTrainer) -> bool:
    """Whether DeepSpeed divides the weights, too, which `gathered` makes whole for a while."""
    return bool(trainer.is_deepspeed_enabled and _settings(trainer).is_zero3())


@contextmanager
def gathered(trainer: GRPOTrainer) -> Iterator[None]:
    """Under ZeRO-3 every process has the whole weights inside, as TRL has them to generate; all have to enter."""
    if not is_zero3(trainer):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(trainer.model.parameters())), out_of_step(trainer.model):
        remove_hooks(trainer.model_wrapped)  # they would divide each layer again after its pass
        try:
            yield
        finally:
            add_hooks(trainer.model_wrapped)


@contextmanager
def out_of_step(model: nn.Module) -> Iterator[None]:
    """Passes inside are begun without DeepSpeed's agreement with the other processes, which may run more or fewer."""
    hooks = model._forward_pre_hooks
    agreeing = {key: hook for key, hook in hooks.items() if (hook.__module__ or "").startswith("deepspeed.")}
    for key in agreeing:
        del hooks[key]
    try:
        yield
    finally:
        since = dict(hooks)
        hooks.clear()
        hooks.update(agreeing | since)  # it begins a pass


@contextmanager
def resuming(trainer: GRPOTrainer) -> Iterator[None]:
    """DeepSpeed's own reading of a checkpoint runs whatever code is in it. Inside, tensors and the three types that it
    writes are read, and nothing else."""
    if not trainer.is_deepspeed_enabled:
        yield
        return
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        with torch.serialization.safe_globals([DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[WEIGHTS_ONLY]
        else:
            os.environ[WEIGHTS_ONLY] = before


def rounded_to(trainer: GRPOTrainer) -> torch.dtype | None:
    """The half precision that DeepSpeed keeps the weights of forward passes in, if it does."""
    settings = _settings(trainer)
    return next((dtype for key, dtype in HALF.items() if settings.is_true(key)), None)


def saves_whole_weights(trainer: GRPOTrainer) -> bool:
    """Whether ZeRO-3 gathers the weights of a checkpoint, so that a policy can be loaded from it."""
    return bool(_settings(trainer).is_true(f"{ZERO}.stage3_gather_16bit_weights_on_model_save"))


def refused_of_zero3(trainer: GRPOTrainer) -> list[tuple[bool, str, str, str]]:
    """(whether it is there, what is wrong with it, where, how to fix it), of what cannot be gathered."""
    if not is_zero3(trainer):
        return []
    return [
        (
            not trainer.args.ds3_gather_for_generation,
            "the policy is to sample with divided weights, layer by layer",
            "ds3_gather_for_generation",
            "leave it at true, or use ZeRO-2.",
        ),
        (
            _settings(trainer).get_value(f"{ZERO}.offload_param.device", "none") != "none",
            "weights that rest elsewhere have not been tried under ZeRO-3",
            "accelerate's offload_param_device",
            "set it to none, or use ZeRO-2.",
        ),
    ]


def _settings(trainer: GRPOTrainer) -> Any:
    return trainer.accelerator.state.deepspeed_plugin.hf_ds_config
