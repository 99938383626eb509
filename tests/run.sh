#!/usr/bin/env bash
# All checks: ruff, mypy, and every test that is neither slow nor in need of a GPU.
#
#   bash tests/run.sh [--python=python3.12] [arguments of pytest]
#
# Makes .venv (or .venv-3.12) on the first run; later runs install nothing.
#   bash tests/run.sh -m slow                 the slow ones instead
#   bash tests/run.sh tests/models -k scan    a few
#   bash tests/run.sh -n 0 -x                 one at a time, until the first that fails
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment "$PWD" "$@"
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
# A process for each core, at most four; tests of one file share fixtures and stay together.
exec "$PYTHON" -m pytest -m 'not slow and not gpu' -n auto --maxprocesses=4 --dist=loadfile \
  --no-loadscope-reorder \
  ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
