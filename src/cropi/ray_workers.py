"""Send work to Ray workers. `ray_pool()` is looked up where work is divided, and empty until `use_ray`."""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import pyarrow as pa

from cropi.errors import ConfigError, UserError, first_line
from cropi.parallel import launched

RESTARTS = 3  # of a Ray worker that dies, and attempts at the task that it had


@dataclass(frozen=True)
class Task:
    """A piece of work for a Ray worker, or its result: a table and JSON values."""

    index: int
    rows: pa.Table
    facts: Mapping[str, Any]


Perform = Callable[[Task], Task]


class Job(Protocol):
    """Everything a Ray worker needs to perform tasks. Ray sends it to each worker."""

    def start(self) -> Perform:
        """Load the policy and the like, once in every worker."""


def packed(task: Task) -> pa.Table:
    """A task as a table of one row, which Ray never divides."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, task.rows.schema) as stream:
        stream.write_table(task.rows)
    rows = pa.array([sink.getvalue().to_pybytes()], pa.large_binary())
    return pa.table({"index": [task.index], "facts": [json.dumps(dict(task.facts))], "rows": rows})


def unpacked(table: pa.Table) -> Task:
    """The task in such a table."""
    (row,) = table.to_pylist()
    with pa.ipc.open_stream(row["rows"]) as stream:
        return Task(row["index"], stream.read_all(), json.loads(row["facts"]))


class Worker:
    """The callable class that `map_batches` runs in its actors.

    `fetch` gets the job, which may be large, from Ray's object store. A UserError comes back as the fact `error`; any
    other exception ends the work with its traceback.
    """

    def __init__(self, fetch: Callable[[], Job]) -> None:
        self._fetch = fetch
        self._perform: Perform | None = None

    def __call__(self, table: pa.Table) -> pa.Table:
        task = unpacked(table)
        try:
            self._perform = self._perform or self._fetch().start()
            start = time.perf_counter()
            done = self._perform(task)
        except UserError as error:
            message = [f"{error.what} (on {platform.node()})", error.where, error.fix]
            return packed(Task(task.index, pa.table({}), {"error": message}))
        return packed(Task(done.index, done.rows, {**done.facts, "seconds": time.perf_counter() - start}))


class RayPool:
    """Ray Data's pool of actors.

    `address` is what `ray.init` takes, or `local` for a cluster on this machine that ends with the work. `workers` is
    the number of actors; unset, Ray Data adds actors while the cluster has room. Each takes `cpus` CPUs, and a GPU if
    the cluster has any and the policy is `on_gpu`.
    """

    def __init__(self, address: str, workers: int | None, *, cpus: int, on_gpu: bool) -> None:
        self._address, self._workers, self._cpus, self._on_gpu = address, workers, cpus, on_gpu
        self.extra_s = 0.0  # seconds of work by the workers, minus the seconds that this process waited

    def map(self, job: Job, tasks: Iterable[Task]) -> Generator[Task]:
        """Perform tasks; results come as they are done, each with the fact `seconds`. Close what is not exhausted.

        UserError where a worker raised one, or where Ray gives up.
        """
        with closing(self._map_batches(job, map(packed, tasks))) as tables:
            while (table := self._wait(tables)) is not None:
                task = unpacked(table)
                if "error" in task.facts:
                    what, where, fix = task.facts["error"]
                    raise UserError(what, where=where, fix=fix)
                self.extra_s += task.facts["seconds"]
                yield task

    def _wait(self, tables: Iterator[pa.Table]) -> pa.Table | None:
        start = time.perf_counter()
        try:
            return next(tables, None)
        finally:
            self.extra_s -= time.perf_counter() - start

    def _map_batches(self, job: Job, tables: Iterable[pa.Table]) -> Generator[pa.Table]:
        ray = _import_ray()
        with self._connected(ray):
            rows = [ray.put(table) for table in tables]
            size = {"size": min(self._workers, len(rows))} if self._workers else {"min_size": 1, "max_size": len(rows)}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # Ray 2.60 has no new names for the last two
                dataset = ray.data.from_arrow_refs(rows).map_batches(
                    Worker,
                    fn_constructor_args=(partial(ray.get, ray.put(job)),),
                    compute=ray.data.ActorPoolStrategy(**size, max_tasks_in_flight_per_actor=1),
                    batch_size=1,
                    batch_format="pyarrow",
                    num_cpus=self._cpus,
                    num_gpus=int(self._on_gpu and ray.cluster_resources().get("GPU", 0) > 0),
                    max_restarts=RESTARTS,
                    max_task_retries=RESTARTS,
                )
            try:
                yield from dataset.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)
            except ray.exceptions.RayActorError as error:
                raise UserError(
                    f"a worker died {RESTARTS + 1} times: {first_line(error)}",
                    where="--ray",
                    fix="look for the reason in Ray's logs (often memory: lower collect.batch_size or "
                    "score.batch_tokens), and run the same command again: it goes on where it stopped.",
                ) from None

    @contextmanager
    def _connected(self, ray: Any) -> Iterator[None]:
        """Join the cluster, and leave it at the end, unless this process had joined before."""
        if ray.is_initialized():
            yield
            return
        # no telemetry, and neither bars nor logs beside our own lines: Ray keeps its logs in a folder of its own
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        handler = signal.getsignal(signal.SIGTERM)
        own: dict[str, Any] = {"include_dashboard": False} if self._address == "local" else {}
        if self._address == "local" and self._workers:
            own["num_cpus"] = self._workers * self._cpus
        try:
            ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"cannot join the cluster: {first_line(error)}",
                where=f"--ray {self._address}",
                fix="start one with `ray start --head`, check the address, or give --ray local.",
            ) from None
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray's own handler ends the process with 1
        try:
            yield
        finally:
            ray.shutdown()


def _import_ray() -> Any:
    try:
        import ray.data
    except ImportError:
        raise ConfigError("Ray is not installed", where="--ray", fix="pip install 'cropi[ray]'.") from None
    return ray


_pool: RayPool | None = None


def ray_pool() -> RayPool | None:
    """The Ray workers that collect and score in place of this process; None without `--ray`."""
    return _pool


def use_ray(address: str | None, workers: int | None, *, cpus: int, on_gpu: bool) -> None:
    """Let Ray workers collect and score, if there is an address. ConfigError where that is impossible."""
    global _pool
    if address is None:
        if workers is not None:
            raise ConfigError("there are no workers without a Ray cluster", where="--workers", fix="give --ray too.")
        _pool = None
        return
    if launched():
        raise ConfigError(
            "the ranks of a launcher divide the work already", where="--ray", fix="run cropi without a launcher."
        )
    if address.startswith("ray://"):
        raise ConfigError(
            "Ray Data does not work through Ray Client",
            where=f"--ray {address}",
            fix="run cropi on a node of the cluster, and give --ray auto.",
        )
    _import_ray()
    _pool = RayPool(address, workers, cpus=cpus, on_gpu=on_gpu)


def extra_seconds() -> float:
    """The seconds that Ray workers worked, minus those that this process waited for them."""
    return 0.0 if _pool is None else _pool.extra_s
