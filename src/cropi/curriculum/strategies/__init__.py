"""Strategies, one file each: its settings and how it ranks prompts. A new one needs its file and an import here."""

from typing import TYPE_CHECKING, Annotated, Union

from pydantic import Field

from cropi.curriculum.strategies.bmc import BmcStrategy as BmcStrategy
from cropi.curriculum.strategies.bots import BotsStrategy as BotsStrategy
from cropi.curriculum.strategies.dots import DotsStrategy as DotsStrategy
from cropi.curriculum.strategies.full import FullStrategy as FullStrategy
from cropi.curriculum.strategies.gaussian import GaussianStrategy as GaussianStrategy
from cropi.curriculum.strategies.gradient_norm import GradientNormStrategy as GradientNormStrategy
from cropi.curriculum.strategies.influence import InfluenceStrategy as InfluenceStrategy
from cropi.curriculum.strategies.learnability import LearnabilityStrategy as LearnabilityStrategy
from cropi.curriculum.strategies.learnalign import LearnAlignStrategy as LearnAlignStrategy
from cropi.curriculum.strategies.lze import LzeStrategy as LzeStrategy
from cropi.curriculum.strategies.mid import MidStrategy as MidStrategy
from cropi.curriculum.strategies.mopps import MoppsStrategy as MoppsStrategy
from cropi.curriculum.strategies.online import OnlineStrategy as OnlineStrategy
from cropi.curriculum.strategies.pass_rate import PassRateStrategy as PassRateStrategy
from cropi.curriculum.strategies.pooled import PooledStrategy as PooledStrategy
from cropi.curriculum.strategies.random import RandomStrategy as RandomStrategy
from cropi.curriculum.strategies.similarity import SimilarityStrategy as SimilarityStrategy
from cropi.curriculum.strategies.similarity_learnability import (
    SimilarityLearnabilityStrategy as SimilarityLearnabilityStrategy,
)
from cropi.curriculum.strategies.thompson import ThompsonStrategy as ThompsonStrategy
from cropi.curriculum.strategies.vcrl import VcrlStrategy as VcrlStrategy
from cropi.curriculum.strategy import StrategyTable as StrategyTable

STRATEGIES: tuple[type[StrategyTable], ...] = tuple(StrategyTable.__subclasses__())

if TYPE_CHECKING:
    Strategy = StrategyTable
else:
    Strategy = Annotated[Union[STRATEGIES], Field(discriminator="type")]  # noqa: UP007 - a union of a tuple
