"""Let the completions of a prompt share its forward and backward pass in a training step of TRL's GRPO.

TRL computes each completion with a copy of its prompt. Here one row holds a prompt without its last token, then for
each completion that last token and the completion; the mask lets a completion see its prompt and itself. The
log-probabilities, and so loss and gradient, are the same but for rounding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer


@dataclass(frozen=True)
class Packed:
    """Rows of prompts with their completions: U rows of L tokens for B completions of at most T tokens."""

    ids_UL: Tensor
    positions_UL: Tensor
    mask_U1LL: Tensor  # True: is seen
    labels_UL: Tensor  # -100 but for completion tokens
    rows_BT: Tensor  # where each completion token stands
    columns_BT: Tensor


def pack(input_ids: Tensor, attention_mask: Tensor, completion_length: int) -> Packed:
    """Pack a batch of TRL's: prompts padded on the left, completions on the right."""
    seen, width = attention_mask.bool(), input_ids.shape[1] - completion_length
    prompts = [tuple(row[keep].tolist()) for row, keep in zip(input_ids[:, :width], seen[:, :width], strict=True)]
    completions = [row[keep].tolist() for row, keep in zip(input_ids[:, width:], seen[:, width:], strict=True)]
    members: dict[tuple[int, ...], list[int]] = {}
    for number, prompt in enumerate(prompts):
        members.setdefault(prompt, []).append(number)
    shared = [len(prompt) - 1 for prompt in members]
    length = max(s + sum(1 + len(completions[n]) for n in own) for s, own in zip(shared, members.values(), strict=True))
    ids = input_ids.new_zeros(len(members), length)
    positions, branch = torch.zeros_like(ids), torch.full_like(ids, -1)  # branch 0: the prompt; -1: padding
    labels = torch.full_like(ids, -100)
    rows, columns = (torch.zeros(len(prompts), completion_length, dtype=torch.long) for _ in range(2))
    for row, (prompt, own) in enumerate(members.items()):
        start = len(prompt) - 1
        ids[row, :start] = torch.tensor(prompt[:-1])
        positions[row, :start], branch[row, :start] = torch.arange(start), 0
        for number, member in enumerate(own, start=1):
            completion = torch.tensor(completions[member])
            end = start + 1 + len(completion)
            ids[row, start], ids[row, start + 1 : end] = prompt[-1], completion
            positions[row, start:end] = torch.arange(len(prompt) - 1, len(prompt) + len(completion))
            branch[row, start:end], labels[row, start + 1 : end] = number, completion
            rows[member, : len(completion)] = row
            columns[member, : len(completion)] = torch.arange(
                start, end - 1
            )  # the log-prob of a token stands before it
            start = end
    order = torch.arange(length)
    causal = order[:, None] >= order[None, :]
    same = branch[:, :, None] == branch[:, None, :]
    mask = causal & (same | (branch == 0)[:, None, :]) & (branch >= 0)[:, None, :]
    mask = mask | torch.eye(length, dtype=torch.bool)  # padding sees itself: a row that sees nothing is NaN
    return Packed(ids, positions, mask[:, None], labels, rows, columns)


class SharedPromptTrainer(GRPOTrainer):
    """`GRPOTrainer` whose completions share their prompt's forward pass, for text models with plain attention."""

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **images: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if compute_aux_loss or any(value is not None for value in images.values()):
            raise NotImplementedError("only text, and no auxiliary loss of a mixture of experts")
        packed = pack(input_ids, attention_mask, logits_to_keep)
        with self.accelerator.autocast():
            outputs = model(
                input_ids=packed.ids_UL,
                attention_mask=packed.mask_U1LL,
                position_ids=packed.positions_UL,
                labels=packed.labels_UL,
                fused_lm_head=True,
                use_cache=False,
            )
        taken = packed.rows_BT, packed.columns_BT
        return outputs.log_probs[taken], outputs.entropy[taken] if compute_entropy else None, None
