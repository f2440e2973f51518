#!/usr/bin/env bash
# bash launch/venv.sh
# Makes the checkout's .venv with the tested versions. Does nothing if it is up to date. PYTHON names the Python to use.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
[ $# -eq 0 ] || { echo "venv: it takes no arguments, but got $* → see bash launch/venv.sh --help" >&2; exit 2; }
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

wanted="$(cat setup.cfg launch/constraints.txt | sha256sum | cut -d' ' -f1)"
[ "$(cat .venv/kfood-stamp 2>/dev/null || true)" = "$wanted" ] && { echo "venv: .venv is up to date" || true; exit 0; }

for candidate in "${PYTHON:-}" python3.12 python3.11 python3; do
  [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null \
    && { python="$candidate"; break; }
done
[ -n "${python:-}" ] || { echo "venv: no Python 3.11 or 3.12 found; install one, or name it: PYTHON=/path/to/python3.12" >&2; exit 2; }
"$python" -c 'import ensurepip' 2>/dev/null \
  || { echo "venv: $python has no ensurepip; run: apt-get install python3-venv" >&2; exit 2; }

echo "venv: installing into .venv with $("$python" --version) (a few minutes the first time)" || true
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv  # made again if incomplete
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint launch/constraints.txt --editable '.[test]'
echo "$wanted" > .venv/kfood-stamp
