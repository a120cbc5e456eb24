"""Options of `cropi bench engine`, checked before anything starts."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cropi.cli.shell import AsJson
from cropi.errors import UserError, hint
from cropi.lab.bench.contender_list import CONTENDERS

Shape = Literal["tiny", "10m", "135m", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b"]
Dtype = Literal["float32", "bfloat16"]
PROMPTS = {"realistic": (32, 8), "plain": (256, 64), "builtin": (1000, 64)}
"""Default numbers of train and validation prompts, by workload."""

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
"""The engine's own batch size where memory allows."""


@dataclass(frozen=True)
class EngineOptions:
    """One measurement. Unset: the default of the workload or device."""

    shape: Annotated[Shape | None, typer.Option(help="A published shape.", show_default="10m")] = None
    workload: Literal["realistic", "plain", "builtin"] = "realistic"
    prompts: Annotated[int | None, typer.Option(min=4, help="Train prompts.", show_default="by workload")] = None
    validation: Annotated[int | None, typer.Option(min=2, help="Validation prompts.", show_default="by workload")] = (
        None
    )
    rounds: Annotated[int, typer.Option(min=1, help="Runs of each contender, in turns.")] = 3
    contenders: Annotated[str, typer.Option(help="Names, separated by commas.", show_default="all")] = ""
    dtype: Annotated[Dtype | None, typer.Option(help="Number format.", show_default="by device")] = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, typer.Option(min=1, help="CPU threads of each contender.")] = 1
    batch_tokens: Annotated[int | None, typer.Option(min=512, help="Tokens in one pass.", show_default="by device")] = (
        None
    )
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
    import torch

    for name in options.names:
        if name not in CONTENDERS:
            fix = hint(name, CONTENDERS, f"choose from: {', '.join(CONTENDERS)}.")
            raise UserError(f"{name!r} is unknown", where="--contenders", fix=fix)
    builtin, cuda = options.workload == "builtin", torch.cuda.is_available()
    if builtin and options.shape:
        raise UserError("the workload builtin has its own policy", where="--shape", fix="leave it out.")
    if options.device == "cuda" and not cuda:
        raise UserError("no CUDA device is available", where="--device", fix="leave it out, or set it to cpu.")
    if options.out is not None and not options.out.absolute().parent.is_dir():
        folder = str(options.out.absolute().parent)
        raise UserError("there is no such folder", where=folder, fix="create it, or name another.")
    prompts, validation = PROMPTS[options.workload]
    device = ("cuda" if cuda else "cpu") if options.device == "auto" else options.device
    return replace(
        options,
        shape=None if builtin else options.shape or "10m",
        prompts=options.prompts or prompts,
        validation=options.validation or validation,
        dtype=options.dtype or ("bfloat16" if device == "cuda" else "float32"),
        device=device,
        batch_tokens=options.batch_tokens or BATCH_TOKENS[device],
    )
