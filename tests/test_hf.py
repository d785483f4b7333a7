"""
extras/hf.py against transformers: the logits of every family, there and back again, files in several pieces,
fields that are not supported, and a run that is exported.
"""
import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

import sample
from common.errors import UserError
from common.model import GPT, ModelConfig
from common.tokenizer import load_tokenizer
from extras import hf

transformers = pytest.importorskip("transformers", reason="the authority on these folders; a dev extra")
pytest.importorskip("safetensors", reason="the extra hf")

SIZES = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, initializer_range=0.3,
             tie_word_embeddings=False, bos_token_id=None, eos_token_id=3, pad_token_id=None)
FAMILIES = {"Llama": {}, "Llama, wide heads": dict(head_dim=16), "Llama, MHA": dict(num_key_value_heads=4),
            "Qwen2": {}, "Qwen2, MQA": dict(num_key_value_heads=1), "Qwen3": dict(head_dim=16),
            "Qwen3Moe": dict(head_dim=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24,
                             norm_topk_prob=True),
            "Qwen3Moe, first dense": dict(head_dim=16, num_experts=4, num_experts_per_tok=3,
                                          moe_intermediate_size=16, mlp_only_layers=[0]),
            "Qwen2Moe": dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24,
                             shared_expert_intermediate_size=48),
            "Qwen2Moe, no biases": dict(num_experts=4, num_experts_per_tok=1, moe_intermediate_size=24,
                                        shared_expert_intermediate_size=24, qkv_bias=False),
            "Mixtral": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None, head_dim=8),
            "Mistral": dict(sliding_window=None, head_dim=16),
            "Mistral, wide window": dict(sliding_window=192),
            "SmolLM3": dict(num_hidden_layers=5, no_rope_layer_interval=2),
            "SmolLM3, all rotary": dict(no_rope_layers=[1, 1]),
            "Olmo2": {}, "Olmo2, MHA": dict(num_key_value_heads=4)}
ROPES = {"default": dict(rope_type="default"), "linear": dict(rope_type="linear", factor=3.0),
         "dynamic": dict(rope_type="dynamic", factor=3.0),
         "yarn": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=8.0),
         "yarn, attention": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16,
                                 attention_factor=0.7),
         "yarn, mscale": dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, mscale=2.0,
                              mscale_all_dim=0.5),
         "llama3": dict(rope_type="llama3", factor=8.0, original_max_position_embeddings=32,
                        low_freq_factor=1.0, high_freq_factor=4.0)}


def make(folder, family="Llama", rope="default", shard_size="5GB", dtype=torch.float32, **changes):
    """A random transformers model, its norms and biases too, saved in folder -> the model"""
    torch.manual_seed(0)
    family, changes = family.split(",")[0], SIZES | FAMILIES[family] | changes
    config = getattr(transformers, family + "Config")(
        **changes, rope_parameters={"rope_theta": 100.0} | ROPES[rope])
    model = getattr(transformers, family + "ForCausalLM")(config).eval()
    for name, p in model.named_parameters():
        if "expert" in name or "gate.weight" in name:         # transformers leaves some of them empty
            torch.nn.init.normal_(p, std=0.3)
        if p.ndim == 1:
            torch.nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    model = model.to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


def load(folder):
    """Ours of the same folder"""
    model = GPT(ModelConfig(**hf.read_config(folder))).eval()
    model.load_state_dict(hf.read_weights(folder))
    return model


def export(model, folder, **how):
    hf.write(str(folder), model.config, model.state_dict(), (3,), {}, **how)
    return str(folder)


def tokens(T, vocab_size=60):
    return torch.randint(vocab_size, (2, T), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model, x):
    return model(x) @ model.head.T if isinstance(model, GPT) else model(x).logits


@torch.no_grad()
def cached_logits(model, x):
    """A prefill, then two tokens, then one at a time"""
    cache, sizes = model.new_cache(*x.shape), [x.shape[1] // 2, 2]
    sizes += [1] * (x.shape[1] - sum(sizes))
    return torch.cat([model(part, cache=cache) for part in x.split(sizes, dim=1)], dim=1) @ model.head.T


def assert_close(actual, expected):
    assert expected.std() > 0.5                               # else 1e-4 would mean little
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def edit(folder, **changes):
    """Change config.json; None removes a field"""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


# -----------------------------------------------------------------------------
# logits, there and back

@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_logits_of_transformers(tmp_path, family, tied):
    theirs = make(tmp_path, family, tie_word_embeddings=tied)
    ours, x = load(str(tmp_path)), tokens(40)
    assert_close(logits(ours, x), logits(theirs, x))
    assert_close(cached_logits(ours, x), logits(theirs, x))


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_scaling_has_the_logits_of_transformers(tmp_path, rope, family):
    theirs = make(tmp_path, family, rope)
    ours, x = load(str(tmp_path)), tokens(90 if rope == "dynamic" else 60)
    expected = logits(theirs, x)
    assert_close(logits(ours, x), expected)
    assert_close(cached_logits(ours, x), expected)
    if rope != "default":                                     # it is seen in the logits at all
        ours.config = replace(ours.config, rope_scaling="none")
        assert (logits(ours, x) - expected).abs().max() > 0.1


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_is_exported_and_has_the_same_logits(tmp_path, family, rope):
    theirs = make(tmp_path / "in", family, rope, tie_word_embeddings=family == "Qwen2")
    folder = export(load(str(tmp_path / "in")), tmp_path / "out")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    # these compute what Llama does
    same = not family.startswith("Mistral") and family != "SmolLM3, all rotary"
    assert type(again) is (type(theirs) if same else transformers.LlamaForCausalLM)
    assert not any(info.values()), info
    assert again.config.eos_token_id == again.generation_config.eos_token_id == 3
    x = tokens(90 if rope == "dynamic" else 60)
    torch.testing.assert_close(logits(again, x), logits(theirs, x), atol=1e-5, rtol=0)
    assert ModelConfig(**hf.read_config(folder)) == ModelConfig(**hf.read_config(str(tmp_path / "in")))


@pytest.mark.parametrize("shard_bytes", [10**9, 9000], ids=["single", "sharded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [
    dict(), dict(attn_bias=True, n_kv_head=1), dict(qk_norm=True, head_dim=12), dict(tie_embeddings=False),
    dict(n_expert=4, d_ff=32, d_expert=32), dict(n_expert=4, qk_norm=True, n_dense_layer=1, norm_topk=False),
    dict(n_expert=4, n_shared_expert=2, shared_gate=True, attn_bias=True), dict(no_rope_every=2),
    dict(qk_norm_all=True, post_norm=True, n_kv_head=2)], ids=str)
def test_what_is_exported_is_imported_bit_by_bit(tmp_path, options, dtype, shard_bytes):
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=50, n_layer=3, n_head=4, n_embd=32, seq_len=24, **options)).to(dtype)
    for p in model.parameters():
        torch.nn.init.normal_(p)
    folder = export(model, tmp_path / "out", shard_bytes=shard_bytes)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 3 or shard_bytes > 9000
    assert ModelConfig(**hf.read_config(folder)) == model.config
    weights, expected = hf.read_weights(folder), model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(weights[name].equal(expected[name]) and weights[name].dtype == dtype for name in weights)
    assert not any(transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True)[1].values())


def test_defaults_of_fields_that_are_absent_are_those_of_transformers(tmp_path):
    for family in ("Llama", "Qwen2", "Qwen3", "Mixtral", "Qwen3Moe", "Qwen2Moe"):
        make(tmp_path / family, family, intermediate_size=48)
        edit(tmp_path / family, rope_parameters=None, rope_theta=None, rms_norm_eps=None,
             tie_word_embeddings=None,
             head_dim=None if family != "Qwen3" else 16,
             norm_topk_prob=None, router_aux_loss_coef=None)
        theirs = transformers.AutoConfig.from_pretrained(tmp_path / family)
        ours = hf.read_config(str(tmp_path / family))
        assert ours["rope_theta"] == theirs.rope_parameters["rope_theta"], family
        assert ours["norm_eps"] == theirs.rms_norm_eps
        assert ours["tie_embeddings"] == theirs.tie_word_embeddings
        if ours.get("n_expert"):
            assert ours.get("norm_topk", True) == getattr(theirs, "norm_topk_prob", True)


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "Qwen3Moe, first dense", "Qwen2Moe"])
def test_even_routing_costs_what_it_costs_in_transformers(tmp_path, family):
    make(tmp_path, family, router_aux_loss_coef=0.01)
    c = ModelConfig(**hf.read_config(str(tmp_path)))
    # transformers: coef times k, over all layers; ours: balance_coef a layer
    assert c.balance_coef * (c.n_layer - c.n_dense_layer) == pytest.approx(0.01 * c.n_expert_active)
    folder = export(load(str(tmp_path)), tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["router_aux_loss_coef"] == 0.01
    assert ModelConfig(**hf.read_config(folder)) == c


def test_sharded_and_single_files_hold_the_same(tmp_path):
    make(tmp_path / "one", "Qwen2", dtype=torch.bfloat16)
    make(tmp_path / "many", "Qwen2", shard_size="9KB", dtype=torch.bfloat16)
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = (hf.read_weights(str(tmp_path / name)) for name in ("one", "many"))
    assert one.keys() == many.keys() and all(torch.equal(one[name], many[name]) for name in one)
    assert one["embed.weight"].dtype == torch.bfloat16        # as in the files


def test_files_from_before_transformers_5_mean_the_same(tmp_path):
    theirs = make(tmp_path, rope="llama3")
    new = hf.read_config(str(tmp_path))
    edit(tmp_path, rope_parameters=None, rope_theta=100.0, rope_scaling=ROPES["llama3"], head_dim=None,
         torch_dtype="float32")
    assert hf.read_config(str(tmp_path)) == new
    old_name = {"type" if name == "rope_type" else name: value for name, value in ROPES["llama3"].items()}
    edit(tmp_path, rope_scaling=old_name)
    assert hf.read_config(str(tmp_path)) == new
    edit(tmp_path, rope_scaling=None)
    assert hf.read_config(str(tmp_path))["rope_scaling"] == "none"
    assert theirs.config.rope_parameters["rope_theta"] == new["rope_theta"] == 100


def test_yarn_of_published_configs_goes_to_the_stretched_length(tmp_path):
    """Qwen2.5's: max_position_embeddings stays the original length"""
    make(tmp_path, "Qwen2")
    edit(tmp_path, rope_parameters=None, max_position_embeddings=32768, rope_theta=1e6,
         rope_scaling=dict(factor=4.0, original_max_position_embeddings=32768, type="yarn"))
    config = ModelConfig(**hf.read_config(str(tmp_path)))
    assert (config.seq_len, config.rope_original_len, config.rope_factor) == (131072, 32768, 4.0)
    edit(tmp_path, max_position_embeddings=65536, rope_scaling=dict(type="yarn", factor=None,
                                                                     original_max_position_embeddings=16384))
    assert hf.read_config(str(tmp_path))["rope_factor"] == 4.0


@pytest.mark.parametrize("family, changes, message", [
    ("Llama", dict(hidden_act="gelu"), 'hidden_act="gelu"'),
    ("Llama", dict(attention_bias=True), "attention_bias=true"),
    ("Llama", dict(mlp_bias=True), "mlp_bias=true"),
    ("Llama", dict(model_type="phi3"), 'model_type="phi3": not supported; expected llama or mixtral'),
    ("Qwen3Moe", dict(model_type="qwen3_next"), 'model_type="qwen3_next"'),
    ("Qwen3Moe", dict(decoder_sparse_step=2), "decoder_sparse_step=2"),
    ("Qwen3Moe", dict(mlp_only_layers=[1]), "mlp_only_layers=[1]"),
    ("Qwen2Moe", dict(shared_expert_intermediate_size=30), "shared_expert_intermediate_size=30"),
    ("Mixtral", dict(sliding_window=32), "sliding_window=32"),
    ("Mistral", dict(sliding_window=63), "sliding_window=63: not supported; expected null, or no less"),
    ("Mistral", dict(sliding_window="64"), 'sliding_window="64"'),
    ("Mistral", dict(max_position_embeddings=8192, sliding_window=None), "sliding_window=4096"),
    ("SmolLM3", dict(no_rope_layers=[1, 0]), "no_rope_layers=[1, 0]"),
    ("SmolLM3", dict(no_rope_layers=[1, 0, 0, 1, 1]), "no_rope_layers=[1, 0, 0, 1, 1]"),
    ("SmolLM3", dict(no_rope_layers="x"), 'no_rope_layers="x"'),
    ("Olmo2", dict(clip_qkv=8.0), "clip_qkv=8.0"),
    ("Mixtral", dict(router_jitter_noise=0.1), "router_jitter_noise=0.1"),
    ("Llama", dict(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    ("Qwen2", dict(use_sliding_window=True, sliding_window=8), "use_sliding_window=true"),
    ("Qwen3", dict(layer_types=["full_attention", "sliding_attention"]), "sliding_attention"),
    ("Llama", dict(logit_scale=0.5), "logit_scale=0.5"),
    ("Llama", dict(num_attention_heads=0), "num_attention_heads=0"),
    ("Llama", dict(model_type=["llama"]), 'model_type=["llama"]'),
    ("Llama", dict(rope_parameters="x"), 'rope_parameters="x"'),
    ("Qwen3", dict(layer_types=5), "layer_types=5"),
    ("Llama", dict(rope_parameters=dict(rope_type=["a"])), 'rope_type=["a"]'),
    ("Qwen2Moe", dict(moe_intermediate_size=0), "moe_intermediate_size=0"),
    ("Llama", dict(quantization_config={"bits": 4}), 'quantization_config={"bits": 4}'),
    ("Llama", dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
    ("Llama", dict(rope_parameters=dict(rope_type="longrope", factor=2.0)), 'rope_type="longrope"'),
    ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=2.0, original=8)), "original=8"),
    ("Llama", dict(rope_parameters=dict(rope_type="linear")), "factor: missing"),
    ("Llama", dict(rope_parameters=dict(rope_type="linear", factor=0.0)), "factor=0.0: not supported"),
    ("Llama", dict(auto_map={"AutoConfig": "x.Y"}), "auto_map={"),
    ("Llama", dict(rope_parameters=dict(rope_type="yarn", factor=2.0, truncate=False)), "truncate=false"),
    ("Llama", dict(rope_parameters=dict(full_attention=dict(rope_type="default"))), "full_attention={"),
    ("Llama", dict(rope_scaling=dict(type="linear", factor=2.0)), 'rope_scaling.rope_type="linear"'),
    ("Llama", dict(rope_parameters=dict(rope_type="linear", factor="2")), 'factor="2"'),
    ("Llama", dict(rope_parameters=dict(rope_type="yarn", factor=float("inf"))), "factor=Infinity"),
    ("Qwen3Moe", dict(mlp_only_layers=1), "mlp_only_layers=1"),
    ("Qwen3Moe", dict(mlp_only_layers=[0, 1]), "mlp_only_layers=[0, 1]"),
    ("Qwen3Moe", dict(qkv_bias=True), "qkv_bias=true"),
    ("Llama", dict(activation="gelu"), 'activation="gelu"'),
    ("Llama", dict(hidden_size="32"), 'hidden_size="32"'), ("Qwen2", dict(num_key_value_heads=None),
                                                           "num_key_value_heads is missing"),
    ("Llama", dict(tie_word_embeddings="no"), 'tie_word_embeddings="no"')])
def test_fields_that_are_not_supported_are_named_with_their_value(tmp_path, family, changes, message):
    make(tmp_path, family)
    edit(tmp_path, **changes)
    with pytest.raises(UserError) as error:
        hf.read_config(str(tmp_path))
    assert message in str(error.value) and "\n" not in str(error.value), error.value


def test_all_fields_that_are_not_supported_are_named_at_once(tmp_path):
    make(tmp_path)
    edit(tmp_path, logit_scale=0.5, hidden_act="gelu", mlp_bias=True)
    with pytest.raises(UserError) as error:
        hf.read_config(str(tmp_path))
    for named in ("logit_scale=0.5", 'hidden_act="gelu"', "mlp_bias=true"):
        assert named in str(error.value)


def test_fields_that_change_nothing_are_passed_over(tmp_path):
    make(tmp_path)
    plain = hf.read_config(str(tmp_path))
    edit(tmp_path, _model_name_or_path="a/b", unk_token_id=0, sep_token_id=1, tokenizer_class="X",
         _attn_implementation="sdpa")
    assert hf.read_config(str(tmp_path)) == plain


def rewrite(folder, change):
    """The tensors of folder's one file after change(dict)"""
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("change, message", [
    (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight is missing"),
    (lambda t: t.update({"model.layers.0.mlp.up_proj.bias": torch.ones(48)}), "mlp.up_proj.bias: unknown"),
    (lambda t: t.update({"model.embed_tokens.weight": torch.ones(59, 32)}), r"\[59, 32\]; expected 60 rows"),
    (lambda t: t.update({"model.embed_tokens.weight": torch.ones(60, 31)}), r"\[60, 31\]; .* \[60, 32\]"),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.weight": torch.ones(32, 31)}), r"\[16, 32\]; exp"),
    (lambda t: t.update({"model.layers.0.mlp.down_proj.weight": torch.ones(32, 9)}), r"\[32, 9\]; config.js"),
    (lambda t: t.update({"model.norm.weight": torch.ones(())}), r"\[\]; expected 32 rows"),
    (lambda t: t.pop("lm_head.weight"), "lm_head.weight is missing")])
def test_tensors_must_be_those_that_the_config_describes(tmp_path, change, message):
    make(tmp_path)
    rewrite(tmp_path, change)
    model = GPT(ModelConfig(**hf.read_config(str(tmp_path))))
    with pytest.raises(UserError, match=message):
        hf.load_weights(str(tmp_path), model)


def test_tensors_of_older_files_that_say_nothing_new_are_passed_over(tmp_path):
    make(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone(),
                                          "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    assert load(str(tmp_path)).untied_head is None


@pytest.mark.parametrize("shard_size", ["5GB", "9KB"])
@pytest.mark.parametrize("family", ["Llama", "Qwen3", "Olmo2"])
def test_a_head_of_its_own_is_used_though_config_json_ties_it(tmp_path, capsys, family, shard_size):
    """Some tools train it apart and leave the field; transformers 5 loads it untied."""
    make(tmp_path, family, tie_word_embeddings=False, shard_size=shard_size)
    edit(tmp_path, tie_word_embeddings=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    model = GPT(ModelConfig(**hf.read_config(str(tmp_path)))).eval()
    hf.load_weights(str(tmp_path), model)
    assert "lm_head.weight is not the embedding" in capsys.readouterr().out
    assert_close(logits(model, tokens(20)), logits(theirs, tokens(20)))


def test_a_head_that_is_the_embedding_is_tied_without_a_word(tmp_path, capsys):
    make(tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    model = GPT(ModelConfig(**hf.read_config(str(tmp_path))))
    hf.load_weights(str(tmp_path), model)
    assert model.untied_head is None and capsys.readouterr().out == ""


def test_exported_files_may_be_read_by_those_who_may_read_any_other(tmp_path):
    """safetensors writes for the owner alone."""
    umask = os.umask(0o022)
    try:
        folder = export(GPT(ModelConfig(vocab_size=9, n_layer=1, n_head=2, n_embd=16, seq_len=8)),
                        tmp_path / "out")
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in Path(folder).iterdir()} == {0o644}


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    make(tmp_path, shard_size="9KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    for damage in (lambda: shard.write_bytes(whole[:100]), shard.unlink):
        damage()
        with pytest.raises(UserError, match=f"{shard.name}: missing or damaged"):
            hf.read_weights(str(tmp_path))
    shard.write_bytes(whole)
    index = tmp_path / "model.safetensors.index.json"
    for name in ("../x.safetensors", 5):
        index.write_text(json.dumps(dict(weight_map={"model.norm.weight": name})))
        with pytest.raises(UserError, match="files beside it"):
            hf.read_weights(str(tmp_path))
    index.unlink()
    with pytest.raises(UserError, match="no model.safetensors"):
        hf.read_weights(str(tmp_path))


def test_what_no_family_computes_is_not_exported(tmp_path):
    for options, name in ((dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
                          (dict(attn_bias=True, qk_norm=True), "qk_norm=True"),
                          (dict(n_expert=4, n_shared_expert=1), "shared_gate=False"),
                          (dict(n_expert=4, norm_topk=False), "norm_topk=False")):
        with pytest.raises(UserError, match=name):
            export(GPT(ModelConfig(vocab_size=9, n_layer=1, n_head=2, n_embd=16, seq_len=8, **options)),
                   tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="already there"):
        export(GPT(ModelConfig(vocab_size=9, n_layer=1, n_head=2, n_embd=16, seq_len=8)), tmp_path / "out")


def test_without_safetensors_the_extra_is_named(tmp_path, monkeypatch):
    make(tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match='its extra "hf"'):
        hf.read_weights(str(tmp_path))


def test_a_run_is_exported_from_the_command_line(tmp_path):
    (tmp_path / "t.txt").write_text("To be, or not to be, that is the question.\n" * 20)
    run("data/prepare.py", "text", f"--input={tmp_path}/t.txt", f"--out_dir={tmp_path}/set")
    run("train_pretrain.py", f"--data_dir={tmp_path}/set", f"--out_dir={tmp_path}/run", "--num_steps=2",
        "--seq_len=16", "--batch_size=2", "--eval_seqs=0", "--model.n_layer=2", "--model.n_head=4",
        "--model.n_kv_head=2", "--model.n_embd=16", "--model.qk_norm=true", "--model.attn_bias=false")

    def command(*options):
        return run("-m", "extras.hf", *options, check=False)
    options = ["export", f"--init_from={tmp_path}/run", f"--hf_dir={tmp_path}/out"]
    result = command(*options)
    assert result.returncode == 0 and "parameters of" in result.stdout, result.stderr
    ours, _ = sample.load(str(tmp_path / "run"), "cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    x = tokens(16, 256)
    torch.testing.assert_close(logits(theirs, x), logits(ours, x), atol=1e-5, rtol=0)
    assert theirs.config.eos_token_id == 256
    for arguments, message in ((options, "already there"), (options[:2], "expected: python -m extras.hf"),
                               (["import"], "expected: python -m extras.hf")):
        result = command(*arguments)
        assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1


PUBLISHED = json.loads((ROOT / "tests/published_configs.json").read_text())
EXPECTED = {                                                  # what is not the default of ModelConfig
    "Qwen2.5-0.5B-Instruct": dict(
        vocab_size=151936, n_layer=24, n_head=14, n_kv_head=2, n_embd=896, head_dim=64, d_ff=4864,
        seq_len=32768, attn_bias=True, rope_theta=1e6),
    "Qwen2.5-7B+yarn": dict(
        vocab_size=152064, n_layer=28, n_head=28, n_kv_head=4, n_embd=3584, head_dim=128, d_ff=18944,
        seq_len=131072, attn_bias=True, rope_theta=1e6, tie_embeddings=False, rope_scaling="yarn",
        rope_original_len=32768, rope_factor=4.0),
    "Qwen3-0.6B": dict(
        vocab_size=151936, n_layer=28, n_head=16, n_kv_head=8, n_embd=1024, head_dim=128, d_ff=3072,
        seq_len=40960, qk_norm=True, rope_theta=1e6),
    "Qwen3-30B-A3B": dict(
        vocab_size=151936, n_layer=48, n_head=32, n_kv_head=4, n_embd=2048, head_dim=128, d_ff=6144,
        seq_len=40960, qk_norm=True, rope_theta=1e6, tie_embeddings=False, n_expert=128, n_expert_active=8,
        d_expert=768, balance_coef=0.001 * 8 / 48),
    "Qwen3-Coder-30B-A3B-Instruct": dict(
        vocab_size=151936, n_layer=48, n_head=32, n_kv_head=4, n_embd=2048, head_dim=128, d_ff=5472,
        seq_len=262144, qk_norm=True, rope_theta=1e7, tie_embeddings=False, n_expert=128, n_expert_active=8,
        d_expert=768, balance_coef=0.0),
    "Llama-3.2-1B-Instruct": dict(
        vocab_size=128256, n_layer=16, n_head=32, n_kv_head=8, n_embd=2048, head_dim=64, d_ff=8192,
        seq_len=131072, norm_eps=1e-5, rope_theta=5e5, rope_scaling="llama3", rope_original_len=8192,
        rope_factor=32.0),
    "Llama-2-7b-chat": dict(
        vocab_size=32000, n_layer=32, n_head=32, n_kv_head=32, n_embd=4096, head_dim=128, d_ff=11008,
        seq_len=4096, norm_eps=1e-5, tie_embeddings=False),
    "vicuna-7b-v1.5-16k": dict(
        vocab_size=32000, n_layer=32, n_head=32, n_kv_head=32, n_embd=4096, head_dim=128, d_ff=11008,
        seq_len=16384, norm_eps=1e-5, tie_embeddings=False, rope_scaling="linear", rope_original_len=4096,
        rope_factor=4.0),
    "TinyLlama": dict(
        vocab_size=32000, n_layer=22, n_head=32, n_kv_head=4, n_embd=2048, head_dim=64, d_ff=5632,
        seq_len=2048, norm_eps=1e-5, tie_embeddings=False),
    "SmolLM2-135M-Instruct": dict(
        vocab_size=49152, n_layer=30, n_head=9, n_kv_head=3, n_embd=576, head_dim=64, d_ff=1536, seq_len=8192,
        norm_eps=1e-5, rope_theta=1e5),
    "Mixtral-8x7B-Instruct": dict(
        vocab_size=32000, n_layer=32, n_head=32, n_kv_head=8, n_embd=4096, head_dim=128, d_ff=14336,
        seq_len=32768, norm_eps=1e-5, rope_theta=1e6, tie_embeddings=False, n_expert=8, d_expert=14336,
        balance_coef=0.02 * 2 / 32),
    "Qwen1.5-MoE-A2.7B-Chat": dict(
        vocab_size=151936, n_layer=24, n_head=16, n_kv_head=16, n_embd=2048, head_dim=128, d_ff=5632,
        seq_len=8192, attn_bias=True, rope_theta=1e6, tie_embeddings=False, n_expert=60, n_expert_active=4,
        n_shared_expert=4, shared_gate=True, d_expert=1408, norm_topk=False, balance_coef=0.001 * 4 / 24),
    "R1-Distill-Qwen-1.5B": dict(
        vocab_size=151936, n_layer=28, n_head=12, n_kv_head=2, n_embd=1536, head_dim=128, d_ff=8960,
        seq_len=131072, attn_bias=True, tie_embeddings=False),
    "Falcon3-1B-Instruct": dict(
        vocab_size=131072, n_layer=18, n_head=8, n_kv_head=4, n_embd=2048, head_dim=256, d_ff=8192,
        seq_len=8192, rope_theta=1000042, tie_embeddings=False)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_understood_whole_or_refused_by_name(tmp_path, name):
    """In the form that they are published in; several of the file's were written from memory"""
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
    if name not in EXPECTED:
        with pytest.raises(UserError, match='model_type="olmoe": not supported'):
            hf.read_config(str(tmp_path))
        return
    expected = dict(rope_original_len=EXPECTED[name]["seq_len"], rope_factor=1.0) | EXPECTED[name]
    config = asdict(ModelConfig(**hf.read_config(str(tmp_path))))
    assert config.pop("balance_coef") == pytest.approx(expected.pop("balance_coef", 0.01), abs=1e-9)
    default = asdict(ModelConfig())
    default.pop("balance_coef")
    assert config == default | expected


def test_a_stretch_goes_on_from_the_folder_s_own(tmp_path):
    """Llama 3.1 and Vicuna: the factor is not the ratio of the lengths that the file has"""
    for name, longer, factor in (("Llama-3.2-1B-Instruct", 262144, 64.0), ("vicuna-7b-v1.5-16k", 16384, 4.0),
                                 ("vicuna-7b-v1.5-16k", 32768, 8.0), ("Qwen2.5-7B+yarn", 262144, 8.0)):
        (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name]))
        config = ModelConfig(**hf.read_config(str(tmp_path))).resolved()
        assert config.continued(config, longer).rope_factor == factor
        assert config.continued(config, 1024) == config


def test_a_run_of_ours_that_is_exported_and_imported_still_talks(chat_set, tmp_path):
    run("train_sft.py", f"--data_dir={chat_set}", f"--out_dir={tmp_path}/sft", "--num_steps=3",
        "--seq_len=150", "--batch_size=4", "--model.n_layer=1", "--model.n_head=2", "--model.n_embd=16",
        "--eval_seqs=0", "--lr=1e-2", "--device=cpu")
    for options in (["export", f"--init_from={tmp_path}/sft", f"--hf_dir={tmp_path}/folder"],
                    ["import", f"--hf_dir={tmp_path}/folder", f"--out_dir={tmp_path}/imported"]):
        run("-m", "extras.hf", *options)
    said = [run("sample.py", f"--init_from={tmp_path}/{name}", "--chat=true", "--prompt=3", "--temperature=0",
                "--max_new_tokens=9", "--show_tags=true").stdout for name in ("sft", "folder", "imported")]
    assert said[0].strip() and said[0] == said[1] == said[2]


def test_a_folder_that_is_not_there_is_named(tmp_path):
    result = run("-m", "extras.hf", "import", f"--hf_dir={tmp_path}/none", f"--out_dir={tmp_path}/out",
                 check=False)
    assert result.returncode == 2 and f"{tmp_path}/none/config.json: missing" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value, token_set):
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=266, n_layer=1, n_head=2, n_embd=16, seq_len=32))
    with torch.no_grad():
        model.blocks[0].mlp.down.weight[3, 5] = value
    folder = tmp_path / "out"
    hf.write(str(folder), model.config, model.state_dict(), (256,), load_tokenizer("bytes").files())
    for command in (["sample.py", "--prompt=x"],
                    ["train_pretrain.py", f"--data_dir={token_set}", f"--out_dir={tmp_path}/run",
                     "--seq_len=16", "--batch_size=2", "--num_steps=1"]):
        result = run(*command, f"--init_from={folder}", check=False)
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert "blocks.0.mlp.down.weight is not finite everywhere" in result.stderr
    assert not (tmp_path / "run").exists()
