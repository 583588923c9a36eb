"""Evaluation: what a checkpoint knows in numbers, several side by side.

    python evaluate.py --models out/pretrain,out/sft --tasks eval_val.jsonl --requests requests.jsonl
    python evaluate.py --models out/pretrain --text_dir out/data            # bits per byte, perplexity
    python evaluate.py --models out/sft,out/ppo --prompts prompts_val.jsonl --requests requests.jsonl \
        --reward_model out/reward --best_of 64          # policies against the first one
    python evaluate.py --runs "out/*"                                       # one row a run with its settings

Replies are greedy unless told otherwise. Task files: {id, task, language, messages, references, labels}, from
data/instructions.py or your own; what gold says (data/gold.py) needs the requests of the story world.
"""

import glob
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import checkpoint
from batches import Shards, bits_from_sums, document_sums, perplexity_from_sums, score_replies
from cli import UserError, option, parse_config, progress_bar, python_function, run, write_text
from data.gold import ASPECTS, Look, gold, rate
from generate import generate, reply_logprobs
from metrics import (accuracy, bleu, distinct_n, exact_match, precision_recall_f1, repetition_rate, rouge,
                     token_f1)
from model import IGNORE_INDEX, LanguageModel, ScalarModel
from records import check_messages, chat, read_records
from training import draw_seed, pick_device

KEYS = "id", "task", "language", "messages", "references"
AT_ONCE = 64                    # prompts answered together


@dataclass
class EvaluateConfig:
    """Judge language models on tasks with right answers and on text."""
    models: str = option("", "OUT directories or checkpoints, separated by commas")
    tasks: str = option("", "examples with references, .jsonl")
    requests: str = option("", "requests.jsonl of the story world; with it, gold marks the replies")
    text_dir: str = option("", "token shards; bits per byte and perplexity of their validation split")
    limit: int = option(0, "examples of each task and language; 0 = all")
    temperature: float = option(0.0, "0 = greedy")
    max_new_tokens: int = option(100, "longest reply, tokens")
    seed: int = option(0, "of replies at a temperature above 0")
    prompts: str = option("", "instead of tasks: prompts {id, messages} that the models answer at "
                              "temperature 1; the first one is what the others are held against")
    reward_model: str = option("", "run of reward.py that scores those replies")
    judge: str = option("", "in the place of gold, for prompts of your own: FILE.py:NAME of NAME(prompts, "
                            "replies) -> list of numbers, lists of texts; not what they were trained on")
    best_of: int = option(0, "replies of the first model a prompt, for best-of-n; 0 = none")
    show: int = option(0, "transcripts to print, of each task and language or of the prompts")
    out: str = option("", "also write everything, replies included, to this JSON file")
    runs: str = option("", 'instead, a table of runs: a pattern such as "out/*"')
    device: str = option("auto", "cpu, cuda, mps or auto")


def main(config):
    if config.runs:
        print_table(runs_table(config.runs))
        return
    if config.models and config.prompts:
        compare(config)
        return
    if not config.models or not (config.tasks or config.text_dir):
        raise UserError("give --models and --tasks, --text_dir or --prompts, or --runs (see evaluate.py "
                        "--help)")
    examples = read_examples(config.tasks, config.limit) if config.tasks else []
    requests = read_requests(config.requests, examples) if config.requests else {}
    found = {}
    for name in models_of(config.models):
        model, tokenizer, _ = checkpoint.load_model(name, pick_device(config.device))
        if not isinstance(model, LanguageModel):
            raise UserError(f"model {name} gives scores, not text; use one of pretrain, sft or ppo")
        found[name] = judge(config, model, tokenizer, examples, requests)
        print_results(name, found[name], config.show)
    if config.out:
        write_text(Path(config.out), json.dumps(found, ensure_ascii=False, indent=1) + "\n")


def judge(config, model, tokenizer, examples, requests):
    """{"text": {...}, "tasks": [row, ...], "replies": [...]} of one model."""
    found = {"text": {}, "tasks": [], "replies": []}
    if config.text_dir:
        shards = Shards(config.text_dir, "val")
        sums = document_sums(model, shards, tokenizer, model.config.max_seq_len)
        found["text"] = {"bits_per_byte": bits_from_sums(sums), "perplexity": perplexity_from_sums(sums)}
    if examples:
        texts, ended = answer(model, tokenizer, [e["messages"] for e in examples], config.max_new_tokens,
                              config.temperature, config.seed)
        chosen = choices(model, tokenizer, examples)
        found["replies"] = [{**e, "reply": text, "ended": end, "chosen": choice, "marks": rate(
            requests[e["id"]], text) if requests else None}
            for e, text, end, choice in zip(examples, texts, ended, chosen)]
        found["tasks"] = summary(found["replies"], requests)
    return found


# ---- examples

def read_examples(path, limit=0):
    """The examples of a file, at most `limit` of each task and language, in the order of the file."""
    found, counts = [], {}
    for where, record in read_records(path):
        if isinstance(record, UserError):
            raise UserError(f"{where}: {record}")
        missing = [key for key in KEYS if key not in record] if isinstance(record, dict) else KEYS
        if missing:
            raise UserError(f"{where}: no {missing[0]!r}; an example has {', '.join(KEYS)}, perhaps labels")
        try:
            messages = chat(record["messages"])
            check_messages(messages, last="user")
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if not isinstance(record["references"], list) or not record["references"]:
            raise UserError(f"{where}: references must be a list with at least one good reply")
        group = record["task"], record["language"]
        counts[group] = counts.get(group, 0) + 1
        if not limit or counts[group] <= limit:
            found.append({**record, "messages": messages, "labels": record.get("labels")})
    if not found:
        raise UserError(f"{path}: no examples in it")
    return found


def read_requests(path, examples):
    """{id: request} of the structured wishes that gold needs, one for every example."""
    found = {record["id"]: record["request"] for _, record in read_records(path)}
    missing = [e["id"] for e in examples if e["id"] not in found]
    if missing:
        raise UserError(f"{path}: no request for example {missing[0]!r}; give the requests.jsonl that was "
                        "written with --tasks")
    return found


# ---- replies

def answer(model, tokenizer, conversations, max_new_tokens, temperature=0.0, seed=0):
    """(texts, whether each ended by itself) of replies to conversations; ending is `<|im_end|>`."""
    prompts = [tokenizer.encode_chat(messages, add_generation_prompt=True)[0] for messages in conversations]
    longest = model.config.max_seq_len - 1
    prompts = [prompt[-longest:] for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))          # like lengths together
    texts, ended, stops = [""] * len(prompts), [False] * len(prompts), (tokenizer.im_end_id, tokenizer.eot_id)
    with progress_bar(total=len(prompts), desc="replies") as bar:
        for start in range(0, len(order), AT_ONCE):
            part = order[start:start + AT_ONCE]
            replies = generate(model, [prompts[i] for i in part], max_new_tokens, temperature=temperature,
                               stop_ids=stops, seeds=[seed * len(prompts) + i for i in part])
            for i, ids in zip(part, replies):
                ended[i] = bool(ids) and ids[-1] == tokenizer.im_end_id
                texts[i] = tokenizer.decode([id for id in ids if id not in stops]).strip()
            bar.update(len(part))
    return texts, ended


def choices(model, tokenizer, examples):
    """For each example with labels the label that the model finds likeliest as its answer, else None.

    The labels to choose from are all those of the same task and language in the file.
    """
    groups = {}
    for e in examples:
        if e["labels"]:
            groups.setdefault((e["task"], e["language"]), set()).update(e["labels"])
    return [likeliest(model, tokenizer, e["messages"], sorted(groups[e["task"], e["language"]]))
            if e["labels"] else None for e in examples]


@torch.no_grad()
def likeliest(model, tokenizer, messages, labels):
    """The label with the largest log-probability of all its tokens, its end included."""
    prompt = tokenizer.encode_chat(messages, add_generation_prompt=True)[0]
    rows = [[*prompt, *tokenizer.encode(label), tokenizer.im_end_id][-model.config.max_seq_len:]
            for label in labels]
    T, device = max(map(len, rows)), next(model.parameters()).device
    ids = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)
    targets = torch.full_like(ids, IGNORE_INDEX)
    for i, (row, label) in enumerate(zip(rows, labels)):
        n = len(tokenizer.encode(label)) + 1
        targets[i, len(row) - n - 1:len(row) - 1] = torch.tensor(row[-n:], device=device)
    logp = model(ids).float().log_softmax(-1)
    picked = logp.gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1) * (targets != IGNORE_INDEX)
    return labels[picked.sum(-1).argmax().item()]


# ---- numbers

def summary(replies, requests):
    """A row of numbers for each task and language, in the order of the file."""
    groups = {}
    for r in replies:
        groups.setdefault((r["task"], r["language"]), []).append(r)
    return [{"task": task, "language": language, **numbers(part, requests)}
            for (task, language), part in groups.items()]


def numbers(replies, requests):
    """What the replies of one task and language are worth."""
    texts, references = [r["reply"] for r in replies], [r["references"] for r in replies]
    mean = lambda values: sum(values) / len(replies)                                        # noqa: E731
    row = {"n": len(replies), "ended": mean([r["ended"] for r in replies]),
           "exact": mean([exact_match(t, ref) for t, ref in zip(texts, references)]),
           "token_f1": mean([token_f1(t, ref) for t, ref in zip(texts, references)]),
           "rougeL": mean([rouge(t, ref)["rougeL"] for t, ref in zip(texts, references)]),
           "bleu": bleu(texts, references), "distinct2": distinct_n(texts),
           "repetition": mean([repetition_rate(t) for t in texts])}
    if all(r["labels"] for r in replies):
        true = [r["labels"][0] for r in replies]
        row |= {"accuracy": accuracy(texts, true), "macro_f1": precision_recall_f1(texts, true)[2],
                "accuracy_by_logprob": accuracy([r["chosen"] for r in replies], true)}
    if requests:
        marks = [r["marks"] for r in replies]
        row |= {"gold": mean([sum(m.values()) / len(m) for m in marks])}
        row |= {f"gold_{aspect}": mean([m[aspect] for m in marks]) for aspect in ASPECTS}
        if any(requests[r["id"]]["elements"] for r in replies):
            row["elements"] = mean([has_elements(requests[r["id"]], r["reply"]) for r in replies])
    return row


def has_elements(request, reply):
    """Whether a tale names everybody and everything that was asked for."""
    return bool(reply.strip()) and all(Look(request, reply.strip()).has(role) for role in request["elements"])


# ---- policies against a reference

def compare(config):
    """Print and write what each model's replies are worth: score, gold, KL from the first one, wins over it.

    All answer the same prompts once at temperature 1. gold_units is gold in standard deviations of the first
    model's over these prompts, from its mean.
    """
    if bool(config.requests) == bool(config.judge) or not config.reward_model:
        raise UserError("--prompts needs --reward_model, and --requests (story world) or "
                        "--judge FILE.py:NAME")
    device = pick_device(config.device)
    judge_model, tokenizer, _ = checkpoint.load_model(config.reward_model, device)
    if not isinstance(judge_model, ScalarModel):
        raise UserError(f"--reward_model {config.reward_model} is no reward model; give a run of reward.py")
    examples = [record for _, record in read_records(config.prompts)][:config.limit or None]
    truth = true_marks(config, examples)
    asked = [tokenizer.encode_chat(e["messages"], add_generation_prompt=True)[0] for e in examples]
    rows, said, reference, base = [], [], None, None
    for name in models_of(config.models):
        model, own, _ = checkpoint.load_model(name, device)
        if not isinstance(model, LanguageModel):
            raise UserError(f"model {name} gives scores, not text; use one of pretrain, sft or ppo")
        if own.sha256 != tokenizer.sha256:
            raise UserError(f"model {name}: its tokenizer is not the reward model's; they cannot be compared")
        reference = reference or model
        replies = sampled(model, asked, config, tokenizer.im_end_id)
        found = judged(replies, asked, truth, judge_model, tokenizer)
        found["kl"] = divergence(model, reference, asked, replies)
        base = base or found
        rows.append({"model": name, **against(found, base, 5 if config.requests else None)})
        said.append(found["text"])
    print_table(rows)
    for i, example in enumerate(examples[:config.show]):
        print(f"--- {example['messages'][-1]['content']}")
        print(*(f"{row['model']}: {texts[i]}" for row, texts in zip(rows, said)), sep="\n")
    curve, best = (best_of(config, reference, asked, truth, judge_model, tokenizer, base) if config.best_of
                   else ([], []))
    if curve:
        print_table(curve)
    if config.out:
        names = [row["model"] for row in rows] + [f"best of {config.best_of}"] * bool(best)
        shown_ones = [{"messages": e["messages"], "replies": dict(zip(names, texts))}
                      for e, *texts in list(zip(examples, *said, *([best] if best else [])))[:config.show]]
        found = {"policies": rows, "best_of": curve, "transcripts": shown_ones}
        write_text(Path(config.out), json.dumps(found, ensure_ascii=False, indent=1) + "\n")


def true_marks(config, examples):
    """A function of one reply to each example that gives their marks: gold's, or those of --judge."""
    if config.requests:
        requests = read_requests(config.requests, examples)
        return lambda texts: [gold(requests[e["id"]], text) for e, text in zip(examples, texts)]
    function, asked = python_function(config.judge, "judge"), [e["messages"][-1]["content"] for e in examples]

    def marks(texts):
        found = [float(x) for x in function(asked, texts)]
        if len(found) != len(texts) or not all(map(math.isfinite, found)):
            raise UserError(f"--judge {config.judge} must give one finite number a reply; "
                            f"it gave {len(found)} for {len(texts)}, "
                            f"{sum(map(math.isfinite, found))} of them finite")
        return found
    return marks


def models_of(names):
    """The names in a list, patterns such as out/ppo/weights/* expanded."""
    found = [path for name in filter(None, (n.strip() for n in names.split(",")))
             for path in (sorted(glob.glob(name)) if "*" in name else [name])]
    if not found:
        raise UserError(f"--models {names}: nothing is there")
    return found


def sampled(model, prompts, config, eos_id, draw=0):
    """One reply to each prompt at temperature 1, lists of ids."""
    replies, order = [None] * len(prompts), sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), AT_ONCE):
        part = order[start:start + AT_ONCE]
        seeds = [draw_seed(config.seed, f"reply {draw}", i) for i in part]
        for i, ids in zip(part, generate(model, [prompts[i] for i in part], config.max_new_tokens,
                                         stop_ids=(eos_id,), seeds=seeds)):
            replies[i] = ids
    return replies


def judged(replies, prompts, truth, judge_model, tokenizer):
    """{"text", "score", "gold", "length", "ended"}: a list over the replies each."""
    eos = tokenizer.im_end_id
    words = [tokenizer.decode([id for id in ids if id < tokenizer.eot_id]) for ids in replies]
    return {"text": words, "score": score_replies(judge_model, prompts, replies, eos).tolist(),
            "gold": truth(words), "length": [len(ids) for ids in replies],
            "ended": [ids[-1] == eos for ids in replies]}


def divergence(model, reference, prompts, replies):
    """KL(model, reference) of each reply, nats, by k1: log-probability under one less under the other."""
    if model is reference:
        return [0.0] * len(replies)
    kl = []
    for start in range(0, len(prompts), AT_ONCE):
        part = prompts[start:start + AT_ONCE], replies[start:start + AT_ONCE]
        kl += [a - b for a, b in zip(reply_logprobs(model, *part), reply_logprobs(reference, *part))]
    return kl


def against(found, base, ceiling=5):
    """A row: means of `found`, its gold in units of `base`, and how often it wins, ties counting half.

    ceiling: the highest mark there is, if there is one.
    gold_same_length is the policy's part of gold ~ 1 + length + policy, least squares over both's replies.
    """
    gold_, base_gold = np.array(found["gold"]), np.array(base["gold"])
    unit = base_gold.std() or 1.0
    lengths = np.array(found["length"] + base["length"], dtype=float)
    design = np.stack([np.ones(len(lengths)), lengths, np.repeat([1.0, 0.0], len(gold_))], 1)
    fit, *_ = np.linalg.lstsq(design, np.concatenate([gold_, base_gold]), rcond=None)
    wins = (gold_ > base_gold) + 0.5 * (gold_ == base_gold)
    return {"n": len(gold_), "score": float(np.mean(found["score"])), "gold": float(gold_.mean()),
            "gold_units": float((gold_.mean() - base_gold.mean()) / unit),
            "gold_same_length": float(fit[2] / unit) if found is not base else 0.0,
            **({"to_ceiling": float((gold_.mean() - base_gold.mean()) / (ceiling - base_gold.mean()))}
               if ceiling else {}),
            "win_rate": float(wins.mean()), "kl": float(np.mean(found["kl"])),
            "kl_error": float(np.std(found["kl"]) / len(gold_) ** 0.5),
            "length": float(np.mean(found["length"])), "ended": float(np.mean(found["ended"]))}


def best_of(config, model, asked, truth, judge_model, tokenizer, base):
    """Rows of best-of-n for n = 1, 2, 4, ...: chosen by score, judged by gold, in the units of `against`.

    Also the reply with the best score to each prompt.
    """
    draws = [judged(sampled(model, asked, config, tokenizer.im_end_id, draw + 1), asked, truth, judge_model,
                    tokenizer)
             for draw in progress_bar(iterable=range(config.best_of), desc="best of n")]
    scores, marks = (np.array([d[key] for d in draws]).T for key in ("score", "gold"))         # (prompts, N)
    unit, rows, n = np.std(base["gold"]) or 1.0, [], 1
    while n <= config.best_of:
        mean = best_of_n(scores, marks, n)
        rows.append({"best_of": n, "kl": math.log(n) - (n - 1) / n, "score": best_of_n(scores, scores, n),
                     "gold": mean, "gold_units": (mean - np.mean(base["gold"])) / unit})
        n *= 2
    return rows, [draws[i]["text"][p] for p, i in enumerate(scores.argmax(1))]


def best_of_n(scores, values, n):
    """Expected value of the reply with the best score among n of N, unbiased (Gao et al. 2022, appendix I).

    scores, values (prompts, N). Of all choices of n, C(i, n - 1) / C(N, n) have the one of rank i (from 0,
    the worst) as their best.
    """
    N = scores.shape[1]
    order = np.argsort(scores, axis=1, kind="stable")
    weights = np.array([math.comb(i, n - 1) / math.comb(N, n) for i in range(N)])
    return float((np.take_along_axis(values, order, axis=1) * weights).sum(1).mean())


# ---- tables

def runs_table(pattern):
    """Rows of what each run was and where it ended: its settings, its last evaluation."""
    rows = []
    for out_dir in sorted(glob.glob(pattern)):
        try:
            record = checkpoint.read_config(checkpoint.resolve(out_dir))
        except UserError:
            continue                                                # no run, or none that can be read
        log, last = Path(out_dir) / "log.jsonl", {}
        for line in log.read_text(encoding="utf-8").splitlines() if log.is_file() else ():
            last |= {k: v for k, v in json.loads(line).items() if k.startswith(("val_", "bits_per_byte"))}
        config = record["config"]
        settings = "d_model", "n_layers", "batch_size", "optimizer", "learning_rate", "seed"
        rows.append({"run": out_dir, **{k: record[k] for k in ("stage", "step", "tokens")},
                     **{k: config.get(k, "") for k in settings}, **last})
    if not rows:
        raise UserError(f"--runs {pattern}: no run with a checkpoint there; quote the pattern")
    return rows


def print_results(name, found, n_shown):
    """A model's numbers as a table, then some transcripts."""
    print(f"\n== {name}")
    for language, bits in found["text"].get("bits_per_byte", {}).items():
        print(f"text, {language}: {bits:.4f} bits/byte, "
              f"perplexity {found['text']['perplexity'][language]:.2f} a token")
    if found["tasks"]:
        print_table(found["tasks"])
    seen = {}
    for r in found["replies"]:
        group = r["task"], r["language"]
        seen[group] = seen.get(group, 0) + 1
        if seen[group] <= n_shown:
            marks = "" if r["marks"] is None else "  " + " ".join(map(str, r["marks"].values()))
            print(f"--- {r['id']}{marks}\n{r['messages'][-1]['content']}\n=> {r['reply']}"
                  f"{'' if r['ended'] else ' ...'}")


def print_table(rows):
    """Rows of equal or unequal keys in columns."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[shown(row.get(column, "")) for column in columns] for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(columns, *cells)]
    for line in [columns, *cells]:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths)))


def shown(value):
    """A value as a person reads it."""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) and abs(value) < 1e-2 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    run(lambda: main(parse_config(EvaluateConfig)))
