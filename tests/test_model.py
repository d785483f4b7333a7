"""
common/model.py against transformers, hand formulas and plain autograd: rotary scalings, attention, KV cache,
packing, activation checkpointing, the rules of ModelConfig.
"""
import cmath
import functools
import inspect
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from common.attention import (
    DENSE_MASK_LEN,
    DENSE_MASK_LEN_GPU,
    Documents,
    attend,
    by_documents,
    documents,
    sdpa,
    varlen_kernel,
)
from common.errors import UserError
from common.layers import RMSNorm, Rotate, SwiGLUInCache, rope_frequencies, swiglu
from common.model import GPT, ModelConfig

TINY = ModelConfig(vocab_size=50, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, d_ff=48, seq_len=24)
HEADS = {"MHA": 4, "GQA": 2, "MQA": 1}


def tiny_model(seed=0, **changes):
    """A GPT with weights so large that attention is far from uniform (std 0.02 would hide most mistakes)."""
    torch.manual_seed(seed)
    model = GPT(replace(TINY, **changes)).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name), std=0.2)
    return model


def random_tokens(*shape, seed=1):
    return torch.randint(TINY.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.fixture(params=["mask", "segments"])
def path(request, monkeypatch):
    """Packed rows, whatever their length, with one mask for all or with a call for each document."""
    monkeypatch.setattr("common.attention.DENSE_MASK_LEN", {"mask": 10**9, "segments": 0}[request.param])
    return request.param


def assert_gradients_close(actual, expected, tolerance):
    """tolerance: of each tensor, relative to its largest entry"""
    for name, grad in expected.items():
        atol = tolerance * grad.abs().max().item()
        torch.testing.assert_close(actual[name], grad, atol=atol, rtol=0, msg=lambda m: f"{name}: {m}")


# -----------------------------------------------------------------------------
# against transformers

LLAMA = dict(vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, tie_word_embeddings=False,
             initializer_range=0.3, pad_token_id=0, bos_token_id=None, eos_token_id=None)
OURS = replace(TINY, head_dim=16, norm_eps=1e-5, tie_embeddings=False, rope_theta=100.0)


def same_weights(theirs, ours):
    """Copy the weights of a transformers model into ours, name by name; every tensor must find its place."""
    state = theirs.state_dict()
    if theirs.config.tie_word_embeddings:
        del state["lm_head.weight"]
    new = {"embed.weight": state.pop("model.embed_tokens.weight"),
           "norm.weight": state.pop("model.norm.weight")}
    if "lm_head.weight" in state:
        new["untied_head.weight"] = state.pop("lm_head.weight")
    for i in range(len(ours.blocks)):
        def take(name):
            return state.pop(f"model.layers.{i}.{name}.weight")
        fused = f"model.layers.{i}.self_attn.qkv_proj.weight" in state                        # Phi-3
        new[f"blocks.{i}.attn.qkv.weight"] = take("self_attn.qkv_proj") if fused else torch.cat(
            [take(f"self_attn.{x}_proj") for x in "qkv"])
        new[f"blocks.{i}.mlp.gate_up.weight"] = take("mlp.gate_up_proj") if fused else torch.cat(
            [take("mlp.gate_proj"), take("mlp.up_proj")])
        new[f"blocks.{i}.attn.out.weight"] = take("self_attn.o_proj")
        new[f"blocks.{i}.mlp.down.weight"] = take("mlp.down_proj")
        new[f"blocks.{i}.attn_norm.weight"] = take("input_layernorm")
        new[f"blocks.{i}.mlp_norm.weight"] = take("post_attention_layernorm")
        if ours.config.qk_norm:
            for x in "qk":
                new[f"blocks.{i}.attn.{x}_norm.weight"] = take(f"self_attn.{x}_norm")
    assert not state, f"left over: {list(state)}"
    ours.load_state_dict(new)


def both(theirs_kind, rope, ours, **changes):
    """(transformers model, ours) with the same random weights, norms included."""
    transformers = pytest.importorskip("transformers", reason="the authority on these models; a dev extra")
    torch.manual_seed(0)
    config = getattr(transformers, theirs_kind + "Config")(
        **LLAMA | dict(max_position_embeddings=ours.seq_len) | changes,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta} | rope)
    theirs = getattr(transformers, theirs_kind + "ForCausalLM")(config).eval()
    for name, p in theirs.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(p, mean=1.0, std=0.2)
    model = GPT(ours).eval()
    same_weights(theirs, model)
    return theirs, model


def logits_of(theirs, ours, T):
    tokens = random_tokens(2, T)
    with torch.no_grad():
        return theirs(tokens).logits, ours(tokens) @ ours.head.T                              # (B, T, V) each


LINEAR, DYNAMIC = dict(rope_type="linear", factor=3.0), dict(rope_type="dynamic", factor=3.0)
OUR_LINEAR, OUR_DYNAMIC = (dict(rope_scaling=kind, seq_len=96, rope_original_len=32)
                           for kind in ("linear", "dynamic"))
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=32)
OUR_YARN = dict(rope_scaling="yarn", seq_len=128, rope_original_len=32)
ROPES = {                      # their rope_parameters, our options, tokens
    "default": ({}, dict(seq_len=64), 64),
    "linear": (LINEAR, OUR_LINEAR, 64),
    "dynamic within the original length": (DYNAMIC, OUR_DYNAMIC, 32),
    "dynamic beyond it": (DYNAMIC, OUR_DYNAMIC, 80),
    "yarn": (YARN, OUR_YARN, 100),
    "yarn, other betas": (YARN | dict(beta_fast=8.0, beta_slow=0.5),
                          OUR_YARN | dict(yarn_beta_fast=8.0, yarn_beta_slow=0.5), 100),
    "yarn, attention_factor": (YARN | dict(attention_factor=0.7),
                               OUR_YARN | dict(yarn_attention_factor=0.7), 100),
    "yarn, mscales": (YARN | dict(mscale=2.0, mscale_all_dim=0.5),
                      OUR_YARN | dict(yarn_mscale=2.0, yarn_mscale_all_dim=0.5), 100),
}


@pytest.mark.parametrize("name", ROPES)
def test_logits_equal_llama_with_every_rope(name):
    rope, options, T = ROPES[name]
    # transformers reads the original length of dynamic scaling from max_position_embeddings
    original = 32 if rope is DYNAMIC else options["seq_len"]
    theirs, ours = both("Llama", rope, replace(OURS, **options), max_position_embeddings=original)
    expected, logits = logits_of(theirs, ours, T)
    assert expected.std() > 0.5                          # else 1e-4 would mean little
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    if name not in ("default", "dynamic within the original length"):
        ours.config = replace(ours.config, rope_scaling="none")
        with torch.no_grad():
            unscaled = ours(random_tokens(2, T)) @ ours.head.T
        assert (unscaled - expected).abs().max() > 0.1   # the scaling is seen in the logits at all


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("heads", HEADS)
def test_logits_equal_llama_for_all_groupings_of_heads(heads, tied):
    options = dict(n_kv_head=HEADS[heads], tie_embeddings=tied, seq_len=64)
    theirs, ours = both("Llama", {}, replace(OURS, **options), num_key_value_heads=HEADS[heads],
                        tie_word_embeddings=tied)
    expected, logits = logits_of(theirs, ours, 20)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_logits_equal_qwen3_with_its_norm_of_queries_and_keys():
    expected, logits = logits_of(*both("Qwen3", {}, replace(OURS, qk_norm=True, seq_len=64)), 20)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("fraction", [0.5, 0.75])
def test_logits_equal_phi3_which_rotates_a_part_of_each_head(fraction):
    # Phi-3 has no head_dim option: 64 channels and 4 heads for heads of 16
    expected, logits = logits_of(*both("Phi3", {"partial_rotary_factor": fraction}, replace(
        OURS, n_embd=64, partial_rotary_factor=fraction, seq_len=64), hidden_size=64), 20)
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


# -----------------------------------------------------------------------------
# rotary frequencies against hand formulas

ROPE = ModelConfig(vocab_size=2, n_layer=1, n_head=1, n_embd=64, seq_len=512, rope_theta=10_000.0)


def hand_yarn(i, d=64, theta=1e4, original=512, s=4.0, fast=32, slow=1):
    """SPEC's formula for one pair i, in plain Python."""
    def dim(r):
        return d * math.log(original / (2 * math.pi * r)) / (2 * math.log(theta))
    low, high = math.floor(dim(fast)), math.ceil(dim(slow))
    keep = 1 - min(max((i - low) / (high - low), 0), 1)
    inv = theta ** (-2 * i / d)
    return keep * inv + (1 - keep) * inv / s


def plain(i):
    return 1e4 ** (-2 * i / 64)


def scaled(kind, **options):
    return dict(rope_scaling=kind, seq_len=2048, rope_original_len=512) | options


HAND = {                       # options, length, inverse frequency of pair i, factor of cos and sin
    "none": (dict(), 512, plain, 1),
    "none, longer than trained": (dict(), 999, plain, 1),
    "linear": (scaled("linear"), 9, lambda i: plain(i) / 4, 1),
    "linear, factor given": (scaled("linear", rope_factor=3.0), 9, lambda i: plain(i) / 3, 1),
    "dynamic, short": (scaled("dynamic"), 512, plain, 1),
    "dynamic, long": (scaled("dynamic"), 1024, lambda i: (1e4 * (4 * 2 - 3) ** (64 / 62)) ** (-i / 32), 1),
    "yarn": (scaled("yarn"), 9, hand_yarn, 0.1 * math.log(4) + 1),
    "yarn, betas": (scaled("yarn", seq_len=1024, yarn_beta_fast=16.0, yarn_beta_slow=2.0), 9,
                    lambda i: hand_yarn(i, s=2, fast=16, slow=2), 0.1 * math.log(2) + 1),
    "yarn, attention factor": (scaled("yarn", yarn_attention_factor=0.8), 9, hand_yarn, 0.8),
    "yarn, mscales": (scaled("yarn", yarn_mscale=1.0, yarn_mscale_all_dim=0.5), 9, hand_yarn,
                      (0.1 * math.log(4) + 1) / (0.05 * math.log(4) + 1)),
    "partial": (dict(partial_rotary_factor=0.25), 9, lambda i: 1e4 ** (-2 * i / 16), 1),
    "partial yarn": (scaled("yarn", partial_rotary_factor=0.5), 9, lambda i: hand_yarn(i, d=32),
                     0.1 * math.log(4) + 1),
}


@pytest.mark.parametrize("name", HAND)
def test_rope_frequencies_follow_the_hand_formula(name):
    options, length, formula, factor = HAND[name]
    config = replace(ROPE, **options).resolved()
    inv, scale = rope_frequencies(config, length)
    expected = torch.tensor([formula(i) for i in range(int(64 * config.partial_rotary_factor) // 2)])
    torch.testing.assert_close(inv, expected, rtol=1e-6, atol=0)
    assert scale == pytest.approx(factor, rel=1e-12)


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    """Of 32 pairs at 512 -> 2048, the first four are kept and those from 16 on are stretched by 4."""
    inv, _ = rope_frequencies(replace(ROPE, **scaled("yarn")).resolved(), 9)
    ratio = (inv / rope_frequencies(ROPE.resolved(), 9)[0]).tolist()
    # dim(32) = 32 ln(512 / 64 pi) / ln 1e4 = 3.25, dim(1) = 32 ln(512 / 2 pi) / ln 1e4 = 15.29
    assert ratio[:4] == pytest.approx([1] * 4) and ratio[16:] == pytest.approx([0.25] * 16)
    assert ratio[9] == pytest.approx(1 - 0.75 * 6 / 13, rel=1e-5)


@pytest.mark.parametrize("rotated", [2, 6, 8])
def test_rotation_is_multiplication_by_a_complex_number(rotated):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)                              # (B, T, H, D)
    angles = torch.randn(2, 5, 1, rotated // 2, dtype=torch.float64)
    y = Rotate.turn(x, 1.3 * angles.cos(), 1.3 * angles.sin())
    for b in range(2):
        for t in range(5):
            for h in range(3):
                for i in range(rotated // 2):
                    z = complex(x[b, t, h, i], x[b, t, h, i + rotated // 2])
                    z *= 1.3 * cmath.exp(1j * angles[b, t, 0, i].item())
                    assert complex(y[b, t, h, i], y[b, t, h, i + rotated // 2]) == pytest.approx(z, abs=1e-12)
    assert y[..., rotated:].equal(x[..., rotated:])


def test_dynamic_rope_follows_the_sequence_without_a_cache_and_the_capacity_with_one():
    model = tiny_model(rope_scaling="dynamic", rope_original_len=8)
    tokens = random_tokens(1, 12)
    with torch.no_grad():
        alone, same_room = model(tokens), model(tokens, cache=model.new_cache(1, 12))
        more_room = model(tokens, cache=model.new_cache(1, 24))
        theta = 1e4 * (3 * 24 / 8 - 2) ** (8 / 6)        # factor 3 = 24 / 8, heads of 8 channels
        model.config = replace(model.config, rope_scaling="none", rope_theta=theta)
        by_hand = model(tokens)
    torch.testing.assert_close(same_room, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(more_room, by_hand, atol=1e-6, rtol=0)
    assert (more_room - alone).abs().max() > 1e-2


# -----------------------------------------------------------------------------
# blocks

@pytest.mark.parametrize("rotated", [4, 8])
def test_gradient_of_the_rotation_is_autograds(rotated):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(2, 2, 3, 1, rotated // 2, dtype=torch.float64)         # not of one angle even
    assert torch.autograd.gradcheck(lambda x: Rotate.apply(x, cos, sin), x)


@pytest.mark.parametrize("rows", [1, 300])
def test_swiglu_and_its_gradient_are_autograds(rows):
    """300 rows are more than one slice, the last one shorter."""
    torch.manual_seed(0)
    x = torch.randn(rows, 2 * 3, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(rows, 3, dtype=torch.float64)
    expected = F.silu(x[:, :3]) * x[:, 3:]
    d_expected, = torch.autograd.grad(expected, x, grad)
    y = SwiGLUInCache.apply(x)
    dx, = torch.autograd.grad(y, x, grad)
    torch.testing.assert_close(y, expected, atol=1e-13, rtol=0)
    torch.testing.assert_close(dx, d_expected, atol=1e-13, rtol=0)
    if rows == 1:
        assert torch.autograd.gradcheck(SwiGLUInCache.apply, x)


def test_swiglu_takes_any_leading_shape():
    x = torch.randn(2, 5, 3, 8)
    torch.testing.assert_close(swiglu(x), F.silu(x[..., :4]) * x[..., 4:])


def test_gradients_of_the_whole_model_are_those_of_a_naive_one_in_float64():
    """Heads in a loop, no SDPA, no custom backward: everything in one plain function of the parameters."""
    model = tiny_model(qk_norm=True, partial_rotary_factor=0.5, n_layer=1).double()
    c, tokens = model.config, random_tokens(2, 7)

    def norm(x, weight):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * weight

    def turn(x):  # (B, T, D), the first 4 channels
        angle = torch.arange(7).double()[:, None] * torch.tensor([1, 1e4 ** -0.5]).double()
        a, b, rest = x[..., :2], x[..., 2:4], x[..., 4:]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest], -1)

    def naive():
        block, x = model.blocks[0], model.embed.weight[tokens]
        w_q, w_k, w_v = block.attn.qkv.weight.split([4 * 8, 2 * 8, 2 * 8])
        h = norm(x, block.attn_norm.weight)
        heads = []
        for i in range(4):
            q = turn(norm(h @ w_q[8 * i:8 * i + 8].T, block.attn.q_norm.weight))
            j = i // 2                                                            # the group's key/value head
            k = turn(norm(h @ w_k[8 * j:8 * j + 8].T, block.attn.k_norm.weight))
            scores = (q @ k.mT / 8 ** 0.5).masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
            heads.append(scores.softmax(-1) @ (h @ w_v[8 * j:8 * j + 8].T))
        x = x + torch.cat(heads, -1) @ block.attn.out.weight.T
        gate, up = (norm(x, block.mlp_norm.weight) @ block.mlp.gate_up.weight.T).chunk(2, -1)
        return norm(x + (gate * gate.sigmoid() * up) @ block.mlp.down.weight.T, model.norm.weight)

    results = []
    for forward in (naive, lambda: model(tokens)):
        model.zero_grad()
        hidden = forward()
        hidden.pow(3).sum().backward()
        results.append((hidden.detach(), gradients(model)))
    # the norms compute in fp32 even here
    torch.testing.assert_close(results[1][0], results[0][0], atol=2e-5, rtol=0)
    assert_gradients_close(results[1][1], results[0][1], 2e-5)


def test_rmsnorm_of_bf16_computes_in_fp32():
    torch.manual_seed(0)
    x, norm = (100 * torch.randn(64, 512)).bfloat16(), RMSNorm(512, 1e-6).bfloat16()
    norm.weight.data = torch.randn(512).bfloat16()
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    assert norm(x).dtype == torch.bfloat16
    # rounded once, to 8 significant bits; sums or products in bf16 would be further off
    assert ((norm(x).double() - expected).abs() <= expected.abs() * 2**-8 * 1.001).all()


def numbers_kept_for_backward(forward):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        forward()
    return sum(sizes)


@pytest.mark.parametrize("p", [0.0, 0.3], ids=["no dropout", "dropout"])
def test_activation_checkpointing_keeps_less_and_changes_neither_loss_nor_gradients(path, p):
    model, tokens, results = tiny_model(attn_dropout=p).train(), random_tokens(2, 9), []
    docs = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    for on in (False, True):
        model.activation_checkpointing = on
        kept = numbers_kept_for_backward(lambda: model(tokens, docs))
        model.zero_grad()
        torch.manual_seed(7)
        loss = model(tokens, docs).pow(3).sum()
        loss.backward()
        results.append((loss.detach(), gradients(model), kept))
    (loss, grads, kept), (loss_on, grads_on, kept_on) = results
    assert loss.equal(loss_on)
    assert all(grads[name].equal(grads_on[name]) for name in grads)
    assert kept_on < kept / 3


def test_attention_dropout_is_active_in_training_only():
    model, tokens = tiny_model(attn_dropout=0.5), random_tokens(2, 9)
    without = tiny_model(attn_dropout=0.0)
    with torch.no_grad():
        assert model(tokens).equal(without(tokens))
        model.train()
        first, second = model(tokens), model(tokens)
        assert not first.equal(second) and not first.equal(without(tokens))
        # position 0 attends to itself alone: its weight is dropped, or doubled, but never 1
        assert not first[:, 0].equal(without(tokens)[:, 0])


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_gives_the_same_hidden_states_and_gradients(backend):
    model, tokens = tiny_model(n_layer=1, partial_rotary_factor=0.5).train(), random_tokens(2, 9)
    docs = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
    results = []
    for forward in (model, torch.compile(model, backend=backend)):
        model.zero_grad()
        hidden = forward(tokens, docs)
        hidden.pow(3).sum().backward()
        results.append((hidden.detach(), gradients(model)))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-6, rtol=1e-5)
    assert_gradients_close(results[1][1], results[0][1], 1e-6)


# -----------------------------------------------------------------------------
# key/value cache

@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("chunks", [[11], [1] * 11, [1, 3, 7], [5, 1, 1, 4], [3, 8]], ids=str)
def test_cached_chunks_of_any_sizes_give_the_uncached_hidden_states(chunks, heads):
    model, tokens = tiny_model(n_kv_head=HEADS[heads], qk_norm=True), random_tokens(3, 11)
    cache, start, parts = model.new_cache(3, 11), 0, []
    with torch.no_grad():
        for n in chunks:
            parts.append(model(tokens[:, start:start + n], cache=cache))
            start += n
        expected = model(tokens)
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=2e-6, rtol=1e-5)
    assert cache.used == cache.capacity == 11


@pytest.mark.parametrize("num_samples", [1, 3])
@pytest.mark.parametrize("heads", HEADS)
def test_forked_rows_go_on_like_each_row_alone(heads, num_samples):
    """Right-padded prefill of lengths 5, 1, 8, then steps of 1, 3 and 1 tokens, and rows that leave."""
    model, tokens, lengths = tiny_model(n_kv_head=HEADS[heads], qk_norm=True), random_tokens(3, 8), [5, 1, 8]
    more = random_tokens(3 * num_samples, 8, seed=5)
    rows, said, hidden = list(range(3 * num_samples)), 0, {}
    with torch.no_grad():
        prompt = tokens.clone()
        for row, n in enumerate(lengths):
            prompt[row, n:] = 49  # what pads is never looked at
        cache = model.new_cache(3, 16)
        first = model(prompt, cache=cache)
        cache.fork(lengths, num_samples, 8)
        for row in rows:
            hidden[row] = [first[row // num_samples, :lengths[row // num_samples]]]
        for n, keep in ((1, [0, 1, 2]), (3, [1, 0, 2]), (1, [2, 1]), (2, [1]), (1, None)):
            out = model(more[rows, said:said + n], cache=cache)
            said += n
            for i, row in enumerate(rows):
                hidden[row].append(out[i])
                alone = model(torch.cat([tokens[row // num_samples, :lengths[row // num_samples]],
                                         more[row, :said]])[None])[0]
                torch.testing.assert_close(torch.cat(hidden[row]), alone, atol=2e-6, rtol=1e-5)
            if keep:  # other prompts drop out, and some rows of those that stay
                keep = [i for i, row in enumerate(rows) if i % 3 in keep] if num_samples > 1 else keep
                rows = [rows[i] for i in keep]
                cache.select(torch.tensor(keep))
        assert cache.used == cache.capacity == 8


def test_selected_rows_of_a_cache_go_on_like_themselves():
    model, tokens, more = tiny_model(), random_tokens(4, 7), random_tokens(4, 2, seed=5)
    cache = model.new_cache(4, 9)
    with torch.no_grad():
        model(tokens, cache=cache)
        cache.select(torch.tensor([0, 3, 2]))
        cache.select(torch.tensor([2, 1]))
        hidden = torch.cat([model(more[[2, 3], n:n + 1], cache=cache) for n in range(2)], 1)
        alone = model(torch.cat([tokens[[2, 3]], more[[2, 3]]], 1))[:, -2:]
        torch.testing.assert_close(hidden, alone, atol=2e-6, rtol=1e-5)


def test_the_trunk_of_samples_is_there_once():
    """Memory: 2 prompts of 8 positions and 3 of each of their 10 rows, not 10 prompts."""
    model = tiny_model()
    cache = model.new_cache(2, 11)
    with torch.no_grad():
        model(random_tokens(2, 8), cache=cache)
        cache.fork([8, 8], 5, 3)
    position = cache.k[0, 0, :, 0].numel()
    assert sum(x.numel() for x in cache.trunk) == 2 * model.config.n_layer * 2 * 8 * position
    assert cache.k.numel() == model.config.n_layer * 10 * 3 * position


def test_a_full_cache_raises_and_says_how_full_it_is():
    model, cache = tiny_model(), tiny_model().new_cache(1, 6)
    with torch.no_grad():
        model(random_tokens(1, 4), cache=cache)
        with pytest.raises(ValueError, match="6 positions.*4 used, 3 more"):
            model(random_tokens(1, 3), cache=cache)
        model(random_tokens(1, 2), cache=cache)  # the refusal left it as it was
        with pytest.raises(ValueError, match="6 used, 1 more"):
            model(random_tokens(1, 1), cache=cache)


def test_the_cache_has_the_dtype_that_attention_computes_in():
    model, tokens = tiny_model(), random_tokens(2, 9)
    assert model.new_cache(2, 9).k.dtype == torch.float32
    assert tiny_model().bfloat16().new_cache(2, 9).v.dtype == torch.bfloat16
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        cache = model.new_cache(2, 9)
        assert cache.k.dtype == torch.bfloat16
        parts = [model(part, cache=cache) for part in tokens.split([4, 1, 1, 1, 1, 1], dim=1)]
        cached, full = torch.cat(parts, 1), model(tokens)
    exact = model(tokens)
    # the cache rounds no more than autocast itself does
    assert (cached - full).abs().max() <= 2 * (full - exact).abs().max()


# -----------------------------------------------------------------------------
# packed documents

DOCS = [4, 1, 6, 2]                                      # lengths of the documents in a row of 13


def packed_row(seed=1):
    docs = torch.repeat_interleave(torch.arange(4), torch.tensor(DOCS))[None]
    return random_tokens(1, 13, seed=seed), docs


def test_a_packed_document_is_computed_as_if_it_were_alone(path):
    model, (tokens, docs) = tiny_model(qk_norm=True), packed_row()
    with torch.no_grad():
        packed = model(tokens.expand(2, -1), torch.cat([docs, torch.zeros_like(docs)]))
        for part, hidden in zip(tokens.split(DOCS, 1), packed[:1].split(DOCS, 1)):
            torch.testing.assert_close(hidden, model(part), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(packed[1:], model(tokens), atol=1e-6, rtol=1e-6) # causal


def test_documents_are_told_apart_by_any_numbers(path):
    model, (tokens, docs) = tiny_model(), packed_row()
    with torch.no_grad():
        assert model(tokens, torch.tensor([7, -3, 2**40, 0])[docs]).equal(model(tokens, docs))


def test_gradients_of_packed_documents_are_the_sum_of_the_single_ones(path):
    model, (tokens, docs) = tiny_model(), packed_row()
    model(tokens, docs).pow(3).sum().backward()
    packed = gradients(model)
    model.zero_grad()
    for part in tokens.split(DOCS, 1):
        model(part).pow(3).sum().backward()
    assert_gradients_close(packed, gradients(model), 1e-6)


def test_another_document_leaves_hidden_states_and_gradients_bit_exact(path):
    """Changing documents 0 and 3 changes no bit of 1 and 2, nor of the gradient of their loss."""
    model, (tokens, docs) = tiny_model(), packed_row()
    changed = torch.where((docs == 0) | (docs == 3), random_tokens(1, 13, seed=9), tokens)
    kept = slice(4, 11)
    assert not changed.equal(tokens) and changed[:, kept].equal(tokens[:, kept])
    results = []
    for row in (tokens, changed):
        model.zero_grad()
        embedded = []
        hook = model.embed.register_forward_hook(lambda _, __, x: embedded.append(x) or x.retain_grad())
        hidden = model(row, docs)[:, kept]
        hook.remove()
        hidden.pow(3).sum().backward()
        results.append((hidden.detach(), embedded[0].grad))
    assert results[0][0].equal(results[1][0])
    assert results[0][1][:, kept].equal(results[1][1][:, kept])
    outside = torch.cat([results[1][1][:, :4], results[1][1][:, 11:]], 1)
    assert outside.count_nonzero() == 0                  # no gradient crosses a boundary


def test_packing_and_a_cache_together_are_refused():
    """The cache has a mask and positions of its own, so `docs` would be ignored without a word."""
    model, (tokens, docs) = tiny_model(), packed_row()
    with torch.no_grad(), pytest.raises((AssertionError, ValueError)):
        model(tokens, docs, model.new_cache(1, 13))


# -----------------------------------------------------------------------------
# packed documents in long rows

LONG = [[1, 60, 1, 75, 13], [150], [149, 1]]             # lengths of the documents in three rows of 150


def long_rows(seed=1):
    """A row's first document has the number of the last one in the row before: only the border parts them."""
    docs, number = [], 0
    for lengths in LONG:
        docs.append((number + torch.arange(len(lengths))).repeat_interleave(torch.tensor(lengths)))
        number += len(lengths) - 1
    return random_tokens(3, 150, seed=seed), torch.stack(docs)


def logits_and_gradients(model, batches):
    """-> logits (N, V) of the (tokens, docs, ...) in order, gradients of their summed cross-entropy"""
    model.zero_grad()
    logits = torch.cat([(model(*batch) @ model.head.T).flatten(0, 1) for batch in batches])
    targets = random_tokens(len(logits), seed=2)
    F.cross_entropy(logits, targets, reduction="sum").backward()
    return logits.detach(), gradients(model)


def alone(model):
    """The same of each document of long_rows() in a row of its own."""
    return logits_and_gradients(model, [(part,) for row, lengths in zip(long_rows()[0].split(1), LONG)
                                        for part in row.split(lengths, 1)])


@pytest.mark.parametrize("heads", HEADS)
def test_documents_in_long_rows_are_computed_as_each_alone_and_as_with_a_mask(monkeypatch, heads):
    model = tiny_model(n_kv_head=HEADS[heads], qk_norm=True)
    expected, segments = alone(model), logits_and_gradients(model, [long_rows()])
    monkeypatch.setattr("common.attention.DENSE_MASK_LEN", 150)
    for logits, grads in (segments, logits_and_gradients(model, [long_rows()])):
        torch.testing.assert_close(logits, expected[0], atol=1e-5, rtol=1e-5)
        assert_gradients_close(grads, expected[1], 1e-5)
    assert expected[0].std() > 0.5


def test_only_longer_rows_than_a_mask_is_made_for_are_computed_document_by_document(monkeypatch):
    calls = []
    monkeypatch.setattr("common.attention.sdpa", lambda q, *args: calls.append(q.shape[2])
                        or sdpa(q, *args))
    docs, model = (torch.arange(DENSE_MASK_LEN + 1) // 100)[None], tiny_model()
    with torch.no_grad():
        model(random_tokens(1, DENSE_MASK_LEN), docs[:, :-1])
        assert calls == [DENSE_MASK_LEN] * 2             # once a layer
        calls.clear()
        model(random_tokens(1, DENSE_MASK_LEN + 1), docs)
    assert calls == [100, DENSE_MASK_LEN - 99] * 2


def test_another_document_in_long_rows_changes_no_bit():
    """Each document in turn: its own logits change from its first token on, the others' not at all."""
    model, (tokens, docs) = tiny_model(), long_rows()
    other, start = (tokens + 1) % TINY.vocab_size, 0
    with torch.no_grad():
        before = (model(tokens, docs) @ model.head.T).flatten(0, 1)
        for n in sum(LONG, []):
            here = torch.zeros(450, dtype=torch.bool)
            here[start:start + n] = True
            changed = torch.where(here.view(3, 150), other, tokens)
            after = (model(changed, docs) @ model.head.T).flatten(0, 1)
            assert torch.equal(after[~here], before[~here])
            assert (after[here] != before[here]).any(1).all()
            start += n


def test_activation_checkpointing_of_long_rows_changes_no_bit():
    model, results = tiny_model(attn_dropout=0.3).train(), []
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(7)
        results.append(logits_and_gradients(model, [long_rows()]))
    (logits, grads), (logits_on, grads_on) = results
    assert logits.equal(logits_on) and all(grads[name].equal(grads_on[name]) for name in grads)


def test_a_compiled_model_computes_long_rows_in_one_graph_to_the_same_result():
    model = tiny_model(n_layer=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(*long_rows()), model(*long_rows()), atol=1e-5, rtol=1e-5)


def test_a_number_that_comes_again_in_a_row_is_another_document(path):
    model, tokens = tiny_model(), torch.randint(0, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    again = model(tokens, torch.tensor([[0] * 4 + [1] * 4 + [0] * 4]))
    assert again.equal(model(tokens, torch.tensor([[0] * 4 + [1] * 4 + [2] * 4])))


class OnGPU:
    """Where the weights of a model are, and of what dtype, as `on_gpu` has it."""
    dtype, device = torch.bfloat16, torch.device("cuda:0")


def varlen_reference(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window_size):
    """torch.nn.attention.varlen.varlen_attn for documents, head by head; asserts what its kernel demands."""
    (total, H, D), borders, key_borders = query.shape, cu_seq_q.tolist(), cu_seq_k.tolist()
    assert key.shape == value.shape == (key_borders[-1], H, D)
    assert all(x.stride(-1) == 1 for x in (query, key, value))
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and len(borders) == len(key_borders)
    assert borders[0] == key_borders[0] == 0 and borders[-1] == total and window_size == (-1, 0)
    assert max_q == cu_seq_q.diff().max() and max_k == cu_seq_k.diff().max()
    out = torch.zeros_like(query)
    for start, end, first, last in zip(borders, borders[1:], key_borders, key_borders[1:]):
        n, S = end - start, last - first
        assert 0 < n <= S                                     # the last query sees the last key
        hidden = torch.ones(n, S, dtype=torch.bool).triu(S - n + 1)
        for h in range(H):
            scores = (query[start:end, h] @ key[first:last, h].T / D ** 0.5).masked_fill(hidden, -torch.inf)
            out[start:end, h] = scores.softmax(-1) @ value[first:last, h]
    return out


@pytest.fixture
def on_gpu(monkeypatch):
    """Every model believes to be on a GPU that has the kernel -> list of the kernel's calls"""
    calls = []

    @functools.wraps(varlen_reference)
    def varlen_attn(*args, **kwargs):
        calls.append(args)
        return varlen_reference(*args, **kwargs)
    monkeypatch.setattr("common.attention.varlen_attn", varlen_attn, raising=False)
    monkeypatch.setattr("common.attention.VARLEN", True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("common.attention.varlen_kernel",
                        lambda device, dtype, D: varlen_kernel(OnGPU.device, OnGPU.dtype, D))
    return calls


@pytest.mark.parametrize("heads", HEADS)
def test_one_kernel_for_all_documents_gives_the_same_as_each_alone(on_gpu, heads):
    model = tiny_model(n_kv_head=HEADS[heads])
    logits, grads = logits_and_gradients(model, [long_rows()])
    assert len(on_gpu) == 2                                   # once a layer
    expected = alone(model)
    torch.testing.assert_close(logits, expected[0], atol=1e-5, rtol=1e-5)
    assert_gradients_close(grads, expected[1], 1e-5)


@pytest.mark.parametrize("lacking", ["dropout", "16 bits", "the function", "the GPU"])
def test_where_the_kernel_cannot_be_used_each_document_has_a_call(on_gpu, monkeypatch, lacking):
    model = tiny_model(attn_dropout=0.3)
    if lacking == "dropout":
        model.train()
    elif lacking == "16 bits":
        monkeypatch.setattr(OnGPU, "dtype", torch.float32)
    elif lacking == "the GPU":
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (7, 5))
    else:
        monkeypatch.setattr("common.attention.VARLEN", False)
    logits, _ = logits_and_gradients(model, [long_rows()])
    assert on_gpu == []
    if lacking == "dropout":                                  # in evaluation it is there
        logits_and_gradients(model.eval(), [long_rows()])
        assert len(on_gpu) == 2
    distance = (logits - alone(model.eval())[0]).abs().max()
    assert distance > 0.1 if lacking == "dropout" else distance < 1e-5


def test_the_kernel_of_torch_takes_and_gives_what_is_expected(monkeypatch):
    """Its real code, autograd included, on tensors without content: those need no GPU."""
    varlen = pytest.importorskip("torch.nn.attention.varlen", reason="torch before 2.10 has no such kernel")
    real = inspect.signature(varlen.varlen_attn).parameters
    for name, parameter in inspect.signature(varlen_reference).parameters.items():
        assert real[name].kind == parameter.kind, name
    assert list(real)[:7] == list(inspect.signature(varlen_reference).parameters)[:7]
    monkeypatch.setattr("common.attention.by_documents", lambda *args: (True, 0))
    layout = Documents(TINY.resolved(), torch.tensor([[1, 1, 1, 2, 2], [2, 2, 3, 3, 3]]), None, None, 0.0)
    assert layout.borders.tolist() == [0, 3, 5, 7, 10] and layout.lengths == [3, 2, 2, 3]
    layout.borders, layout.key_borders = layout.borders.to("meta"), layout.key_borders.to("meta")
    for K in (2, 4):
        q, k, v = (torch.empty(2, 5, heads, 8, dtype=torch.bfloat16, device="meta", requires_grad=True)
                   for heads in (4, K, K))
        y = attend(*(x.transpose(1, 2) for x in (q, k, v)), layout)
        assert y.shape == (2, 4, 5, 8) and y.dtype == torch.bfloat16
        y.sum().backward()
        assert all(x.grad.shape == x.shape for x in (q, k, v))


# -----------------------------------------------------------------------------
# branches: several answers to one prompt

# three rows of 100: lengths of each trunk and of its branches
TREES = [[(20, 7, 1), (3, 5), (9,), (11, 30, 2, 12)], [(60, 40)], [(1, 1, 1, 1), (96,)]]


def trees(seed=1):
    """-> tokens, docs, branch (3, 100). A row's first trunk has the number of the row's end before it."""
    docs, branch, number = [], [], 0
    for row in TREES:
        lengths = torch.tensor([n for tree in row for n in tree])
        docs.append((number + torch.arange(len(lengths))).repeat_interleave(lengths))
        is_branch = torch.tensor([i > 0 for tree in row for i in range(len(tree))])
        branch.append(is_branch.repeat_interleave(lengths))
        number += len(lengths) - 1
    return random_tokens(3, 100, seed=seed), torch.stack(docs), torch.stack(branch)


def in_trees(model):
    """-> logits (300, V) and the gradients of their summed cross-entropy"""
    tokens, docs, branch = trees()
    return logits_and_gradients(model, [(tokens, docs, None, branch)])


def each_branch_alone(model):
    """The same of plain rows: each trunk, and each branch after a copy of its trunk."""
    def hidden(trunk, branch):
        return model(torch.cat([trunk, branch])[None])[0, len(trunk):]
    model.zero_grad()
    tokens, parts = trees()[0].flatten(), []
    for tree in sum(TREES, []):
        (trunk, *branches), tokens = tokens[:sum(tree)].split(tree), tokens[sum(tree):]
        parts += [hidden(trunk[:0], trunk)] + [hidden(trunk, branch) for branch in branches]
    logits = torch.cat(parts) @ model.head.T
    F.cross_entropy(logits, random_tokens(300, seed=2), reduction="sum").backward()
    return logits.detach(), gradients(model)


def test_a_branch_continues_the_positions_of_its_trunk():
    docs = torch.tensor([[5, 5, 5, 6, 6, 7, 8, 8, 9], [1, 2, 3, 3, 3, 4, 4, 4, 4]])
    branch = torch.tensor([[0, 0, 0, 1, 1, 1, 0, 0, 1], [0, 1, 0, 0, 0, 0, 0, 0, 0]]).bool()
    positions, start, trunk_start = documents(docs, branch)
    assert positions.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2], [0, 1, 0, 1, 2, 0, 1, 2, 3]]
    assert start.tolist() == [[0, 0, 0, 3, 3, 5, 6, 6, 8], [0, 1, 2, 2, 2, 5, 5, 5, 5]]
    assert trunk_start.tolist() == [[0, 0, 0, 0, 0, 0, 6, 6, 6], [0, 0, 2, 2, 2, 5, 5, 5, 5]]


@pytest.mark.parametrize("heads", HEADS)
def test_branches_are_computed_as_each_alone_after_its_trunk(path, heads):
    model = tiny_model(n_kv_head=HEADS[heads], qk_norm=True)
    (logits, grads), expected = in_trees(model), each_branch_alone(model)
    torch.testing.assert_close(logits, expected[0], atol=1e-5, rtol=1e-5)
    assert_gradients_close(grads, expected[1], 1e-5)
    assert expected[0].std() > 0.5


def test_another_branch_changes_no_bit_and_another_trunk_only_its_own_branches(path):
    """Each trunk and branch in turn, and the gradient of its logits: none reaches what it does not see."""
    model, (tokens, docs, branch), start = tiny_model(), trees(), 0
    other, embedded = (tokens + 1) % TINY.vocab_size, []
    model.embed.register_forward_hook(lambda _, __, x: embedded.append(x))

    def place(start, n):
        here = torch.zeros(300, dtype=torch.bool)
        here[start:start + n] = True
        return here
    before = model(tokens, docs, branch=branch).flatten(0, 1)
    for tree in sum(TREES, []):
        trunk, whole = place(start, tree[0]), place(start, sum(tree))
        for i, n in enumerate(tree):
            here = place(start, n)
            with torch.no_grad():
                changed = torch.where(here.view(3, 100), other, tokens)
                after = model(changed, docs, branch=branch).flatten(0, 1)
            affected, sees = here if i else whole, here | trunk
            assert torch.equal(after[~affected], before[~affected])
            assert (after[affected] != before[affected]).any(1).all()
            grad, = torch.autograd.grad(before[here].pow(3).sum(), embedded[0], retain_graph=True)
            grad = grad.flatten(0, 1)
            assert not grad[~sees].any() and grad[sees].any(1).all()
            start += n


def test_rows_without_a_branch_are_plain_documents(path):
    model, (tokens, docs) = tiny_model(), long_rows()
    with torch.no_grad():
        assert model(tokens, docs, branch=torch.zeros_like(docs).bool()).equal(model(tokens, docs))


def test_activation_checkpointing_of_branches_changes_no_bit(path):
    model, results = tiny_model(attn_dropout=0.3).train(), []
    for model.activation_checkpointing in (False, True):
        torch.manual_seed(7)
        results.append(in_trees(model))
    (logits, grads), (logits_on, grads_on) = results
    assert logits.equal(logits_on) and all(grads[name].equal(grads_on[name]) for name in grads)
    assert (logits - in_trees(model.eval())[0]).abs().max() > 0.1                # dropout was on


def test_a_compiled_model_computes_branches_in_one_graph_to_the_same_result(monkeypatch):
    monkeypatch.setattr("common.attention.DENSE_MASK_LEN", 0)
    model = tiny_model(n_layer=1)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    tokens, docs, branch = trees()
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens, docs, branch=branch), model(tokens, docs, branch=branch),
                                   atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", HEADS)
def test_one_kernel_for_trunks_and_branches_gives_the_same_as_each_alone(on_gpu, monkeypatch, heads):
    monkeypatch.setattr("common.attention.DENSE_MASK_LEN", 0)
    model = tiny_model(n_kv_head=HEADS[heads])
    logits, grads = in_trees(model)
    assert len(on_gpu) == 2                                   # once a layer
    expected = each_branch_alone(model)
    torch.testing.assert_close(logits, expected[0], atol=1e-5, rtol=1e-5)
    assert_gradients_close(grads, expected[1], 1e-5)


def test_a_gpu_without_that_kernel_has_a_mask_for_rows_that_are_not_too_long(monkeypatch):
    where = OnGPU.device, OnGPU.dtype, 8
    assert by_documents(torch.device("cpu"), torch.bfloat16, 8, 0.0) == (False, DENSE_MASK_LEN)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("common.attention.VARLEN", True)
    assert by_documents(*where, 0.0) == (True, DENSE_MASK_LEN)
    assert by_documents(*where, 0.1) == (False, DENSE_MASK_LEN_GPU)              # no dropout in the kernel
    monkeypatch.setattr("common.attention.VARLEN", False)
    assert by_documents(*where, 0.0) == (False, DENSE_MASK_LEN_GPU)


# -----------------------------------------------------------------------------
# counts and initialisation

@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_parameters_and_flops_equal_the_hand_count(tied):
    model = tiny_model(tie_embeddings=tied, qk_norm=True)
    qkv, out, gate_up, down, head = 32 * (4 + 2 + 2) * 8, 32 * 32, 32 * 2 * 48, 48 * 32, 50 * 32
    matrices = 2 * (qkv + out + gate_up + down) + head
    norms = 2 * (2 * 32 + 2 * 8) + 32                    # two a block, two of a head's width, one at the end
    assert model.num_parameters() == matrices + norms + (0 if tied else 50 * 32)
    # attention: 4 heads of 8 channels, q.k and p.v, 2 FLOPs a product, backward twice forward, causal half
    attention = 2 * 4 * 8 * 2 * 2 * 3 * 20 / 2
    assert model.flops_per_token(20) == 6 * matrices + attention


def test_weights_start_as_normal_with_std_002_and_norms_as_one():
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=500, n_layer=1, n_head=4, n_embd=128, seq_len=8, tie_embeddings=False,
                            qk_norm=True))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert p.equal(torch.ones_like(p)), name
        else:
            assert p.std().item() == pytest.approx(0.02, rel=0.03), name
            assert abs(p.mean().item()) < 5 * 0.02 / p.numel() ** 0.5, name
            assert 3.5 * 0.02 < p.abs().max() < 6 * 0.02, name                    # tails: normal, not uniform
    assert all(not hasattr(m, "bias") or m.bias is None for m in model.modules())


# -----------------------------------------------------------------------------
# configuration

def test_what_is_derived_is_filled_in():
    c = ModelConfig(vocab_size=9, n_head=8, n_embd=512, seq_len=2048, rope_original_len=512).resolved()
    # 8/3 of 512 is 1365.3, and 1376 = 43 * 32
    assert (c.n_kv_head, c.head_dim, c.d_ff, c.rope_original_len, c.rope_factor) == (8, 64, 1376, 512, 4.0)
    assert c.resolved() == c
    c = ModelConfig(vocab_size=9, n_head=3, n_embd=32, head_dim=8, n_kv_head=1, d_ff=5, seq_len=7).resolved()
    assert (c.n_kv_head, c.head_dim, c.d_ff, c.rope_original_len, c.rope_factor) == (1, 8, 5, 7, 1.0)


@pytest.mark.parametrize("changes, named", [
    (dict(vocab_size=0), "vocab_size"), (dict(n_layer=0), "n_layer"), (dict(n_head=0), "n_head"),
    (dict(n_embd=-32), "n_embd"), (dict(seq_len=0), "seq_len"),
    (dict(n_head=5, n_kv_head=0, head_dim=0), "n_head=5"),
    (dict(n_kv_head=3), "n_kv_head=3"), (dict(n_kv_head=-2), "n_kv_head=-2"),
    (dict(head_dim=7), "head_dim=7"), (dict(head_dim=-2), "head_dim=-2"), (dict(d_ff=-4), "d_ff=-4"),
    (dict(partial_rotary_factor=0.4), "partial_rotary_factor=0.4"),               # 3 of 8 channels
    (dict(partial_rotary_factor=0.2), "partial_rotary_factor=0.2"),  # 1.6, of which no pair is left
    (dict(partial_rotary_factor=0.1), "partial_rotary_factor=0.1"),  # 0.8: nothing would be rotated
    (dict(partial_rotary_factor=1.5), "partial_rotary_factor=1.5"),
    (dict(partial_rotary_factor=0.0), "partial_rotary_factor=0.0"),
    (dict(rope_factor=0.5), "rope_factor=0.5"), (dict(rope_original_len=48), "rope_original_len"),
    (dict(attn_dropout=1.5), "attn_dropout=1.5"), (dict(attn_dropout=-0.1), "attn_dropout=-0.1"),
], ids=str)
def test_numbers_that_do_not_fit_are_refused_by_name(changes, named):
    with pytest.raises(UserError, match=f"--model.*{named}"):
        replace(TINY, **changes).resolved()


@pytest.mark.parametrize("changes", [
    dict(n_layer=3), dict(n_head=8), dict(n_kv_head=4), dict(n_embd=64), dict(head_dim=4), dict(d_ff=64),
    dict(vocab_size=60), dict(tie_embeddings=False), dict(qk_norm=True), dict(norm_eps=1e-5),
    dict(partial_rotary_factor=0.5)], ids=str)
def test_a_checkpoint_keeps_its_architecture(changes):
    old = TINY.resolved()
    (name, value), = changes.items()
    with pytest.raises(UserError, match=f"--model.{name}={value}: the checkpoint has {getattr(old, name)}"):
        old.continued(replace(old, **changes), old.seq_len)


def test_a_checkpoint_goes_on_unchanged_and_with_what_leaves_its_tensors_alone():
    old = TINY.resolved()
    assert old.continued(old, 24) == old
    assert old.continued(old, 8) == old                  # shorter sequences than the model can take
    assert old.continued(replace(old, attn_dropout=0.1, rope_theta=5e5), 24) == replace(
        old, attn_dropout=0.1, rope_theta=5e5)


def test_longer_sequences_need_a_scaling():
    old = TINY.resolved()
    for wanted, seq_len in ((old, 96), (replace(old, seq_len=96), 24)):
        with pytest.raises(UserError, match="seq_len=96.*24.*rope_scaling=yarn"):
            old.continued(wanted, seq_len)


@pytest.mark.parametrize("scaling", ["yarn", "linear", "dynamic"])
def test_a_context_extended_once_and_again_is_stretched_by_new_over_original(scaling):
    old = replace(TINY, seq_len=512).resolved()
    new = old.continued(replace(old, rope_scaling=scaling), 2048)
    assert new == replace(old, rope_scaling=scaling, seq_len=2048, rope_original_len=512, rope_factor=4.0)
    assert new.continued(new, 512) == new and new.continued(new, 2048) == new
    again = new.continued(new, 4096)                     # 8 times the original length, not twice the last one
    assert again == replace(new, seq_len=4096, rope_factor=8.0)


def test_a_stretch_that_the_user_gives_is_taken():
    old = replace(TINY, seq_len=512).resolved()
    wanted = replace(old, rope_scaling="yarn", rope_factor=16.0)
    new = old.continued(wanted, 2048)
    assert (new.seq_len, new.rope_original_len, new.rope_factor) == (2048, 512, 16.0)
    assert new.continued(new, 2048) == new
    assert new.continued(new, 1024) == new


def test_an_extended_model_computes_what_a_model_made_with_those_options_does():
    old = tiny_model()
    config = old.config.continued(replace(old.config, rope_scaling="yarn"), 96)
    torch.manual_seed(3)
    extended = GPT(config).eval()
    extended.load_state_dict(old.state_dict())
    direct = tiny_model(rope_scaling="yarn", rope_original_len=24, rope_factor=4.0, seq_len=96)
    tokens = random_tokens(1, 96)
    with torch.no_grad():
        assert extended(tokens).equal(direct(tokens))
        assert not extended(tokens)[:, :24].equal(old(tokens[:, :24]))
