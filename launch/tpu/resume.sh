# shellcheck shell=bash disable=SC2153  # the variables in capitals are set by launch/tpu.sh
# Until the run has finished: look, do the one thing that is next, look again. Nothing is remembered but how often
# and how long things went wrong, so the same command may be ended and given again at any moment, on another machine too. Sourced by tpu.sh.

resume() {
    JOB="$(job_id)"
    CRASHES=0 FAILED_STARTS=0 GRANTED='' STARTED=1 RUNNING_SINCE='' LAST_SEEN=''
    if [[ $DRY_RUN ]]; then
        request_slices
        observing_commands
        setup
        submit
        if [[ $DELETE_WHEN_DONE ]]; then delete_request; fi
        return
    fi
    trap 'say "no longer watching; the run goes on, and the same command watches it again"; exit 130' INT
    local before='' state
    while :; do
        state="$(request_state)"
        allowed "$state"
        if [[ $state != "$before" ]]; then say "$NAME is $state"; fi
        before="$state"
        case "$state" in
            NONE) ask_again ;;
            FAILED)
                refusal "$(failure_reason)"
                refused
                clear_request
                ;;
            SUSPENDED) clear_request ;;
            ACTIVE) GRANTED=yes && look_after_workers ;;
            *) pause ;;
        esac
    done
}

# Asks for slices. What was just asked for is not always found at once; to ask for it again would fail.
ask_again() {
    if request_slices; then pause; else refused; fi
}

# After a refusal: waits for capacity, ends where quota or permission is missing, and tries the rest some times more: a
# cloud that does not answer, or a request or a name of a slice that is there already, as after a request whose answer
# was lost. Once slices were granted quota is there; it may lag behind slices that have just been deleted.
refused() {
    case "$REFUSAL$GRANTED" in
        capacity*) pause 8 ;;
        quota | permission*) done_with 1 ;;
        *) failed_start ;;
    esac
}

# A request whose slices are gone cannot be filled again: it is deleted, and the next look finds none.
clear_request() {
    delete_request || say "$NAME could not be deleted; trying again"
    pause
}

# One look at slices that were granted, and one step.
look_after_workers() {
    local listing lost states became
    if ! listing="$(slices)"; then
        pause
        return
    fi
    lost="$(lost_slices "$listing")" ||
        fail "$NAME is not --slices=$SLICES slices; give the number it was created with, or take another name"
    if [[ $lost ]]; then
        say "taken away: ${lost//$'\n'/, }; asking for new slices"
        clear_request
        return
    fi
    states="$(worker_states)" || states=''
    became="$(outcome "$JOB" "$(worker_count "$listing")" "$states")"
    tell "$became"
    step "$became"
}

# tell OUTCOME: once, but that workers do not answer every ten minutes: somebody may have to look after them.
tell() {
    if [[ $1 != "$LAST_SEEN" ]]; then
        LAST_SEEN="$1" SEEN_SINCE="$(now)"
        TOLD="$SEEN_SINCE"
        say "the run is $1"
    elif [[ $1 == unreachable ]] && (($(now) - TOLD >= 600)); then
        TOLD="$(now)"
        say "workers of $NAME have not answered for $(((TOLD - SEEN_SINCE) / 60)) minutes"
    fi
}

# step OUTCOME
step() {
    case "$1" in running | unreachable) ;; *) RUNNING_SINCE='' ;; esac
    case "$1" in
        finished) done_with 0 ;;
        running) is_running && pause ;;
        mistake)
            (stop) || true
            logs || true
            done_with 2
            ;;
        other) fail "another command runs on $NAME; stop it first: launch/tpu.sh stop $NAME" ;;
        absent) attempt setup submit ;;
        # A machine that came back empty, or on which the command was not started: the others cannot go on without it.
        incomplete) attempt stop setup submit ;;
        # What is left of the run on other workers ends first: all of them start from the same checkpoint.
        interrupted) attempt stop submit ;;
        crashed*)
            # Seen again because it could not be started again, it is the same crash.
            CRASHES=$((CRASHES + STARTED))
            STARTED=0
            if ((CRASHES > MAX_CRASHES)); then
                logs || true
                done_with "${1#crashed }"
            fi
            attempt stop submit
            ;;
        *) pause ;; # unreachable: slices that were granted are never given up for a bad connection
    esac
}

is_running() {
    FAILED_STARTS=0 STARTED=1 RUNNING_SINCE="${RUNNING_SINCE:-$(now)}"
    if steady "$RUNNING_SINCE"; then CRASHES=0; fi
}

# attempt COMMAND...: one after the other.
attempt() {
    if (for command in "$@"; do "$command"; done); then STARTED=1; else failed_start; fi
}

# Ends the script once too many attempts in a row have failed; until then waits longer after each, from two minutes, so
# that an outage of some minutes is no end.
failed_start() {
    FAILED_STARTS=$((FAILED_STARTS + 1))
    if ((FAILED_STARTS > MAX_CRASHES)); then done_with 1; fi
    pause $((4 << (FAILED_STARTS < 4 ? FAILED_STARTS : 4)))
}

# done_with EXIT_CODE
done_with() {
    if [[ ! $DELETE_WHEN_DONE ]]; then
        say "$NAME costs money as long as it is there: launch/tpu.sh delete $NAME"
    elif ! patiently 10 delete_request; then
        say "error: $NAME could not be deleted, and its chips are still billed: launch/tpu.sh delete $NAME"
        exit "$(($1 ? $1 : 1))"
    fi
    exit "$1"
}
