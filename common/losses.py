"""
Losses on hidden states and the output head, a few positions at a time: the logits (B, T, V) are
never held whole. A loss of your own is a function of a few positions' logits, see `chunked`.

Everything returns sums or unreduced values; the training script divides once, by the count over all
micro-batches and ranks, so that results do not depend on the layout.
"""

import math

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from common.dist import compute_dtype


def chunked(loss_of, hidden, weight, *rows, mask=None, chunk_size=0):
    """
    Sum of loss_of over the positions where mask is True. loss_of is plain PyTorch:

        def loss_of(logits, targets):                       # (n, V) float32, (n,) -> (n,)
            return F.cross_entropy(logits, targets, reduction="none")

        loss_sum = chunked(loss_of, hidden, model.head, targets, mask=mask)

    hidden (B, T, C) or (N, C), weight (V, C); rows: what loss_of needs of each position, tensors of
    hidden's leading shape; mask bool, likewise -> scalar float32 SUM. Divide by the global count.
    If loss_of returns a tuple of (n,), so does `chunked` of sums: the first is the loss, the others
    have no gradient. ValueError if loss_of returns another shape. With an empty mask it is called
    once, with n = 0.

    The gradients, of hidden and weight alone, are formed in forward, chunk by chunk, while the
    chunk's logits are at hand; backward only scales them, which is exact because the loss is a
    scalar. Memory: one chunk of logits with what loss_of computes from it, and one gradient of
    weight. Sums are float32; matrix products are in hidden's dtype, or autocast's.
    """
    hidden, *rows = at_mask(mask, hidden, *rows)
    differentiate = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)

    def step(sums, logits, here):
        with torch.set_grad_enabled(differentiate):
            logits = logits.detach().requires_grad_(differentiate)
            losses = loss_of(logits, *[row[here] for row in rows])
            losses = losses if isinstance(losses, tuple) else (losses,)
            totals = [loss.float().sum() for loss in losses]
        n = len(logits)
        for loss in losses:
            if loss.shape != (n,):
                raise ValueError(
                    f"loss_of returned shape {tuple(loss.shape)}, expected ({n},): "
                    "one loss per position, not reduced"
                )
        gradient = torch.autograd.grad(totals[0], logits)[0] if differentiate else None
        return sums + torch.stack(totals).detach(), gradient

    sums = sums_of(step, hidden, weight, chunk_size)
    return sums if len(sums) > 1 else sums[0]


def linear_cross_entropy(hidden, weight, targets, mask=None, token_weight=None, chunk_size=0):
    """
    Sum over positions where mask is True of -log softmax(hidden @ weight.T)[target], times
    token_weight if given. The same as `chunked` with F.cross_entropy, in less time and memory: the
    softmax, and then the gradient, overwrite the chunk's logits.

    hidden (B, T, C) or (N, C), weight (V, C); targets int64, mask bool, token_weight float of
    hidden's leading shape -> scalar float32 SUM. Divide by the global count of targets.
    """
    hidden, targets, scale = at_mask(mask, hidden, targets, token_weight)

    def step(sums, p, here):
        target = targets[here, None]
        torch.softmax(p, -1, out=p)
        p_target = p.gather(1, target)  # (n, 1)
        nll = -p_target.log()
        tiny = p_target[:, 0] < 1e-30  # the log would be off, or infinite
        if tiny.any():
            dtype = compute_dtype(hidden)
            again = (hidden[here][tiny].to(dtype) @ weight.to(dtype).T).float()
            nll[tiny, 0] = F.cross_entropy(again, target[tiny, 0], reduction="none")
        p.scatter_add_(1, target, torch.full_like(p_target, -1.0))  # softmax - onehot
        if scale is not None:
            s = scale[here, None].float()
            nll = nll * s
            p.mul_(s)
        return sums + nll.sum()[None], p

    return sums_of(step, hidden, weight, chunk_size)[0]


# -----------------------------------------------------------------------------
# the loop over chunks of positions


def at_mask(mask, hidden, *rows):
    """hidden (B, T, C), rows (B, T, ...) or None -> (N, ...) each, of N positions that count"""
    lead = hidden.ndim - 1
    n = hidden.shape[:-1].numel()
    rows = [x if x is None else x.reshape(n, *x.shape[lead:]) for x in (hidden, *rows)]
    if mask is None or mask.all():
        return rows
    # what does not count is not computed
    valid = mask.reshape(-1).nonzero()[:, 0]
    return [x if x is None else x[valid] for x in rows]


def chunk_rows(hidden, chunk_size, part=1):
    """
    Positions per chunk of hidden (N, C): equal chunks of at most 512 on a CPU, 4096 on a GPU, or
    that part of it. More makes better matrix products and takes more memory.
    """
    n = len(hidden)
    most = (512 if hidden.device.type == "cpu" else 4096) // part
    return chunk_size or -(-n // -(-n // most)) if n else 1


def over_chunks(step, hidden, weight, chunk, dtype, needs=(False, False), fused=True):
    """
    The one loop over positions. Of each chunk, step(sums, logits, here) gets the logits (n, V)
    float32 of the positions in the slice here; it returns sums with theirs added, and the gradient
    (n, V) of the first sum with respect to logits, or None where none is needed. It may overwrite
    logits.

    hidden (N, C), weight (V, C), matrix products in dtype; needs: whether hidden, and weight, need
    a gradient -> sums, the gradient of hidden in dtype, that of weight in float32; None where not
    needed. fused: in float32 the gradient of weight accumulates inside of the matrix product, which
    rounds differently.
    """
    h_all, w = hidden.to(dtype), weight.to(dtype)
    d_hidden = torch.empty_like(h_all) if needs[0] else None
    d_weight = torch.zeros(weight.shape, device=w.device) if needs[1] else None
    buffer = w.new_empty(min(chunk, len(h_all)), len(w))
    sums = 0.0
    for i in range(0, max(1, len(h_all)), chunk):
        here = slice(i, i + chunk)
        h = h_all[here]
        logits = torch.mm(h, w.T, out=buffer[: len(h)]).float()  # (n, V)
        sums, gradient = step(sums, logits, here)
        g = gradient.to(dtype) if any(needs) else None
        if needs[0]:
            torch.mm(g, w, out=d_hidden[here])
        if needs[1] and fused and dtype == torch.float32:
            d_weight.addmm_(g.T, h)
        elif needs[1]:
            d_weight += g.T @ h
        del g, gradient  # their memory, before the next chunk
    return sums, d_hidden, d_weight


def sums_of(step, hidden, weight, chunk_size, part=1):
    """-> the sums of `over_chunks`, scalars, the first of them differentiable"""
    chunk = chunk_rows(hidden, chunk_size, part)
    # the grad mode is asked here: inside forward it is off
    return _Chunked.apply(hidden, weight, step, chunk, torch.is_grad_enabled())


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, step, chunk, grad_enabled):
        needs = [needed and grad_enabled for needed in ctx.needs_input_grad[:2]]
        dtype = compute_dtype(hidden)
        sums, *ctx.gradients = over_chunks(step, hidden, weight, chunk, dtype, needs)
        first, *others = [x.clone() for x in sums]
        ctx.mark_non_differentiable(*others)
        return first, *others

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_):
        if ctx.gradients is None:
            raise RuntimeError(
                "a second backward through this loss; the first has scaled its gradients in place"
            )
        gradients, ctx.gradients = ctx.gradients, None
        # autograd itself casts a gradient to its input's dtype
        return *[g if g is None else g.mul_(grad) for g in gradients], None, None, None


# -----------------------------------------------------------------------------
# log-probabilities of given tokens


def token_logps(hidden, weight, targets, temperature=1.0, chunk_size=0, suppress=(), support=None):
    """
    log softmax(hidden @ weight.T / temperature)[target] of every position.

    hidden (B, T, C), weight (V, C), targets (B, T) int64; suppress: ids without probability, as in
    sampling; support: the only ids with probability, where top-k or top-p has cut the sampler's
    distribution: ids of all positions, one after the other, and how many each has (B * T,) -> (B,
    T) float32, differentiable in hidden and weight; the logits of a chunk are computed again in
    backward.
    """
    hidden = hidden.reshape(-1, hidden.shape[-1])
    suppress = torch.tensor(suppress, dtype=torch.int64, device=hidden.device)

    def exclude(x, value, here):
        """Put value, in place, where these positions of x (n, V) have no probability"""
        x.index_fill_(1, suppress, value)
        if support:
            ids, n_ids = support  # n_ids: of each position
            start = int(n_ids[: here.start].sum())
            row = torch.arange(len(x), device=x.device).repeat_interleave(n_ids[here])
            out = torch.ones_like(x, dtype=torch.bool)
            out[row, ids[start : start + len(row)].long()] = False
            x.masked_fill_(out, value)

    logps = _TokenLogps.apply(
        hidden,
        weight,
        targets.reshape(-1),
        temperature,
        exclude,
        chunk_rows(hidden, chunk_size),
        compute_dtype(hidden),
    )
    return logps.view(targets.shape)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, exclude, *how):
        logps, lse = torch.empty(2, len(hidden), device=hidden.device)

        def step(sums, logits, here):
            exclude(logits.div_(temperature), -torch.inf, here)
            lse[here] = logits.logsumexp(-1)
            logps[here] = logits.gather(1, targets[here, None])[:, 0] - lse[here]
            return sums, None

        over_chunks(step, hidden, weight, *how)
        ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.options = temperature, exclude, how
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, targets, lse = ctx.saved_tensors
        temperature, exclude, how = ctx.options

        def step(sums, logits, here):
            p = logits.div_(temperature).sub_(lse[here, None]).exp_()
            exclude(p, 0.0, here)
            g = grad[here, None] / temperature
            return sums, p.mul_(-g).scatter_add_(1, targets[here, None], g)  # (onehot - p) g

        needs = ctx.needs_input_grad[:2]
        _, *gradients = over_chunks(step, hidden, weight, *how, needs, fused=False)
        return *gradients, *[None] * 5


# -----------------------------------------------------------------------------
# distillation: a student's distribution over the vocabulary against a teacher's


def kd_loss(student_logits, teacher_logits, temperature=1.0, kind="forward", jsd_beta=0.5):
    """
    temperature^2 times the divergence of the student's distribution q from the teacher's p, both at
    that temperature, of every position. The square keeps the gradient's size as the temperature
    grows (Hinton et al., 1503.02531, section 2). For logits that may be held whole; else
    `linear_kd_loss`.

    student_logits, teacher_logits (B, T, V) -> (B, T), unreduced

    forward   KL(p || q): the student covers what the teacher may say
    reverse   KL(q || p): the student keeps to what the teacher is likely to say (MiniLLM,
              2306.08543)
    jsd       b KL(p || m) + (1 - b) KL(q || m), m = b p + (1 - b) q, b = jsd_beta in (0, 1):
              generalised Jensen-Shannon divergence (GKD, 2306.13649 eq. 1)
    """
    log_q = (student_logits / temperature).log_softmax(-1)
    log_p = (teacher_logits / temperature).log_softmax(-1)
    if kind == "forward":
        divergence = (log_p.exp() * (log_p - log_q)).sum(-1)
    elif kind == "reverse":
        divergence = (log_q.exp() * (log_q - log_p)).sum(-1)
    elif kind == "jsd":
        log_m = torch.logaddexp(log_p + math.log(jsd_beta), log_q + math.log1p(-jsd_beta))
        from_p = jsd_beta * log_p.exp() * (log_p - log_m)
        from_q = (1 - jsd_beta) * log_q.exp() * (log_q - log_m)
        divergence = (from_p + from_q).sum(-1)
    else:
        raise ValueError(f"kind {kind!r}: expected forward, reverse or jsd")
    return temperature**2 * divergence


def linear_kd_loss(
    hidden,
    weight,
    teacher,
    targets,
    mask=None,
    token_weight=None,
    kd_frac=0.5,
    temperature=1.0,
    kind="forward",
    jsd_beta=0.5,
    chunk_size=0,
):
    """
    Sums over positions where mask is True, times token_weight if given: ce, of -log softmax(hidden
    @ weight.T)[target]; kd, of `kd_loss` against the teacher; and loss = (1 - kd_frac) ce + kd_frac
    kd, the one to differentiate (in hidden and weight). -> loss, ce, kd: scalar float32 SUMS.
    Divide by the global count.

    hidden (B, T, C), weight (V, C); targets int64, mask bool, token_weight float (B, T); teacher: a
    function of positions (n,) int64, counted row after row from 0 to B T - 1, that gives its logits
    there, (n, V): `head_logits`, or your own.

    As in `linear_cross_entropy` the gradients are formed in forward. Memory: one chunk of logits of
    both models and one gradient of weight.
    """
    if token_weight is None:
        token_weight = torch.ones(targets.shape, device=hidden.device)
    at = torch.arange(targets.numel(), device=hidden.device)
    hidden, targets, scale, at = at_mask(mask, hidden, targets, token_weight, at)

    def step(sums, logits, here):
        sums = sums + logits.new_zeros(3)  # loss, ce, kd
        n = len(logits)
        if n == 0:
            return sums, logits
        # on a CPU, a few rows at a time: what stays in its cache
        few = max(1, 2**20 // len(weight)) if logits.device.type == "cpu" else n
        rows = logits, teacher(at[here]), targets[here, None], scale[here, None].float()
        for z, t, target, s in zip(*[x.split(few) for x in rows]):
            both = _kd_rows(z, t.float(), target, kd_frac, temperature, kind, jsd_beta)
            sums[1:] += torch.cat(both, dim=1).mul_(s).sum(dim=0)
            z.mul_(s)  # the gradient
        sums[0] = (1 - kd_frac) * sums[1] + kd_frac * sums[2]
        return sums, logits

    return sums_of(step, hidden, weight, chunk_size, part=4)  # two models' logits, and more


def _kd_rows(z, t, target, kd_frac, temperature, kind, jsd_beta):
    """
    z, t (n, V) float32: logits of student and teacher; target (n, 1) -> nll (n, 1), kd (n, 1); the
    gradient of (1 - kd_frac) nll + kd_frac kd takes the place of z. With d = log p - log q and r =
    log m - log q, the gradients in the student's logits / temperature are q - p; -q (d + KL); (1 -
    b) q (sum q r - r).
    """
    log_q = torch.log_softmax(z / temperature, -1)
    log_p = torch.log_softmax(t / temperature, -1)
    q, p = log_q.exp(), log_p.exp()
    d = log_p.sub_(log_q)
    if temperature == 1:
        softmax = q
        nll = -log_q.gather(1, target)
    else:
        softmax = z.softmax(-1)
        nll = z.logsumexp(-1, keepdim=True) - z.gather(1, target)
    if kind == "forward":
        kd = (p * d).sum(-1, keepdim=True)
        g = q - p
    elif kind == "reverse":
        kd = -(q * d).sum(-1, keepdim=True)
        g = q * (d + kd).neg_()
    elif kind == "jsd":
        # r = log(b p / q + 1 - b), exactly 0 where d is, without overflow where it is large
        share = torch.where(d > 0, 1 - jsd_beta, jsd_beta)
        r = d.relu() + torch.log1p(share * torch.expm1(-d.abs()))
        q_r = (q * r).sum(-1, keepdim=True)
        p_d = (p * (d - r)).sum(-1, keepdim=True)
        kd = jsd_beta * p_d - (1 - jsd_beta) * q_r
        g = q * (q_r - r).mul_(1 - jsd_beta)
    else:
        raise ValueError(f"kind {kind!r}: expected forward, reverse or jsd")
    torch.mul(softmax, 1 - kd_frac, out=z)
    z.scatter_add_(1, target, torch.full_like(nll, kd_frac - 1.0))
    z.add_(g, alpha=kd_frac * temperature)
    return nll, kd.mul_(temperature**2)


def head_logits(hidden, weight):
    """-> teacher for `linear_kd_loss`: hidden (B, T, C) @ weight (V, C) at positions (n,)"""
    hidden = hidden.reshape(-1, hidden.shape[-1])
    return lambda at: hidden[at] @ weight.T


# -----------------------------------------------------------------------------
# preferences: log-probs of answers, (B,) each, -> a loss per pair, (B,)


def dpo_loss(
    policy_chosen,
    policy_rejected,
    ref_chosen,
    ref_rejected,
    beta=0.1,
    label_smoothing=0.0,
    kind="sigmoid",
):
    """
    DPO on log-probs summed over an answer's tokens; with d = (policy_chosen - policy_rejected) -
    (ref_chosen - ref_rejected):

    sigmoid   -(1 - e) log sigma(beta d) - e log sigma(-beta d), e = label_smoothing: the share of
              pairs thought to be the wrong way round (DPO, 2305.18290 eq. 7; conservative DPO)
    ipo       (d - 1 / (2 beta))^2 (2310.12036 eq. 17)
    hinge     max(0, 1 - beta d) (SLiC, 2305.10425)
    """
    d = (policy_chosen - policy_rejected) - (ref_chosen - ref_rejected)
    if kind == "sigmoid":
        right, wrong = F.logsigmoid(beta * d), F.logsigmoid(-beta * d)
        return -(1 - label_smoothing) * right - label_smoothing * wrong
    if kind == "ipo":
        return (d - 1 / (2 * beta)) ** 2
    if kind == "hinge":
        return (1 - beta * d).relu()
    raise ValueError(f"kind {kind!r}: expected sigmoid, ipo or hinge")


def simpo_loss(chosen, rejected, beta=2.0, gamma=0.5):
    """
    -log sigma(beta (chosen - rejected) - gamma) on log-probs averaged over tokens (2405.14734 eq.
    6)
    """
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo_loss(chosen, rejected, beta=0.1):
    """
    -beta log sigma(log odds ratio) - chosen, on log-probs averaged over tokens (2403.07691 eq.
    6-7), where the log odds of p are p - log(1 - e^p).
    """
    # an answer that is certain has no odds
    chosen = chosen.clamp(max=-1e-7)
    rejected = rejected.clamp(max=-1e-7)
    log_odds = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    return -beta * F.logsigmoid(log_odds) - chosen


def log1mexp(x):
    """log(1 - e^x) for x < 0, exact near 0 and far from it (Maechler 2012)"""
    near = x > -0.6931
    # the inner where: the branch that is not taken must have a finite gradient
    if_near = (-torch.expm1(torch.where(near, x, -1.0))).log()
    if_far = torch.log1p(-torch.where(near, -1.0, x).exp())
    return torch.where(near, if_near, if_far)


# -----------------------------------------------------------------------------
# policy gradients


def group_advantages(rewards, scale="group", everyone=None):
    """
    (r - mean of the group) / (std + 1e-4) (DeepSeekMath, 2402.03300, section 4.1.2). rewards (P,
    G): of G samples for each of P prompts -> (P, G). scale: std of the group, of the batch, or none
    (2503.20783)

    Rewards of tokens (P, G, T): what a sample still gets from each of its tokens on. Each is
    compared with the group's mean at its place, in units of the largest standard deviation of a
    place -> (P, G, T). everyone: the batch that "batch" means, where rewards are a part of it
    """
    if scale not in ("group", "batch", "none"):
        raise ValueError(f"scale {scale!r}: expected group, batch or none")
    centred = rewards - rewards[:, :1]  # of equal rewards exactly 0, as their mean is not
    centred = centred - centred.mean(1, keepdim=True)
    if scale == "none" or rewards.shape[1] == 1:  # a sample alone has no deviation
        return centred
    if scale == "batch":
        batch = rewards if everyone is None else everyone
        std = batch.flatten(0, 1).std(0).max()
    else:
        std = rewards.std(1, keepdim=True)  # (P, 1) or (P, 1, T)
        std = std if rewards.ndim == 2 else std.amax(2, keepdim=True)
    return centred / (std + 1e-4)


def grpo_token_loss(
    logps,
    old_logps,
    ref_logps,
    advantages,
    mask,
    clip_low=0.2,
    clip_high=0.2,
    delta=None,
    beta=0.0,
    level="token",
    kind="clip",
):
    """
    The loss of every completion token, unreduced: what is averaged over what is the caller's
    choice.

    logps, old_logps (B, T): of the policy now, and when it sampled; ref_logps (B, T) of the
    reference, None with beta = 0; advantages (B,) or (B, T); mask (B, T) bool, False at padding ->
    (B, T), 0 where mask is False.

    clip    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), r = exp(logps - old_logps)
            (2402.03300 eq. 3), with delta: r <= delta in the first term (two-sided clipping,
            2505.07291)
    cispo   -sg(min(r, 1 + clip_high)) A logps (2506.13585 eq. 4-5)
    level   "token": r of each token; "sequence": exp of its mean log-ratio (GSPO, 2507.18071)
    beta    adds beta k3, k3 = e^(ref - logps) - (ref - logps) - 1, which estimates KL(policy ||
            reference)
    """
    # padding must not leak
    logps, old_logps = (torch.where(mask, x, 0.0) for x in (logps, old_logps))
    A = advantages if advantages.ndim == 2 else advantages[:, None]
    log_ratio = logps - old_logps
    if level == "sequence":
        length = mask.sum(1, keepdim=True).clamp(min=1)
        log_ratio = (log_ratio * mask).sum(1, keepdim=True) / length
    ratio = log_ratio.exp()  # (B, T) or (B, 1)
    if kind == "cispo":
        loss = -ratio.clamp(max=1 + clip_high).detach() * A * logps
    else:
        bounded = ratio if delta is None else ratio.clamp(max=delta)
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        loss = -torch.min(bounded * A, clipped * A)
    if beta:
        loss = loss + beta * k3(logps, torch.where(mask, ref_logps, 0.0))
    return torch.where(mask, loss, 0.0)


def k3(logps, ref_logps):
    """Estimate of KL(policy || reference) at tokens sampled by the policy, >= 0 (Schulman 2020)"""
    gap = ref_logps - logps
    return torch.expm1(gap) - gap
