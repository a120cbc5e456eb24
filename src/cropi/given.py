"""What a run works with: named by its config, or brought by a trainer of the user's for which it only chooses."""

from __future__ import annotations

from dataclasses import dataclass

from trl import GRPOConfig

from cropi.config import Config
from cropi.policy import Policy, fingerprint, load_policy
from cropi.rewards.pool import judge_of
from cropi.rewards.verdicts import Judge
from cropi.training.settings import grpo_config


@dataclass(frozen=True)
class Given:
    """A policy, what judges its completions, and the trainer's settings."""

    policy: Policy  # as it is before any training
    identity: str  # what its results depend on
    judge: Judge
    settings: GRPOConfig

    @classmethod
    def named_by(cls, config: Config) -> Given:
        """What a config names. Settings that TRL refuses are refused here, before anything is written."""
        policy = load_policy(config.policy)
        settings = grpo_config(config, config.folder, policy.device)
        return cls(policy, fingerprint(config.policy), judge_of(config.verifier, config.verification), settings)
