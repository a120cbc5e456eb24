import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cropi.functional.surrogate import (
    group_advantages,
    normalizers,
    token_logprobs,
    token_weights,
)

MASK_KT = torch.tensor([[True, True, True], [True, False, False]])


@pytest.mark.parametrize(
    ("normalizer", "expected"), [("sequence", [2 * 3, 2 * 1]), ("token", [4, 4]), ("constant", [2 * 10, 2 * 10])]
)
def test_normalizers_by_hand(normalizer: str, expected: list[int]) -> None:
    assert normalizers(np.array([3, 1]), normalizer, 10).tolist() == expected


def test_an_empty_completion_divides_by_one_not_zero() -> None:
    assert normalizers(np.array([2, 0]), "sequence", 10).tolist() == [4, 2]


def test_token_weights_by_hand() -> None:
    ratios_KT = torch.tensor([[1.0, 2.0, 0.5], [3.0, 99.0, 99.0]])
    scales_K = torch.tensor([1.0, -1.0]).double() / torch.tensor([6.0, 2.0])
    weights_KT = token_weights(ratios_KT, scales_K, MASK_KT)
    expected_KT = torch.tensor([[1 / 6, 2 / 6, 0.5 / 6], [-1.5, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(weights_KT, expected_KT, rtol=1e-12, atol=0)


def test_nothing_outside_the_mask_enters_the_weights() -> None:
    ratios_KT = torch.tensor([[1.0, 2.0, 0.5], [3.0, torch.nan, torch.inf]])
    weights_KT = token_weights(ratios_KT, torch.tensor([1.0, 2.0]), MASK_KT)
    assert weights_KT.tolist() == [[1.0, 2.0, 0.5], [6.0, 0.0, 0.0]]


def test_the_gradient_is_that_of_the_ratio_surrogate() -> None:
    # the oracle writes the surrogate down with the ratio itself, not with detached weights
    generator = torch.Generator().manual_seed(0)
    logits_KTW = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator, requires_grad=True)
    ids_KT = torch.randint(5, (2, 3), generator=generator)
    behaviour_KT = torch.randn(2, 3, dtype=torch.float64, generator=generator) - 2
    advantages_K = torch.tensor([0.7, -1.3], dtype=torch.float64)
    z_K = torch.from_numpy(normalizers(np.array([3, 1]), "sequence", 10))
    logprobs_KT = token_logprobs(logits_KTW, ids_KT, temperature=0.7)
    weights_KT = token_weights((logprobs_KT - behaviour_KT).exp(), advantages_K / z_K, MASK_KT)
    (ours,) = torch.autograd.grad((weights_KT * logprobs_KT).sum(), logits_KTW)

    total = torch.zeros((), dtype=torch.float64)
    for k in range(2):
        for t in range(3):
            if MASK_KT[k, t]:
                p = torch.softmax(logits_KTW[k, t] / 0.7, dim=0)[ids_KT[k, t]]
                total = total + p / behaviour_KT[k, t].exp() * advantages_K[k] / z_K[k]
    (oracle,) = torch.autograd.grad(total, logits_KTW)
    torch.testing.assert_close(ours, oracle, rtol=1e-10, atol=1e-14)


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    logits = torch.tensor([[[5.0, 1.0, -2.0]]], dtype=torch.bfloat16)
    logprob = token_logprobs(logits, torch.tensor([[1]]), temperature=1.0)
    assert logprob.dtype == torch.float32
    torch.testing.assert_close(logprob, torch.log_softmax(logits.float(), -1)[..., 1])


def test_hand_computed_with_bessel_deviation() -> None:
    # mean 1/4, deviations (3/4, -1/4, -1/4, -1/4), variance (9/16 + 3/16) / 3 = 1/4, deviation 1/2
    advantages_K = group_advantages(np.array([1.0, 0.0, 0.0, 0.0]))
    expected_K = np.array([0.75, -0.25, -0.25, -0.25]) / (0.5 + 1e-4)
    np.testing.assert_allclose(advantages_K, expected_K, rtol=1e-12)


def test_without_deviation_is_dr_grpo() -> None:
    advantages_K = group_advantages(np.array([1.0, 1.0, 0.0, 0.0]), std=False)
    assert advantages_K.tolist() == [0.5, 0.5, -0.5, -0.5]


@given(st.floats(-1e6, 1e6), st.integers(2, 9))
def test_equal_rewards_give_exactly_zero(value: float, count: int) -> None:
    assert group_advantages(np.full(count, value)).tolist() == [0.0] * count


def test_one_reward_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        group_advantages(np.array([1.0]))
