#!/usr/bin/env bash
# bash launch/train.sh RECIPE… [--processes N] [--set SECTION.KEY=VALUE …]
# Trains with one recipe, or with several in order. Runs `accelerate launch` on the GPUs or CPUs of this machine or job,
# and prints what it picked and why.
# Exit status: 0 finished; 75 stopped on request, start it again; 2 a mistake of the user; 1 failed.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/python.sh"
exec "$PYTHON" -m kfood_dist.launch.start train "$@"
