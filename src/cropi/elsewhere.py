"""The policy on its way to workers elsewhere: they load what the config names, and are held to the same weights."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cropi import __version__
from cropi.config import PolicyConfig
from cropi.errors import ConfigError, PolicyError
from cropi.policy import Policy, load_policy, weights_identity
from cropi.workers import Workers

Packed = Mapping[str, tuple[str, tuple[int, ...], np.ndarray]]
"""dtype, shape and bytes of tensors by name: arrays can be read by many processes where they lie."""


def pack_tensors(tensors: Mapping[str, Tensor]) -> Packed:
    """Tensors of any dtype and device."""
    return {
        name: (
            str(tensor.dtype).removeprefix("torch."),
            tuple(tensor.shape),
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(),
        )
        for name, tensor in tensors.items()
    }


def unpack_tensors(found: Packed) -> dict[str, Tensor]:
    """The same tensors on the CPU, in memory of their own."""
    return {
        name: torch.from_numpy(array.copy()).view(getattr(torch, dtype)).reshape(shape)
        for name, (dtype, shape, array) in found.items()
    }


@dataclass(frozen=True)
class CarriedPolicy:
    """How a worker comes by a policy that this process has."""

    config: str  # JSON of its table
    identity: str  # of its weights
    weights: Packed | None  # where they are not those that the config names
    folder: str  # relative paths start here
    version: str  # of this package

    @classmethod
    def of(cls, config: PolicyConfig, model: nn.Module, *, named: bool) -> CarriedPolicy:
        """`named`: it is the policy that the config names, which every worker can load for itself."""
        weights = None if named else pack_tensors(model.state_dict())
        return cls(config.model_dump_json(), weights_identity(model), weights, str(Path.cwd()), __version__)

    def load(self) -> Policy:
        """In a worker. ConfigError for another version of this package, PolicyError where the policy cannot be loaded
        or turns out to be another."""
        if self.version != __version__:
            raise ConfigError(
                f"a worker has cropi {__version__}, and the command was given to cropi {self.version}",
                where="--ray",
                fix="install the same version on all nodes.",
            )
        if Path(self.folder).is_dir():
            os.chdir(self.folder)
        config = PolicyConfig.model_validate_json(self.config)
        policy = load_policy(config)
        if self.weights is not None:
            policy.model.load_state_dict(unpack_tensors(self.weights))
        if weights_identity(policy.model) != self.identity:
            raise PolicyError(
                "a worker has loaded other weights than this process",
                where=f"policy.path {config.path}",
                fix="put the same files at this path on all nodes, or pin policy.revision.",
            )
        return policy


@dataclass(frozen=True)
class Elsewhere:
    """Workers, and the policy that they work with."""

    workers: Workers
    policy: CarriedPolicy
