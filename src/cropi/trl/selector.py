"""Settings of the curriculum in a TRL script, and the equivalent run config."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
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
LOOK_AHEAD = 10_000  # prompts of a stream that are chosen among


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
        for name, rows in self.validation_sets.items():
            place = "Selector.validation" + (f"[{name!r}]" if isinstance(self.validation, Mapping) else "")
            if not isinstance(rows, Dataset):
                raise ConfigError(f"it is a {type(rows).__name__}", where=place, fix="give a datasets.Dataset.")
            if not len(rows):
                raise DataError("it holds no rows", where=place, fix="give it prompts.")
            if "prompt" not in rows.column_names:
                raise DataError("it has no column prompt", where=place, fix="rename the column, as TRL asks for it.")

    @property
    def validation_sets(self) -> dict[str, Dataset]:
        """The validation sets by name."""
        return dict(self.validation) if isinstance(self.validation, Mapping) else {"validation": self.validation}


def pool_of(dataset: Dataset | IterableDataset) -> Dataset:
    """The prompts that are chosen among, each with an id: of a stream its beginning."""
    if isinstance(dataset, IterableDataset):
        dataset = Dataset.from_list(list(islice(dataset, LOOK_AHEAD)))
    ids = _ids(dataset)
    if len(set(ids)) < len(ids):
        fix = "make them differ, or drop the column."
        raise DataError("two rows have the same prompt_id", where="train_dataset", fix=fix)
    columns = dataset.remove_columns(PROMPT_ID) if PROMPT_ID in dataset.column_names else dataset
    return columns.add_column(PROMPT_ID, ids)


def _ids(dataset: Dataset) -> list[str]:
    """Ids of the rows: `prompt_id`, else a hash of prompt and answer, numbered if it repeats."""
    if PROMPT_ID in dataset.column_names:
        return [str(value) for value in dataset[PROMPT_ID]]
    seen, ids = Counter[str](), list[str]()
    for known in map(row_id, dataset):
        seen[known] += 1
        ids.append(known if seen[known] == 1 else f"{known}-{seen[known]}")
    return ids


def row_id(row: Mapping[str, Any]) -> str:
    """A hash of a row's prompt and answer."""
    return content_id(json.dumps(shown_prompt(row)), _answer(row))


def shown_prompt(row: Mapping[str, Any]) -> str | list[dict[str, str]]:
    """The prompt of a row as a person reads it: of an image its kind alone; an environment's row is its columns."""
    prompt = row.get("prompt")
    if not prompt:
        return json.dumps({key: value for key, value in row.items() if key != PROMPT_ID}, default=str)
    if isinstance(prompt, str):
        return prompt
    return [{"role": turn["role"], "content": _shown(turn.get("content") or "")} for turn in prompt]


def _shown(content: str | list[dict[str, str]]) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text") or f"[{part.get('type', 'part')}]" for part in content)


def _answer(row: Mapping[str, Any]) -> str:
    known = (row.get(name) for name in ("answer", "solution", "ground_truth"))
    return next((str(answer) for answer in known if answer is not None), "")


def make_config(selector: Selector, folder: Path, train: Dataset, args: GRPOConfig, model: Any, steps: int) -> Config:
    """Build the config of the run that chooses, and write its prompts to files.

    Raises ConfigError for unknown strategies or settings, and for strategies that choose by stage.
    """
    sets = {f"validation-{name}": rows for name, rows in selector.validation_sets.items()}
    files = {name: _written(folder / "data", name, rows) for name, rows in (sets | {"train": train}).items()}
    values: dict[str, Any] = {
        "name": "run",
        "run_dir": str(folder),
        "seed": args.seed,
        "policy": {
            "path": str(getattr(model.config, "_name_or_path", "") or "model"),
            "dtype": "bfloat16" if str(model.dtype) == "torch.bfloat16" else "float32",
        },
        "prompts": {
            "train": files["train"],
            "validation": {name: files[f"validation-{name}"] for name in selector.validation_sets},
        },
        "verifier": {"type": "function", "path": SCRIPT_REWARDS},
        "collect": {
            "num_generations": args.num_generations,
            "max_completion_length": args.max_completion_length,
            "temperature": args.temperature,
        },
        "train": {"stages": 1, "steps_per_stage": steps},
    }
    named = selector.strategy
    patch = preset(named, "Selector.strategy") if isinstance(named, str) else named
    config = validate_config(merged(with_presets(merged(values, patch)), selector.settings), "Selector")
    if "drop" in (config.prompts.empty, config.prompts.duplicates):
        raise ConfigError(
            "rows of a dataset are known by their place, so none can be dropped",
            where='Selector.settings["prompts"]',
            fix="leave `drop` out, and filter the datasets.",
        )
    strategy, groups = config.select.strategy, args.generation_batch_size // args.num_generations
    drops = config.train.dynamic_sampling or strategy.trained_groups(groups) < groups
    if drops or not strategy.chooses_online:
        raise ConfigError(
            f"{config.select.label} chooses the prompts of a stage, or leaves out groups that were sampled",
            where="Selector.strategy",
            fix="leave it out, choose a strategy that chooses batch by batch, or train with `cropi run`.",
        )
    return config


def _written(folder: Path, name: str, rows: Dataset) -> list[dict[str, str]]:
    """Write the prompts of a dataset to a file, and return it as a source of prompts."""
    lines = [
        {
            "prompt": shown_prompt(row),
            "answer": _answer(row).strip() or "(none)",  # the reward functions read their columns themselves
            PROMPT_ID: prompt_id,
            "source": str(row.get("source") or row.get("data_source") or "train"),
            "extra_info": {"row": number},
        }
        for number, (row, prompt_id) in enumerate(zip(rows, _ids(rows), strict=True))
    ]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return [{"type": "file", "path": str(folder / f"{name}.jsonl")}]
