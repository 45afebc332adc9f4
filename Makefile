# The list of commands. Everything is installed in .venv. The machine only needs Python >= 3.11 and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
CPP := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*/*.h csrc/*/*/*.cpp csrc/cuda/*.cuh csrc/cuda/*.cu tests/support/simt/*.cu)

# Does the machine have CUDA where setup.py finds it? If not, pip's headers (34 MB) are installed: the emulator of the CUDA
# kernels is compiled with them
CUDA_HERE := test -n "$$CUDA_HOME$$CUDA_PATH" || command -v nvcc >/dev/null || test -d /usr/local/cuda/include
CUDA_HEADERS := nvidia-cuda-runtime nvidia-cuda-crt nvidia-cuda-cccl
PIP := $(BIN)/python -m pip install --quiet
# On a terminal pip shows what it fetches, with a bar
PIP_SHOWN := $(BIN)/python -m pip install $$(test -t 1 || echo --quiet)
# One process more than there are cores, at most 5 (tests/conftest.py), because tests of servers wait. The tests of a file run in
# one process and share its fixtures; tests/conftest.py defines their order. Without the last option pytest-benchmark warns that
# it is disabled
PARALLEL := -n auto --dist loadfile --no-loadscope-reorder -p no:benchmark
BUILD := FASTLM_SIMT=1 $(BIN)/python setup.py -q build_ext --inplace
# Without a GPU the CUDA kernels are not built: with the emulator, which the tests need, they take two thirds of the time
HERE := FASTLM_CUDA=$${FASTLM_CUDA:-$$(nvidia-smi -L >/dev/null 2>&1 && echo 1 || echo 0)}
BUILD_HERE := $(HERE) $(BIN)/python setup.py -q build_ext --inplace
# Of each file that is compiled: how many are done, and the time left
export NINJA_STATUS := [%f/%t, %W left] $()

.PHONY: help setup build demo test quick test-all simt lint format bench fuzz fuzz-files kill sanitize gate triton-sanitize clean

help:            ## print this list
	@grep -E '^[a-z-]+: .*##' Makefile | sed 's/:.*## /\t/' | expand -t 18

setup: .venv/ready  ## create .venv with fastlm (editable, with the extensions for this machine) and the tools of the other targets
	@$(BUILD_HERE)

# These two files determine what is installed. The extensions are built first, so that a missing compiler is reported before the
# minutes of download
.venv/ready: pyproject.toml setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make: expected Python >= 3.11, got `$(PYTHON) --version`; to use another: make PYTHON=python3.12"; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --upgrade 'pip>=25' setuptools pybind11 ninja
	@$(CUDA_HERE) || $(PIP) --no-deps $(CUDA_HEADERS)
	$(BUILD_HERE)
	@echo "make: fetching torch (200 MB for CPUs, 3 GB with CUDA) and the tools: one to five minutes"
	$(HERE) PYTHONWARNINGS='ignore:Editable installation' $(PIP_SHOWN) --no-build-isolation --editable '.[dev]'
	@touch $@

build: .venv/ready  ## build the extensions in place: compiles the files of csrc/ that an edit affects
	@$(BUILD)

demo: .venv/ready  ## run the first part of recipes/full.toml, text -> tokens -> model -> runs/demo/report.html: 9 to 15 minutes on two cores, set-up included
	@$(BUILD_HERE)
	$(BIN)/fastlm run recipes/full.toml --until eval --set pretrain.max_tokens=2_000_000 --out runs/demo

test: build      ## run every check: lint, types, the tests of all three tiers
	$(MAKE) --no-print-directory lint
	$(BIN)/pytest $(PARALLEL)

quick: .venv/ready  ## run the unit tests: two minutes on two cores
	@$(BUILD_HERE)
	$(BIN)/pytest $(PARALLEL) tests/unit

test-all: build  ## run `make test` and what it omits: all combinations of parameters, simulations, fuzz, kills
	$(MAKE) --no-print-directory lint
	$(BIN)/pytest $(PARALLEL) --all
	$(MAKE) --no-print-directory fuzz MINUTES=10
	$(MAKE) --no-print-directory fuzz-files
	$(MAKE) --no-print-directory kill KILLS=5

simt: .venv/ready  ## build only the emulator, after a change in csrc/cuda or csrc/simt: seconds per file; DEBUG=1: for gdb
	@FASTLM_CPU=0 FASTLM_CUDA=0 FASTLM_DEBUG=$(DEBUG) $(BUILD)

lint: .venv/ready  ## run the checks of pre-commit
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/pyright
	$(BIN)/lint-imports --no-cache
	$(BIN)/python bench/published.py

format: .venv/ready  ## format the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: build     ## run all benchmarks against their peers; writes bench/results/ and the README's table
	$(BIN)/python bench/run.py

fuzz: build      ## test random cases of every op for an hour; make fuzz MINUTES=5 SEED=7 KERNELS=simt
	$(BIN)/python tests/support/fuzz.py --minutes $(or $(MINUTES),60) --seed $(or $(SEED),0) --kernels $(or $(KERNELS),cpu)

fuzz-files: build  ## test damaged model files for ten minutes; make fuzz-files MINUTES=5 SEED=7
	$(BIN)/python tests/support/fuzz_files.py --seconds $$(($(or $(MINUTES),10) * 60)) --seed $(or $(SEED),0)

kill: build      ## kill every command 20 times at random moments, with the same result each time; make kill KILLS=5 SEED=7 CASES='sft ppo'
	$(BIN)/python tests/support/kill_stages.py --kills $(or $(KILLS),20) --seed $(or $(SEED),0) $(CASES)

sanitize: build  ## run the op tests with AddressSanitizer + UndefinedBehaviorSanitizer, the CUDA kernels also with ThreadSanitizer and in 20 orders
	sh tests/support/sanitize.sh
	FASTLM_SIMT_SEEDS=20 $(BIN)/pytest -q --all -m 'not slow' --kernels cuda --ignore tests/kernels/test_cuda_gate.py tests/kernels
	sh tests/support/sanitize_simt.sh address
	sh tests/support/sanitize_simt.sh thread

gate: build      ## compare the machine code of every CUDA and Triton kernel for sm_80, sm_90, sm_100 with the tables
	$(BIN)/python tests/gates/cuda_gate.py
	test -d .venv/triton-3.6.0 || $(BIN)/python -m pip install --quiet --no-deps --target .venv/triton-3.6.0 triton==3.6.0
	PYTHONPATH=.venv/triton-3.6.0:tests/gates $(BIN)/python -m triton_gate
	PYTHONPATH=tests/gates $(BIN)/python -m triton_gate

triton-sanitize: build ## check the addresses of the Triton kernels that triton-viz can interpret, on Triton 3.6.0
	test -d .venv/triton-viz || $(BIN)/python -m pip install --quiet --target .venv/triton-viz triton==3.6.0 triton-viz==3.0 'numpy<2.4'
	PYTHONPATH=.venv/triton-viz $(BIN)/python tests/support/triton_sanitize.py

clean:  ## delete the build products, but not .venv and runs/
	rm -rf build dist *.egg-info fastlm/*.so compile_commands.json
