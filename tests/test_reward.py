"""The reward model: its losses by hand, what it learns from, what it says of itself, formats, bad input."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import checkpoint
import reward
from batches import joined, packed_replies, score_texts
from cli import UserError
from feedback import CollectConfig, collect
from metrics import calibration_error, interval, krippendorff_alpha, nominal, pearson
from model import IGNORE_INDEX, LanguageModel, ModelConfig, ScalarModel
from ranks import on_ranks
from ratings import ASPECTS, append
from records import to_comparison
from reward import (PRESETS, RewardConfig, baselines, interval95, judge, pairwise_accuracy, preference_loss,
                    score_loss, train)
from training import Ranks


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- losses

RANKS = torch.tensor([[0, 1, 2, 3], [1, 0, 1, -1], [0, 0, -1, -1], [2, 0, -1, 1]])


def by_loop(scores, ranks):
    """Ouyang et al. 2022, eq. 1, pair by pair."""
    total, count = 0, 0
    for row, places in zip(scores, ranks.tolist()):
        pairs = [(i, j) for i in range(len(places)) for j in range(len(places)) if 0 <= places[i] < places[j]]
        if pairs:
            total, count = total + sum(-torch.log(1 / (1 + torch.exp(row[j] - row[i]))) for i, j
                                       in pairs) / len(pairs), count + 1
    return total, count


def test_preference_loss_is_the_loop_over_pairs():
    scores = rand(4, 4).requires_grad_()
    (got, count), (wanted, n) = preference_loss(scores, RANKS), by_loop(scores, RANKS)
    assert got.item() == pytest.approx(wanted.item(), abs=1e-12) and count == n == 3
    torch.testing.assert_close(*(torch.autograd.grad(x, scores, retain_graph=True)[0] for x in (got, wanted)))
    assert torch.isfinite(preference_loss(1e4 * scores, RANKS)[0])              # where log(1 + exp) is inf


def test_a_constant_added_to_a_prompts_scores_changes_nothing():
    scores = rand(4, 4)
    shifted = preference_loss(scores + rand(4, 1, seed=3), RANKS)[0]
    assert shifted.item() == pytest.approx(preference_loss(scores, RANKS)[0].item(), abs=1e-12)


def test_linear_scores_give_the_logistic_regression():
    """Check 4: Bradley-Terry on linear scores is logistic regression without intercept, solved by Newton."""
    x, truth = rand(300, 2, 3), torch.tensor([1.0, -2.0, 0.5]).double()
    first = torch.rand(300, generator=torch.Generator().manual_seed(1)) < ((x[:, 0] - x[:,
                                                                                        1]) @ truth).sigmoid()
    ranks = torch.stack([(~first).long(), first.long()], 1)
    weight = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-15)

    def closure():
        solver.zero_grad()
        loss = preference_loss(x @ weight, ranks)[0]
        loss.backward()
        return loss
    solver.step(closure)
    d, y, newton = (x[:, 0] - x[:, 1]).numpy(), first.double().numpy(), np.zeros(3)
    for _ in range(20):
        p = 1 / (1 + np.exp(-d @ newton))
        newton += np.linalg.solve(d.T @ (d * (p * (1 - p))[:, None]), d.T @ (y - p))
    assert weight.detach().numpy() == pytest.approx(newton, abs=1e-6)


def test_score_loss_and_accuracy_by_hand():
    total, count = score_loss(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 4.0]))
    assert (total.item(), count.item()) == (5.0, 2)
    assert pairwise_accuracy(torch.tensor([1.0, 0.0, 2.0, 1.0]), torch.tensor([0.0, 1.0, 2.0, 0.5])) == 0.625


# ---- the numbers

def test_pearson_and_calibration():
    a, b = np.random.default_rng(0).normal(size=(2, 50))
    assert pearson(a.tolist(), (a + b).tolist()) == pytest.approx(np.corrcoef(a, a + b)[0, 1])
    assert math.isnan(pearson([1, 1], [1, 2]))
    draws = np.random.default_rng(1).random((2, 40_000))
    assert calibration_error(draws[0].tolist(), (draws[1] < draws[0]).tolist()) < 0.01
    assert calibration_error([0.9] * 1000, [1, 0] * 500) == pytest.approx(0.4)


def test_krippendorffs_alpha():
    """His own example (Computing Krippendorff's Alpha-Reliability, 2011, section C)."""
    table = ["1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .",
             "1 2 3 3 2 4 4 1 2 5 1 ."]
    units = [[int(v) for v in column if v != "."] for column in zip(*(row.split() for row in table))]
    assert krippendorff_alpha(units, nominal) == pytest.approx(0.743, abs=5e-4)
    assert krippendorff_alpha(units, interval) == pytest.approx(0.849, abs=5e-4)
    assert krippendorff_alpha([[1, 1], [2, 2]], nominal) == 1.0
    assert math.isnan(krippendorff_alpha([[1, 1]], nominal))


def test_the_interval_covers_the_truth():
    """In 100 experiments of 60 prompts with 3 dependent pairs each, about 95% of the intervals hold 0.7."""
    generator, hits = np.random.default_rng(0), 0
    for _ in range(100):
        parts = [[float(generator.random() < 0.7)] * 3 for _ in range(60)]
        low, high = interval95(parts, lambda p: float(np.mean([x for part in p for x in part])), 200)
        hits += low <= 0.7 <= high
    assert 0.87 <= hits / 100 <= 1.0


# ---- reading replies in rows

SMALL = dict(vocab_size=50, d_model=32, n_layers=2, n_heads=2, n_kv_heads=1, d_ff=64, max_seq_len=24)


@pytest.mark.parametrize("likelihood_coef", [0.0, 3.0])
def test_scores_are_the_same_alone_and_packed(likelihood_coef):
    torch.manual_seed(0)
    model = ScalarModel(ModelConfig(**SMALL), likelihood_coef)
    texts = [torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(n)).tolist()
             for n in (5, 24, 1, 9, 9, 12, 3)]
    said = [2, 24, 1, 8, 9, 5, 1]           # 24 and 9 lost their prompt: before their first token is nothing
    lengths, said_lengths = torch.tensor([len(t) for t in texts]), torch.tensor(said)
    alone = torch.stack([model.score_response(torch.tensor([t]), torch.tensor([len(t)]), torch.tensor([n]))[0]
                         for t, n in zip(texts, said)])
    in_twos = score_texts(model, texts, said, max_logits=2 * 24 * 50)
    torch.testing.assert_close(in_twos, alone, rtol=0, atol=1e-6)
    padded = torch.tensor([t + [7] * (24 - len(t)) for t in texts])
    torch.testing.assert_close(model.score_response(padded, lengths, said_lengths), alone, rtol=0, atol=1e-6)
    ids, doc_ids, targets, row, last = packed_replies(texts, said, 24)
    assert all(ids[r, e].item() == t[-1] for t, r, e in zip(texts, row, last)) and len(ids) < len(texts)
    for text, n, r, e in zip(texts, said, row, last):
        known = min(n, len(text) - 1)
        assert targets[r, e - known:e].tolist() == text[len(text) - known:]
    assert (targets != IGNORE_INDEX).sum() == sum(min(n, len(t) - 1) for t, n in zip(texts, said))


@pytest.mark.parametrize("tied", [True, False])
def test_the_likelihood_in_a_score_is_the_language_model_s_own(tied):
    """Token by token, by the language model whose weights it took, without rows, masks or targets."""
    torch.manual_seed(0)
    shape = ModelConfig(**SMALL, tie_embeddings=tied)
    language_model, model = LanguageModel(shape).double(), ScalarModel(shape, 4.0).double()
    checkpoint.load_weights(model, language_model.state_dict(), "there")
    prompts, replies = [[3, 4, 5], [9]], [[7, 8, 2], [6, 2]]
    found = score_texts(model, [p + r for p, r in zip(prompts, replies)], [3, 2])
    for prompt, reply, score in zip(prompts, replies, found):
        total, ids = 0.0, list(prompt)
        for token in reply:
            total += language_model(torch.tensor([ids]))[0, -1].softmax(-1)[token].log().item()
            ids.append(token)
        head = model.score.weight[0] @ model.model(torch.tensor([ids]))[0, -1]
        assert score.item() == pytest.approx(head.item() + 4.0 * total / len(reply), abs=1e-5)
        before = model(torch.tensor([ids]), targets=torch.full((1, len(ids)), IGNORE_INDEX))[0]
        targets = torch.tensor([[IGNORE_INDEX] * (len(prompt) - 1) + reply + [IGNORE_INDEX]])
        assert_close = torch.testing.assert_close
        assert_close(model(torch.tensor([ids]), targets=targets)[0, :-1], before[:-1], rtol=0, atol=1e-6)
        with pytest.raises(ValueError, match="likelihood_coef 4 needs to know which tokens are the reply"):
            model(torch.tensor([ids]))


def test_a_long_prompt_loses_its_start_and_the_reply_nothing():
    assert joined([1, 2, 3], [8, 9], 4) == [2, 3, 8, 9] and joined([1], [8, 9], 2) == [8, 9]
    with pytest.raises(UserError, match="a reply of 3 tokens does not fit into 2"):
        joined([1], [7, 8, 9], 2)


# ---- formats

P = [{"role": "user", "content": "Why?"}]


@pytest.mark.parametrize("record, messages, replies, ranks, scores", [
    ({"prompt": "Why?", "chosen": "a", "rejected": "b"}, P, ["a", "b"], [0, 1], None),
    ({"messages": P, "chosen": "a", "rejected": "b"}, P, ["a", "b"], [0, 1], None),
    ({"prompt": P, "chosen": "a", "rejected": "b"}, P, ["a", "b"], [0, 1], None),
    ({"instruction": "Why?", "input": "", "output": "x", "chosen": "a", "rejected": "b"}, P, ["a", "b"],
     [0, 1], None),
    ({"instruction": "Why", "input": "so?", "chosen": "a", "rejected": "b"},
     [{"role": "user", "content": "Why\n\nso?"}], ["a", "b"], [0, 1], None),
    ({"question": "Why?", "accepted": "a", "rejected": "b"}, P, ["a", "b"], [0, 1], None),
    ({"input": "Why?", "outputs": [{"response": "a", "score": 4}, {"response": "b", "score": 2.5}]}, P,
     ["a", "b"],
     None, [4, 2.5]),
    ({"prompt": "Why?", "outputs": [{"response": "a", "rank": 2}, {"response": "b", "rank": 1}]}, P,
     ["a", "b"],
     [2, 1], None),
    ({"text": "fine", "score": -1.5}, [], ["fine"], None, [-1.5]),
    # The tutorial's three kinds of example: a fact, a sentiment, a recommendation, rated and ranked.
    ({"input": "Which is larger, Mars or the Earth?", "outputs": [
        {"response": "The Earth; Mars has about half its diameter.", "score": 5, "rank": 1},
        {"response": "Mars.", "score": 3, "rank": 3}, {"response": "They are planets.", "score": 4,
                                                       "rank": 2}]},
     [{"role": "user", "content": "Which is larger, Mars or the Earth?"}],
     ["The Earth; Mars has about half its diameter.", "Mars.", "They are planets."], [1, 3, 2], [5, 3, 4]),
    ({"input": "Our train was late and the hotel was full. How do I feel?", "outputs": [
        {"response": "Annoyed and tired.", "score": 5}, {"response": "Happy.", "score": 1},
        {"response": "You travelled.", "score": 2}]},
     [{"role": "user", "content": "Our train was late and the hotel was full. How do I feel?"}],
     ["Annoyed and tired.", "Happy.", "You travelled."], None, [5, 1, 2]),
    ({"prompt": "推荐一个爬山用的背包。", "outputs": [
        {"response": "四十升、带腰带的背包。", "rank": 1}, {"response": "都可以。", "rank": 2},
        {"response": "买双鞋吧。", "rank": 2}]},
     [{"role": "user", "content": "推荐一个爬山用的背包。"}], ["四十升、带腰带的背包。", "都可以。", "买双鞋吧。"], [1, 2, 2], None),
])
def test_formats_of_judged_replies(record, messages, replies, ranks, scores):
    assert to_comparison(record) == (messages, replies, ranks, scores)


# ---- runs

WORDS = "sun moon rain snow wind hail frost mist dew ice".split()


def rankings(n, noise=0):
    """Whoever repeats the prompt's word is better, and longer thanks are better, too."""
    generator, lines = np.random.default_rng(n), []
    for i in range(n):
        a, b = generator.choice(len(WORDS), 2, replace=False)
        replies = [f"{WORDS[a]} it is", f"{WORDS[b]} it is", "no"]
        ranks = [1, 2, 3] if not noise else generator.permutation(3).tolist()
        lines.append({"prompt": f"Say {WORDS[a]} {i}", "outputs": [
            {"response": reply, "rank": int(rank)} for reply, rank in zip(replies, ranks)]})
    return lines


def write(path, records):
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A config with the built-in judgements and model filled in."""
    return reward.built_in(RewardConfig(out_dir=str(tmp_path_factory.mktemp("reward"))), Ranks())


def config_of(ready, out_dir, **changes):
    return RewardConfig(**PRESETS["smoke"] | dict(data=ready.data, init_from=ready.init_from,
                                                  out_dir=str(out_dir),
                                                  dtype="fp32", device="cpu") | changes)


def losses(out_dir):
    found = [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in found if "loss" in line]


def gate_of(out_dir):
    return checkpoint.read_config(checkpoint.resolve(out_dir))["reward"]


def test_it_learns_what_people_prefer_and_passes(ready, tmp_path):
    data = write(tmp_path / "good.jsonl", rankings(150))
    train(config_of(ready, tmp_path / "run", data=data, max_steps=40, learning_rate=3e-3, val_share=0.2),
          Ranks())
    gate = gate_of(tmp_path / "run")
    assert gate["metric"] == "accuracy" and gate["value"] > 0.6 and gate["passed"] and gate["low"] > 0.5
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert {"accuracy", "log_loss", "calibration_error", "length_correlation", "by_margin",
            "baselines"} <= report.keys()


def test_labels_at_random_teach_nothing_and_fail_the_gate(ready, tmp_path):
    data = write(tmp_path / "random.jsonl", rankings(200, noise=1))
    train(config_of(ready, tmp_path / "run", data=data, max_steps=10, val_share=0.3, bootstrap=200), Ranks())
    gate = gate_of(tmp_path / "run")
    assert abs(gate["value"] - 0.5) < 0.12 and not gate["passed"]


def test_normalisation_keeps_the_order(ready, tmp_path):
    model = train(config_of(ready, tmp_path / "run"), Ranks())
    data, _ = reward.open_data(config_of(ready, tmp_path), *checkpoint.source(config_of(ready, tmp_path)),
                               Ranks())
    scores = score_texts(model, *data["normal"])
    raw = scores * model.score_std + model.score_mean
    assert scores.mean().item() == pytest.approx(0, abs=1e-5)
    assert scores.std().item() == pytest.approx(1, abs=1e-5)
    assert scores.argsort().tolist() == raw.argsort().tolist() and model.score_std != 1
    kept, _, _ = checkpoint.load_model(tmp_path / "run")
    torch.testing.assert_close(score_texts(kept, *data["normal"]), scores, rtol=0, atol=1e-6)


def test_ratings_are_learnt_by_regression(ready, tmp_path):
    records = [{"text": f"{word} and {other}", "score": 100 + 10 * i} for i, word in enumerate(WORDS)
               for other in WORDS]
    config = config_of(ready, tmp_path / "run", data=write(tmp_path / "scores.jsonl", records), pair_coef=0.0,
                       score_coef=1.0, max_steps=60, learning_rate=3e-3, val_share=0.2)
    train(config, Ranks())
    gate = gate_of(tmp_path / "run")
    assert gate["metric"] == "pearson" and gate["value"] > 0.5 and gate["passed"]


def test_both_losses_add_up(ready, tmp_path):
    """The first step's loss, both weighed, is the sum of those of two runs, each with one."""
    records = [{"input": f"Say {w} {i}", "outputs": [{"response": w, "score": 5},
                                                     {"response": "no", "score": 1 + i % 3}]}
               for w in WORDS for i in range(3)]
    data = write(tmp_path / "both.jsonl", records)
    for name, pair, score in ("pairs", 1.0, 0.0), ("scores", 0.0, 1.0), ("both", 2.0, 0.5):
        train(config_of(ready, tmp_path / name, data=data, pair_coef=pair, score_coef=score, max_steps=1,
                        val_share=0.2), Ranks())
    pairs, scores, both = (losses(tmp_path / name)[0] for name in ("pairs", "scores", "both"))
    assert both == pytest.approx(2 * pairs + 0.5 * scores, rel=1e-5)


def test_the_error_at_every_token_by_loops(ready, tmp_path):
    records = [{"input": f"Say {w} {i}", "outputs": [{"response": f"{w} and {w}", "score": 5},
                                                     {"response": "no", "score": i}]}
               for w in WORDS for i in range(3)]
    config = config_of(ready, tmp_path / "run", data=write(tmp_path / "marks.jsonl", records), pair_coef=0.0,
                       score_coef=0.5, token_coef=0.7, val_share=0.2)
    shape, tokenizer = checkpoint.source(config)
    data, config = reward.open_data(config, shape, tokenizer, Ranks())
    torch.manual_seed(0)
    model, prompts, (mean, sd) = reward.ScalarModel(shape), data["train"], data["scale"]
    loss_of = reward.loss_function(config, prompts, prompts[:4], data["scale"], Ranks())
    got = sum(loss_of(model, torch.tensor(numbers))[0] for numbers in ([0, 1], [2, 3]))
    errors, ends = [], []
    for prompt in prompts[:4]:
        for i, score in prompt.scores:
            values = model(torch.tensor([prompt.ids[i]]))[0]
            reply = len(tokenizer.encode(prompt.texts[i])) + 1                  # and its end
            errors += [(value - (score - mean) / sd) ** 2 for value in values[-reply:]]
            ends.append(errors[-1])
    assert len({len(prompt.ids[0]) for prompt in prompts[:4]}) > 1
    wanted = 0.7 * sum(errors) / len(errors) + 0.5 * sum(ends) / len(ends)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    for name, mine, theirs in zip([n for n, _ in model.named_parameters()],
                                  torch.autograd.grad(got, [*model.parameters()]),
                                  torch.autograd.grad(wanted, [*model.parameters()])):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5, msg=name)


def test_a_resumed_run_is_the_unbroken_run(ready, tmp_path, monkeypatch):
    train(config_of(ready, tmp_path / "whole"), Ranks())
    taken, step = [], reward.clip_and_step
    monkeypatch.setattr(reward, "clip_and_step", lambda *a: taken.append(1) or (
        step(*a) if len(taken) < 5 else (_ for _ in ()).throw(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        train(config_of(ready, tmp_path / "broken"), Ranks())
    monkeypatch.setattr(reward, "clip_and_step", step)
    train(replace(config_of(ready, tmp_path / "broken"), resume=True), Ranks())
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert gate_of(tmp_path / "broken") == gate_of(tmp_path / "whole")


def train_on(ranks, config):
    train(config, ranks)


def test_micro_batches_and_two_ranks_train_as_one(ready, tmp_path):
    settings = dict(optimizer="adamw", max_steps=4, eval_every=100, bootstrap=20)
    train(config_of(ready, tmp_path / "one", **settings), Ranks())
    train(config_of(ready, tmp_path / "micro", micro_batch_size=2, **settings), Ranks())
    two = config_of(ready, tmp_path / "two", **settings)
    (tmp_path / "out").mkdir()
    on_ranks(2, train_on, two, (two,), tmp_path / "out")
    for name in "micro", "two":
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_each_reply_is_read_once_and_pairs_of_it_are_one_prompt(ready, tmp_path):
    """A ranking of three and the same as three pairs: the same replies, comparisons and judged accuracy."""
    ranked = rankings(30)
    pairs = [{"prompt": r["prompt"], "chosen": r["outputs"][a]["response"],
              "rejected": r["outputs"][b]["response"]}
             for r in ranked for a, b in ((0, 1), (0, 2), (1, 2))]
    config = config_of(ready, tmp_path)
    _, tokenizer = checkpoint.source(config)
    read = [list(reward.read_prompts(write(tmp_path / f"{n}.jsonl", records), tokenizer, 128, config,
                                     str).values())
            for n, records in (("ranked", ranked), ("pairs", pairs))]
    assert [p.ids for p in read[0]] == [p.ids for p in read[1]]
    assert [sorted(p.pairs()) for p in read[0]] == [sorted(p.pairs()) for p in read[1]]


def test_people_s_ratings_train_as_they_are(ready, tmp_path):
    """ratings.jsonl of the Rate page gives what feedback.py collect makes of it, and a whole run."""
    samples = [{"id": f"s{i}", "messages": [{"role": "user", "content": f"Say {i}."}],
                "replies": [{"id": f"r{j}", "text": f"{word} {i}"}
                            for j, word in enumerate(("yes", "no", "so"))]}
               for i in range(40)]
    for i, found in enumerate(samples):
        marks = {f"r{j}": dict.fromkeys(ASPECTS, 5 - j) for j in range(3)}
        for name in "ada", "bo":
            append(tmp_path / "people.jsonl", {"sample": found["id"], "annotator": name, **[
                {"kind": "ranking", "ranking": [["r0"], ["r2", "r1"]]},
                {"kind": "choice", "ranking": [["r1"], ["r0"]]},
                {"kind": "rubric", "scores": marks}][i % 3]})
    write(tmp_path / "samples.jsonl", samples)
    config = config_of(ready, tmp_path / "run", data="", ratings=str(tmp_path / "people.jsonl"),
                       normalize_on=str(tmp_path / "samples.jsonl"), max_steps=2, bootstrap=5)
    model_config, tokenizer = checkpoint.source(config)
    found = reward.open_data(config, model_config, tokenizer, Ranks())[0]
    for form in "rankings", "scores":
        collect(CollectConfig(config.normalize_on, config.ratings, form=form,
                              out=str(tmp_path / f"{form}.jsonl")))
    by_file = reward.read_prompts(f"{tmp_path}/rankings.jsonl,{tmp_path}/scores.jsonl", tokenizer, 128,
                                  config, str)
    direct = {tuple(map(tuple, p.ids)): p for p in found["train"] + found["val"]}
    assert len(direct) == len(by_file) == 40
    for prompt in by_file.values():
        same = direct[tuple(map(tuple, prompt.ids))]
        assert set(same.pairs()) == set(prompt.pairs()) and same.scores == prompt.scores
    assert len(found["normal"][0]) == 120
    train(config, Ranks())
    for name, words in (("none.jsonl", "no such file"),
                        ("samples.jsonl", "samples.jsonl:1: a rating has no 'sample'")):
        with pytest.raises(UserError, match=words):
            train(replace(config, ratings=str(tmp_path / name), out_dir=str(tmp_path / "bad")), Ranks())


def test_baselines_see_length_and_words(ready, tmp_path):
    config = config_of(ready, tmp_path)
    _, tokenizer = checkpoint.source(config)
    found = list(reward.read_prompts(write(tmp_path / "b.jsonl", rankings(80)), tokenizer, 128, config,
                                     str).values())
    plain = baselines(found[:60], found[60:])
    assert 0.6 < plain["length"] <= 0.9 and plain["bag_of_words"] > 0.6
    assert baselines(found, []) == {}


def test_baselines_of_scores_are_those_of_ridge_regression():
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, (400, 6))
    scores = counts @ [1, -1, 0.5, 0, 0, 0] + rng.normal(0, 1, 400)
    texts = [" ".join(w for w, n in zip("good bad fine so and then".split(), row) for _ in range(n))
             for row in counts]
    found = [reward.Prompt([], [text], [len(text.split())], [], [(0, float(s))])
             for text, s in zip(texts, scores)]
    x, y = counts[:300] - counts[:300].mean(0), scores[:300] - scores[:300].mean()
    y /= y.std(ddof=1)
    weight = np.linalg.solve(x.T @ x / 300 + 1e-3 * np.eye(6), x.T @ y / 300)
    lengths = counts.sum(1)
    sign = np.sign(np.corrcoef(lengths[:300], scores[:300])[0, 1])
    wanted = {"length": sign * np.corrcoef(lengths[300:], scores[300:])[0, 1],
              "bag_of_words": np.corrcoef(counts[300:] @ weight, scores[300:])[0, 1]}
    assert baselines(found[:300], found[300:], "pearson") == pytest.approx(wanted, abs=1e-3)
    assert wanted["bag_of_words"] > 0.6


def test_the_learning_curve_and_scores_of_a_file(ready, tmp_path, capsys):
    reward.main(config_of(ready, tmp_path / "run", curve="20,60", bootstrap=20))
    sizes = [json.loads((tmp_path / f"run/curve/{n}/report.json").read_text())["comparisons"] for n
             in (20, 60)]
    assert sizes[0] == sizes[1]                                     # judged on the same prompts
    capsys.readouterr()
    file = tmp_path / "mixed.jsonl"
    write(file, [{"prompt": "Say yes 1.", "chosen": "yes 1!", "rejected": "no"},
                 {"messages": [*P, {"role": "assistant", "content": "So."}]},
                 {"id": "1", "messages": P, "replies": [{"id": "r1", "text": "So."}]}])
    reward.main(RewardConfig(init_from=str(tmp_path / "run"), score=str(file), device="cpu"))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [len(line["scores"]) for line in lines] == [2, 1, 1]
    assert lines[0]["scores"][0] > lines[0]["scores"][1] and lines[1]["scores"] == lines[2]["scores"]


# ---- bad input

TWO = [{"response": "a", "rank": 1}, {"response": "b", "rank": 2}]


@pytest.mark.parametrize("record, wrong", [
    ([1], "is not a record of judged replies"), ({"a": 1}, "in none of the formats of judged replies"),
    ({"prompt": "x", "outputs": []}, "outputs is empty"), ({"prompt": "x", "outputs": "y"},
                                                           "is not a list of objects"),
    ({"prompt": "x", "outputs": [{"rank": 1}]}, "is not a list of objects"),
    ({"prompt": "x", "outputs": [{"response": "a"}, {"response": "b"}]}, "neither rank nor score"),
    ({"prompt": "x", "outputs": TWO[:1]}, "one ranked reply has nothing to be compared with"),
    ({"prompt": "x", "outputs": [TWO[0], {"response": "c"}]},
     "rank null must be a number, one for every reply"),
    ({"prompt": "x", "outputs": [{"response": "a", "score": "5"}]}, 'score "5" must be a number'),
    ({"prompt": "x", "outputs": [{"response": "a", "score": True}]}, "score true must be a number"),
    ({"text": "x", "score": float("nan")}, "score NaN must be a number"),
    ({"prompt": "x", "chosen": "a", "rejected": "a"}, "all replies are equal"),
    ({"prompt": "x", "chosen": "a", "rejected": None}, "rejected null is a NoneType"),
    ({"messages": [{"role": "assistant", "content": "x"}], "chosen": "a", "rejected": "b"}, "not of user"),
    ({"messages": [*P, {"role": "assistant", "content": "x"}], "chosen": "a", "rejected": "b"},
     "must end with one of"),
    ({"prompt": "x", "chosen": "a " * 300, "rejected": "b"}, r"a reply of \d+ tokens does not fit"),
])
def test_a_bad_record_is_one_line_with_its_place(ready, tmp_path, record, wrong):
    data = write(tmp_path / "bad.jsonl", [*rankings(20), record])
    with pytest.raises(UserError, match=rf"bad.jsonl:21: .*{wrong}.*--skip_bad") as error:
        train(config_of(ready, tmp_path / "run", data=data), Ranks())
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    train(config_of(ready, tmp_path / "run", data=data, skip_bad=True, max_steps=1, bootstrap=5), Ranks())


def test_nothing_to_judge_by_is_said_before_training(ready, tmp_path):
    val = write(tmp_path / "val.jsonl",
                [{"prompt": "x", "outputs": [{"response": w, "rank": 1} for w in "ab"]}])
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "x", "chosen": "a", "rejected": "b"}])
    marks = write(tmp_path / "marks.jsonl", [{"text": f"so {i}", "score": i} for i in range(9)])
    for changes in dict(val_data=val), dict(data=marks, val_data=pairs, pair_coef=0.0, score_coef=1.0):
        with pytest.raises(UserError, match="no validation prompt holds anything to judge by"):
            train(config_of(ready, tmp_path / "run", **changes), Ranks())
    assert not (tmp_path / "run").exists()


def test_prompts_of_ties_are_neither_learnt_nor_judged(ready, tmp_path):
    """A raw model's replies mostly tie: they would fill batches and leave the held-out prompts empty."""
    ties = [{"prompt": f"tie {i}", "outputs": [{"response": w, "rank": 1} for w in "ab"]} for i in range(200)]
    config = config_of(ready, tmp_path / "run", data=write(tmp_path / "d.jsonl", [*ties, *rankings(40)]))
    model_config, tokenizer = checkpoint.source(config)
    data, _ = reward.open_data(config, model_config, tokenizer, Ranks())
    assert len(data["train"]) + len(data["val"]) == 40 and len(data["val"]) > 1
    assert all(prompt.pairs() for part in ("train", "val") for prompt in data[part])


@pytest.mark.parametrize("changes, wrong", [
    (dict(data=""), "--data is missing"), (dict(data="none.jsonl"), "none.jsonl: no such file"),
    (dict(init_from=""), "--init_from is missing"), (dict(pair_coef=0.0), "leave nothing to learn"),
    (dict(pair_coef=0.0, score_coef=1.0), "no scores to learn from; give --score_coef 0 --pair_coef 1"),
    (dict(val_share=0.0), "val_share 0.0 is a share"), (dict(curve="a"), "curve 'a' is not a list"),
    (dict(score_coef=-1.0), "score_coef -1.0 must not"), (dict(normalize_on="none.jsonl"), "no such file"),
    (dict(score="none.jsonl"), "is no reward model"),
    (dict(ratings="none.jsonl"), "--ratings needs --normalize_on"),
])
def test_bad_flags_are_one_line(ready, tmp_path, changes, wrong):
    with pytest.raises(UserError, match=wrong) as error:
        reward.main(config_of(ready, tmp_path / "run", **changes))
    assert "\n" not in str(error.value)


def test_judging_is_done_pair_by_pair(ready, tmp_path):
    """judge's accuracy and log-loss against a loop over one reply at a time."""
    config = config_of(ready, tmp_path)
    model_config, tokenizer = checkpoint.source(config)
    torch.manual_seed(0)
    model = ScalarModel(model_config)
    found = list(reward.read_prompts(write(tmp_path / "r.jsonl", rankings(12)), tokenizer, 128, config,
                                     str).values())
    margins = [model(torch.tensor([p.ids[a]]))[0, -1] - model(torch.tensor([p.ids[b]]))[0, -1]
               for p in found for a, b in p.pairs()]
    got = judge(model, found, 0)
    assert got["accuracy"] == pytest.approx(np.mean([m.item() > 0 for m in margins]))
    assert got["log_loss"] == pytest.approx(np.mean([-F.logsigmoid(m).item() for m in margins]), abs=1e-5)
