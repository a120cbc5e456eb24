"""Estimated memory beside what is known of the built-in policy: 4 layers of width 128, float32."""

from collections.abc import Iterator

import pytest
import torch

from cropi.builtin import POLICY_DIR
from cropi.config import PolicyConfig
from cropi.inspection import _unaffordable
from cropi.policy import Policy, load_policy
from cropi.run_estimate import _bytes_per_token


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(PolicyConfig(path=str(POLICY_DIR)))


def test_the_cache_holds_keys_and_values_of_every_layer(policy: Policy) -> None:
    model = policy.model.config
    width = model.num_key_value_heads * (model.hidden_size // model.num_attention_heads)
    _, cached = _bytes_per_token(policy, [1, 2, 3, 4, 5])
    assert cached == 2 * model.num_hidden_layers * width * 4


def test_a_longer_batch_keeps_as_much_for_each_token(policy: Policy) -> None:
    """The bytes that the graph of a batch holds, counted by walking it, not by hooks."""
    ids = torch.arange(2 * 24).reshape(2, 24) % 60
    loss = policy.model(input_ids=ids, logits_to_keep=1, use_cache=False).logits.sum()
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    held = {
        storage.data_ptr(): storage.nbytes() for storage in _saved(loss.grad_fn) if storage.data_ptr() not in weights
    }
    saved, _ = _bytes_per_token(policy, list(range(24)))
    assert saved * ids.numel() == pytest.approx(sum(held.values()), rel=0.15)


def _saved(node: torch.autograd.graph.Node | None) -> Iterator[torch.UntypedStorage]:
    """Storages of the tensors that a graph's nodes have saved."""
    found, seen = [node], set[torch.autograd.graph.Node]()
    while found:
        node = found.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found += [before for before, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_saved_"):
                value = getattr(node, name)
                tensors = value if isinstance(value, tuple | list) else [value]
                yield from (each.untyped_storage() for each in tensors if isinstance(each, torch.Tensor))


def test_what_does_not_fit_is_named() -> None:
    fits = {"most_at_once_bytes": 2.0**31, "free_memory_bytes": 2.0**32}
    assert _unaffordable(fits) == []
    assert _unaffordable(fits | {"selected_prompts_per_stage": 8, "drawn_prompts_per_stage": 8}) == []
    (memory,) = _unaffordable({"most_at_once_bytes": 2.0**33, "free_memory_bytes": 2.0**32})
    assert "about 8 GiB may be needed, and 4 are free" in memory
    (steps,) = _unaffordable(fits | {"selected_prompts_per_stage": 1000, "drawn_prompts_per_stage": 64})
    assert "of 1,000 prompts that a stage selects, its steps can use 64" in steps
