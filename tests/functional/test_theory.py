"""The statements of docs/paper.md about policies, on one so small that every completion and every group is enumerated.

Expectations are exact sums, gradients of objectives come from autograd: neither knows of ratios or baselines.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cropi.functional.influence_formulas import influence, mean_weights
from cropi.functional.ranking import reciprocal_rank_fusion
from cropi.functional.surrogate import EPSILON
from cropi.gradients.groups import SurrogateSettings, ratio_statistics, scales_of
from cropi.gradients.packing import Span
from cropi.lab.audit.agreement import top_overlap
from cropi.lab.audit.policy_audit import log_prefix_ratios

TOKENS, HORIZON, END = 3, 3, 0
PARAMETERS = TOKENS + TOKENS * TOKENS


def enumerate_completions(begun: tuple[int, ...] = ()) -> list[tuple[int, ...]]:
    """Every completion: it ends with END, or is cut at HORIZON tokens."""
    if begun and (begun[-1] == END or len(begun) == HORIZON):
        return [begun]
    return [completion for token in range(TOKENS) for completion in enumerate_completions((*begun, token))]


COMPLETIONS = enumerate_completions()
LENGTHS_C = np.array([len(completion) for completion in COMPLETIONS])
PREFIXES = sorted({completion[:t] for completion in COMPLETIONS for t in range(len(completion))})
REWARDS_C = np.array([float(completion.count(1) == 1) for completion in COMPLETIONS])
GRADED_C = np.random.default_rng(5).random(len(COMPLETIONS))


def parameters(seed: int, *, near: Tensor | None = None, distance: float = 1.0) -> Tensor:
    drawn = torch.randn(PARAMETERS, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * distance
    return drawn if near is None else near + drawn


BETA = parameters(0, distance=0.3)
BETA[END] -= 2.0  # completions do not end at once
AWAY = parameters(1, near=BETA, distance=0.5)


def token_log(theta: Tensor, prefix: tuple[int, ...]) -> Tensor:
    """Log-probs of the next token: a bias, and a row that the last token chooses."""
    row = TOKENS * (1 + (prefix[-1] if prefix else 0))
    return torch.log_softmax(theta[:TOKENS] + theta[row : row + TOKENS], 0)


def logs_of(theta: Tensor) -> list[Tensor]:
    """Log-probs of every completion's tokens."""
    table = {prefix: token_log(theta, prefix) for prefix in PREFIXES}
    return [torch.stack([table[c[:t]][c[t]] for t in range(len(c))]) for c in COMPLETIONS]


def probabilities(theta: Tensor) -> Tensor:
    return torch.stack([logs_T.sum() for logs_T in logs_of(theta)]).exp()


def slope(objective: Any, theta: Tensor) -> np.ndarray:
    """The gradient of an objective by autograd."""
    theta = theta.clone().requires_grad_()
    return torch.autograd.grad(objective(theta), theta)[0].numpy()


def expected(theta: Tensor, outcome_C: np.ndarray) -> Tensor:
    return probabilities(theta) @ torch.from_numpy(outcome_C)


def units(theta: Tensor, beta: Tensor, correction: str, cap: float = math.inf) -> Tensor:
    """sum_t w_t grad log pi(x_t) of every completion (C, P), with the library's ratios."""
    jacobian = torch.autograd.functional.jacobian(lambda t: torch.cat(logs_of(t)), theta)
    log_ratios = [a - b for a, b in zip(logs_of(theta), logs_of(beta), strict=True)]
    weights = [(logs_T if correction == "token" else log_prefix_ratios(logs_T, cap)).exp() for logs_T in log_ratios]
    parts = jacobian.split(LENGTHS_C.tolist())
    return torch.stack([weights_T @ part_TP for weights_T, part_TP in zip(weights, parts, strict=True)])


def group_mean(
    count: int, theta: Tensor, rewards_C: np.ndarray, correction: str = "token", **settings: Any
) -> np.ndarray:
    """Expectation of the group's gradient over every group of `count` completions that the behaviour policy draws."""
    chosen_XK = np.stack(np.meshgrid(*[np.arange(len(COMPLETIONS))] * count, indexing="ij"), -1).reshape(-1, count)
    chances_X = probabilities(BETA).numpy()[chosen_XK].prod(axis=1)
    used = SurrogateSettings(**({"normalizer": "constant", "max_completion_length": 1} | settings))
    scales_XK = scales_of(rewards_C[chosen_XK], LENGTHS_C[chosen_XK], used)
    factors_C = np.zeros(len(COMPLETIONS))
    np.add.at(factors_C, chosen_XK, chances_X[:, None] * scales_XK)
    return factors_C @ units(theta, BETA, correction).numpy()


def decomposed(theta: Tensor, visited: Tensor, continued: Tensor, outcome_C: np.ndarray) -> Tensor:
    """sum_t E over prefixes of `visited`, the next token of `theta`, of what `continued` makes of it.

    Only the next token is differentiated.
    """
    reached_C, weighed_C = probabilities(visited), probabilities(continued)
    total = torch.zeros((), dtype=torch.float64)
    for prefix in PREFIXES:
        here = [c[: len(prefix)] == prefix for c in COMPLETIONS]
        for token in range(TOKENS):
            after_C = torch.tensor([c[: len(prefix) + 1] == (*prefix, token) for c in COMPLETIONS])
            value = weighed_C[after_C] @ torch.from_numpy(outcome_C)[after_C] / weighed_C[after_C].sum()
            total = total + reached_C[torch.tensor(here)].sum() * token_log(theta, prefix)[token].exp() * value
    return total


def gap(found: np.ndarray, expected_P: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected_P) / np.linalg.norm(expected_P))


CORRECTIONS = {"token": (BETA, BETA), "prefix": (AWAY, BETA)}
"""What a correction visits and what it lets go on, of the behaviour policy's and of the current policy's."""


def estimate(theta: Tensor, correction: str, baseline: float, cap: float = math.inf) -> np.ndarray:
    """Expectation over one completion of the estimate with a constant baseline."""
    outcome_C = REWARDS_C - baseline
    return (probabilities(BETA).numpy() * outcome_C) @ units(theta, BETA, correction, cap).numpy()


def test_a_step_gains_its_influence_and_a_remainder_of_second_order() -> None:
    """Of two prompts at once the gains add up; what is left is half the curvature, in which they meet."""
    objectives = [np.random.default_rng(seed).random(len(COMPLETIONS)) for seed in (1, 2, 3)]
    first_P, second_P, validation_P = (slope(lambda t, r=r: expected(t, r), BETA) for r in objectives)
    curvature = torch.autograd.functional.hessian(lambda t: expected(t, objectives[2]), BETA).numpy()
    products_NV = np.array([[first_P @ validation_P], [second_P @ validation_P]])
    gain = influence(products_NV, np.ones(2), np.ones(1)).sum()
    together_P = first_P + second_P
    here = float(expected(BETA, objectives[2]))
    remainders = [
        float(expected(BETA + eta * torch.from_numpy(together_P), objectives[2])) - here - eta * gain
        for eta in (0.02, 0.01)
    ]
    assert remainders[1] / 0.01**2 == pytest.approx(together_P @ curvature @ together_P / 2, rel=0.02)
    assert remainders[0] / remainders[1] == pytest.approx(4, rel=0.02)


def test_cosine_with_the_mean_weighs_each_cosine_by_the_length_of_its_gradient() -> None:
    generator = np.random.default_rng(0)
    own_P, others_MP = generator.standard_normal(6), generator.standard_normal((4, 6))
    lengths_M = np.linalg.norm(others_MP, axis=1)

    def cosine(scaled_MP: np.ndarray, mean: Any = "plain") -> float:
        direction_P = mean_weights(np.linalg.norm(scaled_MP, axis=1), mean, len(scaled_MP)) @ scaled_MP
        norms = np.array([np.linalg.norm(own_P)]), np.array([np.linalg.norm(direction_P)])
        return float(influence(np.array([[own_P @ direction_P]]), *norms, "cosine")[0, 0])

    each_M = others_MP @ own_P / lengths_M / np.linalg.norm(own_P)
    weights_M = lengths_M / np.linalg.norm(others_MP.sum(axis=0))
    assert cosine(others_MP) == pytest.approx(weights_M @ each_M)
    scaled_MP = others_MP * np.array([[5.0], [1.0], [0.1], [1.0]])
    assert abs(cosine(scaled_MP) - cosine(others_MP)) > 0.01  # a scale per validation prompt turns the direction
    assert cosine(scaled_MP, "normalized") == pytest.approx(cosine(others_MP, "normalized"))


def test_learnability_is_a_factor_of_the_gradient_of_a_pass_rate() -> None:
    """p (1 - p) times the difference of the mean scores of right and of wrong completions."""
    chances_C, scores_CP = probabilities(BETA).numpy(), units(BETA, BETA, "token").numpy()
    rights, wrongs = (chances_C * (reward == REWARDS_C) for reward in (1.0, 0.0))
    p = rights.sum()
    contrast_P = (rights / p - wrongs / (1 - p)) @ scores_CP
    assert gap(p * (1 - p) * contrast_P, slope(lambda t: expected(t, REWARDS_C), BETA)) < 1e-12


def test_the_token_ratio_is_exact_at_the_behaviour_policy_and_not_away_from_it() -> None:
    for theta, exact in ((BETA, True), (AWAY, False)):
        found_P = estimate(theta, "token", 0.3)
        assert gap(found_P, slope(lambda t: decomposed(t, BETA, BETA, REWARDS_C), theta)) < 1e-12
        truth_P = slope(lambda t: expected(t, REWARDS_C), theta)
        assert (gap(found_P, truth_P) < 1e-12) if exact else (gap(found_P, truth_P) > 0.05)


def test_which_part_of_the_exact_ratio_each_correction_keeps() -> None:
    truth_P = slope(lambda t: expected(t, REWARDS_C), AWAY)
    for correction, (visited, continued) in CORRECTIONS.items():
        kept_P = slope(lambda t, v=visited, c=continued: decomposed(t, v, c, REWARDS_C), AWAY)
        assert gap(estimate(AWAY, correction, 0.3), kept_P) < 1e-12
        assert gap(kept_P, truth_P) > 0.02
    whole_C = (REWARDS_C - 0.3) * probabilities(AWAY).numpy() / probabilities(BETA).numpy()
    whole_P = (probabilities(BETA).numpy() * whole_C) @ units(AWAY, AWAY, "token").numpy()
    assert gap(whole_P, truth_P) < 1e-12
    assert gap(slope(lambda t: decomposed(t, AWAY, AWAY, REWARDS_C), AWAY), truth_P) < 1e-12


@pytest.mark.parametrize("distance", [0.03, 0.3, 2.0])
def test_the_bias_of_the_token_ratio_is_within_its_bound(distance: float) -> None:
    for seed in range(3):
        theta = parameters(seed, near=BETA, distance=distance)
        bias_P = estimate(theta, "token", 0.0) - slope(lambda t: expected(t, REWARDS_C), theta)
        jacobians = [torch.autograd.functional.jacobian(lambda t, h=h: token_log(t, h), theta) for h in PREFIXES]
        steepest = max(float(jacobian.norm(dim=1).max()) for jacobian in jacobians)
        farthest = max(float((token_log(theta, h).exp() - token_log(BETA, h).exp()).abs().sum()) / 2 for h in PREFIXES)
        assert 0 < np.linalg.norm(bias_P) <= HORIZON * (HORIZON - 1) * steepest * farthest


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("theta", [BETA, AWAY], ids=["on-policy", "off-policy"])
def test_a_baseline_with_the_own_sample_shrinks_by_one_kth(theta: Tensor, correction: str, count: int) -> None:
    for rewards_C in (REWARDS_C, GRADED_C):
        visited, continued = (theta if policy is AWAY else BETA for policy in CORRECTIONS[correction])
        full_P = slope(lambda t, v=visited, c=continued, r=rewards_C: decomposed(t, v, c, r), theta)
        found_P = group_mean(count, theta, rewards_C, correction, advantage_std=False)
        assert gap(found_P, (count - 1) / count * full_P) < 1e-12


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("normalizer", ["constant", "sequence"])
@pytest.mark.parametrize("theta", [BETA, AWAY], ids=["on-policy", "off-policy"])
def test_the_own_deviation_changes_the_length_alone_where_rewards_are_right_or_wrong(theta, normalizer, count):
    pass_rate = float(expected(BETA, REWARDS_C))
    wins = np.arange(count + 1)
    chances = np.array([math.comb(count, m) * pass_rate**m * (1 - pass_rate) ** (count - m) for m in wins])
    deviations = np.array([np.std([1.0] * m + [0.0] * (count - m), ddof=1) for m in wins])
    variance = pass_rate * (1 - pass_rate)
    factor = (count - 1) / count * float(chances @ (deviations**2 / (deviations + EPSILON))) / variance
    outcome_C = (REWARDS_C - pass_rate) / (LENGTHS_C if normalizer == "sequence" else 1)
    full_P = slope(lambda t: decomposed(t, BETA, BETA, outcome_C), theta)
    assert gap(group_mean(count, theta, REWARDS_C, normalizer=normalizer), factor * full_P) < 1e-12
    assert factor < (1 - 1 / count) / math.sqrt(variance)


def test_the_own_deviation_turns_the_gradient_where_rewards_are_graded() -> None:
    full_P = slope(lambda t: decomposed(t, BETA, BETA, GRADED_C), BETA)
    found_P = group_mean(3, BETA, GRADED_C)
    assert found_P @ full_P / np.linalg.norm(found_P) / np.linalg.norm(full_P) < 1 - 1e-6


def test_dividing_by_the_length_gives_the_gradient_of_another_objective() -> None:
    """That of E[(R - b) / length] with b = E[R] held fixed; its direction is another one."""
    mean = float(expected(BETA, REWARDS_C))
    other_P = slope(lambda t: expected(t, (REWARDS_C - mean) / LENGTHS_C), BETA)
    truth_P = slope(lambda t: expected(t, REWARDS_C), BETA)
    found_P = group_mean(3, BETA, REWARDS_C, advantage_std=False, normalizer="sequence")
    assert gap(found_P, 2 / 3 * other_P) < 1e-12
    assert other_P @ truth_P / np.linalg.norm(other_P) / np.linalg.norm(truth_P) < 0.99


def test_caps_let_the_baseline_into_the_gradient() -> None:
    token_P = estimate(AWAY, "token", 0.2)
    assert gap(estimate(AWAY, "token", 0.8), token_P) < 1e-12
    prefix_P = estimate(AWAY, "prefix", 0.2)
    assert gap(estimate(AWAY, "prefix", 0.8), prefix_P) < 1e-12
    assert gap(estimate(AWAY, "prefix", 0.8, 1.1), estimate(AWAY, "prefix", 0.2, 1.1)) > 0.02


def test_influence_errors_are_bounded_and_a_wide_gap_at_the_cut_keeps_the_best() -> None:
    generator = np.random.default_rng(0)
    true_NP, errors_NP = generator.standard_normal((40, 5)), 0.05 * generator.standard_normal((40, 5))
    direction_P, error_P = generator.standard_normal(5), 0.05 * generator.standard_normal(5)
    sizes = [np.linalg.norm(values, axis=-1) for values in (true_NP, errors_NP, direction_P, error_P)]
    bound_N = sizes[1] * sizes[2] + sizes[0] * sizes[3] + sizes[1] * sizes[3]
    true_N, seen_N = true_NP @ direction_P, (true_NP + errors_NP) @ (direction_P + error_P)
    assert bool((np.abs(seen_N - true_N) <= bound_N).all())
    order_N = np.argsort(-true_N)
    true_N[order_N[:10]] += 2 * bound_N.max()
    seen_N[order_N[:10]] += 2 * bound_N.max()
    assert top_overlap(seen_N, true_N, 0.25) == 1.0


def test_the_effective_share_of_whole_ratios_falls_by_a_power_of_the_length() -> None:
    """Behaviour uniform over four tokens, so that each of them once is the expectation."""
    policy_W = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    ratios_W = policy_W / 0.25
    divergence = float(((ratios_W - 1) ** 2).mean())
    whole_X = torch.cartesian_prod(*[ratios_W] * 5).prod(dim=1)
    whole = ratio_statistics(whole_X.log(), [Span(0, 0, len(whole_X))])[0]
    assert whole.effective_share == pytest.approx((1 + divergence) ** -5)
    facts = ratio_statistics(ratios_W.log(), [Span(0, 0, 4)])[0]
    assert facts.effective_share == pytest.approx(1 / (1 + divergence))
    assert facts.kl == pytest.approx(float((policy_W * ratios_W.log()).sum()))


def test_kappa_is_the_width_of_the_flat_head_and_of_a_large_one_is_borda() -> None:
    """Rank m in two lists against rank r in one: m < 2 r + kappa wins."""
    for kappa in (0.0, 60.0):
        for r in (1, 7, 500):
            for m, wins in ((2 * r + int(kappa) - 1, True), (2 * r + int(kappa) + 1, False)):
                both, one = reciprocal_rank_fusion(np.array([[m, m], [r, 10**6]]), kappa=kappa, depth=10**5)
                assert (both > one) == wins
    ranks_NV = np.stack([np.random.default_rng(seed).permutation(50) + 1 for seed in range(3)], axis=1)
    fused_N, sums_N = reciprocal_rank_fusion(ranks_NV, kappa=3.0 * 50**2), ranks_NV.sum(axis=1)
    assert all((fused_N[i] > fused_N[j]) for i in range(50) for j in range(50) if sums_N[i] < sums_N[j])


def test_drift_adds_up_over_stages_at_most() -> None:
    generator = np.random.default_rng(0)
    logits = np.cumsum(generator.standard_normal((6, 5)) * 0.3, axis=0)
    policies = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    divergences = (policies[1:] * np.log(policies[1:] / policies[:-1])).sum(axis=1)
    for stage in range(1, 6):
        distance = np.abs(policies[stage] - policies[0]).sum() / 2
        assert distance <= np.sqrt(divergences[:stage] / 2).sum() <= stage * math.sqrt(divergences[:stage].max() / 2)


def test_the_page_names_what_exists() -> None:
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "paper.md").read_text(encoding="utf-8")
    for folder, pattern, least in (("tests", r"`(test_\w+)`", 25), ("src", r"`(?:\w+\.)*(\w+)\(\)`", 15)):
        code = "\n".join(path.read_text(encoding="utf-8") for path in (root / folder).rglob("*.py"))
        named, defined = set(re.findall(pattern, page)), set(re.findall(r"\b(?:def|class) (\w+)", code))
        assert len(named) >= least
        assert named <= defined, named - defined
