import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cropi
from cropi.rewards.verifier import (
    CORRECT,
    ERROR,
    TIMEOUT,
    UNPARSEABLE_ANSWER,
    UNPARSEABLE_GOLD,
    WRONG,
    Answered,
    VerifierTable,
    reward,
)
from cropi.rewards.verifiers.boxed import BoxedVerifier, last_boxed
from cropi.rewards.verifiers.exact_text import ExactVerifier
from cropi.rewards.verifiers.gsm8k import Gsm8kVerifier
from cropi.rewards.verifiers.math_answer import MathVerifier
from cropi.rewards.verifiers.numeric import NumericVerifier, numbers

EXACT = ExactVerifier(type="exact", marker="answer")
NUMERIC = NumericVerifier(type="numeric")
GSM8K = Gsm8kVerifier(type="gsm8k")
BOXED = BoxedVerifier(type="boxed")
TABLE: dict[str, VerifierTable] = {
    "exact": ExactVerifier(type="exact"), "exact, marked": EXACT, "numeric": NUMERIC, "gsm8k": GSM8K, "boxed": BOXED,
    "math": MathVerifier(type="math"),
}  # fmt: skip


ROWS = [line.split("\t") for line in Path(__file__).with_name("verdicts.tsv").read_text("utf-8").splitlines()]


@pytest.mark.parametrize(("verifier", "gold", "completion", "verdict"), ROWS)
def test_verdicts(verifier: str, gold: str, completion: str, verdict: str) -> None:
    """Of all rows of verdicts.tsv, where \u23ce stands for the end of a line."""
    found = TABLE[verifier].load()(Answered(completion.replace("\u23ce", "\n"), gold.replace("\u23ce", "\n")))
    assert found in ((WRONG, UNPARSEABLE_ANSWER) if verdict == "not right" else (verdict,))


@pytest.mark.parametrize("config", [NUMERIC, GSM8K])
@pytest.mark.parametrize("gold", ["-$5", "- 5", "\u20135", "-\u20ac5", r"-\$5", r"\$-5", "-5", "\u22125"])
def test_a_gold_answer_is_read_as_an_answer_is(config: VerifierTable, gold: str) -> None:
    assert config.load()(Answered("#### -5", gold)) == CORRECT
    assert config.load()(Answered("#### 5", gold)) == WRONG


def test_long_answers_take_linear_time() -> None:
    start = time.process_time()
    for piece in ("9", "8 ", "1+", "{", "$", "[5", "\\frac{1}{", "- ", "a_", "\n", "a", "1"):
        numbers(piece * 100_000)
        numbers(f"5{piece * 100_000}é - 3.")
    assert time.process_time() - start < 10


def test_an_unreadable_gold_answer_is_excluded_not_scored_zero() -> None:
    others = (WRONG, UNPARSEABLE_ANSWER, TIMEOUT, ERROR)
    assert [reward(v) for v in (CORRECT, *others, UNPARSEABLE_GOLD)] == [1.0, 0.0, 0.0, 0.0, 0.0, None]


@pytest.mark.parametrize("config", [EXACT, NUMERIC, GSM8K, BOXED])
def test_a_gold_answer_as_a_completion_would_write_it_is_right(config: VerifierTable) -> None:
    assert config.load()(Answered(config.completion_with("12"), "12")) == CORRECT


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("\\boxed{a{b}c}", "a{b}c"), ("\\boxed{a\\}b}", "a\\}b"), ("\\boxed{\\boxed{1}}", "\\boxed{1}"),
        ("\\fbox{3}", "3"), ("\\boxed{1} } \\boxed{2}", "2"), ("boxed{1}", None),
    ],
)  # fmt: skip
def test_the_last_box(text: str, inside: str | None) -> None:
    assert last_boxed(text) == inside


ADDED = '''
from typing import Literal

from cropi.rewards.verifier import CORRECT, WRONG, VerifierTable, Verify


class LongEnoughVerifier(VerifierTable):
    """Right when the completion is long enough."""

    type: Literal["long_enough"]
    """Picks this verifier."""
    characters: int = 5
    """Least length."""

    def load(self) -> Verify:
        return lambda row: CORRECT if len(row.completion) >= self.characters else WRONG
'''


def test_adding_a_verifier_takes_one_file_and_one_line(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(Path(cropi.__file__).parent, tmp_path / "cropi", ignore=ignored)
    folder = tmp_path / "cropi" / "rewards" / "verifiers"
    (folder / "long_enough.py").write_text(ADDED, encoding="utf-8")
    text = (folder / "__init__.py").read_text(encoding="utf-8")
    line = "from cropi.rewards.verifiers.long_enough import LongEnoughVerifier as LongEnoughVerifier\n"
    last = "from cropi.rewards.verifiers.reasoning_gym"
    (folder / "__init__.py").write_text(text.replace(last, line + last), encoding="utf-8")
    rows = "".join(json.dumps({"completion": text, "answer": ""}) + "\n" for text in ("four", "seven letters"))
    command = [sys.executable, "-m", "cropi", "verify", "--verifier", "long_enough", "--seconds", "60"]
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, input=rows, capture_output=True, text=True)
    assert [json.loads(line)["verdict"] for line in done.stdout.splitlines()] == [WRONG, CORRECT], done.stderr
