# Everything happens in ./.venv; nothing is installed outside of this directory.

PYTHON ?= python3
ARGS ?=
RUNS ?= 10
# The tests mostly wait for servers and leases: a few more at a time than there are cores. "make test AT_ONCE=0": one by one.
AT_ONCE ?= 4

# The tests and the demo start many processes: each would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --disable-pip-version-check
APP := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
BENCH := $(VENV)/.installed-bench
DIST := $(VENV)/.installed-dist
GATEWAY := $(VENV)/.installed-gateway
DOCS := $(VENV)/.installed-docs

# pip reads dependency groups from 25.1 on. A new venv has the pip of its Python, mostly an older one, and replacing
# that is one more thing that can fail, so the groups are read here.
GROUPS := import sys, tomllib; groups = tomllib.load(open("pyproject.toml", "rb"))["dependency-groups"]; \
	print(*sorted({each for name in sys.argv[1:] for each in groups[name]}), sep="\n")
OLD := import sys; sys.exit(sys.version_info < (3, 11))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-gateway soak lint docs bench dist clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: $(APP) ## see a queue at work, on a server of its own
	@$(PY) -m aiqueue demo $(ARGS)

test: $(DEV) ## run the tests on a real server (ARGS="-k lane" runs some)
	@$(PY) -m pytest -n $(AT_ONCE) --dist worksteal $(ARGS)

test-gateway: $(GATEWAY) ## run the gateway's tests with litellm, which is 400 MB; "make test" skips those
	@$(PY) -m pytest -n $(AT_ONCE) --dist worksteal tests/gateway $(ARGS)

soak: $(DEV) ## run the tests RUNS times (10 unless said) and count
	@passed=0; for run in $$(seq $(RUNS)); do \
	  if $(PY) -m pytest -n $(AT_ONCE) --dist worksteal >$(VENV)/soak.log 2>&1; then passed=$$((passed + 1)); else tail -n 40 $(VENV)/soak.log; fi; \
	  echo "soak: run $$run of $(RUNS), $$passed without a failure: $$(tail -n 1 $(VENV)/soak.log)"; \
	done; test $$passed -eq $(RUNS)

lint: $(DEV) ## check style, format, types and the direction of imports
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy
	@$(VENV)/bin/lint-imports

docs: $(DOCS) ## build the site into build/docs; a broken link, or a page that no page lists, fails
	@$(PY) -m tools.docs reference --check
	@rm -rf build/docs
	@$(PY) -m sphinx --fail-on-warning --keep-going --quiet --fresh-env --jobs auto \
	  --conf-dir tools/site --doctree-dir build/doctrees . build/docs
	@echo "the site is build/docs/index.html"

bench: $(BENCH) ## measure everything and write docs/benchmarks (ARGS="--help" shows what else)
	@$(PY) -m benchmarks $(or $(ARGS),all)

dist: $(DIST) ## build the wheel and the source distribution into ./dist
	@rm -rf dist
	@$(PY) -m build --outdir dist .

clean: ## remove ./.venv, caches, builds and ./.aiqueue, the embedded server's data; nothing else
	rm -rf $(VENV) .aiqueue build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage
	rm -rf tests/guide/node_modules tests/guide/.install tests/schema/node_modules tests/schema/.install
	find aiqueue tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The interpreter stands for the venv: where it dangles or was upgraded, the venv is made anew.
$(PY):
	@command -v $(PYTHON) >/dev/null || { echo "there is no $(PYTHON): install Python 3.11 or newer, or say which: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c '$(OLD)' || { echo "$$($(PYTHON) --version 2>&1) is too old, aiqueue needs 3.11 or newer; with another one: make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -m venv --clear $(VENV) || { echo "$(PYTHON) -m venv does not work: install your system's venv package (python3-venv)" >&2; exit 1; }

$(APP): $(PY) pyproject.toml
	@echo "installing aiqueue into $(VENV)"
	@$(PIP) --editable .
	@touch $@

$(DEV): $(APP)
	@echo "installing the tools of the tests into $(VENV)"
	@$(PY) -c '$(GROUPS)' test lint docs > $(VENV)/tools.txt
	@$(PIP) --requirement $(VENV)/tools.txt
	@touch $@

$(BENCH): $(APP)
	@echo "installing what draws the measurements into $(VENV)"
	@$(PY) -c '$(GROUPS)' bench > $(VENV)/bench.txt
	@$(PIP) --requirement $(VENV)/bench.txt
	@touch $@

$(GATEWAY): $(DEV)
	@echo "installing litellm into $(VENV)"
	@$(PY) -c '$(GROUPS)' gateway > $(VENV)/gateway.txt
	@$(PIP) --requirement $(VENV)/gateway.txt
	@touch $@

$(DOCS): $(APP)
	@echo "installing what builds the site into $(VENV)"
	@$(PY) -c '$(GROUPS)' docs > $(VENV)/docs.txt
	@$(PIP) --requirement $(VENV)/docs.txt
	@touch $@

$(DIST): $(PY) pyproject.toml
	@$(PY) -c '$(GROUPS)' dist > $(VENV)/dist.txt
	@$(PIP) --requirement $(VENV)/dist.txt
	@touch $@
