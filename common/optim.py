"""
Update rules and parameter groups.

A rule knows nothing of ranks or models: it updates a flat piece of parameters in place.

    rule.slots                     names of the state it keeps per parameter
    rule.unit                      numbers that must stay together (1 = any piece; a whole matrix
                                   for Muon)
    rule.update(param, grad, state, lr, weight_decay, step, grad_scale)
        param, grad, state[slot]: fp32 (N,), N a multiple of unit; step: 1 at the first update; grad
        is used up: divided in place by grad_scale (a float) first, which is how loss scale and
        clipping arrive

`zero1.ShardedOptimizer` decides which piece is whose and calls the rule.
"""

import math
from dataclasses import dataclass

import torch
from torch.optim.adamw import adamw


@dataclass
class Group:
    """Parameters that share a rule and a weight decay. named: list of (name, parameter)."""

    named: list
    rule: object
    weight_decay: float


def parameter_groups(model, optimizer="adamw", weight_decay=0.1, beta1=0.9, beta2=0.95):
    """
    optimizer: adamw, lion or muon -> list of Group. Decay goes to tensors of at least two
    dimensions only. Muon takes the matrices inside the blocks; embeddings, head and vectors stay
    with AdamW. Parameters without requires_grad are left out.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if optimizer not in ("adamw", "lion", "muon"):
        raise ValueError(f"no optimizer is called {optimizer!r}")
    rule = Lion(beta1, beta2) if optimizer == "lion" else AdamW(beta1, beta2)
    groups = []
    if optimizer == "muon":
        # blocks.* of the model, or of one inside it, such as vision.tower.blocks.*
        matrices = [
            (name, p) for name, p in named if p.ndim >= 2 and "blocks" in name.split(".")[:3]
        ]
        # of experts: one matrix each
        for shape in dict.fromkeys(p.shape[-2:] for _, p in matrices):
            same = [(name, p) for name, p in matrices if p.shape[-2:] == shape]
            groups.append(Group(same, Muon(shape), weight_decay))
        taken = {name for name, _ in matrices}
        named = [(name, p) for name, p in named if name not in taken]
    groups.append(Group([(name, p) for name, p in named if p.ndim >= 2], rule, weight_decay))
    groups.append(Group([(name, p) for name, p in named if p.ndim < 2], rule, 0.0))
    return [group for group in groups if group.named]


class AdamW:
    """
    Adam with decoupled weight decay (1711.05101, algorithm 2) by torch's fused kernel: one memory
    pass.
    """

    slots, unit = ("exp_avg", "exp_avg_sq"), 1

    def __init__(self, beta1=0.9, beta2=0.95, eps=1e-8):
        self.beta1, self.beta2, self.eps = beta1, beta2, eps

    def update(self, param, grad, state, lr, weight_decay, step, grad_scale):
        # the kernel counts up by itself
        before = torch.tensor(float(step - 1), device=param.device)
        scale = None if grad_scale == 1 else torch.tensor(grad_scale, device=param.device)
        adamw(
            [param],
            [grad],
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [before],
            fused=True,
            grad_scale=scale,
            amsgrad=False,
            beta1=self.beta1,
            beta2=self.beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )


class Lion:
    """
    Sign of interpolated momentum (2302.06675, algorithm 2). Wants an lr 3-10 times smaller than
    AdamW.
    """

    slots, unit = ("exp_avg",), 1

    def __init__(self, beta1=0.9, beta2=0.99):
        self.beta1, self.beta2 = beta1, beta2

    def update(self, param, grad, state, lr, weight_decay, step, grad_scale):
        grad.div_(grad_scale)
        momentum = state["exp_avg"]
        param.mul_(1 - lr * weight_decay).add_(
            torch.lerp(grad, momentum, self.beta1).sign_(), alpha=-lr
        )
        momentum.lerp_(grad, 1 - self.beta2)


class Muon:
    """
    Momentum, then the nearest semi-orthogonal matrix by Newton-Schulz (Jordan 2024,
    kellerjordan.github.io/posts/muon). The update is scaled by 0.2 sqrt(max(rows, columns)) so that
    AdamW's lr and weight decay fit (2502.16982, eq. 4).
    """

    slots = ("momentum",)

    def __init__(self, shape, momentum=0.95, newton_schulz_steps=5):
        self.shape, self.unit = tuple(shape), math.prod(shape)
        self.momentum, self.newton_schulz_steps = momentum, newton_schulz_steps

    def update(self, param, grad, state, lr, weight_decay, step, grad_scale):
        grad.div_(grad_scale)
        buffer = state["momentum"].lerp_(grad, 1 - self.momentum)
        nesterov = torch.lerp(grad, buffer, self.momentum).view(-1, *self.shape)
        direction = orthogonalize(nesterov, self.newton_schulz_steps).reshape(-1)
        param.mul_(1 - lr * weight_decay).add_(
            direction, alpha=-lr * 0.2 * math.sqrt(max(self.shape))
        )


def orthogonalize(m, steps=5):
    """
    m (N, rows, columns) -> each matrix with singular values moved to about 1; a zero matrix stays
    zero.
    """
    # the quintic's coefficients: steepest slope at 0 (Jordan 2024)
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = m.shape[-2] > m.shape[-1]
    x = m.mT if tall else m
    x = x.to(torch.bfloat16 if x.is_cuda else x.dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(m.dtype)
