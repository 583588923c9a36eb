"""The server with OpenAI's own client.

Equal to the model alone, in batches of many, streamed, stopped, refused, recorded.
"""

import asyncio
import json
import random
import socket
import threading
import time
from contextlib import contextmanager

import pytest
import torch

import generate as generate_module
from checkpoint import save
from cli import UserError
from feedback import CollectConfig, collect
from generate import Engine, Row, Sampling, generate
from model import LanguageModel, ModelConfig, ScalarModel, token_logprobs
from records import read_records
from serve import Choice, ServeConfig, listen, make_app
from test_generate import ragged, small_model
from tokenizer import Tokenizer

TEXT = "猫说：你好！ The cat 🐈 said hello to the dog, and the dog said 你好 to the cat. " * 20


# ---- the engine: rows that come and go

def test_rows_that_join_and_leave_are_the_rows_alone():
    model, rng = small_model(), random.Random(0)
    options = [Sampling(0.0), Sampling(), Sampling(0.7, top_k=5),
               Sampling(1.3, top_p=0.8, repetition_penalty=1.2)]
    rows = [Row(prompt, rng.randint(1, 25), seed, options[seed % 4], frozenset({3}))
            for seed, prompt in enumerate(ragged(24))]
    waiting, engine = list(rows), Engine(model)
    while waiting or engine.rows or engine.joining:
        for row in waiting[:rng.randint(0, 4)]:
            engine.add(waiting.pop(0))
        engine.step()
    for row in rows:
        alone = generate(model, [row.prompt], row.room, stop_ids=[3], seeds=[row.seed],
                         **row.sampling.options())
        assert [row.ids] == alone


def test_a_row_that_is_ended_from_outside_gets_no_more_and_leaves():
    model = small_model()
    rows = [Row(prompt, 20, seed, Sampling()) for seed, prompt in enumerate(ragged(3))]
    engine = Engine(model, rows)
    engine.step()
    rows[1].ended = True
    for _ in range(5):
        engine.step()
    assert [len(row.ids) for row in rows] == [6, 1, 6] and rows[1] not in engine.rows


def test_noted_logprobs_are_those_of_a_whole_forward():
    model = small_model()
    row = Row([1, 2, 3], 10, 5, Sampling(temperature=0.5), top_logprobs=4)
    engine = Engine(model, [row])
    while engine.step():
        pass
    with torch.no_grad():
        ids = torch.tensor([row.prompt + row.ids])
        logits = model(ids)
    wanted = token_logprobs(logits, ids)[0, 2:]
    assert torch.allclose(torch.tensor([own for own, _ in row.logprobs]), wanted, atol=1e-5)
    top = logits[0, 2:-1].log_softmax(-1).topk(4)
    assert [[id for id, _ in best] for _, best in row.logprobs] == top.indices.tolist()


def test_a_choice_never_shows_a_part_of_a_stop_string():
    """Against the plain way: decode everything, cut at the first stop string."""
    tokenizer = Tokenizer.train([TEXT], 300)
    rng = random.Random(1)
    for trial in range(300):
        ids = tokenizer.encode("".join(rng.choice("abHello 猫🐈你好!") for _ in range(rng.randint(1, 30))))
        ids = ids[:rng.randint(1, len(ids))]
        whole = tokenizer.decode(ids)
        stops = [whole[a:a + rng.randint(1, 4)] or "x" for a in [rng.randrange(len(whole))]] + ["zz"]
        choice, said = Choice(tokenizer, stops), ""
        for n, id in enumerate(ids, 1):
            said += choice.push(id, None, n == len(ids), ())
            assert "\ufffd" not in said or "\ufffd" in whole
            if choice.reason:
                break
        cut = min(whole.find(s) for s in stops if s in whole)
        assert said == whole[:cut] and choice.reason == "stop"


# ---- the server

@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """A model, a reward model and samples to rate."""
    pytest.importorskip("fastapi"), pytest.importorskip("uvicorn"), pytest.importorskip("openai")
    out = tmp_path_factory.mktemp("serve")
    tokenizer = Tokenizer.train([TEXT], 320)
    torch.manual_seed(1)
    shape = ModelConfig(vocab_size=tokenizer.vocab_size, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2,
                        d_ff=48, max_seq_len=160, tie_embeddings=False)
    for name, model in (("one", LanguageModel(shape)), ("two", LanguageModel(shape)),
                        ("judge", ScalarModel(shape))):
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(8.0 if weight.ndim == 2 else 1.0)
        save(out / name, 1, {"stage": name, "config": vars(shape)}, model.state_dict(), {}, tokenizer)
    samples = [{"id": f"s{i}", "messages": [{"role": "user", "content": f"Say {i} <b>你好</b>"}],
                "replies": [{"id": f"r{k}", "text": f"reply {k} <script>alert({k})</script>"}
                            for k in (1, 2, 3)]}
               for i in range(3)]
    (out / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples), encoding="utf-8")
    return out


@contextmanager
def serving(out, **changes):
    """The address of a server that runs in a thread."""
    import uvicorn
    config = ServeConfig(models=f"{out / 'one'},{out / 'two'}", reward_model=str(out / "judge"), port=0,
                         samples=str(out / "samples.jsonl"), ratings=str(out / "ratings.jsonl"),
                         thumbs=str(out / "thumbs.jsonl"))
    for name, value in changes.items():
        setattr(config, name, value)
    listener = listen(config)
    server = uvicorn.Server(uvicorn.Config(make_app(config), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield "http://{}:{}".format(*listener.getsockname())
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(out):
    with serving(out) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    import openai
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)


def ask(text):
    return [{"role": "user", "content": text}]


def alone(out, name, text, **options):
    """What the model says without the server: (text, reason)."""
    from checkpoint import load_model
    model, tokenizer, _ = load_model(out / name)
    stops = (tokenizer.im_end_id, tokenizer.eot_id)
    ids = generate(model, [tokenizer.encode_chat(ask(text), add_generation_prompt=True)[0]],
                   stop_ids=stops, **options)[0]
    return tokenizer.decode([id for id in ids if id not in stops]), "stop" if ids[-1] in stops else "length"


def test_a_greedy_reply_is_the_model_s(out, client):
    for name in "one", "two":
        found = client.chat.completions.create(model=name, messages=ask("hello 猫"), temperature=0,
                                               max_tokens=30)
        choice = found.choices[0]
        assert (choice.message.content, choice.finish_reason) == alone(out, name, "hello 猫",
                                                                       max_new_tokens=30, temperature=0)
        assert found.model == name and choice.message.role == "assistant"
        assert found.usage.completion_tokens == 30 or choice.finish_reason == "stop"
        assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


def test_a_stream_is_the_whole_reply_in_whole_characters(client):
    options = dict(model="one", messages=ask("猫🐈"), seed=3, max_tokens=60, n=2)
    whole = client.chat.completions.create(**options)
    texts, reasons, usage = ["", ""], [None, None], None
    for chunk in client.chat.completions.create(**options, stream=True,
                                                stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.message.content for choice in whole.choices] and texts[0] != texts[1]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_a_seed_makes_the_reply_and_none_makes_it_new(client):
    def say(**options):
        return client.chat.completions.create(model="one", messages=ask("hello"), max_tokens=20,
                                              **options).choices[0]
    assert say(seed=5).message.content == say(seed=5).message.content != say(seed=6).message.content
    assert len({say().message.content for _ in range(3)}) == 3


def test_stop_strings_end_a_reply_and_are_not_in_it(client):
    options = dict(model="one", messages=ask("hello"), seed=1, max_tokens=40)
    whole = client.chat.completions.create(**options).choices[0].message.content
    stop = whole[10:12]
    found = client.chat.completions.create(**options, stop=[stop, "never there"]).choices[0]
    assert found.message.content == whole[:whole.index(stop)] and found.finish_reason == "stop"
    streamed = client.chat.completions.create(**options, stop=stop, stream=True)
    assert "".join(c.choices[0].delta.content or "" for c in streamed) == found.message.content


def test_logprobs_are_there_for_every_token(client):
    options = dict(model="one", messages=ask("hello"), temperature=0, max_tokens=12, logprobs=True,
                   top_logprobs=3)
    choice = client.chat.completions.create(**options).choices[0]
    entries = choice.logprobs.content
    assert b"".join(bytes(e.bytes) for e in entries).decode(errors="replace") == choice.message.content
    for entry in entries:
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob) and len(entry.top_logprobs) == 3
        assert entry.logprob < 0
    streamed = [e for chunk in client.chat.completions.create(**options, stream=True)
                for c in chunk.choices if c.logprobs for e in c.logprobs.content]
    assert [e.token for e in streamed] == [e.token for e in entries]


def test_completions_continue_texts(out, client):
    from checkpoint import load_model
    model, tokenizer, _ = load_model(out / "two")
    found = client.completions.create(model="two", prompt=["The cat", "你"], temperature=0, max_tokens=8,
                                      logprobs=2)
    for text, choice in zip(("The cat", "你"), found.choices):
        ids = generate(model, [[tokenizer.eot_id, *tokenizer.encode(text)]], 8, temperature=0,
                       stop_ids=(tokenizer.im_end_id, tokenizer.eot_id))[0]
        assert choice.text == tokenizer.decode([i for i in ids if i < tokenizer.eot_id])
        assert (len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs)
                == len(choice.logprobs.text_offset))
    streamed = client.completions.create(model="two", prompt="The cat", temperature=0, max_tokens=8,
                                         stream=True)
    assert "".join(c.text for chunk in streamed for c in chunk.choices) == found.choices[0].text


def test_models_and_health(client, address):
    import httpx
    assert [model.id for model in client.models.list()] == ["one", "two"]
    assert httpx.get(f"{address}/health").json()["status"] == "ok"


@pytest.mark.parametrize("n", [40, pytest.param(200, marks=pytest.mark.full)])
def test_many_at_once_are_each_as_alone(out, address, n):
    """Greedy: all equal to what they are alone; sampled with a seed: all but one in a hundred."""
    import openai
    texts = [f"{'cat dog hello'.split()[i % 3]} {i}" for i in range(n)]

    async def all_of_them(**options):
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0,
                                      timeout=300) as client:
            found = await asyncio.gather(*(client.chat.completions.create(
                model="one", messages=ask(text), max_tokens=16, **options) for text in texts))
        return [f.choices[0].message.content for f in found]

    greedy = asyncio.run(all_of_them(temperature=0))
    assert greedy == [alone(out, "one", text, max_new_tokens=16, temperature=0)[0] for text in texts]
    from batches import draws
    seed = draws(7, "samples", 0, 1).tolist()
    sampled = asyncio.run(all_of_them(seed=7))
    wanted = [alone(out, "one", text, max_new_tokens=16, seeds=seed)[0] for text in texts]
    assert sum(a == b for a, b in zip(sampled, wanted)) >= 0.99 * n


@pytest.mark.parametrize("change, status, words", [
    (dict(model="three"), 404, "model 'three' is not here"),
    (dict(model=["one"]), 404, "is not here"), (dict(messages=[]), 400, "messages must be"),
    (dict(messages=[{"role": "user", "content": [5]}]), 400, "only text"),
    (dict(messages=[7]), 400, "messages"),
    (dict(messages=[{"role": "user", "content": None}]), 400, "not text"),
    (dict(messages=[{"role": "user"}]), 400, "content"),
    (dict(messages="hi"), 400, "messages must be"),
    (dict(messages=[{"role": "assistant", "content": "hi"}]), 400, "not of user"),
    (dict(messages=[{"role": "robot", "content": "hi"}]), 400, 'role "robot"'),
    (dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "only text"),
    (dict(messages=[{"role": "user", "content": "cat " * 400}]), 400, "context is 160"),
    (dict(temperature=-1), 400, "temperature -1"), (dict(temperature=3), 400, "temperature 3"),
    (dict(temperature="hot"), 400, "temperature 'hot'"), (dict(temperature=1e-9), 400, "temperature"),
    (dict(top_p=0), 400, "top_p"), (dict(top_p=2), 400, "top_p 2"),
    (dict(n=0), 400, "n 0"), (dict(n=1.5), 400, "n 1.5"),
    (dict(n=17), 400, "n 17"), (dict(max_tokens=0), 400, "max_tokens 0"), (dict(seed="x"), 400, "seed 'x'"),
    (dict(stop=["a"] * 5), 400, "stop"), (dict(stop=[""]), 400, "stop"), (dict(stop=5), 400, "stop"),
    (dict(logprobs="yes"), 400, "logprobs 'yes'"),
    (dict(logprobs=True, top_logprobs=21), 400, "top_logprobs 21"),
    (dict(stream=1), 400, "stream 1"), (dict(tools=[{"type": "function"}]), 400, "tools is not supported"),
    (dict(presence_penalty=0.5), 400, "presence_penalty"),
    (dict(repetition_penalty=0), 400, "repetition_penalty"),
])
def test_bad_requests_are_refused_in_one_line(address, change, status, words):
    import httpx
    answer = httpx.post(f"{address}/v1/chat/completions",
                        json={"messages": ask("hi"), "max_tokens": 4, **change})
    error = answer.json()["error"]
    assert answer.status_code == status and words in error["message"] and "\n" not in error["message"]


def test_bad_bodies_and_paths_are_refused(address):
    import httpx
    url = f"{address}/v1/chat/completions"
    json_type = {"content-type": "application/json"}
    for content, headers, status in ((b"{", json_type, 400), (b"[]", json_type, 400),
                                     (b"\xff", json_type, 400), (b"{}", {"content-type": "text/plain"}, 415),
                                     (b"[" * 100_000, json_type, 400), (b" " * (1 << 21), json_type, 413)):
        answer = httpx.post(url, content=content, headers=headers)
        assert answer.status_code == status and answer.json()["error"]["message"]
    assert httpx.get(f"{address}/v1/nothing").status_code == 404
    assert httpx.get(f"{address}/../serve.py").status_code == 404
    assert httpx.get(url).status_code in (404, 405)


def test_errors_are_the_client_s_own(client):
    import openai
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="three", messages=ask("hi"))
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="one", messages=ask("hi"), temperature=5)


def test_words_typed_like_specials_are_words(client):
    assert client.chat.completions.create(model="one", messages=ask("<|im_end|>"), max_tokens=2).choices


def test_a_key_is_asked_for(out):
    import httpx
    with serving(out, api_key="secret") as address:
        for path in "/v1/models", "/rate/samples?annotator=ada":
            assert httpx.get(address + path).status_code == 401
            assert httpx.get(address + path, headers={"authorization": "Bearer wrong"}).status_code == 401
            assert httpx.get(address + path, headers={"authorization": "Bearer secret"}).status_code == 200
        assert httpx.get(address + "/").status_code == 200


def test_a_full_queue_says_so_and_a_client_that_goes_frees_its_rows(out):
    """Streams that are left alone end on the server; whoever comes meanwhile is answered or told to wait."""
    import httpx
    body = {"model": "one", "messages": ask("hello"), "stream": True, "max_tokens": 120, "n": 4, "seed": 2}
    with serving(out, max_rows=4, max_waiting=8) as address:
        with httpx.Client(timeout=60) as http:
            streams = [http.stream("POST", f"{address}/v1/chat/completions", json=body) for _ in range(3)]
            opened = [stream.__enter__() for stream in streams]
            statuses = [answer.status_code for answer in opened]
            full = http.post(f"{address}/v1/chat/completions", json={**body, "stream": False, "n": 16})
            assert statuses[:2] == [200, 200] and full.status_code == 429 and full.headers["retry-after"]
            for stream in streams:
                stream.__exit__(None, None, None)
        end = time.monotonic() + 20
        while httpx.get(f"{address}/health").json()["rows"] and time.monotonic() < end:
            time.sleep(0.1)
        assert httpx.get(f"{address}/health").json()["rows"] == 0


def test_a_model_that_fails_fails_its_requests_only(out, monkeypatch):
    import httpx
    with serving(out) as address:
        real = generate_module.next_logits
        monkeypatch.setattr(generate_module, "next_logits", lambda *a: 1 / 0)
        body = {"messages": ask("hi"), "max_tokens": 3}
        assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 500
        monkeypatch.setattr(generate_module, "next_logits", real)
        assert httpx.post(f"{address}/v1/chat/completions", json=body).status_code == 200


def test_a_score_is_the_reward_model_s(out, address):
    import httpx
    from batches import score_replies
    from checkpoint import load_model
    model, tokenizer, _ = load_model(out / "judge")
    found = httpx.post(f"{address}/score", json={"messages": ask("hi"), "reply": "hello"}).json()["score"]
    prompt = tokenizer.encode_chat(ask("hi"), add_generation_prompt=True)[0]
    assert found == pytest.approx(score_replies(model, [prompt], [tokenizer.encode("hello")],
                                                tokenizer.im_end_id).item())


# ---- what people think

def test_thumbs_land_once_and_train(out, tmp_path):
    import httpx
    with serving(out, thumbs=str(tmp_path / "thumbs.jsonl")) as address:
        for reply, thumb in ("good", 1), ("bad", -1):
            body = {"messages": ask("hi"), "reply": reply, "model": "one", "thumb": thumb,
                    "nonce": f"{reply}"}
            for _ in range(3):
                assert httpx.post(f"{address}/thumbs", json=body).status_code == 200
        for bad in ({"thumb": 2}, {"thumb": 1, "messages": ask("hi")},
                    {"messages": [], "reply": "x", "thumb": 1}):
            assert httpx.post(f"{address}/thumbs", json=bad).status_code == 400
    assert len((tmp_path / "thumbs.jsonl").read_text().splitlines()) == 2
    collect(CollectConfig(thumbs=str(tmp_path / "thumbs.jsonl"), out=str(tmp_path / "pairs.jsonl"),
                          form="pairs"))
    assert [r["chosen"] for _, r in read_records(str(tmp_path / "pairs.jsonl"))] == ["good"]


def test_two_raters_judge_everything_and_it_trains(out, tmp_path):
    import httpx
    ratings = tmp_path / "ratings.jsonl"

    def judge_all(address, name):
        with httpx.Client(base_url=address) as http:
            left = http.get("/rate/samples", params={"annotator": name}).json()["samples"]
            for sample in left:
                body = {"sample": sample["id"], "annotator": name, "kind": "ranking",
                        "nonce": name + sample["id"], "ranking": [[r["id"]] for r in sample["replies"]]}
                assert http.post("/rate/ratings", json=body).status_code == 200
                assert http.post("/rate/ratings", json=body).status_code == 200

    with serving(out, ratings=str(ratings)) as address:
        raters = [threading.Thread(target=judge_all, args=(address, name)) for name in ("ada", "bo")]
        for rater in raters:
            rater.start()
        for rater in raters:
            rater.join()
        left = httpx.get(f"{address}/rate/samples", params={"annotator": "ada"}).json()
        assert (left["done"], left["total"], left["samples"]) == (3, 3, [])
        for bad in ({"annotator": "ada"},
                    {"sample": "s9", "annotator": "a", "kind": "ranking", "ranking": []},
                    {"sample": "s0", "annotator": " ", "kind": "choice", "ranking": [["r1"], ["r2"]]}):
            assert httpx.post(f"{address}/rate/ratings", json=bad).status_code == 400
        for name in "", "simulated-1":
            assert httpx.get(f"{address}/rate/samples", params={"annotator": name}).status_code == 400
    lines = [json.loads(line) for line in ratings.read_text().splitlines()]
    assert sorted((r["annotator"], r["sample"]) for r in lines) == [
        (a, f"s{i}") for a in ("ada", "bo") for i in range(3)]
    collect(CollectConfig(samples=str(out / "samples.jsonl"), ratings=str(ratings),
                          out=str(tmp_path / "rankings.jsonl")))
    assert len(list(read_records(str(tmp_path / "rankings.jsonl")))) >= 3


@pytest.mark.parametrize("changes, words", [
    (dict(models=""), "--models is empty"), (dict(models="nowhere"), "nowhere"),
    (dict(port=99999), "port 99999"), (dict(host="256.0.0.1"), "cannot listen on 256.0.0.1"),
])
def test_a_server_that_cannot_start_says_why(out, changes, words):
    with pytest.raises(UserError, match=words):
        with serving(out, **changes):
            pass


def test_a_port_that_is_taken_is_named(out):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}"):
            listen(ServeConfig(models="x", port=port))


def test_models_with_one_name_and_wrong_kinds_are_refused(out):
    for models, reward_model, words in ((f"{out / 'one'},{out / 'one'}", "", "two models"),
                                        (str(out / "judge"), "", "gives scores"),
                                        (f"a={out / 'one'}", str(out / "two"), "gives text")):
        with pytest.raises(UserError, match=words):
            make_app(ServeConfig(models=models, reward_model=reward_model))
