"""
Losses on hidden states and the output head, a few positions at a time: the logits (B, T, V) are never held
whole.

Everything returns sums or unreduced values; the training script divides once, by the count over all
micro-batches and ranks, so that results do not depend on the layout.
"""
import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from common.dist import compute_dtype
from common.errors import UserError


def chunk_rows(device, n, chunk_size, part=1):
    """
    Positions per chunk: equal chunks of at most 512 on a CPU, 4096 on a GPU, or that part of it. More makes
    better matrix products and takes more memory.
    """
    most = (512 if device.type == "cpu" else 4096) // part
    return chunk_size or -(-n // -(-n // most)) if n else 1


def linear_cross_entropy(hidden, weight, targets, mask=None, token_weight=None, chunk_size=0):
    """
    Sum over positions where mask is True of -log softmax(hidden @ weight.T)[target], times token_weight if
    given.

    hidden (B, T, C) or (N, C), weight (V, C); targets int64, mask bool, token_weight float of hidden's
    leading shape -> scalar float32 SUM. Divide by the global count of targets.

    The gradients are formed in forward, chunk by chunk, while the chunk's softmax is at hand; backward only
    scales them, which is exact because the loss is a scalar. Memory: one chunk of logits and one gradient of
    weight. Sums in fp32; matrix products are in hidden's dtype, or autocast's.
    """
    C = hidden.shape[-1]
    hidden, targets = hidden.reshape(-1, C), targets.reshape(-1)
    scale = None if token_weight is None else token_weight.reshape(-1).float()
    if mask is not None and not mask.all():                   # what does not count is not computed
        counts = mask.reshape(-1).nonzero()[:, 0]
        hidden, targets = hidden[counts], targets[counts]
        scale = None if scale is None else scale[counts]
    # grad mode and autocast are asked here: inside forward the one is off, and out= does not follow the other
    chunk = chunk_rows(hidden.device, len(hidden), chunk_size)
    return _LinearCrossEntropy.apply(hidden, weight, targets, scale, chunk, compute_dtype(hidden),
                                     torch.is_grad_enabled())


def add_gradients(g, h, w, d_hidden, d_weight):
    """g (n, V): d loss / d logits of rows h (n, C) -> into d_hidden (n, C); added to d_weight (V, C)"""
    if d_hidden is not None:
        torch.mm(g, w, out=d_hidden)
    if d_weight is not None and g.dtype == torch.float32:
        d_weight.addmm_(g.T, h)
    elif d_weight is not None:
        d_weight += g.T @ h


def take_gradients(ctx, grad):
    """-> those that forward has left in ctx, scaled by grad in place; for one backward"""
    if ctx.gradients is None:
        raise RuntimeError("a second backward through this loss; the first has scaled its gradients in place")
    gradients, ctx.gradients = ctx.gradients, None
    return [None if g is None else g.mul_(grad).to(dtype) for g, dtype in zip(gradients, ctx.dtypes)]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, scale, chunk, dtype, grad_enabled):
        need_hidden, need_weight = (needed and grad_enabled for needed in ctx.needs_input_grad[:2])
        h_all, w = hidden.to(dtype), weight.to(dtype)
        d_hidden = torch.empty_like(h_all) if need_hidden else None
        d_weight = torch.zeros(weight.shape, device=w.device) if need_weight else None     # summed in fp32
        buffer = w.new_empty(min(chunk, len(h_all)), len(w))
        loss = torch.zeros((), device=w.device)
        for i in range(0, len(h_all), chunk):
            h, target = h_all[i:i + chunk], targets[i:i + chunk, None]
            logits = torch.mm(h, w.T, out=buffer[:len(h)])                                 # (N, V)
            p = logits if dtype == torch.float32 else logits.float()
            torch.softmax(p, dim=-1, out=p)
            p_target = p.gather(1, target)                                                 # (N, 1)
            nll = -p_target.log()
            tiny = p_target[:, 0] < 1e-30                                       # its log would be off, or inf
            if tiny.any():
                again = (h[tiny] @ w.T).float()
                nll[tiny, 0] = F.cross_entropy(again, target[tiny, 0], reduction="none")
            s = None if scale is None else scale[i:i + chunk, None]
            loss += nll.sum() if s is None else (nll * s).sum()
            if need_hidden or need_weight:
                p.scatter_add_(1, target, torch.full_like(p_target, -1.0))
                g = (p if s is None else p.mul_(s)).to(dtype)
                add_gradients(g, h, w, d_hidden[i:i + chunk] if need_hidden else None, d_weight)
        ctx.gradients, ctx.dtypes = (d_hidden, d_weight), (hidden.dtype, weight.dtype)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return *take_gradients(ctx, grad), *[None] * 5


def token_logps(hidden, weight, targets, temperature=1.0, chunk_size=0, suppress=(), kept=None):
    """
    log softmax(hidden @ weight.T / temperature)[target] of every position.

    hidden (B, T, C), weight (V, C), targets (B, T) int64; suppress: ids without probability, as in sampling;
    kept: the only ids with probability, where top-k or top-p has cut the sampler's distribution: ids of all
    positions, one after the other, and how many each has (B * T,) -> (B, T) float32, differentiable in
    hidden and weight; the logits of a chunk are computed again in backward.
    """
    chunk = chunk_rows(hidden.device, targets.numel(), chunk_size)
    suppress = torch.tensor(suppress, dtype=torch.int64, device=hidden.device)
    ids, counts = kept or (suppress[:0], None)
    logps = _TokenLogps.apply(hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1), temperature,
                              chunk, compute_dtype(hidden), suppress, ids, counts)
    return logps.view(targets.shape)


def exclude(x, value, i, suppress, ids, counts):
    """Put value, in place, where positions i .. i + n of x (n, V) have no probability; see `token_logps`"""
    x.index_fill_(1, suppress, value)
    if counts is not None:
        here, first = counts[i:i + len(x)], int(counts[:i].sum())
        row = torch.arange(len(x), device=x.device).repeat_interleave(here)
        out = torch.ones_like(x, dtype=torch.bool)
        out[row, ids[first:first + len(row)].long()] = False
        x.masked_fill_(out, value)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, chunk, dtype, suppress, ids, counts):
        h_all, w = hidden.to(dtype), weight.to(dtype)
        logps, lse = torch.empty(2, len(h_all), device=w.device)
        for i in range(0, len(h_all), chunk):
            logits = (h_all[i:i + chunk] @ w.T).float().div_(temperature)                  # (N, V)
            exclude(logits, -torch.inf, i, suppress, ids, counts)
            lse[i:i + chunk] = logits.logsumexp(-1)
            logps[i:i + chunk] = logits.gather(1, targets[i:i + chunk, None])[:, 0] - lse[i:i + chunk]
        ctx.save_for_backward(hidden, weight, targets, lse, suppress, ids, counts)
        ctx.temperature, ctx.chunk, ctx.dtype = temperature, chunk, dtype
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, targets, lse, suppress, ids, counts = ctx.saved_tensors
        dtype, chunk = ctx.dtype, ctx.chunk
        h_all, w = hidden.to(dtype), weight.to(dtype)
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(h_all) if need_hidden else None
        d_weight = torch.zeros(weight.shape, device=w.device) if need_weight else None
        for i in range(0, len(h_all), chunk):
            h, target = h_all[i:i + chunk], targets[i:i + chunk, None]
            g = grad[i:i + chunk, None] / ctx.temperature
            p = (h @ w.T).float().div_(ctx.temperature).sub_(lse[i:i + chunk, None]).exp_()
            exclude(p, 0.0, i, suppress, ids, counts)
            d_logits = p.mul_(-g).scatter_add_(1, target, g).to(dtype)       # (onehot - p) g / temperature
            if need_hidden:
                torch.mm(d_logits, w, out=d_hidden[i:i + chunk])
            if need_weight:
                d_weight += d_logits.T @ h
        return (d_hidden.to(hidden.dtype) if need_hidden else None,
                d_weight.to(weight.dtype) if need_weight else None, *[None] * 7)


def critical_ids(ids, vocab_size, device):
    """ids: those of the option --critical_ids -> (N,) int64; UserError where one is no token's"""
    for i in ids:
        if not 0 <= i < vocab_size:
            raise UserError(f"--critical_ids={i}: no such token, expected 0 to {vocab_size - 1}")
    return torch.tensor(ids, dtype=torch.int64, device=device)


def critical_weights(targets, critical_ids, alpha):
    """
    Weight alpha on targets listed in critical_ids, 1 elsewhere: the loss becomes sum(w nll) / sum(w).

    targets (B, T), critical_ids (N,) int64, alpha float -> (B, T) float32
    """
    return torch.where(torch.isin(targets, critical_ids), float(alpha), 1.0)


# -----------------------------------------------------------------------------
# distillation: a student's distribution over the vocabulary against a teacher's

def kd_loss(student_logits, teacher_logits, temperature=1.0, kind="forward", jsd_beta=0.5):
    """
    temperature^2 times the divergence of the student's distribution q from the teacher's p, both at that
    temperature, of every position. The square keeps the gradient's size as the temperature grows (Hinton et
    al., 1503.02531, section 2). For logits that may be held whole; else `linear_kd_loss`.

    student_logits, teacher_logits (B, T, V) -> (B, T), unreduced

    forward   KL(p || q): the student covers what the teacher may say
    reverse   KL(q || p): the student keeps to what the teacher is likely to say (MiniLLM, 2306.08543)
    jsd       b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, b = jsd_beta in (0, 1): generalised
              Jensen-Shannon divergence (GKD, 2306.13649 eq. 1)
    """
    log_q, log_p = ((logits / temperature).log_softmax(-1) for logits in (student_logits, teacher_logits))
    if kind == "forward":
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    elif kind == "reverse":
        divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
    elif kind == "jsd":
        log_m = torch.logaddexp(log_p + math.log(jsd_beta), log_q + math.log1p(-jsd_beta))
        divergence = (jsd_beta * log_p.exp() * (log_p - log_m)
                      + (1 - jsd_beta) * log_q.exp() * (log_q - log_m)).sum(-1)
    else:
        raise ValueError(f"kind {kind!r}: expected forward, reverse or jsd")
    return temperature**2 * divergence


def linear_kd_loss(hidden, weight, teacher, targets, mask=None, token_weight=None, kd_frac=0.5,
                   temperature=1.0, kind="forward", jsd_beta=0.5, chunk_size=0):
    """
    Sums over positions where mask is True, times token_weight if given: ce, of -log softmax(hidden @
    weight.T)[target]; kd, of `kd_loss` against the teacher; and loss = (1 - kd_frac) ce + kd_frac kd, the one
    to differentiate (in hidden and weight). -> loss, ce, kd: scalar float32 SUMS. Divide by the global count.

    hidden (B, T, C), weight (V, C); targets int64, mask bool, token_weight float (B, T); teacher: a function
    of positions (n,) int64, counted row after row from 0 to B T - 1, that gives its logits there, (n, V):
    `head_logits`, or your own.

    As in `linear_cross_entropy` the gradients are formed in forward. Memory: one chunk of logits of both
    models and one gradient of weight.
    """
    if kind not in ("forward", "reverse", "jsd"):
        raise ValueError(f"kind {kind!r}: expected forward, reverse or jsd")
    hidden, targets = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    scale = torch.ones(len(hidden), device=hidden.device) if token_weight is None else \
        token_weight.reshape(-1).float()
    at = torch.arange(len(hidden), device=hidden.device)
    if mask is not None and not mask.all():                   # what does not count is not computed
        at = mask.reshape(-1).nonzero()[:, 0]
        hidden, targets, scale = hidden[at], targets[at], scale[at]
    chunk = chunk_rows(hidden.device, len(hidden), chunk_size, part=4)      # two models' logits, and more
    return _LinearKD.apply(hidden, weight, teacher, at, targets, scale, kd_frac,
                           (temperature, kind, jsd_beta), chunk, compute_dtype(hidden),
                           torch.is_grad_enabled())


class _LinearKD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher, at, targets, scale, kd_frac, how, chunk, dtype, grad_enabled):
        need_hidden, need_weight = (needed and grad_enabled for needed in ctx.needs_input_grad[:2])
        h_all, w = hidden.to(dtype), weight.to(dtype)
        d_hidden = torch.empty_like(h_all) if need_hidden else None
        d_weight = torch.zeros(weight.shape, device=w.device) if need_weight else None     # summed in fp32
        buffer = w.new_empty(min(chunk, len(h_all)), len(w))
        few = max(1, 2**20 // len(w)) if w.device.type == "cpu" else chunk      # rows: what stays in cache
        sums = torch.zeros(2, device=w.device)                                             # ce, kd
        for i in range(0, len(h_all), chunk):
            h, here = h_all[i:i + chunk], slice(i, i + chunk)
            logits = torch.mm(h, w.T, out=buffer[:len(h)]).float()                         # (N, V)
            parts = (logits, teacher(at[here]), targets[here, None], scale[here, None])
            for z, t, target, s in zip(*(part.split(few) for part in parts)):
                both = _kd_rows(z, t.float(), target, kd_frac, *how)                       # (n, 1) each
                sums += torch.cat(both, dim=1).mul_(s).sum(dim=0)
                z.mul_(s)                                                                  # the gradient
            add_gradients(logits.to(dtype), h, w, d_hidden[here] if need_hidden else None, d_weight)
        ctx.gradients, ctx.dtypes = (d_hidden, d_weight), (hidden.dtype, weight.dtype)
        ce, kd = sums.unbind()
        ctx.mark_non_differentiable(ce, kd)
        return (1 - kd_frac) * ce + kd_frac * kd, ce, kd

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        return *take_gradients(ctx, grad), *[None] * 9


def _kd_rows(z, t, target, kd_frac, temperature, kind, jsd_beta):
    """
    z, t (n, V) float32: logits of student and teacher; target (n, 1) -> nll (n, 1), kd (n, 1); the gradient
    of (1 - kd_frac) nll + kd_frac kd takes the place of z. With d = log p - log q and r = log m - log q, the
    gradients in the student's logits / temperature are q - p; -q (d + KL); (1 - b) q (sum q r - r).
    """
    log_q = torch.log_softmax(z / temperature, dim=-1)
    log_p = torch.log_softmax(t / temperature, dim=-1)
    q, p = log_q.exp(), log_p.exp()
    d = log_p.sub_(log_q)
    if temperature == 1:
        nll, softmax = -log_q.gather(1, target), q
    else:
        nll, softmax = z.logsumexp(-1, keepdim=True) - z.gather(1, target), z.softmax(dim=-1)
    if kind == "forward":
        kd, g = (p * d).sum(-1, keepdim=True), q - p
    elif kind == "reverse":
        kd = -(q * d).sum(-1, keepdim=True)
        g = q * (d + kd).neg_()
    else:  # r = log(b p / q + 1 - b), exactly 0 where d is, without overflow where it is large
        r = d.relu() + torch.log1p(torch.where(d > 0, 1 - jsd_beta, jsd_beta) * torch.expm1(-d.abs()))
        q_r = (q * r).sum(-1, keepdim=True)
        kd = jsd_beta * (p * (d - r)).sum(-1, keepdim=True) - (1 - jsd_beta) * q_r
        g = q * (q_r - r).mul_(1 - jsd_beta)
    torch.mul(softmax, 1 - kd_frac, out=z)
    z.scatter_add_(1, target, torch.full_like(nll, kd_frac - 1.0)).add_(g, alpha=kd_frac * temperature)
    return nll, kd.mul_(temperature**2)


def head_logits(hidden, weight):
    """-> function of positions (n,) for `linear_kd_loss`: a teacher's hidden (B, T, C) @ weight (V, C)"""
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return lambda at: hidden[at] @ weight.T


# -----------------------------------------------------------------------------
# preferences: log-probs of answers, (B,) each, -> a loss per pair, (B,)

def dpo_loss(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta=0.1, label_smoothing=0.0,
             kind="sigmoid"):
    """
    DPO on log-probs summed over an answer's tokens; with d = (policy_chosen - policy_rejected) -
    (ref_chosen - ref_rejected):

    sigmoid   -(1 - e) log sigma(beta d) - e log sigma(-beta d), e = label_smoothing: the share of pairs
              thought to be the wrong way round (DPO, 2305.18290 eq. 7; conservative DPO)
    ipo       (d - 1 / (2 beta))^2 (2310.12036 eq. 17)
    hinge     max(0, 1 - beta d) (SLiC, 2305.10425)
    """
    d = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
    if kind == "sigmoid":
        return -(1 - label_smoothing) * F.logsigmoid(beta * d) - label_smoothing * F.logsigmoid(-beta * d)
    if kind == "ipo":
        return (d - 1 / (2 * beta))**2
    if kind == "hinge":
        return (1 - beta * d).relu()
    raise ValueError(f"kind {kind!r}: expected sigmoid, ipo or hinge")


def simpo_loss(chosen, rejected, beta=2.0, gamma=0.5):
    """-log sigma(beta (chosen - rejected) - gamma) on log-probs averaged over tokens (2405.14734 eq. 6)"""
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(chosen, rejected, beta=0.1):
    """
    -beta log sigma(log odds ratio) - chosen, on log-probs averaged over tokens (2403.07691 eq. 6-7), where
    the log odds of p are p - log(1 - e^p).
    """
    chosen, rejected = chosen.clamp(max=-1e-7), rejected.clamp(max=-1e-7)      # certain answers have no odds
    log_odds = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    return -beta * F.logsigmoid(log_odds) - chosen


def log1mexp(x):
    """log(1 - e^x) for x < 0, exact near 0 and far from it (Maechler 2012)"""
    near = x > -0.6931
    return torch.where(near, (-torch.expm1(torch.where(near, x, -1.0))).log(),
                       torch.log1p(-torch.where(near, -1.0, x).exp()))


# -----------------------------------------------------------------------------
# policy gradients

def group_advantages(rewards, scale="group", everyone=None):
    """
    (r - mean of the group) / (std + 1e-4) (DeepSeekMath, 2402.03300, section 4.1.2). rewards (P, G): of G
    samples for each of P prompts -> (P, G). scale: std of the group, of the batch, or none (2503.20783)

    Rewards of tokens (P, G, T): what a sample still gets from each of its tokens on. Each is compared with
    the group's mean at its place, in units of the largest standard deviation of a place -> (P, G, T).
    everyone: the batch that "batch" means, where rewards are a part of it
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale {scale!r}: expected group, batch or none")
    centred = rewards - rewards[:, :1]  # of equal rewards exactly 0, as their mean is not
    centred = centred - centred.mean(dim=1, keepdim=True)
    if scale == "none" or rewards.shape[1] == 1:              # a sample alone has no deviation
        return centred
    if scale == "batch":
        std = (rewards if everyone is None else everyone).flatten(0, 1).std(dim=0).max()
    else:
        std = rewards.std(dim=1, keepdim=True)                # (P, 1) or (P, 1, T)
        std = std if rewards.ndim == 2 else std.amax(dim=2, keepdim=True)
    return centred / (std + 1e-4)


def grpo_token_loss(logps, old_logps, ref_logps, advantages, mask, clip_low=0.2, clip_high=0.2, delta=None,
                    beta=0.0, level="token", kind="clip"):
    """
    The loss of every completion token, unreduced: what is averaged over what is the caller's choice.

    logps, old_logps (B, T): of the policy now, and when it sampled; ref_logps (B, T) of the reference, None
    with beta = 0; advantages (B,) or (B, T); mask (B, T) bool, False at padding -> (B, T), 0 where mask is
    False.

    clip    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logps - old_logps) (2402.03300 eq. 3),
            with delta: r <= delta in the first term (two-sided clipping, 2505.07291)
    cispo   -sg(min(r, 1 + clip_high)) A logps (2506.13585 eq. 4-5)
    level   "token": r of each token; "sequence": exp of its mean log-ratio (GSPO, 2507.18071)
    beta    adds beta k3, k3 = e^(ref - logps) - (ref - logps) - 1, which estimates KL(policy || reference)
    """
    logps, old_logps, ref_logps = (x if x is None else torch.where(mask, x, 0.0)    # padding must not leak
                                   for x in (logps, old_logps, ref_logps))
    A = advantages if advantages.ndim == 2 else advantages[:, None]
    log_ratio = logps - old_logps
    if level == "sequence":
        log_ratio = (log_ratio * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
    ratio = log_ratio.exp()                                                       # (B, T) or (B, 1)
    if kind == "cispo":
        loss = -ratio.clamp(max=1 + clip_high).detach() * A * logps
    else:
        bounded = ratio if delta is None else ratio.clamp(max=delta)
        loss = -torch.min(bounded * A, ratio.clamp(1 - clip_low, 1 + clip_high) * A)
    if beta:
        loss = loss + beta * k3(logps, ref_logps)
    return torch.where(mask, loss, 0.0)


def k3(logps, ref_logps):
    """Estimate of KL(policy || reference) at tokens that the policy has sampled, >= 0 (Schulman 2020)"""
    gap = ref_logps - logps
    return torch.expm1(gap) - gap
