"""Instruction tuning beside Hugging Face's Trainer: python tests/bench_sft.py [rounds].

Alpaca records of at most 128 tokens, 6 layers of width 384, one thread, AdamW; fp32, ours also in bf16 where
the CPU computes in it. Ours packs conversations into rows of 512; the Trainer pads each to 128, as the
tutorial does. Interleaved; real tokens (no padding) a second, medians.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import transformers

from bench import PRESETS, BenchConfig, llama, model_config, trainer
from model import IGNORE_INDEX, LanguageModel
from optim import computes_bf16
from records import conversation_rows, pack, read_conversations
from test_tokenizer import DATA
from tokenizer import Tokenizer
from training import Ranks

LONGEST, ROW, ROWS, STEPS = 128, 512, 8, 4
SETTINGS = BenchConfig(**PRESETS["6x384"] | {"max_seq_len": ROW})


def main(rounds):
    torch.set_num_threads(1)
    texts = [c.messages for c in read_conversations(str(DATA / "alpaca.en.jsonl.gz"), byte_tokenizer(),
                                                    10 ** 6, skip_bad=True).items]
    tokenizer = Tokenizer.train((turn["content"] for turns in texts for turn in turns), SETTINGS.vocab_size)
    items = [item for item in read_conversations(str(DATA / "alpaca.en.jsonl.gz"), tokenizer, 10 ** 6,
                                                 skip_bad=True).items
             if len(item.ids) <= LONGEST]
    print(f"{len(items):,} records of {np.mean([len(item.ids) for item in items]):.1f} tokens on average",
          flush=True)
    ways = {"Trainer, padded to 128, fp32": theirs(items)}
    for dtype in [torch.float32] + [torch.bfloat16] * computes_bf16(torch.device("cpu")):
        for kind, compiled in (("compiled", True), ("eager", False)):
            ways[f"ours, packed, {kind}, {dtype}"] = ours(items, compiled, dtype)
    speeds = {name: [] for name in ways}
    for work in ways.values():
        work(1)
    for _ in range(rounds):
        for name, work in ways.items():
            started = time.perf_counter()
            speeds[name].append(work(STEPS) / (time.perf_counter() - started))
        print("  ".join(f"{name} {taken[-1]:.0f}" for name, taken in speeds.items()), flush=True)
    slowest = statistics.median(speeds["Trainer, padded to 128, fp32"])
    for name, taken in speeds.items():
        median = statistics.median(taken)
        print(f"{name}: {median:.0f} real tokens/s ({min(taken):.0f}-{max(taken):.0f}), "
              f"{median / slowest:.2f} times the Trainer")


def byte_tokenizer():
    return Tokenizer([])


def ours(items, compiled, dtype):
    """A function that takes n steps and returns the real tokens in them."""
    rows = pack(items, ROW)
    batch, n_real = [], []
    for i in range(0, 20 * ROWS, ROWS):
        batch.append([x for x in conversation_rows(items, rows[i:i + ROWS], ROW)])
        n_real.append(sum(len(items[j].ids) - 1 for row in rows[i:i + ROWS] for j in row))
    holder = [x.clone() for x in batch[0]]
    ids, targets, weights, doc_ids = holder

    def loss_of(model, ids, targets, doc_ids):
        return model(ids, targets, doc_ids)
    step = trainer(SETTINGS, Ranks(dtype=dtype), LanguageModel(model_config(SETTINGS)), loss_of,
                   (ids, targets, doc_ids), compiled)

    def work(n):
        tokens = 0
        for i in range(n):
            for place, x in zip(holder, batch[i % len(batch)]):
                place.copy_(x)
            step()
            tokens += n_real[i % len(batch)]
        return tokens
    return work


def theirs(items):
    """The same with Trainer.train, one call for n steps."""
    rng = np.random.default_rng(0)
    chosen = [items[i] for i in rng.permutation(len(items))[:20 * 32]]
    rows = []
    for item in chosen:
        ids = [*item.ids.tolist(), *[0] * (LONGEST - len(item.ids))]
        labels = [id if learn else IGNORE_INDEX for id, learn in zip(item.ids.tolist(), item.learn)]
        rows.append({"input_ids": ids,
                     "attention_mask": [1] * len(item.ids) + [0] * (LONGEST - len(item.ids)),
                     "labels": labels + [IGNORE_INDEX] * (LONGEST - len(labels))})
    model = llama(SETTINGS)
    folder = tempfile.mkdtemp()

    def work(n):
        arguments = transformers.TrainingArguments(
            folder, per_device_train_batch_size=32, max_steps=n, report_to=[], save_strategy="no",
            logging_strategy="no", disable_tqdm=True, use_cpu=True)
        transformers.Trainer(model=model, args=arguments, train_dataset=rows).train()
        return n * 32 * np.mean([len(item.ids) for item in chosen])
    return work


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
