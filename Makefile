PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DEMO := runs/demo
T2I := runs/t2i_demo

.PHONY: help install demo t2i-demo benchmark test lint format clean distclean

help:  ## list the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):.*## /\1\t/' | expand -t 12

install: $(INSTALLED)  ## make .venv and install vistok with everything it needs

$(INSTALLED): setup.py pyproject.toml
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found (make PYTHON=...)" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: vistok needs Python 3.11 or newer" >&2; exit 2; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch torchvision
	$(BIN)/pip install --quiet --editable '.[dev]'
	@touch $@

demo: install  ## train FlexTok and a GPT on digits, sample, measure; results in runs/demo/
	@$(BIN)/python train.py --config configs/digits/flextok.yaml output=$(DEMO)/tokenizer resume=auto
	@$(BIN)/python train.py --config configs/digits/gpt.yaml tokenizer=$(DEMO)/tokenizer output=$(DEMO)/generator resume=auto
	@$(BIN)/python -m vistok.eval reconstruction --checkpoint $(DEMO)/tokenizer --data digits --out $(DEMO)
	@$(BIN)/python -m vistok.eval generation --checkpoint $(DEMO)/generator --data digits --count 500 --cfg-scale 2 --top-p 0.95 --out $(DEMO)
	@$(BIN)/python -m vistok.eval report --run $(DEMO)

t2i-demo: install  ## train a VQGAN and a GPT that reads captions on shapes, sample prompts, GenEval; results in runs/t2i_demo/
	@$(BIN)/python train.py --config configs/shapes/vqgan.yaml output=$(T2I)/tokenizer trainer.max_updates=1000 resume=auto
	@test -e $(T2I)/codes || $(BIN)/python -m vistok.data tokens --tokenizer $(T2I)/tokenizer --data shapes --data-args train_count=60000 --out $(T2I)/codes
	@$(BIN)/python train.py --config configs/shapes/gpt_text.yaml tokenizer=$(T2I)/tokenizer output=$(T2I)/generator \
		data.name=code_cache data.args.path=$(T2I)/codes generator.args.width=160 generator.args.heads=5 trainer.max_updates=1200 \
		trainer.compile=$(if $(shell command -v g++ c++),true,false) resume=auto
	@$(BIN)/python -m vistok.eval reconstruction --checkpoint $(T2I)/tokenizer --data shapes --count 300 --features none --out $(T2I)
	@$(BIN)/python sample.py --checkpoint $(T2I)/generator --cfg-scale 4 --count 8 --out $(T2I)/samples \
		--prompt "a small red circle left of a large blue square" --prompt "three green stars" \
		--prompt "a purple cross and an orange diamond" --prompt "a large yellow triangle above a small white circle"
	@$(BIN)/python -m vistok.eval geneval --checkpoint $(T2I)/generator --data shapes --cfg-scale 1,4 --count-per-prompt 2 --out $(T2I)
	@$(BIN)/python -m vistok.eval report --run $(T2I)

benchmark: install  ## train and measure every system at equal budget (under 2 hours, goes on where it was): benchmarks/table.md
	@$(BIN)/python benchmarks/table.py --table benchmarks/table.md

test: install  ## run the whole test suite
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: install  ## ruff format --check, ruff check, mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install  ## rewrite the code in the house style
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove caches
	rm -rf .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

distclean: clean  ## remove caches, everything trained or sampled (runs/, samples/) and the environment
	rm -rf .venv runs samples *.egg-info
