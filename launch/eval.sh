#!/usr/bin/env bash
# bash launch/eval.sh [--processes N] [options of `kfood eval`]
# Evaluates a model on held-out pictures, with all GPUs of this machine.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
source "$here/python.sh"
exec "$PYTHON" -m kfood_dist.launch.start eval "$@"
