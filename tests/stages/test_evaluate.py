from pathlib import Path
from typing import Any

import pytest
from tests.distributed.threads import together
from tests.runs import judge

from cropi.config import EvaluateConfig
from cropi.config.loading import load_config
from cropi.errors import DataError
from cropi.parallel import ProcessGroup, process_group
from cropi.report.reading import read_answers
from cropi.report.summary import accuracy_by_set
from cropi.run_tables import forget_evaluations, keep_evaluation
from cropi.stages.evaluate import Exam, Question

PROMPTS = [
    Question(name, {"prompt_id": prompt_id, "source": "s", "messages": '""', "answer": answer, "extra": None}, [token])
    for name, prompt_id, answer, token in (
        ("easy", "a", "1", 1),
        ("easy", "b", "2", 2),
        ("hard", "c", "3", 3),
        ("hard", "d", "unreadable", 4),
    )
]


def generate(prompts: list[list[int]], temperature: float | None, seed: int) -> list[str]:
    """Greedy repeats the prompt's number; sampling alternates between it and 9."""
    if temperature is None:
        return [str(ids[0]) if ids[0] != 2 else "9" for ids in prompts]
    return [str(ids[0]) if n % 2 else "9" for n, ids in enumerate(prompts)]


@judge
def verify(completion: str, gold: str) -> str:
    if gold == "unreadable":
        return "unparseable_gold"
    return "correct" if completion == gold else "wrong"


def test_per_prompt_results_and_accuracy_by_hand(tmp_path: Path) -> None:
    config = EvaluateConfig(samples=4)
    rows = Exam(generate, verify, config, seed=0, block=2).answers(PROMPTS, 7)
    assert [(r["prompt_id"], r["greedy"], r["sampled"], r["samples"]) for r in rows] == [
        ("a", 1.0, 0.5, 4),
        ("b", 0.0, 0.5, 4),
        ("c", 1.0, 0.5, 4),
    ]
    keep_evaluation(tmp_path, 7, rows, {})
    result = accuracy_by_set(load_config("quickstart"), read_answers(tmp_path)[7])
    assert result["easy"]["greedy"].mean == 0.5
    assert result["easy"]["greedy"].low == 0.0
    assert result["easy"]["greedy"].high == 1.0
    assert result["hard"]["sampled"].mean == 0.5


@pytest.mark.parametrize("block", [1, 2, 3])
def test_processes_ask_different_questions_and_have_the_same_answers(block: int) -> None:
    config, asked = EvaluateConfig(samples=4), []

    def work(ranks: ProcessGroup) -> Any:
        def counted(prompts: list[list[int]], temperature: float | None, seed: int) -> list[str]:
            if temperature is None:
                asked.extend(prompts)
            return generate(prompts, temperature, seed)

        return Exam(counted, verify, config, seed=0, block=block).answers(PROMPTS, 7)

    alone = work(process_group())
    assert together(work) == [alone, alone]
    assert sorted(asked) == sorted([prompt.prompt_ids for prompt in PROMPTS] * 2)


def test_files_are_found_by_step_and_forgotten_after_a_resume(tmp_path: Path) -> None:
    config = EvaluateConfig()
    for step in (10, 2, 30):
        keep_evaluation(tmp_path, step, Exam(generate, verify, config, seed=0, block=2).answers(PROMPTS, step), {})
    assert list(read_answers(tmp_path)) == [2, 10, 30]
    assert read_answers(tmp_path)[2].sampled == {}
    forget_evaluations(tmp_path, 10)
    assert list(read_answers(tmp_path)) == [2, 10]


def test_a_test_set_without_readable_answers_is_an_error() -> None:
    with pytest.raises(DataError, match="can read none of the recorded answers"):
        Exam(generate, verify, EvaluateConfig(), seed=0, block=2).answers(PROMPTS[3:], 0)
