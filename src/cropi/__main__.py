"""The `cropi` command: the core commands and those of the lab. Nothing imports the lab but this file."""

from cropi.cli import app, main
from cropi.lab.commands import audit, bench, compare

app.command("audit")(audit)
app.command("compare")(compare)
app.add_typer(bench, name="bench")

__all__ = ["app", "main"]

if __name__ == "__main__":
    main()
