"""The real command, at the smallest size."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.runs import cropi_error, cropi_ok

CONTENDERS = "floor,exact,reference"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    cwd = tmp_path_factory.mktemp("bench")
    size = ["--shape", "tiny", "--prompts", "4", "--validation", "2", "--rounds", "2"]
    done = cropi_ok("bench", "engine", *size, "--contenders", CONTENDERS, "--out", "bench.json", cwd=cwd)
    return json.loads((cwd / "bench.json").read_text()), done.stdout


def test_the_result_holds_everything_about_every_contender(finished: tuple[dict[str, Any], str]) -> None:
    result, text = finished
    assert all(f"| {name}" in text for name in CONTENDERS.split(","))
    assert set(result) == {"kind", "settings", "environment", "policy", "workload", "contenders"}
    assert result["environment"]["torch"]
    assert [row["name"] for row in result["contenders"]] == CONTENDERS.split(",")
    for row in result["contenders"]:
        assert len(row["rounds"]) == 2
        assert row["seconds"]["low"] <= row["seconds"]["median"] <= row["seconds"]["high"]
        assert row["peak_rss_mb"] > 100
        assert row["startup_s"] > 0


def test_the_exact_scores_agree_with_autograd(finished: tuple[dict[str, Any], str]) -> None:
    rows = {row["name"]: row for row in finished[0]["contenders"]}
    assert rows["reference"]["spearman"] == pytest.approx(1)
    assert rows["reference"]["precision_at_10"] == 1
    assert rows["floor"]["ratio_to_floor"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert rows["exact"]["parts"]["train"]["tokens_computed"] == rows["floor"]["tokens_computed"]
    assert rows["reference"]["tokens_computed"] > rows["exact"]["tokens_computed"]  # it pads and shares no prompt
    assert rows["exact"]["tokens_given"] > rows["floor"]["tokens_given"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["engine", "--shape", "11m"], "is not one of 'tiny', '10m'"),
        (["engine", "--workload", "dreams"], "is not one of 'realistic', 'plain', 'builtin'"),
        (["engine", "--contenders", "floor,sketsh"], "did you mean 'sketch'"),
        (["engine", "--dtype", "float16"], "is not one of 'float32', 'bfloat16'"),
        (["engine", "--device", "abacus"], "'abacus' is not one of"),
        (["engine", "--rounds", "0"], "Invalid value for '--rounds'"),
        (["engine", "--validation", "1"], "Invalid value for '--validation'"),
        (["engine", "--workload", "builtin", "--shape", "tiny"], "--shape: the workload builtin has its own policy"),
        (["engine", "--out", "nowhere/bench.json"], "there is no such folder"),
    ],
)  # fmt: skip
def test_an_option_that_cannot_be_used_exits_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in cropi_error("bench", *arguments, cwd=tmp_path).stderr
