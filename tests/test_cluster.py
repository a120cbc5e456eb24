"""What of `--ray` needs no Ray: what it refuses, and where there is room."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cropi.cli.shell import ray_workers
from cropi.cluster import Needs, Tally, require_answer
from cropi.errors import ConfigError
from tests.runs import cropi


@pytest.mark.parametrize(
    ("needs", "node", "room"),
    [
        (Needs(1, 0), {"CPU": 4.0}, 4),
        (Needs(3, 0), {"CPU": 8.0, "GPU": 8.0}, 2),
        (Needs(1, 1), {"CPU": 16.0, "GPU": 2.0}, 2),
        (Needs(1, 0.5), {"CPU": 16.0, "GPU": 2.0}, 4),
        (Needs(8, 1), {"CPU": 16.0, "GPU": 8.0}, 2),
        (Needs(1, 1), {"CPU": 16.0}, 0),
        (Needs(1, 0), {}, 0),
    ],
)
def test_a_node_has_room_for_what_its_scarcest_resource_allows(needs: Needs, node: dict[str, float], room: int) -> None:
    assert needs.room(node) == room


def test_what_a_worker_needs_is_said_in_words() -> None:
    assert (str(Needs(2, 0)), str(Needs(1, 0.5))) == ("2 CPU", "1 CPU and 0.5 GPU")


def test_units_are_counted_each_by_itself() -> None:
    tally = Tally()
    assert [tally.begin(index) for index in (3, 4, 3, 3)] == [1, 1, 2, 3]


def test_nobody_at_an_address_is_found_at_once() -> None:
    require_answer("auto")
    with pytest.raises(OSError, match="refused"):
        require_answer("127.0.0.1:1")


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = cropi("collect", "quickstart", "--ray", "local", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: --ray: Ray is not installed\nFix: pip install 'cropi[ray]'.\n"
    assert not (tmp_path / "runs").exists()


def test_workers_need_a_cluster(tmp_path: Path) -> None:
    done = cropi("score", "quickstart", "--workers", "2", cwd=tmp_path)
    assert done.returncode == 2
    assert "error: --workers: there are no workers without a Ray cluster" in done.stderr


def test_a_launcher_and_a_cluster_do_not_mix(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="a launcher has divided the work already"):
        ray_workers("auto", None, None)
    assert ray_workers(None, None, None) is None
