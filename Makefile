# `make report` and `make test` do all the set-up; `make` alone lists the rest.
SHELL   := /bin/bash
PYTHON  ?= python3
VENV    ?= .venv
OUT     ?= out/demo
BIN     := $(abspath $(VENV))/bin
export PATH := $(PATH):/usr/sbin:/sbin
export PYTHON
# Some images set it: then every start of rxlab compiles it anew.
unexport PYTHONDONTWRITEBYTECODE

# What the environment was made of and where: a change of any of it brings the environment up to date, nothing else does.
KEY   := $(shell { cat pyproject.toml constraints.txt .ci/setup; pwd; $(PYTHON) --version; } 2>&1 | sha256sum | cut -c1-16)
STAMP := $(VENV)/installed-$(KEY)

.NOTPARALLEL:
.PHONY: help report test test-vm check lab bench lock clean system-record system-test
help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 10

report: system-record $(STAMP) ## set up, record RPS off and on (or take data/ where that is forbidden), render out/demo/report.html
	$(BIN)/rxlab demo --out $(OUT)

test: system-test $(STAMP) ## set up and run the whole test suite; the live part needs root
	@.ci/test $(BIN)/python

# An emulated CPU stops wherever this machine's does, so a guest meets orders of events that are rare elsewhere: what fails is
# tried once more, both outcomes are printed, and what is wrong by itself fails twice.
GUESTS = RXLAB_VM=1 timeout --foreground --signal=INT --kill-after=60 45m $(BIN)/python -m pytest tests/vm
# A guest shares this machine's root file system, so root; kernels and QEMU (800 MB) are kept in ~/.cache/rxlab-vm.
test-vm: system-test $(STAMP) ## other kernels and a NIC with queues, in QEMU
	@tests/vm/fetch
	@$(GUESTS) || { echo 'rxlab: what failed once more, in guests of its own'; $(GUESTS) --last-failed; }

check: $(STAMP) ## linters and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell

lab: $(STAMP) ## JupyterLab on notebooks/
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) notebooks

bench: system-record $(STAMP) ## the benchmarks of tests/bench, results in out/bench
	@tests/bench/run $(BIN)/python

lock: ## write constraints.txt anew from what PyPI has today
	@.ci/setup lock out/lock

clean: ## remove the environment, caches and what the other targets made (never other recordings)
	rm -rf $(VENV) out/demo out/test out/bench out/lock out/setup.log build dist *.egg-info
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find rxlab tests notebooks -name __pycache__ -type d -prune -exec rm -rf {} +

system-record system-test: system-%:
	@.ci/setup system $*

$(STAMP):
	@.ci/setup venv $(VENV)
	@rm -f $(VENV)/installed-* && touch $@
