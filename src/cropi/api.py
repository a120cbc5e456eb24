"""Runs from Python: start or load one, and read what it wrote as pandas data frames."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
import pyarrow as pa

from cropi.artifacts import EVALUATION, PROMPTS, open_artifact, read_table
from cropi.cli.shell import open_run
from cropi.config import Config
from cropi.config.loading import ConfigLike, load_config
from cropi.errors import ArtifactError
from cropi.report.costs import charges
from cropi.report.reading import prompt_text, read_beliefs, read_scores, read_selection, selection_table, way
from cropi.report.summary import Summary, headline, summarise
from cropi.run_folder import RunFolder
from cropi.run_tables import evaluation_files
from cropi.streams import read_jsonl

__all__ = ["RunResult", "load", "run"]


def run(config: ConfigLike, *overrides: str) -> RunResult:
    """Train, evaluate and report, as `cropi run` does. The same call resumes.

    Args:
        config: A recipe's name, a YAML file, the folder of a run, or the settings as nested mappings.
        overrides: `key=value`, as on the command line.

    Raises:
        cropi.errors.UserError: What can be mended, with the place and the remedy.
    """
    opened = open_run(config, list(overrides))
    from cropi.pipeline import run_all

    try:
        run_all(opened)
    finally:
        opened.folder.unlock()
    return RunResult(opened.config)


def load(folder: str | Path) -> RunResult:
    """Open the folder of a run, finished or not. Nothing is written, and no model is loaded."""
    if not Path(folder).is_dir():
        raise ArtifactError("there is no such run", where=str(folder), fix="name a folder that `cropi run` wrote.")
    return RunResult(load_config(str(Path(folder).absolute())))


@dataclass(frozen=True)
class RunResult:
    """A run as data frames. Each is read when it is first asked for; `load` again to see what a run has added."""

    config: Config

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return self.config.folder

    @cached_property
    def summary(self) -> Summary:
        """The numbers of the report: accuracies with intervals, and costs."""
        return summarise(self.config, self._run)

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """Every prompt: prompt_id, set, source, prompt (its text), answer."""
        path = self._run.prompts
        open_artifact(path, "prompts", made_by="cropi run")
        table = read_table(path / "prompts.parquet", PROMPTS).to_pandas()
        table.insert(3, "prompt", table.pop("messages").map(prompt_text))
        return table.drop(columns="extra")

    @cached_property
    def selections(self) -> pd.DataFrame:
        """One row per stage and training prompt: selected, rank, score, reason. Batch by batch: whether in a batch."""
        tables = {}
        for stage in range(self.config.train.stages):
            table, chosen = selection_table(self._run.stages, stage), read_selection(self._run.stages, stage)
            if table is not None and chosen is not None:
                place = table.column_names.index("selected")
                tables[stage] = table.set_column(place, "selected", [chosen.selected]).drop_columns(["scores"])
        return self._with_text(_stacked(tables))

    @cached_property
    def scores(self) -> pd.DataFrame:
        """Influence on each validation set, by stage and prompt.

        Where influence is read while training: the belief at the end of each stage.
        """
        read = read_beliefs if self.config.select.strategy.reads_influence else read_scores
        return self._with_text(_stacked(read(self.config, self._run.stages)))

    @cached_property
    def curriculum(self) -> pd.DataFrame:
        """Groups that were trained on: one row each, with its step, mean reward and why it was chosen, if known."""
        batches, per_stage = read_jsonl(self._run.stages.rewards), self.config.train.steps_per_stage
        rows = [
            {"stage": batch["step"] // per_stage, "step": batch["step"], "prompt_id": prompt_id, "reward": reward}
            for batch in batches
            for prompt_id, reward in zip(batch["prompt_ids"], batch["rewards"], strict=True)
        ]
        keys = ["stage", "step", "prompt_id"]
        groups = pd.DataFrame(rows, columns=[*keys, "reward"]).astype({"reward": float})
        means = groups.groupby(keys, sort=False).agg(reward=("reward", "mean"), completions=("reward", "size"))
        why = {
            (choice["step"], prompt_id): way(why)
            for choice in read_jsonl(self._run.stages.choices)
            for prompt_id, why in zip(choice["prompt_ids"], choice["why"], strict=True)
        }
        found = means.reset_index()
        found["why"] = [why.get(key) for key in zip(found.step, found.prompt_id, strict=True)]
        return self._with_text(found)

    @cached_property
    def evaluations(self) -> pd.DataFrame:
        """One row per evaluation and question: greedy (1 right), sampled (mean), completion, verdict."""
        files = evaluation_files(self._run.stages.evaluations, all_there=True)
        tables = [read_table(path, EVALUATION) for path in files.values()]
        return self._with_text(pa.concat_tables([EVALUATION.empty_table(), *tables]).to_pandas())

    @cached_property
    def costs(self) -> pd.DataFrame:
        """Seconds and generated tokens by phase and stage. Evaluation is not part of a run's total."""
        charged, per_stage = charges(self.config, self._run.stages), self.config.train.steps_per_stage
        entries = [entry for entry in charged.entries if entry["phase"] != "collect"]
        rows = [(e["phase"], e["stage"], e["seconds"], 0) for e in entries]
        rows += [("collect", e["stage"], e["seconds"], e.get("tokens", 0)) for e in charged.collected]
        rows += [("train", (step["step"] - 1) // per_stage, step["seconds"], 0) for step in charged.steps]
        rows += [("train", batch["step"] // per_stage, 0.0, batch["tokens"]) for batch in charged.batches]
        table = pd.DataFrame(rows, columns=["phase", "stage", "seconds", "tokens"]).astype({"stage": "Int64"})
        return table.groupby(["phase", "stage"], dropna=False, sort=False).sum().reset_index()

    def _repr_html_(self) -> str:
        costs = self.costs.groupby("phase", sort=False)[["seconds", "tokens"]].sum()
        return html_summary(headline(self.summary).replace("`", ""), costs, self.folder / "report.html")

    @cached_property
    def _run(self) -> RunFolder:
        return RunFolder(self.config)

    def _with_text(self, table: pd.DataFrame) -> pd.DataFrame:
        """Add the texts of the prompts and their answers."""
        return table.merge(
            self.prompts[["prompt_id", "prompt", "answer"]].drop_duplicates("prompt_id"), on="prompt_id", how="left"
        )


def _stacked(tables: Mapping[int, pa.Table]) -> pd.DataFrame:
    """Tables of stages below each other, with a column for the stage."""
    nothing = pd.DataFrame({"stage": pd.Series(dtype=int), "prompt_id": pd.Series(dtype=str)})
    frames = [table.to_pandas().assign(stage=stage) for stage, table in tables.items()]
    return pd.concat([frame[["stage", *frame.columns[:-1]]] for frame in frames] or [nothing], ignore_index=True)


def html_summary(text: str, table: pd.DataFrame, report: Path) -> str:
    """A sentence, a table and the path of the report as HTML, everything escaped."""
    shown = table.to_html(escape=True, float_format="{:.2f}".format, border=0)
    return f"<p>{html.escape(text)}</p>{shown}<p>report: {html.escape(str(report))}</p>"
