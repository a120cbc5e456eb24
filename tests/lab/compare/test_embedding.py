"""Mean pooling of a small encoder, against the states that transformers gives for one text at a time."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from cropi.errors import PolicyError
from cropi.lab.compare.embedding import sentence_encoder

WORDS = {"[PAD]": 0, "[UNK]": 1, "red": 2, "green": 3, "blue": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(WORDS), max_position_embeddings=8, **sizes)).save_pretrained(path)
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=4
    ).save_pretrained(path)
    return path


def pooled(folder: Path, ids: list[int]) -> np.ndarray:
    """The mean over the tokens of one text, without padding."""
    with torch.no_grad():
        states = BertModel.from_pretrained(folder).eval()(torch.tensor([ids])).last_hidden_state
    return states[0].mean(dim=0).numpy()


def test_padding_takes_no_part_and_texts_are_cut(folder: Path) -> None:
    encoder = sentence_encoder(folder)
    texts = ["red green blue", "red", "red", "red green blue red green green"]
    found = encoder.encode(texts)
    for vector, ids in zip(found, [[2, 3, 4], [2], [2], [2, 3, 4, 2]], strict=True):
        np.testing.assert_allclose(vector, pooled(folder, ids), atol=1e-5)
    assert encoder.name == folder.name


def test_a_text_is_encoded_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = sentence_encoder(folder)
    first = encoder.encode(["red", "blue"])
    monkeypatch.setattr(torch, "no_grad", lambda: pytest.fail("encoded again"))
    np.testing.assert_array_equal(encoder.encode(["blue", "red", "blue"]), first[[1, 0, 1]])


def test_a_folder_without_a_model_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="holds no model"):
        sentence_encoder(tmp_path)


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(PolicyError, match="cannot be loaded"):
        sentence_encoder(tmp_path).encode(["red"])
