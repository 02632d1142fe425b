#!/usr/bin/env bash
# Makes the environment and runs the tests: bash launch/test.sh [--dry-run] [--slow] [pytest options]
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --dry-run ]; then DRY_RUN=1; shift; fi
. launch/env.sh
make_environment test
run ruff check .
run python -m pytest -n 2 "$@"
