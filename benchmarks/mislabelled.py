"""How many of the prompts that a quickstart run selected carry a wrong answer, by stage.

    python benchmarks/mislabelled.py runs/quickstart

The strategies never see which answers are wrong; this script makes the problems again from the run's config and looks.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from cropi.artifacts import SELECTION, read_table
from cropi.builtin import difficulty, generate
from cropi.config import BuiltinSource, Config
from cropi.config.loading import validate_config


def read_config(run: Path) -> Config:
    return validate_config(json.loads((run / "config.json").read_text(encoding="utf-8")), str(run))


def wrong_answers(config: Config, *, rules: bool = True) -> dict[str, bool]:
    """Whether the recorded answer is wrong, by prompt id, for the built-in part of the training pool.

    `rules`: sources that follow a rule other than the right answer's count too.
    """
    known = {}
    for source in config.prompts.train:
        if isinstance(source, BuiltinSource) and (rules or source.label_rule == "right"):
            level = source.model_dump(include={"min_length", "max_length", "hint"})
            options = source.model_dump(include={"count", "label_noise", "label_rule", "distractors"})
            options["seed"] = config.seed if source.seed is None else source.seed
            for family in source.families:
                rows = generate(family, split="train", level=difficulty(family, **level), **options)
                known |= {row["prompt_id"]: row["mislabelled"] for row in rows}
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    wrong = wrong_answers(read_config(run))
    print(f"pool: {sum(wrong.values())} of {len(wrong)} answers wrong\n")
    print("| stage | selected | wrong |\n|---|---|---|")
    for path in sorted(run.glob("selections/stage-*/selection.parquet")):
        chosen = [row["prompt_id"] for row in read_table(path, SELECTION).to_pylist() if row["selected"]]
        share = sum(wrong[prompt_id] for prompt_id in chosen) / len(chosen)
        print(f"| {path.parent.name} | {len(chosen)} | {share:.2f} |")


if __name__ == "__main__":
    main()
