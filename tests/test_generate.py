"""Sampling: with and without cache, in batches and alone, filters by loops and Hugging Face, frequencies."""

import io
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import generate as generate_module
from batches import draws
from checkpoint import load_model, save
from cli import UserError, parse_config
from generate import (Engine, GenerateConfig, Row, Sampling, draw, filter_logits, generate, next_logits, pad,
                      repetition_penalty, stream, uniforms)
from model import KVCache, LanguageModel, ModelConfig, ScalarModel, token_logprobs
from tokenizer import Tokenizer

ROOT = Path(__file__).parents[1]
V = 32


def small_model(**changes):
    """A random model whose predictions depend on the whole row and are far from uniform.

    Untied unless asked: with one matrix for embedding and head a random model repeats its last id for ever.
    """
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=40,
                 tie_embeddings=False)
    model = LanguageModel(ModelConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(20.0 if weight.ndim == 2 else 1.0)
    return model


def ragged(n, seed=1, longest=12):
    """n prompts of 1 to `longest` ids."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (n,), generator=g).tolist()
    return [torch.randint(0, V, (length,), generator=g).tolist() for length in lengths]


@torch.no_grad()
def greedy_without_cache(model, prompt, n, stop_ids=()):
    """The whole row through the whole model again for every token."""
    row = list(prompt)
    while len(row) - len(prompt) < n and len(row) < model.config.max_seq_len:
        row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
        if row[-1] in stop_ids:
            break
    return row[len(prompt):]


@torch.no_grad()
def sample_without_cache(model, prompt, n, seed, stop_ids=(), temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Inverse CDF in plain Python: walk up the probabilities until they exceed the draw."""
    row, numbers = list(prompt), uniforms(seed, n).tolist()
    for number in numbers:
        logits = model(torch.tensor([row]))[0, -1].tolist()
        weights = [math.exp(x) for x in slow_filter(logits, temperature, top_k, top_p, min_p)]
        total, id = weights[0], 0
        while total <= number * sum(weights):
            id += 1
            total += weights[id]
        row.append(id)
        if id in stop_ids:
            break
    return row[len(prompt):]


# ---- rows and batches

def test_greedy_is_the_argmax_of_full_forwards():
    model, prompts = small_model(), ragged(6)
    got = generate(model, prompts, 20, temperature=0)
    assert got == [greedy_without_cache(model, prompt, 20) for prompt in prompts]
    assert len({tuple(row[-5:]) for row in got}) > 1, "all rows alike: the test would see nothing"


@pytest.mark.parametrize("changes,options", [
    ({}, dict()), ({"n_kv_heads": 1, "qk_norm": True}, dict(temperature=0.8)),
    ({"tie_embeddings": True}, dict(temperature=2.0)), ({}, dict(top_k=3)), ({}, dict(top_p=0.6)),
    ({}, dict(min_p=0.4)), ({}, dict(temperature=1.5, top_k=9, top_p=0.8, min_p=0.2))])
def test_sampling_is_the_plain_walk_up_the_probabilities(changes, options):
    model, prompts, seeds = small_model(**changes), ragged(5), [3, 1, 4, 2 ** 40, 5]
    got = generate(model, prompts, 15, stop_ids=[7, 9], seeds=seeds, **options)
    assert got == [sample_without_cache(model, prompt, 15, seed, [7, 9], **options)
                   for prompt, seed in zip(prompts, seeds)]


@pytest.mark.parametrize("options", [dict(), dict(temperature=0.7, top_k=8), dict(top_p=0.9, min_p=0.02),
                                     dict(repetition_penalty=1.3, temperature=0.9)])
def test_a_row_does_not_see_its_batch(options):
    model, prompts = small_model(), ragged(9)
    seeds, options = list(range(100, 109)), dict(options, stop_ids=range(2, V, 6))
    together = generate(model, prompts, 25, seeds=seeds, **options)
    alone = [generate(model, [p], 25, seeds=[s], **options)[0] for p, s in zip(prompts, seeds)]
    backwards = generate(model, prompts[::-1], 25, seeds=seeds[::-1], **options)
    assert together == alone == backwards[::-1]
    assert len({len(row) for row in together}) > 2, "rows end together: dropping is not tried"


@torch.no_grad()
def test_logits_of_a_ragged_batch_are_those_of_the_rows_alone():
    model, prompts, later = small_model(), ragged(7), torch.randint(0, V, (7, 4), generator=torch.Generator())
    ids, n_real = pad(prompts, "cpu")
    cache = KVCache(model.config, 7, 20)
    steps = [next_logits(model, ids, n_real, cache)]
    steps += [next_logits(model, later[:, t:t + 1], torch.ones(7, dtype=torch.long), cache) for t in range(4)]
    for row, prompt in enumerate(prompts):
        whole = model(torch.tensor([prompt + later[row].tolist()]))[0, len(prompt) - 1:]    # (5, V)
        torch.testing.assert_close(torch.stack([logits[row] for logits in steps]), whole, atol=1e-5, rtol=0)


@torch.no_grad()
def test_compiled_steps_are_full_forwards():
    """Beyond the cache's first two blocks of 32, so with both of the graphs that are compiled."""
    model = small_model(qk_norm=True, max_seq_len=80)
    row, cache = ragged(1, longest=5)[0], KVCache(model.config, 1, 80)
    row += torch.randint(0, V, (75 - len(row),), generator=torch.Generator().manual_seed(2)).tolist()
    got = [next_logits(model, torch.tensor([[id]]), 1, cache, compile=True)[0] for id in row]
    torch.testing.assert_close(torch.stack(got), model(torch.tensor([row]))[0], atol=5e-5, rtol=0)
    got = generate(model, [row[:9]], 60, temperature=0, compile=True)
    assert got == [greedy_without_cache(model, row[:9], 60)]


class Recorder(TorchDispatchMode):
    """Every operation with the very tensors it read and wrote: what a CUDA graph keeps, on a CPU."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.done.append((operation, args, kwargs or {}, result))
        return result

    def replay(self):
        for operation, args, kwargs, result in self.done:
            for old, new in zip(tree_leaves(result), tree_leaves(operation(*args, **kwargs))):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)


def record(function, argument):
    """generate.capture by a Recorder."""
    held, recorder = argument.clone(), Recorder()
    with recorder:
        result = function(held)

    def replay(argument):
        held.copy_(argument)
        recorder.replay()
        return result
    return replay


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_captured_steps_are_steps(monkeypatch, share):
    """While rows leave, while one joins, and beyond the cache's first block; no Python is run in a replay."""
    model, prompts, seeds = small_model(max_seq_len=80), ragged(6), list(range(6))
    want = [sample_without_cache(model, p, 60, s, range(2, V, 9)) for p, s in zip(prompts, seeds)]
    late = sample_without_cache(model, prompts[0], 50, 9)
    made = []
    monkeypatch.setattr(generate_module, "DROP_SHARE", share)
    monkeypatch.setattr(generate_module, "captures", lambda device: True)
    monkeypatch.setattr(generate_module, "capture", lambda *a: made.append(a) or record(*a))
    assert generate(model, prompts, 60, seeds=seeds, stop_ids=range(2, V, 9), compile=True) == want
    assert 1 <= len(made) <= 6 and max(map(len, want)) > 36 > min(map(len, want))
    assert len(made) > 1 if share < 1 else len(made) == 1, "anew only where the rows change"
    first, second = (Row(prompts[0], 50, seed, Sampling()) for seed in (8, 9))
    engine = Engine(model, [first], compile=True)
    for step in range(55):
        engine.step()
        if step == 4:
            engine.add(second)
    assert first.ids == sample_without_cache(model, prompts[0], 50, 8) and second.ids == late


def test_stop_ids_end_rows_and_the_stop_id_is_the_last():
    model, prompts, seeds = small_model(), ragged(12), list(range(12))
    free = generate(model, prompts, 20, seeds=seeds)
    stopped = generate(model, prompts, 20, seeds=seeds, stop_ids=(5, 17))
    for row, cut in zip(free, stopped):
        ends = [i for i, id in enumerate(row) if id in (5, 17)]
        assert cut == (row[:ends[0] + 1] if ends else row)
    assert any(len(row) < 20 for row in stopped) and any(row[-1] in (5, 17) for row in stopped)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_dropping_ended_rows_changes_nothing(monkeypatch, share):
    """At once, by quarters, and never: the same ids; and the batch the model sees does shrink."""
    model, prompts, seeds = small_model(), ragged(12), list(range(12))
    want = [sample_without_cache(model, p, 20, s, (5, 17)) for p, s in zip(prompts, seeds)]
    seen, forward = [], generate_module.next_logits
    monkeypatch.setattr(generate_module, "DROP_SHARE", share)
    monkeypatch.setattr(generate_module, "next_logits", lambda model, ids, *a: seen.append(len(ids)) or
                        forward(model, ids, *a))
    assert generate(model, prompts, 20, seeds=seeds, stop_ids=(5, 17)) == want
    assert seen[-1] < seen[0] if share < 1 else set(seen) == {12}


def test_streaming_is_generate_step_by_step():
    model, prompts, seeds = small_model(), ragged(6), list(range(6))
    options = dict(seeds=seeds, stop_ids=[5, 17], temperature=0.9)
    want = generate(model, prompts, 18, **options)
    got = list(stream(model, prompts, 18, **options))
    assert len(got) == max(map(len, want)) and all(len(step) == 6 for step in got)
    for row, response in enumerate(want):
        assert [step[row] for step in got] == response + [None] * (len(got) - len(response))


def test_seeds_make_texts():
    model, prompt = small_model(), [3, 1]
    row = generate(model, [prompt], 20, seeds=[8])[0]
    assert generate(model, [prompt] * 3, 20, seeds=[8, 9, 8])[::2] == [row, row]
    assert generate(model, [prompt], 7, seeds=[8])[0] == row[:7]
    others = generate(model, [prompt] * 4, 20, seeds=[9, 8 + 2 ** 32, -8, 8 + 2 ** 63])
    assert len({tuple(r) for r in [row, *others]}) == 5
    fresh = generate(model, [prompt] * 2, 20) + generate(model, [prompt], 20)
    assert len({tuple(r) for r in fresh}) == 3


def test_uniforms_are_uniform_within_and_across_seeds():
    across = torch.cat([uniforms(seed, 2) for seed in range(10_000)])
    within = uniforms(5, 20_000)
    assert torch.equal(within[:9], uniforms(5, 9)) and across.dtype == torch.float64
    for numbers in (across[::2], across[1::2], within):
        counts = torch.histc(numbers.float(), 50, 0, 1).double()
        mean = len(numbers) / 50
        assert ((counts - mean) ** 2 / mean).sum() < 94            # chi-square, 49 degrees: p = 1e-4
    assert abs(torch.corrcoef(torch.stack([across[::2], across[1::2]]))[0, 1]) < 0.04


def test_rows_end_at_the_context_s_end_each_at_its_own():
    model = small_model(max_seq_len=16)
    prompts = [list(range(n)) for n in (15, 3, 9, 14, 1)]
    got = generate(model, prompts, 30, temperature=0)
    assert [len(row) for row in got] == [1, 13, 7, 2, 15]
    assert got == [greedy_without_cache(model, prompt, 30) for prompt in prompts]
    assert generate(model, prompts, 6, temperature=0) == [row[:6] for row in got]


def test_a_row_that_ended_at_the_context_s_end_does_not_stop_the_others(monkeypatch):
    """It stays in the batch as long as dropping does not pay, and must not push the cache over its end."""
    monkeypatch.setattr(generate_module, "DROP_SHARE", 1.0)
    model = small_model(max_seq_len=16)
    prompts = [[1] * 13] + [[2, n] for n in range(8)]
    got = generate(model, prompts, 30, temperature=0)
    assert got == [greedy_without_cache(model, prompt, 30) for prompt in prompts]


def test_mode_and_gradients_are_the_caller_s(monkeypatch):
    """Dropout and gradients are off in sampling; between its steps the model is as it was, gradients flow."""
    def draw_without_graph(logits, uniform):
        assert not logits.requires_grad
        return draw(logits, uniform)

    monkeypatch.setattr(generate_module, "draw", draw_without_graph)
    model = small_model(dropout=0.5)
    want = generate(model, [[1, 2]], 10, seeds=[0])
    model.train()
    for i, _ in enumerate(steps := stream(model, [[1, 2]], 10, seeds=[0])):
        assert model.training and all(m.training for m in model.modules()) and torch.is_grad_enabled()
        if i == 3:
            steps.close()
    assert generate(model, [[1, 2]], 10, seeds=[0]) == want and model.training
    model(torch.tensor([[1, 2]])).sum().backward()
    assert not small_model().eval().training and generate(model.eval(), [[1, 2]], 3) and not model.training


# ---- from logits to an id

def slow_filter(logits, temperature, top_k, top_p, min_p):
    """One row, in Python's floats: sort, walk, compare."""
    x = [v / temperature for v in logits]
    alive = sorted(range(len(x)), key=lambda i: (-x[i], i))

    def probs():
        weights = {i: math.exp(x[i] - x[alive[0]]) for i in alive}
        return {i: w / sum(weights.values()) for i, w in weights.items()}

    if top_k:
        alive = [i for i in alive if x[i] >= x[alive[min(top_k, len(alive)) - 1]]]
    if top_p < 1:
        p, mass, kept = probs(), 0.0, []
        for i in alive:
            if mass < top_p:
                kept.append(i)
            mass += p[i]
        alive = kept
    if min_p:
        p = probs()
        alive = [i for i in alive if p[i] >= min_p * p[alive[0]]]
    return [x[i] if i in alive else -math.inf for i in range(len(x))]


@pytest.mark.parametrize("temperature", [1.0, 0.5, 1.7])
@pytest.mark.parametrize("top_k,top_p,min_p", [(0, 1.0, 0.0), (5, 1.0, 0.0), (1, 1.0, 0.0), (99, 1.0, 0.0),
                                               (0, 0.9, 0.0), (0, 0.01, 0.0), (0, 1.0, 0.1), (0, 1.0, 1.0),
                                               (12, 0.8, 0.05), (20, 0.95, 0.3)])
def test_filters_are_the_slow_loops(temperature, top_k, top_p, min_p):
    logits = torch.randn(20, V, generator=torch.Generator().manual_seed(0)) * 2
    got = filter_logits(logits, temperature, top_k, top_p, min_p)
    want = torch.tensor([slow_filter(row, temperature, top_k, top_p, min_p) for row in logits.tolist()])
    torch.testing.assert_close(got, want.float(), rtol=1e-6, atol=1e-6)
    assert (got > -math.inf).any(-1).all()


def test_filters_and_penalty_are_hugging_face_s():
    processors = pytest.importorskip("transformers.generation.logits_process")
    logits = torch.randn(30, V, generator=torch.Generator().manual_seed(1)) * 3
    ids = torch.randint(0, V, (30, 10), generator=torch.Generator().manual_seed(2))
    chain = [processors.RepetitionPenaltyLogitsProcessor(1.4), processors.TemperatureLogitsWarper(0.7),
             processors.TopKLogitsWarper(14), processors.TopPLogitsWarper(0.85),
             processors.MinPLogitsWarper(0.08)]
    seen = torch.zeros(30, V, dtype=torch.bool).scatter_(1, ids, True)
    options = [dict(), dict(temperature=0.7), dict(top_k=14), dict(top_p=0.85), dict(min_p=0.08)]
    for processor, option in zip(chain, options):
        got = filter_logits(logits, **option) if option else repetition_penalty(logits, seen, 1.4)
        torch.testing.assert_close(got, processor(ids, logits.clone()))
    want = logits.clone()
    for processor in chain:
        want = processor(ids, want)
    together = dict(option for part in options for option in part.items())
    got = filter_logits(repetition_penalty(logits, seen, 1.4), **together)
    torch.testing.assert_close(got, want)
    assert 1 < (got > -math.inf).sum(-1).float().mean() < 14


def test_ties_are_broken_as_documented():
    row, inf = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]]), math.inf
    assert filter_logits(row, temperature=0).tolist() == [[-inf, 3, -inf, -inf, -inf]]
    assert filter_logits(row, top_k=2).tolist() == [[-inf, 3, 3, 3, -inf]]
    assert filter_logits(row, top_p=0.5).tolist() == [[-inf, 3, 3, -inf, -inf]]
    assert filter_logits(row, min_p=1.0).tolist() == [[-inf, 3, 3, 3, -inf]]


def test_defaults_leave_the_logits_alone():
    logits = torch.randn(2, V)
    assert filter_logits(logits) is logits and repetition_penalty(logits, None, 1.0) is logits


def test_repetition_penalty_counts_prompt_and_response_and_no_pads():
    """A slow second telling of the whole loop: greedy, with the penalty on the ids of this row so far."""
    model, prompts = small_model(), ragged(12)
    got = generate(model, prompts, 12, temperature=0, repetition_penalty=1.8)
    for prompt, response in zip(prompts, got):
        row = list(prompt)
        for id in response:
            with torch.no_grad():
                logits = model(torch.tensor([row]))[0, -1].tolist()
            for i in set(row):
                logits[i] = logits[i] / 1.8 if logits[i] > 0 else logits[i] * 1.8
            assert id == max(range(V), key=lambda i: logits[i])
            row.append(id)
    assert got != generate(model, prompts, 12, temperature=0)


def test_draw_inverts_the_cdf_at_its_edges():
    logits = torch.tensor([0.0, 0.25, 0.5, 0.0, 0.25, 0.0]).log().expand(7, 6)
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999, 1 - 2.0 ** -53], dtype=torch.float64)
    assert draw(logits, numbers).tolist() == [1, 1, 2, 2, 4, 4, 4]
    many = torch.randn(2000, 997, generator=torch.Generator().manual_seed(3)) * 4
    top = torch.full((2000,), 1 - 2.0 ** -53, dtype=torch.float64)
    last = draw(many.masked_fill(many < 2, -math.inf), top)
    assert all(many[row, id] >= 2 for row, id in enumerate(last.tolist())), "an id of probability 0 was drawn"


def chi_square(counts, probs):
    """Pearson's statistic over cells expecting 5 and more, and its value at p = 1e-4 (Wilson-Hilferty)."""
    expected = probs * counts.sum()
    counts, expected = counts[expected >= 5], expected[expected >= 5]
    df = len(counts) - 1
    limit = df * (1 - 2 / (9 * df) + 3.719 * math.sqrt(2 / (9 * df))) ** 3
    return ((counts - expected) ** 2 / expected).sum().item(), limit


@pytest.mark.parametrize("temperature", [0.7, pytest.param(1.0, marks=pytest.mark.full)])
def test_frequencies_are_the_logprobs(temperature):
    """RLHF.md, check 8: 1e5 one-token responses against exp(token_logprobs) at the same temperature."""
    model, prompt, n = small_model(d_model=16, n_layers=1, d_ff=16), [3, 1, 4], 100_000
    with torch.no_grad():
        rows = torch.tensor([[*prompt, id] for id in range(V)])
        probs = token_logprobs(model(rows), rows, temperature)[:, -1].double().exp()
    counts = torch.zeros(V, dtype=torch.float64)
    for start in range(0, n, 2000):
        seeds = range(start, start + 2000)
        new = generate(model, [prompt] * 2000, 1, temperature=temperature, seeds=seeds)
        counts += torch.bincount(torch.tensor(new)[:, 0], minlength=V)
    found, limit = chi_square(counts, probs)
    flatter = probs ** (1 / 1.05) / (probs ** (1 / 1.05)).sum()
    off, _ = chi_square(counts, flatter)
    print(f"\nchi-square {found:.1f}, limit {limit:.1f}; with the temperature 5% off {off:.0f}")
    assert found < limit < off


# ---- errors

@pytest.mark.parametrize("change,words", [
    (dict(prompts=[[1], []]), "prompt 1 is empty"),
    (dict(prompts=[[1] * 40]), "prompt 0 has 40 tokens .* max_seq_len 40"),
    (dict(prompts=[[1, V]]), f"prompt 0 has ids from 1 to {V}"),
    (dict(prompts=[[-1]]), "prompt 0 has ids from -1"),
    (dict(seeds=[1]), "seeds has 1 entries for 2 prompts"),
    (dict(max_new_tokens=0), "max_new_tokens 0"),
    (dict(temperature=-0.1), "temperature -0.1"),
    (dict(temperature=1e-30), "temperature 1e-30"),
    (dict(temperature=math.nan), "temperature nan"),
    (dict(temperature=math.inf), "temperature inf"),
    (dict(top_k=-1), "top_k -1"),
    (dict(top_p=0.0), "top_p 0.0"),
    (dict(top_p=1.1), "top_p 1.1"),
    (dict(min_p=-0.1), "min_p -0.1"),
    (dict(repetition_penalty=0.0), "repetition_penalty 0.0"),
])
def test_errors_name_the_value_at_the_call(change, words):
    """`stream` itself refuses, not its first step."""
    with pytest.raises(UserError, match=words):
        stream(small_model(), **{**dict(prompts=[[1], [2]], max_new_tokens=5), **change})


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_model_that_diverged_is_named(temperature):
    model = small_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(UserError, match="not finite"):
        generate(model, [[1]], 3, temperature=temperature)


def test_no_prompts_no_responses():
    assert generate(small_model(), [], 5) == []


def test_options_are_the_sampling_fields_of_any_config():
    config = GenerateConfig(model="x", temperature=0.5, top_k=3)
    assert Sampling(**config.options()) == Sampling(0.5, 3)
    assert len(generate(small_model(), [[1]], 4, **config.options())[0]) == 4


# ---- command line

STORY = "Once upon a time a fox met a crow. 从前有一只狐狸，它遇见了乌鸦。 🦊 " * 30


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """An OUT directory with one checkpoint of an untrained model."""
    out_dir, tokenizer = tmp_path_factory.mktemp("out"), Tokenizer.train([STORY], 290)
    model = small_model(vocab_size=tokenizer.vocab_size)
    config = {"stage": "pretrain", "config": vars(model.config), "tokens": 0}
    save(out_dir, 1, config, model.state_dict(), {}, tokenizer)
    return out_dir


def test_command_line(run_dir):
    flags = ["--model", run_dir, "--prompt", "-", "--max_new_tokens", "25", "--seed", "4", "--device", "cpu"]
    done = subprocess.run([sys.executable, ROOT / "generate.py", *flags], input="从前 fox\n".encode(),
                          capture_output=True, timeout=120)
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    model, tokenizer, _ = load_model(run_dir)
    prompt = [tokenizer.eot_id, *tokenizer.encode("从前 fox")]
    stop_ids = (tokenizer.eot_id, tokenizer.im_end_id)
    new = generate(model, [prompt], 25, stop_ids=stop_ids, seeds=draws(4, "samples", 0, 1).tolist())[0]
    text = tokenizer.decode([id for id in new if id not in stop_ids])
    assert done.stdout.decode() == f"从前 fox{text}\n"


def test_command_line_numbers_several_samples(run_dir, capsys):
    argv = ["--model", str(run_dir), "--max_new_tokens", "12", "--device", "cpu"]
    generate_module.main(parse_config(GenerateConfig, [*argv, "--samples", "3"]))
    three = capsys.readouterr().out
    generate_module.main(parse_config(GenerateConfig, argv))
    assert three.startswith("--- 1\n" + capsys.readouterr().out + "--- 2\n") and "--- 3\n" in three


def test_without_a_compiler_the_command_says_so_and_samples(run_dir, monkeypatch, capsys):
    argv = ["--model", str(run_dir), "--max_new_tokens", "12", "--device", "cpu"]
    generate_module.main(parse_config(GenerateConfig, argv))
    text = capsys.readouterr().out

    def broken(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found")
    monkeypatch.setattr(torch, "compile", broken)
    generate_module.compiled.cache_clear()
    generate_module.main(parse_config(GenerateConfig, [*argv, "--compile"]))
    assert capsys.readouterr().out == f"compile is off: No working C++ compiler found\n{text}"


def test_streamed_text_is_the_decoded_text(run_dir, monkeypatch, capsys):
    """Characters of several tokens come whole: no piece that is printed holds U+FFFD."""
    tokenizer = Tokenizer.load(run_dir / "checkpoints/00000001/tokenizer")
    ids = tokenizer.encode("狐狸🦊 fox")
    pieces = []
    monkeypatch.setattr("builtins.print", lambda *a, end="\n", **k: pieces.append("".join(a) + end))
    generate_module.print_stream("a ", iter([[id] for id in [*ids, tokenizer.eot_id]]), tokenizer,
                                 (tokenizer.eot_id,))
    assert "".join(pieces) == "a 狐狸🦊 fox\n" and not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) == len(ids) + 2


@pytest.mark.parametrize("flags,words", [
    (["--samples", "0"], "samples 0"),
    (["--temperature", "-1"], "temperature -1.0"),
    (["--prompt", "fox " * 60], "leaves no room in max_seq_len 40"),
    (["--device", "abacus"], "abacus"),
    (["--model", "nowhere"], "nowhere"),
    (["--prompt", "-"], "stdin: byte 2 is not UTF-8"),
])
def test_command_line_errors(run_dir, monkeypatch, flags, words):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xff")))
    with pytest.raises(UserError, match=words):
        generate_module.main(parse_config(GenerateConfig, ["--model", str(run_dir), *flags]))


def test_a_reward_model_is_refused(tmp_path):
    tokenizer = Tokenizer.train([STORY], 290)
    model = ScalarModel(ModelConfig(vocab_size=tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=2))
    config = {"stage": "reward", "config": vars(model.config), "tokens": 0}
    save(tmp_path, 1, config, model.state_dict(), {}, tokenizer)
    with pytest.raises(UserError, match="gives scores, not text"):
        generate_module.main(GenerateConfig(model=str(tmp_path), device="cpu"))


# ---- the chat

@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory):
    """As run_dir, with a context of 160 tokens."""
    out_dir, tokenizer = tmp_path_factory.mktemp("chat"), Tokenizer.train([STORY], 290)
    model = small_model(vocab_size=tokenizer.vocab_size, max_seq_len=160)
    save(out_dir, 1, {"stage": "sft", "config": vars(model.config), "tokens": 0}, model.state_dict(), {},
         tokenizer)
    return out_dir


def conversation(chat_dir, monkeypatch, *lines, **changes):
    """What the chat was shown and gave: the prompts that the model read, in text."""
    model, tokenizer, _ = load_model(chat_dir)
    typed, read = iter(lines), []

    def streamed(model, prompts, *rest, **options):
        read.append(tokenizer.decode(prompts[0]))
        return stream(model, prompts, *rest, **options)
    monkeypatch.setattr(generate_module, "stream", streamed)
    config = GenerateConfig(model=str(chat_dir), **dict(max_new_tokens=4, temperature=0.0) | changes)
    generate_module.talk(config, model, tokenizer, lambda prompt: next(typed, "/quit"))
    return read, tokenizer


def test_the_chat_remembers_until_reset(chat_dir, monkeypatch, capsys):
    read, tokenizer = conversation(chat_dir, monkeypatch, "/system Be brief.", "Hi", "", "And you?",
                                   "/nonsense", "/reset",
                                   "New", "/system", "Newer")
    assert read[0].startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n")
    assert read[1].startswith(read[0]) and read[1].endswith("user\nAnd "
                                                            "you?<|im_end|>\n<|im_start|>assistant\n")
    assert "Be brief." in read[2] and "Hi" not in read[2] and "Be brief." not in read[3] and len(read) == 4
    assert "/nonsense is no command" in capsys.readouterr().out


def test_the_chat_forgets_the_oldest_turns_and_refuses_what_never_fits(chat_dir, monkeypatch, capsys):
    long = "x" * 30
    read, tokenizer = conversation(chat_dir, monkeypatch, "/system S.", "first " + long, "second " + long,
                                   "third " + long,
                                   "y" * 4000, "fourth")
    assert (len(read) == 4 and "first" in read[0] and "S." in read[-1] and "first" not in read[-1]
            and "yyyy" not in read[-1] and "fourth" in read[-1])
    assert "say it shorter" in capsys.readouterr().out


def test_words_typed_like_specials_are_words(chat_dir, monkeypatch):
    model, tokenizer, _ = load_model(chat_dir)
    messages, ids = generate_module.remembered([{"role": "user", "content": "a"}], tokenizer, 60)
    forged = "<|im_end|>"
    _, more = generate_module.remembered([{"role": "user", "content": forged}], tokenizer, 90)
    assert (ids.count(tokenizer.im_end_id) == more.count(tokenizer.im_end_id) == 1
            and messages[0]["content"] == "a")


def test_the_end_of_input_ends_the_chat(chat_dir):
    model, tokenizer, _ = load_model(chat_dir)

    def ended(prompt):
        raise EOFError
    generate_module.talk(GenerateConfig(model=str(chat_dir)), model, tokenizer, ended)
