"""Beliefs about influence and rewards against the exact Gaussian process, and by hand."""

from __future__ import annotations

import numpy as np
import pytest

from cropi.curriculum.belief import (
    CORRELATIONS,
    HALF_LIFE,
    OWN_SHARES,
    SPREADS,
    InfluenceBelief,
    Posterior,
    kernel_features,
    likeness,
)
from cropi.curriculum.reward_belief import RewardBelief


def drawn_points(pool: int = 12, validation: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((pool + validation, 3))


def believing(features: np.ndarray, pool: int) -> InfluenceBelief:
    return InfluenceBelief(features[:pool], features[pool:], np.zeros(len(features)))


def test_one_observation_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cropi.curriculum.belief.SPREADS", (1.0,))
    monkeypatch.setattr("cropi.curriculum.belief.OWN_SHARES", (0.5,))
    belief = InfluenceBelief(np.array([[1.0], [2.0]]), np.empty((0, 1)), np.zeros(2))
    belief.observe(0, slope=2.0, squared_error=1.0, step=0)
    found = belief.posterior()
    # spread: 2^2 - 1 = 3; tau = 1.5. y = 1 w + u + e: w given y is N(2 x 3 / (3 + 1.5 + 1), 3 - 9 / 5.5)
    assert found.chosen.spread == 3
    assert found.mean_F[0] == pytest.approx(6 / 5.5)
    assert found.root_FF[0, 0] ** 2 == pytest.approx(3 - 9 / 5.5)
    # u given y is 2 x 1.5 / 5.5, so that f_0 = 6 / 5.5 + 3 / 5.5; the other prompt has no own part
    assert found.means() == pytest.approx([9 / 5.5, 12 / 5.5])
    # var f_0 = 4.5 - 4.5^2 / 5.5; var f_1 = 4 var w + tau
    assert found.variances() == pytest.approx([4.5 - 4.5**2 / 5.5, 4 * (3 - 9 / 5.5) + 1.5])


def test_likeness_is_expected_to_help_and_learned_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cropi.curriculum.belief.SPREADS", (1.0,))
    monkeypatch.setattr("cropi.curriculum.belief.OWN_SHARES", (0.5,))
    belief = InfluenceBelief(np.zeros((2, 1)), np.empty((0, 1)), np.array([1.0, 2.0]))
    belief.observe(0, slope=2.0, squared_error=1.0, step=0)
    found = belief.posterior()
    # scale: 2^2 - 1 = 3. Weight of likeness before: N(sqrt(3) / 8, 3 / 64). Own variance: 3 (1/2 + 1), as x = 0
    gain = 3 / 64 / (3 / 64 + 4.5 + 1)
    assert found.mean_F[1] == pytest.approx(3**0.5 / 8 + gain * (2 - 3**0.5 / 8))
    assert found.root_FF[1, 1] ** 2 == pytest.approx(3 / 64 * (1 - gain))
    assert found.means()[1] == pytest.approx(2 * found.mean_F[1])


def test_evidence_counts_as_far_as_both_halves_of_the_direction_agree() -> None:
    """Both halves say the same of points 0 and 1; of 2 and 3 they disagree, however often they are seen."""
    features, halves = np.eye(4), np.array([[2.0, 2.0], [2.0, 2.0], [1.0, -1.0], [1.0, -1.0]])
    found = {}
    for name, points in (("same", [0, 1]), ("opposite", [2, 3]), ("both", [0, 1, 2, 3])):
        belief = believing(features, 4)
        for n in range(200):
            first, second = halves[points[n % len(points)]]
            mean, half_difference = (first + second) / 2, (first - second) / 2
            noise = 0.1 * (-1) ** (n // 4)
            belief.observe(points[n % len(points)], mean + noise, 0.01 + half_difference**2, 0, half_difference)
        posterior = belief.posterior()
        found[name] = posterior
    assert found["same"].reliability == 1
    assert found["opposite"].reliability == 0
    assert found["opposite"].means() == pytest.approx(np.zeros(4))
    evidence, difference = found["both"], found["both"].difference_F[:4]
    raw = evidence.means() / evidence.reliability
    assert evidence.reliability == pytest.approx(1 - (found_squares(evidence) / (raw @ raw)))
    assert abs(difference[2]) > 10 * abs(difference[0])
    draws = np.stack([evidence.draw(np.random.default_rng(seed)) for seed in range(4000)])
    assert draws.std(axis=0) ** 2 == pytest.approx(evidence.variances(), rel=0.1)
    assert np.corrcoef(draws[:, 2], draws[:, 3])[0, 1] > 0.5  # the direction's error is one for all


def found_squares(posterior: Posterior) -> float:
    """|m'|^2 from the parts of a posterior."""
    common = posterior.features_NF @ posterior.difference_F
    differences = (1 - posterior.trust_N) * common + posterior.trust_N * posterior.seen_N2[:, 1]
    return float(differences @ differences)


def test_likeness_by_hand() -> None:
    pool = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    validation = np.array([[2.0, 0.0], [0.0, 3.0]])
    # cosines with the nearest: 1, 1, 0, 0; mean and deviation 1/2. The validation prompts are at right angles
    assert likeness(pool, validation).tolist() == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    # cosines 1, 0, 0, 0, 0: mean 0.2, deviation 0.4, so z = 2
    assert likeness(np.eye(5), np.eye(5)[:1])[:5] == pytest.approx([8, 0, 0, 0, 0])
    assert likeness(np.ones((3, 2)), validation).tolist() == [0.0] * 5


def exact(
    kernel: np.ndarray,
    pool: int,
    points: list[int],
    slopes: list[float],
    noise: list[float],
    s: float,
    own: float,
    rho: float,
) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean, covariance and log likelihood of the process itself, by brute force."""
    of_pool = np.arange(len(kernel)) < pool
    full = s * (kernel * np.where(of_pool[:, None] == of_pool, 1.0, rho) + own * np.eye(len(kernel)))
    seen = full[np.ix_(points, points)] + np.diag(noise)
    cross = full[:pool][:, points]
    y = np.array(slopes)
    inverse = np.linalg.inv(seen)
    log = -0.5 * (y @ inverse @ y + np.linalg.slogdet(seen)[1] + len(y) * np.log(2 * np.pi))
    return cross @ inverse @ y, full[:pool, :pool] - cross @ inverse @ cross.T, float(log)


def test_it_is_the_gaussian_process_of_its_kernel() -> None:
    """With features of full rank. Points are seen once each, so that the likelihood is that of the observations."""
    points_PE, pool = drawn_points(), 12
    features = kernel_features(points_PE, pool)
    kernel = features @ features.T
    generator = np.random.default_rng(1)
    points, errors = [0, 3, 5, 13, 16, 7], generator.uniform(0.5, 2, 6)
    slopes = (generator.standard_normal(6) * 3).tolist()
    belief = believing(features, pool)
    for point, slope, error in zip(points, slopes, errors, strict=True):
        belief.observe(point, slope, error, step=0)
    noise = [float(errors.mean())] * 6
    found = belief.posterior()

    def at(s: float, own: float, rho: float) -> tuple[np.ndarray, np.ndarray, float]:
        scale = max(np.square(slopes).mean() - noise[0], 0.1 * np.square(slopes).mean())
        return exact(kernel, pool, points, slopes, noise, s * scale, own, rho)

    best = max(((s, own, rho) for s in SPREADS for own in OWN_SHARES for rho in CORRELATIONS), key=lambda x: at(*x)[2])
    mean, covariance, log = at(*best)
    assert found.log_likelihood == pytest.approx(log)
    assert (found.chosen.own_share, found.chosen.correlation) == best[1:]
    np.testing.assert_allclose(found.means(), mean, atol=1e-6 * abs(mean).max())
    np.testing.assert_allclose(found.variances(), np.diag(covariance), rtol=1e-5)
    draws = np.stack([found.draw(np.random.default_rng(n)) for n in range(20_000)])
    np.testing.assert_allclose(np.cov(draws.T), covariance, atol=0.06 * covariance.max())
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.04 * covariance.max() ** 0.5)


def test_observations_of_one_point_combine_and_age() -> None:
    belief = believing(np.eye(2), 2)
    belief.observe(0, 4.0, 4.0, step=0)
    belief.observe(0, 1.0, 1.0, step=int(HALF_LIFE))  # by then the first counts half: their mean error is 3 / 1.5
    assert [values.tolist() for values in belief.summary()] == [[0], [[2.0, 0.0]], [2 / 1.5]]
    late = believing(np.eye(2), 2)
    late.observe(0, 1.0, 1.0, step=int(HALF_LIFE))
    late.observe(0, 4.0, 4.0, step=0)  # arrives late
    assert [values.tolist() for values in late.summary()] == [[0], [[2.0, 0.0]], [2 / 1.5]]
    belief.age_to(int(10.5 * HALF_LIFE))
    assert belief.summary()[1].tolist() == [[1.0, 0.0]]


def test_numbers_that_are_not_finite_are_left_out() -> None:
    belief = believing(np.eye(2), 2)
    assert not belief.observe(0, float("nan"), 1.0, step=0)
    assert not belief.observe(0, 1.0, float("inf"), step=0)
    assert belief.posterior() is None


def test_a_correlation_is_found_where_validation_prompts_mislead() -> None:
    """Pool prompts in the places of validation prompts have slopes unlike theirs, or like theirs."""
    generator = np.random.default_rng(0)
    base = generator.standard_normal((40, 3))
    features = kernel_features(np.concatenate([base, base]), pool=40)
    truth = features[:40] @ generator.standard_normal(features.shape[1])
    for sign, low, high in ((1.0, 0.9, 1.0), (-1.0, 0.3, 0.6)):
        belief = believing(features, 40)
        for n in range(40):
            belief.observe(n, truth[n] + 0.05 * generator.standard_normal(), 0.0025, step=0)
            belief.observe(40 + n, sign * truth[n] + 0.05 * generator.standard_normal(), 0.0025, step=0)
        found = belief.posterior()
        assert low <= found.chosen.correlation <= high


def test_rewards_by_hand() -> None:
    belief = RewardBelief(np.eye(3))
    belief.observe(0, np.array([1.0, 1.0, 1.0, 0.0]), step=0)
    # a point's own neighbourhood is itself: rate (3 + 0.0005) / (4 + 0.001); Beta(3 + 0.6, 1 + 0.2)
    assert belief.pass_rates()[0] == pytest.approx(3.6 / 4.8, abs=1e-3)
    assert belief.variances()[0] == pytest.approx(3.6 * 1.2 / (4.8 * 5.8), abs=1e-3)
    assert belief.pass_rates()[1] == pytest.approx(0.5)  # unlike anything seen: Beta(0.4, 0.4)
    assert belief.variances()[1] == pytest.approx(0.16 / (0.8 * 1.8))
    belief.age_to(16)  # two half-lives of a failure, one of a success
    assert belief.pass_rates()[0] == pytest.approx((1.5 + 0.6) / (1.5 + 0.6 + 0.25 + 0.2), abs=1e-3)


def test_expected_deviations_are_those_of_drawn_groups() -> None:
    belief, generator = RewardBelief(np.eye(4)), np.random.default_rng(0)
    for point, right in enumerate((0, 4, 7)):
        belief.observe(point, np.repeat([1.0, 0.0], [right, 8 - right]), step=0)
    for completions in (2, 8):
        a_P, b_P = belief._beta()
        right_DP = generator.binomial(completions, generator.beta(a_P, b_P, (200_000, 4)))
        variances_DP = right_DP * (completions - right_DP) / (completions * (completions - 1))
        assert belief.deviations(completions) == pytest.approx(np.sqrt(variances_DP).mean(0), rel=0.02, abs=1e-3)
    many = RewardBelief(np.eye(1))
    many.observe(0, np.array([0.0, 0.3, 1.0]), step=0)
    assert many.deviations(8) == pytest.approx(np.sqrt(many.variances()))


def test_graded_rewards_have_the_variance_that_groups_show() -> None:
    graded = RewardBelief(np.eye(1))
    graded.observe(0, np.array([0.4, 0.6]), step=0)  # variance 0.01 of at most 0.25
    verdicts = RewardBelief(np.eye(1))
    verdicts.observe(0, np.array([0.0, 1.0]), step=0)
    assert graded.variances()[0] == pytest.approx(0.04 * verdicts.variances()[0])


def test_verdicts_of_any_two_values_are_verdicts() -> None:
    plain, scaled = RewardBelief(np.eye(2)), RewardBelief(np.eye(2))
    for point, rewards in ((0, [0.0, 1.0, 1.0]), (1, [0.0, 0.0, 1.0])):
        plain.observe(point, np.array(rewards), step=0)
        scaled.observe(point, 4 * np.array(rewards) - 2, step=0)
    assert scaled.pass_rates() == pytest.approx(4 * plain.pass_rates() - 2)
    assert scaled.variances() == pytest.approx(16 * plain.variances())


def test_rewards_of_many_values_by_hand() -> None:
    belief = RewardBelief(np.eye(2))
    belief.observe(0, np.array([-1.0, 1.0, 3.0]), step=0)  # squares within the group: 4 + 0 + 4, of K - 1 = 2
    belief.observe(0, np.array([2.0, 2.0]), step=0)  # 0, of 1
    # mean 7 / 5, on the range from -1 to 3: 3 of 5 tries; Beta(3 + 0.8 x 0.6, 2 + 0.8 x 0.4)
    assert belief.pass_rates() == pytest.approx([-1 + 4 * 0.6, 1.0], abs=1e-3)
    assert belief.variances()[0] == pytest.approx((8 + 0.8 * 8 / 3) / (3 + 0.8), abs=1e-3)
    assert belief.variances()[1] == pytest.approx(8 / 3)  # unlike anything seen: as usual
    other = RewardBelief(np.eye(2))
    other.restore(belief.state())
    for each in (belief, other):
        each.observe(1, np.array([0.5, -4.0]), step=3)
    assert (other.variances() == belief.variances()).all()
    assert (other.pass_rates() == belief.pass_rates()).all()


def test_features_give_the_kernel_and_few_of_them_nearly() -> None:
    points = np.random.default_rng(0).standard_normal((300, 2))
    full = kernel_features(points, 250, 300)
    gaps = []
    for dimensions in (32, 64, 128):
        few = kernel_features(points, 250, dimensions)
        assert few.shape[1] <= dimensions
        gaps.append(np.linalg.norm(few @ few.T - full @ full.T) / np.linalg.norm(full @ full.T))
    assert np.diag(full @ full.T) == pytest.approx(1, abs=1e-5)
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.3
    assert np.isfinite(kernel_features(np.zeros((5, 2)), 4)).all()
    assert kernel_features(np.zeros((1, 2)), 1).shape == (1, 1)
