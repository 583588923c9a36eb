"""What every training stage needs and no stage owns: flags, ranks, precision, schedules, one step, the log.

Owns no loop, no loss and no data: a stage's loop calls these functions and can be read from top to bottom.
Works under torchrun (nccl on GPUs, gloo on CPUs) and alone.
"""

import json
import math
import os
import signal
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from batches import draws
from checkpoint import write_file
from cli import UserError, about, need, option
from optim import computes_bf16

SCHEDULES = ("cosine", "linear", "polynomial", "wsd", "constant")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
RESUMABLE = ("max_steps", "micro_batch_size", "device", "threads", "skip_steps")     # may change on --resume
NONFINITE_STEPS = 20                            # this many in a row end a run


@dataclass
class TrainingConfig:
    """The flags of every stage."""
    out_dir: str = option("out/run", "where checkpoints and log.jsonl go")
    init_from: str = option("", "start from the weights of this run or checkpoint")
    resume: bool = option(False, "go on from the newest checkpoint in --out_dir")
    seed: int = option(0, "of weights, data order, dropout and samples")
    max_steps: int = option(1000, "optimiser steps in all; the schedules end here")
    max_seconds: int = option(0, "stop and save after this long, seconds; 0 = no limit")
    batch_size: int = option(32, "rows an optimiser step, all ranks together")
    micro_batch_size: int = option(0, "rows on one device at once, changes memory only; 0 = its whole share")
    batch_size_start: int = option(0, "rows a step at the start of a batch-size ramp, which grows in "
                                      "multiples of it; 0 = no ramp")
    ramp_tokens: int = option(0, "tokens over which the batch grows linearly to batch_size")
    skip_steps: str = option("", "data steps to leave out, such as 120-140,300-310: rescue of a run that "
                                 "diverged")
    optimizer: str = option("muon", "adam, adamw, muon, lamb or lars")
    learning_rate: float = option(2e-3, "peak")
    schedule: str = option("cosine", "after warmup: cosine, linear, polynomial, wsd (stable, then linear) "
                                     "or constant")
    warmup_steps: int = option(100, "steps of linear warmup")
    min_lr: float = option(0.1, "floor of the schedule, as a share of learning_rate")
    decay_power: float = option(2.0, "exponent of the polynomial schedule")
    decay_fraction: float = option(0.2, "share of the steps in which wsd decays")
    weight_decay: float = option(0.1, "decoupled (coupled for adam and lars), on matrices only")
    beta1: float = option(0.9, "decay of the gradient's mean")
    beta2: float = option(0.95, "decay of the squared gradient's mean")
    eps: float = option(1e-8, "added to the root of the squared gradient's mean")
    max_grad_norm: float = option(1.0, "gradients are scaled down to this L2 norm; 0 = not")
    log_every: int = option(10, "steps between lines on the terminal; log.jsonl has every step")
    eval_every: int = option(100, "steps between evaluations")
    save_every: int = option(100, "steps between checkpoints; the last two and the best stay")
    keep_every: int = option(0, "also keep the weights of every so many steps, under OUT/weights; 0 = none")
    dtype: str = option("auto", "of the forward pass: fp32, bf16, fp16 (with loss scaling); "
                                "auto = bf16 where the hardware has it")
    compile: bool = option(True, "torch.compile the trained forward, where that works")
    device: str = option("auto", "cpu, cuda, mps; auto = the best there is")
    threads: int = option(0, "CPU threads a rank; 0 = torch's choice")
    smoke: bool = option(False, "tiny sizes on built-in text: does the stage run at all?")
    overfit: bool = option(False, "train on the first batch again and again: the loss must go to 0")
    tensorboard: bool = option(False, "also write TensorBoard files to OUT/tensorboard")
    wandb: str = option("", "also log to this Weights & Biases project")


def check(config, ranks):
    """Refuse impossible numbers before anything is built; returns the micro-batch size."""
    at_least(1, config, "max_steps", "batch_size", "log_every", "eval_every", "save_every")
    at_least(0, config, "micro_batch_size", "batch_size_start", "ramp_tokens", "warmup_steps",
             "max_grad_norm", "keep_every", "max_seconds", "threads", "decay_power")
    if config.schedule not in SCHEDULES:
        raise UserError(f"schedule {config.schedule!r} is unknown; choose one of {', '.join(SCHEDULES)}")
    if not 0 <= config.min_lr <= 1:
        raise UserError(f"min_lr {config.min_lr} is a share of learning_rate; give 0 to 1")
    if not 0 <= config.decay_fraction <= 1:
        raise UserError(f"decay_fraction {config.decay_fraction} is a share of the steps; give 0 to 1")
    smallest = config.batch_size_start or config.batch_size
    if config.batch_size % ranks.world_size or smallest % ranks.world_size:
        raise UserError(f"batch_size {smallest} is not a multiple of the {ranks.world_size} ranks")
    micro = config.micro_batch_size or smallest // ranks.world_size
    for size in {smallest, config.batch_size}:
        if size % (micro * ranks.world_size):
            raise UserError(f"batch_size {size} is not a multiple of micro_batch_size {micro} "
                            f"x {ranks.world_size} ranks")
    if config.batch_size % smallest:
        raise UserError(f"batch_size {config.batch_size} is not a multiple of batch_size_start {smallest}")
    if bool(config.batch_size_start) != bool(config.ramp_tokens):
        raise UserError(f"batch_size_start {config.batch_size_start} and ramp_tokens {config.ramp_tokens} "
                        "make a ramp only together; give both or neither")
    if config.tensorboard:
        need("torch.utils.tensorboard", "tensorboard")
    if config.wandb:
        need("wandb", "wandb")
    return micro


def at_least(low, config, *names):
    """Refuse those options of a config that are below `low`, 0 or 1, or not a number."""
    for name in names:
        if not getattr(config, name) >= low:
            raise UserError(f"{name} {getattr(config, name)} must "
                            f"{f'be at least {low}' if low else 'not be negative'}")


# ---- ranks, device, precision

@dataclass
class Ranks:
    """This process among those that train together, its device and the type it computes in."""
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    dtype: torch.dtype = torch.float32

    @property
    def is_main(self):
        return self.rank == 0

    def say(self, text):
        """Print on rank 0 only, beside a progress bar if there is one."""
        if self.is_main:
            tqdm.write(str(text), file=sys.stdout)
            sys.stdout.flush()

    def sum(self, tensor):
        """Sum a tensor over all ranks, in place; returns it."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self):
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


@contextmanager
def start_ranks(config):
    """Yield this process's Ranks, as torchrun's environment says; the process group ends with the block."""
    rank, local_rank, world_size = (int(os.environ.get(name, default)) for name, default in
                                    (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
    device = pick_device(config.device, local_rank)
    if config.threads > 0:                                          # check() refuses the rest
        torch.set_num_threads(config.threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")     # cuBLAS is deterministic only with it
    if config.compile:
        torch.use_deterministic_algorithms(True, warn_only=device.type == "mps")
    else:                                                           # the same, not loading the compiler (4 s)
        torch.set_deterministic_debug_mode("warn" if device.type == "mps" else "error")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    ranks = Ranks(rank, local_rank, world_size, device, pick_dtype(config.dtype, device))
    if world_size > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield ranks
    except RuntimeError as error:
        gone = "Connection closed by peer", "Connection reset by peer"  # gloo's words for a rank that ended
        if not any(words in str(error) for words in gone):
            raise
        raise UserError(f"rank {rank}: another rank ended; its own message says why")
    finally:
        if world_size > 1:
            dist.destroy_process_group()


def pick_device(name, local_rank=0):
    """torch.device for cpu, cuda, mps or auto."""
    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in has.items() if there)
    if name not in has:
        raise UserError(f"device {name!r} is unknown; choose auto, {', '.join(has)}")
    if not has[name]:
        raise UserError(f"device {name}: not available on this machine; use --device auto")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def pick_dtype(name, device):
    """The torch dtype of the forward pass; auto = bf16 where the hardware computes in it, else fp32."""
    if name == "auto":
        return torch.bfloat16 if computes_bf16(device) else torch.float32
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is unknown; choose auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def autocast(ranks):
    """The context of a forward pass: matrix products in ranks.dtype, master weights untouched."""
    return nullcontext() if ranks.dtype == torch.float32 else torch.autocast(ranks.device.type, ranks.dtype)


def loss_scaler(ranks):
    """Dynamic loss scaling for fp16, whose gradients would underflow; does nothing for the other types."""
    return torch.amp.GradScaler(ranks.device.type, enabled=ranks.dtype == torch.float16)


def wrap(model, config, ranks):
    """The module whose forward is trained: compiled where that works, inside DDP if there are several ranks.

    Saving, sampling and evaluation use `model` itself, whose parameter names have no prefix.
    """
    wrapped = model
    if config.compile and compiles(ranks):
        wrapped = torch.compile(model, dynamic=False)
    if ranks.world_size > 1:
        wrapped = DistributedDataParallel(wrapped, broadcast_buffers=False, gradient_as_bucket_view=True,
                                          device_ids=[ranks.device] if ranks.device.type == "cuda" else None)
    return wrapped


def compiles(ranks):
    """Try torch.compile on one line of arithmetic.

    Compilers are missing or broken in many ways; this meets them all.
    """
    works = torch.ones((), device=ranks.device)
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=ranks.device))
    except Exception as error:
        ranks.say(f"compile is off: {' '.join(str(error).split())[:120]}")
        works.zero_()
    return ranks.sum(works).item() == ranks.world_size


# ---- schedules

def lr_at(step, config):
    """Learning rate of a step counted from 0.

    Linear warmup, then down to min_lr * peak at max_steps: cosine (Loshchilov & Hutter 2017, eq. 5), linear,
    polynomial, or wsd (Hu et al. 2024): constant, then linear over the last decay_fraction of the steps.
    """
    peak, floor = config.learning_rate, config.learning_rate * config.min_lr
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    begin = config.warmup_steps
    if config.schedule == "wsd":
        begin = max(begin, config.max_steps * (1 - config.decay_fraction))
    done = min(1.0, max(0.0, (step - begin) / max(1, config.max_steps - begin)))
    left = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "wsd": 1 - done,
            "polynomial": (1 - done) ** config.decay_power, "constant": 1.0}[config.schedule]
    return floor + (peak - floor) * left


def batch_sizes(config, tokens_per_row):
    """Rows of every step: an int, or int64 (max_steps,) if the batch grows (Brown et al. 2020, appendix B).

    It grows linearly in the tokens seen, from batch_size_start to batch_size, in multiples of the first.
    """
    start, full = config.batch_size_start, config.batch_size
    if not start or not config.ramp_tokens:
        return full
    sizes, tokens = np.full(config.max_steps, full, dtype=np.int64), 0
    for step in range(config.max_steps):
        if tokens >= config.ramp_tokens:
            break
        sizes[step] = start + (full - start) * tokens // config.ramp_tokens // start * start
        tokens += sizes[step] * tokens_per_row
    return sizes


def intervals(text):
    """"120-140,300" -> [(120, 140), (300, 300)]."""
    try:
        pairs = [[int(number) for number in part.split("-")] for part in text.split(",") if part.strip()]
        result = [(pair[0], pair[-1]) for pair in pairs]
        if any(len(pair) > 2 or pair[0] > pair[-1] for pair in pairs):
            raise ValueError
    except ValueError:
        raise UserError(f"skip_steps {text!r} is not a list of intervals such as 120-140,300-310")
    return result


# ---- one optimiser step

def draw_seed(seed, purpose, index=0):
    """A seed for torch that depends on all of its arguments."""
    return int(draws(seed, purpose, index, 1)[0]) >> 1


def accumulate(model, loss_of, batch, micro_batch_size, total_count, ranks, scaler, seed, step):
    """Backward over this rank's rows in micro-batches; leaves the gradient of the WHOLE batch's mean loss.

    Args:
        loss_of: loss_of(model, *rows) -> (sum of losses, count).
        batch: tuple of tensors (b, ...), this rank's rows.
        total_count: what `count` comes to over all rows of all ranks. DDP averages over ranks, hence
            world_size.
    Returns this rank's share of the mean loss, detached.
    """
    parts = list(zip(*(x.split(micro_batch_size) for x in batch)))
    loss = torch.zeros((), device=ranks.device)
    for i, rows in enumerate(parts):
        model.require_backward_grad_sync = i == len(parts) - 1              # read by DDP, harmless without it
        first_row = ranks.rank * len(batch[0]) + i * micro_batch_size
        torch.manual_seed(draw_seed(seed, "dropout", step << 32 | first_row))
        with autocast(ranks):
            total, *_ = loss_of(model, *rows)
        scaler.scale(total * (ranks.world_size / total_count)).backward()
        loss += total.detach().float()
    return loss / total_count


def clip_and_step(optimizer, parameters, scaler, max_grad_norm):
    """Clip the gradients' L2 norm and take the optimiser's step; returns the norm before clipping, a float.

    A norm that is not finite takes no step, in any precision: one such step would destroy the weights.
    In fp16 it is routine, and halves the loss scale.
    """
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or math.inf).item()
    if math.isfinite(norm):
        optimizer.step()
    if scaler.is_enabled():
        scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return norm


class NonFinite:
    """Counts steps in a row whose gradient was not finite, and ends a run that cannot recover."""

    def __init__(self):
        self.in_a_row = 0

    def check(self, norm, step):
        self.in_a_row = 0 if math.isfinite(norm) else self.in_a_row + 1
        if self.in_a_row == NONFINITE_STEPS:
            raise UserError(f"the gradient was not finite in {NONFINITE_STEPS} steps up to {step}; lower "
                            "--learning_rate, or --resume with --skip_steps around the data where it began")


class Stop:
    """Asks a run to end after this step: at max_seconds, on SIGTERM, on the first Ctrl-C (a second kills)."""

    def __init__(self, max_seconds):
        self.deadline = time.monotonic() + max_seconds if max_seconds else math.inf
        self.asked, self.before = False, {}
        if threading.current_thread() is threading.main_thread():       # elsewhere Python allows no handlers
            self.before = {n: signal.signal(n, self.ask) for n in (signal.SIGINT, signal.SIGTERM)}

    def ask(self, number, frame):
        self.asked = True
        signal.signal(number, self.before[number])

    def agreed(self, ranks):
        """Whether any rank was asked: all must stop at the same step."""
        mine = self.asked or time.monotonic() > self.deadline
        return ranks.sum(torch.tensor(float(mine), device=ranks.device)).item() > 0

    def close(self):
        """Give the signals back to whoever had them."""
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---- what the machine can do

@cache
def matmul_peak(device, dtype, seconds=1.0):
    """FLOP/s of a large square matmul in dtype, measured: what MFU is a share of."""
    n = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        wait()
        start = time.perf_counter()
        a @ b
        wait()
        best = max(best, 2 * n ** 3 / (time.perf_counter() - start))
    return best


def free_memory(device):
    """Bytes free on the device, or None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    names = getattr(os, "sysconf_names", {})
    if device.type == "cpu" and "SC_AVPHYS_PAGES" in names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


# ---- the log

class MetricLog:
    """Metrics of a run: a bar or lines on rank 0's terminal, every step in OUT/log.jsonl, TensorBoard, WandB.

    `step` is the number of optimiser steps taken. A resumed run first drops the lines after its checkpoint,
    which it is about to write again.
    """

    def __init__(self, config, ranks, first_step, flops_per_token=0, peak=0.0):
        self.config, self.ranks, self.first_step = config, ranks, first_step
        self.flops_per_token, self.peak, self.started = flops_per_token, peak, time.monotonic()
        self.file = self.bar = self.board = self.wandb = None
        if ranks.is_main:
            self.open()

    def open(self):
        """Open what is to be written, on rank 0."""
        config, out_dir = self.config, Path(self.config.out_dir)
        path = out_dir / "log.jsonl"
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines()
                     if step_of(line) <= self.first_step]
            write_file(path, lambda file: file.write("".join(line + "\n" for line in lines).encode()))
        self.file = open(path, "a", encoding="utf-8")
        self.bar = tqdm(total=config.max_steps, initial=self.first_step, disable=not sys.stderr.isatty(),
                        unit="step")
        if config.tensorboard:
            board = need("torch.utils.tensorboard", "tensorboard")
            self.board = board.SummaryWriter(str(out_dir / "tensorboard"))
        if config.wandb:
            self.wandb = need("wandb", "wandb").init(project=config.wandb, config=vars(config),
                                                     dir=str(out_dir))

    def step(self, step, tokens, seconds, **metrics):
        """Log a step that took `tokens` (all ranks) and `seconds`; no averages: each line is its step."""
        speed = tokens / seconds
        metrics |= {"tokens_per_second": round(speed, 1)}
        if self.peak:
            metrics["mfu"] = round(speed * self.flops_per_token / self.peak, 4)
        self.write(step, **metrics)
        if not self.ranks.is_main:
            return
        self.bar.update(1)
        text = "  ".join(f"{name} {shown(value)}" for name, value in metrics.items())
        if not self.bar.disable:
            self.bar.set_postfix_str(text)
        elif step % self.config.log_every == 0 or step == self.config.max_steps:
            left = ((time.monotonic() - self.started) / (step - self.first_step)
                    * (self.config.max_steps - step))
            self.ranks.say(f"step {step}/{self.config.max_steps}  {text}  {tqdm.format_interval(left)} left")

    def write(self, step, **metrics):
        """Write one line to log.jsonl and to what else is on."""
        if not self.ranks.is_main:
            return
        plain = {k: v if isinstance(v, str) or math.isfinite(v) else None for k, v in metrics.items()}
        with about(self.file.name):
            self.file.write(json.dumps({"step": step, "time": round(time.time(), 2), **plain}) + "\n")
            self.file.flush()
        numbers = {k: v for k, v in plain.items() if isinstance(v, (int, float))}
        if self.board:
            for name, value in numbers.items():
                self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(numbers, step=step)

    def close(self):
        """Close what open() opened."""
        for thing in (self.bar, self.board):
            if thing is not None:
                thing.close()
        if self.file is not None:
            with about(self.file.name):                     # on a full disk, closing fails once more
                self.file.close()
        if self.wandb:
            self.wandb.finish()


def step_of(line):
    """The step of a line of log.jsonl; infinity for one that a kill cut off."""
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf


def shown(value):
    """A metric as a person reads it: 4 significant digits."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
