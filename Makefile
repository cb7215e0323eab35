# SPDX-License-Identifier: Apache-2.0
# `make help` lists the targets. Each does the set-up that it needs; what is done already is skipped.

VENV ?= .venv
# Arguments of `make train`, `make demo`, `make gallery`, `make test-quick`, `make test-pinned` and `make test-hf`.
ARGS ?=
# Processes that run tests.
JOBS ?= 2
# Interpreters to make the environment from, in this order; constraints.txt is known to install on 3.11 to 3.14.
PYTHON ?= python3.12 python3.11 python3.13 python3.14 python3 python

python := $(VENV)/bin/python
# A process that is done takes over half of what another one has left: neighbours mostly stay together with what they share.
pytest := $(python) -m pytest -n $(JOBS) --dist worksteal
lowest := $(VENV)/lowest-transformers
# What a clean-up may delete: nothing that training wrote, and no environment.
caches := .pytest_cache .ruff_cache .mypy_cache .hypothesis build karat_vit.egg-info

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help train demo gallery test test-quick test-pinned test-lowest test-hf lint docs format clean

help: ## List the targets
	@echo "make TARGET [VENV=path of the Python environment, $(VENV) unless given]"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' Makefile | while IFS='|' read -r name text; do \
		printf '  %-12s %s\n' "$$name" "$$text"; done

train: $(VENV)/.installed-train ## Train; the handwritten digits by default, or ARGS="[recipe.yaml] [flags]"
	$(python) run_image_classification.py $(ARGS)

demo: $(VENV)/.installed-demo ## Show a model on a page in the browser: ARGS="--model DIR_OR_REPO [flags]"
	$(python) -m analysis demo $(ARGS)

gallery: $(VENV)/.installed-analysis ## Make the pictures of docs/gallery anew, from models that it trains
	$(python) -m analysis gallery --overwrite $(ARGS)

test: ## Lint, then run the tests with the pinned and with the lowest Transformers
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory test-pinned
	@$(MAKE) --no-print-directory test-lowest

test-quick: $(VENV)/.installed-test ## Run the tests that start no processes and compile nothing: 3 minutes on two cores
	$(pytest) --ignore=tests/system -m "not system" $(ARGS)

test-pinned: $(VENV)/.installed-test ## Run the tests with the versions of constraints.txt; ARGS go to pytest
	$(pytest) $(ARGS)

# Not the arithmetic of the operator, which Transformers has no part in, nor what compilers make of each basis.
arithmetic := basis initialisation karat_operator kernels projection
export := tests/system/test_compile_and_export.py
exported := operators_compile operators_export onnx_by_the_exporter_of_torchscript

test-lowest: $(lowest)/.installed ## Run what depends on Transformers' version with the lowest
	PYTHONPATH=$(lowest) $(pytest) \
		tests/modeling_karat_vit $(arithmetic:%=--ignore=tests/modeling_karat_vit/test_%.py) \
		$(export) $(exported:%=--deselect=$(export)::test_%) \
		tests/test_presets.py tests/system/test_remote_code.py tests/system/test_optional_packages.py \
		tests/image_classification/training tests/system/test_publisher.py::test_from_the_shell_to_a_stranger

# Transformers' tests have marks of their own. Of each test that is skipped the reason is shown.
hf-options := -o addopts='-rs --import-mode=importlib' -W ignore::pytest.PytestUnknownMarkWarning
test-hf: $(lowest)/.installed ## Run Transformers' own common tests, of the pinned and of the lowest one, on our models
	$(python) tests/hf/fetch.py $(VENV)/transformers-tests
	$(pytest) $(hf-options) $(ARGS) tests/hf/common.py
	PYTHONPATH=$(lowest) $(python) tests/hf/fetch.py $(VENV)/transformers-tests
	PYTHONPATH=$(lowest) $(pytest) $(hf-options) $(ARGS) tests/hf/common.py

lint: $(VENV)/.installed-test ## Check style, formatting and types
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy

docs: $(VENV)/.installed-docs ## Build the pages of docs/ as a site in build/site; links that lead nowhere are errors
	$(VENV)/bin/zensical build --strict --clean

format: $(VENV)/.installed-test ## Mend style and formatting
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

clean: ## Delete caches and build leftovers
	rm -rf $(caches)
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

# Debian and Ubuntu leave out ensurepip, without which there is no environment: hence the second question.
define question
import importlib.util, sys; \
old = sys.version_info < (3, 11); \
print("old" if old else "fits" if importlib.util.find_spec("ensurepip") else "bare")
endef

$(python):
	@if [ -n "$$(ls -A '$(VENV)' 2>/dev/null)" ]; then \
		echo "VENV=$(VENV) is a folder with other things in it. Give the path of a Python environment, or of a" >&2; \
		echo "folder that does not exist, to make one there." >&2; \
		exit 1; \
	fi; \
	bare=; \
	for candidate in $(PYTHON); do \
		case "$$($$candidate -c '$(question)' 2>/dev/null)" in \
			fits) echo "Making the environment $(VENV) with $$($$candidate -V)"; exec $$candidate -m venv '$(VENV)';; \
			bare) bare="$$bare $$candidate";; \
		esac; \
	done; \
	if [ -n "$$bare" ]; then \
		echo "Found$$bare, but without Python's venv and ensurepip modules. On Debian and Ubuntu:" >&2; \
		echo "    sudo apt-get install python3-venv" >&2; \
	else \
		echo "Found no Python 3.11 or later (tried: $(PYTHON)). Install one, or name yours:" >&2; \
		echo "    make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; \
	fi; \
	exit 1

# One stamp for each extra of setup.cfg. torch needs setuptools anyway, so the build uses the pinned one.
$(VENV)/.installed-%: setup.cfg pyproject.toml constraints.txt | $(python)
	@echo "Installing KArAt-ViT and the '$*' packages into $(VENV): several GB on the first call, mostly PyTorch"
	@$(python) -m pip --version >/dev/null 2>&1 || $(python) -m ensurepip
	$(python) -m pip install --quiet --constraint constraints.txt setuptools
	$(python) -m pip install --constraint constraints.txt --no-build-isolation --editable '.[$*]'
	@touch $@

$(lowest)/.installed: requirements-lowest.txt $(VENV)/.installed-test
	rm -rf $(lowest) && mkdir $(lowest)
	$(python) -m pip install --quiet --no-deps --target $(lowest) --requirement requirements-lowest.txt
	@touch $@
