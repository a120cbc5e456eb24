"""Every architecture is computed right or refused with its reason; so is every way to train a part of one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from tests.gradients.architectures import SETTINGS, VOCABULARY, check_gradients, text, tiny, with_lora
from tests.gradients.footprint import check_unchanged, state
from tests.gradients.test_every_causal_lm import build
from torch import Tensor, nn

from cropi.errors import PolicyError
from cropi.gradients.engine import Engine


def without(model: Any, *names: str) -> Any:
    """The model with all but the named parameters frozen."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in name for part in names))
    return model


COVERED: dict[str, Callable[[], Any]] = {
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


def falcon_h1() -> Any:
    """A state-space model beside the attention of every layer, under adapters and in bfloat16: it moves scores by a few
    percent, less than rounding may move a logit."""
    peft = pytest.importorskip("peft")
    mamba = {"d_ssm": 16, "n_heads": 2, "d_head": 8, "d_state": 4, "n_groups": 1, "chunk_size": 8}
    model = text("FalconH1", initializer_range=0.02, **{f"mamba_{name}": size for name, size in mamba.items()})()
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


MIXED = "tokens see other trajectories outside attention"
EXPERTS = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "GPT-2": (lambda: build("gpt2"), "Conv1D"),
    "Mixtral": (lambda: text("Mixtral", num_local_experts=2)().float(), "Mixtral(Experts|TopKRouter)"),
    "Qwen2-MoE": (lambda: text("Qwen2Moe", **EXPERTS)().float(), "Qwen2Moe(Experts|TopKRouter)"),
    "a matrix of one's own": (lambda: replaced("model.layers.0.mlp", lambda m: Extra(m, 16)), "Extra"),
    "a vector that mixes tokens": (lambda: replaced("model.norm", lambda _: AcrossTokens(16)), "AcrossTokens"),
    "a layer that sees tokens twice": (lambda: replaced("model.layers.1.mlp", Twice), "each token once"),
    "an embedding with a bound": (lambda: with_embedding(max_norm=1.0), "Embedding"),
    "an embedding by frequency": (lambda: with_embedding(scale_grad_by_freq=True), "Embedding"),
    "Falcon-H1": (falcon_h1, MIXED),
    "the token after": (lambda: with_faint(lambda x: x.roll(-1, dims=1)), MIXED),
    "all tokens": (lambda: with_faint(lambda x: x.mean(dim=1, keepdim=True)), MIXED),
    "positions of its own": (_with_own_positions, "depend on their place in a pack"),
    "another gradient": (lambda: with_another_gradient(0.0), "its own gradients differ"),
    "Bart's decoder": (text("Bart", d_model=16, encoder_layers=1, decoder_layers=1, decoder_attention_heads=2,
        pad_token_id=0), "does not take a pack of trajectories"),
    "BLOOM": (text("Bloom", n_layer=2, n_head=2, layer_norm_epsilon=1e-5), "attention"),
    "an adapter on the head": (lambda: with_lora(tiny("llama"), ["q_proj", "lm_head"]), "head"),
    "adapters with magnitudes": (lambda: with_lora(tiny("llama"), ["q_proj"], use_dora=True), "Dora"),
    "an adapter on the embedding": (lambda: with_lora(tiny("llama"), ["embed_tokens"]), "[Ee]mbedding|ParameterDict"),
}  # fmt: skip


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
    "adapters and a copy of the embedding": lambda: with_lora(tiny("llama"), ["q_proj"],
        modules_to_save=["embed_tokens"]),
    "adapters and a copy of a tied embedding": lambda: with_lora(tiny("llama_tied"), ["q_proj"],
        modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    "two adapters at once": two_adapters,
    "virtual tokens": with_virtual_tokens,
    "adapters and a copy of the head": lambda: with_lora(tiny("llama"), ["q_proj"], modules_to_save=["lm_head"]),
    "adapters and some rows of the embedding": lambda: with_lora(tiny("llama"), ["q_proj"], trainable_token_indices=[3,
        4]),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_the_rest_is_right_or_refused(name: str) -> None:
    with suppress(PolicyError):
        check_gradients(OTHERS[name]())


def test_a_faint_scale_of_logits_is_found_too() -> None:
    """A policy with small logits must not hide it below an absolute tolerance."""
    check_gradients(text("Granite", logits_scaling=1.02, initializer_range=0.002)())
