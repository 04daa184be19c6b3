# shellcheck shell=bash disable=SC2153  # the variables in capitals are set by launch/tpu.sh
# The workers: all machines of all slices, reached over ssh. Sourced by launch/tpu.sh.

ON_WORKER='bash endistill/on_worker.sh'

DONE=endistill-done

# Shorter timeouts for a machine that is gone than those of ssh, and than the ten retries of gcloud.
IMPATIENT=(-oConnectTimeout=20 -oServerAliveInterval=30)

# on_workers COMMAND [NODE WORKER]: runs a shell command on every worker of every slice at once, or on one.
on_workers() {
    run "${QUEUE[@]}" ssh "$NAME" "${PLACE[@]}" "--node=${2:-all}" "--worker=${3:-all}" "${IMPATIENT[@]/#/--ssh-flag=}" \
        "${SSH_FLAGS[@]}" "--command=$1"
}

# on_every_worker COMMAND: fails unless every worker has done it. Where gcloud cannot reach a slice at all it warns and
# succeeds; so each worker says that it is done, and they are counted.
on_every_worker() {
    local listing answers code=0
    if [[ $DRY_RUN ]]; then
        ask_names
        ask_slices
        on_workers "$1 && echo $DONE"
        return
    fi
    listing="$(slices)" && [[ $listing != *' MISSING '* ]] || return 1
    answers="$(on_workers "$1 && echo $DONE")" || code=$?
    grep --invert-match --line-regexp "$DONE" <<<"$answers" >&2 || true
    ((code == 0 && $(grep --only-matching "$DONE" <<<"$answers" | wc -l) == $(worker_count "$listing")))
}

# The folder of everything on a worker; the first connection to fresh machines, which take minutes to answer. An earlier
# archive goes: a worker that is not sent the new one must not install that.
reach_workers() { patiently "$SSH_ATTEMPTS" on_every_worker 'mkdir -p endistill && rm -f endistill/*.tgz'; }

# What workers are sent, into the folder PACKED. Of this checkout what the package is built from, uncommitted changes
# included.
pack() {
    run mkdir -p "$PACKED"
    run cp "$LAUNCH/tpu/on_worker.sh" "$PACKED/"
    [[ $SOURCE ]] || run tar --create --gzip "--file=$PACKED/checkout.tgz" "--directory=$(dirname "$LAUNCH")" \
        --exclude=__pycache__ pyproject.toml README.md LICENSE endistill_jax gin tasks ||
        fail "$(dirname "$LAUNCH") could not be packed" 1
}

setup() {
    PACKED="${TMPDIR:-/tmp}/endistill_$NAME"
    pack
    install
}

# Sends what was packed to all workers and installs it; may be repeated.
install() {
    local files=("$PACKED/on_worker.sh") package=("$SOURCE")
    if [[ ! $SOURCE ]]; then
        files+=("$PACKED/checkout.tgz")
        package=(checkout.tgz "tpu,gcs${EXTRAS:+,$EXTRAS}")
    fi
    reach_workers ||
        fail "no connection to all workers of $NAME after $SSH_ATTEMPTS attempts; see launch/tpu.sh status $NAME" 1
    patiently "$SSH_ATTEMPTS" run "${QUEUE[@]}" scp "${files[@]}" "$NAME:endistill/" "${PLACE[@]}" \
        --node=all --worker=all "${IMPATIENT[@]/#/--scp-flag=}" "${SSH_FLAGS[@]}" ||
        fail "the package could not be copied to all workers of $NAME" 1
    patiently 3 on_every_worker "$ON_WORKER install $(quoted "${package[@]}")" ||
        fail "the package could not be installed on all workers of $NAME" 1
}

# Names the training command, so that a worker's report on another command is not mistaken for this one's.
job_id() { quoted "${ARGUMENTS[@]}" | sha256sum | cut -c 1-12; }

submit() {
    local environment="${ENVIRONMENT[*]:+$(quoted env "${ENVIRONMENT[@]}") }"
    on_every_worker "$environment$ON_WORKER start $(job_id) $(quoted "${ARGUMENTS[@]}")" ||
        fail "not started on all workers of $NAME: set up first, or stop what runs there: launch/tpu.sh stop $NAME" 1
}

# A machine that was recreated during the run has no script, and nothing to stop.
stop() {
    on_every_worker "$ON_WORKER stop || test ! -e endistill/on_worker.sh" || fail "not stopped on all workers of $NAME" 1
}

logs() { on_workers "$ON_WORKER log $LINES_SHOWN $FOLLOW" "$SLICE" "$WORKER"; }

# Prints a line a worker: its host, the job it knows of, and what became of that (see tpu/on_worker.sh).
worker_states() {
    local command="$ON_WORKER state 2>/dev/null || echo endistill-worker \$(hostname) none absent"
    if [[ $DRY_RUN ]]; then
        on_workers "$command"
    else
        on_workers "$command" | sed -n 's/^endistill-worker //p'
    fi
}

# outcome JOB WORKERS STATES: what became of a job in a word, or two where it ended by itself:
# unreachable, other, mistake, absent, incomplete, interrupted, crashed CODE, running or finished.
outcome() {
    local job="$1" workers="$2" host its_job state code count=0 running=0 finished=0 absent=0
    local other='' mistake='' interrupted='' crashed=''
    while read -r host its_job state code; do
        [[ $host ]] || continue
        count=$((count + 1))
        case "$state:$code" in
            running:*) if [[ $its_job == "$job" ]]; then running=$((running + 1)); else other=yes; fi ;;
            *) if [[ $its_job != "$job" ]]; then absent=$((absent + 1)) && continue; fi ;;&
            exit:0) finished=$((finished + 1)) ;;
            exit:2) mistake=yes ;;
            exit:130 | exit:143 | lost:*) interrupted=yes ;;
            exit:*) crashed="$code" ;;
        esac
    done <<<"$3"
    if ((count == 0 || count < workers)); then
        echo unreachable
    elif [[ $other ]]; then
        echo other
    elif [[ $mistake ]]; then
        echo mistake
    elif ((absent == count)); then
        echo absent
    elif ((absent)); then
        echo incomplete
    elif [[ $interrupted ]]; then
        echo interrupted
    elif [[ $crashed ]]; then
        echo "crashed $crashed"
    elif ((running)); then
        echo running
    else
        echo finished
    fi
}

status() {
    if [[ $DRY_RUN ]]; then
        observing_commands
        return
    fi
    local state
    state="$(request_state)"
    echo "request $NAME: $state"
    if [[ $state == FAILED ]]; then failure_reason; fi
    if [[ $state == ACTIVE ]]; then
        slices | sed 's/^/slice /'
        worker_states | sed 's/^/worker /' || fail "not all workers of $NAME could be reached" 1
    fi
}

# What --dry_run shows of looking.
observing_commands() {
    ask_state
    ask_names
    ask_slices
    worker_states
}
