"""Quality for the time: a megabyte of text, a model of it, one thread. Beside nanoGPT's recipe for the CPU.

    python tests/bench_quick.py TEXT[.gz] [FIRST BYTE]
The clock of ours holds the tokenizer, the shards and `pretrain.py --config quick-1mb`, compilation with an
empty cache included. The recipe as its README tells it: characters, 4 layers, 4 heads, width 128, rows of 64,
batch 12, 2,000 steps of AdamW, no dropout; a GPT-2 with tied embeddings, here of torch's own layers. Both are
judged by bits a byte of the last tenth of the text.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import gzip
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

ROOT, SIZE, TAIL = Path(__file__).parents[1], 1_000_000, 0.1
ROWS, T, STEPS, WARMUP, LR, WIDTH = 12, 64, 2000, 100, 1e-3, 128


def ours(text, out):
    """(seconds, bits a byte) of the three commands."""
    (out / "text.txt").write_text(text)
    commands = (["tokenizer.py", "--input", out / "text.txt", "--vocab_size", 2048,
                 "--out_dir", out / "tokenizer"],
                ["-m", "data.prepare", "--input", out / "text.txt", "--val_tail", TAIL,
                 "--tokenizer", out / "tokenizer", "--out_dir", out / "data"],
                ["pretrain.py", "--config", "quick-1mb", "--data_dir", out / "data",
                 "--out_dir", out / "run"])
    started = time.perf_counter()
    for command in commands:
        subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, check=True,
                       env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(out / "cache")})
    seconds = time.perf_counter() - started
    lines = [json.loads(line) for line in (out / "run/log.jsonl").read_text().splitlines()]
    return seconds, [line["bits_per_byte"] for line in lines if "bits_per_byte" in line][-1]


class GPT(nn.Module):
    """nanoGPT's model: learnt positions, LayerNorm before each part, GELU, no biases, tied embeddings."""

    def __init__(self, n_chars):
        super().__init__()
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, "gelu", batch_first=True,
                                           norm_first=True, bias=False)
        self.layers = nn.TransformerEncoder(layer, 4, nn.LayerNorm(WIDTH, bias=False),
                                            enable_nested_tensor=False)
        self.chars, self.positions = nn.Embedding(n_chars, WIDTH), nn.Embedding(T, WIDTH)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, 0, 0.02)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(T))

    def forward(self, ids):
        n = ids.shape[1]
        x = self.chars(ids) + self.positions.weight[:n]
        return self.layers(x, self.mask[:n, :n], is_causal=True) @ self.chars.weight.T


def recipe(text):
    """(seconds, bits a byte) of nanoGPT's recipe."""
    torch.manual_seed(0)
    started, number = time.perf_counter(), {c: i for i, c in enumerate(sorted(set(text)))}
    ids = torch.tensor([number[c] for c in text])
    cut = int((1 - TAIL) * len(ids))
    train, val = ids[:cut], ids[cut:]
    model = GPT(len(number))
    decayed = [p for p in model.parameters() if p.ndim == 2]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1},
                                   {"params": [p for p in model.parameters() if p.ndim < 2],
                                    "weight_decay": 0}],
                                  lr=LR, betas=(0.9, 0.99), fused=True)
    compiled = torch.compile(model)
    for step in range(STEPS):
        done = max(0, (step - WARMUP) / (STEPS - WARMUP))
        for group in optimizer.param_groups:
            group["lr"] = LR * min(1, (step + 1) / WARMUP) * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)
        rows = train[torch.randint(len(train) - T, (ROWS, 1)) + torch.arange(T + 1)]
        loss = F.cross_entropy(compiled(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = time.perf_counter() - started
    rows = val.unfold(0, T + 1, T)                              # every character judged once
    with torch.no_grad():
        nats = sum(F.cross_entropy(model(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
                   for part in rows.split(64)).item()
    return seconds, nats / math.log(2) / (len(text[cut:].encode()) * rows.shape[0] * T / len(val))


if __name__ == "__main__":
    open_ = gzip.open if sys.argv[1].endswith(".gz") else open
    with open_(sys.argv[1], "rb") as file:
        file.seek(int(sys.argv[2]) if len(sys.argv) > 2 else 0)
        text = file.read(SIZE).decode(errors="ignore")
    with tempfile.TemporaryDirectory() as directory:
        found = {"ours": ours(text, Path(directory)), "nanoGPT's recipe": recipe(text)}
    for name, (seconds, bits) in found.items():
        print(f"{name:20} {seconds:5.0f} s   {bits:.3f} bits/byte")
