"""Verifiers that are someone else's."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cropi.rewards.verifier import CORRECT, UNPARSEABLE_ANSWER, UNPARSEABLE_GOLD, WRONG, Answered, Graded, reward
from cropi.rewards.verifiers.python_function import FunctionVerifier
from cropi.rewards.verifiers.reasoning_gym import ReasoningGymVerifier, is_formula
from tests.runs import json_lines

HERE = "tests.rewards.functions"
LEVEL = json.dumps({"level": 3})


def function(name: str, **settings: object) -> object:
    return FunctionVerifier(type="function", path=f"{HERE}.{name}", **settings).load()  # type: ignore[arg-type]


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


def test_a_grade_is_the_reward_and_the_threshold_still_says_what_is_right() -> None:
    graded = function("grades", graded=True, threshold=0.6)
    assert graded(Answered("0.25", "7")) == Graded(WRONG, 0.25)  # type: ignore[operator]
    assert graded(Answered("0.6", "7")) == Graded(CORRECT, 0.6)  # type: ignore[operator]
    assert function("none", graded=True)(Answered("7", "7")) == UNPARSEABLE_GOLD  # type: ignore[operator]
    assert function("verl_score", graded=True)(Answered("7", "7", "sums")) == Graded(CORRECT, 1.0)  # type: ignore[operator]
    assert graded(Answered(repr(0.2 + 0.4 + 0.3 + 0.1), "7")) == Graded(CORRECT, 1.0)  # type: ignore[operator]
    assert graded(Answered("-1e-9", "7")) == Graded(WRONG, 0.0)  # type: ignore[operator]
    for outside in ("1.5", "-0.5", "inf", "1.00001"):
        with pytest.raises(ValueError, match="outside 0 to 1"):
            graded(Answered(outside, "7"))  # type: ignore[operator]
        assert function("grades")(Answered(outside, "7")) in {CORRECT, WRONG}  # type: ignore[operator]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two", "returned 2 rewards for one completion"),
        ("not_a_number", "not a number"),
        ("bare", "returned one float, not a list"),
    ],
)
def test_what_is_no_reward_is_an_error(name: str, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        function(name)(Answered("7", "7"))  # type: ignore[operator]


@pytest.mark.parametrize("name", ["later", "an_object", "a_coroutine_of_another"])
def test_an_asynchronous_function_is_waited_for_in_one_loop(name: str) -> None:
    verify = function(name)
    for _ in range(2):
        assert verify(Answered("7", "7")) == CORRECT  # type: ignore[operator]
        assert verify(Answered("8", "7")) == WRONG  # type: ignore[operator]
    with pytest.raises(ValueError, match="do not like"):
        function("raises_later")(Answered("bad", "7"))  # type: ignore[operator]


def test_a_name_that_is_not_there_is_told_with_the_nearest() -> None:
    with pytest.raises(ImportError, match="has no equall; did you mean 'equal'"):
        function("equall")
    for path in ("rewards", "rewards.py:right"):
        with pytest.raises(ValueError, match=r"MODULE\.FUNCTION"):
            FunctionVerifier(type="function", path=path)
    with pytest.raises(ValueError, match=r"must hold \{answer\}"):
        FunctionVerifier(type="function", path="a.b", written="answer")


def test_trl_s_own_accuracy_reward() -> None:
    """A peer's function, in its own form."""
    config = FunctionVerifier(
        type="function",
        path="trl.rewards.accuracy_reward",
        answer_as="solution",
        messages=True,
        written="\\boxed{{answer}}",
    )
    verify = config.load()
    assert verify(Answered("so \\boxed{\\frac{1}{2}}", "\\frac{1}{2}")) == CORRECT
    assert verify(Answered("so \\boxed{\\frac{1}{3}}", "\\frac{1}{2}")) == WRONG
    assert config.completion_with("7") == "\\boxed{7}"


@pytest.mark.parametrize("name", ["verl_score", "verl_score_later"])
def test_verl(name: str) -> None:
    """A function in verl's form is known by its signature."""
    verify: Any = function(name)
    assert verify(Answered("7", "7", "sums")) == CORRECT
    assert verify(Answered("8", "7", "sums")) == WRONG
    assert verify(Answered("8", "7", "other", "", LEVEL)) == CORRECT


def entries(task: str, count: int = 5) -> list[dict[str, object]]:
    import reasoning_gym

    return list(reasoning_gym.create_dataset(task, size=count, seed=3))


GOLD = ["chain_sum", "countdown", "n_queens", "spiral_matrix", "polynomial_multiplication", "puzzle24", "coin_flip"]
GOLD += ["rearc", "bitwise_arithmetic", "advanced_geometry"]  # whose scorers do not see what was JSON as it was


@pytest.mark.parametrize("task", GOLD)
def test_reasoning_gym_s_gold_answers_are_right(task: str) -> None:
    verify = ReasoningGymVerifier(type="reasoning_gym").load()
    for entry in entries(task):
        row = Answered(str(entry["answer"]), str(entry["answer"]), task, "", json.dumps(entry["metadata"]))
        assert verify(row) == CORRECT
        assert verify(row._replace(completion=f"<think>1</think><answer>{entry['answer']}</answer>")) == CORRECT
        assert verify(row._replace(completion="<answer>no idea</answer>")) in {WRONG, UNPARSEABLE_ANSWER}


def test_reasoning_gym_s_partial_credit_and_threshold() -> None:
    """A wrong answer in the right form earns 0.05 of chain_sum's score or less than 1: the threshold decides."""
    entry = entries("chain_sum")[0]
    row = Answered("1" + str(entry["answer"]), str(entry["answer"]), "chain_sum", "", json.dumps(entry["metadata"]))
    assert ReasoningGymVerifier(type="reasoning_gym").load()(row) == WRONG
    assert ReasoningGymVerifier(type="reasoning_gym", threshold=1e-9).load()(row) == CORRECT
    found = ReasoningGymVerifier(type="reasoning_gym", graded=True).load()(row)
    assert found.verdict == WRONG
    assert 0 < found.grade < 1


def test_a_task_that_does_not_exist_is_an_unreadable_gold_answer() -> None:
    verify = ReasoningGymVerifier(type="reasoning_gym").load()
    assert verify(Answered("7", "7", "no_such_task")) == UNPARSEABLE_GOLD


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("3*x**2 + 2*x - sin(x)", True), ("(7 + 5) * 2 - 1", True), ("4! / 2", True), ("-cos(2*x)/4 + C", True),
        ("3*Integral(x**3*cos(3*x), x) + C", True), ("__import__('os').system('x')", False),
        ("sympify('a'+'b')", False), ("S(a)", False), ("N(x)", False), ("x.y", False), ("eval(a)", False),
        ("lambda: 1", False), ("0x77 # 67 50 20 82", False), ("0x18", False), ("[1, 2]", False),
    ],
)  # fmt: skip
def test_what_may_be_given_to_sympy(answer: str, expected: bool) -> None:
    assert is_formula(answer) is expected


EVALUATED = ["string_insertion", "spiral_matrix", "binary_matrix", "n_queens"]
PARSED = ["polynomial_multiplication", "countdown", "puzzle24", "simple_integration"]
CODE = [
    "open('{}', 'w')",
    "__import__('os').system('touch {}')",
    "[open(f, 'w') for f in ['{}']]",
    "list(map(exec, ['ope'+'n(\"{}\",\"w\")']))",
    "sympify('ope'+'n(\"{}\",\"w\")')",
    "S('ope'+'n(\"{}\",\"w\")')",
]


@pytest.mark.parametrize("task", EVALUATED + PARSED)
def test_no_code_is_run(task: str, tmp_path: Path) -> None:
    verify = ReasoningGymVerifier(type="reasoning_gym").load()
    entry = entries(task)[0]
    marker = tmp_path / "ran"
    for code in CODE:
        row = Answered(code.format(marker), str(entry["answer"]), task, "", json.dumps(entry["metadata"]))
        with suppress(ValueError, SyntaxError):  # what is no literal
            assert verify(row) in {UNPARSEABLE_ANSWER, WRONG}
        assert not marker.exists(), code


def judged_by(task: str, answers: dict[int, list[str]] | list[str], **settings: Any) -> list[tuple[str, str, object]]:
    """What is not judged 0 of these answers to a task's entries."""
    verify = ReasoningGymVerifier(type="reasoning_gym", **settings).load()
    found = []
    for number, entry in enumerate(entries(task, 20)):
        row = Answered("", str(entry["answer"]), task, "", json.dumps(entry["metadata"]))
        for answer in answers if isinstance(answers, list) else answers[number]:
            verdict = verify(row._replace(completion=answer))
            if (reward(verdict) or 0) > 0.5 and answer != row.answer:
                found.append((answer, row.answer, verdict))
    return found


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize(
    ("task", "answers"),
    [
        (
            "complex_arithmetic",
            ["nan", "-NaN", "nanj", "nan+nani", "1+nanj", "(nan)", "n a n", "inf", "1e999", "-infj"],
        ),
        ("number_sorting", [str([float("nan")] * n).replace("nan", "NaN") for n in range(1, 12)]),
        ("game_of_life_halting", ["maybe", "0", "True False", "nan", "\ufffd"]),
        ("coin_flip", ["0", "0.0", "0.", "00", "0/7", "0,0", "1e-9", ".0"]),
        ("puzzle24", ["9*3-2-1", "8*2+7+1", "2*3*4*1"]),
    ],
)
def test_no_answer_is_right_for_every_question(task: str, answers: list[str], graded: bool) -> None:
    assert judged_by(task, answers, graded=graded) == []


GYM_VERDICTS = json_lines(Path(__file__).with_name("reasoning_gym_verdicts.jsonl"))


@pytest.mark.parametrize(("task", "entry", "answer", "expected"), GYM_VERDICTS)
def test_what_a_task_lets_pass_and_what_it_must_not_lose(task, entry, answer, expected):
    row = Answered(answer, entry["answer"], task, "", json.dumps(entry.get("metadata", {})))
    assert ReasoningGymVerifier(type="reasoning_gym").load()(row) in (
        {expected} if expected == CORRECT else {WRONG, UNPARSEABLE_ANSWER}
    )
