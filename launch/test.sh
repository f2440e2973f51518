#!/usr/bin/env bash
# bash launch/test.sh [what pytest takes]
# The whole suite, some 45 minutes on two cores; arguments go to pytest, such as tests/unit (6 minutes).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/venv.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
command -v slurmctld /usr/sbin/slurmctld >/dev/null \
  || echo "test: no Slurm here, tests/slurm will be skipped; to run it: apt-get install --no-install-recommends slurm-wlm munge"
exec .venv/bin/python -m pytest "$@"
