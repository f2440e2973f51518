#!/usr/bin/env bash
# bash launch/train.sh RECIPE [--processes N] [--set SECTION.KEY=VALUE …]
# Trains by a recipe under `accelerate launch`, on what this machine or job has; says what it picked and why.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/python.sh"
exec "$PYTHON" -m kfood_dist.launch train "$@"
