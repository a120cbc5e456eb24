"""Worker for bergson 2.5.1 (https://github.com/EleutherAI/bergson), in a Python environment without cropi.

It does in-process what `bergson build --advantage_column advantage --projection_dim 16 --precision fp32` does after its
tokenisation: the same calls, in the same order, as `bergson.build.build_worker`, once for the train rows and once for
the validation rows. Only the model is loaded ahead, so that loading and computing can be timed apart. Its hooks,
batches, projection matrices (made anew in every build) and memory-mapped store are its own.

One row is one trajectory, and all are given, those of zero advantage too: bergson skips none. A row's loss is the sum
of its completion tokens' cross-entropy (bergson's default reduction) times its advantage, so that an `advantage` of our
weight gives minus our gradient; the signs cancel in a dot product. bergson sees the weights of linear layers inside the
base model only: no embedding, head, norm or (by default) bias.

Options: `projection_dim` (16; 0 stores whole gradients), `include_bias` (false).
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from cropi.lab.bench.peers.worker_protocol import Measurement, Task, WeightedGroup, serve
else:
    from worker_protocol import (  # beside this file, which runs as a script where cropi is not installed
        Measurement,
        serve,
    )

PRECISIONS = {"float32": "fp32", "bfloat16": "bf16"}


class Bergson:
    """bergson with its model loaded and its rows laid out."""

    def __init__(self, task: Task) -> None:
        import bergson
        import torch
        from bergson.config.config import DistributedConfig
        from bergson.utils.worker_utils import setup_model_and_peft

        if task.device == "cuda" and not torch.cuda.is_available():
            raise RuntimeError("no CUDA device is available")
        self.version = f"bergson {bergson.__version__}, torch {torch.__version__}"
        self._task = task
        self._on_gpu = task.device == "cuda"
        self._folder = tempfile.TemporaryDirectory(prefix="bergson-")
        longest = max(
            len(group.prompt_ids) + len(ids) for group in task.groups + task.validation for ids in group.completions
        )
        self._config = bergson.IndexConfig(
            run_path=str(Path(self._folder.name) / "index"),
            model=task.model,
            precision=PRECISIONS[task.dtype],
            projection_dim=task.options.get("projection_dim", 16),
            include_bias=task.options.get("include_bias", False),
            token_batch_size=max(task.batch_tokens, longest),  # bergson refuses a row longer than a batch
            distributed=DistributedConfig(nproc_per_node=1),
        )
        self._model, self._target_modules = setup_model_and_peft(self._config)
        self._train, self._validation = _rows(task.groups), _rows(task.validation)

    def run(self) -> Measurement:
        """Both stores, built anew."""
        import torch

        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds, tokens = 0.0, 0
        for name, rows in (("train", self._train), ("validation", self._validation)):
            config = dataclasses.replace(self._config, run_path=f"{self._config.run_path}-{name}")
            shutil.rmtree(config.partial_run_path, ignore_errors=True)
            started = time.perf_counter()
            batches = self._build(config, rows)
            seconds += time.perf_counter() - started
            lengths = rows["length"][:]
            tokens += sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
        return Measurement(seconds, tokens, torch.cuda.max_memory_allocated() / (1 << 20) if self._on_gpu else None)

    def _build(self, config: Any, rows: Any) -> list[list[int]]:
        """The steps of `bergson.build.build_worker` after the model load. Returns the batches."""
        from bergson import PreprocessConfig, collect_gradients
        from bergson.data import allocate_batches
        from bergson.utils.worker_utils import create_processor

        config.partial_run_path.mkdir(parents=True)
        processor = create_processor(self._model, config, self._target_modules)
        batches = allocate_batches(rows["length"][:], config.token_batch_size, max_batch_size=config.max_batch_size)
        collect_gradients(
            model=self._model,
            data=rows,
            processor=processor,
            cfg=config,
            batches=batches,
            target_modules=self._target_modules,
            preprocess_cfg=PreprocessConfig(),
        )
        return batches

    def scores_N(self) -> np.ndarray:
        """Rows summed by prompt. Rows are read one at a time: a store can be larger than memory."""
        import numpy as np
        from bergson import load_gradients

        validation, train = (load_gradients(f"{self._config.run_path}-{name}.part") for name in ("validation", "train"))
        direction_D = np.zeros(validation.shape[1])
        for row_D in validation:
            direction_D += row_D.astype(np.float64) / len(self._task.validation)
        influences = [row_D.astype(np.float64) @ direction_D for row_D in train]
        prompt_of_row = [n for n, group in enumerate(self._task.groups) for _ in group.completions]
        return np.bincount(prompt_of_row, weights=influences, minlength=len(self._task.groups))


def _rows(groups: list[WeightedGroup]) -> Any:
    """A dataset with the columns that `bergson build` has after tokenisation, one row a trajectory."""
    from datasets import Dataset

    return Dataset.from_list(
        [
            {
                "input_ids": group.prompt_ids + completion,
                "labels": [-100] * len(group.prompt_ids) + completion,
                "length": len(group.prompt_ids) + len(completion),
                "advantage": weight,
            }
            for group in groups
            for completion, weight in zip(group.completions, group.weights, strict=True)
        ]
    )


if __name__ == "__main__":
    serve(Bergson)
