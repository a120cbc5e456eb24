"""Data-efficient reinforcement learning with verifiable rewards: train on the prompts that help most now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cropi.functional.projection import SparseProjection
    from cropi.gradients.group_influence import InfluenceScores, influence
    from cropi.gradients.groups import Group

__version__ = "0.1.0"
__all__ = ["Group", "InfluenceScores", "SparseProjection", "influence"]

_HOMES = {
    "Group": "cropi.gradients.groups",
    "InfluenceScores": "cropi.gradients.group_influence",
    "SparseProjection": "cropi.functional.projection",
    "influence": "cropi.gradients.group_influence",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when asked for: the command line starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
