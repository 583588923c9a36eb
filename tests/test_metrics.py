"""Metrics against worked cases, brute force and, where they are installed, the usual libraries."""

import itertools
import math
import random

import pytest

import metrics
from metrics import (accuracy, bleu, distinct_n, exact_match, precision_recall_f1, repetition_rate, rouge,
                     token_f1, words)

EN = ["The cat sat on the mat, and it purred.", "He paid 3.50 for two books - a fair price!", "Yes.", "",
      "a a a a b b", "It costs $1,000.00 (about 900 euros); nobody's fault.",
      "state-of-the-art 1990-95 results"]
ZH = ["小狐狸跑到磨坊里，唱了一首歌。", "他花了3.5元买书！", "好。", "", "“你好，”她说——“再见……”", "第2天，A小姐带着2只猫走了。"]


def variants(texts, seed):
    """Each text with some characters or words lost or moved."""
    draw, found = random.Random(seed), []
    for text in texts:
        parts = text.split(" ") if " " in text else list(text)
        parts = [p for p in parts if draw.random() > 0.25]
        draw.shuffle(parts) if draw.random() < 0.2 else None
        found.append((" " if " " in text else "").join(parts))
    return found


# ---- against the libraries; the figures they gave are kept for machines without them

@pytest.mark.parametrize("texts, tokenize", [(EN, "13a"), (ZH, "zh")])
def test_bleu_is_sacrebleus(texts, tokenize):
    replies, others = variants(texts, 1), variants(texts, 2)
    references = [list(pair) for pair in zip(texts, others)]
    assert bleu(replies, references) == pytest.approx(STORED["bleu", tokenize], abs=1e-6)
    sacrebleu = pytest.importorskip("sacrebleu")
    assert bleu(replies, references) == pytest.approx(
        sacrebleu.corpus_bleu(replies, [texts, others], tokenize=tokenize).score, abs=1e-6)
    for reply, text in itertools.product(replies, texts):
        if text:
            wanted = sacrebleu.corpus_bleu([reply], [[text]], tokenize=tokenize).score
            assert bleu([reply], [[text]]) == pytest.approx(wanted, abs=1e-6), (reply, text)


@pytest.mark.parametrize("texts", [EN, ZH], ids=["en", "zh"])
def test_rouge_is_rouge_scores(texts):
    replies, others = variants(texts, 1), variants(texts, 2)
    got = [rouge(reply, list(pair)) for reply, *pair in zip(replies, texts, others)]
    mean = {key: sum(row[key] for row in got) / len(got) for key in got[0]}
    assert mean == pytest.approx(STORED["rouge", "en" if texts is EN else "zh"], abs=1e-6)
    scorer = pytest.importorskip("rouge_score.rouge_scorer")

    class Characters:
        def tokenize(self, text):
            return words(text)
    theirs = scorer.RougeScorer(list(got[0]), tokenizer=None if texts is EN else Characters())
    for reply, text in itertools.product(replies, texts):
        wanted = {key: score.fmeasure for key, score in theirs.score(text, reply).items()}
        assert rouge(reply, [text]) == pytest.approx(wanted, abs=1e-6), (reply, text)


@pytest.mark.parametrize("average", ["macro", "micro"])
def test_f1_is_scikit_learns(average):
    draw = random.Random(0)
    predicted, true = ([draw.choice(letters) for _ in range(300)] for letters in ("abcd", "abce"))
    assert precision_recall_f1(predicted, true, average) == pytest.approx(STORED["f1", average], abs=1e-6)
    sklearn = pytest.importorskip("sklearn.metrics")
    wanted = sklearn.precision_recall_fscore_support(true, predicted, average=average, zero_division=0)[:3]
    assert precision_recall_f1(predicted, true, average) == pytest.approx(wanted, abs=1e-12)
    assert accuracy(predicted, true) == pytest.approx(sklearn.accuracy_score(true, predicted))


STORED = {       # what sacrebleu 2.6.0, rouge-score 0.1.2 and scikit-learn 1.9.1 give
    ("bleu", "13a"): 66.316906763,
    ("bleu", "zh"): 40.491657488,
    ("rouge", "en"): {"rouge1": 0.796283898, "rouge2": 0.504664258, "rougeL": 0.74271247},
    ("rouge", "zh"): {"rouge1": 0.751393534, "rouge2": 0.238095238, "rougeL": 0.616778149},
    ("f1", "macro"): (0.151309884, 0.159663971, 0.155029838),
    ("f1", "micro"): (0.193333333, 0.193333333, 0.193333333),
}


# ---- worked cases and brute force

def test_bleu_by_hand():
    """Hits 5 of 6 words, 3 of 5 pairs, 1 of 4 triples, 0 of 3: the last counts as a half of one."""
    got = bleu(["the cat sat on a mat"], [["the cat is on a mat"]])
    assert got == pytest.approx(100 * (5 / 6 * 3 / 5 * 1 / 4 * 0.5 / 3) ** 0.25)
    assert bleu(["the cat sat on"], [["the cat sat on the mat"]]) == pytest.approx(100 * math.exp(1 - 6 / 4))


@pytest.mark.parametrize("text", [t for t in EN + ZH if len(words(t)) > 4])
def test_identical_and_disjoint(text):
    assert bleu([text], [[text]]) == pytest.approx(100) and set(rouge(text, [text]).values()) == {1.0}
    assert token_f1(text, ["", text]) == exact_match(text, ["", text]) == 1
    for other in "zzz yyy xxx www vvv", "龘靐齉爩鱻":
        assert bleu([other], [[text]]) == 0 and set(rouge(other, [text]).values()) == {0.0}
        assert token_f1(other, [text]) == exact_match(other, [text]) == 0


def test_empty_inputs():
    assert bleu([], []) == bleu([""], [["a b c d e"]]) == bleu(["a b c d"], [[""]]) == 0
    assert token_f1("", ["a"]) == token_f1("a", []) == token_f1("", [""]) == 0
    assert rouge("", ["a"]) == {"rouge1": 0, "rouge2": 0, "rougeL": 0} == rouge("a", [])
    assert accuracy([], []) == 0 and precision_recall_f1([], []) == (0, 0, 0)
    assert distinct_n([]) == distinct_n(["a"]) == repetition_rate("") == repetition_rate("a b c") == 0


def test_common_subsequence_by_brute_force():
    draw = random.Random(0)
    for _ in range(60):
        a, b = ([draw.choice("abc") for _ in range(draw.randint(0, 7))] for _ in range(2))
        subsequences = {s for n in range(len(a) + 1) for s in itertools.combinations(a, n)}
        wanted = max(len(s) for s in subsequences if s in set(itertools.combinations(b, len(s))))
        assert metrics.common(a, b) == wanted


def test_repetition_and_distinct_by_hand():
    assert repetition_rate("a b c d a b c d") == pytest.approx(1 / 5)
    assert (distinct_n(["a b a b", "a b"], 2) == pytest.approx(2 / 4)
            and repetition_rate("啦" * 6) == pytest.approx(2 / 3))


def test_chinese_is_never_zero_by_mistake():
    reply, text = "小狐狸跑到磨坊", "小狐狸跑到了磨坊里"
    assert (token_f1(reply, [text]) > 0.8 and rouge(reply, [text])["rougeL"] > 0.8
            and bleu([reply], [[text]]) > 30)
    assert words("The cat, 2 猫咪!") == ["the", "cat", "2", "猫", "咪"]


def test_lists_of_unequal_length_are_refused():
    for function in accuracy, precision_recall_f1, bleu:
        with pytest.raises(ValueError, match="2 predictions for 1 texts"):
            function(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="macro or micro"):
        precision_recall_f1(["a"], ["a"], "weighted")
