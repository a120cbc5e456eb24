"""Our own: prompts chosen batch by batch while training runs."""

from typing import ClassVar, Literal

import numpy as np

from cropi.curriculum.chooser import ChoosesBatches, Pool
from cropi.curriculum.curriculum import Curriculum
from cropi.curriculum.strategy import Need, StrategyTable
from cropi.functional.points import principal_points


class CropiStrategy(ChoosesBatches, StrategyTable):
    """Prompts chosen for each generation batch by influence that is read from training's own backward passes.

    Nothing of the pool is collected or scored. Only the validation prompts are sampled, to find directions.
    """

    needs: ClassVar[frozenset[Need]] = frozenset({"validation", "rewards", "representations"})
    reads_influence: ClassVar[bool] = True

    type: Literal["cropi"]
    observe_only: bool = False
    """Read influence and report it, but train on the whole pool as `full` does."""
    prior: str | None = None
    """Folder of a finished run of `cropi` on the same policy, whose observations of influence this one begins with."""

    def chooser(self, pool: Pool) -> Curriculum:
        """The `Curriculum`, on the principal directions of the representations."""
        sets = pool.validation_states
        points = principal_points(pool.states_NE, *sets.values())
        pool_NE, *validation = np.split(points, np.cumsum([len(pool), *map(len, sets.values())])[:-1])
        return Curriculum(
            pool_NE,
            dict(zip(sets, validation, strict=True)),
            seed=pool.seed,
            batch=pool.batch,
            generations=pool.generations,
            scaling=pool.scaling,
            observe_only=self.observe_only,
            prompt_ids=pool.prompt_ids,
        )
