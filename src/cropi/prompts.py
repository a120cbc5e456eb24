"""Prompts: reading every source into one table, with stable ids, and refusing what would spoil a run.

Free of torch. Rows have the columns of `artifacts.PROMPTS`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cropi.artifacts import PROMPTS, write_table
from cropi.config import BuiltinSource, Config, FileSource, HubSource, ReasoningGymSource, Source
from cropi.console import warn
from cropi.errors import DataError
from cropi.leakage import Leakage, described, find_leakage
from cropi.seeds import derived_seed

PROMPT_COLUMNS = ("prompt", "question", "problem")
ANSWER_COLUMNS = ("answer", "solution", "ground_truth")
EXTRA_COLUMNS = ("extra_info", "metadata")


class Row(NamedTuple):
    """A raw row and where it stands, for errors."""

    values: dict[str, Any]
    where: str


def load_prompts(config: Config) -> list[dict[str, Any]]:
    """All prompts of a run: the training pool, the validation sets and the test sets, in that order.

    Raises DataError for a source that is missing, empty, unreadable (with the line), lacks a column or repeats an id,
    and, unless `prompts.leakage` says otherwise, for a prompt that stands in train and validation, train and test, or
    validation and test.
    """
    return checked_prompts(config)[0]


def checked_prompts(config: Config) -> tuple[list[dict[str, Any]], Leakage]:
    """`load_prompts`, and what of the held-out prompts comes again in another role."""
    sets = {"train": config.prompts.train}
    sets |= {f"validation/{name}": sources for name, sources in config.prompts.validation.items()}
    sets |= {f"test/{name}": test.sources for name, test in config.prompts.test.items()}
    prompts = [row for name, sources in sets.items() for row in _load_set(name, sources, config.seed)]
    _check_quotas(config, prompts)
    leakage = find_leakage(prompts)
    if leakage.exact and config.prompts.leakage == "refuse":
        raise DataError(
            f"held-out prompts stand in another role with the same text or id: {described(leakage.exact)}",
            where="prompts",
            fix="remove them from one of the sets (disjoint hash_range values split one file), or let them pass with "
            "prompts.leakage=warn.",
        )
    return prompts, leakage


def leakage_warnings(config: Config, leakage: Leakage) -> list[str]:
    """What to tell of the leakage that did not stop the run; nothing under `prompts.leakage=allow`."""
    if config.prompts.leakage == "allow":
        return []
    kinds = {"with the same text or id": leakage.exact, "nearly word for word": leakage.near}
    return [
        f"held-out prompts stand in another role {kind}: {described(matches)} (prompts.leakage=allow silences this)"
        for kind, matches in kinds.items()
        if matches
    ]


def make_prompts(config: Config, folder: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Write `prompts.parquet` to `folder`; returns (rows by set, leakage by kind and sets)."""
    rows, leakage = checked_prompts(config)
    for text in leakage_warnings(config, leakage):
        warn(text)
    write_table(folder / "prompts.parquet", rows, PROMPTS)
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["set"]] = counts.get(row["set"], 0) + 1
    return counts, {"leakage": leakage.as_json()}


def data_identity(config: Config) -> dict[str, str]:
    """What the prompt table depends on: the settings, the run's seed where a source takes it, local files' content."""
    sources = [*config.prompts.train, *(s for sources in config.prompts.validation.values() for s in sources)]
    sources += [s for test in config.prompts.test.values() for s in test.sources]
    identity = {}
    if any(isinstance(source, BuiltinSource | ReasoningGymSource) and source.seed is None for source in sources):
        identity["seed"] = str(config.seed)
    for path in sorted({Path(s.path).expanduser() for s in sources if isinstance(s, FileSource)}):
        if path.is_file():  # a missing one is reported where it is read
            with path.open("rb") as file:
                identity[str(path)] = hashlib.file_digest(file, "sha256").hexdigest()
    return identity


def _check_quotas(config: Config, rows: Iterable[dict[str, Any]]) -> None:
    known = sorted({row["source"] for row in rows if row["set"] == "train"})
    unknown = sorted(set(config.select.quotas) - set(known))
    if unknown:
        raise DataError(
            f"no training prompt has the source {unknown[0]!r}",
            where="select.quotas",
            fix=f"use one of: {', '.join(known)}.",
        )


def _load_set(name: str, sources: Sequence[Source], seed: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    for number, source in enumerate(sources):
        key = f"prompts.{name.replace('/', '.')}.{number}"
        if isinstance(source, BuiltinSource):
            loaded = list(_builtin(source, name, key, seed))
        elif isinstance(source, ReasoningGymSource):
            loaded = list(_reasoning_gym(source, name, key, seed))
        else:
            loaded = list(_from_rows(source, key))
        if not loaded:
            raise DataError("the source holds no rows", where=key, fix="check its path, hash_range and limit.")
        for row, where in loaded:
            first = seen.setdefault(row["prompt_id"], where)
            if first is not where:
                raise DataError(
                    f"the prompt id {row['prompt_id']!r} occurs twice in {name}: at {first} and at {where}",
                    where=key,
                    fix="remove the repeated row, or name a column of unique ids with id_column.",
                )
            rows.append(row | {"set": name})
    return rows


def _builtin(source: BuiltinSource, set_name: str, key: str, seed: int) -> Iterator[tuple[dict[str, Any], str]]:
    """The problems of a source; `seed` is for one that has none of its own."""
    from cropi.builtin import generate

    options = source.model_dump(exclude={"type", "families"})
    if source.seed is None:
        options["seed"] = seed
    for family in source.families:
        try:
            rows = generate(family, split=set_name.split("/")[0], **options)
        except ValueError as error:
            raise DataError(str(error), where=key, fix="change the setting it names.") from None
        for number, row in enumerate(rows):
            prompt = {"messages": json.dumps(row["prompt"]), "answer": row["answer"], "source": family, "extra": None}
            yield prompt | {"prompt_id": row["prompt_id"]}, f"{key} {family} problem {number}"


def _reasoning_gym(
    source: ReasoningGymSource, set_name: str, key: str, seed: int
) -> Iterator[tuple[dict[str, Any], str]]:
    """The problems of a source; each role has seeds of its own."""
    try:
        import reasoning_gym
    except ImportError:
        raise DataError(
            "the package reasoning-gym is not installed", where=key, fix="pip install 'cropi[reasoning-gym]'."
        ) from None
    role, given = set_name.split("/")[0], seed if source.seed is None else source.seed
    for task in source.tasks:
        drawn = derived_seed(given, "reasoning-gym", role, task) % 2**31
        try:
            problems = reasoning_gym.create_dataset(task, size=source.count, seed=drawn, **source.options)
            entries = [problems[number] for number in range(source.count)]
        except Exception as error:  # tasks check their settings in ways of their own
            raise DataError(
                f"the task {task!r} cannot be made: {error}", where=key, fix="check its name and options."
            ) from None
        for number, entry in enumerate(entries):
            yield (
                {
                    "prompt_id": f"{task}-{drawn}-{number}",
                    "source": task,
                    "messages": json.dumps(str(entry["question"]), ensure_ascii=False),
                    "answer": str(entry["answer"]),
                    "extra": json.dumps(entry["metadata"], ensure_ascii=False, default=str),
                },
                f"{key} {task} problem {number}",
            )


def _from_rows(source: FileSource | HubSource, key: str) -> Iterator[tuple[dict[str, Any], str]]:
    rows = [(_prompt(source, row, key), row.where) for row in _raw_rows(source, key)]
    low, high = source.hash_range
    rows = [row for row in rows if low <= _unit_hash(row[0]["prompt_id"]) < high]
    if source.limit is not None:
        rows = sorted(rows, key=lambda row: _unit_hash(row[0]["prompt_id"]))[: source.limit]
    yield from rows


def _raw_rows(source: FileSource | HubSource, key: str) -> Iterable[Row]:
    if isinstance(source, HubSource):
        return _hub_rows(source, key)
    path = Path(source.path).expanduser()
    if not path.is_file():
        raise DataError(f"there is no file {path}", where=f"{key}.path", fix="check the path.")
    if path.suffix == ".parquet":
        try:
            table = pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(
                f"{path} cannot be read as Parquet ({error})", where=key, fix="write the file anew."
            ) from None
        return [Row(values, f"{path}, row {number}") for number, values in enumerate(table.to_pylist(), start=1)]
    if path.suffix == ".jsonl":
        return _jsonl_rows(path, key)
    raise DataError(f"{path} is neither .jsonl nor .parquet", where=f"{key}.path", fix="convert or rename the file.")


def _jsonl_rows(path: Path, key: str) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except ValueError as error:
                raise DataError(
                    f"line {number} is not JSON ({error})", where=str(path), fix="mend that line."
                ) from None
            if not isinstance(values, dict):
                raise DataError(f"line {number} is not a JSON object", where=str(path), fix="mend that line.")
            yield Row(values, f"{path}, line {number}")


def _hub_rows(source: HubSource, key: str) -> Iterator[Row]:
    import datasets

    try:
        rows = datasets.load_dataset(source.dataset, source.name, split=source.split, revision=source.revision)
    except Exception as error:  # datasets raises many kinds; each means that the dataset is not to be had
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"the dataset {source.dataset!r} cannot be loaded: {first}",
            where=f"{key}.dataset",
            fix="check its id, name, split and revision; offline, download it and use type: file.",
        ) from None
    for number, values in enumerate(rows, start=1):
        yield Row(dict(values), f"{source.dataset}, row {number}")


def _prompt(source: FileSource | HubSource, row: Row, key: str) -> dict[str, Any]:
    """A raw row in the project's columns."""
    messages = _column(row, source.prompt_column, PROMPT_COLUMNS, "prompt", key)
    answer = _answer(row, source, key)
    name = Path(source.path).stem if isinstance(source, FileSource) else source.dataset
    identity = row.values.get(source.id_column or "prompt_id")
    if source.id_column is not None and identity is None:
        raise _missing(row, source.id_column, "id", key)
    extra = _extra(row, source, key)
    origin = row.values.get(source.source_column or "source") or row.values.get("data_source")
    origin = origin or (extra or {}).get("source_dataset") or name
    text = json.dumps(_checked_messages(messages, row, key), ensure_ascii=False)
    try:
        written = None if extra is None else json.dumps(extra, ensure_ascii=False, default=str)
        f"{text}{answer}{identity}{origin}{written}".encode()
    except UnicodeEncodeError:
        raise DataError(f"{row.where} holds half a surrogate pair", where=key, fix="mend the row's text.") from None
    return {
        "prompt_id": str(identity) if identity is not None else content_id(text, answer),
        "source": str(origin),
        "messages": text,
        "answer": answer,
        "extra": written,
    }


def _extra(row: Row, source: FileSource | HubSource, key: str) -> dict[str, Any] | None:
    if source.extra_column is not None:
        value = row.values.get(source.extra_column)
        if not isinstance(value, dict):
            raise DataError(
                f"{row.where}: the column {source.extra_column} holds no object",
                where=key,
                fix="mend the row, or leave extra_column out.",
            )
        return value
    return next((row.values[name] for name in EXTRA_COLUMNS if isinstance(row.values.get(name), dict)), None)


def _answer(row: Row, source: FileSource | HubSource, key: str) -> str:
    nested = row.values.get("reward_model")  # verl keeps the gold answer in here
    if source.answer_column is None and isinstance(nested, dict) and nested.get("ground_truth") is not None:
        return str(nested["ground_truth"])
    answer = _column(row, source.answer_column, ANSWER_COLUMNS, "answer", key)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise DataError(
            f"{row.where}: the answer {answer!r} is neither text nor a number",
            where=key,
            fix="write it as the text that a right completion would give, or name another column with answer_column.",
        )
    return str(answer)


def _column(row: Row, named: str | None, usual: Sequence[str], what: str, key: str) -> Any:
    for column in [named] if named is not None else usual:
        if row.values.get(column) is not None:
            return row.values[column]
    raise _missing(row, named or " / ".join(usual), what, key)


def _missing(row: Row, column: str, what: str, key: str) -> DataError:
    return DataError(
        f"{row.where} has no {what} (column {column}); its columns are: {', '.join(row.values)}",
        where=key,
        fix=f"name the column with {what}_column.",
    )


def _checked_messages(messages: Any, row: Row, key: str) -> Any:
    """A non-empty string, or chat messages with string contents."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
    good = (
        isinstance(turns, list)
        and turns
        and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in turns
        )
    )
    if not good or not "".join(turn["content"] for turn in turns).strip():
        raise DataError(
            f"{row.where}: the prompt is neither text nor a list of chat messages, or it is empty",
            where=key,
            fix="mend the row, or name another column with prompt_column.",
        )
    return messages if isinstance(messages, str) else [{"role": t["role"], "content": t["content"]} for t in turns]


def content_id(text: str, answer: str) -> str:
    """16 hexadecimal digits of the SHA-256 of a prompt and its answer."""
    return hashlib.sha256(json.dumps([text, answer]).encode()).hexdigest()[:16]


def _unit_hash(identity: str) -> float:
    """A number in [0, 1) that depends on an id alone."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:6], "big") / (1 << 48)
