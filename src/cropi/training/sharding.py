"""What of accelerate's FSDP and DeepSpeed a training can do with: FSDP2, with whole weights in its checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from trl import GRPOTrainer

from cropi.console import warn
from cropi.errors import ConfigError

OPTIMIZER = "optimizer.bin"  # in a checkpoint that accelerate writes under FSDP


def check_sharding(trainer: GRPOTrainer, asked_in: str, resume_from: Path | None) -> None:
    """ConfigError where weights are divided among the processes in a way that cannot be scored, sampled or saved."""
    for refused, what, where, fix in _refused(trainer, asked_in):
        if refused:
            raise ConfigError(what, where=where, fix=fix)
    if resume_from is not None and (resume_from / OPTIMIZER).is_file() != trainer.is_fsdp_enabled:
        before, now = "without FSDP", "with it"
        if not trainer.is_fsdp_enabled:
            before, now = "under FSDP", "without it"
        raise ConfigError(
            f"training began {before} and would go on {now}, which keep the optimiser in other files",
            where=str(resume_from),
            fix="launch it as before, on any number of processes, or give the run another name.",
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" and not trainer.is_fsdp_enabled:
        warn("accelerate shards no weights on CPUs: this is plain data parallelism")


def _refused(trainer: GRPOTrainer, asked_in: str) -> list[tuple[bool, str, str, str]]:
    """(whether it is there, what is wrong with it, where, how to fix it)."""
    plain = "or launch with plain data parallelism (torchrun, or accelerate launch --multi_gpu)."
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    rounded = getattr(getattr(plugin, "mixed_precision_policy", None), "param_dtype", None)
    return [
        (
            trainer.is_deepspeed_enabled,
            "the weights are divided among the processes by DeepSpeed, and scoring cannot gather them",
            "accelerate's DeepSpeed",
            f"use FSDP2 (accelerate launch --use_fsdp --fsdp_version 2), {plain}",
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
            f"FSDP rounds the weights to {rounded} as it gathers them, and the policy is asked in {asked_in}",
            "policy.dtype",
            "set it to that of trainer.bf16 (policy.dtype=bfloat16, or trainer.bf16=false), or train without FSDP.",
        ),
    ]
