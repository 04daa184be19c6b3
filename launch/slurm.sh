#!/usr/bin/env bash
# Submits a training command to SLURM: nodes with GPUs, one process a node, back in the queue when it is preempted or
# its time is over.
#
#   launch/slurm.sh NAME --nodes=2 --gpus_per_node=8 --time=24:00:00 -- \
#       --gin_file=gin/miniend_3b/gpu_8.gin --gin.MODEL_DIR=/shared/run --gin.TEACHER=/shared/t5_v1_1_xl
#
#   --nodes=1           how many nodes
#   --gpus_per_node=8   GPUs of each
#   --cpus_per_node=N   CPU cores of each, for reading the data; default: 4 a GPU
#   --time=TIME         limit of one allocation; before it ends the run saves, and the job goes back into the queue
#   --partition=NAME    default: the cluster's
#   --sbatch_flag=FLAG  repeatable; handed to sbatch, such as --sbatch_flag=--account=LAB
#   --log_dir=FOLDER    where the output goes, a file per job, shared by its requeues; default: the current folder
#   --dry_run           print the command and submit nothing
#
# MODEL_DIR must be on storage that all nodes share. PYTHON names the interpreter on the nodes (default: python).

set -euo pipefail
LAUNCH="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$LAUNCH/common.sh"

NAME='' NODES=1 GPUS=8 CPUS='' TIME='' PARTITION='' LOG_DIR=. SBATCH_FLAGS=()

while (($#)); do
    case "$1" in
        -h | --help) show_help && exit 0 ;;
        --) shift && break ;;
        --nodes=*) NODES="${1#*=}" && positive_number nodes "$NODES" ;;
        --gpus_per_node=*) GPUS="${1#*=}" && positive_number gpus_per_node "$GPUS" ;;
        --cpus_per_node=*) CPUS="${1#*=}" && positive_number cpus_per_node "$CPUS" ;;
        --time=?*) TIME="${1#*=}" ;;
        --partition=?*) PARTITION="${1#*=}" ;;
        --sbatch_flag=--?*) SBATCH_FLAGS+=("${1#*=}") ;;
        --log_dir=?*) LOG_DIR="${1#*=}" ;;
        --dry_run) DRY_RUN=yes ;;
        --*) fail "unknown flag $1; the training command goes after --; see --help" ;;
        *) [[ ! $NAME ]] || fail "$1: one name is enough; the training command goes after --" && NAME="$1" ;;
    esac
    shift
done
[[ $NAME ]] || fail 'give the job a name: launch/slurm.sh NAME ...'
valid_name "$NAME"
training_arguments "$@"
needs_program sbatch 'run this on a login node of a SLURM cluster'
run mkdir -p "$LOG_DIR"

# --signal: 5 minutes before the end of its time only the job script (B:) receives SIGUSR1.
run sbatch "--job-name=$NAME" "--nodes=$NODES" --ntasks-per-node=1 "--gpus-per-node=$GPUS" \
    "--cpus-per-task=${CPUS:-$((4 * GPUS))}" ${TIME:+"--time=$TIME"} \
    ${PARTITION:+"--partition=$PARTITION"} --requeue --signal=B:USR1@300 --open-mode=append \
    "--output=$LOG_DIR/%x-%j.log" "${SBATCH_FLAGS[@]}" "$LAUNCH/slurm_job.sh" "${ARGUMENTS[@]}"
