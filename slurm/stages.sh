#!/usr/bin/env bash
# bash slurm/stages.sh [--nodes=N and what else sbatch takes] [-- RECIPE RECIPE …]
# Queues training by each recipe in order, launch/recipes/stages/*.yaml by default: each starts when the one before has
# finished, and is measured when it has finished itself. Without Slurm, trains here in that order.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

options=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do options+=("$1"); shift; done
[ $# -gt 0 ] && shift
[ $# -gt 0 ] || set -- launch/recipes/stages/*.yaml
command -v sbatch >/dev/null || exec bash launch/train.sh "$@"

source launch/python.sh
site="${KFOOD_SITE:-slurm/site.env}"
[ ! -f "$site" ] || source "$site"
after=()
for recipe in "$@"; do
  mapfile -t at < <("$PYTHON" - "$recipe" <<'PY'
import sys, pathlib
from kfood_dist.config import load_recipe
recipe = load_recipe(pathlib.Path(sys.argv[1]))
print(recipe.data.shards, recipe.model.base, recipe.run.dir, sep="\n")
PY
  )
  queue() { sbatch --parsable --kill-on-invalid-dep=yes "${after[@]}" "${options[@]}" "$@" | cut -d';' -f1; }
  trained=$(queue slurm/train.sbatch "$recipe")
  after=(--dependency="afterok:$trained")
  measured=$(queue --nodes=1 slurm/evaluate.sbatch --shards "${at[0]}" --model "${at[1]}" --adapter "${at[2]}/adapter" \
    --out "${at[2]}/tuned" --tensorboard "${at[2]}/tensorboard")
  echo "$recipe: training is job $trained, measuring job $measured"
done
