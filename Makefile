# Everything here installs what it needs (Debian packages as root; the rest into $LORA_OPERATOR_CACHE) and says how long it took.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help demo demo-down test test-fast test-e2e lint format requirements bench-fetch cluster cluster-stop

# Found when a recipe runs, not when make starts: `make help` must not install anything. `bootstrap` prints the venv's path.
IN_VENV = venv=$$(e2e/bootstrap); export PATH="$$venv/bin:$$PATH" PYTHONPATH=operator:.;
TIMED = began=$$SECONDS; finish() { echo "[$$((SECONDS - began)) s] $@: $$([[ $$? == 0 ]] && echo done || echo FAILED)"; }; trap finish EXIT;

help: ## Show this list
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

demo: ## Real Kubernetes, real vLLM: adapters from apply to answers (leaves it running)
	@$(TIMED) $(IN_VENV) python -m e2e.demo

demo-down: ## End the demo and its cluster
	@$(TIMED) $(IN_VENV) python -m e2e.demo down

test: ## Lint, then every test, the end-to-end ones on the real cluster with the real engine
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory test-fast
	@$(MAKE) --no-print-directory test-e2e

test-fast: ## Unit, component (real etcd + kube-apiserver) and chart tests
	@$(TIMED) $(IN_VENV) pytest tests -n 2 --dist loadfile --durations=10

test-e2e: ## The end-to-end tests alone
	@$(TIMED) $(IN_VENV) pytest e2e --durations=10

lint: ## Formatting, linting, types, import rules, generated files
	@$(TIMED) $(IN_VENV) \
	ruff check; \
	ruff format --check; \
	mypy operator/lora_operator tests e2e; \
	lint-imports; \
	python -m lora_operator.gen.crds --check

format: ## Format the code and fix what ruff can fix
	@$(IN_VENV) ruff check --fix; ruff format

# No index address, host name or path may enter these files: they are the same wherever they are compiled.
COMPILE = pip compile --quiet --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate --no-header
requirements: ## Compile the hashed requirements from pyproject.toml and requirements/*.in (UPGRADE=1 moves the pins)
	@$(TIMED) uv=$$(e2e/bootstrap uv); upgrade=$(if $(UPGRADE),--upgrade); \
	$$uv $(COMPILE) $$upgrade --universal pyproject.toml -o requirements/operator.txt; \
	$$uv $(COMPILE) $$upgrade --universal pyproject.toml --group dev -o requirements/dev.txt; \
	$$uv $(COMPILE) $$upgrade --universal requirements/build.in -o requirements/build.txt; \
	$$uv $(COMPILE) $$upgrade --universal requirements/bootstrap.in -o requirements/bootstrap.txt; \
	$$uv $(COMPILE) $$upgrade --universal requirements/bench.in -o requirements/bench.txt; \
	$$uv $(COMPILE) $$upgrade --universal --override requirements/engine-overrides.txt \
	    requirements/engine.in -o requirements/engine.txt

bench-fetch: ## Downloads beside hf, aws and curl: ratios, memory, the share of verifying
	@$(IN_VENV) python -m e2e.bench.fetch

cluster: ## Start the test cluster (or find the live one)
	@$(IN_VENV) python -m e2e.cluster start

cluster-stop: ## End the test cluster
	@$(IN_VENV) python -m e2e.cluster stop
