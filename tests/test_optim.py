"""optim.py against torch.optim and naive loops written from the papers."""
import math

import pytest
import torch
from torch import nn

from common.model import GPT, ModelConfig
from common.optim import AdamW, Lion, Muon, orthogonalize, parameter_groups

STEPS, LR, DECAY = 10, 1e-2, 0.1


def tiny_gpt(tied=True):
    torch.manual_seed(0)
    return GPT(ModelConfig(vocab_size=17, n_layer=2, n_head=2, n_embd=8, d_ff=12, seq_len=6,
                           tie_embeddings=tied, qk_norm=True))


def sequence(*shape, seed=0):
    """Ten gradients of wandering sign and size."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 10.0 ** (i % 4 - 2) for i in range(STEPS)]


def run_rule(rule, param, gradients, grad_scale=1.0, **options):
    """Ten updates of a copy of param, flat, with gradients grad_scale times too large -> param, state"""
    flat = param.flatten().clone()
    state = {slot: torch.zeros_like(flat) for slot in rule.slots}
    for i, grad in enumerate(gradients):
        rule.update(flat, grad.flatten() * grad_scale, state, LR, DECAY, i + 1, grad_scale)
    return flat.view(param.shape), state


# -----------------------------------------------------------------------------
# parameter groups

def names(groups):
    return [name for group in groups for name, _ in group.named]


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_is_in_exactly_one_group_and_a_tied_weight_counts_once(optimizer, tied):
    model = tiny_gpt(tied)
    groups = parameter_groups(model, optimizer, DECAY)
    assert sorted(names(groups)) == sorted(dict(model.named_parameters()))
    params = [p for group in groups for _, p in group.named]
    assert len({p.data_ptr() for p in params}) == len(params)
    assert sum(p.numel() for p in params) == model.num_parameters()
    assert ("untied_head.weight" in names(groups)) == (not tied)
    assert all(dict(model.named_parameters())[name] is p for group in groups for name, p in group.named)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
def test_only_tensors_of_at_least_two_dimensions_decay(optimizer):
    model = tiny_gpt()
    model.kernel = nn.Parameter(torch.ones(2, 3, 4))                    # three dimensions decay as well
    for group in parameter_groups(model, optimizer, DECAY):
        assert {p.ndim >= 2 for _, p in group.named} == {group.weight_decay == DECAY}
        assert group.weight_decay in (0.0, DECAY)


@pytest.mark.parametrize("optimizer", ["adamw", "lion", "muon"])
def test_frozen_parameters_and_empty_groups_are_left_out(optimizer):
    model = tiny_gpt()
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("blocks.1.") and p.ndim == 2)
    groups = parameter_groups(model, optimizer, DECAY)
    assert sorted(names(groups)) == sorted(f"blocks.1.{name}.weight" for name in (
        "attn.qkv", "attn.out", "mlp.gate_up", "mlp.down"))
    assert all(group.named for group in groups)


def test_muon_takes_the_matrices_of_the_blocks_one_shape_a_group_and_adamw_the_rest():
    groups = parameter_groups(tiny_gpt(tied=False), "muon", DECAY)
    muon = [group for group in groups if isinstance(group.rule, Muon)]
    others = [group for group in groups if not isinstance(group.rule, Muon)]
    assert sorted(names(muon)) == sorted(f"blocks.{i}.{name}.weight" for i in range(2) for name in (
        "attn.qkv", "attn.out", "mlp.gate_up", "mlp.down"))
    for group in muon:
        assert {tuple(p.shape) for _, p in group.named} == {group.rule.shape}
        assert group.rule.unit == math.prod(group.rule.shape)
    assert all(isinstance(group.rule, AdamW) for group in others)
    assert {"embed.weight", "untied_head.weight", "norm.weight"} <= set(names(others))


def test_the_betas_arrive_in_the_rule():
    model = tiny_gpt()
    for optimizer, kind in (("adamw", AdamW), ("lion", Lion)):
        for group in parameter_groups(model, optimizer, DECAY, beta1=0.8, beta2=0.7):
            assert isinstance(group.rule, kind) and (group.rule.beta1, group.rule.beta2) == (0.8, 0.7)


def test_an_unknown_optimizer_is_refused_and_not_taken_for_adamw():
    with pytest.raises(ValueError, match="adamw2"):
        parameter_groups(tiny_gpt(), "adamw2")


# -----------------------------------------------------------------------------
# update rules

@pytest.mark.parametrize("grad_scale", [1.0, 1024.0, 0.3])
@pytest.mark.parametrize("numel", [1, 37])
def test_adamw_equals_torch_over_ten_steps(numel, grad_scale):
    start, gradients = torch.linspace(-2, 2, numel + 1)[1:], sequence(numel)
    theirs = nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([theirs], lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=DECAY)
    for grad in gradients:
        theirs.grad = grad.clone()
        optimizer.step()
    ours, state = run_rule(AdamW(0.9, 0.95), start, gradients, grad_scale)
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)
    for slot in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[slot], optimizer.state[theirs][slot], rtol=1e-5, atol=1e-9)
    assert (ours - start).abs().mean() > 1e-3                           # it did move


@pytest.mark.parametrize("grad_scale", [1.0, 1024.0, 0.3])
def test_lion_equals_a_loop_written_from_the_paper(grad_scale):
    start, gradients = torch.linspace(-2, 2, 37), sequence(37)
    beta1, beta2 = 0.9, 0.99
    expected, momentum = start.tolist(), [0.0] * 37
    for grad in gradients:                                              # 2302.06675, algorithm 2
        for i, g in enumerate(grad.tolist()):
            c = beta1 * momentum[i] + (1 - beta1) * g
            expected[i] -= LR * (math.copysign(1.0, c) + DECAY * expected[i])
            momentum[i] = beta2 * momentum[i] + (1 - beta2) * g
    ours, state = run_rule(Lion(beta1, beta2), start, gradients, grad_scale)
    torch.testing.assert_close(ours, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state["exp_avg"], torch.tensor(momentum), rtol=1e-4, atol=1e-6)


def test_lion_leaves_a_parameter_without_gradient_to_its_decay():
    ours, _ = run_rule(Lion(), torch.ones(3), [torch.zeros(3)] * STEPS)
    torch.testing.assert_close(ours, torch.full((3,), (1 - LR * DECAY) ** STEPS))


def matrix_with(singular_values, rows, columns):
    u, _ = torch.linalg.qr(torch.randn(rows, len(singular_values)))
    v, _ = torch.linalg.qr(torch.randn(columns, len(singular_values)))
    return u @ torch.diag(torch.tensor(singular_values)) @ v.T


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("rows, columns", [(8, 8), (8, 24), (24, 8), (5, 7), (1, 9), (9, 1)])
def test_orthogonalize_moves_all_singular_values_near_one_and_keeps_the_singular_vectors(rows, columns, size):
    torch.manual_seed(0)
    values = [size * 0.7**k for k in range(min(rows, columns))]         # down to a twelfth of the largest
    m = torch.stack([matrix_with(values, rows, columns) for _ in range(3)])
    result = orthogonalize(m)
    assert result.shape == m.shape and result.dtype == m.dtype
    singular = torch.linalg.svdvals(result)
    assert singular.min() > 0.6 and singular.max() < 1.3, singular
    u, _, vh = torch.linalg.svd(m.double(), full_matrices=False)
    core = u.mT @ result.double() @ vh.mT                              # diagonal when the vectors are m's own
    diagonal = core.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(core, torch.diag_embed(diagonal), rtol=0, atol=1e-4)
    assert diagonal.min() > 0.6


def test_a_zero_matrix_stays_zero_beside_others():
    m = torch.zeros(3, 4, 6)
    m[1] = torch.eye(4, 6)
    result = orthogonalize(m)
    assert (result[0] == 0).all() and (result[2] == 0).all() and result[1].norm() > 1


def naive_muon(param, gradients, momentum):
    """One matrix at a time, in float64: 2502.16982 eq. 4 with Nesterov momentum as an average."""
    w, buffer = param.double(), torch.zeros_like(param, dtype=torch.float64)
    for grad in gradients:
        g = grad.double()
        buffer = momentum * buffer + (1 - momentum) * g
        x = momentum * buffer + (1 - momentum) * g
        x = x / math.sqrt((x * x).sum() + 1e-30)
        for _ in range(5):                       # on singular values: s -> 3.4445 s - 4.7750 s^3 + 2.0315 s^5
            x = 3.4445 * x - 4.7750 * x @ x.T @ x + 2.0315 * x @ x.T @ x @ x.T @ x
        w = w - LR * DECAY * w - LR * 0.2 * math.sqrt(max(w.shape)) * x
    return w.float()


@pytest.mark.parametrize("grad_scale", [1.0, 1024.0, 0.3])
@pytest.mark.parametrize("shape", [(4, 6), (6, 4), (5, 5)])
def test_muon_equals_a_naive_loop_on_each_of_several_matrices(shape, grad_scale):
    start, gradients = sequence(3, *shape, seed=1)[2], sequence(3, *shape)      # (3, rows, columns) each
    ours, _ = run_rule(Muon(shape, momentum=0.9), start, gradients, grad_scale)
    for i in range(3):
        expected = naive_muon(start[i], [grad[i] for grad in gradients], momentum=0.9)
        torch.testing.assert_close(ours[i], expected, rtol=1e-4, atol=1e-5)
