"""Verifiers that are someone else's."""

from __future__ import annotations

import json

import pytest

from cropi.config import FunctionVerifier, ReasoningGymVerifier, VerlVerifier
from cropi.rewards.adapters import harmless
from cropi.rewards.verdicts import CORRECT, UNPARSEABLE_ANSWER, UNPARSEABLE_GOLD, WRONG, Answered
from cropi.rewards.verifiers import verifier, written_gold

HERE = "tests.rewards.functions"
LEVEL = json.dumps({"level": 3})


def function(name: str, **settings: object) -> object:
    return verifier(FunctionVerifier(type="function", path=f"{HERE}.{name}", **settings))  # type: ignore[arg-type]


def test_a_function_gets_what_its_signature_takes() -> None:
    strict = function("strict_signature", answer_as="solution", messages=True)
    assert strict(Answered("7", "7", "sums", '"2+5?"', LEVEL)) == CORRECT  # type: ignore[operator]
    assert strict(Answered("8", "7", "sums", '"2+5?"', LEVEL)) == WRONG  # type: ignore[operator]


def test_a_function_gets_prompt_source_and_the_extra_columns() -> None:
    messages = json.dumps([{"role": "user", "content": "2+5?"}])
    assert function("sees")(Answered("7", "7", "sums", messages, LEVEL)) == CORRECT  # type: ignore[operator]
    assert function("sees")(Answered("7", "7", "other", messages, LEVEL)) == WRONG  # type: ignore[operator]


def test_none_excludes_and_the_threshold_counts() -> None:
    assert function("none")(Answered("7", "7")) == UNPARSEABLE_GOLD  # type: ignore[operator]
    assert function("equal", threshold=1.5)(Answered("7", "7")) == WRONG  # type: ignore[operator]


@pytest.mark.parametrize("name", ["two", "not_a_number"])
def test_what_is_no_reward_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=r"rewards for one completion|not a number"):
        function(name)(Answered("7", "7"))  # type: ignore[operator]


def test_trl_s_own_accuracy_reward() -> None:
    """A peer's function, in its own form."""
    config = FunctionVerifier(
        type="function",
        path="trl.rewards.accuracy_reward",
        answer_as="solution",
        messages=True,
        written="\\boxed{{answer}}",
    )
    verify = verifier(config)
    assert verify(Answered("so \\boxed{\\frac{1}{2}}", "\\frac{1}{2}")) == CORRECT
    assert verify(Answered("so \\boxed{\\frac{1}{3}}", "\\frac{1}{2}")) == WRONG
    assert written_gold(config, "7") == "\\boxed{7}"


def test_verl() -> None:
    verify = verifier(VerlVerifier(type="verl", path=f"{HERE}.verl_score"))
    assert verify(Answered("7", "7", "sums")) == CORRECT
    assert verify(Answered("8", "7", "sums")) == WRONG
    assert verify(Answered("8", "7", "other", "", LEVEL)) == CORRECT
    fixed = verifier(VerlVerifier(type="verl", path=f"{HERE}.verl_score", data_source="sums"))
    assert fixed(Answered("8", "7", "other", "", LEVEL)) == WRONG


def entries(task: str, count: int = 5) -> list[dict[str, object]]:
    import reasoning_gym

    return list(reasoning_gym.create_dataset(task, size=count, seed=3))


@pytest.mark.parametrize("task", ["chain_sum", "countdown", "n_queens", "spiral_matrix", "polynomial_multiplication"])
def test_reasoning_gym_s_gold_answers_are_right(task: str) -> None:
    verify = verifier(ReasoningGymVerifier(type="reasoning_gym"))
    for entry in entries(task):
        row = Answered(str(entry["answer"]), str(entry["answer"]), task, "", json.dumps(entry["metadata"]))
        assert verify(row) == CORRECT
        assert verify(row._replace(completion=f"<think>1</think><answer>{entry['answer']}</answer>")) == CORRECT
        assert verify(row._replace(completion="<answer>no idea</answer>")) == WRONG


def test_reasoning_gym_s_partial_credit_and_threshold() -> None:
    """A wrong answer in the right form earns 0.05 of chain_sum's score or less than 1: the threshold decides."""
    entry = entries("chain_sum")[0]
    row = Answered("1" + str(entry["answer"]), str(entry["answer"]), "chain_sum", "", json.dumps(entry["metadata"]))
    assert verifier(ReasoningGymVerifier(type="reasoning_gym"))(row) == WRONG
    assert verifier(ReasoningGymVerifier(type="reasoning_gym", threshold=1e-9))(row) == CORRECT


def test_a_task_that_does_not_exist_is_an_unreadable_gold_answer() -> None:
    verify = verifier(ReasoningGymVerifier(type="reasoning_gym"))
    assert verify(Answered("7", "7", "no_such_task")) == UNPARSEABLE_GOLD


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[[1, 2], [3, 4]]", True),
        ("3*x**2 + 2*x - sin(x)", True),
        ("(7 + 5) * 2 - 1", True),
        ("['a', 'b']", True),
        ("it is open: you may import it", True),
        ("__import__('os').system('x')", False),
        ("().__class__", False),
        ("open('/tmp/x', 'w')", False),
        ("x.y.z", False),
        ("[x for x in (1,)]", False),
        ("(lambda: 1)()", False),
        ("a.b() !", False),
        ("exec ('x') + 3!", False),
    ],
)
def test_what_may_be_evaluated(answer: str, expected: bool) -> None:
    assert harmless(answer) is expected


@pytest.mark.parametrize("task", ["n_queens", "spiral_matrix", "polynomial_multiplication", "countdown"])
def test_no_code_is_run(task: str, tmp_path: object) -> None:
    verify = verifier(ReasoningGymVerifier(type="reasoning_gym"))
    entry = entries(task)[0]
    for code in ("open('{}', 'w')", "__import__('os').system('touch {}')", "[open(f, 'w') for f in ['{}']]"):
        marker = tmp_path / "ran"  # type: ignore[operator]
        row = Answered(code.format(marker), str(entry["answer"]), task, "", json.dumps(entry["metadata"]))
        assert verify(row) == UNPARSEABLE_ANSWER
        assert not marker.exists()
