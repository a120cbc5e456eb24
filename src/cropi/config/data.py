"""The policy and the prompts."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from cropi.setting_types import Fraction, FreeTable, Positive, Seed, Table

BUILTIN_POLICY = "builtin"


class LoraConfig(Table):
    """LoRA: low-rank adapters beside frozen weights (Hu et al. 2021, arXiv 2106.09685): W + (alpha / r) B A."""

    r: Annotated[int, Field(ge=1, le=10_000)] = 16
    """Rank."""
    alpha: Positive = 32
    """Numerator of the scale."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names of the layers with adapters. `all-linear`: every linear layer except the output head."""


class PolicyConfig(Table):
    """The policy to train: the behaviour policy of the stored trajectories and the start of training."""

    path: str
    """`builtin` (the embedded 0.9 M-parameter policy), a local folder in Hugging Face format, or a Hub id."""
    revision: str | None = None
    """Commit or tag of a Hub id. Pin it: an unpinned model cannot be reproduced."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of the weights while collecting, scoring and evaluating, and of frozen ones. Trained weights are
    float32; matrix products of training follow this setting (`trainer.bf16`)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA if available."""
    cpu_threads: Annotated[int, Field(ge=1, le=1024)] | None = None
    """CPU threads of a computation. Unset: torch's choice. Small policies are fastest with 1."""
    lora: LoraConfig | None = None
    """Train low-rank adapters with PEFT instead of all weights. Influence then comes from the adapters' gradients, and
    checkpoints hold only the adapters."""

    @property
    def trained_in(self) -> Literal["float32", "bfloat16"]:
        """Number format of the weights while they are trained: bfloat16 rounds updates of usual learning rates away.

        With `lora`, that of the frozen weights; adapters are float32.
        """
        return self.dtype if self.lora is not None else "float32"


class BuiltinSource(Table):
    """Procedurally generated problems of the built-in families (see `cropi.builtin`)."""

    type: Literal["builtin"]
    families: tuple[str, ...] = Field(min_length=1)
    """Families to draw from; each becomes the `source` of its prompts."""
    count: Positive
    """Problems per family."""
    seed: Seed | None = None
    """Seed of the problems. Unset: the run's `seed`. Train, validation and test never overlap."""
    min_length: Positive | None = None
    """Shortest problem, in items. Unset: the family's default."""
    max_length: Positive | None = None
    """Longest problem, in items. Unset: the family's default."""
    label_noise: Fraction = 0.0
    """Share of the rows whose recorded answer is wrong."""
    label_rule: Literal["right", "stop_early"] = "right"
    """The recorded answer: the right one, or the result of always stopping one item early."""
    hint: Fraction = 0.0
    """Share of the worked steps that the prompt shows, rounded up to a word. With 1 only the answer is left."""
    distractors: Annotated[int, Field(ge=0, le=1_000)] = 0
    """Words behind the family's name that say nothing: names of other families. With 40, similarity of texts no longer
    tells families apart, and the built-in policy solves nearly as many."""


class _RowSource(Table):
    prompt_column: str | None = None
    """Column of the prompt (a string or chat messages). Unset: the first of `prompt`, `question`, `problem`, `messages`
    that any row has. Rows in which it is empty are never filled from another column; likewise for answers."""
    answer_column: str | None = None
    """Column of the gold answer: text, or a finite number. Unset: the first of `reward_model.ground_truth` (verl),
    `answer`, `solution`, `ground_truth` that any row has. A name with a dot reaches into a column of objects."""
    id_column: str | None = None
    """Column of a unique id. Unset: `prompt_id` if present, else a hash of the prompt and answer."""
    hash_range: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Keep the rows whose id hashes into [low, high): disjoint ranges split one file into disjoint sets."""

    @model_validator(mode="after")
    def _ordered_range(self) -> _RowSource:
        if self.hash_range[0] >= self.hash_range[1]:
            raise ValueError(f"hash_range {list(self.hash_range)} must be [low, high] with low below high")
        return self


class FileSource(_RowSource):
    """A local JSONL, JSON, CSV or Parquet file."""

    type: Literal["file"]
    path: str
    """The file. Its suffix sets the format: .jsonl, .json (a list of objects, or one a line), .csv (all text)
    or .parquet."""


class HubSource(_RowSource):
    """A dataset of the Hugging Face Hub."""

    type: Literal["hub"]
    dataset: str
    """The dataset's Hub id."""
    revision: str | None = None
    """Commit or tag. Pin it: an unpinned dataset cannot be reproduced."""
    name: str | None = None
    """The dataset's configuration, if it has several."""
    split: str = "train"
    """The dataset's split."""


class ReasoningGymSource(Table):
    """Problems that reasoning-gym generates."""

    type: Literal["reasoning_gym"]
    tasks: tuple[str, ...] = Field(min_length=1)
    """Names of its datasets. Each gives `count` problems."""
    count: Positive
    """Problems of each task. The run's `seed` draws them; train, validation and test draw differently."""
    options: FreeTable = Field(default={})
    """Settings of the tasks, under reasoning-gym's names."""


Source = Annotated[BuiltinSource | FileSource | HubSource | ReasoningGymSource, Field(discriminator="type")]


class TestSetConfig(Table):
    """One test set."""

    sources: tuple[Source, ...] = Field(min_length=1)
    """Sources of its prompts."""
    targeted: bool = True
    """True: a skill that the validation sets stand for. False: a skill that must not get worse."""


class PromptsConfig(Table):
    """Sources of prompts, and their format for the policy."""

    train: tuple[Source, ...] = Field(min_length=1)
    """The pool to select from."""
    validation: dict[str, Annotated[tuple[Source, ...], Field(min_length=1)]] = Field(min_length=1)
    """One or more validation sets by name: the skills to improve."""
    test: dict[str, TestSetConfig] = Field(default={})
    """Test sets by name, never used for a decision. A run needs one; your own trainer (`cropi.trl`) does not."""
    leakage: Literal["refuse", "warn", "allow"] = "refuse"
    """Leakage: test prompts that are also in train or validation, and validation prompts in train. `refuse` stops at
    exact duplicates and warns of near ones, `warn` warns of both, `allow` ignores both."""
    duplicates: Literal["refuse", "drop"] = "refuse"
    """Rows that repeat the prompt, answer and id of an earlier row of their set: `refuse` stops and lists them, `drop`
    removes them with a warning."""
    empty: Literal["refuse", "drop"] = "refuse"
    """The same for rows without a prompt, answer or id (null, NaN or blank text)."""
    chat: bool | None = None
    """Apply the tokenizer's chat template; text becomes the user's turn. Unset: yes if the tokenizer has a template; if
    not, chat messages become plain text, with a warning."""
    system_prompt: str | None = None
    """System message before every chat prompt."""

    @model_validator(mode="after")
    def _names(self) -> PromptsConfig:
        for name in (*self.validation, *self.test):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
                raise ValueError(f"the set name {name!r} may hold up to 100 letters, digits, '.', '_' and '-' only")
        return self
