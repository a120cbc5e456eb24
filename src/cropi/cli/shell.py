"""What all commands share: options, output, and how errors end a command."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
import typer.core

from cropi.errors import ConfigError, UserError, printable
from cropi.world import ALONE, OtherFailed, World, first, launched

if TYPE_CHECKING:
    from cropi.config import Config
    from cropi.stages.run import Run
    from cropi.workers import Workers

    Hire = Callable[[Config], Workers]

TOGETHER = frozenset({"run", "collect", "score", "train", "evaluate"})
"""Commands whose work is divided among the processes that a launcher starts."""

DDP_TIMEOUT_S = 1800.0  # as in TrainingArguments

_world = ALONE


class Commands(typer.core.TyperGroup):
    """Turns errors into messages and exit codes around every command; a bug keeps its traceback.

    Of several processes that a launcher has started, the first that fails says why, and the others end with it.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            result = super().invoke(ctx)
            _world.leave()
            return result
        except OtherFailed as other:
            if other.why:
                leave(f"error: {other.why}", other.code)
            sys.exit(other.code)
        except UserError as error:
            leave(f"error: {error}", 2)
        except KeyboardInterrupt:
            leave("interrupted; the same command goes on from here", 130)
        except Exception as error:
            told = _told(error)
            if told:
                leave(f"error: {told}", 2)
            if _connection_is_lost(error):
                leave("error: another process of the run has ended\nFix: run the same command again: it goes on.", 1)
            _world.fail(1)
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
        help="Divide the work in a Ray cluster: auto, HOST:PORT, or local for this machine.",
        show_default=False,
    ),
]
WorkersOption = Annotated[
    int | None,
    typer.Option("--workers", min=1, help="Workers in the Ray cluster; unset as many as it holds.", show_default=False),
]
GpusOption = Annotated[
    float | None,
    typer.Option("--gpus-per-worker", min=0, help="GPUs of each; unset 1 if there are any.", show_default=False),
]


def read_config(config: str, overrides: list[str] | None) -> Config:
    """The config that a command names, with the overrides of its command line."""
    from cropi.loading import load_config

    return load_config(config, overrides or [])


def read_own_config(config: str, overrides: list[str] | None) -> Config:
    """The config that a command names. ConfigError for the curriculum of a TRL script: only the script can go on."""
    from cropi.config import SCRIPT_REWARDS

    loaded = read_config(config, overrides)
    if getattr(loaded.verifier, "path", None) == SCRIPT_REWARDS:
        raise ConfigError(
            "this is the curriculum of a TRL script, and only that script has its model and its reward functions",
            where=config,
            fix="run the script to go on; `cropi report`, `cropi explain` and `cropi export` read this folder.",
        )
    return loaded


def open_run(config: str, overrides: list[str] | None, world: World = ALONE, hire: Hire | None = None) -> Run:
    """Open a run for work."""
    loaded = read_own_config(config, overrides)
    quiet_libraries()
    workers = None if hire is None else hire(loaded)
    from cropi.stages.run import Run

    if world.size > 1:
        try:
            timeout_s = float(loaded.trainer.get("ddp_timeout", DDP_TIMEOUT_S))
        except (TypeError, ValueError):
            raise ConfigError("is no number of seconds", where="trainer.ddp_timeout", fix="correct it.") from None
        world.connect(cpu=loaded.policy.device == "cpu", timeout_s=timeout_s)
    return Run(loaded, world=world, workers=workers)


def ray_workers(address: str | None, count: int | None, gpus: float | None) -> Hire | None:
    """What finds workers in a Ray cluster. ConfigError under a launcher, or for settings of workers without one."""
    if address is None:
        if count is not None or gpus is not None:
            raise ConfigError("there are no workers without a Ray cluster", where="--workers", fix="give --ray too.")
        return None
    if launched():
        raise ConfigError("a launcher has divided the work already", where="--ray", fix="call cropi without it.")

    def hire(config: Config) -> Workers:
        from cropi.cluster import Cluster

        policy = config.policy
        return Cluster(address, count, gpus, cpus=policy.cpu_threads or 1, device=policy.device)

    return hire


def join() -> World:
    """The processes that a launcher has started, this one among them, or this one alone."""
    global _world
    if launched():
        from cropi.distributed import Launched

        _world = Launched.by_environment()
    return _world


def quiet_libraries() -> None:
    """No telemetry, and no progress bars beside our own. Set before the libraries are imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    import datasets
    from transformers.utils import logging

    datasets.disable_progress_bars()
    logging.disable_progress_bar()


def print_result(value: dict[str, Any], as_json: bool, text: str) -> None:
    """What a command found, on standard output."""
    if not first():
        return
    print(json.dumps(value, indent=2, allow_nan=False) if as_json else printable(text))


def leave(text: str, code: int) -> NoReturn:
    """End with a message on standard error, if no other process has failed before."""
    if _world.fail(code):
        print(printable(_world.signed(text)), file=sys.stderr, flush=True)
    sys.exit(code)


def _connection_is_lost(error: Exception) -> bool:
    """Whether a process that this one waited for has ended; it, or the launcher, says why."""
    lost = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL")
    return _world.size > 1 and isinstance(error, RuntimeError) and any(text in str(error) for text in lost)


def _told(error: Exception) -> str:
    """An error of the machine rather than of this program in words; nothing for any other."""
    if _disk_is_full(error):
        return "no space left on the disk\nFix: free some space and run the same command again."
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}\nFix: check that it is there, and may be read and written."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's own
        smaller = "collect.batch_size, collect.batch_tokens, score.batch_tokens or trainer.per_device_train_batch_size"
        return f"out of memory ({' '.join(str(error).split())[:200]})\nFix: lower {smaller}, or use a smaller policy."
    return ""


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether a full disk is behind an error: libraries wrap it in errors of their own."""
    while error is not None:
        if getattr(error, "errno", None) in {errno.ENOSPC, errno.EDQUOT} or "No space left" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
