"""Ranks that shard a policy's parameters sample different numbers of completions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh

from cropi.errors import PolicyError
from cropi.fsdp import in_lockstep
from cropi.policy import Policy
from cropi.rollouts import generation
from cropi.rollouts.generation import Sampling, TransformersGenerator
from cropi.rollouts.shards import behaviour_logprobs
from tests.gradients.architectures import BUILDERS
from tests.gradients.ranks import as_accelerate_does, by_blocks, by_modules, run_on_processes, whole_numbers

pytestmark = pytest.mark.slow  # processes of its own for every worker of the tests

TOKENIZER: Any = SimpleNamespace(pad_token_id=0, eos_token_id=1, bos_token_id=None)
PROMPTS = [[2, 3, 4], [2, 3, 4], [5, 6], [7, 8, 9, 2], [2, 3, 4], [5, 6], [3]]  # repeated ones share their pass
SAMPLED = Sampling(12, 1.0)
Found = tuple[list[list[int]], list[list[float]]]


def sampled(model: Any, prompts: list[list[int]]) -> Found:
    """Completions in batches of three, and their log-probs."""
    policy = Policy(model, TOKENIZER)
    with in_lockstep(model):
        completions = TransformersGenerator(policy, 3)(prompts, SAMPLED, seed=4)
        return completions, behaviour_logprobs(policy, prompts, completions, 1.0, 16)


def by_one(style: Callable[..., Any], policy: str, mesh: DeviceMesh) -> dict[str, Any]:
    """The second process has all the prompts, the first one none."""
    model = style(BUILDERS[policy](), mesh)
    model.generate = model.generate  # as transformers' trainer leaves it, in the model itself
    before, prompts = model.__dict__["generate"], PROMPTS if mesh.get_rank() else []
    found = sampled(model, prompts)
    assert model.__dict__["generate"] is before
    return {"found": found, "kept": whole_numbers(model), "all": sum(p.numel() for p in model.parameters())}


STYLES = {"blocks": by_blocks, "accelerate": as_accelerate_does, "modules": by_modules}
ONE = {f"llama/{name}": (style, "llama") for name, style in STYLES.items()} | {
    f"{policy}/accelerate": (as_accelerate_does, policy) for policy in ("llama_tied", "gpt_neox")
}


@pytest.fixture(scope="module")
def found() -> dict[str, list[Any]]:
    """By case, what each of two processes found."""
    cases = {name: partial(by_one, *case) for name, case in ONE.items()}
    return dict(zip(cases, run_on_processes(list(cases.values()), 2), strict=True))


def assert_same(one: Found, two: Found) -> None:
    assert two[0] == one[0]
    for left, right in zip(one[1], two[1], strict=True):
        assert right == pytest.approx(left, abs=1e-6)


@pytest.mark.parametrize("name", ONE)
def test_a_process_without_prompts_takes_part(name: str, found: dict[str, list[Any]]) -> None:
    first, second = found[name]
    assert not isinstance(first, str), first
    assert not isinstance(second, str), second
    assert first["found"] == ([], [])
    assert_same(sampled(BUILDERS[ONE[name][1]](), PROMPTS), second["found"])
    for part in (first, second):
        assert part["kept"] == pytest.approx(part["all"] / 2, rel=0.05)


def test_running_out_of_memory_is_an_error(alone: DeviceMesh, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other processes would wait for ever for the pass that was broken off."""

    def greedy(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(generation, "shared_prefixes", greedy)
    generate = TransformersGenerator(Policy(by_blocks(BUILDERS["llama"](), alone), TOKENIZER), 6)
    with pytest.raises(PolicyError, match=r"(?s)collect.batch_size.*6 completions.*set it to 3 or less"):
        generate(PROMPTS, SAMPLED, seed=0)
