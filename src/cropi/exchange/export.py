"""`cropi export`: the selection of a stage as the files of another trainer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import torch

from cropi.artifacts import (
    SELECTION,
    Manifest,
    atomic_file,
    finish,
    is_finished,
    open_artifact,
    read_table,
    write_text,
)
from cropi.config import Config
from cropi.errors import ArtifactError, DataError
from cropi.exchange.formats import TASKSET, Format, Item, named
from cropi.exchange.rewards import facts_of
from cropi.exchange.usage import USAGES, Facts
from cropi.policy import encode_prompts, load_tokenizer, policy_location, trainer_prompt, uses_chat
from cropi.run_folder import RunFolder, StagePaths
from cropi.stages.run import start_of_stage
from cropi.training.settings import grpo_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KIND = "export"
WHY = ("prompt_id", "rank", "score", "reason", "pass_rate", "status")


def export(
    run: RunFolder, paths: StagePaths, stage: int, format_name: str, checkpoint: Path | None, folder: Path
) -> Manifest:
    """Write train, validation and test files, the reward function, `why.jsonl` and a README with the commands.

    Prompts are as the policy sees them in a run: chat messages with the system prompt where there is a chat template,
    text otherwise; the best come first. Nothing that is there already is touched: an export that is there is opened.

    Errors: ArtifactError where the stage has not been selected, or the folder holds something else; DataError for a
    format that there is not or cannot have these prompts; PolicyError where the policy of the stage is not there.
    """
    form, folder = named(format_name), folder.resolve()
    policy = _policy(run.config, paths, stage, checkpoint)
    chosen = open_artifact(paths.selection(stage), "selection", made_by="cropi select")
    inputs = {"selection": chosen.identity, "format": format_name, "policy": policy, "folder": str(folder)}
    if is_finished(folder):
        return _opened(folder, inputs)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ArtifactError("is there and is no export", where=str(folder), fix="name a new folder by --output.")
    unfinished = folder.with_name(f".{folder.name}.cropi-export")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    written = _Export(run, form, format_name, unfinished)
    counts = written.prompts(paths.selection(stage))
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
            f"is an export of another {', '.join(other)}", where=str(folder), fix="name a new folder by --output."
        )
    return manifest


def _policy(config: Config, paths: StagePaths, stage: int, checkpoint: Path | None) -> str:
    """Where the policy that the stage begins with lies: an absolute path, or a Hub id."""
    if checkpoint is None and stage:
        checkpoint = start_of_stage(config, paths, stage)
    if checkpoint is not None:
        return str(checkpoint.resolve())
    named_policy = policy_location(config.policy)
    return str(Path(named_policy).resolve()) if Path(named_policy).is_dir() else named_policy


def parquet_table(rows: list[dict[str, Any]], split: str) -> pa.Table:
    """Rows for Parquet. DataError for messages that would come out of it with other keys within than they have."""
    try:
        table = pa.Table.from_pylist(rows)
        whole = all(_valued(a["prompt"]) == _valued(b["prompt"]) for a, b in zip(rows, table.to_pylist(), strict=True))
    except pa.ArrowException:
        whole = False
    if not whole:
        raise DataError(
            "the chat messages are of several forms (parts beside text, tool calls with other arguments), which one "
            "column of Parquet cannot hold",
            where=f"the {split} prompts",
            fix="write them in one form, or export to slime or openrlhf.",
        )
    return table


def _valued(prompt: Any) -> Any:
    """A prompt as a chat template sees it: without keys of messages that have no value."""
    return [{k: v for k, v in turn.items() if v is not None} for turn in prompt] if isinstance(prompt, list) else prompt


class _Export:
    """The files of one export."""

    def __init__(self, run: RunFolder, form: Format, name: str, folder: Path) -> None:
        config = run.config
        self._run, self._config, self._form, self._name, self._folder = run, config, form, name, folder
        self._tokenizer: PreTrainedTokenizerBase = load_tokenizer(config.policy)
        self._chat = uses_chat(self._tokenizer, config.prompts.chat, config.prompts.system_prompt)
        if form.chat_only and not self._chat:
            raise DataError(
                f"{name} puts every prompt through the chat template, and this run's prompts are plain text",
                where="prompts.chat",
                fix="give the tokenizer a chat template and start a run with it, or export to trl, slime or openrlhf.",
            )
        self._longest = 1

    def prompts(self, selection: Path) -> dict[str, int]:
        """Data files, reasons and the reward function; returns how many prompts are in which file."""
        rows = read_table(selection / "selection.parquet", SELECTION).to_pylist()
        selected = [row for row in rows if row["selected"]]
        splits: dict[str, Sequence[Mapping[str, Any]]] = {
            "train": [self._run.train_prompts[row["prompt_id"]] for row in selected],
            "validation": self._run.held_out("validation"),
            "test": self._run.held_out("test"),
        }
        for split, prompts in splits.items():
            items = [self._item(row, split, place) for place, row in enumerate(prompts)]
            encoded = encode_prompts(self._tokenizer, [item.prompt for item in items])
            self._longest = max([self._longest, *map(len, encoded)])
            self._write(split, map(self._form.row, items))
        why = "".join(json.dumps({key: row[key] for key in WHY}) + "\n" for row in selected)
        write_text(self._folder / "why.jsonl", why)
        write_text(self._folder / "reward.py", self._reward())
        if self._name == "prime-rl":
            write_text(self._folder / "cropi_stage.py", TASKSET)
        return {split: len(prompts) for split, prompts in splits.items()}

    def _item(self, row: Mapping[str, Any], split: str, place: int) -> Item:
        prompt = trainer_prompt(row["messages"], chat=self._chat, system_prompt=self._config.prompts.system_prompt)
        facts = facts_of(row["messages"], row["source"], row["extra"] or "")
        return Item(row["prompt_id"], prompt, row["answer"], row["source"], facts, split, place)

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
        """Special tokens as text: some trainers leave them at the end of a completion."""
        tokens = {str(token) for token in self._tokenizer.all_special_tokens}
        return sorted(tokens, key=lambda token: (-len(token), token))

    def readme(self, stage: int, policy: str, folder: Path, count: int) -> None:
        """What is in the folder, and how the trainer is told of it."""
        suffix, weights = self._form.suffix, self._config.policy
        notes = ""
        if weights.revision is not None:
            notes += f"\nRevision of the policy: `{weights.revision}`.\n"
        if weights.lora is not None:
            notes += (
                "\nThe run trains adapters, and its checkpoints hold these alone: merge them into the weights first.\n"
            )
        text = f"""\
# {self._config.name}, stage {stage}, for {self._name}

| file | what |
|---|---|
| `train.{suffix}` | {count} prompts that `{self._config.select.strategy.label}` chose, the best first |
| `why.jsonl` | why each of them |
| `validation.{suffix}`, `test.{suffix}` | the run's validation and test prompts |
| `reward.py` | its verifier; needs cropi, and a function of your own, where rewards are computed |
{notes}
{USAGES[self._name](self._facts(stage, policy, folder))}
"""
        write_text(self._folder / "README.md", text)

    def _facts(self, stage: int, policy: str, folder: Path) -> Facts:
        settings = grpo_config(self._config, self._folder, torch.device("cpu"))
        completions = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
        return Facts(
            name=self._config.name,
            stage=stage,
            policy=policy,
            folder=str(folder),
            chat=self._chat,
            longest_prompt=self._longest,
            num_generations=settings.num_generations,
            max_completion_length=self._config.collect.max_completion_length,
            temperature=settings.temperature,
            learning_rate=settings.learning_rate,
            loss_type=settings.loss_type,
            beta=settings.beta,
            prompts_per_step=max(1, completions // settings.num_generations),
            steps=self._config.train.steps_per_stage,
            per_device=settings.per_device_train_batch_size,
            accumulation=settings.gradient_accumulation_steps,
            scheduler=str(getattr(settings.lr_scheduler_type, "value", settings.lr_scheduler_type)),
        )
