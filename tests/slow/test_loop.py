"""The loop in shell with another trainer, as docs/trainers.md tells it: score, select, export, train, and again."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tests.runs import SMALL

from cropi.config import PolicyConfig
from cropi.policy import fingerprint

pytestmark = pytest.mark.slow

LOOP = Path(__file__).resolve().parents[2] / "examples" / "loop" / "loop.sh"
OWN = ("train.", "trainer.", "evaluate.", "collect.shard_prompts")  # of the trainer that the loop replaces
SETTINGS = [text for text in SMALL if not text.startswith(OWN)]


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


def identity(policy: Path) -> str:
    return fingerprint(PolicyConfig(path="builtin"), str(policy))[:12]


def chosen(place: Path) -> list[str]:
    """Prompts of the first selection in a folder, best first."""
    path = place / "selections" / "stage-000" / "selected.jsonl"
    return [json.loads(line)["prompt"] for line in path.read_text().splitlines()]


@pytest.mark.timeout(3600)
def test_two_stages_with_a_trainer_of_ones_own(tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [LOOP, tmp_path / "it", *SETTINGS],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "STAGES": "2"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    folder, run = tmp_path / "it", tmp_path / "it" / "loop"
    policies = [folder / "policy-0", folder / "policy-1"]
    first, last = ((policy / "model.safetensors").read_bytes() for policy in policies)
    assert first != last
    # Where a checkpoint's results lie is told by its content: the second stage is that of what the first one trained.
    places = [run / "other-checkpoints" / f"{at.name}-{identity(at)}" for at in policies]
    stages = [run, places[0]]
    assert {path.parents[2] for path in run.rglob("selected.jsonl")} == set(stages)
    scores = [manifest(stage / "scores" / "stage-000") for stage in stages]
    assert scores[0]["inputs"]["policy"] == "base"
    assert scores[1]["inputs"]["policy"] == f"checkpoint {places[0].name}"
    assert "imported" in scores[1]["inputs"]
    # The trainer moved the policy away from the one that sampled, and influence was taken where it is now.
    assert scores[0]["details"]["drift"]["kl"] < 1e-4 < scores[1]["details"]["drift"]["kl"]
    assert chosen(stages[0]) != chosen(stages[1])
    for number, stage in enumerate(stages):
        prompts, export = chosen(stage), folder / f"stage-{number}"
        assert len(prompts) == 12
        assert pq.read_table(export / "train.parquet").column("prompt").to_pylist() == prompts
        sampled = [pq.read_table(file) for file in (folder / f"policy-{number}-trainer" / "completions").iterdir()]
        assert len(sampled) == 8  # steps
        assert {prompt for table in sampled for prompt in table.column("prompt").to_pylist()} == set(prompts)
        assert manifest(places[number] / "imported")["counts"]
        assert (places[number] / "evaluations" / "step-000000.parquet").is_file()
