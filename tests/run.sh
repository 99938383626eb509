#!/usr/bin/env bash
# All checks: ruff, mypy, and every test that is neither slow nor in need of a GPU.
#
#   bash tests/run.sh [--python=python3.12] [arguments of pytest]
#
# Makes .venv (or .venv-3.12) on the first run; later runs install nothing.
#   bash tests/run.sh -m slow                 the slow ones instead
#   bash tests/run.sh tests/models -k scan    a few
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment "$PWD" "$@"
"$PYTHON" -m ruff check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest -m 'not slow and not gpu' ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
