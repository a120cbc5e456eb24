r"""The verifier `math`, with the wrong verdicts known of math-verify: what we do in each case."""

from __future__ import annotations

import pytest

from cropi.config import MathVerifier
from cropi.rewards.mathematics import answer_text, math_verifier
from cropi.rewards.verdicts import CORRECT, UNPARSEABLE_ANSWER, UNPARSEABLE_GOLD, WRONG, Answered


def verdict(gold: str, answer: str, **settings: object) -> str:
    completion = answer if "boxed" in answer else f"\\boxed{{{answer}}}"
    return math_verifier(MathVerifier(type="math", **settings))(Answered(completion, gold))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        # 14: numbers near zero are rounded to the same one
        (r"1/2004!", r"1/2006!", WRONG),
        (r"1/2004!", r"\frac{1}{2004!}", CORRECT),
        ("0.0000001", "0.0000002", WRONG),
        ("10^{-7}", "2 \\cdot 10^{-7}", WRONG),
        # 47: a part of an answer in several parts
        ("1,2", "1", WRONG),
        ("1,2", "2", WRONG),
        ("1,2", "2,1", CORRECT),
        (r"\{1,2,3\}", r"\{3,1,2\}", CORRECT),
        (r"(1,2)", "1", WRONG),
        ("1, 2", r"\boxed{1} or \boxed{2}", WRONG),  # the last box counts, alone
        # 60: equations that say nothing
        ("0=0", "x=x", WRONG),
        ("x=x", "2=2", WRONG),
        ("x=3", "3=3", WRONG),
        ("x+y=0", "2x+2y=0", CORRECT),
        # 70: a gold answer outside a LaTeX environment
        (r"\frac{1}{2}", "0.5", CORRECT),
        (r"\sqrt{2}", r"\frac{2}{\sqrt{2}}", CORRECT),
        ("x^2+2x+1", "(x+1)^2", CORRECT),
        # 76: Markdown
        ("73", "**73**", CORRECT),
        ("**73**", "73", CORRECT),
        ("73", "`74`", WRONG),
        # 81: mixed numbers
        ("2", "2 2/3", WRONG),
        ("8/3", "2 2/3", CORRECT),
        (r"2\frac{2}{3}", "8/3", CORRECT),
        ("4/3", "2 2/3", WRONG),
        ("-8/3", "-2 2/3", CORRECT),
    ],
)
def test_known_wrong_verdicts_of_the_library(gold: str, answer: str, expected: str) -> None:
    assert verdict(gold, answer) == expected


@pytest.mark.parametrize(
    ("gold", "answer", "expected"),
    [
        ("1000000", "1000001", WRONG),  # integers are exact
        ("1,000", "1000", CORRECT),
        ("1{,}000", "1000", CORRECT),
        ("12345", "12 345", CORRECT),
        ("0.333333", "1/3", CORRECT),
        ("3.14159", r"\pi", WRONG),
        (r"\sqrt{2}", "1.41421356", CORRECT),
        (r"50\%", "0.5", CORRECT),
        ("50", r"50\%", CORRECT),
        ("50", "0.5", WRONG),
        ("3", "1 2", UNPARSEABLE_ANSWER),  # no sum, no product
        ("east", "seat", WRONG),  # no product of symbols
        (r"\text{East}", "east", CORRECT),
        ("5 cm", "5", CORRECT),
        ("x=3", "3", CORRECT),
        (r"\infty", "2", WRONG),
        ("[1,2)", r"1 \leq x < 2", CORRECT),
        ("", "5", UNPARSEABLE_GOLD),
        ("5", "", UNPARSEABLE_ANSWER),
        ("5", "(" * 11 + "5" + ")" * 11, UNPARSEABLE_ANSWER),
        ("5", "5" + "0" * 60 + "/1" + "0" * 60, UNPARSEABLE_ANSWER),
    ],
)
def test_meaning(gold: str, answer: str, expected: str) -> None:
    assert verdict(gold, answer) == expected


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}} and \boxed{3", r"\frac{1}{2}"),
        (r"nested \boxed{x = \boxed{4}}", r"x = \boxed{4}"),
        ("so\n#### 12\nbye", "12"),
        ("The answer is **5**.", "5"),
        ("Answer: 0.5", "0.5"),
        ("the answer is 3, no: the answer is 4", "4"),
        ("no answer", None),
        ("The answer is", ""),
    ],
)
def test_where_the_answer_stands(completion: str, expected: str | None) -> None:
    assert answer_text(completion, boxed_only=False) == expected


def test_boxed_only() -> None:
    verify = math_verifier(MathVerifier(type="math", boxed_only=True))
    assert verify(Answered("The answer is 5", "5")) == UNPARSEABLE_ANSWER
    assert verify(Answered("The answer is \\boxed{5}", "5")) == CORRECT
    assert verify(Answered("\\boxed{5}", "It takes 2 + 3. #### 5")) == CORRECT


def test_an_answer_longer_than_allowed_is_none() -> None:
    assert verdict("2", "1+1", max_length=3) == CORRECT
    assert verdict("2", "1+1 ", max_length=3) == CORRECT  # white space around it does not count
    assert verdict("2", "1 + 1", max_length=3) == UNPARSEABLE_ANSWER
