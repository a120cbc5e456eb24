"""What `cropi bench` is asked to measure, checked before anything starts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from cropi.errors import UserError, hint
from cropi.lab.bench.lineup import CONTENDERS, DEFAULT
from cropi.lab.bench.shapes import SHAPES
from cropi.lab.bench.workload import WORKLOADS

PROMPTS = {"realistic": (32, 8), "plain": (256, 64), "builtin": (1000, 64)}
"""Train and validation prompts where none are asked for."""

BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
"""What our engine takes where memory allows."""


RECIPE_DIM = {"cpu": 512, "cuda": 32768}
"""The recipe's dense projection takes 2 * dim * kept coordinates operations a prompt, too many for a CPU at the paper's
dim of 32,768 unless one is patient."""


@dataclass(frozen=True)
class EngineSettings:
    """One measurement."""

    shape: str | None = None
    """None: 10m, or the built-in policy for the workload `builtin`."""
    workload: str = "realistic"
    prompts: int | None = None
    validation: int | None = None
    rounds: int = 3
    contenders: tuple[str, ...] = tuple(DEFAULT)
    dtype: str | None = None
    """None: float32 on the CPU, bfloat16 on CUDA."""
    device: str = "auto"
    threads: int = 1
    batch_tokens: int | None = None
    bergson_python: Path | None = None
    recipe_dim: int | None = None
    seed: int = 0
    grow: bool = False
    profile: bool = False


@dataclass(frozen=True)
class Plan:
    """A measurement with nothing left open. `shape` is None for the built-in policy."""

    shape: str | None
    workload: str
    prompts: int
    validation: int
    rounds: int
    contenders: tuple[str, ...]
    dtype: str
    device: str
    threads: int
    batch_tokens: int
    bergson_python: Path | None
    recipe_dim: int
    seed: int
    grow: bool
    profile: bool

    def larger(self, times: int) -> Plan:
        """The same with more train prompts."""
        return replace(self, prompts=self.prompts * times)


def resolve(settings: EngineSettings) -> Plan:
    """Fill in what was left open. UserError for an option that cannot be used."""
    _known("--workload", settings.workload, WORKLOADS)
    if settings.shape is not None:
        _known("--shape", settings.shape, SHAPES)
    for name in settings.contenders:
        _known("--contenders", name, CONTENDERS)
    if settings.dtype is not None:
        _known("--dtype", settings.dtype, ("float32", "bfloat16"))
    builtin = settings.workload == "builtin"
    if builtin and settings.shape is not None:
        raise UserError("the workload builtin has a policy of its own", where="--shape", fix="leave it out.")
    if builtin and settings.grow:
        raise UserError("needs ten times the prompts, which builtin lacks", where="--grow", fix="use another workload.")
    prompts, validation = PROMPTS[settings.workload]
    prompts = settings.prompts if settings.prompts is not None else prompts
    validation = settings.validation if settings.validation is not None else validation
    for option, value, least in (
        ("--prompts", prompts, 4),
        ("--validation", validation, 2),
        ("--rounds", settings.rounds, 1),
        ("--threads", settings.threads, 1),
        ("--batch-tokens", settings.batch_tokens or 512, 512),
        ("--contenders", len(settings.contenders), 1),
        ("--recipe-dim", settings.recipe_dim or 1, 1),
    ):
        if value < least:
            raise UserError(f"{value} is too few", where=option, fix=f"give at least {least}.")
    if settings.bergson_python is not None and not settings.bergson_python.is_file():
        raise UserError(
            f"there is no file {settings.bergson_python}",
            where="--bergson-python",
            fix="give the Python interpreter of the environment that bergson is installed in.",
        )
    device = _device(settings.device)
    return Plan(
        shape=None if builtin else settings.shape or "10m",
        workload=settings.workload,
        prompts=prompts,
        validation=validation,
        rounds=settings.rounds,
        contenders=tuple(dict.fromkeys(settings.contenders)),
        dtype=settings.dtype or ("bfloat16" if device == "cuda" else "float32"),
        device=device,
        threads=settings.threads,
        batch_tokens=settings.batch_tokens or BATCH_TOKENS[device],
        bergson_python=settings.bergson_python,
        recipe_dim=settings.recipe_dim or RECIPE_DIM[device],
        seed=settings.seed,
        grow=settings.grow,
        profile=settings.profile,
    )


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
