"""All settings of a run: typed, frozen, unknown keys refused. Free of torch; `make docs` writes docs/config.md."""

from cropi.config.data import (
    BUILTIN_POLICY,
    BuiltinSource,
    FileSource,
    HubSource,
    LoraConfig,
    PolicyConfig,
    PromptsConfig,
    ReasoningGymSource,
    Source,
    TestSetConfig,
)
from cropi.config.run_config import (
    OWNED_TRAINER_KEYS,
    SAMPLED_BY,
    Config,
    EvaluateConfig,
    SelectConfig,
    TrainConfig,
    config_difference,
    config_hash,
    deciding,
)
from cropi.config.score_config import CollectConfig, ScoreConfig, ServerConfig
from cropi.curriculum.strategies import Strategy, StrategyTable
from cropi.curriculum.strategy import FusionConfig
from cropi.rewards.verifier import VerificationConfig
from cropi.rewards.verifiers import Verifier
from cropi.setting_types import Fraction, NonNegative, Positive, Table

__all__ = [
    "BUILTIN_POLICY",
    "OWNED_TRAINER_KEYS",
    "SAMPLED_BY",
    "BuiltinSource",
    "CollectConfig",
    "Config",
    "EvaluateConfig",
    "FileSource",
    "Fraction",
    "FusionConfig",
    "HubSource",
    "LoraConfig",
    "NonNegative",
    "PolicyConfig",
    "Positive",
    "PromptsConfig",
    "ReasoningGymSource",
    "ScoreConfig",
    "SelectConfig",
    "ServerConfig",
    "Source",
    "Strategy",
    "StrategyTable",
    "Table",
    "TestSetConfig",
    "TrainConfig",
    "VerificationConfig",
    "Verifier",
    "config_difference",
    "config_hash",
    "deciding",
]
