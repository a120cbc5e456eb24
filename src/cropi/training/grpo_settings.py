"""Build TRL's GRPOConfig from the `trainer` table of a config, check it, and try it by one step of training."""

from __future__ import annotations

import dataclasses
import math
import random
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, get_type_hints

import datasets
import numpy as np
import torch
from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import PrinterCallback
from transformers.integrations import get_available_reporting_integrations
from trl import GRPOConfig, GRPOTrainer

from cropi.config import BUILTIN_POLICY, OWNED_TRAINER_KEYS, Config, PolicyConfig
from cropi.console import warn_once
from cropi.errors import ConfigError, hint
from cropi.functional.surrogate import NORMALIZER_OF_LOSS
from cropi.parallel import launched
from cropi.policy import load_policy
from cropi.training.dynamic_sampling import check_dynamic_sampling


def grpo_config(config: Config, output_dir: Path, device: torch.device, processes: int = 1) -> GRPOConfig:
    """Merge TRL's defaults, the user's `trainer` table, and the settings that the run owns.

    The table describes one process: several `processes` share its batch, so that training is the same on any number.

    Raises ConfigError for unknown names, for names that the run owns, and for values that TRL refuses, now or in
    training.
    """
    fields = {field.name for field in dataclasses.fields(GRPOConfig) if field.init}
    given = _typed(config.trainer, fields)
    defaults: dict[str, Any] = {
        "num_generations": config.collect.num_generations,
        "temperature": config.collect.temperature,
        "use_cpu": device.type == "cpu",
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "epoch",
        "save_total_limit": 2,
        "disable_tqdm": True,
    }
    if device.type == "cpu":  # TRL's defaults are for accelerators
        # transformers renamed the setting and warns of the old name
        checkpointing = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
        defaults |= {"bf16": config.policy.dtype == "bfloat16", checkpointing: False}
    owned: dict[str, Any] = {
        "output_dir": str(output_dir),
        "num_train_epochs": config.train.stages,
        "max_steps": -1,
        "seed": config.seed,
        "data_seed": config.seed,
        "max_completion_length": config.collect.max_completion_length,
        "remove_unused_columns": False,
        "eval_strategy": "no",
        "trust_remote_code": False,
        "model_init_kwargs": config.policy.revision and {"revision": config.policy.revision},  # of the KL reference
    }
    options = _divided(defaults | given, processes) | owned
    try:
        settings = GRPOConfig(**options)
    except Exception as error:  # TRL and transformers raise many kinds, each for a setting
        raise ConfigError(" ".join(str(error).split()), where="trainer", fix="correct the value it names.") from None
    _check(settings, config)
    if config.select.strategy.chooses_online:
        _check_online(settings, config, processes)
    if processes == 1 and not launched():
        try_one_step(options, device)
    return settings


def _check_online(settings: GRPOConfig, config: Config, processes: int) -> None:
    """ConfigError where only one process would choose."""
    if processes > 1 and settings.accelerator_config.dispatch_batches:
        raise ConfigError(
            "every process chooses the prompts of a batch, and one of them would fetch it for all",
            where="trainer.accelerator_config",
            fix="leave dispatch_batches out.",
        )
    if config.select.strategy.reads_influence:
        warn_of_other_terms(settings)


def warn_of_other_terms(settings: GRPOConfig) -> None:
    """Say which terms of the loss are read as influence beside that of the rewards."""
    terms = {
        "beta": "KL divergence",
        "entropy_coef": "entropy",
        "use_adaptive_entropy": "entropy",
        "router_aux_loss_coef": "router losses",
    }
    for name, term in terms.items():
        if getattr(settings, name, None):
            warn_once(f"trainer.{name} is set, so the influence that is read contains the term of {term}")


def _divided(options: dict[str, Any], processes: int) -> dict[str, Any]:
    """Divide the batch among processes: first the micro-steps, so that memory use stays the same, then the rows.

    The batches of a step and of a generation, over all processes together, stay the same.
    """
    if processes == 1:
        return options
    known: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(GRPOConfig)} | options
    rows, steps = known["per_device_train_batch_size"], known["gradient_accumulation_steps"]
    served = known["steps_per_generation"]
    fewer_steps = math.gcd(processes, *(steps, served) if served is not None else (steps,))
    fewer_rows = processes // fewer_steps
    if rows % fewer_rows:
        raise ConfigError(
            f"a step has {rows} x {steps} completions, which {processes} processes cannot share evenly",
            where="trainer.per_device_train_batch_size x trainer.gradient_accumulation_steps",
            fix=f"change one of them so that {processes} divides their product, or launch another number of processes.",
        )
    shared = {"per_device_train_batch_size": rows // fewer_rows, "gradient_accumulation_steps": steps // fewer_steps}
    if served is not None:
        shared["steps_per_generation"] = served // fewer_steps
    return options | shared


# Types that TRL accepts, where its annotations differ.
_TYPES: dict[str, Any] = {
    "fsdp": bool | str | None,
    "num_generations": int,
    "scale_rewards": bool | Literal["group", "batch", "none"],
}
_COUNTS = {
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "num_iterations",
    "num_generations",
    "steps_per_generation",
    "generation_batch_size",
}
_MAY_BE_NEGATIVE = {"entropy_coef", "entropy_coef_min", "local_rank", "off_policy_mask_threshold"}
LARGEST = 1_000_000


def _typed(table: Mapping[str, Any], fields: set[str]) -> dict[str, Any]:
    """Convert the values of `trainer` to TRL's types; refuse unknown keys and keys that the run owns."""
    types = get_type_hints(GRPOConfig) | _TYPES
    typed: dict[str, Any] = {}
    for key, value in table.items():
        if key in OWNED_TRAINER_KEYS:
            raise ConfigError(
                f"trainer.{key} is decided by the run", where="trainer", fix=f"set {OWNED_TRAINER_KEYS[key]} instead."
            )
        if key not in fields:
            meant = hint(key, fields, "see TRL's GRPOConfig for the names")
            raise ConfigError(f"unknown key trainer.{key} - {meant}", where="trainer", fix="correct or remove the key.")
        try:
            adapter = TypeAdapter(types[key], config=ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False))
            typed[key] = adapter.validate_python(value)
            problem = _out_of_bounds(key, typed[key])
        except ValidationError as error:
            message = error.errors(include_url=False)[0]["msg"]
            problem = f"{message[0].lower()}{message[1:]}"
        if problem:
            raise ConfigError(f"trainer.{key} is {value!r}: {problem}", where="trainer", fix="correct the value.")
    if "report_to" in typed and typed["report_to"] is None:
        typed["report_to"] = []
    return typed


def _out_of_bounds(key: str, value: Any) -> str:
    """Return the problem of a number that TRL accepts, but that it would divide by or train nothing with."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    lowest = 1 if key in _COUNTS else 0
    if value < lowest and key not in _MAY_BE_NEGATIVE:
        return f"must be at least {lowest}"
    return f"must be at most {LARGEST}" if key in _COUNTS and value > LARGEST else ""


def _check(settings: GRPOConfig, config: Config) -> None:
    if settings.loss_type not in NORMALIZER_OF_LOSS:
        raise ConfigError(
            f"no per-prompt normaliser is known for the loss {settings.loss_type!r}",
            where="trainer.loss_type",
            fix=f"use one of {', '.join(NORMALIZER_OF_LOSS)}.",
        )
    _check_generation_batches(settings, config)
    _check_saving(settings)
    check_dynamic_sampling(settings, config.train.dynamic_sampling)
    if settings.use_vllm and find_spec("vllm") is None:
        raise ConfigError("vLLM is not installed", where="trainer.use_vllm", fix="pip install vllm, or leave it out.")
    missing = sorted(set(settings.report_to) - set(get_available_reporting_integrations()))
    if missing:
        raise ConfigError(
            f"{missing[0]} is not installed",
            where="trainer.report_to",
            fix=f"pip install {missing[0]}, or leave it out.",
        )


def _check_generation_batches(settings: GRPOConfig, config: Config) -> None:
    """Let generation batches, which serve several micro-steps, end with each stage and each checkpoint.

    On resume TRL counts micro-steps from 0 and generates anew. After a checkpoint inside a generation batch, a resumed
    run would therefore sample different completions.
    """
    serves = settings.steps_per_generation * settings.num_iterations
    micro_steps = config.train.steps_per_stage * settings.gradient_accumulation_steps
    if micro_steps % serves:
        raise ConfigError(
            f"{config.train.steps_per_stage} steps are {micro_steps} micro-steps, which is no multiple of the {serves} "
            "that one generation batch serves",
            where="train.steps_per_stage",
            fix="make its micro-steps a multiple of steps_per_generation x num_iterations.",
        )
    save_between_batches(settings, config.train.steps)


def save_between_batches(settings: GRPOConfig, steps: int) -> None:
    """Round `save_steps`, of a training of so many steps, up to where a generation batch ends, and say so."""
    if settings.save_strategy != "steps":
        return
    serves = settings.steps_per_generation * settings.num_iterations
    unit = serves // math.gcd(serves, settings.gradient_accumulation_steps)
    asked = settings.save_steps if settings.save_steps >= 1 else math.ceil(settings.save_steps * steps)  # a share
    settings.save_steps = math.ceil(asked / unit) * unit
    if settings.save_steps != asked:
        warn_once(
            f"checkpoints are saved every {settings.save_steps} steps instead of every {asked:g}: a generation batch "
            f"ends every {unit} steps"
        )


def _check_saving(settings: GRPOConfig) -> None:
    if settings.save_strategy not in {"epoch", "steps"}:
        raise ConfigError(
            f"save_strategy {settings.save_strategy!s} leaves a run that cannot be resumed",
            where="trainer.save_strategy",
            fix="use epoch (every stage) or steps with save_steps.",
        )
    if settings.save_total_limit is not None and settings.save_total_limit < 2:
        raise ConfigError(
            "with a single checkpoint, an interruption during the next save loses both",
            where="trainer.save_total_limit",
            fix="set it to 2 or more.",
        )


# -- a trial step --------------------------------------------------------------------------------------------------

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
