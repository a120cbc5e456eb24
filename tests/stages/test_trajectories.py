"""Imported trajectories in place of the base policy's, by hand."""

import pyarrow as pa
from tests.runs import trajectory

from cropi.artifacts import TRAJECTORIES
from cropi.stages.run import replaced


def table(marks: dict[str, float], generations: int) -> pa.Table:
    """Groups whose log-probs say where they come from."""
    rows = [
        trajectory(prompt_id, sample=sample, completion_ids=[2, 3], behaviour_logprobs=[mark, float(sample)])
        for prompt_id, mark in marks.items()
        for sample in range(generations)
    ]
    return pa.Table.from_pylist(rows, schema=TRAJECTORIES)


def test_imported_groups_replace_those_of_the_base_policy() -> None:
    found = replaced(table(dict.fromkeys("abc", 0.0), 2), table({"b": 10.0}, 3))
    marks: dict[str, set[float]] = {}
    for row in found.to_pylist():
        marks.setdefault(row["prompt_id"], set()).add(row["behaviour_logprobs"][0])
    assert marks == {"a": {0.0}, "b": {10.0}, "c": {0.0}}
    assert found.num_rows == 2 * 2 + 3  # no group of two policies
    assert found.schema == TRAJECTORIES
    assert found.column("prompt_ids").num_chunks == 1
