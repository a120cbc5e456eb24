"""What TRL's documented GRPO scripts use works with a curriculum, and influence is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset
from peft import LoraConfig

from tests.runs import json_lines
from tests.trl.scripts import problems, right, right_later, select, short, tokenizer, trainer

SUM, PAIRS = problems("sum", "parity"), problems("sum", "parity", chat=True)
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)


def named(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
    """Prompts are messages."""
    return [
        float(len(prompt[0]["role"]) == 4) + len(c[0]["content"])
        for prompt, c in zip(prompts, completions, strict=True)
    ]


def sometimes(completions: list[str], answer: list[str], **_: Any) -> list[float | None]:
    return [None if len(a) > 1 else value for a, value in zip(answer, right(completions, answer), strict=True)]


def twice(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """A rollout function that writes more into the prompt."""
    asked = [trainer.processing_class(text=f"{prompt} ")["input_ids"] for prompt in prompts]
    completions, _ = trainer._generate_single_turn(asked, None, {}, 1)
    return {"prompt_ids": asked, "completion_ids": completions, "logprobs": None}


# Settings that have nothing to do with each other share a script.
SCRIPTS: dict[str, dict[str, Any]] = {
    "two rewards with weights": {"reward_funcs": [short, right], "reward_weights": [0.1, 1.0]},
    "asynchronous reward, normalised each": {
        "reward_funcs": [right_later, short],
        "multi_objective_aggregation": "normalize_then_sum",
    },
    "some rows unrewarded": {"reward_funcs": sometimes},
    "chat and lora": {
        "train_dataset": PAIRS,
        "processing_class": "chat",
        "peft_config": LORA,
        "reward_funcs": [named, right],
    },
    "template arguments": {
        "train_dataset": PAIRS,
        "processing_class": "{% if loud %}! {% endif %}{% for m in messages %}{{ m['content'] }} {% endfor %}",
        "chat_template_kwargs": {"loud": True},
    },
    "iterations, dr grpo": {"num_iterations": 2, "max_steps": 6, "loss_type": "dr_grpo", "scale_rewards": "none"},
    "batches over steps": {"steps_per_generation": 4, "max_steps": 6},
    "stream": {"train_dataset": IterableDataset.from_generator(lambda: iter(SUM)), "max_steps": 4},
    "epochs, shuffled by TRL": {"max_steps": -1, "num_train_epochs": 2, "shuffle_dataset": True},
    "loader's workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    "kl, fp32 head": {"beta": 0.1, "cast_lm_head_to_fp32": True},
    "batch scaled": {"scale_rewards": "batch", "loss_type": "grpo"},
    "cispo, truncated masked": {
        "loss_type": "cispo",
        "mask_truncated_completions": True,
        "max_completion_length": 12,
    },
    "top k": {"top_k": 3, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1},
    "checkpointing, bf16": {"gradient_checkpointing": True, "bf16": True},
    "columns dropped": {"remove_unused_columns": True, "reward_funcs": short},
    "rollout function": {"rollout_func": twice},
}


@pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_trains_on_what_is_chosen_and_reads_influence(name: str, tmp_path: Path) -> None:
    changes = {"max_steps": 3} | SCRIPTS[name]
    chat = "processing_class" in changes
    if chat:
        given = changes["processing_class"]
        changes["processing_class"] = tokenizer() if given == "chat" else tokenizer(given)
    made = trainer(tmp_path, select(chat=chat), **changes)
    made.train()
    run = tmp_path / "_curriculum" / "run"
    trained = [list(dict.fromkeys(row["prompt_ids"])) for row in json_lines(run / "rewards.jsonl")]
    chosen = [row["prompt_ids"] for row in json_lines(run / "choices.jsonl")]
    assert trained
    assert trained == chosen[: len(trained)]
    table = made.curriculum.table()
    assert table["times_drawn"].sum() == sum(map(len, chosen))
    assert table["influence/validation"].notna().all()
    logged = [line for line in made.state.log_history if "curriculum/rows_dropped" in line]
    assert logged[-1]["curriculum/rows_dropped"] <= 2  # equal completions of two groups under a rollout function
    assert logged[-1]["curriculum/share_read"] > 0.5
