"""
Mixture of experts (2101.03961, 2401.06066) in place of a block's MLP, and its load balance.

    y, routed = MoE(c)(x)                       # (B, T, C); what the router did
    routing = Routing(c)                        # of a model: collects what the routers of its
                                                blocks do
    routing.note([routed], positions)           # after a training forward
    loss = loss + routing.balance_loss() / n_tokens

B sequences, T positions, C channels, N = B T tokens, E experts, k = n_expert_active of them a
token.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from common import dist
from common.layers import MLP, swiglu


class MoE(nn.Module):
    """
    A router sends each token to n_expert_active of E experts and weights their outputs; shared
    experts see every token. Tokens are sorted by expert, so that an expert is a matrix product over
    its own rows: work grows with the active experts, and no token is ever dropped.
    """

    def __init__(self, c):
        super().__init__()
        self.n_active, self.norm_topk = c.n_expert_active, c.norm_topk
        self.router = nn.Parameter(torch.empty(c.n_expert, c.n_embd))
        self.gate_up = nn.Parameter(torch.empty(c.n_expert, 2 * c.d_expert, c.n_embd))
        self.down = nn.Parameter(torch.empty(c.n_expert, c.n_embd, c.d_expert))
        d_shared = c.n_shared_expert * c.d_expert
        self.shared = MLP(c.n_embd, d_shared) if c.n_shared_expert else None
        self.shared_gate = nn.Linear(c.n_embd, 1, bias=False) if c.shared_gate else None
        for weight in (self.router, self.gate_up, self.down):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x):
        """
        x (B, T, C) -> (B, T, C), and routed: the router's probs (N, E), its choices expert (N, k)
        """
        rows = x.reshape(-1, x.shape[-1])
        # bfloat16 would send near ties anywhere
        with torch.autocast(x.device.type, enabled=False):
            probs = F.linear(rows.float(), self.router.float()).softmax(-1)
        weight, expert = probs.topk(self.n_active)  # (N, k) each
        if self.norm_topk:
            weight = weight / weight.sum(-1, keepdim=True)
        y = self.experts(rows, weight, expert).view(x.shape)
        if self.shared is not None:
            shared = self.shared(x)
            if self.shared_gate is not None:
                shared = self.shared_gate(x).sigmoid() * shared
            y = y + shared
        return y, (probs, expert)

    # rows per expert are only known as it runs
    @torch.compiler.disable
    def experts(self, x, weight, expert):
        """x (N, C), weight and expert (N, k) -> sum of the experts' weighted outputs (N, C)"""
        (N, k), C = expert.shape, x.shape[1]
        x = x.to(dist.compute_dtype(x))
        # (N k,) choices, by expert
        order = expert.flatten().argsort(stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(N * k, device=x.device)
        sizes = expert.flatten().bincount(minlength=len(self.router)).tolist()
        h = TakeRows.apply(x, order, back, k)  # (N k, C)
        h = swiglu(GroupedLinear.apply(h, self.gate_up.to(x.dtype), sizes))
        h = GroupedLinear.apply(h, self.down.to(x.dtype), sizes)
        h = TakeRows.apply(h, back, order, 1).view(N, k, C)
        return (h * weight.to(h.dtype)[..., None]).sum(dim=1)

    def idle_parameters(self):
        """Number of weights of experts that a token does not go to"""
        E = len(self.router)
        return (self.gate_up.numel() + self.down.numel()) // E * (E - self.n_active)


class TakeRows(torch.autograd.Function):
    """
    x[order // k] of x (N, C), where order (N k,) is a permutation and back its inverse: -> (N k, C)
    """

    @staticmethod
    def forward(ctx, x, order, back, k):
        ctx.save_for_backward(back)
        ctx.k = k
        return x.index_select(0, order if k == 1 else order // k)

    @staticmethod
    def backward(ctx, grad):
        (back,) = ctx.saved_tensors
        grad = grad.index_select(0, back)  # scattering is slow, on GPUs random
        if ctx.k > 1:
            grad = grad.view(-1, ctx.k, grad.shape[1]).sum(dim=1)
        return grad, None, None, None


class GroupedLinear(torch.autograd.Function):
    """
    x (N, I), its first sizes[0] rows times weight[0].T, the next times weight[1].T, ... -> (N, O)
    """

    @staticmethod
    def forward(ctx, x, weight, sizes):
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        y = x.new_empty(len(x), weight.shape[1])
        for rows, w, out in zip(x.split(sizes), weight, y.split(sizes)):
            torch.mm(rows, w.T, out=out)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dx = dw = None
        grads = grad.split(ctx.sizes)
        if ctx.needs_input_grad[0]:
            dx = torch.empty_like(x)
            for g, w, out in zip(grads, weight, dx.split(ctx.sizes)):
                torch.mm(g, w, out=out)
        if ctx.needs_input_grad[1]:
            dw = torch.empty_like(weight)
            for g, rows, out in zip(grads, x.split(ctx.sizes), dw):
                torch.mm(g.T, rows, out=out)  # zero where there are no rows
        return dx, dw, None


# -----------------------------------------------------------------------------
# load balance


class Routing:
    """What the routers of a model did, until it is asked for. c: resolved ModelConfig"""

    def __init__(self, c):
        self.n_active, self.coef = c.n_expert_active, c.balance_coef
        self.balance = 0.0  # see balance_loss; with a gradient
        # (L, 1 + E) balance and choices by layer
        self.so_far = None

    @torch.compiler.disable
    def note(self, routers, positions, docs=None):
        """
        After a training forward. routers: list by layer of MoE's (probs, expert); positions (B, T):
        0 where a sequence starts; docs (B, T) or None: negative is padding
        """
        starts = positions.flatten() == 0
        sequence = starts.cumsum(0) - 1  # (N,)
        num_sequences = len(positions)
        if docs is not None:
            num_sequences = int(starts.sum())
            sequence = sequence.masked_fill(docs.flatten() < 0, num_sequences)
        layers = [load_balance(*routed, sequence, num_sequences) for routed in routers]
        balance = [layer[0] for layer in layers]
        chosen = torch.stack([layer[1] for layer in layers])  # (L, E)
        self.balance = self.balance + self.coef * sum(balance)
        noted = torch.cat([torch.stack(balance).detach()[:, None], chosen], dim=1)
        self.so_far = noted if self.so_far is None else self.so_far + noted

    def balance_loss(self):
        """
        balance_coef times `load_balance` of the training forwards since the last call, a SUM over
        their tokens and layers, to be divided by all tokens of the step and added to the loss. A
        sequence is a document with its branches, or a row without docs. 0.0 without experts;
        `GPT.train` and `eval` set it to 0.0
        """
        balance, self.balance = self.balance, 0.0
        return balance

    def stats(self):
        """
        -> what routers did since the last call, over all ranks (which call it together): balance,
        mean of `load_balance` a token and layer (1 = even); expert_frac, list by layer of the share
        of the choices that each expert got; dropped tokens, none ever. {} without experts
        """
        if self.so_far is None:
            return {}
        so_far, self.so_far = dist.all_sum(self.so_far), None
        balance, chosen = so_far[:, 0], so_far[:, 1:]
        # choices: tokens times k
        total = chosen.sum(dim=1, keepdim=True).clamp(min=1)
        balance = (balance * self.n_active / total[:, 0]).mean()
        return dict(balance=balance.item(), expert_frac=(chosen / total).tolist(), dropped=0)


def load_balance(probs, expert, sequence, num_sequences):
    """
    How evenly a router spreads its tokens (Switch Transformer, 2101.03961 eq. 4-6, for each
    sequence by itself as in DeepSeek-V3, 2412.19437 eq. 17-20): sum over sequences of T sum_e f_e
    P_e, T tokens, f_e = (choices of e) E / (T k), P_e = mean of e's probability. 1 a token where it
    is even.

    probs (N, E), expert (N, k); sequence (N,) number of the token's, num_sequences or more:
    padding, does not count -> scalar with a gradient in probs, choices of each expert (E,)
    """
    E, k, S = probs.shape[1], expert.shape[1], num_sequences
    sequence = sequence.clamp(max=S)
    sums = probs.new_zeros(S + 1, E).index_add(0, sequence, probs)[:S]  # T P
    choices = (sequence[:, None] * E + expert).flatten()
    chosen = choices.bincount(minlength=(S + 1) * E).view(S + 1, E)[:S]
    tokens = (chosen.sum(dim=1, keepdim=True) / k).clamp(min=1)
    return (chosen * sums / tokens).sum() * E / k, chosen.sum(dim=0)
