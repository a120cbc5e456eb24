"""A run that trains adapters of low rank."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cropi.config import LoraConfig, PolicyConfig
from cropi.config.loading import load_config
from cropi.errors import PolicyError
from cropi.gradients.reference import trainable_parameters
from cropi.inspection import check_run
from cropi.pipeline import train_all
from cropi.policy import fingerprint, load_policy
from cropi.stages.collect import collect
from cropi.stages.run import Run
from cropi.stages.score import read_scores
from tests.runs import SMALL

PLAIN = PolicyConfig(path="builtin", cpu_threads=1)
LORA = PLAIN.model_copy(update={"lora": LoraConfig(r=4, alpha=8)})
IDS = torch.tensor([[5, 6, 7, 8]])


def logits(config: PolicyConfig, location: str | None = None) -> torch.Tensor:
    with torch.no_grad():
        return load_policy(config, location).model(input_ids=IDS).logits


def test_new_adapters_change_nothing_and_are_all_that_is_trained() -> None:
    assert torch.equal(logits(LORA), logits(PLAIN))
    trained = trainable_parameters(load_policy(LORA).model)
    assert trained
    assert all("lora_" in name for name in trained)


def test_the_same_seed_gives_the_same_adapters_and_leaves_random_numbers_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    one, two = load_policy(LORA).model.state_dict(), load_policy(LORA).model.state_dict()
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_settings_of_the_adapters_are_part_of_the_policy_s_identity() -> None:
    other = LORA.model_copy(update={"lora": LoraConfig(r=8, alpha=8)})
    assert len({fingerprint(PLAIN), fingerprint(LORA), fingerprint(other)}) == 3
    assert fingerprint(LORA) == fingerprint(LORA)


def test_a_run_trains_scores_and_loads_adapters(tmp_path: Path) -> None:
    more = [f"run_dir={tmp_path}", "policy.lora={r: 4, alpha: 8}", "trainer.learning_rate=1e-3"]
    pipeline = Run(load_config("quickstart", [*SMALL, *more]))
    collect(pipeline)
    last = train_all(pipeline)
    saved = load_file(last / "adapter_model.safetensors")
    assert saved
    assert all("lora_" in name for name in saved)
    assert not (last / "model.safetensors").exists()
    base, trained = load_policy(LORA).model.state_dict(), load_policy(LORA, str(last)).model.state_dict()
    moved = {name for name in base if not torch.equal(base[name], trained[name])}
    assert moved
    assert all("lora_" in name for name in moved)
    influence = read_scores(pipeline, 1).column("influence/sum").drop_null().to_pylist()
    assert any(influence)
    pipeline.folder.unlock()


def test_a_layer_that_is_not_there_is_refused() -> None:
    wrong = LORA.model_copy(update={"lora": LoraConfig(target_modules=("no_such",))})
    with pytest.raises(PolicyError, match="cannot be made or loaded"):
        load_policy(wrong)


def test_the_memory_that_check_expects_counts_the_frozen_weights() -> None:
    config = load_config("quickstart", [*SMALL, "policy.lora={r: 4, alpha: 8}"])
    model = load_policy(config.policy).model
    frozen = sum(p.numel() * p.element_size() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in trainable_parameters(model).values())
    assert check_run(config).estimates["model_and_optimiser_bytes"] == frozen + 16 * trained
