#!/usr/bin/env bash
# Trains on an existing GKE cluster through xpk (https://github.com/AI-Hypercomputer/xpk):
#   CLUSTER=c PROJECT=p ZONE=z TYPE=v6e-256 IMAGE=REGION-docker.pkg.dev/p/r/vcm \
#     bash launch/xpk.sh [--dry-run] COMMAND
# COMMAND is build, run FLAGS OF vcm_jax.main, list or delete.
# Data, workdir and compilation cache are in a bucket that the cluster mounts (xpk storage attach) as
# the folder STORAGE. It needs a hierarchical namespace, since checkpoints rename folders.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --dry-run ]; then DRY_RUN=1; shift; fi
. launch/env.sh
NAME=${NAME:-vcm} CLUSTER=${CLUSTER:-my-cluster} PROJECT=${PROJECT:-my-project}
ZONE=${ZONE:-us-east5-b} TYPE=${TYPE:-v6e-256} SLICES=${SLICES:-1} STORAGE=${STORAGE:-/mnt/vcm}
IMAGE=${IMAGE:-us-docker.pkg.dev/$PROJECT/vcm/vcm}

xpk_workload() {
  local verb=$1
  shift
  run xpk workload "$verb" --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" "$@"
}

command=${1:?build, run, list or delete}
shift
case $command in
  build)
    run docker build --file=launch/Dockerfile --tag="$IMAGE" .
    run docker push "$IMAGE"
    ;;
  run)
    # GKE sends a SIGTERM and waits for the grace period. 75: the state is saved. 76: a process has
    # died; 137: it was killed.
    xpk_workload create --workload="$NAME" --tpu-type="$TYPE" --num-slices="$SLICES" \
      --docker-image="$IMAGE" --max-restarts=1000 --restart-on-exit-codes=75,76,137 \
      --termination-grace-period-seconds=120 \
      --command="JAX_COMPILATION_CACHE_DIR=$STORAGE/jax_cache LIBTPU_INIT_ARGS='$TPU_FLAGS' python -m vcm_jax.main$(printf ' %q' "$@")"
    ;;
  list) xpk_workload list ;;
  delete) xpk_workload delete --workload="$NAME" ;;
  *) echo "not understood: $command" >&2; exit 2 ;;
esac
