"""An HTTP server that speaks OpenAI's API for our models, and serves the pages of web/.

    python serve.py --models out/sft,out/ppo --reward_model out/reward --samples out/feedback/samples.jsonl

One thread does the models' work: each model has an Engine (generate.py), whose rows join and leave at any step,
so requests are batched as they come. The event loop checks requests, turns ids into whole characters, looks for stop
strings, and marks the rows of a client that has gone as ended. Thumbs and ratings go to the files that feedback.py reads.
Not here: tools, images, presence and frequency penalties.
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

from batches import draws, score_replies
from checkpoint import load_model
from cli import UserError, need, option, parse_config, run
from feedback import append, check_rating, check_thumb, in_order_of, read_ratings, read_samples
from generate import Engine, Row, Sampling
from model import LanguageModel, ScalarModel
from records import chat, check_turns
from training import at_least, pick_device

WEB = Path(__file__).parent / "web"
PATIENCE = 1.0                  # seconds without a token after which a client is looked for
UNSUPPORTED = {"tools": None, "functions": None, "logit_bias": None, "presence_penalty": 0, "frequency_penalty": 0,
               "suffix": None, "best_of": 1, "echo": False}          # name -> the value that asks for nothing
HEADERS = {"Content-Security-Policy": "default-src 'self'", "X-Content-Type-Options": "nosniff",
           "Referrer-Policy": "no-referrer"}


@dataclass
class ServeConfig:
    """Serve models over HTTP, with pages to talk, compare and rate."""
    models: str = option("out/ppo", "OUT directories or checkpoints, comma-separated, each also NAME=DIR; the first is "
                                    "the default")
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
        raise UserError(f"cannot listen on {config.host} port {config.port}: {error}; give another --port or --host")
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
        except Exception as error:                          # a model that diverged, memory: the server lives on
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
    """One response as its client sees it: whole characters, nothing of a stop string, a reason for the end."""

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
        return max((n for stop in self.stops for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)

    def token(self, id):
        """A token as OpenAI's API writes it."""
        piece = self.tokenizer.decode([id])
        raw = self.tokenizer.token_bytes[id] if id < len(self.tokenizer.token_bytes) else None
        return {"token": piece, "bytes": None if raw is None else list(raw)}

    def chat_logprobs(self, since=0):
        """Log-probabilities of the tokens from number `since` on, in the form of chat completions."""
        return {"content": [{**self.token(id), "logprob": logprob,
                             "top_logprobs": [{**self.token(i), "logprob": x} for i, x in best]}
                            for _, id, logprob, best in self.logprobs[since:]]}

    def text_logprobs(self, since=0):
        """The same in the form of completions."""
        entries = self.logprobs[since:]
        return {"tokens": [self.token(id)["token"] for _, id, _, _ in entries],
                "token_logprobs": [logprob for *_, logprob, _ in entries],
                "top_logprobs": [{self.token(i)["token"]: x for i, x in best} for *_, best in entries],
                "text_offset": [at for at, *_ in entries]}


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
        raise Refusal(400, f"{name} {value!r} must be {'a whole number' if kind is int else 'a number'} from {low} to "
                           f"{high}", name)
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
    if not isinstance(stops, list) or len(stops) > 4 or not all(isinstance(s, str) and 0 < len(s) <= 200 for s in stops):
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
        if not all(part.get("type") == "text" for part in content):
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
    if not isinstance(prompts, list) or not 1 <= len(prompts) <= 64 or not all(isinstance(p, str) for p in prompts):
        raise Refusal(400, "prompt must be a text, up to 64 texts, or a list of token ids", "prompt")
    return [[tokenizer.eot_id, *tokenizer.encode(text)] for text in prompts]


def jobs_for(prompts, body, model, tokenizer, n, top_logprobs):
    """A job for each choice: n of each prompt, each with a seed of its own."""
    limit = model.config.max_seq_len
    new = number(body, "max_completion_tokens", None, 1, 1 << 30, int) or number(body, "max_tokens", limit, 1, 1 << 30, int)
    seed = number(body, "seed", None, -(1 << 63), (1 << 63) - 1, int)
    seeds = draws(secrets.randbits(63) if seed is None else seed, "samples", 0, n).tolist()
    sampling, inbox, loop = wanted(body), asyncio.Queue(), asyncio.get_running_loop()
    for prompt in prompts:
        if len(prompt) >= limit:
            raise Refusal(400, f"this model's context is {limit} tokens; the prompt has {len(prompt)} and leaves no room for "
                               "a reply; shorten it", "messages", "context_length_exceeded")
        if not prompt or not 0 <= min(prompt) <= max(prompt) < model.config.vocab_size:
            raise Refusal(400, f"prompt ids must be from 0 to {model.config.vocab_size - 1}, at least one", "prompt")
    return [Job(list(prompt), min(new, limit - len(prompt)), seed, sampling,
                frozenset((tokenizer.im_end_id, tokenizer.eot_id)), top_logprobs, index=p * n + i, inbox=inbox, loop=loop)
            for p, prompt in enumerate(prompts) for i, seed in enumerate(seeds)]


# ---- the application

def make_app(config):
    """The FastAPI application, with its models loaded and its worker running."""
    fastapi = need("fastapi", "fastapi uvicorn")
    responses, static = need("fastapi.responses", "fastapi"), need("fastapi.staticfiles", "fastapi")
    concurrency = need("fastapi.concurrency", "fastapi")
    device, models, tokenizers, stages = pick_device(config.device), {}, {}, {}
    if config.threads:
        import torch
        torch.set_num_threads(config.threads)
    for spec in filter(None, map(str.strip, config.models.split(","))):
        name, _, path = spec.rpartition("=")
        name = name or Path(path.rstrip("/")).name
        if name in models:
            raise UserError(f"two models are called {name!r}; name them, --models a={path},b=...")
        models[name], tokenizers[name], stored = load_model(path, device)
        stages[name] = stored["stage"]
        if not isinstance(models[name], LanguageModel):
            raise UserError(f"model {path} gives scores, not text; it can be the --reward_model")
    if not models:
        raise UserError("--models is empty; give at least one directory of a training run")
    judge = load_model(config.reward_model, device) if config.reward_model else None
    if judge and not isinstance(judge[0], ScalarModel):
        raise UserError(f"reward_model {config.reward_model} gives text, not scores")
    samples = read_samples(config.samples) if config.samples else {}
    worker, started, written, writing = Worker(models, config.max_rows), int(time.time()), set(), threading.Lock()

    @asynccontextmanager
    async def lifespan(app):
        worker.start()
        yield

    app = fastapi.FastAPI(title="Sprout", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(Refusal)
    async def refuse(request, error):
        kind = "server_error" if error.status >= 500 else "invalid_request_error"
        content = {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code}}
        return responses.JSONResponse(content, error.status, {"Retry-After": "1"} if error.status == 429 else None)

    @app.exception_handler(fastapi.exceptions.StarletteHTTPException)
    async def not_there(request, error):
        return await refuse(request, Refusal(error.status_code, f"{request.url.path}: {error.detail}"))

    @app.middleware("http")
    async def guard(request, call_next):
        if config.api_key and request.url.path.startswith(("/v1/", "/thumbs", "/rate/", "/score")):
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(given.encode(), config.api_key.encode()):
                return await refuse(request, Refusal(401, "wrong or missing API key; send it as bearer token", None,
                                                     "invalid_api_key"))
        response = await call_next(request)
        response.headers.update(HEADERS)
        return response

    async def read_body(request):
        """The JSON object of a request."""
        if not request.headers.get("content-type", "").startswith("application/json"):
            raise Refusal(415, "send application/json")                 # so no other site's form can post here
        size, parts = 0, []
        async for part in request.stream():
            size += len(part)
            if size > config.max_body:
                raise Refusal(413, f"the request is larger than {config.max_body:,} bytes; shorten it")
            parts.append(part)
        try:
            body = json.loads(b"".join(parts))
        except (ValueError, RecursionError):
            raise Refusal(400, "the body is not JSON in UTF-8")
        if not isinstance(body, dict):
            raise Refusal(400, "the body must be a JSON object")
        return body

    def chosen(body):
        """(name, model, tokenizer) that a request asks for; the first where it names none."""
        name = body.get("model") or next(iter(models))
        if name not in models:
            raise Refusal(404, f"model {name!r} is not here; there are {', '.join(models)}", "model", "model_not_found")
        return name, models[name], tokenizers[name]

    def start(name, jobs):
        """Send jobs to the worker, unless too many wait already."""
        if worker.counts()[1] + len(jobs) > config.max_waiting:
            raise Refusal(429, f"{config.max_waiting} responses wait already; try again in a moment")
        worker.submit(name, jobs)

    async def arrivals(request, jobs, choices):
        """(choice, its new text) as tokens arrive, until all have ended or the client has gone."""
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
                if choices[index].reason is None:                       # else a token that was under way at its end
                    new = choices[index].push(id, logprob, last, jobs[index].stop_ids)
                    jobs[index].ended = choices[index].reason is not None
                    yield index, new
        finally:
            for job in jobs:
                job.ended = True

    def usage(prompts, choices):
        n_prompt, n_new = sum(map(len, prompts)), sum(choice.n_tokens for choice in choices)
        return {"prompt_tokens": n_prompt, "completion_tokens": n_new, "total_tokens": n_prompt + n_new}

    async def complete(request, body, prompts, n, top_logprobs, form):
        """Answer a checked request, whole or as a stream. form: "chat" or "text"."""
        name, model, tokenizer = chosen(body)
        streaming, stops = flag(body, "stream"), stop_strings(body)
        options = body.get("stream_options") or {}
        with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        jobs = jobs_for(prompts, body, model, tokenizer, n, top_logprobs)
        choices = [Choice(tokenizer, stops) for _ in jobs]
        kind = "chat.completion" if form == "chat" else "text_completion"
        head = {"id": f"{'chatcmpl' if form == 'chat' else 'cmpl'}-{secrets.token_hex(12)}", "created": int(time.time()),
                "model": name}
        noted = [0] * len(choices)                                      # log-probabilities already sent, by choice
        start(name, jobs)

        def shown(index, key, content):
            choice, said = choices[index], None
            if top_logprobs >= 0:
                said = choice.chat_logprobs(noted[index]) if form == "chat" else choice.text_logprobs(noted[index])
                noted[index] = len(choice.logprobs)
            return {"index": index, key: content, "logprobs": said, "finish_reason": choice.reason}

        async def events():
            def event(parts, **more):
                chunk = head | {"object": "chat.completion.chunk" if form == "chat" else kind, "choices": parts} | more
                return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"
            try:
                if form == "chat":
                    for index in range(len(choices)):
                        yield event([{"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                                      "finish_reason": None}])
                async for index, new in arrivals(request, jobs, choices):
                    if new or choices[index].reason:
                        delta = {"content": new} if new else {}
                        yield event([shown(index, "delta", delta) if form == "chat" else shown(index, "text", new)])
                if with_usage:
                    yield event([], usage=usage(prompts, choices))
            except Refusal as error:
                yield f"data: {json.dumps({'error': {'message': error.message, 'type': 'server_error'}})}\n\n"
            yield "data: [DONE]\n\n"

        if streaming:
            return responses.StreamingResponse(events(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        async for _ in arrivals(request, jobs, choices):
            pass
        parts = [shown(i, "message", {"role": "assistant", "content": choice.text, "refusal": None}) if form == "chat"
                 else shown(i, "text", choice.text) for i, choice in enumerate(choices)]
        return head | {"object": kind, "choices": parts, "usage": usage(prompts, choices)}

    @app.post("/v1/chat/completions")
    async def chat_completions(request: fastapi.Request):
        body = await read_body(request)
        name, model, tokenizer = chosen(body)
        top = number(body, "top_logprobs", 0, 0, 20, int) if flag(body, "logprobs") else -1
        return await complete(request, body, [chat_prompt(body, tokenizer)], number(body, "n", 1, 1, 16, int), top, "chat")

    @app.post("/v1/completions")
    async def completions(request: fastapi.Request):
        body = await read_body(request)
        name, model, tokenizer = chosen(body)
        return await complete(request, body, text_prompts(body, tokenizer), number(body, "n", 1, 1, 16, int),
                              number(body, "logprobs", -1, 0, 20, int), "text")

    @app.get("/v1/models")
    async def list_models():
        return {"object": "list", "data": [
            {"id": name, "object": "model", "created": started, "owned_by": "sprout", "stage": stages[name],
             "context_length": model.config.max_seq_len} for name, model in models.items()]}

    @app.get("/health")
    async def health():
        if not worker.is_alive():
            raise Refusal(500, "the models' thread has ended; start the server again")
        computed, waiting = worker.counts()
        return {"status": "ok", "models": list(models), "reward_model": bool(judge), "samples": len(samples),
                "rows": computed, "waiting": waiting}

    @app.post("/score")
    async def score(request: fastapi.Request):
        body = await read_body(request)
        if not judge:
            raise Refusal(404, "there is no reward model; start the server with --reward_model")
        model, tokenizer, _ = judge
        prompt, reply = chat_prompt(body, tokenizer), body.get("reply")
        if not isinstance(reply, str):
            raise Refusal(400, "reply must be text", "reply")
        ids = [*tokenizer.encode(reply.strip()), tokenizer.im_end_id]
        if len(ids) > model.config.max_seq_len:
            raise Refusal(400, f"reply has {len(ids)} tokens, the reward model reads {model.config.max_seq_len}", "reply")
        found = await concurrency.run_in_threadpool(score_replies, model, [prompt], [ids], tokenizer.im_end_id)
        return {"score": float(found[0])}

    async def write_once(body, path, check, keys):
        """Append a checked record to a file, one time however often it is sent."""
        nonce, record = body.get("nonce"), {key: body[key] for key in keys if key in body}
        record["time"] = round(time.time(), 1)
        try:
            check(record)
        except UserError as error:
            raise Refusal(400, str(error))

        def write():
            with writing:
                if nonce is None or nonce not in written:
                    Path(path).parent.mkdir(parents=True, exist_ok=True)
                    append(path, record)
                    written.add(nonce)
        await concurrency.run_in_threadpool(write)
        return {"written": True}

    @app.post("/thumbs")
    async def thumbs(request: fastapi.Request):
        return await write_once(await read_body(request), config.thumbs, check_thumb,
                                ("messages", "reply", "model", "thumb"))

    @app.get("/rate/samples")
    async def to_rate(annotator: str = "", kind: str = "ranking"):
        if not annotator.strip() or annotator.startswith("simulated"):
            raise Refusal(400, f"annotator {annotator!r} is no name for a person; give yours", "annotator")
        ratings = await concurrency.run_in_threadpool(read_ratings, config.ratings, samples)
        done = {r["sample"]: r for r in ratings if (r["annotator"], r["kind"]) == (annotator, kind)}
        some = [s for s in samples.values() if len(s["replies"]) > 1]
        return {"done": sum(s["id"] in done for s in some), "total": len(some), "samples": [
            {"id": s["id"], "messages": s["messages"], "replies": [
                {"id": r["id"], "text": r["text"]} for r in in_order_of(annotator, s, kind)]}
            for s in some if s["id"] not in done]}

    @app.post("/rate/ratings")
    async def rated(request: fastapi.Request):
        def check(record):
            check_rating(record, samples)
            if not isinstance(record["annotator"], str) or not record["annotator"].strip():
                raise UserError("annotator is empty; give your name")
        return await write_once(await read_body(request), config.ratings, check,
                                ("sample", "annotator", "kind", "ranking", "scores"))

    app.mount("/", static.StaticFiles(directory=WEB, html=True))
    app.state.worker = worker
    return app


if __name__ == "__main__":
    run(lambda: main(parse_config(ServeConfig)))
