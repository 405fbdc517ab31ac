# Two commands for a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
BIN = .venv/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
WORKERS ?= 2
export POSTERITY_DATA ?= $(wildcard ../shared/data)

.PHONY: demo test flower lint docs evidence replication comparisons bench fuzz stubs clean

demo: .venv/core
	$(BIN)/posterity run rectified-flow --claim one_step
	$(BIN)/posterity report rectified-flow -o posterity-report

test: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -q $(ARGS)

flower: .venv/flower/made
	.venv/flower/bin/python -m pytest -q tests/federated -k flower

lint: .venv/lint
	$(BIN)/ruff check --output-format concise .
	$(BIN)/ruff format --check .
	$(BIN)/pyright src
	$(BIN)/lint-imports
	$(BIN)/python -m tools.docstrings

docs: .venv/docs
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d docs/_build/doctrees docs docs/_build/html/manual
	$(BIN)/posterity site -o docs/_build/html

evidence: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.evidence $(SLUGS)

replication: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.replication $(SLUGS)

comparisons: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.comparisons $(TASKS)

bench: .venv/bench
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.bench $(SLUGS)

fuzz: .venv/test
	OMP_NUM_THREADS=1 $(BIN)/python -m tools.fuzz $(or $(MINUTES),10) $(SLUGS)

stubs: .venv/core
	$(BIN)/python -m posterity.stubs
	$(BIN)/python -m tools.own_data

clean:
	rm -rf .venv docs/_build posterity-report posterity-site

.venv/made:
	$(PYTHON) -m venv .venv
	@touch $@

.venv/core: .venv/made constraints.txt pyproject.toml
	$(PIP) -e ".[generative]"
	@touch $@

.venv/test: .venv/core
	$(PIP) -e ".[test]"
	@touch $@

.venv/flower/made: .venv/made constraints-federated.txt pyproject.toml
	$(PYTHON) -m venv .venv/flower
	.venv/flower/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-federated.txt \
		-e ".[federated]" pytest pytest-timeout beartype
	@touch $@

.venv/bench: .venv/test
	$(PIP) -e ".[bench]"
	@touch $@

.venv/lint: .venv/test
	$(PIP) -e ".[lint]"
	@touch $@

.venv/docs: .venv/test
	$(PIP) -e ".[docs]"
	@touch $@
