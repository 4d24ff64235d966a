# make demo, make test: each sets up .venv from requirements.lock on the first run and then starts at once.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
PIP = .venv/bin/python -m pip install -qq --disable-pip-version-check
JOBS ?= 2

.PHONY: demo test lint env
demo: env
	.venv/bin/python examples/radon.py

test: env
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n $(JOBS) tests

lint: env
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

env: .venv/installed

.venv/installed: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "bayesmeta needs Python 3.11 or later, with the module venv" >&2; exit 1; }
	@echo "setting up .venv with $(PYTHON): takes a minute or two, once"
	@test -x .venv/bin/python || $(PYTHON) -m venv .venv
	@$(PIP) --constraint requirements.lock $$(grep '^torch==' requirements.lock)
	@$(PIP) --requirement requirements.lock
	@$(PIP) --no-deps --no-build-isolation --editable .
	@touch $@
