# shellcheck shell=bash
# Sourced by the other scripts, from the repository's root: the virtual environment, made once,
# and `run`, which shows a command and, unless --dry-run was given, executes it.
# VENV names another folder than .venv, PYTHON another interpreter than python3.

VENV=${VENV:-.venv}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$PWD/.jax_cache}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.5

run() {
  printf '+ %s\n' "$*"
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
