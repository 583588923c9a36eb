"""Pretraining as a whole: overfitting a batch, golden losses, ranks, stopping, skipping, compiling."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint
import pretrain
import training
from batches import Shards, bits_per_byte
from cli import UserError
from pretrain import PRESETS, PretrainConfig, built_in_data, evaluate, open_data, train
from training import Ranks

ROOT, GOLDEN = Path(__file__).parents[1], Path(__file__).parent / "golden/pretrain.json"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards of the built-in text."""
    return built_in_data(PretrainConfig(out_dir=str(tmp_path_factory.mktemp("shards"))), Ranks())


def config_of(shards, out_dir, **changes):
    """The smoke preset without looks at the model."""
    return PretrainConfig(**PRESETS["smoke"] | dict(data_dir=str(shards), out_dir=str(out_dir), samples=0,
                                                    dtype="fp32", device="cpu") | changes)


def lines(out_dir):
    return [json.loads(line)
            for line in (Path(out_dir) / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def losses(out_dir):
    return [line["loss"] for line in lines(out_dir) if "loss" in line]


def test_a_batch_can_be_learnt_by_heart(tmp_path, shards):
    """--overfit: the loss of the one batch goes below 0.05, from log(vocab_size) at the start."""
    config = config_of(shards, tmp_path, overfit=True, batch_size=2, max_steps=120, learning_rate=2e-2,
                       schedule="linear", eval_every=1000, save_every=1000, tie_embeddings=False)
    train(config, Ranks())
    assert losses(tmp_path)[0] == pytest.approx(np.log(512), rel=0.03) and losses(tmp_path)[-1] < 0.05


def test_golden_losses(tmp_path, shards):
    """The first ten losses of the smoke run. The commit that changes the file explains why they changed."""
    train(config_of(shards, tmp_path, max_steps=10, optimizer="adamw", dropout=0.1, eval_every=1000,
                    save_every=1000), Ranks())
    assert losses(tmp_path) == pytest.approx(json.loads(GOLDEN.read_text(encoding="utf-8")), rel=1e-4)


def test_evaluation_does_not_depend_on_ranks(tmp_path, shards):
    """Shares of two ranks, added up, give what one rank finds; bits/byte are batches.bits_per_byte's."""
    config = config_of(shards, tmp_path, eval_rows=5, max_steps=1)
    model = train(config, Ranks())
    data, tokenizer, config = open_data(config, Ranks())
    whole = evaluate(config, model, data, tokenizer, Ranks(), whole=True)

    class Half(Ranks):
        """One of two ranks, whose sums are kept instead of added."""
        def sum(self, tensor):
            self.kept = [*getattr(self, "kept", []), tensor.clone()]
            return tensor

    halves = [Half(rank=rank, world_size=2) for rank in range(2)]
    for half in halves:
        evaluate(config, model, data, tokenizer, half, whole=True)
    (loss, correct, count), nats_and_bytes = (halves[0].kept[1] + halves[1].kept[1],
                                              halves[0].kept[2] + halves[1].kept[2])
    assert whole["val_loss"] == pytest.approx((loss / count).item(), rel=1e-5)
    assert whole["val_accuracy"] == pytest.approx((correct / count).item())
    assert whole["val_perplexity"] == pytest.approx(np.exp(whole["val_loss"]))
    nats, size, _ = nats_and_bytes.sum(0).tolist()
    assert whole["bits_per_byte"] == pytest.approx(nats / size / np.log(2), rel=1e-5)
    direct = bits_per_byte(model, Shards(shards, "val"), tokenizer, config.max_seq_len)
    assert {"all": whole["bits_per_byte"], "en": whole["bits_per_byte_en"],
            "zh": whole["bits_per_byte_zh"]} == pytest.approx(direct, rel=1e-5)


def test_skipped_steps_read_the_data_behind_them(tmp_path, shards):
    """With lr 0 the loss is a function of the batch alone: skipping 2-4 gives the losses of steps 0 1 5 6."""
    changes = dict(learning_rate=0.0, eval_every=1000, save_every=1000, micro_batch_size=8)
    train(config_of(shards, tmp_path / "all", max_steps=7, **changes), Ranks())
    train(config_of(shards, tmp_path / "skip", max_steps=4, skip_steps="2-4", **changes), Ranks())
    wanted = losses(tmp_path / "all")
    assert losses(tmp_path / "skip") == [wanted[i] for i in (0, 1, 5, 6)] and len(set(wanted)) == 7


def test_max_seconds_stops_and_saves(tmp_path, shards):
    config = config_of(shards, tmp_path, max_steps=10 ** 6, max_seconds=1, eval_every=10 ** 6,
                       save_every=10 ** 6, log_every=1000)
    train(config, Ranks())
    path = checkpoint.newest(tmp_path)
    assert 0 < checkpoint.read_config(path)["step"] == lines(tmp_path)[-1]["step"] < 10 ** 5


def test_init_from_takes_the_weights_and_starts_at_0(tmp_path, shards):
    train(config_of(shards, tmp_path / "a", max_steps=15), Ranks())
    train(config_of(shards, tmp_path / "b", max_steps=1, init_from=str(tmp_path / "a"), learning_rate=1e-9),
          Ranks())
    before, after = (checkpoint.load_model(tmp_path / name)[0].state_dict() for name in "ab")
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, atol=1e-6, rtol=0)
    assert losses(tmp_path / "b")[0] < losses(tmp_path / "a")[0] - 0.5


def test_too_large_for_the_device_is_one_line(tmp_path, shards, monkeypatch):
    def full(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(pretrain, "time_micro_batch", full)
    with pytest.raises(UserError, match="micro_batch_size 8 does not fit"):
        train(config_of(shards, tmp_path), Ranks())


def test_a_broken_compiler_is_no_hindrance(monkeypatch, capsys):
    def broken(*args, **kwargs):
        raise RuntimeError("No working C++ compiler\nfound")
    monkeypatch.setattr(torch, "compile", broken)
    model = torch.nn.Linear(2, 2)
    assert training.wrap(model, training.TrainingConfig(compile=True), Ranks()) is model
    assert capsys.readouterr().out == "compile is off: No working C++ compiler found\n"


@pytest.mark.full
def test_compiled_training_is_eager_training(tmp_path, shards, monkeypatch):
    """Losses of ten steps agree, the head in three chunks; a compiled run repeats to the bit."""
    monkeypatch.setattr("model.chunk_of_tokens", lambda vocab_size, device: 200)
    for name, compile in (("eager", False), ("compiled", True), ("again", True)):
        train(config_of(shards, tmp_path / name, max_steps=10, compile=compile, optimizer="adamw"), Ranks())
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "eager"), rel=1e-4)
    assert losses(tmp_path / "compiled") == losses(tmp_path / "again")


def test_torchrun(tmp_path):
    """The README's command, two ranks, from nothing: built-in text, checkpoint, log, a line for each look."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "pretrain.py"), "--smoke", "--device", "cpu", "--max_steps", "6",
               "--eval_every", "3", "--save_every", "3", "--out_dir", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("evaluation at step") == 2 and done.stdout.count("sample:") == 4
    assert len(losses(tmp_path)) == 6 and checkpoint.read_config(checkpoint.newest(tmp_path))["step"] == 6
