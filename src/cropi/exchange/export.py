"""`cropi export`: the selection of a stage as the files of another trainer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from cropi.artifacts import SELECTION, Manifest, build, is_finished, open_artifact, read_table, write_text
from cropi.config import BUILTIN_POLICY, Config
from cropi.errors import ArtifactError, DataError
from cropi.exchange.formats import TASKSET, Facts, Format, Item, named
from cropi.policy import device_of, load_tokenizer, policy_location, trainer_prompt, uses_chat
from cropi.training.settings import grpo_config
from cropi.workspace import Arm, Workspace

KIND = "export"
WHY = ("prompt_id", "rank", "score", "reason", "pass_rate", "status")


def export(
    config: Config, space: Workspace, arm: Arm, stage: int, format_name: str, checkpoint: Path | None, folder: Path
) -> Manifest:
    """Write train, validation and test files, the reward function, `why.jsonl` and a README with the commands.

    Prompts are as the policy sees them in a run: chat messages with the system prompt where there is a chat template,
    text otherwise; the best come first. Errors: ArtifactError where the stage has not been selected or the folder holds
    something else, DataError for a format that there is not or columns that do not fit into one file.
    """
    form = named(format_name)
    if folder.is_dir() and any(folder.iterdir()) and not (is_finished(folder) or folder.is_relative_to(space.folder)):
        raise ArtifactError("holds files that are no export", where=str(folder), fix="name a new folder by --output.")
    chosen = open_artifact(arm.selection(stage), "selection", made_by="cropi select")
    inputs = {"selection": chosen.identity, "format": format_name, "policy": str(checkpoint or config.policy.path)}
    make = partial(_write, config, space, arm, stage, form, format_name, checkpoint)
    return build(folder, KIND, make, inputs=inputs, made_by="cropi export")


def _write(
    config: Config,
    space: Workspace,
    arm: Arm,
    stage: int,
    form: Format,
    format_name: str,
    checkpoint: Path | None,
    folder: Path,
) -> tuple[Mapping[str, int], Mapping[str, Any]]:
    rows = read_table(arm.selection(stage) / "selection.parquet", SELECTION).to_pylist()
    selected = [row for row in rows if row["selected"]]
    tokenizer = load_tokenizer(config.policy)
    chat = uses_chat(tokenizer, config.prompts.chat, config.prompts.system_prompt)
    splits = {"train": [space.train_prompts[row["prompt_id"]] for row in selected]}
    splits |= {role: space.held_out(role) for role in ("validation", "test")}
    for split, prompts in splits.items():
        items = _items(config, prompts, split, chat=chat)
        _write_rows(folder / f"{split}.{form.suffix}", form, map(form.row, items))
    write_text(folder / "why.jsonl", "".join(json.dumps({key: row[key] for key in WHY}) + "\n" for row in selected))
    write_text(folder / "reward.py", _reward(config, form))
    if format_name == "prime-rl":
        write_text(folder / "cropi_stage.py", TASKSET)
    facts = _facts(config, stage, chat, checkpoint, folder)
    write_text(folder / "README.md", _readme(facts, format_name, form, len(selected), arm.name))
    return {split: len(prompts) for split, prompts in splits.items()}, {"format": format_name, "stage": stage}


def _items(config: Config, prompts: Sequence[Mapping[str, Any]], split: str, *, chat: bool) -> Iterator[Item]:
    for place, row in enumerate(prompts):
        prompt = trainer_prompt(row["messages"], chat=chat, system_prompt=config.prompts.system_prompt)
        extra = json.loads(row["extra"]) if row["extra"] else {}
        yield Item(row["prompt_id"], prompt, row["answer"], row["source"], extra, split, place)


def _write_rows(path: Path, form: Format, rows: Iterable[dict[str, Any]]) -> None:
    if form.suffix == "jsonl":
        write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return
    try:
        table = pa.Table.from_pylist(list(rows))
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise DataError(
            f"the prompts' further columns do not fit into one table ({error})",
            where=f"{path.name}, extra",
            fix="export as jsonl (slime, openrlhf, prime-rl), or give these columns one type each.",
        ) from None
    parquet.write_table(table, path)


def _reward(config: Config, form: Format) -> str:
    verifier, verification = (table.model_dump(mode="json") for table in (config.verifier, config.verification))
    line = form.reward.format(verifier=repr(verifier), verification=repr(verification))
    about = f"The verifier of the run `{config.name}`, in processes that can be killed."
    return f'"""{about}"""\n\nfrom cropi.exchange.rewards import Rewards\n\n{line}\n'


def _facts(config: Config, stage: int, chat: bool, checkpoint: Path | None, folder: Path) -> Facts:
    settings = grpo_config(config, folder, device_of(config.policy))
    per_step = settings.per_device_train_batch_size * settings.gradient_accumulation_steps
    builtin = config.policy.path == BUILTIN_POLICY
    return Facts(
        name=config.name,
        stage=stage,
        policy=str(checkpoint or (policy_location(config.policy) if builtin else config.policy.path)),
        chat=chat,
        num_generations=settings.num_generations,
        max_completion_length=config.collect.max_completion_length,
        temperature=settings.temperature,
        learning_rate=settings.learning_rate,
        prompts_per_step=max(1, per_step // settings.num_generations),
        steps=config.train.steps_per_stage,
        folder=str(folder),
    )


def _readme(facts: Facts, format_name: str, form: Format, count: int, arm: str) -> str:
    return f"""\
# {facts.name}, stage {facts.stage}, for {format_name}

| file | what |
|---|---|
| `train.{form.suffix}` | {count} prompts that `{arm}` chose, the best first |
| `why.jsonl` | why each of them |
| `validation.{form.suffix}`, `test.{form.suffix}` | the run's validation and test prompts |
| `reward.py` | its verifier; needs cropi where rewards are computed |

{form.usage(facts)}
"""
