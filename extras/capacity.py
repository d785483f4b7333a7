"""
What a run would take (--dry_run=true): memory, FLOPs and time, measured on one micro-batch, not
guessed. And before there is a model: how large it may be.

    print(estimate(model, optimizer, data, cfg, num_steps, autocast, token_flops))
    python -m extras.capacity --memory_gib=24,80 --ranks=1,8  # bytes a parameter, largest models
"""

import time

import torch

from common import dist


def measure(model, forward, autocast):
    """
    forward() -> hidden states of model. It and backward, without the loss -> seconds of the faster
    of two, bytes that are kept for backward in between. Leaves the gradients at zero.
    """
    times = []
    # the first one warms up
    for _ in range(2):
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        # storage -> bytes
        kept = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        start = time.perf_counter()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
            hidden = forward()
        # not where all is frozen and no image is shown
        if hidden.requires_grad:
            hidden.float().sum().backward()
        if hidden.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    for p in model.parameters():
        if p.grad is not None:
            p.grad.zero_()
    return min(times), sum(kept.values())


def weight_bytes(model):
    return sum(p.nbytes for p in model.parameters())


def estimate(
    model,
    optimizer,
    data,
    cfg,
    num_steps,
    autocast,
    token_flops,
    models=(),
    tokens=0,
    rollout=None,
    rollouts=0.0,
):
    """
    -> text. data: as in data.py; cfg: batch_size, seq_len; token_flops: of a token with its loss;
    models: others in memory, or None; tokens: that a row gets besides the data's, at most;
    rollout(): answers a micro-batch, of which a step takes `rollouts`
    """
    ranks = dist.world()[1]
    row_tokens = data.num_tokens / data.num_rows + tokens
    length = max(1, min(cfg.seq_len, round(row_tokens)))
    # nothing travels
    optimizer.sync = False
    if data.images:
        batch = data.batch(0)
        inputs, more = batch.tokens, dict(batch.inputs, docs=batch.docs)
    else:
        shape = data.micro_batch_size, length
        inputs, more = torch.zeros(shape, dtype=torch.int64, device=model.head.device), {}
    seconds, kept = measure(model, lambda: model(inputs, **more), autocast)
    rollout_time = ""
    if rollout:
        start = time.perf_counter()
        with torch.no_grad(), autocast:
            rollout()
        rollout_s = (time.perf_counter() - start) * rollouts * num_steps
        rollout_time = f", {dist.short_time(rollout_s)} of rollouts"
    # of this rank
    speed = model.flops_per_token(length, head_frac=0.0) * inputs.numel() / seconds
    # of a step
    tokens = cfg.batch_size * row_tokens
    flops, epoch = token_flops * tokens * num_steps, data.num_rows / cfg.batch_size
    memory = {
        "weights": weight_bytes(model),
        "gradients": sum(4 * p.numel() for p in model.parameters() if p.requires_grad),
        "optimizer": optimizer.state_bytes(),
        "kept for backward": kept,
        "other models": sum(weight_bytes(other) for other in models if other is not None),
    }
    share = ", ".join(f"{name} {size / 2**20:,.0f}" for name, size in memory.items() if size)
    updates = dist.short_time(flops / speed / ranks)
    return (
        f"model     {model.size()}\n"
        f"data      {data.num_tokens:,} tokens in {data.num_rows:,} samples; "
        f"an epoch is {epoch:,.1f} steps\n"
        f"step      {tokens:,.0f} tokens in {cfg.batch_size} samples, "
        f"{data.micro_batch_size} at once on each of {ranks} rank{'s' if ranks > 1 else ''}\n"
        f"run       {num_steps:,} steps, {num_steps / epoch:,.2f} epochs, "
        f"{tokens * num_steps:,.0f} tokens, {flops:.2e} FLOPs\n"
        f"memory    {sum(memory.values()) / 2**20:,.0f} MiB a rank: {share}; "
        "torch and some logits come on top\n"
        f"speed     {speed / 1e9:,.1f} GFLOP/s a rank, "
        f"measured on {inputs.shape[0]} x {inputs.shape[1]} tokens\n"
        f"time      {updates} of updates{rollout_time}; "
        "evaluation, samples and saving come on top\n"
        "Nothing was written. Leave out --dry_run to train."
    )


def bytes_per_parameter(param_dtype, slots, shards):
    """
    Of weights, fp32 gradients and optimizer state on a rank: slots moments (AdamW 2, Lion 1) and,
    of bfloat16 weights, a master copy, all fp32 and cut into `shards` parts (ZeRO-1, 1910.02054,
    section 5.2)
    """
    weight = {"float32": 4, "bfloat16": 2}[param_dtype]
    return weight + 4 + 4 * (slots + (weight < 4)) / shards


if __name__ == "__main__":  # the only part that knows other modules
    from dataclasses import dataclass
    from typing import Literal

    from common.config import parse_config
    from common.errors import UserError

    @dataclass(frozen=True)
    class Config:
        memory_gib: tuple[float, ...] = (24, 40, 80, 141)  # memory of a GPU
        ranks: tuple[int, ...] = (1, 2, 4, 8, 64)  # numbers of GPUs
        optimizer: Literal["adamw", "lion"] = "adamw"  # 2 or 1 fp32 moments a parameter
        free_frac: float = 0.25  # of the memory, for activations and what torch itself takes

    cfg = parse_config(Config)
    if min((*cfg.memory_gib, *cfg.ranks), default=0) <= 0 or not 0 <= cfg.free_frac < 1:
        raise UserError(
            f"--memory_gib={cfg.memory_gib} --ranks={cfg.ranks} "
            f"--free_frac={cfg.free_frac}: expected positive numbers, and a fraction "
            "below 1"
        )
    print(
        f"{cfg.optimizer}, --zero1=true: bytes a parameter, billions of parameters of the largest "
        f"model; {cfg.free_frac:.0%} of the memory is left free"
    )
    names = [f"{gib:g} GiB" for gib in cfg.memory_gib]
    print(f"{'weights':<10}{'ranks':>6}{'bytes':>8}" + "".join(f"{name:>10}" for name in names))
    for dtype in ("float32", "bfloat16"):
        for n in cfg.ranks:
            size = bytes_per_parameter(dtype, dict(adamw=2, lion=1)[cfg.optimizer], n)
            row = f"{dtype:<10}{n:>6}{size:>8.2f}"
            for gib in cfg.memory_gib:
                row += f"{gib * 2**30 * (1 - cfg.free_frac) / size / 1e9:>10.2f}"
            print(row)
