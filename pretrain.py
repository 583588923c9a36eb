"""Pretraining: learn to predict the next token of text (Radford et al. 2018; Touvron et al. 2023).

Reads the shards that data/prepare.py wrote. One step: rows of the sampler, loss, backward in micro-batches,
clip, optimiser; now and then an evaluation and a checkpoint.
    python pretrain.py --config tiny --data_dir DIR --out_dir OUT
    torchrun --nproc_per_node=8 pretrain.py --config gpt2-124m --data_dir DIR --out_dir OUT
"""

import math
import time
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

import checkpoint
from batches import (Shards, bits_from_sums, check_tokenizer, document_sums, n_rows, packed_rows,
                     row_sums, rows_of_step, share)
from cli import UserError, option, parse_config, run
from generate import generate
from model import (MAX_LOGITS, LanguageModel, ModelConfig, count_params, flops_per_token,
                   training_memory)
from optim import make_optimizer, set_lr
from tokenizer import Tokenizer
from training import (RESUMABLE, MetricLog, NonFinite, Stop, TrainingConfig, accumulate, at_least, autocast,
                      batch_sizes, check, clip_and_step, draw_seed, free_memory, intervals, loss_scaler,
                      lr_at, matmul_peak, start_ranks, wrap)

PRESETS = {     # a shape, and the lr, batch and length that suit it; the data decides max_steps
    "demo": dict(d_model=192, n_layers=3, n_heads=3, n_kv_heads=3, d_ff=512, max_seq_len=256,
                 tie_embeddings=False, qk_norm=True, batch_size=12, max_steps=1500,
                 learning_rate=2.5e-3, min_lr=0.0, schedule="linear", warmup_steps=40, eval_every=500,
                 eval_documents=100, save_every=500),
    "results": dict(d_model=192, n_layers=3, n_heads=3, n_kv_heads=3, d_ff=512, max_seq_len=256,
                    tie_embeddings=False, qk_norm=True, batch_size=12, max_steps=9000,
                    learning_rate=2.5e-3, min_lr=0.0, schedule="linear", warmup_steps=40, eval_every=600,
                    save_every=600),
    "tiny": dict(d_model=192, n_layers=5, n_heads=6, n_kv_heads=2, d_ff=512, max_seq_len=256,
                 batch_size=16, max_steps=620, learning_rate=1e-2, dropout=0.1),
    "quick-1mb": dict(d_model=128, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=352, max_seq_len=256,
                      batch_size=16, max_steps=400, learning_rate=1e-2, dropout=0.1, compile=False),
    "small": dict(d_model=512, n_layers=8, n_heads=8, n_kv_heads=4, d_ff=1408, max_seq_len=512,
                  batch_size=128, micro_batch_size=16, max_steps=5000, warmup_steps=200, learning_rate=2e-3),
    "gpt2-124m": dict(d_model=768, n_layers=12, n_heads=12, n_kv_heads=12, d_ff=2048, max_seq_len=1024,
                      batch_size=512, micro_batch_size=16, max_steps=19000, warmup_steps=700,
                      learning_rate=1e-3, save_every=500, eval_every=250),
    "350m": dict(d_model=1024, n_layers=24, n_heads=16, n_kv_heads=16, d_ff=2816, max_seq_len=1024,
                 batch_size=512, micro_batch_size=8, max_steps=30000, warmup_steps=1000, learning_rate=6e-4,
                 save_every=500, eval_every=250),
    "smoke": dict(d_model=64, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=128, max_seq_len=64, batch_size=8,
                  max_steps=30, warmup_steps=5, learning_rate=5e-3, eval_every=15, save_every=15, log_every=5,
                  eval_rows=8, sample_tokens=24, compile=False, data_dir=""),
}


@dataclass
class PretrainConfig(TrainingConfig, ModelConfig):
    """Pretraining on token shards."""
    data_dir: str = option("out/data", "token shards, from python -m data.prepare")
    out_dir: str = option("out/pretrain", "where checkpoints and log.jsonl go")
    vocab_size: int = option(0, "tokens in the vocabulary; 0 = the shards'")
    eval_rows: int = option(64, "rows of train and validation text in each evaluation")
    eval_documents: int = option(200, "validation documents that bits/byte is taken over on the way; "
                                      "at the end: all")
    samples: int = option(2, "texts written by the model at each evaluation")
    sample_tokens: int = option(100, "longest of them, tokens")


def main(config):
    with start_ranks(config) as ranks:
        train(config, ranks)


def train(config, ranks):
    """The run: what is needed, then the loop; returns the model."""
    micro_batch_size = check(config, ranks)
    at_least(1, config, "eval_rows", "sample_tokens")
    at_least(0, config, "eval_documents", "samples")
    data, tokenizer, config = open_data(config, ranks)
    torch.manual_seed(draw_seed(config.seed, "init"))
    model = LanguageModel(checkpoint.model_config(config)).to(ranks.device)
    optimizer = make_optimizer(config.optimizer, model, config.learning_rate, config.beta1, config.beta2,
                               config.eps, config.weight_decay)
    scaler, skip, sizes = (loss_scaler(ranks), intervals(config.skip_steps),
                           batch_sizes(config, config.max_seq_len))
    state = checkpoint.begin(config, model, optimizer, scaler, tokenizer, ranks)
    forward = wrap(model, config, ranks)

    def batch_of(step):
        epochs, rows = rows_of_step(config.seed, 0 if config.overfit else step, data["rows"], sizes, skip)
        mine = share(epochs, ranks.rank, ranks.world_size), share(rows, ranks.rank, ranks.world_size)
        return [x.to(ranks.device)
                for x in packed_rows(data["train"], *mine, config.max_seq_len, config.seed)], len(rows)

    peak = preflight(config, ranks, forward, batch_of(state["step"])[0], micro_batch_size, data, sizes)
    watch = NonFinite()
    with (closing(MetricLog(config, ranks, state["step"], flops_per_token(config, config.max_seq_len),
                            peak)) as log,
          closing(Stop(config.max_seconds)) as stop):
        for step in range(state["step"], config.max_steps):
            # 1. The batch of this step, and its learning rate.
            started = time.perf_counter()
            batch, batch_rows = batch_of(step)
            tokens, lr = batch_rows * config.max_seq_len, lr_at(step, config)
            set_lr(optimizer, lr)
            # 2. Loss and gradient, micro-batch by micro-batch.
            forward.train()
            loss = accumulate(forward, loss_of, batch, micro_batch_size, tokens, ranks, scaler, config.seed,
                              step)
            # 3. Clip, step.
            grad_norm = clip_and_step(optimizer, model.parameters(), scaler, config.max_grad_norm)
            # 4. Say so; now and then look at the model, and keep it.
            state |= {"step": step + 1, "tokens": state["tokens"] + tokens}
            log.step(step + 1, tokens, time.perf_counter() - started, loss=ranks.sum(loss).item(), lr=lr,
                     grad_norm=grad_norm)
            watch.check(grad_norm, step + 1)
            finished, stopped = step + 1 == config.max_steps, stop.agreed(ranks)
            if finished or (step + 1) % config.eval_every == 0:
                look(config, model, data, tokenizer, ranks, state, log, whole=finished)
            if finished or stopped or (step + 1) % config.save_every == 0:
                checkpoint.save_run("pretrain", config, model, optimizer, scaler, tokenizer, state, ranks)
            if stopped:
                break
    ranks.say(f"{'done' if state['step'] >= config.max_steps else 'stopped (--resume goes on)'}: "
              f"step {state['step']}, {state['tokens']:,} tokens, in {config.out_dir}")
    return model


def loss_of(model, ids, targets, doc_ids):
    """(sum, count) of the next-token loss of packed rows."""
    return model(ids, targets, doc_ids)


def open_data(config, ranks):
    """The two splits, the tokenizer that wrote them, and the config with its vocabulary filled in."""
    if not config.data_dir:
        config = replace(config, data_dir=built_in_data(config, ranks))
    T = config.max_seq_len
    data = {split: Shards(config.data_dir, split, T) for split in ("train", "val")}
    data["rows"] = n_rows(data["train"].n_tokens, T)
    tokenizer = Tokenizer.load(Path(config.data_dir) / "tokenizer")
    check_tokenizer(data["train"], tokenizer)
    if config.vocab_size not in (0, tokenizer.vocab_size):
        raise UserError(f"vocab_size {config.vocab_size} is not the {tokenizer.vocab_size} of "
                        f"{config.data_dir}; leave it out")
    return data, tokenizer, replace(config, vocab_size=tokenizer.vocab_size)


def built_in_data(config, ranks):
    """Tokenizer and shards of a little text of the story world, made once under out_dir; for --smoke."""
    from data.prepare import prepare
    from data.read import documents
    from data.world import write_corpus
    data_dir, text = Path(config.out_dir) / "data", Path(config.out_dir) / "text"
    if ranks.is_main and not data_dir.exists():
        write_corpus(text, 0.2, seed=0)
        train, val = ([str(text / f"{split}.{language}.txt") for language in ("en", "zh")]
                      for split in ("train", "val"))
        tokenizer = Tokenizer.train((d for path in train for d in documents(path)), 512)
        prepare(",".join(train), tokenizer, data_dir, val_input=",".join(val),
                entropy_bound=str(text / "entropy_bound.json"))
    ranks.barrier()
    return str(data_dir)


def preflight(config, ranks, forward, batch, micro_batch_size, data, sizes):
    """Say what the run will need and how long it takes, from one micro-batch done for real.

    Returns the matmul peak. Peak and MFU are over all ranks.
    """
    params, need = count_params(config), training_memory(
        config, micro_batch_size, config.max_seq_len, 4 if config.optimizer in ("muon", "lars") else 8,
        4 if ranks.dtype == torch.float32 else 2)
    free, total = free_memory(ranks.device), sum(need.values())
    parts = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in need.items())
    ranks.say(f"model: {params['all']:,} parameters ({params['embedding']:,} embedding), "
              f"{config.n_layers} layers, {ranks.dtype}, {ranks.world_size} x {ranks.device.type}")
    ranks.say(f"memory: about {total / 2**20:,.0f} MiB a rank ({parts})"
              + (f", {free / 2**20:,.0f} MiB free" if free else ""))
    if free and total > free:
        ranks.say(f"memory: this will hardly fit; lower --micro_batch_size {micro_batch_size}")
    peak = matmul_peak(ranks.device, ranks.dtype) * ranks.world_size
    try:
        seconds = time_micro_batch(forward, [x[:micro_batch_size] for x in batch], ranks)
    except torch.OutOfMemoryError:
        raise UserError(f"micro_batch_size {micro_batch_size} does not fit into the memory of "
                        f"{ranks.device}; lower it, the gradient stays the same")
    rows = int(np.broadcast_to(sizes, config.max_steps).sum())
    tokens, flops = rows * config.max_seq_len, flops_per_token(config, config.max_seq_len)
    ranks.say(f"tokens: {tokens:,} to train on, {tokens / data['train'].n_tokens:.1f} epochs of "
              f"{data['train'].n_tokens:,}, {tokens / params['all']:.1f} a parameter")
    ranks.say(f"compute: {flops * tokens:.2e} FLOPs; matmul peak here {peak / 1e9:,.0f} GFLOP/s; "
              f"about {max(1, rows / (micro_batch_size * ranks.world_size) * seconds / 60):.0f} minutes, "
              "evaluations apart")
    return peak


def time_micro_batch(forward, rows, ranks):
    """Seconds that forward and backward of one micro-batch take, the second time: the first compiles."""
    for _ in range(2):
        start = time.perf_counter()
        with autocast(ranks):
            total, _ = loss_of(forward, *rows)
        total.backward()
        total.item()                                                    # waits for a GPU
        forward.zero_grad(set_to_none=True)
    return time.perf_counter() - start


def look(config, model, data, tokenizer, ranks, state, log, whole):
    """Evaluate, say how the fit goes, show texts; marks in state whether this model is the best so far."""
    found = evaluate(config, model, data, tokenizer, ranks, whole)
    state["history"] = [*state.get("history", []), [found["train_loss"], found["val_loss"]]]
    if found["val_loss"] <= min(val for _, val in state["history"]):
        state["best_step"] = state["step"]
    log.write(state["step"], **found)
    ranks.say(f"evaluation at step {state['step']}: " + "  ".join(f"{k} {v:.4f}" for k, v in found.items()))
    ranks.say(f"fit: {verdict(state['history'])}")
    for language, bound in (data["val"].meta["entropy_bound"] or {}).items():
        bits = found.get(f"bits_per_byte_{language}", found["bits_per_byte"])
        ranks.say(f"bound: {language} {bits:.4f} bits/byte, no model can beat {bound:.4f} on average: "
                  f"excess {bits - bound:.4f}, {bits / bound:.3f} times the bound")
    if ranks.is_main and config.samples:
        seeds = [draw_seed(config.seed, "samples", i) for i in range(config.samples)]
        eot = tokenizer.eot_id
        for ids in generate(model, [[eot]] * config.samples, config.sample_tokens, temperature=0.8,
                            stop_ids=[eot], seeds=seeds):
            ranks.say("sample: " + " ".join(tokenizer.decode([i for i in ids if i != eot]).split()))


def evaluate(config, model, data, tokenizer, ranks, whole):
    """Losses on fixed rows of both splits without dropout, and bits/byte of whole validation documents.

    train_loss here is comparable with val_loss; the `loss` of a step is with dropout and on other rows.
    """
    model.eval()
    found = {}
    for split in ("train", "val"):
        loss, accuracy = row_loss(model, data[split], config, ranks)
        found |= {f"{split}_loss": loss} | (
            {"val_accuracy": accuracy, "val_perplexity": math.exp(min(loss, 100))} if split == "val" else {})
    with autocast(ranks):
        sums = document_sums(model, data["val"], tokenizer, config.max_seq_len, rank=ranks.rank,
                             max_documents=0 if whole else config.eval_documents, world_size=ranks.world_size)
    total = ranks.sum(torch.tensor(np.array(list(sums.values())), dtype=torch.float32,
                                   device=ranks.device)).tolist()
    bits = bits_from_sums(dict(zip(sums, total)))
    return found | {"bits_per_byte" if name == "all" else f"bits_per_byte_{name}": x
                    for name, x in bits.items()}


def row_loss(model, shards, config, ranks):
    """Mean loss in nats a token and token accuracy on eval_rows rows spread evenly over the split."""
    T, total = config.max_seq_len, n_rows(shards.n_tokens, config.max_seq_len)
    rows = np.unique(np.linspace(0, total - 1, min(config.eval_rows, total)).astype(np.int64))
    mine = rows[ranks.rank::ranks.world_size]
    at_once = max(1, MAX_LOGITS // (T * config.vocab_size))
    parts = np.split(mine, range(at_once, len(mine), at_once))
    with autocast(ranks):
        sums = row_sums(model, (packed_rows(shards, part * 0, part, T, config.seed) for part in parts))
    loss, correct, count = ranks.sum(sums).tolist()
    return loss / count, correct / count


def verdict(history):
    """Over- or underfitting in words, from [train_loss, val_loss] of each evaluation so far."""
    (train, val), best = history[-1], min(val for _, val in history)
    gap = f"validation {val:.3f}, train {train:.3f} nats/token"
    if val > best * 1.01:
        when = [val for _, val in history].index(best) + 1
        return (f"overfitting: {gap}; validation was best ({best:.3f}) at evaluation {when}, see OUT/best; "
                "more text, more dropout or fewer steps")
    if val > train * 1.15:
        return f"memorising: {gap}; a gap this wide means the text is seen too often, so add text or dropout"
    if len(history) > 1 and history[-2][1] - val > 0.003 * val:
        return f"still learning: {gap}; more steps would help"
    if len(history) > 1:
        return (f"level: {gap}; no gap, so if this is too high the model or the learning rate is too small "
                "(underfitting)")
    return f"first look: {gap}"


if __name__ == "__main__":
    run(lambda: main(parse_config(PretrainConfig, presets=PRESETS, kept=RESUMABLE)))
