# /// script
# requires-python = ">=3.11"
# dependencies = ["cropi"]
#
# [tool.uv.sources]
# cropi = { path = "../.." }
# ///
"""Train the built-in policy for two minutes on a CPU, and look at what it was trained on: `uv run first_run.py`."""

import sys

import cropi

run = cropi.run("quickstart", "train.stages=2", "train.steps_per_stage=8", *sys.argv[1:])
steps = run.evaluations.groupby(["step", "set"]).greedy.mean().unstack("set")
print(steps.to_string(float_format="{:.2f}".format))
print("\nGroups by source, of those that training took and of the whole pool:")
pool = run.prompts.query("set == 'train'").set_index("prompt_id").source
taken = run.curriculum.prompt_id.map(pool)
print(taken.value_counts().to_frame("taken").join(pool.value_counts().rename("pool")).head(6).to_string())
print(f"\n{run.folder / 'report.html'}")
