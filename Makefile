PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
REPORT := report

.PHONY: report test coverage lint docs benchmarks clean

report: $(READY)  ## run the main job on the embedded model
	$(BIN)/pushforward report --out $(REPORT)
	@echo "The report lies at $(CURDIR)/$(REPORT)/report.html"

test: $(READY)  ## run the tests
	$(BIN)/python -m pytest -n auto --dist worksteal

coverage: $(READY)  ## run the same tests, and see that they reach 95 % of all branches
	$(BIN)/python -m pytest -n auto --dist worksteal -q --cov=pushforward --cov-branch --cov-report=
	$(BIN)/coverage report --fail-under=95

lint: $(READY)  ## lint, format check, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

docs: $(READY)  ## build the documentation, warnings are errors
	$(BIN)/sphinx-build -W --keep-going -b html docs docs/_build/html

benchmarks: $(READY)  ## time the library against its peers
	$(BIN)/python benchmarks/exact.py
	$(BIN)/python benchmarks/exact.py --planning
	$(BIN)/python benchmarks/dense.py
	$(BIN)/python benchmarks/penalties.py

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[cli,dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(REPORT) docs/_build .coverage .pytest_cache
