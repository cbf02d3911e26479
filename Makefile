# `make demo` and `make test` do all of their set-up on a fresh machine; the others share it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done
# Test files run side by side, a thread each; more than one for each core only costs memory.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder tests
BENCHES := coupling attention packing drafting sampler
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') csrc/toolkit.py setup.py pyproject.toml

# An environment with a CUDA build of torch, and ones with other releases for the same wheel.
CUDA_VENV := .venv-cuda
CUDA_BIN := $(CUDA_VENV)/bin
OTHER_TORCH := 2.12.1

.PHONY: setup demo test test-fast test-portable test-portable-fast bench aot-matrix lint format cuda-build wheel-check nvcc-check clean

setup: $(SETUP)

$(SETUP): requirements-cpu.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-cpu.txt
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

demo: $(SETUP)
	$(BIN)/python -m free_dit compare --out outputs/demo

test: $(SETUP)
	$(PYTEST)

test-fast: $(SETUP)
	$(PYTEST) -m "not slow"

# The numerical tests with the kernels of other CPUs; `-fast` is what CI runs of it.
test-portable: $(SETUP)
	$(BIN)/python tests/helpers/portable.py --jobs $(JOBS)

test-portable-fast: $(SETUP)
	$(BIN)/python tests/helpers/portable.py --jobs $(JOBS) --fast

bench: $(SETUP)
	$(BIN)/python -m pytest $(BENCHES:%=benchmarks/*/bench_%.py) --benchmark-only --benchmark-columns=min,median,iqr,rounds \
		--results benchmarks/results
	$(BIN)/python -m benchmarks.sampler.bench_target --results benchmarks/results
	$(BIN)/python -m benchmarks.sampler.bench_modes --results benchmarks/results
	$(BIN)/python -m benchmarks.report.report

# Every configuration of every Triton kernel for every device: 20 CPU minutes, no GPU. The tests compile the largest.
aot-matrix: $(SETUP)
	$(BIN)/python -m free_kernels.ops.aot_table --workers $(JOBS) > $(VENV)/ahead_of_time.md
	$(BIN)/python -m benchmarks.gpu.predict_coupling > $(VENV)/predicted_coupling.md
	mv $(VENV)/ahead_of_time.md $(VENV)/predicted_coupling.md benchmarks/results/
	$(BIN)/python -m benchmarks.report.report

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

# The installation as the README gives it, under a CUDA build of torch; needs the CUDA toolkit, no GPU.
cuda-build: $(CUDA_VENV)/.setup-done
	$(CUDA_BIN)/python -m pip install --no-build-isolation .
	$(CUDA_BIN)/python csrc/cuda_build_check.py

$(CUDA_VENV)/.setup-done: requirements-cuda.txt
	test -x $(CUDA_BIN)/python || $(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_BIN)/python -m pip install --quiet --requirement $<
	touch $@

# The wheel built under this torch, its CPU ops compared under others: .venv-torch-* and, where it exists, .venv-cuda.
wheel-check: $(SETUP) $(OTHER_TORCH:%=.venv-torch-%/.setup-done)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s tests/packaging/test_distribution.py

.venv-torch-%/.setup-done:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet torch==$* numpy==2.4.6 safetensors==0.8.0 tqdm==4.70.1
	touch $@

nvcc-check: $(SETUP)
	$(BIN)/python csrc/nvcc_check.py

clean:
	rm -rf .venv* build *.egg-info free_kernels/_C*.so outputs
