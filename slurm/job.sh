# The scripts that sbatch runs source this file in the checkout. It reads slurm/site.env, and defines `copying`,
# `in_step`, `all_answer` and `put_back` for them.
at_submission="$(compgen -v SBATCH_ | sort)"  # a job inherits the variables that sbatch saw
source slurm/site.sh
missed="$(comm -13 <(echo "$at_submission") <(compgen -v SBATCH_ | sort) | xargs)"
[ -z "$missed" ] || echo "slurm: sbatch did not see $missed of $site; this job runs without these settings," \
  "unless sbatch's command line gave them → \`source $site\` before sbatch" >&2
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"  # srun does not inherit it
[ -n "${SLURM_GPUS_ON_NODE:-}" ] || unset SLURM_CPUS_PER_GPU  # srun refuses it with --gres=none
trap '' TERM  # the signal is for the training, which then ends; this shell has to outlive it

# All jobs of a user have one folder. They share the copies in it, and remove those of killed jobs.
copying=(); [ -z "$KFOOD_SCRATCH" ] || copying=(--copy-to "$KFOOD_SCRATCH")

# in_step COMMAND…: run one task of the command on each node. After the first task ends, the others get
# KFOOD_END_TOGETHER seconds to end.
in_step() {
  srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --wait="$KFOOD_END_TOGETHER" --kill-on-bad-exit=0 \
    $KFOOD_CONTAINER "$@"
}

# all_answer: succeed if each node of the job can still start a task.
all_answer() {
  timeout "$KFOOD_NODE_TIMEOUT" srun --overlap --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --quiet true
}

# put_back: requeue the job and exit with status 75, or exit with 76 if the job must not or cannot be requeued.
put_back() {
  local starts=$((${SLURM_RESTART_COUNT:-0} + 1)) job="$SLURM_JOB_ID" until=$((SECONDS + 60)) answer state may
  # The SLURM_JOB_ID of one task of an array is the number of the complete array.
  [ -z "${SLURM_ARRAY_JOB_ID:-}" ] || job="${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
  while [ "$SECONDS" -lt "$until" ]; do  # the controller may be busy or restarting
    if answer="$(squeue --noheader --jobs="$job" --Format=State,Requeue)"; then
      read -r state may <<<"$answer"
      [ "$state $may" = "RUNNING 1" ] || { echo "slurm: stopped, and not requeued: the job is $state, Requeue=$may"; exit 76; }
      [ "$starts" -lt "$KFOOD_MAX_STARTS" ] || {
        echo "slurm: stopped at start $starts of KFOOD_MAX_STARTS=$KFOOD_MAX_STARTS; given up. A new sbatch continues."
        exit 76
      }
      scontrol requeue "$job" && { echo "slurm: stopped, requeued; the next start is number $((starts + 1))"; exit 75; }
    fi
    sleep 5
  done
  echo "slurm: stopped, and not requeued: Slurm did not do it within a minute. A new sbatch continues."
  exit 76
}
