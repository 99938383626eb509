#!/usr/bin/env bash
# From nothing to a trained multimodal model: makes .venv, trains the quickstart recipe into
# runs/quickstart, evaluates it on held-out examples and prints what it learned.
#
#   bash launch/quickstart.sh [--python=python3.12] [--gin.NAME=VALUE ...]
#
# With VISHWAM_SPOKEN_DIGITS=FOLDER of recordings (see tasks/spoken_digits.py) it then learns to hear
# spoken digits, into runs/spoken_digits.
#
# A second run installs nothing and goes on where the first stopped; after the last step it only
# evaluates.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh
prepare_environment "$PWD" "$@"
RECIPE=(--gin_file=gin/recipes/quickstart_cpu.gin --gin.MODEL_DIR='"runs/quickstart"'
        ${ARGUMENTS[@]+"${ARGUMENTS[@]}"})
"$PYTHON" -m vishwam_t5x train "${RECIPE[@]}"
"$PYTHON" -m vishwam_t5x evaluate "${RECIPE[@]}"
if [ -n "${VISHWAM_SPOKEN_DIGITS:-}" ]; then
  SPOKEN=(--gin_file=gin/recipes/spoken_digits_cpu.gin ${ARGUMENTS[@]+"${ARGUMENTS[@]}"}
          --gin.MODEL_DIR='"runs/spoken_digits"')
  "$PYTHON" -m vishwam_t5x train "${SPOKEN[@]}"
  "$PYTHON" -m vishwam_t5x evaluate "${SPOKEN[@]}"
fi
