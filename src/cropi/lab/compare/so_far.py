"""Interim results of a comparison: a line for every finished run, and the means by strategy."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cropi.config import Config
from cropi.console import say
from cropi.lab.compare.comparison_plan import Plan, Run
from cropi.report.blocks import Table, text_table
from cropi.report.summary import Point, Summary, summarise
from cropi.report.wording import ABSENT, decimal, seconds
from cropi.run_folder import RunFolder


@dataclass
class SoFar:
    """The finished runs of a plan, each read once."""

    plan: Plan
    _known: dict[str, Summary] = field(default_factory=dict)

    def tell(self, config: Config) -> None:
        """Print the line of a run that has just finished, and the table."""
        (run,) = [one for one in self.plan.all if one.config.folder == config.folder]
        found = self._summary(run)
        before, after = _targeted(found.base), _targeted(found.last)
        say(f"{run.label}  accuracy {decimal(after)}, was {decimal(before)}  {seconds(found.cost.total)}")
        say(text_table(self.table()))

    def table(self) -> Table:
        """Means over the finished runs of each strategy; unlike the report, not only over seeds that all have done."""
        rows = []
        for name in self.plan.strategies:
            own = [self._summary(run) for run in self.plan.all if run.strategy == name and run.finished]
            accuracy = [value for found in own if (value := _targeted(found.last)) is not None]
            spent = [found.cost.total for found in own if found.cost.total is not None]
            cells = [decimal(float(np.mean(accuracy))) if accuracy else ABSENT]
            rows.append([name, str(len(own)), *cells, seconds(float(np.mean(spent))) if spent else ABSENT])
        return Table("", ["so far", "runs", "accuracy", "time a run"], rows)

    def _summary(self, run: Run) -> Summary:
        if run.label not in self._known:
            self._known[run.label] = summarise(run.config, RunFolder(run.config))
        return self._known[run.label]


def _targeted(point: Point | None) -> float | None:
    return point.targeted.mean if point and point.targeted else None
