"""Collection by two processes of the real launcher."""

from pathlib import Path

import pytest
from tests.distributed.launching import launch
from tests.runs import SMALL, cropi

from cropi.ledger import Ledger


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_two_processes_collect_what_one_collects(tmp_path: Path) -> None:
    """Every byte, and each shard by one process."""
    one = cropi("collect", "quickstart", *SMALL, "name=one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    two = launch(2, "collect", "quickstart", *SMALL, "name=two", cwd=tmp_path)
    assert two.returncode == 0, two.stderr
    assert two.stdout.splitlines() == ["runs/two/trajectories"]
    assert two.stderr.count("trajectories: ok") == 1
    runs = tmp_path / "runs"
    assert files(runs / "two" / "trajectories") == files(runs / "one" / "trajectories")
    entries = [Ledger(runs / name / "ledger.jsonl").entries() for name in ("one", "two")]
    assert len(entries[0]) == len(entries[1]) == 4
    assert sum(entry["tokens"] for entry in entries[0]) == sum(entry["tokens"] for entry in entries[1])
    assert (runs / "two" / "ledger-001.jsonl").is_file()


@pytest.mark.slow
def test_what_a_user_can_fix_is_said_once_and_ends_all(tmp_path: Path) -> None:
    done = launch(2, "collect", "quickstart", *SMALL, "collect.max_completion_length=100000", cwd=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("error: collect.max_completion_length: no prompt of train fits") == 1
    assert done.stderr.count("Traceback") == 1  # the launcher's own
