"""Tools and environments: what they write into a rollout is no gradient of the policy's, and rows are found again."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from cropi.stages.validation_pass import ValidationPass
from tests.runs import json_lines
from tests.trl.scripts import problems, select, tokenizer, trainer

TEMPLATE = (
    "{% for t in tools or [] %}tally {% endfor %}{% for m in messages %}"
    "{% for c in m.tool_calls or [] %}[ {{ c.function.name }} {{ c.function.arguments | tojson }} ] {% endfor %}"
    "{{ m.content }} {% endfor %}{% if add_generation_prompt %}: {% endif %}"
)
CHAT = problems("sum", "parity", chat=True)


def add(number: int) -> str:
    """Add to a number.

    Args:
        number: any number
    """
    return "7 8 9"


class Board:
    """Shows digits of its own before every answer."""

    def reset(self, **_: Any) -> str:
        return " ".join(str(random.randrange(10)) for _ in range(3))

    def add(self, number: int) -> str:
        """Add to a number.

        Args:
            number: any number
        """
        return "7"


def calls(ids: list[int], **_: Any) -> dict[str, Any]:
    """Every completion with an even number of tokens calls the tool."""
    called = {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"number": 1}}}]}
    return {"role": "assistant", "content": str(len(ids))} | (called if len(ids) % 2 == 0 else {})


def long(completions: list[Any], **_: Any) -> list[float]:
    return [float(sum(len(str(turn)) for turn in turns) % 2) for turns in completions]


@pytest.mark.filterwarnings("ignore:You are using 'environment_factory'")
@pytest.mark.parametrize("given", ["tools", "environment_factory"])
def test_influence_is_read_of_rollouts_with_tools(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known, kept = [], ValidationPass.differentiate

    def noting(self: ValidationPass, model: Any, groups: Any) -> Any:
        known.extend(group for own in groups.values() for group in own)
        return kept(self, model, groups)

    monkeypatch.setattr(ValidationPass, "differentiate", noting)
    written = tokenizer(TEMPLATE)
    written.response_template, written.parse_response = {"fields": {}}, calls
    made = trainer(
        tmp_path,
        select(chat=True),
        train_dataset=CHAT,
        processing_class=written,
        reward_funcs=long,
        max_completion_length=16,
        max_tool_calling_iterations=1,
        **{given: [add] if given == "tools" else Board},
    )
    made.train()
    assert max(entry.get("tools/call_frequency", 0) for entry in made.state.log_history) > 0
    masks = [mask for group in known for mask in group.masks]
    assert any(0 in mask for mask in masks)
    seven = written.convert_tokens_to_ids("7")
    for group in known:
        for completion, mask in zip(group.completions, group.masks, strict=True):
            assert len(completion) == len(mask)
            by_tool = [token for token, own in zip(completion, mask, strict=True) if not own]
            assert not by_tool or seven in by_tool or given == "environment_factory"
    assert made.curriculum.table()["influence/validation"].notna().all()
    logged = [line for line in made.state.log_history if "curriculum/rows_dropped" in line]
    rows = sum(len(row["rewards"]) for row in json_lines(tmp_path / "_curriculum" / "run" / "rewards.jsonl"))
    assert logged[-1]["curriculum/rows_dropped"] < rows / (
        2 if given == "environment_factory" else 8
    )  # by completions alone
