import pytest

from cropi.config import BoxedVerifier, ExactVerifier, Gsm8kVerifier, NumericVerifier
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
from cropi.rewards.verifiers import last_boxed, verifier, written_gold

EXACT = ExactVerifier(type="exact", marker="answer")
NUMERIC = NumericVerifier(type="numeric")
GSM8K = Gsm8kVerifier(type="gsm8k")
BOXED = BoxedVerifier(type="boxed")


@pytest.mark.parametrize(
    ("config", "completion", "gold", "verdict"),
    [
        (EXACT, "steps 1 2 answer 3", "3", CORRECT),
        (EXACT, "answer 2 answer  3 ", "3", CORRECT),  # the last one counts
        (EXACT, "answer 3 answer 2", "3", WRONG),
        (EXACT, "steps 3", "3", UNPARSEABLE_ANSWER),
        (EXACT, "steps 3 answer", "3", UNPARSEABLE_ANSWER),
        (EXACT, "answer 3 1 2", "3 1 2", CORRECT),
        (EXACT, "answer 3", " ", UNPARSEABLE_GOLD),
        (ExactVerifier(type="exact"), " yes ", "yes", CORRECT),
        (NUMERIC, "so 3 + 4 = 7.", "7", CORRECT),
        (NUMERIC, "it is 1,234.50 dollars", "1234.5", CORRECT),
        (NUMERIC, "it is 1,234", "1234 #### 12", WRONG),
        (NUMERIC, "half: 1/2", "0.5", CORRECT),
        (NUMERIC, "minus -3", "3", WRONG),
        (NUMERIC, "1e3", "1000", CORRECT),
        (NUMERIC, "no idea", "7", UNPARSEABLE_ANSWER),
        (NUMERIC, "7", "seven", UNPARSEABLE_GOLD),
        (NUMERIC, "1/0", "7", UNPARSEABLE_ANSWER),
        (NUMERIC, ".5", "0.5", CORRECT),
        (NUMERIC, ".5", "5", WRONG),
        (NUMERIC, "\N{MINUS SIGN}5", "-5", CORRECT),
        (NUMERIC, "\N{MINUS SIGN}5", "5", WRONG),
        (NUMERIC, "1" * 40 + "5", "5", UNPARSEABLE_ANSWER),  # the tail of a long number is not its value
        (NUMERIC, "1,2345", "5", UNPARSEABLE_ANSWER),
        (NUMERIC, "1.2.5", "5", UNPARSEABLE_ANSWER),
        (NUMERIC, "8-3=5", "5", CORRECT),
        (NUMERIC, "on 1/2/2023", "2023", UNPARSEABLE_ANSWER),
        (NUMERIC, "1, 2, 5.", "5", CORRECT),
        (NUMERIC, "It is 12.", "12", CORRECT),
        (NUMERIC, "$1,000,000.00!", "1000000", CORRECT),
        (GSM8K, "#### " + "1" * 41, "1" * 40, UNPARSEABLE_ANSWER),
        (GSM8K, "4 * 2 = 8\n#### 8", "He has 8.\n#### 8", CORRECT),
        (GSM8K, "#### $1,000", "#### 1000", CORRECT),
        (GSM8K, "8", "#### 8", UNPARSEABLE_ANSWER),
        (GSM8K, "#### 9 so #### 8", "8", CORRECT),
        (GSM8K, "#### 2000001", "2000000", WRONG),  # whole numbers are counted
        (NUMERIC, "2000001", "2000000", WRONG),
        (NUMERIC, "2000000.5", "2000000", CORRECT),
        (GSM8K, "#### 1e100", "1", UNPARSEABLE_ANSWER),
        (NUMERIC, "1e100", "100", UNPARSEABLE_ANSWER),
        (GSM8K, "#### 2 1/2", "2", UNPARSEABLE_ANSWER),
        (NUMERIC, "2 1/2", "0.5", UNPARSEABLE_ANSWER),
        (NUMERIC, "7\N{VULGAR FRACTION ONE HALF}", "7", UNPARSEABLE_ANSWER),
        (NUMERIC, "7\N{SUPERSCRIPT TWO}", "7", UNPARSEABLE_ANSWER),
        (NUMERIC, "1 / 2", "2", UNPARSEABLE_ANSWER),
        (NUMERIC, "1/-2", "2", UNPARSEABLE_ANSWER),
        (GSM8K, "#### 1 / 2", "1", UNPARSEABLE_ANSWER),
        (GSM8K, "#### 3 + 4 = 7", "3", UNPARSEABLE_ANSWER),
        (GSM8K, "#### 10^6", "10", UNPARSEABLE_ANSWER),
        (GSM8K, "#### 1 234", "1", UNPARSEABLE_ANSWER),
        (NUMERIC, "1{,}234", "234", UNPARSEABLE_ANSWER),
        (NUMERIC, "1_000", "0", UNPARSEABLE_ANSWER),
        (GSM8K, "#### 12 apples", "12", CORRECT),
        (BOXED, "\\boxed{1 2}", "12", WRONG),
        (BOXED, "so \\boxed{ \\dfrac{1}{2} }.", "\\frac{1}{2}", CORRECT),
        (BOXED, "so \\boxed{0.5}", "\\frac{1}{2}", WRONG),  # letter by letter
        (BOXED, "\\boxed{1} \\boxed{2}", "\\boxed{2}", CORRECT),
        (BOXED, "\\boxed{2", "2", UNPARSEABLE_ANSWER),
        (BOXED, "\\boxed{}", "2", UNPARSEABLE_ANSWER),
        (BOXED, "\\boxed{2}", " ", UNPARSEABLE_GOLD),
    ],
)
def test_verdicts(config: object, completion: str, gold: str, verdict: str) -> None:
    assert verifier(config)(Answered(completion, gold)) == verdict


def test_an_unreadable_gold_answer_is_excluded_not_scored_zero() -> None:
    others = (WRONG, UNPARSEABLE_ANSWER, TIMEOUT, ERROR)
    assert [reward(v) for v in (CORRECT, *others, UNPARSEABLE_GOLD)] == [1.0, 0.0, 0.0, 0.0, 0.0, None]


@pytest.mark.parametrize("config", [EXACT, NUMERIC, GSM8K, BOXED])
def test_a_gold_answer_as_a_completion_would_write_it_is_right(config: object) -> None:
    assert verifier(config)(Answered(written_gold(config, "12"), "12")) == CORRECT


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("\\boxed{a{b}c}", "a{b}c"),
        ("\\boxed{a\\}b}", "a\\}b"),
        ("\\boxed{\\boxed{1}}", "\\boxed{1}"),
        ("\\fbox{3}", "3"),
        ("\\boxed{1} } \\boxed{2}", "2"),
        ("boxed{1}", None),
    ],
)
def test_the_last_box(text: str, inside: str | None) -> None:
    assert last_boxed(text) == inside
