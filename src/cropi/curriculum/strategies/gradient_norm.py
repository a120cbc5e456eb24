"""The longest gradients."""

from typing import ClassVar, Literal

import numpy as np

from cropi.curriculum.strategy import Candidates, FusionConfig, Need, Ranking, StrategyTable


class GradientNormStrategy(StrategyTable):
    """The prompts with the longest gradients."""

    needs: ClassVar[frozenset[Need]] = frozenset({"trajectories", "gradients"})
    reads_lengths: ClassVar[bool] = True

    type: Literal["gradient_norm"]

    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        """s_i = |g_i|, the length of the prompt's off-policy gradient at this stage, or of its feature under `sketch`.

        Importance by gradient norm (Katharopoulos & Fleuret, arXiv 1803.00942), a baseline of GradAlign. It needs no
        validation set, but its pass also computes influence, so it is charged like `influence`.
        """
        assert candidates.lengths_N is not None
        lengths_N = np.nan_to_num(candidates.lengths_N)  # a prompt whose own numbers are not finite
        return Ranking(lengths_N, candidates.mixed_N & (lengths_N > 0), "its gradient is long")
