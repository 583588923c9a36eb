"""tokenizer.py against Hugging Face's trainer, a naive trainer, and cases worked by hand."""

import gzip
import io
import itertools
import json
import random
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
import regex

import tokenizer as module
from cli import UserError
from tokenizer import BYTES, SPECIALS, SPLIT_PATTERN, Tokenizer, count_words, learn_merges

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parents[2] / "shared/data"
MIXED = ["The cat sat on the mat.  The CAT'S hat, isn't it? 1234567 ", "从前有一只猫，猫坐在垫子上。从前，从前……", "naïve café 😀👩‍👩‍👧 \r\n\n\t x",
         "<|im_end|><|endoftext|>", "aaaaaaa aaaaa aa --------- ======", "Привет мир, привет! שלום नमस्ते 한국어"]


@pytest.fixture(scope="module")
def mixed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Tokenizer.train(MIXED * 2, 600)


def naive_merges(words, n_merges):
    """The definition of BPE: count all pairs afresh for every merge; tokens are bytes, ties go to the smaller ids."""
    id_of = {bytes([b]): i for i, b in enumerate(BYTES)}
    split = {word: [bytes([b]) for b in word.encode()] for word in words}
    merges = []
    while len(merges) < n_merges:
        counts = Counter()
        for word, tokens in split.items():
            for pair in itertools.pairwise(tokens):
                counts[pair] += words[word]
        best = min(counts, key=lambda pair: (-counts[pair], id_of[pair[0]], id_of[pair[1]]), default=None)
        if best is None or counts[best] < 2:
            break
        if best[0] + best[1] not in id_of:
            merges.append((id_of[best[0]], id_of[best[1]]))
            id_of[best[0] + best[1]] = len(id_of)
        for word, tokens in split.items():
            merged = []
            for token in tokens:
                if merged and (merged[-1], token) == best and not (merged[-1] is None):
                    merged[-1:] = [token_pair(merged[-1], token), None]     # None: this one cannot be a left half again
                else:
                    merged.append(token)
            split[word] = [token for token in merged if token is not None]
    return merges
