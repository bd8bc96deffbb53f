# make run: a first training on real data.   make attack: attacks on that run, or else on a model that ships.
# make test: the quick tests.   make test-all: all tests.   make lint: ruff and mypy.
# make verify: are the pages as their CSVs say, and do two runs and two attacks give the committed results?
# make study: all experiments of the pages, several days of CPU time.
# Each installs into .venv first.
VENV ?= .venv
PYTHON ?= python3
# What `make attack` trains on: the images that no client owns need no download; PUBLIC=mnist gives more.
PUBLIC ?= unowned
BIN = $(VENV)/bin
WORKERS ?= 2
RUN = mnist10k-shards-rve_pfl-seed1
ATTACKED = $(if $(wildcard results/$(RUN)/config.json),$(RUN),shipped)

# One thread takes the least CPU time, and 1.3 times as long as two. With fp32, figures differ from those in README.md
# by the rounding of the chip alone.
run: $(VENV)/.run
	OMP_NUM_THREADS=1 $(BIN)/python RVE-PFL.py --dataset mnist10k --rounds 2 --local_ep 1 --local_bs 80 \
		--precision fp32 --overwrite

attack: $(VENV)/.run
	$(if $(filter shipped,$(ATTACKED)),$(BIN)/python attack/shipped.py)
	$(BIN)/python attack/mi_attack.py --run $(ATTACKED) --train_epochs 8 --public $(PUBLIC)

verify: $(VENV)/.run
	$(BIN)/python experiments/verify.py

# Runs what is missing in results/reference/, the most important first; the same command goes on.
study: $(VENV)/.run
	for name in headline partitions leakage frontier robustness new_clients real_updates \
			member_inference; do \
		$(BIN)/python experiments/$$name.py --workers $(WORKERS); done

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

$(VENV)/.test: requirements-test.txt requirements-tensorboard.txt requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -r requirements-test.txt
	touch $@

.PHONY: run attack verify study test test-all lint
