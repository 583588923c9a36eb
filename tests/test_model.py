"""model.py told a second time: by loops in float64, by Hugging Face's Llama and Qwen3, and by counting.

Weights are drawn far larger than training starts with (`build`): near zero attention is flat and faults hide.
Shape letters as in model.py.
"""

import cmath
import math

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import model
from cli import UserError
from model import IGNORE_INDEX, INITS, KVCache, LanguageModel, ModelConfig, ScalarModel

SMALL = dict(vocab_size=37, d_model=24, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=40, max_seq_len=32)
SHAPES = {                          # the shapes that every equality below is held on
    "gqa": {},
    "mha": dict(n_kv_heads=4, tie_embeddings=False),
    "mqa": dict(n_kv_heads=1, rope_theta=500.0),
    "qk_norm": dict(qk_norm=True, head_dim=10, tie_embeddings=False, norm_eps=1e-3),
}


def build(kind=LanguageModel, seed=0, **changes):
    """Make a small model in eval mode with large random weights, the norms' included."""
    built = kind(ModelConfig(**{**SMALL, **changes})).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in built.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.3 * noise if weight.ndim == 1 else noise / math.sqrt(weight.shape[1]))
    return built


def random_ids(*shape, seed=1, vocab_size=SMALL["vocab_size"]):
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def gradients(value, built):
    """The gradient of value for each parameter, by name."""
    names, weights = zip(*built.named_parameters())
    return dict(zip(names, torch.autograd.grad(value, weights)))


def assert_close(got, wanted, tolerance=1e-9):
    """Each number within tolerance * (1 + its size); NaN never. (torch.testing takes seconds to import.)"""
    assert got.shape == wanted.shape
    off = (got - wanted).abs()
    assert (off <= tolerance * (1 + wanted.abs())).all(), f"off by {off.max():.3g}"


def assert_same_gradients(got, wanted, tolerance=1e-9):
    """Compare by name; the tolerance is relative to the largest number of each gradient."""
    assert got.keys() == wanted.keys()
    for name in got:
        scale = wanted[name].abs().max()
        assert scale > 0, f"{name} gets no gradient, so this compares nothing"
        off = (got[name] - wanted[name]).abs().max() / scale
        assert off <= tolerance, f"{name} is off by {off:.3g}"


# The decoder by loops: one row, one position, one head at a time, in float64

def slow_norm(x, norm, eps):
    """Divide each vector of x (..., n) by its root mean square, number by number."""
    mean_square = sum(x[..., i] ** 2 for i in range(x.shape[-1])) / x.shape[-1]
    size = (mean_square + eps) ** 0.5
    return torch.stack([x[..., i] * norm.weight[i] / size for i in range(x.shape[-1])], -1)


def slow_rotate(x, position, theta):
    """Turn one head x (K,): its pair n is a complex number, times e^(i * position * theta^(-2 n / K))."""
    half = len(x) // 2
    turned = [torch.complex(x[i], x[i + half]) * cmath.exp(1j * position * theta ** (-i / half))
              for i in range(half)]
    return torch.stack([z.real for z in turned] + [z.imag for z in turned])


def slow_heads(attention, linear, norm, x, doc_ids):
    """The heads of one row x (T, D), normed where qk_norm says so and turned: T lists of (K,)."""
    c, rows = attention.config, []
    for t in range(len(x)):
        heads = (linear.weight @ x[t]).view(-1, c.head_dim)
        heads = slow_norm(heads, norm, c.norm_eps) if c.qk_norm else heads
        rows.append([slow_rotate(head, t - doc_ids.index(doc_ids[t]), c.rope_theta) for head in heads])
    return rows


def slow_attention(attention, x, doc_ids):
    """Attention of one row x (T, D): softmax over the positions up to here of the same document."""
    c = attention.config
    queries = slow_heads(attention, attention.q_proj, attention.q_norm, x, doc_ids)
    keys = slow_heads(attention, attention.k_proj, attention.k_norm, x, doc_ids)
    values = [(attention.v_proj.weight @ row).view(-1, c.head_dim) for row in x]
    rows = []
    for t in range(len(x)):
        seen, heads = [s for s in range(t + 1) if doc_ids[s] == doc_ids[t]], []
        for h in range(c.n_heads):
            g = h * c.n_kv_heads // c.n_heads
            weights = [(queries[t][h] @ keys[s][g] / math.sqrt(c.head_dim)).exp() for s in seen]
            heads.append(sum(w * values[s][g] for w, s in zip(weights, seen)) / sum(weights))
        rows.append(attention.o_proj.weight @ torch.cat(heads))
    return torch.stack(rows)


def slow_swiglu(mlp, x):
    """SwiGLU of x (T, D): the gate z * sigmoid(z) written out."""
    gate = x @ mlp.gate_proj.weight.T
    return (gate / (1 + (-gate).exp()) * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T


def slow_logits(lm, ids, doc_ids):
    """Logits (T, V) of one row of ids (T,)."""
    eps, x = lm.config.norm_eps, lm.model.embed_tokens.weight[ids]
    for block in lm.model.layers:
        x = x + slow_attention(block.self_attn, slow_norm(x, block.input_layernorm, eps), doc_ids)
        x = x + slow_swiglu(block.mlp, slow_norm(x, block.post_attention_layernorm, eps))
    head = lm.model.embed_tokens if lm.config.tie_embeddings else lm.lm_head
    return slow_norm(x, lm.model.norm, eps) @ head.weight.T


def exact_rotary(built):
    """The model in float64, its angles too: made in fp32, they are 1e-7 off, which is enough for training."""
    half, theta = built.config.head_dim // 2, built.config.rope_theta
    angles = torch.tensor([[p * theta ** (-i / half) for i in range(half)]
                           for p in range(built.config.max_seq_len)], dtype=torch.float64)
    for buffer, exact in ((built.model.cos, angles.cos()), (built.model.sin, angles.sin())):
        assert_close(buffer.double(), exact, 1e-5)
    built.double()
    built.model.cos, built.model.sin = angles.cos(), angles.sin()
    return built


def assert_same_part(fast, slow, x, weights):
    """Hold two tellings y(x) together: the value, and the gradient for x and each weight."""
    y, slow_y = fast(x), slow(x)
    assert_close(y, slow_y)
    probe = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(3))
    grads = [torch.autograd.grad((value * probe).sum(), [x, *weights]) for value in (y, slow_y)]
    for got, wanted in zip(*grads):
        assert_close(got, wanted)


def random_stream(*shape, scale=1.0):
    generator = torch.Generator().manual_seed(2)
    return (scale * torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_()


@pytest.mark.parametrize("scale", [1.0, 1e-3])              # at 1e-3 the mean square is below norm_eps
def test_rms_norm(scale):
    lm = build().double()
    block, x = lm.model.layers[0], random_stream(2, 5, 24, scale=scale)
    for norm in (lm.model.norm, block.input_layernorm, block.post_attention_layernorm):
        assert_same_part(norm, lambda x: slow_norm(x, norm, 1e-5), x, [norm.weight])


def test_swiglu():
    mlp = build().double().model.layers[0].mlp
    assert_same_part(mlp, lambda x: slow_swiglu(mlp, x), random_stream(2, 5, 24), list(mlp.parameters()))


@pytest.mark.parametrize("head_dim, theta", [(6, 10_000.0), (2, 10_000.0), (8, 50.0)])
def test_rotate_multiplies_complex_numbers(head_dim, theta):
    built = exact_rotary(build(head_dim=head_dim, rope_theta=theta))
    fast = lambda x: model.rotate(x, built.model.cos[:5], built.model.sin[:5])
    slow = lambda x: torch.stack([torch.stack([slow_rotate(x[0, h, t], t, theta) for t in range(5)])
                                  for h in range(3)])[None]
    assert_same_part(fast, slow, random_stream(1, 3, 5, head_dim), [])


def test_rotary_angles_are_good_to_fp32_at_the_last_position():
    config = ModelConfig(**{**SMALL, "max_seq_len": 2048, "head_dim": 16, "rope_theta": 500.0})
    cos, sin = model.rotary_angles(config)
    assert cos.shape == sin.shape == (2048, 8)
    for i in range(8):
        angle = 2047 * 500.0 ** (-2 * i / 16)
        assert abs(cos[2047, i] - math.cos(angle)) < 2e-4 and abs(sin[2047, i] - math.sin(angle)) < 2e-4


@pytest.mark.parametrize("doc_ids", [[0] * 6, [7, 7, 2, 9, 9, 9]], ids=["one document", "three documents"])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_by_loops(shape, doc_ids):
    lm = exact_rotary(build(**SHAPES[shape]))
    attention = lm.model.layers[1].self_attn
    docs = torch.tensor([doc_ids]) if len(set(doc_ids)) > 1 else None
    positions, mask = lm.model.positions_and_mask(torch.zeros(1, 6), docs, None)
    cos, sin = lm.model.cos[positions].unsqueeze(-3), lm.model.sin[positions].unsqueeze(-3)
    assert_same_part(lambda x: attention(x, cos, sin, mask, None, positions),
                     lambda x: slow_attention(attention, x[0], doc_ids)[None],
                     random_stream(1, 6, 24), list(attention.parameters()))


@pytest.mark.parametrize("doc_ids", [None, [[5, 5, 5, 1, 1, 1, 1], [3, 8, 8, 8, 8, 8, 0]]],
                         ids=["plain", "packed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_decoder_by_loops(shape, doc_ids):
    lm, ids, targets = exact_rotary(build(**SHAPES[shape])), random_ids(2, 7), random_ids(2, 7, seed=4)
    fast = lm(ids, doc_ids=None if doc_ids is None else torch.tensor(doc_ids))
    slow = torch.stack([slow_logits(lm, row, docs) for row, docs in zip(ids, doc_ids or [[0] * 7] * 2)])
    assert_close(fast.detach(), slow.detach())
    loss = lambda logits: -logits.log_softmax(-1).gather(-1, targets[..., None]).sum()
    assert_same_gradients(gradients(loss(fast), lm), gradients(loss(slow), lm))


# Hugging Face with the same weights

HF_SHAPES = {
    "llama gqa tied": dict(),
    "llama gqa untied": dict(tie_embeddings=False, rope_theta=321.0),
    "llama mha tied": dict(n_kv_heads=4, norm_eps=1e-3),
    "llama mha untied": dict(n_kv_heads=4, tie_embeddings=False, head_dim=16),
    "qwen3 untied": dict(qk_norm=True, head_dim=10, tie_embeddings=False, rope_theta=1e6, norm_eps=1e-6),
    "qwen3 tied": dict(qk_norm=True, head_dim=16, n_kv_heads=1),
}


def hugging_face(config):
    """The transformers model of this shape, in eval mode, weights its own."""
    transformers = pytest.importorskip("transformers")
    kind = "Qwen3" if config.qk_norm else "Llama"
    hf_config = getattr(transformers, f"{kind}Config")(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.n_layers, num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads, head_dim=config.head_dim, rms_norm_eps=config.norm_eps,
        max_position_embeddings=config.max_seq_len, tie_word_embeddings=config.tie_embeddings,
        attn_implementation="eager", rope_parameters=dict(rope_type="default", rope_theta=config.rope_theta))
    return getattr(transformers, f"{kind}ForCausalLM")(hf_config).eval()


def hugging_face_twin(lm):
    """The same with lm's state dict, no name changed; a tied head alone is missing, and is the embedding."""
    twin = hugging_face(lm.config)
    loaded = twin.load_state_dict(lm.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert loaded.missing_keys == (["lm_head.weight"] if lm.config.tie_embeddings else [])
    assert (twin.lm_head.weight is twin.model.embed_tokens.weight) == lm.config.tie_embeddings
    return twin


@pytest.mark.parametrize("shape", HF_SHAPES)
def test_logits_loss_and_gradients_equal_hugging_face(shape):
    lm, ids = build(**HF_SHAPES[shape]), random_ids(3, 32)
    twin = hugging_face_twin(lm)
    theirs = twin(ids, labels=ids)
    assert_close(lm(ids).detach(), theirs.logits.detach(), 1e-5)
    total, count = lm(ids[:, :-1], ids[:, 1:])
    assert_close((total / count).detach(), theirs.loss.detach(), 1e-5)
    wanted = gradients(theirs.loss, twin)
    assert_same_gradients(gradients(total / count, lm), wanted, 1e-5)


@pytest.mark.parametrize("shape", HF_SHAPES)
def test_state_dict_names_and_shapes_are_hugging_face_s(shape):
    lm = build(**HF_SHAPES[shape])
    ours = {name: weight.shape for name, weight in lm.state_dict().items()}
    theirs = {name: weight.shape for name, weight in hugging_face(lm.config).state_dict().items()}
    if lm.config.tie_embeddings:                            # theirs lists the one matrix under both names
        theirs.pop("lm_head.weight")
    assert ours == theirs


# KV cache, packing, causality

def decode(lm, cache, ids, n):
    """Logits of the next tokens ids (B, T), of which n are real: an int, or (B,)."""
    logits = lm(ids, cache=cache)
    cache.advance(n)
    return logits


@pytest.fixture(autouse=True)
def small_cache_blocks(monkeypatch):
    """So that a cache of these short texts grows."""
    monkeypatch.setattr(model, "CACHE_BLOCK", 4)


@torch.no_grad()
@pytest.mark.parametrize("blocks", [[1] * 12, [5, 1, 4, 2], [12], [11, 1]], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_logits_equal_the_full_forward(shape, blocks):
    lm, ids = build(**SHAPES[shape]).double(), random_ids(3, 12)
    cache = KVCache(lm.config, 3, 12, dtype=torch.float64)
    cached = torch.cat([decode(lm, cache, part, part.shape[1]) for part in ids.split(blocks, dim=1)], dim=1)
    assert_close(cached, lm(ids))
    assert cache.lengths.tolist() == [12] * 3


def ragged_step(lm, cache, rows, start, step, pad):
    """Feed each row its next step[b] tokens, padded on the right by random ids of seed pad; logits by row."""
    T = max(step)
    block = random_ids(len(rows), T, seed=pad)
    for b, n in enumerate(step):
        block[b, :n] = rows[b, start[b]:start[b] + n]
    logits = decode(lm, cache, block, torch.tensor(step))
    return [logits[b, :n] for b, n in enumerate(step)]


RAGGED_STEPS = {
    "prompts of unequal length, then one token each": [[5, 2, 7, 1]] + [[1] * 4] * 6,
    "rows that stop": [[3, 6, 2, 4], [1, 0, 1, 1], [1, 0, 0, 1], [1, 0, 0, 1], [0, 0, 0, 1]],
    "blocks of unequal length": [[5, 2, 7, 1], [1, 6, 0, 4], [2, 1, 1, 6]],
}


@torch.no_grad()
@pytest.mark.parametrize("steps", RAGGED_STEPS)
@pytest.mark.parametrize("shape", ["gqa", "qk_norm"])
def test_ragged_cached_logits_equal_each_row_alone_whatever_the_pads(shape, steps):
    lm, rows = build(**SHAPES[shape]).double(), random_ids(4, 20)
    for pad in (10, 20):
        cache, seen = KVCache(lm.config, 4, 20, dtype=torch.float64), [[] for _ in rows]
        for step in RAGGED_STEPS[steps]:
            start = cache.lengths.tolist()
            for b, logits in enumerate(ragged_step(lm, cache, rows, start, step, pad)):
                seen[b].append(logits)
        for b, logits in enumerate(seen):
            assert_close(torch.cat(logits), lm(rows[b:b + 1, :cache.lengths[b]])[0])


@torch.no_grad()
def test_the_cache_may_be_filled_to_its_last_place():
    """Rows that overtake one another: a step needs the room of the longest row, not of the longest steps."""
    lm, rows = build(), random_ids(2, 9)
    cache = KVCache(lm.config, 2, 9)
    for step in ([5, 2], [1, 4], [1, 3]):
        ragged_step(lm, cache, rows, cache.lengths.tolist(), step, pad=10)
    assert cache.lengths.tolist() == [7, 9]


@torch.no_grad()
@pytest.mark.parametrize("kept", [[3, 0], [1], [2, 1, 3]], ids=str)
def test_rows_kept_in_the_middle_go_on_as_before(kept):
    lm, rows, step = build().double(), random_ids(4, 12), [5, 2, 7, 1]
    cache = KVCache(lm.config, 4, 12, dtype=torch.float64)
    ragged_step(lm, cache, rows, [0] * 4, step, pad=10)
    cache.keep(torch.tensor(kept))
    assert cache.longest == max(step[b] for b in kept)      # dropping the long rows frees their room
    for i in range(4):
        ids = torch.stack([rows[b, step[b] + i] for b in kept])[:, None]
        logits = decode(lm, cache, ids, 1)
        for row, b in enumerate(kept):
            assert_close(logits[row, 0], lm(rows[b:b + 1, :step[b] + i + 1])[0, -1])


def test_a_cache_longer_than_the_model_is_refused():
    with pytest.raises(UserError, match="33 tokens do not fit into max_seq_len 32"):
        KVCache(ModelConfig(**SMALL), 1, 33)


DOCUMENTS = [[(4, 5), (11, 1), (2, 7), (9, 3)], [(1, 1), (30, 6), (8, 9)]]     # (document id, tokens) a row


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_rows_equal_single_documents(shape):
    lm, ids, targets = build(**SHAPES[shape]).double(), random_ids(2, 16), random_ids(2, 16, seed=5)
    targets[targets < 9] = IGNORE_INDEX
    doc_ids = torch.tensor([[d for d, n in row for _ in range(n)] for row in DOCUMENTS])
    positions, _ = lm.model.positions_and_mask(ids, doc_ids, None)
    assert positions.tolist() == [[i for _, n in row for i in range(n)] for row in DOCUMENTS]
    singles = [part for r, row in enumerate(DOCUMENTS)
               for part in zip(ids[r].split([n for _, n in row]), targets[r].split([n for _, n in row]))]
    assert_close(lm(ids, doc_ids=doc_ids).flatten(0, 1), torch.cat([lm(x[None])[0] for x, _ in singles]))
    total, count = lm(ids, targets, doc_ids=doc_ids)
    alone = [lm(x[None], y[None]) for x, y in singles]
    assert_close(total, sum(t for t, _ in alone), 1e-6)     # the loss is summed in fp32
    assert count == sum(n for _, n in alone) == (targets != IGNORE_INDEX).sum()
    assert_same_gradients(gradients(total, lm), gradients(sum(t for t, _ in alone), lm), 1e-6)


@pytest.mark.parametrize("shape,compiled", [*((shape, False) for shape in SHAPES), ("qk_norm", True)])
def test_packed_rows_by_flex_attention_equal_those_with_a_dense_mask(shape, compiled, monkeypatch):
    """As on a GPU, but by torch's plain telling of it; in one graph, over two of its blocks."""
    lm, ids, targets = build(**SHAPES[shape], max_seq_len=160), random_ids(2, 160), random_ids(2, 160, seed=5)
    doc_ids = (random_ids(2, 160, seed=6) < 2).cumsum(1)
    assert doc_ids[:, -1].min() > 2, "one document only: the mask is not tried"
    want, _ = lm(ids, targets, doc_ids)
    monkeypatch.setattr(model, "skips_blocks", lambda *shape: True)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *qkv: None)      # no gradients on a CPU
    _, mask = lm.model.positions_and_mask(ids, doc_ids, None)
    assert isinstance(mask, flex_attention.BlockMask)
    torch._dynamo.reset()
    forward = torch.compile(lm, backend="aot_eager", fullgraph=True) if compiled else lm
    got, _ = forward(ids, targets, doc_ids)
    assert_close(got, want, 1e-6)
    assert_same_gradients(gradients(got, lm), gradients(want, lm), 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("changed", [0, 4, 11])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_later_token_changes_no_earlier_logit(shape, changed):
    lm, ids = build(**SHAPES[shape]).double(), random_ids(2, 12)
    other = ids.clone()
    other[:, changed] = (ids[:, changed] + 1) % SMALL["vocab_size"]
    before, after = lm(ids), lm(other)
    assert_close(after[:, :changed], before[:, :changed])
    assert ((after - before)[:, changed:].abs().amax(dim=(0, 2)) > 1e-3).all()


# Losses and log probabilities

def test_token_loss_by_hand():
    logits, targets = 3 * random_stream(2, 4, 7), random_ids(2, 4, vocab_size=7)
    targets[0, 1] = targets[1, 3] = IGNORE_INDEX
    total, count = model.token_loss(logits, targets)
    by_hand = sum(torch.log(sum(math.e ** z for z in logits[b, t])) - logits[b, t, targets[b, t]]
                  for b in range(2) for t in range(4) if targets[b, t] != IGNORE_INDEX)
    assert total.dtype == torch.float32 and count == 6
    assert_close(total.double(), by_hand, 1e-6)
    got, wanted = (torch.autograd.grad(value, logits, retain_graph=True)[0] for value in (total, by_hand))
    assert_close(got, wanted, 1e-6)


def test_token_loss_of_half_precision_logits_is_made_in_fp32():
    logits, targets = (8 * random_stream(64, 50).detach()).bfloat16(), random_ids(64, vocab_size=50)
    wanted = -sum(logits.double()[i].log_softmax(-1)[t] for i, t in enumerate(targets))
    assert_close(model.token_loss(logits, targets)[0].double(), wanted, 1e-6)


def test_no_target_to_learn_gives_zero():
    total, count = build()(random_ids(1, 4), torch.full((1, 4), IGNORE_INDEX))
    assert total == 0 and count == 0


@pytest.mark.parametrize("tokens_at_once", [1, 5, 8, 64])   # of 24; 5 leaves a shorter last chunk
@pytest.mark.parametrize("shape", ["gqa", "mha"])
def test_the_loss_in_chunks_equals_that_of_whole_logits(shape, tokens_at_once, monkeypatch):
    lm, ids, targets = build(**SHAPES[shape]).double(), random_ids(2, 12), random_ids(2, 12, seed=6)
    targets[targets < 9] = IGNORE_INDEX
    wanted, count = model.token_loss(lm(ids), targets)
    monkeypatch.setattr(model, "chunk_of_tokens", lambda vocab_size, device: tokens_at_once)
    held, linear = [], torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight, *bias: held.append(
        len(x) if len(weight) == SMALL["vocab_size"] else 0) or linear(x, weight, *bias))
    total, chunked_count = lm(ids, targets)
    assert_close(total, wanted, 1e-6)
    assert chunked_count == count == (targets != IGNORE_INDEX).sum()
    assert_same_gradients(gradients(3 * total, lm), gradients(3 * wanted, lm), 1e-6)
    assert max(held) <= tokens_at_once and sum(held) == count       # made once, of what is learnt alone


@pytest.mark.parametrize("T, S, masked", [(5, 5, False), (11, 11, True), (1, 9, True), (4, 9, True)])
def test_attention_in_bf16_equals_torchs_kernel(T, S, masked, monkeypatch):
    monkeypatch.setattr(model, "QUERY_BLOCK", 4)                    # blocks of 4, 4 and 3 of 11
    q, k, v = (random_stream(2, heads, n, 8).detach().bfloat16().requires_grad_()
               for heads, n in ((6, T), (2, S), (2, S)))
    later = torch.arange(S) <= torch.arange(S - T, S)[:, None]                  # (T, S)
    mask = torch.stack([later, later & (torch.arange(S) != 2) | torch.eye(T, S, dtype=torch.bool)])[:, None]
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *wide, attn_mask=mask if masked else later, enable_gqa=True)
    got = model.attend(q, k, v, mask if masked else None)
    assert got.dtype == torch.bfloat16 and got.shape == wanted.shape
    assert_close(got.double(), wanted, 0.03)
    weights = random_stream(*got.shape).detach()
    for mine, theirs in zip(torch.autograd.grad((got * weights).sum(), (q, k, v)),
                            torch.autograd.grad((wanted * weights).sum(), wide)):
        assert_close(mine.double(), theirs, 0.06)


@pytest.mark.parametrize("vocab_size, device, tokens", [
    (1024, "cpu", 1024), (4096, "cpu", 256), (128_000, "cpu", 256), (4096, "cuda", 8192),
    (128_000, "cuda", 262)])
def test_tokens_whose_logits_are_held_at_once(vocab_size, device, tokens):
    assert model.chunk_of_tokens(vocab_size, torch.device(device)) == tokens


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_token_logprobs_by_loops(temperature):
    logits, ids = 3 * random_stream(2, 5, 7), random_ids(2, 5, vocab_size=7)
    got = model.token_logprobs(logits, ids, temperature)
    assert got.shape == (2, 4) and got.dtype == torch.float32
    wanted = torch.stack([torch.stack([(logits[b, t] / temperature).softmax(-1)[ids[b, t + 1]].log()
                                      for t in range(4)]) for b in range(2)])
    assert_close(got.double(), wanted, 1e-5)
    assert_close(*(torch.autograd.grad(x.sum(), logits, retain_graph=True)[0] for x in (got, wanted)), 1e-5)
    if temperature == 1.0:
        assert_close(-got.sum(), model.token_loss(logits[:, :-1], ids[:, 1:])[0], 1e-5)


# The scalar model

def test_scalar_model_reads_one_number_a_position():
    scalar, ids = build(ScalarModel).double(), random_ids(2, 6)
    scalar.score_mean.fill_(0.25), scalar.score_std.fill_(3.0)
    by_hand = (torch.stack([row @ scalar.score.weight[0] for row in scalar.model(ids)]) - 0.25) / 3
    assert_close(scalar(ids), by_hand, 1e-6)


@torch.no_grad()
def test_score_response_reads_the_last_real_token_whatever_the_pads():
    scalar, ids, lengths = build(ScalarModel).double(), random_ids(4, 9), torch.tensor([9, 1, 4, 6])
    scalar.score_mean.fill_(-0.5), scalar.score_std.fill_(2.0)
    scores = scalar.score_response(ids, lengths)
    alone = torch.stack([scalar(row[None, :n])[0, -1] for row, n in zip(ids, lengths)])
    assert_close(scores, alone, 1e-6)
    padded = torch.where(torch.arange(9) < lengths[:, None], ids, random_ids(4, 9, seed=7))
    assert_close(scalar.score_response(padded, lengths), scores, 1e-6)


def test_scalar_state_dict_shares_the_language_model_s_names():
    scalar, lm = build(ScalarModel), build()
    own = {name: tuple(tensor.shape) for name, tensor in scalar.state_dict().items()
           if not name.startswith("model.")}
    assert own == {"score.weight": (1, SMALL["d_model"]), "score_mean": (), "score_std": ()}
    assert {n for n in scalar.state_dict() if n.startswith("model.")} == set(lm.state_dict())
    scalar.model.load_state_dict(lm.model.state_dict())


# Initialisation

def expected_sd(name, config):
    """What init_weights promises, the fans of each matrix written down by its part's name."""
    if "embed_tokens" in name:
        return 0.02
    if name == "score.weight":
        return (config.d_model + 1) ** -0.5
    D, F_, K = config.d_model, config.d_ff, config.head_dim
    HK, GK = config.n_heads * K, config.n_kv_heads * K
    fans = {"q_proj": (D, HK), "k_proj": (D, GK), "v_proj": (D, GK), "o_proj": (HK, D), "gate_proj": (D, F_),
            "up_proj": (D, F_), "down_proj": (F_, D), "lm_head": (D, config.vocab_size)}
    part = name.split(".")[-2]
    fan_in, fan_out = fans[part]
    sd = {"normal": 0.02, "xavier": (2 / (fan_in + fan_out)) ** 0.5, "he": (2 / fan_in) ** 0.5}[config.init]
    branch = 1 if config.init == "normal" else 0.02
    return sd * branch / (2 * config.n_layers) ** 0.5 if part in ("o_proj", "down_proj") else sd


@pytest.mark.parametrize("kind", [LanguageModel, ScalarModel])
@pytest.mark.parametrize("init", INITS)
def test_weights_start_as_the_scheme_says(init, kind):
    torch.manual_seed(0)
    built = kind(ModelConfig(vocab_size=300, d_model=96, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=32,
                             d_ff=200, tie_embeddings=False, qk_norm=True, init=init))
    for name, weight in built.named_parameters():
        if weight.ndim == 1:
            assert (weight == 1).all(), name
            continue
        unit = weight.detach().double() / expected_sd(name, built.config)
        error = unit.numel() ** -0.5                        # standard errors: 1, sqrt(2) and sqrt(24) of this
        assert abs(unit.mean()) < 5 * error, name
        assert abs(unit.pow(2).mean() - 1) < 5 * 2 ** 0.5 * error, name
        assert abs((unit ** 4).mean() - 3) < 0.2 + 6 * 96 ** 0.5 * error, f"{name} is not Gaussian"


def test_the_same_seed_starts_the_same_weights():
    def start(seed):
        torch.manual_seed(seed)
        return torch.cat([w.detach().flatten() for w in LanguageModel(ModelConfig(**SMALL)).parameters()])
    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))


def scale_residual_projections(lm, factor):
    with torch.no_grad():
        for name, weight in lm.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_(factor)


def sizes_through_depth(init, n_layers=24, undo_depth_scaling=False):
    """Largest over smallest through depth: rms of the stream, embedding included; a block's gradient norm."""
    torch.manual_seed(0)
    lm = LanguageModel(ModelConfig(vocab_size=256, d_model=128, n_layers=n_layers, n_heads=4, n_kv_heads=2,
                                   d_ff=344, max_seq_len=32, init=init))
    if undo_depth_scaling:
        scale_residual_projections(lm, math.sqrt(2 * n_layers))
    streams, rms = [], lambda output: output.detach().pow(2).mean().sqrt()
    for part in (lm.model.embed_tokens, *lm.model.layers):
        part.register_forward_hook(lambda module, args, output: streams.append(rms(output)))
    total, count = lm(random_ids(4, 32, vocab_size=256), random_ids(4, 32, seed=8, vocab_size=256))
    (total / count).backward()
    blocks = [torch.cat([w.grad.flatten() for w in block.parameters()]).norm() for block in lm.model.layers]
    return max(streams) / min(streams), max(blocks) / min(blocks)


@pytest.mark.parametrize("init", INITS)
def test_activations_and_gradients_keep_their_size_through_24_layers(init):
    """Within a factor of 3 (stream) and 4 (gradients); without the 1 / sqrt(2 L) both leave the band.

    The gradient of a pre-norm block goes with 1 / (rms of its stream), so both fail when the branches add up
    to far more than the embedding they are added to.
    """
    stream, gradient = sizes_through_depth(init)
    assert stream < 3 and gradient < 4
    stream, gradient = sizes_through_depth(init, undo_depth_scaling=True)
    assert stream > 4 and gradient > 4


# Counts

COUNTED = {
    "default": {},
    "untied": dict(SMALL, tie_embeddings=False),
    "own head_dim, qk_norm": dict(SMALL, head_dim=10, qk_norm=True, n_kv_heads=1),
    "all of it": dict(vocab_size=101, d_model=30, n_layers=3, n_heads=6, n_kv_heads=3, head_dim=8, d_ff=17,
                      qk_norm=True, tie_embeddings=False),
}


@pytest.mark.parametrize("shape", COUNTED)
def test_count_params_equals_the_model_s_own(shape):
    lm = LanguageModel(ModelConfig(**COUNTED[shape]))
    counts = model.count_params(lm.config)
    embedding = lm.model.embed_tokens.weight.numel()
    matrices = sum(w.numel() for name, w in lm.named_parameters() if w.ndim == 2 and "embed" not in name)
    tied_head = embedding if lm.config.tie_embeddings else 0
    assert counts == {"all": sum(weight.numel() for weight in lm.parameters()),
                      "embedding": embedding, "matrices": matrices + tied_head}


@pytest.mark.parametrize("shape", COUNTED)
def test_flops_per_token_equals_the_counted_matrix_products(shape):
    """Exactly: SDPA's plain kernel forms the whole T x T square, as the formula does; no product differs."""
    lm, ids = LanguageModel(ModelConfig(**COUNTED[shape])), random_ids(2, 24)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        lm(ids, ids)[0].backward()
    assert counter.get_total_flops() == model.flops_per_token(lm.config, 24) * ids.numel()


def kept_for_backward(lm, ids, dtype):
    """Bytes of all storages that autograd saves in a forward, but for the parameters and tables of angles."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*lm.parameters(), *lm.buffers())}
    kept = {}                       # holds the storages, so that no address is given out twice

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    autocast = torch.autocast("cpu", dtype, enabled=dtype != torch.float32)
    with saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        lm(ids, ids)
    return sum(storage.nbytes() for storage in kept.values())


MEASURED = {                        # config, rows, tokens a row
    "narrow": (dict(vocab_size=64, d_model=64, n_layers=4, d_ff=160, n_heads=4), 4, 64),
    "default": ({}, 2, 256),
    "qk_norm": (dict(vocab_size=500, d_model=128, n_layers=3, d_ff=256, n_heads=4, n_kv_heads=4, head_dim=64,
                     qk_norm=True), 4, 128),
}


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", MEASURED)
def test_training_memory_is_within_a_quarter_of_what_autograd_keeps(shape, dtype):
    """Saved tensors and twice the fp32 logits: backward makes gradients of log-softmax's output and input."""
    changes, rows, tokens = MEASURED[shape]
    lm, ids = LanguageModel(ModelConfig(**changes)), random_ids(rows, tokens)
    part = model.training_memory(lm.config, rows, tokens, activation_bytes=dtype.itemsize)
    measured = kept_for_backward(lm, ids, dtype) + 2 * 4 * ids.numel() * lm.config.vocab_size
    assert 0.8 < part["activations"] / measured < 1.25
    n = sum(weight.numel() for weight in lm.parameters())
    assert (part["weights"], part["gradients"], part["optimizer"]) == (4 * n, 4 * n, 8 * n)


# Errors, dropout

@pytest.mark.parametrize("changes, message", [
    (dict(head_dim=5), "head_dim 5 "),
    (dict(d_model=25), "d_model 25 is not a multiple of n_heads 4"),
    (dict(d_model=12), "head_dim 3 "),
    (dict(n_kv_heads=3), "n_heads 4 is not a multiple of n_kv_heads 3"),
    (dict(n_layers=0), "n_layers 0 must be at least 1"),
    (dict(n_kv_heads=0), "n_kv_heads 0 must be at least 1"),
    (dict(n_heads=0), "n_heads 0 must be at least 1"),
    (dict(d_ff=-1), "d_ff -1 must be at least 1"),
    (dict(max_seq_len=0), "max_seq_len 0 must be at least 1"),
    (dict(head_dim=-2), "head_dim -2 "),
    (dict(dropout=1.0), "dropout 1.0 is not in [0, 1)"),
    (dict(dropout=-0.1), "dropout -0.1 is not in [0, 1)"),
    (dict(init="zeros"), "init 'zeros' is unknown; choose among normal, xavier, he"),
], ids=str)
def test_impossible_shapes_are_refused_in_one_line(changes, message):
    with pytest.raises(UserError) as error:
        ModelConfig(**{**SMALL, **changes})
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", [LanguageModel, ScalarModel])
def test_an_input_longer_than_the_model_is_refused(kind):
    built = build(kind)
    built(random_ids(1, 32))
    with pytest.raises(UserError, match=r"^33 tokens do not fit into max_seq_len 32"):
        built(random_ids(1, 33))


def test_dropout_follows_the_seed_in_training_and_is_off_in_eval():
    lm, ids = build(dropout=0.25), random_ids(2, 12)

    def train_logits(seed):
        torch.manual_seed(seed)
        return lm.train()(ids)

    assert torch.equal(train_logits(1), train_logits(1)) and not torch.equal(train_logits(1), train_logits(2))
    assert torch.equal(lm.eval()(ids), build()(ids))


def test_dropout_drops_its_share_of_the_embedding_and_of_each_branch():
    torch.manual_seed(0)
    lm, dropped = build(dropout=0.25).train(), []
    dropouts = [lm.model.dropout, *(block.dropout for block in lm.model.layers)]
    for dropout in dropouts:
        dropout.register_forward_hook(lambda module, args, output: dropped.append((args[0], output)))
    lm(random_ids(8, 32))
    assert len(dropped) == 1 + 2 * SMALL["n_layers"]
    for before, after in dropped:
        kept = after != 0
        assert abs(kept.float().mean() - 0.75) < 0.03       # 6,144 numbers: 5 standard errors
        assert_close(after[kept], before[kept] / 0.75, 1e-6)
