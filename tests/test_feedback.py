"""Feedback: sampling, judging by hand and by program, what a kill leaves, what becomes training data."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import combinations
from pathlib import Path

import pytest
import torch

import checkpoint
import feedback
from cli import UserError
from data.gold import ASPECTS
from data.instructions import InstructionsConfig, write_files
from feedback import (CollectConfig, RateConfig, SampleConfig, SimulateConfig, agreement, append,
                      check_rating, collect, judgement, rate, read_ratings, read_samples, sample, simulate)
from generate import reply_logprobs
from model import LanguageModel, ModelConfig
from records import to_comparison
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]


def write(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(path)


def read(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Prompts and requests of the story world, an untrained model, samples made of demonstrations."""
    out = tmp_path_factory.mktemp("feedback")
    write_files(InstructionsConfig(str(out), examples=60, prompts=60))
    texts = (out / "sft_train.jsonl").read_text(encoding="utf-8").splitlines()
    tokenizer = Tokenizer.train(texts, 400)
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(400, d_model=32, n_layers=1, n_heads=2, d_ff=64, max_seq_len=256))
    record = {"stage": "sft", "config": vars(model.config), "tokens": 0}
    checkpoint.save(out / "model", 0, record, model.state_dict(), {}, tokenizer)
    replies = [e["references"][0] for e in read(out / "eval_train.jsonl")]
    write(out / "samples.jsonl", [
        {"id": p["id"], "messages": p["messages"], "replies": [
            {"id": f"r{k + 1}", "text": replies[(3 * i + k) % len(replies)]} for k in range(3)]}
        for i, p in enumerate(read(out / "prompts_train.jsonl")[:40])])
    return out


# ---- sample

def test_samples_are_the_models_own(world, tmp_path, capsys):
    config = SampleConfig(models=str(world / "model"), prompts=str(world / "prompts_train.jsonl"), limit=3,
                          replies=4,
                          out=str(tmp_path / "s.jsonl"), max_new_tokens=6, temperature="0.8,1.5",
                          device="cpu")
    sample(config)
    model, tokenizer, _ = checkpoint.load_model(world / "model")
    found = list(read_samples(config.out).values())
    assert "3 prompts, 12 replies" in capsys.readouterr().out and len(found) == 3
    for one in found:
        assert len({r["text"] for r in one["replies"]}) == len(one["replies"]) >= 2
        assert {r["temperature"] for r in one["replies"]} == {0.8, 1.5}
        prompt = tokenizer.encode_chat(one["messages"], add_generation_prompt=True)[0]
        for reply in one["replies"]:
            ids, total = prompt + reply["ids"], 0.0
            for t in range(len(prompt), len(ids)):
                logits = model(torch.tensor([ids[:t]]))[0, -1] / reply["temperature"]
                total += logits.log_softmax(-1)[ids[t]].item()
            assert reply["logprob"] == pytest.approx(total, abs=1e-3)
    again = tmp_path / "again.jsonl"
    sample(SampleConfig(**vars(config) | {"out": str(again)}))
    assert again.read_bytes() == Path(config.out).read_bytes()


def test_equal_replies_are_dropped_and_models_answer_side_by_side(world, tmp_path):
    config = SampleConfig(models=f"{world / 'model'},{world / 'model'}",
                          prompts=str(world / "prompts_train.jsonl"),
                          limit=2, replies=3, out=str(tmp_path / "s.jsonl"), max_new_tokens=4,
                          temperature="0",
                          device="cpu")
    sample(config)
    assert [len(one["replies"]) for one in read(config.out)] == [1, 1]          # greedy: all equal


# ---- rate

def answers(*typed):
    typed = iter(typed)
    return lambda prompt: next(typed, "q")


def test_ranking_in_the_terminal_is_kept_at_once(world, tmp_path, capsys):
    config = RateConfig(str(world / "samples.jsonl"), str(tmp_path / "r.jsonl"), "ada")
    assert rate(config, answers("1>3>2", "2 > 1=3", "nonsense", "1>1>2", "1>2", "4>1>2", "s", "3>2>1")) == 3
    kept = read(config.out)
    order = feedback.show(read(world / "samples.jsonl")[0], config)
    assert kept[0]["ranking"] == [[order[i]["id"]] for i in (0, 2, 1)]
    assert len(kept[1]["ranking"]) == 2 and kept[1]["kind"] == "ranking" and kept[1]["annotator"] == "ada"
    out = capsys.readouterr().out
    for complaint in ("is not a ranking", "in the ranking 2 times", "skips reply", "there is no reply 4"):
        assert complaint in out
    assert rate(config, answers("1>2>3")) == 1                          # resumed with what was skipped
    assert len({r["sample"] for r in read(config.out)}) == 4


def test_undo_asks_again_and_the_later_judgement_counts(world, tmp_path):
    config = RateConfig(str(world / "samples.jsonl"), str(tmp_path / "r.jsonl"), "ada", "choice")
    rate(config, answers("1", "u", "2", "="))
    samples = read_samples(config.samples)
    first, second = read_ratings(config.out, samples)
    assert len(read(config.out)) == 3 and first["ranking"] == read(config.out)[1]["ranking"]
    assert len(second["ranking"]) == 1                                          # a tie


def test_the_rubric_takes_four_marks_a_reply():
    assert judgement("5443 1111", ["r2", "r1"], "rubric") == {"scores": {
        "r2": dict(zip(ASPECTS, (5, 4, 4, 3))), "r1": dict(zip(ASPECTS, (1, 1, 1, 1)))}}
    with pytest.raises(UserError, match="is not 2 times four marks"):
        judgement("5443 111", ["r2", "r1"], "rubric")


def test_raters_see_the_replies_in_orders_of_their_own(world):
    found = read(world / "samples.jsonl")[:12]
    orders = [[tuple(r["id"] for r in feedback.show(one, RateConfig(annotator=name))) for one in found]
              for name in ("ada", "bo", "ada")]
    assert orders[0] == orders[2] != orders[1] and len(set(orders[0])) > 2


def test_two_raters_at_once_lose_nothing(world, tmp_path):
    program = ("import sys; from feedback import append\n"
               "for i in range(100): append(sys.argv[1], {'rater': sys.argv[2], 'i': i, 'text': 'x' * 500})")
    raters = [subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "r.jsonl"), name], cwd=ROOT)
              for name in "ab"]
    assert [p.wait() for p in raters] == [0, 0]
    kept = read(tmp_path / "r.jsonl")
    assert [[r["i"] for r in kept if r["rater"] == name] for name in "ab"] == [list(range(100))] * 2


def test_a_line_that_a_kill_cut_off_is_passed_over(world, tmp_path, capsys):
    samples, path = read_samples(world / "samples.jsonl"), tmp_path / "r.jsonl"
    config = RateConfig(str(world / "samples.jsonl"), str(path), "ada", "choice")
    rate(config, answers("1", "2"))
    path.write_bytes(path.read_bytes()[:-20])
    assert len(read_ratings(path, samples)) == 1 and "r.jsonl:2: left out" in capsys.readouterr().err
    rate(config, answers("="))                                                  # asks for the lost one again
    assert len(read_ratings(path, samples)) == 2


def test_simulation_outlives_kills(world, tmp_path):
    """Killed, it goes on; the file is that of an unbroken run."""
    samples = write(tmp_path / "s.jsonl", read(world / "samples.jsonl")[:12])
    command = [sys.executable, "feedback.py", "simulate", "--samples", samples, "--requests",
               str(world / "requests.jsonl"), "--annotators", "2", "--temperature", "0.5", "--out"]
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    subprocess.run([*command, str(whole)], cwd=ROOT, check=True, capture_output=True)
    for n in (8,):
        process = subprocess.Popen([*command, str(broken)], cwd=ROOT, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.DEVNULL)
        while process.poll() is None and (not broken.exists() or broken.read_bytes().count(b"\n") < n):
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL) if process.poll() is None else None
        process.wait()
    subprocess.run([*command, str(broken)], cwd=ROOT, check=True, capture_output=True)
    assert [{k: v for k, v in r.items() if k != "time"} for r in read(broken)] == [
        {k: v for k, v in r.items() if k != "time"} for r in read(whole)]


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.full)])
def test_judging_in_the_terminal_outlives_kills(world, tmp_path, kills):
    """Killed while it asks and writes: what it confirmed is kept, in the end each sample is judged once."""
    samples = write(tmp_path / "s.jsonl",
                    [dict(read(world / "samples.jsonl")[0], id=f"s{i}") for i in range(400)])
    path, command = tmp_path / "r.jsonl", [sys.executable, "feedback.py", "rate", "--samples", samples,
                                           "--annotator", "ada", "--kind", "choice",
                                           "--out", str(tmp_path / "r.jsonl")]
    rng, confirmed = random.Random(0), 0
    for attempt in range(kills + 1):
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                   text=True)
        with suppress(BrokenPipeError):
            process.stdin.write("1\n" * 400)
            process.stdin.flush()
            if attempt < kills:
                enough = (path.stat().st_size if path.exists() else 0) + rng.randrange(200, 4000)
                while process.poll() is None and (not path.exists() or path.stat().st_size < enough):
                    pass
                process.kill()
            process.stdin.close()
        process.wait()
        kept = read_ratings(path, read_samples(samples))
        assert len(kept) >= confirmed
        confirmed = len(kept)
        assert attempt == kills or confirmed < 400, "it was through before the kill"
    assert confirmed == 400 and path.read_bytes().count(b"\n") <= 400 + kills
    assert len({r["sample"] for r in kept}) == 400


# ---- simulate

MARKS = {f"r{i}": dict.fromkeys(ASPECTS, mark) for i, mark in enumerate((5, 4, 4, 2))}
GOLD = {"r0": 5.0, "r1": 4.0, "r2": 4.0, "r3": 2.0}


def test_noise_is_bradley_terrys():
    """How often each pair comes out as gold says, over 4,000 opinions."""
    config, wins = SimulateConfig(temperature=0.8), dict.fromkeys(combinations(GOLD, 2), 0)
    for i in range(4000):
        place = {id: k for k, tie in enumerate(feedback.opinion(MARKS, GOLD, 1, str(i), config)["ranking"])
                 for id in tie}
        for a, b in wins:
            wins[a, b] += place[a] < place[b]
    for (a, b), n in wins.items():
        p = 1 / (1 + math.exp(-(GOLD[a] - GOLD[b]) / 0.8))
        assert abs(n / 4000 - p) < 4 * math.sqrt(p * (1 - p) / 4000), (a, b)


def test_without_noise_equal_replies_tie():
    assert feedback.opinion(MARKS, GOLD, 1, "x", SimulateConfig())["ranking"] == [["r0"], ["r1", "r2"],
                                                                                  ["r3"]]
    rubric = feedback.opinion(MARKS, GOLD, 1, "x", SimulateConfig(kind="rubric"))["scores"]
    assert rubric == MARKS


def test_annotators_have_habits_of_their_own():
    config = SimulateConfig(kind="rubric", bias=0.8, scale=0.3)
    means = [sum(sum(m.values()) for m in feedback.opinion(MARKS, GOLD, n, "x", config)["scores"].values())
             for n in range(1, 12)]
    assert len(set(means)) > 4 and all(m == feedback.opinion(MARKS, GOLD, 3, "y", config)["scores"]["r0"]
                                       for m in [feedback.opinion(MARKS, GOLD, 3, "z",
                                                                  config)["scores"]["r0"]])


def test_the_bayes_accuracy_is_that_of_gold(world, tmp_path, capsys):
    out = tmp_path / "r.jsonl"
    config = SimulateConfig(str(world / "samples.jsonl"), str(world / "requests.jsonl"), str(out),
                            annotators=12,
                            temperature=0.7)
    simulate(config)
    said = float(capsys.readouterr().out.split("wins ")[1].split()[0])
    requests = {r["id"]: r["request"] for r in read(world / "requests.jsonl")}
    samples, right, n = read_samples(config.samples), 0, 0
    for rating in read(out):
        assert rating["annotator"].startswith("simulated-")
        texts = {r["id"]: r["text"] for r in samples[rating["sample"]]["replies"]}
        gold = {id: sum(feedback.gold_marks(requests[rating["sample"]], text).values()) for id, text
                in texts.items()}
        place = {id: k for k, tie in enumerate(rating["ranking"]) for id in tie}
        for a, b in combinations(gold, 2):
            if gold[a] != gold[b]:
                right, n = right + ((gold[a] > gold[b]) == (place[a] < place[b])), n + 1
    assert n > 250 and abs(right / n - said) < 4 * math.sqrt(said * (1 - said) / n) + 0.01


# ---- collect

SAMPLES = [{"id": "s1", "messages": [{"role": "user", "content": "Why?"}],
            "replies": [{"id": f"r{i}", "text": f"answer {i}"} for i in (1, 2, 3)]}]


def rating(ranking=None, annotator="ada", **changes):
    kind = {"kind": "ranking", "ranking": ranking} if ranking else {"kind": "rubric"}
    return {"sample": "s1", "annotator": annotator, "time": 1.0, **kind} | changes


def marks(*values):
    return {f"r{i}": dict.fromkeys(ASPECTS, v) for i, v in enumerate(values, 1)}


@pytest.mark.parametrize("form, wanted", [
    ("rankings", [{"messages": SAMPLES[0]["messages"], "outputs": [
        {"response": "answer 1", "rank": 1}, {"response": "answer 3", "rank": 2},
                                                                   {"response": "answer 2", "rank": 2}]}]),
    ("pairs", [{"messages": SAMPLES[0]["messages"], "chosen": "answer 1", "rejected": f"answer {i}"} for i
               in (3, 2)]),
    ("triples", [{"question": "Why?", "accepted": "answer 1", "rejected": f"answer {i}"} for i in (3, 2)])])
def test_rankings_become_each_form(tmp_path, form, wanted):
    config = CollectConfig(write(tmp_path / "s.jsonl", SAMPLES),
                           write(tmp_path / "r.jsonl", [rating([["r1"], ["r3", "r2"]])]),
                           out=str(tmp_path / "o.jsonl"),
                           form=form)
    collect(config)
    assert read(config.out) == wanted
    for record in read(config.out):
        to_comparison(record)                                           # reward.py reads what is written


def test_rubrics_become_scores_and_comparisons(tmp_path):
    config = CollectConfig(write(tmp_path / "s.jsonl", SAMPLES),
                           write(tmp_path / "r.jsonl", [rating(scores=marks(5, 2, 2))]),
                           out=str(tmp_path / "o.jsonl"))
    for form, n in (("scores", 1), ("pairs", 2), ("rankings", 1)):
        collect(CollectConfig(**vars(config) | {"form": form}))
        assert len(read(config.out)) == n
    collect(CollectConfig(**vars(config) | {"form": "scores"}))
    assert [o["score"] for o in read(config.out)[0]["outputs"]] == [5, 2, 2]


def test_thumbs_from_the_logs_make_pairs_and_scores(tmp_path):
    ask = SAMPLES[0]["messages"]
    other = [{"role": "user", "content": "How?"}]
    thumbs = write(tmp_path / "t.jsonl", [
        {"messages": m, "reply": reply, "model": "sft", "thumb": thumb, "time": 1}
        for m, reply, thumb in ((ask, "good", 1), (ask, "bad", -1), (other, "alone", 1), (ask, "late", -1),
                                (ask, "late", 1))])
    for form, wanted in (("pairs", [("good", "bad"), ("late", "bad")]), ("scores", [5, 1, 5, 5])):
        collect(CollectConfig(thumbs=thumbs, out=str(tmp_path / "o.jsonl"), form=form))
        found = read(tmp_path / "o.jsonl")
        assert ([(r["chosen"], r["rejected"]) for r in found] if form == "pairs"
                else [o["score"] for r in found for o in r["outputs"]]) == wanted


def test_agreement_is_counted_and_the_odd_rater_named():
    same = [["r1"], ["r2"], ["r3"]]
    ratings = [rating(same, name, sample=f"s{i}") for i in range(10) for name in ("ada", "bo", "cy")]
    ratings += [rating(same[::-1], "odd", sample=f"s{i}") for i in range(10)]
    text = "\n".join(agreement(ratings))
    assert "120 comparisons, 0.0% of them ties" in text and "agree on 50.0%" in text and "alpha" in text
    assert "odd is at odds with the rest: agrees on 0.0%" in text and "ada is at odds" not in text


# ---- bad input

@pytest.mark.parametrize("record, wrong", [
    ({"annotator": "a", "kind": "ranking"}, "no 'sample'"), (rating([["r1"], ["r2"], ["r3"]], sample="s9"),
                                                             "'s9' is not among"),
    (rating(kind="vote"), 'kind "vote" is unknown'), (rating(), "has no 'scores'"),
    (rating([["r1"], ["r2"]]), "skips reply 'r3'"), (rating([["r1"], ["r9"], ["r2"]]),
                                                     'reply "r9" is unknown'),
    (rating([["r1"], ["r1"], ["r2"]]), "in the ranking 2 times"), (rating([["r1"]], kind="choice"),
                                                                   "names 1 reply"),
    (rating("r1", kind="ranking"), "is not a list of lists"), (rating([["r1"], []]),
                                                               "is not a list of lists"),
    (rating(scores={}), "is not an object of marks"), (rating(scores=marks(5, 6, 1)),
                                                       "accuracy 6 of r2 is no mark"),
    (rating(scores=marks(5, 0, 1)), "accuracy 0 of r2 is no mark"), (rating(scores=marks(5, "4", 1)),
                                                                     'accuracy "4" of r2'),
    (rating(scores={"r9": marks(1)["r1"]}), "'r9' is unknown"), (rating(scores={"r1": {"accuracy": 1}}),
                                                                 "marks of r1 are"),
])
def test_a_bad_rating_is_named_with_its_line(tmp_path, record, wrong):
    samples = {s["id"]: s for s in SAMPLES}
    with pytest.raises(UserError, match=wrong):
        check_rating(record, samples)
    path = write(tmp_path / "r.jsonl", [rating([["r1"], ["r2"], ["r3"]]), record])
    with pytest.raises(UserError, match=rf"r.jsonl:2: .*{wrong}") as error:
        read_ratings(path, samples)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("command, changes, wrong", [
    (sample, dict(prompts=""), "holds no prompts"), (sample, dict(replies=0), "replies 0 must be at least 1"),
    (sample, dict(temperature="warm"), "temperature 'warm' is not a list"), (sample, dict(temperature="1,-1"),
                                                                             "'1,-1' is not a list"),
    (sample, dict(models="nowhere"), "no usable checkpoint"), (sample, dict(max_new_tokens=250),
                                                               "leaves no room for 250"),
    (rate, dict(annotator=""), "--annotator is missing"), (rate, dict(annotator="simulated-1"),
                                                           "for programs"),
    (rate, dict(kind="stars"), "kind 'stars' is unknown"), (rate, dict(samples="none.jsonl"), "no such file"),
    (simulate, dict(annotators=0), "annotators must be at least 1"), (simulate, dict(kind="x"),
                                                                      "kind 'x' is unknown"),
    (simulate, dict(requests="none.jsonl"), "no such file"), (collect, dict(form="x"), "form 'x' is unknown"),
    (collect, dict(ratings=""), "give --samples and --ratings"),
])
def test_bad_flags_are_one_line(world, tmp_path, command, changes, wrong):
    samples, requests = str(world / "samples.jsonl"), str(world / "requests.jsonl")
    ratings = write(tmp_path / "r.jsonl", [])
    config = {sample: SampleConfig(str(world / "model"), str(world / "prompts_train.jsonl"),
                                   str(tmp_path / "s"),
                                   limit=2, device="cpu"),
              rate: RateConfig(samples, ratings, "ada"), simulate: SimulateConfig(samples, requests, ratings),
              collect: CollectConfig(samples, ratings, out=str(tmp_path / "o"))}[command]
    with pytest.raises(UserError, match=wrong) as error:
        command(type(config)(**vars(config) | changes))
    assert "\n" not in str(error.value) and not (tmp_path / "s").exists() and not (tmp_path / "o").exists()


def test_bad_samples_are_named(tmp_path):
    for records, wrong in (([{"id": "1"}], "s.jsonl:1: not a sample"), (SAMPLES * 2,
                                                                        "s.jsonl:2: sample 's1' is there "
                                                                        "twice")):
        with pytest.raises(UserError, match=wrong):
            read_samples(write(tmp_path / "s.jsonl", records))


def test_the_command_comes_first():
    with pytest.raises(UserError, match="command 'smaple' is unknown; use sample, rate, simulate, collect"):
        feedback.parse(["smaple"])


def test_reply_logprobs_of_ragged_rows(world):
    model, _, _ = checkpoint.load_model(world / "model")
    prompts, replies = [[1, 2, 3], [4]], [[5], [6, 7, 8]]
    both = reply_logprobs(model, prompts, replies, 1.0)
    alone = [reply_logprobs(model, [p], [r], 1.0)[0] for p, r in zip(prompts, replies)]
    assert both == pytest.approx(alone, abs=1e-5)


def test_appending_after_a_torn_line_starts_a_new_one(tmp_path):
    (tmp_path / "r.jsonl").write_bytes(b'{"a": 1}\n{"b"')
    append(tmp_path / "r.jsonl", {"c": 3})
    assert (tmp_path / "r.jsonl").read_bytes() == b'{"a": 1}\n{"b"\n{"c": 3}\n'
