"""Strategies: the ways to choose the prompts of a stage, one table each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from cropi.config.base import Fraction, Name, PositiveNumber, Table

Need = Literal["trajectories", "gradients", "validation", "rewards"]
"""What a strategy reads: stored trajectories of the pool, per-prompt gradients, the validation sets, and the rewards of
training so far."""


CANDIDATES = ("candidates-a", "candidates-b")
"""Directions that are halves of a sample of the pool: see `cropi.curriculum.strategies.learnalign`."""


class StrategyTable(Table):
    """What all strategies have in common."""

    needs: ClassVar[frozenset[Need]] = frozenset()
    reads_lengths: ClassVar[bool] = False  # needs the length of every prompt's gradient
    reads_texts: ClassVar[bool] = False  # chooses by the prompts' words
    pools: ClassVar[bool] = False  # judges prompts by others that are like them
    takes_all: ClassVar[bool] = False  # trains on all that it keeps, instead of the best ceil(fraction N)

    name: Name | None = None
    """Name of the strategy in reports. Unset: the type."""

    @property
    def label(self) -> str:
        """Name of the strategy in reports, and a part of the seeds of what a stage samples."""
        return self.name or str(getattr(self, "type"))  # noqa: B009 - every strategy has one, of its own literal type

    @property
    def reads_trajectories(self) -> bool:
        """Whether it chooses by the stored trajectories, and so has to pay for them."""
        return "trajectories" in self.needs

    @property
    def reads_scores(self) -> bool:
        """Whether it needs `score`."""
        return "gradients" in self.needs

    @property
    def candidates_aimed_at(self) -> int:
        """How many training prompts stand in for the validation sets when it is scored. 0: the validation sets do."""
        return 0

    @property
    def aims_at_validation(self) -> bool:
        """Whether the validation sets' trajectories say what its scores mean."""
        return self.reads_scores and not self.candidates_aimed_at

    def directions(self, validation_sets: Iterable[str]) -> list[str]:
        """Names of what the pool's gradients are compared with, as the columns of its scores have them."""
        return list(CANDIDATES) if self.candidates_aimed_at else sorted(validation_sets)

    def scored_stage(self, stage: int) -> int:
        """The stage whose scores count at a stage."""
        return stage

    @property
    def follows_trajectories(self) -> bool:
        """Whether newer trajectories make a difference to its later stages."""
        return self.reads_trajectories and any(self.scored_stage(stage) == stage for stage in range(1, 100))


# Controls


class FullStrategy(StrategyTable):
    """Every prompt, every stage."""

    takes_all: ClassVar[bool] = True

    type: Literal["full"]
    """Picks this strategy."""


class RandomStrategy(StrategyTable):
    """A uniformly random subset."""

    type: Literal["random"]
    """Picks this strategy."""
    redraw: bool = False
    """Draw a new subset at every stage instead of one for the whole run."""


# By the stored pass rate


class PassRateStrategy(StrategyTable):
    """Random prompts among those whose stored pass rate lies in a band."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories"})

    type: Literal["pass_rate"]
    """Picks this strategy."""
    low: Fraction = 0.2
    """Lowest pass rate kept."""
    high: Fraction = 0.8
    """Highest pass rate kept."""

    @model_validator(mode="after")
    def _ordered(self) -> PassRateStrategy:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not exceed high ({self.high})")
        return self


class MidStrategy(StrategyTable):
    """The prompts whose pass rate is nearest to a half."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories"})

    type: Literal["mid"]
    """Picks this strategy."""


class LearnabilityStrategy(StrategyTable):
    """The prompts with the largest p (1 - p)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories", "rewards"})

    type: Literal["learnability"]
    """Picks this strategy."""
    rescore: bool = False
    """Take p from the newest training rewards of a prompt where it has been trained on."""


class VcrlStrategy(StrategyTable):
    """Random prompts among those whose rewards vary enough (VCRL)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories"})

    type: Literal["vcrl"]
    """Picks this strategy."""
    kappa: Fraction = 0.8
    """Least variance of a group's rewards, as a share of the largest possible one."""


class GaussianStrategy(StrategyTable):
    """Prompts drawn by a bell curve over the pass rate, whose middle moves from stage to stage."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories"})

    type: Literal["gaussian"]
    """Picks this strategy."""
    first: Fraction = 0.8
    """Middle of the curve at the first stage: easy prompts."""
    last: Fraction = 0.2
    """Middle of the curve at the last stage: hard ones. In between it moves in equal steps."""
    sigma: PositiveNumber = 0.2
    """Standard deviation of the curve."""
    shares: dict[str, PositiveNumber] = Field(default={})
    """Fixed proportions of the sources in every selection; sources not named get no place. Empty: as drawn."""


class DotsStrategy(StrategyTable):
    """Prompts drawn by their distance from a target pass rate (DOTS)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories"})

    type: Literal["dots"]
    """Picks this strategy."""
    target: Fraction = 0.5
    """Alpha, the pass rate aimed at (released code: 0.5)."""
    temperature: PositiveNumber = 1e-3
    """Tau; so small a one (released code: 1e-3) takes the nearest prompts and draws among equals."""


# By the rewards of training so far: no stored trajectories


class MoppsStrategy(StrategyTable):
    """Prompts whose pass rate, drawn from what training has seen of them, is nearest to a target (MoPPS)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"rewards"})

    type: Literal["mopps"]
    """Picks this strategy."""
    target: Fraction = 0.5
    """Mu*, the pass rate aimed at (released code: 0.5)."""
    memory: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Lambda: what a visit leaves of the visits before (released configuration: 1)."""


class GresoStrategy(StrategyTable):
    """All prompts but those whose rewards have lately been equal, dropped by chance (GRESO)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"rewards"})
    takes_all: ClassVar[bool] = True

    type: Literal["greso"]
    """Picks this strategy."""
    start: Fraction = 0.5
    """Probability that a prompt is kept after one visit of equal rewards, at first (released code: 0.5)."""
    change: Fraction = 0.01
    """By how much these probabilities, one for solved and one for unsolved, move after each step."""
    zero_variance: Fraction = 0.25
    """Share of visits of equal rewards aimed at: a third of it solved, two thirds unsolved (released code: 0.25)."""
    floor: Fraction = 0.01
    """Least probability that a prompt is kept."""


# By gradients


class GradientNormStrategy(StrategyTable):
    """The prompts with the longest gradients."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories", "gradients"})
    reads_lengths: ClassVar[bool] = True

    type: Literal["gradient_norm"]
    """Picks this strategy."""


class LearnAlignStrategy(StrategyTable):
    """Learnable prompts whose gradients point the way of the pool's (after LearnAlign)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories", "gradients"})
    reads_lengths: ClassVar[bool] = True

    type: Literal["learnalign"]
    """Picks this strategy."""
    candidates: Annotated[int, Field(ge=2, le=1_000_000)] = 200
    """Prompts with signal, drawn at random, whose gradients stand for the pool's."""

    @property
    def candidates_aimed_at(self) -> int:
        return self.candidates


class InfluenceStrategy(StrategyTable):
    """The prompts whose off-policy gradient points most along the validation sets' (CROPI)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories", "gradients", "validation"})

    type: Literal["influence"]
    """Picks this strategy."""
    static: bool = False
    """Score once, at the base policy, instead of at every stage."""
    order: Literal["top", "bottom", "shuffled"] = "top"
    """`bottom`: the other end of every ranking; `shuffled`: with the scores handed round at random. Both are negative
    controls."""

    def scored_stage(self, stage: int) -> int:
        return 0 if self.static else stage


class PooledStrategy(StrategyTable):
    """The prompts with the largest influence as they and their neighbours tell it, times how learnable they are now."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories", "gradients", "validation", "rewards"})
    pools: ClassVar[bool] = True

    type: Literal["pooled"]
    """Picks this strategy."""
    rescore_every: Annotated[int, Field(ge=0)] = 0
    """Stages between two scorings. 0: score once, at the base policy."""
    screen: Fraction = 0.1
    """Share of the pool, at the most, that is sampled at the start of a stage: prompts that would be chosen, of which
    it is not known how often the policy solves them now."""
    screen_generations: Annotated[int, Field(ge=2, le=10_000)] = 4
    """Completions for each of them."""
    own: bool = True
    """Let a prompt's own influence count beside its neighbours', as far as its standard error allows."""
    learnability: Literal["now", "stored"] = "now"
    """Where p (1 - p) comes from: the stored trajectories and all training rewards since, or the former alone."""
    half_life: PositiveNumber = 0.5
    """Stages after which a try counts half in the pass rate of now."""
    prior: PositiveNumber = 2.0
    """Tries that the neighbours' pass rate counts for beside a prompt's own."""
    significance: Annotated[float, Field(ge=0)] = 1.0
    """Standard errors of its neighbourhood's influence that a prompt's must lie above 0 to be chosen for it."""
    exhausted: Fraction = 0.2
    """A prompt whose gain is below this share of what the best had at first is not chosen for it, nor is harm so small
    a reason to leave one out."""
    fusion: Literal["balanced", "sum", "rank"] = "balanced"
    """Over validation sets. `sum`: of the gains, each in units of what its best prompts give it. `balanced`: the same,
    with places for each set in proportion to what is left of it to learn. `rank`: Reciprocal Rank Fusion."""
    room: Literal["headroom", "gain"] = "headroom"
    """What keeps other prompts out of a stage: what the chosen ones still give (`gain`), and no more than what is left
    between the pass rate and 1 in the validation set that has learned least (`headroom`)."""
    draw: Literal["top", "proportional"] = "top"
    """Of the helpful prompts more than a stage takes: the best, or drawn anew each stage in proportion to the score."""

    @model_validator(mode="after")
    def _screening_is_read(self) -> PooledStrategy:
        if self.screen and self.learnability == "stored":
            raise ValueError("learnability=stored does not read what screening finds: set screen=0")
        return self

    def scored_stage(self, stage: int) -> int:
        return stage - stage % self.rescore_every if self.rescore_every else 0


# By the text


class SimilarityStrategy(StrategyTable):
    """The prompts whose text is most like the validation prompts'."""

    reads_texts: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({"validation"})

    type: Literal["similarity"]
    """Picks this strategy."""
    over: Literal["max", "mean"] = "max"
    """Over a set's validation prompts: the similarity to the nearest, or the mean."""
    learnability: bool = False
    """Multiply by p (1 - p) of the stored trajectories."""

    @property
    def reads_trajectories(self) -> bool:
        return self.learnability


Strategy = Annotated[
    FullStrategy
    | RandomStrategy
    | PassRateStrategy
    | MidStrategy
    | LearnabilityStrategy
    | VcrlStrategy
    | GaussianStrategy
    | DotsStrategy
    | MoppsStrategy
    | GresoStrategy
    | GradientNormStrategy
    | LearnAlignStrategy
    | InfluenceStrategy
    | PooledStrategy
    | SimilarityStrategy,
    Field(discriminator="type"),
]
