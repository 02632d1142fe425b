#!/usr/bin/env bash
# Makes the environment, simulates videos with sound, extracts features, trains, generates sound for
# test videos and writes a report:
#   bash launch/demo.sh [--dry-run]
# If interrupted, rerun it: it resumes. The variables DATA, RECORDS and RUN name other folders.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --dry-run ]; then DRY_RUN=1; fi
. launch/env.sh
make_environment test

DATA=${DATA:-data/impacts} RECORDS=${RECORDS:-records/impacts} RUN=${RUN:-runs/impacts}
CORES=$(getconf _NPROCESSORS_ONLN)
# Networks this small leave cores idle unless each core is a device of its own.
export XLA_FLAGS=${XLA_FLAGS:---xla_force_host_platform_device_count=2}

run python -m vcm_jax.impacts --out="$DATA" --train=2400 --val=64 --test=200 --workers="$CORES"
for split in train val test; do
  codec=()
  [ "$split" = train ] || codec=(--codec="$RECORDS/train/codec")
  run python -m vcm_jax.features.extract --videos="$DATA/$split" --captions="$DATA/$split.tsv" \
    --out="$RECORDS/$split" --duration=2.56 --clip_dim=64 --sync_dim=256 --text_dim=32 \
    --workers="$CORES" "${codec[@]}"
done
run python -m vcm_jax.main --config=configs/impacts.py --config.data.dir="$RECORDS" --workdir="$RUN"
run python -m vcm_jax.generate --workdir="$RUN" --video="$DATA/test" --captions="$DATA/test.tsv" \
  --steps=1 --out="$RUN/videos"
run python -m vcm_jax.impacts.report --workdir="$RUN" --data="$DATA"
printf 'videos with generated sound: %s\nreport: %s\n' "$RUN/videos" "$RUN/report.html"
