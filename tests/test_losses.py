"""losses.py against plain float64 logits, cross_entropy and log_softmax, formulas by hand, and trl."""
import copy
import math
import re
from collections import defaultdict
from decimal import Decimal, localcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from common import losses
from common.losses import (
    chunked,
    dpo_loss,
    group_advantages,
    grpo_token_loss,
    head_logits,
    k3,
    kd_loss,
    linear_cross_entropy,
    linear_kd_loss,
    log1mexp,
    orpo_loss,
    simpo_loss,
    token_logps,
)

aten = torch.ops.aten
B, T, C, V = 3, 7, 8, 13                             # 21 positions: chunks of 4 leave a rest
CHUNKS = (1, 3, 4, 1000, 0)


@pytest.fixture
def batch():
    """hidden (B, T, C), weight (V, C), targets (B, T)"""
    torch.manual_seed(0)
    return torch.randn(B, T, C), torch.randn(V, C), torch.randint(V, (B, T))


def leaf(x):
    return x.detach().clone().requires_grad_()


def reference(hidden, weight, targets, scale):
    """The textbook loss in float64, all logits at once -> loss, gradients of hidden and weight, in float32"""
    h, w = leaf(hidden.double()), leaf(weight.double())
    nll = F.cross_entropy((h @ w.T).flatten(0, -2), targets.flatten(), reduction="none")
    loss = (nll * scale.flatten().double()).sum()
    loss.backward()
    return loss.float().detach(), h.grad.float(), w.grad.float()


def ours(hidden, weight, targets, *args, **kwargs):
    h, w = leaf(hidden), leaf(weight)
    loss = linear_cross_entropy(h, w, targets, *args, **kwargs)
    loss.backward()
    return loss.detach(), h.grad, w.grad


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("kind", ["plain", "mask", "token_weight", "both", "all_masked"])
def test_linear_cross_entropy_and_its_gradients_equal_the_textbook_loss(batch, kind, chunk):
    mask, token_weight = torch.rand(B, T) < 0.6, torch.rand(B, T) + 0.5
    if kind == "all_masked":
        mask = torch.zeros(B, T, dtype=torch.bool)
    options, scale = {"plain": ({}, torch.ones(B, T)),
                      "mask": (dict(mask=mask), mask),
                      "token_weight": (dict(token_weight=token_weight), token_weight),
                      "both": (dict(mask=mask, token_weight=token_weight), mask * token_weight),
                      "all_masked": (dict(mask=mask), mask)}[kind]
    result = ours(*batch, **options, chunk_size=chunk)
    assert result[0].shape == () and result[0].dtype == torch.float32
    assert_close(result, reference(*batch, scale))


def test_linear_cross_entropy_takes_flat_positions(batch):
    hidden, weight, targets = batch
    loss, d_hidden, d_weight = ours(hidden.flatten(0, 1), weight, targets.flatten(), chunk_size=4)
    assert_close((loss, d_hidden.view(B, T, C), d_weight), reference(*batch, torch.ones(B, T)))


def test_linear_cross_entropy_scales_its_gradients_by_the_upstream_gradient(batch):
    hidden, weight, targets = batch
    h, w = leaf(hidden), leaf(weight)
    (linear_cross_entropy(h, w, targets, chunk_size=4) * 0.37).backward()
    _, d_hidden, d_weight = reference(*batch, torch.ones(B, T))
    assert_close((h.grad, w.grad), (0.37 * d_hidden, 0.37 * d_weight))


@pytest.mark.parametrize("nats", [120.0, 500.0, 5000.0])
def test_loss_is_right_where_the_probability_of_the_target_underflows(nats):
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0]])                     # (N, C)
    weight = torch.tensor([[nats, 0.0], [0.0, 0.0], [0.0, 1.0]])        # (V, C): sure of token 0 at 0
    targets = torch.tensor([1, 2])
    result, expected = ours(hidden, weight, targets), reference(hidden, weight, targets, torch.ones(2))
    assert expected[0] > nats
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-5)
    logps = token_logps(hidden[None], weight, targets[None])
    torch.testing.assert_close(-logps.sum(), expected[0], rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30], ids=["nan", "inf", "logits overflow"])
def test_a_masked_position_poisons_neither_loss_nor_gradients(batch, poison):
    hidden, weight, targets = batch
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 2] = False
    expected = reference(hidden, weight, targets, mask)
    hidden, weight = hidden.clone(), weight.clone()
    hidden[1, 2] = poison
    if poison == 1e30:                                                  # finite, but its products are not
        hidden[1, 2], weight[3] = 3e38, weight[3] * 4
        clean = hidden.clone()
        clean[1, 2] = 0
        expected = reference(clean, weight, targets, mask)
        assert not (hidden @ weight.T)[1, 2].isfinite().all()
    loss, d_hidden, d_weight = ours(hidden, weight, targets, mask, chunk_size=4)
    assert_close(loss, expected[0])
    assert_close(d_hidden, expected[1])                                 # zero at the masked position
    assert_close(d_weight, expected[2])


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_input_gets_no_gradient_and_the_other_the_right_one(batch, frozen):
    hidden, weight, targets = batch
    h, w = leaf(hidden), leaf(weight)
    (h if frozen == "hidden" else w).requires_grad_(False)
    linear_cross_entropy(h, w, targets, chunk_size=4).backward()
    _, d_hidden, d_weight = reference(*batch, torch.ones(B, T))
    assert (h.grad is None) == (frozen == "hidden") and (w.grad is None) == (frozen == "weight")
    assert_close(w.grad if frozen == "hidden" else h.grad, d_weight if frozen == "hidden" else d_hidden)


def test_a_tied_weight_gets_the_gradients_of_both_its_uses():
    torch.manual_seed(0)
    weight, tokens, targets = torch.randn(V, C), torch.randint(V, (B, T)), torch.randint(V, (B, T))
    tied = leaf(weight)
    linear_cross_entropy(F.embedding(tokens, tied).tanh(), tied, targets, chunk_size=4).backward()
    expected = leaf(weight.double())
    logits = expected[tokens].tanh() @ expected.T                       # (B, T, V)
    F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").backward()
    assert_close(tied.grad, expected.grad.float())


class Watch(TorchDispatchMode):
    """The largest tensor that any operation returned, in numbers, and how many matrix products ran."""
    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(x):
                self.largest = max(self.largest, x.numel(), x.untyped_storage().nbytes() // x.element_size())
        self.products += func.overloadpacket in (aten.mm, aten.addmm, aten.addmm_)
        return result


def test_without_gradients_the_value_is_the_same_and_only_the_logits_are_computed(batch):
    hidden, weight, targets = batch
    w = leaf(weight)                                                    # as in evaluation: it wants gradients
    with torch.no_grad(), Watch() as watch:
        loss = linear_cross_entropy(hidden, w, targets, chunk_size=4)
    assert not loss.requires_grad
    assert_close(loss, reference(*batch, torch.ones(B, T))[0])
    assert watch.products == 6                                          # one a chunk: ceil(21 / 4)


def test_a_second_backward_raises_or_gives_the_gradients_again(batch):
    hidden, weight, targets = batch
    h, w = leaf(hidden), leaf(weight)
    loss = linear_cross_entropy(h, w, targets)
    loss.backward(retain_graph=True)
    once = h.grad.clone(), w.grad.clone()
    try:
        loss.backward()
    except RuntimeError:
        return
    assert_close((h.grad, w.grad), (2 * once[0], 2 * once[1]))


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_bf16_autocast_is_close_to_float32(hidden_dtype):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(4, 32, 64), torch.randn(97, 64) * 0.1, torch.randint(97, (4, 32))
    hidden = hidden.bfloat16().float()                                  # what the reference gets, too
    expected = reference(hidden, weight, targets, torch.ones(4, 32))
    with torch.autocast("cpu", torch.bfloat16):
        result = ours(hidden.to(hidden_dtype), weight, targets, chunk_size=50)
    assert [x.dtype for x in result] == [torch.float32, hidden_dtype, torch.float32]
    for actual, wanted in zip(result, expected):                        # bf16 keeps 8 bits: 0.4 % a rounding
        assert (actual.float() - wanted).norm() < 0.01 * wanted.norm()
    with torch.autocast("cpu", torch.bfloat16):
        logps = token_logps(hidden.to(hidden_dtype), weight, targets, chunk_size=50)
    assert logps.dtype == torch.float32 and abs(-logps.sum() - expected[0]) < 0.01 * expected[0]


def textbook(hidden, weight, targets, chunk_size):
    """What must be caught: all logits at once."""
    return F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="sum")


@pytest.mark.parametrize("loss, holds_all", [
    (linear_cross_entropy, False), (lambda *args, **kwargs: token_logps(*args, **kwargs).sum(), False),
    (lambda *args, **kwargs: chunked(smoothed, *args, **kwargs), False),
    (textbook, True)], ids=["linear_cross_entropy", "token_logps", "chunked", "textbook"])
def test_the_logits_are_never_held_whole_in_forward_or_backward(loss, holds_all):
    n_vocab, n_embd, seq_len, chunk = 211, 16, 300, 32
    h, w = leaf(torch.randn(2, seq_len, n_embd)), leaf(torch.randn(n_vocab, n_embd))
    with Watch() as watch:
        loss(h, w, torch.randint(n_vocab, (2, seq_len)), chunk_size=chunk).backward()
    allowed = max(chunk * n_vocab, n_vocab * n_embd, 2 * seq_len * n_embd)
    assert (watch.largest > allowed) == holds_all, f"{watch.largest} numbers, {allowed} allowed"


# -----------------------------------------------------------------------------
# chunked: losses written in plain PyTorch

def cross_entropy(logits, targets):
    return F.cross_entropy(logits, targets, reduction="none")


def smoothed(logits, targets):
    """Label smoothing and a z-loss"""
    nll = F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.1)
    return nll + 1e-2 * logits.logsumexp(-1)**2


def focal(logits, targets):
    logp = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    return -(1 - logp.exp())**2 * logp


def whole(loss_of, hidden, weight, *rows, mask):
    """All logits at once, in float64 -> sums, and gradients of 0.37 times the first, in float32"""
    h, w = leaf(hidden.double()), leaf(weight.double())
    losses = loss_of((h @ w.T)[mask], *(row[mask] for row in rows))
    sums = [x.sum() for x in (losses if isinstance(losses, tuple) else (losses,))]
    (0.37 * sums[0]).backward()
    return [x.detach().float() for x in (*sums, h.grad, w.grad)]


def in_chunks(loss_of, hidden, weight, *rows, **options):
    h, w = leaf(hidden), leaf(weight)
    sums = chunked(loss_of, h, w, *rows, **options)
    sums = sums if isinstance(sums, tuple) else (sums,)
    assert all(x.shape == () and x.dtype == torch.float32 for x in sums)
    assert [x.requires_grad for x in sums] == [True] + [False] * (len(sums) - 1)
    (0.37 * sums[0]).backward()
    return [*(x.detach() for x in sums), h.grad, w.grad]


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("loss_of", [cross_entropy, smoothed, focal])
@pytest.mark.parametrize("masked", [False, True])
def test_a_loss_in_plain_torch_equals_that_of_whole_logits(batch, loss_of, masked, chunk):
    mask = torch.rand(B, T) < 0.6 if masked else torch.ones(B, T, dtype=torch.bool)
    result = in_chunks(loss_of, *batch, mask=mask if masked else None, chunk_size=chunk)
    assert_close(result, whole(loss_of, *batch, mask=mask))


def test_cross_entropy_in_plain_torch_equals_the_one_made_by_hand(batch):
    mask = torch.rand(B, T) < 0.6
    h, w = leaf(batch[0]), leaf(batch[1])
    (0.37 * linear_cross_entropy(h, w, batch[2], mask)).backward()
    assert_close(in_chunks(cross_entropy, *batch, mask=mask)[1:], [h.grad, w.grad])


@pytest.mark.parametrize("chunk", CHUNKS)
def test_several_sums_and_rows_of_several_numbers(batch, chunk):
    """As a distillation of one's own: the gradient is that of the first sum."""
    teacher, weights = torch.randn(B, T, V).softmax(-1), torch.rand(B, T)
    mask = torch.rand(B, T) < 0.6

    def loss_of(logits, targets, teacher, weights):
        ce = cross_entropy(logits, targets) * weights
        kl = F.kl_div(logits.log_softmax(-1), teacher.to(logits.dtype), reduction="none").sum(-1)
        return 0.3 * ce + 0.7 * kl, ce, kl
    rows = batch[2], teacher, weights
    result = in_chunks(loss_of, *batch[:2], *rows, mask=mask, chunk_size=chunk)
    assert len(result) == 5
    assert_close(result, whole(loss_of, *batch[:2], *rows, mask=mask))


def test_where_nothing_counts_all_sums_and_gradients_are_0(batch):
    def loss_of(logits, targets):
        return smoothed(logits, targets), cross_entropy(logits, targets)
    result = in_chunks(loss_of, *batch, mask=torch.zeros(B, T, dtype=torch.bool))
    assert [x.shape for x in result] == [(), (), (B, T, C), (V, C)]
    assert not any(x.any() for x in result)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.01), (torch.float16, 0.001)],
                         ids=str)
@pytest.mark.parametrize("hidden_dtype", [torch.float32, "autocast's"])
def test_a_loss_in_plain_torch_under_autocast_is_close_to_float32(dtype, tolerance, hidden_dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(4, 32, 64), torch.randn(97, 64) * 0.1
    targets = torch.randint(97, (4, 32))
    hidden_dtype = dtype if hidden_dtype == "autocast's" else hidden_dtype
    hidden = hidden.to(dtype).float()                          # what the reference gets, too
    seen = []

    def loss_of(logits, targets):
        seen.append(logits.dtype)
        return smoothed(logits, targets)
    expected = whole(smoothed, hidden, weight, targets, mask=torch.ones(4, 32, dtype=torch.bool))
    with torch.autocast("cpu", dtype):
        result = in_chunks(loss_of, hidden.to(hidden_dtype), weight, targets, chunk_size=50)
    assert [x.dtype for x in result] == [torch.float32, hidden_dtype, torch.float32]
    assert set(seen) == {torch.float32}
    for actual, wanted in zip(result, expected):
        assert (actual.float() - wanted).norm() < tolerance * wanted.norm()


def test_a_loss_in_plain_torch_without_gradients(batch):
    w = leaf(batch[1])
    expected = whole(smoothed, *batch, mask=torch.ones(B, T, dtype=torch.bool))[0]
    with torch.no_grad(), Watch() as watch:
        loss = chunked(smoothed, batch[0], w, batch[2], chunk_size=4)
    assert not loss.requires_grad and watch.products == 6               # one a chunk: ceil(21 / 4)
    assert_close(loss, expected)
    assert not chunked(smoothed, *batch).requires_grad                  # all is frozen


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_loss_in_plain_torch_of_a_frozen_input(batch, frozen):
    h, w = leaf(batch[0]), leaf(batch[1])
    (h if frozen == "hidden" else w).requires_grad_(False)
    (0.37 * chunked(smoothed, h, w, batch[2], chunk_size=4)).backward()
    _, d_hidden, d_weight = whole(smoothed, *batch, mask=torch.ones(B, T, dtype=torch.bool))
    if frozen == "hidden":
        assert h.grad is None
        assert_close(w.grad, d_weight)
    else:
        assert w.grad is None
        assert_close(h.grad, d_hidden)


def test_a_second_backward_through_a_loss_in_plain_torch_is_refused(batch):
    loss = chunked(smoothed, leaf(batch[0]), leaf(batch[1]), batch[2])
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_a_loss_that_is_not_one_per_position_is_refused(batch):
    for loss_of, shape in ((F.cross_entropy, r"\(\)"), (lambda logits, _: logits, r"\(21, 13\)"),
                           (lambda logits, _: (cross_entropy(logits, _), logits.sum()), r"\(\)")):
        with pytest.raises(ValueError, match=rf"loss_of returned shape {shape}, expected \(21,\)"):
            chunked(loss_of, *batch)


def page():
    return (Path(__file__).parents[1] / "docs/losses.md").read_text(encoding="utf-8")


def test_the_example_of_the_documentation_runs(batch):
    hidden, weight, targets = batch
    mask, h, w = torch.rand(B, T) < 0.6, leaf(hidden), leaf(weight)
    block, = re.findall(r"```python\n(.*?)```", page(), re.DOTALL)
    names = dict(F=F, losses=losses, hidden=h, model=SimpleNamespace(head=w),
                 batch=SimpleNamespace(targets=targets, mask=mask))
    exec(block, names)
    names["loss_sum"].backward()
    logits = (hidden.double() @ weight.double().T)[mask]
    expected = 0.9 * cross_entropy(logits, targets[mask]) - 0.1 * logits.log_softmax(-1).mean(-1)
    expected = (expected + 1e-4 * logits.logsumexp(-1)**2).sum()
    assert_close(names["loss_sum"].detach(), expected.float())
    assert h.grad[mask].any() and w.grad.any()


# -----------------------------------------------------------------------------
# token_logps

def reference_logps(hidden, weight, targets, temperature):
    logits = hidden @ weight.T / temperature                            # (B, T, V)
    return logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_token_logps_and_their_gradients_equal_log_softmax(batch, chunk, temperature):
    hidden, weight, targets = batch
    upstream = torch.randn(B, T)
    h, w = leaf(hidden), leaf(weight)
    logps = token_logps(h, w, targets, temperature, chunk_size=chunk)
    logps.backward(upstream)
    h64, w64 = leaf(hidden.double()), leaf(weight.double())
    expected = reference_logps(h64, w64, targets, temperature)
    expected.backward(upstream.double())
    assert logps.shape == (B, T) and logps.dtype == torch.float32
    assert_close((logps.detach(), h.grad, w.grad),
                 tuple(x.float() for x in (expected.detach(), h64.grad, w64.grad)))


def test_token_logps_have_the_slope_that_finite_differences_show(batch):
    hidden, weight, targets = batch
    upstream, d_h, d_w = torch.randn(B, T), torch.randn(B, T, C), torch.randn(V, C)
    h, w = leaf(hidden), leaf(weight)
    (token_logps(h, w, targets, 1.3, chunk_size=4) * upstream).sum().backward()
    eps, values = 2e-3, []                                              # small, yet above float32's rounding
    for move in (eps, -eps):
        moved = token_logps(hidden + move * d_h, weight + move * d_w, targets, 1.3)
        values.append((moved * upstream).double().sum())
    slope = (values[0] - values[1]) / (2 * eps)
    assert ((h.grad * d_h).sum() + (w.grad * d_w).sum()).item() == pytest.approx(slope.item(), rel=5e-3)


def test_the_logps_of_all_targets_are_a_distribution(batch):
    hidden, weight, _ = batch
    total = sum(token_logps(hidden, weight, torch.full((B, T), v), 0.7, chunk_size=4).exp() for v in range(V))
    assert_close(total, torch.ones(B, T))


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_token_logps_leave_suppressed_ids_out(batch, chunk, temperature):
    hidden, weight, _ = batch
    suppress, upstream = (0, 5, 12, 5), torch.randn(B, T)               # twice is once
    allowed = torch.tensor([v for v in range(V) if v not in suppress])
    targets = allowed[torch.randint(len(allowed), (B, T))]
    weight[5] *= 1e4                                                    # its e^logit overflows
    h, w = leaf(hidden), leaf(weight)
    logps = token_logps(h, w, targets, temperature, chunk_size=chunk, suppress=suppress)
    logps.backward(upstream)
    h64, w64 = leaf(hidden.double()), leaf(weight.double())
    logits = (h64 @ w64.T).index_fill(-1, torch.tensor(suppress), -torch.inf) / temperature
    expected = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    expected.backward(upstream.double())
    assert_close((logps.detach(), h.grad, w.grad),
                 tuple(x.float() for x in (expected.detach(), h64.grad, w64.grad)))
    assert not w.grad[[0, 5, 12]].any() and w.grad[allowed].any(dim=1).all()


@pytest.mark.parametrize("suppress", [(), (3, 12)], ids=str)
@pytest.mark.parametrize("chunk", CHUNKS)
def test_token_logps_among_the_kept_ids_of_each_position(batch, chunk, suppress):
    """As after top-k and top-p: other ids have neither probability nor gradient."""
    hidden, weight, _ = batch
    upstream, free = torch.randn(B, T), [v for v in range(V) if v not in suppress]
    kept = [torch.tensor(free)[torch.randperm(len(free))[:1 + i % 5]].int() for i in range(B * T)]
    targets = torch.stack([ids[0] for ids in kept]).long().view(B, T)
    counts = torch.tensor([len(ids) for ids in kept])
    h, w = leaf(hidden), leaf(weight)
    logps = token_logps(h, w, targets, 0.7, chunk_size=chunk, suppress=suppress,
                        support=(torch.cat(kept), counts))
    logps.backward(upstream)
    h64, w64 = leaf(hidden.double()), leaf(weight.double())
    expected = torch.stack([(w64[ids.long()] @ x / 0.7).log_softmax(-1)[0]
                            for x, ids in zip(h64.flatten(0, 1), kept)]).view(B, T)
    expected.backward(upstream.double())
    assert_close((logps.detach(), h.grad, w.grad),
                 tuple(x.float() for x in (expected.detach(), h64.grad, w64.grad)))
    assert not logps.flatten()[counts == 1].any()                       # one id left: certain
    outside = token_logps(hidden, weight, (targets + 1) % V, 0.7, support=(torch.cat(kept), counts)).flatten()
    lost = torch.tensor([(t + 1) % V not in ids for t, ids in zip(targets.flatten().tolist(), kept)])
    assert ((outside == -torch.inf) == lost).all()


def test_the_logps_of_all_ids_but_the_suppressed_ones_are_a_distribution(batch):
    hidden, weight, _ = batch
    logps = torch.stack([token_logps(hidden, weight, torch.full((B, T), v), 0.7, suppress=(2, 3))
                         for v in range(V)])
    assert_close(logps.exp().sum(0), torch.ones(B, T))
    assert (logps[2:4] == -torch.inf).all()


# -----------------------------------------------------------------------------
# the denominators

def ragged_gradients(model, tokens, targets, mask, num_micro, mean_of_means=False):
    """Gradients of (embed, matrix) when the batch is cut into num_micro parts."""
    embed, matrix = leaf(model[0]), leaf(model[1])
    n_tokens = mask.sum()
    for tok, tgt, m in zip(tokens.chunk(num_micro), targets.chunk(num_micro), mask.chunk(num_micro)):
        hidden = torch.tanh(embed[tok] @ matrix)                        # (B, T, C)
        loss_sum = linear_cross_entropy(hidden, embed, tgt, m, chunk_size=4)
        (loss_sum / (m.sum().clamp(min=1) * num_micro if mean_of_means else n_tokens)).backward()
    return embed.grad, matrix.grad


def test_gradients_of_a_ragged_batch_do_not_depend_on_how_it_is_cut():
    torch.manual_seed(0)
    model = torch.randn(V, C), torch.randn(C, C)
    tokens, targets = torch.randint(V, (8, T)), torch.randint(V, (8, T))
    lengths = torch.tensor([1, 7, 2, 0, 5, 0, 0, 3])                    # some parts have no target at all
    mask = torch.arange(T) < lengths[:, None]                           # (B, T)
    embed, matrix = (leaf(x.double()) for x in copy.deepcopy(model))
    logits = torch.tanh(embed[tokens] @ matrix) @ embed.T               # (B, T, V), float64
    F.cross_entropy(logits[mask], targets[mask], reduction="mean").backward()
    expected = embed.grad.float(), matrix.grad.float()
    for num_micro in (1, 2, 4, 8):
        assert_close(ragged_gradients(model, tokens, targets, mask, num_micro), expected)
    wrong = ragged_gradients(model, tokens, targets, mask, 8, mean_of_means=True)
    assert (wrong[0] - expected[0]).norm() > 0.1 * expected[0].norm()   # the common mistake would show


# -----------------------------------------------------------------------------
# preferences

def sigma(x):
    return 1 / (1 + (-x).exp())


def hand_dpo(pc, pr, rc, rr, beta, smoothing, kind):
    """-> loss of a pair, its derivatives by the four log-probs"""
    d = (pc - rc) - (pr - rr)
    if kind == "sigmoid":
        loss = -(1 - smoothing) * sigma(beta * d).ln() - smoothing * sigma(-beta * d).ln()
        slope = beta * (sigma(beta * d) - 1 + smoothing)
    elif kind == "ipo":
        loss, slope = (d - 1 / (2 * beta)) ** 2, 2 * d - 1 / beta
    else:
        loss, slope = max(1 - beta * d, 0), -beta if beta * d < 1 else 0
    return loss, slope, -slope, -slope, slope


def hand_simpo(chosen, rejected, beta, gamma):
    p = sigma(beta * (chosen - rejected) - gamma)
    return -p.ln(), beta * (p - 1), beta * (1 - p)


def hand_orpo(chosen, rejected, beta):
    p, q = chosen.exp(), rejected.exp()
    log_odds = (p / (1 - p)).ln() - (q / (1 - q)).ln()
    slope = -beta * sigma(-log_odds)
    return -beta * sigma(log_odds).ln() - chosen, slope / (1 - p) - 1, -slope / (1 - q)


def by_hand(formula, rows, *options):
    """rows of log-probs -> losses (B,), derivatives (B, ...), float64, of sums that 60 digits keep exact"""
    with localcontext() as context:
        context.prec = 60
        options = [x if isinstance(x, str) else Decimal(x) for x in options]
        rows = [[float(x) for x in formula(*map(Decimal, row), *options)] for row in rows]
    losses, *slopes = torch.tensor(rows, dtype=torch.float64).T
    return losses, torch.stack(slopes, dim=1)


def with_slopes(loss, rows, dtype):
    """-> losses (B,) and derivatives (B, ...) in float64, computed in dtype"""
    x = torch.tensor(rows, dtype=dtype, requires_grad=True)
    values = loss(*x.T)
    assert values.shape == (len(rows),) and values.dtype == dtype
    slopes, = torch.autograd.grad(values.sum(), x)
    return values.detach().double(), slopes.double()


def rounded(rows):
    """What float32 makes of numbers, as float: the same for a formula by hand"""
    return torch.tensor(rows, dtype=torch.float32).tolist()


def assert_by_hand(loss, formula, rows, *options):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
        torch.testing.assert_close(with_slopes(loss, rows, dtype), by_hand(formula, rows, *options),
                                   rtol=tolerance, atol=tolerance * 1e-3)


# chosen and rejected, of the policy and of the reference
FOUR = rounded([(-3.25, -4.5, -3.5, -4.0), (-20.0, -1.0, -5.0, -6.0), (-1.5, -41.0, -7.0, -7.75),
                (-2.0, -3.0, -2.5, -3.0), (-90.0, -30.0, -15.0, -70.0)])
MEANS = rounded([(-0.3, -1.7), (-2.6, -0.05), (-1.0, -1.0), (-0.6931, -0.6932), (-9.5, -1e-3), (-1e-4, -6.0)])
DPO = [("sigmoid", 0.0), ("sigmoid", 0.1), ("sigmoid", 0.5), ("ipo", 0.0), ("hinge", 0.0)]


@pytest.mark.parametrize("beta", [0.1, 0.75])
@pytest.mark.parametrize("kind, smoothing", DPO)
def test_dpo_losses_and_gradients_equal_the_formulas_by_hand(kind, smoothing, beta):
    options = beta, smoothing, kind
    assert_by_hand(lambda *four: dpo_loss(*four, *options), hand_dpo, FOUR, *options)


def test_simpo_and_orpo_losses_and_gradients_equal_the_formulas_by_hand():
    for beta, gamma in ((2.0, 0.5), (10.0, 3.0)):
        assert_by_hand(lambda *two: simpo_loss(*two, beta, gamma), hand_simpo, MEANS, beta, gamma)
    for beta in (0.1, 1.0):
        assert_by_hand(lambda *two: orpo_loss(*two, beta), hand_orpo, MEANS, beta)


def test_preference_losses_have_the_slopes_that_finite_differences_show():
    torch.manual_seed(0)
    four = [-3 * torch.rand(6, dtype=torch.float64) - 0.1 for _ in range(4)]
    four = [x.requires_grad_() for x in four]
    for kind, smoothing in DPO:
        assert torch.autograd.gradcheck(lambda *x: dpo_loss(*x, 0.3, smoothing, kind), four)
    assert torch.autograd.gradcheck(simpo_loss, four[:2]) and torch.autograd.gradcheck(orpo_loss, four[:2])
    assert torch.autograd.gradcheck(log1mexp, four[:1])


@pytest.mark.parametrize("beta", [0.05, 0.1, 2.0])
def test_where_policy_and_reference_agree_the_losses_are_constants(beta):
    chosen, rejected = torch.tensor([-3.3, -700.1, -0.2]), torch.tensor([-41.7, -2.9, -0.2])
    same = chosen, rejected, chosen, rejected
    for kind, smoothing in DPO:
        constant = {"sigmoid": math.log(2), "ipo": 1 / (4 * beta**2), "hinge": 1.0}[kind]
        assert dpo_loss(*same, beta, smoothing, kind).tolist() == pytest.approx([constant] * 3, rel=1e-6)
    assert simpo_loss(chosen, chosen, beta, 0.0).tolist() == pytest.approx([math.log(2)] * 3, rel=1e-6)
    even = orpo_loss(chosen, chosen, beta) - beta * math.log(2)
    assert even.tolist() == pytest.approx((-chosen).tolist(), rel=1e-6)


@pytest.mark.parametrize("kind, smoothing", DPO)
def test_differences_of_10_000_nats_give_the_right_dpo_loss_and_gradient(kind, smoothing):
    far = [(0.0, -1e4, 0.0, 0.0), (-1e4, 0.0, 0.0, 0.0), (-1e4, -2e4, -2e4, -1e4), (-2e4, -1e4, -1e4, -2e4)]
    options = 0.1, smoothing, kind
    assert_by_hand(lambda *four: dpo_loss(*four, *options), hand_dpo, far, *options)


def test_extreme_means_give_the_right_simpo_and_orpo_loss_and_gradient():
    values = rounded([-1e-6, -1e-3, -0.6931, -20.0, -200.0, -1e4])
    rows = [(chosen, rejected) for chosen in values for rejected in values]
    assert_by_hand(lambda *two: simpo_loss(*two, 2.0, 0.5), hand_simpo, rows, 2.0, 0.5)
    assert_by_hand(lambda *two: orpo_loss(*two, 0.1), hand_orpo, rows, 0.1)


def test_orpo_of_an_answer_that_is_certain_is_finite():
    """Its odds are infinite: such a mean counts as just below 0."""
    for dtype in (torch.float32, torch.float64):
        for sure in (-1e-9, 0.0):
            rows = [(sure, -200.0), (-200.0, sure), (sure, sure), (sure, -1e-9), (sure, -0.5), (-0.5, sure)]
            losses, slopes = with_slopes(orpo_loss, rows, dtype)
            assert losses.isfinite().all() and slopes.isfinite().all()
            assert losses[[0, 4]].tolist() == pytest.approx([0, 0], abs=1e-6)      # nothing left to learn
            assert losses[2].item() == pytest.approx(0.1 * math.log(2), rel=1e-4)
            # odds of e^-200 against 1e7 : 1
            assert losses[1].item() == pytest.approx(200 + 0.1 * (200 + 7 * math.log(10)), rel=1e-4)


def test_log1mexp_keeps_its_digits_near_0_and_far_from_it():
    values = rounded([-1e-12, -1e-9, -1e-4, -0.1, -0.693, -0.6931, -0.6932, -0.7, -1.0, -5.0, -20.0, -80.0])

    def exact(x):
        return (1 - x.exp()).ln(), -x.exp() / (1 - x.exp())
    assert_by_hand(log1mexp, exact, [[x] for x in values])
    losses, slopes = with_slopes(log1mexp, [[-200.0], [-1e4]], torch.float32)
    assert losses.tolist() == [0, 0] and slopes.abs().max() < 1e-30              # e^-200: below float32


def test_an_unknown_kind_is_refused_by_name():
    with pytest.raises(ValueError, match="'slic': expected sigmoid, ipo or hinge"):
        dpo_loss(*torch.zeros(4, 1), kind="slic")


# -----------------------------------------------------------------------------
# preferences, against trl

BETA, SMOOTHING, LENGTHS = 0.3, 0.1, torch.tensor([[3, 5], [1, 7], [6, 2], [4, 4]])


@pytest.fixture
def answers():
    """Log-probs of each token (P, 2, T) of policy and reference, 0 past an answer's end; which are there"""
    torch.manual_seed(0)
    there = torch.arange(7) < LENGTHS[:, :, None]
    return *(-3 * torch.rand(4, 2, 7) * there for _ in range(2)), there


def trl(part=""):
    return pytest.importorskip("trl" + part, reason="the authority on preference losses; a dev extra")


def trl_dpo(policy, ref, there, loss_type):
    """What DPOTrainer makes of the log-probs: mean loss over the pairs"""
    def rows(x):                                                        # all chosen answers, then all others
        return x.transpose(0, 1).flatten(0, 1)
    outputs = SimpleNamespace(log_probs=rows(policy), **dict.fromkeys(
        ("entropy", "mean_logits", "log_sum_sq_probs"), torch.zeros_like(rows(policy))),
        is_top1=torch.zeros_like(rows(there)))
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), beta=BETA, label_smoothing=SMOOTHING, loss_types=[loss_type],
        loss_weights=[1.0], f_divergence_type="reverse_kl", ld_alpha=None, use_weighting=False,
        precompute_ref_logps=True, aux_loss_enabled=False, _total_train_tokens=0,
        _metrics=defaultdict(lambda: defaultdict(list)), accelerator=SimpleNamespace(
            device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x))
    prompt = torch.zeros(2 * len(policy), 1, dtype=torch.int64)          # one token, which is no target
    mask = torch.cat([prompt, rows(there)], dim=1)
    ref_chosen, ref_rejected = ref.sum(dim=2).T
    inputs = dict(input_ids=torch.zeros_like(mask), attention_mask=torch.ones_like(mask),
                  completion_mask=mask, ref_chosen_logps=ref_chosen, ref_rejected_logps=ref_rejected)
    return trl().DPOTrainer._compute_loss(trainer, lambda **inputs: outputs, inputs, return_outputs=False)


def assert_same_loss_and_gradients(ours, theirs, policy):
    results = []
    for loss in (ours, theirs):
        x = leaf(policy)
        value = loss(x)
        results.append((value.detach(), *torch.autograd.grad(value, x)))
    assert results[0][1].norm() > 0.01
    assert_close(*results)


@pytest.mark.parametrize("kind", ["sigmoid", "hinge", "ipo"])
def test_dpo_losses_equal_those_of_trl(answers, kind):
    """trl's ipo averages over an answer's tokens; ours takes what it is given, here the same means."""
    policy, ref, there = answers
    counts = LENGTHS if kind == "ipo" else 1

    def ours(policy):
        four = (*(policy.sum(dim=2) / counts).T, *(ref.sum(dim=2) / counts).T)
        return dpo_loss(*four, BETA, kind=kind).mean()
    assert_same_loss_and_gradients(ours, lambda policy: trl_dpo(policy, ref, there, kind), policy)


def test_smoothed_dpo_is_trls_aot_of_one_pair(answers):
    """trl's sigmoid has no smoothing and its "robust" is another formula; "aot" has ours on sorted pairs."""
    policy, ref, there = answers
    for pair in range(4):
        p, r, t = (x[pair:pair + 1] for x in (policy, ref, there))
        assert_same_loss_and_gradients(
            lambda p: dpo_loss(*p.sum(dim=2).T, *r.sum(dim=2).T, BETA, SMOOTHING).mean(),
            lambda p: trl_dpo(p, r, t, "aot"), p)


def test_simpo_and_orpo_equal_those_of_trl(answers, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    cpo, orpo = trl(".experimental.cpo").CPOTrainer, trl(".experimental.orpo").ORPOTrainer
    means = answers[0].sum(dim=2) / LENGTHS
    trainer = SimpleNamespace(alpha=0.0, loss_type="simpo", simpo_gamma=0.7, beta=BETA, label_smoothing=0.0,
                              accelerator=SimpleNamespace(device="cpu"))
    assert_same_loss_and_gradients(lambda x: simpo_loss(*x.T, BETA, 0.7).sum(),
                                   lambda x: cpo.cpo_loss(trainer, *x.T)[0].sum(), means)
    # theirs is the odds ratio's part, to be subtracted from a cross-entropy over all chosen tokens
    assert_same_loss_and_gradients(lambda x: (orpo_loss(*x.T, BETA) + x[:, 0]).sum(),
                                   lambda x: -orpo.odds_ratio_loss(trainer, *x.T)[0].sum(), means)


# -----------------------------------------------------------------------------
# policy gradients: advantages

REWARDS = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 6.0], [5.0, 5.0, 5.0]])


@pytest.mark.parametrize("scale, deviations", [
    ("group", [1 + 1e-4, 12**0.5 + 1e-4, 1e-4]),                        # squares 1 + 0 + 1, 4 + 4 + 16 over 2
    ("batch", [(44 / 8)**0.5 + 1e-4] * 3),                              # mean 3: 4 + 1 + 0, 9 + 9 + 9, 3 * 4
    ("none", [1] * 3)])
def test_advantages_are_those_of_a_table_by_hand(scale, deviations):
    centred = [[-1, 0, 1], [-2, -2, 4], [0, 0, 0]]
    expected = torch.tensor([[x / d for x in row] for row, d in zip(centred, deviations)])
    torch.testing.assert_close(group_advantages(REWARDS, scale), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_group_of_one_reward_has_no_advantages(scale):
    for value in (0.0, 1.0, -0.5, 1e6):
        assert not group_advantages(torch.full((3, 4), value), scale).any()
    for value in (0.1, 0.3, 2 / 3, 0.9):                                # no float32 is: their mean is rounded
        assert group_advantages(torch.full((2, 7), value), scale).abs().max() < 1e-3
    assert not group_advantages(torch.tensor([[3.0], [4.0]]), scale).any()       # G = 1


def test_advantages_of_a_group_do_not_depend_on_the_order_of_groups_and_answers():
    rewards, order = torch.rand(5, 4), torch.tensor([3, 0, 4, 2, 1])
    for scale in ("group", "batch", "none"):
        shuffled = group_advantages(rewards[order].flip(1), scale)
        torch.testing.assert_close(shuffled, group_advantages(rewards, scale)[order].flip(1))


def test_an_unknown_scale_is_refused_by_name():
    with pytest.raises(ValueError, match="'std': expected group, batch or none"):
        group_advantages(REWARDS, "std")


def test_rewards_of_tokens_are_compared_at_their_place():
    """Two samples: all of 1 at the last place, and 0.5 for each of three tokens after 4 for the first."""
    to_go = torch.tensor([[[1.0, 1.0, 1.0], [5.5, 1.0, 0.5]]])
    deviation = torch.tensor([[[-2.25, 0.0, 0.25], [2.25, 0.0, -0.25]]])
    torch.testing.assert_close(group_advantages(to_go, "none"), deviation)
    for scale in ("group", "batch"):                          # the largest deviation is the first place's
        torch.testing.assert_close(group_advantages(to_go, scale), deviation / (4.5 / 2**0.5 + 1e-4))
    everyone = torch.cat([to_go, torch.zeros(1, 2, 3)])
    std = torch.tensor([1.0, 5.5, 0.0, 0.0]).std()
    torch.testing.assert_close(group_advantages(to_go, "batch", everyone), deviation / (std + 1e-4))


def test_rewards_of_tokens_that_come_to_the_same_sum_are_no_division_by_nothing():
    to_go = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0]]])
    for scale in ("group", "batch"):
        advantages = group_advantages(to_go, scale)
        assert not advantages[..., 0].any()
        assert advantages[0, :, 1].tolist() == pytest.approx([-3**0.5 / 2, 3**0.5 / 2] * 2, abs=1e-3)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_rewards_of_whole_answers_are_the_same_for_each_token(scale):
    expected = group_advantages(REWARDS, scale)[..., None].expand(-1, -1, 5)
    to_go = REWARDS[..., None].expand(-1, -1, 5)
    torch.testing.assert_close(group_advantages(to_go, scale), expected, rtol=0, atol=0)
    logps, old = torch.randn(2, REWARDS.numel(), 5)
    mask, A = torch.rand(REWARDS.numel(), 5) < 0.8, group_advantages(REWARDS, scale)
    torch.testing.assert_close(grpo_token_loss(logps, old, None, expected.flatten(0, 1), mask),
                               grpo_token_loss(logps, old, None, A.flatten(), mask), rtol=0, atol=0)


# -----------------------------------------------------------------------------
# policy gradients: the loss of a token

LOW, HIGH = 0.2, 0.3


@pytest.mark.parametrize("A, ratio, delta, loss, slope", [
    # slope: of the loss by logps; the ratio's own is the ratio
    (2.0, 0.5, None, -1.0, -1.0), (2.0, 1.0, None, -2.0, -2.0), (2.0, 1.2, None, -2.4, -2.4),
    (2.0, 1.5, None, -2.6, 0.0), (-2.0, 0.5, None, 1.6, 0.0), (-2.0, 0.9, None, 1.8, 1.8),
    (-2.0, 1.2, None, 2.4, 2.4), (-2.0, 5.0, None, 10.0, 10.0), (-2.0, 2.5, 3.0, 5.0, 5.0),
    (-2.0, 5.0, 3.0, 6.0, 0.0), (2.0, 5.0, 3.0, -2.6, 0.0), (2.0, 0.5, 3.0, -1.0, -1.0),
    (-2.0, 0.5, 3.0, 1.6, 0.0), (0.0, 5.0, None, 0.0, 0.0)])
def test_the_clipped_loss_of_a_token_is_that_of_a_table_by_hand(A, ratio, delta, loss, slope):
    logps = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    value = grpo_token_loss(logps, logps.detach() - math.log(ratio), None, torch.tensor([A]),
                            torch.tensor([[True]]), LOW, HIGH, delta)
    assert value.shape == (1, 1) and value.item() == pytest.approx(loss, abs=1e-12)
    assert torch.autograd.grad(value.sum(), logps)[0].item() == pytest.approx(slope, abs=1e-12)


def hand_grpo(logps, ratios, refs, A, delta, beta, level, kind):
    """The tokens of one answer, plain Python -> their losses, derivatives of the sum of these by logps"""
    if level == "sequence":
        ratios = [math.prod(ratios) ** (1 / len(ratios))] * len(ratios)
    losses, slopes = [], []
    for logp, r, ref in zip(logps, ratios, refs):
        if kind == "cispo":
            loss, slope = -min(r, 1 + HIGH) * A * logp, -min(r, 1 + HIGH) * A
        elif A > 0:
            loss, slope = -min(r, 1 + HIGH) * A, -r * A * (r < 1 + HIGH)
        else:
            bound = min(r, delta or math.inf)
            loss, slope = -max(bound, 1 - LOW) * A, -r * A * (1 - LOW < r < (delta or math.inf))
        losses.append(loss + beta * (math.exp(ref - logp) - (ref - logp) - 1))
        slopes.append(slope + beta * (1 - math.exp(ref - logp)))
    return losses, slopes


# of one answer: its tokens' ratios; with lengths of 1 and 4, in and out of all borders, for either sign of A
RATIOS = [ratios for ratios in ([0.5, 0.9, 1.2, 4.0], [1.6, 1.5, 4.0, 0.9], [0.3, 0.6, 0.9, 1.1],
                                [0.5], [0.9], [1.2], [1.5], [4.0]) for _ in range(2)]
SIGNS = [1.5, -0.7] * (len(RATIOS) // 2)


@pytest.fixture
def episodes():
    """logps, old, ref (B, 4) float64, advantages (B,), mask (B, 4); what is masked is finite garbage"""
    torch.manual_seed(0)
    mask = torch.arange(4) < torch.tensor([len(ratios) for ratios in RATIOS])[:, None]
    logps, ref = (-3 * torch.rand(len(RATIOS), 4, dtype=torch.float64) - 0.05 for _ in range(2))
    ratios = torch.tensor([ratios + [7.0] * (4 - len(ratios)) for ratios in RATIOS], dtype=torch.float64)
    logps[~mask], ref[~mask] = 5.0, -9.0
    return logps, logps - ratios.log(), ref, torch.tensor(SIGNS, dtype=torch.float64), mask


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kind, delta", [("clip", None), ("clip", 3.0), ("cispo", None)])
@pytest.mark.parametrize("beta", [0.0, 0.25])
def test_policy_losses_and_gradients_equal_the_formulas_by_hand(episodes, beta, kind, delta, level):
    logps, old, ref, A, mask = episodes
    x = leaf(logps)
    loss = grpo_token_loss(x, old, ref if beta else None, A, mask, LOW, HIGH, delta, beta, level, kind)
    (loss.sum(dim=1) / mask.sum(dim=1)).sum().backward()                # means, as the lengths differ
    assert not loss[~mask].any() and not x.grad[~mask].any()
    for b, ratios in enumerate(RATIOS):
        n = len(ratios)
        losses, slopes = hand_grpo(logps[b, :n].tolist(), ratios, ref[b, :n].tolist(), SIGNS[b], delta, beta,
                                   level, kind)
        assert loss[b, :n].tolist() == pytest.approx(losses, rel=1e-10, abs=1e-12), b
        assert (n * x.grad[b, :n]).tolist() == pytest.approx(slopes, rel=1e-10, abs=1e-12), b


def aggregate(token_loss, mask, how, max_new_tokens):
    """As in train_grpo.py, on one rank and without micro-batches"""
    n_answers, n_targets = mask.any(dim=1).sum().clamp(min=1), mask.sum().clamp(min=1)
    if how == "grpo":
        return (token_loss.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum() / n_answers
    if how == "dapo":
        return token_loss.sum() / n_targets
    return token_loss.sum() / (n_answers * max_new_tokens)


AGGREGATES = ["grpo", "dapo", "dr_grpo"]


@pytest.mark.parametrize("how, weights", [                              # of a token in the answers of 1 and 4
    ("grpo", (1 / 2, 1 / 8)), ("dapo", (1 / 5, 1 / 5)), ("dr_grpo", (1 / 20, 1 / 20))])
def test_how_much_a_token_weighs_in_answers_of_1_and_4_tokens(how, weights):
    mask = torch.tensor([[True, False, False, False], [True] * 4, [False] * 4])          # the last left out
    x, A = leaf(-torch.rand(3, 4)), torch.tensor([2.0, -1.0, 5.0])
    loss = aggregate(grpo_token_loss(x, x.detach(), None, A, mask), mask, how, 10)
    loss.backward()
    expected = [-2 * weights[0], 0, 0, 0], [weights[1]] * 4, [0] * 4
    assert_close(x.grad, torch.tensor(expected))
    assert loss.item() == pytest.approx(-2 * weights[0] + 4 * weights[1])


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("how", AGGREGATES)
def test_before_any_update_the_loss_is_0_and_the_gradient_is_not(how, level):
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.5], [0.0, 2.0, 0.0, 0.0]])).flatten()
    x, mask = leaf(-torch.rand(8, 3)), torch.ones(8, 3, dtype=torch.bool)
    loss = aggregate(grpo_token_loss(x, x.detach(), None, advantages, mask, level=level), mask, how, 5)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert_close(x.grad * (40 if how == "dr_grpo" else 24), -advantages[:, None].expand(8, 3))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("how", AGGREGATES)
def test_a_batch_that_is_all_masked_gives_0_and_no_gradient(how, level):
    x, mask = leaf(-torch.rand(4, 3)), torch.zeros(4, 3, dtype=torch.bool)
    for kind in ("clip", "cispo"):
        token_loss = grpo_token_loss(x, x.detach() - 1, x.detach() + 1, torch.randn(4), mask, beta=0.1,
                                     level=level, kind=kind)
        loss = aggregate(token_loss, mask, how, 5)
        grad, = torch.autograd.grad(loss, x)
        assert loss.item() == 0 and not grad.any()


# -----------------------------------------------------------------------------
# policy gradients: the divergence

def exact_kl(logits, ref_logits):
    return (logits.softmax(-1) * (logits.log_softmax(-1) - ref_logits.log_softmax(-1))).sum()


def test_k3_is_never_negative_and_its_mean_over_samples_is_the_exact_kl():
    torch.manual_seed(0)
    logits, ref_logits = torch.randn(2, 6, dtype=torch.float64)
    logps, ref_logps = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    every = k3(logps, ref_logps)
    assert (every > 0).all() and (every * logps.exp()).sum().item() == pytest.approx(
        exact_kl(logits, ref_logits).item(), rel=1e-12)
    samples = torch.multinomial(logps.exp(), 100_000, replacement=True)
    values = k3(logps[samples], ref_logps[samples])
    wrong = k3(ref_logps[samples], logps[samples])                      # the other way round would show
    kl, error = exact_kl(logits, ref_logits), values.std() / len(values)**0.5
    assert abs(values.mean() - kl) < 4 * error < 0.05 * kl < abs(wrong.mean() - kl)


def test_k3_of_nearly_the_same_policies_keeps_its_digits():
    gaps = torch.tensor([0.0, 1e-3, -1e-3, 1e-2, -3.0, 3.0])
    expected = [math.expm1(gap) - gap for gap in gaps.double().tolist()]
    assert k3(torch.full((6,), -0.0), gaps).tolist() == pytest.approx(expected, rel=1e-3, abs=1e-12)
    assert (k3(-8 * torch.rand(10_000), -8 * torch.rand(10_000)) >= 0).all()


def test_a_step_on_the_divergence_alone_lowers_it():
    torch.manual_seed(0)
    logits, ref_logits = torch.randn(2, 6, dtype=torch.float64)
    for _ in range(5):
        x = leaf(logits)
        samples = torch.multinomial(x.softmax(-1).detach(), 5000, replacement=True)[None]       # (1, T)
        logps, ref_logps = x.log_softmax(-1)[samples], ref_logits.log_softmax(-1)[samples]
        loss = grpo_token_loss(logps, logps.detach(), ref_logps, torch.zeros(1), samples >= 0, beta=1.0)
        loss.mean().backward()
        before, logits = exact_kl(logits, ref_logits), logits - 0.5 * x.grad
        assert exact_kl(logits, ref_logits) < 0.95 * before


# -----------------------------------------------------------------------------
# policy gradients, against trl

def trl_grpo(episodes, loss_type, level, delta, beta, logps, max_new_tokens):
    """What GRPOTrainer makes of the log-probs"""
    _, old, ref, A, mask = episodes
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False), loss_type=loss_type, importance_sampling_level=level,
        beta=beta, epsilon_low=LOW, epsilon_high=1 + HIGH if loss_type == "cispo" else HIGH,
        max_completion_length=max_new_tokens, top_entropy_quantile=1.0, off_policy_mask_threshold=None,
        use_vllm=False, aux_loss_enabled=False, _entropy_bonus_enabled=False,
        args=SimpleNamespace(delta=delta, use_bias_correction_kl=False, steps_per_generation=1),
        current_gradient_accumulation_steps=1, _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (logps, torch.zeros_like(logps), None),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x))
    ids = torch.zeros(mask.shape, dtype=torch.int64)
    inputs = dict(prompt_ids=ids, prompt_mask=ids, completion_ids=ids, completion_mask=mask.long(),
                  advantages=A, old_per_token_logps=old, ref_per_token_logps=ref,
                  num_items_in_batch=mask.sum())
    return trl().GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("beta", [0.0, 0.25])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("loss_type, how, delta", [
    ("grpo", "grpo", None), ("grpo", "grpo", 3.0), ("dapo", "dapo", None), ("bnpo", "dapo", None),
    ("dr_grpo", "dr_grpo", 3.0), ("cispo", "dapo", None)])
def test_policy_losses_equal_those_of_trl(episodes, loss_type, how, delta, level, beta):
    logps, old, ref, A, mask = episodes
    kind = "cispo" if loss_type == "cispo" else "clip"
    assert_same_loss_and_gradients(
        lambda x: aggregate(grpo_token_loss(x, old, ref, A, mask, LOW, HIGH, delta, beta, level, kind),
                            mask, how, 9),
        lambda x: trl_grpo(episodes, loss_type, level, delta, beta, x, 9), logps)


# -----------------------------------------------------------------------------
# distillation (PITFALLS 16)

KINDS = ["forward", "reverse", "jsd"]


def divergence64(student, teacher, temperature, kind, beta):
    """temperature^2 times the divergence at each position, by torch's kl_div in float64: (..., V) -> (...)"""
    q, p = ((x.double() / temperature).softmax(-1) for x in (student, teacher))

    def kl(a, b):                                                       # KL(a || b)
        return F.kl_div(b.log(), a, reduction="none").sum(-1)
    m = beta * p + (1 - beta) * q
    return temperature**2 * {"forward": lambda: kl(p, q), "reverse": lambda: kl(q, p),
                             "jsd": lambda: beta * kl(p, m) + (1 - beta) * kl(q, m)}[kind]()


@pytest.fixture
def teacher():
    """hidden (B, T, C + 3), weight (V, C + 3): wider than the student"""
    torch.manual_seed(1)
    return torch.randn(B, T, C + 3), torch.randn(V, C + 3)


@pytest.mark.parametrize("kind, beta", [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.1), ("jsd", 0.9)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kd_loss_of_every_position_equals_kl_div_in_float64(kind, beta, temperature):
    student, teacher = torch.randn(B, T, V) * 3, torch.randn(B, T, V) * 3
    ours, theirs = leaf(student), leaf(student.double())
    loss = kd_loss(ours, teacher, temperature, kind, beta)
    expected = divergence64(theirs, teacher, temperature, kind, beta)
    weights = torch.rand(B, T)
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    assert loss.shape == (B, T)
    assert_close((loss.detach(), ours.grad), (expected.detach().float(), theirs.grad.float()))


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("kind, beta", [("forward", 0.5), ("reverse", 0.5), ("jsd", 0.1), ("jsd", 0.9)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("kd_frac", [0.0, 0.3, 1.0])
def test_linear_kd_loss_and_its_gradients_equal_the_textbook_loss(batch, teacher, kind, beta, temperature,
                                                                  kd_frac, chunk):
    (hidden, weight, targets), mask, token_weight = batch, torch.rand(B, T) < 0.6, torch.rand(B, T) + 0.5
    scale = (mask * token_weight).double()
    h64, w64 = leaf(hidden.double()), leaf(weight.double())
    logits, teachers = h64 @ w64.T, teacher[0].double() @ teacher[1].double().T
    ce = (F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(B, T) * scale).sum()
    kd = (divergence64(logits, teachers, temperature, kind, beta) * scale).sum()
    (0.37 * ((1 - kd_frac) * ce + kd_frac * kd)).backward()
    h, w = leaf(hidden), leaf(weight)
    loss, *parts = linear_kd_loss(h, w, head_logits(*teacher), targets, mask, token_weight, kd_frac,
                                  temperature, kind, beta, chunk)
    (0.37 * loss).backward()
    assert not any(part.requires_grad for part in parts)
    assert_close((loss.detach(), *parts), tuple(x.detach().float() for x in
                                                ((1 - kd_frac) * ce + kd_frac * kd, ce, kd)))
    assert_close((h.grad, w.grad), (h64.grad.float(), w64.grad.float()))
    assert (h.grad[~mask] == 0).all()                                   # a masked position has no gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_a_student_that_is_its_teacher_has_neither_loss_nor_gradient(batch, kind, temperature):
    hidden, weight, targets = batch
    h, w = leaf(hidden), leaf(weight)
    loss, _, kd = linear_kd_loss(h, w, head_logits(hidden, weight), targets, kd_frac=1.0,
                                 temperature=temperature, kind=kind)
    loss.backward()
    assert loss == kd == 0 and h.grad.abs().max() == w.grad.abs().max() == 0
    assert kd_loss(hidden @ weight.T, hidden @ weight.T, temperature, kind).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_keeps_its_size_as_the_temperature_grows(kind):
    """T^2 KL tends to (z - t)^2 / 2V of centred logits (1503.02531 eq. 4), jsd to b (1 - b) of that"""
    torch.manual_seed(0)
    student, teacher = torch.randn(1, 1, V), torch.randn(1, 1, V)
    z = leaf(student)
    kd_loss(z, teacher, 200.0, kind, 0.5).sum().backward()
    difference = student - teacher
    limit = (difference - difference.mean()) / V * (0.25 if kind == "jsd" else 1)
    torch.testing.assert_close(z.grad, limit, rtol=0.03, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_distributions_that_are_far_apart_give_finite_numbers(kind):
    hidden, weight = torch.eye(3)[None], torch.tensor([[300., 0, 0], [0, 300, 0], [0, 0, -300], [0, 0, 0]])
    h, w = leaf(hidden), leaf(weight)
    loss, _, kd = linear_kd_loss(h, w, head_logits(hidden, weight.flip(0)), torch.zeros(1, 3).long(),
                                 kd_frac=1.0, kind=kind)
    loss.backward()
    assert_close(kd, divergence_of_far(hidden @ weight.T, hidden @ weight.flip(0).T, kind))
    assert h.grad.isfinite().all() and w.grad.isfinite().all()


def divergence_of_far(student, teacher, kind):
    log_q, log_p = student.double().log_softmax(-1), teacher.double().log_softmax(-1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    pairs = {"forward": [(1, log_p, log_q)], "reverse": [(1, log_q, log_p)],
             "jsd": [(0.5, log_p, log_m), (0.5, log_q, log_m)]}[kind]
    return sum(weight * (a.exp() * (a - b)).sum() for weight, a, b in pairs).float()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_masked_position_poisons_no_distillation(batch, teacher, poison):
    hidden, weight, targets = batch
    mask = torch.ones(B, T, dtype=torch.bool)
    mask[1, 2] = False
    results = []
    for value in (0.0, poison):
        h, w, t = leaf(hidden), leaf(weight), teacher[0].clone()
        h.data[1, 2] = t[1, 2] = value
        loss, ce, kd = linear_kd_loss(h, w, head_logits(t, teacher[1]), targets, mask, chunk_size=4)
        loss.backward()
        results.append((loss.detach(), ce, kd, h.grad, w.grad))
    assert_close(results[1], results[0])


def test_an_unknown_divergence_is_refused_by_name(batch, teacher):
    with pytest.raises(ValueError, match="kind 'js': expected forward, reverse or jsd"):
        kd_loss(torch.zeros(1, 1, V), torch.zeros(1, 1, V), kind="js")
    with pytest.raises(ValueError, match="kind 'js': expected forward, reverse or jsd"):
        linear_kd_loss(*batch[:2], head_logits(*teacher), batch[2], kind="js")


def test_distillation_holds_no_logits_of_the_whole_batch(batch, teacher):
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **kwargs or {})
            if torch.is_tensor(out):
                self.numel = max(self.numel, out.numel())
            return out
    torch.manual_seed(0)
    hidden, weight = torch.randn(2, 256, 4, requires_grad=True), torch.randn(1000, 4, requires_grad=True)
    with Largest() as largest:
        loss, _, _ = linear_kd_loss(hidden, weight, head_logits(torch.randn(2, 256, 6), torch.randn(1000, 6)),
                                    torch.randint(1000, (2, 256)))
        loss.backward()
    assert largest.numel <= 128 * 1000
