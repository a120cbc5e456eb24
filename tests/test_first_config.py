"""`cropi init` on files of several kinds, and the schema that its files name."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from cropi.builtin import POLICY_DIR
from cropi.cli.first_config import init
from cropi.config.loading import load_config, recipe_names, recipe_text
from cropi.config.yaml_text import parse_yaml
from cropi.prompts import checked_prompts
from cropi.rewards.verifier import CORRECT, Answered
from cropi.run_folder import RunFolder
from tests.runs import cropi_error, cropi_ok


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def questions(count: int, answer: str = "{}", **more: Any) -> list[dict[str, Any]]:
    return [{"question": f"What is {n} + {n + 1}?", "answer": answer.format(2 * n + 1), **more} for n in range(count)]


def test_a_file_becomes_a_config_that_holds_every_row_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "my sums.jsonl", questions(60))
    done = cropi_ok("init", "my sums.jsonl", "policy.path=./model", "train.stages=2", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    text = Path("my-sums.yaml").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 13
    config = load_config("my-sums.yaml")
    assert (config.name, config.policy.path, config.train.stages) == ("my-sums", "./model", 2)
    assert (config.select.strategy.type, config.verifier.type) == ("cropi", "numeric")
    rows = checked_prompts(config).rows
    assert sorted(json.loads(row["messages"]) for row in rows) == sorted(row["question"] for row in questions(60))
    for kind in ("train", "validation", "test"):
        count = sum(row["set"].startswith(kind) for row in rows)
        assert count >= 8
        assert f"{kind:<11} {count} rows" in done.stdout
    assert done.stdout.count("held out") == 2
    RunFolder(config)  # nothing is claimed
    assert "exists already" in cropi_error("init", "my sums.jsonl", cwd=tmp_path).stderr


def test_a_constant_column_is_no_prompt_and_the_built_in_policy_gets_room_and_a_step_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"stem": f"{n} and {n}", "key": str(2 * n), "note": "written for a course, " * 9} for n in range(40)]
    write(tmp_path / "x.jsonl", rows)
    cropi_ok("init", "x.jsonl", "policy.path=builtin", cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    config = load_config("x.yaml")
    assert {(row["messages"], row["answer"]) for row in checked_prompts(config).rows} == {
        (json.dumps(row["stem"]), row["key"]) for row in rows
    }
    assert config.collect.max_completion_length == 64
    assert config.trainer["learning_rate"] == 4e-5


@pytest.mark.parametrize(
    ("answer", "verifier", "asked"),
    [
        ("{}", "numeric", None),
        ("{}.5", "numeric", None),
        ("0", "numeric", None),
        ("we add. #### {}", "gsm8k", "####"),
        (r"\frac{{{}}}{{3}}", "math", r"\boxed"),
        ("blue {}", "exact", "Answer:"),
    ],
)
def test_the_verifier_follows_the_form_of_the_answers(
    tmp_path: Path, answer: str, verifier: str, asked: str | None
) -> None:
    write(tmp_path / "x.jsonl", questions(40, answer))
    cropi_ok("init", "x.jsonl", cwd=tmp_path)
    config = load_config(str(tmp_path / "x.yaml"))
    assert config.verifier.type == verifier
    assert (asked or "") in (config.prompts.system_prompt or "")
    assert (config.prompts.system_prompt is None) == (asked is None)
    recorded = questions(1, answer)[0]["answer"]
    row = Answered(config.verifier.completion_with(recorded), recorded, "", "", "")
    assert config.verifier.load()(row) == CORRECT


def test_columns_of_other_names_and_chat_are_found(tmp_path: Path) -> None:
    chat = [
        {"turns": [{"role": "user", "content": f"Please add {n} and 2."}], "target": n + 2, "id": f"a{n}"}
        for n in range(40)
    ]
    write(tmp_path / "chat.jsonl", chat)
    done = cropi_ok("init", "chat.jsonl", cwd=tmp_path)
    assert "'turns' (chat)" in done.stdout
    (source,) = load_config(str(tmp_path / "chat.yaml")).prompts.train
    assert (source.prompt_column, source.answer_column) == ("turns", "target")


class Terminal(io.StringIO):
    """A standard input at which somebody types."""

    def isatty(self) -> bool:
        return True


def typed(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr("sys.stdin", Terminal("".join(f"{line}\n" for line in lines)))


def test_without_a_file_a_terminal_is_asked_for_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A column that is not there is asked for again; an empty line takes the proposal."""
    rows = [{"question": f"old {n}", "problem": f"new {n}", "answer": str(n), "k": "z"} for n in range(40)]
    write(tmp_path / "sums.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    typed(monkeypatch, "sums.jsonl", "nosuch", "problem", "", "mine.score", "./model", "first")
    init()
    config = load_config("first.yaml")
    (source,) = config.prompts.train
    assert (source.prompt_column, source.answer_column) == ("problem", None)
    assert all(json.loads(row["messages"]).startswith("new") for row in checked_prompts(config).rows)
    assert config.verifier.model_dump(include={"type", "path", "graded"}) == {
        "type": "function",
        "path": "mine.score",
        "graded": True,
    }
    assert (config.name, config.policy.path, config.prompts.system_prompt) == ("first", "./model", None)


def test_a_file_may_be_named_by_a_number(tmp_path: Path) -> None:
    for name in ("08", "1e5"):
        write(tmp_path / f"{name}.jsonl", questions(40))
        cropi_ok("init", f"{name}.jsonl", cwd=tmp_path)
        assert load_config(tmp_path / f"{name}.yaml").name == name


def test_nothing_of_the_data_acts_on_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    task, said = "ta\x1b]0;x\x07sk", "sa\u202eid"
    write(tmp_path / "a.jsonl", [{task: f"Say {n}", said: n} for n in range(40)])
    (tmp_path / "mine.py").write_text("def f(completions, **_):\n    raise ValueError('\\x1b[2J')\n")
    monkeypatch.chdir(tmp_path)
    typed(monkeypatch, "nosuch", "", "")  # the second takes the proposal
    init(Path("a.jsonl"), verifier="mine.f")
    (source,) = load_config("a.yaml").prompts.train
    assert (source.prompt_column, source.answer_column) == (task, said)
    out, err = capsys.readouterr()
    assert "the verifier fails" in out
    assert not set("\x1b\x07\u202e") & set(out + err)


def test_a_terminal_is_asked_for_what_is_unclear_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "clear.jsonl", questions(40))
    write(tmp_path / "words.jsonl", questions(40, "word {}"))
    write(tmp_path / "names.jsonl", [{"task": f"Say {n}", "said": n} for n in range(40)])
    monkeypatch.chdir(tmp_path)
    for name, lines in {"clear": [], "words": ["boxed"], "names": ["", "said"]}.items():
        typed(monkeypatch, *lines)
        init(Path(f"{name}.jsonl"))
        assert sys.stdin.read() == ""
    assert load_config("words.yaml").verifier.type == "boxed"
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert "no data file is named" in cropi_error("init", cwd=tmp_path).stderr


def test_a_verifier_is_taken_from_the_command_line(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", questions(40, "word {}"))
    cropi_ok("init", "x.jsonl", "--verifier", "boxed", "--output", "a.yaml", cwd=tmp_path)
    cropi_ok("init", "x.jsonl", "verifier.type=function", "verifier.path=m.f", "--output", "b.yaml", cwd=tmp_path)
    assert load_config(str(tmp_path / "a.yaml")).verifier.type == "boxed"
    assert load_config(str(tmp_path / "b.yaml")).verifier.path == "m.f"


def test_a_reward_function_is_tried_on_the_first_row(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", [row | {"level": 3} for row in questions(40)])
    functions = {"good": "level, **kwargs", "bad": "depth, level"}
    code = (f"def {name}(completions, {given}):\n    return [1.0]\n" for name, given in functions.items())
    (tmp_path / "mine.py").write_text("".join(code))
    said = {
        name: cropi_ok("init", "x.jsonl", "--verifier", f"mine.{name}", "--output", f"{name}.yaml", cwd=tmp_path).stdout
        for name in ("good", "bad", "absent")
    }
    assert "the verifier fails" not in said["good"]
    assert "mine.bad needs depth, and the row has answer, completions, level, prompts, source" in said["bad"]
    assert "mine has no absent" in said["absent"]


def test_numbers_that_are_too_large_are_texts(tmp_path: Path) -> None:
    write(
        tmp_path / "x.jsonl",
        [*questions(40), {"question": "?", "answer": "1e999999999"}, {"question": "!", "answer": 10**400}],
    )
    cropi_ok("init", "x.jsonl", cwd=tmp_path)
    assert load_config(str(tmp_path / "x.yaml")).verifier.type == "exact"


def test_guessed_columns_and_files_without_rows_are_named(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", [{"frage": f"Was ist {n} + 1?", "schwer": n % 3} for n in range(40)])
    assert "the columns were guessed" in cropi_ok("init", "x.jsonl", cwd=tmp_path).stdout
    write(tmp_path / "one.jsonl", [{"frage": "Was ist 50 + 1?", "schwer": 7}])
    held_out = cropi_error("init", "x.jsonl", "--validation", "one.jsonl", "--output", "y.yaml", cwd=tmp_path)
    assert "give it a second prompt" in held_out.stderr
    (tmp_path / "empty.jsonl").write_text("")
    assert "holds no rows" in cropi_error("init", "empty.jsonl", cwd=tmp_path).stderr


def test_a_policy_in_a_folder_sets_template_and_length(tmp_path: Path) -> None:
    """The built-in one has no chat template and room for 128 tokens."""
    write(tmp_path / "x.jsonl", questions(40, "word {}"))
    done = cropi_ok("init", "x.jsonl", f"policy.path={POLICY_DIR}", cwd=tmp_path)
    config = load_config(str(tmp_path / "x.yaml"))
    assert config.prompts.system_prompt is None
    assert "no chat template" in done.stdout
    assert config.collect.max_completion_length == 64


def test_the_files_of_verl_are_understood(tmp_path: Path) -> None:
    more = {"data_source": "s", "ability": "a"}
    rows = [
        {"prompt": [{"role": "user", "content": f"{n} + 0?"}], "reward_model": {"ground_truth": str(n)}, **more}
        for n in range(40)
    ]
    write(tmp_path / "verl.jsonl", rows)
    assert "'reward_model.ground_truth'" in cropi_ok("init", "verl.jsonl", cwd=tmp_path).stdout
    config = load_config(str(tmp_path / "verl.yaml"))
    assert config.prompts.train[0].answer_column is None
    assert config.verifier.type == "numeric"


def test_files_for_the_held_out_sets_leave_the_whole_file_for_training(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", questions(30))
    write(tmp_path / "v.jsonl", [{"question": f"{n} - 1", "answer": n - 1} for n in range(9)])
    write(tmp_path / "t.jsonl", [{"question": f"{n} * 3", "answer": n * 3} for n in range(7)])
    done = cropi_ok("init", "x.jsonl", "--validation", "v.jsonl", "--test", "t.jsonl", cwd=tmp_path)
    assert [line.split()[1] for line in done.stdout.splitlines()[1:4]] == ["30", "9", "7"]
    assert "held out" not in done.stdout


def test_a_repeated_row_is_refused_with_the_words_that_drop_it(tmp_path: Path) -> None:
    write(tmp_path / "x.jsonl", [*questions(40), questions(1)[0]])
    assert "prompts.duplicates=drop" in cropi_error("init", "x.jsonl", cwd=tmp_path).stderr
    assert not (tmp_path / "x.yaml").exists()
    cropi_ok("init", "x.jsonl", "prompts.duplicates=drop", cwd=tmp_path)
    write(tmp_path / "y.jsonl", [{"question": "2 + 2"}])
    assert "no two columns" in cropi_error("init", "y.jsonl", cwd=tmp_path).stderr


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return json.loads(cropi_ok("schema", cwd=tmp_path_factory.mktemp("schema")).stdout)


def test_the_schema_accepts_every_recipe_and_names_what_is_wrong(schema: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    check = jsonschema.Draft202012Validator(schema)
    for name in recipe_names():
        assert list(check.iter_errors(parse_yaml(recipe_text(name), name))) == [], name
    values = parse_yaml(recipe_text("quickstart"), "")
    assert not check.is_valid(values | {"sed": 1})
    for strategy in ("cropi-paper", {"type": "cropi-paper"}, {"type": "influence", "static": True}):
        assert check.is_valid(values | {"select": {"strategy": strategy}})
    for strategy in ("nosuch", {"type": "nosuch"}, {"type": "influence", "statics": True}):
        assert not check.is_valid(values | {"select": {"strategy": strategy}})


def test_files_that_are_written_name_the_schema_beside_them(tmp_path: Path, schema: dict[str, Any]) -> None:
    cropi_ok("recipes", "copy", "quickstart", cwd=tmp_path)
    first, _, rest = (tmp_path / "quickstart.yaml").read_text(encoding="utf-8").partition("\n")
    name = first.partition("$schema=")[2]
    assert first.startswith("# yaml-language-server: ")
    assert json.loads((tmp_path / name).read_text(encoding="utf-8")) == schema
    assert rest == recipe_text("quickstart")
    assert schema["$defs"]["TrainConfig"]["properties"]["stages"]["description"].startswith("Number of stages")
