"""How a config wants groups scored: one scorer, and rows of a part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from cropi.config import Config, StrategyTable
from cropi.functional.projection import SparseProjection
from cropi.gradients.groups import Group
from cropi.gradients.halves import score_by_halves
from cropi.gradients.parts import Row, part_rows
from cropi.gradients.scorer import Scorer
from cropi.gradients.surrogate import SurrogateSettings
from cropi.world import ALONE, World


def make_scorer(
    config: Config,
    model: nn.Module,
    settings: SurrogateSettings,
    strategy: StrategyTable | None = None,
    world: World = ALONE,
) -> Scorer:
    """The scorer that a config asks for; for a strategy that aims at candidates, the one that it needs."""
    aims_at_candidates = strategy is not None and strategy.candidates_aimed_at > 0
    return Scorer(
        model,
        settings,
        estimator=config.score.estimator,
        score="dot" if aims_at_candidates else config.score.score,
        validation_mean="normalized" if aims_at_candidates else config.score.validation_mean,
        lengths=strategy is not None and strategy.reads_lengths,
        projection=SparseProjection(**config.score.projection.model_dump()),
        batch_tokens=config.score.batch_tokens,
        world=world,
    )


@dataclass(frozen=True)
class BlockScorer:
    """A scorer that has been aimed, and what is asked of it."""

    scorer: Scorer
    names: Sequence[str]  # of the validation sets
    standard_errors: bool
    pools: bool

    def __call__(self, block: Sequence[Group], advance: Callable[[int], None] | None = None) -> list[Row]:
        """Rows of `part_schema` of some groups with a signal."""
        if self.pools and not self.standard_errors:
            scored = score_by_halves(self.scorer, block, advance)
        else:
            scored = self.scorer(block, standard_errors=self.standard_errors, advance=advance)
        return part_rows(block, self.names, self.scorer.values(scored), scored)
