"""Optimizers against a few steps by hand in float64, running averages told as sums over the whole past."""

import copy
import math

import pytest
import torch

from cli import UserError
import optim
from optim import OPTIMIZERS, make_optimizer, parameter_groups

BLOCK = {
    "model.layers.0.self_attn.q_proj.weight": (8, 6),
    "model.layers.0.self_attn.o_proj.weight": (6, 8),
    "model.layers.0.mlp.down_proj.weight": (6, 6),
}
OTHER_MATRICES = {"model.embed_tokens.weight": (11, 6), "lm_head.weight": (11, 6)}
MATRICES = BLOCK | OTHER_MATRICES
VECTORS = {
    "model.layers.0.self_attn.q_norm.weight": (4,),
    "model.layers.0.input_layernorm.weight": (6,),
    "model.norm.weight": (6,),
}
BETA1, BETA2, EPS, DECAY = 0.9, 0.95, 1e-6, 0.1
RATES = [0.01, 0.03, 0.002, 0.02, 0.005]
TRUST = 0.001                                                       # LARS's coefficient


def toy(seed=0, tied=False, dtype=torch.float64):
    """A module that has parameters under the names of a Llama, and no forward."""
    generator, root = torch.Generator().manual_seed(seed), torch.nn.Module()
    for name, shape in (MATRICES | VECTORS).items():
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        weight = torch.randn(shape, generator=generator, dtype=torch.float64)
        module.register_parameter(leaf, torch.nn.Parameter(weight.to(dtype)))
    if tied:
        root.lm_head.weight = root.model.embed_tokens.weight
    return root


def make(name, model, learning_rate=0.01, weight_decay=DECAY):
    return make_optimizer(name, model, learning_rate, BETA1, BETA2, EPS, weight_decay)


def draw_gradients(model, steps, seed=1):
    """A list of {name: gradient}, one for each step, their size changing much from step to step."""
    generator = torch.Generator().manual_seed(seed)
    return [{name: torch.randn(p.shape, generator=generator, dtype=torch.float64) * 3.0 ** (t % 3)
             for name, p in model.named_parameters()} for t in range(steps)]


def set_gradients(model, gradients):
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name].to(parameter.dtype)


def train(model, optimizer, gradients, rates):
    for gradient, rate in zip(gradients, rates, strict=True):
        set_gradients(model, gradient)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_bits(got, want):
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


# ---- the algorithms a second time

def discounted(values, beta):
    """The sum of beta^age * value: what m = beta m + value has come to."""
    return sum(beta ** age * value for age, value in enumerate(reversed(values)))


def mean_of_past(values, beta):
    """The average of the past weighted by beta^age: what bias correction makes of a running average."""
    return discounted(values, beta) / sum(beta ** age for age in range(len(values)))


def norm(x):
    return math.sqrt(sum(value * value for value in x.flatten().tolist()))


def adam_direction(past):
    return mean_of_past(past, BETA1) / (mean_of_past([g * g for g in past], BETA2).sqrt() + EPS)


def adam_by_hand(w, gradients, decay, adapt):
    past = []
    for g, lr in zip(gradients, RATES):
        past.append(g + decay * w)
        w = w - lr * adam_direction(past)
    return w


def adamw_by_hand(w, gradients, decay, adapt):
    for t, lr in enumerate(RATES):
        w = w * (1 - lr * decay) - lr * adam_direction(gradients[:t + 1])
    return w


def lamb_by_hand(w, gradients, decay, adapt):
    for t, lr in enumerate(RATES):
        update = adam_direction(gradients[:t + 1]) + decay * w
        w = w - lr * (norm(w) / norm(update) if adapt else 1) * update
    return w


def lars_by_hand(w, gradients, decay, adapt):
    pushes = []
    for g, lr in zip(gradients, RATES):
        ratio = norm(w) / (norm(g) + decay * norm(w)) if adapt else 1
        pushes.append(lr * TRUST * ratio * (g + decay * w))
        w = w - discounted(pushes, BETA1)
    return w


def newton_schulz(x):
    """Muon's five quintic steps to a nearly orthogonal matrix, rounded to bfloat16 wherever torch rounds."""
    def rounded(y):
        return y.bfloat16().double()

    if x.shape[0] > x.shape[1]:
        return newton_schulz(x.T).T
    x = rounded(rounded(x) / rounded(rounded(x).norm()))
    for _ in range(5):
        square = rounded(x @ x.T)
        x = rounded(3.4445 * x + rounded(-4.7750 * square + 2.0315 * square @ square) @ x)
    return x


def muon_by_hand(w, gradients, decay, orthogonalise):
    for t, lr in enumerate(RATES):
        momentum = (1 - 0.95) * discounted(gradients[:t + 1], 0.95)
        step = orthogonalise((1 - 0.95) * gradients[t] + 0.95 * momentum)
        w = w * (1 - lr * decay) - lr * 0.2 * math.sqrt(max(w.shape)) * step
    return w


def polar_by_svd(x):
    """The same iteration in float64 on the singular values alone, without a product of matrices."""
    u, s, vh = torch.linalg.svd(x / norm(x), full_matrices=False)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
    return u @ torch.diag(s) @ vh


BY_HAND = dict(adam=adam_by_hand, adamw=adamw_by_hand, lamb=lamb_by_hand, lars=lars_by_hand)


@pytest.mark.parametrize("name", BY_HAND)
def test_five_steps_by_hand(name):
    model = toy()
    before, gradients = weights(model), draw_gradients(model, len(RATES))
    train(model, make(name, model), gradients, RATES)
    for key, got in weights(model).items():
        is_matrix = key in MATRICES
        want = BY_HAND[name](before[key], [g[key] for g in gradients], DECAY if is_matrix else 0.0, is_matrix)
        torch.testing.assert_close(got - before[key], want - before[key], rtol=1e-9, atol=1e-14, msg=key)


@pytest.mark.parametrize("bf16, orthogonalise, tolerance", [
    (True, newton_schulz, 0.02), (True, polar_by_svd, 0.04), (False, polar_by_svd, 1e-5)])
def test_five_steps_of_muon_by_hand(bf16, orthogonalise, tolerance, monkeypatch):
    """Blocks: within hundredths of the way gone, since bfloat16 has 8 bits; in fp32 exactly.

    The rest: AdamW, exactly.
    """
    monkeypatch.setattr(optim, "computes_bf16", lambda device: bf16)
    model = toy()
    before, gradients = weights(model), draw_gradients(model, len(RATES))
    train(model, make("muon", model), gradients, RATES)
    for key, got in weights(model).items():
        past = [g[key] for g in gradients]
        if key in BLOCK:
            want = muon_by_hand(before[key], past, DECAY, orthogonalise)
            off = norm(got - want) / norm(want - before[key])
            print(f"{key}: off by {off:.4f} of the way")
            assert off < tolerance
        else:
            want = adamw_by_hand(before[key], past, DECAY if key in MATRICES else 0.0, True)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14, msg=key)


@pytest.mark.parametrize("shape", [(48, 32), (32, 48), (40, 40)])
def test_muon_step_is_nearly_orthogonal(shape):
    """Singular values of step / (0.2 lr sqrt(max(rows, columns))) lie in 0.6 to 1.25; its rms is 0.2 lr."""
    model, lr, generator = toy(), 0.01, torch.Generator().manual_seed(0)
    projection = model.get_submodule("model.layers.0.mlp.down_proj")
    projection.weight = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = make("muon", model, lr)
    rank = min(shape)
    u, v = (torch.linalg.qr(torch.randn(n, rank, generator=generator, dtype=torch.float64))[0] for n in shape)
    spread = torch.logspace(0, -1, rank, dtype=torch.float64)         # a gradient far from orthogonal
    projection.weight.grad = u @ torch.diag(spread) @ v.T
    optimizer.step()
    step = -projection.weight.detach() / lr
    values = torch.linalg.svdvals(step / (0.2 * math.sqrt(max(shape))))
    print(f"{shape}: singular values {values.min():.3f} to {values.max():.3f}")
    assert 0.6 < values.min() and values.max() < 1.25
    assert 0.15 < step.square().mean().sqrt() < 0.25


# ---- which parameter gets what

def test_groups_hold_every_parameter_once_and_decay_matrices_only():
    model = toy()
    matrices, vectors = parameter_groups(model, DECAY)
    assert (set(matrices["param_names"]), matrices["weight_decay"]) == (set(MATRICES), DECAY)
    assert (set(vectors["param_names"]), vectors["weight_decay"]) == (set(VECTORS), 0.0)
    for group in (matrices, vectors):
        pairs = zip(group["param_names"], group["params"], strict=True)
        assert all(model.get_parameter(name) is parameter for name, parameter in pairs)
    assert len(parameter_groups(torch.nn.Linear(2, 2, bias=False), DECAY)) == 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_some_parameters_learn_faster(name):
    model = toy()
    optimizer = make_optimizer(name, model, 0.1, BETA1, BETA2, EPS, DECAY,
                               {"norm.weight": 3.0, "lm_head": 5.0})
    optim.set_lr(optimizer, 0.5)
    rates = {n: g["lr"] for g in optimizer.param_groups for n in g["param_names"]}
    assert set(rates) == {n for n, _ in model.named_parameters()}
    for n, rate in rates.items():
        expected = 0.5 * (3 if "norm.weight" in n else 1) * (5 if "lm_head" in n else 1)
        assert rate == expected * (optim.EMBEDDING_LR if name == "muon" and "embed_tokens" in n else 1), n


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero_gradients_shrink_matrices_and_leave_vectors(name):
    model = toy()
    before = weights(model)
    train(model, make(name, model), [{n: torch.zeros_like(w) for n, w in before.items()}] * 3, [0.01] * 3)
    for key, got in weights(model).items():
        assert norm(got) < norm(before[key]) if key in MATRICES else torch.equal(got, before[key]), key


def test_decay_of_adam_is_not_that_of_adamw():
    """With no gradient AdamW multiplies by 1 - lr * decay; Adam steps by lr * sign(w), whatever the decay."""
    zeros = {n: torch.zeros_like(w) for n, w in weights(toy()).items()}
    for decay in (0.5, 0.05):
        coupled, decoupled, before = toy(), toy(), weights(toy())
        train(coupled, make_optimizer("adam", coupled, 0.01, BETA1, BETA2, 1e-15, decay), [zeros], [0.01])
        train(decoupled, make("adamw", decoupled, weight_decay=decay), [zeros] * 3, [0.01, 0.02, 0.03])
        kept = (1 - 0.01 * decay) * (1 - 0.02 * decay) * (1 - 0.03 * decay)
        for key in MATRICES:
            w, far = before[key], before[key].sign()
            torch.testing.assert_close(coupled.get_parameter(key).data, w - 0.01 * far, rtol=0, atol=1e-12)
            torch.testing.assert_close(decoupled.get_parameter(key).data, w * kept, rtol=1e-12, atol=0)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_muon_takes_the_matrices_inside_blocks_under_any_wrapper(prefix):
    model = toy()
    if prefix:
        outer = torch.nn.Module()
        outer.add_module(prefix.strip("."), model)
        model = outer
    optimizer = make("muon", model)
    blocks, *others = optimizer.param_groups
    assert set(blocks["param_names"]) == {prefix + n for n in BLOCK} and "momentum" in blocks
    assert {n for g in others for n in g["param_names"]} == {prefix + n for n in OTHER_MATRICES | VECTORS}
    assert [g["weight_decay"] for g in others] == [DECAY, DECAY, 0.0]
    optim.set_lr(optimizer, 0.5)
    rates = {n.removeprefix(prefix): g["lr"] for g in optimizer.param_groups for n in g["param_names"]}
    assert rates.pop("model.embed_tokens.weight") == 0.5 * optim.EMBEDDING_LR and set(rates.values()) == {0.5}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_tied_weights_move_once(name):
    """The tied matrix goes the way that the embedding of an untied model goes under the same gradient."""
    tied, untied = toy(tied=True), toy()
    assert sum(len(g["params"]) for g in make(name, tied).param_groups) == len(MATRICES | VECTORS) - 1
    gradients = draw_gradients(untied, len(RATES))
    for model in (tied, untied):
        train(model, make(name, model), gradients, RATES)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert torch.equal(tied.lm_head.weight, untied.model.embed_tokens.weight)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_gradient_no_step(name):
    model = toy()
    before, optimizer = weights(model), make(name, model)
    train(model, optimizer, draw_gradients(model, 1), [0.01])
    after = weights(model)
    optimizer.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    optimizer.step()
    assert_same_bits(weights(model), after)
    assert all(not torch.equal(after[n], before[n]) for n in before)


# ---- trust ratio

@pytest.mark.parametrize("name, share", [("lamb", 1.0), ("lars", TRUST)])
def test_first_step_is_a_share_of_the_norm_whatever_the_gradients_size(name, share):
    for scale in (1e-3, 1.0, 1e3):
        model = toy()
        before, gradients = weights(model), draw_gradients(model, 1)[0]
        scaled = {n: g * scale for n, g in gradients.items()}
        train(model, make(name, model, weight_decay=0.0), [scaled], [0.02])
        for key in MATRICES:
            moved = norm(model.get_parameter(key).data - before[key])
            assert moved == pytest.approx(0.02 * share * norm(before[key]), rel=1e-9)


@pytest.mark.parametrize("name", ["lamb", "lars"])
@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_ratio_is_one_where_a_norm_is_zero(name, decay):
    """A zero matrix takes the bare step, a zero gradient without decay none; both at once stay at zero."""
    model, embedding, head, down = toy(), *OTHER_MATRICES, "model.layers.0.mlp.down_proj.weight"
    with torch.no_grad():
        model.get_parameter(embedding).zero_()
        model.get_parameter(down).zero_()
    before, gradients = weights(model), draw_gradients(model, 1)[0]
    gradients[head].zero_()
    gradients[down].zero_()
    train(model, make(name, model, weight_decay=decay), [gradients], [0.02])
    g, after = gradients[embedding], weights(model)
    bare = g / (g.abs() + EPS) if name == "lamb" else TRUST * g
    torch.testing.assert_close(after[embedding], -0.02 * bare, rtol=1e-9, atol=0)
    assert torch.equal(after[down], before[down])
    share = 0.02 * {"lamb": 1.0, "lars": TRUST}[name] if decay else 0.0     # the ratio undoes its size
    torch.testing.assert_close(after[head], before[head] * (1 - share), rtol=1e-9, atol=0)


# ---- state, fused kernels, gradient scaling

@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("tied", [False, True])
def test_resumed_run_is_the_unbroken_run_bit_for_bit(name, tied, tmp_path):
    model = toy(tied=tied, dtype=torch.float32)
    optimizer, gradients = make(name, model), draw_gradients(model, 5)
    train(model, optimizer, gradients[:2], RATES[:2])
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "saved.pt")
    train(model, optimizer, gradients[2:], RATES[2:])

    again = toy(seed=9, tied=tied, dtype=torch.float32)
    resumed = make(name, again, learning_rate=0.5)
    stored = torch.load(tmp_path / "saved.pt", weights_only=True)
    again.load_state_dict(stored["model"])
    resumed.load_state_dict(stored["optimizer"])
    train(again, resumed, gradients[2:], RATES[2:])
    assert_same_bits(weights(again), weights(model))
    ours, theirs = resumed.state_dict(), optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"] and ours["state"].keys() == theirs["state"].keys()
    for i, state in theirs["state"].items():
        assert_same_bits(*({k: torch.as_tensor(v) for k, v in s.items()} for s in (ours["state"][i], state)))


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("loaded", [False, True])
def test_lr_set_on_the_groups_reaches_every_parameter(name, loaded):
    """With lr 0 a first step moves nothing, with another lr everything; also after a state was loaded."""
    model = toy()
    optimizer = make(name, model, learning_rate=0.5)
    if loaded:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before, gradients = weights(model), draw_gradients(model, 2)
    train(model, optimizer, gradients[:1], [0.0])
    assert_same_bits(weights(model), before)
    train(model, optimizer, gradients[1:], [0.01])
    assert all(not torch.equal(w, before[n]) for n, w in weights(model).items())


@pytest.mark.parametrize("name, plain", [("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)])
def test_fused_is_the_plain_loop(name, plain):
    """fp32, within 1e-6 after 20 steps; the fused kernel repeats itself bit for bit."""
    runs = []
    for fused in (True, True, False):
        model = toy(dtype=torch.float32)
        optimizer = make(name, model)
        assert all(group["fused"] for group in optimizer.param_groups)
        if not fused:
            groups = parameter_groups(model, DECAY)
            optimizer = plain(groups, betas=(BETA1, BETA2), eps=EPS, fused=False, foreach=False)
        train(model, optimizer, draw_gradients(model, 20), RATES * 4)
        runs.append(weights(model))
    assert_same_bits(runs[0], runs[1])
    assert max((runs[0][n] - runs[2][n]).abs().max().item() for n in runs[0]) < 1e-6


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradient_scaler_drives_it(name):
    """A loss scaled by a power of two gives the same bits; one infinite gradient stops every parameter."""
    plain, scaled = toy(dtype=torch.float32), toy(dtype=torch.float32)
    train(plain, make(name, plain), draw_gradients(plain, 1), [0.01])
    optimizer, scaler = make(name, scaled), torch.amp.GradScaler("cpu", init_scale=1024.0)
    before = weights(scaled)
    for spoilt, want in ((True, before), (False, weights(plain))):
        scale = scaler.scale(torch.ones(())).item()
        set_gradients(scaled, {n: g * scale for n, g in draw_gradients(scaled, 1)[0].items()})
        if spoilt:
            scaled.lm_head.weight.grad[0, 0] = float("inf")
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert_same_bits(weights(scaled), want)


# ---- what a user can get wrong

@pytest.mark.parametrize("change, words", [
    (dict(name="sgd"), ["'sgd'", *OPTIMIZERS]),
    (dict(name="AdamW"), ["'AdamW'", *OPTIMIZERS]),
    (dict(beta1=1.0), ["beta1 1.0", "less than 1"]),
    (dict(beta2=-0.1), ["beta2 -0.1", "less than 1"]),
    (dict(learning_rate=-1e-3), ["learning_rate -0.001", "0 or more"]),
    (dict(learning_rate=math.nan), ["learning_rate nan", "0 or more"]),
    (dict(eps=-1.0), ["eps -1.0", "0 or more"]),
    (dict(weight_decay=math.inf), ["weight_decay inf", "0 or more"]),
])
def test_bad_values_are_refused_in_one_line(change, words):
    given = dict(name="lamb", learning_rate=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1) | change
    with pytest.raises(UserError) as error:
        make_optimizer(model=toy(), **given)
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
