"""The vocabulary head, in chunks: log-probs, importance ratios, token weights, and the gradient of the hidden states.

The loss and gradient of a chunk are computed together, so that logits of all tokens never exist at once:
g_logits = w (onehot(x) - softmax(logits / T)) / T, with w = rho A_k / Z_k from the same logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cropi.gradients.attention import unsupported
from cropi.gradients.capture import FactorReader
from cropi.gradients.exact import widened
from cropi.gradients.groups import SurrogateSettings
from cropi.gradients.packing import Pack, Span

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 28}  # logits of one chunk, in float32: 64 MiB and 1 GiB


class Head:
    """The output layer of a transformers causal LM, with the constants that scale its hidden states and its logits, and
    the soft cap of its logits if it has one."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._hidden_scale, self._logit_scale = 1.0, 1.0
        module = model.get_output_embeddings()
        frozen = not any(p.requires_grad for p in module.parameters())
        if type(module).forward is not nn.Linear.forward and not (frozen and isinstance(module, nn.Linear)):
            raise unsupported(
                model, f"module type {type(module).__module__}.{type(module).__name__} of its head is not covered"
            )
        self.module: nn.Linear = module
        self._softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    @contextmanager
    def watched(self) -> Iterator[list[tuple[Tensor, ...]]]:
        """Record what `fit` needs from each of the model's own forward passes inside the block."""
        hidden: list[Tensor] = []  # stays empty if a model calls only a part of its base model
        seen: list[tuple[Tensor, ...]] = []

        def after_head(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            seen.append((hidden.pop() if hidden else args[0], args[0], output))

        base = self._model.base_model
        with ExitStack() as stack:
            stack.callback(base.register_forward_hook(lambda _, args, output: hidden.append(output[0])).remove)
            stack.callback(self.module.register_forward_hook(after_head).remove)
            yield seen

    def fit(self, seen: Sequence[tuple[Tensor, ...]], logits: Sequence[Tensor]) -> None:
        """Find the scaling constants (Granite's `logits_scaling`, Cohere's `logit_scale` and the like) from the model's
        own passes and their logits. PolicyError if the model does anything else around its head."""
        hidden, inputs, outputs = (
            torch.cat([x.detach().flatten(0, -2) for x in parts]) for parts in zip(*seen, strict=True)
        )
        given = torch.cat([x.detach().flatten(0, -2) for x in logits])
        if not bool(torch.isfinite(given).all()):
            return  # `check_engine` reports it
        self._hidden_scale = self._multiple(hidden, inputs)
        if self._softcap is not None:
            within = given.abs() < 0.7 * self._softcap  # the inverse is precise there
            outputs, given = outputs[within], torch.atanh(widened(given[within]) / self._softcap) * self._softcap
        self._logit_scale = self._multiple(outputs, given)

    def _multiple(self, before: Tensor, after: Tensor) -> float:
        """Return the number by which `before` has been multiplied."""
        tolerance = max(8 * torch.finfo(before.dtype).eps, 1e-5)
        before, after = widened(before), widened(after)
        factor = float((before * after).sum() / (before * before).sum())
        if float((after - factor * before).abs().max()) > tolerance * float(after.abs().max()):
            raise unsupported(self._model, "its logits are not its last hidden states times a matrix and a constant")
        return factor

    def logits(self, hidden_EH: Tensor) -> Tensor:
        """Compute logits in at least float32, as the model itself does."""
        logits = type(self.module).forward(self.module, hidden_EH * self._hidden_scale)
        logits = widened(logits).mul_(self._logit_scale)
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    def _back(self, grads_EW: Tensor) -> Tensor:
        """Compute the gradient of the hidden states from the gradient of the matrix product."""
        if type(self.module).forward is nn.Linear.forward and type(self.module.weight) in {Tensor, nn.Parameter}:
            return grads_EW @ self.module.weight * self._hidden_scale
        with torch.enable_grad():  # a quantised weight may support no product but its own forward pass
            hidden_EH = grads_EW.new_zeros(len(grads_EW), self.module.in_features).requires_grad_()
            logits_EW = type(self.module).forward(self.module, hidden_EH)
        return torch.autograd.grad(logits_EW, hidden_EH, grads_EW.to(logits_EW.dtype))[0] * self._hidden_scale

    @torch.no_grad()
    def __call__(
        self,
        hidden_SH: Tensor,
        pack: Pack,
        settings: SurrogateSettings,
        reader: FactorReader | None,
        names: dict[str, str],
    ) -> tuple[Tensor, Tensor]:
        """Return log importance ratios (float64) of a pack's predictions and the gradient of its hidden states; without
        a reader, the gradient is 0."""
        grad_SH = torch.zeros_like(hidden_SH)
        chunk = max(1, LOGITS_AT_ONCE.get(hidden_SH.device.type, 1 << 24) // self.module.out_features)
        log_ratios, temperature = [], settings.temperature
        for first in range(0, len(pack.targets_E), chunk):
            part = slice(first, first + chunk)
            sources_E, targets_E1 = pack.sources_E[part], pack.targets_E[part, None]
            hidden_EH = hidden_SH.index_select(0, sources_E)
            logits_EW = self.logits(hidden_EH)
            logp_EW = torch.log_softmax(logits_EW / temperature, dim=-1)
            logp_E1 = logp_EW.gather(1, targets_E1)
            log_ratios.append(_log_ratios(logp_E1[:, 0], pack, part))
            if reader is None:
                continue
            weights_E = log_ratios[-1].exp() * pack.scales_E[part]
            weights_E1 = weights_E[:, None].to(logp_EW.dtype) / temperature
            grads_EW = logp_EW.exp_().mul_(-weights_E1)
            grads_EW.scatter_add_(1, targets_E1, weights_E1)
            if self._softcap is not None:
                grads_EW *= 1 - (logits_EW / self._softcap) ** 2
            grads_EW = grads_EW.mul_(self._logit_scale).to(hidden_SH.dtype)
            # Several trajectories start from the last prompt token: their gradients add up in its row.
            grad_SH.index_add_(0, sources_E, self._back(grads_EW))
            spans = _clip(pack.predictions, part)
            if "weight" in names:
                reader.linear(names["weight"], hidden_EH * self._hidden_scale, grads_EW, spans)
            if "bias" in names:
                reader.vector(names["bias"], grads_EW, spans)
        return torch.cat(log_ratios), grad_SH


def _log_ratios(logprobs_E: Tensor, pack: Pack, part: slice) -> Tensor:
    """Compute log rho of a chunk of predictions; 0 for on-policy ones."""
    if pack.behaviour_E is None:
        return torch.zeros_like(logprobs_E, dtype=torch.float64)
    differences_E = logprobs_E.double() - pack.behaviour_E[part]
    return torch.where(pack.on_policy_E[part], torch.zeros_like(differences_E), differences_E)


def _clip(spans: Sequence[Span], part: slice) -> list[Span]:
    """Cut the spans to a chunk, counted from its start."""
    clipped = [Span(s.index, max(s.start, part.start) - part.start, min(s.stop, part.stop) - part.start) for s in spans]
    return [span for span in clipped if span.start < span.stop]
