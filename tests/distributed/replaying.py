"""The command, with completions recorded to a file or replayed from it, and a log of what the curriculum is told.

To be launched as a file: `replaying.py record|replay FOLDER ARGUMENTS...`. FSDP works on CPUs too. FOLDER gets
`completions.json`, and of every process `told-RANK.jsonl`: each observation, with the state's digest after it.
"""

import hashlib
import json
import os
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from fsdp_on_cpu import _with_fsdp
from transformers import GenerationMixin

from cropi.curriculum.curriculum import Curriculum
from cropi.parallel import process_group
from cropi.stages.validation_pass import ValidationPass
from cropi.training.stage_trainer import StageTrainer

MODE, FOLDER = sys.argv[1], Path(sys.argv[2])
KNOWN: dict[str, list[list[int]]] = {}
_generate, _sample = GenerationMixin.generate, ValidationPass.sample
_train = StageTrainer._generate_and_score_completions
_at = ""  # the generation batch, or the round of validation completions
_batches = 0
_generations = 0  # of a training batch; 0 for validation prompts


def generate(self: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor, **settings: Any) -> torch.Tensor:
    """Of transformers, or the recorded completions."""
    width = input_ids.shape[1]
    if not _at:  # an evaluation
        return _generate(self, input_ids=input_ids, attention_mask=attention_mask, **settings)  # type: ignore[return-value]
    prompts = [row[mask.bool()].tolist() for row, mask in zip(input_ids, attention_mask, strict=True)]
    keys = [f"{_at} {prompt}" for prompt in prompts]
    if MODE == "record":
        output: Any = _generate(self, input_ids=input_ids, attention_mask=attention_mask, **settings)
        for key, row in zip(keys, output[:, width:].tolist(), strict=True):
            KNOWN.setdefault(key, []).append(row)
        (FOLDER / "completions.json").write_text(json.dumps(KNOWN))
        return output
    times = Counter[str]()
    completions = []
    for row, key in enumerate(keys):
        first = process_group().rank * len(keys) + row
        completions.append(KNOWN[key][first % _generations if _generations else times[key]])
        times[key] += 1
    longest, pad = max(map(len, completions)), settings["generation_config"].pad_token_id
    padded = torch.tensor([own + [pad] * (longest - len(own)) for own in completions])
    return torch.cat([input_ids, padded], 1)


def sample(self: Any, ask: Any, due: Any, step: int) -> Any:
    global _at
    _at = f"validation {step}"
    try:
        return _sample(self, ask, due, step)
    finally:
        _at = ""


def train(self: Any, inputs: Any) -> Any:
    global _at, _batches, _generations
    _at, _generations = f"train {_batches}", self.num_generations
    _batches += 1
    try:
        return _train(self, inputs)
    finally:
        _at, _generations = "", 0


def told(name: str) -> Any:
    original = getattr(Curriculum, name)

    def tell(self: Any, first: Any, *others: Any, **named: Any) -> None:
        original(self, first, *others, **named)
        about = first if isinstance(first, str) else first.place
        digest = hashlib.sha256()
        for key, array in sorted(self.state_dict().items()):
            digest.update(key.encode() + array.tobytes())
        line = {"kind": name, "about": about, "others": others, **named, "state": digest.hexdigest()}
        with (FOLDER / f"told-{process_group().rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    return tell


if __name__ == "__main__":
    if MODE == "replay":
        KNOWN |= json.loads((FOLDER / "completions.json").read_text())
    if os.environ.get("ACCELERATE_USE_FSDP"):
        AcceleratorState.__init__ = _with_fsdp  # type: ignore[method-assign]
    GenerationMixin.generate = generate  # type: ignore[method-assign,assignment]
    ValidationPass.sample = sample  # type: ignore[method-assign]
    StageTrainer._generate_and_score_completions = train  # type: ignore[method-assign]
    for observed in ("observe", "observe_validation"):
        setattr(Curriculum, observed, told(observed))
    sys.argv = ["cropi", *sys.argv[3:]]
    runpy.run_module("cropi", run_name="__main__")
