# Two commands do everything on an empty machine: `make demo` and `make test`.
# Each sets up .venv in this folder, builds the extension, and runs; a second run starts at once.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*/*.cpp csrc/*/*/*.h csrc/*/*.cu csrc/*/*.cuh) setup.py tools/extension_build.py tools/cuda_build.py
FORMATTED := $(wildcard csrc/*/*.h csrc/*/*.cpp csrc/*/*/*.cpp csrc/*/*/*.h csrc/*/*.cu csrc/*/*.cuh tests/kernels*/*.cpp tests/kernels/*.h)

.PHONY: demo test test-slow test-kernels lint format build bench clean

demo: build
	$(BIN)/python -m resnet_fast demo

test: build lint
	RESNET_FAST_REQUIRE=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --max-worker-restart 0 \
		-m "not slow" tests

test-slow: build
	RESNET_FAST_REQUIRE=1 $(BIN)/python -m pytest -q -m slow tests

test-kernels: build
	$(BIN)/python -m pytest -q tests/test_kernels.py tests/test_nvcc.py

bench: build
	$(BIN)/python -m resnet_fast bench

build: $(VENV)/.built

lint: $(VENV)/.dependencies
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)
	$(BIN)/mypy

format: $(VENV)/.dependencies
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

$(VENV)/.dependencies: requirements-dev.txt requirements-rivals.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-deps -r requirements-rivals.txt
	touch $@

$(VENV)/.built: $(VENV)/.dependencies pyproject.toml $(SOURCES)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

clean:
	rm -rf build $(VENV)/.built resnet_fast/*.so *.egg-info
