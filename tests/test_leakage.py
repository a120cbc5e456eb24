"""Planted leaks are found, templates with other numbers are not, and a run stops at exact ones."""

import json
import random
import time
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cropi.artifacts import TRAJECTORIES
from cropi.builtin import FAMILIES, difficulty, generate
from cropi.gradients.groups import Group
from cropi.gradients.validation_directions import one_sided, validation_groups
from cropi.prompt_text import normalised, prompt_text, words
from cropi.prompts import leakage_warnings
from cropi.prompts.leakage import Leakage, Match, common_limit, find_leakage
from tests.runs import SMALL, cropi_error, cropi_ok, trajectory
from tests.test_prompts import config, question, write_rows

PROBLEM = (
    "Maria has a garden with 12 rows of tomato plants, and each row holds 7 plants. On Monday morning she gives 15 of "
    "them to her neighbour. The hail on Tuesday destroys half of all that she has left, and she waters the others. How "
    "many tomato plants does Maria still water on Tuesday evening?"
)


def row(text: str, set_name: str, prompt_id: str | None = None) -> dict[str, Any]:
    return {"prompt_id": prompt_id or f"{set_name}: {text}", "set": set_name, "messages": json.dumps(text)}


def kind(train: str, held_out: str) -> str:
    """What a held-out prompt is to a training prompt."""
    found = find_leakage([row(train, "train"), row(held_out, "test/t")])
    assert len(found.exact) + len(found.near) <= 1
    return "exact" if found.exact else "near" if found.near else "none"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda text: text, "exact"), (str.upper, "exact"), (lambda text: text.replace(" ", "  \n\t"), "exact"),
        (lambda text: text.replace("a", "ａ").replace("fi", "ﬁ"), "exact"),
        (lambda text: text.replace(" ", "\N{NO-BREAK SPACE}"), "exact"),
        (lambda text: text.replace("tomato", "tom\N{SOFT HYPHEN}ato"), "exact"),
        (lambda text: text.replace(",", " ,").replace("?", ""), "near"),
        (lambda text: text.replace("neighbour", "friend"), "near"),
        (lambda text: " ".join([*text.split(". ")[2:3], *text.split(". ")[:2], *text.split(". ")[3:]]), "near"),
        (lambda text: f"Solve this problem step by step and end with the answer. {text} Let's think.", "near"),
        (lambda text: text.replace("12", "13"), "none"),
        (lambda text: text.replace("12", "14").replace("7", "9").replace("15", "5"), "none"),
        (lambda text: text[: len(text) // 2], "none"),
        (lambda text: "How many tomato plants does Maria still water?", "none"),
    ],
)  # fmt: skip
def test_planted_leaks_are_told_apart(change: Any, expected: str) -> None:
    assert kind(change(PROBLEM), PROBLEM) == expected


@pytest.mark.parametrize(
    ("train", "held_out", "expected"),
    [
        ("What is 3 + 4?", "what is 3 + 4", "near"),  # no word differs
        ("What is 3 + 4?", "What is 3 - 4?", "none"), ("What is 3 + 4?", "What is 4 + 3?", "none"),
        ("What is 3 + 4?", "What is 3 + 4 + 5?", "none"), (f"{PROBLEM} What is 3 + 4?", "What is 3 + 4?", "none"),
        ("Tom has $1,000.50.", "Tom has 1000.50", "near"), ("Tom has 1.5 l.", "Tom has 15 l.", "none"),
        ("ẞ", "SS", "exact"),  # case folding
        ("½ of Σ", "1⁄2 of σ", "exact"),  # NFKC
        ("", "", "none"), ("...", "?!", "none"),
        ("...", "?", "none"),  # neither has words
    ],
)  # fmt: skip
def test_short_prompts_are_compared_as_a_whole(train: str, held_out: str, expected: str) -> None:
    assert kind(train, held_out) == expected


def test_scripts_without_spaces_are_read_sign_by_sign() -> None:
    text = (
        "玛丽的花园里有12行番茄,每行有7株。星期一早上她把15株送给邻居。"
        "星期二的冰雹毁掉了剩下的一半。玛丽星期二晚上还要给多少株番茄浇水?"
    )
    assert words("有12行") == ["有", "12", "行"]
    assert kind(text, text.replace("邻居", "朋友")) == "near"
    assert kind(text, text.replace("12", "13")) == "none"


def test_chat_messages_and_text_are_the_same_and_the_system_does_not_count() -> None:
    chat = [{"role": "system", "content": "You are kind."}, {"role": "user", "content": PROBLEM}]
    assert prompt_text(json.dumps(chat)) == PROBLEM
    rows = [row(PROBLEM, "train"), {"prompt_id": "x", "set": "test/t", "messages": json.dumps(chat)}]
    assert len(find_leakage(rows).exact) == 1


def test_which_sets_may_share_a_prompt() -> None:
    def found(*sets: str) -> list[tuple[str, str]]:
        return [(m.set, m.other_set) for m in find_leakage([row(PROBLEM, name) for name in sets]).exact]

    assert found("validation/a", "validation/b") == []
    assert found("test/a", "test/b") == []
    assert found("train", "validation/a") == [("validation/a", "train")]
    assert found("test/a", "validation/a") == [("test/a", "validation/a")]
    assert found("train", "validation/a", "test/a") == [
        ("test/a", "train"),
        ("test/a", "validation/a"),
        ("validation/a", "train"),
    ]


def test_one_id_in_two_roles_is_a_leak_whatever_the_texts() -> None:
    (match,) = find_leakage([row("one", "train", "7"), row("two", "test/t", "7")]).exact
    assert str(match) == "the prompt '7' (two) is in train and in test/t"


def test_no_built_in_family_is_reported() -> None:
    sets = {"train": ("train", 50), "validation/v": ("validation", 24), "test/t": ("test", 24)}
    rows = []
    for family in FAMILIES:
        for name, (split, count) in sets.items():
            problems = generate(
                family,
                split=split,
                count=count,
                seed=1,
                level=difficulty(family, max_length=12 if family != "hop" else None),
            )
            rows += [row(p["prompt"], name, p["prompt_id"]) for p in problems]
    assert find_leakage(rows) == Leakage((), ())


@pytest.mark.parametrize("held_out", [5, 20])  # boilerplate of the training prompts, of all prompts
def test_boilerplate_around_every_prompt_counts_for_nothing(held_out: int) -> None:
    rng = random.Random(1)
    vocabulary = [f"{a}{b}" for a in "bcdfghklmn" for b in "aeiou"]
    before = "Read the following question with care, think step by step, and write the answer in a box at the end: "
    own = [" ".join(rng.choices(vocabulary, k=12)) for _ in range(60)]
    rows = [row(before + text, "test/t" if n < held_out else "train") for n, text in enumerate(own)]
    assert find_leakage(rows) == Leakage((), ())
    leak = row(f"{before}{own[-1]} indeed", "test/t", "leak")
    assert [m.prompt_id for m in find_leakage([*rows, leak]).near] == ["leak"]


# -- against the definition --------------------------------------------------------------------------------------------


def by_definition(rows: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """(held-out prompt, role) of near-duplicates, computed with sets of tuples, pair by pair."""
    role = {r["prompt_id"]: r["set"].split("/")[0] for r in rows}
    text = {r["prompt_id"]: json.loads(r["messages"]) for r in rows}
    order = ["train", "validation", "test"]

    def grams(i: str) -> set[tuple[str, ...]]:
        found = words(text[i])
        if len(found) < 20:
            return {("whole", *found)} if found else set()
        return {tuple(found[n : n + 5]) for n in range(len(found) - 4)}

    of = {i: grams(i) for i in text}
    distinct = {(role[i], normalised(text[i])): i for i in text}
    frequency = Counter(gram for i in distinct.values() for gram in of[i])
    common = {gram for gram, count in frequency.items() if count > common_limit(len(distinct))}
    result = set()
    for h in text:
        own = of[h] - common
        numbers = Counter(w for w in words(text[h]) if w[0].isdigit())
        for earlier in order[: order.index(role[h])]:
            there = [i for i in text if role[i] == earlier]
            if own and not any(normalised(text[i]) == normalised(text[h]) for i in there):
                same = [i for i in there if numbers <= Counter(w for w in words(text[i]) if w[0].isdigit())]
                if any(len(own & of[i]) / len(own) >= 0.6 for i in same):
                    result.add((h, earlier))
    return result


PIECES = ["a b c d e f g", "h i j k l 1 m n", "o p q r s t 2", "u v w x y z", "1 2", "c d e f"]
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=6).map(" ".join)
SETS = st.sampled_from(["train", "train", "validation/a", "validation/b", "test/t"])
ROWS = st.lists(st.tuples(TEXTS, SETS), min_size=1, max_size=40).map(
    lambda pairs: [row(text, name, f"{n:03}") for n, (text, name) in enumerate(pairs)]
)


@settings(deadline=None, max_examples=150)
@given(ROWS)
def test_near_duplicates_are_those_of_the_definition(rows: list[dict[str, Any]]) -> None:
    found = find_leakage(rows).near
    assert {(m.prompt_id, m.other_set.split("/")[0]) for m in found} == by_definition(rows)
    assert len(found) == len({(m.prompt_id, m.other_set.split("/")[0]) for m in found})


@settings(deadline=None, max_examples=50)
@given(ROWS, st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_matter(rows: list[dict[str, Any]], rng: random.Random) -> None:
    shuffled = rng.sample(rows, len(rows))
    assert find_leakage(shuffled) == find_leakage(rows)


@settings(deadline=None)
@given(st.text(min_size=1), st.text())
def test_any_text_is_an_exact_duplicate_of_itself(text: str, other: str) -> None:
    found = find_leakage([row(text, "train"), row(other, "train"), row(f" {text} ", "test/t")])
    assert bool(found.exact) == bool(normalised(text))


# -- size --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hostile", ["word ", "0 1 ", "long", "字"])
def test_a_prompt_of_a_megabyte_takes_seconds_and_finds_what_it_hides(hostile: str) -> None:
    filler = hostile * (1_000_000 // len(hostile))
    rows = [row(filler + " " + PROBLEM, "train", "a"), row(PROBLEM, "test/t", "b"), row(filler, "test/t", "c")]
    start = time.monotonic()
    found = find_leakage(rows)
    assert time.monotonic() - start < 20
    assert ("b", "a") in {(m.prompt_id, m.other_id) for m in found.near}


@pytest.mark.slow
def test_memory_does_not_grow_with_the_training_prompts() -> None:
    rng = random.Random(2)
    vocabulary = [f"{a}{b}" for a in "bcdfghklmnprst" for b in "aeiou"]
    train = [row(" ".join(rng.choices(vocabulary, k=300)), "train", f"{n}") for n in range(1000)]
    held_out = [row(" ".join(rng.choices(vocabulary, k=300)), "test/t", f"t{n}") for n in range(20)]
    tracemalloc.start()
    find_leakage(train + held_out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1000 * 296 * 8  # what the hashes alone of all grams of train would take


# -- in a run ----------------------------------------------------------------------------------------------------------


def test_what_is_told_under_each_setting(tmp_path: Path) -> None:
    match = Match("h", "test/t", "o", "train", 0.75, "Tom has")
    found = Leakage((), (match,))
    loaded = config(write_rows(tmp_path / "pool.jsonl", [question(1)]))
    (text,) = leakage_warnings(loaded, found)
    assert "test/t in train: 1" in text
    assert "the prompt 'h' (Tom has) of test/t is to 75% in train as 'o'" in text
    silent = loaded.model_copy(update={"prompts": loaded.prompts.model_copy(update={"leakage": "allow"})})
    assert leakage_warnings(silent, found) == []
    assert found.as_json() == {"exact": {}, "near": {"test/t in train": 1}}


def planted(folder: Path) -> list[str]:
    """Overrides of a small run whose test set holds a training prompt in capitals and another with a changed end."""
    long = "maximum : " + "1 2 3 4 5 6 7 8 9 0 " * 3 + "="
    train = [{"prompt": "sum mod 7 : 1 2 3 4 =", "answer": "3"}, {"prompt": long, "answer": "9"}]
    test = [{"prompt": "SUM mod 7 :  1 2 3 4 =", "answer": "3"}, {"prompt": long + " answer", "answer": "9"}]
    paths = {name: write_rows(folder / f"{name}.jsonl", rows) for name, rows in (("train", train), ("test", test))}
    return [
        *SMALL,
        SMALL[0].removesuffix("]") + f", {{type: file, path: {paths['train']}}}]",
        f"prompts.test.leaky={{sources: [{{type: file, path: {paths['test']}}}]}}",
    ]


def test_a_run_with_a_planted_leak_stops_and_says_how_to_go_on(tmp_path: Path) -> None:
    overrides = planted(tmp_path)
    for verb in ("check", "collect"):
        done = cropi_error(verb, "quickstart", *overrides, cwd=tmp_path)
        assert "prompts: held-out prompts stand in another role with the same text or id: test/leaky in train: 1" in (
            done.stderr
        )
        assert "SUM mod 7" in done.stderr
        assert "prompts.leakage=warn" in done.stderr


def test_a_leak_let_through_is_told_and_recorded(tmp_path: Path) -> None:
    overrides = [*planted(tmp_path), "prompts.leakage=warn"]
    expected = {"exact": {"test/leaky in train": 1}, "near": {"test/leaky in train": 1}}
    checked = cropi_ok("check", "quickstart", *overrides, cwd=tmp_path)
    assert "leakage            exact 1, near 1" in checked.stdout
    assert checked.stdout.count("warning: held-out prompts stand in another role") == 2
    done = cropi_ok("collect", "quickstart", *overrides, "name=other", cwd=tmp_path)
    assert done.stderr.count("warning: held-out prompts stand in another role") == 2
    manifest = json.loads((tmp_path / "runs/other/prompts/manifest.json").read_text())
    assert manifest["details"]["leakage"] == expected


# -- validation sets that give no direction ----------------------------------------------------------------------------


def rewarded(*groups: tuple[list[float], int]) -> list[Group]:
    """So many groups of these rewards, by their number."""
    return [Group("p", [2], [[3]] * len(r), r, None) for r, count in groups for _ in range(count)]


def test_one_sided_validation_sets_by_hand() -> None:
    solved, failed, mixed = [1.0, 1.0], [0.0, 0.0], [1.0, 0.0]
    assert one_sided(rewarded((solved, 9), (mixed, 1))) is None  # 90 % is not over 90 %
    assert one_sided(rewarded((solved, 63), (mixed, 7))) is None
    text = one_sided(rewarded((solved, 19), (mixed, 1)))
    assert text.startswith("19 of 20 prompts are solved by every completion")
    assert "only 1 " in text
    text = one_sided(rewarded((failed, 37), (solved, 1), (mixed, 2)))
    assert text.startswith("37 of 40 prompts are solved by no completion")
    assert "only 2 " in text
    assert one_sided(rewarded((failed, 10), (solved, 10))) is None
    assert one_sided([]) is None


def test_groups_graded_alike_are_one_side_too() -> None:
    text = one_sided(rewarded(([0.2, 0.2], 19), ([0.2, 0.3], 1)))
    assert text.startswith("19 of 20 prompts are solved by no completion")


def test_a_one_sided_validation_set_is_warned_of_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    def table(mixed: int, solved: int) -> pa.Table:
        rewards = [(1.0, 0.0)] * mixed + [(1.0, 1.0)] * solved
        rows = [
            trajectory(f"p{n}", "validation/x", k, reward=value)
            for n, group in enumerate(rewards)
            for k, value in enumerate(group)
        ]
        return pa.Table.from_pylist(rows, schema=TRAJECTORIES)

    trajectories = {"validation/easy": table(9, 91), "validation/fine": table(10, 90)}
    groups = validation_groups(trajectories)
    assert [len(found) for found in groups.values()] == [9, 10]
    lines = [line for line in capsys.readouterr().err.splitlines() if "solved by" in line]
    assert len(lines) == 1
    assert lines[0].startswith("warning: validation set easy: 91 of 100 prompts are solved by every completion")
