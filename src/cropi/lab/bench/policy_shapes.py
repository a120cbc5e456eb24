"""Policies to measure: published shapes with random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Shape:
    """A transformers architecture and the settings of its config."""

    model_type: str
    summary: str
    settings: dict[str, Any]


_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "max_position_embeddings",
)


def _shape(model_type: str, summary: str, *sizes: int, tied: bool = True) -> Shape:
    return Shape(model_type, summary, dict(zip(_SIZES, sizes, strict=True)) | {"tie_word_embeddings": tied})


SHAPES: dict[str, Shape] = {
    "tiny": _shape("qwen2", "24 thousand parameters, for trying the command out", 32, 64, 2, 4, 2, 256, 1024),
    "10m": _shape("qwen2", "10 million parameters", 320, 864, 8, 5, 5, 2048, 1024),
    "135m": _shape("llama", "SmolLM2-135M", 576, 1536, 30, 9, 3, 49152, 8192),
    "qwen2.5-0.5b": _shape("qwen2", "Qwen2.5-0.5B", 896, 4864, 24, 14, 2, 151936, 32768),
    "qwen2.5-1.5b": _shape("qwen2", "Qwen2.5-1.5B", 1536, 8960, 28, 12, 2, 151936, 32768),
    "qwen2.5-7b": _shape("qwen2", "Qwen2.5-7B", 3584, 18944, 28, 28, 4, 152064, 32768, tied=False),
}


def random_policy(shape: str, *, dtype: str, device: str, seed: int) -> PreTrainedModel:
    """Make a policy of the shape with random weights, on the device and in the dtype."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    # No token ends a sequence: with random weights it would do so anywhere.
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    config = AutoConfig.for_model(SHAPES[shape].model_type, **SHAPES[shape].settings, **special)
    torch.manual_seed(seed)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()


def make_policy(shape: str, folder: Path, *, dtype: str, device: str, seed: int) -> None:
    """Write a random policy of the shape to `folder`. No tokenizer: the benchmark has ids only."""
    import torch

    model = random_policy(shape, dtype=dtype, device=device, seed=seed)
    model.save_pretrained(folder)
    del model
    if device == "cuda":
        torch.cuda.empty_cache()


def policy_config(folder: Path) -> PretrainedConfig:
    """The config of a policy in a folder."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(folder), trust_remote_code=False)


def parameter_count(config: PretrainedConfig) -> int:
    """Count all parameters, a tied weight once."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
