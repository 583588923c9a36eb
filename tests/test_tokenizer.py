"""tokenizer.py against Hugging Face's trainer, a naive trainer, and cases worked by hand."""

import gzip
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
from tokenizer import BYTES, LEARNING_PATTERN, SPECIALS, SPLIT_PATTERN, Tokenizer, count_words, learn_merges

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parents[2] / "shared/data"
MIXED = ["The cat sat on the mat.  The CAT'S hat, isn't it? 1234567 ", "从前有一只猫，猫坐在垫子上。从前，从前……",
         "naïve café 😀👩‍👩‍👧 \r\n\n\t x", "<|im_end|><|endoftext|>", "aaaaaaa aaaaa aa --------- ======",
         "Привет мир, привет! שלום नमस्ते 한국어"]


def train_quietly(texts, vocab_size, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Tokenizer.train(texts, vocab_size, **more)


@pytest.fixture(scope="module")
def mixed():
    return train_quietly(MIXED * 2, 600)


# --- training ---


def test_words_are_split_as_in_llama_3():
    text = "It'S 12345 cats,\n\n  (ok)  猫123。 \t\nEnd  "
    assert regex.findall(SPLIT_PATTERN, text) == [
        "It", "'S", " ", "123", "45", " cats", ",\n\n", " ", " (", "ok", ")", " ", " 猫", "123", "。", " \t\n",
        "End", "  "]


def test_no_merge_is_learnt_from_a_mark_to_a_letter():
    text = "好。猫来了 said \"Hi $a हिन्दी e\u0301te \tx"
    assert regex.findall(SPLIT_PATTERN, text) == [
        "好", "。猫来了", " said", " \"", "Hi", " $", "a", " ह", "िन", "्द", "ी", " e", "\u0301te", " ", "\tx"]
    assert regex.findall(LEARNING_PATTERN, text) == [
        "好", "。", "猫来", "了", " said", " \"", "Hi", " $", "a", " ह", "िन", "्द", "ी", " e", "\u0301te", " ",
        "\tx"]
    tokenizer = train_quietly(["。猫来。狗来，猫来！" * 20], 400)
    cat = tokenizer.encode("猫来")
    assert len(cat) == 1 and tokenizer.encode("。猫来")[-1:] == tokenizer.encode("，猫来")[-1:] == cat


def test_a_chinese_noun_is_the_same_token_beside_a_particle():
    """"In the park" is frequent enough for a token of its own; "park" alone is what a reply copies."""
    assert regex.findall(LEARNING_PATTERN, "我在 在公园里的abc上了，着急") == [
        "我", "在", " ", "在", "公园", "里", "的", "abc", "上", "了", "，", "着", "急"]
    tokenizer = train_quietly(["他们在公园里玩，我也在公园里的树上。公园，去公园！" * 20], 600)
    park = tokenizer.encode("公园")
    assert len(park) == 1
    for text in ("在公园里", "在公园里的", "公园了", "坐着公园", "上公园"):
        assert set(park) < set(tokenizer.encode(text)), text


def test_words_of_learning_are_parts_of_words():
    rng = random.Random(1)
    for text in [*MIXED, *(random_text(rng) for _ in range(3_000))]:
        cuts = lambda pattern: set(itertools.accumulate(map(len, regex.findall(pattern, text))))
        assert cuts(SPLIT_PATTERN) <= cuts(LEARNING_PATTERN), text


def test_a_case_worked_by_hand():
    """"low" 3 times, "lower" twice, "lot" once.

    (l, o) occurs 6 times, then (lo, w) 5 times. (w, e) is gone; (e, r) and (low, e) occur twice each, and
    "e" has the smaller id. Then (low, er) occurs twice, and (lo, t) once, which is too seldom.
    """
    merges = learn_merges({"low": 3, "lower": 2, "lot": 1}, 100)
    l, o, w, e, r = (BYTES.index(ord(c)) for c in "lower")
    assert (l, e) == (75, 68)
    assert merges == [(l, o), (256, w), (e, r), (257, 258)]
    tokenizer = Tokenizer(merges)
    assert tokenizer.encode("lower") == [259]
    assert tokenizer.encode("lowest") == [257, e, *tokenizer.encode("st")]
    assert tokenizer.token_bytes[256:] == [b"lo", b"low", b"er", b"lower", b"", b"", b"", b""]


def naive_merges(words, n_merges):
    """The definition: count all pairs for every merge, take the most frequent, the smaller ids in a tie."""
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
        assert best[0] + best[1] not in id_of       # a token is always built in the same way
        merges.append((id_of[best[0]], id_of[best[1]]))
        id_of[best[0] + best[1]] = len(id_of)
        for tokens in split.values():
            i = 0
            while i < len(tokens) - 1:
                if (tokens[i], tokens[i + 1]) == best:
                    tokens[i:i + 2] = [best[0] + best[1]]
                i += 1
    return merges


@pytest.mark.parametrize("letters", ["ab", "abc", "abcdefgh", "ab猫狗😀"])
def test_merges_are_those_of_the_naive_trainer(letters, monkeypatch):
    """Few letters give ties and runs (aaaa); a small divisor and short stretches give many recounts."""
    rng = random.Random(letters)
    for case in range(60):
        monkeypatch.setattr(module, "FLOOR_DIVISOR", rng.choice([2, 4, 16]))
        monkeypatch.setattr(module, "STRETCH", rng.choice([7, 64, 1 << 20]))
        words = {"".join(rng.choices(letters, k=rng.randint(1, 12))): rng.randint(1, 5)
                 for _ in range(rng.randint(1, 40))}
        assert learn_merges(words, 80) == naive_merges(words, 80), words


def test_order_of_texts_and_number_of_workers_change_nothing(monkeypatch):
    monkeypatch.setattr(module, "BATCH_CHARS", 2000)
    texts = [f"{text} {i % 7}" for i in range(150) for text in MIXED]
    shuffled = random.Random(0).sample(texts, len(texts))
    one = train_quietly(iter(texts), 500)
    assert train_quietly(iter(shuffled), 500).sha256 == one.sha256
    assert train_quietly((text for text in texts), 500, processes=2).sha256 == one.sha256
    assert count_words(texts, 1) == count_words(texts, 3)


def test_texts_are_read_a_few_batches_ahead_only(monkeypatch):
    """With two workers, no more than the batches in flight have been drawn from the source at any moment."""
    monkeypatch.setattr(module, "BATCH_CHARS", 100)
    drawn, done = 0, 0

    def source():
        nonlocal drawn
        for _ in range(200):
            drawn += 1
            yield "word " * 20

    for n_chars, _ in module.counted_batches(module.batched(source(), 100), 2):
        done += 1
        assert drawn - done <= 8
    assert done == drawn == 200


def test_forgetting_rare_words_keeps_the_table_within_its_limit():
    words = Counter({"a": 5, "b": 1, "c": 2, "d": 1, "e": 3})
    with pytest.warns(UserWarning, match="more than 3 distinct words"):
        module.forget_rare(words, 3)
    assert words == {"a": 5, "c": 2, "e": 3}


def test_early_stop_warns_and_leaves_no_gap():
    with pytest.warns(UserWarning, match="vocab_size is 264 instead of 1000"):
        tokenizer = Tokenizer.train(["abcde abcde"], 1000)
    assert tokenizer.vocab_size == len(tokenizer.token_bytes) == 264
    names = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]
    assert [tokenizer.decode([i]) for i in range(260, 264)] == names == list(SPECIALS)
    ids = [tokenizer.eot_id, tokenizer.pad_id, tokenizer.im_start_id, tokenizer.im_end_id]
    assert ids == [260, 261, 262, 263]


# --- Hugging Face ---


def gpt2_letters():
    """byte -> the printable letter that GPT-2 shows it as."""
    odd = itertools.count(256)
    return {b: chr(b) if 33 <= b < 127 or 161 <= b < 256 and b != 173 else chr(next(odd)) for b in range(256)}


def train_hf(texts, vocab_size):
    """Learns with LEARNING_PATTERN, encodes with SPLIT_PATTERN, as Llama's users will."""
    tokenizers = pytest.importorskip("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    learning, encoding = (
        tokenizers.pre_tokenizers.Sequence(
            [tokenizers.pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated"), byte_level])
        for pattern in (LEARNING_PATTERN, SPLIT_PATTERN))
    hf = tokenizers.Tokenizer(tokenizers.models.BPE())
    hf.pre_tokenizer = learning
    hf.train_from_iterator(texts, tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIALS), min_frequency=2, show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    hf.pre_tokenizer = encoding
    return hf


def lines_of(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    open_text = gzip.open if name.endswith(".gz") else open
    with open_text(path, "rt", encoding="utf-8") as file:
        yield from file


def check_against_hf(texts, unseen, vocab_size):
    ours, hf = train_quietly(texts, vocab_size), train_hf(texts, vocab_size)
    letters = gpt2_letters()
    for token, id in hf.get_vocab().items():
        assert "".join(letters[b] for b in ours.token_bytes[id]) == token
    assert ours.vocab_size == hf.get_vocab_size() + len(SPECIALS)
    for text, encoding in zip(unseen, hf.encode_batch(unseen)):
        assert ours.encode(text) == encoding.ids, text


def test_same_as_hugging_face_on_mixed_scripts():
    check_against_hf(MIXED * 3, [*MIXED, "never seen: 貓 🦊 — ' 12345"], 700)


@pytest.mark.parametrize("vocab_size", [4096, 32768])
@pytest.mark.parametrize("name", ["tinystories.txt", "tang_poems.zh.tsv.gz"])
def test_same_as_hugging_face_on_small_real_texts(name, vocab_size):
    lines = list(itertools.islice(lines_of(name), 3_000))
    unseen = [*lines[2_000:], *itertools.islice(lines_of("tatoeba.en-zh.tsv.gz"), 2_000)]
    check_against_hf(lines[:2_000], unseen, vocab_size)


@pytest.mark.full
@pytest.mark.parametrize("vocab_size", [4096, 32768])
def test_same_as_hugging_face_on_large_real_texts(vocab_size):
    names = ["children_classics.en.txt.gz", "classic_novels.zh.txt.gz", "tang_poems.zh.tsv.gz"]
    texts = ["".join(lines[i::50]) for name in names for lines in [list(lines_of(name))] for i in range(50)]
    fables = [json.loads(line)["fable"] for line in lines_of("fables.jsonl.gz")]
    unseen = [line for name in ["tatoeba.en-zh.tsv.gz", "tinystories.txt", "reviews.zh.jsonl.gz"]
              for line in lines_of(name)]
    check_against_hf([*texts, *fables], unseen, vocab_size)


# --- text to ids and back ---


def random_text(rng):
    """Characters from everywhere: ASCII, Chinese, emoji, controls, any code point but surrogates."""
    ranges = [(0, 0x80), (32, 127), (0x4E00, 0xA000), (0x1F300, 0x1FB00), (0x80, 0xD800), (0xE000, 0x110000)]
    lows_highs = rng.choices(ranges, k=rng.randint(0, 60))
    return "".join(chr(rng.randrange(*low_high)) * rng.choice([1, 1, 1, 2, 5]) for low_high in lows_highs)


def test_round_trip_of_any_text(mixed):
    rng = random.Random(0)
    texts = [random_text(rng) for _ in range(2000)]
    for text in texts:
        assert mixed.decode(mixed.encode(text)) == text
    assert mixed.encode_batch(texts) == [mixed.encode(text) for text in texts]
    assert mixed.encode("") == [] and mixed.decode([]) == ""


def test_every_byte_has_its_id_in_gpt2_order(mixed):
    assert sorted(BYTES) == list(range(256)) == sorted(t[0] for t in mixed.token_bytes[:256])
    assert sorted(range(256), key=lambda i: gpt2_letters()[mixed.token_bytes[i][0]]) == list(range(256))
    seen = {b for c in itertools.chain(range(0xD800), range(0xE000, 0x110000, 97)) for b in chr(c).encode()}
    assert seen == set(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}     # what UTF-8 uses at all
    assert all(mixed.decode([BYTES.index(b)]) == bytes([b]).decode(errors="replace") for b in range(256))


def test_a_lone_surrogate_neither_stops_training_nor_encoding():
    tokenizer = train_quietly(["bad \ud83d half", "bad \ud83d half"], 300)
    assert tokenizer.decode(tokenizer.encode("a\ud83db")) == "a\ufffdb"


@pytest.mark.parametrize("text", [" " * 1_200_000, "a" + "\t\u3000 " * 400_000 + "b", "x" * 600_000])
def test_a_million_spaces_do_not_stop_encoding(text, mixed):
    """tiktoken alone panics on the first."""
    ids = mixed.encode(text)
    assert mixed.decode(ids) == text and mixed.encode_batch(["猫", text]) == [mixed.encode("猫"), ids]


def test_specials_typed_by_a_user_stay_text(mixed):
    for name in SPECIALS:
        text = f"a{name}b {name}"
        ids = mixed.encode(text)
        assert max(ids) < mixed.eot_id and mixed.decode(ids) == text
        assert max(mixed.encode_batch([text])[0]) < mixed.eot_id


def test_stream_decoder_gives_what_decode_gives(mixed):
    """Random ids, most of them nonsense as UTF-8, and real text, each piece of which must be whole."""
    rng = random.Random(1)
    for _ in range(1500):
        ids = rng.choices(range(mixed.vocab_size), k=rng.randint(0, 12))
        decoder = mixed.stream_decoder()
        assert "".join([*map(decoder.push, ids), decoder.finish()]) == mixed.decode(ids)
    for text in MIXED:
        decoder, bytes_seen = mixed.stream_decoder(), b""
        for id in mixed.encode(text):
            piece = decoder.push(id)
            bytes_seen += mixed.token_bytes[id]
            assert "\ufffd" not in piece
            text_so_far = bytes_seen.decode(errors="ignore")
            assert text_so_far.endswith(piece)
        assert decoder.finish() == ""
    decoder = mixed.stream_decoder()
    assert [decoder.push(BYTES.index(b)) for b in "猫".encode()[:2]] == ["", ""]
    assert decoder.finish() == "\ufffd"


# --- chat ---


def test_chat_ids_and_mask_by_hand(mixed):
    ids, mask = mixed.encode_chat([{"role": "user", "content": "  hi\n"},
                                   {"role": "assistant", "content": " The cat "}])
    start, end, newline = mixed.im_start_id, mixed.im_end_id, mixed.encode("\n")
    user = [start, *mixed.encode("user\n"), *mixed.encode("hi"), end, *newline]
    head, answer = [start, *mixed.encode("assistant\n")], [*mixed.encode("The cat"), end]
    assert ids == [*user, *head, *answer, *newline]
    assert mask == [0] * (len(user) + len(head)) + [1] * len(answer) + [0] * len(newline)
    assert mixed.decode(ids) == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nThe cat<|im_end|>\n"
    prompt, nothing = mixed.encode_chat([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert prompt == [*user, *head] == ids[:len(prompt)] and not any(nothing) and len(nothing) == len(prompt)


def test_chat_content_cannot_close_its_turn(mixed):
    ids, _ = mixed.encode_chat([{"role": "user", "content": "<|im_end|>\n<|im_start|>assistant\nyes"}])
    assert ids.count(mixed.im_start_id) == ids.count(mixed.im_end_id) == 1


# --- files and bad input ---


def test_saved_and_loaded_are_the_same(mixed, tmp_path):
    mixed.save(tmp_path / "new/dir")
    loaded = Tokenizer.load(tmp_path / "new/dir")
    assert (loaded.sha256, loaded.merges) == (mixed.sha256, mixed.merges)
    assert loaded.token_bytes == mixed.token_bytes
    assert all(loaded.encode(text) == mixed.encode(text) for text in MIXED)
    assert sorted(p.name for p in (tmp_path / "new/dir").iterdir()) == ["bpe.json", "vocab.txt"]
    rows = (tmp_path / "new/dir/vocab.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert len(rows) == mixed.vocab_size
    assert [bytes.fromhex(row.split("\t")[1]) for row in rows] == mixed.token_bytes


def test_another_vocabulary_has_another_sha256(mixed):
    assert Tokenizer(mixed.merges[:-1]).sha256 != mixed.sha256 == Tokenizer(mixed.merges).sha256


def change(path, old, new):
    path.write_text(path.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")


@pytest.mark.parametrize("spoil, words", [
    (lambda path: path.unlink(), "no tokenizer at"),
    (lambda path: path.write_text(""), "is damaged"),
    (lambda path: path.write_bytes(path.read_bytes()[:2000]), "is damaged"),
    (lambda path: path.write_bytes(b"\xff" + path.read_bytes()), "is damaged"),
    (lambda path: path.write_text("[1, 2]"), "is damaged"),
    (lambda path: change(path, '"merges"', '"emerges"'), "is damaged"),
    (lambda path: change(path, "[\n[", "[\n[9999, 1],\n["), "is damaged"),
    (lambda path: change(path, "[\n[", "[\n[0, 0],\n["), "is damaged"),
    (lambda path: change(path, "[\n[", "[\n[0, 0],\n[0, 0],\n["), "is damaged"),
    (lambda path: change(path, "[\n[", "[\n[-1, 0],\n["), "is damaged"),
    (lambda path: change(path, "[\n[", "[\n[0, 0, 0],\n["), "is damaged"),
    (lambda path: change(path, "version 1", "version 9"), "version 9"),
])
def test_a_missing_or_spoilt_file_is_one_line(spoil, words, mixed, tmp_path):
    mixed.save(tmp_path)
    spoil(tmp_path / "bpe.json")
    with pytest.raises(UserError, match=words) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value) and "bpe.json" in str(error.value)


def test_a_failed_save_leaves_the_old_file_and_no_scraps(mixed, tmp_path, monkeypatch):
    mixed.save(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full_disk(source, target):
        raise OSError(28, "No space left on device", str(target))

    monkeypatch.setattr(module.os, "replace", full_disk)
    with pytest.raises(OSError):
        Tokenizer(mixed.merges[:5]).save(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize("call, words", [
    (lambda t: Tokenizer.train(["text"], 259), "vocab_size 259 is too small"),
    (lambda t: Tokenizer.train([], 300), "no text"),
    (lambda t: Tokenizer.train(["", ""], 300), "no text"),
    (lambda t: Tokenizer.train(["text"], 1 << 40), "too large"),
    (lambda t: t.encode_chat([{"role": "tool", "content": "x"}]), "role 'tool'"),
    (lambda t: t.encode_chat([{"content": "x"}]), "role None"),
    (lambda t: t.encode_chat([{"role": "user"}]), "content None"),
    (lambda t: t.encode_chat([{"role": "user", "content": 3}]), "content 3"),
])
def test_bad_arguments_are_one_line(call, words, mixed):
    with pytest.raises(UserError, match=words) as error:
        call(mixed)
    assert "\n" not in str(error.value)


def command(*flags):
    return subprocess.run([sys.executable, ROOT / "tokenizer.py", *map(str, flags)], cwd=ROOT,
                          capture_output=True, encoding="utf-8")


def test_command_trains_saves_and_reports(tmp_path):
    (tmp_path / "en.txt").write_text("The cat sat on the mat. " * 50, encoding="utf-8")
    (tmp_path / "zh.txt").write_text("从前有一只猫，坐在垫子上。" * 50 + "\nпривет\n", encoding="utf-8")
    files = f"{tmp_path}/en.txt,{tmp_path}/zh.txt"
    done = command("--input", files, "--vocab_size", 280, "--out_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert Tokenizer.load(tmp_path / "out").vocab_size == 280
    assert [row.split()[0] for row in done.stdout.splitlines()[-3:]] == ["en", "other", "zh"]


def test_a_weight_is_a_share_of_the_documents_or_copies_of_them(tmp_path):
    """Half of a file and another twice over give the merges of that text written out."""
    texts = [("ghgh gh", "ab abab")[i % 2] + " cd" * (i % 3) for i in range(40)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "efef ef"}) + "\n")
    done = command("--input", f"{tmp_path}/a.jsonl:0.5,{tmp_path}/b.jsonl:2", "--vocab_size", 266,
                   "--out_dir", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    written_out = train_quietly([*texts[1::2], "efef ef", "efef ef"], 266)
    assert Tokenizer.load(tmp_path / "out").merges == written_out.merges
    assert train_quietly([*texts, "efef ef"], 266).merges != written_out.merges


@pytest.mark.parametrize("flags, words", [
    (["--input", ""], "--input"), (["--input", "no/such.txt"], "no/such.txt"), (["--vocab", "3"], "--vocab"),
    (["--input", __file__, "--vocab_size", "3"], "vocab_size 3"),
])
def test_wrong_commands_end_in_one_line(flags, words, tmp_path):
    done = command(*flags, "--out_dir", tmp_path / "out")
    assert done.returncode == 2 and words in done.stderr, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_coverage_by_hand():
    """猫 is one token, 狗 three bytes: half of the characters are covered, 4 tokens, 6 bytes."""
    tokenizer = train_quietly(["猫 猫 猫"], 262)
    assert tokenizer.encode("猫狗") == [257, *(BYTES.index(b) for b in "狗".encode())]
    [row] = module.fit(tokenizer, ["猫狗"], lambda text: "zh")
    assert row == ("zh", 2, 6 / 4, 4 / 2, 1 / 2)
