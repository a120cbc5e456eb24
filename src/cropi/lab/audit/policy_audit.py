"""Audit one policy of a run: compare influence from stored trajectories with influence from fresh ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from cropi.functional.projection import SparseProjection
from cropi.gradients.groups import Group, RatioStatistics, SurrogateSettings
from cropi.gradients.influence_scorer import Scorer, ScorerOptions
from cropi.lab.audit.agreement import spearman, top_overlap
from cropi.lab.audit.fidelity import Comparison, gradient_cosines, plain
from cropi.lab.audit.trajectory_products import TrajectoryProducts, trajectory_products
from cropi.policy import completion_logprobs

DRAWS = ("/ceiling", "/reference")
"""Suffixes of the directions of two draws of fresh validation trajectories."""
VARIANTS = ("token", "prefix")
"""Corrections of the importance ratio: the token's own ratio (paper eq. 4), or the product of those up to it."""
CAP = 10.0
"""Largest product of ratios in the prefix correction: each token weighed by the ratios up to it."""


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
    fresh_directions = {
        name + draw: material.fresh_validation[name][number] for number, draw in enumerate(DRAWS) for name in names
    }

    def aimed(stored_validation: Mapping[str, Sequence[Group]], **options: Any) -> Scorer:
        scorer = Scorer(model, settings, ScorerOptions(batch_tokens=batch_tokens, **options))
        scorer.aim({**stored_validation, **fresh_directions}, advance)
        return scorer

    def corrected(groups: Sequence[Group]) -> list[Group]:
        return prefix_corrected(model, groups, settings.temperature)

    exact = aimed(material.stored_validation, estimator="exact")
    stored = {"token": _products(exact, material.stored, advance)}
    fresh = _products(exact, material.fresh, advance)
    cosines = exact.direction_cosines()
    prefix = aimed({name: corrected(groups) for name, groups in material.stored_validation.items()}, estimator="exact")
    stored["prefix"] = _products(prefix, corrected(material.stored), advance)
    sketch = aimed(material.stored_validation, estimator="sketch", projection=projection)
    together, sketched = _together(sketch, material, advance)
    sets = {}
    for n, name in enumerate(names):
        columns = (n, len(names) + n, 2 * len(names) + n)
        variants = {variant: Comparison(stored[variant], fresh, columns, settings, share, seed) for variant in VARIANTS}
        products_N = np.array([one.products(settings)[0, n] for one in stored["token"]])
        projected = {
            "spearman": spearman(sketched[:, n], products_N),
            "top_overlap": top_overlap(sketched[:, n], products_N, share),
        }
        _, ceiling, reference = columns
        cosine = {"off_policy": cosines[n, reference], "ceiling": cosines[ceiling, reference]}
        sets[name] = plain(_agreement(variants) | {"direction_cosine": cosine, "projection": projected})
    return _facts(material, stored["token"]) | {
        "gradient_cosine": gradient_cosines(together, settings, seed),
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


def _facts(material: Material, stored: Sequence[TrajectoryProducts]) -> dict[str, Any]:
    """Number of prompts and trajectories compared, and the policy's drift."""
    moved = sum((products.total() for products in stored), RatioStatistics())
    return {
        "prompts": len(material.stored),
        "trajectories": {"stored": _count(material.stored), "fresh": _count(material.fresh)},
        "drift": {"ratio_ess": moved.effective_share, "clip_share": moved.clip_share, "kl": moved.kl},
    }


def _count(groups: Sequence[Group]) -> int:
    return min(len(group.completions) for group in groups)


def _products(scorer: Scorer, groups: Sequence[Group], advance: Callable[[int], None]) -> list[TrajectoryProducts]:
    return [products for products, _ in trajectory_products(scorer, groups, advance)]


def _together(
    scorer: Scorer, material: Material, advance: Callable[[int], None]
) -> tuple[list[tuple[TrajectoryProducts, int]], np.ndarray]:
    """Join each prompt's stored and fresh trajectories, with all of their inner products; also return the sketched
    products of the stored ones."""

    def found(groups: Sequence[Group]) -> Iterator[tuple[TrajectoryProducts, torch.Tensor]]:
        for products, features_KD in trajectory_products(scorer, groups, advance):
            assert features_KD is not None
            yield products, features_KD.double()

    together, sketched = [], []
    for (old, old_KD), (new, new_KD) in zip(found(material.stored), found(material.fresh), strict=True):
        features_KD = torch.cat([old_KD, new_KD])
        both = TrajectoryProducts(
            np.concatenate([old.rewards_K, new.rewards_K]),
            np.concatenate([old.lengths_K, new.lengths_K]),
            np.concatenate([old.products_KV, new.products_KV]),
            (features_KD @ features_KD.T).numpy(),
            [*old.ratios, *new.ratios],
        )
        together.append((both, len(old.rewards_K)))
        sketched.append(old.products(scorer.settings)[0])
    return together, np.array(sketched)


# -- the prefix correction --------------------------------------------------------------------------------------------


def log_prefix_ratios(log_ratios_T: Float[Tensor, " T"], cap: float = CAP) -> Float[Tensor, " T"]:
    """log min(rho_1 ... rho_t, cap) of one trajectory, from its log rho_t in order.

    The product is the probability ratio of the whole prefix. Without the cap, and with a baseline that does not depend
    on the trajectory, only the outcome's dependence on later tokens stays uncorrected.
    """
    return log_ratios_T.cumsum(0).clamp(max=math.log(cap))


@torch.no_grad()
def prefix_corrected(model: nn.Module, groups: Sequence[Group], temperature: float, cap: float = CAP) -> list[Group]:
    """Replace behaviour log-probs so that the token ratios at this policy become the prefix products. On-policy groups
    stay as they are."""
    return [_corrected(model, group, temperature, cap) for group in groups]


def _corrected(model: nn.Module, group: Group, temperature: float, cap: float) -> Group:
    if group.behaviour_logprobs is None:
        return group
    corrected: list[list[float]] = []
    for completion, stored in zip(group.completions, group.behaviour_logprobs, strict=True):
        if not completion:
            corrected.append([])
            continue
        found_KT, _ = completion_logprobs(model, [group.prompt_ids], [completion], temperature=temperature)
        current_T = found_KT[0].double().cpu()
        log_ratios_T = current_T - torch.tensor(stored, dtype=torch.float64)
        corrected.append((current_T - log_prefix_ratios(log_ratios_T, cap)).tolist())
    return replace(group, behaviour_logprobs=corrected)
