"""`cropi audit`: compare influence from stored trajectories with influence from fresh ones."""

from __future__ import annotations

from typing import Annotated

import typer

from cropi.cli.shell import AsJson, ConfigArgument, Overrides, open_run, print_result
from cropi.errors import UserError


def audit(
    config: ConfigArgument,
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(min=8, help="Training prompts to sample again.")] = 160,
    trajectories: Annotated[int, typer.Option(min=4, help="Fresh completions of each prompt.")] = 32,
    stages: Annotated[str | None, typer.Option(help="Stages, separated by commas.", show_default="all on disk")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample and its completions.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Compare stored trajectories with fresh ones: noise, bias, drift."""
    wanted = None if stages is None else _numbers(stages)
    run = open_run(config, overrides)
    from cropi.lab.audit.audit_report import audit_sections
    from cropi.lab.audit.run_audit import AuditSettings, audit_run
    from cropi.report.markdown import markdown
    from cropi.report.rendering import write_report

    result = audit_run(run, AuditSettings(prompts, trajectories, seed), wanted)
    folder, title, sections = run.folder.folder, f"cropi audit {run.config.name}", audit_sections(result)
    write_report(folder, "audit", title, sections)
    print_result(result, as_json, f"{markdown(title, sections)}\nreport: {folder / 'audit.html'}")


def _numbers(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(
            f"{text!r} is not a list of stages", where="--stages", fix="give numbers, such as 0,2."
        ) from None
