"""Similarity of the prompt's text to the validation prompts."""

from typing import ClassVar, Literal

import numpy as np

from cropi.curriculum.strategy import Candidates, FusionConfig, Need, Ranking, StrategyTable, fused_ranking
from cropi.functional.points import tfidf_similarity
from cropi.prompt_text import words


class SimilarityStrategy(StrategyTable):
    """The prompts whose text is most similar to a validation prompt."""

    reads_texts: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({"validation"})

    type: Literal["similarity"]
    learnability: bool = False
    """Multiply by p (1 - p) of the stored trajectories."""

    @property
    def collects(self) -> bool:
        return self.learnability

    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        """s_i = sum_v 1 / (kappa + rank_v(i)), rank_v by the prompt's largest TF-IDF cosine with prompts of set v.

        A control of ours: the validation prompts without any gradient. With `learnability`, rank_v is by
        max(0, cosine - its mean over the pool) x p_i (1 - p_i), and prompts with equal rewards are left out. The mean
        is subtracted because all prompts share common words; otherwise p (1 - p) would decide almost alone.
        """
        of_sets = {name: [words(text) for text in texts] for name, texts in candidates.validation_texts.items()}
        values = tfidf_similarity([words(text) for text in candidates.texts], of_sets)
        if not self.learnability:
            return fused_ranking(values, candidates.usable_N, size, fusion, "similar")
        variance_N = np.nan_to_num(candidates.variances_N)
        values = {name: np.maximum(0.0, values_N - values_N.mean()) * variance_N for name, values_N in values.items()}
        return fused_ranking(values, variance_N > 0, size, fusion, "similar and learnable")
