# make train   prepare the embedded data set, train on it with AdamCPR, sample, plot
# make test    run the tests
# Each makes .venv and installs what it needs first; a second call skips what is done.

PYTHON ?= python3
BIN = .venv/bin

train: .venv/installed data/pystdlib_char/meta.json
	$(BIN)/python train.py config/train_char_cpr.py --init_from=auto
	$(BIN)/python sample.py --out_dir=out-char-cpr --num_samples=1 --max_new_tokens=600
	$(BIN)/python plot.py out-char-cpr

test: .venv/installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

data/pystdlib_char/meta.json: data/pystdlib_char/prepare.py data/tokenizers.py data/writer.py | .venv/installed
	$(BIN)/python data/pystdlib_char/prepare.py

.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q -r requirements.txt
	touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install -q -r requirements-dev.txt
	touch $@

.PHONY: train test lint
