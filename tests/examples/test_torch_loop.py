"""The plain torch loop: short, and its curriculum learns that only the validation set's own skill helps."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "torch_loop.py"


def test_it_reads_what_autograd_gives_and_prefers_the_wanted_skill(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(SCRIPT.read_text().splitlines()) <= 60
    found = runpy.run_path(str(SCRIPT))
    assert "influence/sum" in capsys.readouterr().out
    pool = found["train"]
    table = found["curriculum"].table([row["prompt_id"] for row in pool]).to_pandas()
    kinds = [row["prompt"].split()[0] for row in pool]
    influence = table["influence/sum"].groupby(kinds).mean()
    assert influence.idxmax() == "sum"
    drawn = table["times_drawn"].groupby(kinds).sum()
    assert drawn.sum() == found["STEPS"] * found["PROMPTS"]

    # once more, by one gradient of a whole group
    model, (half, _) = found["model"], found["sketch"].directions()
    losses = (found["rollout"](pool[20:21], [4], seed) for seed in range(100))
    loss = next(loss for loss, rewards in losses if len(rewards[0].unique()) > 1)
    reader = found["Reader"](model, [half])
    with reader.reading(torch.arange(4)):
        loss().backward()
    parameters = {name: weight for name, weight in model.named_parameters() if name in half}
    gradients = torch.autograd.grad(loss(), list(parameters.values()))
    dense = {name: part if isinstance(part, torch.Tensor) else part.left @ part.right for name, part in half.items()}
    expected = sum(float((g * dense[name]).sum()) for name, g in zip(parameters, gradients, strict=True))
    assert float(reader.take()[1].sum()) == pytest.approx(expected, rel=1e-4)
