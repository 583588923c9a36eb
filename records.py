"""Records of conversations and of judged replies: many formats read as they are, checked, as tokens.

A file is JSONL, or JSON that holds a list, .gz too; its records may be of several formats. What a person must
mend ends in one line that names file and line. Not here: shards of plain text (batches.py).

Shapes:  N tokens of a conversation   B rows   T max_seq_len
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from batches import draws, first_fit
from cli import UserError
from data.read import clean_unicode, lines, read_weighted
from metrics import in_chinese
from model import IGNORE_INDEX
from tokenizer import SPECIALS


# ---- one record

def to_messages(record):
    """A record of any of the FORMATS as [{"role", "content"}]."""
    if isinstance(record, list):
        return chat(record)
    if not isinstance(record, dict):
        raise UserError(f"{shown(record)} is not a record; give an object or a list of turns")
    for keys, tell in FORMATS:
        if all(key in record for key in keys):
            return tell(record)
    raise UserError(f"a record with the keys {', '.join(map(str, record)) or '(none)'} is in none of the "
                    f"formats: {'; '.join(' '.join(keys) for keys, _ in FORMATS)}")


def chat(turns):
    """A list of turns, as given; keys beside role and content are left out."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"messages {shown(turns)} is not a list of turns with role and content")
    for turn in turns:
        for key in "role", "content":
            if key not in turn:
                raise UserError(f"a turn has no {key!r}, only {', '.join(map(str, turn)) or 'nothing'}")
    return [{"role": turn["role"], "content": text_of(turn, "content")} for turn in turns]


def entity(record):
    """"Tell me about ENTITY." and one sentence a fact, in the language of the record."""
    name, facts = text_of(record, "entity"), record["facts"]
    if not isinstance(facts, list) or not all(isinstance(fact, dict) and {"fact", "value"} <= fact.keys()
                                              for fact in facts):
        raise UserError(f"facts {shown(facts)} is not a list of objects with fact and value")
    pairs = [(text_of(f, "fact"), text_of(f, "value")) for f in facts]
    if in_chinese(name + "".join(fact + value for fact, value in pairs)):
        return exchange(f"请介绍{name}。", "".join(f"{name}的{fact}是{value}。" for fact, value in pairs))
    said = " ".join(f"The {fact} of {name} is {value}." for fact, value in pairs)
    return exchange(f"Tell me about {name}.", said)


def instruction(record):
    """The instruction, a blank line and the input; an output that is a list becomes numbered lines."""
    more, output = text_of(record, "input") if record.get("input") is not None else "", record["output"]
    if isinstance(output, list):
        output = "\n".join(f"{i}. {text_of({'output': item}, 'output')}" for i, item in enumerate(output, 1))
    else:
        output = text_of(record, "output")
    return exchange(text_of(record, "instruction") + (f"\n\n{more}" if more else ""), output)


def label(record):
    """A fixed question for the label, then the text."""
    text = text_of(record, "text")
    ask = "这段文字应该标成什么？" if in_chinese(text) else "Which label fits this text?"
    return exchange(f"{ask}\n{text}", text_of(record, "label"))


def pair(user, assistant):
    """The reader of records that hold both sides under these keys."""
    return lambda record: exchange(text_of(record, user), text_of(record, assistant))


FORMATS = [         # the first row whose keys are all there wins; a new format is a new row
    (("messages",), lambda record: chat(record["messages"])),
    (("entity", "facts"), entity),
    (("instruction", "output"), instruction),
    (("question", "answer"), pair("question", "answer")),
    (("prompt", "completion"), pair("prompt", "completion")),
    (("text", "label"), label),
    (("input", "target"), pair("input", "target")),
]


def exchange(user, assistant):
    """One question and its answer."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def text_of(record, key):
    """The text under a key; a number is taken as written."""
    value = record[key]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise UserError(f"{key} {shown(value)} is a {type(value).__name__}; give it a text")
    return clean_unicode(value)


def shown(value):
    """The start of a value, for a message."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


# ---- replies that somebody judged

class Comparison(NamedTuple):
    """Replies to one prompt, with ranks (0 = best, equal ones tie) or scores (larger = better), or both."""
    messages: list                  # what came before; empty for texts that answer nothing
    replies: list
    ranks: list | None
    scores: list | None


def to_comparison(record):
    """A record of any of the JUDGED formats as a Comparison."""
    if not isinstance(record, dict):
        raise UserError(f"{shown(record)} is not a record of judged replies; give an object")
    for keys, tell in JUDGED:
        if all(key in record for key in keys):
            found = tell(record)
            check_comparison(found)
            return found
    raise UserError(f"a record with the keys {', '.join(map(str, record)) or '(none)'} is in none of the "
                    f"formats of judged replies: {'; '.join(' '.join(keys) for keys, _ in JUDGED)}")


def asked(*keys):
    """The reader of a prompt: turns that end with the user's, or texts that are joined to one."""
    def tell(record):
        if keys[0] == "messages" or isinstance(record[keys[0]], list):
            return chat(record[keys[0]])
        texts = [text_of(record, key) for key in keys if record.get(key)]
        return [{"role": "user", "content": "\n\n".join(texts)}]
    return tell


def better(prompt, chosen, rejected):
    """The reader of pairs."""
    return lambda record: Comparison(prompt(record), [text_of(record, chosen), text_of(record, rejected)],
                                     [0, 1], None)


def outputs(prompt):
    """The reader of several replies, each with its rank, its score or both."""
    def tell(record):
        found = record["outputs"]
        if not isinstance(found, list) or not all(isinstance(one, dict) and "response" in one for one
                                                  in found):
            raise UserError(f"outputs {shown(found)} is not a list of objects with response and score or "
                            f"rank")
        ranks, scores = ([one.get(key) for one in found] for key in ("rank", "score"))
        return Comparison(prompt(record), [text_of(one, "response") for one in found],
                          None if all(r is None for r in ranks) else ranks,
                          None if all(s is None for s in scores) else scores)
    return tell


JUDGED = [          # as FORMATS: the first row whose keys are all there wins
    (("messages", "chosen", "rejected"), better(asked("messages"), "chosen", "rejected")),
    (("prompt", "chosen", "rejected"), better(asked("prompt"), "chosen", "rejected")),
    (("instruction", "chosen", "rejected"), better(asked("instruction", "input"), "chosen", "rejected")),
    (("question", "accepted", "rejected"), better(asked("question"), "accepted", "rejected")),
    (("messages", "outputs"), outputs(asked("messages"))),
    (("prompt", "outputs"), outputs(asked("prompt"))),
    (("input", "outputs"), outputs(asked("input"))),
    (("text", "score"), lambda r: Comparison([], [text_of(r, "text")], None, [r["score"]])),
]


def check_comparison(found):
    """Refuse replies and judgements that teach nothing or contradict themselves."""
    if found.messages:
        check_messages(found.messages, last="user")
    if not found.replies:
        raise UserError("outputs is empty; give at least one reply")
    for name, values in ("rank", found.ranks), ("score", found.scores):
        for value in values or ():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise UserError(f"{name} {shown(value)} must be a number, one for every reply")
    if found.ranks is None and found.scores is None:
        raise UserError("the replies have neither rank nor score; give one of them")
    if found.ranks and len(found.replies) < 2:
        raise UserError("one ranked reply has nothing to be compared with; give two, or a score")
    if len(found.replies) > 1 and len(set(found.replies)) == 1:
        raise UserError(f"all replies are equal ({shown(found.replies[0])}); nothing can be learnt from them")


def check_messages(messages, last="assistant"):
    """Refuse turns that are no conversation, and texts that are written like the template's own tokens."""
    check_turns(messages, last)
    for special in SPECIALS:
        if any(special in turn["content"] for turn in messages):
            raise UserError(f"a text holds {special}, which the template writes itself; take it out")


def check_turns(messages, last):
    """Refuse turns that are not (system,) user, assistant, ..., ending with a turn of `last`."""
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns:
        raise UserError("there is no turn of a user; a conversation begins with one")
    for i, turn in enumerate(turns):
        role, content, due = turn["role"], turn["content"], ("user", "assistant")[i % 2]
        if role not in ("system", "user", "assistant"):
            raise UserError(f"role {shown(role)} is unknown; use system, user or assistant")
        if role != due:
            raise UserError(f"turn {len(messages) - len(turns) + i + 1} is of {role}, not of {due}; after a "
                            "system turn, if any, user and assistant take turns, the user first")
        if not content.strip() and role == "assistant":
            raise UserError(f"turn {len(messages) - len(turns) + i + 1} is an empty answer; fill it or take "
                            "the record out")
    if turns[-1]["role"] != last:
        raise UserError(f"the last turn is of {turns[-1]['role']}; the record must end with one of {last}")


# ---- files

def read_records(path):
    """Yield (where, record) of a file: "FILE:LINE" for JSONL, "FILE: record N" for JSON."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file" if not path.exists() else f"{path}: not a file")
    kind = path.name.removesuffix(".gz")
    if not kind.endswith((".json", ".jsonl")):
        raise UserError(f"{path}: unknown kind of file; records are in .jsonl or .json, or these + .gz")
    if kind.endswith(".json"):
        try:
            whole = json.loads("".join(lines(path)))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}: not JSON ({error}); one record a line goes into .jsonl") from None
        for number, record in enumerate(whole if isinstance(whole, list) else [whole], 1):
            yield f"{path}: record {number}", record
        return
    for number, line in enumerate(lines(path), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                yield f"{path}:{number}", UserError(f"not a JSON record ({error}); mend the line")


def read_prompts(path):
    """[(id, messages)] of a file of prompts {id, messages}, whose last turn is the user's."""
    found = []
    for where, record in read_records(path):
        try:
            if isinstance(record, UserError):
                raise record
            if not isinstance(record, dict) or not {"id", "messages"} <= record.keys():
                raise UserError(f"{shown(record)} is no prompt; it has messages and an id")
            messages = chat(record["messages"])
            check_messages(messages, last="user")
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        found.append((record["id"], messages))
    if not found:
        raise UserError(f"{path}: no prompts in it")
    return found


def weighted_records(spec, seed=0):
    """Yield (where, record, copies) of "FILE[:WEIGHT],..."; 2.3: a record twice, three in ten thrice."""
    for path, weight in read_weighted(spec):
        chance = iter(())
        for number, (where, record) in enumerate(read_records(path)):
            if not number % 4096:
                chance = iter((draws(seed, f"weight {path}", number, 4096) / 2.0 ** 64).tolist())
            yield where, record, int(weight) + (next(chance) < weight % 1)


# ---- conversations as tokens

@dataclass
class Conversation:
    """What the model reads and what it is to learn of it."""
    ids: np.ndarray                 # (N,) int32, ends with the last learnt token
    learn: np.ndarray               # (N,) bool: the assistant's contents and their <|im_end|>
    weight: float                   # of its loss
    where: str
    messages: list


@dataclass
class Conversations:
    """The conversations of some files, and what became of the records."""
    items: list = field(default_factory=list)
    records: int = 0
    bad: int = 0                    # skipped
    shortened: int = 0              # lost turns or the start of the question to fit
    first_bad: str = ""

    def report(self):
        """One line of counts."""
        lost = f", {self.bad:,} bad ones skipped (the first: {self.first_bad})" if self.bad else ""
        cut = f", {self.shortened:,} shortened to fit" if self.shortened else ""
        return f"{self.records:,} records, {len(self.items):,} conversations{cut}{lost}"


def read_conversations(spec, tokenizer, max_tokens, seed=0, skip_bad=False, label_weights=None):
    """The conversations of "FILE[:WEIGHT],..." as tokens.

    Args:
        max_tokens: longest that is kept whole; a longer one loses its oldest turns, then the start of its
            question. Answers stay whole with their end.
        skip_bad: count records that cannot be used and go on, instead of stopping at the first.
        label_weights: {answer: factor of its loss}, for classes that are too rare or too frequent.
    """
    found = Conversations()
    for where, record, copies in weighted_records(spec, seed):
        found.records += 1
        try:
            if isinstance(record, UserError):
                raise record
            item, cut = conversation(record, tokenizer, max_tokens, where, label_weights or {})
        except UserError as error:
            if not skip_bad:
                raise UserError(f"{where}: {error}; --skip_bad leaves such records out") from None
            found.bad, found.first_bad = found.bad + 1, found.first_bad or f"{where}: {error}"
            continue
        found.shortened += cut
        found.items += [item] * copies
    if not found.items:
        raise UserError(f"{spec}: no record to learn from ({found.report()})")
    return found


def conversation(record, tokenizer, max_tokens, where="", label_weights={}):
    """(Conversation, whether it had to be shortened) of a record."""
    messages = to_messages(record)
    check_messages(messages)
    weight = record.get("weight", 1.0) if isinstance(record, dict) else 1.0
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise UserError(f"weight {shown(weight)} must be a number, 0 or more")
    weight = float(weight) * label_weights.get(messages[-1]["content"].strip(), 1.0)
    kept, lost = messages, 0
    ids, learn = encode(kept, tokenizer)
    while len(ids) > max_tokens and sum(turn["role"] == "user" for turn in kept) > 1:
        head = kept[:1] if kept[0]["role"] == "system" else []
        kept = head + kept[len(head) + 2:]                      # the oldest question with its answer
        ids, learn = encode(kept, tokenizer)
    if len(ids) > max_tokens:
        before, opening = [turn for turn in kept if turn["role"] == "system"], [tokenizer.im_start_id,
                                                                                *tokenizer.encode("user\n")]
        start, lost = len(tokenizer.encode_chat(before)[0]) + len(opening), len(ids) - max_tokens
        room = len(tokenizer.encode(kept[len(before)]["content"].strip()))
        if lost > room:
            raise UserError(f"its answer of {int(sum(learn))} tokens does not fit into {max_tokens} with the "
                            "template around it; take a longer --max_seq_len")
        ids, learn = ids[:start] + ids[start + lost:], learn[:start] + learn[start + lost:]
    found = Conversation(np.array(ids, dtype=np.int32), np.array(learn, dtype=bool), weight, where, messages)
    return found, bool(lost) or len(kept) < len(messages)


def encode(messages, tokenizer):
    """encode_chat without what follows the last learnt token."""
    ids, learn = tokenizer.encode_chat(messages)
    end = len(ids) - learn[::-1].index(1)
    return ids[:end], learn[:end]


# ---- rows

def pack(items, max_seq_len, seed=0, packing=True):
    """Rows of conversations, lists of item numbers: first fit, the longest first, or one in each row.

    Among equally long ones the order is the seed's.
    """
    order = np.argsort(draws(seed, "pack", 0, len(items)), kind="stable").tolist()
    if not packing:
        return [[i] for i in order]
    order.sort(key=lambda i: -len(items[i].ids))
    return [[order[i] for i in row] for row in first_fit([len(items[i].ids) - 1 for i in order], max_seq_len)]


def conversation_rows(items, rows, max_seq_len):
    """Inputs, targets, weights and document numbers, each (B, T), of rows as `pack` gives them.

    Targets are the next tokens where they are learnt, else IGNORE_INDEX; weights are float32, 0 where nothing
    is learnt. Each conversation is a document of its own, and what is left of a row another.
    """
    ids, targets, doc_ids = (torch.zeros(len(rows), max_seq_len, dtype=torch.int64) for _ in range(3))
    weights = torch.zeros(len(rows), max_seq_len)
    targets.fill_(IGNORE_INDEX)
    for b, row in enumerate(rows):
        at = 0
        for number, item in enumerate(items[i] for i in row):
            end = at + len(item.ids) - 1
            tokens, learn = torch.from_numpy(item.ids).long(), torch.from_numpy(item.learn[1:])
            ids[b, at:end] = tokens[:-1]
            targets[b, at:end] = tokens[1:].where(learn, IGNORE_INDEX)
            weights[b, at:end] = learn * item.weight
            doc_ids[b, at:end], doc_ids[b, end:] = number, number + 1
            at = end
    return ids, targets, weights, doc_ids
