# Two commands set up everything on a new machine: `make demo` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# One thread for each test process: two processes with two threads each slow each other tenfold.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q
WORKERS ?= 2

.PHONY: demo test test-quick test-hostile test-peers format lint types tiny lock clean

demo: .venv/installed
	bash training/pipeline.sh

test: .venv/installed
	$(TESTS) -n $(WORKERS) --dist loadgroup

# Without training runs, servers and browsers: under two minutes.
test-quick: .venv/installed
	$(TESTS) -n $(WORKERS) -m "not slow"

# The fuzz, mutation and kill tests alone, with twelve times as many examples: about ten minutes.
test-hostile: .venv/installed
	$(TESTS) -n $(WORKERS) --dist loadgroup --hostile

# The suites and example data of others (transformers, PEFT, Anole, Chameleon, LLaVA,
# LLaMA-Factory), fetched into build/peers from PyPI and GitHub; by hand and before a release.
# PEERS=DIR names a folder of repositories (DIR/transformers, DIR/anole, ...) in place of GitHub.
test-peers: .venv/installed
	$(BIN)/python tests/peers/run.py $(if $(PEERS),--peers $(PEERS))

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Style, imports between the rooms, dead code, plain English.
lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/vulture
	$(BIN)/python .ci/plain_english.py

types: .venv/installed
	$(BIN)/mypy

# Trains the embedded model from nothing (an hour and a half on 2 cores).
tiny: .venv/installed
	$(BIN)/python -m training.make_tiny --output build/tiny

# Resolves pyproject.toml's ranges to the pins of requirements.txt (needs uv). The CUDA packages are
# left to torch, which pins them itself: a CPU build of torch needs none of them.
lock:
	uv pip compile pyproject.toml --all-extras --universal --python-version 3.10 \
	    --no-annotate --no-emit-index-url --no-emit-find-links --quiet \
	    --custom-compile-command "make lock" --output-file requirements.txt
	sed -i -E '/^(nvidia-|cuda-|triton)/d' requirements.txt

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf build .venv
