# When sourced, sets PYTHON. When run, starts that Python with the given arguments. It takes the first of these: the
# virtual environment KFOOD_VENV; the checkout's .venv (not in a container, because it was not made for one); the active
# Python.
if [ -n "${KFOOD_VENV:-}" ]; then
  PYTHON="$KFOOD_VENV/bin/python"
  [ -x "$PYTHON" ] || { echo "launch: there is no $PYTHON on this machine → correct KFOOD_VENV" >&2; exit 2; }
else
  PYTHON="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/.venv/bin/python"
  [ -x "$PYTHON" ] && [ -z "${KFOOD_CONTAINER:-}" ] || PYTHON="$(command -v python3 || command -v python)" \
    || { echo "launch: no Python on this machine → bash launch/venv.sh, or set KFOOD_VENV" >&2; exit 2; }
fi
[ "${BASH_SOURCE[0]}" != "$0" ] || exec "$PYTHON" "$@"
