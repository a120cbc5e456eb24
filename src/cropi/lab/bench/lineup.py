"""Who can take part in a measurement, and what is timed of each."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cropi.lab.bench.peers import PEERS

Kind = Literal["floor", "ours", "peer", "yardstick"]


@dataclass(frozen=True)
class Contender:
    """One line of the result."""

    name: str
    kind: Kind
    """`floor`: passes over the train prompts' tokens that read nothing; `ours`, `peer`: engines that score train
    prompts against validation prompts; `yardstick`: what a policy costs beside being scored."""
    summary: str
    options: dict[str, Any] = field(default_factory=dict)
    """For its worker."""

    @property
    def scores(self) -> bool:
        return self.kind in {"ours", "peer"}

    def command(self, peer_python: Path | None) -> list[str]:
        """Command line of its worker; ValueError where the peer's interpreter is not known."""
        if self.kind == "peer":
            return PEERS[self.name].command(None if peer_python is None else str(peer_python))
        return [sys.executable, "-m", "cropi.lab.bench.worker"]


CONTENDERS: dict[str, Contender] = {
    contender.name: contender
    for contender in (
        Contender("forward", "floor", "our packed forward pass and the head's log-probs, prompts with signal alone"),
        Contender("floor", "floor", "the same and the backward pass through activations; nothing is read"),
        Contender(
            "stock",
            "floor",
            "as many tokens through transformers' own model (sdpa) as `floor` computes: rows of one length, no "
            "padding, logits of all positions, backward to the embeddings' output",
        ),
        Contender("exact", "ours", "influence without projection, 2 validation sets"),
        Contender("exact-cosine", "ours", "the same, with the norm of every gradient"),
        Contender("sketch", "ours", "the default projection"),
        Contender("sketch-uniform", "ours", "every coordinate kept by chance, q = 0.1, as in the paper"),
        Contender("reference", "ours", "autograd, one prompt at a time, full gradients, no projection"),
        Contender("bergson", "peer", PEERS["bergson"].summary, {"projection_dim": 16}),
        Contender("recipe", "peer", PEERS["recipe"].summary, {"keep_fraction": 0.1}),
        Contender("generate", "yardstick", "sampling with transformers, batches of 64, mean lengths of the workload"),
        Contender("train", "yardstick", "forward, full backward and an AdamW step on as many tokens as `stock`"),
    )
}
DEFAULT = [name for name, contender in CONTENDERS.items() if contender.kind != "yardstick"]


def worker_options(contender: Contender, recipe_dim: int) -> dict[str, Any]:
    """What its worker is told beside the task."""
    if contender.kind != "peer":
        return {"contender": contender.name}
    return contender.options | ({"dim": recipe_dim} if contender.name == "recipe" else {})
