"""MoPPS: a Beta posterior for each prompt, and Thompson sampling."""

import numpy as np
from jaxtyping import Float

from cropi.config import MoppsStrategy, SelectConfig
from cropi.curriculum.candidates import Candidates, Ranking
from cropi.seeds import derived_seed


def mopps(candidates: Candidates, strategy: MoppsStrategy, config: SelectConfig) -> Ranking:
    """s_i = -(q_i - mu*)^2 with q_i ~ Beta(a_i, b_i) (MoPPS, arXiv 2507.04632).

    Published: each step draws for the prompts of a larger random batch and trains on the nearest ones. Here a stage
    draws once for the whole pool, from the visits of all stages before; at stage 0 that is a random choice. No stored
    trajectories are read.
    """
    a_N, b_N = posterior(candidates, strategy.memory)
    drawn_N = np.empty(len(candidates))
    for row, prompt_id in enumerate(candidates.prompt_ids):
        # a generator for each prompt: what is known of one does not change the draw of another
        generator = np.random.default_rng(derived_seed(candidates.seed, "mopps", candidates.stage, prompt_id))
        drawn_N[row] = generator.beta(a_N[row], b_N[row])
    scores_N = -((drawn_N - strategy.target) ** 2)
    return Ranking(scores_N, candidates.usable_N, f"pass rate drawn near {strategy.target:g}", {})


def posterior(candidates: Candidates, memory: float) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, " N"]]:
    """(a, b) of every prompt after its visits, from Beta(1, 1).

    A visit with n rewards of mean r: a <- m a + (1 - m) + n r, b <- m b + (1 - m) + n (1 - r), m the memory. (The
    released code sets a to 8 for n = 1, by precedence of its operators; here n = 1 is no exception.)
    """
    row_of = {prompt_id: row for row, prompt_id in enumerate(candidates.prompt_ids)}
    a_N, b_N = np.ones(len(candidates)), np.ones(len(candidates))
    for visit in candidates.visits:
        row, right = row_of[visit.prompt_id], visit.tries * visit.mean_reward
        a_N[row] = memory * a_N[row] + (1 - memory) + right
        b_N[row] = memory * b_N[row] + (1 - memory) + visit.tries - right
    return a_N, b_N
