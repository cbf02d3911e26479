#!/usr/bin/env bash
# What needs a GPU, in three calls of nine minutes; builds the ops, and needs no network.
# Usage: benchmarks/run_gpu.sh a|b|c OUT [options of run_gpu.py]; or collect OUT ...
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "${PYTHON:-python3}" "$root/benchmarks/gpu/run_gpu.py" "$@"
