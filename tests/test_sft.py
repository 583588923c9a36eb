"""Instruction tuning: its loss by hand and against torch, learning by heart, resuming, ranks, bad flags."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import checkpoint
import sft
from cli import UserError
from model import IGNORE_INDEX
from ranks import on_ranks
from sft import PRESETS, SFTConfig, answer_loss, built_in, split, train, weights_by_label
from training import Ranks


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A config with the built-in records and model filled in."""
    return built_in(SFTConfig(out_dir=str(tmp_path_factory.mktemp("sft"))), Ranks())


def config_of(ready, out_dir, **changes):
    return SFTConfig(**PRESETS["smoke"] | dict(data=ready.data, init_from=ready.init_from,
                                               out_dir=str(out_dir), samples=0, dtype="fp32",
                                               device="cpu") | changes)


def losses(out_dir):
    found = [json.loads(line) for line in (Path(out_dir) / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in found if "loss" in line]


# ---- the loss

def case(V=7):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, V, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, V, (2, 5), generator=generator)
    targets[0, :2] = targets[1, 3] = IGNORE_INDEX
    weights = (targets != IGNORE_INDEX) * torch.tensor([[1.0], [2.5]])
    return logits, targets, weights


def assert_same(got, wanted, logits):
    assert got.item() == pytest.approx(wanted.item(), rel=1e-5)
    a, b = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (got, wanted))
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_plain_loss_counts_each_weight():
    logits, targets, weights = case()
    got, count = answer_loss(logits, targets, weights)
    wanted = sum(weights[b, t] * -logits[b, t].log_softmax(-1)[targets[b, t]]
                 for b in range(2) for t in range(5) if targets[b, t] != IGNORE_INDEX)
    assert_same(got, wanted, logits)
    assert count == 3 * 1.0 + 4 * 2.5


def test_label_smoothing_is_torchs():
    logits, targets, _ = case()
    learnt = targets != IGNORE_INDEX
    got, count = answer_loss(logits, targets, learnt.float(), label_smoothing=0.2)
    wanted = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum", label_smoothing=0.2)
    assert_same(got, wanted, logits)
    assert count == 7


def test_teacher_term_is_torchs_kl_and_zero_for_oneself():
    logits, targets, weights = case()
    teacher = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    plain, _ = answer_loss(logits, targets, weights)
    got, _ = answer_loss(logits, targets, weights, 0.0, teacher, 0.5)
    kl = F.kl_div(logits.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    assert_same(got, plain + 0.5 * (kl * weights).sum(), logits)
    oneself, _ = answer_loss(logits, targets, weights, 0.0, logits.detach(), 0.5)
    assert_same(oneself, plain, logits)


def test_both_ways_to_the_loss_agree(ready, tmp_path):
    """Records that all weigh 1 take the chunked loss, those that all weigh 2 the logits: the same mean."""
    records = [json.loads(line) for line in Path(ready.data).read_text(encoding="utf-8").splitlines()]
    doubled = tmp_path / "doubled.jsonl"
    doubled.write_text("".join(
        json.dumps(({"messages": r} if isinstance(r, list) else r) | {"weight": 2}) + "\n" for r in records))
    for name, data in ("plain", ready.data), ("doubled", str(doubled)):
        train(config_of(ready, tmp_path / name, max_steps=3, data=data), Ranks())
    assert losses(tmp_path / "doubled") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


# ---- runs

def test_a_batch_can_be_learnt_by_heart(ready, tmp_path):
    train(config_of(ready, tmp_path, overfit=True, batch_size=1, max_steps=150, learning_rate=2e-2,
                    schedule="linear", eval_every=1000, save_every=1000), Ranks())
    assert losses(tmp_path)[0] > 6 and losses(tmp_path)[-1] < 0.05


def test_a_resumed_run_is_the_unbroken_run(ready, tmp_path, monkeypatch):
    settings = dict(max_steps=6, save_every=3, dropout=0.1)
    train(config_of(ready, tmp_path / "whole", **settings), Ranks())
    config = config_of(ready, tmp_path / "broken", **settings)
    taken = []
    step = sft.clip_and_step
    monkeypatch.setattr(sft, "clip_and_step", lambda *a: taken.append(1) or (
        step(*a) if len(taken) < 5 else (_ for _ in ()).throw(KeyboardInterrupt())))
    with pytest.raises(KeyboardInterrupt):
        train(config, Ranks())
    monkeypatch.setattr(sft, "clip_and_step", step)
    train(replace(config, resume=True, init_from=""), Ranks())
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    states = [torch.load(tmp_path / name / "checkpoints/00000006/model.pt", weights_only=True)
              for name in ("whole", "broken")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def train_on(ranks, config):
    train(config, ranks)


def test_two_ranks_train_as_one(ready, tmp_path):
    settings = dict(max_steps=4, optimizer="adamw", save_every=4)
    train(config_of(ready, tmp_path / "one", **settings), Ranks())
    config = config_of(ready, tmp_path / "two", **settings)
    (tmp_path / "out").mkdir()
    on_ranks(2, train_on, config, (config,), tmp_path / "out")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-5)


def test_epochs_decide_steps_and_saving(ready, tmp_path):
    some = tmp_path / "some.jsonl"
    some.write_text("".join(Path(ready.data).read_text(encoding="utf-8").splitlines(True)[:22]),
                    encoding="utf-8")
    config = config_of(ready, tmp_path / "run", data=str(some), val_data=str(some), epochs=3, by_epoch=True,
                       packing=False, batch_size=8)
    train(config, Ranks())
    steps = sorted(int(p.name) for p in (tmp_path / "run/checkpoints").iterdir())
    assert steps[-2:] == [6, 9] and len(losses(tmp_path / "run")) == 9          # 22 / 8 is about 3
    assert checkpoint.read_config(tmp_path / "run/checkpoints/00000009")["config"]["d_model"] == 64
    train(replace(config, max_steps=11, resume=True, init_from=""), Ranks())    # the flag beats the epochs
    assert len(losses(tmp_path / "run")) == 11


def test_equal_conversations_stay_on_one_side_of_the_split(ready):
    _, tokenizer = checkpoint.source(ready)
    items = sft.read_conversations(f"{ready.data}:3", tokenizer, 513).items
    train_part, val_part = split(items, 0.2)
    told = [{repr(item.messages) for item in part} for part in (train_part, val_part)]
    assert not told[0] & told[1] and len(train_part) + len(val_part) == len(items)
    assert 0.1 < len(val_part) / len(items) < 0.3


def test_show_marks_what_is_learnt(ready, capsys):
    sft.show(replace(ready, show=2))
    lines = capsys.readouterr().out
    assert lines.count("--- ") == 2 and "<|im_start|>|" in lines and "[<|im_end|>]" in lines


@pytest.mark.parametrize("changes, words", [
    (dict(init_from=""), "--init_from is missing"), (dict(init_from="nowhere"), "nowhere"),
    (dict(val_share=0.0), "val_share 0.0"), (dict(val_share=1.0), "val_share 1.0"),
    (dict(data="nothing.jsonl"), "no such file"),
    (dict(label_weights="happy"), "label_weights 'happy'"), (dict(label_weights="happy=-1"), "happy=-1"),
    (dict(label_weights="=2"), "label_weights '=2'"), (dict(teacher_coef=0.5), "without --teacher"),
    (dict(teacher_coef=-1.0), "teacher_coef"), (dict(label_smoothing=1.0), "label_smoothing 1.0"),
    (dict(epochs=-1.0), "epochs"), (dict(samples=-1), "samples"), (dict(sample_tokens=0), "sample_tokens"),
    (dict(max_seq_len=16), "does not fit"), (dict(batch_size=0), "batch_size"),
])
def test_bad_flags(ready, tmp_path, changes, words):
    with pytest.raises(UserError, match=None) as error:
        train(config_of(ready, tmp_path, **changes), Ranks())
    assert words in str(error.value)
    assert not (tmp_path / "checkpoints").exists()


def test_weights_by_label():
    assert weights_by_label("happy=2, very sad=0.5,a=b=1") == {"happy": 2.0, "very sad": 0.5, "a=b": 1.0}
