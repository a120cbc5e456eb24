"""A server that is killed in mid-collection and started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.runs import SMALL

from cropi.config.loading import load_config
from cropi.stages.collect import collect
from cropi.stages.run import Run

EXPECTED = 48 * 8 + 6 * 8  # trajectories of the run


def collected_through(
    command: Callable[[int], list[str]], environment: Mapping[str, str], settings: Mapping[str, Any], folder: Path
) -> list[dict[str, Any]]:
    """All trajectories of a run whose server `command(port)` is killed once a shard is there, and then started again.

    Nothing may be lost or come twice.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = folder / "server.log"

    def start() -> subprocess.Popen[bytes]:
        with log.open("ab") as file:
            own = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | dict(environment)
            return subprocess.Popen(command(port), stdout=file, stderr=file, env=own, start_new_session=True)

    server, restarted = start(), threading.Event()

    def interrupt() -> None:
        nonlocal server
        while not list((folder / "quickstart" / "trajectories").glob("part-*.parquet")):
            time.sleep(0.05)
        _kill(server)
        time.sleep(2)
        server = start()
        restarted.set()

    try:
        _wait_for(port, log)
        server_of = {"url": f"http://localhost:{port}/v1"} | dict(settings)
        more = [
            f"run_dir={folder}",
            "collect.shard_prompts=8",
            "collect.batch_size=4",
            "collect.max_completion_length=16",
        ]
        pipeline = Run(load_config("quickstart", [*SMALL, *more, f"collect.server={json.dumps(server_of)}"]))
        threading.Thread(target=interrupt, daemon=True).start()
        manifest = collect(pipeline)
        assert restarted.is_set(), "the server was to be killed before collection had ended"
        rows = [row for table in pipeline.trajectories.tables.values() for row in table.to_pylist()]
        pipeline.folder.unlock()
        count = Counter((row["set"], row["prompt_id"], row["sample"]) for row in rows)
        assert len(rows) == len(count) == EXPECTED
        assert sum(manifest.counts.values()) == EXPECTED
        assert len({row["completion"] for row in rows if row["set"] == "train"}) > 100
        return rows
    finally:
        _kill(server)


def _kill(server: subprocess.Popen[bytes]) -> None:
    """With the processes that it has started: it leads a group of its own."""
    with suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _wait_for(port: int, log: Path) -> None:
    for _ in range(240):
        try:
            urllib.request.urlopen(f"http://localhost:{port}/health", timeout=1).close()
            return
        except OSError:
            time.sleep(0.5)
    pytest.fail(f"the server did not start: {log.read_text()[-2000:]}")
