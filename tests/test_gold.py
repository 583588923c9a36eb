"""Gold orders replies as a person would; neither length nor single words give its order away."""

import re

import numpy as np
import pytest

from data.gold import ASPECTS, gold, rate
from data.instructions import ELEMENTS, SHARES, asking, demonstrate, example, forget, make_request, perfect
from data.rules import LANGUAGES, load
from data.world import generator, sentences, tell

SPACE = {"en": " ", "zh": ""}
OFF_GRAMMAR = {"en": "Stock prices fell sharply on Monday after the bank raised interest rates again.",
               "zh": "受央行加息影响，周一股市大幅下跌。"}


def tale_request(seed, language, elements="htp"):
    """A request for a tale with these elements, and a generator for its replies."""
    draw = generator("gold", seed, language)
    request = make_request(draw, "tale", language, "train")
    return request | {"elements": ELEMENTS[elements]}, draw


def replies(seed, language):
    """{name of a fault: a reply with it} for one request of three elements."""
    request, draw = tale_request(seed, language)
    space, facts, row = SPACE[language], request["facts"], load().row
    whole = perfect(request, draw)
    parts = sentences(whole, language)
    others = (make_request(generator("other", seed, i), "tale", language, "train")["facts"]
              for i in range(99))
    other = next(o for o in others if not {facts["hero"], facts["friend"]} & {o["hero"], o["friend"]})
    stranger = sentences(tell(other, language, draw, "short")[0], language)
    words = [row(role, facts[role])[language][""] for role in request["elements"]]
    there = "zh" if language == "en" else "en"
    one_less = {**request, "elements": ["thing"]}
    return request, {
        "perfect": whole,
        "misses one element": tell(forget(one_less, draw), language, draw, "short")[0],
        "misses all elements": tell(other, language, draw, "short")[0],
        "repeats a sentence": space.join([*parts, parts[-1]]),
        "repeats it four times": space.join([*parts, *[parts[-1]] * 4]),
        "rambles": space.join([parts[0], stranger[0], *parts[1:]]),
        "rambles on and on": space.join([*parts, *stranger, *stranger]),
        "breaks off": whole[:-len(parts[-1]) // 2].rstrip(),
        "another language": tell(facts, there, draw, "short")[0],
        "copies the request": asking(draw, request, "train"),
        "keywords": ("、" if language == "zh" else ", ").join(words),
        "off the grammar": OFF_GRAMMAR[language],
        "empty": "",
    }


ORDER = [       # each line: the left is better than every one on the right, for any request
    ("perfect", ["misses one element", "repeats a sentence", "rambles", "breaks off"]),
    ("misses one element", ["misses all elements", "another language", "keywords", "off the grammar"]),
    ("repeats a sentence", ["repeats it four times", "copies the request", "keywords"]),
    ("rambles", ["rambles on and on", "another language", "keywords"]),
    ("breaks off", ["another language", "copies the request", "off the grammar", "empty"]),
    ("misses all elements", ["empty", "off the grammar"]),
    ("keywords", ["empty"]), ("copies the request", ["empty"]), ("another language", ["empty"]),
]


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("seed", range(6))
def test_replies_are_ordered_as_by_a_person(seed, language):
    """Thirteen replies to each of six requests: 78 a language."""
    request, all_replies = replies(seed, language)
    marks = {name: gold(request, reply) for name, reply in all_replies.items()}
    assert marks["perfect"] == 5 and marks["empty"] == 1
    for better, worse in ORDER:
        for name in worse:
            assert marks[better] > marks[name], (better, name, marks, all_replies[better], all_replies[name])
    for name in ("another language", "keywords", "off the grammar", "copies the request"):
        assert marks[name] <= 3, (name, marks[name], rate(request, all_replies[name]), all_replies[name])


@pytest.mark.parametrize("language", LANGUAGES)
def test_each_fault_costs_on_its_own_side(language):
    """Missing costs accuracy, rambling relevance or concision, breaking off naturalness, length concision."""
    for seed in range(6):
        request, found = replies(seed, language)
        marks = {name: rate(request, reply) for name, reply in found.items()}
        missing, repeated = marks["misses one element"], marks["repeats it four times"]
        assert missing["accuracy"] <= 3 and missing["naturalness"] >= 4
        assert marks["rambles on and on"]["relevance"] <= 3 and marks["rambles on and on"]["concision"] <= 3
        assert marks["breaks off"]["naturalness"] <= 3
        assert repeated["concision"] <= 3 and repeated["naturalness"] <= 2
        assert marks["off the grammar"]["naturalness"] == 1 and marks["another language"]["relevance"] == 1
        assert marks["keywords"]["naturalness"] == 1
        assert all(set(m) == set(ASPECTS) and all(m[a] in range(1, 6) for a in m) for m in marks.values())


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize("task", SHARES)
def test_a_perfect_writer_reaches_the_ceiling(task, language):
    for seed in range(25):
        found = example(seed, task, language, "val")
        for reference in found.references:
            assert gold(found.request, reference) == 5, (
                reference, rate(found.request, reference), found.messages)


@pytest.mark.parametrize("language", LANGUAGES)
def test_answers_are_right_or_wrong(language):
    """A right answer, one about another tale, a tale instead of an answer, in this order."""
    for task in ("who", "where", "what", "why", "mood", "about", "list", "summary", "translate", "chat"):
        for seed in range(5):
            draw = generator("answers", seed, task, language)
            request = make_request(draw, task, language, "train")
            other = make_request(draw, task, language, "train")
            while other["about"] == request["about"] and task in ("chat", "about") or any(
                    other["facts"][role] == request["facts"][role]
                    for role in ("hero", "friend", "place", "after", "plot")):
                other = make_request(draw, task, language, "train")
            right, wrong = perfect(request, draw), perfect(other, draw)
            tale = tell(other["facts"], language, draw, "short")[0]
            assert gold(request, right) == 5 > gold(request, wrong) > 1, (task, right, wrong)
            assert gold(request, tale) <= 3 or task in ("summary", "translate"), (
                task, tale, rate(request, tale))


def demonstrated_pairs(language, n, start):
    """n pairs of demonstrations of one request each, with different gold: [(better, worse)]."""
    pairs, seed = [], start
    while len(pairs) < n:
        draw = generator("pairs", seed, language)
        request = make_request(draw, "tale", language, "train")
        a, b = demonstrate(request, draw), demonstrate(request, draw)
        if gold(request, a) != gold(request, b):
            pairs.append((a, b) if gold(request, a) > gold(request, b) else (b, a))
        seed += 1
    return pairs


def bag(text, language):
    return re.findall(r"[A-Za-z']+|[.!?\",]", text) if language == "en" else list(text)


def bag_of_words_accuracy(train, test, language):
    """Logistic regression on differences of word counts.

    By gradient: Newton's steps would need more words than pairs.
    """
    words = sorted({w for pair in train for text in pair for w in bag(text, language)})
    vocabulary = {w: i for i, w in enumerate(words)}

    def differences(pairs):
        x = np.zeros((len(pairs), len(vocabulary)))
        for row, (better, worse) in zip(x, pairs):
            for sign, text in ((1, better), (-1, worse)):
                for word in bag(text, language):
                    if word in vocabulary:
                        row[vocabulary[word]] += sign
        return x

    x, w = differences(train), np.zeros(len(vocabulary))
    for _ in range(300):
        w += 0.5 * (x.T @ (1 / (1 + np.exp(x @ w))) / len(x) - 1e-3 * w)
    margin = differences(test) @ w
    return np.mean(margin > 0) + np.mean(margin == 0) / 2


def check_cheap_baselines(language, n):
    train, test = demonstrated_pairs(language, n, 0), demonstrated_pairs(language, n, 1_000_000)
    longer = np.array([np.sign(len(a) - len(b)) for a, b in test])
    by_length = np.mean(longer > 0) + np.mean(longer == 0) / 2
    by_words = bag_of_words_accuracy(train, test, language)
    print(f"{language}: {n} pairs, length alone {max(by_length, 1 - by_length):.3f}, "
          f"bag of words {by_words:.3f}")
    assert max(by_length, 1 - by_length) <= 0.60 and by_words <= 0.72


@pytest.mark.parametrize("language", LANGUAGES)
def test_length_and_words_do_not_give_gold_away(language):
    check_cheap_baselines(language, 500)


@pytest.mark.full
@pytest.mark.parametrize("language", LANGUAGES)
def test_length_and_words_do_not_give_gold_away_over_2000_pairs(language):
    check_cheap_baselines(language, 2000)


@pytest.mark.parametrize("language", LANGUAGES)
def test_demonstrations_leave_room_above_them(language):
    """The ceiling lies well above the writers: in units of the spread of their gold."""
    marks = []
    for seed in range(400):
        draw = generator("room", seed, language)
        request = make_request(draw, "tale", language, "train")
        marks.append(gold(request, demonstrate(request, draw)))
    share, room = np.mean(np.array(marks) == 5), (5 - np.mean(marks)) / np.std(marks)
    print(f"{language}: mean {np.mean(marks):.2f}, sd {np.std(marks):.2f}, perfect {share:.2f}, "
          f"ceiling {room:.2f} sd above")
    assert 0.05 < share < 0.3 and room > 1.2


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_reply_is_too_odd_to_be_marked(language):
    """Untrained models say anything: a lone quotation mark once had no sentence to count."""
    request = make_request(generator("odd", language), "tale", language, "train")
    for text in ('"', "“", '""', "...", "\ufffd!", "。", "“”。", "\n.\n", "1. 2. 3.", '" " "'):
        marks = rate(request, text)
        assert set(marks) == set(ASPECTS) and all(1 <= mark <= 5 for mark in marks.values()), text
        assert sum(marks.values()) < 14, (text, marks)
