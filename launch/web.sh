#!/usr/bin/env bash
# Makes the environment and serves the page on the demo's run, with clips of its test set:
#   bash launch/web.sh [--dry-run] [FLAGS OF vcm_jax.web]
# for example --other=runs/meanflow. launch/demo.sh makes the run. RUN and DATA name other folders.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --dry-run ]; then DRY_RUN=1; shift; fi
. launch/env.sh
RUN=${RUN:-runs/impacts} DATA=${DATA:-data/impacts}
if [ -z "${DRY_RUN:-}" ] && [ ! -f "$RUN/run.json" ]; then
  echo "there is no run in $RUN: make it with launch/demo.sh, or name one, RUN=FOLDER" >&2
  exit 1
fi
make_environment "test,web"

if [ -d "$DATA/test" ]; then set -- --examples="$DATA/test" "$@"; fi
run python -m vcm_jax.web --workdir="$RUN" "$@"
