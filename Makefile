# Each target makes what it needs, from nothing: `make demo`, `make test`.
PYTHON ?= python3
VENV := .venv
ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PY := $(BIN)/python

# Memory once had is kept, in large pages: no page is cleared twice, a step takes at least 6% less (LOG.md). Linux only.
# Three variables, as glibc cuts GLIBC_TUNABLES at its first colon on the way to a process's children.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 17179869184

OUT ?= out
SIZE ?= demo
SEED ?= 0
DATA ?=

.PHONY: setup setup-demo setup-extra demo results seeds serve bench test test-all clean

setup: $(VENV)/.installed
setup-demo: $(VENV)/.installed-demo
setup-extra: $(VENV)/.installed-extra

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

$(VENV)/.installed-demo: requirements-demo.txt $(VENV)/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-demo.txt
	touch $@

$(VENV)/.installed-extra: requirements-extra.txt $(VENV)/.installed-demo
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-extra.txt
	touch $@

ifeq ($(SIZE),smoke)
PRETRAIN_FLAGS := --max_seq_len 512
PPO_FLAGS := --force
MEGABYTES ?= 0.3
VOCAB ?= 1024
PROMPTS ?= 60
JUDGED ?= 16
EXAMPLES ?= 400
TALES ?= :0.125
endif
ifeq ($(SIZE),results)
MEGABYTES ?= 40
TALES := :0.1
ENGLISH :=
CHINESE := :1.3
PROMPTS ?= 8000
REPLIES ?= 2
TEMPERATURES ?= 1.0,0.7
TOKENS ?= 64
KIND := rubric
JUDGED ?= 1000
EXAMPLES ?= 150000
BEST_OF ?= 16
BASE := copying
endif
# Enough that no tale is told twice; in few steps English is learnt more slowly, in many Chinese (LOG.md).
MEGABYTES ?= 20
VOCAB ?= 4096
TALES ?= :0.05
ENGLISH ?= :1.2
PROMPTS ?= 1200
REPLIES ?= 4
TEMPERATURES ?= 1.0
TOKENS ?= 48
KIND ?= ranking
JUDGED ?= 200
EXAMPLES ?= 20000
BEST_OF ?= 4
BASE ?= pretrain

# The whole chain. Each stage is a plain command; its .done says that it is through, so a broken chain goes on where it
# stopped, inside a training run from its last checkpoint.
TEXT := $(OUT)/text
ASKED := $(OUT)/instructions
FEEDBACK := $(OUT)/feedback
POLICY := $(OUT)/ppo
JUDGE := --prompts $(ASKED)/prompts_val.jsonl --requests $(ASKED)/requests.jsonl --max_new_tokens $(TOKENS)
ifeq ($(DATA),)
TRAIN := $(TEXT)/train.en.txt$(ENGLISH),$(TEXT)/train.zh.txt$(CHINESE)
# So much of the tales beside what is said that a name is one token at the start of a reply, too (LOG.md).
WORDS := $(TEXT)/train.en.txt$(TALES),$(TEXT)/train.zh.txt$(TALES)
VAL := --val_input $(TEXT)/val.en.txt,$(TEXT)/val.zh.txt --entropy_bound $(TEXT)/entropy_bound.json
else
TRAIN := $(DATA)
WORDS := $(DATA)
endif

# $(call stage,DIRECTORY,SCRIPT,FLAGS): train, or go on with what is there; then say whether it is where it usually is
define stage
if ls -d $(1)/checkpoints/[0-9]* > /dev/null 2>&1; then $(PY) $(2) --resume --out_dir $(1); \
	else $(PY) $(2) --config $(SIZE) --seed $(SEED) $(3) --out_dir $(1); fi
$(if $(filter pretrain sft reward,$(notdir $(1))),$(PY) report.py --out_dir $(OUT) --expected expected/$(SIZE) --check $(notdir $(1)))
touch $(1)/.done
endef

demo: setup-demo $(OUT)/evaluation.json
	$(PY) report.py --out_dir $(OUT) --expected expected/$(SIZE)
	@echo 'Talk to it: $(PY) generate.py --model $(POLICY) --chat'
	@echo 'or with pages: make serve OUT=$(OUT)'

# The longer runs behind the numbers in LOG.md: the chain, its tasks, and the last two stages with two more seeds.
results:
	$(MAKE) SIZE=results OUT=$(OUT)/results demo seeds

.SECONDARY:                     # keep what stands between a seed's judgements and its evaluation
seeds: $(OUT)/tasks.json $(OUT)/evaluation-1.json $(OUT)/evaluation-2.json $(OUT)/curve.json $(OUT)/curve-few.json

serve: setup-demo
	$(PY) serve.py --models $(POLICY),$(OUT)/sft,$(OUT)/pretrain --reward_model $(OUT)/reward \
		--samples $(FEEDBACK)/samples.jsonl --ratings $(FEEDBACK)/people.jsonl --thumbs $(FEEDBACK)/thumbs.jsonl

bench: setup-extra
	$(PY) bench.py --config 6x384 --compare --threads 1

$(TEXT)/.done $(ASKED)/.done: | $(VENV)/.installed

$(TEXT)/.done:
	$(PY) -m data.world --out_dir $(TEXT) --megabytes $(MEGABYTES)
	touch $@

$(ASKED)/.done:
	$(PY) -m data.instructions --out_dir $(ASKED) --examples $(EXAMPLES) $(if $(filter results,$(SIZE)),--prompts $(PROMPTS))
	touch $@

$(OUT)/tokenizer/.done: $(TEXT)/.done $(ASKED)/.done
	$(PY) tokenizer.py --input $(WORDS),$(ASKED)/said_train.txt \
		--vocab_size $(VOCAB) --out_dir $(OUT)/tokenizer
	touch $@

$(OUT)/data/.done: $(OUT)/tokenizer/.done
	$(PY) -m data.prepare --input $(TRAIN) $(VAL) --tokenizer $(OUT)/tokenizer --out_dir $(OUT)/data
	touch $@

$(OUT)/pretrain/.done: $(OUT)/data/.done
	$(call stage,$(OUT)/pretrain,pretrain.py,--data_dir $(OUT)/data $(PRETRAIN_FLAGS))

$(OUT)/tales.txt: $(OUT)/pretrain/.done
	$(PY) generate.py --model $(OUT)/pretrain --samples 48 --max_new_tokens 240 --temperature 0.5 > $@.part
	$(if $(DATA),,$(PY) -m data.world --recognise $@.part --tales 10)
	mv $@.part $@

# A first lesson of little but copying: that is learnt from many places to copy, or not at all (LOG.md).
$(OUT)/copying/.done: $(OUT)/pretrain/.done $(ASKED)/.done
	$(call stage,$(OUT)/copying,sft.py,--init_from $(OUT)/pretrain --data $(ASKED)/copying_train.jsonl --max_steps 600)

$(OUT)/sft/.done: $(OUT)/tales.txt $(ASKED)/.done $(OUT)/$(BASE)/.done
	$(call stage,$(OUT)/sft,sft.py,--init_from $(OUT)/$(BASE) --data $(ASKED)/sft_train.jsonl \
		--val_data $(ASKED)/sft_val.jsonl)

$(FEEDBACK)/samples.jsonl: $(OUT)/sft/.done
	mkdir -p $(FEEDBACK)
	$(PY) feedback.py sample --models $(OUT)/sft --prompts $(ASKED)/prompts_train.jsonl --limit $(PROMPTS) \
		--replies $(REPLIES) --temperature $(TEMPERATURES) --max_new_tokens $(TOKENS) --out $@

$(FEEDBACK)/judged.jsonl: $(FEEDBACK)/samples.jsonl
	$(PY) feedback.py simulate --samples $(FEEDBACK)/samples.jsonl --requests $(ASKED)/requests.jsonl \
		--kind $(KIND) --out $(FEEDBACK)/ratings.jsonl
	$(PY) feedback.py collect --samples $(FEEDBACK)/samples.jsonl --ratings $(FEEDBACK)/ratings.jsonl \
		--form $(if $(filter rubric,$(KIND)),scores,rankings) --out $@

$(OUT)/reward/.done: $(FEEDBACK)/judged.jsonl
	$(call stage,$(OUT)/reward,reward.py,--init_from $(OUT)/sft --data $(FEEDBACK)/judged.jsonl \
		--normalize_on $(FEEDBACK)/samples.jsonl)

$(POLICY)/.done: $(OUT)/reward/.done
	$(call stage,$(POLICY),ppo.py,--init_from $(OUT)/sft --reward_model $(OUT)/reward \
		--data $(ASKED)/prompts_train.jsonl --response_length $(TOKENS) $(PPO_FLAGS))

$(OUT)/evaluation.json: $(POLICY)/.done
	$(PY) evaluate.py --models $(OUT)/sft,$(POLICY),$(OUT)/pretrain $(JUDGE) --limit $(JUDGED) --show 8 \
		--reward_model $(OUT)/reward --best_of $(BEST_OF) --out $@

$(OUT)/tasks.json: $(OUT)/sft/.done
	$(PY) evaluate.py --models $(OUT)/sft,$(OUT)/pretrain --tasks $(ASKED)/eval_val.jsonl \
		--requests $(ASKED)/requests.jsonl --show 12 --out $@

$(OUT)/reward-%/.done: $(FEEDBACK)/judged.jsonl
	$(call stage,$(OUT)/reward-$*,reward.py,--init_from $(OUT)/sft --data $(FEEDBACK)/judged.jsonl \
		--normalize_on $(FEEDBACK)/samples.jsonl --seed $*)

$(OUT)/ppo-%/.done: $(OUT)/reward-%/.done
	$(call stage,$(OUT)/ppo-$*,ppo.py,--init_from $(OUT)/sft --reward_model $(OUT)/reward-$* \
		--data $(ASKED)/prompts_train.jsonl --response_length $(TOKENS) --seed $*)

$(OUT)/evaluation-%.json: $(OUT)/ppo-%/.done
	$(PY) evaluate.py --models $(OUT)/sft,$(OUT)/ppo-$* $(JUDGE) --limit $(JUDGED) --reward_model $(OUT)/reward-$* --out $@

$(OUT)/curve.json: $(OUT)/evaluation.json
	$(PY) evaluate.py --models "$(OUT)/sft,$(POLICY)/weights/*" $(JUDGE) --limit 256 --reward_model $(OUT)/reward \
		--best_of 64 --out $@

# Over-optimisation (Gao et al. 2022): a judge that learnt from 200 comparisons, and nothing that holds PPO back, not
# even its rate.
$(OUT)/reward-few/.done: $(FEEDBACK)/judged.jsonl
	$(call stage,$(OUT)/reward-few,reward.py,--init_from $(OUT)/sft --data $(FEEDBACK)/judged.jsonl \
		--normalize_on $(FEEDBACK)/samples.jsonl --max_comparisons 200 --likelihood_coef 0 --token_coef 0)

$(OUT)/ppo-few/.done: $(OUT)/reward-few/.done
	$(call stage,$(OUT)/ppo-few,ppo.py,--init_from $(OUT)/sft --reward_model $(OUT)/reward-few \
		--data $(ASKED)/prompts_train.jsonl --response_length $(TOKENS) --kl_coef 0 --force \
		--learning_rate 4e-4 --gain_lr_scale 1 --value_lr_scale 1)

$(OUT)/curve-few.json: $(OUT)/ppo-few/.done
	$(PY) evaluate.py --models "$(OUT)/sft,$(OUT)/ppo-few/weights/*" $(JUDGE) --limit 256 \
		--reward_model $(OUT)/reward-few --out $@

# Two processes of one thread each; the browser's tests hang there, so they run alone.
test: setup-extra
	$(PY) -m pytest -n 2 --dist loadfile --ignore tests/test_web.py
	$(PY) -m pytest tests/test_web.py

test-all: setup-extra
	$(PY) -m pytest -n 2 --dist loadfile --ignore tests/test_web.py -m "full or not full"
	$(PY) -m pytest tests/test_web.py

clean:
	rm -rf $(OUT) .pytest_cache
