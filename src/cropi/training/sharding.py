"""Training with sharded weights: what is supported of FSDP and DeepSpeed, and access to whole weights under ZeRO.

Supported are FSDP2 and ZeRO-3 with whole weights in their checkpoints, and ZeRO-1 and 2, which shard gradients and the
optimiser's state but not the weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy
from trl import GRPOTrainer
from trl.models.utils import add_hooks, remove_hooks

from cropi.console import warn
from cropi.errors import ConfigError

FSDP_OPTIMIZER = "optimizer.bin"  # in a checkpoint that accelerate writes under FSDP
PLAIN = "plain data parallelism"
ZERO_NAMES = "DeepSpeed's ZeRO-1 or 2", "DeepSpeed's ZeRO-3"
ZERO_NEWEST = "latest"  # in a DeepSpeed checkpoint: names the folder with the optimiser's states
HALF = {"bf16.enabled": torch.bfloat16, "fp16.enabled": torch.float16}
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def check_sharding(trainer: GRPOTrainer, asked_in: str, resume_from: Path | None) -> None:
    """Raise ConfigError if weights are sharded in a way that cannot be scored, sampled or saved."""
    for refused, what, where, fix in _refused(trainer, asked_in):
        if refused:
            raise ConfigError(what, where=where, fix=fix)
    if resume_from is not None:
        _check_checkpoint(trainer, resume_from)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not trainer.is_fsdp_enabled:
        warn("accelerate shards no weights on CPUs: this is plain data parallelism")


def _check_checkpoint(trainer: GRPOTrainer, checkpoint: Path) -> None:
    began, now = _began_with(checkpoint), _goes_on_with(trainer)
    if began != now:
        raise ConfigError(
            f"training began with {began} and would continue with {now}, which store the optimiser in different files",
            where=str(checkpoint),
            fix="launch it as before, or give the run another name.",
        )
    parts = len(list(checkpoint.glob("global_step*/zero_pp_rank_*_optim_states.pt")))
    if trainer.is_deepspeed_enabled and parts != trainer.accelerator.num_processes:
        raise ConfigError(
            f"DeepSpeed sharded the optimiser's state over {parts} processes, but there are "
            f"{trainer.accelerator.num_processes} now",
            where=str(checkpoint),
            fix=f"launch {parts} processes, or give the run another name.",
        )


def _began_with(checkpoint: Path) -> str:
    if (checkpoint / FSDP_OPTIMIZER).is_file():
        return "FSDP"
    if not (checkpoint / ZERO_NEWEST).is_file():
        return PLAIN
    return ZERO_NAMES[any(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt"))]


def _goes_on_with(trainer: GRPOTrainer) -> str:
    if trainer.is_fsdp_enabled:
        return "FSDP"
    return ZERO_NAMES[is_zero3(trainer)] if trainer.is_deepspeed_enabled else PLAIN


def _refused(trainer: GRPOTrainer, asked_in: str) -> list[tuple[bool, str, str, str]]:
    """List what is unsupported as (present, problem, where, fix)."""
    plain = "or launch with plain data parallelism (torchrun, or accelerate launch --multi_gpu)."
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    rounded = getattr(getattr(plugin, "mixed_precision_policy", None), "param_dtype", None)
    by = "FSDP rounds the weights when it gathers them"
    if trainer.is_deepspeed_enabled:
        halves = (dtype for key, dtype in HALF.items() if _settings(trainer).is_true(key))
        rounded, by = next(halves, None), "DeepSpeed trains with rounded weights"
    return [
        *_refused_of_zero3(trainer),
        (
            plugin is not None and plugin.fsdp_version != 2,
            "scoring cannot gather weights that FSDP1 shards",
            "accelerate's fsdp_version",
            f"set it to 2, {plain}",
        ),
        (
            plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type),
            f"checkpoints saved as {plugin and plugin.state_dict_type} cannot be loaded as a policy",
            "accelerate's fsdp_state_dict_type",
            "set it to FULL_STATE_DICT.",
        ),
        (
            isinstance(getattr(plugin, "cpu_offload", None), CPUOffloadPolicy),
            "weights offloaded to the CPU are untested",
            "accelerate's fsdp_offload_params",
            "set it to false.",
        ),
        (
            plugin is not None and hasattr(trainer.model, "get_base_model"),
            "adapters are untested under FSDP, where generation does not start at the outermost module",
            "policy.lora",
            f"leave it out, {plain}",
        ),
        (
            rounded not in {None, getattr(torch, asked_in)},
            f"{by}, to {rounded}, but the policy is scored in {asked_in}",
            "policy.dtype",
            f"set it to match trainer.bf16 (policy.dtype=bfloat16, or trainer.bf16=false), {plain}",
        ),
    ]


def _refused_of_zero3(trainer: GRPOTrainer) -> list[tuple[bool, str, str, str]]:
    if not is_zero3(trainer):
        return []
    settings = _settings(trainer)
    return [
        (
            not trainer.args.ds3_gather_for_generation,
            "generation with sharded weights, layer by layer, is not supported",
            "ds3_gather_for_generation",
            "leave it at true, or use ZeRO-2.",
        ),
        (
            settings.get_value("zero_optimization.offload_param.device", "none") != "none",
            "offloaded weights are untested under ZeRO-3",
            "accelerate's offload_param_device",
            "set it to none, or use ZeRO-2.",
        ),
        (
            not settings.is_true("zero_optimization.stage3_gather_16bit_weights_on_model_save"),
            "checkpoints without whole weights cannot be loaded as a policy",
            "accelerate's zero3_save_16bit_model",
            "set it to true; despite its name, weights are saved in their training precision.",
        ),
    ]


def is_zero3(trainer: GRPOTrainer) -> bool:
    """Whether DeepSpeed shards the weights, so that whole weights need `gathered`."""
    return bool(trainer.is_deepspeed_enabled and _settings(trainer).is_zero3())


@contextmanager
def gathered(trainer: GRPOTrainer) -> Iterator[None]:
    """Give every process the whole weights under ZeRO-3, as TRL does to generate. Collective."""
    if not is_zero3(trainer):
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(trainer.model.parameters())), out_of_step(trainer.model):
        remove_hooks(trainer.model_wrapped)  # they would shard each layer again after its pass
        try:
            yield
        finally:
            add_hooks(trainer.model_wrapped)


@contextmanager
def out_of_step(model: nn.Module) -> Iterator[None]:
    """Run passes without DeepSpeed's synchronisation, since processes may run different numbers of passes."""
    hooks = model._forward_pre_hooks
    agreeing = {key: hook for key, hook in hooks.items() if (hook.__module__ or "").startswith("deepspeed.")}
    for key in agreeing:
        del hooks[key]
    try:
        yield
    finally:
        since = dict(hooks)
        hooks.clear()
        hooks.update(agreeing | since)  # DeepSpeed's hook runs first


@contextmanager
def resuming(trainer: GRPOTrainer) -> Iterator[None]:
    """Load DeepSpeed checkpoints safely: only tensors and the types that DeepSpeed writes.

    By default DeepSpeed unpickles a checkpoint, which can run arbitrary code.
    """
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


def _settings(trainer: GRPOTrainer) -> Any:
    return trainer.accelerator.state.deepspeed_plugin.hf_ds_config
