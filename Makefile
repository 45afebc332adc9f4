# The index of commands. Everything happens in .venv; nothing needs to be installed but Python >= 3.11 and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/cuda/*.cuh csrc/cuda/*.cu tests/support/simt/*.cu)

# A CUDA of this machine's, which setup.py finds; else pip's headers (34 MB), by which the emulator of the CUDA kernels compiles
CUDA_HERE := test -n "$$CUDA_HOME$$CUDA_PATH" || command -v nvcc >/dev/null || test -d /usr/local/cuda/include
CUDA_HEADERS := nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl
PIP := $(BIN)/python -m pip install --quiet
# A process more than cores, at most 5 (tests/conftest.py): tests of servers wait. A file's tests share their fixtures in one
# process; the order is that of tests/conftest.py. pytest-benchmark warns that it is off in them
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder -p no:benchmark
BUILD := FASTLM_SIMT=1 $(BIN)/python setup.py -q build_ext --inplace
# What this machine runs: no CUDA kernels without a GPU, which take two thirds of the time with the emulator that the tests want
HERE := FASTLM_CUDA=$${FASTLM_CUDA:-$$(nvidia-smi -L >/dev/null 2>&1 && echo 1 || echo 0)}
BUILD_HERE := $(HERE) $(BIN)/python setup.py -q build_ext --inplace

.PHONY: help setup build demo test quick test-all simt lint format bench fuzz fuzz-files kill sanitize gate triton-sanitize clean

help:            ## this list
	@grep -E '^[a-z-]+: .*##' Makefile | sed 's/:.*## /\t/' | expand -t 18

setup: .venv/ready  ## .venv with fastlm (editable, the extensions that this machine runs) and what the other targets use
	@$(BUILD_HERE)

# What is installed follows from these two files. The extensions come first: a compiler that is missing is said before the minutes of fetching
.venv/ready: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: expected Python >= 3.11, got `$(PYTHON) --version`; name another: make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --upgrade 'pip>=25' setuptools pybind11 ninja
	@$(CUDA_HERE) || $(PIP) --no-deps $(CUDA_HEADERS)
	$(BUILD_HERE)
	@echo "make: fetching torch: minutes without output"
	$(HERE) PYTHONWARNINGS='ignore:Editable installation' $(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

build: .venv/ready  ## the extensions, in place: compiles what an edit of csrc/ touched
	@$(BUILD)

demo: .venv/ready  ## the first part of recipes/full.toml, text -> tokens -> model -> runs/demo/report.html, in ten minutes on two cores
	@$(BUILD_HERE)
	$(BIN)/fastlm run recipes/full.toml --until eval --set pretrain.max_tokens=2_000_000 --out runs/demo

test: build      ## every check: lint, types, the tests of all three tiers
	$(MAKE) --no-print-directory lint
	$(BIN)/pytest $(PARALLEL)

quick: .venv/ready  ## the unit tests: two minutes on two cores
	@$(BUILD_HERE)
	$(BIN)/pytest $(PARALLEL) tests/unit

test-all: build  ## what `make test` leaves out too: all combinations of parameters, simulations, fuzz, kills
	$(MAKE) --no-print-directory lint
	$(BIN)/pytest $(PARALLEL) --all
	$(MAKE) --no-print-directory fuzz MINUTES=10
	$(MAKE) --no-print-directory fuzz-files
	$(MAKE) --no-print-directory kill KILLS=5

simt: .venv/ready  ## the emulator alone after a change in csrc/cuda or csrc/simt: seconds a file; DEBUG=1: for gdb
	@FASTLM_CPU=0 FASTLM_CUDA=0 FASTLM_DEBUG=$(DEBUG) $(BUILD)

lint: .venv/ready  ## what pre-commit runs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache

format: .venv/ready  ## rewrite the sources in the one format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: build     ## all benchmarks against their peers; writes bench/results/ and the README's table
	$(BIN)/python bench/run.py

fuzz: build      ## an hour of random cases of every op; make fuzz MINUTES=5 SEED=7 KERNELS=simt
	$(BIN)/python tests/support/fuzz.py --minutes $(or $(MINUTES),60) --seed $(or $(SEED),0) --kernels $(or $(KERNELS),cpu)

fuzz-files: build  ## ten minutes of damaged model files; make fuzz-files MINUTES=5 SEED=7
	$(BIN)/python tests/support/fuzz_files.py --seconds $$(($(or $(MINUTES),10) * 60)) --seed $(or $(SEED),0)

kill: build      ## 20 SIGKILLs at random moments in every command, each to the same end; make kill KILLS=5 SEED=7 CASES='sft ppo'
	$(BIN)/python tests/support/kill_stages.py --kills $(or $(KILLS),20) --seed $(or $(SEED),0) $(CASES)

sanitize: build  ## the op tests on AddressSanitizer + UndefinedBehaviorSanitizer builds, the CUDA kernels on ThreadSanitizer too and in 20 orders
	sh tests/support/sanitize.sh
	FASTLM_SIMT_SEEDS=20 $(BIN)/pytest -q --all -m 'not slow' --kernels cuda --ignore tests/kernels/test_cuda_gate.py tests/kernels
	sh tests/support/sanitize_simt.sh address
	sh tests/support/sanitize_simt.sh thread

gate: build      ## machine code of every CUDA and Triton kernel for sm_80, sm_90, sm_100 against the tables
	$(BIN)/python tests/gates/cuda_gate.py
	test -d .venv/triton-3.6.0 || $(BIN)/python -m pip install --quiet --no-deps --target .venv/triton-3.6.0 triton==3.6.0
	PYTHONPATH=.venv/triton-3.6.0:tests/gates $(BIN)/python -m triton_gate
	PYTHONPATH=tests/gates $(BIN)/python -m triton_gate

triton-sanitize: build ## addresses of the Triton kernels that triton-viz can follow, on Triton 3.6.0
	test -d .venv/triton-viz || $(BIN)/python -m pip install --quiet --target .venv/triton-viz triton==3.6.0 triton-viz==3.0 'numpy<2.4'
	PYTHONPATH=.venv/triton-viz $(BIN)/python tests/support/triton_sanitize.py

clean:  ## build products, not .venv and not runs/
	rm -rf build dist *.egg-info fastlm/*.so compile_commands.json
