r"""The verifier `math` beyond the table of verdicts: what it costs, where an answer stands, and its settings."""

from __future__ import annotations

import time

import pytest

from cropi.rewards.verifier import CORRECT, UNPARSEABLE_ANSWER, UNPARSEABLE_GOLD, Answered
from cropi.rewards.verifiers import math_answer
from cropi.rewards.verifiers.math_answer import MathVerifier
from cropi.rewards.verifiers.math_reading import answer_text


def verdict(gold: str, answer: str) -> str:
    completion = answer if "boxed" in answer else f"\\boxed{{{answer}}}"
    return MathVerifier(type="math").load()(Answered(completion, gold))


@pytest.mark.parametrize(
    "answer",
    [
        "9^{9^{9^9}}", "(10^{10})!", "1000000!", "99!!", r"\frac{1}{9^{9^9}}", r"\binom{10000000}{5000000}",
        r"\binom{10^9}{10^8}", r"\sum_{k=1}^{100000000} k^k", r"\sum_{k=1}^{9999} k!", r"\prod_{k=1}^{100000000} k",
        r"\gcd(9^{9^9},3)", "(x+y+z)^{200}", "(x+1)^{100000}", "e^{10^{10}}", "0.5^{10^9}", "x=9^{9^9}", r"\{7!!!\}",
        r"\begin{pmatrix}9^{9^9}&1\\2&3\end{pmatrix}", r"\Gamma(10^{9})", r"\sin " * 20 + "2",
    ],
)  # fmt: skip
def test_what_nobody_could_work_out_is_refused_before_it_is_evaluated(answer: str) -> None:
    start = time.process_time()
    assert verdict("7", answer) == UNPARSEABLE_ANSWER
    assert time.process_time() - start < 5


@pytest.mark.parametrize("gold", [r"0.\overline{3}", r"\log_2 8 8", "3 4", "9" * 60])
def test_whether_a_gold_answer_can_be_read_does_not_depend_on_the_completion(gold: str) -> None:
    """Else a prompt would be left out exactly where it is answered wrongly."""
    assert len({verdict(gold, answer) == UNPARSEABLE_GOLD for answer in (gold, "1/3", "7", "x")}) == 1


def test_long_runs_of_dots_and_spaces_cost_nothing() -> None:
    verify = MathVerifier(type="math").load()
    start = time.process_time()
    for run in (".", " ", "_", "*", "$"):
        verify(Answered(f"The answer is 7 {run * 200_000} hm", "7"))
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        (r"first \boxed{1}, then \boxed{2}", "2"), (r"\boxed{\frac{1}{2}} and \boxed{3", r"\frac{1}{2}"),
        (r"nested \boxed{x = \boxed{4}}", r"x = \boxed{4}"), ("so\n#### 12\nbye", "12"), ("The answer is **5**.", "5"),
        ("Answer: 0.5", "0.5"), ("the answer is 3, no: the answer is 4", "4"), ("no answer", None),
        ("The answer is", ""),
    ],
)  # fmt: skip
def test_where_the_answer_stands(completion: str, expected: str | None) -> None:
    assert answer_text(completion, boxed_only=False) == expected


def test_boxed_only() -> None:
    verify = MathVerifier(type="math", boxed_only=True).load()
    assert verify(Answered("The answer is 5", "5")) == UNPARSEABLE_ANSWER
    assert verify(Answered("The answer is \\boxed{5}", "5")) == CORRECT
    assert verify(Answered("\\boxed{5}", "It takes 2 + 3. #### 5")) == CORRECT


def test_an_answer_longer_than_allowed_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answer, "MAX_LENGTH", 3)
    assert verdict("2", "1+1") == CORRECT
    assert verdict("2", "1+1 ") == CORRECT  # white space around it does not count
    assert verdict("2", "1 + 1") == UNPARSEABLE_ANSWER
