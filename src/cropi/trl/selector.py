"""Settings of prompt selection in a TRL script, and the equivalent run config."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from cropi.artifacts import write_text
from cropi.config import Config
from cropi.errors import ConfigError, DataError
from cropi.loading import validate_config
from cropi.presets import merged, preset, with_presets
from cropi.prompts import checked_messages, content_id, refuse_unseen
from cropi.rewards.verifiers.python_function import SCRIPT_REWARDS
from cropi.trl.messages import worded

if TYPE_CHECKING:
    from trl import GRPOConfig

PROMPT_ID = "prompt_id"  # the column that identifies a row
VALIDATION = "validation"  # the name of an unnamed set
NO_ANSWER = "(none)"  # for rows without an answer: the reward function reads their columns itself


@dataclass(frozen=True)
class Selector:
    """Which prompts each stage of a `CurriculumTrainer` trains on.

    At the start of the first stage the policy answers some training prompts and the validation prompts, the reward
    function judges the answers, and the strategy chooses. The trainer sees only the chosen prompts until the next
    stage. `folder` keeps all results, so that a resumed training continues with the same selections.
    """

    validation: Dataset | Mapping[str, Dataset]
    """Target of training: rows like those of the training set, but not in it."""
    strategy: str | Mapping[str, Any] = "cropi"
    """Name of a preset, or a config patch as in `cropi compare`: `select`, `score`, `collect`, `refresh`."""
    fraction: float | None = None
    """Largest share of the training prompts in a stage. Unset: the strategy's own, else 0.1."""
    stages: int = 5
    """Number of selections, evenly spaced over the training steps; fewer if there are too few steps."""
    success: int | str | Callable[..., Sequence[float | None]] | None = None
    """The reward function that says whether a completion is right: an index or name among the trainer's, or another
    reward function. Unset: the trainer's only one. Prompts are chosen by it; training rewards are still the
    trainer's."""
    threshold: float = 0.5
    """Smallest value of `success` that counts as right."""
    graded: bool = False
    """Choose by the values of `success` themselves, which must lie in [0, 1], instead of by right and wrong."""
    folder: str | Path | None = None
    """Folder of trajectories, scores and selections. Unset: `_curriculum` in the trainer's output folder, which is
    never uploaded."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Further settings, which override all others: `{"collect": {"batch_size": 64}}`."""

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
        """The script's argument for each set, by the name of the set."""
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
    """Ids of the rows: `prompt_id`, else a hash of prompt and answer, numbered if it repeats."""
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
    """Return the gold answer of a row from one of the usual columns, else an empty text."""
    for name in ("answer", "solution", "ground_truth"):
        if row.get(name) is not None:
            return str(row[name])
    return ""


def are_chat(sets: Mapping[str, Any]) -> bool:
    """Whether all prompts are chat messages rather than text. `sets` holds datasets by the script's argument.

    Raises ConfigError for other objects than datasets, DataError for unusable prompts and for a mix of both forms.
    """
    kinds: dict[bool, str] = {}  # an example of each
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
                    fix="write all prompts in one form.",
                )
        if not len(rows):
            raise DataError("it holds no rows", where=where, fix="give it prompts.")
    return True in kinds


def make_config(
    selector: Selector, folder: Path, train: Dataset, args: GRPOConfig, model: str, chat: bool, stages: int, steps: int
) -> Config:
    """Build the config of the run that chooses, and write its prompts to files.

    Raises ConfigError for unknown strategies or settings, DataError for unusable prompts.
    """
    sets = {"train": train} | {f"validation/{name}": rows for name, rows in selector.validation_sets.items()}
    paths = {name: _written(folder / "data", name, rows, selector.places[name]) for name, rows in sets.items()}
    sources = {name: [{"type": "file", "path": str(path)}] for name, path in paths.items()}
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
    _refuse_unsupported(config, chat)
    return config


def _refuse_unsupported(config: Config, chat: bool) -> None:
    if config.select.strategy.chooses_online:
        raise ConfigError(
            f"{config.select.label} chooses every generation batch, and a Selector the prompts of a stage",
            where="Selector.strategy",
            fix="choose another strategy, or train with `cropi run`.",
        )
    if config.train.dynamic_sampling or config.refresh.reuse_rollouts:
        raise ConfigError(
            "only cropi's own trainer supports dynamic sampling and reused rollouts",
            where="Selector",
            fix="choose another strategy or settings, or train with `cropi run`.",
        )
    if config.prompts.system_prompt is not None or config.prompts.chat is not chat:
        raise ConfigError(
            "the trainer uses the prompts unchanged, so their selection must as well",
            where='Selector.settings["prompts"]',
            fix="leave system_prompt and chat out of it, and write the system message into the datasets.",
        )


def _written(folder: Path, name: str, rows: Dataset, where: str) -> Path:
    """Write the prompts of a dataset to a file; `extra_info` is the row's place in the dataset."""
    path = folder / f"{name.replace('/', '-')}.jsonl"
    lines = [
        json.dumps(
            {
                "prompt": row["prompt"],
                "answer": answer_of(row).strip() or NO_ANSWER,
                PROMPT_ID: prompt_id,
                "source": str(row.get("source") or row.get("data_source") or "train"),
                "extra_info": {"set": name, "row": number},
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
