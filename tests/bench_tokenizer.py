"""Tokenizer training beside Hugging Face's Rust trainer: python tests/bench_tokenizer.py [rounds].

On one thread. Vocabulary 32,768 on the four large files of ../shared/data, held in memory beforehand,
interleaved. Prints seconds and medians.
"""

import os

os.environ |= {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import statistics
import sys
import time
from itertools import chain
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.read import documents
from test_tokenizer import DATA, train_hf
from tokenizer import Tokenizer

FILES = ("children_classics.en.txt.gz", "classic_novels.zh.txt.gz", "tang_poems.zh.tsv.gz", "fables.jsonl.gz")


def seconds(train):
    start = time.perf_counter()
    train()
    return time.perf_counter() - start


def main(rounds):
    texts = list(chain.from_iterable(documents(DATA / name) for name in FILES))
    print(f"{sum(len(text.encode()) for text in texts) / 1e6:.1f} MB", flush=True)
    ways = {"1 process": lambda: Tokenizer.train(texts, 32_768),
            "2 processes": lambda: Tokenizer.train(texts, 32_768, processes=2),
            "Hugging Face": lambda: train_hf(texts, 32_768)}
    times = {name: [] for name in ways}
    for _ in range(rounds):
        for name, train in ways.items():
            times[name].append(seconds(train))
        print("  ".join(f"{name} {taken[-1]:.1f} s" for name, taken in times.items()), flush=True)
    median = {name: statistics.median(taken) for name, taken in times.items()}
    for name, taken in median.items():
        print(f"{name}: median {taken:.1f} s, {taken / median['Hugging Face']:.2f} of Hugging Face")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
