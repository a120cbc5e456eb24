"""Similarity of the prompt's text to the validation prompts'."""

import numpy as np

from cropi.config import SelectConfig, SimilarityStrategy
from cropi.curriculum.candidates import Candidates, Ranking
from cropi.curriculum.fuse import fuse
from cropi.functional.tfidf import tfidf_similarity
from cropi.leakage import words


def similarity(candidates: Candidates, strategy: SimilarityStrategy, config: SelectConfig) -> Ranking:
    """s_i = sum_v 1 / (kappa + rank_v(i)), rank_v by the TF-IDF cosine of the prompt with those of validation set v.

    A control of ours: what the validation prompts say without any gradient. With `learnability`, rank_v by
    max(0, cosine - its mean over the pool) x p_i (1 - p_i), and prompts of equal rewards are left out. The mean is
    taken off because all prompts share common words; otherwise p (1 - p) would decide nearly alone.
    """
    of_sets = {name: [words(text) for text in texts] for name, texts in candidates.validation_texts.items()}
    values = tfidf_similarity([words(text) for text in candidates.texts], of_sets, strategy.over)
    if not strategy.learnability:
        return fuse(candidates, values, candidates.usable_N, config, "similar")
    variance_N = np.nan_to_num(candidates.variances_N)
    values = {name: np.maximum(0.0, values_N - values_N.mean()) * variance_N for name, values_N in values.items()}
    return fuse(candidates, values, variance_N > 0, config, "similar and learnable")
