"""The measurement of a run's belief: on numbers whose distribution is known, and on the belief's own predictions."""

import belief
import numpy as np
import pytest
from mislabelled import wrong_answers

from cropi.curriculum.belief import InfluenceBelief
from cropi.loading import load_config

SOURCE = "{type: builtin, families: [%s], count: 20, seed: 1, %s}"
POOL = f"prompts.train=[{SOURCE % ('sum', 'label_noise: 0.25')}, {SOURCE % ('parity', 'label_rule: stop_early')}]"


def test_planted_answers_are_made_again() -> None:
    config = load_config("quickstart", [POOL])
    assert sum(wrong_answers(config, rules=False).values()) == 5
    assert len(wrong_answers(config)) == 40
    assert sum(wrong_answers(config).values()) > 5


def test_the_area_counts_pairs_in_order() -> None:
    scores = np.array([0.9, 0.5, 0.5, 0.1])
    assert belief.area(scores, np.array([True, True, False, False])) == (1 + 1 + 0.5 + 1) / 4
    assert np.isnan(belief.area(scores, np.ones(4, dtype=bool)))


def test_a_right_prediction_is_covered_and_its_errors_have_the_factor_one() -> None:
    generator = np.random.default_rng(0)
    variances, errors = generator.uniform(0.5, 2, (2, 20_000))
    gaps = generator.standard_normal(20_000) * np.sqrt(variances + errors)
    cells = belief.predictive(list(zip(gaps, variances, errors, gaps, np.full(20_000, 9.0), strict=True))).split(" | ")
    assert [float(cells[n]) for n in (1, 2, 5)] == pytest.approx([0.5, 0.9, 1.0], abs=0.01)
    assert float(cells[3]) > float(cells[4])  # of the constant model, whose variance is wrong


def test_each_step_is_predicted_from_those_before_it() -> None:
    def fresh() -> InfluenceBelief:
        return InfluenceBelief(np.eye(3, dtype=np.float32), np.ones((1, 3), dtype=np.float32) / 2, np.zeros(4))

    first, last = belief.FIRST_STEP - 1, belief.FIRST_STEP
    seen_O5 = np.array([[0, 1.0, 0.1, 0.2, first], [1, -1.0, 0.1, 0.4, first], [0, 2.0, 0.1, 0.3, last]])
    known = fresh()
    for point, slope, half_difference, error, step in seen_O5[:2]:
        known.observe(int(point), slope, error, int(step), half_difference)
    posterior = known.posterior()
    assert posterior is not None
    expected = (2.0 - posterior.means()[0], posterior.variances()[0], 0.3, 2.0, 1.0)
    assert belief.foretold(fresh(), seen_O5, 3) == [pytest.approx(expected)]
