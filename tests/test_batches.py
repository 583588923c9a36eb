"""Shards, the stateless sampler, packed rows and bits per byte, each against a slower or plainer telling."""

import json
import random

import numpy as np
import pytest
import torch

import batches
from batches import (Shards, bits_from_sums, bits_per_byte, check_tokenizer, data_step, document_sums,
                     first_fit, n_rows, packed_rows, perplexity_from_sums, rows_of_step, scoring_windows,
                     share)
from cli import UserError
from model import LanguageModel, ModelConfig
from tokenizer import Tokenizer

TOKENIZER = Tokenizer([])                                       # the bytes and the specials
EOT = TOKENIZER.eot_id
GOLDEN = [[3, 4, 1, 6, 7, 2, 0, 5], [4, 1, 0, 3, 7, 2, 6, 5]]


def write_shards(directory, files, split="val"):
    """Shards written plainly: files = [(language, [documents])]; returns all ids as one list."""
    stream, entries = [], []
    for number, (language, texts) in enumerate(files):
        ids = [EOT] + [i for text in texts for i in [*TOKENIZER.encode(text), EOT]]
        name = f"{split}_{number:05d}.npy"
        np.save(directory / name, np.array(ids, dtype=np.uint16))
        entries.append({"name": name, "split": split, "language": language, "tokens": len(ids),
                        "documents": len(texts), "bytes": sum(len(t.encode()) for t in texts)})
        stream += ids
    meta = {"vocab_size": TOKENIZER.vocab_size, "dtype": "uint16", "tokenizer_sha256": TOKENIZER.sha256,
            "files": entries}
    (directory / "meta.json").write_text(json.dumps(meta))
    return stream


def some_files(seed=0):
    """Three files of documents from 1 to 60 bytes and one long one."""
    rng = random.Random(seed)
    texts = ["".join(rng.choices("abcde ,.", k=rng.randint(1, 60))) for _ in range(30)]
    return [("en", texts[:12]), ("zh", ["从前有一只小猫。", "月亮出来了，小猫睡着了。"]), ("en", texts[12:] + ["xyz" * 60])]


# ---- shards

def test_shards_read_across_file_borders(tmp_path):
    stream = write_shards(tmp_path, some_files())
    shards = Shards(tmp_path, "val", max_seq_len=len(stream) - 1)
    assert shards.n_tokens == len(stream) and shards.languages == ["en", "zh"]
    for _ in range(200):
        start, stop = sorted(random.sample(range(len(stream) + 1), 2))
        assert shards.tokens(start, stop).tolist() == stream[start:stop]
    assert shards.tokens(0, 3).dtype == np.int64
    assert all(isinstance(a, np.memmap) for a in shards.arrays)


def test_documents_come_back(tmp_path):
    files = some_files()
    write_shards(tmp_path, files)
    documents = Shards(tmp_path, "val").documents()
    found = [(language, TOKENIZER.decode(ids.tolist())) for ids, language in documents]
    assert found == [(language, text) for language, texts in files for text in texts]


def change_meta(directory, change):
    meta = json.loads((directory / "meta.json").read_text())
    change(meta)
    (directory / "meta.json").write_text(json.dumps(meta))


def save(directory, array, name="val_00001.npy"):
    np.save(directory / name, array)


def length_of(directory):
    return json.loads((directory / "meta.json").read_text())["files"][1]["tokens"]


BAD_SHARDS = {
    "no meta.json": (lambda d: (d / "meta.json").unlink(), ["no meta.json", "data.prepare"]),
    "meta.json is not JSON": (lambda d: (d / "meta.json").write_text("{"), ["meta.json: not the meta.json"]),
    "meta.json is a list": (lambda d: (d / "meta.json").write_text("[]"), ["meta.json"]),
    "files is no list": (lambda d: change_meta(d, lambda m: m.update(files=3)), ["meta.json"]),
    "key missing": (lambda d: change_meta(d, lambda m: m.pop("tokenizer_sha256")), ["tokenizer_sha256 is"]),
    "file key missing": (lambda d: change_meta(d, lambda m: m["files"][2].pop("tokens")), ["files[].tokens"]),
    "dtype unknown": (lambda d: change_meta(d, lambda m: m.update(dtype="float32")), ["dtype float32"]),
    "dtype too small": (lambda d: change_meta(d, lambda m: m.update(vocab_size=70_000)), ["70000", "uint16"]),
    "split missing": (lambda d: change_meta(d, lambda m: m.update(files=[])), ["no files of split 'val'"]),
    "file missing": (lambda d: (d / "val_00001.npy").unlink(), ["val_00001.npy", "not there"]),
    "file empty": (lambda d: (d / "val_00001.npy").write_bytes(b""), ["val_00001.npy: not a readable .npy"]),
    "file is text": (lambda d: (d / "val_00001.npy").write_text("hello, here I am"), ["not a readable .npy"]),
    "file cut off": (lambda d: (d / "val_00001.npy").write_bytes((d / "val_00001.npy").read_bytes()[:-5]),
                     ["val_00001.npy: not a readable .npy"]),
    "other dtype": (lambda d: save(d, np.full(length_of(d), EOT, np.uint32)), ["uint32", "says 1-D uint16"]),
    "two dimensions": (lambda d: save(d, np.full((length_of(d), 1), EOT, np.uint16)), ["2-D"]),
    "other length": (lambda d: save(d, np.full(5, EOT, np.uint16)), ["val_00001.npy: 5 tokens, meta.json"]),
    "id too large": (lambda d: save(d, np.full(length_of(d), 999, np.uint16)), ["id 999 >= vocab_size 260"]),
    "no EOT": (lambda d: save(d, np.full(length_of(d), 9, np.uint16)), ["<|endoftext|>"]),
}


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_bad_shards_are_named(tmp_path, name):
    spoil, words = BAD_SHARDS[name]
    write_shards(tmp_path, some_files())
    Shards(tmp_path, "val")
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        Shards(tmp_path, "val")
    assert str(tmp_path) in str(error.value) and all(w in str(error.value) for w in words), str(error.value)


def test_too_short_and_not_there(tmp_path):
    stream = write_shards(tmp_path, some_files())
    with pytest.raises(UserError, match=f"at least {len(stream) + 1} tokens.*has {len(stream)}.*smaller"):
        Shards(tmp_path, "val", max_seq_len=len(stream))
    with pytest.raises(UserError, match="no such directory"):
        Shards(tmp_path / "nowhere", "val")


def test_tokenizer_must_fit(tmp_path):
    write_shards(tmp_path, some_files())
    shards = Shards(tmp_path, "val")
    check_tokenizer(shards, Tokenizer([]))
    with pytest.raises(UserError, match="vocab_size 260, not of .*, vocab_size 261; use .*tokenizer"):
        check_tokenizer(shards, Tokenizer([(0, 1)]))


# ---- the sampler

def pairs(epochs, rows):
    return list(zip(epochs.tolist(), rows.tolist()))


def test_each_row_once_an_epoch_and_the_same_on_any_ranks():
    n, b = 37, 12
    seen = []
    for step in range(3 * 37):                                  # 36 epochs, whole at the end
        epochs, rows = rows_of_step(5, step, n, b)
        for world_size in 1, 2, 4:
            parts = [(share(epochs, r, world_size), share(rows, r, world_size)) for r in range(world_size)]
            assert {len(rows) for _, rows in parts} == {b // world_size}
            assert [p for part in parts for p in pairs(*part)] == pairs(epochs, rows)
        seen += pairs(epochs, rows)
    assert sorted(seen) == [(e, r) for e in range(36) for r in range(n)]
    orders = [[r for e, r in seen if e == epoch] for epoch in range(36)]
    assert len({tuple(o) for o in orders}) == 36 and list(range(n)) not in orders


def test_a_step_depends_on_nothing_before_it():
    straight = [pairs(*rows_of_step(1, s, 11, 4)) for s in range(30)]
    batches.permutation.cache_clear()
    assert [pairs(*rows_of_step(1, s, 11, 4)) for s in reversed(range(30))] == straight[::-1]
    assert straight != [pairs(*rows_of_step(2, s, 11, 4)) for s in range(30)]


def test_the_order_stays_what_it_is():
    """Stored once: a change here would make resumed runs see other data than the run they continue."""
    assert batches.permutation(0, 0, 8).tolist() == GOLDEN[0]
    assert batches.permutation(-3, 7, 8).tolist() == GOLDEN[1]


def test_skipping_is_deleting_steps():
    rng = random.Random(0)
    for _ in range(100):
        skip = [tuple(sorted(rng.sample(range(40), 2))) for _ in range(rng.randint(0, 4))] + [(5, 5)]
        left = [d for d in range(200) if not any(a <= d <= b for a, b in skip)]
        assert [data_step(s, skip) for s in range(len(left))] == left
    skip = [(9, 12), (3, 4), (11, 15)]
    left = [d for d in range(60) if not any(a <= d <= b for a, b in skip)]
    for sizes in 4, [1, 2, 3, 5, 8] + [9] * 55:
        for step, d in enumerate(left):
            assert pairs(*rows_of_step(0, step, 23, sizes, skip)) == pairs(*rows_of_step(0, d, 23, sizes))


def test_batch_ramp_cuts_the_same_sequence():
    n, start, sizes = 10, 0, [1, 1, 2, 2, 4, 13, 8]
    endless = [p for s in range(60) for p in pairs(*rows_of_step(3, s, n, 1))]
    for step in range(10):
        size = sizes[min(step, 6)]                              # the last size holds on
        for given in sizes, np.array(sizes):
            assert pairs(*rows_of_step(3, step, n, given)) == endless[start:start + size]
        start += size


# ---- packed rows

def offset_by_eye(shards, ids, T, row):
    """The offset that explains a row, found by trying all."""
    ring = shards.tokens(0, shards.n_tokens).tolist() * 2
    return [o for o in range(T) if ring[o + row * T:o + row * T + T] == ids.tolist()]


def test_packed_rows_are_slices_of_a_ring(tmp_path):
    stream, T = write_shards(tmp_path, some_files()), 16
    shards, N = Shards(tmp_path, "val"), len(stream)
    offsets = set()
    for epoch in range(6):
        rows = np.random.permutation(n_rows(N, T))
        ids, targets, doc_ids = packed_rows(shards, np.full(len(rows), epoch), rows, T, seed=0)
        assert ids.dtype == targets.dtype == doc_ids.dtype == torch.int64 and ids.shape == (N // T, T)
        by_row = dict(zip(rows.tolist(), range(len(rows))))
        (o,) = set.intersection(*(set(offset_by_eye(shards, ids[by_row[r]], T, r)) for r in by_row))
        offsets.add(o)
        learnt = []
        for row, x, y, documents in zip(rows.tolist(), ids.tolist(), targets.tolist(), doc_ids.tolist()):
            places = [(o + row * T + t) % N for t in range(T + 1)]
            learnt += places[1:]
            assert x == [stream[p] for p in places[:-1]] and y == [stream[p] for p in places[1:]]
            assert documents == [x[:t + 1].count(EOT) for t in range(T)]
        assert len(set(learnt)) == len(learnt) == N - N % T     # each token once, fewer than T left out
    assert len(offsets) > 2


def test_packed_rows_of_mixed_epochs_and_shortest_stream(tmp_path):
    stream, T = write_shards(tmp_path, [("en", ["abcdefg"])]), 8
    shards = Shards(tmp_path, "val", max_seq_len=T)
    assert len(stream) == T + 1 and n_rows(len(stream), T) == 1
    one_by_one = [packed_rows(shards, [e], [0], T, seed=4) for e in range(20)]
    for together, single in zip(packed_rows(shards, range(20), [0] * 20, T, seed=4), zip(*one_by_one)):
        assert torch.equal(together, torch.cat(single))


def plain_first_fit(lengths, capacity):
    rows = []
    for item, length in enumerate(lengths):
        for row in rows:
            if sum(lengths[i] for i in row) + length <= capacity:
                row.append(item)
                break
        else:
            rows.append([item])
    return rows


def test_first_fit_is_first_fit():
    assert first_fit([5, 4, 3, 1], 8) == [[0, 2], [1, 3]]
    assert first_fit([], 8) == [] and first_fit([8], 8) == [[0]]
    rng = random.Random(0)
    for _ in range(300):
        capacity = rng.randint(1, 30)
        lengths = [rng.randint(1, capacity) for _ in range(rng.randint(1, 50))]
        assert first_fit(lengths, capacity) == plain_first_fit(lengths, capacity)


# ---- bits per byte

def test_windows_score_each_target_once_with_its_longest_context():
    assert list(scoring_windows(10, 4)) == [(0, 4, 0), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    for T in range(1, 12):
        for n in range(1, 40):
            windows = list(scoring_windows(n, T))
            starts = [k * max(1, T // 2) for k in range(n)]
            scored = {}
            for start, stop, first in windows:
                assert start in starts and stop == min(n, start + T)
                for t in range(first, stop):
                    assert t not in scored
                    scored[t] = t - start
            best = {t: max(t - s for s in starts if s <= t < s + T) for t in range(n)}
            assert scored == best


def small_model():
    torch.manual_seed(0)
    return LanguageModel(ModelConfig(vocab_size=TOKENIZER.vocab_size, d_model=16, n_layers=2, n_heads=2,
                                     n_kv_heads=1, d_ff=32, max_seq_len=32, dropout=0.5)).double()


def slow_sums(model, files, T):
    """(nats, bytes, tokens) by language, from the texts: one document, one target, one forward at a time."""
    sums = {}
    with torch.no_grad():
        for language, texts in files:
            for text in texts:
                stream = [EOT, *TOKENIZER.encode(text), EOT]
                nats, stride = 0.0, max(1, T // 2)
                for t in range(len(stream) - 1):
                    start = 0 if t < T else -(-(t - T + 1) // stride) * stride
                    logits = model(torch.tensor([stream[start:t + 1]]))[0, -1]
                    nats -= logits.log_softmax(-1)[stream[t + 1]].item()
                sums[language] = sums.get(language, 0) + np.array([nats, len(text.encode()), len(stream) - 1])
    return sums


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Shards, a model in training mode, and the sums by hand."""
    directory, model = tmp_path_factory.mktemp("shards"), small_model()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)                                           # far from uniform, so that context counts
    write_shards(directory, some_files())
    return Shards(directory, "val"), model.train(), slow_sums(model.eval(), some_files(), 32)


@pytest.mark.parametrize("batch_rows, pieces_at_once", [(1, 1024), (3, 5), (64, 1024)])
def test_bits_per_byte_is_the_sum_over_single_documents(scored, monkeypatch, batch_rows, pieces_at_once):
    shards, model, want = scored
    monkeypatch.setattr(batches, "PIECES_AT_ONCE", pieces_at_once)
    model.train()
    found = document_sums(model, shards, TOKENIZER, 32, batch_rows=batch_rows)
    assert model.training, "training mode is to be restored"
    for language in "en", "zh":
        np.testing.assert_allclose(found[language], want[language], rtol=1e-5)
    bits = bits_per_byte(model, shards, TOKENIZER, 32, batch_rows=batch_rows)
    assert bits["zh"] == pytest.approx(want["zh"][0] / want["zh"][1] / np.log(2), rel=1e-5)
    total = want["en"] + want["zh"]
    assert bits["all"] == pytest.approx(total[0] / total[1] / np.log(2), rel=1e-5)


class CountedModel(torch.nn.Module):
    """Writes down the shape of each call."""

    def __init__(self, model):
        super().__init__()
        self.model, self.shapes = model, []

    def forward(self, ids, doc_ids):
        self.shapes.append(tuple(ids.shape))
        return self.model(ids, doc_ids=doc_ids)


def test_ranks_add_up_and_make_equal_calls(scored):
    shards, model, want = scored
    for world_size in 2, 3:
        counted = [CountedModel(model) for _ in range(world_size)]
        parts = [document_sums(m, shards, TOKENIZER, 32, 4, rank=r, world_size=world_size)
                 for r, m in enumerate(counted)]
        sums = {language: sum(p[language] for p in parts) for language in parts[0]}
        assert all(list(p) == ["en", "zh"] for p in parts)
        for language in want:
            np.testing.assert_allclose(sums[language], want[language], rtol=1e-5)
        rows = list(batches.packed_pieces(batches.scoring_pieces(shards, 32, 0), 32))
        assert {len(m.shapes) for m in counted} == {-(-len(rows) // (4 * world_size))}
        assert {shape for m in counted for shape in m.shapes} == {(4, 32)}


def test_max_documents_spreads_over_the_split(scored):
    shards, model, _ = scored
    texts = [t for _, texts in some_files() for t in texts]
    for limit in 1, 4, 7, 33, 1000:
        every = next(k for k in range(1, 34) if len(texts[::k]) <= limit)
        n_bytes = sum(p[1] for p in document_sums(model, shards, TOKENIZER, 32, max_documents=limit).values())
        assert n_bytes == sum(len(t.encode()) for t in texts[::every])


def test_bits_from_sums():
    """8 bits a byte, as for a model that knows nothing of bytes: nats = n * ln 256."""
    bits = bits_from_sums({"en": np.array([3 * np.log(256), 3, 2]), "zh": np.array([0.0, 1, 1])})
    assert bits == pytest.approx({"all": 6.0, "en": 8.0, "zh": 0.0})
    perplexity = perplexity_from_sums({"en": np.array([2 * np.log(5), 9, 2]),
                                       "zh": np.array([np.log(7), 1, 1])})
    assert perplexity == pytest.approx({"all": 175 ** (1 / 3), "en": 5.0, "zh": 7.0})
