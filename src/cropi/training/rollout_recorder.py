"""Keep the rollouts of training as trajectories for later scoring: they are new and cost nothing extra."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cropi.artifacts import OK, TRAJECTORIES, TRUNCATED, corrupt, file_sha256, write_table
from cropi.errors import ConfigError
from cropi.streams import append_jsonl, cut_jsonl, read_jsonl
from cropi.training.reward_log import Judged, RecordedReward


class RolloutRecorder:
    """Writes the complete groups of every generation batch to one Parquet file, as trajectories.

    `begin` opens a batch; it is written once `note` has received the log-probs of all its rows, so a file is whole or
    absent. After `forget_rollouts`, a resumed run writes the same files as an uninterrupted one.

    A group is complete if its K completions are adjacent in one batch, all have a reward, and all log-probs are finite.
    Of several complete groups of a prompt the last counts.

    The log-probs are those of the sampling weights at the sampling temperature, from the forward pass of TRL's loss. In
    full precision, or with bfloat16 weights, they equal those of the scored policy up to rounding. Under mixed
    precision (`trainer.bf16` with float32 weights), sampling and loss run under autocast: the log-probs are exact for
    the sampler and differ from the scored policy by bfloat16 rounding. Importance ratios before the first step are then
    about 1, which corrects for this sampler.
    """

    def __init__(
        self, folder: Path, reward: RecordedReward, generations: int, eos_ids: Sequence[int], rank: int = 0
    ) -> None:
        """Record in `folder`; the process of rank `rank` writes its own rows of a batch."""
        self._folder, self._reward, self._generations, self._eos_ids = folder, reward, generations, set(eos_ids)
        self._rank = rank
        self._judged: Judged | None = None
        self._step, self._batch = -1, 0
        self._prompts: Sequence[list[int]] = []
        self._logprobs: list[list[float] | None] = []

    def begin(self, step: int, prompts: Sequence[list[int]]) -> None:
        """Open the batch that was judged last, sampled at an optimiser step; `prompts` are token ids by row."""
        judged = self._reward.latest
        assert self._judged is None, "a generation batch is used up before the next one is sampled"
        assert judged is not None, "a generation batch is judged before it is trained on"
        self._batch = self._batch + 1 if step == self._step else 0
        self._step, self._judged, self._prompts = step, judged, prompts
        self._logprobs = [None] * len(prompts)

    def note(self, rows: Sequence[int], logprobs_BT: Tensor) -> None:
        """Add log-probs of some rows, padded on the right. The first count: later ones are of an updated policy."""
        if self._judged is None:
            return
        for row, values_T in zip(rows, logprobs_BT.detach().float().cpu(), strict=True):
            if self._logprobs[row] is None:
                self._logprobs[row] = values_T[: len(self._judged.completion_ids[row])].tolist()
        if all(values is not None for values in self._logprobs):
            rows_of = self._complete_groups(self._judged)
            place = self._folder, self._step, self._batch, self._rank
            keep_rollouts(place, [row for group in rows_of.values() for row in group])
            self._judged = None

    def _complete_groups(self, judged: Judged) -> dict[str, list[dict[str, Any]]]:
        groups = {}
        for start in range(0, len(judged.prompt_ids), self._generations):
            places = range(start, min(start + self._generations, len(judged.prompt_ids)))
            one_prompt = len({judged.prompt_ids[place] for place in places}) == 1
            if one_prompt and len(places) == self._generations and all(map(self._usable, places)):
                groups[judged.prompt_ids[start]] = [self._row(judged, place, place - start) for place in places]
        return groups

    def _usable(self, place: int) -> bool:
        assert self._judged is not None
        values = self._logprobs[place]
        return self._judged.rewards[place] is not None and values is not None and all(map(math.isfinite, values))

    def _row(self, judged: Judged, place: int, sample: int) -> dict[str, Any]:
        completion = judged.completion_ids[place]
        return {
            "prompt_id": judged.prompt_ids[place],
            "set": "train",
            "sample": sample,
            "prompt_ids": self._prompts[place],
            "completion_ids": list(completion),
            "behaviour_logprobs": self._logprobs[place],
            "completion": judged.texts[place],
            "reward": judged.rewards[place],
            "verdict": judged.verdicts[place],
            "status": OK if completion[-1] in self._eos_ids else TRUNCATED,
        }


def rollout_file(folder: Path, step: int, batch: int, rank: int = 0) -> Path:
    """The file of a process's part of a generation batch of training: by the optimiser step it was sampled at, its
    place in the step, and the process if it is not the first."""
    return folder / f"part-{step:06}-{batch:03}{f'-{rank:03}' if rank else ''}.parquet"


def keep_rollouts(place: tuple[Path, int, int, int], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a file of `rollout_file`, and note that it is whole."""
    folder, step, batch, rank = place
    path = rollout_file(*place)
    write_table(path, rows, TRAJECTORIES)
    noted = {"step": step, "batch": batch, "rank": rank, "file": path.name, "sha256": file_sha256(path)}
    append_jsonl(folder / f"written-{rank:03}.jsonl", noted)


def written_rollouts(folder: Path) -> dict[tuple[int, int, int], tuple[Path, str]]:
    """Files of `rollout_file` and their checksums, as the processes noted them when they had written them."""
    rows = [row for path in sorted(folder.glob("written-*.jsonl")) for row in read_jsonl(path)]
    noted = {(row["step"], row["batch"], row["rank"]): (folder / row["file"], row["sha256"]) for row in rows}
    for key, path in rollout_files(folder).items():
        if key not in noted:
            name = folder / f"written-{key[2]:03}.jsonl"
            raise corrupt(name, f"does not name {path.name}", f"put back a copy, or delete {folder.parent}.")
    return noted


def rollout_files(folder: Path) -> dict[tuple[int, int, int], Path]:
    """The files of `rollout_file` that are there by (step, batch, process), oldest first."""
    found = {}
    for path in folder.glob("part-*-*.parquet"):
        step, batch, *rank = map(int, path.stem.split("-")[1:])
        found[step, batch, rank[0] if rank else 0] = path
    return dict(sorted(found.items()))


def forget_rollouts(folder: Path, step: int) -> None:
    """Delete the batches sampled at or after an optimiser step."""
    for path in folder.glob("written-*.jsonl"):
        cut_jsonl(path, lambda row: row["step"] < step)
    for (sampled_at, *_), path in rollout_files(folder).items():
        if sampled_at >= step:
            path.unlink()


def dropouts(model: nn.Module) -> list[str]:
    """Names of the modules with dropout in training, which makes the loss's log-probs noisy."""
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Dropout) and module.p > 0) or _attention_dropout(module) > 0
    ]


def require_no_dropout(model: nn.Module) -> None:
    """Raise ConfigError if dropout would make the log-probs of reused rollouts noisy."""
    dropping = dropouts(model)
    if dropping:
        raise ConfigError(
            f"the policy uses dropout in training ({dropping[0]}), so the log-probs of its rollouts are noisy",
            where="refresh.reuse_rollouts",
            fix="set it to false, or trainer.disable_dropout=true, or the dropout in the policy's config.json to 0.",
        )


def _attention_dropout(module: nn.Module) -> float:
    """Dropout rate of attention modules that have no dropout module."""
    share = vars(module).get("attention_dropout", 0.0)
    return share if isinstance(share, float) else 0.0
