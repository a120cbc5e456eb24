"""Every setting of a run: typed, frozen, unknown keys refused. Free of torch; `make docs` writes docs/config.md."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cropi.errors import ConfigError

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
    shard_prompts: Positive = 128
    """Prompts per shard: what an interruption can cost."""


class ProjectionConfig(Table):
    """The sparse random projection of a gradient."""

    keep_fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Share of all coordinates kept, uniformly over the whole range (paper: 0.1)."""
    dim: Positive = 32768
    """D, length of a gradient feature (paper: 32,768)."""
    seed: int = 0
    """Seed of the mask, the buckets and the signs."""


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
    batch_tokens: Positive = 8192
    """Padded tokens per forward pass of a group; a larger group is split and its gradients are added."""
    projection: ProjectionConfig = ProjectionConfig()
    """How a gradient becomes a feature."""


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


class _YamlLoader(yaml.SafeLoader):
    """YAML with the numbers and booleans of YAML 1.2: `1e-4` is a number, `on` is a string; repeated keys refused."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} occurs twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


_YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":float", ":int", ":bool", ":timestamp"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_YamlLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.inf$|^\.nan$"),
    list("-+0123456789."),
)

# PyYAML itself reads a leading zero as octal.
_YamlLoader.add_constructor("tag:yaml.org,2002:int", lambda _, node: int(node.value))


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text; `where` names it in errors."""
    try:
        return yaml.load(text, Loader=_YamlLoader)  # noqa: S506 - a subclass of SafeLoader
    except yaml.YAMLError as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"not valid YAML: {text}", where=where, fix="correct the line named.") from None


def recipe_names() -> list[str]:
    """Names of the recipes in the package."""
    return sorted(
        entry.name[:-5] for entry in resources.files("cropi.recipes").iterdir() if entry.name.endswith(".yaml")
    )


def recipe_text(name: str) -> str:
    """A recipe as it is written."""
    return (resources.files("cropi.recipes") / f"{name}.yaml").read_text(encoding="utf-8")


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """Read a recipe by name or a YAML file by path, apply `key.path=value` overrides, and validate.

    Raises ConfigError naming the key at fault and the closest valid one.
    """
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        try:
            text, where = path.read_text(encoding="utf-8"), str(path)
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot be read ({error})", where=str(path), fix="check the path.") from None
    elif name_or_path in recipe_names():
        text, where = recipe_text(name_or_path), f"recipe {name_or_path}"
    else:
        raise ConfigError(
            f"there is no config file and no recipe named {name_or_path!r}",
            fix=f"give a .yaml file or one of the recipes: {', '.join(recipe_names())}.",
        )
    values = parse_yaml(text, where)
    if not isinstance(values, dict):
        raise ConfigError("the config must be a mapping of settings", where=where, fix="see `cropi recipes copy`.")
    for override in overrides:
        _apply_override(values, override)
    return validate_config(values, where)


def _apply_override(values: dict[str, Any], override: str) -> None:
    """Set one `key.path=value`; a part of the path may be a position in a list."""
    where = f"override {override!r}"
    path, equals, text = override.partition("=")
    parts = path.split(".")
    if not equals or not all(parts):
        raise ConfigError("an override is written key.path=value", where=where, fix="for example seed=1.")
    target: Any = values
    for part in parts[:-1]:
        target = target.setdefault(part, {}) if isinstance(target, dict) else target[_position(target, part, where)]
    if isinstance(target, dict):
        target[parts[-1]] = parse_yaml(text, where)
    else:
        target[_position(target, parts[-1], where)] = parse_yaml(text, where)


def _position(target: Any, part: str, where: str) -> int:
    if not isinstance(target, list):
        raise ConfigError(f"{target!r} is a single value, it has no key {part!r}", where=where, fix="shorten the key.")
    if not part.isdigit() or int(part) >= len(target):
        raise ConfigError(f"{part!r} is no position in a list of {len(target)}", where=where, fix="count from 0.")
    return int(part)


def validate_config(values: Mapping[str, Any], where: str) -> Config:
    """The typed config of plain values."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False)
        # A list whose only entry is faulty is reported as too short as well; the entry's own fault says it all.
        blamed = [
            p for p in problems if not any(q["loc"][: len(p["loc"])] == p["loc"] and q is not p for q in problems)
        ]
        lines = dict.fromkeys(_explain(problem) for problem in blamed)
        raise ConfigError("; ".join(lines), where=where, fix="see docs/config.md or `cropi recipes copy`.") from None


def _explain(problem: Any) -> str:
    """One pydantic problem in a user's words: the key, what is wrong with it, the nearest valid spelling."""
    parts, kind = problem["loc"], problem["type"]
    shown, tables = _walk(parts)
    key = ".".join(shown) or "the config"
    if kind == "extra_forbidden":
        known = sorted({field for table in tables for field in table.model_fields})
        return f"unknown key {key} - {_hint(str(parts[-1]), known, 'keys here')}"
    if kind == "missing":
        return f"{key} is missing"
    if kind == "union_tag_not_found":
        return f"{key}.type is missing"
    if kind == "union_tag_invalid":
        options, tag = re.findall(r"'([^']+)'", problem["ctx"]["expected_tags"]), problem["ctx"]["tag"]
        return f"{key}.type is {tag!r}, which is unknown - {_hint(tag, options, 'types')}"
    if kind == "value_error":
        return f"{key}: {problem['ctx']['error']}"
    return f"{key} is {problem['input']!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _hint(word: str, known: Sequence[str], noun: str) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else f"known {noun}: {', '.join(known)}"


def _walk(parts: Sequence[Any]) -> tuple[list[str], list[type[BaseModel]]]:
    """An error path as the user wrote it, without pydantic's union tags, and the tables that may hold its last part."""
    shown: list[str] = []
    tables: list[type[BaseModel]] = [Config]
    for index, part in enumerate(parts):
        tagged = [table for table in tables if _tag(table) == part]
        if tagged and index < len(parts) - 1:
            tables = tagged
            continue
        shown.append(str(part))
        inner = [m for t in tables if part in t.model_fields for m in _tables_in(t.model_fields[part].annotation)]
        if inner and index < len(parts) - 1:
            tables = inner
    return shown, tables


def _tag(table: type[BaseModel]) -> str | None:
    field = table.model_fields.get("type")
    return get_args(field.annotation)[0] if field else None


def _tables_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [table for argument in get_args(annotation) for table in _tables_in(argument)]


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
