"""The policy and the prompts."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cropi.setting_types import Fraction, FreeTable, Positive, Seed, Table

BUILTIN_POLICY = "builtin"


class LoraConfig(Table):
    """Adapters of low rank beside frozen weights (Hu et al. 2021, arXiv 2106.09685): W + (alpha / r) B A."""

    r: Annotated[int, Field(ge=1, le=10_000)] = 16
    """Rank."""
    alpha: Positive = 32
    """Numerator of the scale."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the layers that get one. `all-linear`: every linear layer but the output head."""
    seed: Seed = 0
    """Seed of A; B begins at zero, so the policy begins as it is without adapters."""


class PolicyConfig(Table):
    """The policy to train: the behaviour policy of the stored trajectories and the start of training."""

    path: str
    """`builtin` (the embedded 0.9 M-parameter policy), a local folder in Hugging Face format, or a Hub id."""
    revision: str | None = None
    """Commit or tag of a Hub id. Pin it: an unpinned model cannot be reproduced."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights while collecting, scoring and evaluating."""
    train_dtype: Literal["float32", "bfloat16"] | None = None
    """Number format of the weights that training updates. Unset: float32, as bfloat16 rounds the steps of usual
    learning rates away; matrix products are in bfloat16 where `dtype` is (`trainer.bf16`). Under `lora`: `dtype` for
    what is frozen, and adapters are float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes CUDA where there is one."""
    cpu_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of a computation; torch's choice when unset. A policy of few parameters is fastest with 1."""
    lora: LoraConfig | None = None
    """Train adapters of low rank by PEFT in place of all weights; influence is then that of the adapters' gradients.
    Checkpoints hold the adapters."""

    @model_validator(mode="after")
    def _asked_as_precisely_as_trained(self) -> PolicyConfig:
        if self.dtype == "float32" and self.train_dtype == "bfloat16":
            raise ValueError("train_dtype bfloat16 needs dtype bfloat16: what is trained is what is asked")
        return self

    @property
    def trained_in(self) -> Literal["float32", "bfloat16"]:
        """Number format of the weights that training holds."""
        return self.train_dtype or (self.dtype if self.lora is not None else "float32")


class BuiltinSource(Table):
    """Procedurally generated problems of the built-in families (see `cropi.builtin`)."""

    type: Literal["builtin"]
    """Picks this kind of source."""
    families: tuple[str, ...] = Field(min_length=1)
    """Families to draw from; each becomes the `source` of its prompts."""
    count: Positive
    """Problems per family."""
    seed: Seed | None = None
    """Seed of the problems; the run's `seed` when unset. Train, validation and test never overlap, whatever it is."""
    min_length: Positive | None = None
    """Shortest problem, in items; the family's own default when unset."""
    max_length: Positive | None = None
    """Longest problem, in items; the family's own default when unset."""
    modulus: Positive | None = None
    """Modulus of the families that have one; the family's own default when unset."""
    label_noise: Fraction = 0.0
    """Share of the rows whose recorded answer is wrong."""
    label_rule: Literal["right", "stop_early"] = "right"
    """What is recorded as the answer: the right one, or what one gets who always stops one item early."""
    hint: Fraction = 0.0
    """Share of the worked steps that the prompt gives away, rounded up to a word. At 1 only the answer is left."""


class _RowSource(Table):
    prompt_column: str | None = None
    """Column of the prompt (a string or chat messages). Unset: the first of `prompt`, `question`, `problem`, `messages`
    that any row has. As for answers, rows in which it is empty are never filled from another column."""
    answer_column: str | None = None
    """Column of the gold answer: text, or a finite number. Unset: the first of `reward_model.ground_truth` (verl),
    `answer`, `solution`, `ground_truth` that any row has. A name with a dot reaches into a column of objects."""
    id_column: str | None = None
    """Column of a unique id. Unset: `prompt_id` where present, else a hash of the prompt and answer."""
    source_column: str | None = None
    """Column that names where a prompt comes from. Unset: `source` where present, else the file or dataset name."""
    extra_column: str | None = None
    """Column with an object of further facts, for verifiers that ask for them. Unset: the first of `extra_info` (verl),
    `metadata` (reasoning-gym) that holds one."""
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
    """A local JSONL, JSON, CSV or Parquet file."""

    type: Literal["file"]
    """Picks this kind of source."""
    path: str
    """The file. Its ending decides the format: .jsonl, .json (a list of objects, or one a line), .csv (every value is
    text) or .parquet, in capitals too."""


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


class ReasoningGymSource(Table):
    """Problems that reasoning-gym generates."""

    type: Literal["reasoning_gym"]
    """Picks this kind of source."""
    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of its datasets. Each gives `count` problems."""
    count: Positive
    """Problems of each task."""
    seed: Seed | None = None
    """Seed of the problems; the run's `seed` when unset. Train, validation and test draw differently from one seed."""
    options: FreeTable = Field(default={})
    """Settings of the tasks, as reasoning-gym names them."""


Source = Annotated[BuiltinSource | FileSource | HubSource | ReasoningGymSource, Field(discriminator="type")]


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
    validation: dict[str, Annotated[tuple[Source, ...], Field(min_length=1)]] = Field(min_length=1)
    """One or more validation sets by name: what the training should get better at."""
    test: dict[str, TestSetConfig] = Field(default={})
    """Test sets by name: never used for any decision. A run needs one; a trainer of yours (`cropi.trl`) none."""
    leakage: Literal["refuse", "warn", "allow"] = "refuse"
    """What to do about test prompts that stand in train or validation, and validation prompts that stand in train.
    `refuse` stops at exact duplicates and warns of near ones, `warn` warns of both, `allow` says nothing."""
    duplicates: Literal["refuse", "drop"] = "refuse"
    """What to do about rows of a set that repeat an earlier one, prompt, answer and id: `refuse` counts and names them,
    `drop` warns of what it leaves out."""
    empty: Literal["refuse", "drop"] = "refuse"
    """The same for rows without a prompt, answer or id: null, NaN, blank text."""
    chat: bool | None = None
    """Put prompts as chat messages through the tokenizer's template, text as the user's turn. Unset: yes where the
    tokenizer has one; else chat messages become plain text, of which a warning tells."""
    system_prompt: str | None = None
    """System message put before every chat prompt."""

    @model_validator(mode="after")
    def _names(self) -> PromptsConfig:
        for name in (*self.validation, *self.test):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
                raise ValueError(f"the set name {name!r} may hold up to 100 letters, digits, '.', '_' and '-' only")
        return self
