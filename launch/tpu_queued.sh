#!/usr/bin/env bash
# Trains on TPU machines that are asked for in the queue, spot ones unless SPOT is empty:
#   NAME=vcm ZONE=us-east5-b TYPE=v6e-16 bash launch/tpu_queued.sh [--dry-run] COMMAND [...]
#   create | state | install | run FLAGS OF vcm_jax.main | logs | delete
#   watch FLAGS     all of it: asks, installs, runs, begins anew after a preemption, deletes
# Data, workdir and compile cache are in BUCKET, mounted on every worker as /mnt/vcm, so
# --workdir=/mnt/vcm/runs/s16k; give it a hierarchical namespace: checkpoints rename folders.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --dry-run ]; then DRY_RUN=1; shift; fi
. launch/env.sh
NAME=${NAME:-vcm} ZONE=${ZONE:-us-east5-b} TYPE=${TYPE:-v6e-16}
VERSION=${VERSION:-v2-alpha-tpuv6e} SPOT=${SPOT---spot} BUCKET=${BUCKET:-my-bucket}
POLL=${POLL:-60}  # seconds

queue() { run gcloud compute tpus queued-resources "$@" --zone="$ZONE"; }

# on WORKERS COMMAND
on() { run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"; }

# Empty where there is no answer: no request, or no connection.
state() { queue describe "$NAME" --format="value(state.state)"; }

create() {
  # shellcheck disable=SC2086  # SPOT is one flag or none
  queue create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$VERSION" $SPOT
}

delete() { queue delete "$NAME" --force --quiet; }

install() {
  run git archive --format=tar.gz --output=/tmp/vcm_jax.tar.gz HEAD
  run gcloud compute tpus tpu-vm scp /tmp/vcm_jax.tar.gz "$NAME:" --zone="$ZONE" --worker=all
  # The machines' own Python may be older than what JAX takes: uv brings one.
  on all "mkdir -p vcm_jax && tar xzf vcm_jax.tar.gz -C vcm_jax && cd vcm_jax && \
python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing \
--python 3.12 .venv && python3 -m uv pip install --quiet --python .venv/bin/python \
--requirement requirements.txt --editable '.[tpu]' && sudo mkdir -p /mnt/vcm && \
(mountpoint -q /mnt/vcm || (sudo chmod 777 /mnt/vcm && gcsfuse --implicit-dirs $BUCKET /mnt/vcm))"
}

# Where a run is under way it goes on undisturbed. The file `code` is empty until it ends.
start() {
  local flags
  flags=$(printf ' %q' "$@")
  on all "cd vcm_jax && ([ ! -s code ] && kill -0 \$(cat pid 2>/dev/null) 2>/dev/null || \
(: > code; JAX_COMPILATION_CACHE_DIR=/mnt/vcm/jax_cache nohup sh -c \
$(printf '%q' "echo \$\$ > pid; .venv/bin/python -m vcm_jax.main$flags; echo \$? > code") \
>> log 2>&1 &))"
}

# Whether the machines are gone for good: a request that failed or was preempted.
gone() {
  case $(state) in FAILED | SUSPEND*) return 0 ;; *) return 1 ;; esac
}

# Ends when the run has; 1 when it must begin anew on other machines.
follow() {
  local code
  until gone; do
    code=$(on 0 "cat vcm_jax/code" | tail -n 1) || code=''
    case $code in
      0) return 0 ;;
      75) sleep "$POLL"; start "$@" || true ;;  # when all workers have left
      [1-9]*)
        echo "the run ended with $code; the machines are still there, and cost: see logs, then" \
          "run it again or delete" >&2
        exit "$code"
        ;;
    esac
    sleep "$POLL"
  done
  return 1
}

watch() {
  if [ -n "${DRY_RUN:-}" ]; then
    create; state; install; start "$@"; on 0 "cat vcm_jax/code"; delete
    return
  fi
  # What `run` shows would be read as an answer.
  run() { "$@"; }
  while true; do
    until [ "$(state)" = ACTIVE ]; do
      if gone; then delete || true; fi
      state > /dev/null || create || true
      sleep "$POLL"
    done
    # What fails for want of a connection is tried again; only machines that are gone are deleted.
    if install && start "$@"; then
      if follow "$@"; then break; fi
    else
      sleep "$POLL"
    fi
  done
  delete
}

command=${1:?create, state, install, run, logs, watch or delete}
shift
case $command in
  create | delete | install | state) "$command" ;;
  run) start "$@" ;;
  watch) watch "$@" ;;
  logs) on 0 "tail -n 100 -f vcm_jax/log" ;;
  *) echo "not understood: $command" >&2; exit 2 ;;
esac
