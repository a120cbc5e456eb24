"""Every architecture is computed right or refused with its reason; so is every way to train a part of one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
import transformers
from tests.gradients.architectures import GROUPS, SETTINGS, VOCABULARY, perturbed, relative_gap, tiny, with_lora
from tests.gradients.footprint import check_unchanged, state
from torch import Tensor, nn

from cropi.errors import PolicyError
from cropi.gradients.engine import Engine, segment_of
from cropi.gradients.exact import DenseReader
from cropi.gradients.reference import prompt_gradient

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.35,
}


def make(prefix: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**SMALL | settings)
    return perturbed(getattr(transformers, f"{prefix}ForCausalLM")(config).double().eval())


def check_gradients(model: Any) -> None:
    engine = Engine(model, SETTINGS, 1000)
    reader = DenseReader(engine.parameters, engine.vocabulary)
    engine.run([segment_of(row, group, SETTINGS) for row, group in enumerate(GROUPS)], reader)
    parts = [prompt_gradient(model, group, SETTINGS, batch_tokens=1).gradients for group in GROUPS]
    largest = max(float(gradient.norm()) for gradient in parts[0].values())
    for name, gradient in reader.gradients.items():
        assert relative_gap(gradient, sum(part[name] for part in parts), 1e-3 * largest) < 1e-5, name


def without(model: Any, *names: str) -> Any:
    """The model with all but the named parameters frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in names))
    return model


COVERED: dict[str, Callable[[], Any]] = {
    "Gemma": lambda: make("Gemma", head_dim=8, num_key_value_heads=1),
    "GPTBigCode, positions in a table": lambda: make("GPTBigCode", activation_function="gelu"),
    "OLMo2, norms across heads": lambda: make("Olmo2"),
    "Phi, partial rotation": lambda: make("Phi", qk_layernorm=True),
    "Phi3, fused projections": lambda: make("Phi3"),
    "StableLM, norms of heads": lambda: make("StableLm", num_key_value_heads=1, use_qkv_bias=True),
    "Starcoder2, biases": lambda: make("Starcoder2", num_key_value_heads=1),
    "SmolLM3, layers without rotation": lambda: make("SmolLM3", num_key_value_heads=1, no_rope_layers=[0, 1]),
    "GLM4, norms after": lambda: make("Glm4", head_dim=8, num_key_value_heads=1),
    "Granite, multipliers": lambda: make(
        "Granite", attention_multiplier=0.3, residual_multiplier=0.5, embedding_multiplier=3.0
    ),
    "Cohere, logits as they are": lambda: make("Cohere", logit_scale=1.0),
    "Qwen3-MoE without experts": lambda: make(
        "Qwen3Moe", num_key_value_heads=1, head_dim=8, num_experts=2, mlp_only_layers=[0, 1]
    ),
    "Qwen2 with some windows": lambda: make(
        "Qwen2", num_key_value_heads=1, use_sliding_window=True, sliding_window=3, max_window_layers=1
    ),
    "linear rotary scaling": lambda: make("Llama", rope_parameters=_rope("linear", factor=4.0)),
    "YaRN": lambda: make("Llama", rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "biases alone": lambda: without(tiny("qwen2"), "bias"),
    "norms alone": lambda: without(tiny("gemma3"), "norm"),
    "the head alone": lambda: without(tiny("llama"), "lm_head"),
    "the embedding alone": lambda: without(tiny("llama"), "embed"),
    "an unused layer": lambda: replaced("model.layers.0.mlp.act_fn", _with_unused),
    "one layer": lambda: without(tiny("qwen3"), "layers.1."),
    "adapters of attention": lambda: with_lora(tiny("llama"), ["q_proj", "v_proj"]),
    "rank-stabilised adapters": lambda: with_lora(tiny("llama"), "all-linear", use_rslora=True, lora_dropout=0.5),
    "adapters with biases": lambda: with_lora(tiny("llama"), "all-linear", bias="all"),
    "adapters and norms": lambda: with_lora(tiny("llama"), ["up_proj"], modules_to_save=["norm", "input_layernorm"]),
}


def _rope(kind: str, **settings: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": 100.0, **settings}


@pytest.mark.parametrize("name", COVERED)
def test_gradients_of_what_is_covered(name: str) -> None:
    check_gradients(COVERED[name]())


def _with_unused(module: nn.Module) -> nn.Module:
    module.unused = nn.Linear(3, 3).double()
    return module


class Extra(nn.Module):
    """Wraps a module and multiplies its result by a matrix that no hook covers."""

    def __init__(self, inner: nn.Module, size: int) -> None:
        super().__init__()
        self.inner, self.matrix = inner, nn.Parameter(torch.eye(size, dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden) @ self.matrix


class AcrossTokens(nn.Module):
    """A vector of weights that meets more than the token it stands at."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, dtype=torch.float64))

    def forward(self, hidden: Tensor) -> Tensor:
        return (hidden * self.weight).cumsum(dim=1)


class Twice(nn.Module):
    """Gives a linear layer every token twice."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(torch.cat([hidden, hidden], dim=1))[:, : hidden.shape[1]]


def with_virtual_tokens() -> Any:
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    return peft.get_peft_model(tiny("llama"), config).double().eval()


def two_adapters() -> Any:
    peft = pytest.importorskip("peft")
    model = with_lora(tiny("llama"), ["q_proj"])
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["v_proj"], task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "second"])
    return model.double().eval()


def replaced(path: str, wrap: Callable[[nn.Module], nn.Module]) -> Any:
    model = tiny("llama")
    parent, _, name = path.rpartition(".")
    module = model.get_submodule(path)
    setattr(model.get_submodule(parent), name, wrap(module))
    return model.eval()


def with_embedding(**settings: Any) -> Any:
    model = tiny("llama")
    for name, value in settings.items():
        setattr(model.get_input_embeddings(), name, value)
    with torch.no_grad():
        model.get_input_embeddings()(torch.arange(VOCABULARY))  # shortens what is too long, once
    return model


def gpt2() -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1
    )
    return transformers.GPT2LMHeadModel(config).double().eval()


def falcon_h1() -> Any:
    """A state-space model beside the attention of every layer, under adapters and in bfloat16: it moves scores by a few
    percent, less than rounding may move a logit."""
    peft = pytest.importorskip("peft")
    model = make(
        "FalconH1",
        num_key_value_heads=1,
        head_dim=8,
        mamba_d_ssm=16,
        mamba_n_heads=2,
        mamba_d_head=8,
        mamba_d_state=4,
        mamba_n_groups=1,
        mamba_chunk_size=8,
        initializer_range=0.02,
    )
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config).bfloat16().eval()


def with_faint(mixing: Callable[[Tensor], Tensor]) -> Any:
    """Token mixing that no rounding to bfloat16 would let logits show."""
    model = tiny("llama").bfloat16()
    model.model.layers[0].mlp.register_forward_hook(lambda _, __, output: output + 1e-5 * mixing(output))
    return model


def _with_own_positions() -> Any:
    """Adds what depends on the place in a pass, too little for logits to show in bfloat16."""
    model = tiny("llama").bfloat16()
    model.model.layers[0].register_forward_hook(
        lambda _, __, output: output + 0.1 * torch.arange(output.shape[1], dtype=output.dtype)[None, :, None].cos()
    )
    return model


def with_another_gradient(factor: float) -> Any:
    """In a pack, a layer gives the same numbers and another gradient."""
    model = tiny("llama")

    def change(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        if model.config._attn_implementation == "eager":
            return output
        return output.detach() + factor * (output - output.detach())

    model.model.layers[0].mlp.register_forward_hook(change)
    return model


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "GPT-2": (gpt2, "Conv1D"),
    "Mixtral": (
        lambda: make("Mixtral", num_local_experts=2, num_key_value_heads=1).float(),
        "Mixtral(Experts|TopKRouter)",
    ),
    "Qwen2-MoE": (
        lambda: make(
            "Qwen2Moe",
            num_key_value_heads=1,
            num_experts=2,
            num_experts_per_tok=1,
            moe_intermediate_size=8,
            shared_expert_intermediate_size=8,
        ).float(),
        "Qwen2Moe(Experts|TopKRouter)",
    ),
    "a matrix of one's own": (lambda: replaced("model.layers.0.mlp", lambda m: Extra(m, 16)), "Extra"),
    "a vector that mixes tokens": (lambda: replaced("model.norm", lambda _: AcrossTokens(16)), "AcrossTokens"),
    "a layer that sees tokens twice": (lambda: replaced("model.layers.1.mlp", Twice), "each token once"),
    "an embedding with a bound": (lambda: with_embedding(max_norm=1.0), "Embedding"),
    "an embedding by frequency": (lambda: with_embedding(scale_grad_by_freq=True), "Embedding"),
    "Falcon-H1": (falcon_h1, "tokens see other trajectories outside attention"),
    "the token before": (
        lambda: with_faint(lambda x: x.roll(1, dims=1)),
        "tokens see other trajectories outside attention",
    ),
    "the token after": (
        lambda: with_faint(lambda x: x.roll(-1, dims=1)),
        "tokens see other trajectories outside attention",
    ),
    "all tokens before": (
        lambda: with_faint(lambda x: x.cumsum(dim=1)),
        "tokens see other trajectories outside attention",
    ),
    "all tokens": (
        lambda: with_faint(lambda x: x.mean(dim=1, keepdim=True)),
        "tokens see other trajectories outside attention",
    ),
    "positions of its own": (_with_own_positions, "depend on their place in a pack"),
    "another gradient": (lambda: with_another_gradient(0.0), "its own gradients differ"),
    "a slightly other gradient": (lambda: with_another_gradient(0.9), "its own gradients differ"),
    "Bart's decoder": (
        lambda: make("Bart", d_model=16, encoder_layers=1, decoder_layers=1, decoder_attention_heads=2, pad_token_id=0),
        "does not take a pack of trajectories",
    ),
    "BLOOM": (
        lambda: make("Bloom", n_layer=2, n_head=2, layer_norm_epsilon=1e-5),
        "attention",
    ),
    "an adapter on the head": (lambda: with_lora(tiny("llama"), ["q_proj", "lm_head"]), "head"),
    "adapters with magnitudes": (lambda: with_lora(tiny("llama"), ["q_proj"], use_dora=True), "Dora"),
    "an adapter on the embedding": (lambda: with_lora(tiny("llama"), ["embed_tokens"]), "[Ee]mbedding|ParameterDict"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_covered_is_refused_by_name(name: str) -> None:
    build, message = REFUSED[name]
    model = build()
    before = state(model)
    with pytest.raises(PolicyError, match=message) as caught:
        Engine(model, SETTINGS, 1000)
    assert "score.estimator=reference" in str(caught.value)
    check_unchanged(model, before)


OTHERS: dict[str, Callable[[], Any]] = {
    "OPT": lambda: make("OPT", ffn_dim=24, word_embed_proj_dim=16, pad_token_id=0),
    "BioGPT": lambda: make("BioGpt", pad_token_id=0),
    "Nemotron": lambda: make("Nemotron", num_key_value_heads=1),
    "Cohere with norms of heads": lambda: make("Cohere", logit_scale=1.0, use_qk_norm=True),
    "adapters and a copy of the embedding": lambda: with_lora(
        tiny("llama"), ["q_proj"], modules_to_save=["embed_tokens"]
    ),
    "adapters and a copy of a tied embedding": lambda: with_lora(
        tiny("llama_tied"), ["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "two adapters at once": two_adapters,
    "virtual tokens": with_virtual_tokens,
    "adapters and a copy of the head": lambda: with_lora(tiny("llama"), ["q_proj"], modules_to_save=["lm_head"]),
    "adapters and some rows of the embedding": lambda: with_lora(
        tiny("llama"), ["q_proj"], trainable_token_indices=[3, 4]
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_rest_is_right_or_refused(name: str) -> None:
    with suppress(PolicyError):
        check_gradients(OTHERS[name]())


def test_a_faint_scale_of_logits_is_found_too() -> None:
    """A policy with small logits must not hide it below an absolute tolerance."""
    check_gradients(make("Granite", logits_scaling=1.02, initializer_range=0.002))
