from pathlib import Path

import pytest

from cropi.streams import append_jsonl
from cropi.training.reward_log import never_judged, newest_variances, training_history


def test_history_by_batch_and_prompt(tmp_path: Path) -> None:
    path = tmp_path / "rewards.jsonl"
    append_jsonl(path, {"step": 0, "prompt_ids": ["b", "b", "a", "a"], "rewards": [1.0, 0.0, 1.0, None]})
    append_jsonl(path, {"step": 0, "prompt_ids": ["c", "c", "b", "b"], "rewards": [None, None, 0.0, 0.0]})
    append_jsonl(path, {"step": 3, "prompt_ids": ["b", "b"], "rewards": [1.0, 1.0]})
    assert training_history(path, 3) == [(0, "a", 1.0, 1, 0), (0, "b", 0.5, 2, 0.25), (0, "b", 0.0, 2, 0)]
    assert training_history(path, 4)[-1] == (3, "b", 1.0, 2, 0)
    assert training_history(tmp_path / "none.jsonl", 4) == []
    assert never_judged(path, 4) == {"c"}
    assert never_judged(path, 0) == set()
    append_jsonl(path, {"step": 4, "prompt_ids": ["b", "b", "b"], "rewards": [0.2, 0.8, 0.5]})
    assert newest_variances(training_history(path, 4)) == {"a": 0, "b": 0}
    assert newest_variances(training_history(path, 5)) == {"a": 0, "b": pytest.approx(0.06)}  # (0.09 + 0.09) / 3
