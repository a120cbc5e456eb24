"""Two processes of which one is killed, fails, or is started again by the launcher.

The launcher reports the failure. The same command then comes to the results of an undisturbed run, and makes each
shard once.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tests.distributed.launching import kill_a_rank, launch, launch_ok
from tests.runs import SMALL, evaluations, selections

from cropi.streams import Ledger, read_jsonl

pytestmark = pytest.mark.slow

RUN = Path("runs/quickstart")
ARGUMENTS = [
    "run",
    "quickstart",
    *SMALL,
    "prompts.train=[{type: builtin, families: [sum, parity, count, machine], count: 48, seed: 1, label_noise: 0.25}]",
    "collect.shard_prompts=8",
    "trainer.save_strategy=steps",
    "trainer.save_steps=1",
]
SHARDS = 24 + 1


def files(pattern: str, count: int) -> Callable[[Path], bool]:
    return lambda cwd: len(list(cwd.glob(pattern))) >= count


def lines(path: Path, count: int) -> Callable[[Path], bool]:
    return lambda cwd: len(read_jsonl(cwd / path)) >= count


MOMENTS = {
    "collecting": files(f"{RUN}/trajectories/part-*.parquet", 3),
    "scoring": files(f"{RUN}/scores/stage-000/part-*.parquet", 1),
    "training": lines(RUN / "steps.jsonl", 2),
    "scoring again": files(f"{RUN}/scores/stage-001/part-*.parquet", 1),
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cwd = tmp_path_factory.mktemp("undisturbed")
    launch_ok(2, *ARGUMENTS, cwd=cwd)
    return cwd


def same(ours: Path, theirs: Path, *, made_again: int = 0) -> None:
    """Trajectories, selections, evaluations and what training saw; each shard was paid for once, but for some."""
    for path in sorted((theirs / RUN / "trajectories").iterdir()):
        assert (ours / RUN / "trajectories" / path.name).read_bytes() == path.read_bytes()
    assert selections(ours / RUN) == selections(theirs / RUN)
    assert evaluations(ours / RUN) == evaluations(theirs / RUN)
    assert read_jsonl(ours / RUN / "rewards.jsonl") == read_jsonl(theirs / RUN / "rewards.jsonl")
    entries = Ledger(ours / RUN / "ledger.jsonl").entries()
    assert len([e for e in entries if e["phase"] == "collect" and "tokens" in e]) == SHARDS + made_again
    assert not list((ours / RUN).rglob("*.part"))


@pytest.mark.parametrize(
    ("moment", "rank"), [("collecting", 0), ("collecting", 1), ("scoring", 1), ("training", 0), ("scoring again", 0)]
)
def test_a_killed_process_ends_the_job_and_the_same_command_goes_on(moment, rank, undisturbed, tmp_path):
    code, errors = kill_a_rank(lambda: MOMENTS[moment](tmp_path), *ARGUMENTS, cwd=tmp_path, rank=rank)
    assert code != 0
    assert errors.count("Traceback") == 1, errors  # the launcher's own
    assert not (tmp_path / RUN / "report.html").exists()
    launch_ok(2, *ARGUMENTS, cwd=tmp_path)
    same(tmp_path, undisturbed)


@pytest.mark.parametrize("moment", ["collecting", "training"])
def test_the_launcher_starts_a_killed_job_again_by_itself(moment: str, undisturbed: Path, tmp_path: Path) -> None:
    """Elastic restart: `torchrun --max-restarts 1`."""
    code, errors = kill_a_rank(lambda: MOMENTS[moment](tmp_path), *ARGUMENTS, cwd=tmp_path, restarts=1)
    assert code == 0, errors
    same(tmp_path, undisturbed)


FULL_DISK = """
import os
if os.environ.get("RANK") == "{rank}":
    import errno
    import pyarrow.parquet as pq
    write, written = pq.write_table, 0

    def full(*arguments, **options):
        global written
        written += 1
        if written > {tables}:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments, **options)

    pq.write_table = full
"""


@pytest.mark.parametrize(
    ("rank", "tables", "made_again"), [(0, 3, 1), (1, 3, 1), (1, 12, 0)], ids=["first", "second", "second, scoring"]
)
def test_a_full_disk_of_one_node_is_named_and_nothing_is_lost(rank, tables, made_again, undisturbed, tmp_path):
    """A shard that could be made but not written is made and paid for again."""
    (tmp_path / "injected").mkdir()
    (tmp_path / "injected" / "sitecustomize.py").write_text(FULL_DISK.format(rank=rank, tables=tables))
    cwd = tmp_path / "work"
    cwd.mkdir()
    paths = f"{tmp_path / 'injected'}:{Path(__file__).parents[2] / 'src'}"
    done = launch(2, *ARGUMENTS, cwd=cwd, PYTHONPATH=paths)
    assert done.returncode != 0
    assert done.stderr.count("no space left on the disk") == 1
    assert ("[process 2 of 2 on " in done.stderr) == (rank == 1)
    assert done.stderr.count("Traceback") == 1, done.stderr  # the launcher's own
    launch_ok(2, *ARGUMENTS, cwd=cwd)
    same(cwd, undisturbed, made_again=made_again)


def test_another_number_of_processes_goes_on(undisturbed: Path, tmp_path: Path) -> None:
    """One process ends what two began: shards are the same for any number."""
    moment = MOMENTS["scoring"]
    code, _ = kill_a_rank(lambda: moment(tmp_path), *ARGUMENTS, cwd=tmp_path)
    assert code != 0
    launch_ok(1, *ARGUMENTS, cwd=tmp_path)
    name = "selections/stage-000/selection.parquet"
    assert selections(tmp_path / RUN)[name] == selections(undisturbed / RUN)[name]
    assert [row["step"] for row in read_jsonl(tmp_path / RUN / "rewards.jsonl")] == list(range(6))
