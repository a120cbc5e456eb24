"""Worker for the paper's recipe (arXiv 2510.26491) as its released code goes about it, in cropi's own environment.

One prompt at a time: the full gradient by autograd, flattened, masked, and with the next three prompts' through a dense
random matrix of TRAK's `BasicProjector` (traker 0.3.2), which makes the matrix anew block by block. Prompts without
signal are computed as well, and drop out when scored: their features are zero. Two things differ from the released
code: the mask is uniform over all coordinates (theirs takes the first ones), and the projection is done in float32,
without their CUDA kernel.

Options: `keep_fraction` (0.1), `dim` (32768), `projection` ("normal", or "rademacher", which PyTorch draws more slowly
on a CPU), `block_size` (128 columns of the matrix at a time), `forward_tokens` (80000 padded tokens at most go through
the model at once), `skip_zero` (false).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from cropi.lab.bench.peers.worker_protocol import Measurement, Task, WeightedGroup, serve

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PROMPTS_PER_PROJECTION = 4
SEED = 0


class Recipe:
    """The recipe with its model loaded and its mask drawn."""

    def __init__(self, task: Task) -> None:
        import torch
        from trak.projectors import BasicProjector
        from transformers import AutoModelForCausalLM

        if task.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("no CUDA device is available")
        self.version = f"traker {version('traker')}"
        self._task = task
        self._device = torch.device(task.device)
        settings = {"dtype": getattr(torch, task.dtype), "trust_remote_code": False}
        self._model: Any = AutoModelForCausalLM.from_pretrained(task.model, **settings)
        self._model.to(self._device).eval()
        self._parameters = list(self._model.parameters())  # a tied weight comes once
        count = sum(parameter.numel() for parameter in self._parameters)
        keep_fraction, self._dim = task.options.get("keep_fraction", 0.1), task.options.get("dim", 32768)
        draws_P = torch.rand(count, generator=torch.Generator().manual_seed(SEED))
        self._kept_P = (draws_P < keep_fraction).nonzero().squeeze(1).to(self._device)
        self._scale = (keep_fraction * self._dim) ** -0.5  # makes dot products of features estimate the gradients'
        self._projector = BasicProjector(
            grad_dim=len(self._kept_P),
            proj_dim=self._dim,
            seed=SEED,
            proj_type=task.options.get("projection", "normal"),
            device=self._device,
            block_size=task.options.get("block_size", 128),
        )
        self._tokens = 0

    def run(self) -> Measurement:
        """The features of both sets."""
        import torch

        on_gpu = self._device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self._tokens = 0
        started = time.perf_counter()
        self._train_ND = self._features(self._task.groups)
        self._validation_MD = self._features(self._task.validation)
        seconds = time.perf_counter() - started  # the features are on the CPU, so the GPU has finished
        return Measurement(seconds, self._tokens, torch.cuda.max_memory_allocated() / (1 << 20) if on_gpu else None)

    def scores_N(self) -> np.ndarray:
        """Prompts without signal have zero features, so they get 0."""
        return (self._train_ND.double() @ self._validation_MD.double().mean(dim=0)).numpy()

    def _features(self, groups: list[WeightedGroup]) -> Tensor:
        import torch

        features_ND = torch.zeros(len(groups), self._dim)
        skip_zero = self._task.options.get("skip_zero", False)
        places = [n for n, group in enumerate(groups) if group.has_signal or not skip_zero]
        for start in range(0, len(places), PROMPTS_PER_PROJECTION):
            together = places[start : start + PROMPTS_PER_PROJECTION]
            masked = torch.stack([self._masked_gradient(groups[n]) for n in together])
            features_ND[together] = self._projector.project(masked, model_id=0).cpu() * self._scale
        return features_ND

    def _masked_gradient(self, group: WeightedGroup) -> Tensor:
        """The kept coordinates of a prompt's full gradient, float32."""
        import torch

        from cropi.policy import completion_logprobs

        self._model.zero_grad(set_to_none=True)
        for rows in self._micro_batches(group):
            completions = [group.completions[k] for k in rows]
            logprobs_KT, _ = completion_logprobs(
                self._model, [group.prompt_ids] * len(rows), completions, temperature=1.0
            )
            weights_K = torch.tensor([group.weights[k] for k in rows], device=self._device)
            (weights_K[:, None] * logprobs_KT).sum().backward()
        # Autograd leaves out a parameter that took no part in the loss.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        return torch.cat([gradient.flatten().float() for gradient in gradients])[self._kept_P]

    def _micro_batches(self, group: WeightedGroup) -> Iterator[list[int]]:
        """Trajectories longest first, as many at once as `forward_tokens` allows; counts the padded tokens."""
        rows = sorted(
            (k for k, ids in enumerate(group.completions) if ids), key=lambda k: len(group.completions[k]), reverse=True
        )
        while rows:
            width = len(group.prompt_ids) + len(group.completions[rows[0]])
            count = max(1, self._task.options.get("forward_tokens", 80000) // width)
            self._tokens += width * len(rows[:count])
            yield rows[:count]
            rows = rows[count:]


if __name__ == "__main__":
    serve(Recipe)
