#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, tests, kernels against oracles, benchmarks, memory checker.
# Usage: benchmarks/run_gpu.sh OUT [options of run_gpu.py]; installs nothing and needs no network.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "${BASH_SOURCE[0]}")/run_gpu.py" "$@"
