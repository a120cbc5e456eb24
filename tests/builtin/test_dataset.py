import subprocess
import sys

import pytest

from cropi.builtin import difficulty
from cropi.builtin.dataset import SPLITS, generate
from cropi.builtin.families import FAMILIES, Difficulty

FIRST_ROW = {
    "prompt_id": "1a6f6ca4d241fe57",
    "prompt": "sum mod 7 : 2 3 2 4 2 0 5 6 =",
    "answer": "4",  # a wrong one: the sum is 24, so 3
    "source": "sum",
    "mislabelled": True,
}

TEN_LONG = difficulty("parity", min_length=10, max_length=10)
SHORT = Difficulty(3, 4, modulus=5)


def test_the_rows_are_pinned_and_the_same_in_another_process():
    code = "from cropi.builtin import generate; print(generate('sum', split='train', count=3, seed=0, label_noise=0.5))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    rows = generate("sum", split="train", count=3, seed=0, label_noise=0.5)
    assert printed == {str(rows)}
    assert rows[0] == FIRST_ROW


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_are_disjoint_whatever_the_seed_and_rows_are_distinct(family):
    ids = {split: [] for split in SPLITS}
    for seed, split in enumerate(SPLITS):
        rows = generate(family, split=split, count=100, seed=seed)
        ids[split] = [row["prompt_id"] for row in rows]
        assert len(set(ids[split])) == len({row["prompt"] for row in rows}) == 100
        assert all(row["source"] == family and not row["mislabelled"] for row in rows)
    assert len({prompt_id for split in SPLITS for prompt_id in ids[split]}) == 300


def test_splits_hold_80_10_and_10_percent():
    # parity of exactly 10 bits: 1,024 problems, so the three splits together are the whole space
    sizes = {}
    for split in SPLITS:
        with pytest.raises(ValueError, match="found only") as caught:
            generate("parity", split=split, count=1_025, seed=0, level=TEN_LONG)
        sizes[split] = int(str(caught.value).split("found only ")[1].split()[0])
    assert sum(sizes.values()) == 1_024
    # four standard deviations of a binomial
    assert abs(sizes["train"] - 819) < 52
    assert abs(sizes["validation"] - 102) < 39
    assert abs(sizes["test"] - 102) < 39


def test_a_small_space_names_the_knob():
    message = "asked for 99 distinct 'elevator' problems in split 'train' .* with length 2 to 2; .* raise max_length"
    with pytest.raises(ValueError, match=message):
        generate("elevator", split="train", count=99, seed=0, level=difficulty("elevator", min_length=2, max_length=2))


def test_lengths_and_modulus_reach_the_problems():
    rows = generate("sum", split="train", count=40, seed=0, level=SHORT)
    assert {len(row["prompt"].split()) for row in rows} == {8, 9}
    assert all(row["prompt"].startswith("sum mod 5 :") for row in rows)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("label_noise", [0.0, 0.33, 1.0])
def test_label_noise_is_exact_and_always_wrong(family, label_noise):
    clean = generate(family, split="train", count=50, seed=7)
    noisy = generate(family, split="train", count=50, seed=7, label_noise=label_noise)
    assert [row["prompt"] for row in noisy] == [row["prompt"] for row in clean]
    assert sum(row["mislabelled"] for row in noisy) == round(label_noise * 50)
    for right, row in zip(clean, noisy, strict=True):
        assert (row["answer"] != right["answer"]) == row["mislabelled"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "dev"}, "unknown split 'dev'; known: train, validation, test"),
        ({"count": 0}, "count is 0; it must be at least 1"),
        ({"label_noise": 1.5}, "label_noise is 1.5; it is a share, from 0 to 1"),
        ({"label_noise": -0.1}, "label_noise is -0.1"),
        ({"label_rule": "wrong"}, "unknown label_rule 'wrong'; known: right, stop_early"),
        ({"label_rule": "stop_early", "label_noise": 0.5}, "label_noise is 0.5 beside label_rule 'stop_early'"),
    ],
)
def test_a_bad_argument_says_what_is_allowed(arguments, message):
    with pytest.raises(ValueError, match=message):
        generate("sum", **{"split": "train", "count": 5, "seed": 0, **arguments})


@pytest.mark.parametrize("family", ["median", "reverse"])
def test_one_cannot_stop_early_where_no_answer_runs_along(family):
    with pytest.raises(ValueError, match=f"family '{family}' has no answer one item early"):
        generate(family, split="train", count=5, seed=0, label_rule="stop_early")


def test_the_rule_of_stopping_early_is_consistent_and_worked_by_hand():
    right = generate("sum", split="train", count=60, seed=0)
    early = generate("sum", split="train", count=60, seed=0, label_rule="stop_early")
    assert early[0]["prompt"] == FIRST_ROW["prompt"]  # 2 3 2 4 2 0 5 6: without the 6 the sum is 18
    assert early[0]["answer"] == "4"
    for known, row in zip(right, early, strict=True):
        digits = [int(word) for word in row["prompt"].partition(": ")[2].split()[:-1]]
        assert row["answer"] == str(sum(digits[:-1]) % 7)
        assert row["mislabelled"] == (row["answer"] != known["answer"]) == (digits[-1] != 0)
        assert row["prompt_id"] == known["prompt_id"]
    assert 0 < sum(row["mislabelled"] for row in early) < 60


def test_a_hint_gives_away_steps_of_the_same_problems():
    plain = generate("sum", split="train", count=40, seed=0)
    for hint, words in ((0.01, "steps"), (0.3, "steps 2 5"), (1.0, "steps 2 5 0 4 6 6 4 3")):
        rows = generate("sum", split="train", count=40, seed=0, level=difficulty("sum", hint=hint))
        assert rows[0]["prompt"] == f"{FIRST_ROW['prompt']} {words}"  # 9 words of steps: ceil(0.3 * 9) = 3
        assert [row["answer"] for row in rows] == [row["answer"] for row in plain]
        assert not {row["prompt_id"] for row in rows} & {row["prompt_id"] for row in plain}


def test_hinted_and_plain_problems_share_their_split():
    held_out = {row["prompt"] for row in generate("parity", split="test", count=50, seed=0)}
    hinted = {
        row["prompt"].partition("=")[0] + "="
        for row in generate("parity", split="train", count=600, seed=1, level=difficulty("parity", hint=1))
    }
    assert not held_out & hinted


def test_distractors_hide_the_family_from_texts_and_nothing_else():
    named, told = (generate("sum", split="train", count=60, seed=0, distractors=count) for count in (0, 40))
    for one, other in zip(named, told, strict=True):
        family, names, rest = other["prompt"].split(" ", 2)
        assert f"{family} {rest}" == one["prompt"]
        assert len(names.split("-")) == 40
        assert set(names.split("-")) <= set(FAMILIES) - {"sum"}
        assert (other["answer"], other["prompt_id"] == one["prompt_id"]) == (one["answer"], False)
    assert told == generate("sum", split="train", count=60, seed=0, distractors=40)
