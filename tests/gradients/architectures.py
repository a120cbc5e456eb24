"""Tiny random policies of the architectures that the engine is proved on, and groups of trajectories for them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from cropi.gradients.engine import Engine, segments_of
from cropi.gradients.exact import DenseReader
from cropi.gradients.groups import Group, SurrogateSettings
from cropi.gradients.packing import Segment

VOCABULARY = 41
NORMALIZERS = ["sequence", "token", "constant"]
Gradients = dict[str, Tensor]
SETTINGS = SurrogateSettings("sequence", max_completion_length=16, temperature=0.8)

COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None, "initializer_range": 0.35,
    "tie_word_embeddings": True,
}  # fmt: skip
_GEMMA = {"query_pre_attn_scalar": 24, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama_tied": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {}),
    "gemma2": ("Gemma2", _GEMMA | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 4.0}),
    "gemma3": ("Gemma3", _GEMMA),
    "gpt_neox": ("GPTNeoX", {"num_attention_heads": 2, "tie_word_embeddings": False, "attention_bias": True,
        "use_parallel_residual": True}),
    "mistral": ("Mistral", {"sliding_window": 4, "tie_word_embeddings": False}),
}  # fmt: skip
"""Class prefix and settings by name: grouped keys except in GPT-NeoX; windows shorter than the sequences."""


TEXT = COMMON | {"hidden_size": 32, "initializer_range": 0.3}


def drawn(model: Any) -> Any:
    """The model in float64, with no weight where symmetries hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.3)
    return perturbed(model.double().eval())


def text(prefix: str, model: str | None = None, **settings: Any) -> Callable[[], Any]:
    """Builds a causal LM of a family; `model` where its class has another prefix than its configuration."""

    def build() -> Any:
        torch.manual_seed(0)
        config = getattr(transformers, f"{prefix}Config")(**TEXT | settings)
        return drawn(getattr(transformers, f"{model or prefix}ForCausalLM")(config))

    return build


def tiny(name: str, *, seed: int = 0, **changes: Any) -> transformers.PreTrainedModel:
    """A policy in float64 whose norm scales and biases are neither 1 nor 0."""
    prefix, settings = ARCHITECTURES[name]
    settings = COMMON | settings | changes
    text = "Text" if prefix == "Gemma3" else ""
    if prefix == "GPTNeoX":
        settings = {key: value for key, value in settings.items() if key not in {"head_dim", "num_key_value_heads"}}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{prefix}{text}Config")(**settings)
    model: transformers.PreTrainedModel = getattr(transformers, f"{prefix}ForCausalLM")(config)
    return perturbed(model.double().eval())


def perturbed(model: Any) -> Any:
    """The model with every vector moved away from where symmetries hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def with_lora(model: Any, targets: Any = "all-linear", **settings: Any) -> Any:
    """Freeze the model and add adapters, in the model's dtype, to the named linear layers or to all but the head."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=targets, task_type="CAUSAL_LM", **{"r": 2} | settings)
    adapted = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:  # zero at the start, which would hide the gradient of A
                parameter.normal_(std=0.3)
    return adapted.to(next(model.parameters()).dtype).eval()


def tiny_lora() -> Any:
    return with_lora(tiny("llama"), r=3)


def draw_group(prompt: int, lengths: list[int], *, seed: int, on_policy: bool = False) -> Group:
    """A group of random tokens and distinct rewards, with behaviour log-probs far enough off for ratios unlike 1."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, VOCABULARY, (count,), generator=generator).tolist()

    def logprobs(count: int) -> list[float]:
        return (torch.randn(count, dtype=torch.float64, generator=generator) * 0.7 - 3.0).tolist()

    rewards = torch.rand(len(lengths), dtype=torch.float64, generator=generator).tolist()
    completions = [tokens(length) for length in lengths]
    behaviour = None if on_policy else [logprobs(length) for length in lengths]
    return Group(f"p{seed}", tokens(prompt), completions, rewards, behaviour)


GROUPS = [
    draw_group(6, [9, 1, 5], seed=1),
    draw_group(1, [3, 8], seed=2),
    draw_group(4, [7, 2], seed=3, on_policy=True),
]


def settings_of(normalizer: str) -> SurrogateSettings:
    """The settings of these tests with another normaliser; with `token`, advantages are not divided either."""
    return dataclasses.replace(SETTINGS, normalizer=normalizer, advantage_std=normalizer != "token")


def segments(groups: Sequence[Group] = GROUPS, settings: SurrogateSettings = SETTINGS) -> list[Segment]:
    """What the engine has to compute of these groups."""
    return segments_of(groups, settings)


def dense_gradients(
    model: Any, groups: Sequence[Group] = GROUPS, settings: SurrogateSettings = SETTINGS, budget: int = 1000
) -> Gradients:
    """The sum of the groups' gradients, by the engine."""
    engine = Engine(model, settings, budget)
    reader = DenseReader(engine.parameters, engine.vocabulary)
    engine.run(segments(groups, settings), reader)
    return reader.gradients


def autograd(model: Any, group: Group) -> Gradients:
    """The gradient of sum_k 1 / (K |tau_k|) sum_t rho_{k,t} A_k: one row of the model's own forward pass at a time."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in named.items()}
    rewards = torch.tensor(group.rewards, dtype=torch.float64)
    advantages = ((rewards - rewards.mean()) / (rewards.std() + 1e-4)).tolist()
    for k, completion in enumerate(group.completions):
        ids = torch.tensor([group.prompt_ids + completion])
        logits = model(input_ids=ids, use_cache=False).logits[0, len(group.prompt_ids) - 1 : -1]
        table = torch.log_softmax(logits.double() / SETTINGS.temperature, dim=-1)
        logprobs = table.gather(1, torch.tensor(completion)[:, None])[:, 0]
        behaviour = logprobs.detach()
        if group.behaviour_logprobs is not None:
            behaviour = torch.tensor(group.behaviour_logprobs[k], dtype=torch.float64)
        loss = (logprobs - behaviour).exp().sum() * advantages[k] / (len(group.completions) * len(completion))
        found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
        for name, gradient in zip(named, found, strict=True):
            if gradient is not None:
                total[name] += gradient
    return total


def flat(gradients: Gradients) -> Tensor:
    return torch.cat([gradient.flatten() for gradient in gradients.values()])


def influence_by_autograd(model: Any, groups: Sequence[Group], aim: Sequence[Group]) -> tuple[Tensor, Tensor]:
    """Inner products of each group's gradient with the mean of those aimed at, and products of their lengths."""
    direction = sum(flat(autograd(model, group)) for group in aim) / len(aim)
    gradients = torch.stack([flat(autograd(model, group)) for group in groups])
    return gradients @ direction, gradients.norm(dim=1) * direction.norm()


def check_gradients(model: Any, tolerance: float = 1e-5) -> list[Gradients]:
    """The engine's gradient is that of `autograd`, parameter by parameter; returns those of each group."""
    expected = [autograd(model, group) for group in GROUPS]
    found = dense_gradients(model)
    for name in expected[0]:
        total = sum(gradients[name] for gradients in expected)
        if name in found:
            assert relative_gap(found[name], total, 1e-6) < tolerance, name
        else:
            assert not total.any(), name
    return expected


def random_gradients(parameters: Mapping[str, Tensor], seed: int) -> Gradients:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, dtype=p.dtype, generator=generator) for n, p in parameters.items()}


@contextmanager
def without_casts(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Root-mean-square norms and attention in the dtype of the weights, where transformers takes float32."""
    for norm in {type(module) for module in model.modules() if type(module).__name__.endswith("RMSNorm")}:
        monkeypatch.setattr(norm, "forward", _gemma_norm if "Gemma" in norm.__name__ else _norm)
    own_attention(model)
    yield


def _norm(self: Any, hidden: Tensor) -> Tensor:
    return self.weight * hidden * (hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()


def _gemma_norm(self: Any, hidden: Tensor) -> Tensor:
    return (1 + self.weight) * hidden * (hidden.pow(2).mean(-1, keepdim=True) + self.eps).rsqrt()


def own_attention(model: Any) -> None:
    """Make a model use the attention below."""
    transformers.AttentionInterface.register("written_out", _attention)
    transformers.AttentionMaskInterface.register("written_out", lambda *_, **__: None)
    model.set_attn_implementation("written_out")


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention as the papers write it, (B, heads, T, head size); rows are padded on the right, if at all."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    logits = query @ key.transpose(2, 3) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    behind = torch.arange(logits.shape[2])[:, None] - torch.arange(logits.shape[3])
    unseen = (behind < 0) | (behind >= (sliding_window or logits.shape[3]))
    return (logits.masked_fill(unseen, -torch.inf).softmax(dim=-1) @ value).transpose(1, 2), None


def relative_gap(found: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    """|found - expected| / |expected|, in the Euclidean norm."""
    return float((found - expected).norm() / max(float(expected.norm()), floor))


Builder = Callable[[], Any]
BUILDERS: dict[str, Builder] = {name: lambda name=name: tiny(name) for name in ARCHITECTURES} | {
    "llama_lora": tiny_lora
}
