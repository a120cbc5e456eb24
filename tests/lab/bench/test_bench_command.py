"""The real command, at the smallest size."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.runs import cropi_process
from typer.testing import CliRunner

from cropi.cli import app
from cropi.lab.bench.profile import kind_of
from cropi.lab.bench.share import NEEDED, bench_share
from cropi.lab.bench.table import share_text

CONTENDERS = "floor,exact,reference,bergson"
KEYS = {
    "name", "kind", "summary", "status", "error", "warnings", "install", "version", "options", "covers", "startup_s",
    "seconds", "parts", "tokens_given", "tokens_computed", "given_per_s", "computed_per_s", "peak_rss_mb",
    "peak_gpu_mb", "ratio_to_floor", "seconds_to_sketch", "share_of_2f_ceiling", "spearman", "precision_at_10",
    "rounds", "time_shares",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    cwd = tmp_path_factory.mktemp("bench")
    size = ["--shape", "tiny", "--prompts", "4", "--validation", "2", "--rounds", "2"]
    done = cropi_process(
        "bench", "engine", *size, "--contenders", CONTENDERS, "--profile", "--out", "bench.json", cwd=cwd
    )
    assert done.returncode == 0, done.stderr
    return json.loads((cwd / "bench.json").read_text()), done.stdout


def test_the_result_holds_everything_about_every_contender(finished: tuple[dict[str, Any], str]) -> None:
    result, _ = finished
    assert set(result) == {"kind", "settings", "environment", "policy", "workload", "contenders", "grow"}
    assert result["environment"]["cpu"]
    assert result["environment"]["torch"]
    assert result["settings"]["shape"] == "tiny"
    assert [row["name"] for row in result["contenders"]] == CONTENDERS.split(",")
    for row in result["contenders"]:
        assert set(row) == KEYS
        if row["status"] == "ok":
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


def test_a_peer_that_is_not_there_is_shown_with_its_installation(finished: tuple[dict[str, Any], str]) -> None:
    result, text = finished
    row = result["contenders"][-1]
    assert row["status"] == "absent"
    assert "bergson==2.5.1" in row["install"]
    assert row["install"] in text
    assert "| bergson" in text


def test_the_time_of_ours_is_told_apart_by_kind_of_operation(finished: tuple[dict[str, Any], str]) -> None:
    result, text = finished
    rows = {row["name"]: row["time_shares"] for row in result["contenders"]}
    assert rows["reference"] is None
    for name in ("floor", "exact"):
        assert sum(rows[name].values()) == pytest.approx(1)
        assert all(share > 0 for share in rows[name].values())
        assert f"| {name} " in text.split("where the time goes")[1]


@pytest.mark.parametrize(
    ("operation", "kind"),
    [
        ("aten::mm", "matrix products"),
        ("aten::mm_something", "everything else"),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"),
        ("aten::index_add_", "moving numbers"),
        ("aten::mul", "everything else"),
    ],
)
def test_operations_have_kinds(operation: str, kind: str) -> None:
    assert kind_of(operation) == kind


def made_up() -> dict[str, Any]:
    """A measurement with round numbers: 1 token a second everywhere, 10 given for each that a scorer computes."""

    def row(name: str, **parts: float) -> dict[str, Any]:
        timed = {part: {"seconds": seconds, "tokens_computed": 100} for part, seconds in parts.items()}
        answer = {"seconds": 100.0, "tokens_computed": 100, "parts": timed}
        return {"name": name, "status": "ok", "error": None, "rounds": [answer, answer]}

    return {
        "kind": "engine",
        "policy": {"shape": "tiny"},
        "environment": {"gpu": None, "cpu": "abacus"},
        "settings": {"rounds": 2, "dtype": "float32"},
        "workload": {
            "name": "realistic",
            "zero_share": 0.45,
            "mean_prompt_tokens": 100.0,
            "mean_completion_tokens": 100.0,
            "tokens_given_train": 1000,
            "tokens_given_validation": 1000,
        },
        "contenders": [
            row("sketch", train=100.0, validation=100.0),
            row("generate", sampling=100.0),
            row("train", gradients=100.0, step=1.0),
        ],
    }


def test_the_share_by_hand() -> None:
    result = bench_share(made_up(), 0.5)
    seconds = {term["name"]: term["seconds"]["median"] for term in result["terms"]}
    assert seconds["sampling"] == 200 * 128 * 8 * 100
    assert seconds["updates"] == 200 * 128 * 8 * 200
    assert seconds["optimiser steps"] == 200
    assert seconds["scoring, train"] == 55_000 * 8 * 200 / 10
    assert seconds["scoring, validation"] == 2 * 100 * 8 * 200 / 10
    full, half = result["share_of_training"].values()
    training, rest = 200 * 128 * 8 * 300 + 200, seconds["scoring, validation"] + seconds["selection"]
    assert full["median"] == pytest.approx((8_800_000 + rest) / training)
    assert half["median"] == pytest.approx((4_400_000 + rest) / training)
    assert f"{full['median']:.2%}" in share_text(result)


def test_a_share_is_refused_where_something_was_not_measured(tmp_path: Path) -> None:
    measured = made_up()
    measured["contenders"].pop()
    (tmp_path / "bench.json").write_text(json.dumps(measured))
    done = CliRunner().invoke(app, ["bench", "share", "--from", str(tmp_path / "bench.json")])
    assert done.exit_code == 2
    assert f"a share needs measurements of {', '.join(NEEDED)}; there is none of train" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["engine", "--shape", "11m"], "did you mean '10m'"),
        (["engine", "--workload", "dreams"], "choose from: realistic, plain, builtin"),
        (["engine", "--contenders", "floor,sketsh"], "did you mean 'sketch'"),
        (["engine", "--dtype", "float16"], "'float16' is unknown"),
        (["engine", "--device", "abacus"], "'abacus' is unknown"),
        (["engine", "--rounds", "0"], "--rounds: 0 is too few"),
        (["engine", "--validation", "1"], "--validation: 1 is too few"),
        (["engine", "--workload", "builtin", "--shape", "tiny"], "--shape: the workload builtin has a policy"),
        (["engine", "--workload", "builtin", "--grow"], "--grow: needs ten times the prompts"),
        (["engine", "--bergson-python", "nowhere"], "there is no file nowhere"),
        (["engine", "--out", "nowhere/bench.json"], "there is no such folder"),
        (["share", "--budget-fraction", "2"], "--budget-fraction: 2 is no part of 1"),
        (["share", "--from", "nowhere"], "nowhere: cannot be read"),
    ],
)
def test_an_option_that_cannot_be_used_exits_2(arguments: list[str], message: str) -> None:
    done = CliRunner().invoke(app, ["bench", *arguments])
    assert done.exit_code == 2, done.output
    assert message in done.stderr
