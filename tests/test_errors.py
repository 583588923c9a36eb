"""Bad input to every command: one line naming the thing, its value and the mend; exit status 2; nothing left.

Each case runs in a directory of its own with a text, a tokenizer, shards and a run of 4 steps in it, and that
directory must hold afterwards what it held before, but for what the case itself says.
"""

import gzip
import io
import os
import random
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from data.prepare import prepare
from pretrain import PretrainConfig
from pretrain import main as pretrain
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
SHAPE = dict(d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=16, max_seq_len=32, batch_size=4,
             max_steps=4,
             warmup_steps=1, save_every=2, eval_every=4, samples=0, compile=False, dtype="fp32", device="cpu")
FLAGS = " ".join(f"--{k} {v}" for k, v in SHAPE.items() if k != "compile") + " --no-compile"

TOKENIZE = "tokenizer.py --input text.txt --vocab_size 280 --out_dir out"
PREPARE = "data/prepare.py --tokenizer tok --out_dir out"
TRAIN = f"pretrain.py --data_dir data --out_dir out {FLAGS}"
RESUME = "pretrain.py --resume --out_dir run --max_steps 8"
SAMPLE = "generate.py --model run --device cpu"
LAST, ALL = "run/checkpoints/00000004", ("run/checkpoints/00000002", "run/checkpoints/00000004")


@dataclass
class Case:
    """One mistake: a command line, the words its one line must have, and how to come to it."""
    id: str
    command: str
    words: list
    setup: object = None            # called in the case's directory, before
    stdin: bytes = b""
    limit: int = -1                 # bytes that a file may grow to: stands in for a full disk; -1 = no limit
    without: str = ""               # a module that is not installed
    left: tuple = ()                # paths that may be there or be changed afterwards


def english(n, seed=0):
    rng = random.Random(seed)
    words = "one small cat saw the red moon and sang to an old river".split()
    return [f"{i} " + " ".join(rng.choices(words, k=12)) for i in range(n)]


def write(name, data=b""):
    """Write a text or bytes, zipped where the name says so."""
    data = data.encode() if isinstance(data, str) else data
    Path(name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)


def cut(name, size):
    os.truncate(name, size)


def poke(name, place, data):
    """Overwrite bytes in the middle of a file."""
    with open(name, "r+b") as file:
        file.seek(place)
        file.write(data)


def change(name, old, new):
    text = Path(name).read_text(encoding="utf-8")
    assert old in text
    Path(name).write_text(text.replace(old, new, 1), encoding="utf-8")


def other_tokenizer(name, vocab_size):
    """A tokenizer of other words; with 280 tokens it has the size of the first one and another meaning."""
    Tokenizer.train([text[::-1] for text in english(60)], vocab_size).save(name)


def other_data(vocab_size):
    other_tokenizer("tok2", vocab_size)
    shutil.rmtree("data")
    prepare("text.txt", "tok2", "data", val_fraction=0.2)


def break_all(name):
    for path in ALL:
        cut(f"{path}/{name}", 5)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A directory with text.txt, tok (280 tokens), data (its shards) and run (checkpoints 2 and 4)."""
    directory = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(directory)
        write("text.txt", "\n<|endoftext|>\n".join(english(100)))
        Tokenizer.train(english(100), 280).save("tok")
        prepare("text.txt", "tok", "data", val_fraction=0.2)
        pretrain(PretrainConfig(data_dir="data", out_dir="run", **SHAPE))
        restore_process()
    return directory


def restore_process():
    """Undo what a training run sets for its process: another test shares it."""
    torch.set_deterministic_debug_mode("default")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


# ---- the table

TOKENIZER_CASES = [
    Case("no input", "tokenizer.py", ["--input is empty", "give FILE[:WEIGHT]"]),
    Case("input of no weight", "tokenizer.py --input text.txt:0", ["text.txt:0", "a number above 0"]),
    Case("input missing", "tokenizer.py --input none.txt", ["none.txt: no such file"]),
    Case("one of two missing", "tokenizer.py --input text.txt,none.txt", ["none.txt: no such file"]),
    Case("input is a directory", "tokenizer.py --input tok", ["tok: not a file"]),
    Case("input empty", "tokenizer.py --input e.txt", ["e.txt: no text"], lambda: write("e.txt")),
    Case("input blank", "tokenizer.py --input e.txt", ["e.txt: no text"], lambda: write("e.txt", " \n\n ")),
    Case("input not UTF-8", "tokenizer.py --input g.txt", ["g.txt: byte 6 (line 2) is not UTF-8", "iconv"],
         lambda: write("g.txt", "hello\n月亮".encode("gb18030"))),
    Case("input cut gzip", "tokenizer.py --input t.txt.gz",
         ["t.txt.gz: damaged gzip", "download or compress"],
         lambda: (write("t.txt.gz", "\n".join(english(900))), cut("t.txt.gz", 4000))),
    Case("input not UTF-8 and cut", "tokenizer.py --input t.txt.gz",
         ["t.txt.gz: byte 5 (line 1) is not UTF-8"],
         lambda: (write("t.txt.gz", b"hello\xff\xff" + random.Random(0).randbytes(9000)),
                  cut("t.txt.gz", 900))),
    Case("input no gzip", "tokenizer.py --input t.txt.gz", ["t.txt.gz: damaged gzip"],
         lambda: shutil.copy("text.txt", "t.txt.gz")),
    Case("input of unknown kind", "tokenizer.py --input t.pdf", ["t.pdf: unknown kind", ".txt, .jsonl"],
         lambda: write("t.pdf", "x")),
    Case("vocabulary below the bytes", f"{TOKENIZE} --vocab_size 100",
         ["vocab_size 100 is too small", "260"]),
    Case("vocabulary negative", f"{TOKENIZE} --vocab_size -1", ["vocab_size -1 is too small"]),
    Case("vocabulary beyond memory", f"{TOKENIZE} --vocab_size 99999999999", ["too large", "lower"]),
    Case("vocabulary no number", f"{TOKENIZE} --vocab_size many", ["--vocab_size", "'many'", "--help"]),
    Case("vocabulary no whole number", f"{TOKENIZE} --vocab_size 1e4", ["--vocab_size", "'1e4'"]),
    Case("value missing", "tokenizer.py --input", ["--input", "expected one argument"]),
    Case("processes negative", f"{TOKENIZE} --processes -1", ["processes -1", "at least 1"]),
    Case("flag unknown", f"{TOKENIZE} --vocab_sise 9",
         ["unknown flag --vocab_sise", "did you mean --vocab_size?"]),
    Case("flag shortened", f"{TOKENIZE} --vocab 9", ["unknown flag --vocab;", "did you mean --vocab_size?"]),
    Case("word too many", f"{TOKENIZE} text.txt", ["unknown", "text.txt", "--help"]),
    Case("out_dir a file", f"{TOKENIZE} --out_dir text.txt", ["text.txt", "exists", "another path"]),
    Case("out_dir below a file", f"{TOKENIZE} --out_dir text.txt/x", ["text.txt/x", "another path"]),
    Case("out_dir where nothing can be", f"{TOKENIZE} --out_dir /proc/x/y", ["/proc/x", "another path"]),
    Case("disk full", TOKENIZE, ["out/bpe.json", "make room"], limit=500, left=("out",)),
    Case("disk full beside an old one", f"{TOKENIZE} --out_dir tok", ["tok/bpe.json", "make room"],
         limit=500),
]

PREPARE_CASES = [
    Case("input missing", f"{PREPARE} --input none.txt", ["--input none.txt: no such file"]),
    Case("no input", f"{PREPARE} --input ''", ["--input", "no such file"]),
    Case("input is a directory", f"{PREPARE} --input run", ["--input run", "no such file"]),
    Case("input empty", f"{PREPARE} --input text.txt,e.txt", ["e.txt: no text"], lambda: write("e.txt")),
    Case("input not UTF-8", f"{PREPARE} --input text.txt,g.txt.gz",
         ["g.txt.gz: byte", "is not UTF-8", "iconv"],
         lambda: write("g.txt.gz", "小猫".encode("utf-16"))),
    Case("input cut gzip", f"{PREPARE} --input text.txt,t.txt.gz", ["t.txt.gz: damaged gzip"],
         lambda: (write("t.txt.gz", "\n".join(english(900))), cut("t.txt.gz", 4000))),
    Case("input bad JSON", f"{PREPARE} --input a.jsonl", ["a.jsonl:2: not a JSON record", "mend the line"],
         lambda: write("a.jsonl", '{"text": "x"}\n{"text": ')),
    Case("input other keys", f"{PREPARE} --input a.jsonl", ["a.jsonl:1: no text under", "body", "--text_key"],
         lambda: write("a.jsonl", '{"body": "x"}')),
    Case("input other columns", f"{PREPARE} --input a.tsv --columns 3", ["a.tsv: row 1", "--columns"],
         lambda: write("a.tsv", "a\tb\n")),
    Case("input given twice", f"{PREPARE} --input text.txt,text.txt:2",
         ["text.txt is given twice", "weight"]),
    Case("weight 0", f"{PREPARE} --input text.txt:0", ["text.txt:0", "weight must be above 0"]),
    Case("weight negative", f"{PREPARE} --input text.txt:-2", ["text.txt:-2", "weight must be above 0"]),
    Case("one document", f"{PREPARE} --input a.txt", ["no documents for split val", "--val_tail"],
         lambda: write("a.txt", "one")),
    Case("tokenizer missing", f"{PREPARE} --tokenizer none --input text.txt",
         ["none/bpe.json", "tokenizer.py"]),
    Case("tokenizer a file", f"{PREPARE} --tokenizer text.txt --input text.txt",
         ["no tokenizer at text.txt"]),
    Case("tokenizer empty", f"{PREPARE} --input text.txt", ["tok/bpe.json is damaged", "again"],
         lambda: write("tok/bpe.json")),
    Case("tokenizer cut", f"{PREPARE} --input text.txt", ["tok/bpe.json is damaged", "again"],
         lambda: cut("tok/bpe.json", 400)),
    Case("tokenizer not UTF-8", f"{PREPARE} --input text.txt", ["tok/bpe.json is damaged"],
         lambda: write("tok/bpe.json", b"\xff\xfe{}")),
    Case("tokenizer changed", f"{PREPARE} --input text.txt", ["tok/bpe.json", "sha256"],
         lambda: change("tok/bpe.json", '"sha256": "', '"sha256": "0')),
    Case("tokenizer of another version", f"{PREPARE} --input text.txt", ["tok/bpe.json", "version 9"],
         lambda: change("tok/bpe.json", "version 1", "version 9")),
    Case("val_fraction 0", f"{PREPARE} --input text.txt --val_fraction 0", ["--val_fraction 0.0", "0 and 1"]),
    Case("val_fraction no number", f"{PREPARE} --input text.txt --val_fraction nan", ["--val_fraction nan"]),
    Case("val_tail negative", f"{PREPARE} --input text.txt --val_tail -0.5",
         ["--val_tail -0.5", "at least 0"]),
    Case("shard_tokens 0", f"{PREPARE} --input text.txt --shard_tokens 0",
         ["--shard_tokens 0", "at least 1"]),
    Case("seed a word", f"{PREPARE} --input text.txt --seed x", ["--seed", "'x'"]),
    Case("flag unknown", f"{PREPARE} --tokeniser x",
         ["unknown flag --tokeniser", "did you mean --tokenizer?"]),
    Case("flag shortened", f"{PREPARE} --val_f 0.1",
         ["unknown flag --val_f;", "did you mean --val_fraction?"]),
    Case("out_dir holds something", f"{PREPARE} --out_dir run --input text.txt",
         ["run", "not an empty directory"]),
    Case("out_dir a file", f"{PREPARE} --out_dir text.txt --input text.txt", ["text.txt", "choose another"]),
    Case("out_dir below a file", f"{PREPARE} --out_dir text.txt/a/b --input text.txt",
         ["text.txt/a/b", "another"]),
    Case("out_dir where nothing can be", f"{PREPARE} --out_dir /proc/x/y --input text.txt",
         ["/proc/x/y", "another"]),
    Case("disk full: shards", f"{PREPARE} --input text.txt", ["out", "File too large", "make room"],
         limit=2000),
    Case("disk full: meta.json", f"{PREPARE} --input a.txt", ["out", "File too large", "make room"],
         lambda: write("a.txt", "one\n<|endoftext|>\ntwo"), limit=200),
]

DATA_CASES = [
    Case("data missing", f"{TRAIN} --data_dir none", ["--data_dir none: no such directory", "data.prepare"]),
    Case("data not shards", f"{TRAIN} --data_dir tok", ["--data_dir tok: no meta.json", "data.prepare"]),
    Case("meta.json empty", TRAIN, ["data/meta.json: not the meta.json"], lambda: write("data/meta.json")),
    Case("meta.json cut", TRAIN, ["data/meta.json: not the meta.json"], lambda: cut("data/meta.json", 50)),
    Case("meta.json a list", TRAIN, ["data/meta.json: not the meta.json"],
         lambda: write("data/meta.json", "[]")),
    Case("meta.json not UTF-8", TRAIN, ["data/meta.json: not the meta.json"],
         lambda: write("data/meta.json", b"\xff\xfe")),
    Case("meta.json lacks a key", TRAIN, ["data/meta.json: key vocab_size is missing"],
         lambda: change("data/meta.json", '"vocab_size"', '"vocabulary"')),
    Case("meta.json: size a word", TRAIN, ["data/meta.json", "vocab_size"],
         lambda: change("data/meta.json", '"vocab_size": 280', '"vocab_size": "280"')),
    Case("meta.json: hash a number", TRAIN, ["data/meta.json", "tokenizer_sha256"],
         lambda: change("data/meta.json", '"tokenizer_sha256": "', '"tokenizer_sha256": 5, "x": "')),
    Case("meta.json: name a number", TRAIN, ["data/meta.json", "name"],
         lambda: change("data/meta.json", '"name": "val_00000.npy"', '"name": 7')),
    Case("meta.json: documents a word", TRAIN, ["data/meta.json", "documents"],
         lambda: change("data/meta.json", '"documents": ', '"documents": "many", "x": ')),
    Case("no validation", TRAIN, ["data/meta.json: no files of split 'val'"],
         lambda: change("data/meta.json", '"split": "val"', '"split": "test"')),
    Case("vocabulary larger than the dtype", TRAIN, ["vocab_size 70000 does not fit dtype uint16"],
         lambda: change("data/meta.json", '"vocab_size": 280', '"vocab_size": 70000')),
    Case("dtype unknown", TRAIN, ["dtype float32"],
         lambda: change("data/meta.json", '"uint16"', '"float32"')),
    Case("dtype not the shards'", TRAIN, ["train_00000.npy", "uint16", "uint32", "prepare the data again"],
         lambda: change("data/meta.json", '"uint16"', '"uint32"')),
    Case("ids beyond the vocabulary", TRAIN, ["train_00000.npy: token id", "vocab_size 270"],
         lambda: change("data/meta.json", '"vocab_size": 280', '"vocab_size": 270')),
    Case("shard missing", TRAIN, ["data/train_00000.npy", "not there", "prepare the data again"],
         lambda: os.remove("data/train_00000.npy")),
    Case("shard empty", TRAIN, ["data/train_00000.npy: not a readable"],
         lambda: write("data/train_00000.npy")),
    Case("shard cut", TRAIN, ["data/train_00000.npy: not a readable"],
         lambda: cut("data/train_00000.npy", 1000)),
    Case("shard cut in its header", TRAIN, ["data/val_00000.npy: not a readable"],
         lambda: cut("data/val_00000.npy", 50)),
    Case("shard overwritten", TRAIN, ["data/val_00000.npy: token id 65535 >= vocab_size 280"],
         lambda: poke("data/val_00000.npy", 200, b"\xff\xff")),
    Case("shard of text", TRAIN, ["data/val_00000.npy: not a readable"],
         lambda: write("data/val_00000.npy", "hello " * 999)),
    Case("tokenizer not the shards'", TRAIN, ["data: its tokens are of tokenizer", "data/tokenizer", "again"],
         lambda: other_tokenizer("data/tokenizer", 280)),
    Case("tokenizer of another size", TRAIN, ["data: its tokens are of tokenizer", "280", "272"],
         lambda: other_tokenizer("data/tokenizer", 272)),
    Case("tokenizer missing", TRAIN, ["data/tokenizer/bpe.json"], lambda: shutil.rmtree("data/tokenizer")),
    Case("tokenizer cut", TRAIN, ["data/tokenizer/bpe.json is damaged"],
         lambda: cut("data/tokenizer/bpe.json", 99)),
    Case("vocabulary not the shards'", f"{TRAIN} --vocab_size 4096",
         ["vocab_size 4096", "280", "leave it out"]),
    Case("rows longer than validation", f"{TRAIN} --max_seq_len 1500",
         ["data: val needs at least 1501 tokens", "has",
                                                                       "--max_seq_len"]),
    Case("rows longer than training", f"{TRAIN} --max_seq_len 100000",
         ["data: train needs at least 100001 tokens"]),
]

FLAG_CASES = [
    Case("flag unknown", f"{TRAIN} --learn_rate 3",
         ["unknown flag --learn_rate", "did you mean --learning_rate?"]),
    Case("flag with =", f"{TRAIN} --batchsize=3",
         ["unknown flag --batchsize;", "did you mean --batch_size?"]),
    Case("flag shortened", f"{TRAIN} --micro 3",
         ["unknown flag --micro;", "did you mean --micro_batch_size?"]),
    Case("flag like no other", f"{TRAIN} --zzz", ["unknown flag --zzz (", "--help"]),
    Case("word too many", f"{TRAIN} tiny", ["unknown", "tiny", "--help"]),
    Case("value missing", "pretrain.py --out_dir", ["--out_dir", "expected one argument"]),
    Case("value for a switch", f"{TRAIN} --smoke=yes", ["--smoke", "'yes'"]),
    Case("steps a word", f"{TRAIN} --max_steps ten", ["--max_steps", "'ten'"]),
    Case("steps a fraction", f"{TRAIN} --max_steps 1.5", ["--max_steps", "'1.5'"]),
    Case("rate a word", f"{TRAIN} --learning_rate fast", ["--learning_rate", "'fast'"]),
    Case("preset unknown", f"{TRAIN} --config tinny", ["--config", "'tinny'", "tiny", "gpt2-124m"]),
    Case("optimizer unknown", f"{TRAIN} --optimizer adamm",
         ["optimizer 'adamm'", "adam, adamw, muon, lamb, lars"]),
    Case("schedule unknown", f"{TRAIN} --schedule cosin", ["schedule 'cosin'", "cosine, linear"]),
    Case("dtype unknown", f"{TRAIN} --dtype fp8", ["dtype 'fp8'", "fp32, bf16, fp16"]),
    Case("device unknown", f"{TRAIN} --device gpu", ["device 'gpu'", "cuda"]),
    Case("device absent", f"{TRAIN} --device mps", ["device mps: not available", "--device auto"]),
    Case("init unknown", f"{TRAIN} --init zeros", ["init 'zeros'", "normal, xavier, he"]),
    Case("wandb absent", f"{TRAIN} --wandb x", ["wandb is not installed", "pip install wandb"],
         without="wandb"),
    Case("tensorboard absent", f"{TRAIN} --tensorboard", ["pip install tensorboard"],
         without="torch.utils.tensorboard"),
    *[Case(f"{name} {value}", f"{TRAIN} --{name} {value}", [name, str(value)]) for name, value in (
        ("max_steps", 0), ("max_steps", -5), ("batch_size", 0), ("micro_batch_size", -1), ("log_every", 0),
        ("eval_every", 0), ("save_every", -1), ("keep_every", -1), ("warmup_steps", -1), ("threads", -1),
        ("max_seconds", -1), ("eval_rows", 0), ("eval_rows", -1), ("eval_documents", -1), ("samples", -1),
        ("sample_tokens", 0), ("learning_rate", -1), ("learning_rate", "nan"), ("min_lr", 2),
        ("min_lr", "nan"),
        ("decay_power", -1), ("decay_fraction", -1), ("decay_fraction", 2), ("weight_decay", -1),
        ("beta1", 1.5),
        ("beta2", -1), ("eps", -1), ("max_grad_norm", -1), ("max_grad_norm", "nan"), ("dropout", 1),
        ("dropout", "nan"),
        ("d_model", 0), ("n_layers", 0), ("n_heads", 0), ("n_heads", 3), ("n_kv_heads", -1), ("head_dim", 3),
        ("head_dim", -2), ("d_ff", 0), ("max_seq_len", 0), ("rope_theta", 0), ("norm_eps", -1),
        ("vocab_size", -1))],
    *[Case(f"skip_steps {text}", f"{TRAIN} --skip_steps={text}", [f"skip_steps '{text}'", "120-140,300-310"])
      for text in ("abc", "5-3", "1-2-3", "-5", "3.5", "3-")],
    Case("batch and micro-batch", f"{TRAIN} --batch_size 6 --micro_batch_size 4",
         ["batch_size 6 is not a multiple of micro_batch_size 4"]),
    Case("micro-batch beyond the batch", f"{TRAIN} --micro_batch_size 64",
         ["batch_size 4", "micro_batch_size 64"]),
    Case("ramp and batch", f"{TRAIN} --batch_size 6 --batch_size_start 4 --ramp_tokens 99",
         ["batch_size 6", "4"]),
    Case("ramp and batch, with a micro-batch",
         f"{TRAIN} --batch_size 6 --batch_size_start 4 --micro_batch_size 2 "
         "--ramp_tokens 99", ["batch_size 6 is not a multiple of batch_size_start 4"]),
    Case("ramp downwards", f"{TRAIN} --batch_size_start 8 --ramp_tokens 99", ["batch_size 4", "8"]),
    Case("ramp and micro-batch",
         f"{TRAIN} --batch_size 8 --batch_size_start 2 --micro_batch_size 4 --ramp_tokens 99",
         ["batch_size 2 is not a multiple of micro_batch_size 4"]),
    Case("ramp without its length", f"{TRAIN} --batch_size_start 2", ["batch_size_start 2", "ramp_tokens 0"]),
    Case("ramp without its start", f"{TRAIN} --ramp_tokens 99", ["batch_size_start 0", "ramp_tokens 99"]),
    Case("ramp negative", f"{TRAIN} --batch_size_start 2 --ramp_tokens -9", ["ramp_tokens -9"]),
]

RUN_CASES = [
    Case("out_dir a file", f"{TRAIN} --out_dir text.txt", ["text.txt", "another path"]),
    Case("out_dir below a file", f"{TRAIN} --out_dir text.txt/x", ["text.txt/x", "another path"]),
    Case("out_dir where nothing can be", f"{TRAIN} --out_dir /proc/x/y", ["/proc/x", "another path"]),
    Case("out_dir holds a run", f"{TRAIN} --out_dir run", ["--out_dir run", "--resume", "another directory"]),
    Case("init_from nothing", f"{TRAIN} --init_from none", ["none: no usable checkpoint", "give"]),
    Case("init_from shards", f"{TRAIN} --init_from data", ["data: no usable checkpoint"]),
    Case("init_from another width", f"{TRAIN} --init_from run --d_model 8",
         [LAST, "(280, 16)", "(280, 8)", "same model"]),
    Case("init_from more layers", f"{TRAIN} --init_from run --n_layers 2",
         [LAST, "layers.1.", "absent there"]),
    Case("init_from fewer layers", f"{TRAIN} --init_from run --n_layers 1", [LAST, "layers.1.", "absent"],
         lambda: (shutil.rmtree("run"), train_two_layers())),
    Case("init_from another tokenizer", f"{TRAIN} --init_from run", [LAST, "tokenizer", "--tokenizer"],
         lambda: other_data(280)),
    Case("init_from another vocabulary", f"{TRAIN} --init_from run",
         [LAST, "embed_tokens", "(280, 16)", "(272, 16)"],
         lambda: other_data(272)),
    Case("init_from a broken one", f"{TRAIN} --init_from {LAST}",
         [LAST, "model.pt does not match its checksum"],
         lambda: poke(f"{LAST}/model.pt", 900, b"x")),
    Case("init_from, all broken", f"{TRAIN} --init_from run", ["run: no usable checkpoint"],
         lambda: break_all("model.pt")),
    Case("resume nothing", f"pretrain.py --resume --out_dir none", ["--resume: no checkpoint under none"]),
    Case("resume the default nothing", "pretrain.py --resume",
         ["--resume: no checkpoint under out/pretrain"]),
    Case("resume with another rate", f"{RESUME} --learning_rate 3",
         ["--learning_rate 3.0 cannot change", "--max_steps"]),
    Case("resume with another seed", f"{RESUME} --seed 0", ["--seed 0 cannot change"]),
    Case("resume with a preset", f"{RESUME} --config tiny", ["--config tiny cannot change"]),
    Case("resume with other data", f"{RESUME} --data_dir data", ["--data_dir data cannot change"]),
    Case("resume, all weights broken", RESUME, ["run: no usable checkpoint"], lambda: break_all("model.pt")),
    Case("resume, all states broken", RESUME, ["run: no usable checkpoint"],
         lambda: break_all("training.pt")),
    Case("resume, all configs broken", RESUME, ["--resume: no usable checkpoint under run"],
         lambda: break_all("config.json")),
    Case("resume, all configs of nothing", RESUME, ["--resume: no usable checkpoint under run"],
         lambda: [write(f"{path}/config.json", '{"config": 5}') for path in ALL]),
    Case("resume, no checksums", RESUME, ["run: no usable checkpoint"],
         lambda: [write(f"{path}/checksums.json", "{}") for path in ALL]),
    Case("resume, data gone", RESUME, ["--data_dir data: no such directory"], lambda: shutil.rmtree("data")),
    Case("resume, data of another tokenizer", RESUME, [LAST, "tokenizer"], lambda: other_data(280)),
    Case("disk full: checkpoint", TRAIN, ["out/checkpoints/00000002", "step 2", "make room", "--resume"],
         limit=20_000,
         left=("out", "out/checkpoints", "out/log.jsonl")),
    Case("disk full: optimizer's state", TRAIN, ["out/checkpoints/00000002", "make room"], limit=30_000,
         left=("out", "out/checkpoints", "out/log.jsonl")),
    Case("disk full: second checkpoint", RESUME, ["run/checkpoints/00000006", "make room"], limit=20_000,
         left=("run/log.jsonl",)),
    Case("disk full: log", f"{TRAIN} --save_every 99", ["out/log.jsonl", "make room"], limit=280,
         left=("out", "out/log.jsonl")),
    Case("no such language", "data/world.py --language fr", ["'fr'", "en, zh"]),
    Case("no such split", "data/world.py --split test", ["'test'", "train or val"]),
    Case("no text to write", "data/world.py --out_dir w --megabytes 0", ["--megabytes 0", "above 0"]),
    Case("nothing to recognise", "data/world.py --recognise none.txt", ["none.txt"]),
    Case("no instructions", "data/instructions.py --out_dir w --examples 2", ["--examples 2", "at least 20"]),
    Case("instructions into a file", "data/instructions.py --out_dir text.txt", ["text.txt"]),
    Case("disk full: built-in data", "pretrain.py --smoke --out_dir out", ["out/text", "make room"],
         limit=1000, left=("out", "out/text")),
]

GENERATE_CASES = [
    Case("no model", "generate.py", ["--model", "required"]),
    Case("model missing", "generate.py --model none", ["none: no usable checkpoint", "give"]),
    Case("model of shards", "generate.py --model data", ["data: no usable checkpoint"]),
    Case("model a file", "generate.py --model text.txt", ["text.txt: no usable checkpoint"]),
    Case("model: all broken", SAMPLE, ["run: no usable checkpoint"], lambda: break_all("model.pt")),
    *[Case(f"model: {name} cut", f"generate.py --model {LAST}", [f"checkpoint {LAST}", name, "use another"],
           lambda name=name: cut(f"{LAST}/{name}", 9)) for name in ("model.pt", "tokenizer/bpe.json")],
    Case("model: config.json cut", f"generate.py --model {LAST}",
         [f"checkpoint {LAST}", "cannot be read", "another"],
         lambda: cut(f"{LAST}/config.json", 9)),
    Case("model: weights missing", f"generate.py --model {LAST}",
         [f"checkpoint {LAST}", "model.pt is missing"],
         lambda: os.remove(f"{LAST}/model.pt")),
    *[Case(f"model: checksums {text}", f"generate.py --model {LAST}",
           [f"checkpoint {LAST}", "checksums.json is damaged"],
           lambda text=text: write(f"{LAST}/checksums.json", text)) for text in ("[]", "{}", "5")],
    Case("prompt too long", f"{SAMPLE} --prompt '{'cat sat moon ' * 20}'",
         ["prompt 0 has", "max_seq_len 32", "shorten"]),
    Case("prompt not UTF-8", f"{SAMPLE} --prompt -", ["stdin: byte 5 is not UTF-8", "convert"],
         stdin=b"hello\xff"),
    Case("prompt of broken bytes", f"{SAMPLE} --prompt ab\udcff",
         ["prompt 'ab\\udcff': character 2", "convert"]),
    Case("device unknown", f"{SAMPLE} --device tpu", ["device 'tpu'", "cuda"]),
    *[Case(f"{name} {value}", f"{SAMPLE} --{name} {value}", [name, str(value)]) for name, value in (
        ("samples", 0), ("samples", -2), ("max_new_tokens", 0), ("max_new_tokens", -3), ("temperature", -1),
        ("temperature", "nan"), ("top_k", -1), ("top_p", 0), ("top_p", 1.5), ("min_p", 2), ("min_p", -1),
        ("repetition_penalty", 0), ("repetition_penalty", "nan"), ("threads", -1), ("seed", "x"),
        ("top_k", "many"))],
    Case("flag unknown", f"{SAMPLE} --temprature 1",
         ["unknown flag --temprature", "did you mean --temperature?"]),
    Case("flag shortened", f"{SAMPLE} --temp 1", ["unknown flag --temp;", "did you mean --temperature?"]),
]


def train_two_layers():
    pretrain(PretrainConfig(data_dir="data", out_dir="run", **SHAPE | {"n_layers": 2}))


TABLE = {f"{part} | {case.id}": case for part, cases in (
    ("tokenizer", TOKENIZER_CASES), ("prepare", PREPARE_CASES), ("pretrain data", DATA_CASES),
    ("pretrain flags", FLAG_CASES), ("pretrain run", RUN_CASES),
    ("generate", GENERATE_CASES)) for case in cases}
IN_A_PROCESS = ["tokenizer | disk full", "prepare | input cut gzip",
                "pretrain run | disk full: second checkpoint",
                "generate | prompt of broken bytes"]


# ---- running a case

def snapshot():
    """{path: bytes of a file, None of a directory} of all that lies here."""
    return {p.as_posix(): p.read_bytes() if p.is_file() else None for p in Path(".").rglob("*")}


def limit_files(size):
    """Let no file grow beyond size bytes; -1 = any size. Give the limit before."""
    resource = pytest.importorskip("resource")
    before, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    return before


def run_here(case, monkeypatch):
    """The script's __main__ block in this process: exit status and stderr."""
    script, *flags = shlex.split(case.command)
    monkeypatch.setattr(sys, "argv", [str(ROOT / script), *flags])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(case.stdin)))
    monkeypatch.setattr(sys, "stdout",
                        io.StringIO())                  # pytest keeps it in a file, which has a limit here
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
    if case.without:
        monkeypatch.setitem(sys.modules, case.without, None)
    if case.limit >= 0:
        before = limit_files(case.limit)
    status = 0
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as ended:
        status = ended.code
    finally:
        restore_process()
        if case.limit >= 0:
            limit_files(before)
    return status, stderr.getvalue()


def run_apart(case, **environment):
    """The same as run_here, in a process of its own."""
    script, *flags = shlex.split(case.command)
    module = ["-m", script[:-3].replace("/", ".")] if script.startswith("data/") else [ROOT / script]
    limit = (lambda: limit_files(case.limit)) if case.limit >= 0 else None
    done = subprocess.run([sys.executable, *module, *flags], input=case.stdin, capture_output=True,
                          preexec_fn=limit,
                          env=os.environ | {"PYTHONPATH": str(ROOT)} | environment)
    return done.returncode, done.stderr.decode()


def check(case, status, stderr, before):
    """What every mistake must come to."""
    script = Path(case.command.split()[0]).name
    assert status == 2, stderr
    assert stderr.startswith(f"{script}: ") and stderr.endswith("\n") and stderr.count("\n") == 1, stderr
    line = stderr.removeprefix(f"{script}: ")
    assert [word for word in case.words if word not in line] == [], line
    assert "Traceback" not in line and "Error" not in line.replace("DecodeError", ""), line
    after = snapshot()
    changed = {path for path in before.keys() | after.keys() if before.get(path, 0) != after.get(path, 0)}
    assert changed <= set(case.left)


def prepared(case, base, directory, monkeypatch):
    """Make the case's directory and enter it; returns what is in it."""
    shutil.copytree(base, directory, dirs_exist_ok=True)
    monkeypatch.chdir(directory)
    if case.setup:
        case.setup()
    return snapshot()


@pytest.mark.parametrize("name", TABLE)
def test_one_line_status_2_nothing_left(name, base, tmp_path, monkeypatch):
    before = prepared(TABLE[name], base, tmp_path, monkeypatch)
    check(TABLE[name], *run_here(TABLE[name], monkeypatch), before)


@pytest.mark.parametrize("name", IN_A_PROCESS)
def test_the_same_in_a_process_of_its_own(name, base, tmp_path, monkeypatch):
    before = prepared(TABLE[name], base, tmp_path, monkeypatch)
    check(TABLE[name], *run_apart(TABLE[name]), before)


@pytest.mark.parametrize("case, others_say", [
    (Case("batch and ranks", f"{TRAIN} --batch_size 3", ["batch_size 3 is not a multiple of the 2 ranks"]),
     ["batch_size 3 is not a multiple of the 2 ranks"]),
    (Case("only rank 0 writes", "pretrain.py --smoke --out_dir text.txt/x", ["text.txt/x"]),
     ["another rank ended"]),
], ids=lambda x: getattr(x, "id", ""))
def test_two_ranks(case, others_say, base, tmp_path, monkeypatch):
    """As torchrun starts them: each rank says in one line why it ends, and none waits for ever."""
    before = prepared(case, base, tmp_path, monkeypatch)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(lambda rank: run_apart(case, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2",
                                                        MASTER_PORT=port,
                                                        MASTER_ADDR="127.0.0.1"), "01")
    check(case, *first, before)
    check(replace(case, words=others_say), *second, before)


@pytest.mark.parametrize("room, case", [
    (0, TABLE["tokenizer | disk full"]),
    (0, Case("shards", f"{PREPARE} --input text.txt", ["out: No space left on device", "make room"])),
    (24 << 10, Case("checkpoint", TRAIN, ["00000002", "No space left on device", "make room"],
                    left=("out", "out/checkpoints", "out/log.jsonl"))),
    (0,
     Case("log", TRAIN, ["out/log.jsonl: No space left on device", "make room"],
          left=("out", "out/log.jsonl"))),
], ids=lambda x: getattr(x, "id", None))
def test_a_disk_that_is_really_full(room, case, base, tmp_path, monkeypatch):
    """The same on a file system of 1 MB that has `room` bytes left; only root may make one, on Linux."""
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path],
                      capture_output=True).returncode:
        pytest.skip("may not mount a small file system here")
    try:
        prepared(case, base, tmp_path, monkeypatch)
        fill(tmp_path / "filling", room)
        before = snapshot()
        check(case, *run_here(case, monkeypatch), before)
    finally:
        monkeypatch.undo()                                      # out of the directory
        subprocess.run(["umount", "-l", tmp_path], check=True)


def fill(path, room):
    """Fill a file system but for `room` bytes."""
    size = os.statvfs(path.parent)
    path.write_bytes(b"x" * (size.f_bavail * size.f_bsize - room))
