"""The story world: tales whose facts, words and entropy are known exactly.

    python -m data.world --stories 5 --language zh

A tale is made in two steps: facts are drawn (who, where, what happens), then told by the rules of
data/grammar/ in English or Chinese. One grammar has three readings here: `tell` walks it at random,
`expected` sums over all walks by recursion, `Recogniser` runs it backwards. It draws with Python's Mersenne
Twister, whose random() is the same on every platform. Not here: questions about tales (instructions.py),
marks (gold.py).
"""

import hashlib
import json
import math
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from cli import UserError, option, parse_config, run, write_text
from data.read import SEPARATOR, language_of
from data.rules import CAPITAL, CORE, ENDS, LANGUAGES, ROLES, Choice, Grammar, Ref, Slot, check, load

SHORT = 0.15                # share of tales told in two or three sentences
HELD_OUT = 20               # one combination of core facts in so many is kept for validation


class Story(NamedTuple):
    """A tale, what is true in it, and the log2 of the probability of the choices that made it."""
    text: str
    facts: dict             # {"plot", "form": "full" | "short", role: key of its row, ...}
    log2_probability: float


# ---- first reading: draw facts, tell a tale

def generator(*seed):
    """A random.Random that depends on its arguments alone."""
    return random.Random(int.from_bytes(hashlib.sha256(json.dumps(seed).encode()).digest(), "big"))


def draw_facts(draw, grammar, form=""):
    """Facts of a tale; every role of the drawn plot and form (which is drawn, too, unless it is given)."""
    plots = list(grammar.plots)
    facts = {"plot": plots[int(draw.random() * len(plots))],
             "form": form or ("short" if draw.random() < SHORT else "full")}
    plot = facts["plot"]
    for role in grammar.roles[facts["form"]][plot]:
        pool = grammar.pool(plot, role)
        if role == "friend":
            pool = [key for key in pool if key != facts["hero"]]
        facts[role] = pool[int(draw.random() * len(pool))]
    return facts


def split_of(facts):
    """"val" for one combination of core facts in HELD_OUT, else "train"."""
    core = json.dumps([facts[role] for role in CORE])
    return "val" if int(hashlib.sha256(core.encode()).hexdigest(), 16) % HELD_OUT == 0 else "train"


def fact_bits(grammar, facts):
    """Bits of the draw of these facts, by kind: the plot and its frame, or names and things."""
    share = SHORT if facts["form"] == "short" else 1 - SHORT
    bits = {"plot": math.log2(len(grammar.plots)) - math.log2(share), "things": 0.0}
    for role in grammar.roles[facts["form"]][facts["plot"]]:
        pool = grammar.pool(facts["plot"], role)
        size = len(pool) - (role == "friend" and facts["hero"] in pool)
        bits["plot" if role in ("before", "after", "lesson") else "things"] += math.log2(size)
    return bits


def tell(facts, language, draw, name=None, grammar=None):
    """Tell facts by the rule `name` (None: a tale of facts["form"]); returns (text, bits of the telling)."""
    grammar = grammar or load()
    plot, out, bits = facts["plot"], [], 0.0
    forms = {role: grammar.row(role, facts[role])[language] for role in ROLES if role in facts}

    def walk(nodes):
        nonlocal bits
        for node in nodes:
            kind = type(node)
            if kind is str:
                out.append(node)
            elif kind is Slot:
                out.append(forms[node.role][node.form])
            else:
                if kind is Ref:
                    suffix = f".{facts[node.role]}" if node.role else ""
                    node = grammar.rule(language, plot, node.name + suffix)
                chosen, b = node.picks[int(draw.random() * len(node.picks))]
                bits += b
                walk(chosen)

    walk([Ref(name or facts["form"], "")])
    return capitals("".join(out)), bits


def capitals(text):
    """Carry out the marks for capitals."""
    return re.sub(f"{CAPITAL}+(.)", lambda match: match[1].upper(), text)


def story(seed, language, split="train", grammar=None):
    """The tale number `seed` of a split. The same seed has the same facts in both languages.

    Its probability is that of the unconditioned draw: which combinations are held out is not part of it.
    """
    if language not in LANGUAGES:
        raise UserError(f"language {language!r} must be one of {', '.join(LANGUAGES)}")
    if split not in ("train", "val"):
        raise UserError(f"split {split!r} must be train or val")
    grammar = grammar or load()
    draw = generator("facts", seed, split)
    facts = draw_facts(draw, grammar)
    while split_of(facts) != split:
        facts = draw_facts(draw, grammar)
    text, bits = tell(facts, language, generator("words", seed, split, language), grammar=grammar)
    return Story(text, facts, -bits - sum(fact_bits(grammar, facts).values()))


# ---- second reading: expectations over all tales

def expected(language, grammar=None):
    """Exact means over all tales: {"bits", "bytes", "bits_per_byte", "by_kind": {kind: bits}}.

    By recursion over the rules. Lengths and bits add up, so the mean of a line is the sum of the means of its
    parts, each under the marginal of the one role that it depends on; no independence between roles is
    needed. bits_per_byte = E[bits] / E[bytes] bounds the entropy of the text from above: two derivations may
    give one text.
    """
    grammar = grammar or load()
    kinds, n_bytes = Counter(), 0.0
    for plot in grammar.plots:
        for form, share in ("full", 1 - SHORT), ("short", SHORT):
            weight, roles = share / len(grammar.plots), grammar.roles[form][plot]
            given = {role: {key: 1 / len(grammar.pool(plot, role)) for key in grammar.pool(plot, role)}
                     for role in roles}
            given["friend"] = friend_given(given["hero"], grammar.pool(plot, "friend"))
            mean = fact_means(grammar, plot, form, given)
            words, length = Mean(grammar, language, plot).of(Ref(form, ""), given)
            kinds.update({"plot": weight * mean["plot"], "things": weight * mean["things"],
                          "phrasing": weight * words})
            n_bytes += weight * length
    bits = sum(kinds.values())
    return {"bits": bits, "bytes": n_bytes, "bits_per_byte": bits / n_bytes, "by_kind": dict(kinds)}


def friend_given(heroes, pool):
    """The marginal of a friend who is not the hero."""
    given = dict.fromkeys(pool, 0.0)
    for hero, p in heroes.items():
        rest = [key for key in pool if key != hero]
        for key in rest:
            given[key] += p / len(rest)
    return given


def fact_means(grammar, plot, form, given):
    """Mean of fact_bits over the heroes (the friend's pool is one smaller if the hero is in it)."""
    mean = Counter()
    for hero, p in given["hero"].items():
        for kind, bits in fact_bits(grammar, {"plot": plot, "form": form, "hero": hero}).items():
            mean[kind] += p * bits
    return mean


class Mean:
    """Mean (bits, bytes) of nodes of one plot; `given` has the marginals: {role: {key: probability}}."""

    def __init__(self, grammar, language, plot):
        self.grammar, self.language, self.plot, self.known = grammar, language, plot, {}

    def of(self, node, given):
        """(bits, bytes) of a node."""
        if isinstance(node, str):
            return 0.0, len(node.strip(CAPITAL).encode())
        if isinstance(node, Slot):
            return 0.0, sum(p * len(self.grammar.row(node.role, key)[self.language][node.form].encode())
                            for key, p in given[node.role].items())
        if isinstance(node, Ref) and node.role:
            parts = [(p, self.of(Ref(f"{node.name}.{key}", ""), {**given, node.role: {key: 1.0}}))
                     for key, p in given[node.role].items()]
            return tuple(sum(p * mean[i] for p, mean in parts) for i in range(2))
        if isinstance(node, Ref):
            key = node.name, tuple((role, *given[role]) for role in given if len(given[role]) == 1)
            if key not in self.known:
                self.known[key] = self.of(self.grammar.rule(self.language, self.plot, node.name), given)
            return self.known[key]
        bits, n_bytes = node.entropy, 0.0
        for weight, line in zip(node.weights, node.lines):
            parts = [self.of(part, given) for part in line.nodes]
            bits += weight * sum(b for b, _ in parts)
            n_bytes += weight * sum(n for _, n in parts)
        return bits, n_bytes


# ---- third reading: which sentences can the grammar produce?

SENTENCE = {    # a quotation ends the sentence if it was announced, or if no speaker follows
    "en": re.compile(r'(?:"[^"]*"|[^.!?"]|[.!?](?=\w))*?'
                     r'(?:[.!?]+(?=\s|$)|(?<=[,:] )"[^"]*[.!?]"|"[^"]*[.!?]"(?=\s+[A-Z"]|$)|$)\s*'),
    "zh": re.compile(r"(?:“[^”]*”|[^。！？“])*?(?:[。！？]|(?<=[：，])“[^”]*”|$)\s*")}


def sentences(text, language):
    """Split a text into its sentences."""
    return [part.strip() for part in SENTENCE[language].findall(text.strip()) if part.strip()]


class Recogniser:
    """Says of each sentence of a text whether the grammar can produce it, with one set of facts.

    What users say (rules named ask.*) is left out.
    """

    def __init__(self, language, grammar=None):
        self.language, self.grammar = language, grammar or load()
        self.union, self.units, self.knows = {}, [], lru_cache(50_000)(self.knows)
        for (plot, name), rule in self.grammar.rules[language].items():
            self.union.setdefault(name, []).extend((line, plot) for line in rule.lines)
            if not name.startswith("ask."):
                self.units += [(literals(nodes), nodes, plot)
                               for line in rule.lines for nodes in units(line.nodes)]

    def accepted(self, text):
        """[(sentence, good)] in the order of the text; a quotation may be one sentence with what follows."""
        parts, found = sentences(text, self.language), []
        while parts:
            two = (" " if self.language == "en" else "").join(parts[:2])
            quoted = len(parts) > 1 and parts[0][-1] in '"”'
            n = 2 if quoted and not self.knows(parts[0]) and self.knows(two) else 1
            found += [(part, n == 2 or self.knows(part)) for part in parts[:n]]
            parts = parts[n:]
        return found

    def knows(self, sentence):
        """Whether the grammar can produce this one sentence."""
        small = sentence.lower()
        return any(all(word in small for word in needed) and self.fits(nodes, plot, sentence)
                   for needed, nodes, plot in self.units)

    def tells(self, text, name, facts):
        """Whether a rule can tell the whole text with these facts; a role or plot not in them may be any."""
        known = {role: {key} for role, key in facts.items() if role in ROLES}
        return self.fits((Ref(name, ""),), facts.get("plot", ""), text, known)

    def fits(self, nodes, plot, text, known={}):
        """Whether the nodes can be the whole text, hero and friend being two."""
        for _, end, found in self.match(nodes, plot, text, 0, known):
            same = len(found.get("hero", ())) == 1 and found["hero"] == found.get("friend")
            if end == len(text) and not same:
                return True
        return False

    def match(self, nodes, plot, text, at, known):
        """Yield (text, position after the nodes, {role: keys it may have}) for each way they fit at `at`."""
        if not nodes:
            yield text, at, known
            return
        for text_, at_, known_ in self.match_one(nodes[0], plot, text, at, known):
            yield from self.match(nodes[1:], plot, text_, at_, known_)

    def match_one(self, node, plot, text, at, known):
        """The same for one node."""
        if node == CAPITAL:
            letter = text[at:at + 1]
            if not letter.islower():
                yield text, at, known
            if letter.isupper():                            # the grammar may have it small
                yield text[:at] + letter.lower() + text[at + 1:], at, known
        elif isinstance(node, str):
            if text.startswith(node, at):
                yield text, at + len(node), known
        elif isinstance(node, Slot):
            by_form = {}
            for key in known.get(node.role) or self.grammar.pool(plot, node.role):
                form = self.grammar.row(node.role, key)[self.language].get(node.form)
                by_form.setdefault(form, set()).add(key)
            for form, keys in by_form.items():
                if form and text.startswith(form, at):
                    yield text, at + len(form), {**known, node.role: frozenset(keys)}
        elif isinstance(node, Choice):
            for line in node.lines:
                yield from self.match(line.nodes, plot, text, at, known)
        elif node.role:
            for key in known.get(node.role) or self.grammar.pool(plot, node.role):
                yield from self.match_rule(f"{node.name}.{key}", plot, text, at, {**known, node.role: {key}})
        else:
            yield from self.match_rule(node.name, plot, text, at, known)

    def match_rule(self, name, plot, text, at, known):
        """The rule as the plot has it; where the plot is not known (""), as any has it."""
        if plot:
            yield from self.match_one(self.grammar.rule(self.language, plot, name), plot, text, at, known)
        else:
            for line, plot in self.union.get(name, ()):
                yield from self.match(line.nodes, plot, text, at, known)


def units(nodes):
    """The sentences of a line, tuples of nodes that open with CAPITAL; none if the line is no sentence."""
    if nodes[0] != CAPITAL:
        return
    start, quoted = 0, 0
    for i, node in enumerate(nodes):
        if isinstance(node, str):
            quoted = ((quoted + node.count('"')) % 2 if '"' in node
                      else quoted + node.count("“") - node.count("”"))
            if node == CAPITAL and i and not quoted and nodes[i - 1].rstrip()[-1:] in tuple(ENDS):
                yield (*nodes[start:i - 1], nodes[i - 1].rstrip())
                start = i
    yield nodes[start:]


def literals(nodes):
    """The literals that every text of these nodes has, in small letters, the longest first."""
    return sorted({node.lower() for node in nodes if isinstance(node, str) and node.strip(CAPITAL + " ")},
                  key=len, reverse=True)


def judge(text, recognisers):
    """(language, [(sentence, accepted)]) of a text."""
    language = language_of(text)
    return language, recognisers[language].accepted(text) if language in recognisers else []


# ---- command line

@dataclass
class WorldConfig:
    """Print tales of the story world, write files of them or say which sentences of a file it can produce."""
    stories: int = option(3, "tales to print")
    language: str = option("en", "en or zh")
    split: str = option("train", "train, or val: combinations of facts that train never has")
    seed: int = option(0, "number of the first tale")
    out_dir: str = option("", "instead, write {train,val}.{en,zh}.txt and entropy_bound.json there")
    megabytes: float = option(1.0, "text of each language to write for training; for validation a 20th, "
                                   "at most 0.5")
    recognise: str = option("", "instead, read tales from this file, parted by lines such as '--- 3', and "
                                "say which sentences the grammar cannot produce")
    tales: int = option(0, "of each language, to read from that file; 0 = all")
    check: bool = option(False, "only read the grammar and list what is wrong with it")


def main(config):
    if config.check:
        grammar = Grammar()
        print(*grammar.problems + list(check(grammar)) or ["the grammar is sound"], sep="\n")
    elif config.recognise:
        report_recognised(config.recognise, config.tales)
    elif config.out_dir:
        write_corpus(config.out_dir, config.megabytes, config.seed)
    else:
        for seed in range(config.seed, config.seed + config.stories):
            tale = story(seed, config.language, config.split)
            facts = "  ".join(f"{role} {key}" for role, key in tale.facts.items())
            print(f"{tale.text}\n  [{facts}; {-tale.log2_probability:.0f} bits in "
                  f"{len(tale.text.encode())} bytes]\n")


def write_corpus(out_dir, megabytes, seed):
    """Write files of tales for training and validation, and the bound on their entropy."""
    if megabytes <= 0:
        raise UserError(f"--megabytes {megabytes} must be above 0")
    out_dir, bound = Path(out_dir), {}
    out_dir.mkdir(parents=True, exist_ok=True)
    for language in LANGUAGES:
        bound[language] = round(expected(language)["bits_per_byte"], 6)
        for split, size in ("train", megabytes), ("val", min(megabytes / 20, 0.5)):
            texts, n_bytes = [], 0
            while n_bytes < size * 1e6:
                texts.append(story(seed + len(texts), language, split).text)
                n_bytes += len(texts[-1].encode())
            path = out_dir / f"{split}.{language}.txt"
            write_text(path, f"\n{SEPARATOR}\n".join(texts) + "\n")
            print(f"{path}: {len(texts):,} tales, {n_bytes / 1e6:.2f} MB")
    write_text(out_dir / "entropy_bound.json", json.dumps(bound) + "\n")
    print("entropy bound, bits/byte: " + "  ".join(f"{k} {v:.4f}" for k, v in bound.items()))


def report_recognised(path, n_tales):
    """Print the sentences that the grammar cannot produce, and the share that it can, by language."""
    recognisers = {language: Recogniser(language) for language in LANGUAGES}
    texts = re.split(r"^--- \d+\n", Path(path).read_text(encoding="utf-8"), flags=re.M)
    counts = {language: Counter() for language in (*LANGUAGES, "other")}
    for language, found in (judge(text, recognisers) for text in texts if text.strip()):
        if n_tales and counts[language]["tales"] == n_tales:
            continue
        counts[language].update(tales=1, sentences=len(found), accepted=sum(good for _, good in found))
        print(*(f"{language}: not in the grammar: {sentence}" for sentence, good in found if not good),
              sep="\n")
    for language, n in counts.items():
        if not n and language == "other":
            continue
        share = n["accepted"] / max(1, n["sentences"])
        print(f"{language}: {n['accepted']} of {n['sentences']} sentences ({share:.0%}) of {n['tales']} "
              "tales are of the grammar")


if __name__ == "__main__":
    run(lambda: main(parse_config(WorldConfig)))
