#!/usr/bin/env bash
# Everything that needs a GPU, in one command: build, tests, sanitizer, benchmarks. Results go to OUT as logs and JSON.
# Usage: benchmarks/run_gpu.sh OUT   (needs a CUDA torch, triton, nvcc, pytest and pytest-benchmark; installs nothing)
set -uo pipefail
out=$(mkdir -p "${1:?usage: benchmarks/run_gpu.sh OUT}" && cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
failed=0

# Runs one stage under a time limit; a failure is remembered and the next stage runs all the same.
stage() {
  local name=$1 limit=$2
  shift 2
  local started=$SECONDS
  if timeout "$limit" "$@" >"$out/$name.log" 2>&1; then
    echo "ok      $name ($((SECONDS - started)) s)"
  else
    echo "FAILED  $name ($((SECONDS - started)) s); end of $name.log:"
    tail -n 15 "$out/$name.log"
    failed=1
  fi
}

bench() {
  python -m pytest "benchmarks/bench_$1.py" --benchmark-only --benchmark-json="$out/$1.json" -q
}
export -f bench
export out

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv >"$out/gpu.csv" 2>/dev/null
python -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__)"
stage build 180 python setup.py build_ext --inplace
stage gpu_tests 150 python -m pytest tests -m gpu -q -rs
if command -v compute-sanitizer >/dev/null; then
  stage sanitizer 60 compute-sanitizer --error-exitcode 1 python -m pytest tests/test_packing.py -m gpu -q
else
  echo "skipped sanitizer: compute-sanitizer is not installed"
fi
for name in coupling attention packing sampler; do
  stage "bench_$name" 90 bash -c "bench $name"
done
exit $failed
