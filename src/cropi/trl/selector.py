"""How the prompts of a stage are chosen, and the config of a run that says the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from cropi.artifacts import write_text
from cropi.config import SCRIPT_REWARDS, Config
from cropi.errors import ConfigError, DataError
from cropi.loading import validate_config
from cropi.presets import merged, preset, with_presets
from cropi.prompts import checked_messages, content_id, refuse_unseen
from cropi.trl.wording import worded

if TYPE_CHECKING:
    from trl import GRPOConfig

PROMPT_ID = "prompt_id"  # the column by which a row of a dataset is known again
VALIDATION = "validation"  # the name of a set that is given without one
NO_ANSWER = "(none)"  # where rows record no answer: the reward function reads their columns itself


@dataclass(frozen=True)
class Selector:
    """Which prompts each stage of a `CurriculumTrainer` trains on.

    At the start of the first stage the policy answers a part of the training prompts and the validation prompts, the
    reward function judges, and the strategy chooses; the trainer then sees the chosen prompts only, until the next
    stage begins. Everything is kept in `folder`, and a resumed training goes on with the same selections.
    """

    validation: Dataset | Mapping[str, Dataset]
    """What training should get better at: rows like those of the training set, and none of them in it."""
    strategy: str | Mapping[str, Any] = "cropi"
    """A preset by name, or a patch of a config as in `cropi compare`: `select`, `score`, `collect`, `refresh`."""
    fraction: float | None = None
    """Share of the training prompts that a stage trains on, at the most. Unset: the strategy's own, else 0.1."""
    stages: int = 5
    """How often prompts are chosen, evenly over the steps of the training; less often where these are too few."""
    success: int | str | Callable[..., Sequence[float | None]] | None = None
    """The reward function that says whether a completion is right: its place or name among the trainer's, or another
    function of that form. Unset: the trainer's, if it has one only. Prompts are chosen by it; the rewards of training
    stay those of the trainer."""
    threshold: float = 0.5
    """Its value from which a completion is right."""
    graded: bool = False
    """Choose by its values themselves, which must lie from 0 to 1, rather than by right and wrong."""
    folder: str | Path | None = None
    """Where trajectories, scores and selections are kept. Unset: `_curriculum` in the trainer's output folder,
    which is never uploaded."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further settings, laid over all others: `{"collect": {"batch_size": 64}}`."""

    def __post_init__(self) -> None:
        if isinstance(self.strategy, str):
            with worded():
                preset(self.strategy, "Selector.strategy")
        if self.graded and not 0 < self.threshold <= 1:
            raise ConfigError(
                f"no grade reaches {self.threshold:g}"
                if self.threshold > 1
                else f"every grade reaches {self.threshold:g}",
                where="Selector.threshold",
                fix="give a value above 0, and at most 1.",
            )

    @property
    def places(self) -> dict[str, str]:
        """The argument that each set is given by, by the name of the set."""
        several = isinstance(self.validation, Mapping)
        names = {n: f"Selector.validation[{n!r}]" if several else "Selector.validation" for n in self.validation_sets}
        return {"train": "train_dataset"} | {f"validation/{name}": place for name, place in names.items()}

    @property
    def validation_sets(self) -> dict[str, Dataset]:
        """The validation sets by name."""
        return dict(self.validation) if isinstance(self.validation, Mapping) else {VALIDATION: self.validation}


def _check_columns(dataset: Dataset, where: str) -> None:
    if "prompt" not in dataset.column_names:
        raise DataError(
            f"there is no column `prompt`; the columns are {', '.join(dataset.column_names)}",
            where=where,
            fix="name it as TRL does.",
        )


def prompt_ids(dataset: Dataset, where: str) -> list[str]:
    """An id for every row: its `prompt_id`, else a hash of its prompt and answer and how often these came before."""
    _check_columns(dataset, where)
    if PROMPT_ID in dataset.column_names:
        ids = [str(value) for value in dataset[PROMPT_ID]]
        if len(set(ids)) < len(ids):
            raise DataError(
                "two rows have the same prompt_id", where=where, fix="make them differ, or drop the column."
            )
        return ids
    seen: dict[str, int] = {}
    ids = []
    for row in dataset:
        known = content_id(json.dumps(row["prompt"], default=str), answer_of(row))
        seen[known] = seen.get(known, 0) + 1
        ids.append(known if seen[known] == 1 else f"{known}-{seen[known]}")
    return ids


def answer_of(row: Mapping[str, Any]) -> str:
    """What a row says is right, where it says so in a usual column."""
    for name in ("answer", "solution", "ground_truth"):
        if row.get(name) is not None:
            return str(row[name])
    return ""


def are_chat(sets: Mapping[str, Any]) -> bool:
    """Whether all prompts are chat messages, or else all text. `sets` are named by the arguments that they are.

    Raises ConfigError for what is no dataset, DataError for a prompt that cannot be used or is of the other kind.
    """
    kinds: dict[bool, str] = {}  # a place of each
    for where, rows in sets.items():
        if not isinstance(rows, Dataset):
            raise ConfigError(f"it is a {type(rows).__name__}", where=where, fix="give a datasets.Dataset.")
        _check_columns(rows, where)
        for number, row in enumerate(rows):
            place = f"{where}[{number}]"
            refuse_unseen(row, place, where)
            prompt = checked_messages(row["prompt"], place, where, "mend the row.")
            kinds.setdefault(not isinstance(prompt, str), place)
            if len(kinds) > 1:
                raise DataError(
                    f"the prompt at {kinds[True]} is chat messages, and that at {kinds[False]} is text",
                    where=where,
                    fix="write all prompts in one form: the policy would be asked in two ways.",
                )
        if not len(rows):
            raise DataError("it holds no rows", where=where, fix="give it prompts.")
    return True in kinds


def make_config(
    selector: Selector, folder: Path, train: Dataset, args: GRPOConfig, model: str, chat: bool, stages: int, steps: int
) -> Config:
    """The config of the run that chooses, with its prompts written beside it.

    Raises ConfigError for a strategy or settings that there are none of, DataError for prompts that cannot be used.
    """
    sets = {"train": train} | {f"validation/{name}": rows for name, rows in selector.validation_sets.items()}
    paths = {name: _written(folder / "data", name, rows, selector.places[name]) for name, rows in sets.items()}
    sources = {name: [{"type": "file", "path": str(path), "extra_column": "extra"}] for name, path in paths.items()}
    values: dict[str, Any] = {
        "name": "run",
        "run_dir": str(folder),
        "seed": args.seed,
        "policy": {"path": model, "dtype": "bfloat16" if args.bf16 else "float32"},
        "prompts": {
            "train": sources["train"],
            "validation": {name: sources[f"validation/{name}"] for name in selector.validation_sets},
            "chat": chat,
        },
        "verifier": {
            "type": "function",
            "path": SCRIPT_REWARDS,
            "threshold": selector.threshold,
            "graded": selector.graded,
        },
        "collect": {
            "num_generations": args.num_generations,
            "max_completion_length": args.max_completion_length,
            "temperature": args.temperature,
            "top_p": args.top_p,
        },
        "train": {"stages": stages, "steps_per_stage": steps},
    }
    strategy = selector.strategy
    chosen = preset(strategy, "Selector.strategy") if isinstance(strategy, str) else strategy
    own = {} if selector.fraction is None else {"select": {"fraction": selector.fraction}}
    values = with_presets(merged(values, chosen))
    for patch in (own, selector.settings):
        values = merged(values, patch)
    config = validate_config(values, "Selector")
    _refuse_what_trl_does_not_do(config, chat)
    return config


def _refuse_what_trl_does_not_do(config: Config, chat: bool) -> None:
    if config.train.dynamic_sampling or config.refresh.reuse_rollouts:
        raise ConfigError(
            "dynamic sampling and reused rollouts are the work of cropi's own trainer",
            where="Selector",
            fix="choose another strategy or settings, or train with `cropi run`.",
        )
    if config.prompts.system_prompt is not None or config.prompts.chat is not chat:
        raise ConfigError(
            "the trainer shows the policy the prompts as they are, and so must what chooses them",
            where='Selector.settings["prompts"]',
            fix="leave system_prompt and chat out of it, and write the system message into the datasets.",
        )


def _written(folder: Path, name: str, rows: Dataset, where: str) -> Path:
    """The prompts of a dataset as a file: what a row holds beside them stays in the dataset, at the place noted."""
    path = folder / f"{name.replace('/', '-')}.jsonl"
    lines = [
        json.dumps(
            {
                "prompt": row["prompt"],
                "answer": answer_of(row).strip() or NO_ANSWER,
                PROMPT_ID: prompt_id,
                "source": str(row.get("source") or row.get("data_source") or "train"),
                "extra": {"set": name, "row": number},
            },
            ensure_ascii=False,
        )
        for number, (row, prompt_id) in enumerate(zip(rows, prompt_ids(rows, where), strict=True))
    ]
    text = "\n".join(lines) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return path
