"""Which ways of dividing a policy's weights a training refuses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from cropi.errors import ConfigError
from cropi.training.sharding import FSDP_OPTIMIZER, ZERO_NEWEST, check_sharding

FSDP2: dict[str, Any] = {"fsdp_version": 2, "state_dict_type": "StateDictType.FULL_STATE_DICT"}
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16)


def trainer(
    plugin: dict[str, Any] | None,
    *,
    zero: int | None = None,
    half: str = "",
    changed: dict[str, Any] | None = None,
    processes: int = 2,
    model: Any = None,
    gathers: bool = True,
) -> Any:
    """As much of a trainer as is looked at: under FSDP with this plugin, or under DeepSpeed's ZeRO."""
    whole = {"stage3_gather_16bit_weights_on_model_save": True, "offload_param": {"device": "none"}}
    settings: dict[str, Any] = {"zero_optimization": whole | {"stage": zero} | (changed or {})}
    settings |= {half: {"enabled": True}} if half else {}
    deepspeed = None if zero is None else SimpleNamespace(hf_ds_config=HfDeepSpeedConfig(settings))
    state = SimpleNamespace(
        fsdp_plugin=None if plugin is None else SimpleNamespace(**plugin), deepspeed_plugin=deepspeed
    )
    return SimpleNamespace(
        accelerator=SimpleNamespace(state=state, num_processes=processes),
        args=SimpleNamespace(ds3_gather_for_generation=gathers),
        model=model,
        is_fsdp_enabled=plugin is not None,
        is_deepspeed_enabled=zero is not None,
    )


def test_fsdp2_zero_and_plain_data_parallelism_are_taken() -> None:
    check_sharding(trainer(None, zero=1), "float32", None)
    check_sharding(trainer(None, zero=2, half="bf16"), "bfloat16", None)
    check_sharding(trainer(None, zero=2, changed={"stage3_gather_16bit_weights_on_model_save": False}), "float32", None)
    check_sharding(trainer(None, zero=3), "float32", None)
    check_sharding(trainer(None), "float32", None)
    check_sharding(trainer(FSDP2), "float32", None)
    check_sharding(trainer(FSDP2 | {"mixed_precision_policy": BFLOAT16}), "bfloat16", None)


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (trainer(None, zero=3, gathers=False), "ds3_gather_for_generation"),
        (trainer(None, zero=3, changed={"offload_param": {"device": "cpu"}}), "offload_param_device"),
        (trainer(None, zero=3, changed={"stage3_gather_16bit_weights_on_model_save": False}), "zero3_save_16bit_model"),
        (trainer(None, zero=2, half="bf16"), "DeepSpeed trains with rounded weights, to torch.bfloat16"),
        (trainer(None, zero=2, half="fp16"), "to torch.float16, but the policy is scored in float32"),
        (trainer(FSDP2 | {"fsdp_version": 1}), "FSDP1"),
        (trainer(FSDP2 | {"state_dict_type": "StateDictType.SHARDED_STATE_DICT"}), "set it to FULL_STATE_DICT"),
        (trainer(FSDP2 | {"cpu_offload": CPUOffloadPolicy()}), "offloaded to the CPU"),
        (trainer(FSDP2, model=SimpleNamespace(get_base_model=None)), "policy.lora"),
        (trainer(FSDP2 | {"mixed_precision_policy": BFLOAT16}), "FSDP rounds the weights .*, to torch.bfloat16"),
    ],
)  # fmt: skip
def test_what_is_refused(refused: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_sharding(refused, "float32", None)


def test_a_checkpoint_goes_on_as_it_was_begun(tmp_path: Path) -> None:
    plain, fsdp, zero = trainer(None), trainer(FSDP2), trainer(None, zero=2)
    check_sharding(plain, "float32", tmp_path)
    with pytest.raises(ConfigError, match="began with plain data parallelism and would continue with FSDP"):
        check_sharding(fsdp, "float32", tmp_path)
    (tmp_path / FSDP_OPTIMIZER).touch()
    check_sharding(fsdp, "float32", tmp_path)
    with pytest.raises(ConfigError, match="began with FSDP and would continue with DeepSpeed"):
        check_sharding(zero, "float32", tmp_path)
    (tmp_path / FSDP_OPTIMIZER).unlink()
    (tmp_path / ZERO_NEWEST).touch()
    (tmp_path / "global_step3").mkdir()
    for rank in (0, 1):
        (tmp_path / f"global_step3/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    check_sharding(zero, "float32", tmp_path)
    with pytest.raises(ConfigError, match="with DeepSpeed's ZeRO-1 or 2 and would continue with DeepSpeed's ZeRO-3"):
        check_sharding(trainer(None, zero=3), "float32", tmp_path)
    with pytest.raises(ConfigError, match="over 2 processes, but there are 3 now"):
        check_sharding(trainer(None, zero=2, processes=3), "float32", tmp_path)
    with pytest.raises(
        ConfigError, match="began with DeepSpeed's ZeRO-1 or 2 and would continue with plain data parallelism"
    ):
        check_sharding(plain, "float32", tmp_path)
    for rank in (0, 1):
        (tmp_path / f"global_step3/zero_pp_rank_{rank}_mp_rank_00_model_states.pt").touch()
    check_sharding(trainer(None, zero=3), "float32", tmp_path)
    with pytest.raises(ConfigError, match="with DeepSpeed's ZeRO-3 and would continue with DeepSpeed's ZeRO-1 or 2"):
        check_sharding(zero, "float32", tmp_path)
