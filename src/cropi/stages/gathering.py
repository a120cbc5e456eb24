"""What a strategy chooses from at the start of a stage, gathered from the run's folder."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cropi.artifacts import (
    GOLD_UNPARSEABLE,
    NOT_SAMPLED,
    TRAJECTORIES,
    is_finished,
    open_artifact,
    read_table,
    scores_schema,
    validation_scores_schema,
)
from cropi.curriculum.pooling_data import PoolingData, read_pooling_data
from cropi.curriculum.strategy import Candidates
from cropi.errors import ArtifactError
from cropi.leakage import prompt_text
from cropi.reward_statistics import GroupFacts, Visit, visit
from cropi.rollouts.overlay import FRESH, Overlay, Trajectories
from cropi.rollouts.representations import KIND as REPRESENTED
from cropi.rollouts.representations import read_representations
from cropi.stages.collect import read_trajectories
from cropi.training.reward_log import never_judged, newest_variances, training_history
from cropi.workspace import Arm, Workspace

NOTHING = GroupFacts("", float("nan"), float("nan"))  # of a prompt without trajectories


class Gatherer:
    """Reads the tables of a stage."""

    def __init__(self, space: Workspace, trajectories: Trajectories) -> None:
        self._space, self._config, self._trajectories = space, space.config, trajectories

    def scores(self, arm: Arm, stage: int) -> pa.Table:
        """The scores made for an arm at a stage, held to the run's prompts."""
        folder, names = arm.scores(stage), self._config.arms[arm.name].directions(self._config.prompts.validation)
        table = read_table(folder / "scores.parquet", scores_schema(names))
        if table.column("prompt_id").to_pylist() != list(self._space.train_prompts):
            raise ArtifactError("holds other prompts than the run", where=str(folder), fix="delete the run's folder.")
        return table

    def candidates(self, arm: Arm, stage: int) -> Candidates:
        """What the arm's strategy chooses from at the start of a stage."""
        prompts, strategy = self._space.train_prompts, self._config.arms[arm.name]
        overlay, steps = self._trajectories.overlay(arm, stage), self._config.train.steps_per_stage
        groups = self._trajectories.groups(overlay)
        history, pooling = training_history(arm.rewards, stage * steps), None
        screened, unreadable = self._screened(arm, stage)
        unreadable |= never_judged(arm.rewards, stage * steps)
        sizes = _group_sizes(self._trajectories.base["train"]) | _group_sizes(overlay.table)
        sizes_N = np.array([sizes.get(i, 0) for i in prompts])
        influence, lengths_N = dict[str, np.ndarray](), None
        if strategy.reads_scores:
            table = self.scores(arm, strategy.scored_stage(stage))
            names = strategy.directions(self._config.prompts.validation)
            influence = {name: table.column(f"influence/{name}").to_numpy() for name in names}
            lengths_N = table.column("feature_norm").to_numpy()
            pooling = self._pooling_data(arm, stage, table, sizes_N, overlay) if strategy.pools else None
        return Candidates(
            prompt_ids=list(prompts),
            sources=prompts.column("source"),
            statuses=[
                GOLD_UNPARSEABLE if status == NOT_SAMPLED and i in unreadable else status
                for i, status in zip(prompts, self._trajectories.statuses(groups), strict=True)
            ],
            pass_rates_N=np.array([groups.get(i, NOTHING).pass_rate for i in prompts]),
            variances_N=np.array([groups.get(i, NOTHING).variance for i in prompts]),
            training_variances=newest_variances(history, overlay.drawn_at(steps)),
            influence=influence,
            stage=stage,
            seed=self._config.seed,
            stages=self._config.train.stages,
            steps_per_stage=steps,
            group_sizes_N=sizes_N,
            lengths_N=lengths_N,
            visits=[*history, *screened],
            texts=list(map(prompt_text, prompts.column("messages"))) if strategy.reads_texts else (),
            validation_texts=self._validation_texts,
            pooling=pooling,
        )

    def _screened(self, arm: Arm, stage: int) -> tuple[list[Visit], set[str]]:
        """What was looked at to choose a stage or one before it; and the prompts that turned out unreadable."""
        seen: list[Visit] = []
        unreadable: set[str] = set()
        for number in range(stage + 1):
            folder = arm.screened(number)
            if is_finished(folder):
                open_artifact(folder, FRESH, made_by="cropi score")  # checks the files
                table = read_trajectories(folder).get("train", TRAJECTORIES.empty_table())
                known = pc.is_valid(table.column("reward"))
                unreadable |= set(table.filter(pc.invert(known)).column("prompt_id").to_pylist())
                judged = table.filter(known)
                groups = judged.group_by("prompt_id").aggregate([("reward", "list")]).to_pylist()
                step = number * self._config.train.steps_per_stage
                seen += [visit(step, row["prompt_id"], row["reward_list"]) for row in groups]
        return seen, unreadable

    def _pooling_data(
        self, arm: Arm, stage: int, scores: pa.Table, sizes_N: np.ndarray, overlay: Overlay
    ) -> PoolingData:
        open_artifact(self._space.representations, REPRESENTED, made_by="cropi score")
        names = sorted(self._config.prompts.validation)
        scored, steps = self._config.arms[arm.name].scored_stage(stage), self._config.train.steps_per_stage
        validation = read_table(arm.scores(scored) / "validation.parquet", validation_scores_schema(names))
        ids, drawn_at = list(self._space.train_prompts), overlay.drawn_at(steps)
        trained = {prompt_id for prompt_id, layer in overlay.layer_of.items() if layer.trained}
        return read_pooling_data(
            names,
            scores,
            validation,
            read_representations(self._space.representations),
            sizes_N,
            np.array([0.0 if i in trained else float(n) for i, n in zip(ids, sizes_N, strict=True)]),
            np.array([drawn_at.get(i, 0.0) for i in ids], dtype=np.float64),
            scored * steps if self._config.refresh.validation else 0.0,
        )

    @cached_property
    def _validation_texts(self) -> dict[str, list[str]]:
        """The texts of every validation set's prompts."""
        rows = self._space.held_out("validation")
        names = sorted(self._config.prompts.validation)
        return {n: [prompt_text(row["messages"]) for row in rows if row["set"] == f"validation/{n}"] for n in names}


def _group_sizes(table: pa.Table) -> dict[str, int]:
    """Trajectories of every prompt of a table."""
    return {row["values"]: row["counts"] for row in pc.value_counts(table.column("prompt_id")).to_pylist()}
