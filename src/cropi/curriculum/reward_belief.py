"""Belief about the rewards of prompts while a policy trains, and about which recorded answers are wrong.

Letters: P points, which are the N prompts of the pool and then the validation prompts; F features of a point.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

REWARD_HALF_LIFE = 8.0  # steps after which rewards count half: training changes them fast
SUCCESS_HALF_LIFE = 16.0  # the same of a prompt's successes, by which it is known: what was learned stays
PRIOR_TRIES = 0.8  # completions that the rewards of similar prompts count for: most are solved always or never
WRONG_RATE = (
    0.1  # share of a success that a prompt with a wrong answer gets: by luck, or since the policy errs likewise
)
EXPECTED = 0.2  # probability of a wrong answer where nothing like the prompt was seen
UNLIKE = 4.0  # completions after which more of a prompt say little: prompts that are alike differ in difficulty
ROUNDS = 10


class RewardBelief:
    """Belief about the rewards of every point, whose prior is what similar prompts got.

    Verdicts, which have two values, have a Beta distribution. Of rewards with more values, such as weighted sums, the
    mean is found likewise on the range seen so far, and the variance is that within groups. Both are in the rewards'
    own unit.
    """

    def __init__(self, features_PF: Float[np.ndarray, "P F"]) -> None:
        self._features_PF = features_PF
        points = len(features_PF)
        self._won_P, self._tries_P = np.zeros(points), np.zeros(points)
        self._slow_2P = np.zeros((2, points))  # the same two sums, of which success is forgotten more slowly
        self._squares_P, self._freedom_P = np.zeros(points), np.zeros(points)  # within groups; of these, K - 1 each
        self._ever_2P = np.zeros((2, points))  # sums of rewards, and tries, of all times
        self._values = np.empty(0)  # at most three that differ: the smallest, the largest, and one between
        self._step = 0

    def observe(self, point: int, rewards: Float[np.ndarray, " K"], step: int) -> None:
        """Add a group's rewards."""
        self.age_to(step)
        weight = 2.0 ** (-max(self._step - step, 0) / REWARD_HALF_LIFE)
        self._won_P[point] += weight * float(rewards.sum())
        self._tries_P[point] += weight * len(rewards)
        slow = 2.0 ** (-max(self._step - step, 0) / SUCCESS_HALF_LIFE)
        self._slow_2P[:, point] += slow * float(rewards.sum()), slow * len(rewards)
        self._ever_2P[:, point] += float(rewards.sum()), len(rewards)
        self._squares_P[point] += weight * float(((rewards - rewards.mean()) ** 2).sum())
        self._freedom_P[point] += weight * (len(rewards) - 1)
        values = np.unique(np.concatenate([self._values, rewards]))
        self._values = values if len(values) <= 3 else values[[0, 1, -1]]

    def age_to(self, step: int) -> None:
        """Let time pass."""
        if step > self._step:
            factor = 2.0 ** (-(step - self._step) / REWARD_HALF_LIFE)
            for sums in (self._won_P, self._tries_P, self._squares_P, self._freedom_P):
                sums *= factor
            self._slow_2P *= 2.0 ** (-(step - self._step) / SUCCESS_HALF_LIFE)
            self._step = step

    def pass_rates(self) -> Float[np.ndarray, " P"]:
        """Expected mean reward."""
        low, high = self._range()
        return high - (high - low) * self.missing()

    def missing(self) -> Float[np.ndarray, " P"]:
        """Expected share of the reward that a completion does not get."""
        a_P, b_P = self._beta()
        found: np.ndarray = b_P / (a_P + b_P)
        return found

    def groups(self, completions: int) -> Float[np.ndarray, " P"]:
        """Groups of so many completions that were seen of each point; one counts half after `SUCCESS_HALF_LIFE`."""
        found: np.ndarray = self._slow_2P[1] / completions
        return found

    def variances(self) -> Float[np.ndarray, " P"]:
        """Expected variance of a reward: E[p (1 - p)] for verdicts of 0 and 1."""
        low, high = self._range()
        a_P, b_P = self._beta()
        total_P = a_P + b_P
        if len(self._values) <= 2:
            return (high - low) ** 2 * (a_P * b_P / (total_P * (total_P + 1)))
        near_P, squares_P = self._near(self._freedom_P, self._squares_P)
        prior_P = (squares_P + self.usual_deviation() ** 2 * 1e-3) / (near_P + 1e-3)
        found: np.ndarray = (self._squares_P + PRIOR_TRIES * prior_P) / (self._freedom_P + PRIOR_TRIES)
        return found

    def usual_deviation(self) -> float:
        """Standard deviation of rewards within the groups that were observed; 0 before any."""
        freedom = float(self._freedom_P.sum())
        return float(self._squares_P.sum() / freedom) ** 0.5 if freedom > 0 else 0.0

    def deviations(self, completions: int) -> Float[np.ndarray, " N"]:
        """Expected standard deviation of a group's rewards, with Bessel's correction.

        Of K verdicts, k right: sum over k of P(k) sqrt(k (K - k) / (K (K - 1))), with k beta-binomial. It is smaller
        than the root of the variance where all verdicts of a group may be the same. Rewards of more values: that root.
        """
        if len(self._values) > 2 or completions < 2:
            return np.sqrt(self.variances())
        low, high = self._range()
        a_P, b_P = self._beta()
        chance_P, found_P = np.ones(len(a_P)), np.zeros(len(a_P))
        for k in range(completions):
            chance_P *= (b_P + k) / (a_P + b_P + k)  # at the end that of no right one
        for k in range(1, completions):
            chance_P *= (completions - k + 1) / k * (a_P + k - 1) / (b_P + completions - k)
            found_P += chance_P * (k * (completions - k) / (completions * (completions - 1))) ** 0.5
        return (high - low) * found_P

    def wrong_labels(self, pool: int) -> Float[np.ndarray, " N"]:
        """Probability that the recorded answer of each of the first `pool` points is wrong."""
        low, high = self._range()
        won_N, tries_N = self._ever_2P[:, :pool]
        return wrong_label_probabilities(self._features_PF[:pool], (won_N - low * tries_N) / (high - low), tries_N)

    def _range(self) -> tuple[float, float]:
        """Smallest and largest reward so far; 0 and 1 before two of them differ, unless the only one lies outside."""
        if len(self._values) >= 2:
            return float(self._values[0]), float(self._values[-1])
        return min([0.0, *self._values.tolist()]), max([1.0, *self._values.tolist()])

    def _beta(self) -> tuple[Float[np.ndarray, " P"], Float[np.ndarray, " P"]]:
        low, high = self._range()
        won_P, slow_P = (
            np.maximum(sum_P - low * tries_P, 0.0) / (high - low)
            for sum_P, tries_P in ((self._won_P, self._tries_P), self._slow_2P)
        )
        near_P, near_won_P = self._near(self._tries_P, won_P)
        rate_P = (np.minimum(near_won_P, near_P) + 0.5e-3) / (near_P + 1e-3)
        lost_P = np.maximum(self._tries_P - won_P, 0.0)
        return slow_P + PRIOR_TRIES * rate_P, lost_P + PRIOR_TRIES * (1 - rate_P)

    def _near(self, *sums: Float[np.ndarray, " P"]) -> list[Float[np.ndarray, " P"]]:
        """Sums over points, weighted by how alike they are."""
        seen = np.flatnonzero(self._tries_P)
        sums_2F = np.stack([sum_P[seen] for sum_P in sums]) @ self._features_PF[seen]
        found_2P = (self._features_PF @ sums_2F.T.astype(self._features_PF.dtype)).T.astype(np.float64)
        return list(np.maximum(found_2P, 0.0))

    def _arrays(self) -> dict[str, np.ndarray]:
        sums = {"won": self._won_P, "tries": self._tries_P, "squares": self._squares_P, "freedom": self._freedom_P}
        return sums | {"slow": self._slow_2P, "ever": self._ever_2P, "values": self._values}

    def state(self) -> dict[str, np.ndarray]:
        """Arrays from which `restore` continues bit for bit."""
        return {**{name: values.copy() for name, values in self._arrays().items()}, "step": np.array([self._step])}

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Take over such a state."""
        self._won_P, self._tries_P = state["won"].copy(), state["tries"].copy()
        self._squares_P, self._freedom_P = state["squares"].copy(), state["freedom"].copy()
        self._slow_2P = state["slow"].copy()
        self._ever_2P, self._values = state["ever"].copy(), state["values"].copy()
        self._step = int(state["step"][0])


def wrong_label_probabilities(
    features_NF: Float[np.ndarray, "N F"], won_N: Float[np.ndarray, " N"], tries_N: Float[np.ndarray, " N"]
) -> Float[np.ndarray, " N"]:
    """P(wrong | successes, tries) in a mixture of two kinds of prompts, by expectation maximisation.

    A prompt with a right answer succeeds as often as others with right answers that are like it; one with a wrong
    answer in a tenth of its tries. How frequent wrong answers are is what the prompts like it show, too. n completions
    of a prompt count as 5 n / (n + 4). A whole kind of prompts with wrong answers looks like a kind that is too hard.
    """
    seen = np.flatnonzero(tries_N)
    near_SF, won_S, tries_S = features_NF[seen].astype(np.float64), won_N[seen], tries_N[seen]
    squares_S = np.einsum("sf,sf->s", near_SF, near_SF)

    def near(values_S: Float[np.ndarray, " S"]) -> Float[np.ndarray, " S"]:
        """Sums over the others, weighted by how alike they are."""
        found: np.ndarray = np.maximum(near_SF @ (near_SF.T @ values_S) - squares_S * values_S, 0.0)
        return found

    counted_S = (UNLIKE + 1) / (tries_S + UNLIKE)
    crowd_S, wrong_S = near(np.ones(len(seen))), np.full(len(seen), EXPECTED)
    for _ in range(ROUNDS if len(seen) else 0):
        right_won_S, right_tries_S = (1 - wrong_S) * won_S, (1 - wrong_S) * tries_S
        usual = float(right_won_S.sum() / max(right_tries_S.sum(), 1e-9))
        near_tries_S = near(right_tries_S)
        rate_S = (np.minimum(near(right_won_S), near_tries_S) + usual) / (near_tries_S + 1)
        rate_S = np.clip(rate_S, WRONG_RATE, 0.99)
        share_S = np.clip((near(wrong_S) + EXPECTED) / (crowd_S + 1), 1e-3, 1 - 1e-3)
        evidence_S = won_S * np.log(WRONG_RATE / rate_S) + (tries_S - won_S) * np.log((1 - WRONG_RATE) / (1 - rate_S))
        wrong_S = 1 / (1 + np.exp(-np.log(share_S / (1 - share_S)) - counted_S * evidence_S))
    sums_2F = np.stack([wrong_S, np.ones(len(seen))]) @ near_SF
    alike_2N = np.maximum((features_NF @ sums_2F.T.astype(features_NF.dtype)).T.astype(np.float64), 0.0)
    found_N = np.minimum((alike_2N[0] + EXPECTED) / (alike_2N[1] + 1), 1.0)
    found_N[seen] = wrong_S
    return found_N
