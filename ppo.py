"""PPO on a language model (Schulman et al. 2017; Ziegler et al. 2019; Ouyang et al. 2022): RLHF's last stage.

An update: act (sample replies), judge (score them, less the KL to the reference), credit (advantages by GAE),
learn (clipped steps on policy and value model). Four networks: policy and frozen reference start from the SFT
model, the value model from the reward model.
    python ppo.py --config demo --init_from out/sft --reward_model out/reward --data prompts_train.jsonl
    python ppo.py --init_from out/sft --reward_model out/reward --data FILE --reward_fn mine.py:score

Shapes:  B replies   T prompt and reply   R reply, at most   V vocab_size
Masks are (B, R), 1 = a token of the reply; N tokens are in one.
A score is one number a reply, a reward one a token: -kl_coef * KL everywhere, the score on the last token.
"""

import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import checkpoint
from batches import (Shards, check_tokenizer, draws, n_rows, packed_rows, rows_of_step, score_replies,
                     share)
from cli import UserError, option, parse_config, python_function, run
from generate import generate
from model import (LanguageModel, ModelConfig, ScalarModel, count_params, logprobs_after,
                   training_memory)
from optim import make_optimizer, set_lr
from records import read_prompts
from tokenizer import Tokenizer
from training import (RESUMABLE, MetricLog, NonFinite, Ranks, Stop, TrainingConfig, accumulate, at_least,
                      autocast, check, clip_and_step, draw_seed, loss_scaler, lr_at, start_ranks, wrap)

PRESETS = {
    "demo": dict(batch_size=64, max_steps=30, learning_rate=1e-4, gain_lr_scale=300.0, value_lr_scale=7.5,
                 save_every=10),
    "results": dict(batch_size=256, micro_batch_size=32, max_steps=60, num_ppo_epochs=1, num_mini_batches=4,
                    kl_coef=0.06, learning_rate=1.2e-4, gain_lr_scale=300.0, value_lr_scale=7.5,
                    warmup_steps=5, save_every=5, keep_every=5),
    "smoke": dict(batch_size=8, max_steps=3, num_ppo_epochs=2, response_length=8, save_every=2, log_every=1),
}


@dataclass
class PPOConfig(TrainingConfig):
    """PPO against a reward model or a function."""
    data: str = option("", "prompts, .jsonl: {id, messages}")
    reward_model: str = option("", "run or checkpoint of reward.py; also the value model's start")
    reward_fn: str = option("", "FILE.py:NAME of NAME(prompts, replies) -> list of scores, lists of texts; "
                                "it takes the place of the reward model's score")
    force: bool = option(False, "go on with a reward model that failed its gate")
    out_dir: str = option("out/ppo", "where checkpoints and log.jsonl go")
    max_steps: int = option(100, "updates; one is a batch of replies and all that is learnt from it")
    batch_size: int = option(128, "replies an update, all ranks together")
    num_ppo_epochs: int = option(4, "passes over the replies of an update")
    num_mini_batches: int = option(2, "optimiser steps a pass")
    response_length: int = option(48, "tokens a reply, at most")
    temperature: float = option(1.0, "of sampling and of every log-probability")
    kl_coef: float = option(0.1, "reward taken away per nat of KL from the reference")
    kl_target: float = option(0.0, "nats a reply at which an adaptive kl_coef aims (Ziegler et al. 2019); 0 "
                                   "= fixed")
    kl_horizon: int = option(10_000, "replies over which the adaptive kl_coef moves")
    kl_stop: float = option(0.0, "end an update's passes when the policy has moved so many nats a token; 0 = "
                                 "never")
    missing_eos_penalty: float = option(1.0, "taken from the score of a reply that did not end by itself")
    whiten_rewards: bool = option(False, "divide the rewards by their standard deviation")
    gamma: float = option(1.0, "discount a token")
    lam: float = option(0.95, "lambda of GAE: 1 = returns less values, 0 = one step ahead")
    cliprange: float = option(0.2, "the ratio of new to old probability earns nothing beyond 1 +- this")
    cliprange_value: float = option(0.2, "the same for values, whose unit is the score's; 0 = no clipping")
    vf_coef: float = option(0.5, "weight of the value loss")
    entropy_coef: float = option(0.0, "weight of an entropy bonus")
    ptx_coef: float = option(0.0, "weight of the pretraining loss mixed in (PPO-ptx); needs --ptx_data_dir")
    ptx_data_dir: str = option("", "token shards for it, from python -m data.prepare")
    optimizer: str = option("adamw", "adam, adamw, muon, lamb or lars")
    learning_rate: float = option(3e-4, "peak, of policy and value model; 3e-4 suits 0.5M parameters, 1e-4 "
                                        "10M, 3e-5 30M")
    value_lr_scale: float = option(1.0, "the value model learns so many times as fast: it pays no KL")
    gain_lr_scale: float = option(1.0, "so many times as fast learns the gain of the policy's last norm, "
                                       "which scales all logits and so is its temperature")
    schedule: str = option("linear", "after warmup: cosine, linear, polynomial, wsd or constant")
    warmup_steps: int = option(2, "updates of linear warmup")
    min_lr: float = option(0.0, "floor of the schedule, as a share of learning_rate")
    weight_decay: float = option(0.0, "decoupled (coupled for adam and lars), on matrices only")
    eps: float = option(1e-5, "added to the root of the squared gradient's mean")
    log_every: int = option(1, "updates between lines on the terminal; log.jsonl has every one")
    compile: bool = option(False, "torch.compile the trained forward; every length is compiled anew, so it "
                                  "pays on long runs only")


# ---- the parts of the paper: pure functions, no model inside

def response_mask(ids, eos_id):
    """(B, R) 1.0 up to and including the first EOS of replies ids (B, R), 0.0 after it."""
    ended_before = (ids == eos_id).cumsum(1) - (ids == eos_id).long()
    return (ended_before == 0).float()


def masked_mean(x, mask):
    """Mean of x over the tokens of all replies; both (B, R)."""
    return (x * mask).sum() / mask.sum()


def whiten(x, mask, shift_mean=True):
    """x (B, R) with variance 1 (biased) and, if shift_mean, mean 0 over the tokens; 0 outside them."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean) ** 2, mask)
    return ((x - mean) * torch.rsqrt(variance + 1e-8) + (0 if shift_mean else mean)) * mask


def kl_estimate(logprobs, ref_logprobs, kind):
    """KL(policy, reference) a token, estimated at tokens of the policy (Schulman 2020), nats.

    With d = logprobs - ref_logprobs: k1 = d, unbiased, what the reward takes; k2 = d^2 / 2, whose gradient
    as a loss is that of the KL; k3 = exp(-d) - 1 + d, unbiased and never negative, for the log.
    """
    d = logprobs - ref_logprobs
    return {"k1": lambda: d, "k2": lambda: d ** 2 / 2, "k3": lambda: torch.expm1(-d) + d}[kind]()


def token_rewards(scores, kl, mask, kl_coef):
    """(B, R): -kl_coef * kl at every token, and the score (B,) at the last, which is the EOS itself."""
    last = mask.sum(1).long() - 1
    rewards = -kl_coef * kl * mask
    rewards[torch.arange(len(scores)), last] += scores.to(rewards.dtype)
    return rewards


def compute_gae(rewards, values, mask, gamma, lam):
    """Advantages and returns, both (B, R), 0 outside the mask (Schulman et al. 2016, eq. 16).

    A[t] = delta[t] + gamma lam A[t+1], delta[t] = r[t] + gamma V[t+1] - V[t]; past the last token V = A = 0.
    """
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        here = mask[:, t].bool()                # not a product: what lies behind the EOS may be nan
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantages[:, t] = (delta + gamma * lam * next_advantage).where(here, 0)
        next_value, next_advantage = values[:, t].where(here, 0), advantages[:, t]
    return advantages, (advantages + values).where(mask.bool(), 0)


def policy_loss(logprobs, old_logprobs, advantages, mask, cliprange):
    """Sum of -min(ratio A, clip(ratio) A) (Schulman et al. 2017, eq. 7), count, clipped tokens."""
    ratio = (logprobs - old_logprobs).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return (torch.max(plain, clipped) * mask).sum(), mask.sum(), ((clipped > plain) * mask).sum()


def value_loss(values, old_values, returns, mask, cliprange_value):
    """Sum of 0.5 max((v - R)^2, (v_clipped - R)^2), and the count; cliprange_value 0 = no clip."""
    error = (values - returns) ** 2
    if cliprange_value:
        near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
        error = torch.max(error, (near - returns) ** 2)
    return 0.5 * (error * mask).sum(), mask.sum()


def entropy(logits, mask):
    """Sum over the tokens of the entropy of softmax(logits) in nats, and their count; logits (B, R, V)."""
    logp = logits.float().log_softmax(-1)
    return (-(logp.exp() * logp).sum(-1) * mask).sum(), mask.sum()


class AdaptiveKL:
    """kl_coef that follows a KL target (Ziegler et al. 2019, section 2.2)."""

    def __init__(self, kl_coef, target, horizon):
        self.kl_coef, self.target, self.horizon = kl_coef, target, horizon

    def update(self, kl, n):
        """After n replies of mean KL `kl`: up if above the target, else down, at most by 0.2 n / horizon."""
        error = min(0.2, max(-0.2, kl / self.target - 1))
        self.kl_coef *= 1 + error * n / self.horizon


# ---- policy and value model as one module: one forward through the DDP wrapper

class ActorCritic(nn.Module):
    """What is learnt: of replies under a policy their log-probs, entropies and values."""

    def __init__(self, policy, value_model):
        super().__init__()
        self.policy, self.value_model = policy, value_model

    def forward(self, ids, starts, mask, temperature, ptx=None):
        """(logits / temperature (N, V), logprobs, values (B, R), (sum, count) of the ptx loss or None).

        ids (B, T) prompt, reply, filled up on the right; starts (B,) where the reply begins; N tokens in the
        mask. The value of a token is what the prompt and the reply before it promise.
        """
        logits, logprobs = reply_logits(self.policy, ids, starts, mask, temperature)
        values = in_place(self.value_model(ids)[before(starts, mask)], mask)
        return logits, logprobs, values, self.policy(*ptx) if ptx is not None else None


def reply_logits(model, ids, starts, mask, temperature):
    """(logits / temperature (N, V), log-probs (B, R), 0 outside the mask) of replies begun at `starts`."""
    logits, logprobs = logprobs_after(model, ids, *before(starts, mask), temperature)
    return logits, in_place(logprobs, mask)


def by_length(rows, batch):
    """Rows of the batch, shortest first: micro-batches cut from them are filled up little."""
    return rows[(batch["starts"][rows] + batch["mask"][rows].sum(1)).argsort(stable=True)]


def trimmed(ids, starts, mask):
    """The same without the columns of ids that none of these rows reaches."""
    return ids[:, :(starts + mask.sum(1).long()).max()], starts, mask


def before(starts, mask):
    """Row and place in ids of the token before each token in the mask, (N,) each."""
    row, t = mask.nonzero(as_tuple=True)
    return row, starts[row] - 1 + t


def in_place(x, mask):
    """x (N,), one number for each token in the mask: (B, R), 0 outside it."""
    return torch.zeros_like(mask).masked_scatter(mask.bool(), x)


# ---- the algorithm

def print_log(step, tokens, seconds, metrics):
    """Print an update's metrics in a line."""
    print(f"update {step}  " + "  ".join(f"{k} {v:.4g}" for k, v in metrics.items()), flush=True)


def train(config, policy, reference, value_model, prompts, score, eos_id, log=print_log, ranks=Ranks(),
          begin=None, keep=None, ptx=None):
    """Train the policy (and the value model) in place; returns the policy.

    Args:
        prompts: lists of ids. score: score(prompts, responses) -> (B,) on lists of id lists.
        log: log(update, tokens, seconds, metrics). begin: begin(module, optimizer, scaler) -> state to go on
            from.
        keep: keep(state, optimizer, scaler, metrics) -> whether to stop. ptx: (Shards, seq_len) to mix in.
    """
    micro_batch_size = checked(config, policy, prompts, ranks)
    both = ActorCritic(policy, value_model)
    # Adam moves all weights equally far, but a last gain of 2 or 3 must grow by a third or a half for the
    # policy to be surer of what it says, the cheapest gain for its KL that was found (LOG.md).
    optimizer = make_optimizer(config.optimizer, both, config.learning_rate, config.beta1, config.beta2,
                               config.eps, config.weight_decay,
                               {"policy.model.norm.weight": config.gain_lr_scale,
                                "value_model.": config.value_lr_scale})
    scaler, forward, watch = loss_scaler(ranks), wrap(both, config, ranks), NonFinite()
    state = {"step": 0, "tokens": 0, "kl_coef": config.kl_coef}
    if begin:
        state |= begin(both, optimizer, scaler)
    controller, complaints = AdaptiveKL(state["kl_coef"], config.kl_target, config.kl_horizon), set()
    for update in range(state["step"], config.max_steps):
        started, lr = time.perf_counter(), lr_at(update, config)
        set_lr(optimizer, lr)
        # 1. Act: one reply to each prompt of this batch.
        _, rows = rows_of_step(config.seed, 0 if config.overfit else update, len(prompts), config.batch_size)
        asked = [prompts[i] for i in rows]
        replies = act(policy, asked, eos_id, config, update, ranks)
        batch = fill(asked, replies, eos_id, ranks.device)
        # 2. Judge: a score a reply; what policy, reference and value model think of each token.
        scores = judged(score, asked, replies, eos_id, config, ranks)
        plan = [order(config, update, epoch, ranks.device) for epoch in range(config.num_ppo_epochs)]
        batch |= think(forward, reference, batch, plan[0], micro_batch_size, config, ranks)
        # 3. Credit: the KL is part of the reward; advantages over the whole batch have mean 0 and variance 1.
        mask, kl = batch["mask"], kl_estimate(batch["old_logprobs"], batch["ref_logprobs"], "k1")
        rewards = token_rewards(scores, kl, mask, controller.kl_coef)
        if config.whiten_rewards:
            rewards = whiten(rewards, mask, shift_mean=False)
        advantages, returns = compute_gae(rewards, batch["old_values"], mask, config.gamma, config.lam)
        batch |= {"advantages": whiten(advantages, mask), "returns": returns}
        # 4. Learn: a few passes of clipped steps.
        learnt = learn(forward, optimizer, scaler, batch, plan, micro_batch_size, config, update, ranks, ptx,
                       watch)
        # 5. Say so; keep it.
        metrics = measure(batch, scores, replies, eos_id) | learnt | {"kl_coef": controller.kl_coef, "lr": lr}
        if config.kl_target:
            controller.update(metrics["kl"], config.batch_size)
        n_tokens = sum(map(len, asked)) + sum(map(len, replies))
        state |= {"step": update + 1, "tokens": state["tokens"] + n_tokens, "kl_coef": controller.kl_coef}
        log(update + 1, n_tokens, time.perf_counter() - started, metrics)
        found = diagnose(metrics)
        for name in found.keys() - complaints:                  # said when it begins, not at every update
            ranks.say(f"doctor, update {update + 1}: {found[name]}")
        complaints = found.keys()
        if keep and keep(state, optimizer, scaler, metrics):
            break
    return policy


def checked(config, policy, prompts, ranks):
    """Refuse what cannot work before anything is sampled; returns the micro-batch size."""
    at_least(0, config, "kl_target", "kl_stop", "missing_eos_penalty", "cliprange_value", "vf_coef",
             "entropy_coef", "ptx_coef", "value_lr_scale", "gain_lr_scale")
    at_least(1, config, "num_ppo_epochs", "num_mini_batches", "response_length", "kl_horizon")
    for name, good, wanted in (("temperature", config.temperature > 0, "above 0"),
                               ("cliprange", 0 < config.cliprange < 1, "above 0 and below 1"),
                               ("gamma", 0 <= config.gamma <= 1, "from 0 to 1"),
                               ("lam", 0 <= config.lam <= 1, "from 0 to 1")):
        if not good:
            raise UserError(f"{name} {getattr(config, name)} must be {wanted}")
    if config.batch_size % config.num_mini_batches:
        raise UserError(f"batch_size {config.batch_size} is not a multiple of num_mini_batches "
                        f"{config.num_mini_batches}")
    if config.batch_size_start or config.skip_steps:
        raise UserError("batch_size_start and skip_steps are not for PPO: its data are its own replies")
    if not prompts:
        raise UserError("there are no prompts; give at least one")
    longest, room = max(map(len, prompts)), policy.config.max_seq_len - config.response_length
    if longest > room:
        raise UserError(f"a prompt of {longest} tokens leaves no room for response_length "
                        f"{config.response_length} in max_seq_len {policy.config.max_seq_len}; shorten "
                        f"prompts or --response_length to fit")
    return check(replace(config, batch_size=config.batch_size // config.num_mini_batches), ranks)


def act(policy, prompts, eos_id, config, update, ranks):
    """A reply to each prompt, ids up to and including EOS, sampled from exactly the policy's softmax."""
    numbers = share(range(len(prompts)), ranks.rank, ranks.world_size)
    seeds = [draw_seed(config.seed, "rollout", update << 32 | i) for i in numbers]
    with autocast(ranks):
        mine = generate(policy, [prompts[i] for i in numbers], config.response_length,
                        temperature=config.temperature, stop_ids=(eos_id,), seeds=seeds)
    if ranks.world_size == 1:
        return mine
    found = [None] * ranks.world_size
    dist.all_gather_object(found, mine)
    return sum(found, [])


def fill(prompts, replies, eos_id, device):
    """{"ids" (B, T), "starts" (B,), "mask" (B, R)}; filled up with EOS, which nobody reads."""
    R, T = max(map(len, replies)), max(len(p) + len(r) for p, r in zip(prompts, replies))
    ids = torch.tensor([[*p, *r] + [eos_id] * (T - len(p) - len(r)) for p, r in zip(prompts, replies)])
    reply_ids = torch.tensor([[*r] + [eos_id] * (R - len(r)) for r in replies])
    found = {"ids": ids, "starts": torch.tensor([len(p) for p in prompts]),
             "mask": response_mask(reply_ids, eos_id)}
    return {name: x.to(device) for name, x in found.items()}


def judged(score, prompts, replies, eos_id, config, ranks):
    """Scores (B,) fp32, less the penalty of replies that did not end; refuses what is no score."""
    mine = [share(x, ranks.rank, ranks.world_size) for x in (prompts, replies)]
    try:
        found = torch.as_tensor(score(*mine), dtype=torch.float32)
    except UserError:
        raise
    except Exception as error:
        said = " ".join(str(error).split())
        raise UserError(f"the reward function failed with {type(error).__name__}: {said}") from error
    if found.shape != (len(mine[1]),):
        raise UserError(f"the reward function gave shape {tuple(found.shape)} for {len(mine[1])} replies; it "
                        f"must give one number for each")
    if not found.isfinite().all():
        raise UserError(f"the reward function gave {found[~found.isfinite()][0].item()} for a reply; scores "
                        f"must be finite")
    whole = torch.zeros(len(replies), device=ranks.device)
    start = ranks.rank * len(replies) // ranks.world_size
    whole[start:start + len(found)] = found.to(ranks.device)
    ended = torch.tensor([reply[-1] == eos_id for reply in replies], device=ranks.device)
    return ranks.sum(whole) - config.missing_eos_penalty * (~ended).float()


def order(config, update, epoch, device):
    """The rows of each minibatch of a pass, (num_mini_batches, b)."""
    shuffled = draws(config.seed, "minibatches", update << 16 | epoch,
                     config.batch_size).argsort(kind="stable")
    return torch.from_numpy(shuffled).view(config.num_mini_batches, -1).to(device)


@torch.no_grad()
def think(forward, reference, batch, minibatches, micro_batch_size, config, ranks):
    """Log-probs, entropies, values of the replies before learning, the reference's log-probs, all (B, R).

    In the micro-batches of the first pass, so that its first ratio is exactly 1: another shape would round
    otherwise.
    """
    names = "old_logprobs", "old_values", "ref_logprobs", "entropies"
    found = {name: torch.zeros_like(batch["mask"]) for name in names}
    forward.train()
    reference.eval()
    for rows in minibatches:
        for part in by_length(share(rows, ranks.rank, ranks.world_size), batch).split(micro_batch_size):
            ids, starts, mask = trimmed(*(batch[name][part] for name in ("ids", "starts", "mask")))
            with autocast(ranks):
                logits, logprobs, values, _ = forward(ids, starts, mask, config.temperature)
                _, theirs = reply_logits(reference, ids, starts, mask, config.temperature)
            logp = logits.log_softmax(-1)
            entropies = in_place(-(logp.exp() * logp).sum(-1), mask)
            for name, x in zip(names, (logprobs, values, theirs, entropies)):
                found[name][part] = x
    return {name: ranks.sum(x) * batch["mask"] for name, x in found.items()}


def learn(forward, optimizer, scaler, batch, plan, micro_batch_size, config, update, ranks, ptx, watch):
    """The passes of an update; returns what they were like."""
    sums, first, steps, norm = torch.zeros(5, device=ranks.device), math.nan, 0, 0.0
    names = "ids", "starts", "mask", "old_logprobs", "old_values", "advantages", "returns"
    for epoch, minibatches in enumerate(plan):
        for number, rows in enumerate(minibatches):
            mine = by_length(share(rows, ranks.rank, ranks.world_size), batch)
            parts, n_tokens = [batch[name][mine] for name in names], batch["mask"][rows].sum().item()
            step = (update * config.num_ppo_epochs + epoch) * config.num_mini_batches + number
            parts += pretraining_rows(ptx, config, step, len(rows), ranks) if ptx else []
            stats = torch.zeros(5, device=ranks.device)     # policy, value, clipped, k3, largest ratio
            optimizer.zero_grad()
            accumulate(forward, loss_function(config, n_tokens, stats), parts, micro_batch_size, n_tokens,
                       ranks, scaler, config.seed, step)
            largest = stats[4].clone()
            if ranks.world_size > 1:
                dist.all_reduce(largest, dist.ReduceOp.MAX)
            means = ranks.sum(stats)[:4] / n_tokens
            first = largest.item() if math.isnan(first) else first
            sums[:4] += means
            sums[4] = torch.maximum(sums[4], largest)
            steps += 1
            if config.kl_stop and means[3] > config.kl_stop:    # before the step: momentum would move on
                optimizer.zero_grad()
                break
            norm = clip_and_step(optimizer, (p for g in optimizer.param_groups for p in g["params"]), scaler,
                                 config.max_grad_norm)
            watch.check(norm, update + 1)
        else:
            continue
        break
    names = "policy_loss", "value_loss", "clipfrac", "approx_kl"
    found = dict(zip(names, (sums[:4] / steps).tolist()))
    return found | {"first_ratio": first, "ratio_max": sums[4].item(), "grad_norm": norm,
                    "optimizer_steps": steps}


def loss_function(config, n_tokens, stats):
    """loss_of(model, *rows) -> (sum over the tokens, their count); adds what there is to tell to `stats`."""
    def loss_of(model, ids, starts, mask, old_logprobs, old_values, advantages, returns, *ptx):
        logits, logprobs, values, mixed = model(*trimmed(ids, starts, mask), config.temperature, ptx or None)
        policy, count, clipped = policy_loss(logprobs, old_logprobs, advantages, mask, config.cliprange)
        value, _ = value_loss(values, old_values, returns, mask, config.cliprange_value)
        total = policy + config.vf_coef * value
        if config.entropy_coef:                             # dear: one more softmax over the vocabulary
            total = total - config.entropy_coef * entropy(logits, mask[mask.bool()])[0]
        if mixed is not None:                               # a mean over its own tokens: all rows are full
            n_mixed = config.batch_size // config.num_mini_batches * ptx[0].shape[1]
            total = total + config.ptx_coef * mixed[0] * (n_tokens / n_mixed)
        with torch.no_grad():
            moved = kl_estimate(old_logprobs, logprobs, "k3")   # KL(old, new) at tokens of the old policy
            stats[:4] += torch.stack([policy, value, clipped, (moved * mask).sum()])
            stats[4] = torch.maximum(stats[4], (((logprobs - old_logprobs).exp() - 1).abs() * mask).max())
        return total, count
    return loss_of


def pretraining_rows(ptx, config, step, n, ranks):
    """This rank's rows of pretraining text, one for each reply of the minibatch: [ids, targets, doc_ids]."""
    shards, T = ptx
    epochs, rows = rows_of_step(config.seed, step, n_rows(shards.n_tokens, T), n)
    epochs, rows = (share(x, ranks.rank, ranks.world_size) for x in (epochs, rows))
    return [x.to(ranks.device) for x in packed_rows(shards, epochs, rows, T, config.seed)]


# ---- the doctor

def measure(batch, scores, replies, eos_id):
    """What an update's replies were like, before learning from them."""
    mask, values, returns = batch["mask"], batch["old_values"], batch["returns"]
    kl = (kl_estimate(batch["old_logprobs"], batch["ref_logprobs"], "k1") * mask).sum(1)       # a reply
    k3 = (kl_estimate(batch["old_logprobs"], batch["ref_logprobs"], "k3") * mask).sum(1)
    surprise = ((batch["old_logprobs"] + batch["entropies"]) * mask).sum(1)     # mean 0 if sampled as scored
    errors_off = lambda x: (x.mean() / (x.std(correction=0) / len(x) ** 0.5 + 1e-6)).item()     # noqa: E731
    error = masked_mean((returns - values - masked_mean(returns - values, mask)) ** 2, mask)
    spread = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
    return {"score": scores.mean().item(), "score_std": scores.std(correction=0).item(),
            "kl": kl.mean().item(), "kl_k3": k3.mean().item(),
            "kl_per_token": (kl.sum() / mask.sum()).item(),
            "kl_z": errors_off(kl), "surprise_z": errors_off(surprise),
            "entropy": masked_mean(batch["entropies"], mask).item(), "length": mask.sum(1).mean().item(),
            "eos_rate": sum(reply[-1] == eos_id for reply in replies) / len(replies),
            "explained_variance": (1 - error / (spread + 1e-8)).item()}


HEALTHY = [         # metric, lowest and highest healthy value, what it means outside and what to try
    ("first_ratio", 0, 1e-4, "the first minibatch's ratio is off 1 by {:.2g}: its log-probs are not those of "
                             "the same weights; look for dropout, or a forward that differs from the one "
                             "before"),
    ("surprise_z", -5, 5, "the replies are {:+.1f} standard errors likelier than the policy says: they were "
                          "not sampled from it; look for another temperature, top-k or top-p (+), wrong "
                          "positions or padding (-)"),
    ("kl_z", -4, math.inf, "the KL is negative by {:.1f} standard errors, which no KL is: sampling and "
                           "scoring differ"),
    ("kl_per_token", -math.inf, 0.5, "KL {:.2f} nats a token: the policy has left the reference; raise "
                                     "kl_coef, or lower learning_rate"),
    ("approx_kl", -math.inf, 0.1, "one update moves the policy by {:.2g} nats a token; lower learning_rate "
                                  "or num_ppo_epochs"),
    ("clipfrac", -math.inf, 0.4, "{:.0%} of tokens are clipped: the steps are too long; lower learning_rate "
                                 "or num_ppo_epochs"),
    ("eos_rate", 0.5, math.inf, "only {:.0%} of replies end; does the SFT data teach the end, is "
                                "response_length too short, is missing_eos_penalty on?"),
    ("entropy", 0.02, math.inf, "entropy {:.2g} nats a token: the policy says the same always; raise kl_coef "
                                "or entropy_coef, or lower learning_rate"),
    ("score_std", 1e-3, math.inf, "all scores are equal (spread {:.1g}): the reward model tells nothing "
                                  "apart; was it trained?"),
    ("explained_variance", -1, math.inf, "the values explain {:.2f} of the returns, worse than a constant; "
                                         "lower learning_rate or raise vf_coef"),
]


def diagnose(metrics):
    """{metric: sentence} for every metric outside its healthy range."""
    return {name: f"{name} {metrics[name]:.3g}: {text.format(metrics[name])}"
            for name, low, high, text in HEALTHY if not low <= metrics[name] <= high}


# ---- from the command line

def main(config):
    with start_ranks(config) as ranks:
        if config.smoke:
            config = built_in(config, ranks)
        policy, tokenizer, others = prepare(config, ranks)
        value_model, stop, logs = others["value_model"], Stop(config.max_seconds), []

        def begin(both, optimizer, scaler):
            found = checkpoint.begin(config, policy, optimizer, scaler, tokenizer, ranks)
            if "value_model" in found:
                value_model.load_state_dict(found.pop("value_model"))
            logs.append(MetricLog(config, ranks, found["step"]))
            return found

        def keep(state, optimizer, scaler, metrics):
            stopped, finished = stop.agreed(ranks), state["step"] == config.max_steps
            if stopped or finished or state["step"] % config.save_every == 0:
                kept = state | {"value_model": value_model.state_dict()}
                checkpoint.save_run("ppo", config, policy, optimizer, scaler, tokenizer, kept, ranks)
            if stopped or finished:
                ranks.say(f"{'done' if finished else 'stopped (--resume goes on)'}: update {state['step']}, "
                          f"{state['tokens']:,} tokens, in {config.out_dir}")
            return stopped

        try:
            train(config, policy, others["reference"], value_model, others["prompts"], others["score"],
                  tokenizer.im_end_id, lambda step, tokens, seconds, metrics: logs[0].step(
                      step, tokens, seconds, **metrics), ranks, begin, keep, others["ptx"])
        finally:
            stop.close()
            for log in logs:
                log.close()


def prepare(config, ranks):
    """(policy, tokenizer, the other arguments of `train` by name), checked before anything runs."""
    if not config.init_from:
        raise UserError("--init_from is missing; name the SFT run or checkpoint to start from")
    if not config.reward_model:
        raise UserError("--reward_model is missing; name a run of reward.py (with --reward_fn it is the "
                        "value model)")
    model_config, tokenizer = checkpoint.source(config, ranks.say)
    policy = LanguageModel(model_config).to(ranks.device)
    reference, *_ = checkpoint.load_model(config.init_from, ranks.device)
    reward_model, judge_tokenizer, record = checkpoint.load_model(config.reward_model, ranks.device)
    if not isinstance(reference, LanguageModel) or not isinstance(reward_model, ScalarModel):
        raise UserError(f"--init_from {config.init_from} must be a language model and --reward_model "
                        f"{config.reward_model} a run of reward.py; are they exchanged?")
    if judge_tokenizer.sha256 != tokenizer.sha256:
        raise UserError(f"--reward_model {config.reward_model}: its tokenizer is not that of --init_from "
                        f"{config.init_from}; train it from that model")
    gate = record.get("reward")
    if not config.force and not config.reward_fn and not (gate and gate["passed"]):
        why = (f"{gate['metric']} {gate['value']:.3f}, low end {gate['low']:.3f}" if gate
               else "it was never judged")
        raise UserError(f"--reward_model {config.reward_model} failed its gate ({why}): its score is within "
                        f"noise of chance; give it more or clearer judgements, or --force")
    value_model = ScalarModel(reward_model.config).to(ranks.device)
    checkpoint.load_weights(value_model, reward_model.state_dict(), config.reward_model)
    if reward_model.likelihood_coef:        # its buffers hold the likelihood, of which values know nothing
        value_model.score_mean.fill_(0.0), value_model.score_std.fill_(1.0)
        if not record["config"]["token_coef"]:  # learnt at the end alone: begin with the mean score
            nn.init.zeros_(value_model.score.weight)
    prompts, texts = encode_prompts(config.data, tokenizer)
    score = (function_score(config.reward_fn, texts, tokenizer) if config.reward_fn
             else model_score(reward_model, tokenizer.im_end_id, ranks))
    ptx = None
    if config.ptx_coef:
        if not config.ptx_data_dir:
            raise UserError(f"ptx_coef {config.ptx_coef} without --ptx_data_dir; name the pretraining shards")
        ptx = Shards(config.ptx_data_dir, "train", policy.config.max_seq_len), policy.config.max_seq_len
        check_tokenizer(ptx[0], tokenizer)
    n = count_params(model_config)["all"]
    longest = max(map(len, prompts)) + config.response_length
    need = training_memory(model_config, config.micro_batch_size
                           or config.batch_size // config.num_mini_batches
                           // ranks.world_size, longest)
    ranks.say(f"{len(prompts):,} prompts; policy, value model, reference, judge: {n:,} parameters each; "
              f"about {(2 * sum(need.values()) + 2 * need['weights']) / 2 ** 20:,.0f} MiB; the log tells the "
              f"time left")
    return policy, tokenizer, {"reference": reference.requires_grad_(False), "value_model": value_model,
                               "prompts": prompts, "score": score, "ptx": ptx}


def encode_prompts(path, tokenizer):
    """Prompts as ids, the reply's opening included, and {ids: text of the last turn}."""
    if not path:
        raise UserError("--data is missing; name a file of prompts: {id, messages}, one a line")
    prompts, texts = [], {}
    for _, messages in read_prompts(path):
        prompts.append(tokenizer.encode_chat(messages, add_generation_prompt=True)[0])
        texts[tuple(prompts[-1])] = messages[-1]["content"]
    return prompts, texts


def model_score(reward_model, eos_id, ranks):
    """score(prompts, responses) of a reward model, in the run's precision; see score_replies."""
    def score(prompts, responses):
        with autocast(ranks):
            return score_replies(reward_model, prompts, responses, eos_id)
    return score


def function_score(spec, texts, tokenizer):
    """score(prompts, responses) of a user's function of texts, "FILE.py:NAME"."""
    function = python_function(spec, "reward_fn")

    def score(prompts, responses):
        return function([texts[tuple(prompt)] for prompt in prompts],
                        [tokenizer.decode([id for id in ids if id < tokenizer.eot_id]).strip() for ids
                         in responses])
    return score


def built_in(config, ranks):
    """The config with small untrained models and prompts filled in; for --smoke."""
    directory = Path(config.out_dir) / "built_in"
    if ranks.is_main and not directory.exists():
        directory.mkdir(parents=True)
        (directory / "prompts.jsonl").write_text("".join(
            f'{{"id": "{i}", "messages": [{{"role": "user", "content": "Say {i}."}}]}}\n' for i in range(16)))
        tokenizer = Tokenizer.train(["Say 1, 2, 3, 4, 5, 6, 7, 8, 9."], 300)
        shape = ModelConfig(tokenizer.vocab_size, d_model=64, n_layers=2, n_heads=4, d_ff=128, max_seq_len=64)
        torch.manual_seed(config.seed)
        for stage, kind in (("sft", LanguageModel), ("reward", ScalarModel)):
            record = {"stage": stage, "config": vars(shape), "tokens": 0}
            checkpoint.save(directory / stage, 0, record, kind(shape).state_dict(), {}, tokenizer)
    ranks.barrier()
    return replace(config, data=config.data or str(directory / "prompts.jsonl"), force=True,
                   init_from=config.init_from or str(directory / "sft"),
                   reward_model=config.reward_model or str(directory / "reward"))


if __name__ == "__main__":
    run(lambda: main(parse_config(PPOConfig, presets=PRESETS, kept=RESUMABLE)))
