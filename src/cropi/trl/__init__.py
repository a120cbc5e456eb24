"""The curriculum inside a training script of TRL's: another trainer class, and a selector.

from cropi.trl import CurriculumTrainer, Selector

trainer = CurriculumTrainer(..., selector=Selector(validation=held_out))
trainer.train()
"""

from cropi.trl.selector import Selector
from cropi.trl.trainer import CurriculumTrainer
from cropi.trl.verified import Verified

__all__ = ["CurriculumTrainer", "Selector", "Verified"]
