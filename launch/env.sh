# shellcheck shell=bash
# The other scripts source this file from the root of the repository. It makes the virtual
# environment, once, and defines `run`, which shows a command and executes it unless --dry-run was
# given. VENV names another folder than .venv, PYTHON another interpreter than python3.

VENV=${VENV:-.venv}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.jax_cache}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5
# Functions of librosa that numba has compiled, filled when the environment is made.
case $VENV in
  /*) export NUMBA_CACHE_DIR=${NUMBA_CACHE_DIR:-$VENV/numba} ;;
  *) export NUMBA_CACHE_DIR=${NUMBA_CACHE_DIR:-$PWD/$VENV/numba} ;;
esac
# Large pages make programs with large arrays 5 to 15% faster on CPUs (benchmarks/README.md).
# Only Linux has this setting.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# Flags of XLA that overlap communication with computation; XLA_TUNING=off leaves them out. They are
# described at https://docs.jax.dev/en/latest/xla_flags.html, those for GPUs also at
# https://docs.nvidia.com/jax-toolbox/performance-profiling/gpu-performance. They have not been timed.
# Gradients are summed block by block; the thresholds combine the sums of one block.
GPU_FLAGS='--xla_gpu_enable_latency_hiding_scheduler=true
 --xla_gpu_enable_pipelined_all_gather=true
 --xla_gpu_enable_pipelined_reduce_scatter=true
 --xla_gpu_enable_pipelined_all_reduce=true
 --xla_gpu_all_reduce_combine_threshold_bytes=134217728
 --xla_gpu_all_gather_combine_threshold_bytes=134217728
 --xla_gpu_reduce_scatter_combine_threshold_bytes=134217728'
# All-gathers in parallel with products, and sums between slices in parallel with the next blocks.
TPU_FLAGS='--xla_enable_async_all_gather=true
 --xla_tpu_enable_async_collective_fusion=true
 --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true
 --xla_tpu_enable_async_collective_fusion_multiple_steps=true
 --xla_tpu_overlap_compute_collective_tc=true
 --xla_tpu_enable_data_parallel_all_reduce_opt=true
 --xla_tpu_data_parallel_opt_different_sized_ops=true'
if [ "${XLA_TUNING:-on}" = off ]; then GPU_FLAGS='' TPU_FLAGS=''; fi
GPU_FLAGS=${GPU_FLAGS//$'\n'/} TPU_FLAGS=${TPU_FLAGS//$'\n'/}

# show COMMAND...: as it can be pasted.
show() {
  printf +
  printf ' %q' "$@"
  echo
}

run() {
  show "$@"
  [ -n "${DRY_RUN:-}" ] || "$@"
}

# The first use of librosa compiles its functions, which takes 20 s.
WARM_LIBROSA='import librosa, numpy
sound = numpy.random.default_rng(0).standard_normal(9999).astype("float32")
librosa.griffinlim(abs(librosa.stft(sound)), n_iter=1)
librosa.onset.onset_detect(y=sound)'

# make_environment EXTRA: installs the requirements and an extra of setup.py if they have changed.
make_environment() {
  local wanted installed="$VENV/.installed"
  wanted=$(cat requirements.txt setup.py; echo "$*")
  if [ ! -f "$installed" ] || [ "$(cat "$installed")" != "$wanted" ]; then
    echo "making the environment in $VENV (1.7 GB): about a minute, more on a slow line"
    run "${PYTHON:-python3}" -m venv "$VENV"
    run "$VENV/bin/pip" install --disable-pip-version-check --requirement requirements.txt
    run "$VENV/bin/python" -c "$WARM_LIBROSA"
    run "$VENV/bin/pip" install --quiet --disable-pip-version-check --editable ".[$1]"
    [ -n "${DRY_RUN:-}" ] || printf '%s\n' "$wanted" > "$installed"
  fi
  case $VENV in
    /*) PATH=$VENV/bin:$PATH ;;
    *) PATH=$PWD/$VENV/bin:$PATH ;;
  esac
}

# until_done COMMAND...: starts the command again whenever it exits with 75, which says that it saved
# its state after a SIGTERM. A SIGTERM or Ctrl-C to this script is passed on as a SIGTERM and ends
# the loop: processes that a script puts into the background ignore Ctrl-C.
until_done() {
  local code=75 stopped='' child
  if [ -n "${DRY_RUN:-}" ]; then run "$@"; return; fi
  trap 'stopped=1; kill -TERM "$child" 2>/dev/null' TERM INT
  while [ "$code" = 75 ] && [ -z "$stopped" ]; do
    show "$@"
    "$@" &
    child=$!
    # A signal ends the first wait before the command has ended.
    while kill -0 "$child" 2>/dev/null; do wait "$child" && code=0 || code=$?; done
  done
  trap - TERM INT
  return "$code"
}
