"""What answers to tasks are worth without a network.

    python tests/baselines.py TRAIN.jsonl EVAL.jsonl REQUESTS.jsonl [LIMIT]

keyword: the reply of the training record whose request shares most rare words with this one (tf-idf).
n-gram: the likeliest next token after the longest context of up to four tokens that training has, again and
again. The same numbers as evaluate.py.
"""

import math
import sys
from collections import Counter, defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.gold import rate
from evaluate import numbers, print_table, read_examples, read_requests
from metrics import words
from records import read_conversations
from tokenizer import Tokenizer


def keyword_answers(train, asked):
    """The reply of the nearest training request to each request; both lists of (request, reply) and texts."""
    bags = [Counter(words(request)) for request, _ in train]
    seen = Counter(word for bag in bags for word in bag)
    weight = {word: math.log(len(train) / n) for word, n in seen.items()}
    index = defaultdict(list)
    for i, bag in enumerate(bags):
        size = math.sqrt(sum((n * weight[word]) ** 2 for word, n in bag.items())) or 1.0
        for word, n in bag.items():
            index[word].append((i, n * weight[word] / size))
    answers = []
    for request in asked:
        scores = Counter()
        for word, n in Counter(words(request)).items():
            for i, value in index.get(word, ()):
                scores[i] += n * weight[word] * value
        answers.append(train[scores.most_common(1)[0][0]][1] if scores else "")
    return answers


def ngram_answers(train, prompts, end, longest, order=5):
    """Greedy continuations by the longest context that training has; ids."""
    counts = [defaultdict(Counter) for _ in range(order)]
    for ids in train:
        for i in range(1, len(ids)):
            for n in range(min(order, i + 1)):
                counts[n][tuple(ids[i - n:i])][ids[i]] += 1
    answers = []
    for prompt in prompts:
        row = list(prompt)
        while len(row) - len(prompt) < longest and (len(row) == len(prompt) or row[-1] != end):
            context = next(c for n in range(order - 1, -1, -1)
                           if (c := counts[n].get(tuple(row[len(row) - n:]))))
            row.append(context.most_common(1)[0][0])
        answers.append(row[len(prompt):])
    return answers


def main(train_path, eval_path, requests_path, limit=0):
    examples = read_examples(eval_path, int(limit))
    requests = read_requests(requests_path, examples)
    conversations = read_conversations(train_path, Tokenizer([]), 10 ** 6).items
    tokenizer = Tokenizer.train((turn["content"] for c in conversations for turn in c.messages), 4096)
    train = [(c.messages[-2]["content"], c.messages[-1]["content"]) for c in conversations]
    rows = [tokenizer.encode_chat(c.messages)[0] for c in conversations]
    prompts = [tokenizer.encode_chat(e["messages"], add_generation_prompt=True)[0] for e in examples]
    found = {"keyword": [(text, True) for text in
                         keyword_answers(train, [e["messages"][-1]["content"] for e in examples])],
             "n-gram": [(tokenizer.decode([i for i in ids if i < tokenizer.eot_id]).strip(),
                         ids[-1] == tokenizer.im_end_id)
                        for ids in ngram_answers(rows, prompts, tokenizer.im_end_id, 100)]}
    for name, answers in found.items():
        replies = [{**e, "reply": text, "ended": ended, "chosen": text,
                    "marks": rate(requests[e["id"]], text)}
                   for e, (text, ended) in zip(examples, answers)]
        groups = dict.fromkeys((e["task"], e["language"]) for e in examples)
        print(f"\n== {name}")
        print_table([{"task": t, "language": lang,
                      **numbers([r for r in replies if (r["task"], r["language"]) == (t, lang)], requests)}
                     for t, lang in groups])


if __name__ == "__main__":
    main(*sys.argv[1:])
