"""`cropi verify` and `cropi audit-rewards`."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cropi.config.loading import load_config
from cropi.errors import ConfigError
from cropi.rewards.reward_audit import audit_of
from cropi.rewards.verifiers.exact_text import ExactVerifier
from tests.runs import cropi_error, cropi_ok


def verify(text: str, *arguments: str, cwd: Path | None = None) -> tuple[list[dict[str, Any]], str, int]:
    command = [sys.executable, "-m", "cropi", "verify", *arguments]
    done = subprocess.run(command, input=text, capture_output=True, text=True, cwd=cwd, timeout=120, check=False)
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr, done.returncode


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_one_verdict_a_row_in_order() -> None:
    rows = [{"completion": f"so {n}", "answer": "3"} for n in range(5)] + [{"completion": "?", "answer": "3"}]
    found, errors, code = verify(lines(*rows), "--verifier", "numeric")
    assert [row["verdict"] for row in found] == ["wrong"] * 3 + ["correct", "wrong", "unparseable_answer"]
    assert all(set(row) == {"verdict", "seconds"} and row["seconds"] >= 0 for row in found)
    counts, _, ended = errors.splitlines()[-1].partition("; ")  # in the order in which processes answered
    assert (sorted(counts.split(", ")), ended) == (
        ["1 correct", "1 unparseable_answer", "4 wrong"],
        "0 processes ended",
    )
    assert code == 0


def test_settings_and_limits_of_a_verifier_and_a_function_in_the_working_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import time\n"
        "def f(completions, answer, **_):\n"
        "    time.sleep(60 if completions[0] == 'slow' else 0)\n"
        "    return [float(completions[0] == answer[0])]\n"
    )
    rows = [{"completion": text, "answer": "7"} for text in ("7", "slow", "8")]
    found, _, code = verify(
        lines(*rows), "--verifier", "function", "--option", "path=mine.f", "--seconds", "0.5", cwd=tmp_path
    )
    assert [row["verdict"] for row in found] == ["correct", "timeout", "wrong"]
    assert found[1]["note"] == "took too long"
    assert code == 0


def test_grades_are_shown(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(completions, **_):\n    return [len(completions[0]) / 4]\n")
    rows = [{"completion": text, "answer": "7"} for text in ("7", "777", "77777")]
    options = ["--option", "path=mine.f", "--option", "graded=true"]
    found, _, code = verify(lines(*rows), "--verifier", "function", *options, cwd=tmp_path)
    assert [(row["verdict"], row.get("reward")) for row in found] == [("wrong", 0.25), ("correct", 0.75), ("error", 0)]
    assert "outside 0 to 1" in found[2]["note"]
    assert code == 0


@pytest.mark.parametrize(
    ("text", "arguments", "message"),
    [
        ("", ["--verifier", "nummeric"], "did you mean 'numeric'?"),
        ("", ["--verifier", "exact", "--option", "mark=x"], "unknown key verifier.mark"),
        (
            "",
            ["--verifier", "function", "--option", "path=a.b", "--option", "graded=true", "--option", "threshold=1.5"],
            "threshold must be above 0 and at most 1 where graded",
        ),
        ("", ["--verifier", "exact", "--option", "marker"], "key.path=value"),
        ("[1]\n", ["--verifier", "exact"], "standard input, line 1"),
        ("{\n", ["--verifier", "exact"], "standard input, line 1: not JSON"),
        (lines({"completion": "7"}), ["--verifier", "exact"], "lacks completion or answer"),
        (lines({"completion": 7, "answer": "7"}), ["--verifier", "exact"], "not an object of texts"),
        ("", ["--verifier", "exact", "--processes", "2000"], "verification.processes is 2000"),
        ("", ["--verifier", "exact", "--seconds", "2000000"], "verification.seconds is 2000000"),
        ("", ["--verifier", "exact", "--memory-mb", "2000000000"], "verification.memory_mb is 2000000000"),
        (
            lines({"completion": "7", "answer": "7"}),
            ["--verifier", "function", "--option", "path=a.b"],
            "a.b cannot be",
        ),
    ],
)
def test_what_a_user_can_fix(text, arguments, message, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    done = cropi_error("verify", *arguments, cwd=tmp_path)
    assert message in done.stderr
    assert done.stdout == ""


def test_an_interrupt_ends_it_at_once(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ndef f(completions, **_):\n    time.sleep(600)\n    return [1.0]\n")
    command = [sys.executable, "-m", "cropi", "verify", "--verifier", "function", "--option", "path=slow.f"]
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen([*command, "--seconds", "600"], cwd=tmp_path, **pipes) as running:
        running.stdin.write(lines({"completion": "7", "answer": "7"}).encode())
        running.stdin.close()
        time.sleep(4)
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=10) == 130


PROMPTS = [
    {"prompt_id": name, "source": source, "messages": '"?"', "answer": answer, "extra": None}
    for name, source, answer in (("a", "easy", "1"), ("b", "easy", "2"), ("c", "hard", "3"), ("d", "hard", "none"))
]


def test_an_audit_by_hand() -> None:
    config = load_config("quickstart", ["verifier={type: numeric}"])
    rows = [PROMPTS[n] for n in (0, 0, 1, 1, 2, 2, 3, 3)]
    texts = ["so 1", "1 or 2", "2", "?", "?", "?", "3", "7"]
    audit = audit_of(config, PROMPTS, rows, texts, "by hand", ExactVerifier(type="exact"))
    assert audit.gold == {"correct": 3, "unparseable_gold": 1}
    assert audit.bad_gold == [{"prompt_id": "d", "answer": "none", "verdict": "unparseable_gold"}]
    assert audit.sources == {
        "easy": {"completions": 4, "in_format": 0.75, "right": 0.5},
        "hard": {"completions": 4, "in_format": 0.0, "right": 0.0},
    }
    assert audit.verdicts == {"correct": 2, "wrong": 1, "unparseable_answer": 3, "unparseable_gold": 2}
    assert (audit.disagreement["count"], audit.disagreement["first_only"], audit.disagreement["of"]) == (1, 1, 8)
    assert [row["completion"] for row in audit.disagreement["examples"]] == ["so 1"]
    assert any("1 gold answers cannot be read" in text for text in audit.fixes)
    assert any("few completions of easy, hard" in text for text in audit.fixes)
    assert "numeric and exact disagree on 1 of 8" in audit.as_text()


def test_an_audit_of_grades_tells_their_mean() -> None:
    config = load_config("quickstart", ["verifier={type: function, path: tests.rewards.functions.near, graded: true}"])
    rows = [PROMPTS[n] for n in (0, 0, 1, 2)]
    audit = audit_of(config, PROMPTS[:3], rows, ["answer 1", "answer 2", "answer 4", "answer 7"], "by hand", None)
    assert audit.sources == {
        "easy": {"completions": 3, "in_format": 1, "right": 2 / 3, "reward": pytest.approx((1 + 1 / 2 + 1 / 3) / 3)},
        "hard": {"completions": 1, "in_format": 1, "right": 0, "reward": 0.2},
    }
    assert audit.fixes == []  # not hopeless: it earns something
    assert "nothing to fix" in audit.as_text()
    assert "0.611" in audit.as_text()


def by_function(name: str, *more: str) -> Any:
    return load_config("quickstart", [f"verifier={{type: function, path: tests.rewards.functions.{name}}}", *more])


@pytest.mark.parametrize(
    ("name", "cause"),
    [("always_raises", "KeyError: 'no column score'"), ("never_ends", "took too long"), ("two", "returned 2 rewards")],
)
def test_a_verifier_that_fails_on_every_row_is_told_by_its_one_cause(name: str, cause: str) -> None:
    config = by_function(name, "verification.seconds=0.2")
    texts = ["1", "2", "x" * 50]
    with pytest.raises(ConfigError, match=f"(?s)^verifier: it fails on all 6 .*{cause}.*Fix: ") as caught:
        audit_of(config, PROMPTS[:3], PROMPTS[:3], texts, "by hand", None)
    assert "gold" not in str(caught.value)


def test_a_second_verifier_that_fails_on_every_row() -> None:
    second = by_function("always_raises").verifier
    with pytest.raises(ConfigError, match="--against: it fails on all 3 "):
        audit_of(load_config("quickstart", ["verifier={type: numeric}"]), PROMPTS, PROMPTS[:3], ["1"] * 3, "", second)


def test_gold_answers_that_the_verifier_fails_on_are_not_called_wrong() -> None:
    audit = audit_of(by_function("raises_on_gold"), PROMPTS[:3], PROMPTS[:3], ["so 1", "so 2", "so 3"], "by hand", None)
    assert audit.gold == {"error": 3}
    assert audit.verdicts == {"correct": 3}
    assert len(audit.fixes) == 1
    assert audit.fixes[0].startswith("3 gold answers or completions ended as error (ValueError: no reasoning)")


def test_an_audit_tells_of_answers_that_need_no_thought() -> None:
    config = load_config("quickstart", ["verifier={type: function, path: tests.rewards.functions.lenient}"])
    prompts = [PROMPTS[0] | {"source": "measures", "answer": str(n), "messages": '"?"'} for n in range(20)]
    audit = audit_of(config, prompts, prompts[:3], ["0", "1", "2"], "by hand", None)
    assert audit.cheap == [{"source": "measures", "answer": "'nan'", "earns": 1.0, "chance": 0.05, "rows": 20}]
    assert audit.as_json()["cheap"] == audit.cheap
    assert "cheap in measures: 'nan' earns 100% on 20 rows (chance 5%)" in audit.as_text()
    assert any("earn more than chance in measures" in text for text in audit.fixes)


def test_the_command_samples_where_nothing_is_collected_and_writes_nothing(tmp_path: Path) -> None:
    done = cropi_ok("audit-rewards", "quickstart", "--prompts", "6", "--against", "numeric", "--json", cwd=tmp_path)
    result = json.loads(done.stdout)
    assert result["completions"] == 48
    assert result["origin"] == "sampled now"
    assert set(result["gold"]) == {"correct"}
    assert result["cheap"] == []
    assert list(tmp_path.iterdir()) == []
