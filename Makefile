# `make demo` and `make test` install what they need into .venv; nothing else has to be set up.
PYTHON ?= python3
VENV   := .venv
CLUSTER := .venv-cluster
GRPC   := .venv-grpc
BIN    := $(VENV)/bin
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt

# all tests of a file run in one process, because they share fixtures
PARALLEL := -n 2 --dist loadfile

# versions of pynq on the images of boards, tested in addition to the one in constraints.txt
OLDER_PYNQ := 3.0.1 3.1.2

.PHONY: help demo notebooks docs test test-all rtl-tools matrix versions cluster grpc bench check check-cpp clean
help: ## show this text
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(VENV)/base: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[train]'
	@touch $@

# all of base in one go: pip then resolves and downloads once
$(VENV)/dev: setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -e '.[train,dev,docs,board,serve,grpc,clients]'
	$(PIP) --no-deps hls4ml # only for its ap_int headers: the C-simulation is tested with them too
	@touch $(VENV)/base $@

$(VENV)/jupyter: $(VENV)/base
	$(PIP) -e '.[train,notebooks]'
	@touch $@

# Ray is large (about 750 MB): in an environment of its own, so that `make test` does not install it
$(CLUSTER)/done: setup.py constraints.txt
	$(PYTHON) -m venv $(CLUSTER)
	$(CLUSTER)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[cluster,serve]' pytest pytest-timeout
	@touch $@

# Triton's gRPC client and KServe's need a later protobuf than pynq 4.0 accepts, KServe's an older psutil
$(GRPC)/done: setup.py constraints.txt
	$(PYTHON) -m venv $(GRPC)
	grep -v '^psutil==' constraints.txt > $(@D)/constraints.txt
	$(GRPC)/bin/pip install --quiet --disable-pip-version-check -c $(@D)/constraints.txt \
		-e '.[serve,grpc]' 'tritonclient[grpc]' kserve pytest pytest-timeout
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

demo: $(VENV)/base ## classify real clips with a pretrained I3D at 8 bits, bit for bit as the accelerator
	$(BIN)/python examples/demo.py

notebooks: $(VENV)/jupyter ## open the notebooks in a browser
	$(BIN)/jupyter notebook notebooks

check: check-cpp ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# clang-format is stable within a version only: constraints.txt pins it
check-cpp: $(VENV)/dev ## format of the C++ sources
	$(BIN)/clang-format --dry-run --Werror $(wildcard hls_src/*.cpp hls_src/*.h hls_src/*/*.cpp hls_src/*/*.h hls_src/checks/stubs/*.h hls_src/checks/stubs/*/*.h)

docs: $(VENV)/dev ## build the site of the documents into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test: check ## format, lint, types, and all tests but the slow ones
	$(BIN)/python -m pytest -m 'not slow' $(PARALLEL)

test-all: test matrix versions cluster grpc rtl-tools ## every test, the slow ones too
	$(BIN)/python -m pytest -m slow

# without them the tests of hls_src/rtl and hls_src/checks are skipped with a message
rtl-tools: ## install Verilator, yosys and clang 14, which simulate, synthesize and check hls_src
	@if command -v verilator >/dev/null && command -v yosys >/dev/null \
		&& command -v clang-14 >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
		apt-get update -q && apt-get install -q -y --no-install-recommends verilator yosys clang-14 \
			make g++ \
		|| echo 'rtl-tools: apt-get could not install verilator, yosys, clang-14: not tested'; \
	else echo 'rtl-tools: HLS sources and RTL not tested; put verilator (5), yosys (0.23) and' \
		'clang-14 on PATH, on Debian with "sudo apt-get install verilator yosys clang-14"'; fi

matrix: $(OLDER_PYNQ:%=$(VENV)/pynq-%/done) ## test the driver under older versions of pynq
	for version in $(OLDER_PYNQ); do \
		$(VENV)/pynq-$$version/bin/python -m pytest -m 'not slow' -k 'board or doctor' \
			host_tests/test_board.py host_tests/test_board_xrt.py \
			host_tests/test_board_battery.py host_tests/test_doctor.py host_tests/test_backends.py || exit 1; \
		$(VENV)/pynq-$$version/bin/python -m pytest host_tests/test_deploy.py || exit 1; \
	done

versions: ## test the runtime on the oldest and newest Python and numpy
	.ci/versions

cluster: $(CLUSTER)/done ## test batches and several boards, with Ray in an environment of its own
	$(CLUSTER)/bin/python -m pytest host_tests/test_cluster.py

grpc: $(GRPC)/done ## test the service with the gRPC clients of Triton and KServe, in an environment of its own
	$(GRPC)/bin/python -m pytest host_tests/test_grpc.py

bench: $(VENV)/bench $(VENV)/dev ## benchmark the emulation and native beside other engines, and the driver's overhead
	$(BIN)/python benchmarks/emulation.py --csim
	$(BIN)/python benchmarks/driver.py

clean: ## remove the virtual environment and caches
	rm -rf $(VENV) $(CLUSTER) $(GRPC) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
