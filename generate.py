"""Sampling from a language model: batches of unequal prompts, a KV cache, one seed a row, streamed.

With the defaults nothing touches the logits: tokens are drawn from exactly softmax(logits), as PPO needs. A
row's text depends on its prompt and its seed, not on the batch it sits in. No token is banned.

Shapes:  B rows of the batch now   T positions in this call   N new tokens at most   V vocab_size
"""

import math
import secrets
import sys
from dataclasses import MISSING, dataclass, fields

import numpy as np
import torch

from batches import draws
from checkpoint import load_model
from cli import UserError, option, parse_config, run
from model import KVCache, LanguageModel, token_logprobs
from training import pick_device

DROP_SHARE = 0.25                   # ended rows are computed along until they are this share of the batch


@dataclass
class Sampling:
    """How the next token is chosen; a stage's config may inherit it and pass `**config.options()`."""
    temperature: float = option(1.0, "divides the logits; 0 = greedy")
    top_k: int = option(0, "keep the k likeliest tokens; 0 = all")
    top_p: float = option(1.0, "keep the fewest likeliest tokens that reach this probability; 1 = all")
    min_p: float = option(0.0, "keep tokens at least this share as likely as the likeliest; 0 = all")
    repetition_penalty: float = option(1.0, "divides the logits of ids already in the row; 1 = none")

    def __post_init__(self):
        for name, good, wanted in (
                ("temperature", self.temperature == 0 or 1e-6 <= self.temperature < math.inf, "0 or >= 1e-6"),
                ("top_k", self.top_k >= 0, "0 or more"),
                ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
                ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
                ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0")):
            if not good:
                raise UserError(f"{name} {getattr(self, name)} must be {wanted}")

    def options(self):
        """These five as keyword arguments of `stream` and `generate`."""
        return {f.name: getattr(self, f.name) for f in fields(Sampling)}


def repetition_penalty(logits, seen, penalty):
    """Make the ids that stand in the row already less likely (Keskar et al. 2019, section 4.1).

    logits (B, V); seen (B, V), True for ids of prompt and response. The paper divides; negative logits, which
    that would make likelier, are multiplied instead, as all libraries do.
    """
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Divide logits (B, V) by the temperature and set those to -inf that top_k, top_p, then min_p drop.

    The order is Hugging Face's: each filter sees the probabilities that those before left. Ties: temperature
    0 keeps the smallest of the likeliest ids, top_k all equal to its last, top_p takes the smaller id first.
    """
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter(-1, best, logits.gather(-1, best))
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:                                               # Holtzman et al. 2020
        ranked, order = logits.sort(dim=-1, descending=True, stable=True)
        probs = ranked.softmax(-1)
        dropped = probs.cumsum(-1).roll(1, -1) >= top_p         # the mass of the likelier ones suffices
        dropped[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), -math.inf)
    if min_p > 0:                                               # Nguyen et al. 2024, in logarithms
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(min_p), -math.inf)
    return logits


def uniforms(seed, n):
    """Give the first n of a seed's uniform numbers in [0, 1), float64, all 53 bits random.

    Not from torch's CPU generator, which reads only 32 bits of its seed: two seeds equal in those are one.
    """
    return torch.from_numpy((draws(seed, "tokens", 0, n) >> np.uint64(11)) * 2.0 ** -53)


def draw(logits, uniform):
    """Give the ids (B,) at which the cumulative probability of logits (B, V) first exceeds uniform (B,).

    Summed in float64, divided by its own end, so that rounding never gives an id of probability 0; V for nan.
    """
    cdf = logits.softmax(-1).to(uniform.device).cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cdf / cdf[:, -1:], uniform[:, None], right=True).squeeze(1)


def stream(model, prompts, max_new_tokens, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0,
           repetition_penalty=1.0, stop_ids=(), seeds=None):
    """Give an iterator of steps, each one list: the new id of every row, None where the row has ended.

    A row ends with the first of stop_ids (its last id), after max_new_tokens, or when prompt and response
    together fill max_seq_len. prompts: lists of ids, none empty. seeds: one int a prompt; None = fresh ones.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    seeds = [secrets.randbits(64) for _ in prompts] if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise UserError(f"seeds has {len(seeds)} entries for {len(prompts)} prompts; give one a prompt")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens} must be at least 1")
    check_prompts(prompts, model.config)
    rooms = [min(max_new_tokens, model.config.max_seq_len - len(prompt)) for prompt in prompts]
    return steps(model, prompts, rooms, sampling, frozenset(stop_ids), seeds) if prompts else iter(())


def generate(model, prompts, max_new_tokens, **options):
    """Give each prompt's response, new ids only, the stop id included. Options are those of `stream`."""
    responses = [[] for _ in prompts]
    for step in stream(model, prompts, max_new_tokens, **options):
        for response, id in zip(responses, step):
            if id is not None:
                response.append(id)
    return responses


def check_prompts(prompts, config):
    """Refuse a prompt that the model cannot read or that leaves no room for a response."""
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {i} is empty; start from <|endoftext|> to sample without one")
        if len(prompt) >= config.max_seq_len:
            raise UserError(f"prompt {i} has {len(prompt)} tokens and leaves no room in max_seq_len "
                            f"{config.max_seq_len}; shorten it to {config.max_seq_len - 1} or fewer")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise UserError(f"prompt {i} has ids from {min(prompt)} to {max(prompt)}, outside vocab_size "
                            f"{config.vocab_size}; encode it with the model's own tokenizer")


@torch.no_grad()            # not inference_mode: its tensors, kept by autocast, could not be trained on next
def steps(model, prompts, rooms, sampling, stop_ids, seeds):
    """Do what `stream` promises; rooms: how many new tokens each prompt may have."""
    weight, V, N = model.model.embed_tokens.weight, model.config.vocab_size, max(rooms)
    ids, n_real = pad(prompts, weight.device)                                           # (B, T), (B,)
    seen = torch.zeros(len(prompts), V, dtype=torch.bool, device=weight.device).scatter_(1, ids, True)
    uniform = torch.stack([uniforms(seed, N) for seed in seeds], dim=1)                 # (N, B)
    uniform = uniform.to("cpu" if weight.device.type == "mps" else weight.device)       # MPS has no float64
    max_len = max(len(prompt) + room for prompt, room in zip(prompts, rooms))
    cache = KVCache(model.config, len(prompts), max_len, weight.device, weight.dtype)
    rows = list(range(len(prompts)))                    # the prompt of each row of the batch; None = ended
    for step in range(N):
        logits = repetition_penalty(next_logits(model, ids, n_real, cache), seen, sampling.repetition_penalty)
        logits = filter_logits(logits, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        ids = draw(logits, uniform[step]).to(weight.device)[:, None]                 # (B, 1)
        new = ids[:, 0].tolist()
        if V in new:
            raise UserError("the model's logits are not finite: no token to draw; take an earlier checkpoint")
        of_prompt = dict(zip(rows, new))
        yield [of_prompt.get(prompt) for prompt in range(len(prompts))]
        rows = [None if row is None or id in stop_ids or step + 1 == rooms[row] else row
                for row, id in zip(rows, new)]
        kept = [i for i, row in enumerate(rows) if row is not None]
        if not kept:
            return
        seen.scatter_(1, ids, True)
        if len(kept) <= (1 - DROP_SHARE) * len(rows) or cache.longest == max_len:
            rows, kept = [rows[i] for i in kept], torch.tensor(kept, device=weight.device)
            ids, seen, uniform = ids[kept], seen[kept], uniform[:, kept.to(uniform.device)]
            cache.keep(kept)
        n_real = torch.ones_like(ids[:, 0])


def pad(prompts, device):
    """Ids (B, T), each row filled up on the right with its own first id, and the rows' lengths (B,)."""
    T = max(len(prompt) for prompt in prompts)
    ids = [[*prompt, *[prompt[0]] * (T - len(prompt))] for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor([len(prompt) for prompt in prompts], device=device)


def next_logits(model, ids, n_real, cache):
    """Give fp32 logits (B, V) after each row's last token; of ids (B, T) the first n_real (B,) are real."""
    training = model.training
    if training:
        model.eval()                                    # in this call only: what runs between steps may train
    try:
        hidden = model.model(ids, cache=cache)          # (B, T, D)
    finally:
        if training:
            model.train()
    cache.advance(n_real)
    return model.head(hidden[torch.arange(len(ids), device=ids.device), n_real - 1]).float()


@torch.no_grad()
def reply_logprobs(model, prompts, replies, temperature=1.0):
    """Log-probability in nats of each whole reply under the model at this temperature; lists of ids."""
    rows = [[*prompt, *reply] for prompt, reply in zip(prompts, replies)]
    T, device = max(map(len, rows)), next(model.parameters()).device
    ids = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)
    logprobs = token_logprobs(model(ids), ids, temperature)
    return [logprobs[i, len(prompt) - 1:len(row) - 1].sum().item()
            for i, (prompt, row) in enumerate(zip(prompts, rows))]


# ---- command line

@dataclass(kw_only=True)
class GenerateConfig(Sampling):
    """Continue a prompt, or tell something from nothing, with a trained model."""
    model: str = option(MISSING, "OUT directory of a training run, or one checkpoint")
    chat: bool = option(False, "talk to a model that was tuned on conversations, in the terminal")
    prompt: str = option("", "text to continue; - = from stdin; none = start from <|endoftext|> alone")
    samples: int = option(1, "texts; one is printed as it comes, more are numbered")
    max_new_tokens: int = option(200, "tokens a sample, at most")
    seed: int = option(0, "sample i is the same for any number of samples")
    device: str = option("auto", "cpu, cuda, mps or auto")
    threads: int = option(0, "CPU threads; 0 = torch's choice")


def main(config):
    """Print `config.samples` texts, each with its prompt."""
    if config.samples < 1:
        raise UserError(f"samples {config.samples} must be at least 1")
    if config.threads < 0:
        raise UserError(f"threads {config.threads} must be at least 1, or 0 for torch's choice")
    if config.threads:
        torch.set_num_threads(config.threads)
    model, tokenizer, _ = load_model(config.model, pick_device(config.device))
    if not isinstance(model, LanguageModel):
        raise UserError(f"model {config.model} gives scores, not text; use one of pretrain, sft or ppo")
    if config.chat:
        talk(config, model, tokenizer)
        return
    text = read_prompt(config.prompt)
    prompts = [[tokenizer.eot_id, *tokenizer.encode(text)]] * config.samples
    stop_ids = (tokenizer.eot_id, tokenizer.im_end_id)
    seeds = draws(config.seed, "samples", 0, config.samples).tolist()
    arguments = dict(config.options(), stop_ids=stop_ids, seeds=seeds)
    if config.samples == 1:
        print_stream(text, stream(model, prompts, config.max_new_tokens, **arguments), tokenizer, stop_ids)
        return
    for i, response in enumerate(generate(model, prompts, config.max_new_tokens, **arguments), 1):
        print(f"--- {i}\n{text}{tokenizer.decode([id for id in response if id not in stop_ids])}", flush=True)


def print_stream(text, steps, tokenizer, stop_ids):
    """Print a prompt and its response as it comes; a character appears when its last byte is there.

    Returns the response.
    """
    decoder, said = tokenizer.stream_decoder(), []
    print(text, end="", flush=True)
    for (id,) in steps:
        if id not in stop_ids:
            said.append(decoder.push(id))
            print(said[-1], end="", flush=True)
    said.append(decoder.finish())
    print(said[-1], flush=True)
    return "".join(said)


def talk(config, model, tokenizer, ask=input):
    """Converse until /quit or the end of input; what does not fit is forgotten, the oldest first."""
    messages, turn, stop_ids = [], 0, (tokenizer.eot_id, tokenizer.im_end_id)
    room = model.config.max_seq_len - min(config.max_new_tokens, model.config.max_seq_len // 2)
    print("/reset forgets the conversation, /system TEXT sets what comes before it, /quit ends.")
    while True:
        try:
            line = ask("you> ").strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        command, _, rest = line.partition(" ")
        if command == "/quit":
            return
        if command in ("/reset", "/system"):
            system = messages[:1] if messages and messages[0]["role"] == "system" else []
            if command == "/system":
                system = [{"role": "system", "content": rest}] if rest.strip() else []
            messages = system
        elif line.startswith("/"):
            print(f"{command} is no command; there are /reset, /system TEXT and /quit")
        elif line:
            try:
                messages, prompt = remembered([*messages, {"role": "user", "content": line}], tokenizer, room)
            except UserError as error:
                print(error)
                continue
            seed = draws(config.seed, "chat", turn, 1).tolist()
            steps = stream(model, [prompt], config.max_new_tokens, stop_ids=stop_ids, seeds=seed, **config.options())
            reply = print_stream("", steps, tokenizer, stop_ids)
            messages, turn = [*messages, {"role": "assistant", "content": reply}], turn + 1


def remembered(messages, tokenizer, room):
    """(messages, ids) of the newest turns that fit into `room` tokens; a system turn stays."""
    while len(ids := tokenizer.encode_chat(messages, add_generation_prompt=True)[0]) > room:
        head = messages[:1] if messages[0]["role"] == "system" else []
        if len(messages) < len(head) + 3:
            raise UserError(f"that is {len(ids)} tokens, {room} fit; say it shorter")
        messages = head + messages[len(head) + 2:]              # the oldest question with its answer
    return messages, ids


def read_prompt(prompt):
    """The text of --prompt; where that is "-", all of stdin without its last line break."""
    try:
        if prompt == "-":
            return sys.stdin.buffer.read().decode("utf-8").removesuffix("\n").removesuffix("\r")
        prompt.encode()                                                 # the shell passes on any bytes
        return prompt
    except UnicodeDecodeError as error:
        raise UserError(f"stdin: byte {error.start} is not UTF-8; convert the prompt to UTF-8")
    except UnicodeEncodeError as error:
        raise UserError(f"prompt {prompt!r}: character {error.start} is not UTF-8; "
                        "convert the prompt to UTF-8")


if __name__ == "__main__":
    run(lambda: main(parse_config(GenerateConfig)))
