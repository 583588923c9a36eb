# Each target makes what it needs, from nothing: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PY := $(BIN)/python

OUT ?= out
SIZE ?= quick-1mb
DATA ?= data/stand_in.txt
VOCAB ?= 1024
STEPS ?= 60

.PHONY: setup setup-extra demo test test-all clean

setup: $(VENV)/.installed
setup-extra: $(VENV)/.installed-extra

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-extra: requirements-extra.txt $(VENV)/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-extra.txt
	touch $@

# The chain so far: text -> tokenizer -> shards -> pretraining -> texts of its own.
demo: setup
	$(PY) tokenizer.py --input $(DATA) --vocab_size $(VOCAB) --out_dir $(OUT)/tokenizer
	$(PY) -m data.prepare --input $(DATA) --tokenizer $(OUT)/tokenizer --out_dir $(OUT)/data
	$(PY) pretrain.py --config $(SIZE) --data_dir $(OUT)/data --out_dir $(OUT)/pretrain \
		--max_steps $(STEPS) --warmup_steps 10 --eval_every 30
	$(PY) generate.py --model $(OUT)/pretrain --samples 5

test: setup-extra
	$(PY) -m pytest

test-all: setup-extra
	$(PY) -m pytest -m "full or not full"

clean:
	rm -rf $(OUT) .pytest_cache
