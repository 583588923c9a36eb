"""Interpolated Kneser-Ney n-gram model over token ids, counted by sorting; a yardstick for the story world.

Chen and Goodman 1999, section 2.7: one discount d = n1 / (n1 + 2 n2) an order; lower orders count the
distinct tokens that an n-gram was seen after (continuation counts), not its occurrences.
"""

import numpy as np


def bits(train, test, order, vocab_size):
    """Bits that the model of `train` gives to all of `test` (1-D int arrays), each token once.

    The first order - 1 tokens of both are padded with token 0.
    """
    pad = np.zeros(order - 1, dtype=np.int64)
    seen, new = (np.concatenate([pad, np.asarray(x, dtype=np.int64)]) for x in (train, test))
    n = len(seen) - order + 1
    probability = np.full(len(test), 1 / vocab_size)
    # Names of contexts: the same number for the same last k tokens in both texts, built one token to the
    # left at a time.
    both = np.concatenate([seen, new])
    names = np.zeros(len(both), dtype=np.int64)
    windows = {}
    for k in range(order):                                  # windows[k] then names the k tokens before i
        windows[k] = names
        shifted = np.concatenate([np.zeros(k + 1, dtype=np.int64), both[:len(both) - k - 1]])
        names = np.unique(names * vocab_size + shifted, return_inverse=True)[1].astype(np.int64)
    for k in range(order):                                  # contexts of k tokens: unigrams first
        context, gram = windows[k], windows[k] * vocab_size + both
        if k == order - 1:
            grams, counts = np.unique(gram[order - 1:order - 1 + n], return_counts=True)
        else:                                               # distinct (token before, gram)
            longer = np.unique(windows[k + 1][order - 1:order - 1 + n] * vocab_size
                               + both[order - 1:order - 1 + n], return_index=True)[1]
            grams, counts = np.unique(gram[order - 1:order - 1 + n][longer], return_counts=True)
        owners, where = np.unique(grams // vocab_size, return_inverse=True)
        total, kinds = np.bincount(where, counts), np.bincount(where)
        ones, twos = (counts == 1).sum(), (counts == 2).sum()
        discount = ones / max(1, ones + 2 * twos) if ones else 0.5
        asked, asked_gram = context[len(seen) + order - 1:], gram[len(seen) + order - 1:]
        o = np.minimum(np.searchsorted(owners, asked), len(owners) - 1)
        g = np.minimum(np.searchsorted(grams, asked_gram), len(grams) - 1)
        known = owners[o] == asked
        count = np.where(grams[g] == asked_gram, counts[g], 0)
        interpolated = (np.maximum(count - discount, 0) + discount * kinds[o] * probability) / total[o]
        probability = np.where(known, interpolated, probability)
    return -np.log2(probability).sum()
