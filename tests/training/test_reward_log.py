from pathlib import Path

from cropi.streams import append_jsonl
from cropi.training.reward_log import newest_rewards


def test_newest_rewards_by_prompt(tmp_path: Path) -> None:
    path = tmp_path / "rewards.jsonl"
    append_jsonl(path, {"step": 0, "prompt_ids": ["b", "b", "a", "a"], "rewards": [1.0, 0.0, 1.0, None]})
    append_jsonl(path, {"step": 0, "prompt_ids": ["c", "c", "b", "b"], "rewards": [None, None, 0.0, 0.0]})
    append_jsonl(path, {"step": 3, "prompt_ids": ["b", "b"], "rewards": [1.0, 1.0]})
    assert newest_rewards(path, 3) == {"a": [1.0], "b": [0.0, 0.0], "c": []}
    assert newest_rewards(path, 4) == {"a": [1.0], "b": [1.0, 1.0], "c": []}
    assert newest_rewards(path, 0) == newest_rewards(tmp_path / "none.jsonl", 4) == {}
    append_jsonl(path, {"step": 4, "prompt_ids": ["b", "c", "a"], "rewards": [0.2, 0.5, None]})
    assert newest_rewards(path, 5) == {"a": [1.0], "b": [0.2], "c": [0.5]}
