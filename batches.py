"""What every stage reads: token shards, the stateless sampler, packed rows, bits per byte of documents.

The batch of a step is a pure function of (seed, step): no sampler state is stored, any number of ranks sees
the same global batch, and a poisoned stretch of data is skipped by skipping its steps. `data/prepare.py`
writes what `Shards` reads. Holds no loss and no loop.

Shapes:  N tokens of a split, or texts   B rows   T seq_len   V vocab_size
"""

import json
import zlib
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from cli import UserError
from model import IGNORE_INDEX, MAX_LOGITS, token_loss

META_KEYS = {"vocab_size": int, "dtype": str, "tokenizer_sha256": str, "files": list}
FILE_KEYS = {"name": str, "split": str, "language": str, "tokens": int, "documents": int}
DTYPES = ("uint16", "uint32")
PIECES_AT_ONCE = 1024       # pieces that bits per byte holds in memory and packs together


# ---- shards

class Shards:
    """The token shards of one split, memory-mapped and read as one stream of `n_tokens` ids.

    Each file is `<|endoftext|> doc <|endoftext|> ... doc <|endoftext|>`, so the stream may be cut anywhere,
    and even closed to a ring, without joining two documents.
    """

    def __init__(self, data_dir, split, max_seq_len=0):
        self.data_dir, self.split = Path(data_dir), split
        self.meta = read_meta(self.data_dir)
        self.vocab_size = self.meta["vocab_size"]
        self.eot_id = self.vocab_size - 4                   # the four specials are the last ids, EOT first
        self.files = [f for f in self.meta["files"] if f["split"] == split]
        if not self.files:
            raise UserError(f"{data_dir}/meta.json: no files of split {split!r}; prepare the data again")
        self.arrays = [self.open_shard(f) for f in self.files]
        self.starts = np.cumsum([0] + [len(a) for a in self.arrays])
        self.n_tokens = int(self.starts[-1])
        if max_seq_len and self.n_tokens < max_seq_len + 1:
            raise UserError(f"{data_dir}: {split} needs at least {max_seq_len + 1} tokens (seq_len + 1), has "
                            f"{self.n_tokens}; use more text or a smaller --max_seq_len")

    def open_shard(self, file):
        """Map one file and hold it against its entry in meta.json."""
        path, dtype = self.data_dir / file["name"], self.meta["dtype"]
        again = "damaged or from another run; prepare the data again"
        if not path.is_file():
            raise UserError(f"{path}: listed in meta.json but not there; prepare the data again")
        try:
            array = np.load(path, mmap_mode="r")
        except (ValueError, EOFError) as error:
            raise UserError(f"{path}: not a readable .npy file ({error}); {again}")
        if array.dtype != dtype or array.ndim != 1:
            raise UserError(f"{path}: {array.ndim}-D {array.dtype}, meta.json says 1-D {dtype}; {again}")
        if len(array) != file["tokens"]:
            raise UserError(f"{path}: {len(array)} tokens, meta.json says {file['tokens']}; {again}")
        if not len(array) or (largest := int(array.max())) >= self.vocab_size:
            found = f"token id {largest} >= vocab_size {self.vocab_size}" if len(array) else "no tokens"
            raise UserError(f"{path}: {found}; {again}")
        if array[0] != self.eot_id or array[-1] != self.eot_id:
            raise UserError(f"{path}: does not begin and end with <|endoftext|> (id {self.eot_id}); {again}")
        return array

    def tokens(self, start, stop):
        """Ids [start, stop) of the stream, int64, across file borders."""
        assert 0 <= start < stop <= self.n_tokens, (start, stop, self.n_tokens)
        parts, i = [], int(np.searchsorted(self.starts, start, "right")) - 1
        while start < stop:
            parts.append(self.arrays[i][start - self.starts[i]:stop - self.starts[i]])
            start, i = self.starts[i + 1], i + 1
        return np.concatenate(parts).astype(np.int64)

    def documents(self):
        """Yield (ids int64 without the `<|endoftext|>` around them, language), file by file."""
        for array, file in zip(self.arrays, self.files):
            borders = np.flatnonzero(array == self.eot_id)
            for before, after in zip(borders, borders[1:]):
                yield array[before + 1:after].astype(np.int64), file["language"]

    @property
    def languages(self):
        """Languages of this split, sorted."""
        return sorted({f["language"] for f in self.files})


def read_meta(data_dir):
    """meta.json as a dict, with every key that is read later known to be there and of its type."""
    path = Path(data_dir) / "meta.json"
    mend = "make shards with python -m data.prepare --out_dir DIR"
    if not path.parent.is_dir():
        raise UserError(f"--data_dir {data_dir}: no such directory; {mend}")
    if not path.is_file():
        raise UserError(f"--data_dir {data_dir}: no meta.json in it; {mend}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        missing = [k for k in META_KEYS if k not in meta]
        missing += [f"files[].{k}" for k in FILE_KEYS for f in meta.get("files", []) if k not in f]
        wrong = [k for k, kind in META_KEYS.items() if k in meta and not isinstance(meta[k], kind)]
        wrong += [f"files[].{k}" for k, kind in FILE_KEYS.items() for f in meta.get("files", [])
                  if k in f and not isinstance(f[k], kind)]
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the meta.json of token shards ({error}); {mend}")
    if missing:
        raise UserError(f"{path}: key {missing[0]} is missing; {mend}")
    if wrong:
        raise UserError(f"{path}: key {wrong[0]} holds another type; {mend}")
    if meta["dtype"] not in DTYPES or meta["vocab_size"] > np.iinfo(meta["dtype"]).max + 1:
        raise UserError(f"{path}: vocab_size {meta['vocab_size']} does not fit dtype {meta['dtype']}; {mend}")
    return meta


def check_tokenizer(shards, tokenizer):
    """Refuse a tokenizer other than the one that wrote the shards."""
    theirs, ours = shards.meta["tokenizer_sha256"], tokenizer.sha256
    if theirs != ours:
        raise UserError(f"{shards.data_dir}: its tokens are of tokenizer {theirs[:12]}, vocab_size "
                        f"{shards.vocab_size}, not of {ours[:12]}, vocab_size {tokenizer.vocab_size}; use "
                        f"{shards.data_dir}/tokenizer or prepare the data again")


# ---- the sampler: which rows does step s see?

def rows_of_step(seed, step, n_rows, batch_sizes, skip=()):
    """Epochs and rows, two int64 arrays (b,), of the global batch of `step`; pure in its arguments.

    Batches follow one another through an endless sequence: epoch 0's permutation of the n_rows rows, then
    epoch 1's and so on. A batch knows nothing of ranks; rank r takes `share(..., r, world_size)` of it.

    Args:
        batch_sizes: rows a step; an int, or a sequence with one entry a data step (batch-size ramp, Brown et
            al. 2020), whose last entry holds for all steps after it.
        skip: inclusive intervals (first, last) of data steps to leave out. Step s then reads the batch of the
            s-th data step that is left, so the data after a skipped stretch comes that much sooner.
    """
    d = data_step(step, skip)
    if np.ndim(batch_sizes) == 0:
        start, size = d * int(batch_sizes), int(batch_sizes)
    else:
        sizes = np.asarray(batch_sizes, dtype=np.int64)
        start = int(sizes[:d].sum() + max(0, d - len(sizes)) * sizes[-1])
        size = int(sizes[min(d, len(sizes) - 1)])
    epochs, places = np.divmod(np.arange(start, start + size, dtype=np.int64), n_rows)
    parts = [permutation(seed, e, n_rows)[places[epochs == e]] for e in np.unique(epochs).tolist()]
    return epochs, np.concatenate(parts)


def data_step(step, skip=()):
    """The step-th data step outside all `skip` intervals: step=5, skip=[(2, 3)] -> 7."""
    free = 0                                                    # steps before this one are settled
    for first, last in sorted(skip):
        first = max(first, free)
        if first <= step and first <= last:
            step += last - first + 1
        free = max(free, last + 1)
    return step


@lru_cache(maxsize=4)
def permutation(seed, epoch, n_rows):
    """The order of all rows in one epoch, int64 (n_rows,), read-only."""
    order = np.argsort(draws(seed, "rows", epoch, n_rows), kind="stable")
    order.flags.writeable = False
    return order


def draws(seed, purpose, index, n):
    """n raw 64-bit draws for (seed, purpose, index); raw ones, as numpy keeps only these for ever."""
    entropy = [seed % 2**64, zlib.crc32(purpose.encode()), index]
    return np.random.PCG64(np.random.SeedSequence(entropy)).random_raw(n)


def share(rows, rank, world_size):
    """This rank's contiguous part of a global batch (arrays, tensors, lists)."""
    return rows[rank * len(rows) // world_size:(rank + 1) * len(rows) // world_size]


# ---- packing: what stands in a row?

def n_rows(n_tokens, seq_len):
    """Rows of seq_len targets in one epoch."""
    return n_tokens // seq_len


def packed_rows(shards, epochs, rows, seq_len, seed):
    """Inputs, targets and document numbers, each int64 (b, T), of the given rows of the given epochs.

    Row r of epoch e is tokens o + r*T to o + r*T + T of the stream closed to a ring; o in [0, T) is drawn
    from (seed, "offset", e), so each epoch cuts the documents elsewhere. doc_ids counts the `<|endoftext|>`
    so far in the row: a document's inputs are `<|endoftext|>` + text, and attention stays in equal doc_ids.

    Contiguous windows rather than whole documents fitted into rows: no padding, no plan of the epoch to
    store, and every token but N % T of the ring is learnt exactly once an epoch. The price is that a document
    cut by a border goes on without its beginning, at most once every T tokens and elsewhere in each epoch.
    """
    T, N = seq_len, shards.n_tokens
    window = np.empty((len(rows), T + 1), dtype=np.int64)
    for out, epoch, row in zip(window, epochs, rows):
        start = (int(draws(seed, "offset", int(epoch), 1)[0] % T) + int(row) * T) % N
        stop = start + T + 1
        out[:min(stop, N) - start] = shards.tokens(start, min(stop, N))
        if stop > N:                                            # round the ring
            out[N - start:] = shards.tokens(0, stop - N)
    window = torch.from_numpy(window)
    ids, targets = window[:, :-1].contiguous(), window[:, 1:].contiguous()
    return ids, targets, (ids == shards.eot_id).cumsum(1)


def first_fit(lengths, capacity):
    """Put whole items into rows of `capacity`, each into the first row with room: lists of item numbers.

    first_fit([5, 4, 3, 1], 8) -> [[0, 2], [1, 3]]. O(n log n) by a tree over the rows whose nodes hold the
    largest free space below them; rows not yet begun are just empty ones further right.
    """
    assert all(0 <= n <= capacity for n in lengths), f"an item is longer than {capacity}"
    leaves = 1 << max(0, len(lengths) - 1).bit_length()
    free, rows = [capacity] * (2 * leaves), [[] for _ in lengths]
    for item, length in enumerate(lengths):
        node = 1
        while node < leaves:
            node = 2 * node + (free[2 * node] < length)
        rows[node - leaves].append(item)
        free[node] -= length
        while node > 1:
            node //= 2
            free[node] = max(free[2 * node], free[2 * node + 1])
    return [row for row in rows if row]


@torch.no_grad()
def row_sums(model, rows):
    """(3,) fp32: nats, targets that are the likeliest token, targets; of batches (ids, targets, doc_ids)."""
    device = next(model.parameters()).device
    sums = torch.zeros(3, device=device)
    for batch in rows:
        ids, targets, doc_ids = (x.to(device) for x in batch)
        logits = model(ids, doc_ids=doc_ids)
        loss, count = token_loss(logits, targets)
        sums += torch.stack([loss.float(), (logits.argmax(-1) == targets).sum().float(), count.float()])
    return sums


# ---- replies for a ScalarModel

def joined(prompt, reply, max_tokens):
    """Ids of a prompt and its reply; where both do not fit, the prompt loses its start, the reply nothing."""
    if len(reply) > max_tokens:
        raise UserError(f"a reply of {len(reply)} tokens does not fit into {max_tokens}; take a longer "
                        "--max_seq_len or shorter replies")
    room = max_tokens - len(reply)
    return [*prompt[max(0, len(prompt) - room):], *reply]


def packed_replies(texts, lengths, max_seq_len, device=None):
    """Rows of whole texts (lists of ids) that end in replies of these lengths.

    Give ids, doc_ids, targets (B, T), and each text's row and last place, (N,). targets: the next token where
    that is of a reply, else IGNORE_INDEX.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    rows = first_fit([len(texts[i]) for i in order], max_seq_len)
    ids, doc_ids = (torch.zeros(len(rows), max_seq_len, dtype=torch.int64) for _ in range(2))
    targets = torch.full_like(ids, IGNORE_INDEX)
    where = torch.zeros(2, len(texts), dtype=torch.int64)
    for b, row in enumerate(rows):
        at = 0
        for number, i in enumerate((order[j] for j in row), 1):
            end = at + len(texts[i])
            ids[b, at:end], doc_ids[b, at:end] = torch.tensor(texts[i]), number
            start = max(at, end - lengths[i] - 1)                   # the token before the reply
            targets[b, start:end - 1] = ids[b, start + 1:end]
            where[:, i], at = torch.tensor([b, end - 1]), end
    return tuple(x.to(device) for x in (ids, doc_ids, targets, *where))


@torch.no_grad()
def score_texts(model, texts, lengths, max_logits=MAX_LOGITS):
    """What a ScalarModel says at the last token of each text, (N,) fp32; as packed_replies takes them."""
    device, T = next(model.parameters()).device, model.config.max_seq_len
    ids, doc_ids, targets, row, last = packed_replies(texts, lengths, T, device)
    at_once = max(1, max_logits // (T * model.config.vocab_size))
    model.eval()
    found = [model(*part) for part in zip(*(x.split(at_once) for x in (ids, doc_ids, targets)))]
    return torch.cat(found)[row, last]


def score_replies(model, prompts, replies, eos_id):
    """score_texts of replies to prompts, lists of ids; one without its end is read as if it ended there."""
    replies = [reply if reply[-1] == eos_id else [*reply, eos_id] for reply in replies]
    return score_texts(model, [joined(p, r, model.config.max_seq_len) for p, r in zip(prompts, replies)],
                       [len(reply) for reply in replies])


# ---- bits per byte over whole documents

def scoring_windows(n_targets, max_seq_len):
    """Yield (start, stop, first_scored): windows that score every target once, with its longest context.

    A window sees inputs [start, stop) and scores targets [first_scored, stop). Starts lie max_seq_len // 2
    apart, and a target belongs to the first window that reaches it.
    scoring_windows(10, 4) -> (0, 4, 0) (2, 6, 4) (4, 8, 6) (6, 10, 8)
    """
    stride, scored = max(1, max_seq_len // 2), 0
    for start in range(0, n_targets, stride):
        stop = min(start + max_seq_len, n_targets)
        yield start, stop, scored
        scored = stop
        if stop == n_targets:
            return


def bits_per_byte(model, shards, tokenizer, max_seq_len, batch_rows=8, max_documents=0):
    """{"all": bits per byte, language: bits per byte} of the documents of `shards`; lower is better.

    Each document is scored whole from its `<|endoftext|>`: nats of all targets, the closing `<|endoftext|>`
    included, over UTF-8 bytes of the text. Bytes, not tokens, so that models of different tokenizers compare.

    Args:
        batch_rows: rows of max_seq_len in one forward pass.
        max_documents: score at most this many, evenly spread over the split; 0 = all.
    """
    return bits_from_sums(document_sums(model, shards, tokenizer, max_seq_len, batch_rows, max_documents))


def bits_from_sums(sums):
    """{"all" or language: bits per byte} from {language: (nats, bytes, tokens)}, summed over ranks."""
    return {name: float(nats / n_bytes / np.log(2)) for name, (nats, n_bytes, _) in with_all(sums) if n_bytes}


def perplexity_from_sums(sums):
    """The same -> {"all": exp(nats a token), language: that}."""
    return {name: float(np.exp(nats / n_tokens)) for name, (nats, _, n_tokens) in with_all(sums) if n_tokens}


def with_all(sums):
    """The sums of all languages together, then those of each."""
    return [("all", np.sum(list(sums.values()), axis=0)), *sums.items()]


@torch.no_grad()
def document_sums(model, shards, tokenizer, max_seq_len, batch_rows=8, max_documents=0, rank=0, world_size=1):
    """{language: float64 (nats, bytes, tokens)} over this rank's share of the documents of `shards`.

    Every rank makes the same number of forward passes on batches of one shape, as FSDP and compilation need,
    and returns the same languages in the same order, so the values of the ranks add up.
    """
    check_tokenizer(shards, tokenizer)
    n_bytes = torch.tensor([len(b) for b in tokenizer.token_bytes])
    n_bytes[shards.eot_id] = 0
    sums, was_training = {language: np.zeros(3) for language in shards.languages}, model.training
    rows = packed_pieces(scoring_pieces(shards, max_seq_len, max_documents), max_seq_len)
    model.eval()
    try:
        while batch := list(islice(rows, batch_rows * world_size)):
            mine = batch[rank::world_size]
            ids, targets, doc_ids, scored = fill_rows(mine, batch_rows, max_seq_len, list(sums))
            nats = target_nats(model, ids, targets, doc_ids)
            for i, language in enumerate(sums):
                here = scored == i
                sums[language] += (nats[here].sum().item(), n_bytes[targets[here]].sum().item(),
                                   here.sum().item())
    finally:
        model.train(was_training)
    return sums


def target_nats(model, ids, targets, doc_ids):
    """-log p of each target, float64 (B, T) on the CPU; only one row of logits at a time is made fp32."""
    device = next(model.parameters()).device
    logits = model(ids.to(device), doc_ids=doc_ids.to(device))
    rows = [F.cross_entropy(x.float(), y, reduction="none") for x, y in zip(logits, targets.to(device))]
    return torch.stack(rows).cpu().double()


def scoring_pieces(shards, max_seq_len, max_documents):
    """Yield (stream, skipped, language): max_seq_len + 1 ids at most; `skipped` targets do not count."""
    total = sum(f["documents"] for f in shards.files)
    every = -(-total // max_documents) if max_documents else 1
    for ids, language in islice(shards.documents(), 0, None, every):
        stream = np.concatenate([[shards.eot_id], ids, [shards.eot_id]])
        for start, stop, first_scored in scoring_windows(len(stream) - 1, max_seq_len):
            yield stream[start:stop + 1], first_scored - start, language


def packed_pieces(pieces, max_seq_len):
    """Yield rows, each a list of pieces whose targets fit max_seq_len together."""
    while group := list(islice(pieces, PIECES_AT_ONCE)):
        for row in first_fit([len(stream) - 1 for stream, _, _ in group], max_seq_len):
            yield [group[i] for i in row]


def fill_rows(rows, n_rows, max_seq_len, languages):
    """ids, targets, doc_ids and scored, each int64 (n_rows, max_seq_len).

    scored is the number of the target's language, -1 where the target does not count. What no piece fills is
    a document of zeros of its own, scored -1.
    """
    ids, targets, doc_ids = (torch.zeros(n_rows, max_seq_len, dtype=torch.int64) for _ in range(3))
    scored = torch.full_like(ids, -1)
    for b, row in enumerate(rows):
        at = 0
        for number, (stream, skipped, language) in enumerate(row):
            end = at + len(stream) - 1
            ids[b, at:end] = torch.from_numpy(stream[:-1])
            targets[b, at:end] = torch.from_numpy(stream[1:])
            doc_ids[b, at:end], doc_ids[b, end:] = number, number + 1
            scored[b, at + skipped:end] = languages.index(language)
            at = end
    return ids, targets, doc_ids, scored
