# make demo    sets up everything, then trains on scanned digits one sample at a time, with and without normalization
# make test    sets up everything, then runs all tests
# make check   linters, types, import contract, docs map
# PYTHON is any Python >= 3.11; the environment is made once in .venv and reused.

PYTHON ?= python3
BIN := .venv/bin
export OMP_WAIT_POLICY = PASSIVE

.PHONY: demo test check setup clean
.DEFAULT_GOAL := test

setup: .venv/ready

# torch first and pinned: a range would let pip fetch a GPU build of several GB. The editable install builds without it.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "streamnorm needs Python >= 3.11; run: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: .venv/ready
	$(BIN)/streamnorm compare --out runs/demo

test: .venv/ready
	$(BIN)/python -m pytest -n 2

check: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_paper_map.py tests/test_public_api.py

clean:
	rm -rf .venv runs
