"""Training's own rollouts, kept as trajectories: they are fresh, and cost no further sampling."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cropi.artifacts import (
    OK,
    TRAJECTORIES,
    TRUNCATED,
    append_jsonl,
    corrupt,
    cut_jsonl,
    file_sha256,
    read_jsonl,
    write_table,
)
from cropi.errors import ConfigError
from cropi.training.reward import Judged, RecordedReward


class RolloutRecorder:
    """Writes the complete groups of every generation batch to a Parquet file of its own, as trajectories.

    A batch is opened by `begin` and written once `note` has brought the log-probs of all its rows, so a file is whole
    or absent, and `forget_from` makes a resumed run write what an undisturbed one would have written.

    A group is complete when its K completions stand side by side in one batch, all have a reward, and all log-probs are
    finite. Of several complete groups of a prompt the last counts.

    What the log-probs are: those of the weights that sampled, at the sampling temperature, by the forward pass of
    TRL's loss. In full precision, or with weights in bfloat16, that is the policy as it is scored, but for rounding.
    Under mixed precision (`trainer.bf16` with float32 weights) both sampling and the loss run under autocast: the
    log-probs are exact for the policy that sampled, and differ by bfloat16 rounding from those of the plain policy.
    Importance ratios then are about 1 rather than 1 before the first step, which is what corrects for such a sampler.
    """

    def __init__(
        self, folder: Path, reward: RecordedReward, generations: int, eos_ids: Sequence[int], rank: int = 0
    ) -> None:
        """`rank` is that of the process, which writes its own part of a batch."""
        self._folder, self._reward, self._generations, self._eos_ids = folder, reward, generations, set(eos_ids)
        self._rank = rank
        self._judged: Judged | None = None
        self._step, self._batch = -1, 0
        self._prompts: Sequence[list[int]] = []
        self._logprobs: list[list[float] | None] = []

    def begin(self, step: int, prompts: Sequence[list[int]]) -> None:
        """Open the batch judged last, sampled at an optimiser step; `prompts` are token ids, row by row."""
        judged = self._reward.latest
        assert self._judged is None, "a generation batch is used up before the next one is sampled"
        assert judged is not None, "a generation batch is judged before it is trained on"
        self._batch = self._batch + 1 if step == self._step else 0
        self._step, self._judged, self._prompts = step, judged, prompts
        self._logprobs = [None] * len(prompts)

    def note(self, rows: Sequence[int], logprobs_BT: Tensor) -> None:
        """Log-probs of some rows, padded on the right. Those noted first stay: later ones are of an updated policy."""
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
    """Drop the batches sampled at or after an optimiser step."""
    for path in folder.glob("written-*.jsonl"):
        cut_jsonl(path, lambda row: row["step"] < step)
    for (sampled_at, *_), path in rollout_files(folder).items():
        if sampled_at >= step:
            path.unlink()


def dropouts(model: nn.Module) -> list[str]:
    """Names of the modules that drop activations while training: log-probs of the loss are noisy with them."""
    return [
        name
        for name, module in model.named_modules()
        if (isinstance(module, nn.Dropout) and module.p > 0) or _attention_dropout(module) > 0
    ]


def require_no_dropout(model: nn.Module) -> None:
    """ConfigError where the log-probs of rollouts that are to be used again would be noisy."""
    dropping = dropouts(model)
    if dropping:
        raise ConfigError(
            f"the policy drops activations while it trains ({dropping[0]}), so the log-probs of its rollouts are noisy",
            where="refresh.reuse_rollouts",
            fix="set it to false, or trainer.disable_dropout=true, or the dropout in the policy's config.json to 0.",
        )


def _attention_dropout(module: nn.Module) -> float:
    """The share that attention drops without a module of its own."""
    share = vars(module).get("attention_dropout", 0.0)
    return share if isinstance(share, float) else 0.0
