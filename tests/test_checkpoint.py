"""Checkpoints: whole or absent, verified, and a resumed run continues bit for bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import free_port

import checkpoint
from cli import UserError
from model import LanguageModel, ModelConfig, ScalarModel
from pretrain import PRESETS, PretrainConfig, built_in_data, train
from tokenizer import Tokenizer
from training import Ranks, Stop

ROOT = Path(__file__).parents[1]
SHAPE = dict(vocab_size=300, d_model=16, n_layers=1, n_heads=2, n_kv_heads=1, d_ff=24, max_seq_len=16)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards of the built-in text."""
    return built_in_data(PretrainConfig(out_dir=str(tmp_path_factory.mktemp("shards"))), Ranks())


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["one two one two one"], 300)


def saved(out_dir, tokenizer, steps, best=(), keep_every=0, kind=LanguageModel):
    """Checkpoints of these steps, each of a model whose seed is the step."""
    for step in steps:
        torch.manual_seed(step)
        model = kind(ModelConfig(**SHAPE))
        checkpoint.save(out_dir, step, {"stage": "test", "config": SHAPE, "tokens": step * 10},
                        model.state_dict(), {"state": {"step": step}}, tokenizer, best=step in best,
                        keep_every=keep_every)


def names(out_dir, folder="checkpoints"):
    return sorted(path.name for path in (Path(out_dir) / folder).glob("*"))


# ---- what is written, and what stays

def test_last_two_and_best_stay(tmp_path, tokenizer):
    saved(tmp_path, tokenizer, [10, 20, 30, 40, 50], best=[10, 20], keep_every=20)
    assert names(tmp_path) == ["00000020", "00000040", "00000050"]
    assert checkpoint.best_name(tmp_path) == "00000020"
    assert names(tmp_path, "weights") == ["00000020", "00000040"]
    assert sorted(p.name for p in (tmp_path / "checkpoints/00000050").iterdir()) == [
        "checksums.json", "config.json", "model.pt", "tokenizer", "training.pt"]
    assert not (tmp_path / "weights/00000040/training.pt").exists()
    record = checkpoint.read_config(tmp_path / "checkpoints/00000050")
    assert (record["step"] == 50 and record["tokens"] == 500 and record["stage"] == "test"
            and "git_commit" in record)


@pytest.mark.parametrize("kind", [LanguageModel, ScalarModel])
def test_load_model_is_the_saved_model(tmp_path, tokenizer, kind):
    saved(tmp_path, tokenizer, [7], keep_every=7, kind=kind)
    torch.manual_seed(7)
    wanted, ids = kind(ModelConfig(**SHAPE)), torch.randint(0, 300, (2, 9))
    for path in (tmp_path, tmp_path / "checkpoints/00000007", tmp_path / "weights/00000007"):
        model, loaded, record = checkpoint.load_model(path)
        assert torch.equal(model(ids), wanted(ids)) and not model.training
        assert loaded.encode("one two") == tokenizer.encode("one two") and record["step"] == 7
    state = torch.load(tmp_path / "checkpoints/00000007/model.pt", weights_only=True)
    assert all(x.dtype == torch.float32 for x in state.values())


def test_a_failed_write_leaves_what_was_there(tmp_path, tokenizer, monkeypatch):
    saved(tmp_path, tokenizer, [1])
    for error in (OSError(28, "No space left on device"),
                  RuntimeError("PytorchStreamWriter failed writing file")):
        def fail(state, file):
            file.write(b"half")
            raise error
        with monkeypatch.context() as patch:
            patch.setattr(torch, "save", fail)
            with pytest.raises(UserError, match="00000002.*make room"):
                saved(tmp_path, tokenizer, [2])
        assert names(tmp_path) == ["00000001"] and checkpoint.problem(tmp_path / "checkpoints/00000001") == ""


def test_a_checkpoint_is_never_overwritten(tmp_path, tokenizer):
    """Replaying a step whose checkpoint is whole keeps it; a broken one is moved aside, not lost."""
    saved(tmp_path, tokenizer, [5])
    path = tmp_path / "checkpoints/00000005"
    before = (path / "model.pt").stat().st_mtime_ns
    saved(tmp_path, tokenizer, [5])
    assert (path / "model.pt").stat().st_mtime_ns == before
    (path / "model.pt").write_bytes(b"broken")
    saved(tmp_path, tokenizer, [5])
    assert names(tmp_path) == ["00000005", "00000005.broken-1"] and checkpoint.problem(path) == ""
    assert (tmp_path / "checkpoints/00000005.broken-1/model.pt").read_bytes() == b"broken"
    saved(tmp_path, tokenizer, [6])                         # the broken one is not counted among the last two
    assert names(tmp_path) == ["00000005", "00000005.broken-1", "00000006"]
    said = []
    assert checkpoint.newest(tmp_path, said.append).name == "00000006" and not said


def truncate(path):
    path.write_bytes(path.read_bytes()[:-10])


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("file", ["model.pt", "training.pt", "config.json", "checksums.json",
                                  "tokenizer/bpe.json"])
@pytest.mark.parametrize("damage", [truncate, flip_a_bit, Path.unlink],
                         ids=["truncated", "bit flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, tokenizer, file, damage):
    saved(tmp_path, tokenizer, [1, 2])
    damage(tmp_path / "checkpoints/00000002" / file)
    said = []
    assert checkpoint.newest(tmp_path, said.append) == tmp_path / "checkpoints/00000001"
    assert len(said) == 1 and "00000002" in said[0]
    with pytest.raises(UserError, match="00000002"):
        checkpoint.resolve(tmp_path / "checkpoints/00000002")


def test_another_shape_is_named(tmp_path, tokenizer):
    saved(tmp_path, tokenizer, [1])
    state = torch.load(tmp_path / "checkpoints/00000001/model.pt", weights_only=True)
    with pytest.raises(UserError, match=r"down_proj.weight is \(16, 24\) there but \(16, 32\) in this model"):
        checkpoint.load_weights(LanguageModel(ModelConfig(**SHAPE | {"d_ff": 32})), {
            k: v for k, v in state.items() if "gate" not in k and "up" not in k} | {
            k: v.new_zeros(32, 16) for k, v in state.items() if "gate" in k or "up" in k}, "X")


def test_start_removes_what_a_kill_left(tmp_path, tokenizer):
    saved(tmp_path, tokenizer, [1])
    (tmp_path / "checkpoints/.tmp-00000002/tokenizer").mkdir(parents=True)
    (tmp_path / ".tmp-best").write_text("x")
    checkpoint.clean(tmp_path)
    assert names(tmp_path) == ["00000001"] and not (tmp_path / ".tmp-best").exists()


# ---- resuming: stopped in the middle equals never stopped

def config_of(shards, out_dir, **changes):
    return PretrainConfig(**PRESETS["smoke"] | dict(
        data_dir=str(shards), out_dir=str(out_dir), max_steps=12, save_every=4, eval_every=6, dropout=0.1,
        samples=0, eval_rows=2, eval_documents=2, optimizer="adamw", micro_batch_size=4) | changes)


def losses(out_dir):
    lines = [json.loads(line)
             for line in (Path(out_dir) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return {line["step"]: (line["loss"], line["grad_norm"], line["lr"]) for line in lines if "loss" in line}


def state_of(out_dir, step):
    path = Path(out_dir) / f"checkpoints/{step:08d}"
    assert checkpoint.problem(path) == ""
    return [torch.load(path / name, weights_only=True) for name in ("model.pt", "training.pt")]


def assert_identical(a, b):
    """Equal to the last bit, through dicts and lists."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_identical(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_identical(x, y)
    else:
        assert a == b


def train_stopping_after(config, steps, monkeypatch):
    """A run that is asked to stop after so many steps of its own, as SIGTERM does."""
    calls = iter(range(1, 10 ** 6))
    with monkeypatch.context() as patch:
        patch.setattr(Stop, "agreed", lambda self, ranks: next(calls) == steps)
        train(config, Ranks())


@pytest.mark.parametrize("changes", [
    {}, {"optimizer": "adam"}, {"optimizer": "lamb"}, {"optimizer": "lars"}, {"optimizer": "muon"},
    {"batch_size_start": 4, "ramp_tokens": 3000}, {"skip_steps": "2-5"},
    {"schedule": "wsd", "tie_embeddings": False}],
    ids=lambda c: ",".join(f"{k}={v}" for k, v in c.items()) or "adamw")
def test_resumed_run_is_the_unbroken_run(tmp_path, shards, changes, monkeypatch):
    train(config_of(shards, tmp_path / "whole", **changes), Ranks())
    train_stopping_after(config_of(shards, tmp_path / "parts", **changes), 5, monkeypatch)
    train_stopping_after(config_of(shards, tmp_path / "parts", resume=True, **changes), 2, monkeypatch)
    train(config_of(shards, tmp_path / "parts", resume=True, **changes), Ranks())
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole") and len(losses(tmp_path / "whole")) == 12
    assert_identical(state_of(tmp_path / "parts", 12), state_of(tmp_path / "whole", 12))


def test_resume_survives_a_torn_newest(tmp_path, shards, capsys):
    train(config_of(shards, tmp_path), Ranks())
    wanted = losses(tmp_path), state_of(tmp_path, 12)
    truncate(tmp_path / "checkpoints/00000012/training.pt")
    train(config_of(shards, tmp_path, resume=True), Ranks())
    assert "passing over checkpoint" in capsys.readouterr().out
    assert losses(tmp_path) == wanted[0]
    assert_identical(state_of(tmp_path, 12), wanted[1])
    assert "00000012.broken-1" in names(tmp_path)


# ---- kill -9

def start(arguments, world_size):
    """Start pretrain.py on world_size processes, each a session of its own so that kill takes all of it."""
    port, processes = free_port(), []
    for rank in range(world_size):
        env = os.environ | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
                            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(subprocess.Popen([sys.executable, str(ROOT / "pretrain.py"), *arguments], env=env,
                                          text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                          start_new_session=True))
    return processes


def finish(processes):
    """Wait for success."""
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output


def kill_when(processes, condition):
    """kill -9 all processes once condition() holds; False if they ended before."""
    while all(process.poll() is None for process in processes):
        if condition():
            for process in processes:
                os.killpg(process.pid, signal.SIGKILL)
            for process in processes:
                process.communicate()
            return True
        time.sleep(0.0002)
    finish(processes)
    return False


def kill_run(tmp_path, shards, world_size, kills, seed):
    """Kill a run `kills` times, at random steps, every second time inside a checkpoint's write.

    Then compare it with the whole.
    """
    steps = 6 * kills + 12
    flags = [f"--{k}={v}" for k, v in dict(
        data_dir=shards, max_steps=steps, save_every=3, eval_every=6, dropout=0.1, samples=0, eval_rows=2,
        eval_documents=2, optimizer="adamw", micro_batch_size=2, d_model=128, max_seq_len=128,
        device="cpu").items()]
    finish(start(["--smoke", f"--out_dir={tmp_path / 'whole'}", *flags], world_size))
    out, rng, done, in_write = tmp_path / "killed", random.Random(seed), 0, 0
    while done < kills:
        first = not any(out.glob("checkpoints/[0-9]*"))
        arguments = ["--smoke", *flags] if first else ["--resume"]
        log, goal = out / "log.jsonl", rng.randint(1, 6)
        reached = log.read_text().count('"loss"') if log.exists() else 0
        delay = rng.random() * 0.02

        def now():
            if done % 2:
                return any(out.glob("checkpoints/.tmp-*[0-9]"))     # not the removal of an old one
            if log.exists() and log.read_text().count('"loss"') >= reached + goal:
                time.sleep(delay)
                return True
        if not kill_when(start([*arguments, f"--out_dir={out}"], world_size), now):
            break
        in_write += any(out.glob("checkpoints/.tmp-*[0-9]"))
        done += 1
    assert done == kills, f"the run ended after {done} of {kills} kills"
    finish(start(["--resume", f"--out_dir={out}"] if any(out.glob("checkpoints/[0-9]*"))
                 else ["--smoke", *flags, f"--out_dir={out}"], world_size))
    print(f"\n{kills} kills on {world_size} ranks, {in_write} inside a checkpoint's write")
    assert losses(out) == losses(tmp_path / "whole") and len(losses(out)) == steps
    assert_identical(state_of(out, steps), state_of(tmp_path / "whole", steps))
    left = [name for name in names(out) if not name.isdigit()]
    assert not left, f"neither scraps nor broken checkpoints after a kill: {left}"


@pytest.mark.parametrize("world_size", [1, 2])
def test_killed_run_is_the_unbroken_run(tmp_path, shards, world_size):
    kill_run(tmp_path, shards, world_size, kills=2, seed=world_size)


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2])
def test_run_killed_20_times_is_the_unbroken_run(tmp_path, shards, world_size):
    kill_run(tmp_path, shards, world_size, kills=20, seed=10 + world_size)
