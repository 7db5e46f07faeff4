# make train   train, evaluate and report a small model on emoji
# make test    the test suite; make test-slow adds fault injection, several processes, parity with other libraries
# make test-extra  runs against servers of buckets and a Dask cluster, follows the guide to data command by command, and
#              compares more cases of losses with dense formulas; make test-exhaustive compares every loss of pairs on
#              1 to 8 devices, with each tile and strategy
# make docs    the documentation as a site, in site/
# make plan    an environment in which plan.py compiles for TPUs and GPUs (6 GB)

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# Programs that run once.
QUICKLY_COMPILED := --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false

.PHONY: train test test-slow test-extra test-exhaustive docs plan lint clean

train: .venv/runtime
	$(BIN)/python train.py --config=configs/emoji.py --workdir=runs/emoji

# Half of the time would go to making fast code of programs that run once; the slow tests run what users get.
test: export XLA_FLAGS := $(QUICKLY_COMPILED)
test: .venv/test
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: .venv/slow
	$(BIN)/python -m pytest -m "slow and not extra" -n 2 --dist loadfile

test-extra: .venv/extra
	$(BIN)/python -m pytest -m "extra and not exhaustive" -n 2 --dist loadfile

test-exhaustive: export XLA_FLAGS := $(QUICKLY_COMPILED)
test-exhaustive: .venv/test
	$(BIN)/python -m pytest -m exhaustive -n 2 --dist load

docs: .venv-docs/ready
	.venv-docs/bin/mkdocs build --strict

plan: .venv-plan/ready
	@echo "Now: .venv-plan/bin/python plan.py --config=configs/siglip_b16.py --topology=v5e:16x16"

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv .venv-docs .venv-plan site

.venv/runtime: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/test: requirements-test.txt .venv/runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@

.venv/slow: requirements-slow.txt requirements-peers.txt .venv/test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-slow.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements-peers.txt
	@touch $@

.venv/extra: requirements-extra.txt requirements-remote.txt .venv/slow
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-extra.txt
	@touch $@

# The site is made from the source: JAX is not installed.
.venv-docs/ready: requirements-docs.txt
	test -x .venv-docs/bin/python || $(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-docs.txt
	@touch $@

# Apart from .venv: with libtpu importable, JAX looks for a TPU at every start.
.venv-plan/ready: requirements.txt requirements-plan.txt
	test -x .venv-plan/bin/python || $(PYTHON) -m venv .venv-plan
	.venv-plan/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-plan.txt
	@touch $@
