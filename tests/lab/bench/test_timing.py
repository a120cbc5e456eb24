from typing import Any

import numpy as np
import pytest

from cropi.lab.bench.timing import per_token, quality, rates, ratios, spread
from cropi.lab.bench.worker_rounds import Record


def answer(seconds: float, tokens: int, **parts: tuple[float, int]) -> dict[str, Any]:
    return {
        "seconds": seconds,
        "tokens_computed": tokens,
        "peak_rss_mb": 100 + seconds,
        "peak_gpu_mb": None,
        "parts": {name: {"seconds": s, "tokens_computed": t} for name, (s, t) in parts.items()},
    }


def test_spread_and_ratios_by_hand() -> None:
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0}
    assert spread([]) is None
    # The machine was twice as slow in the second round: the ratio does not notice.
    assert ratios([2.0, 4.0, 2.2], [1.0, 2.0, 1.0]) == {"median": 2.0, "low": 2.0, "high": 2.2}
    assert ratios([2.0, 4.0], [1.0]) == {"median": 2.0, "low": 2.0, "high": 2.0}


def test_quality_leaves_out_prompts_without_signal() -> None:
    exact_N, found_N = np.array([0.0, 0.0, 1.0, 2.0, 3.0]), np.array([9.0, -9.0, 1.0, 2.0, 3.0])
    assert quality(found_N, exact_N, exact_N > 0) == {"spearman": pytest.approx(1), "precision_at_10": 1.0}
    assert quality(None, exact_N, exact_N > 0) == {"spearman": None, "precision_at_10": None}


def test_rates_and_cost_per_token() -> None:
    record = Record(rounds=[answer(4.0, 40, train=(3.0, 20)), answer(2.0, 40, train=(1.0, 20))])
    assert per_token(record) == [3 / 20, 1 / 20]
    assert per_token(Record(rounds=[answer(4.0, 40)])) == [0.1]
    found = rates(record, tokens_given=80)
    assert found["given_per_s"] == {"median": 30.0, "low": 20.0, "high": 40.0}
    assert found["computed_per_s"]["median"] == 15.0
    assert found["parts"]["train"]["seconds"]["median"] == 2.0
    assert found["peak_rss_mb"] == 104
    assert found["peak_gpu_mb"] is None
    assert rates(Record(), 80)["seconds"] is None
