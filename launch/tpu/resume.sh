# shellcheck shell=bash disable=SC2034,SC2153  # variables in capitals are shared by the files that launch/tpu.sh sources
# Until the run has finished: look, do the one thing that is next, look again. Nothing is remembered but how often and
# how long things went wrong, so the same command may be ended and given again at any moment, on another machine too.
# Sourced by launch/tpu.sh.

resume() {
    JOB="$(job_id)"
    CRASHES=0 FAILED_STARTS=0 GRANTED='' STARTED=1 LOST='' RUNNING_SINCE='' LAST_SEEN=''
    # Until the run was started or seen running, how it ended is what an earlier start came to: with what was packed
    # since, and other variables, it may do better.
    EARLIER=yes
    if [[ $DRY_RUN ]]; then
        request_slices
        observing_commands
        setup
        submit
        if [[ $DELETE_WHEN_DONE ]]; then delete_request; fi
        return
    fi
    # Packed once: what is changed in this checkout meanwhile is no part of the run. Not in /tmp, where files get old.
    local cache="${XDG_CACHE_HOME:-$HOME/.cache}/endistill"
    mkdir -p "$cache"
    PACKED="$(mktemp -d "$cache/$NAME.XXXXXX")"
    trap 'rm -rf "$PACKED"' EXIT
    pack
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
    (($(wc -l <<<"$listing") == SLICES)) ||
        fail "$NAME is not --slices=$SLICES slices; give the number it was created with, or take another name"
    lost="$(lost_slices "$listing")"
    if [[ $lost ]]; then
        lose "${lost//$'\n'/, }"
        return
    fi
    LOST=''
    states="$(worker_states)" || states=''
    became="$(outcome "$JOB" "$(worker_count "$listing")" "$states")"
    report "$became"
    step "$became"
}

# lose SLICES: gives the rest back too, once two looks in a row have found some lost; one listing may be wrong.
lose() {
    if [[ $LOST ]]; then
        say "taken away: $1; asking for new slices"
        LOST=''
        clear_request
    else
        LOST=yes
        pause
    fi
}

# report OUTCOME: prints it once; unresponsive workers every ten minutes, as they may need attention.
report() {
    if [[ $1 != "$LAST_SEEN" ]]; then
        LAST_SEEN="$1" SEEN_SINCE="$(now)"
        REPORTED="$SEEN_SINCE"
        say "the run is $1"
    elif [[ $1 == unreachable ]] && (($(now) - REPORTED >= 600)); then
        REPORTED="$(now)"
        say "workers of $NAME have not answered for $(((REPORTED - SEEN_SINCE) / 60)) minutes"
    fi
}

# step OUTCOME
step() {
    case "$1" in running | unreachable) ;; *) RUNNING_SINCE='' ;; esac
    case "$1" in
        finished) done_with 0 ;;
        running) is_running && pause ;;
        mistake)
            if [[ $EARLIER ]]; then
                attempt stop install submit
                return
            fi
            (stop) || true
            logs || true
            done_with 2
            ;;
        other) fail "another command runs on $NAME; stop it first: launch/tpu.sh stop $NAME" ;;
        absent) attempt install submit ;;
        # A machine that came back empty, or on which the command was not started: the others cannot go on without it.
        incomplete) attempt stop install submit ;;
        # What is left of the run on other workers ends first: all of them start from the same checkpoint.
        interrupted) attempt stop ${EARLIER:+install} submit ;;
        crashed*)
            # Seen again because it could not be started again, it is the same crash.
            CRASHES=$((CRASHES + STARTED))
            STARTED=0
            if ((CRASHES > MAX_CRASHES)); then
                logs || true
                done_with "${1#crashed }"
            fi
            attempt stop ${EARLIER:+install} submit
            ;;
        *) pause ;; # unreachable: slices that were granted are never given up for a bad connection
    esac
}
