# Two commands do all the set-up: `make demo` runs the main job, `make test` passes the tests.
PYTHON ?= python3
VENV   := .venv
CLUSTER := .venv-cluster
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

# a file of tests stays in one process: its tests share what they build
PARALLEL := -n 2 --dist loadfile

# beside the pynq of constraints.txt: what the images of boards carry
OLDER_PYNQ := 3.0.1 3.1.2

.PHONY: help demo notebooks test test-all rtl-tools matrix versions cluster bench check clean
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

$(VENV)/jupyter: $(VENV)/base
	$(PIP) -e '.[train,notebooks]'
	@touch $@

# Ray is large: apart, so that the tests of everything else need not wait for it
$(CLUSTER)/done: setup.py constraints.txt
	$(PYTHON) -m venv $(CLUSTER)
	$(CLUSTER)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[cluster,serve]' pytest pytest-timeout
	@touch $@

$(VENV)/bench: $(VENV)/base
	$(PIP) -e '.[train,bench]'
	@touch $@

$(VENV)/pynq-%/done: setup.py constraints.txt
	$(PYTHON) -m venv $(@D)
	grep -v '^pynq==' constraints.txt > $(@D)/constraints.txt
	$(@D)/bin/pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt \
		-e '.[board]' pynq==$* pytest pytest-timeout
	@touch $@

demo: $(VENV)/base ## recognize real clips with a real 3-D CNN at 8 bits, bit for bit as on the board
	$(BIN)/python examples/demo.py

notebooks: $(VENV)/jupyter ## open the notebooks in a browser
	$(BIN)/jupyter notebook notebooks

check: $(VENV)/dev ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

test: check ## the tests, within minutes
	$(BIN)/python -m pytest -m 'not slow' $(PARALLEL)

test-all: test matrix versions cluster rtl-tools ## every proof, the slow ones too
	$(BIN)/python -m pytest -m slow

# without them the tests of hls_src/rtl are skipped, and say so
rtl-tools: ## Verilator and yosys, which simulate and synthesize hls_src/rtl
	@if command -v verilator >/dev/null && command -v yosys >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && apt-get install -q -y --no-install-recommends verilator yosys make g++ \
		|| echo 'rtl-tools: apt-get could not install verilator and yosys: RTL not tested'; \
	else echo 'rtl-tools: RTL not tested; put verilator (5) and yosys (0.23) or later on PATH,' \
		'on Debian with "sudo apt-get install verilator yosys"'; fi

matrix: $(OLDER_PYNQ:%=$(VENV)/pynq-%/done) ## the driver under older versions of pynq
	for version in $(OLDER_PYNQ); do \
		$(VENV)/pynq-$$version/bin/python -m pytest -m 'not slow' -k 'board or doctor' \
			host_tests/test_board.py host_tests/test_doctor.py host_tests/test_backends.py || exit 1; \
	done

versions: ## the runtime on the oldest and newest Python and numpy
	.ci/versions

cluster: $(CLUSTER)/done ## batches and many boards, with Ray in an environment of its own
	$(CLUSTER)/bin/python -m pytest host_tests/test_cluster.py

bench: $(VENV)/bench $(VENV)/dev ## emulation against other engines, interleaved; the driver's cost
	$(BIN)/python benchmarks/emulation.py --csim
	$(BIN)/python benchmarks/driver.py

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) $(CLUSTER) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
