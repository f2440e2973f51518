# Sourced by the scripts here: sets PYTHON to the checkout's .venv if there is one, else to the active Python.
PYTHON="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python"
[ -x "$PYTHON" ] || PYTHON="$(command -v python3 || command -v python)"
