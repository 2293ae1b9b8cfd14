# Bare `make` lists the targets. Everything runs in .venv, which `setup` makes from requirements.lock.
PYTHON ?= python3.11
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup reproduce sweep compare federated bench test test-long test-distributed test-lowest test-newest fuzz check docs docstrings notebook lock clean

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-17s %s\n", $$1, $$2}'

setup: .venv/ready ## a virtual environment with what requirements.lock pins

.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes --requirement requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --config-settings editable_mode=compat --editable .
	@touch $@

reproduce: setup ## LAQ, TWO-LAQ, GD, QGD, LAG on the embedded MNIST: the table and figures of LAQ, in results/laq-logistic (6 to 15 minutes)
	$(BIN)/python -m experiments.reproduce laq-logistic

sweep: setup ## the default grid of b, C and D on the embedded MNIST, in results/sweep (three minutes)
	$(BIN)/python -m experiments.sweep

compare: setup ## every method at its best on a convex problem, in results/compare (half an hour)
	$(BIN)/python -m experiments.compare

federated: setup ## LAQ, GD, QGD and EF21 as a federation in one process, in results/federated (half a minute)
	$(BIN)/python -m experiments.federated

bench: setup ## speed and memory beside this machine's GEMM rate
	$(BIN)/python -m experiments.bench

test: setup ## the tests (seven minutes on two cores)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-long: setup ## the tests that take minutes each
	$(BIN)/python -m pytest -m long

test-distributed: setup ## the tests that start many processes
	$(BIN)/python -m pytest -m distributed

# the library itself, in environments of its own; another Python: make test-newest PYTHON=python3.13
TOOLS := beartype equinox flax hypothesis polars pytest pytest-xdist
DECLARED := import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"])

test-lowest: ## the core tests with the lowest versions that pyproject.toml allows, in .venv-lowest
test-newest: ## the core tests with the newest versions of everything, in .venv-newest
test-lowest: DEPENDENCIES = $$($(PYTHON) -c '$(DECLARED)' | sed 's/>=/==/g')
test-lowest test-newest: test-%:
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet --disable-pip-version-check --editable . $(TOOLS) $(DEPENDENCIES)
	.venv-$*/bin/python -m pip list --disable-pip-version-check | grep -E '^(jax|jaxlib|jaxtyping|numpy|optax) '
	.venv-$*/bin/python -m pytest -n 2 --dist loadfile -m 'core and not long and not distributed' tests/library tests/laws

fuzz: setup ## a minute of atheris over the decoder of messages
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "atheris>=3.0"
	$(BIN)/python tests/library/fuzz.py -max_total_time=60 -max_len=200

check: setup ## format, lint, types: what CI runs beside the tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

docs: setup ## the pages of docs/, in results/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo results/site/index.html

docstrings: setup ## write the shared sections of the factories' docstrings again
	$(BIN)/python docs/docstrings.py

notebook: setup ## the Colab notebook again, from experiments/notebook/laqjax_colab.py
	$(BIN)/jupytext --quiet --to ipynb --update experiments/notebook/laqjax_colab.py

lock: setup ## pin again what pyproject.toml asks for (needs uv on the PATH)
	uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-header \
		--extra experiments --extra flower --extra docs --extra dev --output-file requirements.lock pyproject.toml requirements-build.in

clean: ## remove the environments and the results
	rm -rf .venv .venv-* results
