# make demo    own environment, every stage, a table, samples, a page with curves  (Python 3.11 or newer)
# make demo-vlm  own environment, a model that answers questions about pictures
# make gym     own environment, GRPO on a task of reasoning-gym
# make test    own environment, ruff, the tests that guard a promise (make test-all: the long ones too)
# make bench   speed and memory, as ratios against named references

PYTHON ?= python3
BIN = .venv/bin

.PHONY: demo demo-vlm gym test test-all bench clean

.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-dev.txt
	touch $@

demo: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt \
	    $$(grep ^matplotlib requirements-dev.txt)
	$(BIN)/python demos/demo/run.py

demo-vlm: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt \
	    $$(grep -e ^pillow -e ^easy-vqa requirements-dev.txt)
	$(BIN)/python demos/vlm/run.py

gym: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt \
	    $$(grep ^reasoning-gym requirements-dev.txt)
	$(BIN)/python demos/gym/run.py

test: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n 2 --durations=10 -m "not slow"

test-all: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q -n 2 --durations=10

bench: .venv/installed-dev
	$(BIN)/python tests/bench/bench.py

clean:
	rm -rf out .venv .pytest_cache .ruff_cache
