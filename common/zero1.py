"""
Data parallelism and ZeRO-1 (1910.02054) without wrapping the model.

    optimizer = ShardedOptimizer(groups, zero1=True)  # groups: from optim.parameter_groups
    optimizer.sync = i == num_micro - 1               # before each backward: True in the last one
                                                      only
    (loss_sum / n_tokens).backward()
    optimizer.lr = ...
    grad_norm = optimizer.step(grad_clip)             # finish sync, clip by the global norm,
                                                      update, gather

The parameters of a group lie one after the other in a flat buffer, their gradients in another: `p`
and `p.grad` become views of them. The flat space is cut into equal buckets, regardless of where one
tensor ends and the next begins. As soon as the gradients of a bucket are complete, while backward
still runs, the bucket is summed over the ranks:

    replicated (zero1=False)   all-reduce; every rank updates parameters
    zero1=True                 reduce-scatter; rank r updates the r-th part of every bucket and
                               keeps only its state; the updated parameters are gathered while the
                               next bucket is updated

Buckets travel in one fixed order on all ranks, and all have left when backward returns, so it does
not matter when, or whether, a rank uses a parameter (one that it leaves unused holds later buckets
back until then). A parameter that no rank uses has a zero gradient. Nothing here averages: the loss
is to be divided by the global count before backward.

Parameters in bf16 or fp16 get an fp32 master copy (part of the sharded state) and fp32 gradients.
Load weights into a model before the optimizer is made, or its masters are those of the old weights.
"""

import math
import weakref

import torch
import torch.distributed as td

from common import dist

# the names before and after torch 2.13
_reduce_scatter = getattr(td, "reduce_scatter_single", None) or td.reduce_scatter_tensor
_all_gather = getattr(td, "all_gather_single", None) or td.all_gather_into_tensor


class ShardedOptimizer:
    """
    groups: list with .named [(name, parameter)], .rule and .weight_decay (see optim.py). bucket_mb:
    fp32 megabytes of gradient per message. loss_scaling: dynamic, for fp16; multiply the loss by
    `loss_scale` before backward.
    """

    def __init__(self, groups, zero1=False, bucket_mb=16, loss_scaling=False):
        self.rank, self.world_size = dist.world()
        self.shards = self.world_size if zero1 else 1
        self.lr, self.sync = 0.0, True
        # good_steps: in a row, see _adjust_loss_scale
        self.num_updates, self.good_steps = 0, 0
        self.loss_scale, self.loss_scaling = 2.0**16 if loss_scaling else 1.0, loss_scaling
        bucket_size = int(bucket_mb * 2**20 / 4) if self.world_size > 1 else None
        self.flats = [
            FlatGroup(group, self.rank if zero1 else 0, self.shards, bucket_size)
            for group in groups
        ]
        # the order in which backward completes them, nearly: by how far into their group they reach
        self.buckets = sorted(
            (bucket for flat in self.flats for bucket in flat.buckets), key=lambda b: b.reaches
        )
        # buckets under way in this step; see _gradient_ready
        self.launched, self.closing = 0, False
        # a hook that held on to us would do so for good
        me = weakref.ref(self)
        for n, flat in enumerate(self.flats):
            for i, p in enumerate(flat.params):
                p.register_post_accumulate_grad_hook(
                    lambda p, n=n, i=i: me() and me()._gradient_ready(n, i)
                )

    def _gradient_ready(self, n, i):
        flat = self.flats[n]
        flat.collect(i)
        if self.world_size == 1:
            return
        if any(bucket.work for bucket in flat.buckets_of[i]):
            raise RuntimeError(
                "backward after the gradients were sent; "
                "set optimizer.sync = False in all micro-batches but the last"
            )
        if not self.sync:
            return
        if not self.closing:  # once a backward: what it leaves unused follows at its end
            self.closing = True
            torch.autograd.Variable._execution_engine.queue_callback(self._launch_rest)
        for bucket in flat.buckets_of[i]:
            bucket.missing.discard(i)
        while self.launched < len(self.buckets) and not self.buckets[self.launched].missing:
            self._launch()

    def _launch(self):
        self.buckets[self.launched].reduce(self.shards)
        self.launched += 1

    def _launch_rest(self):
        self.closing = False
        while self.launched < len(self.buckets):
            self._launch()

    def step(self, grad_clip=0.0, apply=True):
        """
        Finish the sum over ranks, clip to the global norm grad_clip (0 = off), update. -> the norm
        before clipping (float, the same on all ranks). The update is skipped when the norm is not
        finite or apply is False (give every rank the same); the gradients are zero afterwards in
        any case.
        """
        if self.world_size > 1:
            # nothing to do, unless there was no backward
            self._launch_rest()
            for bucket in self.buckets:
                bucket.wait()
        square = torch.stack([bucket.my_grad.norm() for bucket in self.buckets]).square().sum()
        if self.shards > 1:
            square = dist.all_sum(square)
        grad_norm = math.sqrt(square.item()) / self.loss_scale
        if apply and math.isfinite(grad_norm):
            self.num_updates += 1
            shrink = min(1.0, grad_clip / (grad_norm + 1e-6)) if grad_clip else 1.0
            for bucket in self.buckets:
                bucket.update(self.lr, self.num_updates, self.loss_scale / shrink)
                bucket.gather(self.shards)
            for bucket in self.buckets:
                bucket.wait()
        self._adjust_loss_scale(math.isfinite(grad_norm))
        for flat in self.flats:
            flat.grad.zero_()
        for bucket in self.buckets:
            bucket.expect_all()
        self.launched = 0
        return grad_norm

    def _adjust_loss_scale(self, finite, patience=2000):
        """
        Halve after an overflow (all ranks see it in the global norm), double after many good steps.
        """
        if not self.loss_scaling:
            return
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.loss_scale = max(1.0, self.loss_scale / 2)
        elif self.good_steps == patience:
            self.loss_scale, self.good_steps = self.loss_scale * 2, 0

    # -------------------------------------------------------------------------
    # state

    def state_bytes(self):
        """Bytes of optimizer state (moments and master weights) on this rank."""
        return sum(t.numel() * t.element_size() for flat in self.flats for t in flat.state.values())

    def state_dict(self):
        """
        This rank's part of the state. Parts are the same on all ranks when not sharded.
        `load_state_dict` of any number of ranks takes the parts of any other.
        """
        return dict(
            num_updates=self.num_updates,
            loss_scale=self.loss_scale,
            good_steps=self.good_steps,
            shards=self.shards,
            shard=self.rank if self.shards > 1 else 0,
            groups=[
                dict(
                    parameters=[(name, list(p.shape)) for name, p in zip(flat.names, flat.params)],
                    pieces=[(b.my_start, b.my_size) for b in flat.buckets],
                    state=flat.state,
                )
                for flat in self.flats
            ],
        )

    def load_state_dict(self, parts):
        """
        parts: the state_dict of every shard, in any order. ValueError, and nothing changed, when
        shards are missing or of another model or optimizer.
        """
        shards = parts[0]["shards"] if parts else 1
        if sorted(part["shard"] for part in parts) != list(range(shards)):
            raise ValueError(f"optimizer state has {len(parts)} of its {shards} shards")
        for part in parts:
            if len(part["groups"]) != len(self.flats):
                raise ValueError(
                    f"optimizer state has {len(part['groups'])} parameter groups, this model "
                    f"{len(self.flats)}; was it another --optimizer?"
                )
            for flat, saved in zip(self.flats, part["groups"]):
                flat.check(saved)
        for key in ("num_updates", "loss_scale", "good_steps"):
            setattr(self, key, parts[0][key])
        for part in parts:
            for flat, saved in zip(self.flats, part["groups"]):
                flat.load(saved)


class FlatGroup:
    """
    The flat buffers of one group. rank, shards: which part of each bucket is kept and updated here.
    """

    def __init__(self, group, rank, shards, bucket_size):
        # registration order reversed: nearly the order in which backward finishes
        self.names, self.params = zip(*reversed(group.named))
        self.rule, self.weight_decay = group.rule, group.weight_decay
        first = self.params[0]
        if any(p.dtype != first.dtype or p.device != first.device for p in self.params):
            raise ValueError("the parameters of a group must share dtype and device")
        sizes = [p.numel() for p in self.params]
        self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
        self.numel = sum(sizes)
        step = self.rule.unit * shards  # a bucket must divide into whole units for each shard
        count = -(-self.numel // max(step, bucket_size or self.numel))
        # equal buckets: no more padding than they need
        bucket_size = -(-self.numel // count // step) * step
        self.param = torch.zeros(count * bucket_size, dtype=first.dtype, device=first.device)
        self.grad = torch.zeros(count * bucket_size, dtype=torch.float32, device=first.device)
        self.views = []
        for p, start, size in zip(self.params, self.starts, sizes):
            self.param[start : start + size] = p.detach().reshape(-1)
            p.data = self.param[start : start + size].view(p.shape)
            self.views.append(self.grad[start : start + size].view(p.shape))
            p.grad = self.views[-1] if p.dtype == torch.float32 else None
        self.state = {
            slot: torch.zeros(count * bucket_size // shards, device=first.device)
            for slot in self.rule.slots
        }
        if first.dtype != torch.float32:
            self.state["master"] = torch.empty(count * bucket_size // shards, device=first.device)
        self.buckets = [Bucket(self, b, bucket_size, rank, shards) for b in range(count)]
        self.buckets_of = [
            [b for b in self.buckets if i in b.parameters] for i in range(len(self.params))
        ]

    def collect(self, i):
        """The gradient of parameter i has arrived in p.grad: make sure it is in the flat buffer."""
        p, view = self.params[i], self.views[i]
        if p.grad.data_ptr() == view.data_ptr():
            return
        # low precision, or the user called zero_grad()
        view += p.grad
        p.grad = view if p.dtype == torch.float32 else None

    def check(self, saved):
        """
        saved: one of state_dict()["groups"], from any layout; ValueError if not of these parameters
        """
        ours = [(name, list(p.shape)) for name, p in zip(self.names, self.params)]
        theirs = [(name, list(shape)) for name, shape in saved["parameters"]]
        if ours != theirs or set(saved["state"]) != set(self.state):
            wrong = next(
                (f"{a} against {b}" for a, b in zip(theirs, ours) if a != b),
                f"{len(theirs)} against {len(ours)} parameters, "
                f"state {sorted(saved['state'])} against {sorted(self.state)}",
            )
            raise ValueError(f"optimizer state of another model or optimizer: {wrong}")

    def load(self, saved):
        """Copy what of saved (see check) belongs to this rank."""
        offset = 0
        for start, size in saved["pieces"]:
            for bucket in self.buckets:
                low, high = (
                    max(start, bucket.my_start),
                    min(start + size, bucket.my_start + bucket.my_size),
                )
                if low < high:
                    for slot, tensor in bucket.state.items():
                        piece = saved["state"][slot][offset + low - start : offset + high - start]
                        tensor[low - bucket.my_start : high - bucket.my_start] = piece
            offset += size


class Bucket:
    """
    Positions [index * size, (index + 1) * size) of a flat group; ours: the rank-th of `shards`
    parts.
    """

    def __init__(self, flat, index, size, rank, shards):
        start, part = index * size, size // shards
        self.flat, self.work = flat, None
        self.param, self.grad = flat.param[start : start + size], flat.grad[start : start + size]
        self.my_start, self.my_size = start + rank * part, part
        self.my_param, self.my_grad = (
            t[self.my_start : self.my_start + part] for t in (flat.param, flat.grad)
        )
        self.state = {slot: t[index * part : (index + 1) * part] for slot, t in flat.state.items()}
        if "master" in self.state:
            self.state["master"].copy_(self.my_param)
        ends = [s + p.numel() for s, p in zip(flat.starts, flat.params)]
        self.reaches = min(1.0, (start + size) / flat.numel)
        self.parameters = {
            i for i, (s, e) in enumerate(zip(flat.starts, ends)) if s < start + size and e > start
        }
        self.expect_all()

    def expect_all(self):
        # parameters whose gradient is not complete yet
        self.missing = set(self.parameters)

    def reduce(self, shards):
        if shards > 1:
            self.work = _reduce_scatter(self.my_grad, self.grad, async_op=True)
        else:
            self.work = td.all_reduce(self.grad, async_op=True)

    def update(self, lr, step, grad_scale):
        target = self.state.get("master", self.my_param)
        self.flat.rule.update(
            target, self.my_grad, self.state, lr, self.flat.weight_decay, step, grad_scale
        )
        if target is not self.my_param:
            self.my_param.copy_(target)

    def gather(self, shards):
        if shards > 1:
            self.work = _all_gather(self.param, self.my_param, async_op=True)

    def wait(self):
        if self.work is not None:
            self.work.wait()
            self.work = None
