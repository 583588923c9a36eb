"""How fast training and sampling are on this machine, beside its own matmul and beside Hugging Face's Llama.

All ways are timed in one run, step by step in turn, so that a machine busy with other things slows them
alike; medians are reported with the lowest and the highest. FLOPs: model.flops_per_token. MFU is the share of
a large matmul's FLOP/s, measured between the steps in the same dtype with the same threads (Chowdhery et al.
2022, appendix B).
"""

import copy
import json
import re
import statistics
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from cli import UserError, need, numbers, option, parse_config, run, write_text
from generate import captures, generate
from model import LanguageModel, ModelConfig, count_params, flops_per_token
from optim import make_optimizer
from training import (accumulate, at_least, autocast, clip_and_step, compiles, loss_scaler, matmul_peak,
                      start_ranks, wrap)

PRESETS = {     # the shapes that LOG.md has numbers for
    "6x384": dict(d_model=384, n_layers=6, n_heads=6, n_kv_heads=6, d_ff=1024, vocab_size=4096,
                  max_seq_len=256,
                  batch_size=16),
    "12x768": dict(d_model=768, n_layers=12, n_heads=12, n_kv_heads=12, d_ff=2048, vocab_size=32_000,
                   max_seq_len=512, batch_size=2),
    "gpt2-124m": dict(d_model=768, n_layers=12, n_heads=12, n_kv_heads=12, d_ff=2048, vocab_size=50_304,
                      max_seq_len=1024, batch_size=16),
    "350m": dict(d_model=1024, n_layers=24, n_heads=16, n_kv_heads=16, d_ff=2816, vocab_size=50_304,
                 max_seq_len=1024, batch_size=8),
}
PROMPT_TOKENS = 32


@dataclass
class BenchConfig(ModelConfig):
    """Measure training and sampling; one JSON line a measurement, a table at the end."""
    batch_size: int = option(16, "rows of max_seq_len tokens a training step, of all ranks")
    train: bool = option(True, "measure training")
    sample_batches: str = option("1,32", "batch sizes of sampling; empty = do not measure it")
    new_tokens: int = option(128, f"tokens sampled a row, after {PROMPT_TOKENS} of prompt")
    optimizer: str = option("adamw", "as in pretraining")
    rounds: int = option(5, "measurements of each way")
    compare: bool = option(False, "also Hugging Face's Llama of the same shape, compiled and eager")
    scaling: bool = option(False, "also halve, double and quadruple rows' length, batch and width")
    profile: bool = option(False, "show where a training step and a sampled token go")
    out: str = option("", "also write the measurements to this JSON file")
    dtype: str = option("auto", "of the forward pass: fp32, bf16, fp16; auto = bf16 where the hardware "
                                "has it")
    compile: bool = option(True, "also measure the compiled forward")
    device: str = option("auto", "cpu, cuda, mps; auto = the best there is")
    threads: int = option(0, "CPU threads a rank; 0 = torch's choice")


def main(config):
    at_least(1, config, "batch_size", "new_tokens", "rounds", "vocab_size")
    at_least(0, config, "threads")
    text = config.sample_batches
    batches = numbers(text, "sample_batches", int, 1, "1,32") if text else ()
    with start_ranks(config) as ranks:
        if config.batch_size % ranks.world_size:
            raise UserError(f"batch_size {config.batch_size} is not a multiple of "
                            f"the {ranks.world_size} ranks")
        ranks.say(f"{ranks.world_size} x {ranks.device.type}, {torch.get_num_threads()} threads, "
                  f"{ranks.dtype}, {count_params(config)['all']:,} parameters, torch {torch.__version__}")
        found = measure_training(config, ranks) if config.train else []
        for label, variant in variants(config) if config.train and config.scaling else ():
            found += measure_training(replace(variant, compare=False), ranks, f"{label}: ")
        for batch in batches if ranks.world_size == 1 else ():
            found += measure_sampling(config, ranks, batch)
        if config.profile:
            profile(config, ranks)
        ranks.say(table(found))
        if config.out and ranks.is_main:
            text = json.dumps({"config": asdict(config), "found": found}, indent=1)
            write_text(Path(config.out), text + "\n")


def variants(config):
    """(label, config) with one thing changed: the rows' length at equal tokens, the batch, the width."""
    for factor in (2, 4):
        if config.batch_size % factor == 0:
            yield f"length x{factor}", replace(config, max_seq_len=config.max_seq_len * factor,
                                               batch_size=config.batch_size // factor)
            yield f"batch /{factor}", replace(config, batch_size=config.batch_size // factor)
    for factor in (0.5, 2):
        wide = {name: int(getattr(config, name) * factor)
                for name in ("d_model", "n_heads", "n_kv_heads", "d_ff")}
        if wide["n_kv_heads"]:
            yield f"width x{factor:g}", replace(config, **wide)


# ---- training

def measure_training(config, ranks, label=""):
    """Tokens/s of a training step in each way, and its MFU."""
    batch = random_batch(config, ranks)
    document = torch.arange(config.max_seq_len, device=ranks.device).expand_as(batch[0]) // 100
    ways = {}
    for compiled in (True, False) if config.compile else (False,):
        kind = "compiled" if compiled else "eager"
        ways[f"train, {kind}"] = trainer(config, ranks, LanguageModel(model_config(config)), our_loss, batch,
                                         compiled)
        if config.compare:
            ways[f"train, Llama {kind}"] = trainer(config, ranks, llama(config), llama_loss, batch, compiled)
    first = next(iter(ways))
    ways[f"{first}, packed"] = trainer(config, ranks, LanguageModel(model_config(config)), our_loss,
                                       (*batch, document.contiguous()), first.endswith("compiled"))
    seconds, peak, memory = interleave(ways, config.rounds, ranks)
    tokens, flops = config.batch_size * config.max_seq_len, flops_per_token(config, config.max_seq_len)
    return [report(ranks, label + way, tokens, taken, memory[way],
                   mfu=tokens * flops / statistics.median(taken) / peak, gflops_peak=peak / 1e9)
            for way, taken in seconds.items()]


def random_batch(config, ranks):
    """Inputs and targets (b, T) of this rank: ids at random, the same in every call."""
    torch.manual_seed(0)
    rows = torch.randint(config.vocab_size, (config.batch_size // ranks.world_size, config.max_seq_len + 1),
                         device=ranks.device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def trainer(config, ranks, model, loss_of, batch, compiled):
    """A function that takes one whole training step on `batch`, with the functions that pretraining uses."""
    model = model.to(ranks.device)
    optimizer = make_optimizer(config.optimizer, model, 1e-4, 0.9, 0.95, 1e-8, 0.1)
    scaler = loss_scaler(ranks)
    forward = wrap(model, replace(config, compile=compiled), ranks)
    count = batch[0].numel() * ranks.world_size

    def step():
        accumulate(forward, loss_of, batch, len(batch[0]), count, ranks, scaler, 0, 0)
        clip_and_step(optimizer, model.parameters(), scaler, 1.0)
    return step


def our_loss(model, ids, targets, doc_ids=None):
    return model(ids, targets, doc_ids)


def llama_loss(model, ids, targets):
    """(sum, count) of the loss that Hugging Face's model makes itself; its labels are not shifted here."""
    loss = model(ids, labels=targets, shift_labels=targets, use_cache=False).loss
    return loss * targets.numel(), targets.numel()


def llama(config):
    """Hugging Face's Llama of the same shape, random weights."""
    transformers = need("transformers", "transformers")
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim, attn_implementation="sdpa",
        max_position_embeddings=config.max_seq_len, tie_word_embeddings=config.tie_embeddings,
        bos_token_id=None, eos_token_id=None, pad_token_id=None))


def model_config(config):
    """The ModelConfig part of a BenchConfig."""
    return ModelConfig(**{f.name: getattr(config, f.name) for f in fields(ModelConfig)})


# ---- sampling

def measure_sampling(config, ranks, batch):
    """New tokens/s of `generate` in each way, and the share of what reading the weights alone would allow."""
    torch.manual_seed(0)
    if config.max_seq_len < PROMPT_TOKENS + config.new_tokens:
        raise UserError(f"new_tokens {config.new_tokens} and {PROMPT_TOKENS} of prompt do not fit into "
                        f"max_seq_len {config.max_seq_len}; lower the first")
    prompts = torch.randint(config.vocab_size, (batch, PROMPT_TOKENS), device=ranks.device)
    ours = LanguageModel(model_config(config)).to(ranks.device).eval()
    ways = {f"sample {batch}": sampler(ours, prompts, config, ranks)}
    if config.compile and (captures(ranks.device) or batch == 1 and compiles(ranks)):
        kept = copy.deepcopy(ours).to(ranks.dtype)      # a weight cast at each use would be read in fp32
        ways[f"sample {batch}, compiled"] = sampler(kept, prompts, config, ranks, compile=True)
    if ranks.dtype != torch.float32:
        ways[f"sample {batch}, fp32"] = sampler(ours, prompts, config, replace(ranks, dtype=torch.float32))
    if config.compare:
        theirs = llama(config).to(ranks.device).eval()
        ways[f"sample {batch}, Llama"] = llama_sampler(theirs, prompts, config, ranks)
    seconds, _, memory = interleave(ways, config.rounds, ranks)
    tokens, width = batch * config.new_tokens, torch.tensor([], dtype=ranks.dtype).element_size()
    bandwidth = read_bandwidth(ranks.device)
    least = config.new_tokens * count_params(config)["matrices"] * width / bandwidth
    return [report(ranks, way, tokens, taken, memory[way], of_bandwidth=least / statistics.median(taken),
                   gigabytes_per_second=bandwidth / 1e9) for way, taken in seconds.items()]


def sampler(model, prompts, config, ranks, compile=False):
    """A function that samples new_tokens after each prompt in ranks.dtype."""
    prompts, seeds = prompts.tolist(), list(range(len(prompts)))

    def sample():
        with autocast(ranks):
            generate(model, prompts, config.new_tokens, seeds=seeds, compile=compile)
    return sample


def llama_sampler(model, prompts, config, ranks):
    """The same by Hugging Face's generate, with its cache."""
    def sample():
        with autocast(ranks), torch.no_grad():
            model.generate(prompts, do_sample=True, max_new_tokens=config.new_tokens, top_k=0,
                           min_new_tokens=config.new_tokens, attention_mask=torch.ones_like(prompts))
    return sample


def read_bandwidth(device):
    """Bytes/s at which 256 MB are read from memory, the best of five."""
    x, best = torch.zeros(2 ** 26, device=device), 0.0
    for _ in range(5):
        start = time.perf_counter()
        x.sum().item()
        best = max(best, x.nbytes / (time.perf_counter() - start))
    return best


# ---- measuring

def interleave(ways, rounds, ranks):
    """Seconds of each way in each round, the median matmul peak of all ranks, and each way's peak memory.

    Two calls before the first round compile and warm up.
    """
    seconds, memory, peaks = {way: [] for way in ways}, {}, []
    wait = torch.cuda.synchronize if ranks.device.type == "cuda" else lambda: None
    for way, work in ways.items():
        work()
        reset_peak_memory(ranks.device)
        work()
        wait()
        memory[way] = peak_memory(ranks.device)
    for _ in range(rounds):
        peaks.append(matmul_peak.__wrapped__(ranks.device, ranks.dtype, 0.3) * ranks.world_size)
        for way, work in ways.items():
            ranks.barrier()
            start = time.perf_counter()
            work()
            wait()
            seconds[way].append(time.perf_counter() - start)
    return seconds, statistics.median(peaks), memory


def reset_peak_memory(device):
    """Forget the highest memory use so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device):
    """Highest memory since the reset in MiB, on a CPU of the whole process; None where nobody says."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2 ** 20)
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", status.read_text()) if status.exists() else None
    return round(int(found[1]) / 2 ** 10) if found else None


def report(ranks, way, tokens, seconds, memory, **more):
    """One measurement, as a JSON line and a row."""
    row = {"way": way, "tokens_per_second": round(tokens / statistics.median(seconds), 1),
           "low": round(tokens / max(seconds), 1), "high": round(tokens / min(seconds), 1),
           "peak_mib": memory,
           **{name: round(value, 3) for name, value in more.items()}}
    ranks.say(json.dumps(row))
    return row


def table(found):
    """The measurements under each other; speed beside that of Hugging Face's fastest way of the same kind."""
    lines = [f"{'':32} {'tokens/s':>10} {'low-high':>17} {'MFU':>6} {'of bandwidth':>13} {'MiB':>6}"
             "  times Llama"]
    for row in found:
        kind = row["way"].split(",")[0]
        peers = [r["tokens_per_second"] for r in found if r["way"].startswith(f"{kind}, Llama")]
        spread = f"{row['low']:.0f}-{row['high']:.0f}"
        ratio = f"{row['tokens_per_second'] / max(peers):.2f}" if peers else ""
        share = [f"{row[name]:.2f}" if name in row else "" for name in ("mfu", "of_bandwidth")]
        lines.append(f"{row['way']:32} {row['tokens_per_second']:10.0f} {spread:>17} {share[0]:>6} "
                     f"{share[1]:>13} {row['peak_mib'] or '':>6}  {ratio:>11}")
    return "\n".join(lines)


def profile(config, ranks):
    """The ten operations that a training step and sampling spend most time in."""
    batch = random_batch(config, ranks)
    model = LanguageModel(model_config(config)).to(ranks.device)
    step = trainer(config, ranks, model, our_loss, batch, config.compile)
    for name, work in {"a training step": step,
                       "sampling": sampler(model, batch[0][:, :PROMPT_TOKENS], config, ranks)}.items():
        work()
        with torch.profiler.profile() as found:
            work()
        key = f"self_{'cuda' if ranks.device.type == 'cuda' else 'cpu'}_time_total"
        ranks.say(f"{name}:\n"
                  f"{found.key_averages().table(sort_by=key, row_limit=10, max_name_column_width=40)}")


if __name__ == "__main__":
    run(lambda: main(parse_config(BenchConfig, presets=PRESETS)))
