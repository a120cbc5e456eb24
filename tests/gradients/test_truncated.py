"""`mask_truncated_completions`: the surrogate's gradient is that of TRL's own loss on the same completions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tests.gradients.architectures import Gradients, dense_gradients
from tests.runs import SMALL, cropi_ok, grpo_args, trajectory
from trl import GRPOTrainer

from cropi.artifacts import OK, TRAJECTORIES, TRUNCATED, read_table, write_table
from cropi.config import PolicyConfig
from cropi.functional.surrogate import NORMALIZER_OF_LOSS
from cropi.gradients.groups import Group, SurrogateSettings, group_facts, iterate_groups
from cropi.gradients.reference import prompt_gradient
from cropi.policy import load_policy
from cropi.rollouts.shards import read_trajectories
from cropi.run_tables import scores_schema

LENGTH, COUNT, TEMPERATURE = 6, 8, 1.3


class Watching(GRPOTrainer):
    """Keeps the completions of its one batch, their rewards, and the gradient of its loss before it learns."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        loss: torch.Tensor = super()._compute_loss(model, inputs)
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(loss, list(named.values()), retain_graph=True)
        self.gradient: Gradients = {name: g.double() for name, g in zip(named, found, strict=True)}
        self.prompt_ids = inputs["prompt_ids"][0][inputs["prompt_mask"][0].bool()].tolist()
        return loss


def row(k: int, prompt: list[int], completion: list[int], logprobs: list[float] | None, status: str) -> dict[str, Any]:
    """A trajectory as it is stored; its reward is k modulo 3."""
    ids = {"prompt_ids": prompt, "completion_ids": completion, "behaviour_logprobs": logprobs}
    return trajectory("p", sample=k, reward=float(k % 3), status=status, **ids)


def trained(loss_type: str, folder: Path) -> tuple[Watching, Any, list[dict[str, Any]]]:
    """A trainer after one step on one group, the policy before it, and the group as trajectories are stored."""
    policy = load_policy(PolicyConfig(path="builtin", cpu_threads=1))
    seen: list[list[list[int]]] = []

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.append(completion_ids)
        return [float(k % 3) for k in range(len(completion_ids))]

    sizes = {"max_steps": 1, "per_device_train_batch_size": COUNT, "num_generations": COUNT}
    loss = {"max_completion_length": LENGTH, "temperature": TEMPERATURE, "loss_type": loss_type, "beta": 0.0}
    arguments = grpo_args(folder, **sizes, **loss, mask_truncated_completions=True)
    data = Dataset.from_list([{"prompt": "3+4="}] * COUNT)
    trainer = Watching(policy.model, reward, args=arguments, train_dataset=data, processing_class=policy.tokenizer)
    trainer.train()
    rows = [
        row(k, trainer.prompt_ids, ids, None, OK if ids[-1] in policy.eos_ids else TRUNCATED)
        for k, ids in enumerate(seen[0])
    ]
    return trainer, load_policy(PolicyConfig(path="builtin", cpu_threads=1)).model, rows


def stored(rows: list[dict[str, Any]], folder: Path, *, mask: bool) -> Group:
    folder.mkdir()
    write_table(folder / "part-00000.parquet", rows, TRAJECTORIES)
    [(_, group)] = iterate_groups(read_trajectories(folder, mask_truncated=mask)["train"])
    return group


def by_engine(model: Any, group: Group, settings: SurrogateSettings) -> Gradients:
    return {name: gradient.double() for name, gradient in dense_gradients(model, [group], settings).items()}


def by_reference(model: Any, group: Group, settings: SurrogateSettings) -> Gradients:
    return {name: g.double() for name, g in prompt_gradient(model, group, settings).gradients.items()}


def flat(gradients: Gradients) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "bnpo", "dapo"])
def test_the_gradient_is_that_of_trl(loss_type: str, tmp_path: Path) -> None:
    trainer, model, rows = trained(loss_type, tmp_path / "trl")
    assert 0 < [row["status"] for row in rows].count(TRUNCATED) < COUNT
    settings = SurrogateSettings(NORMALIZER_OF_LOSS[loss_type], LENGTH, TEMPERATURE)
    theirs = -flat(trainer.gradient)
    group = stored(rows, tmp_path / "masked", mask=True)
    for compute in (by_engine, by_reference):
        ours = flat(compute(model, group, settings))
        if loss_type in {"bnpo", "dapo"}:  # these divide by what the tokens of a batch come to
            ours = ours * (theirs.norm() / ours.norm())
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))
    unmasked = flat(by_engine(model, stored(rows, tmp_path / "unmasked", mask=False), settings))
    assert float(torch.cosine_similarity(unmasked, theirs, dim=0)) < 0.99


def test_a_group_of_truncated_completions_alone_has_no_signal(tmp_path: Path) -> None:
    rows = [row(k, [3], [4, 5], [-1.0, -2.0], TRUNCATED) for k in range(2)]
    group = stored(rows, tmp_path / "part", mask=True)
    assert (group.completions, group.behaviour_logprobs) == ([[], []], [[], []])
    [facts] = group_facts(read_trajectories(tmp_path / "part", mask_truncated=True)["train"]).values()
    assert (facts.status, facts.pass_rate) == ("no_signal", 0.5)


def test_a_run_scores_by_what_its_trainer_learns_from(tmp_path: Path) -> None:
    masked = [*SMALL, "collect.max_completion_length=4", "trainer.mask_truncated_completions=true"]
    for command in ("collect", "score"):
        cropi_ok(command, "quickstart", *masked, cwd=tmp_path)
    [run] = (tmp_path / "runs").iterdir()
    [path] = run.glob("scores/*/scores.parquet")
    scored = {row["prompt_id"]: row for row in read_table(path, scores_schema(["sum"])).to_pylist()}
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in read_trajectories(run / "trajectories")["train"].to_pylist():
        groups.setdefault(row["prompt_id"], []).append(row)
    assert sum(row["status"] == TRUNCATED for rows in groups.values() for row in rows) > 0
    for prompt_id, rows in groups.items():
        whole = [row for row in rows if row["status"] != TRUNCATED]
        assert scored[prompt_id]["completion_tokens"] == sum(len(row["completion_ids"]) for row in whole)
        assert scored[prompt_id]["pass_rate"] == pytest.approx(sum(row["reward"] for row in rows) / len(rows))
        assert whole or scored[prompt_id]["status"] == "no_signal"
