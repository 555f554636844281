# `make demo` and `make test` do everything, from an empty machine with Python, pip and make.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= runs/demo
STAMP  := $(VENV)/.installed

.PHONY: demo test docs lint types package notebook report report-experiments bench chaos clean help

help:            ## This list
	@grep -E '^[a-z-]+: .*##' Makefile | sed 's/:.*##/\t/'

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[adapters,docs,offline,ray,report,dev]'
	touch $(STAMP)

demo: $(STAMP)   ## Base, SFT and DPO on the embedded data, evaluated: table and figures in runs/demo
	$(BIN)/dpo demo --out $(OUT) $(DEMO)

test: $(STAMP)   ## All tests but the slow ones
	$(BIN)/python -m pytest -n auto --dist loadfile -m "not slow and not gpu"

docs: $(STAMP)   ## The documentation site in build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: $(STAMP)   ## Style
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## Types, strictly
	$(BIN)/mypy

package: $(STAMP) ## Wheel and source distribution: build, look inside, install where nothing is
	$(BIN)/python -m pytest -m slow tests/test_packaging.py

notebook: $(STAMP) ## Run the notebook, and look whether it shows what it says
	$(BIN)/python -m pytest -m slow tests/test_notebooks.py

report: $(STAMP) ## Check every statement of the theory, then build report/report.pdf
	$(BIN)/dpo theory --json report/results/theory.json
	$(BIN)/python report/build.py

report-experiments: $(STAMP) ## Run and record the report's studies (long): DATA=folder of real rows [QUICK=--quick]
	$(BIN)/python studies/record.py --report $(if $(DATA),--data $(DATA)) $(QUICK)

bench: $(STAMP)  ## Our steps and sampler beside TRL's and transformers': DATA=folder for real text
	$(BIN)/python benchmarks/compare.py all $(if $(DATA),--data-folder $(DATA))
	$(BIN)/python benchmarks/report.py

chaos: $(STAMP)  ## Kill 100 training runs at random moments; resumed, they must end bit for bit alike
	PYTHONPATH=tests $(BIN)/python -m chaos $(CHAOS)

clean:           ## Remove the environment
	rm -rf $(VENV)
