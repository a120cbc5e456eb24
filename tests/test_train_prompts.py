"""Training prompts as columns."""

import pyarrow as pa
import pytest

from cropi.run_tables import TrainPrompts


def test_rows_by_id_in_ascending_order_whatever_chunks_they_came_in() -> None:
    rows = [{"prompt_id": i, "messages": f'"{i}?"', "answer": i.upper()} for i in ("c", "é", "a", "b", "z")]
    prompts = TrainPrompts(pa.concat_tables([pa.Table.from_pylist(rows[:2]), pa.Table.from_pylist(rows[2:])]))
    expected = {row["prompt_id"]: row for row in sorted(rows, key=lambda row: row["prompt_id"])}
    assert list(prompts) == list(expected)
    assert dict(prompts.items()) == expected
    assert list(prompts.rows()) == list(expected.values())
    assert prompts.column("answer") == [row["answer"] for row in expected.values()]
    assert ("b" in prompts, "bb" in prompts, len(prompts)) == (True, False, 5)
    with pytest.raises(KeyError):
        prompts["d"]
