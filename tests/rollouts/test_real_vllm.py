"""Completions from vLLM itself, where it is installed: `make test-vllm` takes its build for CPUs."""

from __future__ import annotations

import contextlib
import sys
import time
from collections import Counter
from collections.abc import Iterator

import psutil
import pytest
import torch
from tests.runs import SMALL
from tests.stages.killed import collected_through

from cropi.builtin import POLICY_DIR
from cropi.config import PolicyConfig
from cropi.config.loading import load_config
from cropi.policy import Policy, load_policy
from cropi.rollouts.generation import Sampling, TransformersGenerator, VllmGenerator
from cropi.stages.collect import collect
from cropi.stages.run import Run

pytest.importorskip("vllm", exc_type=ImportError)
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]

WEIGHTS = PolicyConfig(path="builtin", cpu_threads=1)
# On CPUs vLLM cannot put back the seed of a prompt that it has computed in two pieces (seen with 0.32).
ENGINE = {"max_model_len": 128, "enforce_eager": True, "enable_chunked_prefill": False}


@pytest.fixture(autouse=True, scope="module")
def quiet_engine() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("VLLM_NO_USAGE_STATS", "1"), ("VLLM_CPU_KVCACHE_SPACE", "1"), ("HF_HUB_OFFLINE", "1")):
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(WEIGHTS)


@pytest.fixture(scope="module")
def engine(policy: Policy) -> Iterator[VllmGenerator]:
    generator = VllmGenerator(policy, WEIGHTS, ENGINE)
    yield generator
    generator.close()


def prompts(policy: Policy, count: int) -> list[list[int]]:
    return [policy.tokenizer(f"sum mod 7 : {n % 7} {n // 7} 6 1 =")["input_ids"] for n in range(count)]


def engine_processes() -> set[int]:
    found = set()
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended meanwhile
            if "VLLM" in " ".join(child.cmdline()):
                found.add(child.pid)
    return found


def test_greedy_completions_are_those_of_transformers(policy: Policy, engine: VllmGenerator) -> None:
    asked, greedy = prompts(policy, 40), Sampling(24, None)
    found = engine(asked, greedy, seed=1)
    assert found == TransformersGenerator(policy, 40)(asked, greedy, seed=1)
    assert all(completion[-1] in policy.eos_ids for completion in found)


def test_samples_are_drawn_by_their_seeds_and_as_the_policy_draws(policy: Policy, engine: VllmGenerator) -> None:
    sampling = Sampling(1, 2.0)
    [prompt] = prompts(policy, 1)
    drawn = engine([prompt] * 2000, sampling, seed=1)
    assert drawn == engine([prompt] * 2000, sampling, seed=1)
    assert drawn != engine([prompt] * 2000, sampling, seed=2)
    with torch.no_grad():
        logits = policy.model(torch.tensor([prompt])).logits[0, -1].double()
    expected = 2000 * torch.softmax(logits / sampling.temperature, -1).numpy()
    seen = Counter(token for [token] in drawn)
    often = [token for token in range(len(expected)) if expected[token] >= 5]
    counts = torch.tensor([*(seen[token] for token in often), 2000 - sum(seen[token] for token in often)])
    theirs = torch.tensor([*expected[often], 2000 - expected[often].sum()])
    assert len(often) >= 5
    statistic = ((counts - theirs) ** 2 / theirs).sum()
    freedom = torch.tensor(float(len(often)))
    assert torch.special.gammaincc(freedom / 2, statistic.float() / 2) > 1e-3  # the chance of a larger one


def vllm_serve(port: int) -> list[str]:
    options = ["--max-model-len", "128", "--dtype", "float32", "--enforce-eager", "--no-enable-chunked-prefill"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(POLICY_DIR)]
    return [*command, *options, "--port", str(port)]


@pytest.mark.timeout(900)
def test_its_server_killed_in_mid_collection_and_started_again_loses_and_doubles_nothing(policy, tmp_path):
    """And what it says comes as its tokens: each completion has its end, where it was not cut."""
    environment = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
    settings = {"model": str(POLICY_DIR), "body": {"top_k": -1, "return_token_ids": True}}
    rows = collected_through(vllm_serve, environment, settings, tmp_path)
    assert {row["verdict"] for row in rows} >= {"correct", "wrong"}
    for row in rows:
        assert (row["completion_ids"][-1] in policy.eos_ids) == (row["status"] == "ok")
        assert len(row["completion_ids"]) == 16 or row["status"] == "ok"


def test_a_run_collects_through_it_and_its_processes_are_gone(policy, engine, tmp_path):
    engine(prompts(policy, 1), Sampling(1, None), seed=1)
    before = engine_processes()
    assert before, "those of an engine that is in use are seen"
    few = ["collect.num_generations=4", "collect.validation_num_generations=4"]
    vllm = f"collect.vllm={ENGINE.model_dump_json()}"
    found = []
    for name in ("once", "again"):
        pipeline = Run(load_config("quickstart", [*SMALL, *few, vllm, f"run_dir={tmp_path}", f"name={name}"]))
        manifest = collect(pipeline)
        found.append([row for table in pipeline.trajectories.tables.values() for row in table.to_pylist()])
        pipeline.folder.unlock()
        assert sum(manifest.counts.values()) == len(found[-1]) > 50
    assert [row["completion"] for row in found[0]] == [row["completion"] for row in found[1]]
    assert {row["verdict"] for row in found[0]} >= {"correct", "wrong"}
    deadline = time.monotonic() + 30
    while left := engine_processes() - before:
        assert time.monotonic() < deadline, left
        time.sleep(0.5)
