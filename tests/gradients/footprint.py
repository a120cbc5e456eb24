"""All that a guest of a model could leave behind."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def state(model: nn.Module) -> dict[str, Any]:
    """All of a model and its surroundings that a guest could change."""
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        "parameters": [(name, id(p), type(p), p.requires_grad, p.grad_fn) for name, p in model.named_parameters()],
        "gradients": {
            name: None if p.grad is None else (id(p.grad), p.grad.tolist()) for name, p in model.named_parameters()
        },
        "values": {name: value.tolist() for name, value in model.state_dict().items()},
        "buffers": {name: value.tolist() for name, value in model.named_buffers()},
        "modes": {name: module.training for name, module in model.named_modules()},
        "modules": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "own": {name: list(module._parameters) for name, module in model.named_modules()},
        "hooks": {name: [len(getattr(module, kind)) for kind in HOOKS] for name, module in model.named_modules()},
        "attention": causal_lm.config._attn_implementation,
        "random": torch.random.get_rng_state().tolist(),
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }


def check_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    for what in before:
        assert after[what] == before[what], what
