"""The command line. The only place that parses arguments; only the commands that need torch import it."""

from cropi.cli.main import app, main

__all__ = ["app", "main"]
