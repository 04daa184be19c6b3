#!/usr/bin/env bash
# Submits a training command to a GKE cluster with TPU slices through XPK (https://github.com/AI-Hypercomputer/xpk).
#
#   launch/gke_xpk.sh NAME --cluster=CLUSTER --zone=ZONE --type=v5litepod-64 --image=IMAGE -- \
#       --gin_file=gin/miniend_3b.gin --gin.MODEL_DIR=gs://BUCKET/student --gin.TEACHER=gs://BUCKET/t5_v1_1_xl \
#       --gin.DATA_DIR=gs://BUCKET/tensorflow_datasets
#
#   --cluster=CLUSTER    a cluster made by `xpk cluster create`
#   --type=TYPE          TPU type of one slice: v5litepod-64 (or v5e-64), v4-64, v5p-32, v6e-16
#   --slices=1           how many slices work on the one run, whose mesh must spread data over them, as with
#                        --gin.MESH='(2, -1, 1)' or (-1, 1, 1) for two
#   --image=IMAGE        a container image that has endistill-jax[tpu,gcs]
#   --project=PROJECT    default: $CLOUDSDK_CORE_PROJECT
#   --zone=ZONE          default: $CLOUDSDK_COMPUTE_ZONE
#   --max_restarts=100   how often the workload is started again; a mistake (exit code 2) ends it at once
#   --xpk_flag=FLAG      repeatable; handed to `xpk workload create`, such as --xpk_flag=--priority=high
#   --dry_run            print the command and submit nothing
#
# See it with `xpk workload list --cluster=CLUSTER`, end it with
# `xpk workload delete --cluster=CLUSTER --workload=NAME`.

set -euo pipefail
LAUNCH="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# shellcheck source=launch/common.sh
source "$LAUNCH/common.sh"

PROJECT="${CLOUDSDK_CORE_PROJECT:-}" ZONE="${CLOUDSDK_COMPUTE_ZONE:-}"
NAME='' CLUSTER='' TYPE='' SLICES=1 IMAGE='' MAX_RESTARTS=100 XPK_FLAGS=()

while (($#)); do
    case "$1" in
        -h | --help) show_help && exit 0 ;;
        --) shift && break ;;
        --cluster=?*) CLUSTER="${1#*=}" ;;
        --type=?*) TYPE="${1#*=}" && TYPE="${TYPE/#v5e-/v5litepod-}" ;;
        --slices=*) SLICES="${1#*=}" && positive_number slices "$SLICES" ;;
        --image=?*) IMAGE="${1#*=}" ;;
        --project=?*) PROJECT="${1#*=}" ;;
        --zone=?*) ZONE="${1#*=}" ;;
        --max_restarts=*) MAX_RESTARTS="${1#*=}" && positive_number max_restarts "$MAX_RESTARTS" ;;
        --xpk_flag=--?*) XPK_FLAGS+=("${1#*=}") ;;
        --dry_run) DRY_RUN=yes ;;
        --*) fail "unknown flag $1; the training command goes after --; see --help" ;;
        *) [[ ! $NAME ]] || fail "$1: one name is enough; the training command goes after --" && NAME="$1" ;;
    esac
    shift
done
[[ $NAME ]] || fail 'give the workload a name: launch/gke_xpk.sh NAME ...'
valid_name "$NAME"
given project "$PROJECT" 'your Google Cloud project, or set CLOUDSDK_CORE_PROJECT'
given zone "$ZONE" 'the zone of the cluster, or set CLOUDSDK_COMPUTE_ZONE'
given cluster "$CLUSTER" 'a cluster made by xpk cluster create'
given type "$TYPE" 'the TPU type of one slice, such as v5litepod-64'
given image "$IMAGE" 'a container image that has endistill-jax[tpu,gcs]'
training_arguments "$@"
needs_bucket
needs_known_gin_files image
needs_program xpk 'pip install xpk'

# XPK fails a workload for good on exit codes below 127 but for 42. Here 1 means that it should start again.
run xpk workload create "--workload=$NAME" "--cluster=$CLUSTER" "--project=$PROJECT" "--zone=$ZONE" "--tpu-type=$TYPE" \
    "--num-slices=$SLICES" "--docker-image=$IMAGE" "--max-restarts=$MAX_RESTARTS" \
    --termination-grace-period-seconds=300 --restart-on-exit-codes=1 "${XPK_FLAGS[@]}" \
    "--command=python -m endistill_jax.main $(quoted "${ARGUMENTS[@]}")"
