# Sourced by the scripts that sbatch runs, in the checkout: reads slurm/site.env; copying, in_step and put_back are for them.
at_submission="$(compgen -v SBATCH_ | sort)"  # a job inherits what sbatch saw
source slurm/site.sh
missed="$(comm -13 <(echo "$at_submission") <(compgen -v SBATCH_ | sort) | xargs)"
[ -z "$missed" ] || echo "slurm: sbatch did not see $missed of $site; where its command line did not say as much," \
  "this job runs without: \`source $site\` before sbatch" >&2
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun does not take it over itself
[ -n "${SLURM_GPUS_ON_NODE:-}" ] || unset SLURM_CPUS_PER_GPU  # with --gres=none srun would refuse it
trap '' TERM  # meant for the training, which answers by ending; this shell has to be there then

# One folder for all jobs of a user, in which they share copies and remove those of killed jobs.
copying=(); [ -z "$KFOOD_SCRATCH" ] || copying=(--copy-to "$KFOOD_SCRATCH")

# in_step COMMAND…: one task of it on each node. When the first has ended, the others get KFOOD_END_TOGETHER seconds.
in_step() {
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --wait="$KFOOD_END_TOGETHER" --kill-on-bad-exit=0 \
    $KFOOD_CONTAINER "$@"
}

# all_answer: whether each node of the job still starts a task.
all_answer() {
  timeout "$KFOOD_NODE_TIMEOUT" srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --quiet true
}

# put_back: end the script with status 75, back in the queue, or with 76 where that may or can not be.
put_back() {
  local starts=$((${SLURM_RESTART_COUNT:-0} + 1)) job="$SLURM_JOB_ID" until=$((SECONDS + 60)) answer state may
  # One task of an array has the number of all as its own.
  [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  while [ "$SECONDS" -lt "$until" ]; do  # the controller may be busy, or just restarting
    if answer="$(squeue --noheader --jobs="$job" --Format=State,Requeue)"; then
      read -r state may <<<"$answer"
      [ "$state $may" = "RUNNING 1" ] || { echo "slurm: stopped, and not requeued: the job is $state, Requeue=$may"; exit 76; }
      [ "$starts" -lt "$KFOOD_MAX_STARTS" ] || {
        echo "slurm: stopped at start $starts of KFOOD_MAX_STARTS=$KFOOD_MAX_STARTS; given up. A new sbatch goes on."
        exit 76
      }
      scontrol requeue "$job" && { echo "slurm: stopped, requeued; the next start is number $((starts + 1))"; exit 75; }
    fi
    sleep 5
  done
  echo "slurm: stopped, and not requeued: Slurm did not do so for a minute. A new sbatch goes on."
  exit 76
}
