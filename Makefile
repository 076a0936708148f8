# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help demo test test-all bench check clean
help: ## show this text
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(VENV)/base: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[train]'
	@touch $@

$(VENV)/dev: $(VENV)/base
	$(PIP) -e '.[train,dev,board,serve,clients]'
	$(PIP) --no-deps hls4ml # only its ap_int headers, for the C-simulation's second set of types
	@touch $@

$(VENV)/bench: $(VENV)/base
	$(PIP) -e '.[train,bench]'
	@touch $@

demo: $(VENV)/base ## recognize real clips with a real 3-D CNN at 8 bits, bit for bit as on the board
	$(BIN)/python examples/demo.py

check: $(VENV)/dev ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check ## the tests, within minutes
	$(BIN)/python -m pytest -m 'not slow'

test-all: check ## every proof, the slow ones too
	$(BIN)/python -m pytest

bench: $(VENV)/bench ## emulation against torch, ONNX Runtime and OpenVINO, interleaved
	$(BIN)/python benchmarks/emulation.py

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
