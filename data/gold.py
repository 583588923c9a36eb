"""Gold: a careful person's marks, 1-5, of a reply to a request of the story world on each side of the rubric.

accuracy: what was asked for is there and right. relevance: the asked kind of thing, about the asked subject,
in the asked language. naturalness: sentences that the grammar can produce, whole, unrepeated, with an end.
concision: as long as was asked. Only feedback.py (simulated annotators) and evaluate.py may import this; no
training stage sees it.
"""

import re
from functools import lru_cache

from data.instructions import perfect
from data.rules import load
from data.world import Recogniser
from metrics import in_chinese
from ratings import ASPECTS

NAMED = "hero", "friend", "thing", "place"              # what a summary or a list of a tale must hold
PEOPLE = "character"


def rate(request, reply):
    """{aspect: mark} for all ASPECTS, whole numbers 1-5. request: that of instructions.make_request."""
    text = reply.strip()
    if not text:
        return dict.fromkeys(ASPECTS, 1)
    found = Look(request, text)
    if not found.judged:                            # a lone quotation mark is no sentence
        return dict.fromkeys(ASPECTS, 1)
    marks = {"accuracy": accuracy(found), "relevance": relevance(found), "naturalness": naturalness(found),
             "concision": concision(found)}
    return {aspect: int(min(5, max(1, mark + 0.5))) for aspect, mark in marks.items()}


def gold(request, reply):
    """The mean of the four marks, 1.0-5.0."""
    return sum(rate(request, reply).values()) / len(ASPECTS)


@lru_cache
def recogniser(language):
    """One recogniser a language: it remembers sentences."""
    return Recogniser(language)


class Look:
    """What there is to see in a reply: its sentences, who and what it names, whether it is exactly right."""

    def __init__(self, request, text):
        self.request, self.text = request, text
        self.task, self.language = request["task"], request["language"]
        self.judged = recogniser(self.language).accepted(text)
        self.good = [sentence for sentence, good in self.judged if good]
        self.named = named(text, self.language)
        self.named_well = named(" ".join(self.good), self.language)
        self.exact = self.is_exact()

    def is_exact(self):
        """Whether the grammar can give just this reply to just this request."""
        request, facts, tells = self.request, self.request["facts"], recogniser(self.language).tells
        if self.task == "tale":
            asked = {role: facts[role] for role in request["elements"]}
            return any(tells(self.text, "short", {**asked, "plot": plot}) for plot in load().plots)
        if self.task in ("summary", "translate"):
            return tells(self.text, "summary", facts)
        if self.task == "continue":
            space = " " if self.language == "en" else ""
            return tells(request["sources"] + space + self.text, "short", facts)
        if self.task == "chat":
            return tells(self.text, f"answer.chat.{request['about']}", facts)
        if self.task in ("who", "where", "what", "why"):
            return tells(self.text, f"answer.{self.task}", facts)
        return self.text == perfect(request, None)

    def has(self, role):
        """1 if a fact stands in a good sentence, a half if only in another."""
        key = self.request["facts"][role]
        return 1 if key in self.named_well else 0.5 if key in self.named else 0


def named(text, language):
    """The keys of all people, things and places that a text names."""
    return {key for pattern, keys in names(language) for word in pattern.findall(text) for key in keys[word]}


@lru_cache
def names(language):
    """One pattern for every table, and what its words stand for: [(pattern, {word: keys})]."""
    found = []
    for table in (PEOPLE, "thing", "place"):
        words = {}
        for key, row in load().tables[table].items():
            forms = ("",) if table != "place" else ("", "in", "to") if language == "en" else ("",)
            for form in forms:
                words.setdefault(row[language][form], set()).add(key)
        options = "|".join(sorted(map(re.escape, words), key=len, reverse=True))
        found.append((re.compile(rf"\b(?:{options})\b" if language == "en" else options), words))
    return found


# ---- the four sides

def accuracy(look):
    """5 for just right; else by the share of what was asked for that is there."""
    if look.exact:
        return 5
    request, facts = look.request, look.request["facts"]
    if look.task == "tale":
        missing = sum(1 - look.has(role) for role in request["elements"])
        return 5 - 2 * missing - (missing == len(request["elements"]))
    if look.task in ("summary", "translate", "continue"):
        return 4 - sum(1 - look.has(role) for role in NAMED) * 0.75
    if look.task == "list":
        return 1 + 3 * sum(facts[role] in look.named for role in NAMED) / len(NAMED)
    if look.task == "about":
        return 1 + 3 * sum(part in look.text for part in re.split(r"(?<=[.。])\s*", perfect(request, None))
                           if part) / 4
    if look.task == "mood":
        words = [load().row(role, facts[role])[look.language][""] for role in ("after", "before")]
        return 4 if words[0] in look.text and words[1] not in look.text else 1
    if look.task in ("who", "where"):
        table, key = (PEOPLE, facts["friend"]) if look.task == "who" else ("place", facts["place"])
        others = look.named & set(load().tables[table]) - {key, facts["hero"]}
        return 4 if key in look.named and not others else 1
    return 1 + look.has("hero") + (look.task != "chat") * look.has("thing")


def relevance(look):
    """Is it what was asked for, about what was asked for, in the language that was asked for?"""
    if look.exact:
        return 5
    if re.search(r"\w", look.text) and in_chinese(look.text) != (look.language == "zh"):
        return 1
    if look.task in ("mood", "list", "about"):
        return accuracy(look)
    if look.task in ("who", "where", "what", "why", "chat"):
        kind = answers_as(look)
        return 1 + 3 * kind if len(look.judged) <= 2 else 1 + kind
    people, things = (set(load().tables[table]) for table in (PEOPLE, "thing"))
    facts, roles = look.request["facts"], look.request["elements"] or NAMED
    asked = {facts[role] for role in roles}
    guests = 1 if look.task == "tale" and "friend" not in roles else 0      # a tale may bring in one more
    strangers = max(0, len(look.named & people - asked) - guests)
    strange = max(0, len(look.named & things - asked) - (look.task == "tale" and "thing" not in roles))
    tale_like = len([s for s in look.good if not is_answer(s, look.language)]) / len(look.judged)
    about_it = any(look.has(role) for role in roles if role != "place")
    return 1 + 4 * tale_like * (1 if about_it else 0.25) - 1.5 * strangers - 0.5 * strange


def answers_as(look):
    """Whether the reply has the form of an answer to this question: 1, or 0."""
    rule = f"answer.chat.{look.request['about']}" if look.task == "chat" else f"answer.{look.task}"
    return any(is_answer(sentence, look.language, rule) for sentence in look.good)


@lru_cache(50_000)
def is_answer(sentence, language, rule="answer"):
    """Whether a sentence is an answer to a question (of that rule) rather than part of a tale."""
    found = recogniser(language)
    rules = {name for _, name in load().rules[language] if name == rule or name.startswith(rule + ".")}
    return any(found.tells(sentence, name, {}) for name in sorted(rules))


def naturalness(look):
    """Good sentences, none twice, an end; only a whole and coherent reply deserves 5."""
    if look.exact:
        return 5
    if look.task in ("mood", "list"):
        return accuracy(look)
    repeated = len(look.judged) - len({sentence for sentence, _ in look.judged})
    mark = 1 + 4 * len(look.good) / len(look.judged) - 1.5 * repeated
    if look.text[-1] not in ".!?\"。！？”":
        mark -= 1
    return min(4, mark)


def concision(look):
    """5 for the number of sentences that was asked for; each one too many costs 1, each too few 1.5."""
    if look.exact:
        return 5
    least, most = look.request["sentences"]
    n = len(look.judged)
    if look.task in ("mood", "list"):
        return 4 if len(look.text) <= 2 * len(perfect(look.request, None)) else 2
    mark = 5 - max(0, n - most) - 1.5 * max(0, least - n)
    words = len(look.text.split()) if look.language == "en" else len(look.text) / 2
    return mark - (words < 4 * least) - (words > 22 * most)
