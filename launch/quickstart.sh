#!/usr/bin/env bash
# bash launch/quickstart.sh
# From nothing to an evaluated, tuned model. Makes and packs a practice set, evaluates the base model, trains with the
# real recipe, evaluates the tuned model and compares both. If you run it again, it continues where it stopped, and each
# step says what it reused.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
[ $# -eq 0 ] || { echo "quickstart: it takes no arguments, but got $* → see bash launch/quickstart.sh --help" >&2; exit 2; }
cd "$(dirname "${BASH_SOURCE[0]}")/.."

recipe=launch/recipes/quickstart.yaml
run=runs/quickstart
trap '' PIPE  # the console is best effort: the script continues when a reader of its output ends
say() { printf "$@" 2>/dev/null || true; }
step() { say '\n== %s\n' "$*"; }

step "1/7 environment"
bash launch/venv.sh
kfood=.venv/bin/kfood

step "2/7 practice set: drawn pictures of ten dishes and a tiny untrained Qwen2.5-VL"
$kfood mini data/practice

step "3/7 pack into WebDataset shards"
$kfood pack data/practice/images shards/practice --classes shards/kfood150.tsv --split 0.7,0.1,0.2

step "4/7 evaluate the base model"
bash launch/eval.sh --config $recipe --shards shards/practice --split test --model data/practice/model --out $run/base

step "5/7 train"
bash launch/train.sh $recipe --processes fit

step "6/7 evaluate the tuned model"
bash launch/eval.sh --shards shards/practice --split test --model data/practice/model --adapter $run/adapter \
  --out $run/tuned --tensorboard $run/tensorboard

step "7/7 compare"
$kfood compare base=$run/base tuned=$run/tuned --out $run

say '\nReport:      %s\nTensorBoard: %s\n' "$run/tuned/report.html" ".venv/bin/tensorboard --logdir $run/tensorboard"
