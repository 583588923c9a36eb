"""Evaluation: replies, choices by log-probability by loops, numbers of known replies, bad files."""

import json
import math
from itertools import combinations

import numpy as np
import pytest
import torch

import checkpoint
import evaluate
from cli import UserError
from data.instructions import InstructionsConfig, write_files
from evaluate import (EvaluateConfig, against, answer, best_of_n, compare, divergence, likeliest,
                      read_examples, read_requests, runs_table, summary)
from model import LanguageModel, ModelConfig, ScalarModel
from tokenizer import Tokenizer


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A directory with files of instructions and an untrained model in `model`."""
    directory = tmp_path_factory.mktemp("evaluate")
    write_files(InstructionsConfig(str(directory), examples=240, prompts=20))
    tokenizer = Tokenizer.train((directory / "sft_train.jsonl").read_text(encoding="utf-8").splitlines(), 400)
    torch.manual_seed(0)
    model = LanguageModel(ModelConfig(400, d_model=32, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=32,
                                      max_seq_len=300))
    checkpoint.save(directory / "model", 7, {"stage": "sft", "config": vars(model.config), "tokens": 5},
                    model.state_dict(), {}, tokenizer)
    (directory / "model/log.jsonl").write_text('{"step": 1, "time": 1, "loss": 2}\n'
                                               '{"step": 1, "time": 1, "val_loss": 3.5}\n')
    return directory


def test_perfect_replies_get_full_marks_and_others_do_not(ready):
    examples = read_examples(str(ready / "eval_val.jsonl"))
    requests = read_requests(str(ready / "requests.jsonl"), examples)
    for reply, low, high in ((lambda e: e["references"][0], 1, 1), (lambda e: "", 0, 0),
                             (lambda e: "zzz", 0, 0)):
        told = [{**e, "reply": reply(e), "ended": True, "chosen": (e["labels"] or [None])[0],
                 "marks": evaluate.rate(requests[e["id"]], reply(e))} for e in examples]
        rows = summary(told, requests)
        assert len(rows) == 24 and sum(row["n"] for row in rows) == len(examples)
        for row in rows:
            for key in "exact", "token_f1", "rougeL", "accuracy", "elements":
                assert low <= row.get(key, low) <= high, (key, row)
            assert (row["gold"] == 5) == (low == 1) and (row["task"] != "mood" or "macro_f1" in row)


def test_the_likeliest_label_by_loops(ready):
    model, tokenizer, _ = checkpoint.load_model(ready / "model")
    messages, labels = [{"role": "user", "content": "How is Pip?"}], ["happy", "very sad", "a", "高兴"]
    scores = []
    for label in labels:
        ids, learn = tokenizer.encode_chat([*messages, {"role": "assistant", "content": label}])
        logp = model(torch.tensor([ids]))[0].log_softmax(-1)
        scores.append(sum(logp[i - 1, ids[i]].item() for i in range(len(ids)) if learn[i]))
    assert likeliest(model, tokenizer, messages, labels) == labels[scores.index(max(scores))]
    order = sorted(labels, key=lambda label: -scores[labels.index(label)])
    assert likeliest(model, tokenizer, messages, order[1:]) == order[1]


def test_a_reply_does_not_depend_on_its_neighbours_and_ends_are_seen(ready, monkeypatch):
    model, tokenizer, _ = checkpoint.load_model(ready / "model")
    asked = [[{"role": "user", "content": "x " * n}] for n in (9, 1, 4)]
    texts, ended = answer(model, tokenizer, asked, 5)
    assert texts == [answer(model, tokenizer, [a], 5)[0][0] for a in asked]
    ends = {0: [tokenizer.im_end_id], 1: [tokenizer.eot_id], 2: [65, 66]}
    monkeypatch.setattr(evaluate, "generate",
                        lambda model, prompts, *a, **k: [ends[i] for i in range(len(prompts))])
    texts, ended = answer(model, tokenizer, asked, 5)
    assert sorted(ended) == [False, False, True] and sorted(map(bool, texts)) == [False, False, True]


def test_main_prints_and_writes_everything(ready, tmp_path, capsys):
    evaluate.main(EvaluateConfig(models=str(ready / "model"), tasks=str(ready / "eval_val.jsonl"), limit=1,
                                 show=1, requests=str(ready / "requests.jsonl"), max_new_tokens=4,
                                 out=str(tmp_path / "e.json"), device="cpu"))
    (found,) = json.loads((tmp_path / "e.json").read_text(encoding="utf-8")).values()
    assert (len(found["tasks"]) == len(found["replies"]) == 24
            and "accuracy_by_logprob" in capsys.readouterr().out)


def test_runs_side_by_side(ready):
    (row,) = runs_table(str(ready / "m*"))
    assert (row["stage"], row["step"], row["tokens"], row["d_model"],
            row["val_loss"]) == ("sft", 7, 5, 32, 3.5)
    with pytest.raises(UserError, match="no run"):
        runs_table(str(ready / "nothing*"))


GOOD = {"id": "1", "task": "t", "language": "en", "messages": [{"role": "user", "content": "x"}],
        "references": ["y"]}


@pytest.mark.parametrize("line, words", [
    ("", "no examples"), ("{", "not a JSON record"), ("[]", "no 'id'"),
    (json.dumps({"id": "1"}), "no 'task'"), (json.dumps(GOOD | {"references": []}), "references"),
    (json.dumps(GOOD | {"references": "y"}), "references"),
    (json.dumps(GOOD | {"messages": []}), "no turn of a user"),
    (json.dumps(GOOD | {"messages": [{"role": "assistant", "content": "x"}]}), "turn 1 is of assistant"),
])
def test_bad_examples_are_named(line, words, tmp_path):
    (tmp_path / "e.jsonl").write_text(line + "\n")
    with pytest.raises(UserError) as error:
        read_examples(str(tmp_path / "e.jsonl"))
    assert words in str(error.value) and "e.jsonl" in str(error.value)


@pytest.mark.parametrize("changes, words", [
    (dict(), "--models"), (dict(models="x"), "--tasks"), (dict(models="nowhere", text_dir="x"), "nowhere")])
def test_bad_flags(changes, words):
    with pytest.raises(UserError, match=words):
        evaluate.main(EvaluateConfig(**changes))


def test_a_missing_request_is_named(ready, tmp_path):
    (tmp_path / "r.jsonl").write_text("")
    with pytest.raises(UserError, match="no request for example"):
        read_requests(str(tmp_path / "r.jsonl"), [GOOD])


# ---- policies against a reference

def test_best_of_n_is_the_mean_over_all_choices():
    scores, values = np.random.default_rng(0).normal(size=(2, 3, 6))
    for n in (1, 2, 4, 6):
        wanted = np.mean([[values[p][max(chosen, key=lambda i: scores[p][i])]
                           for chosen in combinations(range(6), n)] for p in range(3)])
        assert best_of_n(scores, values, n) == pytest.approx(wanted)


def test_gold_at_equal_length_is_the_regressions():
    """A policy that is 3 tokens longer and 0.5 better, where a token is worth 0.1: 0.2 is its own."""
    lengths = np.arange(10, 50) % 17
    base = {"gold": (1 + 0.1 * lengths).tolist(), "score": [0.0] * 40, "kl": [0.0] * 40, "ended": [True] * 40,
            "length": lengths.tolist()}
    found = base | {"gold": (1 + 0.1 * (lengths + 3) + 0.2).tolist(), "length": (lengths + 3).tolist(),
                    "kl": [2.0] * 40}
    row, unit = against(found, base), np.std(base["gold"])
    assert (row["gold_same_length"] * unit == pytest.approx(0.2)
            and row["gold_units"] * unit == pytest.approx(0.5))
    assert row["win_rate"] == 1.0 and row["kl"] == 2.0 and against(base, base)["win_rate"] == 0.5


def test_divergence_is_the_kl_of_enumeration(ready):
    """Of one-token replies, all listed, weighed by the model's own probabilities."""
    model, _, _ = checkpoint.load_model(ready / "model")
    torch.manual_seed(3)
    other = LanguageModel(model.config)
    replies = [[i] for i in range(400)]
    logp, ref = (m(torch.tensor([[1, 2, 3]]))[0, -1].log_softmax(-1).double() for m in (model, other))
    k1 = torch.tensor(divergence(model, other, [[1, 2, 3]] * 400, replies), dtype=torch.float64)
    assert (logp.exp() * k1).sum().item() == pytest.approx((logp.exp() * (logp - ref)).sum().item(), abs=1e-5)
    assert divergence(model, model, [[1]], [[2]]) == [0.0]


def test_a_model_against_itself_and_another(ready, tmp_path, capsys):
    model, tokenizer, record = checkpoint.load_model(ready / "model")
    torch.manual_seed(1)
    for name, kind in (("other", LanguageModel), ("reward", ScalarModel)):
        checkpoint.save(tmp_path / name, 1, {"stage": name, "config": record["config"], "tokens": 0},
                        kind(model.config).state_dict(), {}, tokenizer)
    config = EvaluateConfig(models=f"{ready / 'model'},{tmp_path}/oth*",
                            prompts=str(ready / "prompts_val.jsonl"), requests=str(ready / "requests.jsonl"),
                            reward_model=str(tmp_path / "reward"), limit=6, best_of=4, max_new_tokens=5,
                            show=1, out=str(tmp_path / "o.json"), device="cpu")
    evaluate.main(config)
    found = json.loads((tmp_path / "o.json").read_text())
    one, two = found["policies"]
    assert one["kl"] == 0 and one["win_rate"] == 0.5 and one["n"] == 6 and two["model"].endswith("other")
    assert [row["best_of"] for row in found["best_of"]] == [1, 2, 4]
    scores = [row["score"] for row in found["best_of"]]
    assert scores == sorted(scores) and found["best_of"][2]["kl"] == pytest.approx(math.log(4) - 3 / 4)
    assert "other: " in capsys.readouterr().out
    mine = tmp_path / "mine.py"
    mine.write_text("def shorter(prompts, replies): "
                    "return [-len(r) for p, r in zip(prompts, replies, strict=True)]\n"
                    "def short(prompts, replies): return [1.0]\n")
    compare(EvaluateConfig(**vars(config) | dict(requests="", judge=f"{mine}:shorter")))
    two = json.loads((tmp_path / "o.json").read_text())["policies"][1]
    assert two["gold"] < 0 and "to_ceiling" not in two and "to_ceiling" in found["policies"][1]
    for changes, wrong in ((dict(requests=""), "and --requests .story world. or --judge"),
                           (dict(reward_model=""), "needs --reward"),
                           (dict(judge=f"{mine}:shorter"), "or --judge"),
                           (dict(requests="", judge=f"{mine}:short"),
                            "one finite number a reply; it gave 1 for 6"),
                           (dict(reward_model=str(ready / "model")), "is no reward model"),
                           (dict(models=f"{tmp_path}/none*"), "nothing is there"),
                           (dict(models=str(tmp_path / "reward")), "gives scores, not text")):
        with pytest.raises(UserError, match=wrong):
            compare(EvaluateConfig(**vars(config) | changes))
