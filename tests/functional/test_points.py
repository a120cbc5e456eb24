import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cropi.functional.points import tfidf_similarity


def test_by_hand() -> None:
    # four texts: a stands in three of them, b in two, c in one
    found = tfidf_similarity([["a"], ["a", "b"], []], {"v": [["a", "b", "b", "c"]]})["v"]
    a, b, c = (1 + math.log(5 / (1 + count)) for count in (3, 2, 1))
    length = math.sqrt(a * a + 4 * b * b + c * c)
    assert found.tolist() == pytest.approx([a / length, (a * a + 2 * b * b) / math.hypot(a, b) / length, 0])


TEXT = st.lists(st.sampled_from("abcde"), max_size=6)


@given(st.lists(TEXT, min_size=1, max_size=5), st.lists(TEXT, min_size=1, max_size=3), st.lists(TEXT, min_size=1))
def test_against_dense_vectors(texts: list[list[str]], first: list[list[str]], second: list[list[str]]) -> None:
    everything = [*texts, *first, *second]
    holding = {word: sum(word in text for text in everything) for word in "abcde"}
    weights_W = np.array([1 + math.log((1 + len(everything)) / (1 + holding[word])) for word in "abcde"])

    def unit(text: list[str]) -> np.ndarray:
        vector_W = np.array([Counter(text)[word] for word in "abcde"]) * weights_W
        return vector_W / (np.linalg.norm(vector_W) or 1.0)

    found = tfidf_similarity(texts, {"first": first, "second": second})
    for name, members in (("first", first), ("second", second)):
        expected = [max(unit(text) @ unit(member) for member in members) for text in texts]
        np.testing.assert_allclose(found[name], expected, atol=1e-12)
