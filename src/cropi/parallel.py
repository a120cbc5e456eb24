"""Divide work: keep it in this process, share it among ranks of torch.distributed, or send it to Ray workers.

`process_group()` and `ray_pool()` are looked up where work is divided. Both stay empty until the command line calls
`start_ranks` or `use_ray`. In a TRL script the trainer's ranks work together while it trains: `joined_ranks`.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pyarrow as pa

from cropi.errors import ConfigError, UserError

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

RESTARTS = 3  # of a Ray worker that dies, and attempts at the task that it had

_LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "Timed out", "timed out")


def launched() -> bool:
    """Whether `torchrun`, `accelerate launch` or the like has started this process as one of several."""
    return "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first_rank() -> bool:
    """Whether this process writes to the terminal: rank 0, or the only process."""
    return not launched() or os.environ.get("RANK") == "0"


def leave_launcher() -> None:
    """Make this process forget that a launcher has started it, for a command that one process runs."""
    for name in ("LOCAL_RANK", "RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


class ProcessGroup:
    """The process group; this class is the single-process case.

    Every method that exchanges data is collective: all ranks call it, in the same order. A file has one writer: rank 0,
    or the rank that its piece of work belongs to.
    """

    rank = 0
    size = 1

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, work: Sequence[T]) -> Sequence[T]:
        """This rank's share of some work: every `size`-th piece."""
        return work[self.rank :: self.size]

    def titled(self, label: str) -> str:
        """A label for a progress bar, which counts the share of rank 0."""
        return label if self.size == 1 else f"{label} (process 1 of {self.size})"

    def signed(self, text: str) -> str:
        """A message, with the name of the process before it unless that is rank 0."""
        return text if self.is_main else f"[process {self.rank + 1} of {self.size} on {platform.node()}] {text}"

    def barrier(self) -> None:
        """Wait until all ranks are here."""

    def from_main(self, find: Callable[[], T]) -> T:
        """The value that rank 0 finds."""
        return find()

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in order of rank."""
        return [value]

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace tensors by their sums over all ranks, computed in float64."""

    def copy_main(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace tensors by those of rank 0."""

    def fails_first(self) -> bool:
        """Whether no other rank has failed before, so that this one reports the error.

        Before a launcher's ranks have joined, one of each node reports.
        """
        return os.environ.get("LOCAL_RANK", "0") == "0"

    def facts(self) -> dict[str, Any]:
        """The number of processes, for a line of the cost ledger."""
        return {} if self.size == 1 else {"processes": self.size}


class Ranks(ProcessGroup):
    """Ranks of torch.distributed: of a subgroup, or of the default group. `device` is where their tensors have to be.

    torch's own timeout ends a wait for a rank that is gone.
    """

    def __init__(self, subgroup: Any = None, device: Any = None) -> None:
        from torch import distributed

        self._torch, self._subgroup, self._device = distributed, subgroup, device
        self.rank, self.size = distributed.get_rank(subgroup), distributed.get_world_size(subgroup)

    def barrier(self) -> None:
        self.gather(None)

    def from_main(self, find: Callable[[], T]) -> T:
        found: list[Any] = [find() if self.is_main else None]
        self._torch.broadcast_object_list(found, group=self._subgroup, group_src=0)
        return found[0]

    def gather(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.size
        self._torch.all_gather_object(values, value, group=self._subgroup)
        return values

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        for name in sorted(tensors):
            wide = tensors[name].to(self._device or tensors[name].device).double()
            self._torch.all_reduce(wide, group=self._subgroup)
            tensors[name].copy_(wide)

    def copy_main(self, tensors: Mapping[str, Tensor]) -> None:
        for name in sorted(tensors):
            if tensors[name].numel():
                same = tensors[name].to(self._device or tensors[name].device).contiguous()
                self._torch.broadcast(same, group=self._subgroup, group_src=0)
                tensors[name].copy_(same)

    def fails_first(self) -> bool:
        from torch.distributed.distributed_c10d import _get_default_store

        try:
            return bool(_get_default_store().add("cropi/failures", 1) == 1)
        except RuntimeError:  # the node that holds the store is gone
            return os.environ.get("LOCAL_RANK") == "0"


_group = ProcessGroup()


def process_group() -> ProcessGroup:
    """The processes that work on this run."""
    return _group


def start_ranks(*, cpu: bool, timeout_s: float) -> None:
    """Join the processes of the launcher. `cpu`: their tensors are on no GPU. `timeout_s` bounds every wait.

    TRL trains in the same group. Objects travel through gloo on GPUs too, so that a lost rank is an error here and not
    the end of the process.
    """
    global _group
    import torch
    from accelerate import PartialState
    from torch import distributed

    on_gpu = torch.cuda.is_available() and not cpu
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=timeout_s)
    distributed.init_process_group("cuda:nccl,cpu:gloo" if on_gpu else "gloo", timeout=timeout)
    PartialState(cpu=not on_gpu)  # TRL's trainer asks it; it takes the group that exists
    _group = Ranks()


@contextmanager
def joined_ranks() -> Iterator[None]:
    """Work with the ranks that the trainer of a script has joined, until the end of the block."""
    global _group
    from torch import distributed

    before = _group
    if distributed.is_initialized() and distributed.get_world_size() > 1:
        _group = Ranks()
    try:
        yield
    finally:
        _group = before


def end_ranks() -> None:
    """Leave the process group, once all ranks are done."""
    global _group
    if _group.size > 1:
        from torch import distributed

        _group.barrier()
        distributed.destroy_process_group()
        _group = ProcessGroup()


def is_lost_rank(error: Exception) -> bool:
    """Whether an error says that another rank has ended, or did not answer in time."""
    return _group.size > 1 and isinstance(error, RuntimeError) and any(text in str(error) for text in _LOST)


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
                    f"a worker died {RESTARTS + 1} times: {_first_line(error)}",
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
                f"cannot join the cluster: {_first_line(error)}",
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


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


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
