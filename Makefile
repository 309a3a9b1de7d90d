# Two commands for a newcomer: `make train` and `make test`. Each sets up .venv once and starts at once after that.
# `make train` resumes a run that was interrupted, and starts a numbered one beside one that has ended.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train test test-core slow wheel interop docs dry-run measured format dist clean

train: .venv/.installed-lm
	$(BIN)/statefeed train recipes/quickstart.yaml --again

test: .venv/.installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# Equations, layers and kernels, for daily work: under two minutes on two cores.
CORE := $(addprefix tests/test_,oracles.py scan.py feedback.py schedule.py recurrence.py layers.py segments.py custom.py \
	custom_steps.py custom_diagonal.py swap.py extending.py kernels_layer.py kernels_safety.py imports.py language.py pickles.py)

test-core: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal $(CORE)

slow: .venv/.installed-dev
	$(BIN)/python -m pytest -m slow

# Other people's packages, each in an environment of its own under build/interop; `make interop PACKAGES="darts flair"`.
# On a quiet machine, `make interop RECORD=zen5-1` appends to results/packages/zen5-1.jsonl and writes the table of the docs.
interop:
	$(PYTHON) tests/interop/environments.py $(if $(RECORD),--record $(RECORD)) $(PACKAGES)

docs: .venv/.installed-docs
	$(BIN)/sphinx-build --fail-on-warning --quiet docs build/docs

# What a user of the WikiText-103 recipes must expect: 50 steps of each on another text in the same format, such as that of
# WikiText-2, and their tokens per second and memory in $(DRY)/runs.jsonl. A run that has ended is not repeated.
DATA ?= data/wikitext-2
DRY := build/dry-run
STEPS ?= 50
RECIPES ?= $(wildcard recipes/wikitext103-*.yaml)
dry-run: .venv/.installed-lm
	mkdir -p $(DRY)
	for recipe in $(RECIPES); do name=$$(basename $$recipe .yaml); \
	  $(BIN)/statefeed train $$recipe --resume --data.path=$(DATA) --train.steps=$(STEPS) --train.evaluations=1 \
	    --run.dir=$(DRY)/$$name || exit 1; done
	rm -f $(DRY)/runs.jsonl
	$(BIN)/statefeed report $(DRY) -o $(DRY)/report.html --records=$(DRY)/runs.jsonl

# docs/measured.md, the tables of docs/gpu.md, the figures in README.md, and the verdicts and pictures of results/README.md, from the records alone.
CELLS := $(addprefix results/runs/quickstart/,cells-bf16.jsonl rates.jsonl shakespeare.jsonl sizes-bf16.jsonl schedules-bf16.jsonl)
measured: .venv/.installed-lm
	$(BIN)/statefeed report results/bench results/runs --markdown=docs/measured.md
	$(BIN)/statefeed report results/bench/zen5-* results/bench/xeon-amx-* --summary=README.md
	$(BIN)/statefeed report $(CELLS) --verdicts=results/README.md
	$(BIN)/python -m statefeed.bench.gpu.tables results/bench/nvidia-h200 docs/gpu.md
	$(BIN)/python tests/interop/picture.py
	mkdir -p build
	$(BIN)/statefeed report results/runs --output=build/report.html --figures=build/figures
	for figure in results/figures/*.svg; do cp build/figures/$${figure##*/} $$figure; done

format: .venv/.installed-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

dist: .venv/.installed-dev
	$(BIN)/python -m build

wheel: .venv/.installed-dev
	STATEFEED_WHEEL_TORCH=$$($(BIN)/python -c "import torch; print(torch.__path__[0])") $(BIN)/python -m build --wheel

clean:
	rm -rf .venv dist build

.venv/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit("statefeed needs Python 3.10 or later, \
	found %d.%d: name another one, as in make train PYTHON=python3.12" % v[:2])'
	$(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }

.venv/.installed-%: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$*]"
	touch $@
