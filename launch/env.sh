# shellcheck shell=bash
# The other scripts source this file in the repository's root. It defines `make_environment`, which
# makes the virtual environment once, and `run`, which shows a command and executes it unless
# --dry-run was given. VENV names another folder than .venv, PYTHON another interpreter than python3.

VENV=${VENV:-.venv}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.jax_cache}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5
# Large memory pages make CPUs 5 to 15% faster (benchmarks/README.md). Only Linux has this setting.
export GLIBC_TUNABLES=${GLIBC_TUNABLES:-glibc.malloc.hugetlb=1}

# show COMMAND...: prints a command so that it can be pasted into a shell.
show() {
  printf +
  printf ' %q' "$@"
  echo
}

run() {
  show "$@"
  [ -n "${DRY_RUN:-}" ] || "$@"
}

# make_environment EXTRA: installs the requirements and an extra of setup.py if they have changed.
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

# until_done COMMAND...: starts the command again whenever it ends with 75, which means that it has
# saved its state after a SIGTERM. If this script gets a SIGTERM or a Ctrl-C, it sends the command a
# SIGTERM and ends with it: a command in the background of a script does not get the Ctrl-C itself.
until_done() {
  local code=75 stopped='' child
  if [ -n "${DRY_RUN:-}" ]; then run "$@"; return; fi
  trap 'stopped=1; kill -TERM "$child" 2>/dev/null' TERM INT
  while [ "$code" = 75 ] && [ -z "$stopped" ]; do
    show "$@"
    "$@" &
    child=$!
    # A signal can end `wait` before the command has ended.
    while kill -0 "$child" 2>/dev/null; do wait "$child" && code=0 || code=$?; done
  done
  trap - TERM INT
  return "$code"
}
