"""`report`: one self-contained HTML page, the same in Markdown, and the numbers in JSON."""

from __future__ import annotations

from cropi.artifacts import write_json
from cropi.report.contents import read_contents, sections
from cropi.report.rendering import write_report
from cropi.report.summary import Summary, summarise
from cropi.run_folder import RunFolder


def make_report(run: RunFolder) -> Summary:
    """Write `report.html`, `report.md` and `summary.json` to a run's folder, from what the folder holds.

    A run may be reported at any time: what is not there yet is left out and said to be. The same folder gives the same
    bytes. Raises ArtifactError where a file of the run is corrupt.
    """
    config, folder = run.config, run.folder
    summary = summarise(config, run)
    write_report(folder, "report", f"cropi run {config.name}", sections(read_contents(config, run, summary)))
    write_json(folder / "summary.json", summary.as_json())
    return summary
