"""Instruction tuning: learn the answers of conversations, not the questions (Ouyang et al. 2022, step 1).

Starts from a pretrained checkpoint. One step: rows of packed conversations, cross-entropy over the
assistant's tokens and their ends, clip, optimiser.
    python sft.py --config demo --init_from out/pretrain --data DIR/sft_train.jsonl --out_dir OUT
    python sft.py --init_from out/pretrain --data FILE --show 3        # what is learnt, token by token

Shapes:  B rows   T max_seq_len   V vocab_size
"""

import math
import sys
import time
import zlib
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import checkpoint
from batches import row_sums, rows_of_step, share
from cli import UserError, option, parse_config, run
from generate import generate
from model import IGNORE_INDEX, MAX_LOGITS, LanguageModel, ModelConfig, flops_per_token
from optim import make_optimizer, set_lr
from records import conversation_rows, pack, read_conversations
from tokenizer import SPECIALS, Tokenizer
from training import (RESUMABLE, MetricLog, NonFinite, Stop, TrainingConfig, accumulate, at_least, autocast,
                      batch_sizes, check, clip_and_step, draw_seed, intervals, loss_scaler, lr_at,
                      matmul_peak, start_ranks, wrap)

PRESETS = {
    "demo": dict(batch_size=8, epochs=0, max_steps=600, learning_rate=2.5e-3, warmup_steps=20, eval_every=150,
                 save_every=150, compile=False),
    "results": dict(batch_size=16, epochs=0, max_steps=2600, learning_rate=2.5e-3, warmup_steps=30,
                    eval_every=500, save_every=500, compile=False),
    "tutorial": dict(max_seq_len=128, packing=False, batch_size=8, epochs=3, by_epoch=True, optimizer="adamw",
                     learning_rate=5e-5, weight_decay=0.01, log_every=10),
    "smoke": dict(max_steps=6, epochs=0, batch_size=4, eval_every=3, save_every=3, warmup_steps=2,
                  log_every=2, samples=1, sample_tokens=16, compile=False),
}


@dataclass
class SFTConfig(TrainingConfig):
    """Instruction tuning of a pretrained model on records of conversations."""
    data: str = option("", "records to learn: FILE[:WEIGHT],...; .jsonl or .json, any of seven formats")
    val_data: str = option("", "records to judge by; none = --val_share of the data")
    val_share: float = option(0.05, "of the data that is kept for validation where there is no --val_data")
    out_dir: str = option("out/sft", "where checkpoints and log.jsonl go")
    max_seq_len: int = option(0, "longest conversation, tokens; 0 = the checkpoint's")
    dropout: float = option(0.0, "share of the embedding and of each block's outputs set to 0 in training")
    epochs: float = option(3.0, "times that the data is seen; it decides max_steps; 0 = as --max_steps says")
    by_epoch: bool = option(False, "evaluate and save at the end of every epoch, not every so many steps")
    learning_rate: float = option(1e-3, "peak")
    packing: bool = option(True, "several conversations a row; without it batch_size means conversations")
    skip_bad: bool = option(False, "count records that cannot be used and go on")
    label_smoothing: float = option(0.0, "share of the target's probability spread over the vocabulary")
    label_weights: str = option("", "factors on the loss of whole answers, such as happy=2,sad=0.5")
    teacher: str = option("", "checkpoint whose next-token distribution is learnt beside the data: a larger "
                              "one (distillation), or --init_from itself (against forgetting)")
    teacher_coef: float = option(0.0, "weight of the KL divergence from the teacher, nats a token")
    samples: int = option(2, "validation prompts answered at each evaluation")
    sample_tokens: int = option(80, "longest answer, tokens")
    show: int = option(0, "print so many records token by token, with what is learnt, and train nothing")


def main(config):
    with start_ranks(config) as ranks:
        if config.smoke:
            config = built_in(config, ranks)
        if not config.data:
            raise UserError("--data is missing; name files of records: FILE[:WEIGHT],...")
        show(config) if config.show else train(config, ranks)


def train(config, ranks):
    """The run: what is needed, then the loop; returns the model."""
    micro_batch_size = check(config, ranks)
    at_least(0, config, "samples", "teacher_coef", "label_smoothing", "epochs")
    at_least(1, config, "sample_tokens")
    if config.label_smoothing >= 1:
        raise UserError(f"label_smoothing {config.label_smoothing} is a share; "
                        "give 0 or more and less than 1")
    model_config, tokenizer = checkpoint.source(config, ranks.say)
    data, config = open_data(config, model_config, tokenizer, ranks)
    model_config = replace(model_config, max_seq_len=config.max_seq_len)
    torch.manual_seed(draw_seed(config.seed, "init"))
    model = LanguageModel(model_config).to(ranks.device)
    optimizer = make_optimizer(config.optimizer, model, config.learning_rate, config.beta1, config.beta2,
                               config.eps, config.weight_decay)
    scaler, skip, sizes = (loss_scaler(ranks), intervals(config.skip_steps),
                           batch_sizes(config, config.max_seq_len))
    state = checkpoint.begin(config, model, optimizer, scaler, tokenizer, ranks)
    forward, loss_of = wrap(model, config, ranks), loss_function(config, data, ranks)
    peak = matmul_peak(ranks.device, ranks.dtype) * ranks.world_size
    watch = NonFinite()
    with (closing(MetricLog(config, ranks, state["step"], flops_per_token(model_config, config.max_seq_len),
                            peak)) as log,
          closing(Stop(config.max_seconds)) as stop):
        for step in range(state["step"], config.max_steps):
            # 1. The rows of this step; the loss is a mean over the weights of all of them.
            started = time.perf_counter()
            _, rows = rows_of_step(config.seed, 0 if config.overfit else step, len(data["rows"]), sizes, skip)
            mine = [data["rows"][r] for r in share(rows, ranks.rank, ranks.world_size)]
            batch = [x.to(ranks.device) for x in conversation_rows(data["train"], mine, config.max_seq_len)]
            tokens, lr = int(data["tokens"][rows].sum()), lr_at(step, config)
            set_lr(optimizer, lr)
            # 2. Loss and gradient, micro-batch by micro-batch.
            forward.train()
            loss = accumulate(forward, loss_of, batch, micro_batch_size, data["weights"][rows].sum(), ranks,
                              scaler, config.seed, step)
            # 3. Clip, step.
            grad_norm = clip_and_step(optimizer, model.parameters(), scaler, config.max_grad_norm)
            # 4. Say so; now and then look at the model, and keep it.
            state |= {"step": step + 1, "tokens": state["tokens"] + tokens}
            log.step(step + 1, tokens, time.perf_counter() - started, loss=ranks.sum(loss).item(), lr=lr,
                     grad_norm=grad_norm)
            watch.check(grad_norm, step + 1)
            finished, stopped = step + 1 == config.max_steps, stop.agreed(ranks)
            if finished or (step + 1) % config.eval_every == 0:
                look(config, model, data, tokenizer, ranks, state, log)
            if finished or stopped or (step + 1) % config.save_every == 0:
                checkpoint.save_run("sft", config, model, optimizer, scaler, tokenizer, state, ranks)
            if stopped:
                break
    ranks.say(f"{'done' if state['step'] >= config.max_steps else 'stopped (--resume goes on)'}: "
              f"step {state['step']}, {state['tokens']:,} tokens, in {config.out_dir}")
    return model


# ---- data

def built_in(config, ranks):
    """The config with records of the story world and a small untrained model filled in; for --smoke."""
    from data.instructions import InstructionsConfig, write_files
    directory = Path(config.out_dir) / "built_in"
    if ranks.is_main and not directory.exists():
        write_files(InstructionsConfig(str(directory), examples=300, prompts=20))
        texts = (directory / "sft_train.jsonl").read_text(encoding="utf-8").splitlines()
        tokenizer = Tokenizer.train(texts, 512)
        torch.manual_seed(config.seed)
        model = LanguageModel(ModelConfig(512, d_model=64, n_layers=2, n_heads=4, d_ff=128, max_seq_len=512))
        record = {"stage": "pretrain", "config": vars(model.config), "tokens": 0}
        checkpoint.save(directory / "model", 0, record, model.state_dict(), {}, tokenizer)
    ranks.barrier()
    return replace(config, data=config.data or str(directory / "sft_train.jsonl"),
                   init_from=config.init_from or str(directory / "model"))


def open_data(config, model_config, tokenizer, ranks):
    """{"train", "val": conversations, "rows", of each row "tokens", "weights"}, and the config filled in."""
    T = config.max_seq_len or model_config.max_seq_len
    read = partial(read_conversations, tokenizer=tokenizer, max_tokens=T + 1, seed=config.seed,
                   skip_bad=config.skip_bad, label_weights=weights_by_label(config.label_weights))
    found = read(config.data)
    ranks.say(f"data: {found.report()}")
    train, val = found.items, None
    if config.val_data:
        judged = read(config.val_data)
        ranks.say(f"validation: {judged.report()}")
        val = judged.items
    else:
        train, val = split(train, config.val_share)
    rows = pack(train, T, config.seed, config.packing)
    tokens = np.array([sum(len(train[i].ids) - 1 for i in row) for row in rows])
    weights = np.array([sum(train[i].weight * train[i].learn[1:].sum() for i in row) for row in rows])
    ranks.say(f"rows: {len(rows):,} of {T} positions, {tokens.sum() / (len(rows) * T):.1%} of them real, "
              f"{weights.sum():,.0f} to learn")
    steps = max(1, round(len(rows) / config.batch_size))                # of an epoch
    config = replace(config, max_seq_len=T, **(
        {"max_steps": max(1, round(config.epochs * steps))} if config.epochs and not config.resume else {}))
    if config.by_epoch:
        config = replace(config, eval_every=steps, save_every=steps)
    return {"train": train, "val": val, "rows": rows, "tokens": tokens, "weights": weights}, config


def split(items, share):
    """(train, validation): a conversation goes to validation by its words, so equal ones stay together."""
    if not 0 < share < 1:
        raise UserError(f"val_share {share} is a share of the data; give more than 0 and less than 1, or "
                        "--val_data")
    parts = [], []
    for item in items:
        parts[zlib.crc32(repr(item.messages).encode()) < share * 2 ** 32].append(item)
    if not all(parts):
        raise UserError(f"val_share {share} of {len(items)} conversations leaves {len(parts[0])} for "
                        f"training and {len(parts[1])} for validation; change it or give --val_data")
    return parts


def weights_by_label(text):
    """"happy=2,sad=0.5" -> {"happy": 2.0, "sad": 0.5}."""
    found = {}
    for part in filter(None, text.split(",")):
        label, _, weight = part.rpartition("=")
        try:
            found[label.strip()] = float(weight)
        except ValueError:
            weight = -1
        if not label.strip() or not 0 <= float(weight) < math.inf:
            raise UserError(f"label_weights {part!r} is not LABEL=FACTOR; give for instance happy=2,sad=0.5")
    return found


def show(config):
    """Print conversations token by token: what is learnt in green, what is only read in grey."""
    model_config, tokenizer = checkpoint.source(config)
    T = config.max_seq_len or model_config.max_seq_len
    found = read_conversations(config.data, tokenizer, T + 1, config.seed, config.skip_bad)
    green, grey, plain = ("\033[32m", "\033[90m", "\033[0m") if sys.stdout.isatty() else ("[", "", "]")
    for item in found.items[:config.show]:
        print(f"--- {item.where}: {len(item.ids)} tokens, {item.learn.sum()} learnt, weight {item.weight:g}")
        decoder = tokenizer.stream_decoder()
        for id, learn in zip(item.ids.tolist(), item.learn):
            text = SPECIALS[id - tokenizer.eot_id] if id >= tokenizer.eot_id else decoder.push(id)
            print(f"{green}{text}{plain}" if learn else f"{grey}{text}{plain if grey else ''}", end="|")
        print()
    print(found.report())


# ---- loss

def loss_function(config, data, ranks):
    """loss_of(model, ids, targets, weights, doc_ids) -> (sum, count), as the flags say."""
    plain = all(item.weight == 1 for item in data["train"])
    if plain and not config.label_smoothing and not config.teacher_coef:
        return lambda model, ids, targets, weights, doc_ids: model(ids, targets, doc_ids)
    teacher = load_teacher(config, ranks) if config.teacher_coef else None

    def loss_of(model, ids, targets, weights, doc_ids):
        logits, guide = model(ids, doc_ids=doc_ids), None
        if teacher is not None:
            with torch.no_grad():
                guide = teacher(ids, doc_ids=doc_ids)
        return answer_loss(logits, targets, weights, config.label_smoothing, guide, config.teacher_coef)
    return loss_of


def answer_loss(logits, targets, weights, label_smoothing=0.0, teacher_logits=None, teacher_coef=0.0):
    """Weighted sum over the learnt targets in nats, and the sum of their weights.

    Of each target y with the model's distribution p, smoothing s over V ids (Szegedy et al. 2016, section 7)
    and the teacher's distribution q (Hinton et al. 2015, with temperature 1):
        (1 - s) (-log p_y) + s mean_v(-log p_v) + teacher_coef KL(q || p)

    logits, teacher_logits (B, T, V); targets (B, T), IGNORE_INDEX where nothing is learnt; weights (B, T), 0
    there.
    """
    logp = logits.float().log_softmax(-1)
    wanted = targets.where(targets != IGNORE_INDEX, 0)
    loss = -(1 - label_smoothing) * logp.gather(-1, wanted[..., None]).squeeze(-1)
    if label_smoothing:
        loss = loss - label_smoothing * logp.mean(-1)
    if teacher_logits is not None:
        logq = teacher_logits.float().log_softmax(-1)
        loss = loss + teacher_coef * (logq.exp() * (logq - logp)).sum(-1)
    return (loss * weights).sum(), weights.sum()


def load_teacher(config, ranks):
    """The teacher, its weights fixed."""
    if not config.teacher:
        raise UserError(f"teacher_coef {config.teacher_coef} without --teacher; name its checkpoint")
    teacher, tokenizer, _ = checkpoint.load_model(config.teacher, ranks.device)
    if tokenizer.sha256 != checkpoint.source(config)[1].sha256:
        raise UserError(f"teacher {config.teacher}: its tokenizer is not the student's; both must share one")
    return teacher.requires_grad_(False)


# ---- evaluation

def look(config, model, data, tokenizer, ranks, state, log):
    """Evaluate, say so, answer some validation prompts; marks in state whether this model is the best."""
    found = evaluate(config, model, data["val"], ranks)
    if found["val_loss"] <= state.get("best_loss", math.inf):
        state |= {"best_loss": found["val_loss"], "best_step": state["step"]}
    log.write(state["step"], **found)
    ranks.say(f"evaluation at step {state['step']}: " + "  ".join(f"{k} {v:.4f}" for k, v in found.items()))
    if not ranks.is_main or not config.samples:
        return
    asked = [data["val"][i] for i in np.linspace(0, len(data["val"]) - 1, config.samples).astype(int)]
    prompts = [tokenizer.encode_chat(item.messages[:-1], add_generation_prompt=True)[0] for item in asked]
    prompts = [prompt[1 - config.max_seq_len:] for prompt in prompts]
    seeds = [draw_seed(config.seed, "samples", i) for i in range(len(prompts))]
    ends = tokenizer.im_end_id, tokenizer.eot_id
    for item, ids in zip(asked, generate(model, prompts, config.sample_tokens, temperature=0.7, stop_ids=ends,
                                         seeds=seeds)):
        question, answer = item.messages[-2]["content"], tokenizer.decode([i for i in ids if i not in ends])
        ranks.say(f"sample: {' '.join(question.split())} -> {' '.join(answer.split())}")


def evaluate(config, model, items, ranks):
    """Loss in nats a learnt token, perplexity, token accuracy over validation conversations, unweighted."""
    model.eval()
    rows, T = pack(items, config.max_seq_len), config.max_seq_len
    at_once = max(1, MAX_LOGITS // (T * model.config.vocab_size))
    mine = share(rows, ranks.rank, ranks.world_size)
    batches = (conversation_rows(items, mine[i:i + at_once], T) for i in range(0, len(mine), at_once))
    with autocast(ranks):
        sums = row_sums(model, ((ids, targets, doc_ids) for ids, targets, _, doc_ids in batches))
    loss, right, count = ranks.sum(sums).tolist()
    return {"val_loss": loss / count, "val_perplexity": math.exp(min(100, loss / count)),
            "val_accuracy": right / count}


if __name__ == "__main__":
    run(lambda: main(parse_config(SFTConfig, presets=PRESETS, kept=RESUMABLE)))
