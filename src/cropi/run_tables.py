"""Tables in a run's folder: columns of scores, evaluations by optimiser step, and training prompts by id."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from cropi.artifacts import EVALUATION, check_file, corrupt, finish, is_finished, read_manifest, write_table

EVALUATED = "evaluation"  # kind of artifact
STEP_FILE = re.compile(r"step-(\d+)\.parquet")
BLOCK_ROWS = 1 << 14


def scores_schema(validation_sets: Iterable[str]) -> pa.Schema:
    """Columns of an influence table: one `influence/NAME` and one `standard_error/NAME` per validation set."""
    validation_sets = list(validation_sets)
    return pa.schema(
        [
            ("prompt_id", pa.string()),
            ("source", pa.string()),
            ("status", pa.string()),
            ("pass_rate", pa.float64()),
            ("reward_variance", pa.float64()),  # p (1 - p) where rewards are 1 and 0
            ("completion_tokens", pa.int64()),
            ("feature_norm", pa.float64()),
            ("ratio_ess", pa.float64()),  # effective sample size of the token ratios, as a share of the tokens
            ("clip_share", pa.float64()),  # share of the token ratios outside 1 +- 0.2
            ("kl", pa.float64()),  # KL(policy || behaviour policy) per token, in nats
            ("top_probability", pa.float64()),  # of being among the best when fused; null where it is not known
            *((f"influence/{name}", pa.float64()) for name in validation_sets),
            *((f"standard_error/{name}", pa.float64()) for name in validation_sets),  # null where it is not known
        ]
    )


def beliefs_schema(validation_sets: Iterable[str]) -> pa.Schema:
    """Columns of what is believed of the pool at the end of a stage; influence is null before anything is known."""
    influence = [f"{kind}/{name}" for name in sorted(validation_sets) for kind in ("influence", "standard_error")]
    known = [("prompt_id", pa.string()), ("times_drawn", pa.int64()), ("pass_rate", pa.float64())]
    return pa.schema([*known, *((name, pa.float64()) for name in influence)])


def evaluation_files(folder: Path, *, all_there: bool = False) -> dict[int, Path]:
    """Tables of finished evaluations by optimiser step, in ascending order; step 0 is the base policy.

    ArtifactError where one is damaged, and with `all_there` where one is missing.
    """
    known = read_manifest(folder, EVALUATED, made_by="cropi run").files if is_finished(folder) else {}
    again = "go on with `cropi run`: it is measured again, if the checkpoint of its step is still there."
    for name, checksum in known.items():
        if all_there or (folder / name).is_file():
            check_file(folder / name, checksum, f"delete {folder / name} and {again}")
    found = {_evaluated_at(path.name): path for path in folder.glob("step-*") if STEP_FILE.fullmatch(path.name)}
    for path in found.values():
        if all_there and path.name not in known:
            raise corrupt(path, "is not in its manifest", again)
    return {step: path for step, path in sorted(found.items()) if path.name in known}


def keep_evaluation(folder: Path, step: int, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Write the table of an evaluation, and the manifest of all in the folder."""
    path = folder / f"step-{step:06}.parquet"
    write_table(path, rows, EVALUATION)
    before = read_manifest(folder, EVALUATED, made_by="cropi run") if is_finished(folder) else None
    known = {} if before is None else {name: found for name, found in before.files.items() if name != path.name}
    inputs = {"settings": {**({} if before is None else before.inputs["settings"]), **settings}}
    finish(folder, EVALUATED, inputs=inputs, counts={}, known=known, names=sorted([*known, path.name]))


def forget_evaluations(folder: Path, step: int) -> None:
    """Drop evaluations beyond the step that an interrupted training goes on from."""
    if is_finished(folder):
        before = read_manifest(folder, EVALUATED, made_by="cropi run")
        kept = {name: checksum for name, checksum in before.files.items() if _evaluated_at(name) <= step}
        finish(folder, EVALUATED, inputs=before.inputs, counts={}, known=kept, names=kept)
    for path in folder.glob("step-*.parquet"):
        if STEP_FILE.fullmatch(path.name) and _evaluated_at(path.name) > step:
            path.unlink()


def _evaluated_at(name: str) -> int:
    return int(name.removeprefix("step-").removesuffix(".parquet"))


class TrainPrompts(Mapping[str, dict[str, Any]]):
    """Training prompts by id, in ascending order of id. Rows are made from columns when they are asked for."""

    def __init__(self, table: pa.Table) -> None:
        wide = [pa.field(f.name, pa.large_string() if f.type == pa.string() else f.type) for f in table.schema]
        self._table = table.cast(pa.schema(wide)).sort_by("prompt_id").combine_chunks()
        self._ids: list[str] = self._table.column("prompt_id").to_pylist()

    def __getitem__(self, prompt_id: str) -> dict[str, Any]:
        place = bisect_left(self._ids, prompt_id)
        if place == len(self._ids) or self._ids[place] != prompt_id:
            raise KeyError(prompt_id)
        return self._table.slice(place, 1).to_pylist()[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def rows(self) -> Iterator[dict[str, Any]]:
        """All rows, a block of them in memory at a time."""
        for start in range(0, len(self._ids), BLOCK_ROWS):
            yield from self._table.slice(start, BLOCK_ROWS).to_pylist()

    def column(self, name: str) -> list[Any]:
        """One column, in the order of the ids."""
        return self._table.column(name).to_pylist()
