# shellcheck shell=bash disable=SC2153  # the variables in capitals are set by launch/tpu.sh
# Until the run has finished: look, do the one thing that is next, look again. Nothing is remembered but the number of
# crashes, so the same command may be ended and given again at any moment, on another machine too. Sourced by tpu.sh.

resume() {
    JOB="$(job_id)"
    CRASHES=0 FAILED_STARTS=0 LAST_SEEN=''
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
        if [[ $state != "$before" ]]; then say "$NAME is $state"; fi
        before="$state"
        case "$state" in
            NONE) ask_again ;;
            FAILED)
                refusal "$(failure_reason)"
                case "$REFUSAL" in capacity) ;; other) failed_start ;; *) done_with 1 ;; esac
                clear_request
                ;;
            SUSPENDED) clear_request ;;
            ACTIVE) look_after_workers ;;
            *) pause ;;
        esac
    done
}

# Asks for slices; goes on if there are none to be had now, ends if there never will be.
ask_again() {
    if ! request_slices; then
        [[ $REFUSAL == capacity ]] || exit 1
        pause 8
    fi
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
    if [[ $became != "$LAST_SEEN" ]]; then say "the run is $became"; fi
    LAST_SEEN="$became"
    step "$became"
}

# step OUTCOME
step() {
    case "$1" in
        finished) done_with 0 ;;
        running) FAILED_STARTS=0 && pause ;;
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
            CRASHES=$((CRASHES + 1))
            if ((CRASHES > MAX_CRASHES)); then
                logs || true
                done_with "${1#crashed }"
            fi
            attempt stop submit
            ;;
        *) pause ;; # unreachable: slices that were granted are never given up for a bad connection
    esac
}

# attempt COMMAND...: one after the other. Ends the script once too many attempts in a row have failed.
attempt() {
    if (for command in "$@"; do "$command"; done); then return; fi
    failed_start
    pause
}

failed_start() {
    FAILED_STARTS=$((FAILED_STARTS + 1))
    if ((FAILED_STARTS > MAX_CRASHES)); then done_with 1; fi
}

# done_with EXIT_CODE
done_with() {
    if [[ $DELETE_WHEN_DONE ]]; then
        delete_request || say "$NAME could not be deleted and still costs money"
    else
        say "$NAME still costs money: launch/tpu.sh delete $NAME"
    fi
    exit "$1"
}
