"""Log-probs of many completions of the same prompts, each shared prefix computed once.

The completions of a prompt stand in one row as a tree: a token follows its parent, sees the prompt and its ancestors
alone, and has the position it would have in its completion. Completions sampled from one policy share so much that this
takes a fraction of the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cropi.errors import PolicyError
from cropi.functional.surrogate import token_logprobs
from cropi.policy import completion_logprobs

TOLERANCE = 1e-3
"""Largest difference, in nats, between a completion's log-prob here and by a forward pass of its own."""


@dataclass(frozen=True)
class Tree:
    """The completions of one prompt. Nodes are the prompt's tokens, then theirs; a parent stands before its child."""

    tokens: list[int]
    parents: list[int]
    ends: list[int]
    """The node that each completion ends in."""
    prompt_length: int


def make_tree(prompt_ids: Sequence[int], completions: Sequence[Sequence[int]]) -> Tree:
    """Raises ValueError for an empty prompt, after which nothing would be predicted from."""
    if not prompt_ids:
        raise ValueError("a tree needs a prompt to stand on")
    tokens, parents = list(prompt_ids), [-1, *range(len(prompt_ids) - 1)]
    children: dict[tuple[int, int], int] = {}
    ends = []
    for completion in completions:
        node = len(prompt_ids) - 1
        for token in completion:
            if (node, token) not in children:
                children[node, token] = len(tokens)
                tokens.append(token)
                parents.append(node)
            node = children[node, token]
        ends.append(node)
    return Tree(tokens, parents, ends, len(prompt_ids))


class SharedPrefixes:
    """Log-probs of fixed completions under a model whose weights change.

    PolicyError where the model does not take the tree's mask as it is meant, by comparison with plain forward passes.
    """

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[tuple[list[int], list[list[int]]]],
        *,
        temperature: float,
        batch_tokens: int,
    ) -> None:
        """`prompts`: token ids of each prompt and of its completions."""
        self._model, self._temperature = model, temperature
        trees = [make_tree(prompt_ids, completions) for prompt_ids, completions in prompts]
        self._batches = [_Batch(trees, rows, next(model.parameters())) for rows in _batched(trees, batch_tokens)]
        self._count = len(trees)
        self._check(prompts)

    @torch.no_grad()
    def __call__(self) -> list[list[float]]:
        """log pi of each whole completion, by prompt; 0 for an empty one."""
        found: list[list[float]] = [[] for _ in range(self._count)]
        for batch in self._batches:
            for row, values in zip(batch.rows, batch.log_probs(self._model, self._temperature), strict=True):
                found[row] = values
        return found

    def _check(self, prompts: Sequence[tuple[list[int], list[list[int]]]]) -> None:
        for (prompt_ids, completions), found in list(zip(prompts, self(), strict=True))[:4]:
            with torch.no_grad():
                logprobs_KT, _ = completion_logprobs(
                    self._model, [prompt_ids] * len(completions), completions, temperature=self._temperature
                )
            gap = (logprobs_KT.double().sum(dim=1).cpu() - torch.tensor(found, dtype=torch.float64)).abs().max()
            if not gap <= TOLERANCE:
                raise PolicyError(
                    f"log-probs over shared prefixes differ by {gap:.2g} from plain forward passes",
                    where=type(self._model).__name__,
                    fix="this model cannot be measured here; use one with plain causal attention.",
                )


class _Batch:
    """Trees side by side, padded on the right to the largest."""

    def __init__(self, trees: Sequence[Tree], rows: list[int], like: Tensor) -> None:
        self.rows, self._trees = rows, [trees[row] for row in rows]
        width = max(len(tree.tokens) for tree in self._trees)
        shape = (len(rows), width)
        self._ids, self._positions = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        seen = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)
        for b, tree in enumerate(self._trees):
            self._ids[b, : len(tree.tokens)] = torch.tensor(tree.tokens)
            for node, parent in enumerate(tree.parents):
                if parent >= 0:
                    self._positions[b, node] = self._positions[b, parent] + 1
                    seen[b, node] |= seen[b, parent]
        least = torch.finfo(like.dtype).min
        self._mask = torch.zeros(seen.shape, dtype=like.dtype).masked_fill(~seen, least)[:, None].to(like.device)
        self._ids, self._positions = self._ids.to(like.device), self._positions.to(like.device)

    def log_probs(self, model: nn.Module, temperature: float) -> list[list[float]]:
        logits = model(
            input_ids=self._ids, attention_mask=self._mask, position_ids=self._positions, use_cache=False
        ).logits
        found = []
        for b, tree in enumerate(self._trees):
            nodes = range(tree.prompt_length, len(tree.tokens))
            parents = torch.tensor([tree.parents[node] for node in nodes], dtype=torch.long, device=logits.device)
            ids = self._ids[b, tree.prompt_length : len(tree.tokens)]
            steps = token_logprobs(logits[b, parents][None], ids[None], temperature=temperature)[0].double().tolist()
            sums = [0.0] * len(tree.tokens)
            for node, step in zip(nodes, steps, strict=True):
                sums[node] = sums[tree.parents[node]] + step
            found.append([sums[end] for end in tree.ends])
        return found


def _batched(trees: Sequence[Tree], batch_tokens: int) -> Iterator[list[int]]:
    """Rows of similar size, at most so many padded tokens together, at least one."""
    order = sorted(range(len(trees)), key=lambda row: -len(trees[row].tokens))
    while order:
        size = max(1, batch_tokens // len(trees[order[0]].tokens))
        yield order[:size]
        order = order[size:]
