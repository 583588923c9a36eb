"""Instructions on the story world: requests, replies by writers of varying skill, records in seven formats.

    python -m data.instructions --out_dir DATA

Writes DATA/{sft,eval,prompts}_{train,val}.jsonl, DATA/copying_train.jsonl (lists and beginnings of tales: a
first lesson in copying), DATA/requests.jsonl, and what is said in sft_train as plain text for the tokenizer,
DATA/said_train.txt. Everything follows from facts, so right answers are known. Tales come from writers who
forget, ramble, repeat or break off, so that there is something to prefer; other tasks are answered well. Not
here: marks for replies (gold.py).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from cli import UserError, option, parse_config, progress_bar, run, write_text
from data.read import SEPARATOR
from data.rules import LANGUAGES, load
from data.world import draw_facts, generator, sentences, split_of, tell
from records import to_messages

SHARES = {"tale": 12, "continue": 1, "summary": 1, "translate": 2, "who": 3, "where": 3, "what": 2, "why": 2,
          "mood": 1, "about": 1, "list": 1, "chat": 1}              # of the SFT examples
ELEMENTS = {"ht": ["hero", "thing"], "hp": ["hero", "place"], "hf": ["hero", "friend"],
            "htp": ["hero", "thing", "place"], "hft": ["hero", "friend", "thing"]}
CHATS = "name", "skill", "maker", "greeting", "thanks", "bye", "chinese"
CHARACTER = "kind", "trait", "home", "likes"
FACT_NAMES = {"en": dict(zip(CHARACTER, ("kind", "character", "home", "favourite food"))),
              "zh": dict(zip(CHARACTER, ("种类", "性格", "住处", "最爱吃的")))}
WRITERS = 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3        # faults that writers make in a tale; each as likely
FAULTS = "forget", "stray", "repeat", "repeat", *["break off"] * 10, *["ramble"] * 12
SAID = 40_000           # training records whose words the tokenizer learns: 10 MB beside the tales' 80


class Example(NamedTuple):
    """One request with one demonstration."""
    id: str
    task: str
    language: str           # of the reply
    record: dict | list     # the demonstration in one of the seven formats
    messages: list          # what the user sends
    request: dict           # the structured wish; gold.py marks replies by it
    references: list        # good replies
    label: str | None


def example(seed, task, language, split):
    """Example number `seed` of a task, language and split.

    "val" has held-out facts, and held-out phrasings half the time.
    """
    draw = generator("example", seed, task, language, split)
    request = make_request(draw, task, language, split)
    ask = asking(draw, request, split)
    reply = opening(request, draw) if task == "opening" else demonstrate(request, draw)
    record = record_of(request, ask, reply)
    messages = to_messages(record)[:-1]
    label = reply if task == "mood" else None
    n = {"mood": 1, "list": 1, "about": 1, "continue": 1, "tale": 3}.get(task, 12)  # nearly all right ones
    references = [perfect(request, draw) for _ in range(n)]
    return Example(f"{split}-{task}-{language}-{seed}", task, language, record, messages, request,
                   list(dict.fromkeys(references)), label)


# ---- requests

def make_request(draw, task, language, split):
    """What is wished, as data: all that a perfect reply and its marks depend on."""
    facts, opens = short_facts(draw, split), task == "opening"
    task = "tale" if opens else task
    request = {"task": task, "language": language, "facts": facts, "elements": [], "sentences": [1, 1],
               "about": None, "sources": ""}
    said = "zh" if task == "translate" and language == "en" else "en" if task == "translate" else language
    if task == "tale":
        asked = [roles for roles in ELEMENTS.values() if "place" in roles or not opens]
        request |= {"elements": list(pick(draw, asked)), "sentences": [2, 3]}
    elif task == "continue":
        tale = sentences(tell(facts, language, draw, "short")[0], language)
        rest = (" " if language == "en" else "").join(tale[1:])
        request |= {"sources": tale[0], "sentences": [len(tale) - 1] * 2, "about": rest}
    elif task in ("summary", "list", "who", "where"):
        request |= {"sources": tell(facts, language, draw, "short")[0]}
    elif task == "translate":
        request |= {"sources": tell(facts, said, draw, "summary")[0]}
    elif task in ("what", "why"):
        request |= {"sources": tell(facts, language, draw, "text.what" if task == "what" else "short")[0]}
    elif task == "mood":
        request |= {"sources": tell(facts, language, draw, "text.mood")[0]}
    elif task == "about":
        request |= {"about": facts["hero"], "sentences": [4, 4]}
    elif task == "chat":
        request |= {"about": pick(draw, CHATS), "sentences": [1, 2]}
    return request


def short_facts(draw, split):
    """Facts of a tale of this split with every role that its full form has, told in its short form."""
    while True:
        facts = draw_facts(draw, load(), form="full")
        if split_of(facts) == split:
            return facts | {"form": "short"}


def pick(draw, items):
    return items[int(draw.random() * len(items))]


def asking(draw, request, split):
    """The user's words, without the text that the request is about."""
    task, name = request["task"], f"ask.{request['task']}"
    if task in ("mood", "about"):
        return ""
    if task == "tale":
        name += "." + next(k for k, roles in ELEMENTS.items() if roles == request["elements"])
    if task == "chat":
        name += "." + request["about"]
    if split == "val" and draw.random() < 0.5:
        name += ".held_out"
    return tell(request["facts"], request["language"], draw, name)[0]


# ---- replies

def perfect(request, draw):
    """A reply that deserves full marks."""
    task, facts, language = request["task"], request["facts"], request["language"]
    if task in ("tale", "summary", "translate"):
        return tell(facts, language, draw, "short" if task == "tale" else "summary")[0]
    if task == "continue":
        return request["about"]
    row = {role: load().row(role, facts[role])[language][""]
           for role in ("hero", "friend", "thing", "place", "after")}
    if task == "mood":
        return row["after"]
    if task == "list":
        return "\n".join(f"{i}. {row[role]}"
                         for i, role in enumerate(("hero", "friend", "thing", "place"), 1))
    if task == "about":
        return to_messages(record_of(request, "", ""))[-1]["content"]
    name = f"answer.chat.{request['about']}" if task == "chat" else f"answer.{task}"
    return tell(facts, language, draw, name)[0]


def opening(request, draw):
    """A perfect tale up to the place that was asked for.

    English says "in the park" but "near the windmill": the word before must already know the place, and in
    whole tales that is one word in a hundred, too few to be learnt from (LOG.md).
    """
    language = request["language"]
    row, parts = load().row("place", request["facts"]["place"])[language], []
    for part in sentences(perfect(request, draw), language):
        parts.append(part)
        if any(name.lower() in part.lower() for name in row.values()):
            break
    return (" " if language == "en" else "").join(parts)


def demonstrate(request, draw):
    """A reply by a writer of varying skill: a tale has up to four of FAULTS; all else is perfect."""
    if request["task"] != "tale":
        return perfect(request, draw)
    n_faults = pick(draw, WRITERS)
    faults = {pick(draw, FAULTS) for _ in range(n_faults)}
    language, facts = request["language"], request["facts"]
    if "stray" in faults and draw.random() < 0.3:                   # answers something else altogether
        other = short_facts(draw, split_of(facts))
        return tell(other, language, draw, pick(draw, ("summary", "short", "answer.where")))[0]
    if "forget" in faults or "stray" in faults:
        facts = forget(request, draw)
    parts = sentences(tell(facts, language, draw, "short")[0], language)
    if "ramble" in faults:
        other = short_facts(draw, split_of(facts))
        parts.insert(int(draw.random() * len(parts)) + 1,
                     pick(draw, sentences(tell(other, language, draw, "short")[0], language)))
    if "repeat" in faults:
        i = int(draw.random() * len(parts))
        parts.insert(i + 1, parts[i])
    text = (" " if language == "en" else "").join(parts)
    return break_off(text, parts[-1], draw) if "break off" in faults else text


def forget(request, draw):
    """The facts with another row of the plot's pool in place of one or more elements asked for."""
    facts, grammar = dict(request["facts"]), load()
    roles = [role for role in request["elements"] if draw.random() < 0.5] or [pick(draw, request["elements"])]
    for role in roles:
        taken = {facts["hero"], facts["friend"], facts[role]}
        pool = [key for key in grammar.pool(facts["plot"], role) if key not in taken]
        facts[role] = pick(draw, pool)
    return facts


def break_off(text, last, draw):
    """Cut the text inside its last sentence."""
    cut = len(text) - len(last) + int(len(last) * (0.3 + 0.5 * draw.random()))
    return text[:cut].rsplit(" ", 1)[0].rstrip(" ,") if " " in last else text[:cut].rstrip("，。")


# ---- records

def record_of(request, ask, reply):
    """A demonstration in the format that this task is kept in (the seven of the tutorial)."""
    task, source, language = request["task"], request["sources"], request["language"]
    if task == "tale":
        return {"instruction": ask, "output": reply}
    if task == "list":
        items = [line.split(". ", 1)[1] for line in reply.split("\n")]
        return {"instruction": ask, "input": source, "output": items}
    if task == "summary":
        return {"instruction": ask, "input": source, "output": reply}
    if task == "continue":
        return {"prompt": f"{ask}\n{source}", "completion": reply}
    if task == "translate":
        return {"input": f"{ask}\n{source}", "target": reply}
    if task == "mood":
        return {"text": source, "label": reply}
    if task == "about":
        row = load().row("character", request["about"])[language]
        return {"entity": row[""], "facts": [{"fact": FACT_NAMES[language][fact], "value": row[fact]}
                                             for fact in CHARACTER]}
    if task == "chat":
        return [{"role": "user", "content": ask}, {"role": "assistant", "content": reply}]
    return {"question": f"{source}\n{ask}", "answer": reply}


# ---- files

@dataclass
class InstructionsConfig:
    """Write instructions on the story world: SFT records, evaluation examples, prompts, their requests."""
    out_dir: str = option("out/instructions", "directory of the files; they are written over")
    examples: int = option(12_000, "SFT training records; a tenth as many, at most 2,400, for validation and "
                                   "for evaluation")
    prompts: int = option(3_000, "prompts for RLHF; 4 in 10 as many for validation, at least 1,000 if "
                                 "they are that many")
    seed: int = option(0, "number of the first example")

    def __post_init__(self):
        for name in ("examples", "prompts"):
            if getattr(self, name) < 20:
                raise UserError(f"--{name} {getattr(self, name)} must be at least 20")


def plan(n, shares):
    """n pairs (task, language) in the proportions of `shares`, languages in turn, mixed evenly."""
    tasks = [task for task, share in shares.items() for _ in range(share)]
    tasks = tasks[::2] + tasks[1::2]                                # no long stretch of one task
    return [(tasks[i % len(tasks)], LANGUAGES[i // len(tasks) % 2]) for i in range(n)]


def write_files(config):
    """Write all files; returns {name: records}."""
    out_dir, counts, requests, said = Path(config.out_dir), {}, {}, []
    out_dir.mkdir(parents=True, exist_ok=True)
    prompt_shares = {"tale": 8, "who": 1, "why": 1}
    few = min(config.examples // 10, 2_400)
    sizes = {("sft", "train"): (config.examples, SHARES), ("sft", "val"): (few, SHARES),
             ("eval", "train"): (few, dict.fromkeys(SHARES, 1)),
             ("eval", "val"): (few, dict.fromkeys(SHARES, 1)),
             ("copying", "train"): (config.examples // 5, {"list": 1, "opening": 1}),
             ("prompts", "train"): (config.prompts, prompt_shares),
             ("prompts", "val"): (max(config.prompts * 4 // 10, min(1_000, config.prompts)), prompt_shares)}
    start = config.seed
    with progress_bar(total=sum(n for n, _ in sizes.values()), desc="instructions") as bar:
        for (kind, split), (n, shares) in sizes.items():
            records = []
            for i, (task, language) in enumerate(plan(n, shares)):
                found = example(start + i, task, language, split)
                records.append(record_for(kind, found))
                if kind in ("eval", "prompts"):
                    requests[found.id] = found.request
                elif (kind, split) == ("sft", "train") and i < SAID:
                    said += [message["content"] for message in to_messages(found.record)]
                bar.update()
            start += n                                              # no example is in two files
            name = f"{kind}_{split}.jsonl"
            write_jsonl(out_dir / name, records)
            counts[name] = n
    wishes = [{"id": id, "request": request} for id, request in requests.items()]
    write_jsonl(out_dir / "requests.jsonl", wishes)
    write_text(out_dir / "said_train.txt", f"\n{SEPARATOR}\n".join(said) + "\n")
    return counts | {"requests.jsonl": len(requests), "said_train.txt": len(said)}


def record_for(kind, found):
    """What one example is in a file of that kind."""
    if kind in ("sft", "copying"):
        return found.record
    if kind == "prompts":
        return {"id": found.id, "messages": found.messages}
    return {"id": found.id, "task": found.task, "language": found.language, "messages": found.messages,
            "references": found.references, "labels": [found.label] if found.label else None}


def write_jsonl(path, records):
    """Write records, one a line."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def main(config):
    """Write the files and say what is in them."""
    for name, n in write_files(config).items():
        print(f"{config.out_dir}/{name}: {n:,} records")


if __name__ == "__main__":
    run(lambda: main(parse_config(InstructionsConfig)))
