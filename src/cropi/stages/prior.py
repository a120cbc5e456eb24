"""Begin a run with the influence that an earlier one on the same policy observed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from cropi.artifacts import is_finished, open_artifact, read_manifest, read_table
from cropi.curriculum.curriculum import Curriculum
from cropi.errors import ConfigError
from cropi.loading import load_config
from cropi.rollouts.representations import KIND as REPRESENTED
from cropi.run_folder import RunFolder
from cropi.run_tables import beliefs_schema
from cropi.stages.run import Run
from cropi.training.curriculum_state import load_state

ANOTHER_RUN = 2.0  # times as large is the squared error of an observation that another run made


def take_prior(run: Run, curriculum: Curriculum, prompt_ids: Sequence[str], folder: str) -> None:
    """Give a new curriculum what a finished run of `cropi` observed of the prompts and validation prompts of both.

    Observations keep their step: both policies begin as the same one and are trained for as long. Rewards are left:
    they change fast. Raises ConfigError for a run whose influence is another policy's or in another unit.
    """
    earlier = RunFolder(load_config(folder))
    train, names = earlier.config.train, earlier.config.prompts.validation
    last = earlier.stages.checkpoints / f"checkpoint-{train.steps}"
    if not (is_finished(last) and is_finished(earlier.stages.beliefs(train.stages - 1))):
        raise _unfit("is not a finished run of cropi with its last checkpoint", folder)
    made_from = read_manifest(earlier.representations, REPRESENTED, made_by="cropi train").inputs
    if made_from["policy"] != run.setup.identity:
        raise _unfit("is a run of another policy", folder)
    if any(run.config.trainer.get(key) != earlier.config.trainer.get(key) for key in ("loss_type", "scale_rewards")):
        raise _unfit("has another loss_type or scale_rewards, so that its influence is in another unit", folder)
    open_artifact(last, "checkpoint", made_by="cropi train")
    beliefs = earlier.stages.beliefs(train.stages - 1) / "beliefs.parquet"
    their_ids = read_table(beliefs, beliefs_schema(names)).column("prompt_id").to_pylist()
    theirs, state = load_state(last)["curriculum"], curriculum.state_dict()
    for name in sorted(run.config.prompts.validation):
        pairs = (earlier, their_ids), (run.folder, prompt_ids)
        before, now = ([*ids, *_members(place, name)] for place, ids in pairs)
        known = carried(theirs[f"influence/{name}/seen"], before, now) if name in names else np.empty((0, 5))
        if not len(known):
            raise _unfit(f"has observed no prompt of this run for the validation set {name!r}", folder)
        state[f"influence/{name}/seen"] = known
    curriculum.load_state_dict(state)


def _members(folder: RunFolder, name: str) -> list[Any]:
    return [("held out", row["prompt_id"]) for row in folder.validation_prompts.get(name, [])]


def carried(seen_O5: np.ndarray, before: Sequence[Any], now: Sequence[Any]) -> np.ndarray:
    """Observations of points that both have, by the places of the new run."""
    place_of = {key: place for place, key in enumerate(now)}
    places_O = np.array([place_of.get(before[int(point)], -1) for point in seen_O5[:, 0]], dtype=float)
    found = seen_O5[places_O >= 0] * [1.0, 1.0, 1.0, ANOTHER_RUN, 1.0]
    found[:, 0] = places_O[places_O >= 0]
    return found


def _unfit(problem: str, folder: str) -> ConfigError:
    fix = "name a finished run of cropi on the same policy, or leave it out."
    return ConfigError(f"{folder} {problem}", where="select.strategy.prior", fix=fix)
