"""Files to documents to shards: every kind of file, the split, weights, memory, bad input."""

import gzip
import hashlib
import json
import os
import random
import resource
import subprocess
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from batches import Shards
from cli import UserError
from data.prepare import Document, Source, n_copies, parse_sources, prepare, split_by_hash, summary
from data.read import LOOK_AHEAD, documents, language_of
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared/data"
TOKENIZER = Tokenizer([])                                       # the bytes and the specials


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save(directory)
    return directory


def write(path, text):
    """Write a text or bytes, zipped where the name says so; returns the path."""
    data = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def txt(path, texts):
    return write(path, "\n<|endoftext|>\n".join(texts))


def english(n, seed=0, length=20):
    """n different short English texts."""
    rng = random.Random(seed)
    words = "one small cat saw the red moon and sang".split()
    return [f"{i} " + " ".join(rng.choices(words, k=length)) for i in range(n)]


def chinese(n):
    return [f"从前有一只小猫，它有{i}个朋友。\n它们每天都在河边唱歌。" for i in range(n)]


def written(out_dir, split):
    """(texts, language) of every document of a split, by reading the .npy files alone."""
    meta = json.loads((out_dir / "meta.json").read_text(encoding="utf-8"))
    found = []
    for file in meta["files"]:
        if file["split"] == split:
            ids = np.load(out_dir / file["name"]).tolist()
            assert ids[0] == ids[-1] == TOKENIZER.eot_id
            parts = TOKENIZER.decode(ids).split("<|endoftext|>")
            assert parts[0] == parts[-1] == ""
            found += [(text, file["language"]) for text in parts[1:-1]]
    return found


# ---- reading

def test_every_kind_of_file(tmp_path):
    texts = ["Once upon a time.\nThe end.", "从前有一座山，\n山里有一座庙。", 'She said "hi", twice.']
    records = "".join(json.dumps({"other": 1, "text": t}) + "\n" for t in texts)
    rows = [t.replace("\n", " ").split(" ", 1) for t in texts]
    rows = [r if len(r) == 2 else [r[0], "x"] for r in rows]
    quoted = "".join(f'"{a}","{b}"\r\n' for a, b in ((t.replace('"', '""'), "y") for t in texts))
    expected = {
        "a.txt": ("\n<|endoftext|>\n".join(texts) + "\n<|endoftext|>\n", texts),
        "b.jsonl": (records, texts),
        "c.tsv": ("".join("\t".join(r) + "\n" for r in rows), ["\n".join(r) for r in rows]),
        "d.csv": (quoted, [t + "\ny" for t in texts]),
    }
    for name, (content, want) in expected.items():
        for path in tmp_path / name, tmp_path / f"{name}.gz":
            sizes = []
            write(path, content)
            assert list(documents(path, on_read=sizes.append)) == want, path.name
            assert sum(sizes) == path.stat().st_size


def test_columns_and_keys(tmp_path):
    table = write(tmp_path / "t.tsv", "title\tauthor\tpoem\nMoon\tLi\tbright\n\nRiver\tDu\twide\n")
    assert list(documents(table, columns="3,1"))[1:] == ["bright\nMoon", "wide\nRiver"]
    assert list(documents(table, columns="poem, title")) == ["bright\nMoon", "wide\nRiver"]
    story = write(tmp_path / "s.jsonl", '{"prompt": "p", "fable": "f"}\n\n{"story": "s", "text": "t"}\n')
    assert list(documents(story)) == ["f", "t"]
    assert list(documents(story, text_key="prompt,story")) == ["p", "s"]
    book = write(tmp_path / "b.csv", '"' + "long " * 100_000 + '",x\n')
    assert len(next(documents(book, columns="1"))) == 499_999


def test_marks_line_ends_and_halves_of_characters(tmp_path):
    text = "\ufeffone\r\ntwo\r\n<|endoftext|>\r\n\r\n \ufeff three\rfour \n<|endoftext|>\n"
    assert list(documents(write(tmp_path / "a.txt", text))) == ["one\ntwo", "three\nfour"]
    escaped = write(tmp_path / "b.jsonl", '\ufeff{"text": "a\\r\\nb\\ufeff \\ud83d \\ud83d\\ude00"}\n')
    assert list(documents(escaped)) == ["a\nb \ufffd \U0001f600"]


def test_separator_may_be_another_line(tmp_path):
    path = write(tmp_path / "a.txt", "one\n***\n***\ntwo *** three\n")
    assert list(documents(path, separator="***")) == ["one", "two *** three"]


BOOKS = {
    "blank lines": "".join(f"Line {i} of a book.\n" + "\n" * (i % 7 == 0) for i in range(20_000)),
    "lines without blank ones": "".join(f"第{i}回　小猫看见了月亮。\n" for i in range(20_000)),
    "no line ends": "小猫看见了月亮，又看见了星星。" * 20_000,
}


@pytest.mark.parametrize("name", BOOKS)
def test_book_without_separators_is_cut(tmp_path, name):
    path = write(tmp_path / "book.txt", BOOKS[name])
    pieces = list(documents(path, strip=False))
    assert "".join(pieces) == BOOKS[name]
    sizes = [len(p.encode()) for p in pieces]
    assert min(sizes[:-1]) >= 20_000 and max(sizes) <= 70_000
    if name == "blank lines":
        assert all(p.endswith("\n\n") for p in pieces[:-1]) and max(sizes) < 20_300
    if name != "no line ends":
        assert all(p.endswith("\n") for p in pieces)
    assert list(documents(path)) == [p.strip() for p in pieces]


def test_separated_documents_are_never_cut(tmp_path):
    texts = ["short", "long line\n\n" * 10_000 + "end", "x" * 100_000]
    assert list(documents(txt(tmp_path / "a.txt", texts))) == texts
    late = txt(tmp_path / "b.txt", ["word\n" * (LOOK_AHEAD // 5 + 10), "after"])
    assert list(documents(late))[-1] == "after" and len(list(documents(late))) > 20


def test_languages():
    assert language_of("The cat sat on the mat, “purring” — it’s true!") == "en"
    assert language_of("Où êtes-vous né, là-bas ?") == "en"     # Latin letters, whatever they spell
    assert language_of("《红楼梦》第一回：“甄士隐梦幻识通灵”。") == "zh"
    assert language_of("小猫说：Hello！然后它走了。") == "zh"
    others = "", "123 !?", "Привет, мир", "ねこはそらをみています。", "안녕하세요"
    assert [language_of(t) for t in others] == ["other"] * 5


def test_real_files_are_read(tmp_path):
    if not REAL.is_dir():
        pytest.skip("no shared/data beside the project")
    assert len(list(documents(REAL / "tinystories.txt"))) == 2563
    assert len(list(documents(REAL / "fables.jsonl.gz"))) == 2997
    novels = list(documents(REAL / "classic_novels.zh.txt.gz"))
    assert {language_of(t) for t in novels} == {"zh"} and not any("\ufeff" in t for t in novels)
    with gzip.open(REAL / "classic_novels.zh.txt.gz", "rt", encoding="utf-8") as file:
        whole = file.read().replace("\ufeff", "")
    assert "".join(documents(REAL / "classic_novels.zh.txt.gz", strip=False)) == whole


# ---- writing

def test_round_trip(tmp_path):
    texts = english(300) + chinese(200) + ["a typed <|im_end|>", "Привет, мир"]
    out = tmp_path / "out"
    meta = prepare(txt(tmp_path / "a.txt", texts), TOKENIZER, out, val_fraction=0.1, shard_tokens=2000)
    train, val = written(out, "train"), written(out, "val")
    assert Counter(t for t, _ in train + val) == Counter(texts)
    assert all(language_of(text) == language for text, language in train + val)
    assert not {t for t, _ in train} & {t for t, _ in val} and 25 < len(val) < 80
    assert meta == json.loads((out / "meta.json").read_text(encoding="utf-8"))
    assert list(meta) == "vocab_size dtype tokenizer_sha256 files sources seed entropy_bound".split()
    assert {p.name for p in out.iterdir()} == {"meta.json", "tokenizer", *(f["name"] for f in meta["files"])}
    assert Tokenizer.load(out / "tokenizer").sha256 == meta["tokenizer_sha256"] == TOKENIZER.sha256
    for file in meta["files"]:
        assert list(file) == "name split language tokens bytes documents sha256".split()
        assert file["tokens"] == file["bytes"] + file["documents"] + 1 <= 2000      # as a token is a byte
    assert len(meta["files"]) > 10
    assert Shards(out, "train").languages == ["en", "other", "zh"]
    assert Shards(out, "val").languages == ["en", "zh"]
    totals = [line.split() for line in summary(meta)][-2:]
    assert [(t[1], int(t[2])) for t in totals] == [("train", len(train)), ("val", len(val))]


def test_shards_hold_their_checksum_and_dtype(tmp_path):
    large = Tokenizer([(i // 256, i % 256) for i in range(65_536)])
    for tokenizer, dtype in (TOKENIZER, "uint16"), (large, "uint32"):
        out = tmp_path / dtype
        meta = prepare(txt(tmp_path / "a.txt", english(50)), tokenizer, out)
        assert meta["dtype"] == dtype
        for file in meta["files"]:
            assert hashlib.sha256((out / file["name"]).read_bytes()).hexdigest() == file["sha256"]
            assert np.load(out / file["name"], mmap_mode="r").dtype == dtype


def test_split_does_not_move_when_files_are_added(tmp_path):
    a, b = txt(tmp_path / "a.txt", english(400, 1)), txt(tmp_path / "b.txt", english(300, 2) + chinese(100))
    moved = txt(tmp_path / "moved.txt", english(400, 1)[::-1])
    for name, input in ("one", a), ("both", f"{b},{a}:0.5"), ("moved", moved), ("seed", a):
        prepare(input, TOKENIZER, tmp_path / name, seed=int(name == "seed"))
    val = {name: {t for t, _ in written(tmp_path / name, "val")} for name in ("one", "both", "moved", "seed")}
    assert val["both"] & set(english(400, 1)) == val["one"] == val["moved"] and len(val["one"]) > 8
    assert val["seed"] != val["one"]


def test_tiny_inputs_have_validation_of_each_language(tmp_path):
    tiny = txt(tmp_path / "tiny.txt", english(15) + chinese(15))
    for seed in range(20):
        meta = prepare(tiny, TOKENIZER, tmp_path / str(seed), seed=seed)
        train, val = (written(tmp_path / str(seed), s) for s in ("train", "val"))
        assert {language for _, language in val} == {language for _, language in train} == {"en", "zh"}
        assert sorted(t for t, _ in train + val) == sorted(documents(tiny))
        assert meta["entropy_bound"] is None


def test_held_back_text_is_the_nearest_and_takes_its_copies_along():
    source = Source("a", 1.0)
    texts = english(30) * 2
    random.Random(0).shuffle(texts)
    split = list(split_by_hash((Document(source, "en", t) for t in texts), 1e-9, 0))
    assert Counter(d.text for _, d in split) == Counter(texts)
    val = [d.text for s, d in split if s == "val"]
    assert len(val) == 2 and len(set(val)) == 1
    more = list(split_by_hash((Document(source, "en", t) for t in texts), 0.3, 0))
    assert val[0] in {d.text for s, d in more if s == "val"}
    alone = list(split_by_hash([Document(source, "zh", "一")], 1e-9, 0))
    assert [s for s, _ in alone] == ["train"]


def test_weights_repeat_and_thin_training_only(tmp_path):
    a, b, c = (txt(tmp_path / f"{n}.txt", english(600, i)) for i, n in enumerate("abc"))
    prepare(f"{a}:2,{b}:0.3,{c}:1.5", TOKENIZER, tmp_path / "out", val_fraction=0.2)
    train = Counter(t for t, _ in written(tmp_path / "out", "train"))
    val = Counter(t for t, _ in written(tmp_path / "out", "val"))
    assert set(val.values()) == {1}
    for i, allowed, mean in (0, {2}, 2), (1, {0, 1}, 0.3), (2, {1, 2}, 1.5):
        copies = [train[t] for t in english(600, i) if t not in val]
        assert set(copies) == allowed and abs(np.mean(copies) - mean) < 0.08
    assert n_copies(Document(Source("x", 3.0), "en", "y"), 0) == 3


def test_val_tail_takes_the_end_byte_for_byte(tmp_path):
    book = BOOKS["lines without blank ones"] + "尾 \n"
    path = write(tmp_path / "book.txt", book)
    prepare(path, TOKENIZER, tmp_path / "out", val_tail=0.1)
    train, val = ("".join(t for t, _ in written(tmp_path / "out", s)) for s in ("train", "val"))
    data = book.encode()
    assert (train + val).encode() == data
    assert abs(len(val.encode()) - len(data) / 10) <= 3


def test_identical_runs_write_identical_files(tmp_path):
    input = txt(tmp_path / "a.txt", english(200) + chinese(50))
    metas = [prepare(f"{input}:1.5", TOKENIZER, tmp_path / name) for name in ("one", "two")]
    assert metas[0] == metas[1]


def grow(path, megabytes):
    """A file of so many MB of separated texts, written piece by piece."""
    block = "\n<|endoftext|>\n".join(english(2000, length=100)) + "\n<|endoftext|>\n"
    with open(path, "w", encoding="utf-8") as file:
        for i in range(int(megabytes * 1e6 / len(block))):
            file.write(block.replace("one small", f"one {i} small"))
    return path


@pytest.mark.parametrize("megabytes", [8, pytest.param(60, marks=pytest.mark.full)])
def test_memory_stays_bounded(tmp_path, megabytes):
    """Python's peak does not follow the input; shards of 200,000 tokens so that they do not either."""
    peaks = []
    for size in megabytes / 4, megabytes:
        path = grow(tmp_path / f"{size}.txt", size)
        tracemalloc.start()
        prepare(path, TOKENIZER, tmp_path / f"out{size}", shard_tokens=200_000)
        peaks.append(tracemalloc.get_traced_memory()[1] / 1e6)
        tracemalloc.stop()
    print(f"\npeak {peaks[0]:.1f} MB for {megabytes / 4} MB of text, {peaks[1]:.1f} MB for {megabytes} MB")
    assert peaks[1] < peaks[0] * 1.2 + 2


# ---- bad input

def make_inputs(d):
    """A directory of every mistake in a file that we know."""
    good = txt(d / "good.txt", english(100))
    write(d / "empty.txt", "")
    write(d / "blank.txt", " \n\n<|endoftext|>\n \n")
    write(d / "latin.txt", b"good line\n" * 300_000 + b"caf\xe9 au lait\n")
    write(d / "gb.txt.gz", "小猫看见了月亮。".encode("gb18030"))
    write(d / "half.txt", "小猫".encode()[:-1])
    write(d / "utf16.txt", "hello".encode("utf-16"))
    (d / "torn.txt.gz").write_bytes(gzip.compress("\n".join(english(5000)).encode())[:-100])
    zipped = gzip.compress("\n".join(english(5000)).encode())
    (d / "flipped.txt.gz").write_bytes(zipped[:10] + b"\xff" + zipped[11:])      # no such block
    (d / "sum.txt.gz").write_bytes(zipped[:-8] + b"12345678")
    write(d / "not.txt.gz", b"")
    (d / "plain.jsonl.gz").write_text('{"text": "x"}')
    write(d / "bad.jsonl", '{"text": "fine"}\n{"text": \n')
    write(d / "list.jsonl", "[1, 2]\n")
    write(d / "keys.jsonl", '{"text": "fine"}\n{"body": "x", "id": 3}\n')
    write(d / "number.jsonl", '{"text": 5}\n')
    write(d / "open.csv", 'a,"b\nc\n')
    write(d / "narrow.tsv", "a\tb\nc\n")
    write(d / "book.pdf", "x")
    write(d / "one.txt", "a single document")
    (d / "folder.txt").mkdir()
    return good


BAD_INPUT = [                                                   # input, options, words of the message
    ("nowhere.txt", {}, ["nowhere.txt", "no such file"]),
    ("folder.txt", {}, ["folder.txt"]),
    ("good.txt,", {}, ["no such file"]),
    ("good.txt,good.txt:2", {}, ["given twice"]),
    ("good.txt:0", {}, ["weight must be above 0"]),
    ("good.txt:-1", {}, ["weight must be above 0"]),
    ("good.txt:nan", {}, ["weight must be above 0"]),
    ("good.txt:1e9", {}, ["weight", "at most 1000"]),
    ("good.txt:half", {}, ["good.txt:half", "no such file"]),
    ("good.txt", {"val_fraction": 0.0}, ["--val_fraction 0.0"]),
    ("good.txt", {"val_tail": 1.0}, ["--val_tail 1.0"]),
    ("good.txt", {"shard_tokens": 0}, ["--shard_tokens 0"]),
    ("good.txt:0.001", {}, ["no documents for split train"]),
    ("one.txt", {}, ["no documents for split val"]),
    ("empty.txt", {}, ["empty.txt: no text"]),
    ("good.txt,blank.txt", {}, ["blank.txt: no text"]),
    ("not.txt.gz", {}, ["not.txt.gz: no text"]),
    ("latin.txt", {}, ["latin.txt: byte 3000003 (line 300001) is not UTF-8", "iconv"]),
    ("gb.txt.gz", {}, ["gb.txt.gz: byte 4 (line 1) is not UTF-8"]),
    ("half.txt", {}, ["half.txt", "ends inside a UTF-8 character"]),
    ("utf16.txt", {}, ["utf16.txt: byte 0"]),
    ("torn.txt.gz", {}, ["torn.txt.gz: damaged gzip"]),
    ("flipped.txt.gz", {}, ["flipped.txt.gz: damaged gzip"]),
    ("sum.txt.gz", {}, ["sum.txt.gz: damaged gzip"]),
    ("plain.jsonl.gz", {}, ["plain.jsonl.gz: damaged gzip"]),
    ("bad.jsonl", {}, ["bad.jsonl:2: not a JSON record"]),
    ("list.jsonl", {}, ["list.jsonl:1: no text", "list"]),
    ("keys.jsonl", {}, ["keys.jsonl:2: no text under text or fable", "body, id", "--text_key"]),
    ("number.jsonl", {}, ["number.jsonl:1: no text"]),
    ("open.csv", {}, ["open.csv:2: not CSV"]),
    ("narrow.tsv", {"columns": "1,2"}, ["narrow.tsv: row 2 has 1 columns"]),
    ("narrow.tsv", {"columns": "0"}, ["--columns 0"]),
    ("narrow.tsv", {"columns": "title"}, ["narrow.tsv: no column 'title'"]),
    ("book.pdf", {}, ["book.pdf: unknown kind", ".jsonl"]),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


@pytest.mark.parametrize("input, options, words", BAD_INPUT, ids=[f"{i}{o or ''}" for i, o, _ in BAD_INPUT])
def test_bad_input_is_named_and_leaves_nothing(inputs, tmp_path, monkeypatch, input, options, words):
    monkeypatch.chdir(inputs)
    with pytest.raises(UserError) as error:
        prepare(input, TOKENIZER, tmp_path / "deep/out", **options)
    assert all(w in str(error.value) for w in words), str(error.value)
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def command(*arguments, **more):
    return subprocess.run([sys.executable, "-m", "data.prepare", *map(str, arguments)], cwd=ROOT, timeout=120,
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, **more)


def refused(result, *words):
    """One line on stderr, exit status 2."""
    assert result.returncode == 2 and result.stdout == "" and "Traceback" not in result.stderr, result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert all(w in result.stderr for w in words), result.stderr


def test_command_line(inputs, tokenizer_dir, tmp_path):
    out = tmp_path / "new/out"
    good = "--input", txt(inputs / "good.txt", english(40))
    common = "--tokenizer", tokenizer_dir, "--out_dir", out
    refused(command(*common, "--input", inputs / "latin.txt"), "latin.txt", "line 300001")
    refused(command(*good, "--out_dir", out, "--tokenizer", tmp_path / "none"), "no tokenizer")
    refused(command(*common, "--sed", 3), "unknown flag --sed", "--seed")
    assert list(tmp_path.iterdir()) == []
    result = command(*common, *good)
    assert result.returncode == 0, result.stderr
    assert "bytes/token" in result.stdout and len(written(out, "train")) > 20
    before = sorted((p, p.stat().st_mtime_ns) for p in out.rglob("*"))
    refused(command(*common, *good), "--out_dir", "not an empty directory")
    assert sorted((p, p.stat().st_mtime_ns) for p in out.rglob("*")) == before
    (tmp_path / "file").write_text("x")
    refused(command(*good, "--tokenizer", tokenizer_dir, "--out_dir", tmp_path / "file/out"), "file")
    refused(command(*good, "--tokenizer", tmp_path / "file", "--out_dir", tmp_path / "x"), "no tokenizer")


def test_full_disk_leaves_nothing(inputs, tokenizer_dir, tmp_path):
    """A limit on the size of files stands in for a full disk."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))

    arguments = "--tokenizer", tokenizer_dir, "--out_dir", tmp_path / "out", "--input", inputs / "good.txt"
    refused(command(*arguments, preexec_fn=limit), "File too large")
    assert list(tmp_path.iterdir()) == []


def test_interrupt_leaves_nothing(tmp_path, monkeypatch):
    class Interrupted(Tokenizer):
        def encode_batch(self, texts):
            assert [p.name.startswith(".tmp-out") for p in tmp_path.iterdir() if p.is_dir()] == [True]
            raise KeyboardInterrupt

    path = txt(tmp_path / "a.txt", english(10))
    with pytest.raises(KeyboardInterrupt):
        prepare(path, Interrupted([]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == [path]


def test_empty_out_dir_is_used(tmp_path):
    (tmp_path / "out").mkdir()
    prepare(txt(tmp_path / "a.txt", english(20)), TOKENIZER, tmp_path / "out")
    assert (tmp_path / "out/meta.json").is_file()


def test_sources_are_parsed(tmp_path):
    a, b = write(tmp_path / "a.txt", "a"), write(tmp_path / "b:2.txt", "b")
    assert parse_sources(f"{a}, {b}") == [Source(str(a), 1.0), Source(str(b), 1.0)]
    assert parse_sources(f"{b}:0.5") == [Source(str(b), 0.5)]


def test_validation_files_and_the_bound(tmp_path):
    """With --val_input all of --input trains and all of --val_input validates; the bound is passed on."""
    train = txt(tmp_path / "train.txt", english(30) + chinese(5))
    val = txt(tmp_path / "val.txt", english(9, 5))
    bound = write(tmp_path / "bound.json", '{"en": 0.31, "zh": 0.29}')
    meta = prepare(train, TOKENIZER, tmp_path / "out", val_input=str(val), entropy_bound=str(bound))
    assert {t for t, _ in written(tmp_path / "out", "train")} == {*english(30), *chinese(5)}
    assert {t for t, _ in written(tmp_path / "out", "val")} == set(english(9, 5))
    assert meta["entropy_bound"] == {"en": 0.31, "zh": 0.29}
    assert [s["counts"][0]["split"] for s in meta["sources"]] == ["train", "val"]


@pytest.mark.parametrize("options, said", [
    (dict(val_input="gone.txt"), "--val_input gone.txt"),
    (dict(val_input="a.txt", val_tail=0.1), "exclude each other"),
    (dict(entropy_bound="a.txt"), "--entropy_bound a.txt")])
def test_bad_validation_files(tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "[1]")
    with pytest.raises(UserError, match=said):
        prepare("a.txt", TOKENIZER, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
