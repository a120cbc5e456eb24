"""Settings of a run: selection, training, evaluation, and all tables together."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, model_validator

from cropi.config.data import PolicyConfig, PromptsConfig
from cropi.config.score_config import CollectConfig, ScoreConfig
from cropi.curriculum.strategies import Strategy
from cropi.curriculum.strategy import FusionConfig
from cropi.rewards.verifier import VerificationConfig
from cropi.rewards.verifiers import Verifier
from cropi.rewards.verifiers.python_function import SCRIPT_REWARDS
from cropi.setting_types import FreeTable, Name, Positive, Seed, Table


class SelectConfig(Table):
    """Selection of the prompts that a stage trains on."""

    strategy: Strategy
    """The strategy: how the prompts of a stage are chosen."""
    name: Name | None = None
    """Name of the strategy in reports. Unset: the preset that `strategy` names, or its type."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Alpha: ceil(alpha N) prompts are selected (paper: 0.1)."""
    fusion: FusionConfig = FusionConfig()
    """Fusion of the rankings of several validation sets."""

    @property
    def label(self) -> str:
        """Name of the strategy in reports."""
        return self.name or self.strategy.type


class TrainConfig(Table):
    """Stages of GRPO. One epoch of the trainer is a stage."""

    stages: Annotated[int, Field(ge=1, le=10_000)]
    """Number of stages; each begins with a selection (paper: 5)."""
    steps_per_stage: Positive
    """Optimiser steps per stage (paper: 200)."""
    dynamic_sampling: Annotated[int, Field(ge=0, le=1000)] = 0
    """DAPO's dynamic sampling: largest number of times that groups with equal rewards in a generation batch are
    replaced by groups of the stage's next prompts. All samples are charged. 0: off."""


class EvaluateConfig(Table):
    """Evaluation during and after training."""

    confidence: ClassVar[float] = 0.95  # coverage of the intervals

    every: Positive | None = None
    """Steps between evaluations. Unset: at the end of every stage."""
    samples: Annotated[int, Field(ge=0, le=10_000)] = 0
    """n of avg@n: completions per prompt, sampled at temperature 1 beside the greedy one. 0: greedy only."""


_CODE = re.compile(
    r'\\*"(trust_remote_code|code_revision|custom_generate|use_kernels|allow_all_kernels|auto_map)\\*"\s*:'
)


def _without_tilde(path: str) -> str:
    expanded = os.path.expanduser(path)  # noqa: PTH111 - Path would drop a dot in front
    if expanded.startswith("~"):
        raise ValueError(f"{path} begins with the home of an unknown user")
    return expanded


class Config(Table):
    """One run: a policy, prompts, and the strategy that chooses what the policy trains on."""

    name: Name
    """Name of the run; its folder is `run_dir`/`name`."""
    run_dir: Annotated[str, AfterValidator(_without_tilde)] = "runs"
    """Folder that holds runs."""
    seed: Seed = 0
    """Seed of sampling, selection and training."""
    policy: PolicyConfig
    """The policy."""
    prompts: PromptsConfig
    """The data."""
    verifier: Verifier
    """The judge of completions."""
    verification: VerificationConfig = VerificationConfig()
    """The processes of the verifier."""
    collect: CollectConfig
    """Trajectory collection."""
    score: ScoreConfig = ScoreConfig()
    """Influence."""
    select: SelectConfig
    """Selection."""
    train: TrainConfig
    """Stages."""
    trainer: FreeTable = Field(default={})
    """Settings of TRL's GRPOConfig under TRL's names. Those that the run sets itself are refused (see below).
    Batch sizes are those of a single process; several processes share them (docs/scaling.md)."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation."""

    @model_validator(mode="after")
    def _no_code_of_a_model(self) -> Config:
        for place, table in (("trainer", self.trainer), ("collect.vllm", self.collect.vllm)):
            found = _CODE.search(json.dumps(table, default=str))  # also in nested tables, and in JSON as text
            if found:
                raise ValueError(f"{place} has {found[1]}: code that comes with a model is never run; remove it")
        return self

    @model_validator(mode="after")
    def _online_chooses_whole_batches(self) -> Config:
        if self.select.strategy.reads_influence and self.train.dynamic_sampling:
            raise ValueError(
                f"{self.select.label} reads the influence of whole generation batches, and train.dynamic_sampling "
                "replaces groups: set it to 0"
            )
        return self

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run_dir) / self.name

    @property
    def is_of_script(self) -> bool:
        """Whether it is the curriculum of a TRL script, which alone has the model and the reward functions."""
        return getattr(self.verifier, "path", None) == SCRIPT_REWARDS

    def resolved(self) -> dict[str, Any]:
        """All settings, defaults included, as plain JSON values."""
        return self.model_dump(mode="json")


# Settings of GRPOConfig that a run sets itself, with the setting to use instead.
OWNED_TRAINER_KEYS: dict[str, str] = {
    "output_dir": "run_dir and name",
    "max_steps": "train.stages and train.steps_per_stage",
    "num_train_epochs": "train.stages",
    "seed": "seed",
    "data_seed": "seed",
    "temperature": "collect.temperature",
    "chat_template_kwargs": "nothing: prompts are encoded by the template's defaults",
    "save_only_model": "nothing: a run without the optimiser's state cannot go on",
    "ignore_data_skip": "nothing: a resumed run goes on with the next batch",
    "max_completion_length": "collect.max_completion_length",
    "shuffle_dataset": "nothing: a stage is always shuffled by seed",
    "eval_strategy": "evaluate.every",
    "resume_from_checkpoint": "nothing: the same command resumes",
    "remove_unused_columns": "nothing",
    "dataloader_num_workers": "nothing",
    "model_init_kwargs": "the table policy",
    "parallelism_config": "nothing: `accelerate launch` divides the work",
    "trust_remote_code": "nothing: code that comes with a model is never run",
    "do_train": "nothing",
    "do_eval": "nothing",
}


# Settings that no result depends on: they may change during a run.
FREE: dict[str, tuple[str, ...]] = {
    "": ("name", "run_dir"),
    "prompts.": ("leakage",),
    "verification.": ("processes",),
    "collect.server.": ("url", "api_key_env"),
    "trainer.": (
        *("report_to", "run_name", "logging_steps", "logging_strategy", "logging_first_step", "log_completions"),
        *("num_completions_to_print", "log_level", "disable_tqdm", "ddp_timeout"),
        *("save_strategy", "save_steps", "save_total_limit"),
        *("vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout"),
    ),
}
# Tables that base trajectories depend on.
SAMPLED_BY = ("seed", "policy", "prompts", "verifier", "verification", "collect")


def deciding(resolved: Any, prefix: str = "") -> Any:
    """Resolved settings without those that no result depends on."""
    if not isinstance(resolved, dict):
        return resolved
    return {key: deciding(v, f"{prefix}{key}.") for key, v in resolved.items() if key not in FREE.get(prefix, ())}


def config_hash(values: Any) -> str:
    """SHA-256 of JSON values in canonical form."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def config_difference(before: Any, after: Any, prefix: str = "") -> list[str]:
    """Lines `key: before -> after` for every setting that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        lines: list[str] = []
        for key in sorted({*before, *after}):
            lines += config_difference(before.get(key), after.get(key), f"{prefix}.{key}" if prefix else key)
        return lines
    return [] if before == after else [f"{prefix}: {json.dumps(before)} -> {json.dumps(after)}"]
