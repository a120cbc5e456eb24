"""Procedural problems that are easy step by step and hard at once.

A problem is a line of words such as ``sum mod 7 : 3 5 6 1 =``. Worked step by step its completion is
``steps 3 1 0 1 answer 1``; answered at once it is ``answer 1``. The verdict is an exact match of the text after
the last ``answer``. Every word comes from the closed `VOCABULARY`, one token each.

A family is worked in one of four styles, named by the completion's first word (`STYLES`): arithmetic in ``steps``,
counting in a ``tally``, moves in a ``trace``, ordering in a ``list``. Which style suits a problem is what a policy
has to learn family by family, so practice on one family helps those of its style and not the others.

To add a family, write one generator `(rng, length, modulus) -> Problem` and add one line to `FAMILIES` and `STYLES`.
Generators whose problems have no modulus are handed ``None`` and ignore it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

STYLES = {
    **dict.fromkeys(("sum", "alternate", "product", "horner"), "steps"),
    **dict.fromkeys(("parity", "count", "runs", "depth"), "tally"),
    **dict.fromkeys(("machine", "shell", "compass", "elevator", "hop"), "trace"),
    **dict.fromkeys(("maximum", "median", "reverse"), "list"),
}
# In the others every step is the answer so far, and the last one the answer.
WITHOUT_RUNNING_ANSWER = ("median", "reverse")
MIN_LENGTH, MAX_LENGTH = 2, 12

DIGITS = tuple(str(digit) for digit in range(10))
LETTERS = tuple("abcdefghijkl")
CUP_SWAPS = ("ab", "ac", "ad", "bc", "bd", "cd")
BRACKETS = {"(": ")", "[": "]", "{": "}"}
HEADINGS = ("north", "east", "south", "west")
TURNS = {"right": 1, "around": 2, "left": 3}
HOP_LETTERS = LETTERS[:5]
# Where `machine` goes from each state on x, y and z.
MACHINE = {
    "a": {"x": "b", "y": "e", "z": "a"},
    "b": {"x": "d", "y": "a", "z": "c"},
    "c": {"x": "a", "y": "c", "z": "e"},
    "d": {"x": "e", "y": "b", "z": "b"},
    "e": {"x": "c", "y": "d", "z": "d"},
}


@dataclass(frozen=True)
class Problem:
    """One question, its right answer and its full step-by-step completion."""

    family: str
    prompt: str
    answer: str
    steps: str


@dataclass(frozen=True)
class Difficulty:
    """Range of a problem's length, in items to work through, the modulus where the family has one (else None), and the
    share of the worked steps that the prompt shows."""

    min_length: int
    max_length: int
    modulus: int | None = None
    hint: float = 0.0

    def __post_init__(self) -> None:
        for name, length in (("min_length", self.min_length), ("max_length", self.max_length)):
            if not MIN_LENGTH <= length <= MAX_LENGTH:
                raise ValueError(f"{name} is {length}; allowed: {MIN_LENGTH} to {MAX_LENGTH}")
        if self.min_length > self.max_length:
            raise ValueError(f"min_length ({self.min_length}) is above max_length ({self.max_length})")
        if not 0.0 <= self.hint <= 1.0:
            raise ValueError(f"hint is {self.hint}; it is a share, from 0 to 1")


def _problem(question: str, items: Iterable[object], steps: Iterable[object], answer: object) -> Problem:
    """Join the parts; the family is the question's first word."""
    family = question.split()[0]
    prompt = " ".join([question, ":", *map(str, items), "="])
    worked = " ".join([STYLES[family], *map(str, steps), "answer", str(answer)])
    return Problem(family, prompt, str(answer), worked)


def _scan(question: str, items: Sequence[object], states: Sequence[object]) -> Problem:
    """A problem with one state per item, whose answer is the last state."""
    return _problem(question, items, states, states[-1])


def _walk(start: Any, items: Iterable[Any], step: Callable[[Any, Any], Any]) -> list[Any]:
    """The states after each item, from a start that is none of them."""
    return [*accumulate(items, step, initial=start)][1:]


def sum_mod(rng: random.Random, length: int, modulus: int) -> Problem:
    """Running sum of digits modulo `modulus`."""
    items = [rng.randrange(modulus) for _ in range(length)]
    states = [sum(items[: i + 1]) % modulus for i in range(length)]
    return _scan(f"sum mod {modulus}", items, states)


def alternate(rng: random.Random, length: int, modulus: int) -> Problem:
    """First minus second plus third minus fourth ..., modulo `modulus`."""
    items = [rng.randrange(modulus) for _ in range(length)]
    states = [(sum(items[: i + 1 : 2]) - sum(items[1 : i + 1 : 2])) % modulus for i in range(length)]
    return _scan(f"alternate mod {modulus}", items, states)


def product(rng: random.Random, length: int, modulus: int) -> Problem:
    """Running product of non-zero digits modulo `modulus`."""
    items = [rng.randrange(1, modulus) for _ in range(length)]
    states = [*accumulate(items, lambda total, item: total * item % modulus)]
    return _scan(f"product mod {modulus}", items, states)


def horner(rng: random.Random, length: int, modulus: int) -> Problem:
    """Value of the polynomial with the given coefficients at a point, by Horner's rule, modulo `modulus`."""
    point = rng.randrange(1, modulus)
    items = [rng.randrange(modulus) for _ in range(length)]
    states = [*accumulate(items, lambda total, item: (total * point + item) % modulus)]
    return _scan(f"horner {point} mod {modulus}", items, states)


def parity(rng: random.Random, length: int, _modulus: None) -> Problem:
    """Whether the number of ones so far is even or odd."""
    bits = [rng.randrange(2) for _ in range(length)]
    states = [("even", "odd")[sum(bits[: i + 1]) % 2] for i in range(length)]
    return _scan("parity", bits, states)


def maximum(rng: random.Random, length: int, _modulus: None) -> Problem:
    """Running maximum; the ceiling varies, so that no single answer is a good guess."""
    ceiling = rng.randrange(1, 10)
    items = [rng.randint(0, ceiling) for _ in range(length)]
    return _scan("maximum", items, [max(items[: i + 1]) for i in range(length)])


def count(rng: random.Random, length: int, _modulus: None) -> Problem:
    """Number of times that the named letter has come so far."""
    letter = rng.choice("abc")
    items = rng.choices("abc", k=length)
    return _scan(f"count {letter}", items, [items[: i + 1].count(letter) for i in range(length)])


def machine(rng: random.Random, length: int, _modulus: None) -> Problem:
    """State of the fixed finite automaton `MACHINE`, started in a."""
    items = rng.choices("xyz", k=length)
    return _scan("machine", items, _walk("a", items, lambda state, item: MACHINE[state][item]))


def shell(rng: random.Random, length: int, _modulus: None) -> Problem:
    """Shell game: the cup the ball is under, after each swap of two of the cups a, b, c and d."""
    ball = rng.choice("abcd")
    swaps = rng.choices(CUP_SWAPS, k=length)
    states = _walk(ball, swaps, lambda cup, swap: swap.replace(cup, "") if cup in swap else cup)
    return _scan(f"shell {ball}", swaps, states)


def depth(rng: random.Random, length: int, _modulus: None) -> Problem:
    """Number of open brackets; every closing bracket closes the one opened last."""
    items: list[str] = []
    states: list[int] = []
    expected: list[str] = []
    for _ in range(length):
        if expected and rng.random() < 0.5:
            items.append(expected.pop())
        else:
            items.append(rng.choice(list(BRACKETS)))
            expected.append(BRACKETS[items[-1]])
        states.append(len(expected))
    return _scan("depth", items, states)


def compass(rng: random.Random, length: int, _modulus: None) -> Problem:
    """The heading after each turn."""
    heading = rng.randrange(4)
    turns = rng.choices(list(TURNS), k=length)
    states = _walk(heading, turns, lambda at, turn: (at + TURNS[turn]) % 4)
    return _scan(f"compass {HEADINGS[heading]}", turns, [HEADINGS[at] for at in states])


def elevator(rng: random.Random, length: int, modulus: int) -> Problem:
    """The floor of a lift in a house of `modulus` floors, counted from 0; it stays put at the top and bottom."""
    floor = rng.randrange(modulus)
    moves = rng.choices(["up", "down"], k=length)
    states = _walk(floor, moves, lambda at, move: min(at + 1, modulus - 1) if move == "up" else max(at - 1, 0))
    return _scan(f"elevator {floor} of {modulus}", moves, states)


def runs(rng: random.Random, length: int, _modulus: None) -> Problem:
    """Number of runs of equal letters that have begun."""
    items = rng.choices("abc", k=length)
    states = [1 + sum(items[j] != items[j - 1] for j in range(1, i + 1)) for i in range(length)]
    return _scan("runs", items, states)


def hop(rng: random.Random, length: int, _modulus: None) -> Problem:
    """Follow the arrows `length` times; the arrows come in any order."""
    arrows = {letter: rng.choice(HOP_LETTERS) for letter in rng.sample(HOP_LETTERS, len(HOP_LETTERS))}
    start = rng.choice(HOP_LETTERS)
    states = _walk(start, range(length), lambda at, _: arrows[at])
    return _scan(f"hop {length} from {start}", [f"{tail} > {head}" for tail, head in arrows.items()], states)


def median(rng: random.Random, length: int, _modulus: None) -> Problem:
    """The middle digit once sorted (the lower of the two when the length is even); the steps sort them."""
    items = [rng.randrange(10) for _ in range(length)]
    ordered = sorted(items)
    return _problem("median", items, ordered, ordered[(length - 1) // 2])


def reverse(rng: random.Random, length: int, _modulus: None) -> Problem:
    """The letters from last to first: an answer of several words."""
    items = rng.sample(LETTERS, length)
    return _problem("reverse", items, items[::-1], " ".join(items[::-1]))


class Family(NamedTuple):
    """The draw of a family's problems, and their difficulty by default."""

    generate: Callable[[random.Random, int, Any], Problem]  # the modulus is an int where the family has one, else None
    default: Difficulty


FAMILIES: dict[str, Family] = {
    "sum": Family(sum_mod, Difficulty(4, 8, modulus=7)),
    "alternate": Family(alternate, Difficulty(4, 8, modulus=7)),
    "product": Family(product, Difficulty(4, 8, modulus=7)),
    "horner": Family(horner, Difficulty(4, 7, modulus=5)),
    "parity": Family(parity, Difficulty(6, 10)),
    "maximum": Family(maximum, Difficulty(4, 8)),
    "count": Family(count, Difficulty(5, 9)),
    "machine": Family(machine, Difficulty(4, 8)),
    "shell": Family(shell, Difficulty(4, 8)),
    "depth": Family(depth, Difficulty(4, 9)),
    "compass": Family(compass, Difficulty(4, 8)),
    "elevator": Family(elevator, Difficulty(5, 9, modulus=7)),
    "runs": Family(runs, Difficulty(5, 9)),
    "hop": Family(hop, Difficulty(2, 5)),
    "median": Family(median, Difficulty(4, 7)),
    "reverse": Family(reverse, Difficulty(4, 7)),
}
QUESTION_WORDS = ("mod", "of", "from", ":", ">", "=", "answer", "even", "odd", "x", "y", "z", "up", "down")
VOCABULARY: tuple[str, ...] = (
    *FAMILIES,
    *QUESTION_WORDS,
    *dict.fromkeys(STYLES.values()),
    *DIGITS,
    "10",
    "11",
    "12",
    *LETTERS,
    *CUP_SWAPS,
    *BRACKETS,
    *BRACKETS.values(),
    *HEADINGS,
    *TURNS,
)


def difficulty(
    family: str, *, min_length: int | None = None, max_length: int | None = None, hint: float = 0.0
) -> Difficulty:
    """The family's default difficulty with the given parts replaced.

    Raises ValueError for an unknown family or a part out of range.
    """
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; known: {', '.join(FAMILIES)}")
    default = FAMILIES[family].default
    return Difficulty(
        default.min_length if min_length is None else min_length,
        default.max_length if max_length is None else max_length,
        default.modulus,
        hint,
    )


def draw(family: str, rng: random.Random, level: Difficulty) -> Problem:
    """A random problem, its length uniform over the level's range."""
    return FAMILIES[family].generate(rng, rng.randint(level.min_length, level.max_length), level.modulus)


def guess(problem: Problem, rng: random.Random, level: Difficulty) -> str:
    """A plausible answer given without working: another problem's, or these words in another order."""
    words = problem.answer.split()
    if len(words) > 1:
        return " ".join(rng.sample(words, len(words)))
    return draw(problem.family, rng, level).answer


def early_answer(problem: Problem) -> str:
    """The answer of one who stops one item early: the step before the last.

    Raises ValueError for a family whose steps are not the answer so far.
    """
    if problem.family in WITHOUT_RUNNING_ANSWER:
        raise ValueError(f"family {problem.family!r} has no answer one item early: its steps are not the answer so far")
    return problem.steps.partition(" answer ")[0].split()[-2]
