"""Byte-level BPE (Sennrich et al. 2016; bytes as in GPT-2): trained here by hand, applied by tiktoken.

Text is split by Llama 3's pattern into words, and inside words the most frequent pair of tokens is merged,
again and again; learning keeps marks, letters and Chinese particles apart besides. Ids: 0-255 the bytes in
GPT-2's order, the merges as they were learnt, the four specials. The trainer's trick is to do many merges at
once in numpy, with the same result: see `learn_merges`. Special tokens are never recognised in text; they
come from `encode_chat` and from whoever packs documents.
"""

import codecs
import hashlib
import heapq
import itertools
import json
import os
import warnings
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import regex
import tiktoken

from cli import UserError, option, parse_config, progress_bar, run, write_text

SPLIT_PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                 r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# Learnt apart, so that what a small model copies is the same token wherever it stands (LOG.md): a mark and
# the letter behind it (a name at the start, after a quotation mark, inside), and, as Chinese has no spaces,
# the particles that stand before and after its nouns. The words are parts of SPLIT_PATTERN's.
PARTICLES = "的了着在里上"
LEARNING_PATTERN = SPLIT_PATTERN.replace(
    r"[^\r\n\p{L}\p{N}]?\p{L}+",
    rf"[{PARTICLES}]|[^\r\n\p{{L}}\p{{N}}\p{{P}}\p{{S}}]?[^\P{{L}}{PARTICLES}]+")
SPECIALS = ("<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>")
ROLES = ("system", "user", "assistant")
FILE, FORMAT = "bpe.json", "sprout byte-level BPE, version 1"

PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]   # GPT-2 shows these as they are, and first
BYTES = PRINTABLE + [b for b in range(256) if b not in PRINTABLE]   # id -> byte
MAX_SPACES = 500_000            # tiktoken's regex engine gives up on a million white spaces in a row
BATCH_CHARS = 1_000_000         # characters that a counting worker gets at once
MAX_WORDS = 5_000_000           # distinct words held before rare ones are forgotten; about 5 GB in all
STRETCH = 1 << 20               # bytes of the corpus looked through at once
FLOOR_DIVISOR = 16              # how far below the top the heap reaches before all pairs are counted again
EDGE = np.iinfo(np.int32).min   # stands between words, where other places hold ids


class Tokenizer:
    """A vocabulary with its merges; `token_bytes[id]` are the bytes of a token, b"" for specials."""

    def __init__(self, merges):
        """merges: one (left id, right id) for each token from 256 on, as `learn_merges` gives them."""
        self.merges = [(int(left), int(right)) for left, right in merges]
        tokens = [bytes([b]) for b in BYTES]
        for left, right in self.merges:
            tokens.append(tokens[left] + tokens[right])
        specials = {name: len(tokens) + i for i, name in enumerate(SPECIALS)}
        self.eot_id, self.pad_id, self.im_start_id, self.im_end_id = specials.values()
        self.token_bytes = tokens + [b""] * len(SPECIALS)
        self.vocab_size = len(self.token_bytes)
        self.encoding = tiktoken.Encoding("sprout", pat_str=SPLIT_PATTERN, special_tokens=specials,
                                          mergeable_ranks={token: i for i, token in enumerate(tokens)})
        content = json.dumps([FORMAT, SPLIT_PATTERN, SPECIALS, self.merges])
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()

    @classmethod
    def train(cls, texts, vocab_size, processes=1, progress=False):
        """Learn a vocabulary from any iterable of str, read once and never held whole.

        vocab_size counts bytes and specials too; it comes out smaller, with a warning, where no pair occurs
        twice any more. processes: workers that count words, by spawn, so that a script needs its `__main__`
        guard.
        """
        smallest = len(BYTES) + len(SPECIALS)
        if vocab_size < smallest:
            raise UserError(f"vocab_size {vocab_size} is too small; bytes and specials alone are {smallest}")
        words = count_words(texts, processes, progress)
        if not words:
            raise UserError("no text to train a tokenizer on; give at least one file that is not empty")
        tokenizer = cls(learn_merges(words, vocab_size - smallest, progress))
        if tokenizer.vocab_size < vocab_size:
            warnings.warn(f"no pair occurs twice any more: vocab_size is {tokenizer.vocab_size} instead of "
                          f"{vocab_size}; more text would give more tokens", stacklevel=2)
        return tokenizer

    def encode(self, text):
        """Ids of a text, all of it ordinary: a typed "<|im_end|>" is ten characters like any others."""
        if len(text) <= MAX_SPACES:
            return self.encoding.encode_ordinary(text)
        runs = regex.finditer(r"\s{2,}", text)
        cuts = [i for run in runs for i in range(run.start() + MAX_SPACES, run.end(), MAX_SPACES)]
        pieces = (text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)]))
        return [id for piece in pieces for id in self.encoding.encode_ordinary(piece)]

    def encode_batch(self, texts):
        """`encode` of each of many texts, a slice of them on each core: tiktoken works outside the GIL."""
        n = os.cpu_count() or 1
        slices = [texts[len(texts) * i // n:len(texts) * (i + 1) // n] for i in range(n)]
        with ThreadPoolExecutor(n) as pool:
            return [ids for part in pool.map(lambda part: [self.encode(text) for text in part], slices)
                    for ids in part]

    def decode(self, ids):
        """Text of ids; specials as they are written, bytes that are not UTF-8 as U+FFFD."""
        return self.encoding.decode(ids, errors="replace")

    def stream_decoder(self):
        """A decoder for ids that come one at a time; its pieces joined are `decode` of them all."""
        return StreamDecoder(self.encoding)

    def encode_chat(self, messages, add_generation_prompt=False):
        """Ids and loss mask (1 = learn) of a conversation: "<|im_start|>role\\ncontent<|im_end|>\\n" a turn.

        messages: [{"role": system | user | assistant, "content": str}, ...]. Content is stripped and encoded
        apart from the frame. Learnt are the assistant's content and its <|im_end|>. The generation prompt
        opens a reply.
        """
        ids, loss_mask = [], []

        def add(new_ids, learn=False):
            ids.extend(new_ids)
            loss_mask.extend([int(learn)] * len(new_ids))

        for message in messages:
            role, content = message.get("role"), message.get("content")
            if role not in ROLES:
                raise UserError(f"message has role {role!r}; use one of {', '.join(ROLES)}")
            if not isinstance(content, str):
                raise UserError(f"message of {role} has content {content!r}; give it a text")
            add([self.im_start_id, *self.encode(role + "\n")])
            add([*self.encode(content.strip()), self.im_end_id], learn=role == "assistant")
            add(self.encode("\n"))
        if add_generation_prompt:
            add([self.im_start_id, *self.encode("assistant\n")])
        return ids, loss_mask

    def save(self, dir):
        """Write bpe.json, which `load` reads, and vocab.txt, which is for looking only.

        vocab.txt cannot be loaded: it shows tokens, not which two each was merged from, pattern or checksum.
        """
        dir = Path(dir)
        dir.mkdir(parents=True, exist_ok=True)
        head = {"format": FORMAT, "split_pattern": SPLIT_PATTERN, "specials": SPECIALS, "sha256": self.sha256}
        lines = [f'"{key}": {json.dumps(value)}' for key, value in head.items()]
        merges = ",\n".join(f"[{left}, {right}]" for left, right in self.merges)
        write_text(dir / FILE, "{" + ",\n".join([*lines, f'"merges": [\n{merges}\n]']) + "}\n")
        rows = (f"{i}\t{token.hex(' ')}\t{self.decode([i])!r}\n" for i, token in enumerate(self.token_bytes))
        write_text(dir / "vocab.txt", "id\tbytes (none: special)\ttext\n" + "".join(rows))

    @classmethod
    def load(cls, dir):
        """Read what `save` wrote; UserError where it is missing, torn, altered or of another kind."""
        path = Path(dir) / FILE
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            format, sha256, tokenizer = stored["format"], stored["sha256"], cls(stored["merges"])
        except OSError as error:
            raise UserError(f"no tokenizer at {path} ({error.strerror}); train one with tokenizer.py")
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); copy or train it again")
        if (format, sha256) != (FORMAT, tokenizer.sha256):
            raise UserError(f"{path} is damaged or of another kind: {format!r}, sha256 {sha256!r}, expected "
                            f"{FORMAT!r}, {tokenizer.sha256!r}; copy or train it again")
        return tokenizer


class StreamDecoder:
    """Turns ids into text piece by piece, holding back the bytes of a character until it is whole."""

    def __init__(self, encoding):
        self.encoding = encoding
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, id):
        """The text that this id completes; "" in the middle of a character."""
        return self.decoder.decode(self.encoding.decode_single_token_bytes(id))

    def finish(self):
        """What was held back: U+FFFD for a character that never became whole, else ""."""
        return self.decoder.decode(b"", final=True)


# ---- training, first half: words and how often each occurs

def count_words(texts, processes=1, progress=False):
    """Counter of the words of all texts, which are read once, a few batches in flight at a time."""
    words = Counter()
    with progress_bar(desc="counting words", unit="char", unit_scale=True, disable=not progress) as bar:
        for n_chars, counted in counted_batches(batched(texts, BATCH_CHARS), processes):
            words.update(counted)
            bar.update(n_chars)
            forget_rare(words, MAX_WORDS)
    return words


def counted_batches(batches, processes):
    """Yield `count_batch` of each batch in order; by workers where the batches pay for starting them."""
    head = list(itertools.islice(batches, 4))
    batches = itertools.chain(head, batches)
    if processes == 1 or len(head) < 4:
        yield from map(count_batch, batches)
        return
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        waiting = deque()
        for batch in batches:
            waiting.append(pool.submit(count_batch, batch))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def batched(texts, n_chars):
    """Yield lists of texts of about n_chars characters in all."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= n_chars:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def count_batch(texts):
    """Number of characters and Counter of the words of a few texts."""
    words = Counter()
    for text in texts:
        words.update(regex.findall(LEARNING_PATTERN, text))
    return sum(map(len, texts)), words


def forget_rare(words, limit):
    """Keep a Counter within limit: drop words seen once, then twice (lossy counting, Manku 2002)."""
    for rare in itertools.count(1):
        if len(words) <= limit:
            return
        for word in [word for word, count in words.items() if count <= rare]:
            del words[word]
        warnings.warn(f"more than {limit:,} distinct words: those seen {rare} times so far were forgotten")


# ---- training, second half: merges

def learn_merges(words, n_merges, progress=False):
    """The first n_merges merges of BPE as [(left id, right id)]; fewer when no pair occurs twice any more.

    By definition one pair after the other, the most frequent first, is merged everywhere, ties going to the
    smaller (left, right). Here the next few are merged together, which changes nothing as long as none of
    them, (c, d), follows an (a, b) with c = b or d = a. Only then could merging (a, b) take occurrences from
    (c, d). And no pair that arises overtakes (c, d): (x, ab) occurs no more often than (x, a), which comes
    later itself, and loses ties, for its new id is the largest. (a, a) ends its batch all the same: out of
    "aaaa" it makes (aa, aa) at once.
    """
    corpus = Corpus(words, n_merges)
    with progress_bar(total=n_merges, desc="merging", unit="merge", disable=not progress) as bar:
        while batch := corpus.next_batch():
            corpus.merge(batch)
            bar.update(len(batch))
    return corpus.merges


class Corpus:
    """All distinct words in one flat array, the merges so far, and a heap of frequent pairs with places.

    ids[p] is the id of the token that starts at byte p and ~id at the last byte of a longer one; the rest of
    its bytes are negative, and EDGE stands between words. So the token after the one at p starts at
    p + length[ids[p]], and the one before it ends at p - 1.
    """

    def __init__(self, words, n_merges):
        encoded = [word.encode(errors="replace") for word in words]     # a lone surrogate becomes "?"
        blob = b"\xff".join([b"", *encoded, b""])                       # 0xFF never occurs in UTF-8
        self.max_tokens, self.place_bits = len(BYTES) + n_merges, len(blob).bit_length()
        if 2 * self.max_tokens.bit_length() + self.place_bits > 63:
            raise UserError(f"a vocabulary of {self.max_tokens:,} is too large for {len(blob):,} bytes of "
                            "distinct words; lower vocab_size or give less text")
        raw = np.frombuffer(blob, np.uint8)
        id_of_byte = np.argsort(BYTES).astype(np.int32)
        id_of_byte[0xFF] = EDGE
        self.ids = id_of_byte[raw]                                      # (len(blob),)
        word_sizes = np.diff(np.flatnonzero(raw == 0xFF))
        self.counts = np.repeat(list(words.values()), word_sizes)       # how often the word at a place occurs
        self.length = np.ones(self.max_tokens, np.int64)                # bytes of each token
        self.merges = []
        self.heap = []          # (-count, left, right, places), all as when pushed: merges take places away
        self.floor = 2          # pairs with lower counts are not on the heap

    def next_batch(self):
        """Take the next pairs that can be merged together: [(left, right, places)], [] when none is left."""
        batch, lefts, rights = [], set(), set()
        pair = self.pop()
        if pair is None:
            self.find_frequent_pairs()
            pair = self.pop()
        while pair and len(BYTES) + len(self.merges) + len(batch) < self.max_tokens:
            _, left, right, places = pair
            if left in rights or right in lefts:
                heapq.heappush(self.heap, pair)
                break
            batch.append((left, right, places))
            lefts.add(left)
            rights.add(right)
            pair = self.pop() if left != right else None
        return batch

    def pop(self):
        """Take the most frequent pair off the heap, counted afresh: (-count, left, right, places) or None."""
        while self.heap:
            bound, left, right, places = heapq.heappop(self.heap)
            places = places[self.ids[places] == left]
            places = places[self.ids[places + self.length[left]] == right]
            pair = (-int(self.counts[places].sum()), left, right, places)
            if pair[0] == bound:
                return pair
            if -pair[0] >= self.floor:
                heapq.heappush(self.heap, pair)

    def merge(self, batch):
        """Merge a batch of pairs everywhere, and put the frequent ones of those that arise on the heap."""
        lefts, rights, places = map(list, zip(*batch))
        if lefts[-1] == rights[-1]:
            places[-1] = every_other(np.sort(places[-1]), self.length[lefts[-1]])
        first_new = len(BYTES) + len(self.merges)
        new_ids = np.arange(first_new, first_new + len(batch))
        self.merges += zip(lefts, rights)
        self.length[new_ids] = self.length[lefts] + self.length[rights]

        sizes = [len(p) for p in places]
        places, new = np.concatenate(places), np.repeat(new_ids, sizes)
        seam, end = places + np.repeat(self.length[lefts], sizes), places + self.length[new]
        self.ids[seam] = EDGE
        self.ids[end - 1] = ~new
        self.ids[places] = new

        before, behind = self.ids[places - 1], self.ids[end]
        before = np.maximum(before, ~before).astype(np.int64)       # ~EDGE is the largest int32
        has_left, has_right = before < first_new, behind >= 0       # two new in a row: seen by the left one
        before = before[has_left]
        self.push(np.concatenate([self.packed(before, new[has_left], places[has_left] - self.length[before]),
                                  self.packed(new[has_right], behind[has_right], places[has_right])]))

    def packed(self, left, right, places):
        """Pair and place of each occurrence in one int64, which sorts faster than an argsort."""
        return (left * self.max_tokens + right) << self.place_bits | places

    def push(self, packed, new_floor=False):
        """Put those pairs on the heap that reach the floor; new_floor: set it by the top count first."""
        if not len(packed):
            return
        packed.sort()
        keys = packed >> self.place_bits
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        keys, ends = keys[starts], np.append(starts[1:], len(keys))
        places = np.bitwise_and(packed, (1 << self.place_bits) - 1, out=packed)
        counts = np.add.reduceat(self.counts[places], starts)
        if new_floor:
            self.floor = max(2, counts.max() // FLOOR_DIVISOR)
        kept = counts >= self.floor
        for key, count, start, end in zip(*(x[kept].tolist() for x in (keys, counts, starts, ends))):
            heapq.heappush(self.heap, (-count, *divmod(key, self.max_tokens), places[start:end].copy()))

    def find_frequent_pairs(self):
        """Count all pairs as they stand, and fill the empty heap down to the top count / FLOOR_DIVISOR."""
        packed = []
        for start in range(0, len(self.ids), STRETCH):
            places = start + np.flatnonzero(self.ids[start:start + STRETCH] >= 0)
            left = self.ids[places].astype(np.int64)
            right = self.ids[places + self.length[left]]
            packed.append(self.packed(left, right, places)[right >= 0])
        self.push(np.concatenate(packed), new_floor=True)


def every_other(places, step):
    """Of the sorted places of a pair (a, a), those to merge: in a run, `step` apart, the 1st, 3rd, 5th ..."""
    index = np.arange(len(places))
    run_start = np.maximum.accumulate(np.where(np.diff(places, prepend=-step) != step, index, 0))
    return places[(index - run_start) % 2 == 0]


# ---- command line

@dataclass
class TokenizerConfig:
    """Train a tokenizer on text files and report how well it fits each language."""
    input: str = option("", "FILE[:WEIGHT],... of any kind that data/read.py reads; 0.1 = a tenth of the "
                            "documents, 2 = each twice")
    vocab_size: int = option(4096, "tokens, the 256 bytes and the four specials included")
    out_dir: str = option("out/tokenizer", "directory for bpe.json and vocab.txt")
    processes: int = option(0, "workers that count words; 0 = one a core")


def fit(tokenizer, texts, language_of):
    """Rows (language, characters, bytes per token, tokens per character, coverage) over texts.

    Coverage is the share of characters that lie whole inside one token; the rest are spelt in byte fragments.
    """
    cut = np.array([ends_inside_character(token) for token in tokenizer.token_bytes])
    sums = {}
    for text in texts:
        ids = tokenizer.encode(text)
        row = np.array([len(text), len(text.encode()), len(ids), cut[ids].sum()])
        language = language_of(text)
        sums[language] = sums.get(language, 0) + row
    return [(language, chars, size / n, n / chars, 1 - cuts / chars)
            for language, (chars, size, n, cuts) in sorted(sums.items())]


def ends_inside_character(token):
    """True where a token ends in the first bytes of a character: each character in fragments has one such."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder.decode(token)
    return len(decoder.getstate()[0]) > 0


def main(config):
    from data.read import documents, language_of, read_weighted     # only the command line reads files

    if not config.input:
        raise UserError("--input is empty; give FILE[:WEIGHT],...")
    files = read_weighted(config.input)
    if config.processes < 0:
        raise UserError(f"processes {config.processes} must be at least 1, or 0 for one a core")
    texts = (text for path, weight in files for i, text in enumerate(documents(path))
             for _ in range(int((i + 1) * weight) - int(i * weight)))
    processes = config.processes or os.cpu_count() or 1
    tokenizer = Tokenizer.train(texts, config.vocab_size, processes, progress=True)
    tokenizer.save(config.out_dir)
    longest = max(map(len, tokenizer.token_bytes))
    print(f"{config.out_dir}: {tokenizer.vocab_size} tokens of up to {longest} bytes")
    print("Lines of the first 500 documents of each file; coverage: characters that lie whole in one token.")
    print("language  characters  bytes/token  tokens/character  coverage")
    texts = (text for path, _ in files for text in itertools.islice(documents(path), 500))
    lines = (line for text in texts for line in text.splitlines() if line)
    for language, chars, size, rate, coverage in fit(tokenizer, lines, language_of):
        print(f"{language:8}{chars:12,}{size:13.2f}{rate:18.3f}{coverage:10.2%}")


if __name__ == "__main__":
    run(lambda: main(parse_config(TokenizerConfig)))
