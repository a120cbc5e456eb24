"""Prompts: read every source into one table with stable ids, and refuse rows that would spoil a run.

Free of torch. Rows have the columns of `artifacts.PROMPTS`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cropi.artifacts import PROMPTS, file_sha256, write_table
from cropi.config import BuiltinSource, Config, FileSource, HubSource, ReasoningGymSource, Source
from cropi.console import warn
from cropi.errors import DataError
from cropi.prompt_text import turn_text
from cropi.prompts.data_files import Row, raw_rows
from cropi.prompts.leakage import Leakage, described, find_leakage
from cropi.seeds import derived_seed

PROMPT_COLUMNS = ("prompt", "question", "problem", "messages")
ANSWER_COLUMNS = ("reward_model.ground_truth", "answer", "solution", "ground_truth")  # verl's first
EXTRA_COLUMNS = ("extra_info", "metadata")
UNSEEN_COLUMNS = ("tools", "chat_template_kwargs", "image", "images", "video", "videos", "audio", "audios")
EXAMPLES = 3  # of rows that cannot be used


class Checked(NamedTuple):
    """The prompts of a run, their leakage between roles, and warnings about both."""

    rows: list[dict[str, Any]]
    leakage: Leakage
    warnings: list[str]


class _Reading:
    """Reads the sets. Rows that are incomplete or repeated are refused in one message, or dropped."""

    def __init__(self, config: Config) -> None:
        settings = config.prompts
        self.keeps_columns = config.verifier.type == "function"  # as TRL, which passes every column
        self._drop = {"empty": settings.empty == "drop", "duplicates": settings.duplicates == "drop"}
        self._found: dict[tuple[str, str], dict[str, None]] = {}  # places by setting and kind

    def note(self, setting: str, kind: str, place: str) -> None:
        """Record a row, once for each place: several sets may read one file."""
        self._found.setdefault((setting, kind), {})[place] = None

    def warnings(self) -> list[str]:
        """List the rows that were dropped. DataError for rows that may not be dropped."""
        lines: dict[str, list[str]] = {}
        for (setting, kind), places in self._found.items():
            shown = [*list(places)[:EXAMPLES], *(["…"] if len(places) > EXAMPLES else [])]
            lines.setdefault(setting, []).append(f"rows {kind}: {len(places)} ({'; '.join(shown)})")
        refused = [setting for setting in lines if not self._drop[setting]]
        if refused:
            raise DataError(
                ". ".join(line for setting in refused for line in lines[setting]),
                where="prompts",
                fix="correct these rows, name other columns (answer_column, id_column and the like), or leave rows out "
                f"with {' and '.join(f'prompts.{setting}=drop' for setting in refused)}.",
            )
        return [f"left out: {line}" for setting in lines for line in lines[setting]]


def checked_prompts(config: Config) -> Checked:
    """All prompts of a run: the training pool, the validation sets and the test sets, in that order.

    Raises DataError for a source that is missing, empty or unreadable (with the line), that lacks a column or repeats
    an id; and for leakage between roles, unless `prompts.leakage` allows it.
    """
    sets = {"train": config.prompts.train}
    sets |= {f"validation/{name}": sources for name, sources in config.prompts.validation.items()}
    sets |= {f"test/{name}": test.sources for name, test in config.prompts.test.items()}
    reading = _Reading(config)
    loaded = {name: _load_set(name, sources, config.seed, reading) for name, sources in sets.items()}
    left_out = reading.warnings()
    for name, rows in loaded.items():
        if not rows:
            key = f"prompts.{name.replace('/', '.')}"
            raise DataError("no row is left", where=key, fix="check its paths and hash_range.")
    prompts = [row for rows in loaded.values() for row in rows]
    leakage = find_leakage(prompts)
    if leakage.exact and config.prompts.leakage == "refuse":
        raise DataError(
            f"held-out prompts stand in another role with the same text or id: {described(leakage.exact)}",
            where="prompts",
            fix="remove them from one of the sets (disjoint hash_range values split one file), or allow them with "
            "prompts.leakage=warn.",
        )
    return Checked(prompts, leakage, [*left_out, *leakage_warnings(config, leakage)])


def leakage_warnings(config: Config, leakage: Leakage) -> list[str]:
    """Warnings about leakage that did not stop the run; none under `prompts.leakage=allow`."""
    if config.prompts.leakage == "allow":
        return []
    kinds = {"with the same text or id": leakage.exact, "nearly word for word": leakage.near}
    return [
        f"held-out prompts stand in another role {kind}: {described(matches)} (prompts.leakage=allow silences this)"
        for kind, matches in kinds.items()
        if matches
    ]


def require_pairs(config: Config, prompts: Sequence[Mapping[str, Any]]) -> None:
    """DataError for a validation set of one prompt, where its direction needs two halves."""
    counts = Counter(row["set"] for row in prompts if row["set"].startswith("validation/"))
    if config.select.strategy.reads_influence and 1 in counts.values():
        raise DataError(
            "the direction of a validation set has no error unless it has two prompts or more",
            where=next(f"prompts.{name.replace('/', '.')}" for name, count in counts.items() if count == 1),
            fix="give it a second prompt.",
        )


def make_prompts(config: Config, folder: Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Write `prompts.parquet` to `folder`; returns (rows by set, leakage by kind and sets)."""
    rows, leakage, warnings = checked_prompts(config)
    require_pairs(config, rows)
    for text in warnings:
        warn(text)
    write_table(folder / "prompts.parquet", rows, PROMPTS)
    return dict(Counter(row["set"] for row in rows)), {"leakage": leakage.as_json()}


def data_identity(config: Config) -> dict[str, str]:
    """The inputs of the prompt table besides settings: the run's seed if used, which columns, hashes of local files."""
    sources = [*config.prompts.train, *(s for sources in config.prompts.validation.values() for s in sources)]
    sources += [s for test in config.prompts.test.values() for s in test.sources]
    identity = {}
    if any(s.type == "reasoning_gym" or (s.type == "builtin" and s.seed is None) for s in sources):
        identity["seed"] = str(config.seed)
    if _Reading(config).keeps_columns:
        identity["columns"] = "all"
    for path in sorted({Path(s.path).expanduser() for s in sources if isinstance(s, FileSource)}):
        if path.is_file():  # a missing one is reported where it is read
            identity[str(path)] = file_sha256(path)
    return identity


def _load_set(name: str, sources: Sequence[Source], seed: int, reading: _Reading) -> list[dict[str, Any]]:
    kept: dict[str, tuple[dict[str, Any], str]] = {}  # (row, place) by id
    for number, source in enumerate(sources):
        key = f"prompts.{name.replace('/', '.')}.{number}"
        if isinstance(source, BuiltinSource):
            loaded = list(_builtin(source, name, key, seed))
        elif isinstance(source, ReasoningGymSource):
            loaded = list(_reasoning_gym(source, name, key, seed))
        else:
            loaded = _from_rows(source, key, reading)
        new: dict[str, tuple[dict[str, Any], str]] = {}
        for row, place in loaded:
            identity = row["prompt_id"]
            first = new.get(identity) or kept.get(identity)
            if first is None:
                new[identity] = row, place
                continue
            twice = f"the prompt id {identity!r} occurs twice in {name}: at {first[1]} and at {place}"
            if any(first[0][column] != row[column] for column in ("messages", "answer")):
                raise DataError(
                    f"{twice}, for two prompts", where=key, fix="name a column of unique ids with id_column."
                )
            reading.note("duplicates", f"of {name} that come again", twice)
        kept |= new
    return [row | {"set": name} for row, _ in kept.values()]


def _builtin(source: BuiltinSource, set_name: str, key: str, seed: int) -> Iterator[tuple[dict[str, Any], str]]:
    """The problems of a source; `seed` is used if the source has none."""
    from cropi.builtin import difficulty, generate

    level = source.model_dump(include={"min_length", "max_length", "hint"})
    options = source.model_dump(include={"count", "label_noise", "label_rule", "distractors"})
    options["seed"] = seed if source.seed is None else source.seed
    for family in source.families:
        try:
            rows = generate(family, split=set_name.split("/")[0], level=difficulty(family, **level), **options)
        except ValueError as error:
            raise DataError(str(error), where=key, fix="change the setting it names.") from None
        for number, row in enumerate(rows):
            prompt = {"messages": json.dumps(row["prompt"]), "answer": row["answer"], "source": family, "extra": None}
            yield prompt | {"prompt_id": row["prompt_id"]}, f"{key} {family} problem {number}"


def _reasoning_gym(
    source: ReasoningGymSource, set_name: str, key: str, seed: int
) -> Iterator[tuple[dict[str, Any], str]]:
    """The problems of a source; each role has its own seeds."""
    try:
        import reasoning_gym
    except ImportError:
        raise DataError(
            "the package reasoning-gym is not installed", where=key, fix="pip install 'cropi[reasoning-gym]'."
        ) from None
    role = set_name.split("/")[0]
    for task in source.tasks:
        drawn = derived_seed(seed, "reasoning-gym", role, task) % 2**31
        try:
            problems = reasoning_gym.create_dataset(task, size=source.count, seed=drawn, **source.options)
            entries = [problems[number] for number in range(source.count)]
        except Exception as error:  # tasks raise many kinds
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


def _from_rows(source: FileSource | HubSource, key: str, reading: _Reading) -> list[tuple[dict[str, Any], str]]:
    """(prompt, place) of the rows in the source's hash range. The columns are chosen once for all rows."""
    raw = raw_rows(source, key)
    if not raw:
        raise DataError("the source holds no rows", where=key, fix="check its path.")
    columns = {"prompt": _column(raw, source.prompt_column, PROMPT_COLUMNS, "prompt", key)}
    columns["answer"] = _column(raw, source.answer_column, ANSWER_COLUMNS, "answer", key)
    if source.id_column is not None:
        columns["id"] = _column(raw, source.id_column, (), "id", key)
    low, high = source.hash_range
    found, outside = [], 0
    for row in raw:
        lacking = next((what for what, column in columns.items() if _value(row, column) is None), None)
        if lacking is not None:
            reading.note("empty", f"without {lacking} (column {columns[lacking]})", row.where)
            continue
        prompt = _prompt(source, row, columns, key, whole=reading.keeps_columns)
        if low <= _unit_hash(prompt["prompt_id"]) < high:
            found.append((prompt, row.where))
        else:
            outside += 1
    if outside and not found:
        raise DataError(
            f"all {outside} rows hash outside its hash_range", where=key, fix="widen it, or give more rows."
        )
    return found


def _column(rows: Sequence[Row], named: str | None, usual: Sequence[str], what: str, key: str) -> str:
    """The configured column, else the first of the usual ones that any row has."""
    names = [named] if named is not None else usual
    for name in names:
        if any(_cell(row, name) is not _ABSENT for row in rows):
            return name
    raise DataError(
        f"{rows[0].where} has no {what} (column {' / '.join(names)}); its columns are: {', '.join(rows[0].values)}",
        where=key,
        fix=f"name the column with {what}_column.",
    )


_ABSENT = object()


def _cell(row: Row, column: str) -> Any:
    """The value in a column; `outer.inner` is the key `inner` of an object in the column `outer`."""
    if column in row.values:
        return row.values[column]
    outer, _, inner = column.partition(".")
    nested = row.values.get(outer)
    return nested.get(inner, _ABSENT) if isinstance(nested, dict) else _ABSENT


def _value(row: Row, column: str) -> Any:
    """As `_cell`, but None for an absent column or an empty value."""
    value = _cell(row, column)
    return None if value is _ABSENT or _is_nothing(value) else value


def _is_nothing(value: Any) -> bool:
    """Whether it is null, NaN, blank text, or an empty list or object."""
    if isinstance(value, float):
        return math.isnan(value)
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def _written(value: Any) -> str:
    """Write whole numbers without the decimal point that pandas adds if a column has gaps."""
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
    return str(int(value) if whole else value)


def _prompt(
    source: FileSource | HubSource, row: Row, columns: dict[str, str], key: str, *, whole: bool
) -> dict[str, Any]:
    """Convert a raw row to the project's columns. `whole`: `extra` holds every column but the prompt."""
    answer = _answer(row, columns["answer"], key)
    name = Path(source.path).stem if isinstance(source, FileSource) else source.dataset
    identity = _value(row, columns.get("id", "prompt_id"))
    nested = next((name for name in EXTRA_COLUMNS if isinstance(row.values.get(name), dict)), None)
    extra = row.values[nested] if nested else None
    origin = _value(row, "source") or _value(row, "data_source")
    origin = origin or (extra or {}).get("source_dataset") or name
    refuse_unseen(row.values, row.where, key)
    if whole:
        others = {name: value for name, value in row.values.items() if name not in (columns["prompt"], nested)}
        extra = others | (extra or {})
    fix = "correct the row, or name another column with prompt_column."
    messages = checked_messages(_value(row, columns["prompt"]), row.where, key, fix)
    if columns["prompt"] != "prompt" and not isinstance(messages, str) and messages[-1]["role"] == "assistant":
        raise DataError(
            f"{row.where}: the messages end in the assistant's turn, so the prompt holds its answer",
            where=key,
            fix="remove that turn from the column, and keep its text in an answer column.",
        )
    try:
        text = json.dumps(messages, ensure_ascii=False)
        written = None if extra is None else json.dumps(extra, ensure_ascii=False, default=str)
        f"{text}{answer}{identity}{origin}{written}".encode()
    except TypeError as error:
        raise DataError(f"{row.where}: the messages are not JSON ({error})", where=key, fix=fix) from None
    except UnicodeEncodeError:
        raise DataError(f"{row.where} holds half a surrogate pair", where=key, fix="correct the row's text.") from None
    return {
        "prompt_id": _written(identity) if identity is not None else content_id(text, answer),
        "source": _written(origin),
        "messages": text,
        "answer": answer,
        "extra": written,
    }


def _answer(row: Row, column: str, key: str) -> str:
    answer = _value(row, column)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or answer in (math.inf, -math.inf):
        raise DataError(
            f"{row.where}: the answer {str(answer)[:80]!r} is neither text nor a finite number",
            where=key,
            fix="write it as the text that a right completion would give, or name another column with answer_column.",
        )
    return _written(answer)


def checked_messages(messages: Any, where: str, key: str, fix: str) -> str | list[dict[str, Any]]:
    """Check a prompt: text, or chat messages. Keys without a value are removed.

    Raises DataError for a message without role or content (tool calls may replace it), and for images and the like.
    """

    def refused(what: str) -> DataError:
        return DataError(f"{where}: {what}", where=key, fix=fix)

    neither = "the prompt is neither text nor a list of chat messages"
    if isinstance(messages, str):
        return messages
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        raise refused(neither)
    kept = []
    for number, turn in enumerate(messages, start=1):
        content = turn.get("content")
        if not isinstance(turn.get("role"), str) or not turn["role"]:
            raise refused(f"{neither}: message {number} has no `role`")
        if content is None and not turn.get("tool_calls"):
            raise refused(f"{neither}: message {number} has no `content`")
        if not isinstance(content, str | list | None):
            raise refused(f"{neither}: the `content` of message {number} is neither text nor a list of parts")
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            if kind != "text" or not isinstance(part.get("text"), str):
                raise refused(f"the `content` of message {number} has a part of type {kind!r}; prompts are text alone")
        kept.append({k: v for k, v in turn.items() if v is not None} | {"content": content})
    if not "".join(map(turn_text, kept)).strip():
        raise refused("the prompt is empty")
    return kept


def refuse_unseen(values: Mapping[str, Any], where: str, key: str) -> None:
    """DataError for columns that would make TRL build another prompt from the row."""
    for column in UNSEEN_COLUMNS:
        if column in values and not _is_nothing(values[column]):
            raise DataError(
                f"{where}: the column `{column}` would change what the policy is shown, and training ignores it",
                where=key,
                fix="write its content into the messages, and remove or rename the column.",
            )


def content_id(text: str, answer: str) -> str:
    """16 hexadecimal digits of the SHA-256 of a prompt and its answer."""
    return hashlib.sha256(json.dumps([text, answer]).encode()).hexdigest()[:16]


def _unit_hash(identity: str) -> float:
    """A number in [0, 1) that depends only on an id."""
    return int.from_bytes(hashlib.sha256(identity.encode()).digest()[:6], "big") / (1 << 48)
