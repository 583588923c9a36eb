"""Schedules, the batch ramp, accumulation over micro-batches and ranks, clipping, skipped steps, the log."""

import json
import math
from dataclasses import replace

import pytest
import torch
from ranks import on_ranks

import training
from cli import UserError
from model import IGNORE_INDEX, LanguageModel, ModelConfig
from pretrain import PRESETS, PretrainConfig, built_in_data, train, verdict
from training import (DTYPES, MetricLog, NonFinite, Ranks, TrainingConfig, accumulate, batch_sizes, check,
                      clip_and_step, intervals, loss_scaler, lr_at, pick_dtype)

TINY = ModelConfig(vocab_size=50, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=16)


# ---- schedules

def curve(schedule, **changes):
    config = replace(TrainingConfig(schedule=schedule, max_steps=100, warmup_steps=10, learning_rate=2.0,
                                    min_lr=0.1), **changes)
    return [lr_at(step, config) for step in range(101)]


def test_schedules_by_hand():
    """Points computed by hand: the warmup, the middle and the end of each shape; peak 2, floor 0.2."""
    for schedule in training.SCHEDULES:
        lr = curve(schedule)
        assert (lr[0] == pytest.approx(0.2) and lr[4] == pytest.approx(1.0)
                and lr[9] == lr[10] == 2.0), schedule
        assert lr[100] == pytest.approx(2.0 if schedule == "constant" else 0.2), schedule
        assert all(a >= b for a, b in zip(lr[10:], lr[11:])), schedule
    assert curve("cosine")[55] == pytest.approx(1.1)                    # half way: the mean of peak and floor
    assert curve("cosine")[10 + 30] == pytest.approx(0.2 + 1.8 * 0.75)  # (1 + cos 60 degrees) / 2
    assert curve("linear")[55] == pytest.approx(1.1)
    assert curve("polynomial")[55] == pytest.approx(0.2 + 1.8 * 0.25)
    assert curve("polynomial", decay_power=1.0) == pytest.approx(curve("linear"))
    assert curve("wsd")[80] == 2.0 and curve("wsd")[90] == pytest.approx(1.1)
    assert set(curve("constant")[10:]) == {2.0}


def test_schedule_against_torch():
    """Cosine is torch's CosineAnnealingLR behind a linear warmup."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=2.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=0.2)
    for want in curve("cosine")[10:]:
        assert optimizer.param_groups[0]["lr"] == pytest.approx(want)
        optimizer.step()
        cosine.step()


def test_batch_ramp():
    """GPT-3's ramp listed step by step: multiples of the start, by the number of tokens before the step."""
    config = TrainingConfig(max_steps=30, batch_size=16, batch_size_start=4, ramp_tokens=100 * 8)
    sizes, tokens = batch_sizes(config, 8), 0
    for size in sizes:
        exact = 4 + 12 * tokens / 800
        assert size == (16 if tokens >= 800 else exact // 4 * 4)
        tokens += size * 8
    assert sizes[0] == 4 and sizes[-1] == 16 and len(set(sizes.tolist())) == 4
    assert batch_sizes(TrainingConfig(batch_size=16), 8) == 16


def test_intervals():
    assert intervals("") == []
    assert intervals("120-140,300") == [(120, 140), (300, 300)]
    for text in ("a", "5-3", "1-2-3", "-4"):
        with pytest.raises(UserError, match="skip_steps"):
            intervals(text)


def test_check_derives_the_micro_batch():
    assert check(TrainingConfig(batch_size=32), Ranks(world_size=4)) == 8
    assert check(TrainingConfig(batch_size=32, micro_batch_size=2), Ranks(world_size=4)) == 2
    for changes, words in (({"batch_size": 30}, "4 ranks"), ({"micro_batch_size": 3}, "micro_batch_size 3"),
                           ({"batch_size_start": 12}, "multiple"), ({"schedule": "cos"}, "cosine"),
                           ({"min_lr": 2.0}, "share")):
        with pytest.raises(UserError, match=words):
            check(replace(TrainingConfig(batch_size=32), **changes), Ranks(world_size=4))


# ---- accumulation: any micro-batch, any number of ranks, the same gradient

def ragged_batch(rows=8):
    """Rows in which between 1 and all 16 targets count, so that means of means would be wrong."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (rows, 16), generator=generator)
    targets = torch.randint(0, 50, (rows, 16), generator=generator)
    for b in range(rows):
        targets[b, 1 + 2 * b:] = IGNORE_INDEX
    return ids, targets


def gradients(ranks, micro_batch_size):
    torch.manual_seed(0)
    model = LanguageModel(TINY)
    forward = training.wrap(model, TrainingConfig(compile=False), ranks)
    ids, targets = ragged_batch()
    count = (targets != IGNORE_INDEX).sum()
    mine = slice(ranks.rank * len(ids) // ranks.world_size, (ranks.rank + 1) * len(ids) // ranks.world_size)
    loss = accumulate(forward, lambda m, i, t: m(i, t), (ids[mine], targets[mine]), micro_batch_size, count,
                      ranks, loss_scaler(ranks), seed=0, step=0)
    return ranks.sum(loss.clone()).item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def whole_batch_gradients():
    """The second telling: one mean over all counted targets, one backward."""
    torch.manual_seed(0)
    model, (ids, targets) = LanguageModel(TINY), ragged_batch()
    loss = torch.nn.functional.cross_entropy(model(ids).flatten(0, 1), targets.flatten(),
                                             ignore_index=IGNORE_INDEX)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters()}


def assert_same_gradients(found, wanted):
    assert found[0] == pytest.approx(wanted[0], abs=1e-6)
    for name, grad in wanted[1].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-6, rtol=1e-5,
                                   msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4, 8])
def test_gradient_does_not_depend_on_the_micro_batch(micro_batch_size):
    assert_same_gradients(gradients(Ranks(), micro_batch_size), whole_batch_gradients())


def test_mean_of_means_would_be_caught():
    """The fault this guards against, planted: dividing each micro-batch by its own count."""
    torch.manual_seed(0)
    model, (ids, targets) = LanguageModel(TINY), ragged_batch()
    for i, t in zip(ids.split(2), targets.split(2)):
        total, count = model(i, t)
        (total / count / 4).backward()
    with pytest.raises(AssertionError):
        assert_same_gradients((whole_batch_gradients()[0], {n: p.grad for n, p in model.named_parameters()}),
                              whole_batch_gradients())


# ---- ranks: pretraining on two gloo ranks is pretraining on one

def short_run(ranks, data_dir, out_dir, optimizer, steps, micro_batch_size):
    """Losses of every step, and the weights, of `steps` steps of the smoke model in fp32."""
    torch.manual_seed(0)
    config = PretrainConfig(**PRESETS["smoke"] | {
        "data_dir": str(data_dir), "out_dir": str(out_dir), "optimizer": optimizer, "max_steps": steps,
        "dtype": "fp32", "learning_rate": {"lars": 1.0, "lamb": 1e-2}.get(optimizer, 2e-3),
        "micro_batch_size": micro_batch_size, "eval_every": 1000, "save_every": 1000, "eval_rows": 2,
        "eval_documents": 2, "samples": 0, "weight_decay": 1e-2})
    model = train(config, ranks)
    lines = [json.loads(line) for line in open(f"{out_dir}/log.jsonl", encoding="utf-8")]
    return [line["loss"] for line in lines if "loss" in line], model.state_dict()


def runs_on(ranks, data_dir, out, optimizers, steps, micro_batch_size):
    return {name: short_run(ranks, data_dir, f"{out}/{name}-{ranks.world_size}", name,
                            steps if name != "muon" else 1, micro_batch_size) for name in optimizers}


def gradients_on(ranks, micro_batch_sizes):
    return [gradients(ranks, size) for size in micro_batch_sizes]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards of the built-in text."""
    out = tmp_path_factory.mktemp("shards")
    return built_in_data(PretrainConfig(out_dir=str(out)), Ranks())


def test_two_ranks_give_the_gradient_of_one(tmp_path):
    for rank in on_ranks(2, gradients_on, TrainingConfig(device="cpu", dtype="fp32", compile=False),
                         ([1, 2, 4],), tmp_path):
        for found in rank:
            assert_same_gradients(found, whole_batch_gradients())


def test_two_ranks_train_as_one(tmp_path, shards, steps=20):
    """The loss of every step and the weights at the end, AdamW, LAMB and LARS; Muon after one update."""
    optimizers = ["adamw", "lamb", "lars", "muon"]
    config = TrainingConfig(device="cpu", dtype="fp32", compile=False)
    one = runs_on(Ranks(), shards, tmp_path, optimizers, steps, 0)
    two = on_ranks(2, runs_on, config, (shards, str(tmp_path), optimizers, steps, 2), tmp_path)
    for name in optimizers:
        tolerance = 1e-2 if name == "muon" else 1e-5
        assert len(one[name][0]) == (steps if name != "muon" else 1)
        assert two[0][name][0] == pytest.approx(one[name][0], rel=tolerance), name
        assert one[name][0][-1] < one[name][0][0] or name == "muon", f"{name} does not learn"
        for key, weight in one[name][1].items():
            torch.testing.assert_close(two[0][name][1][key], two[1][name][1][key], atol=0, rtol=0)
            difference = (two[0][name][1][key] - weight).norm() / weight.norm()
            assert difference < 2 * tolerance, (name, key, difference)


@pytest.mark.full
def test_two_ranks_train_as_one_for_50_steps(tmp_path, shards):
    test_two_ranks_train_as_one(tmp_path, shards, steps=50)


# ---- precision, clipping, steps that are not taken

def test_auto_dtype_is_what_the_hardware_runs_well():
    cpu = torch.device("cpu")
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert pick_dtype("auto", cpu) == (torch.bfloat16 if native else torch.float32)
    assert [pick_dtype(name, cpu) for name in DTYPES] == [torch.float32, torch.bfloat16, torch.float16]
    with pytest.raises(UserError, match="fp32, bf16, fp16"):
        pick_dtype("int8", cpu)


def one_step(ranks, scaler, poison=False):
    """One AdamW step of the tiny model; poison puts an infinity into a gradient as an overflow would."""
    torch.manual_seed(0)
    model, (ids, targets) = LanguageModel(TINY), ragged_batch()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    accumulate(model, lambda m, i, t: m(i, t), (ids, targets), 4, (targets != IGNORE_INDEX).sum(), ranks,
               scaler, 0, 0)
    if poison:
        next(model.parameters()).grad[0, 0] = math.inf
    norm = clip_and_step(optimizer, model.parameters(), scaler, 1.0)
    return norm, {n: p.detach() - before[n] for n, p in model.named_parameters()}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_a_step_in_each_precision(dtype):
    """bf16 and fp16 steps have fp32's gradient norm within rounding; weights and gradients stay fp32."""
    exact, _ = one_step(Ranks(), loss_scaler(Ranks()))
    ranks = Ranks(dtype=dtype)
    norm, moved = one_step(ranks, loss_scaler(ranks))
    assert norm == pytest.approx(
        exact, rel={torch.float32: 1e-6, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype])
    assert all(d.dtype == torch.float32 and d.abs().max() > 0 for d in moved.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_step_that_overflowed_is_not_taken(dtype):
    """Weights and moments stay as they were; fp16's loss scale halves, and grows after enough good steps."""
    ranks = Ranks(dtype=dtype)
    scaler = loss_scaler(ranks)
    before = scaler.get_scale()
    norm, moved = one_step(ranks, scaler, poison=True)
    assert not math.isfinite(norm) and all(d.abs().max() == 0 for d in moved.values())
    assert scaler.get_scale() == (before / 2 if dtype == torch.float16 else 1.0)
    _, moved = one_step(ranks, scaler)
    assert all(d.abs().max() > 0 for d in moved.values())


def test_fp16_scale_leaves_the_gradient_as_it_is():
    """Scaled by 65,536 and back: the step equals the unscaled one's, clipping included."""
    ranks = Ranks(dtype=torch.float16)
    scaled = one_step(ranks, loss_scaler(ranks))
    plain = one_step(ranks, torch.amp.GradScaler("cpu", enabled=False))
    assert scaled[0] == pytest.approx(plain[0], rel=0.02)


def test_clipping_is_the_definition():
    weight = torch.nn.Parameter(torch.zeros(2))
    for limit, want in ((1.0, [-0.6, -0.8]), (0.0, [-3.0, -4.0]), (10.0, [-3.0, -4.0])):
        weight.data.zero_()
        weight.grad = torch.tensor([3.0, 4.0])
        norm = clip_and_step(torch.optim.SGD([weight], lr=1.0), [weight], loss_scaler(Ranks()), limit)
        assert norm == pytest.approx(5.0) and weight.tolist() == pytest.approx(want, rel=1e-5)
        assert weight.grad is None


def test_a_run_that_only_overflows_ends():
    watch = NonFinite()
    for step in range(training.NONFINITE_STEPS - 1):
        watch.check(math.nan, step)
    watch.check(1.0, 0)
    for step in range(training.NONFINITE_STEPS - 1):
        watch.check(math.inf, step)
    with pytest.raises(UserError, match="learning_rate"):
        watch.check(math.inf, 99)


# ---- the log, and the word on the fit

def test_log_drops_what_a_resumed_run_writes_again(tmp_path):
    config = TrainingConfig(out_dir=str(tmp_path), max_steps=5)
    log = MetricLog(config, Ranks(), 0)
    for step in (1, 2, 3):
        log.step(step, tokens=100, seconds=0.5, loss=1.0 / step, grad_norm=math.nan if step == 2 else 1.0)
    log.close()
    with open(tmp_path / "log.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')                                       # a kill in the middle of a line
    MetricLog(config, Ranks(), 2).close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert lines[0]["tokens_per_second"] == 200 and lines[1]["grad_norm"] is None


def test_verdict_tells_over_and_underfitting():
    falling = [[5.0, 5.0], [4.0, 4.1], [3.5, 3.7]]
    assert verdict(falling[:1]).startswith("first look")
    assert verdict(falling).startswith("still learning")
    assert (verdict(falling + [[3.5, 3.7]]).startswith("level")
            and "underfitting" in verdict(falling + [[3.5, 3.7]]))
    assert verdict(falling + [[3.0, 3.69]]).startswith("memorising")
    assert (verdict(falling + [[2.0, 3.9]]).startswith("overfitting")
            and "evaluation 3" in verdict(falling + [[2.0, 3.9]]))
