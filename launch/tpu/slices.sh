# shellcheck shell=bash disable=SC2153  # the variables in capitals are set by launch/tpu.sh
# The slices: requested, observed and given back as one queued resource. Sourced by launch/tpu.sh.

QUEUE=(gcloud compute tpus queued-resources)

# The software of a TPU VM, by the accelerator type (https://cloud.google.com/tpu/docs/runtimes).
default_runtime_version() {
    case "$TYPE" in
        v6e-*) echo v2-alpha-tpuv6e ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        *) echo tpu-ubuntu2204-base ;;
    esac
}

# Asks for the slices and returns; the request then waits in the cloud's queue. Fails with one line that says why.
request_slices() {
    local nodes=("--node-id=$NAME") message
    if ((SLICES > 1)); then nodes=("--node-count=$SLICES" "--node-prefix=$NAME"); fi
    local command=("${QUEUE[@]}" create "$NAME" "${PLACE[@]}" "--accelerator-type=$TYPE"
        "--runtime-version=$RUNTIME_VERSION" "${nodes[@]}" ${SPOT:+--spot} --async "${CREATE_FLAGS[@]}")
    if [[ $DRY_RUN ]]; then
        quoted "${command[@]}"
    elif message="$("${command[@]}" 2>&1)"; then
        say "asked for $SLICES x $TYPE in $ZONE"
    else
        refusal "$message"
        return 1
    fi
}

# kind_of_refusal MESSAGE: capacity, quota, permission, exists, or other, which may pass by itself.
kind_of_refusal() {
    shopt -s nocasematch
    case "$1" in
        *'per minute'* | *rate_limit* | *ratelimit*) echo other ;; # a quota of requests
        *capacity* | *stockout* | *'not enough'* | *'insufficient resources'*) echo capacity ;;
        *quota*) echo quota ;;
        *already_exists* | *'already exists'*) echo exists ;;
        *permission_denied* | *unauthenticated* | *'active account'* | *reauthenticat* | *'auth tokens'*) echo permission ;;
        *) echo other ;;
    esac
}

# refusal MESSAGE: what the cloud said in one line, what to do about it, and REFUSAL for whoever decides on it.
refusal() {
    local message="${1//$'\n'/ }"
    REFUSAL="$(kind_of_refusal "$message")"
    case "$REFUSAL" in
        capacity) say "no $TYPE is free in $ZONE now; wait, or try another zone, type or --spot: $message" ;;
        quota)
            say "the quota of project $PROJECT for $TYPE in $ZONE is too small; ask for more: $message"
            ;;
        exists) say "$NAME exists already; see launch/tpu.sh status $NAME, or take another name" ;;
        permission)
            say "project $PROJECT does not let you do this; see gcloud auth login, and the role tpu.admin: $message"
            ;;
        other) say "refused: $message" ;;
    esac
}

# What is asked of the cloud; with --dry_run the commands.
ask_state() { run "${QUEUE[@]}" describe "$NAME" "${PLACE[@]}" '--format=value(state.state)'; }
ask_names() { run "${QUEUE[@]}" describe "$NAME" "${PLACE[@]}" '--format=value(tpu.nodeSpec[].nodeId)'; }
ask_slices() {
    run gcloud compute tpus tpu-vm list "${PLACE[@]}" '--format=value(name.basename(),state,networkEndpoints.len())'
}

# Prints the state of the request: NONE if there is none, UNKNOWN if it could not be asked for, DENIED if you may not ask.
request_state() {
    local answer errors
    errors="$(mktemp)"
    if answer="$(ask_state 2>"$errors")"; then
        echo "$answer"
    elif grep --quiet --ignore-case 'not_found\|not found' "$errors"; then
        echo NONE
    else
        say "the state of $NAME could not be read: $(tr '\n' ' ' <"$errors")"
        if [[ $(kind_of_refusal "$(<"$errors")") == permission ]]; then echo DENIED; else echo UNKNOWN; fi
    fi
    rm -f "$errors"
}

# allowed STATE: ends the script where twenty looks in a row were denied, as after a login has expired.
allowed() {
    if [[ $1 == DENIED ]]; then DENIED_LOOKS=$((${DENIED_LOOKS:-0} + 1)); else DENIED_LOOKS=0; fi
    ((DENIED_LOOKS < 20)) ||
        fail "project $PROJECT no longer lets you see $NAME, which stays as it is: gcloud auth login, and start again" 1
}

failure_reason() { "${QUEUE[@]}" describe "$NAME" "${PLACE[@]}" '--format=value(state.failedData.error.message)' 2>&1; }

# Prints a line for each slice of the request, whose names it knows itself: name, state, how many workers it has; the
# state MISSING where there is none of that name. Fails if it is unknown.
slices() {
    local names listing name
    names="$(ask_names)" && listing="$(ask_slices)" || return 1
    [[ $names ]] || { say "$NAME does not list its slices" && return 1; }
    for name in ${names//;/ }; do
        awk -v name="$name" '$1 == name { print $1, $2, $3; found = 1 } END { if (!found) print name, "MISSING", 0 }' <<<"$listing"
    done
}

# lost_slices LISTING: those of the listing that will not come back by themselves.
lost_slices() {
    awk '$2 ~ /^(PREEMPTED|TERMINATED|STOPPED|STOPPING|DELETING|UNKNOWN|MISSING)$/ { print $1, $2 }' <<<"$1"
}

# worker_count LISTING
worker_count() { awk '{ workers += $3 } END { print workers + 0 }' <<<"$1"; }

# Succeeds, too, where there is nothing left to delete.
delete_request() { run "${QUEUE[@]}" delete "$NAME" "${PLACE[@]}" --force || [[ $(request_state) == NONE ]]; }

create() {
    request_slices || exit "$([[ $REFUSAL == exists ]] && echo 2 || echo 1)"
    if [[ $DRY_RUN ]]; then
        ask_state
        return
    fi
    trap 'say "the request stays in the queue; launch/tpu.sh delete $NAME takes it back"; exit 130' INT
    pause # what was just asked for is not always found at once
    local state before=''
    while :; do
        state="$(request_state)"
        allowed "$state"
        if [[ $state != "$before" ]]; then say "$NAME is $state"; fi
        before="$state"
        case "$state" in
            ACTIVE) return ;;
            FAILED) refusal "$(failure_reason)" && fail "launch/tpu.sh delete $NAME clears the failed request" 1 ;;
            NONE | SUSPENDING | SUSPENDED) fail "$NAME was taken away before it was used; delete it and ask again" 1 ;;
        esac
        pause
    done
}

delete() { delete_request; }
