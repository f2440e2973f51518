#!/usr/bin/env bash
# bash launch/test.sh [--sweep] [options of pytest]
# Runs the complete test suite with one worker process more than there are cores, but at most 8. It takes about 20
# minutes on two cores. --sweep adds every ZeRO stage in 4-bit and bf16, every change of ranks and ZeRO stage, every
# byte flipped, and long fuzzing. The sweep took 33 minutes, measured once.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/venv.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
command -v slurmctld /usr/sbin/slurmctld >/dev/null \
  || echo "test: no Slurm here: tests/slurm is skipped; to run it: apt-get install --no-install-recommends slurm-wlm munge"
workers=$(($(nproc) + 1))  # some tests mostly wait
exec .venv/bin/python -m pytest -n $((workers < 8 ? workers : 8)) "$@"
