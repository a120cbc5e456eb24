"""The table of docs/architectures.md: how a tiny random model of each family is scored and read, against autograd.

    python -m tests.gradients.coverage_table
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.gradients.architectures import GROUPS, SETTINGS, Builder, autograd
from tests.gradients.test_every_causal_lm import VALIDATION, adapted, build, flat
from tests.gradients.test_model_families import FAMILIES as CLASSES
from tests.gradients.test_reading import WEIGHTS, directions_for, expected, gap, loss_of_rows, rows_of_tokens
from torch import Tensor, nn

from cropi.gradients.influence_scorer import ScorerOptions, scorer_of
from cropi.gradients.training_influence import Reader

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"

KINDS = {
    "Llama": "llama",
    "Llama 4": "llama4_text",
    "Mistral": "mistral",
    "Ministral 3": "ministral3",
    "Mixtral": "mixtral",
    "Qwen2": "qwen2",
    "Qwen2-MoE": "qwen2_moe",
    "Qwen3": "qwen3",
    "Qwen3-MoE": "qwen3_moe",
    "Qwen3-Next": "qwen3_next",
    "Qwen3.5": "qwen3_5_text",
    "Qwen3.5-MoE": "qwen3_5_moe_text",
    "Gemma": "gemma",
    "Gemma 2": "gemma2",
    "Gemma 3": "gemma3_text",
    "Gemma 4": "gemma4_text",
    "GPT-OSS": "gpt_oss",
    "GPT-2": "gpt2",
    "GPT-J": "gptj",
    "GPT-NeoX": "gpt_neox",
    "StarCoder": "gpt_bigcode",
    "StarCoder2": "starcoder2",
    "DeepSeek-V2": "deepseek_v2",
    "DeepSeek-V3": "deepseek_v3",
    "DeepSeek-V3.2": "deepseek_v32",
    "DeepSeek-V4": "deepseek_v4",
    "GLM-4": "glm4",
    "GLM-4-MoE": "glm4_moe",
    "Granite": "granite",
    "Granite MoE": "granitemoe",
    "Granite hybrid": "granitemoehybrid",
    "Cohere": "cohere",
    "Cohere 2": "cohere2",
    "Phi": "phi",
    "Phi-3": "phi3",
    "Phi-3.5-MoE": "phimoe",
    "OLMo": "olmo",
    "OLMo 2": "olmo2",
    "OLMo 3": "olmo3",
    "OLMoE": "olmoe",
    "SmolLM3": "smollm3",
    "LFM2": "lfm2",
    "LFM2-MoE": "lfm2_moe",
    "Falcon": "falcon",
    "Falcon-H1": "falcon_h1",
    "Mamba 2": "mamba2",
    "Bamba": "bamba",
    "Jamba": "jamba",
    "Nemotron": "nemotron",
    "Nemotron-H": "nemotron_h",
    "RecurrentGemma": "recurrent_gemma",
    "MiniCPM3": "minicpm3",
    "MiniMax-M2": "minimax_m2",
    "EXAONE 4": "exaone4",
    "ERNIE 4.5": "ernie4_5",
    "ERNIE 4.5 MoE": "ernie4_5_moe",
    "Hunyuan": "hunyuan_v1_dense",
    "StableLM": "stablelm",
    "Seed-OSS": "seed_oss",
    "BLOOM": "bloom",
}
WITH_IMAGES = ["Gemma 3", "Gemma 4", "Qwen2.5-VL", "Qwen3-VL", "Mistral 3", "LLaVA", "SmolVLM", "Aya Vision"]


def _class_with_images(name: str) -> Builder:
    known = CLASSES.get(f"{name} with images") or CLASSES[name]
    return lambda: known().float()


MODELS: dict[str, Builder] = {name: (lambda kind=kind: build(kind)) for name, kind in KINDS.items()} | {
    f"{name}, images left out": _class_with_images(name) for name in WITH_IMAGES
}

INTRODUCTION = """\
# Architectures

What cropi does with each family, on a tiny random model of its class in transformers. Everything here was compared with
autograd through the model itself, one row at a time.

- **Scoring** (`cropi score`, `cropi.influence`): `packed` is [the engine](engine.md). `autograd` means that the engine
  refuses the model, which a warning says once, and autograd scores it one prompt at a time: as right, but slower. With
  LoRA the adapters are on the attention's layers. Error: |found − right| / |right| of the influence of a few prompts,
  the larger of both ways.
- **Reading while training** (the curriculum): the share of the squared gradient, over all weights, that lies in layers
  which are read, and the error of what is read. Experts, short convolutions and the states of recurrent layers are not
  read. The share of a real model is another one; training measures it. With LoRA it is {lora} for every family.

`python -m tests.gradients.coverage_table` writes this page (float32, CPU, one draw of the weights).

| family | scoring | with LoRA | error | share read | error |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Coverage:
    """What was found for one family."""

    ways: tuple[str, str]  # of scoring: all weights, and LoRA
    score_error: float
    shares: tuple[float, float]  # of the squared gradient that is read: all weights, and LoRA
    read_error: float


def coverage(name: str) -> Coverage:
    """Score and read a family's model, whole and with adapters where PEFT can make them."""
    model = MODELS[name]()
    ways, errors, shares, read_errors = zip(*_whole_and_adapted(model), strict=True)
    return Coverage((ways[0], ways[-1] if len(ways) > 1 else "–"), max(errors), (shares[0], shares[-1]), max(read_errors))


def _whole_and_adapted(model: Any) -> list[tuple[str, float, float, float]]:
    found = [(*_scored(model), *_read(model))]
    with_adapters = adapted(model)
    return found if with_adapters is None else [*found, (*_scored(with_adapters), *_read(with_adapters))]


def _scored(model: nn.Module) -> tuple[str, float]:
    """How, and the relative error of the influence of three prompts."""
    scorer = scorer_of(model, SETTINGS, ScorerOptions("exact"))
    scorer.aim({"v": VALIDATION})
    found = torch.tensor(scorer(GROUPS).products_NV[:, 0])
    direction = sum(flat(autograd(model, group)) for group in VALIDATION) / len(VALIDATION)
    right = torch.stack([flat(autograd(model, group)) @ direction for group in GROUPS])
    return "packed" if scorer.estimator == "exact" else "autograd", gap(found, right)


def _read(model: nn.Module) -> tuple[float, float]:
    """The share of the squared gradient that is read, and the relative error of four rows."""
    directions, (ids, mask) = directions_for(model), rows_of_tokens()
    reader = Reader(model, directions)

    def passed() -> Tensor:
        with reader.reading(torch.arange(len(ids)), model):
            loss_of_rows(model, ids, mask, WEIGHTS).backward()
        return reader.take()[1]

    passed()
    _, share = reader.exclude_unfaithful()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in reader.read_parameters)
    error = gap(passed(), expected(model, directions, ids, mask, WEIGHTS))
    for parameter in trained:
        parameter.requires_grad_()
    model.zero_grad()
    return share, error


def line(name: str, found: Coverage) -> str:
    cells = [name, *found.ways, f"{found.score_error:.0e}", f"{found.shares[0]:.0%}", f"{found.read_error:.0e}"]
    return f"| {' | '.join(cells)} |"


def lines_by_family() -> dict[str, list[str]]:
    """The cells of the page, by family."""
    rows = [row.strip("| \n").split(" | ") for row in PAGE.read_text(encoding="utf-8").splitlines() if row[:2] == "| "]
    return {name: cells for name, *cells in rows[1:]}


def main() -> None:
    found = {name: coverage(name) for name in MODELS}
    lora = min(each.shares[1] for each in found.values() if each.ways[1] != "–")
    text = INTRODUCTION.format(lora=f"{lora:.0%}") + "".join(f"{line(*each)}\n" for each in found.items())
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
