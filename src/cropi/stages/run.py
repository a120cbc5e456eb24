"""An open run: its config, folder, policy, judge, processes and trajectories. Every stage takes one."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from torch import nn
from trl import GRPOConfig

from cropi.artifacts import (
    NOT_SAMPLED,
    OK,
    PROMPT_TOO_LONG,
    TRAJECTORIES,
    Manifest,
    count_status,
    is_finished,
    open_artifact,
)
from cropi.config import Config
from cropi.console import counts_text
from cropi.errors import ArtifactError, ConfigError, PolicyError, SignalError
from cropi.gradients.groups import GroupFacts, group_facts, surrogate_settings
from cropi.parallel import process_group
from cropi.policy import Policy, Replica, fingerprint, load_policy
from cropi.prompts.encoding import Encode, encode_rows
from cropi.rewards.pool import strict_judge
from cropi.rewards.verifier import Judge
from cropi.rollouts.shards import read_trajectories
from cropi.run_folder import RunFolder, StagePaths, require_writable
from cropi.streams import Ledger
from cropi.training.grpo_settings import grpo_config


@dataclass(frozen=True)
class Setup:
    """The policy of a run, the judge of its completions, and the settings of its trainer."""

    policy: Policy  # before any training
    identity: str  # hash of everything in the policy that results depend on
    judge: Judge
    settings: GRPOConfig
    encode: Encode | None = None  # of a trainer of the user's; unset: by the config

    @classmethod
    def of(cls, config: Config, processes: int = 1) -> Setup:
        """Load what a config names, for `run` and `check` alike. Settings are refused before a file is written.

        Prompts are refused elsewhere: in `checked_prompts`, `plan` and `questions`.
        """
        if not config.prompts.test:
            raise ConfigError("there is no test set", where="prompts.test", fix="name one: a run is judged by it.")
        if config.collect.vllm is not None and find_spec("vllm") is None:
            raise PolicyError("vLLM is not installed", where="collect.vllm", fix="pip install 'cropi[vllm]'.")
        require_writable(config.folder)
        policy = load_policy(config.policy)
        settings = grpo_config(config, config.folder, policy.device, processes)
        return cls(policy, fingerprint(config.policy), strict_judge(config.verifier, config.verification), settings)


class Run:
    """A run that is open for work. It holds the lock of its folder."""

    def __init__(self, config: Config, setup: Setup | None = None) -> None:
        """`setup` is given by a trainer of the user's; unset, the config names it. Each rank has its own `Run`."""
        self.config = config
        self.folder = RunFolder(config)  # refuses a folder that is another run's, before a policy is loaded
        self.setup = setup or Setup.of(config, process_group().size)
        self.judge = self.setup.judge
        self.encode = self.setup.encode or partial(encode_rows, self.setup.policy.tokenizer, config.prompts)
        trainer = self.setup.settings
        self.surrogate = surrogate_settings(config, trainer.loss_type, trainer.scale_rewards)
        self._replica = Replica(self.setup.policy, config.policy)
        self.folder.lock()
        self._mask_truncated = trainer.mask_truncated_completions
        self._open(self.folder.stages)

    def _open(self, paths: StagePaths) -> None:
        """Work on the run's own stages, or on those of a checkpoint from outside."""
        self.paths = paths
        self.ledger = Ledger(paths.ledger)
        self.trajectories = Trajectories(self.folder, paths, mask_truncated=self._mask_truncated)

    def at_checkpoint(self, stage: int, checkpoint: Path | None) -> Run:
        """This run at a stage, or at a checkpoint from outside with a folder of its own for what is made there.

        Errors: ArtifactError for a stage that the run does not have, PolicyError for a checkpoint that is not there.
        """
        paths = paths_at(self.folder, stage, checkpoint)
        if paths.folder == self.paths.folder:
            return self
        run = copy(self)
        run._open(paths)
        return run

    @property
    def base(self) -> Policy:
        """The policy before training, in the precision of sampling and scoring."""
        return self.asked(self.setup.policy.model)

    def asked(self, model: nn.Module) -> Policy:
        """A policy in training, in the precision of sampling and scoring."""
        return Policy(self._replica.of(model), self.setup.policy.tokenizer)

    def is_finished(self, folder: Path) -> bool:
        """Whether the first process sees a finished artifact."""
        return process_group().from_main(lambda: is_finished(folder))

    def origin(self, stage: int) -> str:
        """The name of the policy at the start of a stage, for manifests."""
        step = stage * self.config.train.steps_per_stage
        return f"{self.config.select.label} after step {step}" if stage else "base"

    def policy_at(self, stage: int, checkpoint: Path | None) -> tuple[Policy, str]:
        """The policy at the start of a stage and its name, for work outside training."""
        if checkpoint is not None:
            return load_policy(self.config.policy, str(checkpoint)), f"checkpoint {self.paths.folder.name}"
        if stage == 0:
            return self.base, "base"
        path = start_of_stage(self.config, self.paths, stage)
        return load_policy(self.config.policy, str(path)), self.origin(stage)

    def require_trajectories(self) -> None:
        """Refuse to score a policy without trajectories."""
        if not self.config.select.strategy.collects:
            raise ConfigError(
                f"{self.config.select.label} reads no trajectories, so there are none to score by",
                where="select.strategy",
                fix="start a run with a strategy that reads them, such as influence.",
            )


def start_of_stage(config: Config, paths: StagePaths, stage: int) -> Path:
    """The checkpoint at the start of a stage after the first. PolicyError where it is not there."""
    path = paths.checkpoints / f"checkpoint-{stage * config.train.steps_per_stage}"
    if not path.is_dir():
        raise PolicyError(
            f"there is no checkpoint of the start of stage {stage}",
            where=str(path),
            fix="train up to it first, or keep more checkpoints with trainer.save_total_limit.",
        )
    return path


def paths_at(folder: RunFolder, stage: int, checkpoint: Path | None) -> StagePaths:
    """Paths of a run's own stages, or of a checkpoint from outside. See `Run.at_checkpoint` for the errors."""
    config = folder.config
    if stage >= config.train.stages:
        last = config.train.stages - 1
        raise ArtifactError(f"the run has no stage {stage}", where="--stage", fix=f"give 0 to {last}.")
    if checkpoint is None:
        return folder.stages
    if stage:
        raise PolicyError("a checkpoint from outside has one stage only", where="--stage", fix="leave it out.")
    if not checkpoint.is_dir():
        raise PolicyError(f"there is no folder {checkpoint}", where="--checkpoint", fix="check the path.")
    return folder.outside(checkpoint, fingerprint(config.policy, str(checkpoint)))


# -- trajectories --------------------------------------------------------------------------------------------------

IMPORTED = "imported trajectories"  # kind of artifact


class Trajectories:
    """A run's trajectories, read when they are first asked for and then kept in memory."""

    def __init__(self, folder: RunFolder, paths: StagePaths, *, mask_truncated: bool = False) -> None:
        """`mask_truncated`: as the trainer's loss has it; see `read_trajectories`."""
        self._folder, self._paths, self.mask_truncated = folder, paths, mask_truncated

    @cached_property
    def tables(self) -> dict[str, pa.Table]:
        """Trajectories by set. A training prompt with imported trajectories has only these."""
        self._open()  # checks the files
        none = {"train": TRAJECTORIES.empty_table()}  # for a strategy that collects nothing
        base = none | read_trajectories(self._folder.trajectories, mask_truncated=self.mask_truncated)
        if self._imported is None:
            return base
        imported = read_trajectories(self._paths.imported, mask_truncated=self.mask_truncated)["train"]
        return base | {"train": replaced(base["train"], imported)}

    @cached_property
    def groups(self) -> dict[str, GroupFacts]:
        """Facts of the training prompts' groups. The groups themselves need not fit into memory."""
        return group_facts(self.tables["train"])

    @cached_property
    def statuses(self) -> list[str]:
        """The status of every training prompt."""
        too_long, groups = frozenset(self._open().details["too_long"]), self.groups
        without = {True: PROMPT_TOO_LONG, False: NOT_SAMPLED}
        return [groups[i].status if i in groups else without[i in too_long] for i in self._folder.train_prompts]

    @property
    def inputs(self) -> dict[str, str]:
        """Identities of the trajectories, for the manifests of artifacts made from them."""
        inputs = {"trajectories": self._open().identity}
        if self._imported is not None:
            inputs["imported"] = self._imported.identity
        return inputs | ({"truncated": "masked"} if self.mask_truncated else {})

    @cached_property
    def _imported(self) -> Manifest | None:
        path = self._paths.imported
        return open_artifact(path, IMPORTED, made_by="cropi import") if is_finished(path) else None

    def _open(self) -> Manifest:
        return open_artifact(self._folder.trajectories, "trajectories", made_by="cropi collect")


def replaced(base: pa.Table, imported: pa.Table) -> pa.Table:
    """Replace groups of the base trajectories by imported ones. Returns a table of one chunk.

    Works column by column, so that only one column is in memory twice.
    """
    kept = pc.invert(pc.is_in(base.column("prompt_id"), value_set=imported.column("prompt_id").unique()))
    columns = [
        pa.concat_arrays([*base.column(name).filter(kept).chunks, *imported.column(name).chunks])
        for name in TRAJECTORIES.names
    ]
    return pa.table(columns, schema=TRAJECTORIES)


def require_signal(statuses: Sequence[str]) -> int:
    """Count the mixed groups. SignalError where there is none: there is nothing to learn from."""
    mixed = sum(status == OK for status in statuses)
    if not mixed:
        raise SignalError(
            f"none of the {len(statuses)} training prompts has both better and worse completions "
            f"({counts_text(count_status(statuses))})",
            where="prompts.train",
            fix="use problems that the policy solves sometimes, raise collect.num_generations, or see in `cropi check` "
            "how the verifier judges real completions.",
        )
    return mixed
