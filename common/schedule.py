"""
Learning-rate schedules: pure functions of the step, so a resumed run cannot be off by one.

step counts from 0; the update made at step s is number s + 1. Warm-up reaches lr at update number
warmup_steps, the decaying schedules reach min_lr at the last update.
"""

import math


def learning_rate(
    kind,
    step,
    num_steps,
    lr,
    min_lr,
    warmup_steps=0,
    initial_lr=0.0,
    period=0,
    period_mul=1.0,
    decay_frac=0.2,
):
    """
    kind: cosine, restarts, constant or wsd; see the functions below -> the learning rate of this
    step
    """
    if step < warmup_steps:
        return initial_lr + (lr - initial_lr) * (step + 1) / warmup_steps
    if kind == "cosine":
        return cosine(step, num_steps, lr, min_lr, warmup_steps)
    if kind == "restarts":
        return cosine_restarts(step, num_steps, lr, min_lr, warmup_steps, period, period_mul)
    if kind == "wsd":
        return warmup_stable_decay(step, num_steps, lr, min_lr, decay_frac)
    if kind == "constant":
        return lr
    raise ValueError(f"no schedule is called {kind!r}")


def cosine(step, num_steps, lr, min_lr, warmup_steps=0):
    """Half a cosine from lr down to min_lr (SGDR, 1608.03983 eq. 5, one period)."""
    done = (step + 1 - warmup_steps) / max(1, num_steps - warmup_steps)  # 0 .. 1
    return min_lr + 0.5 * (lr - min_lr) * (1 + math.cos(math.pi * min(1.0, done)))


def cosine_restarts(step, num_steps, lr, min_lr, warmup_steps=0, period=0, period_mul=1.0):
    """
    Cosine that starts again from lr after `period` steps, each period period_mul times as long as
    the one before (SGDR); the last update of a period is at min_lr. period 0: one period over
    everything that follows the warm-up.
    """
    start, length = warmup_steps, period or max(1, num_steps - warmup_steps)
    while step >= start + length:
        start, length = start + length, max(1, round(length * period_mul))
    return cosine(step, start + length, lr, min_lr, start)


def warmup_stable_decay(step, num_steps, lr, min_lr, decay_frac=0.2):
    """
    lr, then over the last decay_frac of steps straight down to min_lr (2405.18392, "linear"
    cooldown).
    """
    decay_steps = round(decay_frac * num_steps)
    # updates after this one
    left = num_steps - (step + 1)
    return lr if left >= decay_steps else min_lr + (lr - min_lr) * left / decay_steps
