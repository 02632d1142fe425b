#!/usr/bin/env bash
# Makes the environment, checks the code's style and runs the tests:
#   bash launch/test.sh [--dry-run] [--torch] [--slow] [pytest options]
# --torch also installs PyTorch; without it the tests that need it are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --dry-run ]; then DRY_RUN=1; shift; fi
extras="test"
if [ "${1:-}" = --torch ]; then extras="test,torch"; shift; fi
. launch/env.sh
make_environment "$extras"
run ruff check .
run ruff format --check .
# Each of two processes gets one half of the tests in their order, so that tests that share programs
# or fixtures run in the same process; who is done first takes tests from the other.
run python -m pytest -n 2 --dist worksteal "$@"
