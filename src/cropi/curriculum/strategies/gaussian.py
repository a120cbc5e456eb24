"""A bell curve over the pass rate that moves from easy to hard."""

import numpy as np
from jaxtyping import Float

from cropi.config import GaussianStrategy, SelectConfig
from cropi.curriculum.candidates import Candidates, Ranking
from cropi.curriculum.draw import gumbel_keys
from cropi.functional.ranking import ranks


def gaussian(candidates: Candidates, strategy: GaussianStrategy, config: SelectConfig) -> Ranking:
    """A draw without replacement by w_i = exp(-(p_i - mu_t)^2 / (2 sigma^2)), p_i of the stored trajectories.

    mu_t = first + (last - first) t / (T - 1) at stage t of T: after the curriculum of Nemotron 3 Nano (arXiv
    2512.20848, section 3.2.2), whose numbers were not at hand: first 0.8, last 0.2, sigma 0.2 are ours. There, batches
    are drawn from the mixture; here a stage draws its selection. With `shares`, each source has its proportion in every
    selection, as each domain has there.
    """
    p_N = candidates.pass_rates_N
    eligible_N = candidates.hopeful_N
    progress = candidates.stage / (candidates.stages - 1) if candidates.stages > 1 else 0.0
    middle = strategy.first + (strategy.last - strategy.first) * progress
    log_weights_N = -((np.nan_to_num(p_N) - middle) ** 2) / (2 * strategy.sigma**2)
    keys_N = gumbel_keys(candidates, "gaussian", log_weights_N)
    if strategy.shares:
        eligible_N &= np.isin(np.array(candidates.sources), list(strategy.shares))
        keys_N = _in_shares(candidates, strategy, keys_N, eligible_N)
    return Ranking(keys_N, eligible_N, f"drawn around pass rate {middle:.2f}", {})


def _in_shares(
    candidates: Candidates, strategy: GaussianStrategy, keys_N: np.ndarray, eligible_N: np.ndarray
) -> Float[np.ndarray, " N"]:
    """Scores of which any number of the highest has the sources in proportion, and the highest keys of each.

    The r-th prompt of a source with share q has -(r - 1/2) / q: the divisor method of Webster.
    """
    scores_N = np.full(len(keys_N), -np.inf)
    sources = np.array(candidates.sources)
    for source, share in strategy.shares.items():
        rows = np.flatnonzero(eligible_N & (sources == source)).tolist()
        scores_N[rows] = -(ranks(keys_N[rows]) - 0.5) / share
    return scores_N
