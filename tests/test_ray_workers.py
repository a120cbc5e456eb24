"""Collecting and scoring by Ray workers, with a pool in this process: the bytes of one process, charged and resumed."""

from __future__ import annotations

import pickle
import shutil
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pytest
import torch

from cropi import ray_workers
from cropi.artifacts import write_json
from cropi.config import PolicyConfig
from cropi.config.loading import load_config
from cropi.errors import ConfigError, DataError, PolicyError, UserError
from cropi.policy import PolicyCopy, load_policy, weights_identity
from cropi.ray_workers import Job, Perform, RayPool, Task, Worker, packed, unpacked, use_ray
from cropi.stages.collect import collect
from cropi.stages.run import Run
from cropi.stages.score import score
from cropi.stages.select import select
from cropi.streams import Ledger
from tests.runs import SMALL, cropi_error

BUILTIN = PolicyConfig(path="builtin", cpu_threads=1)
RUN = [*SMALL, "collect.shard_prompts=8"]

# 68 of 72 training prompts have a signal: two parts.
POOL = [
    *RUN[1:],
    "prompts.train=[{type: builtin, families: [sum, parity, count, machine], count: 18, seed: 1, label_noise: 0.25}]",
]
WAYS: dict[str, list[str]] = {
    "influence": [],
    "exact": ["score.estimator=exact"],
    "with errors": ["score.standard_errors=true"],
    "learnalign": ["select.strategy={type: learnalign}"],
    "adapters": ["policy.lora={r: 2, alpha: 4}"],
}
SLOW = {"with errors", "learnalign", "adapters"}


class LocalPool(RayPool):
    """Works in this process, on the last task first, and ends after `stop` of them, as a driver that is killed does."""

    def __init__(self, stop: int | None = None) -> None:
        super().__init__("local", None, cpus=1, on_gpu=False)
        self.stop, self.made = stop, list[int]()

    def _map_batches(self, job: Job, tables: Iterable[pa.Table]) -> Generator[pa.Table]:
        worker = Worker(lambda: pickle.loads(pickle.dumps(job)))
        for table in reversed(list(tables)):
            if len(self.made) == self.stop:
                raise KeyboardInterrupt
            yield worker(table)
            self.made.append(unpacked(table).index)


@dataclass(frozen=True)
class Doubling:
    """A job that needs nothing."""

    broken: bool = False
    seconds: float = 0.0

    def start(self) -> Perform:
        if self.broken:
            raise DataError("it is gone", where="data.path", fix="look for it.")

        def perform(task: Task) -> Task:
            time.sleep(self.seconds)
            values = [2 * value for value in task.rows.column("value").to_pylist()]
            return Task(task.index, pa.table({"value": values}), {"tokens": len(values)})

        return perform


def tasks(count: int) -> Iterator[Task]:
    return (Task(index, pa.table({"value": list(range(index))}), {"of": count}) for index in range(count))


def test_a_task_travels_as_one_row() -> None:
    nested = pa.table({"ids": [[1, 2], None, []]}, schema=pa.schema([("ids", pa.list_(pa.int32()))]))
    row = packed(Task(7, nested, {"name": "part", "share": 0.5}))
    back = unpacked(row)
    assert row.num_rows == 1
    assert back.rows.equals(nested)
    assert (back.index, back.facts) == (7, {"name": "part", "share": 0.5})


def test_a_user_error_comes_back_with_the_name_of_its_node() -> None:
    with pytest.raises(UserError, match=r"^data.path: it is gone \(on .+\)\nFix: look for it.$"):
        list(LocalPool().map(Doubling(broken=True), tasks(3)))


def test_seconds_of_workers_are_charged_in_place_of_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool, ledger = LocalPool(), Ledger(tmp_path / "ledger.jsonl")
    monkeypatch.setattr(ray_workers, "_pool", pool)
    with ledger.charge("score"):
        found = {
            task.index: task.rows.column("value").to_pylist() for task in pool.map(Doubling(seconds=0.05), tasks(4))
        }
        pool.extra_s += 100  # of other workers at the same time
        time.sleep(0.02)
    assert found == {index: [2 * value for value in range(index)] for index in range(4)}
    (entry,) = ledger.entries()
    assert 100.2 < entry["seconds"] < 101


def test_a_policy_is_loaded_by_name_or_with_its_trained_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_policy(BUILTIN).model
    named = PolicyCopy.of(BUILTIN, model, trained=False)
    assert weights_identity(named.load().model) == weights_identity(model)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    trained = PolicyCopy.of(BUILTIN, model, trained=True)
    assert weights_identity(trained.load().model) == weights_identity(model) != named.identity
    with pytest.raises(PolicyError, match="a worker has loaded other weights"):
        PolicyCopy.of(BUILTIN, model, trained=False).load()
    with pytest.raises(ConfigError, match="install the same version on all nodes"):
        PolicyCopy(BUILTIN, "", {}, "/", version="0.0.0").load()


def opened(folder: Path, *overrides: str) -> Run:
    torch.set_num_threads(1)
    return Run(load_config("quickstart", [*overrides, f"run_dir={folder}"]))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def costs(run: Run) -> list[Any]:
    names = ("phase", "passes", "tokens", "prompt_tokens")
    return sorted([entry[name] for name in names] for entry in run.ledger.entries())


def test_shards_of_workers_are_those_of_one_process_and_outlive_an_interruption(tmp_path, monkeypatch):
    alone = opened(tmp_path / "alone", *RUN)
    collect(alone)
    run = opened(tmp_path / "run", *RUN)
    monkeypatch.setattr(ray_workers, "_pool", LocalPool(stop=3))
    with pytest.raises(KeyboardInterrupt):
        collect(run)
    run.folder.unlock()
    parts = {path: path.stat().st_mtime_ns for path in run.folder.trajectories.glob("part-*")}
    assert len(parts) == 3
    pool = LocalPool()
    monkeypatch.setattr(ray_workers, "_pool", pool)
    again = opened(tmp_path / "run", *RUN)
    collect(again)
    assert len(pool.made) == 4
    assert all(path.stat().st_mtime_ns == before for path, before in parts.items())
    assert files(again.folder.trajectories) == files(alone.folder.trajectories)
    assert costs(again) == costs(alone)


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collected")
    run = opened(folder, *POOL)
    collect(run)
    run.folder.unlock()
    return folder / "quickstart"


def scored(collected: Path, folder: Path, overrides: list[str]) -> dict[str, bytes]:
    """Scores and selection, by trajectories that all share but for those of another policy."""
    config = load_config("quickstart", [*POOL, *overrides, f"run_dir={folder}"])
    if config.policy == load_config("quickstart", POOL).policy and not config.folder.exists():
        shutil.copytree(collected, config.folder)
        write_json(config.folder / "config.json", config.resolved())
    run = opened(folder, *POOL, *overrides)
    collect(run)
    score(run, 0, run.base.model, "base")
    select(run, 0)
    run.folder.unlock()
    return files(run.paths.scores(0)) | files(run.paths.selection(0))


@pytest.mark.parametrize("way", [pytest.param(w, marks=pytest.mark.slow) if w in SLOW else w for w in WAYS])
def test_scores_of_workers_are_those_of_one_process(way, collected, tmp_path, monkeypatch):
    """By a killed command as well, which keeps the part that was done."""
    alone = scored(collected, tmp_path / "alone", WAYS[way])
    monkeypatch.setattr(ray_workers, "_pool", LocalPool(stop=1))
    if way != "adapters":
        with pytest.raises(KeyboardInterrupt):
            scored(collected, tmp_path / "workers", WAYS[way])
    pool = LocalPool()
    monkeypatch.setattr(ray_workers, "_pool", pool)
    assert scored(collected, tmp_path / "workers", WAYS[way]) == alone
    assert pool.made[-1:] == [0]


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("collect.vllm={}", "vllm serve"),
        ("verifier={type: function, path: nowhere.at_all}", r"verifier: the verifier cannot be set up: .* \(on .+\)"),
    ],
)
def test_settings_that_workers_cannot_follow_are_refused(setting, said, tmp_path, monkeypatch):
    installed = ModuleType("vllm")
    installed.__spec__ = ModuleSpec("vllm", None)
    monkeypatch.setitem(sys.modules, "vllm", installed)
    monkeypatch.setattr(ray_workers, "_pool", LocalPool())
    with pytest.raises(UserError, match=said):
        collect(opened(tmp_path, *RUN, setting))


def test_without_ray_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    done = cropi_error("collect", "quickstart", "--ray", "local", cwd=tmp_path)
    assert done.stderr == "error: --ray: Ray is not installed\nFix: pip install 'cropi[ray]'.\n"
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("address", "workers", "rank", "said"),
    [
        (None, 2, None, "no workers without a Ray cluster"),
        ("auto", None, "0", "the ranks of a launcher divide the work"),
        ("ray://head:10001", None, None, "Ray Client"),
    ],
)
def test_options_that_do_not_go_together_are_refused(address, workers, rank, said, monkeypatch):
    if rank is not None:
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said):
        use_ray(address, workers, cpus=1, on_gpu=False)
