"""The curriculum inside a TRL training script: another trainer class, and a selector.

from cropi.trl import CurriculumTrainer, Selector

trainer = CurriculumTrainer(..., selector=Selector(validation=held_out))
trainer.train()
trainer.curriculum.table()
"""

from cropi.trl.selector import Selector
from cropi.trl.trainer import CurriculumTrainer, Verified

__all__ = ["CurriculumTrainer", "Selector", "Verified"]
