"""The vocabulary head: log-probs, importance ratios and token weights, and the gradient they send back, in chunks.

Loss and gradient of a chunk are made together, so that logits of all tokens never exist at once:
g_logits = w (onehot(x) - softmax(logits / T)) / T, with w = rho A_k / Z_k (or a corrected ratio for rho) taken from
the very same logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from cropi.functional.surrogate import corrected_ratios
from cropi.gradients.attention import unsupported
from cropi.gradients.capture import Reader
from cropi.gradients.eligible import ROUNDING, difference, require_finite
from cropi.gradients.packing import Pack, Span
from cropi.gradients.surrogate import SurrogateSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGITS_AT_ONCE = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Logits of one chunk, in float32: 64 MiB and 1 GiB."""


@dataclass(frozen=True)
class HeadResult:
    """Per prediction: log-probs, float32 or wider, and log importance ratios, float64; and the gradient of the hidden
    states."""

    logprobs_E: Tensor
    log_ratios_E: Tensor
    grad_SH: Tensor


class Head:
    """The output layer of a transformers causal LM, with the soft cap of its logits where it has one."""

    def __init__(self, model: PreTrainedModel) -> None:
        module = model.get_output_embeddings()
        if type(module).forward is not nn.Linear.forward:
            raise unsupported(
                model, f"module type {type(module).__module__}.{type(module).__name__} of its head is not covered"
            )
        self.module: nn.Linear = module
        self._softcap: float | None = getattr(model.config.get_text_config(), "final_logit_softcapping", None)

    def logits(self, hidden_EH: Tensor) -> Tensor:
        """Logits in at least float32, as the model itself would give them."""
        logits = nn.functional.linear(hidden_EH, self.module.weight, self.module.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self._softcap is None else torch.tanh(logits / self._softcap) * self._softcap

    @torch.no_grad()
    def __call__(
        self, hidden_SH: Tensor, pack: Pack, settings: SurrogateSettings, reader: Reader | None, names: dict[str, str]
    ) -> HeadResult:
        """Loss and gradient at the predictions of a pack; without a reader, log-probs alone."""
        grad_SH = torch.zeros_like(hidden_SH)
        chunk = max(1, LOGITS_AT_ONCE.get(hidden_SH.device.type, 1 << 24) // self.module.out_features)
        logprobs, log_ratios = [], []
        factors, temperature = _Factors(pack, settings), settings.temperature
        for first in range(0, len(pack.targets_E), chunk):
            part = slice(first, first + chunk)
            sources_E, targets_E1 = pack.sources_E[part], pack.targets_E[part, None]
            hidden_EH = hidden_SH.index_select(0, sources_E)
            logits_EW = self.logits(hidden_EH)
            logp_EW = torch.log_softmax(logits_EW / temperature, dim=-1)
            logp_E1 = logp_EW.gather(1, targets_E1)
            logprobs.append(logp_E1[:, 0])
            log_ratios.append(_log_ratios(logp_E1[:, 0], pack, part))
            if reader is None:
                continue
            weights_E = factors(log_ratios[-1], part) * pack.scales_E[part]
            weights_E1 = weights_E[:, None].to(logp_EW.dtype) / temperature
            grads_EW = logp_EW.exp_().mul_(-weights_E1)
            grads_EW.scatter_add_(1, targets_E1, weights_E1)
            if self._softcap is not None:
                grads_EW *= 1 - (logits_EW / self._softcap) ** 2
            grads_EW = grads_EW.to(hidden_SH.dtype)
            # Several trajectories start from the last prompt token: their gradients meet in its row.
            grad_SH.index_add_(0, sources_E, grads_EW @ self.module.weight)
            spans = _clip(pack.predictions, part)
            if "weight" in names:
                reader.linear(names["weight"], hidden_EH, grads_EW, spans)
            if "bias" in names:
                reader.vector(names["bias"], grads_EW, spans)
        return HeadResult(torch.cat(logprobs), torch.cat(log_ratios), grad_SH)


def _log_ratios(logprobs_E: Tensor, pack: Pack, part: slice) -> Tensor:
    """log rho of a chunk of predictions; 0 for on-policy ones."""
    if pack.behaviour_E is None:
        return torch.zeros_like(logprobs_E, dtype=torch.float64)
    differences_E = logprobs_E.double() - pack.behaviour_E[part]
    return torch.where(pack.on_policy_E[part], torch.zeros_like(differences_E), differences_E)


class _Factors:
    """What stands in for each ratio, chunk by chunk: a chunk may end within a trajectory."""

    def __init__(self, pack: Pack, settings: SurrogateSettings) -> None:
        self._pack, self._settings = pack, settings
        self._waiting = list(reversed(pack.lengths))
        """Predictions to come of each trajectory, the next one last."""
        self._so_far = 0.0
        """Sum of the log ratios that were met of the next trajectory."""

    def __call__(self, log_ratios_E: Tensor, part: slice) -> Tensor:
        settings = self._settings
        if settings.correction == "token":
            return log_ratios_E.exp()
        scales_E, found, start = self._pack.scales_E[part], [], 0
        while start < len(log_ratios_E):
            length = self._waiting.pop()
            logs_T = log_ratios_E[start : start + length].clone()
            if not length:
                continue
            logs_T[0] += self._so_far
            sign = float(scales_E[start].sign())
            found.append(
                corrected_ratios(logs_T, settings.correction, clip=settings.clip, cap=settings.prefix_cap, sign=sign)
            )
            if len(logs_T) < length:
                self._waiting.append(length - len(logs_T))
                self._so_far = float(logs_T.sum()) if settings.correction == "prefix" else 0.0
            else:
                self._so_far = 0.0
            start += len(logs_T)
        return torch.cat(found)


def _clip(spans: Sequence[Span], part: slice) -> list[Span]:
    """The spans that fall into a chunk, counted from its start."""
    clipped = [Span(s.index, max(s.start, part.start) - part.start, min(s.stop, part.stop) - part.start) for s in spans]
    return [span for span in clipped if span.start < span.stop]


def check_head(model: PreTrainedModel, ours_EW: Tensor, theirs_EW: Tensor, dtype: torch.dtype) -> None:
    """PolicyError where the model makes something else of hidden states in `dtype` than we do."""
    require_finite(theirs_EW)
    gap = difference(ours_EW, theirs_EW)
    if gap > ROUNDING.get(dtype, 5e-3):
        raise unsupported(
            model, f"its own logits differ from the engine's by {gap:.2g} of their size on a test sequence"
        )
