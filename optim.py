"""The optimizers a run can choose: torch's Adam, AdamW and Muon, and LAMB and LARS by hand.

Every one is a `torch.optim.Optimizer`. The learning rate is set from outside, each step, on every group:
`for group in optimizer.param_groups: group["lr"] = lr`; the schedules are in training.py.

Adam + weight decay is not AdamW: Adam adds weight_decay * w to the gradient (L2, coupled), where the division by
sqrt(v) takes its strength away again; AdamW shrinks w by lr * weight_decay beside the step (Loshchilov & Hutter 2019).
"""

import itertools

import torch

from cli import UserError

OPTIMIZERS = ("adam", "adamw", "muon", "lamb", "lars")
FUSED_DEVICES = {"cpu", "cuda", "mps"}                              # where torch >= 2.10 has one kernel for Adam's step
TRUST_COEFFICIENT = 0.001                                           # of LARS (You et al. 2017)


def parameter_groups(model, weight_decay):
    """Split the parameters into [matrices, with decay; vectors, without], leaving out a group that is empty.

    A norm's gain sets a scale that decay would fight; embeddings are matrices. Tied weights come once, under their
    first name. Each group: `params`, `param_names` in the same order (the key torch uses), `weight_decay`.
    """
    return split(list(model.named_parameters()), weight_decay)      # torch names a shared parameter once


def split(named, weight_decay):
    """The groups of parameter_groups for a list of (name, parameter)."""
    matrices, vectors = [(n, p) for n, p in named if p.ndim >= 2], [(n, p) for n, p in named if p.ndim < 2]
    return [dict(params=[p for _, p in part], param_names=[n for n, _ in part], weight_decay=decay)
            for part, decay in ((matrices, weight_decay), (vectors, 0.0)) if part]


def make_optimizer(name, model, learning_rate, beta1, beta2, eps, weight_decay):
    """Make the optimizer called `name` over all parameters of `model`.

    adam, adamw, lamb use beta1, beta2 and eps as their papers do; lars has momentum beta1, and neither beta2 nor eps;
    muon keeps its own momentum of 0.95, its AdamW part uses beta1, beta2 and eps.
    A step of lr moves a matrix by about lr an entry (adam, adamw), 0.2 lr an entry (muon), lr of its norm (lamb),
    or lr / 1000 of its norm (lars; after momentum lr / 100), so lars wants a rate about 1,000 times AdamW's.
    """
    check(name, learning_rate, beta1, beta2, eps, weight_decay)
    groups = parameter_groups(model, weight_decay)
    adam = dict(lr=learning_rate, betas=(beta1, beta2), eps=eps)
    if name == "adam":
        return torch.optim.Adam(groups, **adam, fused=has_fused(model))
    if name == "adamw":
        return torch.optim.AdamW(groups, **adam, fused=has_fused(model))
    if name == "muon":
        return muon_with_adamw(model, weight_decay, adam)
    if name == "lamb":
        return LAMB(groups, adam)
    return LARS(groups, dict(lr=learning_rate, momentum=beta1, trust_coefficient=TRUST_COEFFICIENT))


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


def muon_with_adamw(model, weight_decay, adam):
    """Muon for the matrices inside the blocks, AdamW for embeddings, head and all vectors (Jordan et al. 2024).

    Muon's step is an orthogonalised momentum: every direction of a matrix moves equally far. "match_rms_adamw" scales
    it by 0.2 sqrt(max(rows, columns)), to the size of an AdamW step (Liu et al. 2025), so that one lr serves both.
    """
    named = list(model.named_parameters())
    inside = [p.ndim == 2 and "model.layers." in n for n, p in named]       # a wrapper may put its prefix before
    blocks = split(list(itertools.compress(named, inside)), weight_decay)
    others = split([pair for pair, is_inside in zip(named, inside) if not is_inside], weight_decay)
    muon = torch.optim.Muon(blocks, lr=adam["lr"], adjust_lr_fn="match_rms_adamw")
    return Chain(muon, torch.optim.AdamW(others, **adam, fused=has_fused(model)))


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
    """||weight|| / size as a 0-d tensor; 1 for vectors, and where either is 0, so that a zero matrix can move."""
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
    """Adam whose step has, layer by layer, lr times the norm of the weight (You et al. 2020, algorithm 2, arXiv 1904.00962).

        m = beta1 m + (1 - beta1) g          v = beta2 v + (1 - beta2) g^2
        r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)
        w = w - lr * phi(||w||) / ||r + weight_decay w|| * (r + weight_decay w)

    Chosen where the paper leaves it open: bias correction as in its algorithm 2 (some later code drops it); phi(z) = z,
    without bounds; ratio 1 where a norm is 0; vectors (norm gains) take no ratio and no decay, as in the authors' BERT runs.
    """

    def move(self, weight, group):
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
    """SGD whose rate is set, layer by layer, by ||weight|| / ||gradient|| (You et al. 2017, algorithm 1, arXiv 1708.03888).

        rate = trust_coefficient * ||w|| / (||g|| + weight_decay ||w||)
        v = momentum v + lr * rate * (g + weight_decay w)
        w = w - v

    Chosen: lr stands inside the momentum, as in the paper (torch's SGD has it outside, which differs while lr changes);
    decay is coupled, and since clipped gradients are small beside the weights, wants about 1e-4, not AdamW's 0.1;
    the ratio of norms is 1 for vectors and where a norm is 0, the coefficient stays, so one lr serves all.
    """

    def move(self, weight, group):
        decay, state = group["weight_decay"], self.state[weight]
        if not state:
            state.update(momentum_buffer=torch.zeros_like(weight))
        size = weight.grad.norm() + decay * weight.norm()
        rate = group["lr"] * group["trust_coefficient"] * trust_ratio(weight, size)
        state["momentum_buffer"].mul_(group["momentum"]).add_(rate * (weight.grad + decay * weight))
        weight.sub_(state["momentum_buffer"])
