"""Text files to documents, one at a time: .txt, .jsonl, .tsv and .csv, each also gzipped.

Whatever the file, a document comes out as clean Unicode: decoded from UTF-8, without byte-order marks, line
ends "\\n". Holds one document and a read-ahead of about 1 MB, never more. Judges no text: cleaning does.
"""

import codecs
import csv
import gzip
import io
import itertools
import json
import math
import zlib
from pathlib import Path

import numpy as np

from cli import UserError

SEPARATOR = "<|endoftext|>"
TEXT_KEYS = "text,fable,content,story"
KINDS = (".txt", ".jsonl", ".tsv", ".csv")
LOOK_AHEAD = 1_000_000      # characters in which a .txt file shows whether it has separators
CUT_BYTES = 20_000          # .txt without separators is cut at the first blank line after so many
MAX_PIECE = 10_000          # characters read at once where a .txt file has no line ends


def read_weighted(spec):
    """"a.jsonl,b.jsonl:0.5" -> [(path, weight)]."""
    found = []
    for part in filter(None, (part.strip() for part in spec.split(","))):
        path, colon, weight = part.rpartition(":")
        try:
            path, weight = (path, float(weight)) if colon else (part, 1.0)
        except ValueError:                                      # the colon is part of the name
            path, weight = part, 1.0
        if not 0 < weight < math.inf:
            raise UserError(f"{part}: the weight must be a number above 0")
        found.append((path, weight))
    if not found:
        raise UserError(f"{spec!r} names no file; give FILE[:WEIGHT][,FILE[:WEIGHT]]")
    return found


def documents(path, separator=SEPARATOR, text_key=TEXT_KEYS, columns="", strip=True, on_read=None):
    """Yield the documents of a file as str; UserError where it cannot be read or holds no text.

    Args:
        separator: the line between two documents of a .txt file. A file that shows none in its first MB is
            cut at blank lines about every 20 KB instead, at line ends where there are no blank lines.
        text_key: keys of a .jsonl record, separated by commas; the first that is there holds the text.
        columns: columns of a .tsv or .csv file to join by newlines, separated by commas: numbers from 1, or
            names where the first line is a header; "" = all.
        strip: drop white space around each document. Without it the pieces of a .txt file join to the file.
        on_read: called with the number of bytes of each read from the (compressed) file, for a progress bar.
    """
    found = False
    for text in raw_documents(Path(path), separator, text_key, columns, on_read):
        text = clean_unicode(text)
        text = text.strip() if strip else text
        if text:
            found = True
            yield text
    if not found:
        raise UserError(f"{path}: no text in it; give a file that is not empty")


def raw_documents(path, separator, text_key, columns, on_read):
    """Iterator over the documents of a file, chosen by its name."""
    name = path.name.removesuffix(".gz")
    if not path.is_file():
        raise UserError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    if name.endswith(".txt"):
        return txt_documents(lines(path, on_read, MAX_PIECE), separator)
    if name.endswith(".jsonl"):
        return jsonl_documents(lines(path, on_read), path, text_key.split(","))
    if name.endswith(".tsv"):
        rows = (line.rstrip("\n").split("\t") for line in lines(path, on_read))
        return table_documents(rows, path, columns)
    if name.endswith(".csv"):
        return table_documents(csv_rows(path, on_read), path, columns)
    raise UserError(f"{path}: unknown kind of file; its name must end in {', '.join(KINDS)} or these + .gz")


# ---- bytes to lines

class CountedFile(io.FileIO):
    """A file that tells on_read how many bytes each read took."""

    def __init__(self, path, on_read):
        super().__init__(path)
        self.on_read = on_read

    def readinto(self, buffer):
        n = super().readinto(buffer)
        self.on_read(n)
        return n


def open_bytes(path, on_read=None):
    """Open a file for reading bytes, unzipped where its name ends in .gz."""
    file = io.BufferedReader(CountedFile(path, on_read) if on_read else io.FileIO(path), 2**16)
    return gzip.GzipFile(fileobj=file) if path.name.endswith(".gz") else file


def lines(path, on_read=None, limit=-1):
    """Yield the lines of a UTF-8 file with their "\\n"; one longer than limit characters comes in pieces."""
    try:
        with io.TextIOWrapper(open_bytes(path, on_read), encoding="utf-8") as text:
            while line := text.readline(limit):
                yield line.replace("\ufeff", "")
    except UnicodeDecodeError:
        raise UserError(f"{path}: {first_bad_byte(path)}; convert the file, for instance with "
                        "iconv -f GB18030 -t UTF-8") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip file ({error}); download or compress it again") from None


def first_bad_byte(path):
    """Say where a file stops being UTF-8."""
    decoder, offset, line = codecs.getincrementaldecoder("utf-8")(), 0, 1
    with open_bytes(path) as file:
        while chunk := file.read1(2**20):                       # what there is before a torn end, too
            held = len(decoder.getstate()[0])                   # bytes of a character begun in the last chunk
            try:
                line += decoder.decode(chunk).count("\n")
            except UnicodeDecodeError as error:
                line += error.object[:error.start].count(b"\n")
                return f"byte {offset - held + error.start} (line {line}) is not UTF-8"
            offset += len(chunk)
    return f"it ends inside a UTF-8 character, after byte {offset}"


# ---- lines to documents

def txt_documents(lines, separator):
    """Yield what lies between separator lines, or pieces of about CUT_BYTES where there are none."""
    head, size, cut = [], 0, CUT_BYTES
    for line in lines:
        head.append(line)
        size += len(line)
        if line.strip() == separator:
            cut = float("inf")
        if line.strip() == separator or size >= LOOK_AHEAD:
            break
    document, size = [], 0
    for line in itertools.chain(head, lines):
        separates = line.strip() == separator
        if not separates:
            document.append(line)
            size += len(line.encode())
        if separates or (size >= cut and not line.strip()) or size >= 2 * cut:
            yield "".join(document)
            document, size = [], 0
    yield "".join(document)


def jsonl_documents(lines, path, keys):
    """Yield the text of each JSON record."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not a JSON record ({error}); mend the line") from None
        texts = [record[k] for k in keys if k in record] if isinstance(record, dict) else []
        if not texts or not isinstance(texts[0], str):
            has = f"keys {', '.join(record)}" if isinstance(record, dict) else type(record).__name__
            raise UserError(f"{path}:{number}: no text under {' or '.join(keys)}, the record has {has}; "
                            "name the key with --text_key")
        yield texts[0]


def csv_rows(path, on_read):
    """Iterate over the rows of a .csv file; a quoted field may hold line ends."""
    csv.field_size_limit(2**31 - 1)                         # a column may be a book; the default is 128 KB
    reader = csv.reader(lines(path, on_read), strict=True)
    try:
        yield from reader
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not CSV ({error}); mend the line") from None


def table_documents(rows, path, columns):
    """Yield each row's columns, joined by newlines."""
    wanted = [c.strip() for c in columns.split(",")] if columns else []
    places = [int(c) - 1 for c in wanted if c.isdigit()]
    first = 1
    if len(places) < len(wanted):
        header, first = next(rows, []), 2
        if missing := [c for c in wanted if c not in header]:
            raise UserError(f"{path}: no column {missing[0]!r} in its header ({', '.join(header)})")
        places = [header.index(c) for c in wanted]
    if places and min(places) < 0:
        raise UserError(f"--columns {columns}: columns are counted from 1")
    for number, row in enumerate(rows, first):
        if not any(row):                                        # a blank line
            continue
        if places and len(row) <= max(places):
            raise UserError(f"{path}: row {number} has {len(row)} columns, --columns wants {max(places) + 1}")
        yield "\n".join([row[i] for i in places] if places else row)


# ---- text

def clean_unicode(text):
    """Byte-order marks out, line ends to "\\n", half surrogate pairs to U+FFFD: JSON can hide all three."""
    text = text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if not encodable(text) else text


def encodable(text):
    """Whether a str can be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def language_of(text, sample=4000):
    """"zh", "en" or "other": the script with more than half of the letters' bytes at the start of a text.

    Bytes, because a Chinese character says about as much as three Latin letters.
    """
    counts = np.bincount(np.frombuffer(text[:sample].encode(), dtype=np.uint8), minlength=256)
    chinese, latin, others = counts @ SCRIPTS
    if chinese > latin + others:
        return "zh"
    return "en" if latin > chinese + others else "other"


def script_weights():
    """(256, 3): bytes of a Chinese, a Latin or another letter that begins with this byte in UTF-8.

    The first byte alone is quick and tells the scripts apart well enough. E2, EF and F0 begin punctuation and
    emoji.
    """
    weights = np.zeros((256, 3), dtype=np.int64)
    weights[0xE4:0xEA, 0] = 3                                   # U+4000 to U+9FFF
    weights[[*range(65, 91), *range(97, 123)], 1] = 1
    weights[0xC3:0xCA, 1] = 2                                   # letters with accents
    weights[0xCA:0xE0, 2] = 2
    weights[[0xE0, 0xE1, 0xE3, *range(0xEA, 0xEF)], 2] = 3
    return weights


SCRIPTS = script_weights()
