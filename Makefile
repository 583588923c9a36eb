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
SIZE ?= demo
MEGABYTES ?= 4
VOCAB ?= 4096

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

TEXT := $(OUT)/text
ifeq ($(SIZE),smoke)
MEGABYTES := 0.3
VOCAB := 1024
endif

# The chain so far: story world -> tokenizer -> shards -> pretraining -> tales of its own, judged by the grammar.
demo: setup
	$(PY) -m data.world --out_dir $(TEXT) --megabytes $(MEGABYTES)
	$(PY) tokenizer.py --input $(TEXT)/train.en.txt,$(TEXT)/train.zh.txt --vocab_size $(VOCAB) --out_dir $(OUT)/tokenizer
	$(PY) -m data.prepare --input $(TEXT)/train.en.txt,$(TEXT)/train.zh.txt --val_input $(TEXT)/val.en.txt,$(TEXT)/val.zh.txt \
		--entropy_bound $(TEXT)/entropy_bound.json --tokenizer $(OUT)/tokenizer --out_dir $(OUT)/data
	$(PY) pretrain.py --config $(SIZE) --data_dir $(OUT)/data --out_dir $(OUT)/pretrain
	$(PY) generate.py --model $(OUT)/pretrain --samples 40 --max_new_tokens 240 --temperature 0.5 > $(OUT)/tales.txt
	$(PY) -m data.world --recognise $(OUT)/tales.txt --tales 10

test: setup-extra
	$(PY) -m pytest

test-all: setup-extra
	$(PY) -m pytest -m "full or not full"

clean:
	rm -rf $(OUT) .pytest_cache
