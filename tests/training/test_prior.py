"""A run that begins with an earlier run's influence: whose observations it has, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tests.runs import SMALL, cropi_error, cropi_ok, json_lines

from cropi.stages.online import carried
from cropi.stages.online_loop import load_state

SHORT = [text for text in SMALL if not text.startswith(("select.", "train.", "trainer.per_device", "evaluate."))]
SHORT += ["trainer.per_device_train_batch_size=16", "trainer.gradient_accumulation_steps=2", "train.stages=1"]
OTHER_POOL = "prompts.train=[{type: builtin, families: [count, sum, parity], count: 12, seed: 1, label_noise: 0.25}]"


def settings(name: str, strategy: str, steps: int, *more: str) -> list[str]:
    return [
        "quickstart",
        *SHORT,
        f"name={name}",
        f"select.strategy={strategy}",
        f"train.steps_per_stage={steps}",
        *more,
    ]


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("earlier")
    cropi_ok("run", *settings("first", "cropi", 3), cwd=place)
    return place


def test_observations_go_to_the_places_of_the_new_run_and_count_less() -> None:
    seen = np.array([[0, 0.5, 0.1, 2.0, 3], [2, -1.0, 0.2, 1.0, 4], [1, 9.0, 0.3, 1.0, 5], [3, 7.0, 0.4, 1.0, 6]])
    found = carried(seen, ["a", "b", "c", "d"], ["c", "x", "y", "d", "a"])
    assert found.tolist() == [[4, 0.5, 0.1, 2.0, 3 - 16], [0, -1.0, 0.2, 1.0, 4 - 16], [3, 7.0, 0.4, 1.0, 6 - 16]]


def test_a_run_begins_with_what_an_earlier_one_observed(earlier: Path, tmp_path: Path) -> None:
    shutil.copytree(earlier, tmp_path / "it")
    strategy = "{type: cropi, prior: runs/first}"
    cropi_ok("run", *settings("second", strategy, 1, OTHER_POOL, "seed=1"), cwd=tmp_path / "it")
    first, second = (tmp_path / "it" / "runs" / name for name in ("first", "second"))
    why = [source.split()[0] for source in json_lines(second / "choices.jsonl")[0]["why"]]
    assert {"mean", "draw"} & set(why)  # influence is known before the first step
    states = [load_state(next(folder.glob("checkpoints/checkpoint-?")))["curriculum"] for folder in (first, second)]
    theirs, ours = (state["influence/sum/seen"] for state in states)
    of_pool = [row for row in theirs if row[0] < len(states[0]["last"])]
    kept = [row for row in ours if any((row[1:4] == other[1:4]).all() and row[4] == other[4] - 16 for other in of_pool)]
    assert 0 < len(kept) <= len(of_pool)
    assert {row[4] for row in kept} <= {-16.0, -15.0, -14.0}
    assert len(states[1]["last"]) == 36 < len(states[0]["last"])


def damaged(place: Path, what: str) -> list[str]:
    """Make the earlier run, or the new one, unfit in a way; returns the new one's settings."""
    folder, more = place / "runs" / "first", list[str]()
    match what:
        case "unfinished":
            shutil.rmtree(folder / "checkpoints" / "checkpoint-3")
        case "no run":
            (folder / "config.json").unlink()
        case "another policy":
            more.append("policy.path=runs/first/checkpoints/checkpoint-3")
        case "another unit":
            more.append("trainer.loss_type=grpo")
        case "no such set":
            more.append("prompts.validation={parity: [{type: builtin, families: [parity], count: 6, seed: 2}]}")
        case "no such prompt":
            more.append("prompts.train=[{type: builtin, families: [shell], count: 12, seed: 5}]")
            more.append("prompts.validation={sum: [{type: builtin, families: [sum], count: 6, seed: 9}]}")
    return settings("second", "{type: cropi, prior: runs/first}", 1, *more)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("unfinished", "is not a finished run of cropi"), ("no run", "holds no config of a run"),
        ("another policy", "is a run of another policy"), ("another unit", "another loss_type or scale_rewards"),
        ("no such set", "has observed no prompt of this run for the validation set 'parity'"),
        ("no such prompt", "has observed no prompt of this run for the validation set 'sum'"),
    ],
)  # fmt: skip
def test_a_run_that_is_unfit_is_refused(what: str, message: str, earlier: Path, tmp_path: Path) -> None:
    shutil.copytree(earlier, tmp_path / "it")
    done = cropi_error("run", *damaged(tmp_path / "it", what), cwd=tmp_path / "it")
    assert message in " ".join(done.stderr.split())
    assert json.loads((earlier / "runs" / "first" / "config.json").read_text())["name"] == "first"
