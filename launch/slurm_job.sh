#!/usr/bin/env bash
# The job that launch/slurm.sh submits; SLURM runs it on the first node of every allocation.
#
# One process a node. JAX finds the hosts in SLURM's variables by itself, but would then give each process one GPU, as
# if there were a process a GPU; JAX_LOCAL_DEVICE_IDS names all GPUs of the node. Preempted jobs are put back into the
# queue by SLURM (--requeue); at the end of its time this script does it. A job that was cancelled, finished or failed
# stays out.

set -euo pipefail

gpus="${SLURM_GPUS_ON_NODE:?slurm_job.sh is run by SLURM; submit it with launch/slurm.sh}"
JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((gpus - 1)))"
export JAX_LOCAL_DEVICE_IDS JAX_PLATFORMS=cuda

# Asks the processes to save and end, until SLURM has taken it on. Through scancel, whose signals go to the tasks alone:
# srun does not hand SIGTERM on but kills them at once.
# shellcheck disable=SC2329  # the trap calls it
ask_to_save() {
    time_is_over=yes
    until scancel --signal=TERM "$SLURM_JOB_ID" || ! kill -0 "$processes" 2>/dev/null; do sleep 5; done
}

time_is_over=''
trap ask_to_save USR1

# srun does not take the cores of a task over from sbatch.
srun "--cpus-per-task=${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 "${PYTHON:-python}" -m endistill_jax.main "$@" &
processes=$!
code=0
wait "$processes" || code=$?
if [[ $time_is_over ]]; then
    # The signal ended the first wait, not srun.
    code=0
    wait "$processes" || code=$?
    if ((code)); then
        scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$code"
