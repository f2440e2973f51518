#!/usr/bin/env bash
# bash slurm/stages.sh [--nodes=N and other options of sbatch] [-- RECIPE RECIPE …]
# Queues a training for each recipe in order. The default recipes are launch/recipes/stages/*.yaml. Each training starts
# when the previous one has finished, and its model is evaluated when it has finished itself. Without Slurm, trains on
# this machine in the same order, and evaluates nothing.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../launch/help.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."

options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- launch/recipes/stages/*.yaml
command -v sbatch >/dev/null || exec bash launch/train.sh "$@"

source slurm/site.sh
# Shards, base model and run directory of each recipe, one per line. All recipes are read before the first is queued.
found="$($KFOOD_CONTAINER bash launch/python.sh -X utf8 - "$@" <<'PY'
import sys
from pathlib import Path
try:
    from kfood_dist.config.recipe import load_recipe
    from kfood_dist.errors import KfoodError
except ImportError as error:
    sys.exit(f"stages: {sys.executable}: {error} → bash launch/venv.sh, or name the jobs' Python in site.env")
try:
    for recipe in map(load_recipe, map(Path, sys.argv[1:])):
        print(recipe.data.shards, recipe.model.base, recipe.run.dir, sep="\n")
except KfoodError as error:
    sys.exit(f"stages: {error}")
PY
)" || { echo "stages: nothing was queued" >&2; exit 2; }
mapfile -t at <<<"$found"

queue() { sbatch --parsable --kill-on-invalid-dep=yes "${after[@]}" "${options[@]}" "$@" | cut -d';' -f1; }
after=() queued=()
take_back() {
  echo "stages: not all jobs could be queued; cancelling ${queued[*]:-none}" >&2
  [ ${#queued[@]} -eq 0 ] || scancel "${queued[@]}"
  exit 1
}
trap take_back ERR INT TERM
for recipe in "$@"; do
  trained=$(queue slurm/train.sbatch "$recipe"); queued+=("$trained")
  after=(--dependency="afterok:$trained")
  measured=$(queue --nodes=1 slurm/evaluate.sbatch --shards "${at[0]}" --model "${at[1]}" --adapter "${at[2]}/adapter" \
    --out "${at[2]}/tuned" --tensorboard "${at[2]}/tensorboard")
  queued+=("$measured") at=("${at[@]:3}")
  echo "$recipe: training is job $trained, evaluation is job $measured"
done
