"""The real command on a real run, at the smallest size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.runs import SMALL, cropi_error, cropi_ok

FEW = ["--prompts", "12", "--trajectories", "8"]
RUN = [*SMALL, "train.stages=1"]


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    cwd = tmp_path_factory.mktemp("audit")
    cropi_ok("run", "quickstart", *RUN, cwd=cwd)
    done = cropi_ok("audit", "quickstart", *RUN, *FEW, cwd=cwd)
    run = next((cwd / "runs").iterdir())
    return cwd, json.loads((run / "audit.json").read_text()), done.stdout


def test_every_policy_on_disk_is_audited(audited: tuple[Path, dict[str, Any], str]) -> None:
    _, result, text = audited
    assert [stage["stage"] for stage in result["stages"]] == list(range(len(result["stages"])))
    assert len(result["stages"]) >= 2
    for stage in result["stages"]:
        assert stage["prompts"] == 12
        assert stage["trajectories"]["fresh"] == 8
        for found in stage["sets"].values():
            assert set(found["variants"]) == {"token", "prefix"}
            assert found["by_trajectories"][-1]["trajectories"] == 4
            assert 0 <= found["projection"]["top_overlap"] <= 1
    assert "Is the estimate right?" in text


def test_at_the_base_policy_nothing_has_drifted(audited: tuple[Path, dict[str, Any], str]) -> None:
    """Up to rounding: stored log-probs are float32 and come from other batches."""
    first = audited[1]["stages"][0]
    assert first["drift"]["ratio_ess"] == pytest.approx(1.0, abs=1e-6)
    assert first["drift"]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert first["drift"]["clip_share"] == 0.0
    for found in first["sets"].values():
        parts = [found["variants"][name]["overall"]["pearson"] for name in found["variants"]]
        assert parts == pytest.approx([parts[0]] * 2, rel=1e-3)  # all corrections are the same there


def test_later_policies_have_moved(audited: tuple[Path, dict[str, Any], str]) -> None:
    last = audited[1]["stages"][-1]["drift"]
    assert last["ratio_ess"] < 1
    assert last["kl"] > 0


@pytest.mark.slow
def test_audits_are_read_back_and_other_sizes_stand_beside_them(audited: tuple[Path, dict[str, Any], str]) -> None:
    cwd, result, _ = audited
    run = next((cwd / "runs").iterdir())
    kept = next((run / "audit").glob("000-*")) / "audit.json"
    before = kept.stat().st_mtime_ns
    cropi_ok("audit", "quickstart", *RUN, "--prompts", "8", "--trajectories", "4", "--stages", "0", cwd=cwd)
    assert json.loads((run / "audit.json").read_text())["settings"]["prompts"] == 8
    assert len(list((run / "audit").iterdir())) == len(result["stages"]) + 1
    done = cropi_ok("audit", "quickstart", *RUN, *FEW, "--json", cwd=cwd)
    assert kept.stat().st_mtime_ns == before
    assert json.loads(done.stdout) == result


def test_the_audit_has_a_page_of_its_own(audited: tuple[Path, dict[str, Any], str]) -> None:
    run = next((audited[0] / "runs").iterdir())
    assert "Is the estimate right?" in (run / "audit.html").read_text()
    assert "Corrections of the estimate" in (run / "audit.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stages", "0,9"], "no policy of the start of stage 9"),
        (["--stages", "first"], "not a list of stages"),
        (["--prompts", "3"], "8"),
    ],
)
def test_bad_arguments(audited: tuple[Path, dict[str, Any], str], arguments: list[str], message: str) -> None:
    done = cropi_error("audit", "quickstart", *RUN, *arguments, cwd=audited[0])
    assert message in done.stderr
