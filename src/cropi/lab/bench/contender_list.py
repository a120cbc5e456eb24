"""The contenders of a measurement: floors, our engines, and other engines with the way to install them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

PEERS = Path(__file__).parent / "peers"


@dataclass(frozen=True)
class Contender:
    """One line of the result. Each contender runs in its own process.

    `floor`: passes over the train prompts' tokens that read nothing. `ours`, `peer`: engines that score train prompts
    against validation prompts.
    """

    name: str
    kind: Literal["floor", "ours", "peer"]
    summary: str
    options: dict[str, Any] = field(default_factory=dict)  # for its worker
    install: str | None = None  # the command that installs a peer
    own_environment: bool = False  # whether a peer's packages clash with ours

    @property
    def scores(self) -> bool:
        """Whether it scores prompts."""
        return self.kind != "floor"

    def command(self, peer_python: Path | None) -> list[str]:
        """Command line of its worker. ValueError where the peer needs an interpreter of its own and none is known."""
        if self.kind != "peer":
            return [sys.executable, "-m", "cropi.lab.bench.contenders"]
        if self.own_environment and peer_python is None:
            raise ValueError(f"{self.name} runs in a Python environment of its own: {self.install}")
        python = str(peer_python) if self.own_environment else sys.executable
        return [python, str(PEERS / f"{self.name}_worker.py")]

    def worker_options(self, recipe_dim: int) -> dict[str, Any]:
        """Options that its worker gets with the task."""
        if self.kind != "peer":
            return {"contender": self.name}
        return self.options | ({"dim": recipe_dim} if self.name == "recipe" else {})


CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("forward", "floor", "our packed forward pass and the head's log-probs, prompts with signal alone"),
        Contender("floor", "floor", "the same and the backward pass through activations; nothing is read"),
        Contender(
            "stock",
            "floor",
            "as many tokens as `floor` through transformers' own model (sdpa): rows of one length, no padding, logits "
            "of all positions, backward to the embeddings' output",
        ),
        Contender("exact", "ours", "influence without projection, 2 validation sets"),
        Contender("exact-cosine", "ours", "the same, with the norm of every gradient"),
        Contender("sketch", "ours", "the default projection"),
        Contender("sketch-uniform", "ours", "coordinates kept at random, q = 0.1, as in the paper"),
        Contender("reference", "ours", "autograd, one prompt at a time, full gradients, no projection"),
        Contender(
            "bergson",
            "peer",
            "bergson's index builder: hooks on every linear layer, both sides projected, one row a trajectory",
            {"projection_dim": 16},
            "python -m venv bergson-env && bergson-env/bin/pip install torch==2.13.0 bergson==2.5.1 && "
            "bergson-env/bin/pip uninstall -y torchvision torchaudio",
            own_environment=True,
        ),
        Contender(
            "recipe",
            "peer",
            "the paper's recipe: one prompt at a time, full gradient, random mask, TRAK's dense projection",
            {"keep_fraction": 0.1},
            "pip install --no-deps traker==0.3.2",
        ),
    )
}
