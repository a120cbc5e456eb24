"""What the surrogate of a group is made of: settings, and the factor A_k / Z_k of each trajectory."""

from dataclasses import dataclass

import torch

from cropi.functional.advantages import group_advantages
from cropi.functional.surrogate import Normalizer, normalizers
from cropi.gradients.groups import Group


@dataclass(frozen=True)
class SurrogateSettings:
    """What the off-policy surrogate of a prompt is made of."""

    normalizer: Normalizer
    max_completion_length: int
    temperature: float = 1.0
    advantage_std: bool = True


def trajectory_scales(group: Group, settings: SurrogateSettings) -> list[float]:
    """A_k / Z_k of each trajectory, by which the gradient of sum_t rho_{k,t} enters the group's (paper eq. 4).

    A trajectory with a scale of 0 or without a token adds nothing and need not be computed.
    """
    lengths_K = torch.tensor([len(completion) for completion in group.completions])
    mask_KT = torch.arange(int(lengths_K.max()))[None] < lengths_K[:, None]
    advantages_K = group_advantages(torch.tensor(group.rewards, dtype=torch.float64), std=settings.advantage_std)
    return (advantages_K / normalizers(mask_KT, settings.normalizer, settings.max_completion_length)).tolist()
