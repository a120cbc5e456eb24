import pytest

from cropi.config import ExactVerifier, Gsm8kVerifier, NumericVerifier
from cropi.rewards.verifiers import CORRECT, UNPARSEABLE_ANSWER, UNPARSEABLE_GOLD, WRONG, reward, verifier

EXACT = ExactVerifier(type="exact", marker="answer")
NUMERIC = NumericVerifier(type="numeric")
GSM8K = Gsm8kVerifier(type="gsm8k")


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
    ],
)
def test_verdicts(config: object, completion: str, gold: str, verdict: str) -> None:
    assert verifier(config)(completion, gold) == verdict


def test_an_unreadable_gold_answer_is_excluded_not_scored_zero() -> None:
    assert [reward(v) for v in (CORRECT, WRONG, UNPARSEABLE_ANSWER, UNPARSEABLE_GOLD)] == [1.0, 0.0, 0.0, None]


def test_hostile_completions_are_judged_at_once() -> None:
    for text in ("9" * 100_000, "1e99", "1e999999", "9" * 39 + "e99", "1/" * 50_000, "," * 100_000, "1," * 50_000):
        assert verifier(NUMERIC)(text, "7") in {WRONG, UNPARSEABLE_ANSWER}
