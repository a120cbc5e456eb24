"""Options, output and error messages that all commands share."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.core

from cropi.artifacts import is_full_disk
from cropi.errors import ArtifactError, ConfigError, UserError, printable
from cropi.parallel import end_ranks, is_first_rank, is_lost_rank, launched, process_group, start_ranks
from cropi.ray_workers import use_ray

if TYPE_CHECKING:
    from cropi.config import Config
    from cropi.config.loading import ConfigLike
    from cropi.stages.run import Run

TOGETHER = frozenset({"run", "collect", "score", "train", "evaluate"})
"""Commands that the ranks of a launcher run together."""

DDP_TIMEOUT_S = 1800.0  # as in TrainingArguments


class Commands(typer.core.TyperGroup):
    """Turns errors into messages and exit codes around every command; a bug keeps its traceback.

    Of several ranks, the first that fails reports the error.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            end_ranks()
            return result
        except UserError as error:
            leave(f"error: {error}", 2)
        except KeyboardInterrupt:
            leave("interrupted; the same command goes on from here", 130)
        except Exception as error:
            message = machine_error(error)
            if message:
                leave(f"error: {message}", 2)
            if is_lost_rank(error):
                leave(
                    "error: another process of the run has ended, or has not answered within trainer.ddp_timeout\n"
                    "Fix: run the same command again: it goes on where it stopped.",
                    1,
                )
            raise


ConfigArgument = Annotated[str, typer.Argument(metavar="CONFIG", help="A recipe, a YAML file, or the folder of a run.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="key=value", help="Settings that replace the config's.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
StageOption = Annotated[int, typer.Option("--stage", min=0, help="Stage to work on, counted from 0.")]
CheckpointOption = Annotated[
    Path | None, typer.Option("--checkpoint", help="Folder of a checkpoint of the policy.", show_default=False)
]

RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Divide the work among Ray workers: auto, HOST:PORT, or local for this machine.",
        show_default=False,
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Number of Ray workers; unset as many as fit.", show_default=False),
]


def read_config(config: ConfigLike, overrides: list[str] | None) -> Config:
    """Load the config that a command names, with the overrides of its command line."""
    from cropi.config.loading import load_config

    return load_config(config, overrides or [])


def begun_config(name: str, overrides: list[str] | None) -> Config:
    """The config of a run that has begun. ArtifactError if there is none."""
    loaded = read_config(name, overrides)
    if not (loaded.folder / "config.json").is_file():
        fix = f"run `cropi run {name}` first, or name the folder of a run."
        raise ArtifactError("there is no such run", where=str(loaded.folder), fix=fix)
    return loaded


def read_own_config(config: ConfigLike, overrides: list[str] | None) -> Config:
    """Load the config that a command names. ConfigError for the curriculum of a TRL script: only that can go on."""
    loaded = read_config(config, overrides)
    if loaded.is_of_script:
        raise ConfigError(
            "this is the curriculum of a TRL script, and only that script has its model and its reward functions",
            where=str(config),
            fix="run the script to go on; `cropi report` and `cropi explain` read this folder.",
        )
    return loaded


def open_run(
    config: ConfigLike, overrides: list[str] | None, *, ray: str | None = None, workers: int | None = None
) -> Run:
    """Open the run of a config, on all ranks of a launcher; `ray` and `workers` are the options of that name."""
    loaded = read_own_config(config, overrides)
    policy = loaded.policy
    use_ray(ray, workers, cpus=policy.cpu_threads or 1, on_gpu=policy.device != "cpu")
    quiet_libraries()
    if launched():
        try:
            timeout_s = float(loaded.trainer.get("ddp_timeout", DDP_TIMEOUT_S))
        except (TypeError, ValueError):
            raise ConfigError("is no number of seconds", where="trainer.ddp_timeout", fix="correct it.") from None
        start_ranks(cpu=policy.device == "cpu", timeout_s=timeout_s)
    from cropi.stages.run import Run

    return Run(loaded)


def quiet_libraries() -> None:
    """Turn off telemetry and the progress bars of libraries. Call it before they are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def print_result(value: dict[str, Any], as_json: bool, text: str) -> None:
    """Print the result of a command, as JSON or as text, on the first rank only."""
    if not is_first_rank():
        return
    print(json.dumps(value, indent=2, allow_nan=False) if as_json else printable(text))


def leave(text: str, code: int) -> NoReturn:
    """End with a message on standard error, if no other rank has failed before."""
    ranks = process_group()
    if ranks.fails_first():
        print(printable(ranks.signed(text)), file=sys.stderr, flush=True)
    sys.exit(code)


def machine_error(error: Exception) -> str:
    """Explain an error that the machine causes, such as a full disk; an empty text for any other."""
    if is_full_disk(error):
        return "no space left on the disk\nFix: free some space and run the same command again."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}\nFix: check that it is there, and may be read and written."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's own
        smaller = "collect.batch_size, collect.batch_tokens, score.batch_tokens or trainer.per_device_train_batch_size"
        return f"out of memory ({' '.join(str(error).split())[:200]})\nFix: lower {smaller}, or use a smaller policy."
    return ""
