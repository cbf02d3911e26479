# `make demo` and `make test` do all of their set-up on a fresh machine; the others share it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SETUP := $(VENV)/.setup-done
# Test files run side by side, a thread each; more than one for each core only costs memory.
JOBS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile tests
BENCHES := coupling attention packing sampler
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') setup.py pyproject.toml

.PHONY: setup demo test test-fast test-portable test-portable-fast bench lint format nvcc-check clean

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
	$(BIN)/python tests/portable.py --jobs $(JOBS)

test-portable-fast: $(SETUP)
	$(BIN)/python tests/portable.py --jobs $(JOBS) --fast

bench: $(SETUP)
	$(BIN)/python -m pytest $(BENCHES:%=benchmarks/bench_%.py) --benchmark-only --benchmark-columns=min,median,iqr,rounds \
		--results benchmarks/results
	$(BIN)/python benchmarks/bench_target.py --results benchmarks/results
	$(BIN)/python benchmarks/bench_modes.py --results benchmarks/results
	$(BIN)/python benchmarks/report.py

lint: $(SETUP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(SETUP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' | xargs $(BIN)/clang-format -i

nvcc-check: $(SETUP)
	$(BIN)/python csrc/nvcc_check.py

clean:
	rm -rf $(VENV) build *.egg-info free_kernels/_C*.so outputs
