"""Prompts with images, on a tiny random LLaVA."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from tests.runs import json_lines
from tests.trl.scripts import select, tokenizer, trainer

TEMPLATE = (
    "{% for m in messages %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }} {% endif %}{% endfor %}{% endfor %}"
)
SIZE = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def policy() -> dict[str, Any]:
    """A model and its processor."""
    words = tokenizer(TEMPLATE)
    words.add_tokens(["<image>"], special_tokens=True)
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    layout = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    processor = LlavaProcessor(pixels, words, chat_template=TEMPLATE, **layout)
    ids = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    text = LlamaConfig(vocab_size=len(words), num_key_value_heads=2, **SIZE, **ids)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=16, **SIZE)
    image = words.convert_tokens_to_ids("<image>")
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=image, image_seq_length=4)
    return {"model": LlavaForConditionalGeneration(config), "processing_class": processor}


def rows(first: int, *, images: bool = True) -> Dataset:
    generator = np.random.default_rng(first)
    found: list[dict[str, Any]] = []
    for number in range(first, first + 6):
        row = {"prompt": [{"role": "user", "content": f"{number} is it ?"}], "answer": str(number)}
        picture = Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8))
        found.append(row | ({"image": picture} if images else {}))
    return Dataset.from_list(found)


def varied(completions: list[Any], **_: Any) -> list[float]:
    return [float(sum(map(ord, turns[0]["content"])) % 2) for turns in completions]


@pytest.mark.parametrize("images", [True, False])
def test_influence_is_read_where_the_validation_prompts_are_text(
    images: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where they have images, rewards alone choose, and nothing is sampled for them."""
    selector = select(validation=rows(100, images=images))
    made = trainer(tmp_path, selector, train_dataset=rows(0), reward_funcs=varied, max_steps=3, **policy())
    made.train()
    run = tmp_path / "_curriculum" / "run"
    recorded = json_lines(run / "rewards.jsonl")
    chosen = [row["prompt_ids"] for row in json_lines(run / "choices.jsonl")]
    assert [list(dict.fromkeys(row["prompt_ids"])) for row in recorded] == chosen[: len(recorded)]
    assert made.curriculum.table()["prompt"].str.contains("is it").all()
    assert ("influence/validation" in made.curriculum.table()) != images
    assert (made.curriculum.metrics()["curriculum/overhead_tokens"] == 0) == images
    assert ("chosen by their rewards" in capsys.readouterr().err) == images
