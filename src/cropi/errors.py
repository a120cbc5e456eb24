"""Errors a user can fix. The command line prints them without a traceback and exits with code 2."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """What happened, where, and how to fix it, in one paragraph."""

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what, self.where, self.fix = what, where, fix
        parts = [f"{where}: {what}" if where else what]
        if fix:
            parts.append(f"Fix: {fix}")
        super().__init__("\n".join(parts))


class ConfigError(UserError):
    """The config file or an override cannot be used."""


class DataError(UserError):
    """A prompt source cannot be used."""


class ArtifactError(UserError):
    """A file of the run folder is missing, corrupt, or belongs to something else."""


class PolicyError(UserError):
    """The model or its tokenizer cannot be used."""


class SignalError(UserError):
    """The data carry no learning signal, or a selection came out empty."""


def hint(word: str, known: Iterable[str], otherwise: str) -> str:
    """`did you mean ...?` where one of the known words is close to a wrong one, else what to say instead."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else otherwise
