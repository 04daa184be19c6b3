#!/usr/bin/env bash
# Submits a training command to a GKE cluster with TPU slices as a JobSet, without XPK: fills in launch/gke_jobset.yaml
# and hands it to kubectl.
#
#   launch/gke_jobset.sh NAME --topology=v5e:4x4 --image=IMAGE -- \
#       --gin_file=gin/miniend_3b.gin --gin.MODEL_DIR=gs://BUCKET/student --gin.TEACHER=gs://BUCKET/t5_v1_1_xl \
#       --gin.DATA_DIR=gs://BUCKET/tensorflow_datasets
#
#   --topology=GENERATION:TOPOLOGY   of one slice, as the node pool has it: v4:2x2x4, v5e:4x4, v5p:2x2x2, v6e:4x4
#   --slices=1             how many slices work on the one run; a node pool each. The run's mesh must spread data over
#                          them, as with --gin.MESH='(2, -1, 1)' or (-1, 1, 1) for two
#   --chips_per_host=4     chips of one machine; 4 in all slices of several hosts
#   --image=IMAGE          a container image that has endistill-jax[tpu,gcs]
#   --service_account=default   the pods' Kubernetes service account. It does not open the bucket: with host networking
#                          the pods have the rights of their nodes, whose account and scopes must allow writing to it
#   --env=NAME=VALUE       repeatable; an environment variable of the training command, such as LIBTPU_INIT_ARGS
#   --spot                 node pools of Spot machines
#   --max_restarts=100     how often the run is started again; a mistake (exit code 2) ends it at once
#   --dry_run              print the manifest and submit nothing
#
# kubectl's own context says which cluster and namespace. The cluster needs JobSet 0.6 or newer. See it with
# `kubectl get jobset NAME`, end it with `kubectl delete jobset NAME`, which must come before it is submitted again.

set -euo pipefail
LAUNCH="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$LAUNCH/common.sh"

NAME='' TOPOLOGY='' SLICES=1 CHIPS_PER_HOST=4 IMAGE='' SERVICE_ACCOUNT=default SPOT='' MAX_RESTARTS=100
ENVIRONMENT=()

read_command_line() {
    while (($#)); do
        case "$1" in
            -h | --help) show_help && exit 0 ;;
            --) shift && break ;;
            --topology=?*) TOPOLOGY="${1#*=}" ;;
            --slices=*) SLICES="${1#*=}" && positive_number slices "$SLICES" ;;
            --chips_per_host=*) CHIPS_PER_HOST="${1#*=}" && positive_number chips_per_host "$CHIPS_PER_HOST" ;;
            --image=?*) IMAGE="${1#*=}" ;;
            --service_account=?*) SERVICE_ACCOUNT="${1#*=}" ;;
            --env=*) environment_variable "${1#*=}" && ENVIRONMENT+=("${1#*=}") ;;
            --spot) SPOT=yes ;;
            --max_restarts=*) MAX_RESTARTS="${1#*=}" && positive_number max_restarts "$MAX_RESTARTS" ;;
            --dry_run) DRY_RUN=yes ;;
            --*) fail "unknown flag $1; the training command goes after --; see --help" ;;
            *) [[ ! $NAME ]] || fail "$1: one name is enough; the training command goes after --" && NAME="$1" ;;
        esac
        shift
    done
    [[ $NAME ]] || fail 'give the run a name: launch/gke_jobset.sh NAME ...'
    valid_name "$NAME"
    given topology "$TOPOLOGY" 'the topology of one slice, such as v5e:4x4'
    given image "$IMAGE" 'a container image that has endistill-jax[tpu,gcs]'
    training_arguments "$@"
    needs_bucket
    needs_known_gin_files image
}

# GKE's name of a TPU generation, as node pools are labeled with.
accelerator() {
    case "${TOPOLOGY%%:*}" in
        v4) echo tpu-v4-podslice ;;
        v5e) echo tpu-v5-lite-podslice ;;
        v5p) echo tpu-v5p-slice ;;
        v6e) echo tpu-v6e-slice ;;
        *) fail "--topology=$TOPOLOGY: the generation is v4, v5e, v5p or v6e, as in v5e:4x4" ;;
    esac
}

hosts() {
    local shape="${TOPOLOGY#*:}" chips
    [[ $shape =~ ^[1-9][0-9]*(x[1-9][0-9]*){1,2}$ ]] ||
        fail "--topology=$TOPOLOGY: the shape is chips by chips, as in v5e:4x4"
    chips=$((${shape//x/*}))
    ((chips % CHIPS_PER_HOST == 0)) ||
        fail "--topology=$TOPOLOGY has $chips chips, not a multiple of --chips_per_host=$CHIPS_PER_HOST"
    ((chips > CHIPS_PER_HOST || SLICES == 1)) ||
        fail "--slices=$SLICES: GKE joins slices of several hosts only, and one of $TOPOLOGY is a single host"
    echo $((chips / CHIPS_PER_HOST))
}

# A string as JSON, which is YAML too.
json() {
    local word="${1//\\/\\\\}"
    word="${word//\"/\\\"}"
    word="${word//$'\n'/\\n}"
    printf '"%s"\n' "${word//$'\t'/\\t}"
}

json_list() {
    local word list=''
    for word in "$@"; do list+=", $(json "$word")"; done
    echo "[${list#, }]"
}

# variables NAME=VALUE...: as a container has them. Slices that are taken away come back minutes apart: their hosts wait
# for each other for an hour.
variables() {
    local variable list=''
    if ((SLICES > 1)); then set -- ENDISTILL_CONNECT_SECONDS=3600 "$@"; fi
    for variable in "$@"; do
        list+=", {name: $(json "${variable%%=*}"), value: $(json "${variable#*=}")}"
    done
    echo "[${list#, }]"
}

# Prints the template with its ${NAMES} filled in, without its heading, and without the Spot lines unless asked for.
manifest() {
    local line filled
    while IFS= read -r line; do
        if [[ $line == '#'* || ($line == *'# --spot' && ! $SPOT) ]]; then continue; fi
        line="${line%  # --spot}" filled=''
        while [[ $line =~ ^([^$]*)\$\{([A-Z_]+)\}(.*)$ ]]; do # values may hold ${NAMES} themselves, which stay
            filled+="${BASH_REMATCH[1]}${VALUES[${BASH_REMATCH[2]}]}"
            line="${BASH_REMATCH[3]}"
        done
        printf '%s\n' "$filled$line"
    done <"$LAUNCH/gke_jobset.yaml"
}

read_command_line "$@"
ACCELERATOR="$(accelerator)"
HOSTS="$(hosts)"
declare -A VALUES=(
    [NAME]="$NAME" [SLICES]="$SLICES" [HOSTS]="$HOSTS" [ACCELERATOR]="$ACCELERATOR" [SHAPE]="${TOPOLOGY#*:}"
    [CHIPS_PER_HOST]="$CHIPS_PER_HOST" [IMAGE]="$IMAGE" [SERVICE_ACCOUNT]="$SERVICE_ACCOUNT"
    [MAX_RESTARTS]="$MAX_RESTARTS" [COMMAND]="$(json_list python -m endistill_jax.main "${ARGUMENTS[@]}")"
    [VARIABLES]="$(variables "${ENVIRONMENT[@]}")"
)
needs_program kubectl 'see https://kubernetes.io/docs/tasks/tools'
filled_in="$(manifest)"
if [[ $DRY_RUN ]]; then
    printf '%s\n' '# kubectl create --filename=-' "$filled_in"
else
    # Not apply, which succeeds and does nothing where the same JobSet is there already, finished or failed.
    kubectl create --filename=- <<<"$filled_in" ||
        fail "not submitted; where $NAME exists already, delete it first: kubectl delete jobset $NAME" 1
fi
