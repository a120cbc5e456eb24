"""All settings of a run: typed, frozen, unknown keys refused. Free of torch; `make docs` writes docs/config.md."""

from cropi.config.data import BUILTIN_POLICY as BUILTIN_POLICY
from cropi.config.data import BuiltinSource as BuiltinSource
from cropi.config.data import FileSource as FileSource
from cropi.config.data import HubSource as HubSource
from cropi.config.data import LoraConfig as LoraConfig
from cropi.config.data import PolicyConfig as PolicyConfig
from cropi.config.data import PromptsConfig as PromptsConfig
from cropi.config.data import ReasoningGymSource as ReasoningGymSource
from cropi.config.data import Source as Source
from cropi.config.run_config import OWNED_TRAINER_KEYS as OWNED_TRAINER_KEYS
from cropi.config.run_config import SAMPLED_BY as SAMPLED_BY
from cropi.config.run_config import Config as Config
from cropi.config.run_config import EvaluateConfig as EvaluateConfig
from cropi.config.run_config import ScoreConfig as ScoreConfig
from cropi.config.run_config import ServerConfig as ServerConfig
from cropi.config.run_config import config_difference as config_difference
from cropi.config.run_config import config_hash as config_hash
from cropi.config.run_config import deciding as deciding
from cropi.curriculum.strategies import Strategy as Strategy
from cropi.curriculum.strategies import StrategyTable as StrategyTable
from cropi.curriculum.strategy import FusionConfig as FusionConfig
from cropi.rewards.verifier import VerificationConfig as VerificationConfig
from cropi.rewards.verifiers import Verifier as Verifier
