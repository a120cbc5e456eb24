"""Errors a user can fix. The command line prints them without a traceback and exits with code 2."""


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
