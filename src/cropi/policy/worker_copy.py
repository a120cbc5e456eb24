"""The policy of this process as a Ray worker loads it: by name, with the same weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from cropi import __version__
from cropi.config import PolicyConfig
from cropi.errors import ConfigError, PolicyError
from cropi.policy.loaded_policy import Policy, load_policy, weights_identity


@dataclass(frozen=True)
class PolicyCopy:
    """Everything a worker needs to load the policy that this process has."""

    config: PolicyConfig
    identity: str  # of its weights
    weights: Mapping[str, Tensor]  # those that training may have changed
    folder: str  # relative paths start here
    version: str = __version__

    @classmethod
    def of(cls, config: PolicyConfig, model: nn.Module, *, trained: bool) -> PolicyCopy:
        """Describe a model that `config` has loaded; if it may be `trained`, with its trainable weights."""
        trainable = ((name, weight) for name, weight in model.named_parameters() if weight.requires_grad and trained)
        weights = {name: weight.detach().cpu() for name, weight in trainable}
        return cls(config, weights_identity(model), weights, str(Path.cwd()))

    def load(self) -> Policy:
        """Load the policy in a worker. ConfigError for another version of this package, PolicyError where the policy
        cannot be loaded or has other weights."""
        if self.version != __version__:
            raise ConfigError(
                f"a worker has cropi {__version__}, and the command was given to cropi {self.version}",
                where="--ray",
                fix="install the same version on all nodes.",
            )
        if Path(self.folder).is_dir():
            os.chdir(self.folder)
        policy = load_policy(self.config)
        policy.model.load_state_dict(self.weights, strict=False)
        if weights_identity(policy.model) != self.identity:
            raise PolicyError(
                "a worker has loaded other weights than this process",
                where=f"policy.path {self.config.path}",
                fix="put the same files at this path on all nodes, or pin policy.revision.",
            )
        return policy
