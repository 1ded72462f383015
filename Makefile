# Two commands need nothing but Python 3.11+: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-for-development

MINUTES ?= 4
SEED ?= 0

.PHONY: demo test test-slow test-families test-trackers test-deepspeed test-serving test-lowest docs chaos soak lint base sweep clean

demo: $(VENV)/.installed
	$(BIN)/cwdpo demo

test: $(STAMP) lint
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow"

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile -m slow

# Kills, damaged run folders and mutated inputs, compared with undisturbed twins: docs/security.md.
chaos: $(STAMP)
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m chaos --minutes $(MINUTES) --seed $(SEED) $(ARGS)

# By hand: memory and open files of long runs, of `watch` and of a sweep, for an hour.
soak: MINUTES := $(if $(filter file,$(origin MINUTES)),60,$(MINUTES))
soak: $(STAMP)
	cd tests && OMP_NUM_THREADS=1 ../$(BIN)/python -m chaos.soak --minutes $(MINUTES)

# Every model family with its real processor, in an environment of its own (built once a machine, outside the clone).
test-families:
	python=$$($(PYTHON) tests/environments.py families) && OMP_NUM_THREADS=1 PYTHONPATH="$(CURDIR)/src" \
	$$python -m pytest -n 2 --dist loadgroup -p no:cacheprovider tests/families

# Every experiment tracker, read back from its own store, and the page of `cwdpo chat`, in an environment of its own.
test-trackers:
	python=$$($(PYTHON) tests/environments.py trackers) && OMP_NUM_THREADS=1 PYTHONPATH="$(CURDIR)/src" \
	$$python -m pytest -p no:cacheprovider tests/trackers tests/evaluation/test_chat.py

# Two processes under DeepSpeed against one, in an environment of its own.
test-deepspeed:
	python=$$($(PYTHON) tests/environments.py zero) && OMP_NUM_THREADS=1 PYTHONPATH="$(CURDIR)/src" \
	$$python -m pytest -p no:cacheprovider tests/pipeline/test_processes.py -k zero

# By hand: exports and rounds on a real vLLM, in an environment of its own that only serves.
test-serving: $(STAMP)
	vllm=$$($(PYTHON) tests/environments.py serving) && OMP_NUM_THREADS=1 CWDPO_VLLM="$$vllm" PYTHONPATH="$(CURDIR)/src" \
	$(BIN)/python -m pytest -p no:cacheprovider tests/serving

# By hand: the fast tests with the lowest versions that pyproject.toml allows, in an environment of their own.
LOWEST := .venv-lowest
test-lowest: pyproject.toml
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	sed -nE 's/^  "([A-Za-z0-9-]+)>=([0-9.]+)[",].*/\1==\2/p' pyproject.toml | sort -u > $(LOWEST)/lowest.txt
	$(LOWEST)/bin/python -m pip install --quiet --disable-pip-version-check -c $(LOWEST)/lowest.txt -e ".[dev]"
	OMP_NUM_THREADS=1 nice -n 19 $(LOWEST)/bin/pytest -n 2 -m "not slow"

# The site, into site/: every link and every page is checked.
DOCS := .venv-docs
docs:
	test -x $(DOCS)/bin/python || $(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check -r docs/site/requirements.txt
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --quiet

lint: $(STAMP)
	$(BIN)/ruff format --check src tests examples
	$(BIN)/ruff check src tests examples
	$(BIN)/mypy

# The embedded base model, from random weights (about 25 minutes on one core).
base: $(VENV)/.installed
	rm -rf runs/base
	$(BIN)/cwdpo train recipes/base.yaml
	cp runs/base/model/*.json runs/base/model/*.jinja runs/base/model/model.safetensors src/cwdpo/worlds/base/

# The settings of the demo's methods (about 20 minutes on 2 cores).
sweep: $(VENV)/.installed
	$(BIN)/cwdpo sweep --study demo --finalists 3 --jobs 2 --out runs/sweep

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(STAMP): $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(LOWEST) $(DOCS) site runs build dist src/*.egg-info
