"""Completions from vLLM in this process, by a stand-in with vLLM's interface: the library needs an accelerator."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
from tests.runs import SMALL

from cropi.builtin import POLICY_DIR
from cropi.config import PolicyConfig
from cropi.config.loading import load_config
from cropi.errors import ConfigError, PolicyError
from cropi.policy import Policy, load_policy
from cropi.rollouts.generation import Sampling, TransformersGenerator, VllmGenerator
from cropi.stages.collect import collect
from cropi.stages.run import Run

WEIGHTS = PolicyConfig(path="builtin", cpu_threads=1)
SAMPLING = Sampling(8, 0.7)


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(WEIGHTS)


@dataclass
class SamplingParams:
    """The fields of vLLM's class that are used; an unknown one is a TypeError, as there."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop_token_ids: list[int]
    detokenize: bool


class Engine:
    """`vllm.LLM`: completes with the policy's own model, and goes on past the end as a batch does."""

    started: ClassVar[list[dict[str, Any]]] = []
    requests: ClassVar[list[tuple[dict[str, Any], SamplingParams]]] = []
    alive: ClassVar[int] = 0
    policy: ClassVar[Policy]

    def __init__(self, **settings: Any) -> None:
        if settings["gpu_memory_utilization"] > 0.95:
            raise ValueError("Free memory on device is less than\n desired GPU memory utilization")
        Engine.started.append(settings)
        Engine.alive += 1

    def __del__(self) -> None:
        Engine.alive -= 1

    def generate(
        self, prompts: list[dict[str, Any]], sampling_params: list[SamplingParams], use_tqdm: bool
    ) -> list[SimpleNamespace]:
        Engine.requests += list(zip(prompts, sampling_params, strict=True))
        found = []
        for prompt, parameters in zip(prompts, sampling_params, strict=True):
            sampling = Sampling(parameters.max_tokens, parameters.temperature or None)
            generate = TransformersGenerator(Engine.policy, 1)
            [tokens] = generate([prompt["prompt_token_ids"]], sampling, seed=parameters.seed)
            found.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=(*tokens, 5, 6))]))
        return found


@pytest.fixture
def vllm(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = Engine, SamplingParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    Engine.started, Engine.requests, Engine.policy = [], [], policy
    yield
    Engine.started, Engine.requests = [], []


def prompts(policy: Policy, count: int) -> list[list[int]]:
    return [policy.tokenizer(f"sum mod 7 : {n} 5 6 1 =")["input_ids"] for n in range(count)]


@pytest.mark.usefixtures("vllm")
def test_completions_are_plain_samples_in_order_each_with_its_seed(policy: Policy) -> None:
    engine = VllmGenerator(policy, WEIGHTS, {"max_num_seqs": 4})
    asked = prompts(policy, 3) * 2
    drawn = engine(asked, SAMPLING, seed=1)
    assert [request["prompt_token_ids"] for request, _ in Engine.requests] == asked
    seeds = [parameters.seed for _, parameters in Engine.requests]
    assert len(set(seeds)) == 6
    alone = TransformersGenerator(policy, 1)
    expected = [alone([ids], SAMPLING, seed=seed)[0] for ids, seed in zip(asked, seeds, strict=True)]
    eos = set(policy.eos_ids)
    for completion, truth in zip(drawn, expected, strict=True):
        ended = truth[-1] in eos
        assert completion == (truth if ended else [*truth, 5, 6])  # what follows the end is cut off
    assert any(truth[-1] in eos for truth in expected)
    assert {(p.temperature, p.top_p, p.top_k, p.max_tokens) for _, p in Engine.requests} == {(0.7, 1.0, -1, 8)}
    assert engine(asked, SAMPLING, seed=1) == drawn
    [settings] = Engine.started  # one engine for both calls
    assert settings["model"] == str(POLICY_DIR)
    assert (settings["max_num_seqs"], settings["generation_config"]) == (4, "vllm")
    assert settings["trust_remote_code"] is False


@pytest.mark.usefixtures("vllm")
def test_a_run_collects_through_it_and_gives_its_memory_back(tmp_path: Path) -> None:
    few = ["prompts.train.0.count=3", "collect.num_generations=4", "collect.validation_num_generations=4"]
    config = load_config("quickstart", [*SMALL, *few, f"run_dir={tmp_path}", "collect.vllm.max_model_len=128"])
    Engine.policy = load_policy(config.policy)
    pipeline = Run(config)
    collect(pipeline)
    rows = [row for table in pipeline.trajectories.tables.values() for row in table.to_pylist()]
    pipeline.folder.unlock()
    assert len(rows) == len(Engine.requests) > 0
    assert {row["verdict"] for row in rows} >= {"correct", "wrong"}
    assert Engine.alive == 0


@pytest.mark.usefixtures("vllm")
def test_what_it_refuses_is_said(policy: Policy) -> None:
    engine = VllmGenerator(policy, WEIGHTS, {"gpu_memory_utilization": 0.99})
    with pytest.raises(PolicyError, match="Free memory on device is less than desired"):
        engine(prompts(policy, 1), SAMPLING, seed=1)


def test_without_vllm_the_message_says_what_to_install(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(PolicyError, match="vLLM is not installed"):
        VllmGenerator(policy, WEIGHTS, {})(prompts(policy, 1), SAMPLING, seed=1)


def test_one_backend() -> None:
    both = ["collect.vllm={}", "collect.server.url=http://localhost:1/v1", "collect.server.model=x"]
    with pytest.raises(ConfigError, match="exclude each other"):
        load_config("quickstart", both)
