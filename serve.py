"""An HTTP server that speaks OpenAI's API for our models, and serves the pages of web/.

    python serve.py --models out/sft,out/ppo --reward_model out/reward --samples out/feedback/samples.jsonl

One thread does the models' work: each model has an Engine (generate.py), whose rows join and leave at any
step, so requests are batched as they come. The event loop checks requests, turns ids into whole characters,
looks for stop strings, and marks the rows of a client that has gone as ended. Thumbs and ratings go to the
files that feedback.py reads. Not here: tools, images, presence and frequency penalties.
"""

import asyncio
import hmac
import ipaddress
import json
import queue
import secrets
import socket
import threading
import time
import traceback
from collections import deque
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from batches import draws, score_replies
from checkpoint import load_model
from cli import UserError, need, option, parse_config, run
from generate import Engine, Row, Sampling
from model import LanguageModel, ScalarModel
from ratings import append, check_rating, check_thumb, in_order_of, read_ratings, read_samples
from records import chat, check_turns
from training import at_least, pick_device

WEB = Path(__file__).parent / "web"
PATIENCE = 1.0                  # seconds without a token after which a client is looked for
UNSUPPORTED = {                 # name -> the value that asks for nothing
    "tools": None, "functions": None, "logit_bias": None, "presence_penalty": 0, "frequency_penalty": 0,
    "suffix": None, "best_of": 1, "echo": False}
HEADERS = {"Content-Security-Policy": "default-src 'self'", "X-Content-Type-Options": "nosniff",
           "Referrer-Policy": "no-referrer"}


@dataclass
class ServeConfig:
    """Serve models over HTTP, with pages to talk, compare and rate."""
    models: str = option("out/ppo", "OUT directories or checkpoints, comma-separated, each also NAME=DIR; "
                                    "the first is the default")
    reward_model: str = option("", "a reward model whose score the pages show beside each reply")
    samples: str = option("", "replies to rate, from feedback.py sample")
    ratings: str = option("out/ratings.jsonl", "file that ratings are appended to")
    thumbs: str = option("out/thumbs.jsonl", "file that thumbs are appended to")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0 = everybody who can reach this machine")
    port: int = option(8000, "port to listen on; 0 = any that is free")
    api_key: str = option("", "what clients must send as bearer token; empty = nothing")
    max_rows: int = option(64, "responses of one model that are computed together")
    max_waiting: int = option(512, "responses that may wait for that; more are refused with status 429")
    max_body: int = option(1 << 20, "bytes of a request, at most")
    device: str = option("auto", "cpu, cuda, mps or auto")
    threads: int = option(0, "CPU threads; 0 = torch's choice")


def main(config):
    at_least(1, config, "max_rows", "max_waiting", "max_body")
    at_least(0, config, "port", "threads")
    uvicorn = need("uvicorn", "fastapi uvicorn")
    app = make_app(config)
    listener = listen(config)
    address = "http://{}:{}".format(*listener.getsockname()[:2])
    print(f"{address}  (Ctrl-C ends; the API is at {address}/v1)", flush=True)
    if not config.api_key and not ipaddress.ip_address(listener.getsockname()[0]).is_loopback:
        print("anybody who can reach this machine may use it; --api_key asks for a key", flush=True)
    options = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    uvicorn.Server(options).run(sockets=[listener])


def listen(config):
    """A socket bound to host and port, or one line saying why not."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise UserError(f"cannot listen on {config.host} port {config.port}: {error}; give another --port or "
                        f"--host")
    return listener


# ---- the models' thread

@dataclass
class Job(Row):
    """A row that tells its request of every token."""
    index: int = 0                  # which of the request's choices it is
    inbox: Any = None               # asyncio.Queue of the request
    loop: Any = None                # event loop that the queue belongs to


class Worker(threading.Thread):
    """Steps the engines of all models in turn, as long as any has rows."""

    def __init__(self, models, max_rows):
        super().__init__(daemon=True, name="models")
        self.engines = {name: Engine(model) for name, model in models.items()}
        self.waiting = {name: deque() for name in models}
        self.submitted, self.max_rows = queue.SimpleQueue(), max_rows

    def submit(self, name, jobs):
        """Let jobs wait for their model, from any thread."""
        for job in jobs:
            self.submitted.put((name, job))

    def counts(self):
        """(rows that are computed, rows that wait)."""
        return (sum(len(engine.rows) + len(engine.joining) for engine in self.engines.values()),
                self.submitted.qsize() + sum(map(len, self.waiting.values())))

    def run(self):
        """Work while there are rows, else sleep until some are submitted."""
        while True:
            idle = self.counts() == (0, 0)
            while idle or not self.submitted.empty():
                name, job = self.submitted.get()
                self.waiting[name].append(job)
                idle = False
            for name in self.engines:
                self.work(name)

    def work(self, name):
        """One step of one model; what goes wrong there goes to those who wait for it."""
        engine, waiting = self.engines[name], self.waiting[name]
        while waiting and len(engine.rows) + len(engine.joining) < self.max_rows:
            engine.add(waiting.popleft())
        if not engine.rows and not engine.joining:
            return
        try:
            tell([(job, (job.index, job.ids[-1], job.logprobs[-1] if job.logprobs else None, job.ended))
                  for job in engine.step()])
        except Exception as error:                  # a model that diverged, memory: the server lives on
            traceback.print_exc()
            jobs = engine.rows + engine.joining
            self.engines[name] = Engine(engine.model)
            tell([(job, error) for job in jobs if not job.ended])


def tell(news):
    """Put news on the queues of their requests, with one call an event loop."""
    for loop in {job.loop for job, _ in news}:
        mine = [(job.inbox, item) for job, item in news if job.loop is loop]
        try:
            loop.call_soon_threadsafe(lambda mine=mine: [inbox.put_nowait(item) for inbox, item in mine])
        except RuntimeError:                                # the loop has ended, and with it who waited
            pass


# ---- from ids to text

class Choice:
    """One response as its client sees it: whole characters, nothing of a stop string, why it ended."""

    def __init__(self, tokenizer, stops):
        self.tokenizer, self.stops, self.decoder = tokenizer, stops, tokenizer.stream_decoder()
        self.text, self.sent, self.n_tokens, self.reason = "", 0, 0, None
        self.logprobs = []                                  # (start in text, id, logprob, likeliest)

    def push(self, id, logprob, last, stop_ids):
        """Take a token; returns the text that is certain by now."""
        self.n_tokens += 1
        if id in stop_ids:
            self.reason = "stop"
        else:
            if logprob:
                self.logprobs.append((len(self.text), id, *logprob))
            self.text += self.decoder.push(id)
        if last:
            self.text += self.decoder.finish()
            self.reason = self.reason or "length"
        found = [at for stop in self.stops if (at := self.text.find(stop)) >= 0]
        if found:
            self.text, self.reason = self.text[:min(found)], "stop"
            self.logprobs = [entry for entry in self.logprobs if entry[0] < len(self.text)]
        end = len(self.text) if self.reason else len(self.text) - self.held()
        new, self.sent = self.text[self.sent:end], max(self.sent, end)
        return new

    def held(self):
        """Characters at the end that may be the beginning of a stop string."""
        return max((n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])),
                   default=0)

    def token(self, id):
        """A token as OpenAI's API writes it."""
        piece = self.tokenizer.decode([id])
        raw = self.tokenizer.token_bytes[id] if id < len(self.tokenizer.token_bytes) else None
        return {"token": piece, "bytes": None if raw is None else list(raw)}


# ---- requests

class Refusal(Exception):
    """An answer with an HTTP status other than 200."""

    def __init__(self, status, message, param=None, code=None):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


def number(body, name, default, low, high, kind=float):
    """A number of a request within its range."""
    value = body.get(name)
    if value is None:
        return default
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not good or kind is int and int(value) != value:
        wish = "a whole number" if kind is int else "a number"
        raise Refusal(400, f"{name} {value!r} must be {wish} from {low} to {high}", name)
    return kind(value)


def flag(body, name):
    """A true or false of a request; false where it is missing."""
    value = body.get(name)
    if value not in (None, True, False) or isinstance(value, (int, float)) and not isinstance(value, bool):
        raise Refusal(400, f"{name} {value!r} must be true or false", name)
    return bool(value)


def stop_strings(body):
    """The stop strings of a request, up to four."""
    stops = body.get("stop") or []
    stops = [stops] if isinstance(stops, str) else stops
    good = isinstance(stops, list) and all(isinstance(s, str) and 0 < len(s) <= 200 for s in stops)
    if not good or len(stops) > 4:
        raise Refusal(400, "stop must be a string or up to four strings of 1 to 200 characters", "stop")
    return stops


def wanted(body):
    """How a request wants its tokens drawn."""
    for name, nothing in UNSUPPORTED.items():
        if body.get(name) not in (None, nothing, [], {}):
            raise Refusal(400, f"{name} is not supported here; leave it out", name)
    try:
        return Sampling(number(body, "temperature", 1.0, 0, 2), number(body, "top_k", 0, 0, 1 << 30, int),
                        number(body, "top_p", 1.0, 0, 1), number(body, "min_p", 0.0, 0, 1),
                        number(body, "repetition_penalty", 1.0, 0, 100))
    except UserError as error:
        raise Refusal(400, str(error), str(error).split()[0])


def chat_prompt(body, tokenizer):
    """Ids of a conversation that is to be answered."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refusal(400, "messages must be a list of at least one {role, content}", "messages")
    try:
        messages = chat([{**turn, "content": content_of(turn["content"])} for turn in messages])
        check_turns(messages, last="user")
        return tokenizer.encode_chat(messages, add_generation_prompt=True)[0]
    except (KeyError, TypeError):
        raise Refusal(400, "each of messages must have a role and a content", "messages")
    except UserError as error:
        raise Refusal(400, f"messages: {error}", "messages")


def content_of(content):
    """The text of a turn, also where it comes in parts."""
    if isinstance(content, list):
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise UserError("only text parts are read here")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise UserError("a content is not text")
    return content


def text_prompts(body, tokenizer):
    """Ids of each text that is to be continued."""
    prompt = body.get("prompt", "")
    if isinstance(prompt, list) and prompt and all(type(id) is int for id in prompt):
        return [prompt]
    prompts = [prompt] if isinstance(prompt, str) else prompt
    good = isinstance(prompts, list) and all(isinstance(p, str) for p in prompts)
    if not good or not 1 <= len(prompts) <= 64:
        raise Refusal(400, "prompt must be a text, up to 64 texts, or a list of token ids", "prompt")
    return [[tokenizer.eot_id, *tokenizer.encode(text)] for text in prompts]


def jobs_for(prompts, body, model, tokenizer, n, top_logprobs):
    """A job for each choice: n of each prompt, each with a seed of its own."""
    limit = model.config.max_seq_len
    new = (number(body, "max_completion_tokens", None, 1, 1 << 30, int)
           or number(body, "max_tokens", limit, 1, 1 << 30, int))
    seed = number(body, "seed", None, -(1 << 63), (1 << 63) - 1, int)
    seeds = draws(secrets.randbits(63) if seed is None else seed, "samples", 0, n).tolist()
    sampling, inbox, loop = wanted(body), asyncio.Queue(), asyncio.get_running_loop()
    for prompt in prompts:
        if len(prompt) >= limit:
            raise Refusal(400, f"this model's context is {limit} tokens; the prompt has {len(prompt)} "
                               "and leaves no room for a reply; shorten it",
                          "messages", "context_length_exceeded")
        if not prompt or not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise Refusal(400, f"prompt ids must be from 0 to {model.config.vocab_size - 1}, at least one",
                          "prompt")
    return [Job(list(prompt), min(new, limit - len(prompt)), seed, sampling,
                frozenset((tokenizer.im_end_id, tokenizer.eot_id)), top_logprobs, index=p * n + i,
                inbox=inbox, loop=loop)
            for p, prompt in enumerate(prompts) for i, seed in enumerate(seeds)]


# ---- answering

class Server:
    """What the requests share: models, the worker, files; and an answer to each kind of request."""

    def __init__(self, config):
        self.config, self.started, device = config, int(time.time()), pick_device(config.device)
        self.models, self.stages = {}, {}
        for spec in filter(None, map(str.strip, config.models.split(","))):
            name, _, path = spec.rpartition("=")
            name = name or Path(path.rstrip("/")).name
            if name in self.models:
                raise UserError(f"two models are called {name!r}; name them, --models a={path},b=...")
            model, tokenizer, stored = load_model(path, device)
            if not isinstance(model, LanguageModel):
                raise UserError(f"model {path} gives scores, not text; it can be the --reward_model")
            self.models[name], self.stages[name] = (model, tokenizer), stored["stage"]
        if not self.models:
            raise UserError("--models is empty; give at least one directory of a training run")
        self.judge = load_model(config.reward_model, device) if config.reward_model else None
        if self.judge and not isinstance(self.judge[0], ScalarModel):
            raise UserError(f"reward_model {config.reward_model} gives text, not scores")
        self.samples = read_samples(config.samples) if config.samples else {}
        self.worker = Worker({name: model for name, (model, _) in self.models.items()}, config.max_rows)
        self.written, self.writing = set(), threading.Lock()

    async def read_body(self, request):
        """The JSON object of a request."""
        if not request.headers.get("content-type", "").startswith("application/json"):
            raise Refusal(415, "send application/json")             # so no other site's form can post here
        size, parts = 0, []
        async for part in request.stream():
            size += len(part)
            if size > self.config.max_body:
                raise Refusal(413, f"the request is larger than {self.config.max_body:,} bytes; shorten it")
            parts.append(part)
        try:
            body = json.loads(b"".join(parts))
        except (ValueError, RecursionError):
            raise Refusal(400, "the body is not JSON in UTF-8")
        if not isinstance(body, dict):
            raise Refusal(400, "the body must be a JSON object")
        return body

    def chosen(self, body):
        """(name, model, tokenizer) that a request asks for; the first where it names none."""
        name = body.get("model") or next(iter(self.models))
        if not isinstance(name, str) or name not in self.models:
            raise Refusal(404, f"model {name!r} is not here; there are {', '.join(self.models)}", "model",
                          "model_not_found")
        return name, *self.models[name]

    async def chat_completions(self, request):
        """POST /v1/chat/completions."""
        body = await self.read_body(request)
        name, model, tokenizer = self.chosen(body)
        top_logprobs = number(body, "top_logprobs", 0, 0, 20, int) if flag(body, "logprobs") else -1
        return await self.complete(request, body, [chat_prompt(body, tokenizer)], top_logprobs, ChatForm)

    async def completions(self, request):
        """POST /v1/completions."""
        body = await self.read_body(request)
        name, model, tokenizer = self.chosen(body)
        return await self.complete(request, body, text_prompts(body, tokenizer),
                                   number(body, "logprobs", -1, 0, 20, int),
                                   TextForm)

    async def complete(self, request, body, prompts, top_logprobs, form):
        """Answer a checked request, whole or as a stream."""
        name, model, tokenizer = self.chosen(body)
        streaming, stops = flag(body, "stream"), stop_strings(body)
        options = body.get("stream_options") or {}
        jobs = jobs_for(prompts, body, model, tokenizer, number(body, "n", 1, 1, 16, int), top_logprobs)
        choices = [Choice(tokenizer, stops) for _ in jobs]
        if self.worker.counts()[1] + len(jobs) > self.config.max_waiting:
            raise Refusal(429, f"{self.config.max_waiting} responses wait already; try again in a moment")
        self.worker.submit(name, jobs)
        answer = form(name, choices, top_logprobs >= 0, sum(map(len, prompts)))
        if streaming:
            with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
            return need("fastapi.responses", "fastapi").StreamingResponse(
                events(answer, arrivals(request, jobs, choices), with_usage), media_type="text/event-stream",
                headers={"Cache-Control": "no-cache"})
        async for _ in arrivals(request, jobs, choices):
            pass
        return answer.whole()

    async def list_models(self, request):
        """GET /v1/models."""
        return {"object": "list", "data": [
            {"id": name, "object": "model", "created": self.started, "owned_by": "sprout",
             "stage": self.stages[name],
             "context_length": model.config.max_seq_len} for name, (model, _) in self.models.items()]}

    async def health(self, request):
        """GET /health."""
        if not self.worker.is_alive():
            raise Refusal(500, "the models' thread has ended; start the server again")
        computed, waiting = self.worker.counts()
        return {"status": "ok", "models": list(self.models), "reward_model": bool(self.judge),
                "samples": len(self.samples), "rows": computed, "waiting": waiting}

    async def score(self, request):
        """POST /score {messages, reply}: what the reward model says."""
        body = await self.read_body(request)
        if not self.judge:
            raise Refusal(404, "there is no reward model; start the server with --reward_model")
        model, tokenizer, _ = self.judge
        prompt, reply = chat_prompt(body, tokenizer), body.get("reply")
        if not isinstance(reply, str):
            raise Refusal(400, "reply must be text", "reply")
        ids = [*tokenizer.encode(reply.strip()), tokenizer.im_end_id]
        if len(ids) > model.config.max_seq_len:
            raise Refusal(400, f"reply has {len(ids)} tokens, the reward model reads "
                               f"{model.config.max_seq_len}", "reply")
        found = await asyncio.to_thread(score_replies, model, [prompt], [ids], tokenizer.im_end_id)
        return {"score": found.item()}

    # What people think.

    async def thumbs(self, request):
        """POST /thumbs {messages, reply, model, thumb, nonce}."""
        return await self.write_once(request, self.config.thumbs, check_thumb,
                                     ("messages", "reply", "model", "thumb"))

    async def rated(self, request):
        """POST /rate/ratings: a line of ratings.jsonl, with a nonce."""
        def check(record):
            check_rating(record, self.samples)
            if not isinstance(record["annotator"], str) or not record["annotator"].strip():
                raise UserError("annotator is empty; give your name")
        return await self.write_once(request, self.config.ratings, check,
                                     ("sample", "annotator", "kind", "ranking", "scores"))

    async def write_once(self, request, path, check, keys):
        """Append a checked record to a file, one time however often it is sent."""
        body = await self.read_body(request)
        nonce, record = body.get("nonce"), {key: body[key] for key in keys if key in body}
        record["time"] = round(time.time(), 1)
        try:
            check(record)
        except UserError as error:
            raise Refusal(400, str(error))

        def write():
            with self.writing:
                if not isinstance(nonce, str) or nonce not in self.written:
                    Path(path).parent.mkdir(parents=True, exist_ok=True)
                    append(path, record)
                    self.written.add(nonce)
        await asyncio.to_thread(write)
        return {"written": True}

    async def to_rate(self, request):
        """GET /rate/samples?annotator=NAME&kind=KIND: what this person has not judged, in their own order."""
        given = request.query_params
        annotator, kind = given.get("annotator", ""), given.get("kind", "ranking")
        if not annotator.strip() or annotator.startswith("simulated"):
            raise Refusal(400, f"annotator {annotator!r} is no name for a person; give yours", "annotator")
        ratings = await asyncio.to_thread(read_ratings, self.config.ratings, self.samples)
        done = {r["sample"] for r in ratings if (r["annotator"], r["kind"]) == (annotator, kind)}
        some = [sample for sample in self.samples.values() if len(sample["replies"]) > 1]
        return {"done": sum(sample["id"] in done for sample in some), "total": len(some), "samples": [
            {"id": sample["id"], "messages": sample["messages"], "replies": [
                {"id": r["id"], "text": r["text"]} for r in in_order_of(annotator, sample, kind)]}
            for sample in some if sample["id"] not in done]}


async def arrivals(request, jobs, choices):
    """(number of the choice, its new text) as tokens arrive, until all have ended or the client has gone."""
    try:
        while any(choice.reason is None for choice in choices):
            try:
                item = await asyncio.wait_for(jobs[0].inbox.get(), PATIENCE)
            except TimeoutError:
                if await request.is_disconnected():
                    return
                continue
            if isinstance(item, Exception):
                raise Refusal(500, f"the model failed: {item}")
            index, id, logprob, last = item
            if choices[index].reason is None:                   # else a token that was under way at its end
                new = choices[index].push(id, logprob, last, jobs[index].stop_ids)
                if choices[index].reason:                       # never back to False: the engine sets it, too
                    jobs[index].ended = True
                yield index, new
    finally:
        for job in jobs:
            job.ended = True


async def events(answer, news, with_usage):
    """The lines of a stream of server-sent events."""
    def line(content):
        return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"
    try:
        for chunk in answer.opening():
            yield line(chunk)
        async for index, new in news:
            if new or answer.choices[index].reason:
                yield line(answer.chunk(index, new))
        if with_usage:
            yield line(answer.head | {"object": answer.streamed, "choices": [], "usage": answer.usage()})
    except Refusal as error:
        yield line({"error": {"message": error.message, "type": "server_error"}})
    yield "data: [DONE]\n\n"


class ChatForm:
    """An answer as chat completions write it."""
    id, object, streamed = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, model, choices, with_logprobs, n_prompt):
        self.choices, self.with_logprobs, self.n_prompt = choices, with_logprobs, n_prompt
        self.head = {"id": f"{self.id}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self.sent = [0] * len(choices)                              # log-probabilities so far, by choice

    def usage(self):
        """Tokens read and written."""
        n_new = sum(choice.n_tokens for choice in self.choices)
        return {"prompt_tokens": self.n_prompt, "completion_tokens": n_new,
                "total_tokens": self.n_prompt + n_new}

    def opening(self):
        """What a stream begins with."""
        return [self.part(i, {"delta": {"role": "assistant", "content": ""}, "logprobs": None,
                              "finish_reason": None})
                for i in range(len(self.choices))]

    def chunk(self, index, new):
        """A piece of a stream."""
        return self.part(index, self.content(index, new) | self.state(index))

    def content(self, index, new):
        return {"delta": {"content": new} if new else {}}

    def part(self, index, content):
        return self.head | {"object": self.streamed, "choices": [{"index": index, **content}]}

    def state(self, index):
        """Log-probabilities that were not sent yet, and why the choice has ended."""
        choice, said = self.choices[index], None
        if self.with_logprobs:
            said = self.logprobs(choice, choice.logprobs[self.sent[index]:])
            self.sent[index] = len(choice.logprobs)
        return {"logprobs": said, "finish_reason": choice.reason}

    def whole(self):
        """The answer in one piece."""
        return self.head | {"object": self.object, "usage": self.usage(), "choices": [
            {"index": i, **self.final(choice.text), **self.state(i)}
            for i, choice in enumerate(self.choices)]}

    def final(self, text):
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, choice, entries):
        """Log-probabilities of some tokens."""
        return {"content": [{**choice.token(id), "logprob": logprob,
                             "top_logprobs": [{**choice.token(i), "logprob": x} for i, x in best]}
                            for _, id, logprob, best in entries]}


class TextForm(ChatForm):
    """An answer as completions write it."""
    id = "cmpl"
    object = streamed = "text_completion"

    def opening(self):
        return []

    def content(self, index, new):
        return {"text": new}

    def final(self, text):
        return {"text": text}

    def logprobs(self, choice, entries):
        """The same as lists side by side."""
        return {"tokens": [choice.token(id)["token"] for _, id, _, _ in entries],
                "token_logprobs": [logprob for _, _, logprob, _ in entries],
                "top_logprobs": [{choice.token(i)["token"]: x for i, x in best} for *_, best in entries],
                "text_offset": [at for at, *_ in entries]}


# ---- the application

def make_app(config):
    """The FastAPI application, with its models loaded; the worker starts with it."""
    fastapi, static = need("fastapi", "fastapi uvicorn"), need("fastapi.staticfiles", "fastapi")
    if config.threads:
        torch.set_num_threads(config.threads)
    server = Server(config)

    @asynccontextmanager
    async def lifespan(app):
        server.worker.start()
        yield

    app = fastapi.FastAPI(title="Sprout", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.middleware("http")(guard_of(config.api_key))
    app.add_exception_handler(Refusal, refuse)
    app.add_exception_handler(fastapi.exceptions.StarletteHTTPException, not_there)
    for method, path, answer in (
            ("POST", "/v1/chat/completions", server.chat_completions),
            ("POST", "/v1/completions", server.completions), ("GET", "/v1/models", server.list_models),
            ("GET", "/health", server.health), ("POST", "/score", server.score),
            ("POST", "/thumbs", server.thumbs), ("GET", "/rate/samples", server.to_rate),
            ("POST", "/rate/ratings", server.rated)):
        app.add_api_route(path, endpoint(answer, fastapi.Request), methods=[method])
    app.mount("/", static.StaticFiles(directory=WEB, html=True))
    return app


def endpoint(answer, Request):
    """`answer` as FastAPI wants it: with its argument's type, known only where FastAPI is there."""
    async def call(request):
        return await answer(request)
    call.__annotations__["request"] = Request
    return call


async def refuse(request, error):
    """A Refusal as the API's own kind of error."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    content = {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return need("fastapi.responses", "fastapi").JSONResponse(content, error.status, headers)


async def not_there(request, error):
    """A wrong path or method in the same form."""
    return await refuse(request, Refusal(error.status_code, f"{request.url.path}: {error.detail}"))


def guard_of(api_key):
    """A middleware that asks for the key, and says what a browser may do with what we send."""
    async def guard(request, call_next):
        if api_key and request.url.path.startswith(("/v1/", "/thumbs", "/rate/", "/score")):
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), api_key.encode()):
                return await refuse(request, Refusal(401, "wrong or missing API key; send it as bearer token",
                                                     None,
                                                     "invalid_api_key"))
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response
    return guard


if __name__ == "__main__":
    run(lambda: main(parse_config(ServeConfig)))
