"""Every setting of a run: typed, frozen, unknown keys refused. Free of torch; `make docs` writes docs/config.md."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

BUILTIN_POLICY = "builtin"


class Table(BaseModel):
    """A frozen table of settings that refuses unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)


Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]


class PolicyConfig(Table):
    """The policy to train: the behaviour policy of the stored trajectories and the start of training."""

    path: str
    """`builtin` (the embedded 0.9 M-parameter policy), a local folder in Hugging Face format, or a Hub id."""
    revision: str | None = None
    """Commit or tag of a Hub id. Pin it: an unpinned model cannot be reproduced."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights while collecting, scoring and training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    cpu_threads: Positive | None = None
    """CPU threads of a computation; torch's choice when unset. A policy of few parameters is fastest with 1."""


class BuiltinSource(Table):
    """Procedurally generated problems of the built-in families (see `cropi.builtin`)."""

    type: Literal["builtin"]
    """Picks this kind of source."""
    families: tuple[str, ...] = Field(min_length=1)
    """Families to draw from; each becomes the `source` of its prompts."""
    count: Positive
    """Problems per family."""
    seed: int = 0
    """Seed of the problems. Train, validation and test never overlap, whatever the seeds."""
    min_length: Positive | None = None
    """Shortest problem, in items; the family's own default when unset."""
    max_length: Positive | None = None
    """Longest problem, in items; the family's own default when unset."""
    modulus: Positive | None = None
    """Modulus of the families that have one; the family's own default when unset."""
    label_noise: Fraction = 0.0
    """Share of the rows whose recorded answer is wrong."""


class _RowSource(Table):
    prompt_column: str | None = None
    """Column of the prompt (a string or chat messages). Unset: the first of `prompt`, `question`, `problem`."""
    answer_column: str | None = None
    """Column of the gold answer. Unset: the first of `answer`, `solution`, `ground_truth`."""
    id_column: str | None = None
    """Column of a unique id. Unset: `prompt_id` where present, else a hash of the prompt and answer."""
    source_column: str | None = None
    """Column that names where a prompt comes from. Unset: `source` where present, else the file or dataset name."""
    hash_range: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Keep the rows whose id hashes into [low, high): disjoint ranges split one file into disjoint sets."""
    limit: Positive | None = None
    """Keep at most this many rows, the first in hash order: a fixed random subset."""

    @model_validator(mode="after")
    def _ordered_range(self) -> _RowSource:
        if self.hash_range[0] >= self.hash_range[1]:
            raise ValueError(f"hash_range {list(self.hash_range)} must be [low, high] with low below high")
        return self


class FileSource(_RowSource):
    """A local JSONL or Parquet file."""

    type: Literal["file"]
    """Picks this kind of source."""
    path: str
    """The file. Its ending decides the format: .jsonl or .parquet."""


class HubSource(_RowSource):
    """A dataset of the Hugging Face Hub."""

    type: Literal["hub"]
    """Picks this kind of source."""
    dataset: str
    """The dataset's Hub id."""
    revision: str | None = None
    """Commit or tag. Pin it: an unpinned dataset cannot be reproduced."""
    name: str | None = None
    """The dataset's configuration, where it has several."""
    split: str = "train"
    """The dataset's split."""


Source = Annotated[BuiltinSource | FileSource | HubSource, Field(discriminator="type")]


class TestSetConfig(Table):
    """One test set."""

    sources: tuple[Source, ...] = Field(min_length=1)
    """Where its prompts come from."""
    targeted: bool = True
    """True for the skill the validation sets stand for; false for one that must not get worse."""


class PromptsConfig(Table):
    """Where prompts come from and how they are put to the policy."""

    train: tuple[Source, ...] = Field(min_length=1)
    """The pool to select from."""
    validation: dict[str, tuple[Source, ...]] = Field(min_length=1)
    """One or more validation sets by name: what the training should get better at."""
    test: dict[str, TestSetConfig] = Field(min_length=1)
    """Test sets by name: never used for any decision."""
    chat: bool | None = None
    """Put prompts as chat messages through the tokenizer's template. Unset: yes where the tokenizer has one."""
    system_prompt: str | None = None
    """System message put before every chat prompt."""

    @model_validator(mode="after")
    def _names(self) -> PromptsConfig:
        for name in (*self.validation, *self.test):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
                raise ValueError(f"the set name {name!r} may hold letters, digits, '.', '_' and '-' only")
        return self


class ExactVerifier(Table):
    """Right when the text after the last marker equals the answer, white space aside."""

    type: Literal["exact"]
    """Picks this verifier."""
    marker: Annotated[str, Field(min_length=1)] | None = None
    """The answer stands after the last occurrence of this text. Unset: the whole completion is the answer."""


class NumericVerifier(Table):
    """Right when the last number of the completion equals the answer."""

    type: Literal["numeric"]
    """Picks this verifier."""
    tolerance: Annotated[float, Field(ge=0)] = 1e-6
    """Largest difference that still counts as equal, relative to max(1, |gold|)."""


class Gsm8kVerifier(Table):
    """Right when the number after the last `####` equals the one after the gold's last `####`."""

    type: Literal["gsm8k"]
    """Picks this verifier."""


Verifier = Annotated[ExactVerifier | NumericVerifier | Gsm8kVerifier, Field(discriminator="type")]


class CollectConfig(Table):
    """Trajectories, sampled once from the base policy."""

    num_generations: Annotated[int, Field(ge=2)] = 8
    """K, completions per training prompt (paper: 8)."""
    validation_num_generations: Annotated[int, Field(ge=2)] = 32
    """Completions per validation prompt (paper's code: 32)."""
    max_completion_length: Positive
    """Longest completion, in tokens."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Sampling temperature; the importance ratio is taken at the same one. 1 keeps the behaviour policy exact."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus mass. Below 1 the stored log-probs are not those of the sampler, and a warning says so."""
    batch_size: Positive = 256
    """Sequences generated at once; halved by itself when memory runs out."""
    batch_tokens: Positive = 8192
    """Padded tokens per forward pass when the behaviour log-probs are computed."""
    shard_prompts: Positive = 128
    """Prompts per shard: what an interruption can cost."""


class ProjectionConfig(Table):
    """The sparse random projection of a gradient."""

    mask: Literal["structured", "uniform"] = "structured"
    """What is kept. `structured`: of each layer a few directions and random columns, at a third of the extra cost;
    `uniform`: each coordinate by chance, as the paper has it. See docs/decisions/projection.md."""
    keep_fraction: Annotated[float, Field(gt=0, le=1)] = 0.03
    """Share of the coordinates kept. The paper keeps 0.1 by its uniform mask, which needs them: give both."""
    rank: Annotated[int, Field(ge=0)] = 8
    """Structured mask: input directions of each layer that are kept in full."""
    row_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Structured mask: share of each layer's rows kept; the columns' is keep_fraction / row_fraction."""
    dim: Positive = 32768
    """D, length of a gradient feature (paper: 32,768)."""
    seed: int = 0
    """Seed of the mask, the buckets and the signs."""


class BudgetConfig(Table):
    """What scoring may leave out; by default nothing. What each option loses: docs/decisions/budget.md."""

    trajectories: Annotated[int, Field(ge=2)] | None = None
    """Trajectories of each group that are scored at first, half of them with positive advantage."""
    contenders: Fraction | None = None
    """Share of the pool that is then scored in full: those that rank best so far. Needs `trajectories`."""
    rescore: bool = False
    """After the first stage, score only prompts whose last score could still bring them to the cut."""

    @property
    def active(self) -> bool:
        """Whether anything is left out."""
        return self.trajectories is not None or self.rescore

    @model_validator(mode="after")
    def _contenders_of_something(self) -> BudgetConfig:
        if self.contenders is not None and self.trajectories is None:
            raise ValueError("contenders needs trajectories: without, every prompt is scored in full already")
        return self


class ScoreConfig(Table):
    """Influence of every training prompt on every validation set, at the current policy."""

    normalizer: Literal["auto", "sequence", "token", "constant"] = "auto"
    """What a prompt's surrogate is divided by. `auto` matches the trainer's loss; see docs/decisions."""
    score: Literal["dot", "cosine"] = "dot"
    """`dot` is the first-order gain of a step along the prompt's gradient; `cosine` is what the paper's runs use."""
    advantage_std: bool | Literal["auto"] = "auto"
    """Divide advantages by the group's standard deviation (GRPO). `auto` follows `trainer.scale_rewards`."""
    validation_mean: Literal["plain", "normalized"] = "plain"
    """Mean of the validation features as they are, or each scaled to length 1 first."""
    max_validation_prompts: Positive = 100
    """Validation prompts used per set, a fixed random choice (paper's code: 100)."""
    estimator: Literal["sketch", "exact", "reference"] = "sketch"
    """How gradients meet the validation sets: projected, without projection, or by autograd one prompt at a time."""
    batch_tokens: Positive | None = None
    """Tokens of a forward pass; a larger group is split and its gradients are added. Unset: what memory allows."""
    store: Literal["none", "bfloat16", "float32"] = "none"
    """Keep the gradient features beside the scores, in this type. Needs the sketch estimator."""
    budget: BudgetConfig = BudgetConfig()
    """Scoring for less."""
    projection: ProjectionConfig = ProjectionConfig()
    """How a gradient becomes a feature."""

    @model_validator(mode="after")
    def _store_needs_features(self) -> ScoreConfig:
        if self.store != "none" and self.estimator != "sketch":
            raise ValueError(f"store={self.store} needs estimator=sketch: {self.estimator} makes no features")
        if self.store != "none" and self.budget.active:
            raise ValueError(f"store={self.store} needs features of every prompt, which score.budget leaves out")
        if self.budget.trajectories is not None and self.estimator == "reference":
            raise ValueError("budget.trajectories needs estimator=sketch or exact")
        return self


class FusionConfig(Table):
    """Reciprocal Rank Fusion over validation sets: sum over sets of 1 / (kappa + rank)."""

    kappa: Annotated[float, Field(ge=0)] = 60.0
    """Larger values even out the head of the lists (60: Cormack et al. 2009; the paper's code: 0)."""
    truncate: bool = False
    """Rank only the first ceil(fraction N) of each list; others add nothing (the paper's code: true, with floor)."""


class FullStrategy(Table):
    """Every prompt, every stage."""

    type: Literal["full"]
    """Picks this strategy."""


class RandomStrategy(Table):
    """A uniformly random subset."""

    type: Literal["random"]
    """Picks this strategy."""
    redraw: bool = False
    """Draw a new subset at every stage instead of one for the whole run."""


class PassRateStrategy(Table):
    """Random prompts among those whose stored pass rate lies in a band."""

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


class LearnabilityStrategy(Table):
    """The prompts with the largest p (1 - p)."""

    type: Literal["learnability"]
    """Picks this strategy."""
    rescore: bool = False
    """Take p from the newest training rewards of a prompt where it has been trained on."""


class InfluenceStrategy(Table):
    """The prompts whose off-policy gradient points most along the validation sets' (CROPI)."""

    type: Literal["influence"]
    """Picks this strategy."""
    static: bool = False
    """Score once, at the base policy, instead of at every stage."""


Strategy = Annotated[
    FullStrategy | RandomStrategy | PassRateStrategy | LearnabilityStrategy | InfluenceStrategy,
    Field(discriminator="type"),
]


class SelectConfig(Table):
    """Which prompts a stage trains on."""

    strategy: Strategy
    """The strategy of the main arm."""
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Alpha: ceil(alpha N) prompts are selected (paper: 0.1)."""
    fusion: FusionConfig = FusionConfig()
    """How the rankings of several validation sets become one."""
    exploration: Fraction = 0.0
    """Share of the selection drawn at random from the prompts the strategy left out, those without signal included."""
    quotas: dict[str, Fraction] = {}
    """Largest share of a selection that a source may take, by source: floor(share x size) places, at least one."""


class TrainConfig(Table):
    """Stages of GRPO. An epoch of the trainer is a stage."""

    stages: Positive
    """How often prompts are selected (paper: 5)."""
    steps_per_stage: Positive
    """Optimiser steps per stage (paper: 200)."""


class EvaluateConfig(Table):
    """Evaluation during and after training."""

    every: Positive | None = None
    """Steps between evaluations. Unset: at the end of every stage."""
    samples: NonNegative = 0
    """n of avg@n: sampled completions per prompt beside the greedy one. 0: greedy only."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Temperature of the sampled completions."""
    bootstrap: Positive = 2000
    """Redraws over questions behind each interval."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Coverage of the intervals."""


class Config(Table):
    """One run: a policy, prompts, and the arms to train on them."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run; its folder is `run_dir`/`name`."""
    run_dir: str = "runs"
    """Folder that holds runs."""
    seed: int = 0
    """Seed of sampling, selection and training."""
    policy: PolicyConfig
    """The policy."""
    prompts: PromptsConfig
    """The data."""
    verifier: Verifier
    """How a completion is judged."""
    collect: CollectConfig
    """Trajectory collection."""
    score: ScoreConfig = ScoreConfig()
    """Influence."""
    select: SelectConfig
    """Selection."""
    train: TrainConfig
    """Stages."""
    trainer: dict[str, Any] = {}
    """Settings of TRL's GRPOConfig under TRL's own names. Those that belong to a run are set by it and refused here."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Evaluation."""
    baselines: tuple[Strategy, ...] = ()
    """Further strategies trained on the same prompts, trajectories and number of steps, for comparison."""

    @model_validator(mode="after")
    def _arms(self) -> Config:
        names = [strategy.type for strategy in (self.select.strategy, *self.baselines)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"{', '.join(twice)} is named twice by select.strategy and baselines: drop one, e.g. baselines=[]"
            )
        return self

    @model_validator(mode="after")
    def _enough_contenders(self) -> Config:
        contenders = self.score.budget.contenders
        if contenders is not None and contenders < self.select.fraction:
            raise ValueError(
                f"score.budget.contenders ({contenders}) is below select.fraction ({self.select.fraction})"
            )
        return self

    @property
    def arms(self) -> dict[str, Any]:
        """The strategies to train, the main one first, by name."""
        return {strategy.type: strategy for strategy in (self.select.strategy, *self.baselines)}

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.run_dir) / self.name

    def resolved(self) -> dict[str, Any]:
        """Every setting, defaults included, as plain JSON values."""
        return self.model_dump(mode="json")


# Settings of GRPOConfig that a run decides itself, with the place where the user does so.
OWNED_TRAINER_KEYS: dict[str, str] = {
    "output_dir": "run_dir and name",
    "max_steps": "train.stages and train.steps_per_stage",
    "num_train_epochs": "train.stages",
    "seed": "seed",
    "data_seed": "seed",
    "temperature": "collect.temperature",
    "top_p": "collect.top_p",
    "chat_template_kwargs": "nothing: prompts are encoded by the template's defaults",
    "save_only_model": "nothing: a run without the optimiser's state cannot go on",
    "ignore_data_skip": "nothing: a resumed run goes on with the next batch",
    "max_completion_length": "collect.max_completion_length",
    "shuffle_dataset": "nothing: a stage is always shuffled by seed",
    "eval_strategy": "evaluate.every",
    "resume_from_checkpoint": "nothing: the same command resumes",
    "remove_unused_columns": "nothing",
    "dataloader_num_workers": "nothing",
    "do_train": "nothing",
    "do_eval": "nothing",
}


def config_hash(values: Any) -> str:
    """SHA-256 of JSON values in canonical form."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def config_difference(before: Any, after: Any, prefix: str = "") -> list[str]:
    """Lines `key: before -> after` for every setting that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        lines: list[str] = []
        for key in sorted({*before, *after}):
            lines += config_difference(before.get(key), after.get(key), f"{prefix}.{key}" if prefix else key)
        return lines
    return [] if before == after else [f"{prefix}: {json.dumps(before)} -> {json.dumps(after)}"]
