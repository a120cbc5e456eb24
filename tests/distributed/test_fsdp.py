"""A run under FSDP2 by two processes: trained, scored, sampled and saved with the weights divided between them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from tests.distributed.launching import LAUNCHER, finished, launch, launch_ok
from tests.runs import SMALL, cropi_ok, evaluations, selections

from cropi.artifacts import EVALUATION, read_table
from cropi.run_tables import scores_schema
from cropi.streams import read_jsonl

pytestmark = pytest.mark.slow

RUN = Path("runs/quickstart")
ARGUMENTS = [*SMALL, "evaluate.samples=2"]

# What `accelerate launch --use_fsdp --fsdp_version 2 --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP` hands on.
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
}


def sharded(*arguments: str, cwd: Path, processes: int = 2, **environment: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("fsdp_on_cpu.py")
    return finished([*LAUNCHER, str(processes), str(script), *arguments], cwd=cwd, **(FSDP | environment))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run under FSDP."""
    cwd = tmp_path_factory.mktemp("fsdp")
    done = sharded("run", "quickstart", *ARGUMENTS, cwd=cwd)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("report: runs/quickstart/report.html") == 1
    return cwd


@pytest.fixture
def copied(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "copy")
    return tmp_path / "copy"


def scores(cwd: Path, stage: int) -> pa.Table:
    return read_table(cwd / RUN / f"scores/stage-{stage:03}/scores.parquet", scores_schema(["sum"]))


def assert_close(one: pa.Table, two: pa.Table) -> None:
    assert two.num_rows == one.num_rows
    for name in one.column_names:
        left, right = one.column(name), two.column(name)
        if not pa.types.is_floating(left.type):
            assert right.to_pylist() == left.to_pylist(), name
            continue
        values = [np.array(c.to_pylist(), dtype=np.float64) for c in (left, right)]
        scale = np.nanmax(np.abs(values[0]), initial=0.0)
        np.testing.assert_allclose(values[1], values[0], rtol=1e-4, atol=1e-5 * scale, err_msg=name)


def test_the_first_stage_is_that_of_one_process(run: Path, tmp_path: Path) -> None:
    """Whose policy is whole: the same trajectories, scores but for rounding, and selection."""
    for command in ("collect", "score", "select"):
        cropi_ok(command, "quickstart", *ARGUMENTS, cwd=tmp_path)
    assert_close(scores(tmp_path, 0), scores(run, 0))
    first = "selections/stage-000/selected.jsonl"
    assert selections(run / RUN)[first] == selections(tmp_path / RUN)[first]
    for path in sorted((tmp_path / RUN / "trajectories").iterdir()):
        assert (run / RUN / "trajectories" / path.name).read_bytes() == path.read_bytes()


def test_later_scores_are_those_of_the_whole_checkpoint(run: Path, copied: Path) -> None:
    for made in ("scores", "selections"):
        shutil.rmtree(copied / RUN / made / "stage-001")
    for command in ("score", "select"):
        cropi_ok(command, "runs/quickstart", "--stage", "1", cwd=copied)
    assert_close(scores(copied, 1), scores(run, 1))
    assert selections(copied / RUN) == selections(run / RUN)


def test_it_learns_and_is_evaluated_as_the_checkpoint_is(run: Path, tmp_path: Path) -> None:
    found = {path: content for path, content in evaluations(run / RUN).items() if "000000" not in path}
    assert [path.rpartition("-")[2] for path in found] == ["000002.parquet", "000004.parquet", "000006.parquet"]
    shutil.copytree(run, tmp_path / "copy")
    last = run / RUN / "checkpoints/checkpoint-6"
    cropi_ok("evaluate", "runs/quickstart", "--checkpoint", str(last), cwd=tmp_path / "copy")
    (again,) = (tmp_path / "copy" / RUN / "other-checkpoints").glob("*/evaluations/step-000000.parquet")
    expected = read_table(again, EVALUATION).drop_columns("step")
    rows = read_table(run / RUN / "evaluations/step-000006.parquet", EVALUATION).drop_columns("step")
    assert rows.to_pylist() == expected.to_pylist()
    base = read_table(run / RUN / "evaluations/step-000000.parquet", EVALUATION)
    assert np.mean(rows.column("greedy")) > np.mean(base.column("greedy"))


def test_it_goes_on_from_a_checkpoint(run: Path, copied: Path) -> None:
    """And comes to the same weights."""
    last = copied / RUN / "checkpoints/checkpoint-6"
    expected = (last / "model.safetensors").read_bytes()
    shutil.rmtree(last)
    done = launch(2, "train", "runs/quickstart", cwd=copied)
    assert done.returncode != 0
    assert "training began with FSDP and would continue with plain data parallelism" in done.stderr
    done = sharded("train", "runs/quickstart", cwd=copied)
    assert done.returncode == 0, done.stderr
    assert (last / "model.safetensors").read_bytes() == expected
    assert rewards(copied) == rewards(run)


def rewards(cwd: Path) -> list[Any]:
    return [{k: row[k] for k in ("step", "prompt_ids", "rewards")} for row in read_jsonl(cwd / RUN / "rewards.jsonl")]


def test_on_cpus_accelerate_shards_nothing(tmp_path: Path) -> None:
    done = launch_ok(2, "run", "quickstart", *ARGUMENTS[:-3], cwd=tmp_path, **FSDP)
    assert done.stderr.count("accelerate shards no weights on CPUs") == 1
