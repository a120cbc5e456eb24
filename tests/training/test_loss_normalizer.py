"""The normaliser of each loss is undone: a row's weight depends on its own group only.

Oracle: each loss written out as TRL 1.16 divides it, differentiated with respect to its per-token terms.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cropi.training.group_evidence import LossNormalizer

LONGEST, GENERATIONS, ACCUMULATED, PER_GENERATION = 10, 4, 3, 6
CISPO_HIGH = 0.2
LOSSES = ["grpo", "sapo", "dr_grpo", "bnpo", "dapo", "cispo", "vespo", "luspo"]


def divided(loss: str, terms_BT: Tensor, mask_BT: Tensor, items: float) -> Tensor:
    if loss in {"grpo", "sapo"}:
        return ((terms_BT * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1)).mean() / ACCUMULATED
    if loss == "bnpo":
        return (terms_BT * mask_BT).sum() / mask_BT.sum().clamp(min=1) / ACCUMULATED
    if loss == "dr_grpo":
        return (terms_BT * mask_BT).sum() / (len(terms_BT) * LONGEST) / ACCUMULATED
    if loss == "luspo":
        return (terms_BT * mask_BT).sum(-1).mean() / ACCUMULATED
    if loss == "cispo":
        terms_BT = CISPO_HIGH * terms_BT  # a ratio of 1, cut there
    return (terms_BT * mask_BT).sum() / (items * ACCUMULATED / PER_GENERATION)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("neighbours", [[2], [9, 1, 5], [0, 10]])
def test_a_row_weighs_the_same_beside_any_neighbours(loss: str, neighbours: list[int]) -> None:
    own = 4
    lengths = torch.tensor([own, *neighbours])
    mask_BT = (torch.arange(LONGEST) < lengths[:, None]).long()
    terms_BT = torch.zeros(mask_BT.shape, requires_grad=True)
    items = float(mask_BT.sum()) * 5
    (weights_BT,) = torch.autograd.grad(divided(loss, terms_BT, mask_BT, items), terms_BT)
    settings = SimpleNamespace(
        loss_type=loss,
        num_generations=GENERATIONS,
        max_completion_length=LONGEST,
        steps_per_generation=PER_GENERATION,
        epsilon=CISPO_HIGH,
        epsilon_high=None,
    )
    normalizer = LossNormalizer(settings, processes=1)
    inputs = {"completion_ids": mask_BT, "completion_mask": mask_BT, "num_items_in_batch": torch.tensor(items)}
    weight = float(normalizer.factor(inputs, ACCUMULATED) * weights_BT[0, 0])
    assert weight == pytest.approx(1 / (GENERATIONS * (own if loss in {"grpo", "sapo"} else LONGEST)))
