#!/usr/bin/env bash
# Trains on all GPUs of this machine, and starts again when the run was stopped by a SIGTERM:
#   bash launch/local_gpu.sh [--dry-run] FLAGS OF vcm_jax.main
# for example --config=configs/s16k.py --workdir=runs/s16k. EXTRA=test trains on the CPU.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --dry-run ]; then DRY_RUN=1; shift; fi
. launch/env.sh
make_environment "${EXTRA:-gpu}"

# The fraction of the GPU memory that JAX takes; the rest is for NCCL and cuDNN.
export XLA_FLAGS="$GPU_FLAGS ${XLA_FLAGS:-}"
export XLA_PYTHON_CLIENT_MEM_FRACTION=${XLA_PYTHON_CLIENT_MEM_FRACTION:-0.92}
until_done python -m vcm_jax.main "$@"
