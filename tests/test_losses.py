"""losses.py against plain float64 logits, cross_entropy and log_softmax."""
import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from common.losses import critical_weights, linear_cross_entropy, token_logps

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
    (textbook, True)], ids=["linear_cross_entropy", "token_logps", "textbook"])
def test_the_logits_are_never_held_whole_in_forward_or_backward(loss, holds_all):
    n_vocab, n_embd, seq_len, chunk = 211, 16, 300, 32
    h, w = leaf(torch.randn(2, seq_len, n_embd)), leaf(torch.randn(n_vocab, n_embd))
    with Watch() as watch:
        loss(h, w, torch.randint(n_vocab, (2, seq_len)), chunk_size=chunk).backward()
    allowed = max(chunk * n_vocab, n_vocab * n_embd, 2 * seq_len * n_embd)
    assert (watch.largest > allowed) == holds_all, f"{watch.largest} numbers, {allowed} allowed"


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


# -----------------------------------------------------------------------------
# the denominators

def test_critical_weights_give_the_weighted_mean_of_a_hand_computed_table():
    targets = torch.tensor([[2, 0, 1], [1, 1, 2]])
    weights = critical_weights(targets, torch.tensor([1, 5]), alpha=3.0)
    assert weights.tolist() == [[1, 1, 3], [3, 3, 1]] and weights.dtype == torch.float32
    no_ids = torch.tensor([], dtype=torch.int64)
    assert critical_weights(targets, no_ids, alpha=3.0).tolist() == [[1, 1, 1], [1, 1, 1]]
    # probabilities 1/2, 1/4, 1/4 everywhere: nll = ln 2 for token 0, 2 ln 2 for the others
    hidden, weight = torch.ones(2, 3, 1), torch.tensor([[0.5], [0.25], [0.25]]).log()
    mask = torch.tensor([[True, True, True], [True, False, True]])
    loss = linear_cross_entropy(hidden, weight, targets, mask, weights) / (weights * mask).sum()
    # w nll / ln 2 = 2, 1, 6; 6, -, 2 -> 17 over w = 1 + 1 + 3 + 3 + 1
    assert loss.item() == pytest.approx(17 / 9 * 0.6931471805599453, rel=1e-6)


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
