"""What of accelerate's FSDP and DeepSpeed a training can do with: FSDP2 and ZeRO-3 with whole weights in their
checkpoints, and ZeRO-1 and 2, which divide gradients and the optimiser's state but not the weights.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from trl import GRPOTrainer

from cropi.console import warn
from cropi.errors import ConfigError
from cropi.training.zero import is_zero3, refused_of_zero3, rounded_to, saves_whole_weights

FSDP_OPTIMIZER = "optimizer.bin"  # in a checkpoint that accelerate writes under FSDP
PLAIN = "plain data parallelism"
ZERO = "DeepSpeed's ZeRO-1 or 2", "DeepSpeed's ZeRO-3"
ZERO_NEWEST = "latest"  # in one of DeepSpeed's: the name of the folder with the optimiser's states


def check_sharding(trainer: GRPOTrainer, asked_in: str, resume_from: Path | None) -> None:
    """ConfigError where weights are divided among the processes in a way that cannot be scored, sampled or saved."""
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
            f"training began with {began} and would go on with {now}, which keep the optimiser in other files",
            where=str(checkpoint),
            fix="launch it as before, or give the run another name.",
        )
    parts = len(list(checkpoint.glob("global_step*/zero_pp_rank_*_optim_states.pt")))
    if trainer.is_deepspeed_enabled and parts != trainer.accelerator.num_processes:
        raise ConfigError(
            f"the optimiser's state was divided by DeepSpeed among {parts} processes, and there are "
            f"{trainer.accelerator.num_processes} now",
            where=str(checkpoint),
            fix=f"launch {parts} processes, or give the run another name.",
        )


def _began_with(checkpoint: Path) -> str:
    if (checkpoint / FSDP_OPTIMIZER).is_file():
        return "FSDP"
    if not (checkpoint / ZERO_NEWEST).is_file():
        return PLAIN
    return ZERO[any(checkpoint.glob("global_step*/zero_pp_rank_*_model_states.pt"))]


def _goes_on_with(trainer: GRPOTrainer) -> str:
    if trainer.is_fsdp_enabled:
        return "FSDP"
    return ZERO[is_zero3(trainer)] if trainer.is_deepspeed_enabled else PLAIN


def _refused(trainer: GRPOTrainer, asked_in: str) -> list[tuple[bool, str, str, str]]:
    """(whether it is there, what is wrong with it, where, how to fix it)."""
    plain = "or launch with plain data parallelism (torchrun, or accelerate launch --multi_gpu)."
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    rounded = getattr(getattr(plugin, "mixed_precision_policy", None), "param_dtype", None)
    by = "FSDP rounds the weights as it gathers them"
    if trainer.is_deepspeed_enabled:
        rounded, by = rounded_to(trainer), "DeepSpeed trains with weights that are rounded"
    return [
        *refused_of_zero3(trainer),
        (
            is_zero3(trainer) and not saves_whole_weights(trainer),
            "checkpoints are to be saved without whole weights, and no policy can be loaded from them",
            "accelerate's zero3_save_16bit_model",
            "set it to true; whatever its name says, weights are saved in the precision that they are trained in.",
        ),
        (
            plugin is not None and plugin.fsdp_version != 2,
            "the weights are divided among the processes by FSDP1, and scoring cannot gather them",
            "accelerate's fsdp_version",
            f"set it to 2, {plain}",
        ),
        (
            plugin is not None and "FULL_STATE_DICT" not in str(plugin.state_dict_type),
            f"checkpoints are to be saved as {plugin and plugin.state_dict_type}, from which no policy can be loaded",
            "accelerate's fsdp_state_dict_type",
            "set it to FULL_STATE_DICT.",
        ),
        (
            isinstance(getattr(plugin, "cpu_offload", None), CPUOffloadPolicy),
            "weights that rest on the CPU have not been tried",
            "accelerate's fsdp_offload_params",
            "set it to false.",
        ),
        (
            plugin is not None and hasattr(trainer.model, "get_base_model"),
            "adapters have not been tried under FSDP, where generation does not begin at the outermost module",
            "policy.lora",
            f"leave it out, {plain}",
        ),
        (
            rounded not in {None, getattr(torch, asked_in)},
            f"{by}, to {rounded}, and the policy is asked in {asked_in}",
            "policy.dtype",
            f"set it to that of trainer.bf16 (policy.dtype=bfloat16, or trainer.bf16=false), {plain}",
        ),
    ]
