"""Other engines that `cropi bench engine` measures beside ours, each in a worker process of its own."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """One engine to compare with: how to install it and how to start its worker."""

    name: str
    summary: str
    worker: Path
    interpreter: Literal["own", "given"]
    """`own`: the Python that runs cropi; `given`: one that the user names, for the peer's packages clash with ours."""
    install: str

    def command(self, python: str | None = None) -> list[str]:
        """The worker's command line; `python` is the user's interpreter. ValueError where it is missing."""
        if self.interpreter == "own":
            return [sys.executable, str(self.worker)]
        if python is None:
            raise ValueError(f"{self.name} runs in a Python environment of its own: {self.install}")
        return [python, str(self.worker)]


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in (
        Peer(
            name="bergson",
            summary="bergson's index builder: hooks on every linear layer, both sides projected, one row a trajectory",
            worker=_HERE / "bergson_worker.py",
            interpreter="given",
            install=(
                "python -m venv bergson-env && bergson-env/bin/pip install torch==2.13.0 bergson==2.5.1 && "
                "bergson-env/bin/pip uninstall -y torchvision torchaudio"
            ),
        ),
        Peer(
            name="recipe",
            summary="the paper's recipe: one prompt at a time, full gradient, random mask, TRAK's dense projection",
            worker=_HERE / "recipe_worker.py",
            interpreter="own",
            install="pip install --no-deps traker==0.3.2",
        ),
    )
}
