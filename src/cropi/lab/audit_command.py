"""`cropi audit`: is the estimate right?"""

from __future__ import annotations

from typing import Annotated

import typer

from cropi.cli.shell import AsJson, ConfigArgument, Overrides, open_run, print_result
from cropi.errors import UserError


def audit(
    config: ConfigArgument,
    overrides: Overrides = None,
    prompts: Annotated[int, typer.Option(min=8, help="Training prompts that are sampled anew.")] = 160,
    trajectories: Annotated[int, typer.Option(min=4, help="Fresh completions of each.")] = 32,
    stages: Annotated[
        str | None, typer.Option(help="Stages with commas between.", show_default="all that are on disk")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the sample and its completions.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Stored trajectories against fresh ones: noise, bias, drift."""
    wanted = None if stages is None else _numbers(stages)
    run = open_run(config, overrides)
    from cropi.lab.audit.run import AuditSettings, audit_run
    from cropi.lab.audit.section import TITLE
    from cropi.lab.audit.section import audit as section
    from cropi.report.blocks import Section
    from cropi.report.markdown import markdown
    from cropi.report.report import make_report

    result = audit_run(run, AuditSettings(prompts, trajectories, seed), wanted)
    make_report(run.config, run.folder.folder)
    text = markdown("cropi audit", [Section(TITLE, section(run.folder.folder))])
    print_result(result, as_json, f"{text}\nreport: {run.folder.folder / 'report.html'}")


def _numbers(text: str) -> list[int]:
    try:
        return sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise UserError(f"{text!r} holds something else than numbers", where="--stages", fix="give 0,2, say.") from None
