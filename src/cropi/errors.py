"""Errors a user can fix. The command line prints them without a traceback and exits with code 2."""

import difflib
import re
from collections.abc import Iterable

_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters but tab and line feed: escape sequences begin with them
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # bidi controls, which show text in another order
    "\u2028\u2029\ud800-\udfff]"  # separators that some terminals break lines at; lone surrogates
)


def printable(text: str) -> str:
    """Replace characters that a terminal or a page would act on, or that UTF-8 cannot hold, with U+FFFD."""
    return _UNSAFE.sub("\N{REPLACEMENT CHARACTER}", text)


class UserError(Exception):
    """An error that the user can fix: one paragraph that names the fault, its place and the remedy."""

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        what, where, fix = self.what, self.where, self.fix = printable(what), printable(where), printable(fix)
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


class UncoveredError(PolicyError):
    """The engine does not cover the model; autograd may."""


class SignalError(UserError):
    """The data carry no learning signal, or a selection came out empty."""


def first_line(error: BaseException) -> str:
    """First line of an error that a library raised, or the name of its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def hint(word: str, known: Iterable[str], otherwise: str) -> str:
    """`did you mean ...?` where one of the known words is close to a wrong one, else what to say instead."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else otherwise
