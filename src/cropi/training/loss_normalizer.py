"""Undo the normaliser of TRL's losses, so that a group's gradient does not depend on the groups beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from trl import GRPOConfig

BY_SEQUENCE = ("grpo", "sapo")  # each completion is divided by its own length, as part of the estimator
BY_ROWS = (*BY_SEQUENCE, "dr_grpo", "luspo")
BY_BATCH = ("dapo", "cispo", "vespo")


@dataclass(frozen=True)
class LossNormalizer:
    """The factor from a row's part of TRL's loss to its part of the group's surrogate.

    The surrogate of a group of K completions is sum_k A_k sum_t rho_kt / (K Z), with Z the length of completion k for
    `grpo` and `sapo`, else the largest completion length. Where TRL divides the loss:

        grpo, sapo   B a |o_k|   B rows of the micro-batch, a micro-steps in an optimiser step
        dr_grpo      B a L       L the largest completion length
        luspo        B a
        bnpo         a M         M tokens that count in the micro-batch
        dapo, cispo, vespo       a tokens of the generation batch / (processes x steps per generation)
    """

    loss_type: str
    generations: int
    max_completion_length: int
    steps_per_generation: int
    processes: int

    @classmethod
    def of(cls, settings: GRPOConfig, processes: int) -> LossNormalizer:
        """The normaliser of a trainer's settings. ValueError for a loss that is not known."""
        if settings.loss_type not in (*BY_ROWS, *BY_BATCH, "bnpo"):
            raise ValueError(f"the normaliser of the loss {settings.loss_type!r} is not known")
        return cls(
            settings.loss_type,
            settings.num_generations,
            settings.max_completion_length,
            settings.steps_per_generation,
            processes,
        )

    def factor(self, inputs: Mapping[str, Tensor], accumulated: int) -> float:
        """The factor of a micro-batch, one of `accumulated` in its optimiser step."""
        rows = len(inputs["completion_ids"])
        longest = self.max_completion_length
        if self.loss_type in BY_ROWS:
            unit = 1 if self.loss_type in (*BY_SEQUENCE, "dr_grpo") else longest
            return rows * accumulated / (self.generations * unit)
        if self.loss_type == "bnpo":
            mask = inputs["completion_mask"]
            counted = float((mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).sum())
            return max(counted, 1.0) * accumulated / (self.generations * longest)
        items = max(float(inputs["num_items_in_batch"]), 1.0) / self.processes
        return items * accumulated / self.steps_per_generation / (self.generations * longest)
