import torch

from cropi.functional.influence import influence, mean_direction


def test_dot_and_cosine_by_hand() -> None:
    feature_D = torch.tensor([3.0, 4.0])
    directions_VD = torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.0, 0.0]])
    assert influence(feature_D, directions_VD, "dot").tolist() == [3.0, -8.0, 0.0]
    torch.testing.assert_close(
        influence(feature_D, directions_VD, "cosine"), torch.tensor([0.6, -0.8, 0.0], dtype=torch.float64)
    )


def test_a_zero_gradient_has_no_influence_not_nan() -> None:
    assert influence(torch.zeros(2), torch.ones(1, 2), "cosine").tolist() == [0.0]


def test_plain_mean_is_linear_and_the_normalised_mean_is_not() -> None:
    features_MD = torch.tensor([[2.0, 0.0], [0.0, 8.0], [0.0, 0.0]])
    assert mean_direction(features_MD, "plain").tolist() == [2 / 3, 8 / 3]
    assert mean_direction(features_MD, "normalized").tolist() == [1 / 3, 1 / 3]
    one_by_one = torch.stack([influence(torch.tensor([1.0, 2.0]), row[None])[0] for row in features_MD]).mean()
    together = influence(torch.tensor([1.0, 2.0]), mean_direction(features_MD)[None])[0]
    torch.testing.assert_close(one_by_one, together)
