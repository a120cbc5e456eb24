from __future__ import annotations

import pytest

from cropi.functional.sampling import places


@pytest.mark.parametrize(("fraction", "count", "expected"), [(0.1, 1000, 100), (0.07, 100, 7), (0.1, 11, 2)])
def test_places_of_the_fraction_as_written(fraction: float, count: int, expected: int) -> None:
    assert places(fraction, count) == expected
