"""A small real run for tests: the built-in policy, few prompts, few steps."""

import contextlib
import gc
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cropi.rewards.verifier import Judge, Judgement

# Four families, one of them the target; two stages of three steps.
SMALL = [
    "prompts.train=[{type: builtin, families: [sum, parity, count, machine], count: 12, seed: 1, label_noise: 0.25}]",
    "prompts.validation={sum: [{type: builtin, families: [sum], count: 6, seed: 2}]}",
    "prompts.test={sum: {sources: [{type: builtin, families: [sum], count: 16, seed: 3}]}}",
    "collect.validation_num_generations=8",
    "collect.shard_prompts=16",
    "select.strategy={type: influence}",
    "select.fraction=0.25",
    "train.stages=2",
    "train.steps_per_stage=3",
    "trainer.per_device_train_batch_size=32",
    "evaluate.every=2",
]


def cropi_process(*arguments: str, cwd: Path, timeout_s: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the real command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cropi", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
        check=False,
    )


def cropi(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in this process, which saves the imports. What it has opened is closed before it returns."""
    from cropi import console
    from cropi.__main__ import app

    out, err, code = io.StringIO(), io.StringIO(), 0
    console.warn_once.cache_clear()
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            app(list(arguments), prog_name="cropi")
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
    gc.collect()  # lets go of the run's lock, as the end of a process does
    return subprocess.CompletedProcess(list(arguments), code, out.getvalue(), err.getvalue())


def cropi_ok(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in this process; it must succeed."""
    done = cropi(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done


def cropi_error(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in this process; it must end with a user's error: code 2 and no traceback."""
    done = cropi(*arguments, cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def json_lines(path: Path) -> list[Any]:
    """Rows of a JSONL file that is no stream of ours."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def judge(verdict: Callable[[str, str], str]) -> Judge:
    """Judges rows by a function (completion, answer) -> verdict."""
    return lambda rows: [Judgement(verdict(row.completion, row.answer), 0.0) for row in rows]


def trajectory(prompt_id: str, name: str = "train", sample: int = 0, **changed: Any) -> dict[str, Any]:
    """A row of a trajectories' table, of a wrong answer unless it is changed."""
    plain = {"prompt_ids": [2], "completion_ids": [3], "behaviour_logprobs": [-1.0], "completion": "", "verdict": ""}
    return {"prompt_id": prompt_id, "set": name, "sample": sample, "reward": 0.0, "status": "ok"} | plain | changed


def grpo_args(folder: Path, **changed: Any) -> Any:
    """TRL's settings for a few steps on a CPU."""
    from trl import GRPOConfig

    quiet = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": [], "disable_tqdm": True}
    return GRPOConfig(output_dir=str(folder), **(quiet | {"save_strategy": "no"} | changed))


def refused_settings(kind: str) -> list[list[str]]:
    """Overrides of a kind, each with the message that refuses it."""
    rows = Path(__file__).with_name("refused_settings.tsv").read_text(encoding="utf-8").splitlines()
    return [row.split("\t")[1:] for row in rows if row.startswith(f"{kind}\t")]


def selections(folder: Path) -> dict[str, bytes]:
    """Selection files of all stages, by path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("selections/stage-*/sel*"))}


def evaluations(folder: Path) -> dict[str, bytes]:
    """Evaluation files, by path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.glob("evaluations/step-*.parquet"))}
