# make demo    a fresh venv, everything installed, the CPU quickstart on 4 ranks, a report
# make test    the tests (slow and GPU ones left out)
# make check   lint, format, types
# make docs    the pages as a site, in outputs/docs; every link is checked; needs no network
# make gpu     all that one GPU can show (benchmarks/gpu/README.md); installs nothing, needs no network
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Tests of ranks wait for each other more than they compute: four files at a time keep two cores busy; of the slow ones,
# which have more ranks and limits of their own, three.
AT_ONCE ?= 4
SLOW_AT_ONCE ?= 3
OUT ?= outputs/gpu
DEVICE ?= cuda
STAGES ?=

# Images of containers often ask for no bytecode: each of a test run's processes would compile the same files again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test test-all check docs gpu install clean

install: $(VENV)/installed

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,docs,report]"
	touch $@

demo: install
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false $(BIN)/accelerate launch --config_file recipes/accelerate/cpu.yaml \
		recipes/sft.py --config recipes/quickstart_cpu/train.yaml

test: install
	$(BIN)/python -m pytest -m "not slow and not gpu" -n $(AT_ONCE) --dist loadfile

test-all: test
	$(BIN)/python -m pytest -m "slow and not gpu" -n $(SLOW_AT_ONCE) --dist loadfile

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file docs/mkdocs.yml --site-dir $(CURDIR)/outputs/docs

# with the machine's own interpreter: one with a GPU may have no network to install anything from
gpu:
	$(PYTHON) benchmarks/gpu/run.py --output "$(OUT)" --device $(DEVICE) $(if $(STAGES),--stages $(STAGES))

clean:
	rm -rf $(VENV) build dist *.egg-info outputs
