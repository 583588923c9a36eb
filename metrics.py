"""Numbers that judge replies, and those who judge them, as pure functions of texts, labels and scores.

BLEU (Papineni et al. 2002) and ROUGE (Lin 2004) give the figures of sacrebleu and rouge-score; Chinese is
cut into characters, so that a Chinese reply is never 0 by mistake.
Shares are 0-1, BLEU is 0-100. `references` of a reply is a list: any one of them is right.
"""

import math
import re
from collections import Counter

# What sacrebleu's "zh" sets apart: Han characters, their punctuation, full-width forms, most symbols.
HAN = ("\u2001-\u2a6d\u2e80-\u2fdf\u2ff0-\u303f\u3100-\u312f\u31a0-\u31bf\u31c0-\u31ef\u3200-\u4db5"
       "\u4e00-\u9fbb\uf900-\ufa2d\ufa30-\ufa6a\ufa70-\ufad9\ufe10-\ufe1f\ufe30-\ufe4f\uff00-\uffef")


# ---- cutting texts into tokens

def in_chinese(text):
    """Whether Chinese characters say more of a text than Latin letters; one says about as much as three."""
    han, latin = (sum(low <= c <= high for c in text) for low, high in ("\u4e00\u9fff", "az"))
    return 3 * han > latin


def words(text):
    """Small words of a text; letters of scripts beyond Latin and Greek, Han above all, one by one.

    words("The cat, 2 猫咪!") -> ["the", "cat", "2", "猫", "咪"]. For English this is rouge-score's cutting,
    which ends a word at an accented letter.
    """
    return re.findall(r"[a-z0-9]+|(?![\x00-\u03ff])[^\W_]", text.lower())


def bleu_tokens(text, chinese=False):
    """Tokens as BLEU counts them: sacrebleu's "13a", or its "zh" with Han characters one by one.

    bleu_tokens("He paid 3.50, so") -> ["He", "paid", "3.50", ",", "so"]
    """
    if chinese:
        text = re.sub(f"([{HAN}])", r" \1 ", text.strip())
    else:
        text = f" {text} ".replace("<skipped>", "").replace("-\n", "")
        for entity, char in ("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"):
            text = text.replace(entity, char)
    text = re.sub(r"([{-~\[-` -&(-+:-@/])", r" \1 ", text.replace("\n", " "))
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)         # full stops and commas, not inside numbers
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    return re.sub(r"([0-9])(-)", r"\1 \2 ", text).split()


def ngrams(tokens, n):
    """How often each n tokens in a row occur: Counter of tuples."""
    return Counter(zip(*(tokens[i:] for i in range(n))))


# ---- labels

def accuracy(predicted, true):
    """Share of labels that are right."""
    check_lengths(predicted, true)
    return sum(p == t for p, t in zip(predicted, true)) / len(true) if true else 0.0


def precision_recall_f1(predicted, true, average="macro"):
    """(precision, recall, F1) over all labels that occur; what is 0/0 counts as 0.

    macro: the mean over labels, rare ones counting as much as frequent ones; micro: of all decisions
    together, which for one label a text is the accuracy.
    """
    check_lengths(predicted, true)
    right = Counter(t for p, t in zip(predicted, true) if p == t)
    made, there = Counter(predicted), Counter(true)
    if average == "micro":
        return (ratios(right.total(), made.total(), there.total()))
    if average != "macro":
        raise ValueError(f"average {average!r} must be macro or micro")
    labels = made.keys() | there.keys()
    rows = [ratios(right[label], made[label], there[label]) for label in labels]
    return tuple(sum(column) / len(rows) for column in zip(*rows)) if rows else (0.0, 0.0, 0.0)


def ratios(right, made, there):
    """(precision, recall, F1) of `right` hits among `made` guesses at `there` truths."""
    return (right / made if made else 0.0, right / there if there else 0.0,
            2 * right / (made + there) if right else 0.0)


def check_lengths(a, b):
    """Refuse two lists that are not about the same texts."""
    if len(a) != len(b):
        raise ValueError(f"{len(a)} predictions for {len(b)} texts; give one for each")


# ---- a reply against references

def exact_match(reply, references):
    """1.0 if the reply has the words of a reference in its order, else 0.0; case and punctuation are free."""
    return float(any(words(reply) == words(reference) for reference in references))


def token_f1(reply, references):
    """F1 of the bag of words against the best reference (Rajpurkar et al. 2016, who drop articles, too)."""
    return max((bag_f1(ngrams(words(reply), 1), ngrams(words(ref), 1)) for ref in references), default=0.0)


def rouge(reply, references):
    """F1 against the best reference: {"rouge1": words, "rouge2": pairs, "rougeL": longest subsequence}."""
    found, best = words(reply), {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    for wanted in map(words, references):
        scores = {f"rouge{n}": bag_f1(ngrams(found, n), ngrams(wanted, n)) for n in (1, 2)}
        scores["rougeL"] = ratios(common(found, wanted), len(found), len(wanted))[2]
        best = {key: max(best[key], scores[key]) for key in best}
    return best


def bag_f1(found, wanted):
    """F1 of two Counters."""
    return ratios((found & wanted).total(), found.total(), wanted.total())[2]


def common(a, b):
    """Length of the longest common subsequence of two lists, O(len(a) len(b))."""
    row = [0] * (len(b) + 1)
    for x in a:
        corner = 0                                              # the entry up and to the left
        for j, y in enumerate(b, 1):
            corner, row[j] = row[j], corner + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def bleu(replies, references, max_n=4):
    """BLEU of a corpus, 0-100: geometric mean of clipped n-gram precisions times the brevity penalty.

    An order without a hit counts as 1/2, 1/4, ... of a hit (sacrebleu's default, Chen & Cherry 2014, method
    3); the corpus scores 0 if no word hits or if no reply has max_n tokens.

    Args:
        references: for each reply a list of texts; the length nearest to the reply's counts. If they are
            in Chinese as a whole, all texts are cut so.
    """
    check_lengths(replies, references)
    chinese = in_chinese("".join(text for texts in references for text in texts))
    hits, made, length, wanted_length = [0] * max_n, [0] * max_n, 0, 0
    for reply, texts in zip(replies, references):
        found, wanted = bleu_tokens(reply, chinese), [bleu_tokens(text, chinese) for text in texts]
        length += len(found)
        wanted_length += min((abs(len(w) - len(found)), len(w)) for w in wanted)[1]
        for n in range(1, max_n + 1):
            counts, best = ngrams(found, n), Counter()
            for w in wanted:
                best |= ngrams(w, n)
            hits[n - 1] += (counts & best).total()
            made[n - 1] += counts.total()
    if not any(hits) or not all(made):
        return 0.0
    log_precision, missed = 0.0, 0
    for hit, total in zip(hits, made):
        missed += hit == 0
        log_precision += math.log((hit or 0.5 ** missed) / total) / max_n
    return 100 * math.exp(log_precision + min(0.0, 1 - wanted_length / length))


# ---- a reply by itself

def distinct_n(texts, n=2):
    """Share of different n-grams among all n-grams of many texts (Li et al. 2016); 1 = none comes twice."""
    counts = Counter()
    for text in texts:
        counts.update(ngrams(words(text), n))
    return len(counts) / counts.total() if counts else 0.0


def repetition_rate(text, n=4):
    """Share of a text's n-grams that stand in it before: 0 for a text that never repeats itself."""
    counts = ngrams(words(text), n)
    return 1 - len(counts) / counts.total() if counts else 0.0


# ---- scores against judgements

def pearson(a, b):
    """Correlation of two lists of numbers, -1 to 1; nan where one of them does not vary."""
    check_lengths(a, b)
    mean_a, mean_b = sum(a) / len(a), sum(b) / len(b)
    both = sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b))
    size = sum((x - mean_a) ** 2 for x in a) * sum((y - mean_b) ** 2 for y in b)
    return both / math.sqrt(size) if size else math.nan


def calibration_error(probabilities, outcomes, n_bins=10):
    """Expected calibration error (Guo et al. 2017, eq. 3), 0-1: |mean probability - share that came true|.

    Averaged over n_bins bins that hold equally many, weighted by how many they hold.
    """
    check_lengths(probabilities, outcomes)
    pairs, total = sorted(zip(probabilities, outcomes), key=lambda pair: pair[0]), 0.0
    for b in range(n_bins):
        part = pairs[b * len(pairs) // n_bins:(b + 1) * len(pairs) // n_bins]
        total += abs(sum(p - came_true for p, came_true in part))
    return total / len(pairs)


# ---- judges against one another

def krippendorff_alpha(units, distance):
    """Krippendorff's alpha (2011): 1 = the judges agree, 0 = as by chance; nan if nothing can disagree.

    1 - observed / expected disagreement. Observed: the mean distance of two values of one unit, each unit
    weighing as many values as it has; expected: that of any two values.

    Args:
        units: for each judged thing the list of its values, one a judge; those with fewer than 2 say nothing.
        distance: d(a, b), 0 for equal values, such as `nominal` or `interval`.
    """
    units = [unit for unit in units if len(unit) > 1]
    counts = Counter(value for unit in units for value in unit)
    n = counts.total()
    observed = sum(distance(a, b) / (len(unit) - 1) for unit in units
                   for i, a in enumerate(unit) for j, b in enumerate(unit) if i != j)
    expected = sum(distance(a, b) * m * k for a, m in counts.items() for b, k in counts.items())
    return 1 - observed * (n - 1) / expected if expected else math.nan


def nominal(a, b):
    """Distance of two names: equal or not."""
    return float(a != b)


def interval(a, b):
    """Distance of two numbers: their squared difference."""
    return float(a - b) ** 2
