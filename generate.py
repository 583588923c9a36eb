"""Sampling from a language model: batches of unequal prompts, a KV cache, one seed a row, streamed.

With the defaults nothing touches the logits: tokens are drawn from exactly softmax(logits), as PPO needs. A
row's text depends on its prompt and its seed, not on the batch it sits in. No token is banned.

Shapes:  B rows of the batch now   T positions in this call   N new tokens at most   V vocab_size
"""

import functools
import math
import secrets
import sys
from dataclasses import MISSING, dataclass, field, fields

import numpy as np
import torch

from batches import draws
from checkpoint import load_model
from cli import UserError, option, parse_config, run
from model import Block, KVCache, LanguageModel, logprobs_after, work_type
from training import Ranks, compiles, pick_device

DROP_SHARE = 0.25                   # ended rows are computed along until they are this share of the batch


@dataclass(unsafe_hash=True)
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
           repetition_penalty=1.0, stop_ids=(), seeds=None, compile=False):
    """Give an iterator of steps, each one list: the new id of every row, None where the row has ended.

    A row ends with the first of stop_ids (its last id), after max_new_tokens, or when prompt and response
    together fill max_seq_len. prompts: lists of ids, none empty. seeds: one int a prompt; None = fresh ones.
    compile: see Engine.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    seeds = [secrets.randbits(64) for _ in prompts] if seeds is None else seeds
    if len(seeds) != len(prompts):
        raise UserError(f"seeds has {len(seeds)} entries for {len(prompts)} prompts; give one a prompt")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens {max_new_tokens} must be at least 1")
    check_prompts(prompts, model.config)
    rows = [Row(prompt, min(max_new_tokens, model.config.max_seq_len - len(prompt)), seed, sampling,
                frozenset(stop_ids))
            for prompt, seed in zip(prompts, seeds)]
    return steps(Engine(model, rows, compile), rows) if rows else iter(())


def steps(engine, rows):
    """Each step of the engine as a list of what these rows got."""
    while got := engine.step():
        new = {id(row): row.ids[-1] for row in got}
        yield [new.get(id(row)) for row in rows]


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


@dataclass
class Row:
    """One response in the making."""
    prompt: list                    # ids
    room: int                       # new tokens, at most
    seed: int
    sampling: Sampling
    stop_ids: frozenset = frozenset()
    top_logprobs: int = -1          # likeliest ids to note with each token; 0 = the token's own, -1 = nothing
    ids: list = field(default_factory=list)             # the response so far
    logprobs: list = field(default_factory=list)        # of each id (logprob, [(likely id, logprob)]), nats
    ended: bool = False             # set it from outside, and the row gets no more tokens

    def __post_init__(self):
        self.uniforms = uniforms(self.seed, self.room)


class Engine:
    """Rows sampled together: each joins at any step and leaves when it has ended (Yu et al. 2022, Orca).

    A row's text depends on its prompt, its seed and its settings, not on its company. compile: on a CPU the
    steps of a row that is alone run compiled, in half of the time; the first two take seconds, and more rows
    gain little. On a GPU the steps of any batch are captured, anew when its rows change.
    """

    def __init__(self, model, rows=(), compile=False):
        self.model, self.joining, self.compile = model, list(rows), compile
        self.rows, self.cache = [], None                # an ended row is computed along until `drop`
        self.captured = None, None                      # the keys that a captured step reads, and the step

    def add(self, row):
        """Let a row join at the next step."""
        self.joining.append(row)

    @torch.no_grad()        # not inference_mode: its tensors, kept by autocast, could not be trained on next
    def step(self):
        """Give each row that has not ended its next token; returns those rows, [] when none is left."""
        self.drop()
        weight, logits = self.model.model.embed_tokens.weight, []
        if self.rows:
            ids = torch.tensor([row.ids[-1:] for row in self.rows], device=weight.device)       # (B, 1)
            logits.append(self.next_logits(ids))
        if self.joining:
            ids, n_real = pad([row.prompt for row in self.joining], weight.device)              # (B, T), (B,)
            size = max(len(row.prompt) + row.room for row in self.joining)
            cache = KVCache(self.model.config, len(ids), size, weight.device, work_type(weight))
            logits.append(next_logits(self.model, ids, n_real, cache))
            if self.rows:
                self.cache.join(cache)
            else:
                self.cache = cache
            self.rows, self.joining = self.rows + self.joining, []
        live = [i for i, row in enumerate(self.rows) if not row.ended]
        if live:
            logits = torch.cat(logits) if len(logits) > 1 else logits[0]
            choose(logits if len(live) == len(logits) else logits[live], [self.rows[i] for i in live])
        return [self.rows[i] for i in live]

    def next_logits(self, ids):
        """Logits (B, V) after one new token a row, ids (B, 1), in the fastest way there is."""
        if not self.compile or not captures(ids.device):
            return next_logits(self.model, ids, 1, self.cache, self.compile and len(ids) == 1)
        self.cache.grow(self.cache.max_len)             # so that it stays where it is
        if self.captured[0] is not self.cache.keys:
            self.captured = self.cache.keys, capture(
                lambda ids: last_logits(self.model, ids, 1, self.cache), ids)
        logits = self.captured[1](ids)
        self.cache.advance(1)
        return logits

    def drop(self):
        """Take ended rows out once they are DROP_SHARE of the batch, or the cache is full to their end."""
        self.joining = [row for row in self.joining if not row.ended]
        kept = [i for i, row in enumerate(self.rows) if not row.ended]
        full = self.cache is not None and self.cache.longest == self.cache.max_len
        if not kept:
            self.rows, self.cache = [], None
        elif len(kept) <= (1 - DROP_SHARE) * len(self.rows) or full and len(kept) < len(self.rows):
            self.rows = [self.rows[i] for i in kept]
            self.cache.keep(torch.tensor(kept, device=self.cache.keys.device))


def choose(logits, rows):
    """Draw each row's next id from logits (B, V), by its own settings, and note which rows end."""
    for sampling in {row.sampling for row in rows}:
        chosen = [i for i, row in enumerate(rows) if row.sampling == sampling]
        mine = [rows[i] for i in chosen]
        raw = logits if len(chosen) == len(rows) else logits[chosen]
        part = raw
        if sampling.repetition_penalty != 1:
            seen = torch.zeros_like(part, dtype=torch.bool)
            for i, row in enumerate(mine):
                seen[i, row.prompt + row.ids] = True
            part = repetition_penalty(part, seen, sampling.repetition_penalty)
        part = filter_logits(part, sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        uniform = torch.stack([row.uniforms[len(row.ids)] for row in mine])
        # MPS has no float64
        new = draw(part, uniform.to("cpu" if part.device.type == "mps" else part.device)).tolist()
        if logits.shape[-1] in new:
            raise UserError("the model's logits are not finite: no token to draw; take an earlier checkpoint")
        for i, (row, id) in enumerate(zip(mine, new)):
            if row.top_logprobs >= 0:
                logprobs = raw[i].log_softmax(-1)
                best = logprobs.topk(row.top_logprobs)
                row.logprobs.append((logprobs[id].item(),
                                     list(zip(best.indices.tolist(), best.values.tolist()))))
            row.ids.append(id)
            row.ended = id in row.stop_ids or len(row.ids) == row.room


def pad(prompts, device):
    """Ids (B, T), each row filled up on the right with its own first id, and the rows' lengths (B,)."""
    T = max(len(prompt) for prompt in prompts)
    ids = [[*prompt, *[prompt[0]] * (T - len(prompt))] for prompt in prompts]
    return torch.tensor(ids, device=device), torch.tensor([len(prompt) for prompt in prompts], device=device)


@functools.cache
def compiled(function):
    """torch.compile, once, and not on import: the compiler alone takes seconds to load."""
    return torch.compile(function)


def captures(device):
    """Whether steps are captured here: where launching a kernel costs more than a small model's kernel."""
    return device.type == "cuda"


def capture(function, argument):
    """function as a CUDA graph: all its kernels in one launch, without Python.

    What is returned takes arguments of this one's shape and gives the same tensor each time, filled anew. All
    other tensors that the function reads must stay where they are.
    """
    held, side = argument.clone(), torch.cuda.Stream()
    # Autocast's cache of cast weights ends before the graph does, so the graph casts them itself.
    with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"),
                        cache_enabled=False):
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):                   # what libraries set up in a first call, outside of it
            function(held)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function(held)

    def replay(argument):
        held.copy_(argument)
        graph.replay()
        return result
    return replay


def read_stream(model, stream):
    """Logits (..., V) of the stream (..., D) as it leaves the blocks."""
    return model.head(model.model.norm(stream))


def last_logits(model, ids, n_real, cache, compile=False):
    """Give fp32 logits (B, V) after each row's last token; of ids (B, T) the first n_real are real.

    n_real: (B,), or one int. compile: by compiled blocks and a compiled head.
    """
    training = model.training
    if training:
        model.eval()                                    # in this call only: what runs between steps may train
    try:
        block = compiled(Block.forward) if compile else None
        stream = model.model.through_blocks(ids, cache=cache, block=block)                  # (B, T, D)
    finally:
        if training:
            model.train()
    rows = slice(None) if isinstance(n_real, int) else torch.arange(len(ids), device=ids.device)
    last = stream[rows, n_real - 1]                                                         # (B, D)
    return (compiled(read_stream) if compile else read_stream)(model, last).float()


def next_logits(model, ids, n_real, cache, compile=False):
    """The same, and the cache counts these tokens as read."""
    logits = last_logits(model, ids, n_real, cache, compile)
    cache.advance(n_real)
    return logits


@torch.no_grad()
def reply_logprobs(model, prompts, replies, temperature=1.0):
    """Log-probability in nats of each whole reply under the model at this temperature; lists of ids."""
    rows = [[*prompt, *reply] for prompt, reply in zip(prompts, replies)]
    T, device = max(map(len, rows)), next(model.parameters()).device
    ids = torch.tensor([row + [0] * (T - len(row)) for row in rows], device=device)
    row, place = torch.tensor([(i, t) for i, prompt in enumerate(prompts)
                               for t in range(len(prompt) - 1, len(rows[i]) - 1)], device=device).T
    _, logprobs = logprobs_after(model, ids, row, place, temperature)
    return [part.sum().item() for part in logprobs.split([len(reply) for reply in replies])]


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
    compile: bool = option(False, "torch.compile the steps of a single sample: seconds once, then twice as "
                                  "fast; on a GPU capture those of any number as CUDA graphs")


def main(config):
    """Print `config.samples` texts, each with its prompt."""
    if config.samples < 1:
        raise UserError(f"samples {config.samples} must be at least 1")
    if config.threads < 0:
        raise UserError(f"threads {config.threads} must be at least 1, or 0 for torch's choice")
    if config.threads:
        torch.set_num_threads(config.threads)
    device = pick_device(config.device)
    model, tokenizer, _ = load_model(config.model, device)
    if not isinstance(model, LanguageModel):
        raise UserError(f"model {config.model} gives scores, not text; use one of pretrain, sft or ppo")
    if config.compile and not captures(device):             # a graph needs no compiler
        config.compile = compiles(Ranks(device=device))
    if config.chat:
        talk(config, model, tokenizer)
        return
    text = read_prompt(config.prompt)
    prompts = [[tokenizer.eot_id, *tokenizer.encode(text)]] * config.samples
    stop_ids = (tokenizer.eot_id, tokenizer.im_end_id)
    seeds = draws(config.seed, "samples", 0, config.samples).tolist()
    arguments = dict(config.options(), stop_ids=stop_ids, seeds=seeds, compile=config.compile)
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
            steps = stream(model, [prompt], config.max_new_tokens, stop_ids=stop_ids, seeds=seed,
                           compile=config.compile, **config.options())
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
