"""Options of `cropi bench engine`, checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from cropi.cli.shell import AsJson
from cropi.errors import UserError, hint
from cropi.lab.bench.contender_list import CONTENDERS
from cropi.lab.bench.policy_shapes import SHAPES

PROMPTS = {"realistic": (32, 8), "plain": (256, 64), "builtin": (1000, 64)}
"""Default numbers of train and validation prompts, by workload."""

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
"""The engine's own batch size where memory allows."""


@dataclass(frozen=True)
class EngineOptions:
    """One measurement. Empty or zero: the default of the workload or device."""

    shape: Annotated[str, typer.Option(help="tiny, 10m, 135m, qwen2.5-0.5b, -1.5b or -7b.", show_default="10m")] = (
        ""  # stays empty for the built-in policy
    )
    workload: Annotated[str, typer.Option(help="realistic, plain or builtin.")] = "realistic"
    prompts: Annotated[int, typer.Option(help="Train prompts.", show_default="by workload")] = 0
    validation: Annotated[int, typer.Option(help="Validation prompts.", show_default="by workload")] = 0
    rounds: Annotated[int, typer.Option(help="Runs of each contender, in turns.")] = 3
    contenders: Annotated[str, typer.Option(help="Names, separated by commas.", show_default="all")] = ""
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.", show_default="by device")] = ""
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto"
    threads: Annotated[int, typer.Option(help="CPU threads of each contender.")] = 1
    batch_tokens: Annotated[int, typer.Option(help="Tokens in one pass.", show_default="by device")] = 0
    seed: Annotated[int, typer.Option(help="Seed of weights and rows.")] = 0
    out: Annotated[Path | None, typer.Option("--out", help="Write the JSON to this file.", show_default=False)] = None
    as_json: AsJson = False

    @property
    def names(self) -> list[str]:
        """Contenders to measure, none twice."""
        chosen = [name.strip() for name in self.contenders.split(",")] if self.contenders else CONTENDERS
        return list(dict.fromkeys(chosen))

    def recorded(self) -> dict[str, Any]:
        """Options of the measurement as plain JSON."""
        values = asdict(self) | {"contenders": self.names}
        return {name: value for name, value in values.items() if name not in ("out", "as_json")}


def resolve(options: EngineOptions) -> EngineOptions:
    """Fill in the defaults. UserError for an option that cannot be used."""
    _known("--workload", options.workload, PROMPTS)
    if options.shape:
        _known("--shape", options.shape, SHAPES)
    for name in options.names:
        _known("--contenders", name, CONTENDERS)
    if options.dtype:
        _known("--dtype", options.dtype, ("float32", "bfloat16"))
    builtin = options.workload == "builtin"
    if builtin and options.shape:
        raise UserError("the workload builtin has its own policy", where="--shape", fix="leave it out.")
    prompts, validation = PROMPTS[options.workload]
    device = _device(options.device)
    resolved = replace(
        options,
        shape="" if builtin else options.shape or "10m",
        prompts=options.prompts or prompts,
        validation=options.validation or validation,
        dtype=options.dtype or ("bfloat16" if device == "cuda" else "float32"),
        device=device,
        batch_tokens=options.batch_tokens or BATCH_TOKENS[device],
    )
    _check_sizes(resolved)
    if options.out is not None and not options.out.absolute().parent.is_dir():
        folder = str(options.out.absolute().parent)
        raise UserError("there is no such folder", where=folder, fix="create it, or name another.")
    return resolved


def _check_sizes(options: EngineOptions) -> None:
    least = {"prompts": 4, "validation": 2, "rounds": 1, "threads": 1, "batch_tokens": 512}
    for name, smallest in least.items():
        value = getattr(options, name)
        if value < smallest:
            where = f"--{name.replace('_', '-')}"
            raise UserError(f"{value} is too few", where=where, fix=f"give at least {smallest}.")


def _device(name: str) -> str:
    import torch

    _known("--device", name, ("auto", "cpu", "cuda"))
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device is available", where="--device", fix="leave it out, or set it to cpu.")
    return name


def _known(option: str, word: str, known: Iterable[str]) -> None:
    names = list(known)
    if word not in names:
        raise UserError(
            f"{word!r} is unknown", where=option, fix=hint(word, names, f"choose from: {', '.join(names)}.")
        )
