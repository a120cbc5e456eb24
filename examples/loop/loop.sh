#!/usr/bin/env bash
# Stage by stage with a trainer of your own: score, select, export, train, and again from what it saved.
# Here the trainer is train.py, TRL's on the files of the export; put verl, slime, OpenRLHF or prime-rl in its place.
#
#   examples/loop/loop.sh FOLDER [key=value ...]        settings go to the run: see docs/config.md
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
folder=$1 && shift
run=$folder/loop
stages=${STAGES:-3}

cropi collect quickstart name=loop run_dir="$folder" select.strategy=influence "$@"
at=() # the base policy, then what the trainer saved
for ((stage = 0; stage < stages; stage++)); do
  cropi score "$run" ${at[@]+"${at[@]}"}
  cropi select "$run" ${at[@]+"${at[@]}"}
  cropi export "$run" ${at[@]+"${at[@]}"} --format trl --output "$folder/stage-$stage"
  python "$here/train.py" "$folder/stage-$stage" "$folder/policy-$stage" "${policy:-}"
  # what it sampled is fresher than what the base policy sampled: lay it over that
  policy=$folder/policy-$stage
  at=(--checkpoint "$policy")
  cropi import "$run" "$folder/policy-$stage-trainer/completions" ${at[@]+"${at[@]}"}
  cropi evaluate "$run" ${at[@]+"${at[@]}"}
done
