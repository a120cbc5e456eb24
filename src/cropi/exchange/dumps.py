"""`cropi import`: read rollouts of another trainer as trajectories."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from pyarrow import parquet

from cropi.artifacts import (
    GOLD_UNPARSEABLE,
    OK,
    TRAJECTORIES,
    TRUNCATED,
    Manifest,
    build,
    count_status,
    file_sha256,
    is_finished,
    write_table,
)
from cropi.config import SAMPLED_BY, config_hash
from cropi.console import progress, say
from cropi.errors import ArtifactError, DataError
from cropi.policy import Policy
from cropi.prompts.encoding import encode_prompts, trainer_prompts
from cropi.rewards.verifier import answered
from cropi.rollouts.shards import behaviour_logprobs
from cropi.stages.collect import make_prompt_table
from cropi.stages.run import IMPORTED, Run

SHARD_PROMPTS = 256


class Rollout(NamedTuple):
    """A completion of a dump, its prompt as the trainer wrote it, and its optimiser step."""

    prompt: str
    completion: str
    step: int


def import_rollouts(run: Run, policy: Policy, origin: str, paths: Sequence[Path]) -> Manifest:
    """Read dumps as trajectories of the run's training prompts; they replace those that were collected.

    Formats: verl's `trainer.rollout_data_dir` (JSONL) and TRL's `log_completions` (Parquet). Prompts are matched by
    text. Of each prompt, the newest step with at least two completions counts; prompts without a unique match are left
    out and counted. The run's verifier judges the completions. They are tokenised again, with an end-of-sequence token
    if there is room, and `policy` gives the log-probs; both may differ from the trainer's.

    Errors: DataError for files that are no dump or hold no prompt of the run; ArtifactError if the stage has been
    scored or selected by other trajectories.
    """
    made = [folder for folder in (run.paths.scores(0), run.paths.selection(0)) if is_finished(folder)]
    if made and not is_finished(run.paths.imported):
        raise ArtifactError(
            "was made from earlier trajectories",
            where=str(made[0]),
            fix="import before you score and select, or delete it and everything made from it.",
        )
    files = _files(paths)
    inputs: dict[str, Any] = {
        "prompts": make_prompt_table(run).identity,
        "policy": origin,
        "files": config_hash([file_sha256(path) for path in files]),
    }
    inputs |= {"settings": run.folder.settings(*SAMPLED_BY)}
    make = partial(_make, run, policy, files)
    manifest = build(run.paths.imported, IMPORTED, make, inputs=inputs, made_by="cropi import")
    found, rest = manifest.details["prompts"], manifest.details["left_out"]
    say(f"imported trajectories of {found} prompts; {rest} rollouts were of other prompts or of single completions")
    return manifest


def _make(run: Run, policy: Policy, files: Sequence[Path], folder: Path) -> tuple[Mapping[str, int], Mapping[str, Any]]:
    known, encoded = _known(run, policy)
    groups, left_out = _newest_groups(files, known)
    statuses: list[str] = []
    verdicts: Counter[str] = Counter()
    ids = list(groups)
    with progress("import", len(ids), "prompts") as bar:
        for start in range(0, len(ids), SHARD_PROMPTS):
            chosen = ids[start : start + SHARD_PROMPTS]
            rows = [row for i in chosen for row in _rows(run, policy, i, encoded[i], groups[i])]
            _judge(run, policy, rows)
            write_table(folder / f"part-{start // SHARD_PROMPTS:05}.parquet", rows, TRAJECTORIES)
            statuses += [row["status"] for row in rows]
            verdicts.update(row["verdict"] for row in rows)
            bar.advance(len(chosen))
    details = {"prompts": len(groups), "left_out": left_out, "verdicts": dict(sorted(verdicts.items()))}
    return count_status(statuses), details


def _newest_groups(files: Sequence[Path], known: Mapping[str, str]) -> tuple[dict[str, list[str]], int]:
    """(completions of the newest step with at least two, by prompt id; the number of rollouts left out)."""
    by_step: dict[str, dict[int, list[str]]] = defaultdict(lambda: defaultdict(list))
    count = 0
    for path in files:
        for rollout in _read(path):
            count += 1
            if rollout.prompt in known:
                steps = by_step[known[rollout.prompt]]
                steps[rollout.step].append(rollout.completion)
                newest = _newest(steps)
                for older in [step for step in steps if newest is not None and step < newest]:
                    del steps[older]
    groups: dict[str, list[str]] = {}
    for prompt_id, steps in sorted(by_step.items()):
        newest = _newest(steps)
        if newest is not None:
            groups[prompt_id] = steps[newest]
    if not groups:
        raise DataError(
            "no two rollouts belong to one training prompt of this run",
            where=", ".join(map(str, files[:3])),
            fix="import into the run that exported the prompts, with its system prompt and chat template.",
        )
    return groups, count - sum(map(len, groups.values()))


def _newest(steps: Mapping[int, Sequence[str]]) -> int | None:
    """The newest step with at least two completions."""
    return max((step for step, completions in steps.items() if len(completions) > 1), default=None)


def _judge(run: Run, policy: Policy, rows: Sequence[dict[str, Any]]) -> None:
    """Add verdicts, rewards and log-probs to the rows."""
    settings, prompts = run.config.collect, run.folder.train_prompts
    judged = run.judge([answered(row["completion"], prompts[row["prompt_id"]]) for row in rows])
    asked, given = ([row[name] for row in rows] for name in ("prompt_ids", "completion_ids"))
    logprobs = behaviour_logprobs(policy, asked, given, settings.temperature, settings.batch_tokens)
    for row, judgement, values in zip(rows, judged, logprobs, strict=True):
        row |= {"verdict": judgement.verdict, "reward": judgement.reward, "behaviour_logprobs": values}
        if row["reward"] is None:
            row["status"] = GOLD_UNPARSEABLE


def _rows(
    run: Run, policy: Policy, prompt_id: str, prompt_ids: list[int], completions: Sequence[str]
) -> Iterator[dict[str, Any]]:
    longest = run.config.collect.max_completion_length
    for sample, text in enumerate(completions):
        tokens = list(policy.tokenizer(text=text, add_special_tokens=False)["input_ids"])
        ended = len(tokens) < longest
        yield {
            "prompt_id": prompt_id,
            "set": "train",
            "sample": sample,
            "prompt_ids": prompt_ids,
            "completion_ids": [*tokens, policy.tokenizer.eos_token_id] if ended else tokens[:longest],
            "completion": text,
            "status": OK if ended else TRUNCATED,
        }


def _known(run: Run, policy: Policy) -> tuple[dict[str, str], dict[str, list[int]]]:
    """(training prompt ids by each form in which dumps write prompts; token ids by prompt id)."""
    known, tokenizer = run.folder.train_prompts, policy.tokenizer
    prompts = trainer_prompts(tokenizer, run.config.prompts, known.rows())
    encoded = dict(zip(known, encode_prompts(tokenizer, prompts), strict=True))
    decoded = tokenizer.batch_decode(list(encoded.values()), skip_special_tokens=True)
    by_text: dict[str, set[str]] = defaultdict(set)
    for prompt_id, prompt, text in zip(known, prompts, decoded, strict=True):
        by_text[text.strip()].add(prompt_id)
        by_text[_written(prompt)].add(prompt_id)
    return {text: next(iter(ids)) for text, ids in by_text.items() if len(ids) == 1}, encoded


def _written(prompt: Any) -> str:
    """A prompt as text, or as JSON of its messages' roles and contents."""
    if isinstance(prompt, str):
        return prompt.strip()
    return json.dumps([[message["role"], message["content"]] for message in prompt])


def _files(paths: Sequence[Path]) -> list[Path]:
    files = []
    for path in paths:
        found = sorted(p for p in path.iterdir() if p.suffix in {".jsonl", ".parquet"}) if path.is_dir() else [path]
        if not found or not all(p.is_file() for p in found):
            raise DataError(
                "holds no rollouts", where=str(path), fix="give .jsonl or .parquet files, or a folder of them."
            )
        files += found
    return files


def _read(path: Path) -> Iterator[Rollout]:
    try:
        if path.suffix == ".parquet":
            for batch in parquet.ParquetFile(path).iter_batches(columns=["step", "prompt", "completion"]):
                for row in batch.to_pylist():
                    completion = row["completion"]
                    text = completion if isinstance(completion, str) else str(completion[-1]["content"])
                    yield Rollout(_written(row["prompt"]), text, int(row["step"]))
            return
        with path.open(encoding="utf-8") as file:
            for line in file:
                row = json.loads(line)
                yield Rollout(str(row["input"]).strip(), str(row["output"]), int(row["step"]))
    except (pa.ArrowInvalid, KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            f"is not a dump of rollouts ({type(error).__name__}: {error})",
            where=str(path),
            fix="give files of verl's trainer.rollout_data_dir (.jsonl) or of TRL's log_completions (.parquet).",
        ) from None
