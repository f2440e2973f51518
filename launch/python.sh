# Sourced, sets PYTHON; run, is that Python. The environment KFOOD_VENV comes first, then the checkout's .venv (not in a
# container, for which it was not made), then the active Python.
if [ -n "${KFOOD_VENV:-}" ]; then
  PYTHON="$KFOOD_VENV/bin/python"
  [ -x "$PYTHON" ] || { echo "launch: there is no $PYTHON here → correct KFOOD_VENV" >&2; exit 2; }
else
  PYTHON="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python"
  [ -x "$PYTHON" ] && [ -z "${KFOOD_CONTAINER:-}" ] || PYTHON="$(command -v python3 || command -v python)" \
    || { echo "launch: no Python here → bash launch/venv.sh, or set KFOOD_VENV" >&2; exit 2; }
fi
[ "${BASH_SOURCE[0]}" != "$0" ] || exec "$PYTHON" "$@"
