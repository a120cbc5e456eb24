"""What the curriculum costs in the TRL script of examples/trl, on the built-in policy.

    python benchmarks/script_overhead.py --steps 96 --rounds 2
    python benchmarks/script_overhead.py --steps 96 --rounds 2 --sample

Trains alternately with TRL's `GRPOTrainer` and with `CurriculumTrainer` in one process, and prints for each pair the
CPU seconds of both, their ratio, and that ratio per token trained on: which prompts are chosen changes the tokens.
Completions are replayed: the policy answers every prompt beforehand, and sampling costs next to nothing on either side.
With `--sample` both sample, as a user's script does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from trl import GRPOConfig, GRPOTrainer

from cropi.builtin import POLICY_DIR
from cropi.config import PolicyConfig
from cropi.policy import load_policy
from cropi.rollouts.generation import Sampling, TransformersGenerator
from cropi.trl import CurriculumTrainer, Selector

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "trl"))
import curriculum as script

RECORDED = 16  # completions of a prompt
LONGEST = 24


def recorded() -> dict[tuple[int, ...], list[list[int]]]:
    """Completions of the base policy by the tokens of a prompt."""
    policy = load_policy(PolicyConfig(path="builtin", cpu_threads=1))
    prompts = policy.tokenizer([*script.dataset["prompt"], *script.held_out["prompt"]])["input_ids"]
    asked = [prompt for prompt in prompts for _ in range(RECORDED)]
    found: dict[tuple[int, ...], list[list[int]]] = {}
    for prompt, ids in zip(
        asked, TransformersGenerator(policy, 64)(asked, Sampling(LONGEST, 1.0), seed=0), strict=True
    ):
        found.setdefault(tuple(prompt), []).append(ids)
    return found


def replaying(known: dict[tuple[int, ...], list[list[int]]]) -> Any:
    """A stand-in for TRL's generation."""
    times = Counter[tuple[int, ...]]()

    def generate(self: Any, prompt_ids: list[list[int]], *_: Any) -> tuple[list[list[int]], None]:
        completions = []
        for prompt in map(tuple, prompt_ids):
            completions.append(known[prompt][times[prompt] % RECORDED])
            times[prompt] += 1
        return completions, None

    return generate


def trained(folder: Path, steps: int, chosen: bool) -> tuple[float, float]:
    """CPU seconds of a training, and the tokens that it trained on."""
    settings = GRPOConfig(
        output_dir=str(folder),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=64,
        num_generations=8,
        max_completion_length=LONGEST,
        max_steps=steps,
        learning_rate=5e-5,
        report_to=[],
        logging_steps=steps,
        save_strategy="no",
        disable_tqdm=True,
    )
    given: dict[str, Any] = {"model": str(POLICY_DIR), "reward_funcs": script.right, "train_dataset": script.dataset}
    made = (
        CurriculumTrainer(args=settings, selector=Selector(validation=script.held_out), **given)
        if chosen
        else GRPOTrainer(args=settings, **given)
    )
    before = time.process_time()
    made.train()
    seconds = time.process_time() - before
    return seconds, next(line["num_tokens"] for line in made.state.log_history if "num_tokens" in line)


def main() -> None:
    """Measure, and print a line for each pair."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sample", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    original = GRPOTrainer._generate_single_turn
    if not given.sample:
        GRPOTrainer._generate_single_turn = replaying(recorded())
    try:
        with tempfile.TemporaryDirectory() as folder:
            for number in range(given.rounds):
                kinds = (False, True) if number % 2 == 0 else (True, False)
                found = {kind: trained(Path(folder) / f"{number}-{kind}", given.steps, kind) for kind in kinds}
                (plain, tokens), (own, own_tokens) = found[False], found[True]
                line = {"plain": plain, "curriculum": own, "ratio": own / plain}
                line["ratio_per_token"] = (own / own_tokens) / (plain / tokens)
                print(json.dumps({name: round(value, 3) for name, value in line.items()}), flush=True)
    finally:
        GRPOTrainer._generate_single_turn = original


if __name__ == "__main__":
    main()
