# make demo        set up, compose four LoRAs of the embedded world, print the path of the contact sheet
# make test        set up, run the tests (minutes)
# make test-long   set up, run the long tests
# make bench       set up, the CPU's goals into benchmarks/RESULTS.md (15 minutes)
# make lint        set up, ruff
#
# PYTHON is the Python >= 3.11 that makes .venv. OUT is where the demo writes.
.PHONY: demo test test-long bench lint clean

OUT ?= out/demo
VENV := .venv
# The first of these that is Python 3.11 or newer, unless PYTHON is given.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/bin
STAMP := $(VENV)/.multilora-installed

demo: $(STAMP)
	$(BIN)/multilora compose --out $(OUT)

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not long" -n 2 --dist loadfile

test-long: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long -n 2 --dist loadfile

bench: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/results.py

lint: $(STAMP)
	$(BIN)/ruff check .

# One pip call, so that torch and torchvision come as a pair from one index.
$(STAMP): pyproject.toml
	@test -n "$(PYTHON)" || { echo "no Python >= 3.11 found; say which with: make PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

clean:
	rm -rf build dist out *.egg-info
