"""Choosers inside prime-rl and Trinity-RFT, held to the signatures of their sources."""

from __future__ import annotations

import inspect
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cropi.curriculum.strategies.mopps import MoppsStrategy
from cropi.exchange.live import PrimeSampler, TrinitySelector

MAKE = MoppsStrategy(type="mopps", candidates=4).chooser
RATES = np.linspace(0, 1, 40)  # of the prompts
# prime-rl, orchestrator/curriculum/samplers/base.py at 2cfe40f; Trinity-RFT, buffer/selector/selector.py at 3e9eb60
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
    plain = {"has_error": False, "num_turns": 1, "agent": SimpleNamespace(trainable=True)} | flaws
    return [SimpleNamespace(ok=True, task=task, traces=[SimpleNamespace(reward=r, **plain)]) for r in rewards]


@pytest.mark.parametrize(("ours", "theirs"), [(PrimeSampler, PRIME), (TrinitySelector, TRINITY)])
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
    for flaw in ({"has_error": True}, {"num_turns": 0}, {"agent": SimpleNamespace(trainable=False)}):
        sampler.observe(finished(task, [1.0], **flaw))
    assert sampler.state_dict()["told"] == before["told"] == 0


def test_several_groups_of_one_prompt_may_be_asked_for_before_any_is_told() -> None:
    selector = Mopps(SimpleNamespace(dataset=RATES[:3]), SimpleNamespace(batch_size=3))
    places, extra = selector.get_indices(6, return_extra_info=True)
    assert extra["indices"] == places
    assert sorted(places) == [0, 0, 1, 1, 2, 2]
    selector.update(places, [0.5] * 6)
    assert selector.state_dict()["told"] == 6
