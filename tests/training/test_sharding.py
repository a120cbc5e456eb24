"""Which ways of dividing a policy's weights a training refuses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from cropi.errors import ConfigError
from cropi.training.sharding import OPTIMIZER, check_sharding

FSDP2: dict[str, Any] = {"fsdp_version": 2, "state_dict_type": "StateDictType.FULL_STATE_DICT"}
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


def trainer(plugin: dict[str, Any] | None, *, deepspeed: bool = False, model: Any = None) -> Any:
    """As much of a trainer as is looked at."""
    state = SimpleNamespace(fsdp_plugin=None if plugin is None else SimpleNamespace(**plugin))
    enabled = {"is_fsdp_enabled": plugin is not None, "is_deepspeed_enabled": deepspeed}
    return SimpleNamespace(accelerator=SimpleNamespace(state=state), model=model, **enabled)


def test_fsdp2_and_plain_data_parallelism_are_taken() -> None:
    check_sharding(trainer(None), "float32", None)
    check_sharding(trainer(FSDP2), "float32", None)
    check_sharding(trainer(FSDP2 | {"mixed_precision_policy": BFLOAT16}), "bfloat16", None)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (trainer(None, deepspeed=True), "by DeepSpeed"),
        (trainer(FSDP2 | {"fsdp_version": 1}), "by FSDP1"),
        (trainer(FSDP2 | {"state_dict_type": "StateDictType.SHARDED_STATE_DICT"}), "set it to FULL_STATE_DICT"),
        (trainer(FSDP2 | {"cpu_offload": CPUOffloadPolicy()}), "rest on the CPU"),
        (trainer(FSDP2, model=SimpleNamespace(get_base_model=None)), "policy.lora"),
        (trainer(FSDP2 | {"mixed_precision_policy": BFLOAT16}), "rounds the weights to torch.bfloat16"),
    ],
)
def test_what_is_refused(refused: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sharding(refused, "float32", None)


def test_a_checkpoint_goes_on_as_it_was_begun(tmp_path: Path) -> None:
    check_sharding(trainer(None), "float32", tmp_path)
    with pytest.raises(ConfigError, match="began without FSDP and would go on with it"):
        check_sharding(trainer(FSDP2), "float32", tmp_path)
    (tmp_path / OPTIMIZER).touch()
    check_sharding(trainer(FSDP2), "float32", tmp_path)
    with pytest.raises(ConfigError, match="began under FSDP and would go on without it"):
        check_sharding(trainer(None), "float32", tmp_path)
