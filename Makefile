# make run: a first training on real data.   make attack: model inversion of what it trained.
# make test: the quick tests.   make test-all: all tests.   make lint: ruff and mypy.
# make verify: are the pages as their CSVs say, and does make run give the committed results?
# Each installs into .venv first.
VENV ?= .venv
PYTHON ?= python3
# What `make attack` trains on: the images that no client owns need no download; PUBLIC=mnist gives more.
PUBLIC ?= unowned
BIN = $(VENV)/bin

run: $(VENV)/.run
	$(BIN)/python RVE-PFL.py --dataset mnist10k --rounds 5 --local_ep 2 --overwrite

attack: $(VENV)/.run
	$(BIN)/python attack/mi_attack.py --run mnist10k-shards-rve_pfl-seed1 --images 6 --iterations 80 --train_epochs 8 \
		--public $(PUBLIC)

verify: $(VENV)/.run
	$(BIN)/python experiments/verify.py

test: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-all: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/.test
	$(BIN)/ruff check
	$(BIN)/mypy

# A stamp is as new as the requirements it was installed from.
$(VENV)/.run: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements.txt
	touch $@

$(VENV)/.test: requirements-test.txt requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements-test.txt
	touch $@

.PHONY: run attack verify test test-all lint
