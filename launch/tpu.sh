#!/usr/bin/env bash
# Trains on Cloud TPU slices: one queued resource, one training command.
#
#   launch/tpu.sh create NAME --type=v5litepod-64 [--slices=2] [--spot]
#       request slices, wait until they are there
#   launch/tpu.sh setup NAME
#       install this checkout on every worker of every slice
#   launch/tpu.sh submit NAME -- --gin_file=gin/miniend_3b.gin --gin.MODEL_DIR=gs://BUCKET/student ...
#       start the training command on all workers; it outlives the connection. Its gin files are those of this
#       checkout's gin/, as setup sent them
#   launch/tpu.sh status NAME
#       the request, the slices, and the command on every worker
#   launch/tpu.sh logs NAME [--slice=0] [--worker=0] [--lines=100] [--follow]
#       what the command says on one worker
#   launch/tpu.sh stop NAME
#       ask the command to save and end; slices stay
#   launch/tpu.sh resume NAME --type=v5litepod-64 [flags of create and setup] -- --gin_file=...
#       all of the above until the run has finished: slices that were taken away are requested again
#   launch/tpu.sh delete NAME
#       give the slices back
#
# Every command:
#   --project=PROJECT   default: $CLOUDSDK_CORE_PROJECT
#   --zone=ZONE         default: $CLOUDSDK_COMPUTE_ZONE
#   --dry_run           print the commands and run none
#   --poll_seconds=15   between two looks at a state; also the first pause before trying again
# create, resume:
#   --type=TYPE         accelerator type of one slice: v5litepod-64 (or v5e-64), v4-64, v5p-32, v6e-16
#   --slices=1          how many slices work on the one run, whose mesh must spread data over them, as with
#                       --gin.MESH='(2, -1, 1)' or (-1, 1, 1) for two
#   --spot              cheaper machines that can be taken away; the default is on demand
#   --runtime_version=  default: the one for JAX on this type
#   --create_flag=FLAG  repeatable; handed to `gcloud compute tpus queued-resources create`, such as
#                       --create_flag=--network=NET, --create_flag=--reserved, --create_flag=--valid-until-duration=6h
# setup, resume:
#   --extras=hf         extras of the package in addition to tpu and gcs; hf for a TEACHER by its name on the Hugging Face hub
#   --source=PACKAGE    what pip installs instead of this checkout: 'endistill-jax[tpu,gcs] @ git+https://...'
# submit, resume:
#   --env=NAME=VALUE    repeatable; an environment variable of the training command, such as LIBTPU_INIT_ARGS
# setup, submit, status, logs, stop, resume:
#   --ssh_flag=FLAG     repeatable; handed to `... ssh` and `... scp`, such as --ssh_flag=--tunnel-through-iap
# setup, submit, resume:
#   --ssh_attempts=10   how often a connection is tried before giving up
# resume:
#   --max_crashes=3     how often the command may end by itself, neither finished nor stopped, before giving up;
#                       half an hour of running makes up for it. As often in a row may a start fail
#   --delete_when_done  give the slices back once the run has finished or failed for good
#
# Exit codes: 0 done; 2 a mistake of yours, here or in the training command; 1 the cloud said no; for resume after too
# many crashes, the exit code of the training command. See docs/launching.md.

set -euo pipefail
LAUNCH="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$LAUNCH/common.sh"
# shellcheck source=launch/tpu/slices.sh
source "$LAUNCH/tpu/slices.sh"
# shellcheck source=launch/tpu/workers.sh
source "$LAUNCH/tpu/workers.sh"
# shellcheck source=launch/tpu/budgets.sh
source "$LAUNCH/tpu/budgets.sh"
# shellcheck source=launch/tpu/resume.sh
source "$LAUNCH/tpu/resume.sh"

PROJECT="${CLOUDSDK_CORE_PROJECT:-}"
ZONE="${CLOUDSDK_COMPUTE_ZONE:-}"
TYPE='' RUNTIME_VERSION='' SPOT='' SLICES=1
SOURCE='' EXTRAS='' SSH_ATTEMPTS=10
SLICE=0 WORKER=0 LINES_SHOWN=100 FOLLOW=''
MAX_CRASHES=3 DELETE_WHEN_DONE=''
CREATE_FLAGS=() SSH_FLAGS=() ENVIRONMENT=() ARGUMENTS=()

declare -A TAKES=(
    [create]='type runtime_version slices spot create_flag'
    [setup]='source extras ssh_flag ssh_attempts'
    [submit]='env ssh_flag ssh_attempts'
    [status]='ssh_flag'
    [logs]='slice worker lines follow ssh_flag'
    [stop]='ssh_flag'
    [resume]='type runtime_version slices spot create_flag source extras env ssh_flag ssh_attempts max_crashes
        delete_when_done'
    [delete]=''
)

# flag WORD: sets what a flag sets.
flag() {
    local name="${1#--}" value="${1#*=}"
    name="${name%%=*}"
    [[ " ${TAKES[$COMMAND]//$'\n'/ } project zone dry_run poll_seconds " == *" $name "* ]] ||
        fail "$COMMAND does not take $1; see --help"
    case "$1" in
        --project=?*) PROJECT="$value" ;;
        --zone=?*) ZONE="$value" ;;
        --type=?*) TYPE="${value/#v5e-/v5litepod-}" ;;
        --runtime_version=?*) RUNTIME_VERSION="$value" ;;
        --slices=*) positive_number slices "$value" && SLICES="$value" ;;
        --spot) SPOT=yes ;;
        --create_flag=--?*) CREATE_FLAGS+=("$value") ;;
        --source=?*) SOURCE="$value" ;;
        --extras=[a-z]*) EXTRAS="$value" ;;
        --env=*) environment_variable "$value" && ENVIRONMENT+=("$value") ;;
        --ssh_flag=--?*) SSH_FLAGS+=("$value") ;;
        --ssh_attempts=*) positive_number ssh_attempts "$value" && SSH_ATTEMPTS="$value" ;;
        --slice=*) numbered slice "$value" && SLICE="$value" ;;
        --worker=*) numbered worker "$value" && WORKER="$value" ;;
        --lines=*) positive_number lines "$value" && LINES_SHOWN="$value" ;;
        --follow) FOLLOW=follow ;;
        --max_crashes=*) positive_number max_crashes "$value" && MAX_CRASHES="$value" ;;
        --delete_when_done) DELETE_WHEN_DONE=yes ;;
        --poll_seconds=*) positive_seconds poll_seconds "$value" && POLL_SECONDS="$value" ;;
        --dry_run) DRY_RUN=yes ;;
        *) fail "$1: a value is missing, or one too many; see --help" ;;
    esac
}

read_command_line() {
    COMMAND="${1:-}"
    case "$COMMAND" in
        -h | --help | help) show_help && exit 0 ;;
        '') fail 'give a command: create, setup, submit, status, logs, stop, resume or delete; see --help' ;;
    esac
    [[ -v TAKES[$COMMAND] ]] ||
        fail "$COMMAND is no command; give create, setup, submit, status, logs, stop, resume or delete"
    shift
    NAME=''
    while (($#)); do
        case "$1" in
            -h | --help) show_help && exit 0 ;;
            --) shift && break ;;
            --*) flag "$1" ;;
            *) [[ ! $NAME ]] || fail "$1: one name is enough; the training command goes after --" && NAME="$1" ;;
        esac
        shift
    done
    if [[ $COMMAND == submit || $COMMAND == resume ]]; then
        training_arguments "$@"
        needs_bucket
        needs_known_gin_files package
    elif (($#)); then
        fail "$COMMAND takes no training command"
    fi
}

check_command_line() {
    [[ $NAME ]] || fail "give the slices a name: launch/tpu.sh $COMMAND NAME ..."
    valid_name "$NAME"
    given project "$PROJECT" 'your Google Cloud project, or set CLOUDSDK_CORE_PROJECT'
    given zone "$ZONE" 'a zone that has this type of TPU, or set CLOUDSDK_COMPUTE_ZONE'
    if [[ $COMMAND == create || $COMMAND == resume ]]; then
        given type "$TYPE" 'the accelerator type of one slice, such as v5litepod-64'
        [[ $TYPE =~ ^v([234]|5litepod|5p|6e)-[1-9][0-9]*$ ]] ||
            fail "--type=$TYPE is no accelerator type; they look like v4-64, v5litepod-64, v5p-32, v6e-16"
        RUNTIME_VERSION="${RUNTIME_VERSION:-$(default_runtime_version)}"
    fi
    [[ ! $SOURCE || ! $EXTRAS ]] || fail "--extras=$EXTRAS: name them in --source, as in endistill-jax[tpu,gcs,$EXTRAS]"
    needs_program gcloud 'see https://cloud.google.com/sdk/docs/install'
    PLACE=("--project=$PROJECT" "--zone=$ZONE" --quiet)
}

read_command_line "$@"
check_command_line
"$COMMAND"
