"""
common/moe.py against a loop over tokens, and its load-balance loss against hand-made tables
(PITFALLS 15). The layouts of ranks and micro-batches are in test_zero1.py and test_stages.py, the logits of
Qwen's models in test_hf.py.
"""
import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from common.model import GPT, ModelConfig
from common.moe import MoE, load_balance
from common.optim import Muon, parameter_groups
from common.sampling import SamplingConfig, complete

TINY = ModelConfig(vocab_size=50, n_layer=3, n_head=2, n_embd=32, d_ff=64, seq_len=24, n_expert=8,
                   n_expert_active=2, n_dense_layer=1)
OPTIONS = {"top 2 of 8": {}, "top 1": dict(n_expert_active=1), "all": dict(n_expert_active=8),
           "weights as they are": dict(norm_topk=False), "shared": dict(n_shared_expert=2),
           "gated": dict(n_shared_expert=1, shared_gate=True)}


def tiny_model(**changes):
    torch.manual_seed(0)
    return GPT(replace(TINY, **changes))


def random_tokens(B=2, T=24):
    return torch.randint(50, (B, T), generator=torch.Generator().manual_seed(1))


def routers(model):
    return [block.mlp.router for block in model.blocks if isinstance(block.mlp, MoE)]


def token_by_token(moe, x, k, norm_topk):
    """x (N, C) -> (N, C), with nothing but vectors"""
    rows = []
    for row in x:
        probs = (moe.router @ row).softmax(0)
        best = sorted(range(len(probs)), key=lambda e: -probs[e].item())[:k]
        total = sum(probs[e] for e in best) if norm_topk else 1.0
        out = torch.zeros_like(row)
        for e in best:
            gate, up = (moe.gate_up[e] @ row).chunk(2)
            out = out + probs[e] / total * (moe.down[e] @ (F.silu(gate) * up))
        if moe.shared is not None:
            gate, up = (moe.shared.gate_up.weight @ row).chunk(2)
            shared = moe.shared.down.weight @ (F.silu(gate) * up)
            out = out + (shared if moe.shared_gate is None else
                         torch.sigmoid(moe.shared_gate.weight[0] @ row) * shared)
        rows.append(out)
    return torch.stack(rows)


# -----------------------------------------------------------------------------
# experts

@pytest.mark.parametrize("name", OPTIONS)
def test_values_and_gradients_equal_a_loop_over_tokens_in_float64(name):
    c = replace(TINY, **OPTIONS[name]).resolved()
    torch.manual_seed(0)
    moe = MoE(c).double()
    x = torch.randn(2, 9, 32, dtype=torch.float64, requires_grad=True)
    y, (probs, expert) = moe(x)
    assert probs.shape == (18, 8) and expert.shape == (18, c.n_expert_active)
    expected = token_by_token(moe, x.view(-1, 32), c.n_expert_active, c.norm_topk).view(2, 9, 32)
    weights = torch.randn_like(y)
    leaves = [x, *moe.parameters()]
    ours, theirs = (torch.autograd.grad((z * weights).sum(), leaves) for z in (y, expected))
    # the router computes in fp32 whatever the rest does
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-9)
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_an_expert_without_tokens_has_a_zero_gradient_and_the_others_theirs():
    torch.manual_seed(0)
    moe = MoE(TINY.resolved())
    with torch.no_grad():
        moe.router.zero_()
        moe.router[:, 0] = -torch.arange(8.0)                 # the first two experts, wherever x[0] > 0
    x = torch.randn(5, 3, 32).index_fill(2, torch.tensor(0), 1.0)
    y, (_, expert) = moe(x)
    y.square().sum().backward()
    assert set(expert.unique().tolist()) == {0, 1}
    for weight in (moe.gate_up, moe.down):
        assert (weight.grad[:2].flatten(1).norm(dim=1) > 0).all() and not weight.grad[2:].any()


def test_the_whole_model_has_finite_gradients_everywhere_and_the_router_has_one():
    """transformers#1408's bug: a router that the loss never reaches"""
    model = tiny_model(n_shared_expert=1)
    model(random_tokens()).square().sum().backward()          # without the balance loss
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all() and p.grad.any(), name
    assert len(routers(model)) == 2                           # the first block is dense


def test_work_grows_with_the_active_experts_not_with_all():
    def flops(**changes):
        model = tiny_model(d_expert=32, **changes)
        with FlopCounterMode(display=False) as counter:
            model(random_tokens()).sum().backward()
        return counter.get_total_flops(), model
    few, small = flops(n_expert=4)
    many, large = flops(n_expert=32)
    tokens, layers = 2 * 24, 2
    router = 3 * 2 * tokens * layers * 28 * 32                # of 28 more experts, forward and twice backward
    assert many - few == router
    assert large.num_parameters() - small.num_parameters() == layers * 28 * (32 + 3 * 32 * 32)
    assert flops(n_expert=4, n_expert_active=4)[0] - few == 3 * 2 * tokens * layers * 2 * 3 * 32 * 32


def test_parameters_and_flops_equal_the_hand_count():
    model = tiny_model(n_shared_expert=1, shared_gate=True, d_expert=24)
    attention, dense = 4 * 32 * 32, 3 * 32 * 64
    experts, shared, router = 8 * 3 * 32 * 24, 3 * 32 * 24, 8 * 32
    outside, norms = 50 * 32, 32 * 7
    blocks = 3 * attention + dense + 2 * (experts + shared + 32 + router)
    idle = 2 * experts * 6 // 8
    assert model.num_parameters() == blocks + outside + norms
    assert model.size() == (f"{blocks + outside + norms:,} parameters "
                            f"({blocks + outside + norms - idle:,} active in a token)")
    scores = 6 * 3 * 32 * 20                                  # attention's two products, half of them
    assert model.flops_per_token(20) == 6 * (blocks - idle + outside) + scores
    dense = GPT(replace(TINY, n_expert=0, n_dense_layer=0))
    assert dense.size() == f"{dense.num_parameters():,} parameters"


def test_what_is_derived_is_filled_in():
    assert TINY.resolved().d_expert == 32                     # two active ones are as wide as d_ff = 64
    assert replace(TINY, n_shared_expert=2).resolved().d_expert == 16
    assert replace(TINY, n_expert=0, n_dense_layer=0).resolved().d_expert == 0


@pytest.mark.parametrize("changes, named", [
    (dict(n_expert_active=9), "n_expert_active=9"), (dict(n_expert_active=0), "n_expert_active=0"),
    (dict(n_expert=-1), "n_expert=-1"), (dict(d_expert=-1), "d_expert=-1"),
    (dict(balance_coef=-0.1), "balance_coef=-0.1"), (dict(n_shared_expert=-1), "n_shared_expert=-1"),
    (dict(shared_gate=True), "shared_gate"),
    (dict(n_expert=0, n_shared_expert=1), "n_shared_expert"),
    (dict(n_expert=0, n_dense_layer=1), "only with --model.n_expert"),
    (dict(n_dense_layer=-1), "n_dense_layer=-1"),
    (dict(n_dense_layer=3), "n_dense_layer=3")], ids=str)
def test_numbers_that_do_not_fit_are_refused_by_name(changes, named):
    with pytest.raises(UserError, match=f"--model.*{named}"):
        replace(TINY, **changes).resolved()


def test_a_checkpoint_keeps_its_experts_but_not_the_weight_of_the_balance():
    old = TINY.resolved()
    with pytest.raises(UserError, match="n_expert_active=1: the checkpoint has 2"):
        old.continued(replace(old, n_expert_active=1), old.seq_len)
    assert old.continued(replace(old, balance_coef=0.5), old.seq_len).balance_coef == 0.5


# -----------------------------------------------------------------------------
# load balance

def test_the_balance_of_a_hand_made_table():
    """Two sequences of 3 and 2 tokens, 4 experts, 2 choices a token; one token of padding"""
    probs = torch.tensor([[.4, .3, .2, .1], [.1, .2, .3, .4], [.7, .1, .1, .1],
                          [.25, .25, .25, .25], [.1, .6, .2, .1], [.97, .01, .01, .01]])
    expert = torch.tensor([[0, 1], [3, 2], [0, 1], [0, 1], [1, 2], [0, 1]])
    sequence = torch.tensor([0, 0, 0, 1, 1, 9])
    # T sum f P, f = count 4 / (2 T), P = mean: (count * sum of probs).sum() * 2 / T
    first = (2 * 1.2 + 2 * .6 + 1 * .6 + 1 * .6) * 2 / 3
    second = (1 * .35 + 2 * .85 + 1 * .45 + 0 * .35) * 2 / 2
    total, chosen = load_balance(probs, expert, sequence, 2)
    assert total.item() == pytest.approx(first + second, rel=1e-6)
    assert chosen.tolist() == [3, 4, 2, 1]


def test_even_routing_gives_alpha_a_layer_and_collapse_the_most():
    T, E, k = 16, 8, 2
    even = torch.stack([torch.arange(T) * k % E, (torch.arange(T) * k + 1) % E], dim=1)
    probs = torch.full((T, E), 0.1 / 6).scatter(1, even, 0.45)
    sequence = torch.zeros(T, dtype=torch.int64)
    assert load_balance(probs, even, sequence, 1)[0].item() / T == pytest.approx(1, rel=1e-6)
    one_pair = torch.tensor([[0, 1]]).expand(T, k)
    probs = torch.zeros(T, E).index_fill(1, torch.tensor([0, 1]), 0.5)
    assert load_balance(probs, one_pair, sequence, 1)[0].item() / T == pytest.approx(E / k, rel=1e-6)
    model = tiny_model(balance_coef=0.3)                      # equal probabilities: whatever is chosen, 1
    for router in routers(model):
        torch.nn.init.zeros_(router)
    model(random_tokens())
    assert model.balance_loss().item() / (2 * 24) == pytest.approx(0.3 * 2, rel=1e-6)


def test_the_balance_loss_reaches_the_routers_and_evens_them_out():
    model = tiny_model(balance_coef=1.0)
    with torch.no_grad():
        for router in routers(model):
            router[0] += 0.5                                  # a favourite
    optimizer, curve = torch.optim.Adam(routers(model), lr=0.01), []
    for _ in range(60):
        model(random_tokens())
        loss = model.balance_loss() / (2 * 24)
        curve.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        assert all(router.grad.any() for router in routers(model))
        optimizer.step()
    assert curve[0] > 2.2 and curve[-1] < 2.05                # of two layers


@pytest.mark.parametrize("parts", [[4], [2, 2], [1, 1, 1, 1], [1, 3]], ids=str)
def test_sum_and_gradient_do_not_depend_on_micro_batches(parts):
    tokens = random_tokens(4)

    def gradient(parts):
        model, total = tiny_model(), 0.0
        for rows in tokens.split(parts):
            model(rows)
            loss = model.balance_loss() / tokens.numel()
            loss.backward()
            total += loss.item()
        return total, [router.grad for router in routers(model)], model.router_stats()
    (total, grads, stats), (whole, whole_grads, whole_stats) = gradient(parts), gradient([4])
    assert total == pytest.approx(whole, rel=1e-5)
    for a, b in zip(grads, whole_grads):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)
    assert torch.tensor(stats["expert_frac"]).allclose(torch.tensor(whole_stats["expert_frac"]))
    assert stats["balance"] == pytest.approx(whole_stats["balance"], rel=1e-5)


def test_the_balance_adds_up_until_it_is_asked_for():
    """Two forwards, then one loss: neither's balance is lost. Bit for bit the sum of each one's."""
    def gradient(ask):
        model, total = tiny_model(), 0.0
        for rows in random_tokens(2).split(1):
            model(rows)
            if ask:
                total = total + model.balance_loss()
        total = total if ask else model.balance_loss()
        total.backward()
        assert model.balance_loss() == 0.0
        return [total.detach()] + [router.grad for router in routers(model)]
    for once, each in zip(gradient(False), gradient(True)):
        assert once.equal(each) and once.any()


def test_documents_in_a_row_balance_like_each_alone_and_padding_does_not_count():
    model, tokens = tiny_model(), random_tokens(1, 20)
    total = 0.0
    for piece in (tokens[:, :7], tokens[:, 7:16]):
        model(piece)
        total += model.balance_loss()
    alone = torch.autograd.grad(total, routers(model))
    model.router_stats()
    docs = torch.tensor([[0] * 7 + [1] * 9 + [-1] * 4])
    model(tokens, docs)
    packed = model.balance_loss()
    grads = torch.autograd.grad(packed, routers(model))
    assert packed.item() == pytest.approx(total.item(), rel=1e-5)
    for a, b in zip(grads, alone):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    stats = model.router_stats()
    assert [sum(layer) for layer in stats["expert_frac"]] == pytest.approx([1, 1])
    assert stats["balance"] == pytest.approx(packed.item() / (0.01 * 2 * 16), rel=1e-5)


def test_a_prompt_and_its_branches_are_one_sequence():
    model, tokens = tiny_model(), random_tokens(1, 20)
    docs = torch.tensor([[0] * 5 + [1] * 4 + [2] * 3 + [3] * 4 + [4] * 4])
    branch = torch.tensor([[False] * 5 + [True] * 7 + [False] * 4 + [True] * 4])
    model(tokens, docs, branch=branch)
    together = model.balance_loss()
    parts = 0.0
    for here in (slice(0, 12), slice(12, 20)):
        model(tokens[:, here], docs[:, here], branch=branch[:, here])
        parts += model.balance_loss()
    assert together.item() == pytest.approx(parts.item(), rel=1e-5)


def test_statistics_are_the_shares_of_the_choices_and_start_anew():
    model, tokens = tiny_model(), random_tokens()
    seen = []
    for block in model.blocks[1:]:
        block.mlp.register_forward_hook(lambda module, args, out: seen.append(out[1][1]))
    model(tokens)
    stats = model.router_stats()
    for expert, shares in zip(seen, stats["expert_frac"]):
        assert shares == pytest.approx([(expert == e).sum().item() / expert.numel() for e in range(8)])
    assert stats["dropped"] == 0 and model.router_stats() == {}
    model.eval()(tokens)
    with torch.no_grad():
        model.train()(tokens)                                 # neither is training
    assert model.router_stats() == {} and model.balance_loss() == 0.0
    dense = GPT(replace(TINY, n_expert=0, n_dense_layer=0))
    dense(tokens)
    assert dense.router_stats() == {} and dense.balance_loss() == 0.0


# -----------------------------------------------------------------------------
# the rest of the code base

@pytest.mark.parametrize("how", ["recomputed", pytest.param("compiled", marks=pytest.mark.slow)])
def test_activation_checkpointing_and_compile_change_neither_gradients_nor_statistics(how):
    def gradients(model, forward):
        weights = torch.randn(2, 24, 32, generator=torch.Generator().manual_seed(2))
        ((forward(random_tokens()) * weights).sum() + model.balance_loss()).backward()
        return [p.grad for p in model.parameters()], model.router_stats()
    plain, other = tiny_model(), tiny_model()
    other.activation_checkpointing = how == "recomputed"
    expected, stats = gradients(plain, plain)
    actual, their_stats = gradients(other, torch.compile(other, backend="aot_eager") if how == "compiled"
                                    else other)
    assert their_stats["balance"] == pytest.approx(stats["balance"])
    assert torch.tensor(their_stats["expert_frac"]).allclose(torch.tensor(stats["expert_frac"]))
    for a, b in zip(actual, expected):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * b.abs().max().item())


def test_cached_tokens_give_the_uncached_hidden_states():
    model, tokens = tiny_model(n_shared_expert=1).eval(), random_tokens()
    cache = model.new_cache(2, 24)
    with torch.no_grad():
        parts = [model(piece, cache=cache) for piece in tokens.split([10, 1, 3, 10], dim=1)]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True], ids=["fp32", "packed"])
def test_samples_of_a_batch_are_those_of_each_prompt_alone(packed):
    if packed and "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no fbgemm on this CPU")
    model = tiny_model(n_shared_expert=1, shared_gate=True)
    model(random_tokens()).sum().backward()                   # sampling in the middle of training
    cfg = SamplingConfig(8, temperature=1.0, packed=packed)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    together, logps, _ = complete(model, prompts, cfg, (), 2, seed=3, numbers=[0, 1, 2])
    for i, prompt in enumerate(prompts):
        alone, their_logps, _ = complete(model, [prompt], cfg, (), 2, seed=3, numbers=[i])
        assert alone == together[2 * i:2 * i + 2]
        for a, b in zip(their_logps, logps[2 * i:2 * i + 2]):
            assert list(a) == pytest.approx(list(b), abs=1e-4)


def test_a_model_is_copied_after_a_training_step():
    """A reference for GRPO or a sampler's copy: the noted balance must not hold on to the graph"""
    model = tiny_model()
    (model(random_tokens()).sum() + model.balance_loss()).backward()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert twin(random_tokens()).equal(model(random_tokens()))


def test_bf16_autocast_routes_in_fp32():
    model, tokens = tiny_model(), random_tokens()
    seen = []
    model.blocks[1].mlp.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.autocast("cpu", torch.bfloat16):
        model(tokens).float().square().sum().backward()
    y, (probs, _) = seen[0]
    assert probs.dtype == torch.float32 and y.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


def test_muon_takes_each_expert_as_a_matrix_of_its_own():
    model = tiny_model(n_shared_expert=1, d_expert=32)
    model(random_tokens()).square().mean().backward()
    groups = [g for g in parameter_groups(model, "muon") if isinstance(g.rule, Muon)]
    names = {name for group in groups for name, _ in group.named}
    assert {"blocks.1.mlp.gate_up", "blocks.1.mlp.down", "blocks.1.mlp.router"} <= names
    group = next(g for g in groups if "blocks.1.mlp.down" in dict(g.named))
    assert group.rule.shape == (32, 32) and group.rule.unit == 32 * 32
    param = dict(group.named)["blocks.1.mlp.down"]
    flat, grad = param.detach().flatten().clone(), param.grad.flatten().clone()
    group.rule.update(flat, grad, {"momentum": torch.zeros_like(flat)}, 0.01, 0.1, 1, 1.0)
    one, one_grad = param[3].detach().flatten().clone(), param.grad[3].flatten().clone()
    Muon((32, 32)).update(one, one_grad, {"momentum": torch.zeros_like(one)}, 0.01, 0.1, 1, 1.0)
    torch.testing.assert_close(flat.view(8, -1)[3], one)
