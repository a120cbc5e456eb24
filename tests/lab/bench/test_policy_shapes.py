from pathlib import Path

import pytest
from transformers import AutoConfig

from cropi.lab.bench.policy_shapes import SHAPES, make_policy, parameter_count, policy_config

PUBLISHED = {
    "135m": 134_515_008,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-7b": 7_615_616_512,
}


@pytest.mark.parametrize(("name", "count"), PUBLISHED.items())
def test_shapes_have_the_published_parameter_counts(name: str, count: int) -> None:
    assert parameter_count(AutoConfig.for_model(SHAPES[name].model_type, **SHAPES[name].settings)) == count


def test_a_policy_is_written_and_the_same_seed_writes_the_same(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_policy("tiny", tmp_path / name, dtype="float32", device="cpu", seed=seed)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert policy_config(tmp_path / "a").vocab_size == 256
