#!/usr/bin/env bash
# Makes the environment and runs the tests:
#   bash launch/test.sh [--dry-run] [--torch] [--slow] [OPTIONS OF pytest]
# --torch also installs PyTorch; without it the tests that need it are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --dry-run ]; then DRY_RUN=1; shift; fi
extras="test"
if [ "${1:-}" = --torch ]; then extras="test,torch"; shift; fi
. launch/env.sh
make_environment "$extras"
run ruff check .
run python -m pytest -n 2 "$@"
