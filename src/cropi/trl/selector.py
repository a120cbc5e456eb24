"""Settings of the curriculum in a TRL script, and the equivalent run config."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset, IterableDataset

from cropi.artifacts import write_text
from cropi.config import Config
from cropi.config.loading import merged, preset, validate_config, with_presets
from cropi.errors import ConfigError, DataError
from cropi.prompts import content_id
from cropi.rewards.verifiers.python_function import SCRIPT_REWARDS
from cropi.trl.messages import worded

if TYPE_CHECKING:
    from trl import GRPOConfig

PROMPT_ID = "prompt_id"  # the column that identifies a row
VALIDATION = "validation"  # the name of an unnamed set
NO_ANSWER = "(none)"  # for rows without an answer: the reward functions read their columns themselves
LOOK_AHEAD = 10_000  # prompts of a stream that are chosen among
ANSWERS = ("answer", "solution", "ground_truth")


@dataclass(frozen=True)
class Selector:
    """Settings by which a `CurriculumTrainer` chooses the prompts of each generation batch."""

    validation: Dataset | Mapping[str, Dataset]
    """Target of training: rows like those of the training set, but not in it."""
    strategy: str | Mapping[str, Any] = "cropi"
    """Name of a preset that chooses batch by batch, or a config patch as in `cropi compare`."""
    folder: str | Path | None = None
    """Folder of choices and beliefs. Unset: `_curriculum` in the trainer's output folder, which is never uploaded."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further settings, which override all others: `{"prompts": {"leakage": "warn"}}`."""

    def __post_init__(self) -> None:
        if isinstance(self.strategy, str):
            with worded():
                preset(self.strategy, "Selector.strategy")
        for place, rows in zip(self.places.values(), self.validation_sets.values(), strict=True):
            if not isinstance(rows, Dataset):
                raise ConfigError(f"it is a {type(rows).__name__}", where=place, fix="give a datasets.Dataset.")
            if not len(rows):
                raise DataError("it holds no rows", where=place, fix="give it prompts.")

    @property
    def places(self) -> dict[str, str]:
        """The script's argument for each validation set, by its name."""
        several = isinstance(self.validation, Mapping)
        return {n: f"Selector.validation[{n!r}]" if several else "Selector.validation" for n in self.validation_sets}

    @property
    def validation_sets(self) -> dict[str, Dataset]:
        """The validation sets by name."""
        return dict(self.validation) if isinstance(self.validation, Mapping) else {VALIDATION: self.validation}


def pool_of(dataset: Dataset | IterableDataset) -> Dataset:
    """The prompts that are chosen among, each with an id: of a stream its beginning."""
    if isinstance(dataset, IterableDataset):
        dataset = Dataset.from_list(list(islice(dataset, LOOK_AHEAD)))
    ids = prompt_ids(dataset, "train_dataset")
    columns = dataset.remove_columns(PROMPT_ID) if PROMPT_ID in dataset.column_names else dataset
    return columns.add_column(PROMPT_ID, ids)


def prompt_ids(dataset: Dataset, where: str) -> list[str]:
    """Ids of the rows: `prompt_id`, else a hash of prompt and answer, numbered if it repeats."""
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
        known = content_id(json.dumps(shown_prompt(row)), answer_of(row))
        seen[known] = seen.get(known, 0) + 1
        ids.append(known if seen[known] == 1 else f"{known}-{seen[known]}")
    return ids


def answer_of(row: Mapping[str, Any]) -> str:
    """Return the gold answer of a row from one of the usual columns, else an empty text."""
    return next((str(row[name]) for name in ANSWERS if row.get(name) is not None), "")


def shown_prompt(row: Mapping[str, Any]) -> str | list[dict[str, str]]:
    """The prompt of a row as a person reads it: of an image its kind alone; an environment's row is its columns."""
    prompt = row.get("prompt")
    if not prompt:
        return json.dumps({key: value for key, value in row.items() if key != PROMPT_ID}, default=str)
    if isinstance(prompt, str):
        return prompt
    return [{"role": turn["role"], "content": _shown(turn.get("content"))} for turn in prompt]


def _shown(content: Any) -> str:
    if not isinstance(content, list):
        return str(content or "")
    return "\n".join(str(part.get("text") or f"[{part.get('type', 'part')}]") for part in content)


def make_config(selector: Selector, folder: Path, train: Dataset, args: GRPOConfig, model: Any, steps: int) -> Config:
    """Build the config of the run that chooses, and write its prompts to files.

    Raises ConfigError for unknown strategies or settings, and for strategies that choose by stage.
    """
    sets = {"train": train} | {f"validation/{name}": rows for name, rows in selector.validation_sets.items()}
    paths = {name: _written(folder / "data", name, rows) for name, rows in sets.items()}
    sources = {name: [{"type": "file", "path": str(path)}] for name, path in paths.items()}
    values: dict[str, Any] = {
        "name": "run",
        "run_dir": str(folder),
        "seed": args.seed,
        "policy": {
            "path": str(getattr(model.config, "_name_or_path", "") or "model"),
            "dtype": "bfloat16" if str(model.dtype) == "torch.bfloat16" else "float32",
        },
        "prompts": {
            "train": sources["train"],
            "validation": {name: sources[f"validation/{name}"] for name in selector.validation_sets},
        },
        "verifier": {"type": "function", "path": SCRIPT_REWARDS},
        "collect": {
            "num_generations": args.num_generations,
            "max_completion_length": args.max_completion_length,
            "temperature": args.temperature,
        },
        "train": {"stages": 1, "steps_per_stage": steps},
    }
    strategy = selector.strategy
    chosen = preset(strategy, "Selector.strategy") if isinstance(strategy, str) else strategy
    config = validate_config(merged(with_presets(merged(values, chosen)), selector.settings), "Selector")
    if not config.select.strategy.chooses_online or config.train.dynamic_sampling:
        raise ConfigError(
            f"{config.select.label} chooses the prompts of a stage, or samples groups that it drops",
            where="Selector.strategy",
            fix="leave it out, choose a strategy that chooses batch by batch, or train with `cropi run`.",
        )
    return config


def _written(folder: Path, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write the prompts of a dataset to a file; `extra_info` is the row's place in the dataset."""
    path = folder / f"{name.replace('/', '-')}.jsonl"
    ids = prompt_ids(rows, name)
    lines = [
        json.dumps(
            {
                "prompt": shown_prompt(row),
                "answer": answer_of(row).strip() or NO_ANSWER,
                PROMPT_ID: prompt_id,
                "source": str(row.get("source") or row.get("data_source") or "train"),
                "extra_info": {"set": name, "row": number},
            },
            ensure_ascii=False,
        )
        for number, (row, prompt_id) in enumerate(zip(rows, ids, strict=True))
    ]
    text = "\n".join(lines) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    return path
