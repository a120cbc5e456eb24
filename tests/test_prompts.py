import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cropi.config import Config
from cropi.config.loading import load_config, validate_config
from cropi.errors import DataError
from cropi.prompts import checked_prompts, data_identity
from tests.runs import json_lines


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def question(number: int, **more: Any) -> dict[str, Any]:
    return {"question": f"What is {number} + 1?", "answer": str(number + 1), **more}


def config(train: str, **source: Any) -> Config:
    values = load_config("quickstart").resolved()
    folder = Path(train).parent
    write_rows(folder / "validation.jsonl", [question(n) for n in range(1000, 1010)])
    write_rows(folder / "test.jsonl", [question(n) for n in range(2000, 2010)])
    values["prompts"] |= {
        "train": [{"type": "file", "path": train, **source}],
        "validation": {"v": [{"type": "file", "path": str(folder / "validation.jsonl")}]},
        "test": {"t": {"sources": [{"type": "file", "path": str(folder / "test.jsonl")}]}},
    }
    return validate_config(values, "test")


def train_rows(config: Config) -> list[dict[str, Any]]:
    return [row for row in checked_prompts(config).rows if row["set"] == "train"]


def test_jsonl_and_parquet_give_the_same_prompts(tmp_path: Path) -> None:
    rows = [question(n) for n in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pool.parquet")
    from_jsonl = train_rows(config(write_rows(tmp_path / "pool.jsonl", rows)))
    from_parquet = train_rows(config(str(tmp_path / "pool.parquet")))
    assert from_jsonl == from_parquet
    assert json.loads(from_jsonl[0]["messages"]) == "What is 0 + 1?"
    assert {row["source"] for row in from_jsonl} == {"pool"}


def test_ids_come_from_content_or_a_column(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pool.jsonl", [question(n, key=f"k{n}") for n in range(3)])
    by_content = [row["prompt_id"] for row in train_rows(config(path))]
    assert len(set(by_content)) == 3
    assert by_content == [row["prompt_id"] for row in train_rows(config(path))]
    assert [row["prompt_id"] for row in train_rows(config(path, id_column="key"))] == ["k0", "k1", "k2"]


def test_chat_messages_and_verl_rows_are_read(tmp_path: Path) -> None:
    row = {
        "prompt": [{"role": "user", "content": "1+1?"}],
        "reward_model": {"style": "rule", "ground_truth": "2"},
        "data_source": "sums",
    }
    (loaded,) = train_rows(config(write_rows(tmp_path / "pool.jsonl", [row])))
    assert json.loads(loaded["messages"]) == row["prompt"]
    assert (loaded["answer"], loaded["source"]) == ("2", "sums")


def test_what_verifiers_may_ask_for_is_kept(tmp_path: Path) -> None:
    """verl's extra_info or reasoning-gym's metadata; null if there is none."""
    rows = [
        question(1, extra_info={"index": 7, "split": "train"}),
        question(2, metadata={"source_dataset": "chain_sum", "level": 3}),
        question(3, metadata="text", mine={"a": [1]}),
        question(4),
    ]
    path = write_rows(tmp_path / "pool.jsonl", rows)
    loaded = [None if row["extra"] is None else json.loads(row["extra"]) for row in train_rows(config(path))]
    assert loaded == [rows[0]["extra_info"], rows[1]["metadata"], None, None]
    assert [row["source"] for row in train_rows(config(path))] == ["pool", "chain_sum", "pool", "pool"]


def test_a_reward_function_gets_every_column_as_in_trl(tmp_path: Path) -> None:
    """Under the columns' own names, the answer's too."""
    rows = [
        {"task": "1 + 1", "expected": "2", "tests": ["a"], "level": 3, "metadata": {"level": 4}},
        {"task": "1 + 2", "expected": "3", "tests": None, "level": 1, "metadata": "text"},
    ]
    path = write_rows(tmp_path / "pool.jsonl", rows)
    values = config(path).resolved() | {"verifier": {"type": "function", "path": "mine.right"}}
    values["prompts"]["train"] = [{"type": "file", "path": path, "prompt_column": "task", "answer_column": "expected"}]
    loaded = [json.loads(row["extra"]) for row in train_rows(validate_config(values, "test"))]
    assert loaded == [
        {"expected": "2", "tests": ["a"], "level": 4},
        {"expected": "3", "tests": None, "level": 1, "metadata": "text"},
    ]


def test_reasoning_gym_problems_differ_by_role_and_seed() -> None:
    values = load_config("quickstart").resolved()
    source = {"type": "reasoning_gym", "tasks": ["chain_sum", "leg_counting"], "count": 6}
    values["prompts"] |= {"train": [source], "validation": {"v": [source]}, "test": {"t": {"sources": [source]}}}
    rows = checked_prompts(validate_config(values, "test")).rows
    assert len(rows) == 36
    assert len({row["messages"] for row in rows}) == 36
    assert {row["source"] for row in rows} == {"chain_sum", "leg_counting"}
    assert json.loads(rows[0]["extra"])["source_dataset"] == "chain_sum"
    assert checked_prompts(validate_config(values, "test")).rows == rows
    other = checked_prompts(validate_config(values | {"seed": 1}, "test")).rows
    assert not {row["messages"] for row in rows if row["source"] == "chain_sum"} & {row["messages"] for row in other}
    source["tasks"] = ["no_such_task"]
    with pytest.raises(DataError, match="'no_such_task' cannot be made"):
        checked_prompts(validate_config(values, "test"))


def test_hash_ranges_split_a_file_into_disjoint_parts(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pool.jsonl", [question(n) for n in range(200)])
    parts = [{r["prompt_id"] for r in train_rows(config(path, hash_range=[a, b]))} for a, b in ((0, 0.5), (0.5, 1))]
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 200
    assert 70 < len(parts[0]) < 130


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no rows"),
        (
            [question(1), question(1)],
            "rows of train that come again: 1 .*occurs twice in train: at .*line 1 and at .*line 2",
        ),
        (
            [{"question": "a"}],
            r"line 1 has no answer \(column reward_model.ground_truth / answer / solution / ground_truth\)",
        ),
        ([{"text": "a", "answer": "1"}], "has no prompt .*its columns are: text, answer"),
        ([question(1), {"question": "  ", "answer": "1"}], r"rows without prompt \(column question\): 1 \(.*line 2\)"),
        ([{"prompt": [{"role": "user"}], "answer": "1"}], "neither text nor a list of chat messages"),
        ([question(1000)], "is in validation/v|is in train and in validation/v"),
        ([{"question": "what is  2000 + 1?", "answer": "other"}], "test/t"),  # same words, other case and spaces
    ],
)
def test_bad_data_is_refused_with_the_place(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    settings = config(write_rows(tmp_path / "pool.jsonl", rows))
    with pytest.raises(DataError, match=message) as caught:
        checked_prompts(settings)
    assert "Fix: " in str(caught.value)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no file"):
        checked_prompts(config(str(tmp_path / "none.jsonl")))
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(DataError, match=r"folder.jsonl is a folder"):
        checked_prompts(config(str(tmp_path / "folder.jsonl")))
    (tmp_path / "pool.jsonl").write_bytes(json.dumps(question(1)).encode() + b"\n\xff\xfe\n")
    with pytest.raises(DataError, match="line 2 is not UTF-8"):
        checked_prompts(config(str(tmp_path / "pool.jsonl")))


def test_a_hub_dataset_out_of_reach_is_an_error() -> None:
    values = load_config("quickstart").resolved()
    values["prompts"]["train"] = [{"type": "hub", "dataset": "nobody/nothing"}]
    with pytest.raises(DataError, match="cannot be loaded"):
        checked_prompts(validate_config(values, "test"))


def test_builtin_parameters_out_of_range_are_named() -> None:
    for override in ("prompts.train.0.families=[nosuch]", "prompts.train.0.max_length=99"):
        with pytest.raises(DataError, match=r"prompts\.train\.0"):
            checked_prompts(load_config("quickstart", [override]))


def problems(config: Config) -> dict[str, set[str]]:
    """Prompt ids by set."""
    found: dict[str, set[str]] = {}
    for row in checked_prompts(config).rows:
        found.setdefault(row["set"], set()).add(row["prompt_id"])
    return found


def test_builtin_problems_follow_the_seed_of_the_run_unless_they_have_their_own() -> None:
    unset = ["prompts.train.0.seed=null", "prompts.test.sum.sources.0.seed=null"]
    own, first, second = (
        problems(load_config("quickstart", overrides))
        for overrides in (["prompts.train.0.seed=5", "prompts.test.sum.sources.0.seed=5"], [*unset, "seed=5"], unset)
    )
    assert own == first
    for name in ("train", "test/sum"):
        assert first[name] != second[name]
    assert first["validation/sum"] == second["validation/sum"]


def test_the_seed_of_a_run_counts_where_a_source_takes_it() -> None:
    def identity(*overrides: str) -> dict[str, str]:
        return data_identity(load_config("quickstart", list(overrides)))

    assert identity("seed=5") == identity("seed=6")
    unset = "prompts.validation.machine.0.seed=null"
    assert identity("seed=5", unset) != identity("seed=6", unset)
    assert identity("seed=5", unset) == identity("seed=5", unset)


def test_label_rule_and_hint_reach_the_rows() -> None:
    pool = "prompts.train=[{type: builtin, families: [compass], count: 20, seed: 1, %s}]"
    right, early, hinted = (
        train_rows(load_config("quickstart", [pool % more]))
        for more in ("hint: 0", "label_rule: stop_early", "hint: 1")
    )
    assert all(a["answer"] != b["answer"] for a, b in zip(right, early, strict=True))  # every turn changes the heading
    assert all(json.loads(r["messages"]).endswith(f" {r['answer']}") for r in hinted)


def text_of(rows: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(json.loads(row["messages"]), row["answer"]) for row in rows]


PAIRS = [('a, "b"\nc?', "05"), ("d?", "NA")]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("pool.csv", 'question,answer\n"a, ""b""\nc?",05\nd?,NA\n'),
        ("pool.CSV", '\ufeffquestion,answer\r\n"a, ""b""\nc?",05\r\n\r\nd?,NA\r\n'),
        ("pool.JSONL", "".join(json.dumps({"question": q, "answer": a}) + "\r\n\r\n" for q, a in PAIRS)),
        ("pool.jsonl", "\ufeff" + "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in PAIRS)),
        ("pool.json", "\ufeff \n" + json.dumps([{"question": q, "answer": a} for q, a in PAIRS], indent=1)),
        ("pool.Json", "".join(json.dumps({"question": q, "answer": a}) + "\n" for q, a in PAIRS)),
    ],
)
def test_every_format_is_read_and_texts_stay_as_they_are(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert text_of(train_rows(config(str(tmp_path / name)))) == PAIRS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("pool.parquet", "PAR1 not really", "cannot be read as parquet"),
        ("pool.jsonl", '{"question": "a", "answer": "1"}\n{"question": "a", \n', "line 2 is not JSON"),
        ("pool.jsonl", '{"question": "a", "answer": "1"}\n[1]\n', "line 2 is not a JSON object"),
        ("pool.json", '{"data": 1,\n "b": 2}', "line 1 is not JSON"),
        ("pool.json", "[1]", "row 1 is not a JSON object"),
        ("pool.json", '[{"question": "a"', "the file is not JSON"),
        ("pool.jsonl", '{"question": "a", "answer": "1", "answer": "2"}', "the key 'answer' occurs twice"),
        ("pool.jsonl", "[" * 100_000, "line 1 is not JSON"),
        ("pool.jsonl", '{"question": "a", "answer": ' + "1" * 5000 + "}", "line 1 is not JSON"),
        ("pool.csv", "question,answer\na\n", "line 2 has more or fewer values"),
        ("pool.csv", "question,answer\na,1,2\n", "line 2 has more or fewer values"),
        ("pool.csv", "answer,answer\na,1\n", "two columns have one name"),
        ("pool.csv", 'question,answer\n"a,1\n', "cannot be read as csv"), ("pool.csv", "", "holds no rows"),
        ("pool.xlsx", "", "none of .jsonl, .json, .csv, .parquet"),
        ("latin.csv", "question,answer\n\xe9,1\n", "latin.csv is not UTF-8"),
        ("latin.jsonl", '{"question": "\xe9"}', "line 1 is not UTF-8"),
        ("latin.json", '[{"question": "\xe9"}]', "the file is not UTF-8"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_with_the_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="latin-1")
    with pytest.raises(DataError, match=message):
        checked_prompts(config(str(tmp_path / name)))


@pytest.mark.parametrize("answer", ["NaN", "null", '""', '" \\n"'])
def test_a_missing_answer_is_no_gold_answer(tmp_path: Path, answer: str) -> None:
    """And no other column takes its place: the file has an `answer` column."""
    path = tmp_path / "pool.jsonl"
    lines = [json.dumps(question(n, solution=f"long text {n}")) for n in range(3)]
    path.write_text("\n".join([*lines, f'{{"question": "a", "answer": {answer}, "solution": "long text"}}']))
    with pytest.raises(DataError, match=r"(?s)rows without answer \(column answer\): 1 \(.*line 4.*prompts.empty=drop"):
        checked_prompts(config(str(path)))
    if answer in ("NaN", "null"):
        values = {"question": "a", "answer": float("nan") if answer == "NaN" else None}
        pq.write_table(pa.Table.from_pylist([{"question": "b", "answer": 1.0}, values]), tmp_path / "pool.parquet")
        with pytest.raises(DataError, match=r"rows without answer \(column answer\): 1 \(.*row 2"):
            checked_prompts(config(str(tmp_path / "pool.parquet")))


def test_columns_are_decided_once_for_a_file(tmp_path: Path) -> None:
    """Rows without a column lack it, though another usual column holds something."""
    cases: list[tuple[list[dict[str, Any]], str]] = [
        ([question(1), {"question": "b", "solution": "2"}], "answer"),
        ([{"prompt": None, "question": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}], "prompt"),
        ([question(1, reward_model={"ground_truth": "3"}), question(2)], "answer"),
        ([question(1, reward_model={"ground_truth": None})], "answer"),
    ]
    for rows, what in cases:
        with pytest.raises(DataError, match=f"rows without {what}"):
            checked_prompts(config(write_rows(tmp_path / "pool.jsonl", rows)))
    path = write_rows(tmp_path / "pool.jsonl", [{"question": "b", "solution": "2", "answer": None}])
    assert text_of(train_rows(config(path, answer_column="solution"))) == [("b", "2")]


@pytest.mark.parametrize(
    ("answer", "text"), [("5", "5"), (5, "5"), (5.0, "5"), (0.5, "0.5"), (-0.0, "0"), (1e300, "1e+300"), (" 5", " 5")]
)
def test_a_number_is_written_as_one_writes_it(tmp_path: Path, answer: Any, text: str) -> None:
    """A column of whole numbers that has a gap comes out of pandas as floats."""
    for row in (question(1) | {"answer": answer}, question(1, reward_model={"ground_truth": answer})):
        (loaded,) = train_rows(config(write_rows(tmp_path / "pool.jsonl", [row])))
        assert loaded["answer"] == text


@pytest.mark.parametrize("answer", [["4"], {"a": 1}, True, False, float("inf"), float("-inf")])
def test_an_answer_of_another_kind_is_refused(tmp_path: Path, answer: Any) -> None:
    """verl's `ground_truth` as well."""
    for row in (question(1) | {"answer": answer}, question(1, reward_model={"ground_truth": answer})):
        with pytest.raises(DataError, match=r"line 1: the answer .* is neither text nor a finite number"):
            checked_prompts(config(write_rows(tmp_path / "pool.jsonl", [row])))


def test_what_is_missing_or_repeated_is_counted_in_one_message_or_dropped(tmp_path: Path) -> None:
    rows = [question(1), question(2), question(1), question(1), question(3) | {"answer": None}, {"question": " "}]
    loaded = config(write_rows(tmp_path / "pool.jsonl", rows))
    with pytest.raises(DataError) as caught:
        checked_prompts(loaded)
    for part in (
        "rows without answer (column answer): 1 (",
        "rows without prompt (column question): 1 (",
        "rows of train that come again: 2 (",
        "prompts.duplicates=drop",
        "prompts.empty=drop",
    ):
        assert part in str(caught.value)
    values = loaded.resolved()
    values["prompts"] |= {"duplicates": "drop", "empty": "drop"}
    checked = checked_prompts(validate_config(values, "test"))
    assert text_of([r for r in checked.rows if r["set"] == "train"]) == [
        (question(n)["question"], str(n + 1)) for n in (1, 2)
    ]
    assert len(checked.warnings) == 3
    values["prompts"]["empty"] = "refuse"
    with pytest.raises(DataError, match="without answer") as caught:
        checked_prompts(validate_config(values, "test"))
    assert "come again" not in str(caught.value)


def test_one_id_for_two_prompts_is_never_dropped(tmp_path: Path) -> None:
    rows = [question(1, key="a"), question(2, key="a")]
    values = config(write_rows(tmp_path / "pool.jsonl", rows), id_column="key").resolved()
    values["prompts"]["duplicates"] = "drop"
    with pytest.raises(DataError, match=r"'a' occurs twice in train.*for two prompts"):
        checked_prompts(validate_config(values, "test"))


def test_a_file_split_into_roles_reports_a_row_once(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "pool.jsonl", [*(question(n) for n in range(40)), {"question": "a", "answer": ""}])
    values = config(path, hash_range=[0, 0.5]).resolved()
    values["prompts"]["validation"] = {"v": [{"type": "file", "path": path, "hash_range": [0.5, 1]}]}
    with pytest.raises(DataError, match=r"without answer \(column answer\): 1 \("):
        checked_prompts(validate_config(values, "test"))


def test_ids_and_sources_that_are_missing_in_pandas(tmp_path: Path) -> None:
    nan = float("nan")
    rows = [question(1, key=7.0, source="s"), question(2, key=8.0, source=nan)]
    loaded = train_rows(config(write_rows(tmp_path / "pool.jsonl", rows), id_column="key"))
    assert [(row["prompt_id"], row["source"]) for row in loaded] == [("7", "s"), ("8", "pool")]
    with pytest.raises(DataError, match=r"rows without id \(column key\): 1"):
        checked_prompts(config(write_rows(tmp_path / "pool.jsonl", [question(1, key=nan)]), id_column="key"))


TOOL_CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": None}}}
CONVERSATION = [
    {"role": "system", "content": "brief", "name": "rules"},
    {"content": [{"type": "text", "text": "1"}, {"type": "text", "text": "+1?"}], "role": "user"},
    {"role": "assistant", "content": None, "reasoning_content": "add them", "tool_calls": [TOOL_CALL], "weight": 0},
    {"role": "tool", "name": "add", "content": "2"},
]


def test_messages_are_kept_whole(tmp_path: Path) -> None:
    """All keys with a value, in their order; a column `messages` is read where there is none of the other names."""
    rows: list[dict[str, Any]] = [{"messages": CONVERSATION, "answer": "2"}, {"messages": "plain", "answer": "1"}]
    whole, plain = train_rows(config(write_rows(tmp_path / "pool.jsonl", rows)))
    assert json.loads(whole["messages"]) == CONVERSATION
    assert list(json.loads(whole["messages"])[1]) == ["content", "role"]  # templates may write a message as JSON
    assert json.loads(plain["messages"]) == "plain"


def turn(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


@pytest.mark.parametrize(("row", "message"), json_lines(Path(__file__).with_name("refused_prompts.jsonl")))
def test_what_a_prompt_cannot_show_is_refused_by_its_key(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        checked_prompts(config(write_rows(tmp_path / "pool.jsonl", [row | {"answer": "1"}])))
    assert "Fix: " in str(caught.value)


def test_columns_without_a_value_change_no_prompt(tmp_path: Path) -> None:
    nothing: list[Any] = [[], None, "", float("nan")]
    rows = [question(n, tools=tools, images=None) for n, tools in enumerate(nothing)]
    assert len(train_rows(config(write_rows(tmp_path / "pool.jsonl", rows)))) == 4


def test_messages_that_are_not_json_are_refused(tmp_path: Path) -> None:
    rows = [{"prompt": [turn("a", at=datetime(2026, 1, 1, tzinfo=UTC))], "answer": "1"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "pool.parquet")
    with pytest.raises(DataError, match="the messages are not JSON"):
        checked_prompts(config(str(tmp_path / "pool.parquet")))


def test_what_tool_calls_say_tells_prompts_apart(tmp_path: Path) -> None:
    """In the guard against leakage."""
    other = json.loads(json.dumps(CONVERSATION))
    other[2]["tool_calls"][0]["function"]["arguments"]["a"] = 7
    values = config(write_rows(tmp_path / "pool.jsonl", [{"prompt": CONVERSATION, "answer": "2"}])).resolved()
    held_out = write_rows(tmp_path / "validation.jsonl", [{"prompt": other, "answer": "8"}])
    assert len(checked_prompts(validate_config(values, "test")).rows) == 12
    write_rows(Path(held_out), [{"prompt": CONVERSATION, "answer": "8"}])
    with pytest.raises(DataError, match="held-out prompts"):
        checked_prompts(validate_config(values, "test"))
