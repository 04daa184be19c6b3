#!/usr/bin/env bash
# Runs a training command as several processes on this machine, joined by jax.distributed: what several hosts would do.
#
#   launch/local_multiprocess.sh 2 -- --gin_file=gin/miniend_demo.gin --gin.MODEL_DIR=/tmp/demo
#
#   --devices_per_process=1   CPU devices of each process
#   --log_dir=FOLDER          a log a process, process_0.log and so on; default: a fresh folder under ${TMPDIR:-/tmp}
#   --port=PORT               where process 0 listens for the others; default: a free one
#   --grace_seconds=120       how long processes may take to save and end, when they are asked to or one has failed
#   --dry_run                 print the commands and run none
#
# Process 0 is shown on the screen too. If a process fails, the others are ended and its exit code is that of this
# script; Ctrl-C and SIGTERM ask all of them to save and end. PYTHON names the interpreter (default: python).

set -euo pipefail
LAUNCH="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$LAUNCH/common.sh"

PYTHON="${PYTHON:-python}"
PROCESSES='' DEVICES=1 LOG_DIR='' PORT='' GRACE_SECONDS=120

read_command_line() {
    while (($#)); do
        case "$1" in
            -h | --help) show_help && exit 0 ;;
            --) shift && break ;;
            --devices_per_process=*) DEVICES="${1#*=}" && positive_number devices_per_process "$DEVICES" ;;
            --log_dir=?*) LOG_DIR="${1#*=}" ;;
            --port=*) PORT="${1#*=}" && positive_number port "$PORT" ;;
            --grace_seconds=*) GRACE_SECONDS="${1#*=}" && positive_number grace_seconds "$GRACE_SECONDS" ;;
            --dry_run) DRY_RUN=yes ;;
            --*) fail "unknown flag $1; the training command goes after --; see --help" ;;
            *)
                [[ ! $PROCESSES ]] || fail "$1: one number is enough; the training command goes after --"
                PROCESSES="$1"
                ;;
        esac
        shift
    done
    [[ $PROCESSES =~ ^[1-9][0-9]*$ ]] ||
        fail "${PROCESSES:-nothing}: give the number of processes, such as: $PROGRAM 2 -- ..."
    training_arguments "$@"
}

free_port() { "$PYTHON" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

# process INDEX: the command of one process, into PROCESS.
process() {
    PROCESS=(env "ENDISTILL_COORDINATOR=127.0.0.1:$PORT" "ENDISTILL_NUM_PROCESSES=$PROCESSES" "ENDISTILL_PROCESS_ID=$1"
        JAX_PLATFORMS=cpu "XLA_FLAGS=${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$DEVICES"
        "$PYTHON" -m endistill_jax.main "${ARGUMENTS[@]}")
}

start_processes() {
    local index
    for ((index = 0; index < PROCESSES; index++)); do
        process "$index"
        : >"$LOG_DIR/process_$index.log" # there before tail looks for it
        "${PROCESS[@]}" >"$LOG_DIR/process_$index.log" 2>&1 &
        PIDS+=("$!")
    done
    tail --lines=+1 --follow --sleep-interval=0.2 "--pid=${PIDS[0]}" "$LOG_DIR/process_0.log" &
    SCREEN=$!
}

alive() {
    local pid
    for pid in "${PIDS[@]}"; do
        if kill -0 "$pid" 2>/dev/null; then return 0; fi
    done
    return 1
}

# Ends what still runs: first asked to, then not.
end_all() {
    local waited=0
    kill -TERM "${PIDS[@]}" 2>/dev/null || true
    while alive && ((waited++ < GRACE_SECONDS * 5)); do sleep 0.2; done
    kill -KILL "${PIDS[@]}" 2>/dev/null || true
}

# Waits for all processes; on the first that fails ends the others and returns its exit code.
watch() {
    local index code
    local -A ended=()
    while ((${#ended[@]} < PROCESSES)); do
        for index in "${!PIDS[@]}"; do
            if [[ ${ended[$index]:-} ]] || kill -0 "${PIDS[$index]}" 2>/dev/null; then continue; fi
            code=0
            wait "${PIDS[$index]}" || code=$?
            ended[$index]=yes
            if ((code)); then
                say "process $index ended with $code: $(tail --lines=1 "$LOG_DIR/process_$index.log" | cut -c 1-200)"
                end_all
                return "$code"
            fi
        done
        sleep 0.2
    done
}

read_command_line "$@"
if [[ $DRY_RUN ]]; then
    PORT="${PORT:-PORT}"
    for ((index = 0; index < PROCESSES; index++)); do
        process "$index"
        quoted "${PROCESS[@]}"
    done
    exit 0
fi
needs_program "$PYTHON" 'set PYTHON to an interpreter that has endistill-jax'
PORT="${PORT:-$(free_port)}"
LOG_DIR="${LOG_DIR:-$(mktemp -d "${TMPDIR:-/tmp}/endistill_processes.XXXXXX")}"
mkdir -p "$LOG_DIR"
say "logs are in $LOG_DIR"
PIDS=()
# A process started with & does not receive Ctrl-C itself.
trap 'end_all; exit 130' INT
trap 'end_all; exit 143' TERM
start_processes
code=0
watch || code=$?
wait "$SCREEN" || true
exit "$code"
