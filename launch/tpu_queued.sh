#!/usr/bin/env bash
# Trains on TPU machines from a queued request; they are spot machines unless SPOT is empty:
#   NAME=vcm ZONE=us-east5-b TYPE=v6e-16 bash launch/tpu_queued.sh [--dry-run] COMMAND
# COMMAND is create, state, install, run FLAGS OF vcm_jax.main, logs, delete, or
#   watch FLAGS     does all of it: requests the machines, installs, runs, starts again after a
#                   preemption or the death of a process, and deletes the machines when it is done
# Data, workdir and compilation cache are in the bucket BUCKET, which every worker mounts as /mnt/vcm:
# --workdir=/mnt/vcm/runs/s16k. It needs a hierarchical namespace, since checkpoints rename folders.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --dry-run ]; then DRY_RUN=1; shift; fi
. launch/env.sh
NAME=${NAME:-vcm} ZONE=${ZONE:-us-east5-b} TYPE=${TYPE:-v6e-16}
VERSION=${VERSION:-v2-alpha-tpuv6e} SPOT=${SPOT---spot} BUCKET=${BUCKET:-my-bucket}
POLL=${POLL:-60}  # seconds between two looks at the state
MAX_RESTARTS=${MAX_RESTARTS:-5}  # in a row, of a run whose processes die within QUICKLY seconds
QUICKLY=${QUICKLY:-600}

queue() { run gcloud compute tpus queued-resources "$@" --zone="$ZONE"; }

# on WORKERS COMMAND: runs a command on one worker, by its number, or on all.
on() { run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"; }

# Prints the state of the request; nothing if there is no request or no connection.
state() { queue describe "$NAME" --format="value(state.state)"; }

create() {
  # shellcheck disable=SC2086  # SPOT is one flag or none
  queue create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$VERSION" $SPOT
}

delete() { queue delete "$NAME" --force --quiet; }

install() {
  run git archive --format=tar.gz --output=/tmp/vcm_jax.tar.gz HEAD
  run gcloud compute tpus tpu-vm scp /tmp/vcm_jax.tar.gz "$NAME:" --zone="$ZONE" --worker=all
  # The machines' own Python may be too old for JAX, so uv installs one.
  on all "mkdir -p vcm_jax && tar xzf vcm_jax.tar.gz -C vcm_jax && cd vcm_jax && \
python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --allow-existing \
--python 3.12 .venv && python3 -m uv pip install --quiet --python .venv/bin/python \
--requirement requirements.txt --editable '.[tpu]' && sudo mkdir -p /mnt/vcm && \
(mountpoint -q /mnt/vcm || (sudo chmod 777 /mnt/vcm && gcsfuse --implicit-dirs $BUCKET /mnt/vcm))"
}

# Starts the run on the workers where it is not running. It writes its exit code to the file `code`,
# which is empty until then.
start() {
  local flags
  flags=$(printf ' %q' "$@")
  on all "cd vcm_jax && ([ ! -s code ] && kill -0 \$(cat pid 2>/dev/null) 2>/dev/null || \
(: > code; JAX_COMPILATION_CACHE_DIR=/mnt/vcm/jax_cache LIBTPU_INIT_ARGS='$TPU_FLAGS' nohup sh -c \
$(printf '%q' "echo \$\$ > pid; .venv/bin/python -m vcm_jax.main$flags; echo \$? > code") \
>> log 2>&1 &))"
}

# Whether the machines are gone for good: the request has failed, or they were preempted.
gone() {
  case $(state) in FAILED | SUSPEND*) return 0 ;; *) return 1 ;; esac
}

# Waits for the end of the run; returns 1 if it has to be started on other machines.
follow() {
  local code again restarts=0 started=$SECONDS
  until gone; do
    code=$(on 0 "cat vcm_jax/code" | tail -n 1) || code=''
    again=''
    case $code in
      0) return 0 ;;
      75) again=1 ;;      # the state is saved after a SIGTERM
      76 | 137)           # a process has died; 137 is one that was killed
        if [ $((SECONDS - started)) -gt "$QUICKLY" ]; then restarts=0; fi
        restarts=$((restarts + 1))
        if [ "$restarts" -le "$MAX_RESTARTS" ]; then again=1; fi
        ;;
    esac
    if [ -n "$again" ]; then
      sleep "$POLL"       # until all workers have ended
      started=$SECONDS
      start "$@" || true
    elif [[ $code == [1-9]* ]]; then
      echo "the run ended with $code; the machines are still there and cost money: look at the" \
        "logs, then run it again or delete the machines" >&2
      exit "$code"
    fi
    sleep "$POLL"
  done
  return 1
}

watch() {
  if [ -n "${DRY_RUN:-}" ]; then
    create; state; install; start "$@"; on 0 "cat vcm_jax/code"; delete
    return
  fi
  # The output of `run` is read as an answer here, so it must not show the commands.
  run() { "$@"; }
  while true; do
    until [ "$(state)" = ACTIVE ]; do
      if gone; then delete || true; fi
      state > /dev/null || create || true
      sleep "$POLL"
    done
    # Without a connection it tries again; it deletes only machines that are gone.
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
