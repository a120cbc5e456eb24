"""Pooled influence as a strategy: whom it chooses, when it lets go, and what it leaves alone."""

import dataclasses
from typing import Any

import numpy as np
import pytest
from tests.curriculum.pool import FUSION, pool, scores

from cropi.console import warn_once
from cropi.curriculum.choose import choose, selection_table
from cropi.curriculum.pooling_data import PoolingData
from cropi.curriculum.strategies.pooled import PooledStrategy, _agreement, _shares
from cropi.curriculum.strategy import Candidates, Ranking
from cropi.functional import pooling
from cropi.reward_statistics import Visit

KINDS, EACH, SEEN = 5, 20, 5  # kinds of prompts; prompts of each; of these with trajectories
USEFUL, NEUTRAL, HARMFUL, SECOND = 0, 1, 3, 4
SLOPES = np.array([[3.0, 0.0], [0.0, 0.0], [0.0, 0.0], [-8.0, 0.0], [0.0, 2.0]])  # by kind and validation set
KIND = np.repeat(np.arange(KINDS), EACH)
STRATEGY = PooledStrategy(type="pooled")


def candidates(noise: float = 0.05, slopes: np.ndarray = SLOPES, **facts: Any) -> Candidates:
    """A hundred prompts of five kinds, a quarter of them sampled, and eight validation prompts for each of two sets."""
    generator = np.random.default_rng(0)
    centres = 4 * generator.normal(size=(KINDS, 6))
    seen = np.tile(np.arange(EACH) < SEEN, KINDS)
    p = np.where(seen, generator.choice([0.25, 0.375, 0.5, 0.625], size=len(KIND)), np.nan)
    w = np.where(seen, np.nan_to_num(p * (1 - p)) * 8 / 7, 0.0)
    owners = np.repeat([USEFUL, SECOND], 8)
    p_M = generator.choice([0.375, 0.5], size=16)
    w_M = p_M * (1 - p_M) * 16 / 15
    pooling = PoolingData(
        names=("one", "two"),
        representations_NE=centres[KIND] + 0.1 * generator.normal(size=(len(KIND), 6)),
        tries_N=np.where(seen, 8.0, 0.0),
        tried_at_N=np.zeros(len(KIND)),
        strengths_N=w,
        influence_NV=w[:, None] * slopes[KIND] + noise * generator.normal(size=(len(KIND), 2)) * seen[:, None],
        errors_NV=np.full((len(KIND), 2), noise) * seen[:, None],
        validation_sets=["one"] * 8 + ["two"] * 8,
        validation_ME=centres[owners] + 0.1 * generator.normal(size=(16, 6)),
        validation_tries_M=np.full(16, 16.0),
        validation_tried_at=0.0,
        validation_pass_rates_M=p_M,
        validation_variances_M=p_M * (1 - p_M),
        validation_strengths_M=w_M,
        validation_influence_MV=w_M[:, None] * slopes[owners] + noise * generator.normal(size=(16, 2)),
        validation_errors_MV=np.full((16, 2), noise),
    )
    plain = pool([0.5] * len(KIND))
    statuses = ["ok" if one else "not_sampled" for one in seen]
    return dataclasses.replace(
        plain, statuses=statuses, pass_rates_N=p, variances_N=p * (1 - p), pooling=pooling, **facts
    )


def rank(found: Candidates, size: int = 40) -> Ranking:
    return STRATEGY.rank(found, size, FUSION)


def kinds(found: Candidates, size: int = 40) -> dict[int, int]:
    """How many prompts of each kind are chosen."""
    ranking = rank(found, size)
    rows = selection_table(found, ranking, choose(found, ranking, size)).to_pylist()
    kind_of = dict(zip(found.prompt_ids, KIND.tolist(), strict=True))
    chosen = [kind_of[row["prompt_id"]] for row in rows if row["selected"]]
    return {kind: chosen.count(kind) for kind in range(KINDS)}


def visits(pool: Candidates, kind: int, mean: float, step: int) -> list[Visit]:
    """Training has seen every prompt of a kind, with this mean reward."""
    return [Visit(step, i, mean, 8, mean * (1 - mean)) for i, k in zip(pool.prompt_ids, KIND, strict=True) if k == kind]


def test_prompts_never_sampled_are_chosen_by_their_kind() -> None:
    assert kinds(candidates()) == {USEFUL: EACH, NEUTRAL: 0, 2: 0, HARMFUL: 0, SECOND: EACH}


def test_grades_count_by_how_much_they_vary() -> None:
    """Nothing is followed, so all are drawn by learnability; the neutral kind earns 1/2 on average."""
    found = candidates(slopes=np.zeros_like(SLOPES))
    neutral_N = (KIND == NEUTRAL) & ~np.isnan(found.pass_rates_N)
    means_N = np.where(neutral_N, 0.5, found.pass_rates_N)

    def drawn(variance: float) -> int:
        variances_N = np.where(neutral_N, variance, found.variances_N)
        graded = dataclasses.replace(found, pass_rates_N=means_N, variances_N=variances_N)
        return sum(kinds(dataclasses.replace(graded, seed=seed), size=20)[NEUTRAL] for seed in range(20))

    assert drawn(0.25) > 1.5 * drawn(0.0)


def test_the_manifest_is_told_what_decided() -> None:
    facts = rank(candidates()).facts
    assert (facts["helpful"], facts["chosen_as_helpful"], facts["drawn_beside_them"]) == (2 * EACH, 2 * EACH, 0)
    assert (facts["harmful"], facts["trust_in_validation_prompts"]) == (EACH, 1.0)
    assert facts["left_to_learn"] == {"one": 1.0, "two": 1.0}
    assert facts["bandwidth"] > 0


def test_a_direction_on_which_the_validation_prompts_do_not_agree_chooses_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    warn_once.cache_clear()
    found = candidates()
    assert found.pooling is not None
    influence_MV = found.pooling.validation_influence_MV.copy()
    influence_MV[:8, 0] = [0.5, -0.5, 0.4, -0.4, 0.6, -0.6, 0.1, -0.1]  # mean 0 in set one
    noise = dataclasses.replace(found.pooling, validation_influence_MV=influence_MV)
    chosen = kinds(dataclasses.replace(found, pooling=noise), size=EACH)
    assert chosen == {USEFUL: 0, NEUTRAL: 0, 2: 0, HARMFUL: 0, SECOND: EACH}
    told = capsys.readouterr().err
    assert "validation set one is ignored: its prompts do not help one another (0.0 standard errors" in told
    assert "set two" not in told
    influence_MV[8:, 1] = influence_MV[:8, 0]  # and in set two: drawn by learnability from all kinds
    nothing = dataclasses.replace(found.pooling, validation_influence_MV=influence_MV)
    facts = rank(dataclasses.replace(found, pooling=nothing)).facts
    assert facts["agreement"] == {"one": 0.0, "two": 0.0}
    assert (facts["helpful"], facts["harmful"], facts["drawn_beside_them"]) == (0, 0, 40)


def test_agreement_is_the_mean_influence_within_a_set_in_standard_errors() -> None:
    found = candidates().pooling
    assert found is not None
    influence_MV = found.validation_influence_MV.copy()
    influence_MV[:8, 0] = [1, 2, 3, 4, 5, 6, 7, 8]  # mean 4.5, variance 6, standard error sqrt(6 / 8)
    agreement_V = _agreement(dataclasses.replace(found, validation_influence_MV=influence_MV))
    assert agreement_V[0] == pytest.approx(4.5 / 0.75**0.5)
    one = dataclasses.replace(found, validation_sets=["one"] + ["two"] * 15)
    assert np.isnan(_agreement(one)[0])


def test_no_more_than_a_block_of_the_kernel_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, rows = rank(candidates()), []

    def squares(first_NE: np.ndarray, second_OE: np.ndarray) -> np.ndarray:
        rows.append(len(first_NE))
        return original(first_NE, second_OE)

    original = pooling._squares
    monkeypatch.setattr(pooling, "_squares", squares)
    monkeypatch.setattr(pooling, "BLOCK", 60)  # a hundred prompts, of which with the validation prompts 41 are observed
    parts = rank(candidates())
    assert max(rows) == 60
    np.testing.assert_allclose(parts.scores_N, whole.scores_N)
    np.testing.assert_array_equal(parts.eligible_N, whole.eligible_N)


def test_a_rare_skill_is_not_diluted_up_to_the_fraction() -> None:
    """Seventy places, forty useful prompts: the others stay empty as long as these are not learned."""
    assert sum(kinds(candidates(), size=70).values()) == 2 * EACH


def test_what_is_learned_makes_room_and_harm_is_left_out() -> None:
    fresh = candidates(stage=3, steps_per_stage=16)
    seen = [*visits(fresh, SECOND, 1.0, 40), *visits(fresh, SECOND, 1.0, 47), *visits(fresh, USEFUL, 0.88, 47)]
    found = kinds(dataclasses.replace(fresh, visits=seen), size=60)
    assert found[SECOND] < found[USEFUL]
    assert found[NEUTRAL] + found[2] > 0
    assert found[HARMFUL] == 0


def test_places_by_hand() -> None:
    """Eight prompts that give all they gave, of ten places; the same at a quarter of the headroom; at half the gain."""
    gain_C = np.full(8, 0.5)
    assert _shares(gain_C, gain_C, 10, room=1.0) == (8, 0)
    assert _shares(gain_C, gain_C, 10, room=0.25) == (2, 8)
    assert _shares(gain_C, 2 * gain_C, 10, room=0.9) == (5, 5)
    assert _shares(gain_C[:2], gain_C[:2], 10, room=0.25) == (2, 6)
    assert _shares(gain_C, gain_C, 10, room=0.0) == (1, 9)
    assert _shares(gain_C[:0], gain_C[:0], 10, room=1.0) == (0, 10)


def test_headroom_is_that_of_the_set_that_has_learned_least() -> None:
    fresh = candidates(stage=3, steps_per_stage=16)

    def headroom(useful: float, second: float) -> float:
        rates = ((USEFUL, useful), (SECOND, second))
        seen = [visit for kind, mean in rates for step in (40, 44, 47) for visit in visits(fresh, kind, mean, step)]
        return float(rank(dataclasses.replace(fresh, visits=seen)).facts["headroom"])

    assert headroom(0.4, 0.9) == pytest.approx(headroom(0.9, 0.4), abs=0.1)
    assert headroom(0.4, 0.9) > 0.9
    assert headroom(0.9, 0.9) < 0.4


def test_where_nothing_is_helpful_nothing_is_left_out_as_harmful() -> None:
    """Both useful kinds are gone from the evidence; what is left only hurts."""
    slopes = np.where(SLOPES > 0, -1.0, SLOPES)
    found = kinds(candidates(slopes=slopes), size=60)
    assert found[HARMFUL] > 0
    assert sum(found.values()) == 60


def test_when_all_is_learned_nothing_is_harmful_any_more() -> None:
    """The direction that the harmful kind opposes has next to no length left."""
    fresh = candidates(slopes=np.where(SLOPES < 0, -2.0, SLOPES), stage=3, steps_per_stage=16)
    seen = [visit for kind in (USEFUL, SECOND) for step in (40, 47) for visit in visits(fresh, kind, 1.0, step)]
    found = kinds(dataclasses.replace(fresh, visits=seen), size=60)
    assert found[HARMFUL] > 0
    assert found[NEUTRAL] + found[2] > found[USEFUL] + found[SECOND]


def test_harm_that_is_hardly_ever_rewarded_now_is_still_left_out() -> None:
    """Prompts paid for a habit that the policy has lost would bring it back."""
    fresh = candidates(stage=3, steps_per_stage=16)
    seen = [*visits(fresh, SECOND, 1.0, 40), *visits(fresh, SECOND, 1.0, 47), *visits(fresh, HARMFUL, 0.01, 47)]
    assert kinds(dataclasses.replace(fresh, visits=seen), size=90)[HARMFUL] == 0


def test_old_tries_are_forgotten() -> None:
    """The same visits, long ago: the useful prompts are no longer known to be solved."""
    late = candidates(stage=20, steps_per_stage=16)
    just, long_ago = (
        kinds(dataclasses.replace(late, visits=visits(late, USEFUL, 1.0, step)), size=40)[USEFUL] for step in (319, 3)
    )
    assert just < 5
    assert long_ago > 2 * just


def test_a_prompts_own_influence_counts_beside_its_neighbours() -> None:
    """One of the sampled useful prompts has a wrong label: its influence points the other way."""
    found = candidates()
    assert found.pooling is not None
    influence_NV = found.pooling.influence_NV.copy()
    influence_NV[0, 0] *= -1
    pooling = dataclasses.replace(found.pooling, influence_NV=influence_NV)
    wrong = dataclasses.replace(found, pooling=pooling)
    own = scores(STRATEGY, wrong)[:SEEN]
    assert own[0] == own.min()


def test_noise_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Influence far below its error: nobody is helpful, so the places go to learnable prompts of every kind."""
    found = candidates()
    assert found.pooling is not None
    generator = np.random.default_rng(1)
    seen = found.pooling.strengths_N > 0
    silent = dataclasses.replace(
        found.pooling,
        influence_NV=0.01 * generator.normal(size=(len(KIND), 2)) * seen[:, None],
        validation_influence_MV=0.01 * generator.normal(size=(16, 2)),
        errors_NV=np.full((len(KIND), 2), 1.0) * seen[:, None],
        validation_errors_MV=np.full((16, 2), 1.0),
    )
    monkeypatch.setattr("cropi.curriculum.strategies.pooled.SIGNIFICANCE", 3.0)
    chosen = kinds(dataclasses.replace(found, pooling=silent), size=50)
    assert all(count > 0 for count in chosen.values())


def test_sets_that_pull_apart_share_the_places() -> None:
    """Each kind serves its own set and hurts the other."""
    apart = SLOPES.copy()
    apart[USEFUL], apart[SECOND] = [3.0, -1.5], [-0.2, 3.0]
    assert kinds(candidates(slopes=apart), size=16) == {USEFUL: 8, NEUTRAL: 0, 2: 0, HARMFUL: 0, SECOND: 8}


def test_a_set_that_has_been_learned_leaves_its_places_to_the_other() -> None:
    fresh = candidates(stage=3, steps_per_stage=16)
    seen = [visit for step in (40, 47) for visit in visits(fresh, SECOND, 0.95, step)]
    found = kinds(dataclasses.replace(fresh, visits=seen), size=20)
    assert found[USEFUL] > 3 * found[SECOND]


def test_pooling_without_its_data_is_an_error() -> None:
    with pytest.raises(ValueError, match="needs pooling data"):
        scores(STRATEGY, pool([0.5] * 4))
