# shellcheck shell=bash
# Sourced by the other scripts, from the repository's root: the virtual environment, made once,
# and `run`, which shows a command and, unless --dry-run was given, executes it.
# VENV names another folder than .venv, PYTHON another interpreter than python3.

VENV=${VENV:-.venv}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.jax_cache}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5
# Large pages for large arrays: on CPUs 5 to 15% faster (benchmarks/README.md). Linux alone knows it.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

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

# make_environment EXTRA: installs the requirements, and an extra of setup.py, where they changed.
make_environment() {
  local wanted installed="$VENV/.installed"
  wanted=$(cat requirements.txt setup.py; echo "$*")
  if [ ! -f "$installed" ] || [ "$(cat "$installed")" != "$wanted" ]; then
    echo "making the environment in $VENV (1.7 GB): about a minute, more on a slow line"
    run "${PYTHON:-python3}" -m venv "$VENV"
    run "$VENV/bin/pip" install --quiet --disable-pip-version-check --requirement requirements.txt
    run "$VENV/bin/pip" install --quiet --disable-pip-version-check --editable ".[$1]"
    [ -n "${DRY_RUN:-}" ] || printf '%s\n' "$wanted" > "$installed"
  fi
  case $VENV in
    /*) PATH=$VENV/bin:$PATH ;;
    *) PATH=$PWD/$VENV/bin:$PATH ;;
  esac
}

# until_done COMMAND...: starts it again whenever it ends with 75: its state is saved after a
# SIGTERM. A SIGTERM or Ctrl-C to this script is handed on as a SIGTERM, and is the end of it: what
# a script puts into the background does not hear Ctrl-C.
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
