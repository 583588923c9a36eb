"""Text files to token shards: python -m data.prepare --input FILE[,FILE:weight] --tokenizer DIR --out_dir DIR

Reads, splits into train and validation, repeats or thins by weight, encodes, and writes {train,val}_NNNNN.npy
with meta.json and the tokenizer beside them; one pass, bounded memory. The format is .npy because numpy maps
it into memory as it is: any row is there at once, all ranks share the pages, and no reader library is needed,
as TFRecord and HDF5 would. All is written under a temporary name; a run that fails leaves nothing behind.
"""

import hashlib
import io
import json
import math
import os
import shutil
import time
from array import array
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import UserError, option, parse_config, progress_bar, run
from data.read import SEPARATOR, TEXT_KEYS, documents, language_of
from tokenizer import Tokenizer

BATCH_CHARS = 1_000_000     # characters encoded at once
MAX_WEIGHT = 1000


@dataclass
class PrepareConfig:
    """Turn text files into token shards for training and validation."""
    input: str = option("out/text/train.en.txt,out/text/train.zh.txt",
                        "files FILE[:WEIGHT],...; .txt .jsonl .tsv .csv, also + .gz; weight 2 repeats a "
                        "file's training documents, 0.3 keeps 3 in 10 of them")
    tokenizer: str = option("out/tokenizer", "directory of the tokenizer")
    out_dir: str = option("out/data", "directory to make; may exist if it is empty")
    val_fraction: float = option(0.05, "share of documents for validation, chosen by a hash of their text")
    val_tail: float = option(0.0, "instead, take this share at the end of each file for validation; 0 = off")
    val_input: str = option("", "instead, these files are for validation, and all of --input trains")
    entropy_bound: str = option("", "file {language: bits/byte that no model can beat}, for meta.json; "
                                    "python -m data.world writes one")
    document_separator: str = option(SEPARATOR, "line between two documents of a .txt file")
    text_key: str = option(TEXT_KEYS, "keys of a .jsonl record; the first that is there holds the text")
    columns: str = option("", "columns of .tsv and .csv files to join: 2,3 or names in a header; '' = all")
    seed: int = option(0, "of the split and of weights that are not whole")
    shard_tokens: int = option(20_000_000, "tokens in a file at most; a longer document has a file to itself")

    def __post_init__(self):
        if not 0 < self.val_fraction < 1:
            raise UserError(f"--val_fraction {self.val_fraction} must lie between 0 and 1")
        if not 0 <= self.val_tail < 1:
            raise UserError(f"--val_tail {self.val_tail} must be at least 0 (off) and less than 1")
        if self.val_input and self.val_tail:
            raise UserError(f"--val_tail {self.val_tail} and --val_input {self.val_input} exclude each "
                            "other; leave one out")
        if self.shard_tokens < 1:
            raise UserError(f"--shard_tokens {self.shard_tokens} must be at least 1")


class Source(NamedTuple):
    """One input file."""
    path: str
    weight: float
    split: str = ""             # "train" or "val" where files are given for each


class Document(NamedTuple):
    """One text to write."""
    source: Source
    language: str
    text: str


def prepare(input, tokenizer, out_dir, **options):
    """Make a directory of shards and return its meta.json as a dict.

    Args:
        input: "FILE[:WEIGHT],..." as on the command line.
        tokenizer: a Tokenizer, or the directory of one.
        options: further fields of PrepareConfig.
    """
    config = PrepareConfig(input=str(input), out_dir=str(out_dir), **options)
    sources = parse_sources(config.input)
    if config.val_input:
        sources = ([s._replace(split="train") for s in sources]
                   + [s._replace(split="val") for s in parse_sources(config.val_input, "--val_input")])
    bound = read_bound(config.entropy_bound) if config.entropy_bound else None
    tokenizer = tokenizer if isinstance(tokenizer, Tokenizer) else Tokenizer.load(tokenizer)
    with finished_directory(config.out_dir) as directory:
        writer = ShardWriter(directory, tokenizer, config.shard_tokens)
        counts = write_documents(writer, tokenizer, sources, config)
        meta = {"vocab_size": tokenizer.vocab_size, "dtype": writer.dtype.name,
                "tokenizer_sha256": tokenizer.sha256,
                "files": writer.finish(),
                "sources": [{"path": s.path, "weight": s.weight, "counts": counts[s]} for s in sources],
                "seed": config.seed, "entropy_bound": bound}
        tokenizer.save(directory / "tokenizer")
        text = json.dumps(meta, indent=1, ensure_ascii=False) + "\n"
        (directory / "meta.json").write_text(text, encoding="utf-8")
    return meta


def read_bound(path):
    """{language: bits/byte} from a file."""
    try:
        bound = json.loads(Path(path).read_text(encoding="utf-8"))
        if isinstance(bound, dict) and all(isinstance(x, float) and x > 0 for x in bound.values()):
            return bound
    except ValueError:
        pass
    raise UserError(f"--entropy_bound {path}: not {{language: bits/byte}} in JSON; python -m data.world "
                    "--out_dir writes one")


def parse_sources(input, flag="--input"):
    """"a.txt,b.txt:0.5" -> [Source("a.txt", 1.0), Source("b.txt", 0.5)]."""
    sources = []
    for part in input.split(","):
        path, _, weight = part.strip().rpartition(":")
        try:
            source = Source(path, float(weight))
        except ValueError:                                      # no weight; a colon may be part of the name
            source = Source(part.strip(), 1.0)
        if not 0 < source.weight <= MAX_WEIGHT:
            raise UserError(f"{flag} {part}: the weight must be above 0 and at most {MAX_WEIGHT}")
        if not Path(source.path).is_file():
            raise UserError(f"{flag} {source.path}: no such file")
        if source.path in [s.path for s in sources]:
            raise UserError(f"{flag} {source.path} is given twice; give it once with a weight")
        sources.append(source)
    return sources


# ---- documents: read, split, repeat

def write_documents(writer, tokenizer, sources, config):
    """Send all documents to the writer; returns {source: [{language, split, documents, bytes, tokens}]}."""
    counts = {}
    n_bytes = sum(os.path.getsize(s.path) for s in sources) * (2 if config.val_tail else 1)
    with progress_bar(total=n_bytes, desc="reading", unit="B", unit_scale=True) as bar:
        for split, document, ids in encoded_copies(tokenizer, sources, config, bar.update):
            key, size = (document.source, document.language, split), len(document.text.encode())
            writer.add(split, document.language, ids, size)
            counts[key] = counts.get(key, 0) + np.array([1, size, len(ids)])
    table = {source: [] for source in sources}
    for (source, language, split), count in counts.items():
        names = dict(zip(("documents", "bytes", "tokens"), count.tolist()))
        table[source].append({"language": language, "split": split, **names})
    return table


def encoded_copies(tokenizer, sources, config, on_read):
    """Yield (split, Document, ids) as often as the document is to be written; copies lie a batch apart."""
    for batch in batched(split_documents(sources, config, on_read), BATCH_CHARS):
        copies = [n_copies(d, config.seed) if split == "train" else 1 for split, d in batch]
        encoded = tokenizer.encode_batch([d.text if n else "" for n, (_, d) in zip(copies, batch)])
        for round in range(max(copies)):
            yield from ((split, d, ids) for n, (split, d), ids in zip(copies, batch, encoded) if round < n)


def split_documents(sources, config, on_read):
    """Yield ("train" or "val", Document) over all sources."""
    if config.val_input:
        yield from ((source.split, d) for source in sources for d in read_source(source, config, on_read))
        return
    if not config.val_tail:
        everything = (d for source in sources for d in read_source(source, config, on_read))
        yield from split_by_hash(everything, config.val_fraction, config.seed)
        return
    for source in sources:
        yield from split_tail(lambda: read_source(source, config, on_read, strip=False), config.val_tail)


def read_source(source, config, on_read, strip=True):
    """Yield the documents of a source."""
    reading = config.document_separator, config.text_key, config.columns
    for text in documents(source.path, *reading, strip, on_read):
        # The place of cleaning, filters and near-duplicate removal: what they reject goes no further.
        yield Document(source, language_of(text), text)


def split_by_hash(documents, fraction, seed):
    """Yield (split, Document), validation being the texts whose hash lies below `fraction`.

    A document's split depends on nothing but its text and the seed, so it does not move when files are added.
    One exception, for tiny inputs: while a language has no validation, the text nearest to it is held back,
    and becomes its validation if none has come by the end.
    """
    held, validated, trained = {}, set(), set()                 # held: language -> (hash, equal documents)
    for document in documents:
        language, place = document.language, uniform(document.text, "split", seed)
        nearest, equal = held.get(language, (math.inf, []))
        if place < fraction:
            validated.add(language)
            yield "val", document
        elif language in validated or place > nearest:
            trained.add(language)
            yield "train", document
        elif place == nearest:
            equal.append(document)
        else:
            held[language] = place, [document]
            trained.update([language] if equal else [])
            yield from (("train", d) for d in equal)
    for language, (_, equal) in held.items():
        yield from (("val" if language in trained - validated else "train", d) for d in equal)


def split_tail(read, fraction):
    """Yield (split, Document), validation being the last `fraction` of the bytes; may cut a document in two.

    read: called twice, the first time for the number of bytes.
    """
    left = round(sum(len(d.text.encode()) for d in read()) * (1 - fraction))    # bytes of training to come
    for document in read():
        data = document.text.encode()
        head = data[:max(0, left)].decode(errors="ignore")      # not into the middle of a character
        left -= len(data)
        for split, text in ("train", head), ("val", document.text[len(head):]):
            if text:
                yield split, document._replace(text=text)


def n_copies(document, seed):
    """How often a training document is written: weight 2.3 gives 2, and 3 for three tenths of the texts."""
    whole = math.floor(document.source.weight)
    return whole + (uniform(document.text, "weight", seed) < document.source.weight - whole)


def uniform(text, purpose, seed):
    """A number in [0, 1) that depends on (text, purpose, seed) alone."""
    salt, person = (seed % 2**64).to_bytes(8, "little"), purpose.encode()
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=salt, person=person).digest()
    return int.from_bytes(digest, "little") / 2**64


def batched(pairs, n_chars):
    """Lists of (split, Document) with n_chars characters or a document more."""
    batch, size = [], 0
    for pair in pairs:
        batch.append(pair)
        size += len(pair[1].text)
        if size >= n_chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


# ---- shards

class ShardWriter:
    """Gathers encoded documents by split and language and writes a file whenever one is full."""

    def __init__(self, directory, tokenizer, shard_tokens):
        self.directory, self.eot_id, self.shard_tokens = directory, tokenizer.eot_id, shard_tokens
        self.typecode = "H" if tokenizer.vocab_size <= 65536 else "I"
        self.dtype = np.dtype(self.typecode)
        self.ids, self.files = {}, {}                           # by (split, language)
        self.written = []

    def add(self, split, language, ids, n_bytes):
        """Append one document."""
        key = split, language
        if key in self.ids and len(self.ids[key]) + len(ids) + 1 > self.shard_tokens:
            self.write(key)
        if key not in self.ids:
            self.ids[key] = array(self.typecode, [self.eot_id])
            self.files[key] = {"bytes": 0, "documents": 0}
        self.ids[key].extend(array(self.typecode, ids))
        self.ids[key].append(self.eot_id)
        self.files[key]["bytes"] += n_bytes
        self.files[key]["documents"] += 1

    def write(self, key):
        """Write the file of (split, language) as it stands."""
        (split, language), ids, file = key, np.asarray(self.ids.pop(key)), self.files.pop(key)
        name = f"{split}_{sum(f['split'] == split for f in self.written):05d}.npy"
        head, sha256 = io.BytesIO(), hashlib.sha256()
        np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(ids))
        with open(self.directory / name, "wb") as out:          # by hand, as np.save hides why a write failed
            for part in head.getvalue(), ids.data:
                out.write(part)
                sha256.update(part)
        self.written.append({"name": name, "split": split, "language": language, "tokens": len(ids), **file,
                             "sha256": sha256.hexdigest()})

    def finish(self):
        """Write what is left; returns the entries of all files. Refuses an empty split."""
        for key in list(self.ids):
            self.write(key)
        for split, mend in ("train", "raise the weights or give more text"), ("val", "give more documents"):
            if not any(f["split"] == split for f in self.written):
                raise UserError(f"no documents for split {split}; {mend} (documents stay whole, a language "
                                "needs two), or split by --val_tail 0.1")
        return sorted(self.written, key=lambda f: f["name"])


@contextmanager
def finished_directory(out_dir):
    """A temporary directory that becomes out_dir when the block ends well, and is removed otherwise."""
    out_dir = Path(out_dir).absolute()
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"--out_dir {out_dir} is there and not an empty directory; choose another")
    base = next(p for p in out_dir.parents if p.exists())       # parents are made last, too
    temporary = base / f".tmp-{out_dir.name}"
    shutil.rmtree(temporary, ignore_errors=True)                # of a run that was killed
    try:
        temporary.mkdir()
        yield temporary
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        if out_dir.exists():
            out_dir.rmdir()                                     # Windows renames onto nothing only
        os.replace(temporary, out_dir)
    except OSError as error:                                    # say the name that was asked for
        error.filename = str(error.filename or out_dir).replace(str(temporary), str(out_dir))
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def summary(meta):
    """What was written, as lines of a table: by source, language and split, then by split."""
    rows = [(s["path"], f"{s['weight']:g}", *c.values())
            for s in meta["sources"] for c in s["counts"]]
    for split in "train", "val":
        sums = [sum(column) for column in zip(*(r[4:] for r in rows if r[3] == split))]
        rows.append(("total", "", "", split, *sums))
    width = max(len(r[0]) for r in rows)
    yield f"{'source':{width}}  weight  language  split  documents        MB        tokens  bytes/token"
    for path, weight, language, split, n, size, tokens in rows:
        yield (f"{path:{width}}  {weight:>6}  {language:8}  {split:5}  {n:9,}  {size / 1e6:8.2f}  "
               f"{tokens:12,}  {size / tokens:11.2f}")


def main(config):
    """Run prepare and report what it did."""
    start = time.perf_counter()
    meta = prepare(**vars(config))
    seconds = time.perf_counter() - start
    print(*summary(meta), sep="\n")
    size = sum(f["bytes"] for f in meta["files"]) / 1e6
    print(f"{len(meta['files'])} files in {config.out_dir}: {size:.2f} MB of text in {seconds:.1f} s "
          f"({size / seconds:.1f} MB/s)")


if __name__ == "__main__":
    run(lambda: main(parse_config(PrepareConfig)))
