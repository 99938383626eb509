#!/usr/bin/env bash
# Every benchmark, one after the other (about ten minutes on two quiet cores).
# usage: bash benchmarks/run_all.sh      (PYTHON=... for another interpreter)
set -euo pipefail
cd "$(dirname "$0")/.."
export JAX_PLATFORMS=cpu EPATH_USE_TF=false
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
for script in packing step checkpoint_stall startup ratios image_path; do
  echo "== $script"
  "${PYTHON:-python}" "benchmarks/$script.py"
done
