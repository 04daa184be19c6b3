# shellcheck shell=bash disable=SC2034,SC2153  # variables in capitals are shared by the files that launch/tpu.sh sources
# What resume makes of failures: how often it tries again, how long it waits before, when it ends. Sourced by
# launch/tpu.sh.

# After a refusal: waits for capacity, ends where quota or permission is missing, and tries the rest some times more: a
# cloud that does not answer, or a request or a name of a slice that is there already, as after a request whose answer
# was lost. Once slices were granted quota is there; it may lag behind slices that have just been deleted.
refused() {
    case "$REFUSAL$GRANTED" in
        capacity*) pause 8 ;;
        quota) done_with 1 ;;
        permission*) exit 1 ;; # which is missing for giving slices back too
        *) failed_start ;;
    esac
}

is_running() {
    FAILED_STARTS=0 STARTED=1 EARLIER='' RUNNING_SINCE="${RUNNING_SINCE:-$(now)}"
    if steady "$RUNNING_SINCE"; then CRASHES=0; fi
}

# attempt COMMAND...: one after the other.
attempt() {
    if (for command in "$@"; do "$command"; done); then STARTED=1 EARLIER=''; else failed_start; fi
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
