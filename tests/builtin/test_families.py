import random
from pathlib import Path
from types import SimpleNamespace

import pytest
from tests.runs import json_lines

from cropi.builtin.families import (
    FAMILIES,
    MAX_LENGTH,
    MIN_LENGTH,
    STYLES,
    VOCABULARY,
    WITHOUT_RUNNING_ANSWER,
    Difficulty,
    Problem,
    difficulty,
    draw,
    early_answer,
    guess,
)


def scripted(**returns):
    """A stand-in for random.Random whose methods return the given values in order."""

    def method(values):
        values = iter(values)
        return lambda *args, **kwargs: next(values)

    return SimpleNamespace(**{name: method(values) for name, values in returns.items()})


# Worked by hand: family, length, modulus, what the generator is made to draw, prompt, step-by-step completion.
HAND_WORKED = json_lines(Path(__file__).with_name("hand_worked.jsonl"))


@pytest.mark.parametrize(("family", "length", "modulus", "draws", "prompt", "steps"), HAND_WORKED)
def test_hand_worked_problem(family, length, modulus, draws, prompt, steps):
    problem = FAMILIES[family].generate(scripted(**draws), length, modulus)
    assert (problem.family, problem.prompt, problem.steps) == (family, prompt, steps)
    assert problem.answer == steps.split(" answer ")[1]


def test_every_family_has_a_hand_worked_problem_and_a_default():
    assert {row[0] for row in HAND_WORKED} == set(FAMILIES)
    assert len(FAMILIES) >= 12


@pytest.mark.parametrize("family", FAMILIES)
def test_steps_end_with_the_answer_and_every_text_is_short_and_in_the_vocabulary(family):
    rng = random.Random(0)
    modulus = None if FAMILIES[family].default.modulus is None else 10
    for level in (FAMILIES[family].default, Difficulty(MIN_LENGTH, MAX_LENGTH, modulus)):
        for _ in range(200):
            problem = draw(family, rng, level)
            assert problem.steps.split()[0] == STYLES[family]
            assert problem.steps.rpartition(" answer ")[2] == problem.answer
            assert problem.prompt.split()[0] == family
            assert max(len(problem.prompt.split()), len(problem.steps.split()) + 1) <= 32
            assert set(f"{problem.prompt} {problem.steps}".split()) <= set(VOCABULARY)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_guess_is_right_only_by_chance(family):
    rng, level = random.Random(1), FAMILIES[family].default
    problems = [draw(family, rng, level) for _ in range(1_000)]
    right = sum(guess(problem, rng, level) == problem.answer for problem in problems)
    most = {"parity": 600}.get(family, 350)
    assert right <= most


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "sums"}, "unknown family 'sums'; known: sum, alternate"),
        ({"family": "sum", "min_length": 1}, "min_length is 1; allowed: 2 to 12"),
        ({"family": "sum", "max_length": 13}, "max_length is 13; allowed: 2 to 12"),
        ({"family": "sum", "min_length": 6, "max_length": 5}, r"min_length \(6\) is above max_length \(5\)"),
        ({"family": "sum", "hint": 1.5}, "hint is 1.5; it is a share, from 0 to 1"),
    ],
)
def test_a_bad_difficulty_says_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        difficulty(**arguments)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_step_is_the_answer_wherever_an_answer_runs_along(family):
    problems = [draw(family, random.Random(seed), FAMILIES[family].default) for seed in range(20)]
    last = [problem.steps.partition(" answer ")[0].split()[-1] == problem.answer for problem in problems]
    assert all(last) == (family not in WITHOUT_RUNNING_ANSWER)


@pytest.mark.parametrize(
    ("problem", "early"),
    [
        (Problem("depth", "depth : ( [ ] ) { =", "1", "tally 1 2 1 0 1 answer 1"), "0"),
        (Problem("machine", "machine : x y =", "a", "trace b a answer a"), "b"),  # x leads from a to b, y back to a
    ],
)
def test_the_answer_one_item_early(problem, early):
    assert early_answer(problem) == early
