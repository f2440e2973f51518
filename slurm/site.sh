# job.sh and stages.sh source this file in the checkout. It reads slurm/site.env and loads the modules and the virtual
# environment that it names.
site="${KFOOD_SITE:-slurm/site.env}"
[ -f "$site" ] || { echo "slurm: no $site → cp slurm/site.env.example slurm/site.env, and edit it" >&2; exit 2; }
source "$site"
for name in $(grep -o '^KFOOD_[A-Z_]*' slurm/site.env.example); do
  [ -n "${!name+set}" ] || { echo "slurm: $site does not set $name → copy its line from slurm/site.env.example" >&2; exit 2; }
done
export KFOOD_CONTAINER KFOOD_VENV  # for launch/python.sh, which picks the Python of the place where it runs
if [ -n "$KFOOD_MODULES" ]; then module load $KFOOD_MODULES || exit 2; fi
if [ -n "$KFOOD_VENV" ] && [ -z "$KFOOD_CONTAINER" ]; then source "$KFOOD_VENV/bin/activate" || exit 2; fi
