#!/usr/bin/env bash
# Runs a training command on the GPUs of this machine: one process, all its GPUs or those that are named.
#
#   launch/gpu_host.sh -- --gin_file=gin/miniend_3b.gin --gin.MODEL_DIR=/runs/student --gin.TEACHER=/models/t5_v1_1_xl
#
#   --gpus=0,1        which ones, as nvidia-smi numbers them; default: all
#   --log=FILE        the output goes to this file too, after what it has already
#   --max_crashes=3   how often to start again after a crash; a mistake (exit code 2) or a signal is the end;
#                     crashes before a run of half an hour no longer count
#   --dry_run         print the command and run nothing
#
# Ctrl-C and SIGTERM ask the run to save and end. PYTHON names the interpreter (default: python).

set -euo pipefail
LAUNCH="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$LAUNCH/common.sh"

PYTHON="${PYTHON:-python}"
GPUS='' LOG='' MAX_CRASHES=3

while (($#)); do
    case "$1" in
        -h | --help) show_help && exit 0 ;;
        --) shift && break ;;
        --gpus=?*) GPUS="${1#*=}" ;;
        --log=?*) LOG="${1#*=}" ;;
        --max_crashes=*) MAX_CRASHES="${1#*=}" ;;
        --dry_run) DRY_RUN=yes ;;
        *) fail "unknown argument $1; the training command goes after --; see --help" ;;
    esac
    shift
done
[[ $MAX_CRASHES =~ ^[0-9]+$ ]] || fail "--max_crashes=$MAX_CRASHES: give a whole number"
[[ ! $GPUS || $GPUS =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "--gpus=$GPUS: give numbers with commas, such as --gpus=0,1"
training_arguments "$@"
needs_program nvidia-smi 'this machine has no NVIDIA driver'
needs_program "$PYTHON" 'set PYTHON to an interpreter that has endistill-jax[gpu]'

# JAX would silently fall back to the CPU, so it is set to use GPUs or fail.
command=(env JAX_PLATFORMS=cuda ${GPUS:+"CUDA_VISIBLE_DEVICES=$GPUS"} "$PYTHON" -m endistill_jax.main "${ARGUMENTS[@]}")
if [[ $DRY_RUN ]]; then
    quoted "${command[@]}"
    exit
fi
if [[ $LOG ]]; then
    mkdir -p "$(dirname "$LOG")"
    exec > >(tee --append --ignore-interrupts "$LOG") 2>&1 # it receives Ctrl-C too, while the run still saves
fi

# A process started with & receives neither Ctrl-C nor what is sent to this script alone: both are passed on, and the run
# saves before it ends.
CHILD='' ASKED=''
trap 'ASKED=yes; if [[ $CHILD ]]; then kill -TERM "$CHILD" 2>/dev/null || true; fi' INT TERM

# Sets CODE.
run_once() {
    "${command[@]}" &
    CHILD=$!
    while kill -0 "$CHILD" 2>/dev/null; do wait "$CHILD" || true; done
    CODE=0
    wait "$CHILD" || CODE=$?
}

crashes=0 CODE=143
while [[ ! $ASKED ]]; do
    started="$(now)"
    run_once
    case "$CODE" in 0 | 2 | 130 | 143) break ;; esac
    if steady "$started"; then crashes=0; fi
    crashes=$((crashes + 1))
    if [[ $ASKED ]] || ((crashes > MAX_CRASHES)); then break; fi
    say "ended with $CODE; starting again ($crashes of $MAX_CRASHES)"
done
exit "$CODE"
