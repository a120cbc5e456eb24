"""Audit every policy of a run that is still on disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from cropi import __version__
from cropi.artifacts import OK, build, is_finished, read_sealed, write_sealed
from cropi.config import config_hash
from cropi.console import progress, say
from cropi.errors import ArtifactError, SignalError
from cropi.functional.projection import projection_of
from cropi.gradients.groups import Group, iterate_groups
from cropi.gradients.validation_directions import validation_groups
from cropi.lab.audit.policy_audit import Material, audit_stage, passes
from cropi.policy import Policy
from cropi.rewards.verifier import Judge, answered
from cropi.rollouts.generation import Sampling, TransformersGenerator
from cropi.seeds import derived_seed, unit_interval
from cropi.stages.run import Run

FORMAT = 1
MADE_BY = "cropi audit"


@dataclass(frozen=True)
class AuditSettings:
    """Size of the sample."""

    prompts: int = 160
    """Training prompts, the same at every policy."""
    trajectories: int = 32
    """Fresh completions of each."""
    seed: int = 0


def audit_run(run: Run, settings: AuditSettings, stages: Sequence[int] | None) -> dict[str, Any]:
    """Audit the policies at the start of some stages (by default all on disk) and the last one.

    Each policy has an artifact of its own, so an interrupted audit resumes. `audit.json` holds the latest request.
    """
    auditor = _Auditor(run, settings)
    known = auditor.stages()
    wanted = known if stages is None else list(stages)
    missing = [stage for stage in wanted if stage not in known]
    if missing:
        raise ArtifactError(
            f"there is no policy of the start of stage {missing[0]}",
            where="--stages",
            fix=f"choose from {', '.join(map(str, known))}, or train further first.",
        )
    found = [auditor.audit(stage) for stage in wanted]
    result = {
        "kind": "audit",
        "version": FORMAT,
        "cropi": __version__,
        "settings": asdict(settings) | {"fraction": run.config.select.fraction},
        "surrogate": asdict(run.surrogate),
        "steps_per_stage": run.config.train.steps_per_stage,
        "stages": found,
    }
    write_sealed(run.folder.folder / "audit.json", result)
    return result


class _Auditor:
    """A run and the sample of its prompts."""

    def __init__(self, run: Run, settings: AuditSettings) -> None:
        self._run, self._settings = run, settings
        self._rows = {row["prompt_id"]: row for row in run.folder.prompt_rows}
        self._judge = run.judge

    def stages(self) -> list[int]:
        """Stages whose first policy is on disk; one past the last means the end of training."""
        config = self._run.config.train
        folder = self._run.paths.checkpoints
        steps = [stage * config.steps_per_stage for stage in range(config.stages + 1)]
        return [stage for stage, step in enumerate(steps) if not step or (folder / f"checkpoint-{step}").is_dir()]

    def audit(self, stage: int) -> dict[str, Any]:
        """Audit one policy, or read the audit back if it exists."""
        run, settings = self._run, config_hash(asdict(self._settings) | {"version": FORMAT})
        folder = run.folder.folder / "audit" / f"{stage:03}-{settings[:8]}"
        inputs = run.trajectories.inputs | {
            "policy": f"{run.config.select.label} at stage {stage}",
            "settings": settings,
        }
        if not is_finished(folder):
            say(f"audit of stage {stage}")
        build(folder, "audit", partial(self._make, stage), inputs=inputs, made_by=MADE_BY)
        return read_sealed(folder / "audit.json")

    def _make(self, stage: int, folder: Path) -> tuple[Mapping[str, int], Mapping[str, Any]]:
        run = self._run
        policy, _ = run.policy_at(stage, None)
        run.require_trajectories()
        tables = run.trajectories.tables
        stored = self._chosen(tables["train"])
        validation = validation_groups(tables)
        with run.ledger.charge("audit", stage=stage) as entry:
            material = self._material(policy, stored, validation, stage)
            entry["tokens"] = sum(
                group.completion_tokens
                for groups in (material.fresh, *(draw for pair in material.fresh_validation.values() for draw in pair))
                for group in groups
            )
            score = run.config.score
            with progress(f"audit stage {stage}", passes(material), "groups") as bar:
                found = audit_stage(
                    policy.model,
                    run.surrogate,
                    projection_of(score.mask),
                    material,
                    share=run.config.select.fraction,
                    batch_tokens=score.batch_tokens,
                    seed=self._settings.seed,
                    advance=bar.advance,
                )
        write_sealed(folder / "audit.json", {"stage": stage} | found)
        return {"prompts": len(material.stored)}, {}

    def _chosen(self, table: pa.Table) -> list[Group]:
        """The stored groups of a random sample of the training prompts, the same prompts at every stage."""
        groups = {prompt_id: group for prompt_id, group in iterate_groups(table) if group is not None}
        order = sorted(groups, key=lambda i: unit_interval(self._settings.seed, "audit", i))
        return [groups[prompt_id] for prompt_id in sorted(order[: self._settings.prompts])]

    def _material(
        self, policy: Policy, stored: Sequence[Group], validation: Mapping[str, Sequence[Group]], stage: int
    ) -> Material:
        fresh = {
            group.prompt_id: group
            for group in self._sample(
                policy, as_prompts(stored, self._rows), self._settings.trajectories, f"train {stage}"
            )
        }
        kept = [group for group in stored if group.prompt_id in fresh]
        fresh_validation = {}
        for name, groups in validation.items():
            count = max(len(group.completions) for group in groups)
            prompts = as_prompts(groups, self._rows)
            draws = [
                [
                    group
                    for group in self._sample(policy, prompts, count, f"{name} {stage} {draw}")
                    if group.status == OK
                ]
                for draw in range(2)
            ]
            if not all(draws):
                raise SignalError(
                    "the policy solves each prompt of this validation set always or never: fresh trajectories "
                    "give no direction",
                    where=f"validation set {name}, stage {stage}",
                    fix="audit earlier stages only (--stages).",
                )
            fresh_validation[name] = (draws[0], draws[1])
        return Material(kept, [fresh[group.prompt_id] for group in kept], validation, fresh_validation)

    def _sample(self, policy: Policy, prompts: Sequence[Prompt], count: int, label: str) -> list[Group]:
        collect = self._run.config.collect
        groups = sample_groups(
            policy,
            prompts,
            count,
            Sampling(collect.max_completion_length, collect.temperature),
            self._judge,
            batch_size=collect.batch_size,
            seed=self._settings.seed,
            label=label,
        )
        masked = self._run.trajectories.mask_truncated
        return [without_truncated(group, policy.eos_ids) for group in groups] if masked else groups


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt and its row of the prompt table."""

    prompt_id: str
    prompt_ids: list[int]
    row: Mapping[str, Any]  # of the prompt table


def sample_groups(
    policy: Policy,
    prompts: Sequence[Prompt],
    count: int,
    sampling: Sampling,
    judge: Judge,
    *,
    batch_size: int,
    seed: int,
    label: str,
) -> list[Group]:
    """Sample and judge `count` completions of each prompt. They are on-policy: all importance ratios are 1.

    Prompts whose gold answer cannot be read are left out.
    """
    generate = TransformersGenerator(policy, batch_size)
    repeated = [prompt.prompt_ids for prompt in prompts for _ in range(count)]
    completions = generate(repeated, sampling, seed=derived_seed(seed, "audit", label))
    texts = policy.tokenizer.batch_decode(completions, skip_special_tokens=True)
    rows = [prompt.row for prompt in prompts for _ in range(count)]
    judged = judge([answered(text, row) for text, row in zip(texts, rows, strict=True)])
    groups = []
    for number, prompt in enumerate(prompts):
        part = slice(number * count, (number + 1) * count)
        rewards = [judgement.reward for judgement in judged[part]]
        known = [value for value in rewards if value is not None]
        if len(known) == count:
            groups.append(Group(prompt.prompt_id, prompt.prompt_ids, completions[part], known, None))
    return groups


def as_prompts(groups: Sequence[Group], rows: Mapping[str, Mapping[str, Any]]) -> list[Prompt]:
    """The prompts of stored groups, with their rows of the prompt table."""
    return [Prompt(group.prompt_id, group.prompt_ids, rows[group.prompt_id]) for group in groups]


def without_truncated(group: Group, eos_ids: Collection[int]) -> Group:
    """Return the group with completions emptied that do not end with an end-of-sequence token."""
    kept = [bool(completion) and completion[-1] in eos_ids for completion in group.completions]
    logprobs = group.behaviour_logprobs
    return replace(
        group,
        completions=[ids if keep else [] for ids, keep in zip(group.completions, kept, strict=True)],
        behaviour_logprobs=None
        if logprobs is None
        else [row if keep else [] for row, keep in zip(logprobs, kept, strict=True)],
    )
