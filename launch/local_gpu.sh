#!/usr/bin/env bash
# Trains on all GPUs of this machine; what is not said otherwise goes to vcm_jax.main:
#   bash launch/local_gpu.sh [--dry-run] --config=configs/s16k.py --workdir=runs/s16k [...]
# EXTRA=test trains on the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --dry-run ]; then DRY_RUN=1; shift; fi
. launch/env.sh
make_environment "${EXTRA:-gpu}"

# GPU memory is taken as it is needed up to this part; the rest is for NCCL and cuDNN.
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
# No XLA_FLAGS: none was measured to help here.
# export XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=true"
until_done python -m vcm_jax.main "$@"
