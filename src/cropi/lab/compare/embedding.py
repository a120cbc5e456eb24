"""Embeddings of prompts by a sentence encoder, for the similarity analysis of the report."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cropi.errors import PolicyError
from cropi.lab.compare.report.selected import Encoder

if TYPE_CHECKING:
    import torch

BATCH = 64
MAX_TOKENS = 512  # of a text, where the tokenizer does not say less


def sentence_encoder(folder: Path) -> Encoder:
    """The encoder in a folder that transformers can load: mean of the last hidden states over the tokens of a text.

    Nothing is loaded before the first text; what has been encoded once is kept. A pooling that the folder asks for
    otherwise (sentence-transformers' `1_Pooling`) is not read. Raises PolicyError where there is no model.
    """
    if not (folder / "config.json").is_file():
        raise PolicyError(
            "holds no model (no config.json)", where=str(folder), fix="name the folder of an encoder: --embedding DIR."
        )
    return Encoder(folder.resolve().name, _Model(folder).encode)


class _Model:
    """A model with its tokenizer, loaded when first used."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, np.ndarray] = {}

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Embeddings (N, D)."""
        new = sorted({text for text in texts if text not in self._known}, key=lambda text: (len(text), text))
        for start in range(0, len(new), BATCH):
            batch = new[start : start + BATCH]
            self._known |= dict(zip(batch, self._pooled(batch), strict=True))
        return np.stack([self._known[text] for text in texts])

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)
            model = AutoModel.from_pretrained(self._folder, trust_remote_code=False, use_safetensors=True)
        except (OSError, ValueError, ImportError) as error:
            raise PolicyError(
                f"cannot be loaded ({error})", where=str(self._folder), fix="name the folder of a transformers encoder."
            ) from None
        return tokenizer, model.float().eval()

    def _pooled(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        tokenizer, model = self._loaded
        length = min(tokenizer.model_max_length, MAX_TOKENS)
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        with torch.no_grad():
            states_NTD: torch.Tensor = model(**tokens).last_hidden_state
        mask_NT1 = tokens["attention_mask"][:, :, None].float()
        return ((states_NTD * mask_NT1).sum(dim=1) / mask_NT1.sum(dim=1).clamp(min=1)).numpy()
