"""Families of policies against plain autograd through the model as it is, one row at a time: gradients, dot and cosine,
all weights and LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from tests.gradients.architectures import (
    GROUPS,
    SETTINGS,
    TEXT,
    VOCABULARY,
    Gradients,
    autograd,
    check_gradients,
    dense_gradients,
    draw_group,
    drawn,
    relative_gap,
    segments,
    text,
    with_lora,
)
from tests.gradients.footprint import check_unchanged, state
from tests.gradients.test_capture import EXPERTS
from torch import Tensor, nn

import cropi
from cropi.errors import PolicyError
from cropi.gradients.capture import FactorReader
from cropi.gradients.engine import Engine
from cropi.gradients.groups import Group
from cropi.gradients.influence_scorer import ScorerOptions
from cropi.gradients.reference import prompt_gradient
from cropi.policy import Policy, weights_identity

VISION = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
QWEN_VISION = {"intermediate_size": 24, "depth": 1, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4}
ALL_FULL = {"layer_types": ["full_attention"] * 2, "sliding_window": 4}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8}


def vlm(
    prefix: str, kind: str | None, vision: dict[str, Any], changes: dict[str, Any], **top: Any
) -> Callable[[], Any]:
    """Builds a class with a vision tower; `kind` is the text model's type, where the class takes several."""

    def build() -> Any:
        torch.manual_seed(0)
        of_text = TEXT | changes | ({} if kind is None else {"model_type": kind})
        config = getattr(transformers, f"{prefix}Config")(text_config=of_text, vision_config=vision, **top)
        return drawn(getattr(transformers, f"{prefix}ForConditionalGeneration")(config))

    return build


def rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 100.0, **settings}}


LONGROPE = rope(
    "longrope", original_max_position_embeddings=15, short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0, 5.0]
)
IMAGE = {"image_token_id": 40}
QWEN_TOKENS = IMAGE | {"video_token_id": 39, "vision_start_token_id": 38, "vision_end_token_id": 37}
SIGLIP, CLIP = VISION | {"model_type": "siglip_vision_model"}, VISION | {"model_type": "clip_vision_model"}
GEMMA4 = {"global_head_dim": 8, "hidden_size_per_layer_input": 4, "vocab_size_per_layer_input": VOCABULARY}
GEMMA4_VISION = VISION | {"num_key_value_heads": 2, "head_dim": 8, "patch_size": 4, "position_embedding_size": 16}

FAMILIES: dict[str, Callable[[], Any]] = {
    # masks that no layer uses
    "Gemma 2, no window": text("Gemma2", **ALL_FULL, query_pre_attn_scalar=24),
    "Gemma 3, no window": text("Gemma3Text", "Gemma3", **ALL_FULL),
    "Gemma 4, no window": text("Gemma4Text", "Gemma4", **ALL_FULL, **GEMMA4, num_kv_shared_layers=0),
    "OLMo 3, no window": text("Olmo3", **ALL_FULL),
    "Ministral, no window": text("Ministral", **ALL_FULL),
    "Cohere 2, no window": text("Cohere2", **ALL_FULL),
    "OLMo 3": text("Olmo3", **MIXED),
    "Gemma 4, layers that share keys": text("Gemma4Text", "Gemma4", **GEMMA4, num_hidden_layers=4,
        num_kv_shared_layers=2, layer_types=MIXED["layer_types"] * 2, sliding_window=4, use_double_wide_mlp=False),
    # constants and caps at the head
    "Granite": text("Granite", logits_scaling=8.0, embedding_multiplier=3.0, attention_multiplier=0.3),
    "Granite, untied": text("Granite", logits_scaling=1.1, tie_word_embeddings=False),
    "Cohere": text("Cohere", logit_scale=0.0625),
    "Cohere 2": text("Cohere2", **MIXED, logit_scale=0.25),
    "HyperCLOVA X": text("HyperCLOVAX", logits_scaling=0.2),
    "MiniCPM 3, hidden states scaled": text("MiniCPM3", **LATENT, dim_model_base=4, num_key_value_heads=4, head_dim=4),
    "Gemma 2, caps": text("Gemma2", **MIXED, query_pre_attn_scalar=24, attn_logit_softcapping=3.0,
        final_logit_softcapping=4.0),
    "VaultGemma, cap": text("VaultGemma", **MIXED, query_pre_attn_scalar=24, final_logit_softcapping=4.0),
    # rotary positions that change with the length of the sequence
    "Phi-3, longrope": text("Phi3", **LONGROPE, original_max_position_embeddings=15),
    "MiniCPM 3, longrope": text("MiniCPM3", **LATENT, **rope("longrope", original_max_position_embeddings=15,
        short_factor=[1.0, 1.1], long_factor=[2.0, 4.0]), num_key_value_heads=4, head_dim=4),
    "Llama, dynamic": text("Llama", **rope("dynamic", factor=4.0), max_position_embeddings=15),
    # vision towers, on text
    "Gemma 3 with images": vlm("Gemma3", None, VISION, MIXED, mm_tokens_per_image=4, image_token_index=40,
        boi_token_index=39, eoi_token_index=38),
    "Gemma 4 with images": vlm("Gemma4", None, GEMMA4_VISION, MIXED | GEMMA4 | {"num_kv_shared_layers": 0,
        "pad_token_id": 0}, audio_config=None, **IMAGE, boi_token_id=39, eoi_token_id=38, video_token_id=37),
    "Qwen2.5-VL": vlm("Qwen2_5_VL", None, QWEN_VISION | {"hidden_size": 16, "window_size": 16,
        "fullatt_block_indexes": [0]}, rope("default", mrope_section=[1, 1, 2]), **QWEN_TOKENS),
    "Qwen3-VL": vlm("Qwen3VL", None, QWEN_VISION | {"hidden_size": 16, "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0]}, rope("default", mrope_section=[2, 1, 1]), **QWEN_TOKENS),
    "Mistral 3": vlm("Mistral3", "mistral", VISION | {"model_type": "pixtral", "head_dim": 8}, {},
        image_token_index=40),
    "LLaVA": vlm("Llava", "llama", CLIP, {}, image_token_index=40),
    "LLaVA-NeXT, untied": vlm("LlavaNext", "llama", CLIP, {"tie_word_embeddings": False}, image_token_index=40),
    "SmolVLM": vlm("SmolVLM", "llama", VISION, {}, **IMAGE, scale_factor=2),
    "Aya Vision": vlm("AyaVision", "cohere2", SIGLIP, MIXED | {"logit_scale": 0.25}, image_token_index=40),
}  # fmt: skip


LAYOUTS = {
    "Llama, linear": text("Llama", **rope("linear", factor=4.0)),
    "Llama, YaRN": text("Llama", **rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "Gemma": text("Gemma", num_key_value_heads=1),
    "GPTBigCode, positions in a table": text("GPTBigCode", activation_function="gelu"),
    "OLMo 2, norms across heads": text("Olmo2"),
    "Phi, partial rotation": text("Phi", qk_layernorm=True, tie_word_embeddings=False),
    "Phi-3, fused projections": text("Phi3"),
    "StableLM, norms of heads": text("StableLm", num_key_value_heads=1, use_qkv_bias=True),
    "Starcoder 2, biases": text("Starcoder2", num_key_value_heads=1),
    "SmolLM 3, layers without rotation": text("SmolLM3", no_rope_layers=[0, 1]),
    "GLM 4, norms after": text("Glm4", num_key_value_heads=1),
    "Qwen3-MoE without experts": text("Qwen3Moe", num_experts=2, mlp_only_layers=[0, 1]),
    "Qwen2 with some windows": text("Qwen2", use_sliding_window=True, sliding_window=3, max_window_layers=1),
}


def inner(first: Gradients, second: Gradients) -> float:
    return sum(float((first[name] * second[name]).sum()) for name in first)


def check_family(model: Any, tolerance: float = 1e-5) -> None:
    """Gradients by parameter, and dot and cosine of two groups on the third."""
    *train, aim = check_gradients(model, tolerance)
    dots = [inner(gradient, aim) for gradient in train]
    lengths = [math.sqrt(inner(gradient, gradient) * inner(aim, aim)) for gradient in train]
    for score, right in (("dot", dots), ("cosine", [dot / both for dot, both in zip(dots, lengths, strict=True)])):
        found = cropi.influence(
            model, GROUPS[:-1], {"aim": GROUPS[-1:]}, surrogate=SETTINGS, options=ScorerOptions("exact", score)
        )
        scale = max(lengths) if score == "dot" else 1.0
        assert found.values[:, 0].tolist() == pytest.approx(right, abs=tolerance * scale), score


@pytest.mark.parametrize("name", FAMILIES)
def test_all_weights_of_a_family(name: str) -> None:
    model = FAMILIES[name]()
    autograd(model, GROUPS[0])  # some models keep what a first pass has found
    before = state(model)
    check_family(model)
    check_unchanged(model, before)


@pytest.mark.parametrize("name", LAYOUTS)
def test_gradients_of_other_layouts(name: str) -> None:
    check_gradients(LAYOUTS[name]())


USUAL = {"Gemma 4, no window", "Granite", "Phi-3, longrope", "Gemma 3 with images", "Qwen2.5-VL"}


@pytest.mark.parametrize(
    "name", [each if each in USUAL else pytest.param(each, marks=pytest.mark.slow) for each in FAMILIES]
)
def test_adapters_of_a_family(name: str) -> None:
    check_family(with_lora(FAMILIES[name]()))


@pytest.mark.parametrize(
    "build",
    [
        text("Qwen2Moe", **EXPERTS, sliding_window=0),
        text("GraniteMoe", num_local_experts=2, num_experts_per_tok=1, logits_scaling=8.0),
    ],
    ids=["Qwen2-MoE", "Granite MoE"],
)
def test_frozen_experts(build: Callable[[], Any]) -> None:
    check_family(with_lora(build().float(), ["q_proj", "o_proj"]), tolerance=1e-4)  # no experts in float64


def test_the_context_of_a_class_with_images_is_that_of_its_text_model() -> None:
    assert Policy(FAMILIES["SmolVLM"](), None).context_length == 64


class Codes(Tensor):
    """A weight kept as integers and a scale, as quantisers keep theirs: without a storage of its own, and with no
    product but that of `F.linear`."""

    @staticmethod
    def __new__(cls, codes: Tensor, scale: Tensor) -> Tensor:
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes: Tensor, scale: Tensor) -> None:
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], *_: Any) -> Tensor:
        return Codes(parts["codes"], parts["scale"])

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.linear:
            return _Product.apply(args[0], args[1])
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return Codes(args[0].codes, args[0].scale)
        raise NotImplementedError(func)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Codes) -> Tensor:
        ctx.save_for_backward(weight)
        return inputs @ (weight.codes * weight.scale).T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad @ (weight.codes * weight.scale), None


def quantised(model: Any) -> Any:
    """The model with every linear layer's weight as codes, the head's too, and adapters beside some of them."""
    for module in model.modules():
        if type(module) is nn.Linear:
            scale = module.weight.detach().abs().max() / 127
            codes = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = nn.Parameter(Codes(codes, scale), requires_grad=False)
    return with_lora(model, ["q_proj", "up_proj"])


def test_adapters_beside_quantised_weights() -> None:
    check_family(quantised(text("Llama", tie_word_embeddings=False)()))


def test_the_identity_of_quantised_weights_tells_them_apart() -> None:
    first, same, other = (quantised(text("Llama", tie_word_embeddings=False)()) for _ in range(3))
    other.get_base_model().lm_head.weight.codes[0, 0] += 1
    identities = [weights_identity(model.get_base_model().lm_head) for model in (first, same, other)]
    assert identities[0] == identities[1] != identities[2]


def test_by_reference_every_row_is_rotated_by_its_own_length() -> None:
    group = draw_group(6, [30, 5, 8, 9, 20], seed=5)  # on both sides of the length, 15
    model = FAMILIES["Phi-3, longrope"]()
    found, expected = prompt_gradient(model, group, SETTINGS).gradients, autograd(model, group)
    for parameter in expected:
        assert relative_gap(found[parameter], expected[parameter], 1e-6) < 1e-5, parameter


@pytest.mark.parametrize("name", ["Phi-3, longrope", "Llama, dynamic"])
def test_a_row_beyond_the_length_where_rotation_changes_is_refused(name: str) -> None:
    longer = Group("long", [5] * 6, [[3] * 10, [4] * 2], [1.0, 0.0], None)  # 16 tokens; the length is 15
    with pytest.raises(PolicyError, match=r"above 15 tokens.* has 16"):
        dense_gradients(FAMILIES[name](), [longer])


class Sometimes(nn.Module):
    """A layer that packs of 7 tokens alone reach, as a router reaches an expert for some texts."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.expert = inner, nn.Linear(32, 32).double()

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden) + (self.expert(hidden) if hidden.shape[1] == 7 else 0.0)


def test_a_window_that_its_mask_does_not_have_is_refused() -> None:
    model = FAMILIES["OLMo 3"]()
    model.model.layers[0].self_attn.sliding_window = None
    with pytest.raises(PolicyError, match="neither causal nor a sliding window"):
        Engine(model, SETTINGS, 1000)


def test_logits_that_are_no_multiple_of_the_heads_output_are_refused() -> None:
    class Shifted(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits - output.logits[..., :1]
            return output

    model = drawn(Shifted(transformers.LlamaConfig(**TEXT)))
    with pytest.raises(PolicyError, match="a matrix and a constant"):
        Engine(model, SETTINGS, 1000)


def test_a_layer_that_only_some_texts_reach_is_refused_when_one_does() -> None:
    model = text("Llama")()
    model.model.layers[0].mlp = Sometimes(model.model.layers[0].mlp)
    engine = Engine(model.eval(), SETTINGS, 1000)
    reached = Group("p", [5, 6, 7], [[3, 4, 5], [6, 7, 8]], [1.0, 0.0], None)
    with pytest.raises(PolicyError, match="Linear for some texts only"):
        engine.run(segments([reached]), FactorReader())
