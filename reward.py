"""Reward model: a scalar head on the SFT model, learnt from human judgements of replies.

Pairs and rankings by the Bradley-Terry likelihood of all comparisons of a prompt (Ouyang et al. 2022, eq. 1),
ratings by regression, both by weight. At the end it is normalised, judged on prompts it has not seen, and
passes a gate or not, which ppo.py reads.
    python reward.py --config demo --init_from out/sft --data out/feedback/judged.jsonl --out_dir out/reward
    python reward.py --init_from out/reward --score FILE            # one line {"where", "scores"} a record

Shapes:  N prompts (in the loss) or replies   K replies of a prompt
"""

import json
import math
import time
import zlib
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import checkpoint
import ratings
from batches import draws, joined, packed_replies, rows_of_step, score_texts, share
from cli import UserError, numbers, option, parse_config, run, write_text
from metrics import calibration_error, pearson, words
from model import LanguageModel, ModelConfig, ScalarModel, flops_per_token
from optim import make_optimizer, set_lr
from records import read_records, to_comparison, to_messages, weighted_records
from tokenizer import Tokenizer
from training import (RESUMABLE, MetricLog, NonFinite, Stop, TrainingConfig, accumulate, at_least,
                      batch_sizes, check, clip_and_step, draw_seed, intervals, loss_scaler, lr_at,
                      matmul_peak, start_ranks, wrap)

PRESETS = {
    "demo": dict(batch_size=16, optimizer="muon", learning_rate=2e-3, warmup_steps=10,
                 eval_every=50, save_every=100),
    "results": dict(batch_size=32, likelihood_coef=4.0, token_coef=0.5, learning_rate=3e-4, eval_every=50,
                    save_every=100),
    "smoke": dict(batch_size=8, epochs=0, max_steps=6, warmup_steps=2, eval_every=3, save_every=3,
                  log_every=2,
                  bootstrap=50),
}
WORDS = 2000                    # the most frequent ones, which the bag-of-words baseline sees
MARGINS = (0.5, 1.0, 2.0)       # borders of the margins by which accuracy is told


@dataclass
class RewardConfig(TrainingConfig):
    """Training of a reward model on judged replies."""
    data: str = option("", "judged replies: FILE[:WEIGHT],...; pairs, triples, rankings or scores, mixed")
    ratings: str = option("", "beside --data or in its place: judgements as the Rate page and feedback.py "
                              "rate write them, of the replies in --normalize_on")
    val_data: str = option("", "judged replies to be held against; none = the prompts of --val_share")
    val_share: float = option(0.1, "of the prompts that are kept from training where there is no --val_data")
    normalize_on: str = option("", "samples.jsonl of the SFT model, on whose replies the scores get mean 0 "
                                   "and standard deviation 1; none = the training replies")
    score: str = option("", "train nothing; print the scores of the replies in this file")
    out_dir: str = option("out/reward", "where checkpoints, report.json and log.jsonl go")
    batch_size: int = option(16, "prompts an optimiser step, all ranks together")
    max_seq_len: int = option(0, "longest prompt and reply, tokens; 0 = the checkpoint's")
    dropout: float = option(0.0, "share of the embedding and of each block's outputs set to 0 in training")
    epochs: float = option(1.0, "times that the data is seen; it decides max_steps; 0 = as --max_steps says")
    pair_coef: float = option(1.0, "weight of the comparisons: all pairs of a prompt with unequal ranks or "
                                   "scores")
    score_coef: float = option(0.0, "weight of the squared error on ratings, which are z-scored")
    likelihood_coef: float = option(0.0, "weight in the score of the reply's mean log-probability by the "
                                         "language head (Meng et al. 2024); 0 = the scalar head alone")
    token_coef: float = option(0.0, "weight of that error at every token of a rated reply, as verifiers "
                                    "learn (Cobbe et al. 2021)")
    max_comparisons: int = option(0, "learn from the first prompts that hold so many pairs; 0 = from all")
    curve: str = option("", "before, learn from fewer comparisons, such as 200,1000, and tell what each "
                            "reaches")
    bootstrap: int = option(1000, "resamplings of the prompts behind a 95% interval")
    skip_bad: bool = option(False, "count records that cannot be used and go on")
    optimizer: str = option("adamw", "adam, adamw, muon, lamb or lars")
    learning_rate: float = option(5e-4, "peak; 5e-4 suits 0.5M parameters, 1e-4 30M")
    schedule: str = option("linear", "after warmup: cosine, linear, polynomial, wsd (stable, then linear) "
                                     "or constant")
    warmup_steps: int = option(10, "steps of linear warmup")
    min_lr: float = option(0.0, "floor of the schedule, as a share of learning_rate")
    weight_decay: float = option(0.0, "decoupled (coupled for adam and lars), on matrices only")
    eps: float = option(1e-5, "added to the root of the squared gradient's mean")
    compile: bool = option(False, "torch.compile the trained forward; the number of rows changes by the "
                                  "step, so it pays on long runs only")


def main(config):
    with start_ranks(config) as ranks:
        if config.smoke:
            config = built_in(config, ranks)
        if config.score:
            score_file(config, ranks)
            return
        if not config.data and not config.ratings:
            raise UserError("--data is missing; name files of judged replies: FILE[:WEIGHT],..., "
                            "or --ratings")
        for n in numbers(config.curve, "curve", int, 1, "200,1000") if config.curve else ():
            out_dir = Path(config.out_dir) / "curve" / str(n)
            train(replace(config, max_comparisons=n, curve="", out_dir=str(out_dir)), ranks)
        train(config, ranks)


def train(config, ranks):
    """The run: what is needed, then the loop, at its end the report; returns the model."""
    micro_batch_size = check(config, ranks)
    at_least(0, config, "epochs", "pair_coef", "score_coef", "token_coef", "likelihood_coef",
             "max_comparisons")
    model_config, tokenizer = checkpoint.source(config, ranks.say)
    data, config = open_data(config, model_config, tokenizer, ranks)
    torch.manual_seed(draw_seed(config.seed, "init"))
    model = ScalarModel(replace(model_config, max_seq_len=config.max_seq_len),
                        config.likelihood_coef).to(ranks.device)
    optimizer = make_optimizer(config.optimizer, model, config.learning_rate, config.beta1, config.beta2,
                               config.eps, config.weight_decay)
    scaler, skip, sizes = (loss_scaler(ranks), intervals(config.skip_steps),
                           batch_sizes(config, config.max_seq_len))
    state = checkpoint.begin(config, model, optimizer, scaler, tokenizer, ranks)
    forward, prompts = wrap(model, config, ranks), data["train"]
    watch = NonFinite()
    with (closing(MetricLog(config, ranks, state["step"], flops_per_token(model.config, config.max_seq_len),
                            matmul_peak(ranks.device, ranks.dtype) * ranks.world_size)) as log,
          closing(Stop(config.max_seconds)) as stop):
        for step in range(state["step"], config.max_steps):
            # 1. Whole prompts: all replies of one in one batch, each read once, whatever it is compared with.
            started = time.perf_counter()
            _, rows = rows_of_step(config.seed, 0 if config.overfit else step, len(prompts), sizes, skip)
            batch = [prompts[i] for i in rows]
            tokens, lr = sum(len(ids) for prompt in batch for ids in prompt.ids), lr_at(step, config)
            set_lr(optimizer, lr)
            # 2. Loss and gradient, micro-batch by micro-batch.
            forward.train()
            loss_of = loss_function(config, prompts, batch, data["scale"], ranks)
            mine = torch.from_numpy(share(rows, ranks.rank, ranks.world_size))
            loss = accumulate(forward, loss_of, [mine], micro_batch_size, 1, ranks, scaler, config.seed, step)
            # 3. Clip, step.
            grad_norm = clip_and_step(optimizer, model.parameters(), scaler, config.max_grad_norm)
            # 4. Say so; now and then look at the model, and keep it.
            state |= {"step": step + 1, "tokens": state["tokens"] + tokens}
            log.step(step + 1, tokens, time.perf_counter() - started, loss=ranks.sum(loss).item(), lr=lr,
                     grad_norm=grad_norm)
            watch.check(grad_norm, step + 1)
            finished, stopped = step + 1 == config.max_steps, stop.agreed(ranks)
            if not finished and (step + 1) % config.eval_every == 0:
                found = judge(model, data["val"], 0)
                log.write(step + 1, **{f"val_{k}": v for k, v in found.items() if isinstance(v, float)})
                ranks.say(f"evaluation at step {step + 1}: " + told(found))
            extra = {}
            if finished:
                found = judge(model, data["val"], config.bootstrap)
                normalize(model, *data["normal"])
                extra = {"reward": conclude(config, found, data, log, ranks)}
            if finished or stopped or (step + 1) % config.save_every == 0:
                checkpoint.save_run("reward", config, model, optimizer, scaler, tokenizer, state, ranks,
                                    **extra)
            if stopped:
                break
    ranks.say(f"{'done' if state['step'] >= config.max_steps else 'stopped (--resume goes on)'}: "
              f"step {state['step']}, {state['tokens']:,} tokens, in {config.out_dir}")
    return model


# ---- losses

def preference_loss(scores, ranks):
    """Sum over prompts of the mean -log sigmoid(better - worse) of their pairs; how many have any.

    scores, ranks (N, K); rank 0 = best, -1 = no reply there; equal ranks are no pair. All pairs of a prompt
    together, one forward a reply: shuffled apart they overfit in an epoch (Ouyang et al. 2022, section 3.4).
    """
    there = (ranks >= 0)[:, :, None] & (ranks >= 0)[:, None, :]
    pairs = (ranks[:, :, None] < ranks[:, None, :]) & there         # (N, K, K): the first is better
    losses = -F.logsigmoid(scores[:, :, None] - scores[:, None, :]) * pairs
    n_pairs = pairs.sum((1, 2))
    return (losses.sum((1, 2)) / n_pairs.clamp(min=1)).sum(), (n_pairs > 0).sum()


def score_loss(predicted, scores):
    """Sum of squared errors on z-scored ratings, and how many they are; both (N,)."""
    return ((predicted - scores) ** 2).sum(), torch.tensor(len(scores))


def pairwise_accuracy(chosen, rejected):
    """Share of pairs whose chosen reply scores higher, equal scores half; both (N,)."""
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean().item()


def loss_function(config, prompts, batch, scale, ranks):
    """loss_of(model, numbers of prompts) -> (its part of the whole batch's loss, 1).

    Each kind of loss is a mean over what the WHOLE batch has of it, so their counts are taken here.
    """
    n_compared = max(1, sum(len(prompt.rankings) for prompt in batch))
    n_rated = max(1, sum(len(prompt.scores) for prompt in batch))
    n_tokens = max(1, sum(prompt.lengths[i] for prompt in batch for i, _ in prompt.scores))
    mean, sd = scale

    def loss_of(model, numbers):
        mine = [prompts[i] for i in numbers.tolist()]
        texts, lengths = joined_up((prompt.ids, prompt.lengths) for prompt in mine)
        ids, doc_ids, targets, row, last = packed_replies(texts, lengths, config.max_seq_len, ranks.device)
        values = model(ids, doc_ids, targets)                   # (B, T)
        scores = values[row, last]                              # one a reply
        table, places, rated = (x.to(ranks.device) for x in tables(mine))
        pairs, _ = preference_loss(scores[places], table)
        who, marks = rated[0].long(), (rated[1] - mean) / sd
        errors, _ = score_loss(scores[who], marks)
        loss = config.pair_coef / n_compared * pairs + config.score_coef / n_rated * errors
        if config.token_coef:
            which, at = every_token(last[who], torch.tensor(lengths, device=ranks.device)[who])
            errors, _ = score_loss(values[row[who][which], at], marks[which])
            loss = loss + config.token_coef / n_tokens * errors
        return loss, 1
    return loss_of


def every_token(last, lengths):
    """Whose each token of replies that end at `last` is, and its place; last, lengths (N,), both (sum,)."""
    which = torch.arange(len(last), device=last.device).repeat_interleave(lengths)
    left = lengths.cumsum(0)[which] - torch.arange(len(which), device=last.device)      # to the end, and one
    return which, last[which] + 1 - left


def tables(prompts):
    """The rankings as ranks (N, K), -1 for none, and places (N, K) of their replies in one long list; and the
    ratings as (2, n): places and scores."""
    starts = np.cumsum([0] + [len(prompt.ids) for prompt in prompts]).tolist()
    rankings = [([start + i for i in places], ranks) for prompt, start in zip(prompts, starts)
                for places, ranks in prompt.rankings]
    K = max((len(ranks) for _, ranks in rankings), default=1)
    table = torch.tensor([ranks + [-1] * (K - len(ranks)) for _, ranks in rankings]).view(-1, K)
    places = torch.tensor([where + [0] * (K - len(where)) for where, _ in rankings]).long().view(-1, K)
    rated = [[start + i, score] for prompt, start in zip(prompts, starts) for i, score in prompt.scores]
    return table, places, torch.tensor(rated, dtype=torch.float32).view(-1, 2).T


# ---- data

@dataclass
class Prompt:
    """All that is known of a prompt: its different replies as tokens, and what was said of them."""
    ids: list                       # of each reply with its prompt before it and its end
    texts: list                     # of each reply
    lengths: list                   # of each reply alone, tokens
    rankings: list                  # [(places in ids, ranks)], those that prefer anything
    scores: list                    # [(place in ids, score)]

    def pairs(self):
        """(place of the better reply, place of the worse) of all comparisons."""
        return [(a, b) for places, ranks in self.rankings for a, i in zip(places, ranks)
                for b, j in zip(places, ranks) if i < j]

    def teaches(self):
        """Whether anything is said of the replies; of nothing but ties there is nothing to learn."""
        return bool(self.rankings or self.scores)


def read_prompts(spec, tokenizer, max_tokens, config, say=print):
    """{prompt: Prompt} of the records of "FILE[:WEIGHT],...", in their order; a line says how many."""
    found, n_records, bad, first_bad = {}, 0, 0, ""
    for where, record, copies in weighted_records(spec, config.seed):
        n_records += 1
        try:
            if isinstance(record, UserError):
                raise record
            add_record(found, record, tokenizer, max_tokens, copies)
        except UserError as error:
            if not config.skip_bad:
                raise UserError(f"{where}: {error}; --skip_bad leaves such records out") from None
            bad, first_bad = bad + 1, first_bad or f"{where}: {error}"
    prompts = list(found.values())
    say(f"{spec}: {n_records:,} records, {len(prompts):,} prompts, {sum(len(p.ids) for p in prompts):,} "
        f"replies, {sum(len(p.pairs()) for p in prompts):,} comparisons, "
        f"{sum(len(p.scores) for p in prompts):,} scores"
        + (f", {bad:,} bad records skipped (the first: {first_bad})" if bad else ""))
    if not prompts:
        raise UserError(f"{spec}: no judged replies in it")
    return found


def add_record(found, record, tokenizer, max_tokens, copies):
    """Put a record's replies and judgements to those of its prompt, a new one if it has not been seen."""
    comparison = to_comparison(record)
    whole, lengths = with_prompt(comparison.messages, comparison.replies, tokenizer, max_tokens)
    key = json.dumps(comparison.messages, ensure_ascii=False)
    prompt = found.setdefault(key if comparison.messages else comparison.replies[0],
                              Prompt([], [], [], [], []))
    places = []
    for text, ids, n in zip(comparison.replies, whole, lengths):
        if ids not in prompt.ids:
            prompt.ids.append(ids)
            prompt.texts.append(text)
            prompt.lengths.append(n)
        places.append(prompt.ids.index(ids))
    ranks, scores = comparison.ranks, comparison.scores
    if ranks is None and len(whole) > 1:
        ranks = [-score for score in scores]
    if ranks is not None and len(set(ranks)) > 1:
        order = sorted(set(ranks))
        prompt.rankings += [(places, [order.index(rank) for rank in ranks])] * copies
    prompt.scores += list(zip(places, scores or ())) * copies


def with_prompt(messages, replies, tokenizer, max_tokens):
    """Ids of each reply with its prompt before it and its end, and the lengths of the replies alone."""
    asked = tokenizer.encode_chat(messages, add_generation_prompt=True)[0]
    replies = [[*tokenizer.encode(text.strip()), tokenizer.im_end_id] for text in replies]
    return [joined(asked, reply, max_tokens) for reply in replies], [len(reply) for reply in replies]


def joined_up(parts):
    """(texts, lengths) of all together; parts: such pairs of lists."""
    texts, lengths = [], []
    for some, of_those in parts:
        texts += some
        lengths += of_those
    return texts, lengths


def add_ratings(found, path, samples, tokenizer, max_tokens, say):
    """Put what people said of the samples to the prompts: marks as scores, all else as rankings."""
    if not samples:
        raise UserError("--ratings needs --normalize_on: the samples.jsonl that was rated")
    if not Path(path).exists():
        raise UserError(f"{path}: no such file")
    judged = ratings.read_ratings(path, samples)
    records = [*ratings.records_of(judged, samples, "scores"),
               *ratings.records_of([r for r in judged if r["kind"] != "rubric"], samples, "rankings")]
    if not records:
        raise UserError(f"{path}: no ratings in it")
    for record in records:
        add_record(found, record, tokenizer, max_tokens, 1)
    say(f"{path}: {len(judged):,} ratings by {len({r['annotator'] for r in judged})} people")


def open_data(config, model_config, tokenizer, ranks):
    """({"train", "val": [Prompt], "scale": (mean, sd) of ratings, "normal": (texts, lengths)}, the config
    filled in)."""
    T = config.max_seq_len or model_config.max_seq_len
    found = read_prompts(config.data, tokenizer, T, config, ranks.say) if config.data else {}
    samples = ratings.read_samples(config.normalize_on) if config.normalize_on else {}
    if config.ratings:
        add_ratings(found, config.ratings, samples, tokenizer, T, ranks.say)
    for name, coef, n in (("pair_coef", config.pair_coef, sum(len(p.rankings) for p in found.values())),
                          ("score_coef", config.score_coef, sum(len(p.scores) for p in found.values()))):
        if coef and not n and not (config.pair_coef and config.score_coef):
            other, what = (("score_coef", "comparisons") if name == "pair_coef" else ("pair_coef", "scores"))
            raise UserError(f"{config.data or config.ratings}: no {what} to learn from; "
                            f"give --{name} 0 --{other} 1")
    if not config.pair_coef and not config.score_coef:
        raise UserError("pair_coef 0 and score_coef 0 leave nothing to learn; raise one of them")
    found = {key: prompt for key, prompt in found.items() if prompt.teaches()}
    if config.val_data:
        held_out = read_prompts(config.val_data, tokenizer, T, config, ranks.say).values()
        train, val = list(found.values()), [prompt for prompt in held_out if prompt.teaches()]
    else:
        train, val = split(found, config.val_share)
    if config.max_comparisons:
        sums = np.cumsum([len(prompt.pairs()) or len(prompt.scores) for prompt in train])
        train = train[:int(np.searchsorted(sums, config.max_comparisons)) + 1]
    if (not (config.pair_coef and any(prompt.pairs() for prompt in val))
            and sum(len(prompt.scores) for prompt in val) < 3):
        raise UserError(f"{config.val_data or config.data or config.ratings}: no validation prompt holds "
                        "anything to judge by; give --val_data or more --val_share")
    scores = [score for prompt in train for _, score in prompt.scores]
    scale = (float(np.mean(scores)), float(np.std(scores)) or 1.0) if scores else (0.0, 1.0)
    normal = joined_up((prompt.ids, prompt.lengths) for prompt in train)
    if config.normalize_on:
        normal = joined_up(with_prompt(sample["messages"], [reply["text"] for reply in sample["replies"]],
                                       tokenizer, T) for sample in samples.values())
        if len(normal[0]) < 2:
            raise UserError(f"{config.normalize_on}: {len(normal[0])} replies are too few to normalise on")
    steps = max(1, math.ceil(len(train) / config.batch_size))
    ranks.say(f"prompts: {len(train):,} to learn from, {len(val):,} to judge by")
    config = replace(config, max_seq_len=T, **(
        {"max_steps": max(1, round(config.epochs * steps))} if config.epochs and not config.resume else {}))
    return {"train": train, "val": val, "scale": scale, "normal": normal}, config


def split(found, share):
    """(train, validation): a prompt goes to validation by its words, whatever else is in the file."""
    if not 0 < share < 1:
        raise UserError(f"val_share {share} is a share of the prompts; give more than 0 and less than 1, or "
                        "--val_data")
    parts = [], []
    for key, prompt in found.items():
        parts[zlib.crc32(key.encode()) < share * 2 ** 32].append(prompt)
    if not all(parts):
        raise UserError(f"val_share {share} of {len(found)} prompts leaves {len(parts[0])} for training and "
                        f"{len(parts[1])} for validation; change it or give --val_data")
    return parts


# ---- how good is it?

def judge(model, prompts, n_bootstrap):
    """What the model's scores are worth on prompts it has not seen; the intervals resample the prompts."""
    texts, lengths = joined_up((prompt.ids, prompt.lengths) for prompt in prompts)
    raw = score_texts(model, texts, lengths) * model.score_std + model.score_mean
    by_prompt = [part.tolist() for part in raw.split([len(prompt.ids) for prompt in prompts])]
    found = {"length_correlation": pearson(raw.tolist(), lengths)}
    margins = [[scores[a] - scores[b] for a, b in prompt.pairs()] for prompt, scores
               in zip(prompts, by_prompt)]
    if any(margins):
        flat = torch.tensor([m for part in margins for m in part])
        found |= {"comparisons": len(flat), "accuracy": pairwise_accuracy(flat, -flat),
                  "log_loss": -F.logsigmoid(flat).mean().item(), "calibration_error": calibration(flat)}
        found["by_margin"] = {f"{low:g}-{high:g}": (len(part), pairwise_accuracy(part, -part))
                              for low, high in zip((0, *MARGINS), (*MARGINS, math.inf))
                              if len(part := flat[(flat.abs() >= low) & (flat.abs() < high)])}
        right = [[(m > 0) + 0.5 * (m == 0) for m in part] for part in margins]
        found["accuracy_interval"] = interval95(
            right, lambda parts: float(np.mean([x for part in parts for x in part])), n_bootstrap)
    rated = [[(scores[i], score) for i, score in prompt.scores] for prompt, scores in zip(prompts, by_prompt)]
    if sum(map(len, rated)) > 2:
        correlation = lambda parts: pearson(*zip(*(pair for part in parts for pair
                                                   in part)))       # noqa: E731
        found |= {"scores": sum(map(len, rated)), "pearson": correlation(rated),
                  "pearson_interval": interval95(rated, correlation, n_bootstrap)}
    return found


def calibration(margins):
    """Expected calibration error of sigmoid(margin), each pair told in both orders."""
    probability = torch.cat([margins, -margins]).sigmoid().tolist()
    return calibration_error(probability, [1] * len(margins) + [0] * len(margins))


def interval95(parts, statistic, n_bootstrap):
    """(low, high) by drawing prompts with replacement (Efron 1979): pairs of one depend on each other."""
    parts = [part for part in parts if len(part)]
    if not n_bootstrap:
        return math.nan, math.nan
    drawn = [statistic([parts[i] for i in (draws(0, "bootstrap", b, len(parts)) % len(parts)).tolist()])
             for b in range(n_bootstrap)]
    return tuple(np.nanpercentile(drawn, [2.5, 97.5]).tolist())


def baselines(train, val, metric="accuracy"):
    """Two judges that read little, on the validation prompts: {"length", "bag_of_words"}.

    By accuracy on pairs or by Pearson's r with scores. length: longer or shorter, whichever was better in
    training. bag_of_words: logistic regression on the difference of the counts of the WORDS most frequent
    words, for scores linear regression on the counts, with a small L2 penalty.
    """
    def judged(prompts):                    # texts that count for and against, their length, the target
        if metric == "accuracy":
            return [((p.texts[a], p.texts[b]), p.lengths[a] - p.lengths[b], 1.0)
                    for p in prompts for a, b in p.pairs()]
        return [((p.texts[i],), p.lengths[i], score) for p in prompts for i, score in p.scores]
    learn, hold = judged(train), judged(val)
    if not learn or not hold:
        return {}
    count = Counter(word for texts, _, _ in learn for text in texts for word in set(words(text)))
    index = {word: i for i, (word, _) in enumerate(count.most_common(WORDS))}

    def table(items):
        x = torch.zeros(len(items), len(index))
        for row, (texts, _, _) in zip(x, items):
            for text, sign in zip(texts, (1, -1)):
                for word, n in Counter(words(text)).items():
                    if word in index:
                        row[index[word]] += sign * n
        return x
    x, target = table(learn), torch.tensor([float(t) for _, _, t in learn])
    if metric == "pearson":                 # of neither does the mean matter, of the scores not the unit
        x, target = x - x.mean(0), (target - target.mean()) / target.std().clamp(min=1e-6)
    weight = torch.zeros(len(index), requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        solver.zero_grad()
        told = x @ weight
        losses = -F.logsigmoid(told) if metric == "accuracy" else (told - target) ** 2
        loss = losses.mean() + 1e-3 * (weight ** 2).sum()
        loss.backward()
        return loss
    solver.step(closure)

    def quality(told, items):
        if metric == "accuracy":
            return pairwise_accuracy(told, -told)
        return pearson(told.tolist(), [t for _, _, t in items])
    length = [torch.tensor([float(n) for _, n, _ in items]) for items in (learn, hold)]
    chance = 0.5 if metric == "accuracy" else 0.0
    return {"length": quality(length[1] * (1 if quality(length[0], learn) >= chance else -1), hold),
            "bag_of_words": quality(table(hold) @ weight.detach(), hold)}


def normalize(model, texts, lengths):
    """Set the buffers so that these texts, given as to score_texts, score 0 on average, deviation 1."""
    model.score_mean.fill_(0.0)
    model.score_std.fill_(1.0)
    raw = score_texts(model, texts, lengths)
    model.score_mean.copy_(raw.mean())
    model.score_std.copy_(raw.std().clamp(min=1e-6))


def conclude(config, found, data, log, ranks):
    """Say and write what the model is worth; returns the gate for config.json."""
    metric = "accuracy" if config.pair_coef and "accuracy" in found else "pearson"
    chance = 0.5 if metric == "accuracy" else 0.0
    low = found[f"{metric}_interval"][0]
    gate = {"metric": metric, "value": found[metric], "low": low, "passed": bool(low > chance)}
    plain = baselines(data["train"], data["val"], metric)
    found = found | {"baselines": plain, "gate": gate}
    ranks.say(f"held out: {told(found)}")
    for margin, (n, right) in found.get("by_margin", {}).items():
        ranks.say(f"    margin of scores {margin}: {right:.3f} of {n:,} right")
    ranks.say("baselines: " + "  ".join(f"{name} {value:.3f}" for name, value in plain.items()))
    ranks.say(verdict(found, gate, plain))
    log.write(config.max_steps, **{f"val_{k}": v for k, v in found.items() if isinstance(v, float)})
    if ranks.is_main:
        write_text(Path(config.out_dir) / "report.json", json.dumps(found, indent=1) + "\n")
    return gate


def verdict(found, gate, plain):
    """The result in words."""
    if not gate["passed"]:
        return (f"verdict: not usable. {gate['metric']} {gate['value']:.3f} is within noise of chance (its "
                f"95% interval begins at {gate['low']:.3f}); more or clearer judgements are needed. ppo.py "
                f"refuses it.")
    text = (f"verdict: usable. {gate['metric']} {gate['value']:.3f}, at least {gate['low']:.3f} with 95% "
            "confidence.")
    worse = [name.replace("_", " ") for name, value in plain.items() if value >= gate["value"]]
    if worse:
        text += f" But {' and '.join(worse)} alone does as well: it has learnt little below the surface."
    if abs(found["length_correlation"]) > 0.5:
        side = "longer" if found["length_correlation"] > 0 else "shorter"
        text += (f" It likes {side} replies (correlation {found['length_correlation']:.2f}): "
                 "watch the length in PPO.")
    return text


def told(found):
    """The numbers of `judge` in a line."""
    parts = [f"{k} {v:.4f}" for k, v in found.items() if isinstance(v, float)]
    parts += [f"{k[:-9]} 95% interval {v[0]:.3f}-{v[1]:.3f}" for k, v in found.items()
              if k.endswith("_interval") and not math.isnan(v[0])]         # none is made on the way
    return "  ".join(parts)


# ---- scoring a file, and the built-in data

def score_file(config, ranks):
    """Print {"where", "scores"} for every record of judged or plain replies of a file."""
    model, tokenizer, _ = checkpoint.load_model(config.init_from or config.out_dir, ranks.device)
    if not isinstance(model, ScalarModel):
        raise UserError(f"--init_from {config.init_from} is no reward model; give the --out_dir of a "
                        f"reward.py run")
    for where, record in read_records(config.score):
        try:
            if isinstance(record, UserError):
                raise record
            messages, replies = replies_of(record)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        scores = score_texts(model, *with_prompt(messages, replies, tokenizer, model.config.max_seq_len))
        print(json.dumps({"where": where, "scores": [round(score, 4) for score in scores.tolist()]}))


def replies_of(record):
    """(messages, replies) of a record of samples.jsonl, of judged replies or of a conversation."""
    if isinstance(record, dict) and isinstance(record.get("replies"), list):
        return record["messages"], [reply["text"] for reply in record["replies"]]
    try:
        found = to_comparison(record)
        return found.messages, found.replies
    except UserError:
        messages = to_messages(record)
        return messages[:-1], [messages[-1]["content"]]


def built_in(config, ranks):
    """The config with made-up judgements and a small untrained model filled in; for --smoke."""
    directory = Path(config.out_dir) / "built_in"
    if ranks.is_main and not directory.exists():
        directory.mkdir(parents=True)
        records = [{"prompt": f"Say {word} {i}.", "outputs": [
            {"response": f"{word} {i}!", "rank": 1}, {"response": f"{word}?", "rank": 2},
            {"response": "no", "rank": 3}]} for i in range(20) for word in ("hello", "yes", "now")]
        write_text(directory / "rankings.jsonl", "".join(json.dumps(record) + "\n" for record in records))
        tokenizer = Tokenizer.train([json.dumps(record) for record in records], 300)
        torch.manual_seed(config.seed)
        model = LanguageModel(ModelConfig(tokenizer.vocab_size, d_model=64, n_layers=2, n_heads=4, d_ff=128))
        checkpoint.save(directory / "model", 0, {"stage": "sft", "config": vars(model.config), "tokens": 0},
                        model.state_dict(), {}, tokenizer)
    ranks.barrier()
    return replace(config, data=config.data or str(directory / "rankings.jsonl"),
                   init_from=config.init_from or str(directory / "model"))


if __name__ == "__main__":
    run(lambda: main(parse_config(RewardConfig, presets=PRESETS, kept=RESUMABLE)))
