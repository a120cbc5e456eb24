"""The sketches and statistics behind the price of a direction, on the built-in policy."""

import json
import sys
from typing import Any

import numpy as np
import pilot
import pytest
import torch
from direction import Measured, Products, Sketcher, centred, gradients
from grpo import Policy, Row, log_probs, pack
from improvement import change
from tests.examples.sampled_groups import questions

from cropi.builtin import POLICY_DIR


@pytest.fixture(scope="module")
def policy() -> Policy:
    return Policy(POLICY_DIR, learning_rate=1e-3, longest=12, seed=0, bf16=False)


def test_the_branches_of_a_sketch_add_up_to_the_weight_gradient_between_its_projections(policy: Policy) -> None:
    question = questions(policy, 1)[0]
    completions = policy.sample([question], 6)[0].completions
    packed = pack([Row(question.prompt, completions, [1.0, -1.0, 0.5, 2.0, -0.5, 1.0])])
    sketcher = Sketcher(policy.model)
    policy.optimizer.zero_grad()
    with sketcher.reading(packed) as found:
        (packed.weights_T * log_probs(policy.model, packed)).sum().backward()
    assert found.shape[1] == 7
    for n, layer in enumerate(sketcher.layers):
        inputs, outputs = sketcher.projections[n]
        expected = (outputs.T @ layer.weight.grad @ inputs).flatten()
        torch.testing.assert_close(found[0, :, n].sum(0), expected, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_prompt_uses_the_leave_one_out_baseline() -> None:
    """By hand: rewards 1, 0, 0 give 1 - 0, 0 - 1/2, 0 - 1/2."""
    assert centred([1.0, 0.0, 0.0]) == [1.0, -0.5, -0.5]
    scores = np.array([[[3.0, 0.0], [1.0, 2.0], [1.0, 4.0]]])
    found = gradients(scores, np.array([[1.0, 0.0, 0.0]]), [np.array([0, 1, 2])])
    np.testing.assert_allclose(found, [[2 / 3, -1.0]])


def test_combined_gradients_have_the_inner_products_of_their_sums() -> None:
    generator = np.random.default_rng(0)
    scores, rewards = generator.standard_normal((3, 8, 20)).astype(np.float32), generator.integers(0, 2, (3, 8)) * 1.0
    products = Products([scores.reshape(24, 20)])
    measured = Measured(rewards, np.arange(24).reshape(3, 8))
    taken = [np.array([0, 3, 5]), np.array([1, 2]), np.arange(8)]
    rows = gradients(scores, rewards, taken)
    weights = measured.weights(taken, products.size)
    np.testing.assert_allclose(products.between(weights), rows @ rows.T, rtol=1e-4, atol=1e-5)
    total, first = rows.mean(0), rows[2]
    cosine = total @ first / np.linalg.norm(total) / np.linalg.norm(first)
    assert products.cosine(weights.mean(0), weights[2]) == pytest.approx(cosine, abs=1e-5)


def test_the_change_of_the_reward_is_weighted_by_likelihood() -> None:
    """One prompt, two completions, rewards 1 and 0: the first becomes twice as likely, so 1 x (2 - 1) / 2."""
    before, after = np.log([[0.2, 0.3]]), np.log([[0.4, 0.3]])
    weights = np.array([centred([1.0, 0.0])])
    assert change(np.repeat(before, 2, 0), np.repeat(after, 2, 0), np.repeat(weights, 2, 0))[0] == pytest.approx(0.5)


def test_a_pilot_that_was_stopped_goes_on_as_if_it_had_not_been(folder, data, tmp_path, easy, monkeypatch):
    def lines(run: str, *stops: int) -> list[dict[str, Any]]:
        for steps in stops:
            command = f"pilot.py --model {folder} --data {data} --output {tmp_path / run}"
            command += f" --choose likeness --steps {steps} --prompts 2 --every 2 --save-every 1 --longest 6"
            monkeypatch.setattr(sys, "argv", command.split())
            pilot.main()
        found = [json.loads(line) for line in (tmp_path / run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        return [{name: value for name, value in line.items() if name != "seconds"} for line in found]

    whole = lines("whole", 4)
    assert [line["evaluated"] for line in whole if "evaluated" in line] == [0, 2, 4]
    assert lines("parts", 2, 4) == whole
