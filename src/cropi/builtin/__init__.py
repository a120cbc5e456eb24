"""The policy and the procedural tasks that ship with the package, so that everything runs offline on a laptop."""

from pathlib import Path

from cropi.builtin.dataset import generate
from cropi.builtin.families import FAMILIES, difficulty

POLICY_DIR = Path(__file__).parent / "policy"

__all__ = ["FAMILIES", "POLICY_DIR", "difficulty", "generate"]
