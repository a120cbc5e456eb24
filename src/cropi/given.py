"""What a run works with: named by its config, or brought by a trainer of the user's for which it only chooses."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from trl import GRPOConfig

from cropi.config import Config
from cropi.errors import ArtifactError, PolicyError
from cropi.policy import Policy, fingerprint, load_policy
from cropi.rewards.pool import strict_judge
from cropi.rewards.verdicts import Judge
from cropi.training.settings import grpo_config
from cropi.workspace import Arm, Workspace


@dataclass(frozen=True)
class Given:
    """A policy, what judges its completions, and the trainer's settings."""

    policy: Policy  # as it is before any training
    identity: str  # what its results depend on
    judge: Judge
    settings: GRPOConfig

    @classmethod
    def named_by(cls, config: Config, processes: int = 1) -> Given:
        """What a config names. Settings that TRL refuses are refused here, before anything is written."""
        policy = load_policy(config.policy)
        settings = grpo_config(config, config.folder, policy.device, processes)
        return cls(policy, fingerprint(config.policy), strict_judge(config.verifier, config.verification), settings)


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
