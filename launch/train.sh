#!/usr/bin/env bash
# bash launch/train.sh RECIPE… [--processes N] [--set SECTION.KEY=VALUE …]
# Trains by a recipe, or by several in order, under `accelerate launch`, on what this machine or job has; says what it
# picked and why. Exit status: 0 finished, 75 stopped as asked and to be started again, 2 a mistake, 1 failed.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/python.sh"
exec "$PYTHON" -m kfood_dist.launch.start train "$@"
