"""The same policy in transformers' hands alone: a floor that owes nothing to our engine, sampling, and training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cropi.lab.bench.contenders import Meter, Unscored, as_group, load_model, segments_of
from cropi.lab.bench.peers.wire import Measurement, Task

GENERATION_BATCH = 64

LOGITS_AT_ONCE = 1 << 31
"""Of a batch, whatever its tokens: 8 GiB in float32."""


def equal_rows(task: Task) -> Tensor:
    """(rows, length) token ids: as many tokens as the packed train prompts have, in rows of their trajectories' mean
    length. The tokens are the trajectories', one after another."""
    segments = segments_of([as_group(group) for group in task.groups])
    sequences = [segment.prompt_ids + ids for segment in segments for ids in segment.completions]
    length = round(sum(map(len, sequences)) / len(sequences))
    rows = max(1, round(sum(segment.tokens for segment in segments) / length))
    stream = torch.tensor([i for sequence in sequences for i in sequence], device=task.device)
    return stream[: min(rows, len(stream) // length) * length].view(-1, length)


def cross_entropy(model: Any, rows_BT: Tensor, **inputs: Any) -> Tensor:
    """Summed over all tokens that have one before them."""
    logits = model(use_cache=False, **inputs).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1).float(), rows_BT[:, 1:].flatten(), reduction="sum")


class Stock(Unscored):
    """Forward and backward to the embeddings' output, weights frozen."""

    def __init__(self, task: Task) -> None:
        self._model: Any = load_model(task, attn_implementation="sdpa").requires_grad_(False)
        self._batches = _batches(task, self._model)
        self._meter = Meter(self._model)

    def run(self) -> Measurement:
        """All rows, as many at once as `batch_tokens` allows."""
        self._meter.begin()
        with self._meter.part("train"):
            for rows_BT in self._batches:
                embedded = self._model.get_input_embeddings()(rows_BT).requires_grad_()
                cross_entropy(self._model, rows_BT, inputs_embeds=embedded).backward()
        return self._meter.measurement()


class Training(Unscored):
    """Forward, backward to all weights, and one optimiser step, timed apart: a batch of any size takes one."""

    def __init__(self, task: Task) -> None:
        self._model: Any = load_model(task, attn_implementation="sdpa")
        self._batches = _batches(task, self._model)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-6)
        self._meter = Meter(self._model)

    def run(self) -> Measurement:
        """One step on all rows."""
        self._meter.begin()
        with self._meter.part("gradients"):
            for rows_BT in self._batches:
                cross_entropy(self._model, rows_BT, input_ids=rows_BT).backward()
        with self._meter.part("step"):
            self._optimizer.step()
            self._optimizer.zero_grad()
        return self._meter.measurement()


class Generation(Unscored):
    """Completions of the workload's mean length from prompts of its mean length, one batch."""

    def __init__(self, task: Task) -> None:
        self._model: Any = load_model(task)
        trajectories = [(group.prompt_ids, ids) for group in task.groups for ids in group.completions]
        width = round(sum(len(prompt) for prompt, _ in trajectories) / len(trajectories))
        self._length = round(sum(len(ids) for _, ids in trajectories) / len(trajectories))
        stream = [i for prompt, _ in trajectories for i in prompt]
        stream *= -(-GENERATION_BATCH * width // len(stream))
        self._prompts_BT = torch.tensor(stream[: GENERATION_BATCH * width], device=task.device).view(-1, width)
        self._meter = Meter(self._model)

    @torch.no_grad()
    def run(self) -> Measurement:
        """Tokens computed are those sampled; the prompts' come on top, as they do for anyone who samples."""
        from transformers import GenerationConfig

        settings = GenerationConfig(
            max_new_tokens=self._length,
            min_new_tokens=self._length,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
            disable_compile=True,
        )
        torch.manual_seed(0)
        self._meter.begin()
        with self._meter.part("sampling"):
            mask = torch.ones_like(self._prompts_BT)
            output = self._model.generate(self._prompts_BT, attention_mask=mask, generation_config=settings)
        measured = self._meter.measurement()
        sampled = output[:, self._prompts_BT.shape[1] :].numel()
        return Measurement(measured.seconds, sampled, measured.peak_gpu_mb, measured.parts)


def _batches(task: Task, model: Any) -> list[Tensor]:
    """Rows together as `batch_tokens` allows."""
    rows_BT = equal_rows(task)
    tokens = min(task.batch_tokens, LOGITS_AT_ONCE // model.config.vocab_size)
    return list(rows_BT.split(max(1, tokens // rows_BT.shape[1])))
