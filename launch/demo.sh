#!/usr/bin/env bash
# Makes the environment, simulates videos with sound, trains a codec and a network, generates sound
# for test videos and writes a page about it:
#   bash launch/demo.sh [--dry-run]
# If interrupted, rerun it: it resumes. The variables DATA, CODEC, RECORDS and RUN name other folders.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --dry-run ]; then DRY_RUN=1; fi
. launch/env.sh

times='' begun=$SECONDS
# stage NAME: notes the seconds since the last stage ended, for the page.
stage() {
  times="$times${times:+, }\"$1\": $((SECONDS - begun))"
  begun=$SECONDS
}

make_environment test
stage 'environment'

DATA=${DATA:-data/impacts} CODEC=${CODEC:-codecs/impacts}
RECORDS=${RECORDS:-records/impacts} RUN=${RUN:-runs/impacts}
CORES=$(getconf _NPROCESSORS_ONLN)
# Networks this small leave cores idle unless each core is a device of its own.
export XLA_FLAGS=${XLA_FLAGS:---xla_force_host_platform_device_count=2}

run python -m vcm_jax.impacts --out="$DATA" --train=2400 --val=64 --test=200 --workers="$CORES"
stage 'simulated videos'
run python -m vcm_jax.codec.train --sounds="$DATA/train" --out="$CODEC"
stage 'codec'
for split in train val; do
  run python -m vcm_jax.features.extract --videos="$DATA/$split" --captions="$DATA/$split.tsv" \
    --out="$RECORDS/$split" --duration=2.56 --clip_dim=64 --sync_dim=256 --text_dim=32 \
    --workers="$CORES" --codec="$CODEC"
done
stage 'features'
run python -m vcm_jax.main --config=configs/impacts.py --config.data.dir="$RECORDS" --workdir="$RUN"
stage 'training'
[ -n "${DRY_RUN:-}" ] || printf '{%s}\n' "$times" > "$RUN/times.json"
run python -m vcm_jax.impacts.report --workdir="$RUN" --data="$DATA" --times="$RUN/times.json"
printf 'videos with generated sound: %s\npage: %s\n' "$RUN/videos" "$RUN/report.html"
