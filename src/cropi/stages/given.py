"""What a run works with: named by its config, or brought by a trainer of the user's for which it only chooses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trl import GRPOConfig

from cropi.config import Config
from cropi.errors import ArtifactError, ConfigError, DataError, PolicyError
from cropi.policy import Policy, encode_prompts, fingerprint, load_policy, trainer_prompt, uses_chat
from cropi.rewards.pool import strict_judge
from cropi.rewards.verdicts import Judge
from cropi.stages.evaluate import Question
from cropi.training.grpo_settings import grpo_config
from cropi.training.rollout_recorder import require_no_dropout
from cropi.workspace import Arm, Workspace, require_writable


@dataclass(frozen=True)
class Given:
    """A policy, what judges its completions, and the trainer's settings."""

    policy: Policy  # as it is before any training
    identity: str  # what its results depend on
    judge: Judge
    settings: GRPOConfig

    @classmethod
    def named_by(cls, config: Config, processes: int = 1) -> Given:
        """What a config names, for `run` and `check` alike; what is refused of it is refused before a file is written.

        What is refused of the prompts: `checked_prompts`, `plan` and `questions`.
        """
        if not config.prompts.test:
            raise ConfigError("there is no test set", where="prompts.test", fix="name one: a run is judged by it.")
        if config.collect.vllm is not None and find_spec("vllm") is None:
            raise PolicyError("vLLM is not installed", where="collect.vllm", fix="pip install 'cropi[vllm]'.")
        Workspace(config)  # refuses a folder that is another run's
        require_writable(config.folder)
        policy = load_policy(config.policy)
        settings = grpo_config(config, config.folder, policy.device, processes)
        if config.refresh.reuse_rollouts and not settings.disable_dropout:
            require_no_dropout(policy.model)
        return cls(policy, fingerprint(config.policy), strict_judge(config.verifier, config.verification), settings)


def questions(config: Config, policy: Policy, rows: Sequence[Mapping[str, Any]]) -> list[Question]:
    """Test prompts as they are asked. DataError where one does not fit into the policy's context."""
    settings = config.prompts
    chat = uses_chat(policy.tokenizer, settings.chat, settings.system_prompt)
    prompts = [trainer_prompt(row["messages"], chat=chat, system_prompt=settings.system_prompt) for row in rows]
    encoded = encode_prompts(policy.tokenizer, prompts)
    limit, longest = policy.context_length, max(map(len, encoded), default=0)
    if limit is not None and longest + config.collect.max_completion_length > limit:
        raise DataError(
            f"the longest test prompt has {longest} tokens, which leaves no room for a completion in {limit}",
            where="prompts.test",
            fix="leave such prompts out, or lower collect.max_completion_length.",
        )
    return [Question(row["set"].removeprefix("test/"), row, ids) for row, ids in zip(rows, encoded, strict=True)]


def start_of_stage(config: Config, arm: Arm, stage: int) -> Path:
    """The checkpoint that a stage after the first begins with. PolicyError where it is not there."""
    path = arm.checkpoints / f"checkpoint-{stage * config.train.steps_per_stage}"
    if not path.is_dir():
        raise PolicyError(
            f"there is no checkpoint of the start of stage {stage}",
            where=str(path),
            fix="train up to it first, or keep more checkpoints with trainer.save_total_limit.",
        )
    return path


def arm_at(space: Workspace, stage: int, checkpoint: Path | None) -> Arm:
    """The main arm, or a folder of its own for a checkpoint from elsewhere.

    Errors: ArtifactError for a stage that the run does not have, PolicyError for a checkpoint that is not there.
    """
    config = space.config
    if stage >= config.train.stages:
        last = config.train.stages - 1
        raise ArtifactError(f"the run has no stage {stage}", where="--stage", fix=f"give 0 to {last}.")
    if checkpoint is None:
        return space.arms[config.select.strategy.arm]
    if stage:
        raise PolicyError("a checkpoint from elsewhere has one stage only", where="--stage", fix="leave it out.")
    if not checkpoint.is_dir():
        raise PolicyError(f"there is no folder {checkpoint}", where="--checkpoint", fix="check the path.")
    return space.foreign(checkpoint, fingerprint(config.policy, str(checkpoint)))
