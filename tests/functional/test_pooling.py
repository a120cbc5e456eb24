"""Pooling over neighbours, against closed forms, brute force and simulated pools."""

import numpy as np
import pytest
from cropi.functional.pooling import (
    Cells,
    Observed,
    bandwidth_of,
    kernel,
    nearest_first,
    pooled_slopes,
    pooled_strengths,
    principal_points,
    trust_of,
    verdict_rates,
)

from cropi.functional import pooling

FAR = 1e6


def observed(
    places: np.ndarray,
    w: np.ndarray,
    s: np.ndarray,
    e: np.ndarray | None = None,
    guests: np.ndarray | None = None,
) -> Observed:
    """Without errors, unless they are given, and without guests."""
    return Observed(
        places,
        w,
        s,
        np.zeros_like(s) if e is None else e,
        np.zeros(len(w), dtype=bool) if guests is None else guests,
    )


def test_principal_points_keep_distances_up_to_one_scale() -> None:
    rows = np.random.default_rng(0).normal(size=(40, 5)) @ np.diag([3.0, 2.0, 1.0, 0.5, 0.1]) + 7
    points = principal_points(rows, dimensions=5)
    of_rows = np.linalg.norm(rows[:, None] - rows[None], axis=-1)
    of_points = np.linalg.norm(points[:, None] - points[None], axis=-1)
    scale = of_rows[0, 1] / of_points[0, 1]
    np.testing.assert_allclose(of_points * scale, of_rows, atol=1e-8)
    assert (points**2).sum(axis=1).mean() == pytest.approx(1.0)
    # the first two directions carry the most, so dropping the others changes least
    assert np.var(principal_points(rows, dimensions=2), axis=0).sum() > 0.95


def test_principal_points_by_blocks_and_parts_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(1).normal(size=(40, 5)).astype(np.float32)
    whole = principal_points(rows.astype(np.float64), dimensions=3)
    monkeypatch.setattr(pooling, "POINTS", 7)
    parts = principal_points(rows[:25], rows[25:], dimensions=3)
    np.testing.assert_allclose(parts @ parts.T, whole @ whole.T, atol=1e-12)


def test_the_nearest_to_each_set_take_turns() -> None:
    places = np.array([[0.0], [1.0], [2.0], [3.0], [9.0], [20.0]])
    #  set a at 0.9: rows 1, 0, 2, 3, 4, 5;  set b at 8 and 21: rows 4 and 5 (1 away each, the first first), 3, 2, 1, 0
    validation = np.array([[0.9], [8.0], [21.0]])
    assert nearest_first(places, validation, ["a", "b", "b"]).tolist() == [1, 4, 0, 5, 2, 3]
    assert nearest_first(places, validation[:1], ["a"]).tolist() == [1, 0, 2, 3, 4, 5]


def test_principal_points_of_equal_rows_are_all_zero() -> None:
    np.testing.assert_array_equal(principal_points(np.ones((4, 3))), np.zeros((4, 3)))


@pytest.mark.parametrize("usual", [True, False])
def test_bandwidth_is_the_usual_one_unless_another_tells_better(*, usual: bool) -> None:
    """By brute force: every prompt's influence told by the others, written out. Noise alone asks for a broad one."""
    places, w, _, s, _ = clusters(3)
    s = s[:, :1] if usual else np.random.default_rng(0).normal(size=(len(w), 1))
    apart = np.linalg.norm(places[:, None] - places[None], axis=-1)
    np.fill_diagonal(apart, np.inf)
    unit, losses = np.median(apart.min(axis=1)), []
    pool, prior = (w @ s[:, 0]) / (w @ w), np.mean(w**2)
    for multiple in pooling.BANDWIDTHS:
        errors = []
        for j in range(len(w)):
            k = np.exp(-(apart[j] ** 2) / (2 * (multiple * unit) ** 2))
            f = (np.sum(k * w * s[:, 0]) + prior * pool) / (np.sum(k * w**2) + prior)
            errors.append((s[j, 0] - w[j] * f) ** 2)
        losses.append(np.array(errors))
    better = [losses[0] - loss for loss in losses]
    gains = [d.mean() if d.mean() > d.std(ddof=1) / np.sqrt(len(d)) else 0.0 for d in better]
    assert (max(gains) == 0.0) == usual
    assert bandwidth_of(observed(places, w, s)) == pytest.approx(unit * pooling.BANDWIDTHS[int(np.argmax(gains))])


def test_bandwidth_of_equal_places_and_of_many_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bandwidth_of(observed(np.zeros((3, 2)), np.ones(3), np.ones((3, 1)))) == 1.0
    places, w, _, s, _ = clusters(3)
    monkeypatch.setattr(pooling, "BLOCK", 200)
    assert bandwidth_of(observed(places, w, s)) == bandwidth_of(observed(places[::2], w[::2], s[::2]))


@pytest.mark.parametrize(("agreement", "trusted"), [(1.0, True), (-1.0, False)])
def test_guests_are_trusted_as_far_as_the_pool_bears_them_out(agreement: float, *, trusted: bool) -> None:
    """Guests in the same places as the pool's prompts, which tell the same or the contrary."""
    places, w, _, s, _ = clusters(3, wrong=0.0)
    guests = np.arange(len(w)) % 2 == 1
    s[guests] *= agreement
    trust = trust_of(observed(places, w, s, guests=guests))[0]
    assert trust == 1.0 if trusted else trust <= 0.1


def test_guests_far_away_are_trusted_for_want_of_a_reason_not_to() -> None:
    places, w, _, s, _ = clusters(3)
    guests = np.arange(len(w)) < 80  # the two useful kinds, like nothing in the rest of the pool
    seen = observed(places, w, s, guests=guests)
    assert trust_of(seen) == (1.0, bandwidth_of(seen))


def test_without_a_pool_guests_are_trusted() -> None:
    guests = np.array([False, True, True])
    seen = observed(np.eye(3), np.ones(3), np.ones((3, 1)), guests=guests)
    assert trust_of(seen) == (1.0, bandwidth_of(seen))


def test_kernel_by_hand() -> None:
    found = kernel(np.array([[0.0, 0.0]]), np.array([[0.0, 0.0], [3.0, 4.0]]), 5.0)
    np.testing.assert_allclose(found, [[1.0, np.exp(-0.5)]])


def test_a_prompt_far_from_all_others_has_the_slope_of_the_pool() -> None:
    strengths, influence = np.array([0.25, 0.2]), np.array([[0.5], [0.1]])
    found = pooled_slopes(
        np.array([[FAR]]),
        observed(np.array([[0.0], [1.0]]), strengths, influence, np.full((2, 1), 0.1)),
        np.array([-1]),
        1.0,
    )
    assert found.values_NV[0, 0] == pytest.approx((0.25 * 0.5 + 0.2 * 0.1) / (0.25**2 + 0.2**2))


def test_guests_say_nothing_of_the_pool() -> None:
    """Far from all, the slope and its error are the pool's own, whatever guests there are."""
    places, w, _, s, e = clusters(2)
    guests = np.arange(len(w)) >= 300
    far, own = np.full((1, 8), FAR), np.array([-1])
    alone = pooled_slopes(far, observed(places[:300], w[:300], s[:300], e[:300]), own, 1.0)
    beside = pooled_slopes(far, observed(places, w, s, e, guests), own, 1.0)
    np.testing.assert_allclose(beside.values_NV, alone.values_NV)
    np.testing.assert_allclose(beside.errors_NV, alone.errors_NV)


def test_trust_is_a_weight_on_every_guest() -> None:
    """Half the trust in two guests that tell the same is full trust in one."""
    places, w, _, s, e = clusters(2)
    one = np.arange(400)
    twice = np.concatenate([one, one[300:]])
    halved = observed(places[twice], w[twice], s[twice], e[twice], twice >= 300).trusting(0.5)
    whole = observed(places, w, s, e, one >= 300)
    found, expected = (pooled_slopes(places, by, np.full(400, -1), 1.0) for by in (halved, whole))
    np.testing.assert_allclose(found.values_NV, expected.values_NV)


def test_slopes_by_hand() -> None:
    # Two observed prompts in one place, weights 1, strengths 0.2 and 0.1; prior weight (0.04 + 0.01) / 2 = 0.025.
    w, s, e = np.array([0.2, 0.1]), np.array([[0.4], [0.05]]), np.array([[0.1], [0.05]])
    pool = (0.2 * 0.4 + 0.1 * 0.05) / 0.05  # 1.7
    f = (0.085 + 0.025 * pool) / (0.05 + 0.025)  # 1.7 as well: the pool is the neighbourhood
    assert f == pytest.approx(1.7)
    residuals = (0.4 - 0.34) ** 2 + (0.05 - 0.17) ** 2  # 0.018
    noise = 0.01 + 0.0025
    spread_of_pool = (residuals - noise) / 0.05  # 0.11
    spread = (residuals - noise + 0.025 * spread_of_pool) / 0.075
    per_strength = noise / 0.05
    first_noise = 0.25 * 0.01 + 0.75 * per_strength * 0.04
    gain = spread * 0.04 / (spread * 0.04 + first_noise)
    found = pooled_slopes(np.zeros((1, 1)), observed(np.zeros((2, 1)), w, s, e), np.array([0]), 1.0)
    assert found.values_NV[0, 0] == pytest.approx(1.7 + gain * (0.4 / 0.2 - 1.7))


def test_error_of_a_neighbourhood_is_that_of_its_mean() -> None:
    """Prompts of one kind, drawn anew: f moves from draw to draw by what its error says."""
    generator, found = np.random.default_rng(5), []
    for _ in range(400):
        slope, w = 2.0 + 0.5 * generator.normal(size=50), generator.uniform(0.1, 0.25, 50)
        s = (w * slope + 0.1 * generator.normal(size=50))[:, None]
        found.append(
            pooled_slopes(
                np.zeros((1, 1)), observed(np.zeros((50, 1)), w, s, np.full((50, 1), 0.1)), np.array([-1]), 1.0
            )
        )
    spread = np.std([one.values_NV[0, 0] for one in found])
    assert np.mean([one.smooth_errors_NV[0, 0] for one in found]) == pytest.approx(spread, rel=0.15)


def test_groups_without_strength_tell_nothing() -> None:
    generator = np.random.default_rng(1)
    places, w = generator.normal(size=(6, 2)), np.array([0.2, 0.1, 0.25, 0.2, 0.0, 0.0])
    s, e = generator.normal(size=(6, 2)) * (w[:, None] > 0), np.full((6, 2), 0.1) * (w[:, None] > 0)
    own = np.arange(6)
    with_them = pooled_slopes(places, observed(places, w, s, e), own, 1.0)
    without = pooled_slopes(places, observed(places[:4], w[:4], s[:4], e[:4]), np.array([0, 1, 2, 3, -1, -1]), 1.0)
    np.testing.assert_allclose(with_them.values_NV, without.values_NV)
    np.testing.assert_allclose(with_them.errors_NV, without.errors_NV)
    with pytest.raises(ValueError, match="no observed prompt has any strength"):
        pooled_slopes(places, observed(places, np.zeros(6), s, e), own, 1.0)


@pytest.mark.parametrize("together", [3, 6, 12])
def test_prompts_in_one_place_are_one_cell(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A third as many cells as prompts: where prompts share places, nothing is lost; of empty cells none is left."""
    generator = np.random.default_rng(3)
    places = np.repeat(generator.normal(size=(36 // together, 2)), together, axis=0)
    w, s, e = generator.uniform(0.05, 0.25, 36), generator.normal(size=(36, 2)), generator.uniform(0.1, 0.5, (36, 2))
    own, tries = np.arange(36), generator.integers(4, 9, 36).astype(float)
    slopes = pooled_slopes(places, observed(places, w, s, e), own, 1.0)
    strengths = pooled_strengths(places, places, 0.3 * tries, tries, own, 1.0, 2.0)
    monkeypatch.setattr(pooling, "CELLS", 12)
    cells = Cells.of(places)
    assert len(cells.places_CE) == min(12, 36 // together)
    np.testing.assert_allclose(cells.sums(np.ones(36)), np.full(len(cells.places_CE), 36 / len(cells.places_CE)))
    found = pooled_slopes(places, observed(places, w, s, e), own, 1.0)
    np.testing.assert_allclose(found.values_NV, slopes.values_NV)
    np.testing.assert_allclose(found.errors_NV, slopes.errors_NV)
    np.testing.assert_allclose(found.smooth_errors_NV, slopes.smooth_errors_NV)
    np.testing.assert_allclose(pooled_strengths(places, places, 0.3 * tries, tries, own, 1.0, 2.0), strengths)


def test_an_eighth_as_many_cells_as_prompts_tell_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    places, w, _, s, e = clusters(4)
    bandwidth = bandwidth_of(observed(places, w, s, e))
    whole = pooled_slopes(places, observed(places, w, s, e), np.arange(400), bandwidth)
    monkeypatch.setattr(pooling, "CELLS", 50)
    found = pooled_slopes(places, observed(places, w, s, e), np.arange(400), bandwidth)
    assert not np.array_equal(found.values_NV, whole.values_NV)
    assert np.corrcoef(found.values_NV[:, 0], whole.values_NV[:, 0])[0, 1] > 0.99


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(2)
    places, w = generator.normal(size=(30, 3)), generator.uniform(0.05, 0.25, 30)
    s, e = generator.normal(size=(30, 2)), generator.uniform(0.1, 0.5, (30, 2))
    arguments = (places, observed(places, w, s, e), np.arange(30), 0.8)
    whole = pooled_slopes(*arguments)
    monkeypatch.setattr(pooling, "BLOCK", 7)
    parts = pooled_slopes(*arguments)
    np.testing.assert_allclose(parts.values_NV, whole.values_NV)
    np.testing.assert_allclose(parts.errors_NV, whole.errors_NV)


def clusters(seed: int, noise: float = 0.25, wrong: float = 0.5) -> tuple[np.ndarray, ...]:
    """A pool of ten kinds of prompts, two of them of use; a share of these has wrong labels and does harm."""
    generator = np.random.default_rng(seed)
    kind = np.repeat(np.arange(10), 40)
    places = generator.normal(size=(10, 8))[kind] + 0.15 * generator.normal(size=(400, 8))
    right = generator.random(400) >= wrong
    slope = np.where(kind < 2, np.where(right, 4.0, -1.0), 0.0) + 0.2 * generator.normal(size=400)
    w = generator.uniform(0.1, 0.25, 400)
    influence = w * slope + noise * generator.normal(size=400)
    return places, w, slope, influence[:, None], np.full((400, 1), noise)


def test_posterior_beats_raw_scores_and_neighbours_alone() -> None:
    raw_error = alone_error = posterior_error = 0.0
    for seed in range(5):
        places, w, slope, s, e = clusters(seed)
        bandwidth, own = bandwidth_of(observed(places, w, s)), np.arange(400)
        posterior = pooled_slopes(places, observed(places, w, s, e), own, bandwidth).values_NV[:, 0]
        alone = pooled_slopes(places, observed(places, w, s, e), np.full(400, -1), bandwidth).values_NV[:, 0]
        raw_error += np.mean((s[:, 0] / w - slope) ** 2)
        alone_error += np.mean((alone - slope) ** 2)
        posterior_error += np.mean((posterior - slope) ** 2)
    assert posterior_error < 0.5 * raw_error
    assert posterior_error < 0.8 * alone_error


def test_posterior_covers_the_truth() -> None:
    inside, widths, alone = [], [], []
    for seed in range(5):
        places, w, slope, s, e = clusters(seed)
        found = pooled_slopes(places, observed(places, w, s, e), np.arange(400), bandwidth_of(observed(places, w, s)))
        inside.append(np.abs(found.values_NV[:, 0] - slope) < 1.96 * found.errors_NV[:, 0])
        widths.append(found.errors_NV.mean())
        alone.append((e[:, 0] / w).mean())
    assert np.mean(inside) > 0.9
    assert np.mean(widths) < 0.8 * np.mean(alone)  # and not by saying nothing


def test_prompts_never_sampled_are_told_by_their_neighbours() -> None:
    places, w, _, s, e = clusters(0, wrong=0.0)
    seen = np.arange(0, 400, 4)
    bandwidth = bandwidth_of(observed(places[seen], w[seen], s[seen]))
    found = pooled_slopes(places, observed(places[seen], w[seen], s[seen], e[seen]), np.full(400, -1), bandwidth)
    top = np.argsort(-found.values_NV[:, 0])[:80]
    assert (top < 80).mean() > 0.95  # the two kinds of use


def test_verdict_rates_vary_as_the_rewards_do() -> None:
    means_N, variances_N = np.array([0.7, 0.5, 0.4, 0.4, np.nan]), np.array([0.09, 0.0, 0.0, 0.16, np.nan])
    found_N = verdict_rates(means_N, variances_N)
    np.testing.assert_allclose(found_N, [0.9, 1.0, 0.0, 0.2, np.nan])
    p_N = np.arange(8) / 7
    assert verdict_rates(p_N, p_N * (1 - p_N)).tolist() == p_N.tolist()  # to the bit


def test_strengths_by_hand() -> None:
    # One prompt with 3 of 8, one neighbour in the same place with 6 of 8, one untried prompt there too.
    pool = 9 / 16
    rate = (9 + 8 * pool) / (16 + 8)
    a, b = 3 + 2 * rate, 5 + 2 * (1 - rate)
    places, tried = np.zeros((3, 1)), np.zeros((2, 1))
    means, strengths = pooled_strengths(
        places, tried, np.array([3.0, 6.0]), np.array([8.0, 8.0]), np.array([0, 1, -1]), 1.0, prior=2.0
    )
    assert means[0] == pytest.approx(a / 10)
    assert strengths[0] == pytest.approx(a * b / (10 * 11))
    assert means[2] == pytest.approx(rate)
    assert strengths[2] == pytest.approx(rate * (1 - rate) * 4 / (2 * 3))


def test_strength_is_the_expectation_over_the_beta_posterior() -> None:
    place = np.zeros((1, 1))
    _, strengths = pooled_strengths(place, place, np.array([2.0]), np.array([8.0]), np.array([0]), 1.0, prior=4.0)
    rate = 2 / 8
    draws = np.random.default_rng(0).beta(2 + 4 * rate, 6 + 4 * (1 - rate), 400_000)
    assert strengths[0] == pytest.approx(np.mean(draws * (1 - draws)), rel=2e-3)
