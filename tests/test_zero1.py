"""
zero1.py on real Gloo processes, against torch.optim.AdamW and clip_grad_norm_ on the whole batch.

Three processes start once for the whole file. Every case (a function below) runs in them once per layout,
each time with a process group of its own, and returns plain values, which the tests at the end compare.
"""
import copy
import gc
import itertools
import math
import traceback
import weakref
from datetime import timedelta
from fractions import Fraction
from functools import cache
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as td
import torch.multiprocessing as mp
import torch.nn.functional as F
from launch import _context
from torch import nn

from common import dist, zero1
from common.model import GPT, ModelConfig
from common.optim import AdamW, Group, Lion, parameter_groups
from common.zero1 import ShardedOptimizer

LAYOUTS = [(1, False), (2, False), (2, True), (3, False), (3, True)]    # ranks, zero1
B, T, V, C, D_FF = 24, 6, 11, 6, 13
RARE = V - 1                                                            # a token of one sequence of the batch
CLIP, STEPS, BUCKET = 0.7, 10, 36                                       # BUCKET: gradients a message


def buckets_of(numbers):
    """bucket_mb for buckets of so many gradients; a Fraction, so that rounding cannot shift it"""
    return Fraction(4 * numbers, 2**20)


class Toy(nn.Module):
    """Tensors of 1, 5, 7 and more numbers, one of them tied, one unused, one that only one sequence uses."""
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        shapes = dict(unused=(3, 5), embed=(V, C), up=(C, D_FF), gain=(1,), bias=(5,), vector=(7,),
                      rare=(4, C), down=(D_FF, C))
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=generator) * 0.5))

    def forward(self, tokens):
        """tokens (B, T) -> hidden (B, T, C)"""
        x = self.embed[tokens]
        if (tokens == RARE).any():
            x = x + (tokens == RARE)[..., None] * self.rare.sum(0)
        h = torch.tanh(x @ self.up) * self.gain                         # (B, T, D_FF)
        h = h + F.pad(self.bias, (0, D_FF - 5)) + F.pad(self.vector, (D_FF - 7, 0))
        return x + h @ self.down

    def nll_sum(self, tokens, targets, mask):
        logits = self(tokens) @ self.embed.T                            # (B, T, V)
        return F.cross_entropy(logits[mask], targets[mask], reduction="sum")

    def groups(self):
        """One group of a single number, one of all the others."""
        return [Group([(name, p) for name, p in self.named_parameters() if name != "gain"], AdamW(), 0.1),
                Group([("gain", self.gain)], AdamW(), 0.0)]


def ragged_batch(step):
    """-> tokens, targets, mask (B, T) of this step, the same in every process; some rows have no target"""
    generator = torch.Generator().manual_seed(step)
    tokens, targets = torch.randint(RARE, (2, B, T), generator=generator)
    tokens[3, 0] = RARE
    lengths = torch.randint(T + 1, (B,), generator=generator)
    lengths[3] = T
    return tokens, targets, torch.arange(T) < lengths[:, None]


def learning_rate(step):
    return 0.01 * (1 + step % 3)


def train(model, optimizer, steps=range(STEPS), num_micro=1, before_step=lambda loss: None):
    """The loop of the training scripts -> gradient norms"""
    rank, world_size = dist.world()
    norms = []
    for step in steps:
        tokens, targets, mask = ragged_batch(step)
        parts = [[t.chunk(world_size)[rank].chunk(num_micro)[i] for t in (tokens, targets, mask)]
                 for i in range(num_micro)]
        for i, part in enumerate(parts):
            optimizer.sync = i == num_micro - 1
            loss = model.nll_sum(*part) / mask.sum()
            (loss * optimizer.loss_scale).backward()
        before_step(loss)
        optimizer.lr = learning_rate(step)
        norms.append(optimizer.step(CLIP))
    return norms


def weights_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def snapshot(model, optimizer):
    return copy.deepcopy((weights_of(model), optimizer.state_dict()))


def same(a, b):
    """Bit-equality of nested dicts, lists and tensors"""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b


@cache
def torch_adamw(steps):
    """The same training with torch.optim on the whole batch of one process -> weights, norms"""
    model = Toy()
    groups = [dict(params=[p for _, p in g.named], weight_decay=g.weight_decay) for g in model.groups()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        tokens, targets, mask = ragged_batch(step)
        (model.nll_sum(tokens, targets, mask) / mask.sum()).backward()
        assert model.unused.grad is None
        model.unused.grad = torch.zeros_like(model.unused)              # no gradient is a zero gradient
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
    return weights_of(model), norms


# -----------------------------------------------------------------------------
# cases: run in every process of a layout. c.zero1, c.rank, c.world_size, c.folder

def trained(c):
    """Ten steps with tiny and with default buckets."""
    result = {}
    for kind, bucket_mb in (("tiny", buckets_of(BUCKET)), ("default", 16)):
        model = Toy()
        optimizer = ShardedOptimizer(model.groups(), c.zero1, bucket_mb)
        norms = train(model, optimizer)
        result[kind] = dict(weights=weights_of(model), norms=norms, num_buckets=len(optimizer.buckets),
                            state_bytes=optimizer.state_bytes())
    return result


def fractional_buckets(c):
    model = Toy()
    optimizer = ShardedOptimizer(model.groups(), c.zero1, bucket_mb=4 * BUCKET / 2**20)
    train(model, optimizer, range(3))
    return weights_of(model)


def zero_grad(c):
    """A script that also calls model.zero_grad(), which takes the gradient views away."""
    model = Toy()
    optimizer = ShardedOptimizer(model.groups(), c.zero1, buckets_of(BUCKET))
    for step in range(3):
        train(model, optimizer, [step])
        model.zero_grad()
    return weights_of(model)


def recorded(c):
    """Four micro-batches a step; all messages and gradients in the order in which they happen."""
    model, events = Toy(), []
    for name, p in model.named_parameters():                            # before the optimizer's own hooks
        p.register_post_accumulate_grad_hook(lambda p, name=name: events.append(("gradient", name)))
    optimizer = ShardedOptimizer(model.groups(), c.zero1, buckets_of(BUCKET))
    grads = {b.grad.data_ptr(): i for i, b in enumerate(optimizer.buckets)}
    params = {b.param.data_ptr(): i for i, b in enumerate(optimizer.buckets)}
    reduce_scatter, all_gather, all_reduce = zero1._reduce_scatter, zero1._all_gather, td.all_reduce

    def watched_reduce_scatter(output, tensor, **kwargs):
        events.append(("sum", grads[tensor.data_ptr()]))
        return reduce_scatter(output, tensor, **kwargs)

    def watched_all_gather(output, tensor, **kwargs):
        events.append(("gather", params[output.data_ptr()]))
        return all_gather(output, tensor, **kwargs)

    def watched_all_reduce(tensor, **kwargs):
        bucket = grads.get(tensor.data_ptr())
        events.append(("norm", tensor.numel()) if bucket is None else ("sum", bucket))
        return all_reduce(tensor, **kwargs)

    steps = []
    with patch.object(zero1, "_reduce_scatter", watched_reduce_scatter), \
            patch.object(zero1, "_all_gather", watched_all_gather), \
            patch.object(td, "all_reduce", watched_all_reduce):
        for step in range(3):
            train(model, optimizer, [step], num_micro=4)
            steps.append(events[:])
            events.clear()
    return dict(weights=weights_of(model), steps=steps, num_buckets=len(optimizer.buckets))


def summed_before_step(c):
    """As the scripts do it: the loss is summed over the ranks between the last backward and step."""
    model = Toy()
    optimizer = ShardedOptimizer(model.groups(), c.zero1, buckets_of(BUCKET))
    sums = []
    train(model, optimizer, range(3), before_step=lambda loss: sums.append(dist.all_sum(loss.item())))
    return dict(weights=weights_of(model), losses=sums)


def sync_never_off(c):
    """Four micro-batches with sync left on."""
    model = Toy()
    optimizer = ShardedOptimizer(model.groups(), c.zero1, buckets_of(BUCKET))
    always_on = SimpleNamespace(loss_scale=1.0, step=optimizer.step)  # takes .sync and .lr, passes on nothing
    optimizer.lr = learning_rate(0)
    try:
        train(model, always_on, [0], num_micro=4)
    except (RuntimeError, AssertionError):
        return "refused"
    return "accepted"


def skipped(c):
    """Two good steps, a bad one of each kind, a good one."""
    result = {}
    for kind in ("nan", "inf on one rank", "apply=False"):
        model = Toy()
        optimizer = ShardedOptimizer(model.groups(), c.zero1, buckets_of(BUCKET))
        train(model, optimizer, range(2))
        before = snapshot(model, optimizer)
        loss = model.nll_sum(*ragged_batch(99))
        if kind == "nan":
            loss = loss * float("nan")
        elif kind == "inf on one rank" and c.rank == c.world_size - 1:
            loss = loss * float("inf")
        loss.backward()
        norm = optimizer.step(CLIP, apply=kind != "apply=False")
        unchanged = same(before, snapshot(model, optimizer))
        train(model, optimizer, [2])
        result[kind] = dict(norm=norm, unchanged=unchanged, weights=weights_of(model))
    return result


def loss_scaled(c):
    """fp16's loss scale: an overflow on the last rank alone, between good steps."""
    model = Toy()
    optimizer = ShardedOptimizer(model.groups(), c.zero1, buckets_of(BUCKET), loss_scaling=True)
    scales, norms = [optimizer.loss_scale], train(model, optimizer, range(2))
    scales.append(optimizer.loss_scale)
    before = weights_of(model), [f.state["exp_avg"].clone() for f in optimizer.flats]
    overflow = 1e38 if c.rank == c.world_size - 1 else 1.0
    (model.nll_sum(*ragged_batch(99)) * optimizer.loss_scale * overflow).backward()
    bad_norm = optimizer.step(CLIP)
    unchanged = same(before, (weights_of(model), [f.state["exp_avg"].clone() for f in optimizer.flats]))
    scales.append(optimizer.loss_scale)
    norms += train(model, optimizer, [2])
    scales.append(optimizer.loss_scale)
    return dict(scales=scales, norms=norms, bad_norm=bad_norm, unchanged=unchanged, weights=weights_of(model),
                num_updates=optimizer.num_updates)


def state_file(folder, layout, rank):
    return f"{folder}/state-{layout[0]}-{layout[1]}-{rank}"


def saved(c):
    """Two steps, then a checkpoint: each shard's state, and the weights."""
    model = Toy()
    optimizer = ShardedOptimizer(model.groups(), c.zero1, buckets_of(BUCKET))
    train(model, optimizer, range(2))
    torch.save(optimizer.state_dict(), state_file(c.folder, (c.world_size, c.zero1), c.rank))
    torch.save(weights_of(model), state_file(c.folder, (c.world_size, c.zero1), "weights"))
    return optimizer.state_dict()


def load_parts(folder, layout):
    ranks = range(layout[0] if layout[1] else 1)
    return [torch.load(state_file(folder, layout, rank), weights_only=True) for rank in reversed(ranks)]


def resumed(c):
    """Two more steps from the checkpoint of every layout, with buckets of another size than it had."""
    result = {}
    for layout in LAYOUTS:
        model = Toy()
        model.load_state_dict(torch.load(state_file(c.folder, layout, "weights"), weights_only=True))
        optimizer = ShardedOptimizer(model.groups(), c.zero1, buckets_of(20))
        optimizer.load_state_dict(load_parts(c.folder, layout))
        loaded = copy.deepcopy(optimizer.state_dict())
        norms = train(model, optimizer, range(2, 4))
        result[layout] = dict(loaded=loaded, norms=norms, weights=weights_of(model))
    return result


def other_rules(c):
    """Lion and Muon on a small GPT; a Muon bucket holds whole matrices."""
    tokens = torch.randint(17, (6, 9), generator=torch.Generator().manual_seed(0)).chunk(c.world_size)[c.rank]
    result = {}
    for name in ("lion", "muon"):
        torch.manual_seed(0)
        model = GPT(ModelConfig(vocab_size=17, n_layer=2, n_head=2, n_embd=8, d_ff=12, seq_len=8))
        optimizer = ShardedOptimizer(parameter_groups(model, name), c.zero1, buckets_of(64))
        optimizer.lr = 0.01
        for _ in range(3):
            logits = model(tokens[:, :-1]) @ model.head.T               # (B, T, V)
            (F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum") / 48).backward()
            optimizer.step(1.0)
        result[name] = weights_of(model)
    return result


def experts(c):
    """Rows whose tokens all go to two of six experts, so that each rank leaves others without any."""
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=17, n_layer=2, n_head=2, n_embd=8, d_ff=12, seq_len=8, n_expert=6,
                            n_dense_layer=1, balance_coef=0.5))
    with torch.no_grad():                                     # tokens 5 f to 5 f + 4 to experts 2 f, 2 f + 1
        for f in range(3):
            model.embed.weight[5 * f:5 * f + 5, f] = 1.0
            model.blocks[1].mlp.router[2 * f:2 * f + 2, f] = 1.0
    tokens, targets = torch.randint(5, (2, 6, 8), generator=torch.Generator().manual_seed(0))
    tokens += torch.tensor([0, 0, 5, 5, 10, 10])[:, None]
    tokens, targets = (x.chunk(c.world_size)[c.rank] for x in (tokens, targets))
    optimizer, unused, stats = ShardedOptimizer(parameter_groups(model), c.zero1, buckets_of(64)), [], []
    optimizer.lr = 0.003
    for _ in range(5):
        for i, (row, target) in enumerate(zip(tokens.chunk(2), targets.chunk(2))):
            optimizer.sync = i == 1
            logits = model(row) @ model.head.T                          # (B, T, V)
            nll = F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="sum")
            ((nll + model.balance_loss()) / 48).backward()
        unused.append(int((model.routing.so_far[0, 1:] == 0).sum()))
        stats.append(model.router_stats())
        optimizer.step(1.0)
    return dict(weights=weights_of(model), unused=unused, stats=stats)


class Regression(nn.Module):
    """One matrix with a model's size of weights (0.02), far from its solution: gradients keep their sign."""
    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter((torch.randn(32, 32, generator=generator) * 0.02).bfloat16().to(dtype))
        self.x, self.y = torch.randn(2, 12, 32, generator=generator).bfloat16().to(dtype)

    def loss_sum(self, rank=0, world_size=1):
        x, y = self.x.chunk(world_size)[rank], self.y.chunk(world_size)[rank]
        return (x @ self.weight - y).float().square().sum()


def low_precision(c):
    """100 steps of lr 1e-5 on bf16 weights."""
    model = Regression(torch.bfloat16)
    group = Group(list(model.named_parameters()), AdamW(), 0.0)
    optimizer = ShardedOptimizer([group], c.zero1, buckets_of(400))
    optimizer.lr = 1e-5
    for _ in range(100):
        (model.loss_sum(c.rank, c.world_size) / 12).backward()
        optimizer.step()
    return dict(weight=model.weight.detach(), loss=model.loss_sum().item(), state=optimizer.state_dict())


CASES = [trained, fractional_buckets, zero_grad, recorded, sync_never_off, skipped, loss_scaled,
         saved, resumed, other_rules, experts, low_precision, summed_before_step]


def worker(rank, folder):
    torch.set_num_threads(1)
    for case, layout in itertools.product(CASES, LAYOUTS):
        world_size, zero1_on = layout
        if rank >= world_size:
            continue
        name = f"{folder}/{case.__name__}-{world_size}-{zero1_on}"
        if world_size > 1:
            td.init_process_group("gloo", init_method=f"file://{name}.store", timeout=timedelta(seconds=10),
                                  rank=rank, world_size=world_size)
        try:
            value = case(SimpleNamespace(rank=rank, world_size=world_size, zero1=zero1_on, folder=folder))
            if world_size > 1:
                td.barrier()
        except Exception:                                          # shown by the test that asks for the value
            value = SimpleNamespace(error=traceback.format_exc())
        torch.save(value, f"{name}-{rank}")
        if world_size > 1:
            td.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """-> function (case, layout) that gives the case's value on every rank"""
    folder = tmp_path_factory.mktemp("zero1")
    try:
        _context()                                                    # have imported torch already
        mp.start_processes(worker, (str(folder),), nprocs=3, start_method="forkserver")
        died = "was not run"
    except mp.ProcessExitedException as error:                        # Gloo aborts when messages do not match
        died = f"or one before it killed its process: {error}"

    def get(case, layout):
        paths = [folder / f"{case.__name__}-{layout[0]}-{layout[1]}-{rank}" for rank in range(layout[0])]
        assert all(path.exists() for path in paths), f"{case.__name__} {layout} {died}"
        values = [torch.load(path, weights_only=False) for path in paths]  # our own files
        errors = [value.error for value in values if isinstance(value, SimpleNamespace)]
        assert not errors, "\n".join(errors)
        return values
    get.folder = folder
    return get


# -----------------------------------------------------------------------------
# tests

def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=2e-6)


def layout_name(layout):
    return f"{layout[0]}-{'zero1' if layout[1] else 'replicated'}"


each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=layout_name)
each_parallel_layout = pytest.mark.parametrize("layout", LAYOUTS[1:], ids=layout_name)


@each_layout
@pytest.mark.parametrize("kind", ["tiny", "default"])
def test_ten_steps_equal_torch_adamw_with_the_whole_batch(results, layout, kind):
    weights, norms = torch_adamw(STEPS)
    assert min(norms) < CLIP < max(norms)                               # some steps are clipped, some are not
    for value in results(trained, layout):
        assert value[kind]["num_buckets"] == (9 if kind == "tiny" and layout[0] > 1 else 2)
        assert_close(value[kind]["weights"], weights)
        assert value[kind]["norms"] == pytest.approx(norms, rel=1e-5)


@each_parallel_layout
def test_experts_that_a_rank_has_no_tokens_for_make_no_difference(results, layout):
    whole, values = results(experts, LAYOUTS[0])[0], results(experts, layout)
    assert any(value["unused"][0] > whole["unused"][0] for value in values)
    for value in values:
        assert_close(value["weights"], whole["weights"])
        for ours, theirs in zip(value["stats"], whole["stats"]):
            assert ours["balance"] == pytest.approx(theirs["balance"], rel=1e-4)
            assert torch.tensor(ours["expert_frac"]).equal(torch.tensor(theirs["expert_frac"]))


@each_layout
def test_ranks_hold_the_same_bits(results, layout):
    values = results(trained, layout)
    assert all(same(value["tiny"]["weights"], values[0]["tiny"]["weights"]) for value in values)
    assert all(value["tiny"]["norms"] == values[0]["tiny"]["norms"] for value in values)


@each_layout
def test_state_per_rank_is_one_nth_up_to_padding(results, layout):
    world_size, zero1_on = layout
    numel = [p.numel() for p in Toy().parameters()]
    for value in results(trained, layout):
        numbers = value["tiny"]["state_bytes"] / 8                      # two fp32 moments a parameter
        shards = world_size if zero1_on else 1
        padding = BUCKET + shards                                       # of the last bucket of each group
        assert sum(numel) <= numbers * shards <= sum(numel) + padding


@each_layout
def test_bucket_mb_may_be_a_fraction(results, layout):
    for value in results(fractional_buckets, layout):
        assert_close(value, torch_adamw(3)[0])


@each_layout
def test_zero_grad_of_the_model_does_no_harm(results, layout):
    for value in results(zero_grad, layout):
        assert_close(value, torch_adamw(3)[0])


@each_layout
def test_four_micro_batches_equal_the_whole_batch(results, layout):
    for value in results(recorded, layout):
        assert_close(value["weights"], torch_adamw(3)[0])


@each_layout
def test_every_bucket_travels_once_a_step_in_a_fixed_order_and_only_in_the_last_micro_batch(results, layout):
    world_size, zero1_on = layout
    for value in results(recorded, layout):
        all_buckets = list(range(value["num_buckets"]))
        for events in value["steps"]:
            sums = [i for kind, i in events if kind == "sum"]
            assert sums == (all_buckets if world_size > 1 else [])
            assert [i for kind, i in events if kind == "gather"] == (all_buckets if zero1_on else [])
            assert [i for kind, i in events if kind == "norm"] == ([1] if zero1_on else [])
            if world_size > 1:                                      # the embedding's gradient ends a backward
                ends = [i for i, event in enumerate(events) if event == ("gradient", "embed")]
                assert len(ends) == 4 and ends[2] < events.index(("sum", 0))


@each_parallel_layout
def test_the_first_bucket_leaves_before_the_last_gradient_is_there(results, layout):
    for value in results(recorded, layout):
        for events in value["steps"]:
            last_gradient = max(i for i, (kind, _) in enumerate(events) if kind == "gradient")
            launched = [i for i, (kind, _) in enumerate(events) if kind == "sum"]
            assert launched[0] < last_gradient < launched[-1]           # `unused` keeps its bucket to the end


@each_parallel_layout
def test_a_sum_over_ranks_between_backward_and_step_does_not_mix_with_the_buckets(results, layout):
    """A rank that does not use a parameter has buckets left to send then, another has not."""
    reference = Toy()
    tokens, targets, mask = ragged_batch(0)
    loss = (reference.nll_sum(tokens, targets, mask) / mask.sum()).item()
    for value in results(summed_before_step, layout):
        assert value["losses"][0].item() == pytest.approx(loss, rel=1e-5)
        assert_close(value["weights"], torch_adamw(3)[0])


@each_parallel_layout
def test_leaving_sync_on_in_all_micro_batches_is_refused(results, layout):
    # otherwise a gradient is summed or lost depending on whether its bucket has left yet
    assert results(sync_never_off, layout) == ["refused"] * layout[0]


@each_layout
@pytest.mark.parametrize("kind", ["nan", "inf on one rank", "apply=False"])
def test_a_bad_step_changes_neither_weights_nor_state_on_any_rank(results, layout, kind):
    for value in results(skipped, layout):
        assert math.isfinite(value[kind]["norm"]) == (kind == "apply=False")
        assert value[kind]["unchanged"]
        assert_close(value[kind]["weights"], torch_adamw(3)[0])         # as if it had never been


@each_layout
def test_an_overflow_on_one_rank_skips_the_step_on_all_and_halves_the_scale(results, layout):
    for value in results(loss_scaled, layout):
        assert value["scales"] == [2.0**16, 2.0**16, 2.0**15, 2.0**15]
        assert value["unchanged"] and value["num_updates"] == 3
        assert not math.isfinite(value["bad_norm"])
        weights, norms = torch_adamw(3)
        assert value["norms"] == pytest.approx(norms, rel=1e-5)         # of the unscaled gradients
        assert_close(value["weights"], weights)


def test_loss_scale_doubles_after_2000_good_steps_in_a_row():
    p = nn.Parameter(torch.ones(1))
    optimizer = ShardedOptimizer([Group([("p", p)], AdamW(), 0.0)], loss_scaling=True)
    changes = []
    for step in range(4100):
        before = optimizer.loss_scale
        p.grad.fill_(float("inf") if step == 50 else 1.0)
        optimizer.step()
        if optimizer.loss_scale != before:
            changes.append((step, optimizer.loss_scale / before))
    assert changes == [(50, 0.5), (2050, 2.0), (4050, 2.0)]


def whole_state(parts):
    """Put the state together from the parts of all shards -> {(group, slot): tensor of all its parameters}"""
    whole = {}
    for part in parts:
        for g, group in enumerate(part["groups"]):
            numel = sum(torch.Size(shape).numel() for _, shape in group["parameters"])
            for slot, tensor in group["state"].items():
                target, offset = whole.setdefault((g, slot), torch.full((numel,), float("nan"))), 0
                for start, size in group["pieces"]:
                    end = min(start + size, numel)                      # what follows is padding
                    if start < end:
                        target[start:end] = tensor[offset:offset + end - start]
                    offset += size
    return whole


@pytest.mark.parametrize("source", LAYOUTS, ids=layout_name)
@each_layout
def test_state_of_any_layout_loads_into_any_other_and_training_continues_equal(results, layout, source):
    before = whole_state(results(saved, source))
    values = [value[source] for value in results(resumed, layout)]
    after = whole_state([value["loaded"] for value in values])
    assert same(before, after) and not any(tensor.isnan().any() for tensor in after.values())
    for value in values:
        assert value["loaded"]["num_updates"] == 2
        assert value["norms"] == pytest.approx(torch_adamw(4)[1][2:], rel=1e-5)
        assert_close(value["weights"], torch_adamw(4)[0])


def test_loss_scale_and_its_count_are_part_of_the_state():
    def optimizer():
        group = Group([("p", nn.Parameter(torch.ones(3)))], AdamW(), 0.0)
        return ShardedOptimizer([group], loss_scaling=True)
    old, new = optimizer(), optimizer()
    old.flats[0].grad.fill_(float("inf"))
    old.step()
    for _ in range(7):
        old.step()
    new.load_state_dict([copy.deepcopy(old.state_dict())])
    assert (new.loss_scale, new.good_steps, new.num_updates) == (2.0**15, 7, 7)


class Other(Toy):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(C, D_FF + 1))


@pytest.mark.parametrize("groups, message", [
    (lambda: Other().groups(), "up"),
    (lambda: [Group(g.named, Lion(), g.weight_decay) for g in Toy().groups()], "exp_avg_sq"),
    (lambda: [Group(list(Toy().named_parameters()), AdamW(), 0.0)], "2 parameter groups"),
    (lambda: [Group(g.named[1:] or g.named, g.rule, 0.0) for g in Toy().groups()], "7 against 6 parameters"),
], ids=["another shape", "another rule", "other groups", "fewer parameters"])
def test_state_of_another_model_or_optimizer_is_refused(results, groups, message):
    optimizer = ShardedOptimizer(groups())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(load_parts(results.folder, (2, True)))


@pytest.mark.parametrize("shards", [[0], [1], [0, 0], [0, 1, 1], []], ids=str)
def test_a_missing_or_repeated_shard_is_refused(results, shards):
    parts = {part["shard"]: part for part in load_parts(results.folder, (2, True))}
    optimizer = ShardedOptimizer(Toy().groups())
    with pytest.raises(ValueError, match="shards"):
        optimizer.load_state_dict([parts[shard] for shard in shards])
    assert optimizer.num_updates == 0


def test_a_refused_state_leaves_the_optimizer_as_it_was(results):
    model = Other()
    optimizer = ShardedOptimizer(model.groups())
    before = snapshot(model, optimizer)
    with pytest.raises(ValueError):
        optimizer.load_state_dict(load_parts(results.folder, (3, True)))
    assert same(before, snapshot(model, optimizer))


@each_parallel_layout
@pytest.mark.parametrize("name", ["lion", "muon"])
def test_lion_and_muon_give_the_same_weights_in_every_layout(results, layout, name):
    alone = results(other_rules, (1, False))[0][name]
    for value in results(other_rules, layout):
        assert_close(value[name], alone)


def test_an_optimizer_that_is_dropped_is_gone():
    """Hooks of its parameters that held on to it would keep weights, gradients and state for good."""
    model = nn.Linear(3, 3)
    optimizer = ShardedOptimizer(parameter_groups(model))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    alive = weakref.ref(optimizer)
    del optimizer, model
    gc.collect()
    assert alive() is None


def test_parameters_of_one_group_must_share_their_dtype():
    mixed = [("a", nn.Parameter(torch.ones(2))), ("b", nn.Parameter(torch.ones(2).bfloat16()))]
    with pytest.raises(ValueError, match="dtype"):
        ShardedOptimizer([Group(mixed, AdamW(), 0.0)])


# -----------------------------------------------------------------------------
# bf16 parameters: 100 steps of lr 1e-5

@cache
def torch_regression(dtype):
    """The same 100 steps by torch.optim, without master weights -> start, weight, loss"""
    model = Regression(dtype)
    start = model.weight.detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(100):
        optimizer.zero_grad()
        (model.loss_sum() / 12).backward()
        optimizer.step()
    return start, model.weight.detach(), model.loss_sum().item()


def fraction_moved(start, end):
    return (start != end).float().mean().item()


@each_layout
def test_bf16_parameters_move_as_float32_ones_do(results, layout):
    start, _, loss = torch_regression(torch.float32)
    for value in results(low_precision, layout):
        assert value["weight"].dtype == torch.bfloat16
        assert fraction_moved(start.bfloat16(), value["weight"]) > 0.9
        assert value["loss"] == pytest.approx(loss, rel=0.01)
    # not so without master weights, or these numbers would prove nothing
    assert fraction_moved(*torch_regression(torch.bfloat16)[:2]) < 0.5


@each_layout
def test_master_weights_of_bf16_parameters_are_within_one_percent_of_the_float32_run(results, layout):
    start, weight, _ = torch_regression(torch.float32)
    values = results(low_precision, layout)
    master = whole_state([value["state"] for value in values])[0, "master"].view(32, 32)
    assert (master - weight).norm() < 0.01 * weight.norm() < (start - weight).norm()
    assert all(torch.equal(value["weight"], master.bfloat16()) for value in values)


@each_layout
def test_the_state_of_bf16_parameters_is_float32(results, layout):
    for value in results(low_precision, layout):
        state = value["state"]["groups"][0]["state"]
        assert {slot: t.dtype for slot, t in state.items()} == dict.fromkeys(
            ("exp_avg", "exp_avg_sq", "master"), torch.float32)
