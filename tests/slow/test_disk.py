"""A disk that fills up while a run writes: a clear error, exit 2, and a run that goes on once there is space."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.runs import SMALL, cropi_process

pytestmark = pytest.mark.slow


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 6 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(place)]
    mounted = subprocess.run(mount, capture_output=True, check=False)
    if mounted.returncode:
        pytest.skip("mounting a file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.parametrize("filled_mb", [6, 4, 1], ids=["at once", "at the first checkpoint", "in its optimizer.pt"])
def test_a_full_disk_is_named_and_nothing_is_lost(small_disk: Path, filled_mb: int) -> None:
    ballast = small_disk / "ballast"
    ballast.write_bytes(b"\0" * (filled_mb * 1_000_000))
    done = cropi_process("run", "quickstart", *SMALL, cwd=small_disk)
    assert done.returncode == 2, done.stderr
    assert "no space left" in done.stderr
    assert "Traceback" not in done.stderr
    ballast.unlink()
    subprocess.run(["mount", "-o", "remount,size=200m", str(small_disk)], check=True)
    again = cropi_process("run", "quickstart", *SMALL, cwd=small_disk)
    assert again.returncode == 0, again.stderr
