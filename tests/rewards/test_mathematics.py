r"""The verifier `math`, with the wrong verdicts known of math-verify: what we do in each case."""

from __future__ import annotations

import time

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
    ("gold", "answer"),
    [
        # an equation is no number because a number stands in it
        ("7", "8=7"), ("7", "0=7"), ("7", "2x=7"), ("7", "x^2=7"), ("7", "x+1=7"), ("7", "x+y=7"), ("7", "x=8=7"),
        ("2x", "3=2x"),
        # R is not r
        ("R-r", "r-R"), ("V-v", "v-V"), ("2x", "2X"), ("n!", "N!"),
        # what stands apart
        ("12", "1 2"), ("23", r"2 \quad 3"), ("21/2", "2 1/2"), ("4/3", r"2\ 2/3"), ("3", r"1\ 2"), ("3", r"1\quad 2"),
        ("3", r"1\,2"),
        # units and text
        (r"2\text{ hours }30\text{ minutes}", "2"),
        (r"2\text{ hours }30\text{ minutes}", r"2\text{ hours }40\text{ minutes}"),
        (r"5\text{ am}", r"5\text{ pm}"), (r"10\text{ m}", r"10\text{ km}"), (r"10\text{ minutes}", r"10\text{ hours}"),
        # bases
        ("1010_2", "1010_3"), ("12_5", "12_7"), ("7", "7_8"),
        # lists, brackets, infinity, dots
        ("1,1,2", "1,2,2"), ("(1,2)", r"\{1,2\}"), (r"\infty", r"\infty+1"), (r"\infty", r"-\infty"),
        ("0.333", "0.333..."),
    ],
)  # fmt: skip
def test_more_that_the_library_lets_pass(gold: str, answer: str) -> None:
    assert verdict(gold, answer) in {WRONG, UNPARSEABLE_ANSWER}


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("7", "x=7"), ("7", "f(x)=7"), ("7", "3+4=7"), ("x-y", "-y+x"), ("-3", r"\log_2\frac{1}{8}"),
        ("12345", r"12\,345"), (r"10\text{ m}", "10"), (r"10\text{ hours}", "10 hour"), ("1010_2", "1010_{2}"),
        ("1010_2", "1010"), ("(1,2)", "(1, 2)"), (r"\infty", r"+\infty"), ("2 1/2", "5/2"), (r"2\frac12", "2.5"),
        ("1{,}234", "1234"), (r"\{1,1,2\}", r"\{1,2,1\}"),
    ],
)  # fmt: skip
def test_what_is_right_in_another_writing(gold: str, answer: str) -> None:
    assert verdict(gold, answer) == CORRECT


@pytest.mark.parametrize("gold", [r"0.\overline{3}", r"\log_2 8 8", "3 4", "9" * 60])
def test_whether_a_gold_answer_can_be_read_does_not_depend_on_the_completion(gold: str) -> None:
    """Else a prompt would be left out exactly where it is answered wrongly."""
    assert len({verdict(gold, answer) == UNPARSEABLE_GOLD for answer in (gold, "1/3", "7", "x")}) == 1


def test_long_runs_of_dots_and_spaces_cost_nothing() -> None:
    verify = math_verifier(MathVerifier(type="math"))
    start = time.perf_counter()
    for run in (".", " ", "_", "*", "$"):
        verify(Answered(f"The answer is 7 {run * 200_000} hm", "7"))
    assert time.perf_counter() - start < 5


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
