"""Workers in a Ray cluster: Ray Data with a pool of actors, each of which is made ready once.

A row of the dataset is a whole unit of work, so what is retried, and what comes back, is always one. An actor whose
process is killed is started again, and the unit that it had in hand is made anew. Free of torch.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cropi.console import say, warn
from cropi.errors import ConfigError, UserError
from cropi.workers import Order, Unit, Worker, Workers, failed, packed, unpacked

LOCAL = "local"
CLIENT = "ray://"
ANSWER_S = 30.0  # that the head of a cluster may take
ATTEMPTS = 4  # at a unit whose worker dies: Ray would go on for ever


@dataclass(frozen=True)
class Needs:
    """What a worker takes of a node."""

    cpus: int
    gpus: float

    def room(self, node: dict[str, float]) -> int:
        """How many workers a node of these resources has room for."""
        by_cpu = int(node.get("CPU", 0) // self.cpus)
        return by_cpu if not self.gpus else min(by_cpu, int(node.get("GPU", 0) / self.gpus))

    def __str__(self) -> str:
        return f"{self.cpus} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")


class Tally:
    """How often each unit has been begun: an actor of its own, which outlives the workers."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, index: int) -> int:
        self._begun[index] += 1
        return self._begun[index]


class Actor(Worker):
    """A worker whose order lies in the cluster's object store."""

    def __init__(self, order: Any, tally: Any) -> None:
        import ray

        super().__init__(ray.get(order))
        self._begin = lambda index: ray.get(tally.begin.remote(index))

    def __call__(self, table: pa.Table) -> pa.Table:
        unit = unpacked(table)
        if self._begin(unit.index) <= ATTEMPTS:
            return super().__call__(table)
        error = UserError(
            f"the worker has died {ATTEMPTS} times over the same piece of work",
            where="--ray",
            fix="look for the reason in Ray's logs (often memory: lower collect.batch_size or score.batch_tokens), and "
            "run the same command again: it goes on where it stopped.",
        )
        return packed(failed(unit, error))


class Cluster(Workers):
    """`address`: as `ray.init` takes it, or `local` for a cluster of this machine that ends with the work.

    `count` workers, as many as there is room for where it is unset. `gpus` of each: unset 1 where the cluster has any
    and `device` is not cpu. `cpus` of each are the threads that it computes with.
    """

    def __init__(self, address: str, count: int | None, gpus: float | None, *, cpus: int, device: str) -> None:
        super().__init__()
        try:
            import ray.data
        except ImportError:
            raise ConfigError("Ray is not installed", where="--ray", fix="pip install 'cropi[ray]'.") from None
        if address.startswith(CLIENT):
            raise ConfigError(
                "Ray Data does not work through Ray Client",
                where=f"--ray {address}",
                fix="call cropi on a node of the cluster, and give --ray auto.",
            )
        self._ray: Any = ray
        self._address, self._count, self._gpus, self._cpus, self._device = address, count, gpus, cpus, device

    def _each(self, order: Order, units: Iterable[Unit]) -> Generator[pa.Table]:
        with self._connected():
            needs = self._needs()
            rows = [self._ray.put(packed(unit)) for unit in units]
            size = min(self._size(needs), len(rows))
            pool = self._ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1)
            made = self._ray.data.from_arrow_refs(rows).map_batches(
                Actor,
                fn_constructor_args=(self._ray.put(order), self._tally()),
                compute=pool,
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=needs.cpus,
                num_gpus=needs.gpus,
            )
            say(f"ray: {size} workers of {needs} each")
            yield from made.iter_batches(batch_size=1, batch_format="pyarrow", prefetch_batches=0)

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """In the cluster; out of it again at the end, unless the caller of this process had joined before."""
        if self._ray.is_initialized():
            yield
            return
        _quiet(self._ray)
        handler = signal.getsignal(signal.SIGTERM)
        own: dict[str, Any] = {"include_dashboard": False} if self._address == LOCAL else {}
        if self._address == LOCAL and self._count is not None:
            own["num_cpus"] = max(self._count * self._cpus, os.cpu_count() or 1)
        try:
            require_answer(self._address)
            self._ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR, **own)
        except (OSError, ValueError, RuntimeError) as error:
            raise ConfigError(
                f"there is no cluster to be had: {str(error).strip().splitlines()[0]}",
                where=f"--ray {self._address}",
                fix="start one with `ray start --head`, check the address, or give --ray local.",
            ) from None
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)  # Ray sets one that ends the process with 1
        try:
            yield
        finally:
            self._ray.shutdown()

    def _tally(self) -> Any:
        """Beside this process, so that it ends with it and no sooner."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self._ray.get_runtime_context().get_node_id(), soft=True)
        return self._ray.remote(num_cpus=0, scheduling_strategy=here)(Tally).remote()

    def _needs(self) -> Needs:
        gpus = self._gpus
        if gpus is None:
            has_any = self._ray.cluster_resources().get("GPU", 0) > 0
            gpus = 1.0 if has_any and self._device != "cpu" else 0.0
        return Needs(self._cpus, gpus)

    def _size(self, needs: Needs) -> int:
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        room = sum(needs.room(node) for node in nodes)
        if not room and self._address == LOCAL:
            raise ConfigError(
                f"this machine has no room for a worker, which takes {needs}",
                where="--ray local",
                fix="lower --gpus-per-worker or policy.cpu_threads.",
            )
        wanted = self._count or max(room, 1)
        if room < wanted:
            warn(f"the cluster has room for {room} of {wanted} workers now, each of {needs}: Ray waits for more")
        return wanted


def require_answer(address: str) -> None:
    """OSError where nobody listens at HOST:PORT: Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()


def _quiet(ray: Any) -> None:
    """No telemetry, and neither bars nor logs beside our own lines. Ray keeps its logs in its own folder."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
