"""Data-efficient reinforcement learning with verifiable rewards: train on the prompts that help most now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cropi.api import RunResult, load, run
    from cropi.functional.projection import SparseProjection
    from cropi.gradients.group_influence import InfluenceScores, influence
    from cropi.gradients.groups import Group, SurrogateSettings
    from cropi.gradients.influence_scorer import ScorerOptions
    from cropi.lab.compare.comparison_result import ComparisonResult, compare, load_comparison

__version__ = "0.1.0"
__all__ = [
    "ComparisonResult",
    "Group",
    "InfluenceScores",
    "RunResult",
    "ScorerOptions",
    "SparseProjection",
    "SurrogateSettings",
    "compare",
    "influence",
    "load",
    "load_comparison",
    "run",
]

_HOMES = {
    "ComparisonResult": "cropi.lab.compare.comparison_result",
    "RunResult": "cropi.api",
    "compare": "cropi.lab.compare.comparison_result",
    "load": "cropi.api",
    "load_comparison": "cropi.lab.compare.comparison_result",
    "run": "cropi.api",
    "Group": "cropi.gradients.groups",
    "InfluenceScores": "cropi.gradients.group_influence",
    "ScorerOptions": "cropi.gradients.influence_scorer",
    "SparseProjection": "cropi.functional.projection",
    "SurrogateSettings": "cropi.gradients.groups",
    "influence": "cropi.gradients.group_influence",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that the command line starts without torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
