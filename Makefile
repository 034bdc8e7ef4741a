# make demo    sets up everything, then learns from a stream whose rule changes, row by row, and trains on scanned digits
#              one sample at a time, with and without normalization
# make test    sets up everything, then runs all tests
# make check   linters, types, import contract, docs map
# make build   compiles the kernels again if their sources changed; without a C++ compiler there are none
# make docs    builds the site into build/site, strictly, and checks its links
# make bench   times the layers beside their peers, each way to keep memory; takes a while
# make fuzz    random histories of layers against the oracle, for SECONDS=600
# make kill    commands that write, killed at KILLS=200 random moments, go on to the same end
# make hostile  FILES=10000 damaged files of runs and data are read, or refused in a line
# make soak    long streams: memory and time a step stay flat, statistics right
# make clients  tests of other libraries that use the layers, in an environment of their own with the versions of
#              tests/clients/requirements.txt; not in CI
# make sanitize  tests the compiled kernels under address and undefined-behavior sanitizers; needs gcc
# PYTHON is any Python >= 3.11; the environment is made once in .venv and reused.

PYTHON ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test check docs setup build bench fuzz kill hostile soak clients sanitize clean
.DEFAULT_GOAL := test

setup: .venv/ready

# torch first and pinned: a range would let pip fetch a GPU build of several GB. The editable install builds without it.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "streamnorm needs Python >= 3.11; run: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

build: .venv/ready
	$(BIN)/python hatch_build.py

demo: build
	$(BIN)/streamnorm learn drift --arms none layer streaming --out runs/demo-learn
	$(BIN)/streamnorm compare --out runs/demo

test: build
	$(BIN)/python -m pytest -n 2

SECONDS ?= 600
fuzz: build
	$(BIN)/python tests/fuzz.py --seconds $(SECONDS)

KILLS ?= 200
kill: build
	OMP_NUM_THREADS=1 $(BIN)/python tests/kill.py --kills $(KILLS)

FILES ?= 10000
hostile: build
	OMP_NUM_THREADS=1 $(BIN)/python tests/hostile.py --files $(FILES)

soak: build
	OMP_NUM_THREADS=1 $(BIN)/python tests/soak.py

bench: build
	$(BIN)/streamnorm bench

CLIENTS := build/clients
clients: $(CLIENTS)/ready
	$(CLIENTS)/bin/python -m pytest tests/clients

$(CLIENTS)/ready: pyproject.toml constraints.txt tests/clients/requirements.txt
	test -x $(CLIENTS)/bin/python || $(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(CLIENTS)/bin/pip install --quiet --disable-pip-version-check -c constraints.txt -r tests/clients/requirements.txt -e '.[dev]'
	touch $@

# The sanitizers' own libraries have to be loaded before Python; what Python and torch leave to the exit is no leak.
sanitize: .venv/ready
	CXX=g++ $(BIN)/python hatch_build.py --sanitize
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	  STREAMNORM_LIBRARY=build/sanitize/_native.so STREAMNORM_ISA=base \
	  $(BIN)/python -m pytest -n 2 tests/ops/test_native.py tests/ops/test_fused_changes.py tests/nn/test_fusedscan*.py tests/train/test_online*.py -k "not every_instruction_set and not (large_tensors and caches)"

docs: .venv/docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	$(BIN)/python docs/site/check.py build/site

.venv/docs: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/project/test_paper_map.py tests/project/test_public_api.py

clean:
	rm -rf .venv runs build streamnorm/ops/_native.*
