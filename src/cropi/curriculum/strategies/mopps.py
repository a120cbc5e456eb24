"""MoPPS: a Beta posterior for each prompt, and Thompson sampling."""

from typing import ClassVar, Literal

import numpy as np
from jaxtyping import Float

from cropi.curriculum.strategy import Candidates, FusionConfig, Need, Ranking, StrategyTable
from cropi.seeds import derived_seed

TARGET = 0.5  # mu*, the target pass rate (released code)


class MoppsStrategy(StrategyTable):
    """Prompts whose pass rate, drawn from a posterior given the training rewards, is nearest to 1/2 (MoPPS)."""

    needs: ClassVar[frozenset[Need]] = frozenset({"rewards"})

    type: Literal["mopps"]
    """Selects this strategy."""

    def rank(self, candidates: Candidates, size: int, fusion: FusionConfig) -> Ranking:
        """s_i = -(q_i - mu*)^2 with q_i ~ Beta(a_i, b_i) (MoPPS, arXiv 2507.04632).

        Published: each step draws for the prompts of a larger random batch and trains on the nearest ones. Here a stage
        draws once for the whole pool, from the visits of all earlier stages; stage 0 is a random choice. It reads no
        stored trajectories.
        """
        a_N, b_N = posterior(candidates)
        drawn_N = np.empty(len(candidates))
        for row, prompt_id in enumerate(candidates.prompt_ids):
            # one generator per prompt: visits of one prompt do not change the draw of another
            generator = np.random.default_rng(derived_seed(candidates.seed, "mopps", candidates.stage, prompt_id))
            drawn_N[row] = generator.beta(a_N[row], b_N[row])
        scores_N = -((drawn_N - TARGET) ** 2)
        return Ranking(scores_N, candidates.usable_N, f"pass rate drawn near {TARGET:g}")


def posterior(candidates: Candidates) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """(a, b) of each prompt after its visits, from Beta(1, 1): n rewards of mean r add n r and n (1 - r).

    The released code can also discount old visits; its configuration does not. (It sets a to 8 for n = 1, by precedence
    of its operators; here n = 1 is no exception.)
    """
    row_of = {prompt_id: row for row, prompt_id in enumerate(candidates.prompt_ids)}
    a_N, b_N = np.ones(len(candidates)), np.ones(len(candidates))
    for visit in candidates.visits:
        row, right = row_of[visit.prompt_id], visit.tries * visit.mean_reward
        a_N[row] += right
        b_N[row] = b_N[row] + visit.tries - right
    return a_N, b_N
