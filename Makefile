# Each target makes its own environment first; nothing else need be installed than Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PACKAGES := scm search_spaces trainables reports harness

.PHONY: help setup demo robustness-demo gate test test-slow lint bench-quick mutation clean

help:
	@echo "make demo       sweep the two example data sets, print the ranked configs, write a page of each run"
	@echo "make robustness-demo  try the three best of those configs on singular inputs, faults and shifted data"
	@echo "make gate       compare this code's trainings with a baseline's: the commit before it, or a stored one"
	@echo "make test       run the tests"
	@echo "make test-slow  run the tests marked slow (clusters, long trainings)"
	@echo "make lint       formatting, lint and types"
	@echo "make bench-quick  every benchmark at its quick size"
	@echo "make mutation   change the code here and there, and see the tests fail; about five minutes"
	@echo "make setup      make the environment in $(VENV) (the others call it)"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,peer,track,grid,pages,mutation]'
	@touch $(STAMP)

demo: setup
	rm -rf runs/demo
	$(BIN)/scm-harness sweep examples/nh4.yaml --out runs/demo/nh4
	$(BIN)/scm-harness sweep examples/gbsg2.yaml --out runs/demo/gbsg2
	$(BIN)/scm-harness report runs/demo/nh4
	$(BIN)/scm-harness report runs/demo/gbsg2

robustness-demo: setup
	test -f runs/demo/gbsg2/leaderboard.parquet || $(BIN)/scm-harness sweep examples/gbsg2.yaml --out runs/demo/gbsg2
	$(BIN)/scm-harness robustness runs/demo/gbsg2 --top 3 --profile smoke
	@echo "page: runs/demo/gbsg2/robustness/report.html"

# In a folder of its own: what an earlier gate left is not looked at.
gate: setup
	out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && \
	$(BIN)/scm-harness gate run --suite examples/gate/suite.yaml --against HEAD~1 --any-baseline \
	  --on-inconclusive warn --out "$$out/gate"

test: setup
	$(BIN)/python -m pytest -q

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench-quick: setup
	$(BIN)/python benchmarks/step_time.py --quick
	$(BIN)/python benchmarks/peer_domains.py --quick
	$(BIN)/python benchmarks/failure_modes.py --quick
	$(BIN)/python benchmarks/coverage_control.py --quick
	$(BIN)/python benchmarks/sweep_throughput.py --quick
	$(BIN)/python benchmarks/peer_counterexamples.py --quick
	$(BIN)/python benchmarks/ranking_scale.py --quick
	$(BIN)/python benchmarks/defaults_regret.py --quick
	$(BIN)/python benchmarks/gate_calibration.py --quick

mutation: setup
	$(BIN)/python benchmarks/mutation.py --quick

clean:
	rm -rf $(VENV) runs .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
