"""The optimizers a run can choose: torch's Adam, AdamW and Muon, and LAMB and LARS by hand.

Each is a `torch.optim.Optimizer` whose lr is set from outside at each step, by `set_lr`.

Adam with weight decay is not AdamW (Loshchilov & Hutter 2019). Adam adds weight_decay * w to the gradient
(L2, coupled) and then divides it by sqrt(v), which takes its strength away; AdamW shrinks w beside the step,
by lr * weight_decay * w.
"""

import math
from contextlib import nullcontext

import torch
from torch.overrides import TorchFunctionMode

from cli import UserError

OPTIMIZERS = ("adam", "adamw", "muon", "lamb", "lars")
EMBEDDING_LR = 4.0                                      # of Muon's AdamW, beside 1 for head and vectors
FUSED_DEVICES = {"cpu", "cuda", "mps"}                  # where torch >= 2.10 has one kernel for Adam's step
TRUST_COEFFICIENT = 0.001                               # of LARS (You et al. 2017)


def parameter_groups(model, weight_decay, lr_scales=None):
    """Split the parameters into groups: matrices, with decay, then vectors, without; none is empty.

    A norm's gain sets a scale that decay would fight; embeddings are matrices. Tied weights come once, under
    their first name. Each group: `params`, `param_names` in the same order (torch's own key), `weight_decay`.
    lr_scales {part of a name: factor}: parameters that learn so many times as fast, in groups of their own
    with that `lr_scale`.
    """
    return split(list(model.named_parameters()), weight_decay, lr_scales or {})     # a shared one comes once


def split(named, weight_decay, lr_scales):
    """The groups of parameter_groups for a list of (name, parameter)."""
    groups = {}
    for name, parameter in named:
        scale = math.prod(factor for part, factor in lr_scales.items() if part in name)
        group = groups.setdefault((parameter.ndim < 2, scale), dict(params=[], param_names=[]))
        group["params"].append(parameter)
        group["param_names"].append(name)
    return [group | {"weight_decay": 0.0 if is_vector else weight_decay}
            | ({} if scale == 1 else {"lr_scale": scale})
            for (is_vector, scale), group in sorted(groups.items(), key=lambda item: item[0])]


def make_optimizer(name, model, learning_rate, beta1, beta2, eps, weight_decay, lr_scales=None):
    """Make the optimizer called `name` over all parameters of `model`.

    lars has beta1 for momentum and no use for beta2 and eps; muon's own momentum is 0.95, its AdamW uses all
    three. One step moves a matrix by about lr an entry (adam, adamw), 0.2 lr an entry (muon), lr of its norm
    (lamb), or lr / 1,000 of its norm (lars; with momentum 0.9 in the long run lr / 100). Small models want
    an lr of 0.003-0.01 with the first three, 0.01-0.03 with lamb, 3-10 with lars. lr_scales: see
    parameter_groups.
    """
    check(name, learning_rate, beta1, beta2, eps, weight_decay)
    groups = parameter_groups(model, weight_decay, lr_scales)
    adam = dict(lr=learning_rate, betas=(beta1, beta2), eps=eps)
    if name == "adam":
        return torch.optim.Adam(groups, **adam, fused=has_fused(model))
    if name == "adamw":
        return torch.optim.AdamW(groups, **adam, fused=has_fused(model))
    if name == "muon":
        return muon_with_adamw(model, weight_decay, adam, lr_scales or {})
    if name == "lamb":
        return LAMB(groups, adam)
    return LARS(groups, dict(lr=learning_rate, momentum=beta1, trust_coefficient=TRUST_COEFFICIENT))


def set_lr(optimizer, lr):
    """Set the lr of all groups; one with a `lr_scale` has that many times as much."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def check(name, learning_rate, beta1, beta2, eps, weight_decay):
    """Refuse an unknown name and numbers outside their range, each with one line."""
    if name not in OPTIMIZERS:
        raise UserError(f"optimizer {name!r} is unknown; choose one of {', '.join(OPTIMIZERS)}")
    for thing, value in dict(beta1=beta1, beta2=beta2).items():
        if not 0 <= value < 1:
            raise UserError(f"{thing} {value} is outside its range; give 0 or more and less than 1")
    for thing, value in dict(learning_rate=learning_rate, eps=eps, weight_decay=weight_decay).items():
        if not 0 <= value < float("inf"):
            raise UserError(f"{thing} {value} is outside its range; give a number that is 0 or more")


def has_fused(model):
    """Whether torch has a fused Adam for every device that the parameters are on."""
    return {parameter.device.type for parameter in model.parameters()} <= FUSED_DEVICES


def muon_with_adamw(model, weight_decay, adam, lr_scales):
    """Give Muon the matrices inside blocks, AdamW embeddings, head and all vectors (Jordan et al. 2024).

    Muon's step is an orthogonalised momentum: every direction of a matrix moves about equally far. One lr
    serves both: "match_rms_adamw" scales by 0.2 sqrt(max(rows, columns)), to AdamW's size (Liu et al. 2025).
    Embeddings move EMBEDDING_LR times as fast: a rare token's row has a gradient in few steps (LOG.md).
    """
    named = list(model.named_parameters())
    inside = {n for n, p in named if p.ndim == 2 and "model.layers." in n}    # under any wrapper's prefix
    blocks = split([(n, p) for n, p in named if n in inside], weight_decay, lr_scales)
    others = split([(n, p) for n, p in named if n not in inside], weight_decay,
                   {"embed_tokens.weight": EMBEDDING_LR} | lr_scales)
    muon = Muon(blocks, lr=adam["lr"], adjust_lr_fn="match_rms_adamw")
    return Chain(muon, torch.optim.AdamW(others, **adam, fused=has_fused(model)))


def computes_bf16(device):
    """Whether the hardware multiplies in bf16; where not, it is emulated, some 50 times slower than fp32."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported()
                                     or torch.cpu._is_amx_tile_supported())


class KeepFloat32(TorchFunctionMode):
    """Inside it, a tensor's .bfloat16() is its copy in fp32."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return function(*args, **(kwargs or {}))


class Muon(torch.optim.Muon):
    """torch's Muon, whose iteration is written in bf16, with that iteration in fp32 where bf16 is slow."""

    def step(self, closure=None):
        with nullcontext() if computes_bf16(self.param_groups[0]["params"][0].device) else KeepFloat32():
            return super().step(closure)


class Chain(torch.optim.Optimizer):
    """Optimizers over different parameters that look like one.

    The parts share this object's groups and state, so zero_grad, state_dict and all that reads an Optimizer
    (gradient scaling, distributed checkpoints) need no second telling.
    """

    def __init__(self, *parts):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.share()

    def share(self):
        """Give every part its slice of the groups, and the one state dict."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    def load_state_dict(self, state_dict):
        """Load, then share again: torch's own puts new groups and a new state in place of the old."""
        super().load_state_dict(state_dict)
        self.share()

    def step(self, closure=None):
        """Let each part move its parameters."""
        assert closure is None
        for part in self.parts:
            part.step()


def trust_ratio(weight, size):
    """Divide ||weight|| by size; 1 for vectors and where either is 0, so that a zero matrix can move."""
    if weight.ndim < 2:
        return 1.0
    norm = weight.norm()
    return torch.where((norm > 0) & (size > 0), norm / size, torch.ones_like(norm))


class Layerwise(torch.optim.Optimizer):
    """What LAMB and LARS share: each parameter with a gradient is one layer and moves by itself."""

    @torch.no_grad()
    def step(self, closure=None):
        """Move every parameter that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.move(weight, group)


class LAMB(Layerwise):
    """Adam whose step has, layer by layer, lr times the weight's norm (You et al. 2020, arXiv 1904.00962).

    Algorithm 2 of the paper, for step t and the gradient g of one layer w:
        m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
        r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        w = w - lr * phi(||w||) / ||r + weight_decay w|| * (r + weight_decay w)

    Chosen here: bias correction, as the algorithm has it (much code drops it); phi(z) = z, where the paper
    allows bounds; the quotient is 1 where a part of it is 0, and for vectors, which take no decay either: the
    paper treats all layers alike, the authors' code for BERT leaves norms and biases out.
    """

    def move(self, weight, group):
        """Take the step above for one layer."""
        (beta1, beta2), state = group["betas"], self.state[weight]
        if not state:
            state.update(step=0, exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
        state["step"] += 1
        state["exp_avg"].lerp_(weight.grad, 1 - beta1)
        state["exp_avg_sq"].lerp_(weight.grad.square(), 1 - beta2)
        m = state["exp_avg"] / (1 - beta1 ** state["step"])
        v = state["exp_avg_sq"] / (1 - beta2 ** state["step"])
        update = m / (v.sqrt() + group["eps"]) + group["weight_decay"] * weight
        weight.sub_(group["lr"] * trust_ratio(weight, update.norm()) * update)


class LARS(Layerwise):
    """SGD with momentum at a rate that goes, by layer, as ||w|| / ||g|| (You et al. 2017, arXiv 1708.03888).

    Algorithm 1 with equation 6 of the paper, for the gradient g of one layer w:
        rate = trust_coefficient * ||w|| / (||g|| + weight_decay ||w||)
        v = momentum v + lr * rate * (g + weight_decay w)
        w = w - v

    Chosen here: lr stands inside the momentum, as in the paper (torch's SGD has it outside, which differs
    while lr changes); the quotient is 1 where a part of it is 0, and for vectors (without decay); they
    keep the coefficient, because the lr of 3-10 that it asks for is much for a bare gain. Decay is
    coupled, and clipped gradients are small beside the weights: it wants about 1e-4, not AdamW's 0.1.
    """

    def move(self, weight, group):
        """Take the step above for one layer."""
        decay, state = group["weight_decay"], self.state[weight]
        if not state:
            state.update(momentum_buffer=torch.zeros_like(weight))
        size = weight.grad.norm() + decay * weight.norm()
        rate = group["lr"] * group["trust_coefficient"] * trust_ratio(weight, size)
        state["momentum_buffer"].mul_(group["momentum"]).add_(rate * (weight.grad + decay * weight))
        weight.sub_(state["momentum_buffer"])
