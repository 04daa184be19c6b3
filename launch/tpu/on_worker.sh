#!/usr/bin/env bash
# Runs on a TPU worker, where launch/tpu.sh puts it: installs the package, starts the training command, reports its state.
#
#   on_worker.sh install PACKAGE [EXTRAS]   an archive in this folder and extras such as tpu,gcs, or what pip installs
#   on_worker.sh start JOB ARGUMENT... starts `python -m endistill_jax.main ARGUMENT...` and returns; JOB is any word
#   on_worker.sh state                 one line: endistill-worker HOST JOB running | exit CODE | lost | absent
#   on_worker.sh log LINES [follow]    the end of its output
#   on_worker.sh stop                  SIGTERM, on which it saves and ends; SIGKILL if it has not after five minutes,
#                                      or $ENDISTILL_STOP_SECONDS
#
# The folder of this script holds: environment/, job (the word), log (of all starts), exit (the command's exit code,
# written when it ended), and running.lock, locked as long as the command lives. A job without exit code that nobody
# holds the lock for is lost: the machine was restarted under it.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
PYTHON_VERSION=3.12 # the images' own is older than the package needs

install() {
    local package="$1"
    export PATH="$HOME/.local/bin:$PATH"
    command -v uv >/dev/null || python3 -m pip install --user --quiet 'uv>=0.5,<1'
    [[ -x environment/bin/python ]] || uv venv --quiet --python "$PYTHON_VERSION" environment
    if [[ -f $package ]]; then
        rm -rf source && mkdir source
        tar --extract --gzip "--file=$package" --directory=source
        package="endistill-jax[$2] @ file://$PWD/source"
    fi
    uv pip install --quiet --python environment/bin/python "$package"
}

start() {
    local job="$1"
    shift
    exec 9>running.lock
    flock --nonblock 9 || { echo "a command runs already on $(hostname)" >&2 && exit 4; }
    rm -f exit
    echo "$job" >job
    # A session of its own, so that neither the end of the connection nor a signal to this script reaches it. It
    # inherits the lock.
    setsid nohup bash on_worker.sh record "$@" >>log 2>&1 </dev/null &
    echo "$!" >process_group
}

# The training command, and its exit code in a file that is written atomically.
record() {
    local code=0
    trap : TERM # the command decides what SIGTERM means; its exit code is still written
    environment/bin/python -m endistill_jax.main "$@" || code=$?
    echo "$code" >exit.part
    mv exit.part exit
}

is_running() { [[ -e running.lock ]] && ! flock --nonblock running.lock true; }

state() {
    local became=absent
    if is_running; then
        became=running
    elif [[ -e exit ]]; then
        became="exit $(cat exit)"
    elif [[ -e job ]]; then
        became=lost
    fi
    echo "endistill-worker $(hostname) $(cat job 2>/dev/null || echo none) $became"
}

log() { tail --lines="$1" ${2:+--follow} log; }

stop() {
    local seconds="${ENDISTILL_STOP_SECONDS:-300}"
    is_running || return 0
    kill -TERM -- "-$(<process_group)"
    while is_running && ((seconds-- > 0)); do sleep 1; done
    if is_running; then kill -KILL -- "-$(<process_group)"; fi
}

case "${1:-}" in
    install | start | record | state | log | stop) "$@" ;;
    *) sed -n '2,/^[^#]/s/^# \{0,1\}//p' on_worker.sh && exit 2 ;;
esac
