"""Audit one policy of a run: compare influence from stored trajectories with influence from fresh ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cropi.artifacts import OK
from cropi.functional.agreement import spearman, top_overlap
from cropi.functional.projection import SparseProjection
from cropi.gradients.groups import Group
from cropi.gradients.ratios import RatioMoments
from cropi.gradients.scorer import Scorer
from cropi.gradients.surrogate import SurrogateSettings
from cropi.gradients.units import Units
from cropi.lab.audit.fidelity import Comparison, gradient_cosines, plain

DRAWS = ("/ceiling", "/reference")
"""Suffixes of the directions of two draws of fresh validation trajectories."""
VARIANTS: dict[str, dict[str, Any]] = {
    "token": {},
    "prefix": {"correction": "prefix"},
}
"""Corrections of the estimate, by name; `token` is paper eq. 4."""


@dataclass(frozen=True)
class Material:
    """The groups to compare at one policy: the same prompts twice, in the same order."""

    stored: Sequence[Group]
    fresh: Sequence[Group]
    stored_validation: Mapping[str, Sequence[Group]]
    fresh_validation: Mapping[str, tuple[Sequence[Group], Sequence[Group]]]
    """Two independent draws."""


def passes(material: Material) -> int:
    """Count the groups that `audit_stage` sends through the policy."""
    validation = sum(len(groups) for groups in material.stored_validation.values())
    fresh = sum(len(groups) for draws in material.fresh_validation.values() for groups in draws)
    stored = len(material.stored)
    return (validation + fresh + stored) * (len(VARIANTS) + 1) + 2 * len(material.fresh)


def audit_stage(
    model: torch.nn.Module,
    settings: SurrogateSettings,
    projection: SparseProjection,
    material: Material,
    *,
    share: float,
    batch_tokens: int | None,
    seed: int,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    """Compare stored with fresh trajectories at one policy; the result is plain JSON."""
    names = list(material.stored_validation)
    directions = dict(material.stored_validation) | {
        name + draw: material.fresh_validation[name][number] for number, draw in enumerate(DRAWS) for name in names
    }

    def aimed(changes: Mapping[str, Any], **options: Any) -> tuple[Scorer, SurrogateSettings]:
        used = replace(settings, **{"correction": "token", "baseline": "group", **changes})
        scorer = Scorer(model, used, batch_tokens=batch_tokens, **options)
        scorer.aim(directions, advance)
        return scorer, used

    exact, used = aimed({}, estimator="exact")
    stored = {"token": _units(exact, material.stored, advance)}
    fresh = _units(exact, material.fresh, advance)
    cosines = exact.direction_cosines()
    for variant, changes in VARIANTS.items():
        if variant != "token":
            stored[variant] = _units(aimed(changes, estimator="exact")[0], material.stored, advance)
    sketch, _ = aimed({}, estimator="sketch", projection=projection)
    together, sketched = _together(sketch, material, advance)
    sets = {}
    for n, name in enumerate(names):
        columns = (n, len(names) + n, 2 * len(names) + n)
        variants = {
            variant: Comparison(stored[variant], fresh, columns, replace(used, **changes), share, seed)
            for variant, changes in VARIANTS.items()
        }
        products_N = np.array([units.products(used)[0, n] for units in stored["token"]])
        projected = {
            "spearman": spearman(sketched[:, n], products_N),
            "top_overlap": top_overlap(sketched[:, n], products_N, share),
        }
        _, ceiling, reference = columns
        cosine = {"off_policy": cosines[n, reference], "ceiling": cosines[ceiling, reference]}
        sets[name] = plain(_agreement(variants) | {"direction_cosine": cosine, "projection": projected})
    return _facts(material, stored["token"]) | {
        "gradient_cosine": gradient_cosines(together, used, seed),
        "sets": sets,
    }


def _agreement(variants: Mapping[str, Comparison]) -> dict[str, Any]:
    """Results for one validation set; `token` is the estimate itself."""
    overall = {variant: comparison.overall() for variant, comparison in variants.items()}
    return {
        "overall": overall["token"],
        "by_trajectories": variants["token"].by_count(),
        "variants": {
            variant: comparison.error_parts() | {"overall": overall[variant]}
            for variant, comparison in variants.items()
        },
    }


def _facts(material: Material, stored: Sequence[Units]) -> dict[str, Any]:
    """Counts of what was compared, and how far the policy has moved."""
    moved = sum((units.total() for units in stored), RatioMoments())
    return {
        "prompts": len(material.stored),
        "with_signal": {
            "stored": sum(group.status == OK for group in material.stored),
            "fresh": sum(group.status == OK for group in material.fresh),
            "both": sum(a.status == b.status == OK for a, b in zip(material.stored, material.fresh, strict=True)),
        },
        "trajectories": {"stored": _count(material.stored), "fresh": _count(material.fresh)},
        "drift": {"ratio_ess": moved.effective_share, "clip_share": moved.clip_share, "kl": moved.kl},
    }


def _count(groups: Sequence[Group]) -> int:
    return min(len(group.completions) for group in groups)


def _units(scorer: Scorer, groups: Sequence[Group], advance: Callable[[int], None]) -> list[Units]:
    return [units for units, _, _ in scorer.units(groups, advance=advance)]


def _together(
    scorer: Scorer, material: Material, advance: Callable[[int], None]
) -> tuple[list[tuple[Units, int]], np.ndarray]:
    """Join stored and fresh trajectories by prompt, with all inner products; also sketched products of the stored."""

    def found(groups: Sequence[Group]) -> Iterator[tuple[Units, torch.Tensor]]:
        for units, features_KD, _ in scorer.units(groups, advance=advance):
            assert features_KD is not None
            yield units, features_KD.double()

    together, products = [], []
    for (old, old_KD), (new, new_KD) in zip(found(material.stored), found(material.fresh), strict=True):
        features_KD = torch.cat([old_KD, new_KD])
        both = Units(
            np.concatenate([old.rewards_K, new.rewards_K]),
            np.concatenate([old.lengths_K, new.lengths_K]),
            np.concatenate([old.products_KV, new.products_KV]),
            (features_KD @ features_KD.T).numpy(),
            [*old.ratios, *new.ratios],
        )
        together.append((both, len(old.rewards_K)))
        products.append(old.products(scorer.settings)[0])
    return together, np.array(products)
