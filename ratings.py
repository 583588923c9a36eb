"""Files of what people think: samples judged, ratings, thumbs; each record checked, each written at once.

feedback.py asks and collects, serve.py asks in the browser; both write the same files, reward.py reads them.
"""

import json
import os
import sys
from pathlib import Path

from batches import draws
from cli import UserError, about
from records import chat, check_turns, read_records, shown

ASPECTS = "accuracy", "relevance", "naturalness", "concision"          # of the rubric, each 1-5
KINDS = "ranking", "choice", "rubric"
FORMS = "rankings", "pairs", "triples", "scores"                        # of training data made of them


def read_samples(path):
    """{id: sample} of a samples.jsonl, checked."""
    found = {}
    for where, record in read_records(path):
        good = (isinstance(record, dict) and {"id", "messages", "replies"} <= record.keys()
                and isinstance(record["replies"], list)
                and all(isinstance(r, dict) and {"id", "text"} <= r.keys() and isinstance(r["text"], str)
                        for r in record["replies"]))
        if not good:
            raise UserError(f"{where}: not a sample; it has id, messages and replies with id and text")
        try:
            check_turns(chat(record["messages"]), last="user")
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if record["id"] in found:
            raise UserError(f"{where}: sample {record['id']!r} is there twice; give each its own id")
        found[record["id"]] = record
    return found


def read_ratings(path, samples):
    """Checked ratings in the order of the file; of one annotator's on a sample the last of each kind."""
    found = {}
    for where, record in read_records(path) if Path(path).exists() else ():
        if isinstance(record, UserError):                       # what a kill left of a line
            print(f"{where}: left out, {record}", file=sys.stderr)
            continue
        try:
            check_rating(record, samples)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        found[record["sample"], record["annotator"], record["kind"]] = record
    return list(found.values())


def check_rating(record, samples):
    """Refuse a rating that does not fit its sample."""
    missing = [k for k in ("sample", "annotator", "kind") if not isinstance(record, dict) or k not in record]
    if missing:
        raise UserError(f"a rating has no {missing[0]!r}; it has sample, annotator, kind, and ranking or "
                        f"scores")
    if record["sample"] not in samples:
        raise UserError(f"sample {record['sample']!r} is not among the samples; give the file that was rated")
    if record["kind"] not in KINDS:
        raise UserError(f"kind {shown(record['kind'])} is unknown; use {', '.join(KINDS)}")
    known = [reply["id"] for reply in samples[record["sample"]]["replies"]]
    key = "scores" if record["kind"] == "rubric" else "ranking"
    if key not in record:
        raise UserError(f"a {record['kind']} has no {key!r}")
    if key == "ranking":
        check_ranking(record["ranking"], known, whole=record["kind"] == "ranking")
        return
    if not isinstance(record["scores"], dict) or not record["scores"]:
        raise UserError(f"scores {shown(record['scores'])} is not an object of marks by reply")
    for reply, marks in record["scores"].items():
        if reply not in known:
            raise UserError(f"reply {reply!r} is unknown; the sample has {', '.join(known)}")
        if not isinstance(marks, dict) or set(marks) != set(ASPECTS):
            raise UserError(f"marks of {reply} are {shown(marks)}; give {', '.join(ASPECTS)}")
        for aspect, mark in marks.items():
            if isinstance(mark, bool) or not isinstance(mark, (int, float)) or not 1 <= mark <= 5:
                raise UserError(f"{aspect} {shown(mark)} of {reply} is no mark; marks go from 1 to 5")


def check_ranking(ranking, known, whole):
    """Refuse a ranking that names a reply twice, one that is not there, or (whole) not all of them."""
    if not isinstance(ranking, list) or not all(isinstance(tie, list) and tie for tie in ranking):
        raise UserError(f"ranking {shown(ranking)} is not a list of lists of replies, the best first")
    named = [reply for tie in ranking for reply in tie]
    for reply in named:
        if reply not in known:
            raise UserError(f"reply {shown(reply)} is unknown; the sample has {', '.join(known)}")
        if named.count(reply) > 1:
            raise UserError(f"reply {reply!r} is in the ranking {named.count(reply)} times")
    if len(named) < 2:
        raise UserError(f"ranking {shown(ranking)} names {len(named)} reply; nothing is compared")
    skipped = [reply for reply in known if reply not in named]
    if whole and skipped:
        raise UserError(f"the ranking skips reply {skipped[0]!r}; rank all {len(known)}, equal ones together")


def levels(rating):
    """{reply: number, larger = better} of a rating, from the mean mark or the place in the ranking."""
    if rating["kind"] == "rubric":
        return {id: sum(marks.values()) / len(marks) for id, marks in rating["scores"].items()}
    return {id: -place for place, tie in enumerate(rating["ranking"]) for id in tie}


def records_of(ratings, samples, form):
    """Training records of ratings; what one annotator said of a sample stays together where the form can."""
    lines = []
    for rating in ratings:
        found = samples[rating["sample"]]
        texts, by_reply = {reply["id"]: reply["text"] for reply in found["replies"]}, levels(rating)
        if form == "scores" and rating["kind"] != "rubric":
            continue
        if form in ("rankings", "scores") and len(by_reply) > (form == "rankings"):
            best_first = sorted(set(by_reply.values()), reverse=True)
            value = {"rank": lambda level: best_first.index(level) + 1, "score": lambda level: level}
            key = "rank" if form == "rankings" else "score"
            lines.append({"messages": found["messages"], "outputs": [
                {"response": texts[id], key: value[key](level)} for id, level in by_reply.items()]})
        elif form in ("pairs", "triples"):
            lines += [pair(found["messages"], texts[a], texts[b], form)
                      for a in by_reply for b in by_reply if by_reply[a] > by_reply[b]]
    return lines


def pair(messages, better, worse, form):
    """A record of two replies."""
    if form == "triples":
        return {"question": messages[-1]["content"], "accepted": better, "rejected": worse}
    return {"messages": messages, "chosen": better, "rejected": worse}


def append(path, record):
    """Add one line to a file at once, so that a kill loses nothing and two raters do not mix."""
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    with about(path):
        with open(path, "ab+", buffering=0) as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":                       # a kill has cut the last line off
                    line = b"\n" + line
            file.write(line)
            os.fsync(file.fileno())


def in_order_of(annotator, found, kind):
    """The replies that this annotator is asked about, in an order of their own."""
    order = draws(0, f"{annotator} {found['id']}", 0, len(found["replies"])).argsort(kind="stable")
    return [found["replies"][i] for i in order][:2 if kind == "choice" else None]


def read_thumbs(path):
    """Checked thumbs of a file."""
    found = []
    for where, record in read_records(path):
        try:
            check_thumb(record)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        found.append(record)
    return found


def check_thumb(record):
    """Refuse what is no thumb up or down on a reply."""
    if (not isinstance(record, dict) or not {"messages", "reply", "thumb"} <= record.keys()
            or record["thumb"] not in (1, -1) or not isinstance(record["reply"], str)):
        raise UserError("not a thumb; it has messages, reply and thumb, 1 or -1")
    check_turns(chat(record["messages"]), last="user")
