"""`cropi export`: the selection of a stage, or the prompts of its batches, as the files of another trainer."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from cropi.artifacts import SELECTION, Manifest, atomic_file, finish, is_finished, open_artifact, read_table, write_text
from cropi.config import Config
from cropi.errors import ArtifactError, DataError
from cropi.exchange.formats import Format, Item, named
from cropi.exchange.rewards import facts_of
from cropi.policy import load_tokenizer, policy_location
from cropi.prompts.encoding import encode_prompts, trainer_prompts, uses_chat
from cropi.report.explanations import draws
from cropi.run_folder import RunFolder, StagePaths
from cropi.stages.run import start_of_stage
from cropi.training.grpo_settings import grpo_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KIND = "export"
WHY = ("prompt_id", "rank", "score", "reason", "pass_rate", "status")


def export(
    run: RunFolder, paths: StagePaths, stage: int, format_name: str, checkpoint: Path | None, folder: Path
) -> Manifest:
    """Write train, validation and test files, the reward function, `why.jsonl` and a README with the settings.

    Prompts are as the policy sees them in a run: chat messages with the system prompt if the tokenizer has a chat
    template, else text; the best come first. Of a strategy that chooses batch by batch: the prompts that the stage has
    drawn, the most often drawn first. Existing files stay as they are: a finished export is opened.

    Errors: ArtifactError if the stage has chosen nothing or the folder holds something else; DataError for an
    unknown format or one that cannot hold these prompts; PolicyError if the policy of the stage is missing.
    """
    form, folder = named(format_name), folder.resolve()
    policy = _policy(run.config, paths, stage, checkpoint)
    identity, chosen = _chosen(run.config, paths, stage)
    inputs = {"selection": identity, "format": format_name, "policy": policy, "folder": str(folder)}
    if is_finished(folder):
        return _opened(folder, inputs)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError("exists and is no export", where=str(folder), fix="name a new folder with --output.")
    unfinished = folder.with_name(f".{folder.name}.cropi-export")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    written = _Export(run, form, format_name, unfinished)
    counts = written.prompts(chosen)
    written.readme(stage, policy, folder, counts["train"])
    finish(unfinished, KIND, inputs=inputs, counts=counts, details={"format": format_name, "stage": stage})
    if folder.is_dir():
        folder.rmdir()
    unfinished.rename(folder)
    return _opened(folder, inputs)


def _opened(folder: Path, inputs: Mapping[str, str]) -> Manifest:
    manifest = open_artifact(folder, KIND, made_by="cropi export")
    other = sorted(key for key in inputs if manifest.inputs.get(key) != inputs[key])
    if other:
        raise ArtifactError(
            f"is an export of another {', '.join(other)}", where=str(folder), fix="name a new folder with --output."
        )
    return manifest


def _chosen(config: Config, paths: StagePaths, stage: int) -> tuple[str, list[dict[str, Any]]]:
    """Return an identity of the stage's choice, and the rows of `why.jsonl`, the best first."""
    if not config.select.strategy.chooses_online:
        made = open_artifact(paths.selection(stage), "selection", made_by="cropi select")
        rows = read_table(paths.selection(stage) / "selection.parquet", SELECTION).to_pylist()
        return made.identity, [{key: row[key] for key in WHY} for row in rows if row["selected"]]
    drawn = [
        {"prompt_id": prompt_id, "drawn": times.total(), "reasons": dict(times)}
        for prompt_id, times in draws(paths).get(stage, {}).items()
    ]
    if not drawn:
        raise ArtifactError(
            f"{config.select.label} chooses batch by batch, and stage {stage} has no batch yet",
            where=str(paths.choices),
            fix="run `cropi run` first, and name a stage that has begun.",
        )
    return hashlib.sha256(json.dumps(drawn).encode()).hexdigest(), drawn


def _policy(config: Config, paths: StagePaths, stage: int, checkpoint: Path | None) -> str:
    """The location of the policy that the stage begins with: an absolute path, or a Hub id."""
    if checkpoint is None and stage:
        checkpoint = start_of_stage(config, paths, stage)
    if checkpoint is not None:
        return str(checkpoint.resolve())
    named_policy = policy_location(config.policy)
    return str(Path(named_policy).resolve()) if Path(named_policy).is_dir() else named_policy


def parquet_table(rows: list[dict[str, Any]], split: str) -> pa.Table:
    """Rows for Parquet. DataError if a column cannot hold the messages without changing their keys."""
    try:
        table = pa.Table.from_pylist(rows)
        whole = all(_valued(a["prompt"]) == _valued(b["prompt"]) for a, b in zip(rows, table.to_pylist(), strict=True))
    except pa.ArrowException:
        whole = False
    if not whole:
        raise DataError(
            "one Parquet column cannot hold the chat messages: they have different forms (parts beside text, tool "
            "calls with other arguments)",
            where=f"the {split} prompts",
            fix="write them in one form, or export to slime or openrlhf.",
        )
    return table


def _valued(prompt: Any) -> Any:
    """A prompt as a chat template sees it: without message keys that have no value."""
    return [{k: v for k, v in turn.items() if v is not None} for turn in prompt] if isinstance(prompt, list) else prompt


class _Export:
    """The files of one export."""

    def __init__(self, run: RunFolder, form: Format, name: str, folder: Path) -> None:
        config = run.config
        self._run, self._config, self._form, self._name, self._folder = run, config, form, name, folder
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(config.policy)
        if form.chat_only and not uses_chat(self._tokenizer, config.prompts.chat, config.prompts.system_prompt):
            raise DataError(
                f"{name} applies the chat template to every prompt, and this run's prompts are plain text",
                where="prompts.chat",
                fix="give the tokenizer a chat template and start a run with it, or export to trl, slime or openrlhf.",
            )
        self._longest = 1

    def prompts(self, chosen: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """Write data files, reasons and the reward function. Returns the number of prompts by file."""
        splits: dict[str, Sequence[Mapping[str, Any]]] = {
            "train": [self._run.train_prompts[row["prompt_id"]] for row in chosen],
            "validation": self._run.held_out("validation"),
            "test": self._run.held_out("test"),
        }
        for split, prompts in splits.items():
            shown = trainer_prompts(self._tokenizer, self._config.prompts, prompts)
            self._longest = max([self._longest, *map(len, encode_prompts(self._tokenizer, shown))])
            items = [
                Item(
                    row["prompt_id"],
                    prompt,
                    row["answer"],
                    row["source"],
                    facts_of(row["messages"], row["source"], row["extra"] or ""),
                    split,
                    place,
                )
                for place, (row, prompt) in enumerate(zip(prompts, shown, strict=True))
            ]
            self._write(split, map(self._form.row, items))
        write_text(self._folder / "why.jsonl", "".join(json.dumps(row) + "\n" for row in chosen))
        write_text(self._folder / "reward.py", self._reward())
        for name, text in self._form.files.items():
            write_text(self._folder / name, text)
        return {split: len(prompts) for split, prompts in splits.items()}

    def _write(self, split: str, rows: Iterable[dict[str, Any]]) -> None:
        path = self._folder / f"{split}.{self._form.suffix}"
        if self._form.suffix == "jsonl":
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            return
        table = parquet_table(list(rows), split)
        with atomic_file(path) as temporary:
            pa.parquet.write_table(table, temporary)

    def _reward(self) -> str:
        verifier, verification = (
            table.model_dump(mode="json") for table in (self._config.verifier, self._config.verification)
        )
        about = "The verifier of the run, in processes that can be killed."
        made = f"rewards = Rewards(\n    {verifier!r},\n    {verification!r},\n    ends={self._ends()!r},\n)\n"
        return f'"""{about}"""\n\nfrom cropi.exchange.rewards import Rewards\n\n{made}{self._form.reward}\n'

    def _ends(self) -> list[str]:
        """Special tokens as text; some trainers leave them at the end of a completion."""
        tokens = {str(token) for token in self._tokenizer.all_special_tokens}
        return sorted(tokens, key=lambda token: (-len(token), token))

    def readme(self, stage: int, policy: str, folder: Path, count: int) -> None:
        """List the files and the run's settings; docs/trainers.md says how each trainer takes them."""
        suffix, weights, select = self._form.suffix, self._config.policy, self._config.select
        what, why = f"{count} prompts that `{select.label}` chose, the best first", "why each of them was chosen"
        if select.strategy.chooses_online:
            what = f"{count} prompts that `{select.label}` drew for the stage's batches, the most often drawn first"
            why = "how often each of them was drawn, by reason"
        notes = ""
        if weights.revision is not None:
            notes += f"\nRevision of the policy: `{weights.revision}`.\n"
        if weights.lora is not None:
            notes += (
                "\nThe run trains adapters, and its checkpoints hold only these: merge them into the weights first.\n"
            )
        settings = {"policy": policy, "training prompts": f"{folder}/train.{suffix}"} | self._settings()
        rows = "\n".join(f"| {name} | `{value}` |" for name, value in settings.items())
        text = f"""\
# {self._config.name}, stage {stage}, for {self._name}

| file | content |
|---|---|
| `train.{suffix}` | {what} |
| `why.jsonl` | {why} |
| `validation.{suffix}`, `test.{suffix}` | the run's validation and test prompts |
| `reward.py` | its verifier; needs cropi, and a function of your own, where rewards are computed |
{notes}
Settings of the run, under TRL's names where it has one. Other names: docs/trainers.md of cropi.

| setting | value |
|---|---|
{rows}
"""
        write_text(self._folder / "README.md", text)

    def _settings(self) -> dict[str, Any]:
        """The run's training settings."""
        settings = grpo_config(self._config, self._folder, torch.device("cpu"))
        completions = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        return {
            "prompts per step": max(1, completions // settings.num_generations),
            "num_generations": settings.num_generations,
            "max_steps": self._config.train.steps_per_stage,
            "longest prompt, tokens": self._longest,
            "max_completion_length": self._config.collect.max_completion_length,
            "temperature": settings.temperature,
            "learning_rate": settings.learning_rate,
            "lr_scheduler_type": str(getattr(settings.lr_scheduler_type, "value", settings.lr_scheduler_type)),
            "loss_type": settings.loss_type,
            "beta": settings.beta,
        }
