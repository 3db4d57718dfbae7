# make demo | demo-lm | test | check | docs | results | bench | bench-gpu | venv | clean. Each sets up .venv first: minutes once, nothing afterwards.

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV := .venv
RUN := ./$(VENV)/bin/python
PIP_INSTALL := $(RUN) -m pip install --no-input --disable-pip-version-check -q
# Written last: it exists only where an install went through.
INSTALLED := $(VENV)/.installed
# Two workers, whole files each, so that a file's fixtures are built once, in the order of tests/conftest.py.
# `make test PYTEST_ARGS=tests/test_lora.py`
PYTEST_ARGS ?= -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: demo demo-lm test check docs results bench bench-gpu venv clean

demo: venv
	./.venv/bin/python -m harness -m sweeps=demo && ./.venv/bin/python -m analysis report --sweep demo

# A language model pretrained here, then adapted to another domain: about half an hour.
demo-lm: venv
	./.venv/bin/python -m harness -m sweeps=newsgpt && ./.venv/bin/python -m harness -m sweeps=demo_lm && ./.venv/bin/python -m analysis report --sweep demo_lm

test: venv
	$(RUN) -m pytest $(PYTEST_ARGS)

check: venv
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	@$(MAKE) --no-print-directory docs

# The site, readable from disk, in site/. The variable silences mkdocs-material's notice of its successor.
# Never with --quiet: mkdocs then hears no warnings, and --strict has nothing to fail on.
docs: venv
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

# What README.md and docs/ show of sweeps, from the recorded runs in docs/results/.
results: venv
	$(RUN) docs/rebuild.py

# Timings, on a machine that does nothing else: a Markdown table for each question, about an hour.
bench: venv
	$(RUN) benchmarks/step.py
	$(RUN) benchmarks/packs.py
	$(RUN) benchmarks/cells.py
	$(RUN) benchmarks/many_adapters.py
	$(RUN) benchmarks/many_runs.py docs/results/reuters_tuned.tar.xz

# On a GPU, with whatever `python` has PyTorch for it, transformers and accelerate: BENCH_PYTHON=python3.12
BENCH_PYTHON ?= python3
bench-gpu:
	PYTHONPATH=. $(BENCH_PYTHON) benchmarks/gpu.py

venv: $(INSTALLED)

# An install that is out of date is brought up to date in place; one that was interrupted starts over, because pip
# takes a half-written package for an installed one.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "lora-harness needs Python 3.11 or newer, '$(PYTHON)' is not; name one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; \
	  exit 1; }
	@if [ ! -e $@ ]; then echo "setting up $(VENV) with $(PYTHON)"; $(PYTHON) -m venv --clear $(VENV); fi
	@rm -f $@
	@echo "installing lora-harness and its dependencies into $(VENV), a few minutes the first time"
	@$(PIP_INSTALL) --use-pep517 -c constraints.txt -e '.[test,dev]'
	@touch $@

# What make and the tools wrote; never runs/ and reports/.
clean:
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find harness analysis hydra_plugins tests -name __pycache__ -type d -prune -exec rm -rf {} +
