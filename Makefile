# make train   train, evaluate and report a small model on emoji
# make test    the test suite; make test-slow adds fault injection and several processes

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: train test test-slow lint clean

train: .venv/runtime
	$(BIN)/python train.py --config=configs/emoji.py --workdir=runs/emoji

test: .venv/test
	$(BIN)/python -m pytest -m "not slow"

test-slow: .venv/test
	$(BIN)/python -m pytest -m slow

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv

.venv/runtime: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/test: requirements-test.txt .venv/runtime
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	@touch $@
