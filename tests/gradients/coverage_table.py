"""The table of docs/architectures.md: how a tiny random model of each family is scored and read, against autograd.

python -m tests.gradients.coverage_table
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tests.gradients.architectures import GROUPS, SETTINGS, Builder, influence_by_autograd
from tests.gradients.test_every_causal_lm import VALIDATION, adapted, build
from tests.gradients.test_model_families import FAMILIES as CLASSES
from tests.gradients.test_reading import WEIGHTS, directions_for, expected, gap, loss_of_rows, rows_of_tokens
from torch import Tensor, nn

from cropi.gradients.influence_scorer import ScorerOptions, scorer_of
from cropi.gradients.training_influence import Reader

PAGE = Path(__file__).resolve().parents[2] / "docs" / "architectures.md"

KINDS = {
    "Llama": "llama", "Llama 4": "llama4_text", "Mistral": "mistral", "Ministral 3": "ministral3",
    "Mixtral": "mixtral", "Qwen2": "qwen2", "Qwen2-MoE": "qwen2_moe", "Qwen3": "qwen3", "Qwen3-MoE": "qwen3_moe",
    "Qwen3-Next": "qwen3_next", "Qwen3.5": "qwen3_5_text", "Qwen3.5-MoE": "qwen3_5_moe_text", "Gemma": "gemma",
    "Gemma 2": "gemma2", "Gemma 3": "gemma3_text", "Gemma 4": "gemma4_text", "GPT-OSS": "gpt_oss", "GPT-2": "gpt2",
    "GPT-J": "gptj", "GPT-NeoX": "gpt_neox", "StarCoder": "gpt_bigcode", "StarCoder2": "starcoder2",
    "DeepSeek-V2": "deepseek_v2", "DeepSeek-V3": "deepseek_v3", "DeepSeek-V3.2": "deepseek_v32",
    "DeepSeek-V4": "deepseek_v4", "GLM-4": "glm4", "GLM-4-MoE": "glm4_moe", "Granite": "granite",
    "Granite MoE": "granitemoe", "Granite hybrid": "granitemoehybrid", "Cohere": "cohere", "Cohere 2": "cohere2",
    "Phi": "phi", "Phi-3": "phi3", "Phi-3.5-MoE": "phimoe", "OLMo": "olmo", "OLMo 2": "olmo2", "OLMo 3": "olmo3",
    "OLMoE": "olmoe", "SmolLM3": "smollm3", "LFM2": "lfm2", "LFM2-MoE": "lfm2_moe", "Falcon": "falcon",
    "Falcon-H1": "falcon_h1", "Mamba 2": "mamba2", "Bamba": "bamba", "Jamba": "jamba", "Nemotron": "nemotron",
    "Nemotron-H": "nemotron_h", "RecurrentGemma": "recurrent_gemma", "MiniCPM3": "minicpm3",
    "MiniMax-M2": "minimax_m2", "EXAONE 4": "exaone4", "ERNIE 4.5": "ernie4_5", "ERNIE 4.5 MoE": "ernie4_5_moe",
    "Hunyuan": "hunyuan_v1_dense", "StableLM": "stablelm", "Seed-OSS": "seed_oss", "BLOOM": "bloom",
}  # fmt: skip
WITH_IMAGES = [
    "Gemma 3 with images",
    "Gemma 4 with images",
    "Qwen2.5-VL",
    "Qwen3-VL",
    "Mistral 3",
    "LLaVA",
    "SmolVLM",
    "Aya Vision",
]
MODELS: dict[str, Builder] = {name: partial(build, kind) for name, kind in KINDS.items()} | {
    name: lambda name=name: CLASSES[name]().float() for name in WITH_IMAGES
}


@dataclass(frozen=True)
class Found:
    """What was found for one model."""

    scoring: str
    score_error: float
    share: float  # of the squared gradient that is read
    read_error: float


def coverage(name: str) -> list[Found]:
    """Score and read a family's model, whole and with adapters; without the second where PEFT cannot make them."""
    model = MODELS[name]()
    found = [Found(*_scored(model), *_read(model))]
    with_adapters = adapted(model)
    return found if with_adapters is None else [*found, Found(*_scored(with_adapters), *_read(with_adapters))]


def _scored(model: nn.Module) -> tuple[str, float]:
    """How, and the relative error of the influence of three prompts."""
    scorer = scorer_of(model, SETTINGS, ScorerOptions("exact"))
    scorer.aim({"v": VALIDATION})
    found = torch.tensor(scorer(GROUPS).products_NV[:, 0])
    right, _ = influence_by_autograd(model, GROUPS, VALIDATION)
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


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def cells(found: Sequence[Found]) -> list[str]:
    """A family's line of the table: scoring whole and with LoRA, its error, share read, its error."""
    ways = [each.scoring for each in found] + ["–"] * (2 - len(found))
    errors = [max(each.score_error for each in found), max(each.read_error for each in found)]
    return [*ways, f"{errors[0]:.0e}", percent(found[0].share), f"{errors[1]:.0e}"]


def cells_by_family() -> dict[str, list[str]]:
    """The cells of the page, by family."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return {name: row for name, *row in (line.strip("| ").split(" | ") for line in lines[1:])}


def main() -> None:
    above, rule, _ = PAGE.read_text(encoding="utf-8").partition("|---|---|---|---|---|---|\n")
    lines = [f"| {' | '.join([name, *cells(coverage(name))])} |\n" for name in MODELS]
    PAGE.write_text(above + rule + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
