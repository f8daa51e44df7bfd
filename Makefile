# Everything a developer does: `make help`.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-builtin-rules --no-print-directory
.SUFFIXES:

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
ARGS ?=

.PHONY: help demo demo-release test lint format bench race chaos fuzz docs lock clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## Train, pack, bake and serve a real model, and measure it (ARGS=--once ends by itself)
	@$(BIN)/python -m demo $(ARGS)

demo-release: $(VENV)/.dev ## Release a bad version and a good one under traffic, and watch what the judge does (ARGS=--quick: half a minute)
	@$(BIN)/python -m demo.release $(ARGS)

test: $(VENV)/.dev ## Run all tests (ARGS="-k words" for some)
	@$(BIN)/python -m pytest $(if $(ARGS),,-n auto --dist loadgroup) $(ARGS)

lint: $(VENV)/.dev ## Check style, types, layers, reference pages, and pins for known vulnerabilities
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check --quiet || { echo 'error: not formatted'; echo 'hint: make format'; exit 1; }
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m docs.generate --check
	@$(BIN)/python -m tools.audit

format: $(VENV)/.dev ## Format the code and sort the imports
	@$(BIN)/ruff check --fix-only --quiet
	@$(BIN)/ruff format --quiet

bench: $(VENV)/.dev ## Measure speed and size on this machine
	@$(BIN)/python -m bench $(ARGS)

race: $(VENV)/.dev ## Measure beside other servers, each installed in .race/ once (ARGS=--quick installs nothing)
	@$(BIN)/python -m bench race $(ARGS)

chaos: $(VENV)/.dev ## Break a server on purpose, and see whether its promises hold (ARGS=--quick in minutes)
	@$(BIN)/python -m chaos $(ARGS)

fuzz: $(VENV)/.dev ## Fuzz everything that reads what others wrote, for half an hour (ARGS="--minutes 5")
	@$(PIP) install atheris==3.0.0
	@$(BIN)/python -m fuzz $(ARGS)

docs: $(VENV)/.dev ## Write docs/reference from the code
	@$(BIN)/python -m docs.generate

lock: $(VENV)/.dev ## Pin the newest versions that fit pyproject.toml
	@$(PIP) install uv
	@compile() { $(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
		--no-annotate --no-config --custom-compile-command 'make lock' pyproject.toml "$$@"; }; \
	compile --group dev --extra sklearn --extra lightgbm --extra plots --extra signing --extra release \
		--extra postgres --extra mlflow --extra s3 --extra kubernetes -o requirements/dev.txt; \
	compile -c requirements/dev.txt --group build --extra sklearn -o requirements/demo.txt; \
	sed -n '/^ml-dtypes/d; s/^\([^# ].*\) \\$$/\1/p' requirements/dev.txt > $(VENV)/versions.txt; \
	compile -c $(VENV)/versions.txt -o requirements/base.txt

clean: ## Remove everything that make made
	rm -rf $(VENV) .demo .race build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# A stamp is as new as the lock that was installed, so a second call starts at once.
$(VENV)/.python:
	@python=; \
	for candidate in python3 python3.13 python3.12 python3.11; do \
		if $$candidate -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then \
			python=$$candidate; break; \
		fi; \
	done; \
	[ -n "$$python" ] || { echo 'error: no Python 3.11, 3.12 or 3.13 on the PATH' >&2; exit 1; }; \
	if [ -e $(VENV) ] && [ ! -e $(VENV)/.ours ]; then \
		echo 'error: $(VENV) is there, and make has not made it' >&2; \
		echo 'hint: remove it, or make VENV=another-folder' >&2; exit 1; \
	fi; \
	echo "making $(VENV) with $$($$python --version)" >&2; \
	rm -rf $(VENV); mkdir -p $(VENV); touch $(VENV)/.ours; \
	$$python -m venv $(VENV) || { rm -rf $(VENV); \
		echo 'hint: on Debian and Ubuntu, apt install python3-venv' >&2; exit 1; }
	@touch $@

$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: requirements/%.txt pyproject.toml | $(VENV)/.python
	@echo 'installing what requirements/$*.txt pins (once)' >&2
	@if [ -x $(BIN)/uv ]; then \
		$(BIN)/uv pip install --quiet --python $(BIN)/python --compile-bytecode --require-hashes -r $<; \
	else $(PIP) install --require-hashes -r $<; fi
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@
