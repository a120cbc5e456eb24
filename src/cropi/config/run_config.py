"""Settings of a run: collection, scoring, selection, training, evaluation, and all tables together."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, AnyHttpUrl, Field, model_validator

from cropi.config.data import PolicyConfig, PromptsConfig
from cropi.curriculum.strategies import Strategy
from cropi.curriculum.strategy import FusionConfig
from cropi.rewards.verifier import VerificationConfig
from cropi.rewards.verifiers import Verifier
from cropi.rewards.verifiers.python_function import SCRIPT_REWARDS
from cropi.setting_types import FreeTable, Name, Positive, Seed, Table, Temperature


def _address(url: str) -> str:
    parts = AnyHttpUrl(url)
    if parts.query or parts.fragment:
        raise ValueError("must end in a path, such as /v1")
    return url


class ServerConfig(Table):
    """A server with OpenAI's completions API and the base policy's weights."""

    url: Annotated[str, AfterValidator(_address)]
    """Base URL of its API, e.g. `http://localhost:8000/v1`."""
    model: str
    """The policy's name there."""
    prompts: Literal["tokens", "text"] = "tokens"
    """Send prompts as token ids (vLLM, SGLang, llama.cpp), or as text that tokenises back (`transformers serve`)."""
    api_key_env: str | None = None
    """Environment variable that holds the key, where the server needs one."""
    body: FreeTable = Field(default={})
    """Further fields of a request, as the server names them. Sampling must be plain for the log-probs to be those of
    the policy: `{"top_k": -1, "return_token_ids": true}` for vLLM."""

    @model_validator(mode="after")
    def _nothing_that_is_ours(self) -> ServerConfig:
        ours = {"model", "prompt", "max_tokens", "temperature", "top_p", "seed", "n", "best_of", "echo", "stream"}
        if ours & set(self.body):
            raise ValueError(f"{', '.join(sorted(ours & set(self.body)))} cannot be set by body")
        return self


class CollectConfig(Table):
    """Trajectories, sampled once from the base policy if the strategy reads them."""

    num_generations: Annotated[int, Field(ge=2, le=10_000)] = 8
    """K, completions per training prompt (paper: 8)."""
    validation_num_generations: Annotated[int, Field(ge=2, le=10_000)] = 32
    """Completions per validation prompt (paper's code: 32)."""
    max_completion_length: Positive
    """Longest completion, in tokens."""
    temperature: Temperature = 1.0
    """Sampling temperature; the importance ratio is taken at the same one. 1 keeps the behaviour policy exact."""
    batch_size: Positive = 256
    """Sequences generated at once, also by a server; halved automatically if memory runs out."""
    batch_tokens: Positive = 8192
    """Padded tokens per forward pass when the behaviour log-probs are computed."""
    shard_prompts: Positive = 128
    """Prompts per shard, the unit of progress that an interruption can lose."""
    server: ServerConfig | None = None
    """Take the completions from a server instead of generating them in this process. Completions of later policies
    (validation, evaluation, training) are still generated here or by the trainer."""
    vllm: FreeTable | None = None
    """Take the completions from vLLM in this process, with the base policy's weights beside those that are trained;
    those of later policies as with `server`. It holds arguments of `vllm.LLM`, e.g. `{"max_model_len": 4096}`; if
    unset, `gpu_memory_utilization` is 0.7. The table `policy` decides model, tokenizer, revision and dtype."""

    @model_validator(mode="after")
    def _one_backend(self) -> CollectConfig:
        if self.server is not None and self.vllm is not None:
            raise ValueError("collect.server and collect.vllm exclude each other: remove one")
        return self

    @model_validator(mode="after")
    def _nothing_that_the_run_decides(self) -> CollectConfig:
        options = self.vllm or {}
        taken = {"model", "tokenizer", "revision", "dtype", "generation_config", "trust_remote_code"} & set(options)
        if taken:
            raise ValueError(f"{', '.join(sorted(taken))} cannot be set by collect.vllm")
        longest = options.get("max_model_len")
        if longest is not None and (type(longest) is not int or longest < 1):
            raise ValueError(f"collect.vllm.max_model_len is {longest!r}: must be a whole number of at least 1")
        return self


class ScoreConfig(Table):
    """Influence of every training prompt on every validation set, at the current policy."""

    normalizer: Literal["auto", "sequence", "token", "constant"] = "auto"
    """The divisor of a prompt's surrogate. `auto` matches the trainer's loss; see research/decisions."""
    score: Literal["dot", "cosine", "gain"] = "dot"
    """`dot` is the first-order gain of a step along the prompt's gradient; `cosine` is what the paper's runs use;
    `gain` is cosine x standard deviation of the rewards."""
    advantage_std: bool | Literal["auto"] = "auto"
    """Divide advantages by the group's standard deviation (GRPO). `auto` follows `trainer.scale_rewards`."""
    estimator: Literal["sketch", "exact", "reference"] = "sketch"
    """Gradients are compared projected, without projection, or by autograd one prompt at a time, which is also what
    architectures get that the first two do not cover."""
    batch_tokens: Positive | None = None
    """Tokens of a forward pass; a larger group is split and its gradients are added. Unset: what memory allows."""
    standard_errors: bool = False
    """Also estimate the error of every influence, from two halves of the prompt's trajectories. Prompts are computed
    twice."""
    mask: Literal["structured", "uniform"] = "structured"
    """The coordinates of a gradient that the sketch keeps. `structured`: of each layer eight directions and 3 % of the
    columns, at a third of the extra cost; `uniform`: each coordinate with a chance of 10 %, as the paper has it."""


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

    @property
    def steps(self) -> int:
        """Optimiser steps of all stages."""
        return self.stages * self.steps_per_stage


class EvaluateConfig(Table):
    """Evaluation during and after training."""

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
    Batch sizes are those of a single process; several processes share them (docs/scaling.md). Defaults that differ from
    TRL's: `save_strategy: epoch` (every stage), `save_total_limit: 2`, `logging_steps: 1`, `report_to: []`,
    `disable_tqdm: true`; on a CPU no gradient checkpointing, and `bf16` only if `policy.dtype` says so."""
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
    def evaluate_every(self) -> int:
        """Optimiser steps between evaluations."""
        return self.evaluate.every or self.train.steps_per_stage

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
