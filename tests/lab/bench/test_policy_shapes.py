from pathlib import Path

import pytest
from transformers import AutoConfig

from cropi.lab.bench.policy_shapes import SHAPES, forward_flops, make_policy, parameter_count, policy_config
from cropi.lab.bench.worker_protocol import WeightedGroup

PUBLISHED = {
    "135m": 134_515_008,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_shapes_have_the_published_parameter_counts(name: str, count: int) -> None:
    assert parameter_count(AutoConfig.for_model(SHAPES[name].model_type, **SHAPES[name].settings)) == count


def test_the_ten_million_shape_has_ten_million_parameters() -> None:
    config = AutoConfig.for_model(SHAPES["10m"].model_type, **SHAPES["10m"].settings)
    assert parameter_count(config) == pytest.approx(10e6, rel=0.1)


def test_a_policy_is_written_and_the_same_seed_writes_the_same(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_policy("tiny", tmp_path / name, dtype="float32", device="cpu", seed=seed)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert policy_config(tmp_path / "a").vocab_size == 256


def test_flops_of_a_forward_pass_by_hand() -> None:
    config = AutoConfig.for_model(
        "llama",
        hidden_size=4,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=10,
    )
    # 2 prompt tokens and 3 + 1 - 2 completion tokens go through the model; 4 predict.
    groups = [
        WeightedGroup("a", [1, 2], [[3, 4, 5], [6]], [1.0, -1.0]),
        WeightedGroup("no signal", [1, 2], [[3]], [0.0]),
    ]
    attention = 4 * 2 * (2 + 2 * 1) + 4 * 4
    layer = attention + 3 * 4 * 8
    seen = (1 + 2) + (3 + 4)  # each token sees itself and those before it
    expected = 2 * layer + 2 * 4 * 10 * 4 / 4 + 4 * 4 * seen / 4
    assert forward_flops(config, groups) == pytest.approx(expected)
