"""The pool of the SmolLM2 experiment: problems with other numbers, and the answers that go with them."""

import random
import re
from fractions import Fraction

import pytest
from pool import expression_of, versions

PARTY = {"question": "Debby bought 37 sodas. 4 friends drank 5 each. How many are left?", "answer": "17"}
DRINKS = re.compile(r"bought (\d+) sodas\. (\d+) friends drank (\d+) each")


def test_versions_have_other_numbers_and_the_answer_that_follows_from_them() -> None:
    found = versions([PARTY], 6, random.Random(0))
    assert found[0] == PARTY
    assert len({row["question"] for row in found}) == 6
    for row in found:
        bought, friends, each = map(int, DRINKS.findall(row["question"])[0])
        assert int(row["answer"]) == bought - friends * each > 0
        assert [len(str(n)) for n in (bought, friends, each)] == [2, 1, 1]


def test_quotients_stay_whole() -> None:
    row = {"question": "36 pens go into boxes of 9. How many boxes?", "answer": "4"}
    for new in versions([row], 6, random.Random(0)):
        pens, size = map(int, re.findall(r"\d+", new["question"]))
        assert Fraction(pens, size) == int(new["answer"])


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("A ribbon of 2.5 m and one of 1 m. How long are both?", "3.5"),  # not whole
        ("Tom has 2 apples and 2 pears. How many fruits?", "4"),  # 2 + 2 and 2 * 2
        ("Tom has 7 apples. How many has he?", "12"),  # no expression gives it
    ],
)
def test_a_problem_whose_solution_is_not_clear_stands_once(question: str, answer: str) -> None:
    row = {"question": question, "answer": answer}
    assert expression_of(row) is None
    assert versions([row], 6, random.Random(0)) == [row]
