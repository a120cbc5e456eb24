"""Choosers inside prime-rl, Trinity-RFT and AsyncGRPO, held to the signatures of their sources."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import pickle
import queue
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from trl.experimental.async_grpo.async_grpo_trainer import RolloutWorkerProtocol
from trl.experimental.async_grpo.async_rollout_worker import RolloutSample, _AsyncRolloutLoop

from cropi.curriculum.strategies.lze import LzeStrategy
from cropi.curriculum.strategies.mopps import MoppsStrategy
from cropi.errors import ConfigError
from cropi.exchange.live import PrimeGate, PrimeSampler, PromptStream, StreamReward, TrinitySelector

MAKE = MoppsStrategy(type="mopps", candidates=4).chooser
RATES = np.linspace(0, 1, 40)  # of the prompts
# prime-rl, orchestrator/curriculum/{samplers,gates}/base.py and orchestrator/types.py (EpisodeRun) at 2cfe40f;
# Trinity-RFT, buffer/selector/selector.py at 3e9eb60
GATE = {"admit": ["group"], "state_dict": [], "load_state_dict": ["state_dict"], "metrics": []}
PRIME = {"__next__": [], "observe": ["group"], "state_dict": [], "load_state_dict": ["state_dict"], "metrics": []}
TRINITY = {
    "__init__": ["data_source", "config"],
    "get_indices": ["batch_size", "return_extra_info"],
    "update": ["indices", "values"],
    "state_dict": [],
    "load_state_dict": ["state_dict"],
}


class Mopps(TrinitySelector):
    make = MAKE


def tasks() -> list[Any]:
    return [SimpleNamespace(key=f"task {n}") for n in range(len(RATES))]


def finished(task: Any, rewards: list[float], **flaws: Any) -> list[Any]:
    plain = {"has_error": False, "agent": SimpleNamespace(trainable=True)} | flaws
    context = SimpleNamespace(task=task)
    return [SimpleNamespace(context=context, traces=[SimpleNamespace(reward=r, **plain)]) for r in rewards]


@pytest.mark.parametrize(("ours", "theirs"), [(PrimeSampler, PRIME), (PrimeGate, GATE), (TrinitySelector, TRINITY)])
def test_it_has_the_methods_of_the_trainer_s_own_class(ours: type, theirs: dict[str, list[str]]) -> None:
    for name, parameters in theirs.items():
        assert list(inspect.signature(getattr(ours, name)).parameters)[1:] == parameters


def test_both_choose_what_is_neither_too_easy_nor_too_hard() -> None:
    generator = np.random.default_rng(0)
    sampler = PrimeSampler(tasks(), MAKE, batch=4, generations=8)
    selector = Mopps(SimpleNamespace(dataset=RATES), SimpleNamespace(batch_size=4))
    seen: list[list[float]] = [[], []]
    for _ in range(60):
        for task in [next(sampler) for _ in range(4)]:
            rate = RATES[int(task.key.split()[1])]
            seen[0].append(rate)
            sampler.observe(finished(task, (generator.random(8) < rate).astype(float).tolist()))
        places = selector.get_indices(4)
        seen[1] += RATES[places].tolist()
        selector.update(places, RATES[places].tolist())
    for rates in seen:
        assert np.abs(np.array(rates[-100:]) - 0.5).mean() < 0.8 * np.abs(RATES - 0.5).mean()


def test_a_state_that_went_through_json_goes_on_alike() -> None:
    def told(sampler: PrimeSampler, count: int) -> list[str]:
        found = []
        for _ in range(count):
            task = next(sampler)
            found.append(task.key)
            sampler.observe(finished(task, [1.0, 0.0, 0.0, 1.0]))
        return found

    first, again = (PrimeSampler(tasks(), MAKE, batch=4) for _ in range(2))
    told(first, 10)
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert told(again, 12) == told(first, 12)
    assert again.metrics() == first.metrics()


def test_failed_and_untrainable_traces_tell_nothing() -> None:
    sampler = PrimeSampler(tasks(), MAKE, batch=4)
    before = sampler.state_dict()
    task = next(sampler)
    for flaw in ({"has_error": True}, {"agent": SimpleNamespace(trainable=False)}):
        sampler.observe(finished(task, [1.0], **flaw))
    assert sampler.state_dict()["told"] == before["told"] == 0


def test_several_groups_of_one_prompt_may_be_asked_for_before_any_is_told() -> None:
    selector = Mopps(SimpleNamespace(dataset=RATES[:3]), SimpleNamespace(batch_size=3))
    places, extra = selector.get_indices(6, return_extra_info=True)
    assert extra["indices"] == places
    assert sorted(places) == [0, 0, 1, 1, 2, 2]
    selector.update(places, [0.5] * 6)
    assert selector.state_dict()["told"] == 6


def test_a_gate_admits_about_its_share_of_mixed_groups_and_no_equal_ones() -> None:
    generator = np.random.default_rng(0)
    sampler = PrimeSampler(tasks(), LzeStrategy(type="lze", share=0.5).chooser, batch=8)
    gate, admitted = PrimeGate(sampler), list[bool]()
    for number in range(120):
        rewards = [float(number % 2)] * 8 if number % 3 == 0 else generator.permutation([1.0] * 4 + [0.0] * 4).tolist()
        group = finished(next(sampler), rewards)
        sampler.observe(group)
        if len(set(rewards)) > 1:
            admitted.append(gate.admit(group))
        else:
            assert not gate.admit(group)
    assert 0.3 < np.mean(admitted) < 0.9  # half of eight groups, of which five or six are mixed
    assert not gate.admit(finished(next(sampler), [1.0], has_error=True))
    with pytest.raises(ConfigError, match="same key"):
        PrimeSampler([*tasks(), *tasks()], MAKE)
    with pytest.raises(ConfigError, match="trains on all groups"):
        PrimeGate(PrimeSampler(tasks(), MAKE))


def test_what_a_gate_goes_by_is_in_the_sampler_s_state() -> None:
    first, again = (PrimeSampler(tasks(), LzeStrategy(type="lze").chooser, batch=4) for _ in range(2))
    for _ in range(5):
        first.observe(finished(next(first), [1.0, 0.0]))
    again.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [again.keeps_newest()] * 3 == [first.keeps_newest() for _ in range(3)]


def graded(completions: list[str], rate: list[float], **_: Any) -> list[float | None]:
    return [None if text == "?" else float(text) for text in completions]


async def bonus(completions: list[str], **_: Any) -> list[float | None]:
    return [None] * len(completions)


class Worker:
    """A `RolloutWorkerProtocol`: no server, and a rate of right answers that each prompt has."""

    def __init__(self, dataset: Any, reward: Any, generations: int) -> None:
        self.rollout_buffer, self.metrics_queue = queue.Queue[Any](), queue.Queue[Any]()
        loop = {"dataset": dataset, "reward_funcs": [reward], "num_generations": generations}
        loop = pickle.loads(pickle.dumps(loop))  # as for a process of its own
        self.loop, self.version = SimpleNamespace(**loop, _dataset_iter=iter(loop["dataset"])), 0
        self.generator = np.random.default_rng(0)

    def start(self) -> None:
        rows = _AsyncRolloutLoop._repeat_iterator(self.loop)
        for number, group in itertools.groupby(itertools.islice(rows, 120 * self.loop.num_generations), lambda g: g[0]):
            own = [row for _, row in group]
            right = self.generator.random(len(own)) < own[0]["rate"]
            columns = {name: [row[name] for row in own] for name in own[0] if name != "prompt"}
            given = {"prompts": [row["prompt"] for row in own], "completions": [str(int(r)) for r in right]}
            rewards = asyncio.run(self.loop.reward_funcs[0](**given, completion_ids=[[1]] * len(own), **columns))
            for row, reward in zip(own, rewards, strict=True):
                ids = np.array([1])
                sample = RolloutSample(row["prompt"], [], ids, ids, ids, reward, self.version, number, {})
                self.rollout_buffer.put(sample)

    def stop(self) -> None:
        pass

    def update_model_version(self, model_version: int) -> None:
        self.version = model_version

    def check_health(self, stale_after_s: float) -> None:
        pass


def test_a_stream_learns_from_what_a_rollout_worker_of_trl_s_has_judged() -> None:
    rows = [{"prompt": [{"role": "user", "content": str(n)}], "rate": rate} for n, rate in enumerate(RATES)]
    stream = PromptStream(rows, MAKE, batch=4, generations=8)
    worker = Worker(stream, StreamReward(stream, graded, bonus), 8)
    for name, method in inspect.getmembers(RolloutWorkerProtocol, inspect.isfunction):
        if not name.startswith("_"):
            assert list(inspect.signature(getattr(Worker, name)).parameters) == list(
                inspect.signature(method).parameters
            )
    worker.start()
    samples = list(worker.rollout_buffer.queue)
    assert len(samples) == 120 * 8
    assert worker.loop.dataset.state_dict()["told"] == 120
    seen = [RATES[int(sample.prompt[0]["content"])] for sample in samples[-400::8]]
    assert np.abs(np.array(seen) - 0.5).mean() < 0.8 * np.abs(RATES - 0.5).mean()
    assert len(stream) == len(RATES)


def test_rewards_of_a_stream_are_summed_as_trl_sums_them() -> None:
    stream = PromptStream([{"prompt": "a"}], MAKE, batch=1)
    reward = StreamReward(stream, graded, graded, bonus)
    columns = next(iter(stream))
    found = asyncio.run(reward(completions=["1", "?", "0.25"], rate=[0.0] * 3, curriculum_place=[0] * 3))
    assert columns == {"prompt": "a", "curriculum_place": 0}
    assert found == [2.0, None, 0.5]
    assert asyncio.run(reward(completions=["?"], rate=[0.0], curriculum_place=[0])) == [None]
    assert stream.state_dict()["told"] == 1
