import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import cropi
from cropi.rewards.verdicts import (
    CORRECT,
    ERROR,
    TIMEOUT,
    UNPARSEABLE_ANSWER,
    UNPARSEABLE_GOLD,
    WRONG,
    Answered,
    reward,
)
from cropi.rewards.verifier import VerifierTable
from cropi.rewards.verifiers.boxed import BoxedVerifier, last_boxed
from cropi.rewards.verifiers.exact_text import ExactVerifier
from cropi.rewards.verifiers.gsm8k import Gsm8kVerifier
from cropi.rewards.verifiers.numeric import NumericVerifier, numbers

EXACT = ExactVerifier(type="exact", marker="answer")
NUMERIC = NumericVerifier(type="numeric")
GSM8K = Gsm8kVerifier(type="gsm8k")
BOXED = BoxedVerifier(type="boxed")


@pytest.mark.parametrize(
    ("config", "completion", "gold", "verdict"),
    [
        (EXACT, "steps 1 2 answer 3", "3", CORRECT),
        (EXACT, "answer 2 answer  3 ", "3", CORRECT),  # the last one counts
        (EXACT, "answer 3 answer 2", "3", WRONG), (EXACT, "steps 3", "3", UNPARSEABLE_ANSWER),
        (EXACT, "steps 3 answer", "3", UNPARSEABLE_ANSWER), (EXACT, "answer 3 1 2", "3 1 2", CORRECT),
        (EXACT, "answer 3", " ", UNPARSEABLE_GOLD), (ExactVerifier(type="exact"), " yes ", "yes", CORRECT),
        (NUMERIC, "so 3 + 4 = 7.", "7", CORRECT), (NUMERIC, "it is 1,234.50 dollars", "1234.5", CORRECT),
        (NUMERIC, "it is 1,234", "1234 #### 12", WRONG), (NUMERIC, "half: 1/2", "0.5", CORRECT),
        (NUMERIC, "minus -3", "3", WRONG), (NUMERIC, "1e3", "1000", CORRECT),
        (NUMERIC, "no idea", "7", UNPARSEABLE_ANSWER), (NUMERIC, "7", "seven", UNPARSEABLE_GOLD),
        (NUMERIC, "1/0", "7", UNPARSEABLE_ANSWER), (NUMERIC, ".5", "0.5", CORRECT), (NUMERIC, ".5", "5", WRONG),
        (NUMERIC, "\N{MINUS SIGN}5", "-5", CORRECT), (NUMERIC, "\N{MINUS SIGN}5", "5", WRONG),
        (NUMERIC, "1" * 40 + "5", "5", UNPARSEABLE_ANSWER),  # the tail of a long number is not its value
        (NUMERIC, "1,2345", "5", UNPARSEABLE_ANSWER), (NUMERIC, "1.2.5", "5", UNPARSEABLE_ANSWER),
        (NUMERIC, "8-3=5", "5", CORRECT), (NUMERIC, "on 1/2/2023", "2023", UNPARSEABLE_ANSWER),
        (NUMERIC, "1, 2, 5.", "5", CORRECT), (NUMERIC, "It is 12.", "12", CORRECT),
        (NUMERIC, "$1,000,000.00!", "1000000", CORRECT), (GSM8K, "#### " + "1" * 41, "1" * 40, UNPARSEABLE_ANSWER),
        (GSM8K, "4 * 2 = 8\n#### 8", "He has 8.\n#### 8", CORRECT), (GSM8K, "#### $1,000", "#### 1000", CORRECT),
        (GSM8K, "8", "#### 8", UNPARSEABLE_ANSWER), (GSM8K, "#### 9 so #### 8", "8", CORRECT),
        (GSM8K, "#### 2000001", "2000000", WRONG),  # whole numbers are counted
        (NUMERIC, "2000001", "2000000", WRONG), (NUMERIC, "2000000.5", "2000000", CORRECT),
        (GSM8K, "#### 1e100", "1", UNPARSEABLE_ANSWER), (NUMERIC, "1e100", "100", UNPARSEABLE_ANSWER),
        (GSM8K, "#### 2 1/2", "2", UNPARSEABLE_ANSWER), (NUMERIC, "2 1/2", "0.5", UNPARSEABLE_ANSWER),
        (NUMERIC, "7\N{VULGAR FRACTION ONE HALF}", "7", UNPARSEABLE_ANSWER),
        (NUMERIC, "7\N{SUPERSCRIPT TWO}", "7", UNPARSEABLE_ANSWER), (NUMERIC, "1 / 2", "2", UNPARSEABLE_ANSWER),
        (NUMERIC, "1/-2", "2", UNPARSEABLE_ANSWER), (GSM8K, "#### 1 / 2", "1", UNPARSEABLE_ANSWER),
        (GSM8K, "#### 3 + 4 = 7", "3", UNPARSEABLE_ANSWER), (GSM8K, "#### 10^6", "10", UNPARSEABLE_ANSWER),
        (GSM8K, "#### 1 234", "1", UNPARSEABLE_ANSWER), (NUMERIC, "1{,}234", "234", WRONG),
        (NUMERIC, "1_000", "0", UNPARSEABLE_ANSWER), (GSM8K, "#### 12 apples", "12", CORRECT),
        (BOXED, "\\boxed{1 2}", "12", WRONG), (BOXED, "so \\boxed{ \\dfrac{1}{2} }.", "\\frac{1}{2}", CORRECT),
        (BOXED, "so \\boxed{0.5}", "\\frac{1}{2}", WRONG),  # letter by letter
        (BOXED, "\\boxed{1} \\boxed{2}", "\\boxed{2}", CORRECT), (BOXED, "\\boxed{2", "2", UNPARSEABLE_ANSWER),
        (BOXED, "\\boxed{}", "2", UNPARSEABLE_ANSWER), (BOXED, "\\boxed{2}", " ", UNPARSEABLE_GOLD),
    ],
)  # fmt: skip
def test_verdicts(config: VerifierTable, completion: str, gold: str, verdict: str) -> None:
    assert config.load()(Answered(completion, gold)) == verdict


@pytest.mark.parametrize(
    ("config", "completion", "gold"),
    [
        (GSM8K, "#### -$5", "-5"), (GSM8K, "#### - 5", "-5"), (GSM8K, "#### –5", "-5"), (GSM8K, "#### -€5", "-5"),
        (GSM8K, r"#### -\$5", "-5"), (GSM8K, "#### $-5", "-5"), (GSM8K, "#### —5", "-5"), (GSM8K, "#### − $5", "-5"),
        (GSM8K, "#### $9{,}500", "9500"), (GSM8K, "#### $9,500.00", "9500"), (GSM8K, r"#### \$9,500", "9500"),
        (NUMERIC, "it costs $9{,}500", "9500"), (NUMERIC, "**5**", "5"), (NUMERIC, r"\boxed{5}", "5"),
        (NUMERIC, r"\boxed{5\text{ cm}}", "5"), (NUMERIC, r"\boxed{-\$5}", "-5"), (NUMERIC, r"\boxed{- 5}", "-5"),
        (NUMERIC, r"$\boxed{5}$.", "5"), (NUMERIC, r"The answer is \(5\).", "5"), (NUMERIC, r"\[5\]", "5"),
        (NUMERIC, "$$5$$", "5"), (NUMERIC, "x = 5", "5"), (NUMERIC, "x=5.", "5"), (NUMERIC, "10 / 2 = 5", "5"),
        (NUMERIC, r"10 \div 2 = 5", "5"), (NUMERIC, "<answer>5</answer>", "5"), (NUMERIC, "答案是5。", "5"),
        (NUMERIC, "5%", "5"), (NUMERIC, r"5\%", "5"), (NUMERIC, "(5)", "5"), (NUMERIC, "(-5)", "-5"),
        (NUMERIC, '"5"', "5"), (NUMERIC, "5 apples", "5"), (NUMERIC, "5km", "5"), (NUMERIC, "5 km/h", "5"),
        (NUMERIC, "$5/hour", "5"), (NUMERIC, "5-year-old", "5"), (NUMERIC, "$20 per hour, x_{3}", "20"),
        (NUMERIC, "answer:5", "5"), (NUMERIC, "Answer: 5", "5"), (NUMERIC, "It is 12.", "12"),
        (NUMERIC, "Step 2: 5", "5"), (NUMERIC, "so it's 5 cm^2", "5"), (NUMERIC, "5 cm²", "5"),
        (NUMERIC, r"5^\circ", "5"), (NUMERIC, "5°C", "5"), (NUMERIC, "5€", "5"), (NUMERIC, "5 €", "5"),
        (NUMERIC, "-5€", "-5"), (NUMERIC, "1/2", "0.5"), (NUMERIC, "1, 2, 5", "5"), (NUMERIC, "５", "5"),
        (NUMERIC, "5!", "5"), (NUMERIC, "5, so done", "5"), (NUMERIC, "The answer is -5.", "-5"),
        (NUMERIC, "the change is - $5", "-5"), (NUMERIC, "-£5.00", "-5"), (NUMERIC, "total—5", "5"),
        (NUMERIC, "3x + 2 = 5", "5"), (NUMERIC, r"\text{The answer is } 5", "5"), (NUMERIC, "the 5th", "5"),
        (NUMERIC, "x²=2", "2"), (NUMERIC, "1e3", "1000"), (NUMERIC, r"\$5 million", "5"), (NUMERIC, "3.5.", "3.5"),
        (NUMERIC, "x > 7", "7"), (GSM8K, "#### x = 5", "5"), (GSM8K, "#### The answer is 5", "5"),
        (GSM8K, "#### **5**", "5"), (GSM8K, "#### $5$", "5"), (GSM8K, r"#### \boxed{5}", "5"),
        (GSM8K, "#### 5 dollars", "5"), (GSM8K, "#### 5 (five)", "5"), (GSM8K, "#### 3 (4)", "3"),
        (GSM8K, "#### 3!", "3"), (GSM8K, "#### 3 % 4", "3"), (GSM8K, "#### 12 apples, 3 each", "12"),
        (GSM8K, "#### -5 dollars", "-5"), (GSM8K, "####5", "5"), (GSM8K, "####-5", "-5"), (GSM8K, "#### +5", "5"),
        (GSM8K, r"#### 5\% ", "5"), (GSM8K, r"#### 5 \text{ cm}", "5"),
        (NUMERIC, "It is:\n- 5", "5"), (NUMERIC, "10\n-3", "-3"), (NUMERIC, "2\n5", "5"),
    ],
)  # fmt: skip
def test_a_number_that_stands_alone_is_read_with_its_sign(config: VerifierTable, completion: str, gold: str) -> None:
    assert config.load()(Answered(completion, gold)) == CORRECT


@pytest.mark.parametrize(
    ("config", "completion", "gold"),
    [
        (GSM8K, "#### - 5", "5"), (NUMERIC, r"\frac{3}{4}", "4"), (NUMERIC, "2^{10}", "10"),
        (NUMERIC, "x_{12}", "12"), (NUMERIC, r"\sqrt{2}", "2"), (NUMERIC, r"\sqrt 2", "2"),
        (NUMERIC, r"\frac{ 3 }{ 4 }", "3"), (NUMERIC, r"\frac {3} {4}", "4"), (NUMERIC, r"\frac{\sqrt{3}{2}", "2"),
        (NUMERIC, r"\lim_{x \to 0} f(x)", "0"), (NUMERIC, "2^10", "10"), (NUMERIC, "2 ^ {10}", "10"),
        (NUMERIC, "x12", "12"), (NUMERIC, "7x", "7"), (NUMERIC, r"7 \pi", "7"), (NUMERIC, r"7\sqrt{3}", "7"),
        (NUMERIC, r"7 \frac{1}{2}", "7"), (NUMERIC, "5**2", "5"), (NUMERIC, "5**2", "2"), (NUMERIC, "5 ** 2", "2"),
        (NUMERIC, r"3 \times 4", "4"), (NUMERIC, "10 – 3", "3"), (NUMERIC, "10 - 3", "3"), (NUMERIC, "10 - 3", "-3"),
        (NUMERIC, "10 -3", "-3"), (NUMERIC, "x - 3", "-3"), (NUMERIC, "f(5)", "5"), (NUMERIC, "a ratio of 3:4", "4"),
        (NUMERIC, "3 × 4", "3"), (NUMERIC, "3·4", "3"), (NUMERIC, "n + 5", "5"), (NUMERIC, "COVID-12", "12"),
        (NUMERIC, "log3", "3"), (NUMERIC, r"\binom{5}{2}", "5"), (NUMERIC, "5 / 2", "2"), (NUMERIC, "-1/2", "2"),
        (NUMERIC, "± 5", "5"), (NUMERIC, r"\pm 5", "5"), (NUMERIC, r"\log_2 8", "8"), (NUMERIC, "−5", "5"),
        (NUMERIC, "1,2,5", "5"), (NUMERIC, "1 234", "1234"), (NUMERIC, "1 234", "234"), (NUMERIC, "7'8", "8"),
        (NUMERIC, "$2^{10}$", "10"), (NUMERIC, "x^2", "2"), (NUMERIC, "5k", "5"), (NUMERIC, r"\$\frac{3}{4}\$", "4"),
        (NUMERIC, "$x+7$", "7"), (GSM8K, "#### 5**2", "5"), (GSM8K, "#### 5**2", "25"),
        (GSM8K, r"#### 3 \times 4", "3"), (GSM8K, "#### 10 – 3", "10"), (GSM8K, "#### 3/x", "3"),
        (GSM8K, "#### 3x4", "3"), (GSM8K, "#### 3 x 4", "3"), (GSM8K, r"#### \frac{3}{4}", "3"),
        (GSM8K, "#### 8 = 5", "8"), (GSM8K, "#### 3(4)", "3"), (GSM8K, "#### 3^2", "3"), (GSM8K, "#### 10:30", "10"),
        (GSM8K, "#### 5 - 2", "5"), (GSM8K, "#### 5 -2", "5"), (GSM8K, "#### 5 + 2", "5"), (GSM8K, "#### 5-2", "5"),
        (GSM8K, "#### 1 1/2", "1.5"),
    ],
)  # fmt: skip
def test_a_number_is_never_cut_out_of_an_expression(config: VerifierTable, completion: str, gold: str) -> None:
    assert config.load()(Answered(completion, gold)) in (WRONG, UNPARSEABLE_ANSWER)


@pytest.mark.parametrize("config", [NUMERIC, GSM8K])
@pytest.mark.parametrize("gold", ["-$5", "- 5", "\u20135", "-\u20ac5", r"-\$5", r"\$-5", "-5", "\u22125"])
def test_a_gold_answer_is_read_as_an_answer_is(config: VerifierTable, gold: str) -> None:
    assert config.load()(Answered("#### -5", gold)) == CORRECT
    assert config.load()(Answered("#### 5", gold)) == WRONG


def test_long_answers_take_linear_time() -> None:
    start = time.process_time()
    for piece in ("9", "8 ", "1+", "{", "$", "[5", "\\frac{1}{", "- ", "a_"):
        numbers(piece * 100_000)
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

from cropi.rewards.verdicts import CORRECT, WRONG
from cropi.rewards.verifier import VerifierTable, Verify


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
