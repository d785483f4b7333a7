"""
config.json of transformers' folders, to our ModelConfig and back.

Every field is honoured, or known to change nothing (IGNORED), or an error that names it: a model
that computes something else than its authors' would be worse than none. Honoured are the fields of
FIELDS, those of a family (FAMILIES) and

    model_type, architectures, max_position_embeddings (max_sequence_length), and the rotary ones:
    rope_parameters (transformers 5), rope_theta and rope_scaling (before), of rope_type default,
    linear, dynamic, yarn, llama3
    router_aux_loss_coef, mlp_only_layers (the first ones only); Qwen2-MoE: qkv_bias and
    shared_expert_intermediate_size; SmolLM3: no_rope_layers, no_rope_layer_interval; Mistral and
    Mixtral: a sliding_window no shorter than the context

and the fields of ONLY, with the one value listed there.
"""

import json
import math
from typing import NamedTuple

from common.errors import UserError
from common.model import ModelConfig

# our field: theirs
FIELDS = dict(
    vocab_size="vocab_size",
    n_embd="hidden_size",
    d_ff="intermediate_size",
    n_layer="num_hidden_layers",
    n_head="num_attention_heads",
    n_kv_head="num_key_value_heads",
    head_dim="head_dim",
    norm_eps="rms_norm_eps",
    attn_dropout="attention_dropout",
    tie_embeddings="tie_word_embeddings",
)
POSITION_FIELDS = dict(seq_len="max_position_embeddings", rope_theta="rope_theta")
# theirs about losses, shared experts and layers have other units: see _our_config
MIXTRAL = dict(
    n_expert="num_local_experts",
    n_expert_active="num_experts_per_tok",
    d_expert="intermediate_size",
    balance_coef="router_aux_loss_coef",
)
QWEN3_MOE = dict(
    n_expert="num_experts",
    n_expert_active="num_experts_per_tok",
    d_expert="moe_intermediate_size",
    norm_topk="norm_topk_prob",
    balance_coef="router_aux_loss_coef",
    n_dense_layer="mlp_only_layers",
)
QWEN2_MOE = dict(QWEN3_MOE, attn_bias="qkv_bias", n_shared_expert="shared_expert_intermediate_size")
# rope_type: {our field: theirs}
LINEAR = dict(rope_factor="factor")
STRETCH = dict(LINEAR, rope_original_len="original_max_position_embeddings")
ROPE_FIELDS = dict(
    default={},
    linear=LINEAR,
    dynamic=LINEAR,
    llama3=dict(
        STRETCH, rope_low_freq_factor="low_freq_factor", rope_high_freq_factor="high_freq_factor"
    ),
    yarn=dict(
        STRETCH,
        yarn_beta_fast="beta_fast",
        yarn_beta_slow="beta_slow",
        yarn_mscale="mscale",
        yarn_attention_factor="attention_factor",
        yarn_mscale_all_dim="mscale_all_dim",
    ),
)
# of a rope_type that has them; yarn's factor may follow from the lengths
ROPE_REQUIRED = {"factor", "low_freq_factor", "high_freq_factor"}
ROPE_ONLY = dict(partial_rotary_factor=1.0, truncate=True)
# values of absent fields, from the classes of transformers; some depend on the family
DEFAULTS = dict(
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    attention_dropout=0.0,
    tie_word_embeddings=False,
    max_sequence_length=1,
    norm_topk_prob=False,
    router_aux_loss_coef=0.001,
    qkv_bias=True,
)
# fields that must have this value, if they are there
ONLY = dict(
    hidden_act="silu",
    attention_bias=False,
    mlp_bias=False,
    use_sliding_window=False,
    partial_rotary_factor=1.0,
    use_mrope=False,
    is_decoder=False,
    add_cross_attention=False,
    decoder_sparse_step=1,
    router_jitter_noise=0.0,
    rope_interleaved=False,
    activation="swiglu",
)
# fields that change nothing in what these models compute: bookkeeping, initialisation, defaults of
# text generation; the tokenizer reads the end token for itself; windows are in use with
# use_sliding_window only
IGNORED = set(
    """
    _name_or_path transformers_version torch_dtype dtype use_cache initializer_range pretraining_tp
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id tokenizer_class
    _model_name_or_path _attn_implementation max_window_layers sliding_window
    output_attentions output_hidden_states return_dict id2label label2id
    _attn_implementation_autoset unsloth_fixed unsloth_version
    output_router_logits is_llama_config transformers.js_config
    """.split()
)
# fields that are read, but not as they are
SPECIAL = {"model_type", "layer_types", "rope_parameters", "rope_scaling", "max_sequence_length"}
# our tensor: theirs, where a family has other names than TENSORS in hf.py
MIXTRAL_TENSORS = {
    "mlp.router": "block_sparse_moe.gate.weight",
    "mlp.gate_up": "block_sparse_moe.experts.*.w1.weight block_sparse_moe.experts.*.w3.weight",
    "mlp.down": "block_sparse_moe.experts.*.w2.weight",
}
KINDS = {
    bool: "true or false",
    int: "a number (int), at least 1",
    float: "a number (float), not negative",
}


# what a family computes, unless it has options or fields of these names
PLAIN = dict(
    attn_bias=False,
    qk_norm=False,
    n_expert=0,
    n_shared_expert=0,
    shared_gate=False,
    n_dense_layer=0,
    qk_norm_all=False,
    post_norm=False,
    no_rope_every=0,
)


class Family(NamedTuple):
    architecture: str  # class of transformers
    options: dict = {}  # what sets it apart, fields of ModelConfig
    own_fields: dict = {}  # our field: theirs
    defaults: dict = {}  # these: besides those that all families share
    only: dict = {}
    tensors: dict = {}


# model_type: Family; where two compute the same, the first is exported
FAMILIES = dict(
    llama=Family("LlamaForCausalLM"),
    mixtral=Family(
        "MixtralForCausalLM",
        dict(norm_topk=True),
        MIXTRAL,
        defaults=dict(rms_norm_eps=1e-5, rope_theta=1e6),
        tensors=MIXTRAL_TENSORS,
    ),
    mistral=Family("MistralForCausalLM", defaults=dict(num_key_value_heads=8)),
    qwen2=Family("Qwen2ForCausalLM", dict(attn_bias=True)),
    qwen2_moe=Family("Qwen2MoeForCausalLM", dict(shared_gate=True), QWEN2_MOE),
    qwen3=Family("Qwen3ForCausalLM", dict(qk_norm=True), defaults=dict(head_dim=128)),
    qwen3_moe=Family(
        "Qwen3MoeForCausalLM",
        dict(qk_norm=True),
        QWEN3_MOE,
        only=dict(qkv_bias=False, shared_expert_intermediate_size=0, use_qk_norm=True),
    ),
    smollm3=Family(
        "SmolLM3ForCausalLM",
        own_fields=dict(no_rope_every="no_rope_layer_interval"),
        defaults=dict(
            no_rope_layer_interval=4,
            num_key_value_heads=4,
            rope_theta=2e6,
            tie_word_embeddings=True,
        ),
    ),
    olmo2=Family(
        "Olmo2ForCausalLM",
        dict(qk_norm_all=True, post_norm=True),
        defaults=dict(rms_norm_eps=1e-5),
        tensors={
            "attn_norm.weight": "post_attention_layernorm.weight",
            "mlp_norm.weight": "post_feedforward_layernorm.weight",
        },
    ),
)
# sliding_window where config.json has none; there it is in use without use_sliding_window
WINDOWS = dict(mistral=4096, mixtral=None)


def our_config(file):
    """file: config.json -> dict of ModelConfig's fields; ValueError"""
    given = {name: value for name, value in file.items() if value is not None}
    model_type = given.get("model_type")
    _expect("model_type", model_type, list(FAMILIES), " or ".join(FAMILIES))
    family = FAMILIES[model_type]
    only = ONLY | family.only | dict(architectures=[family.architecture])
    names = FIELDS | POSITION_FIELDS | family.own_fields
    names.pop("n_dense_layer", None)
    has_experts = "n_expert" in names
    if has_experts:
        for name in ("num_experts", "num_local_experts"):
            if name in given:
                names["n_expert"] = name
    known = IGNORED | SPECIAL | only.keys() | set(names.values())
    if has_experts:
        known.add("mlp_only_layers")
    if "no_rope_every" in names:
        known.add("no_rope_layers")
    _refuse_all(given, only, known)
    values = DEFAULTS | family.defaults | given
    n_head = _value(values, "num_attention_heads", int)
    values.setdefault("head_dim", _value(values, "hidden_size", int) // n_head)
    # Qwen's class has a default that no model uses
    if model_type in ("llama", "olmo2"):
        values.setdefault("num_key_value_heads", n_head)
    config = family.options | _our_fields(values, names)
    n_layer = config["n_layer"]
    full = ["full_attention"] * n_layer
    _expect("layer_types", given.get("layer_types", full), [full], "full_attention for all")
    config |= _read_rope(values, config["seq_len"])
    if model_type in WINDOWS:
        window = file.get("sliding_window", WINDOWS[model_type])
        if window is not None and not (type(window) is int and window >= config["seq_len"]):
            raise _refusal("sliding_window", window, "null, or no less than the context")
    if has_experts:
        dense = given.get("mlp_only_layers", [])
        first = [list(range(n)) for n in range(n_layer)]
        _expect("mlp_only_layers", dense, first, "the first layers, 0 to n - 1")
        config["n_dense_layer"] = len(dense)
        # even routing costs k times theirs, whatever the number of layers, and ours for each layer
        share = config["n_expert_active"] / (n_layer - len(dense))
        config["balance_coef"] = round(config["balance_coef"] * share, 12)
    if "no_rope_layers" in given:
        config["no_rope_every"] = _no_rope_every(given["no_rope_layers"], n_layer)
    # theirs: one expert, as large as all of ours
    if "n_shared_expert" in names:
        size, d_expert = config["n_shared_expert"], config["d_expert"]
        if size % d_expert:
            raise _refusal(
                names["n_shared_expert"], size, f"a multiple of moe_intermediate_size={d_expert}"
            )
        config["n_shared_expert"] = size // d_expert
    return config


def _no_rope_every(rotates, n_layer):
    """rotates: no_rope_layers, 0 for a layer without rotary positions -> every how many one is"""
    expected = "a 0 at every n-th place, else 1"
    if not isinstance(rotates, list):
        raise _refusal("no_rope_layers", rotates, expected)
    rotates = rotates[:n_layer]
    every = rotates.index(0) + 1 if 0 in rotates else 0
    _expect("no_rope_layers", rotates, [_rotating_layers(every, n_layer)], expected)
    return every


def _rotating_layers(every, n_layer):
    """-> list of int, as in no_rope_layers: 0 at every so many layers (0 = nowhere), else 1"""
    return [int(not every or layer % every > 0) for layer in range(1, n_layer + 1)]


def _read_rope(values, seq_len):
    """
    values: config.json with defaults; seq_len: its max_position_embeddings -> ModelConfig's fields
    about rotary positions, with seq_len
    """
    rope = {}
    for field in ("rope_parameters", "rope_scaling"):
        if not isinstance(given := values.get(field, {}), dict):
            raise _refusal(field, given, "an object")
        for name, value in given.items():
            name = "rope_type" if name == "type" else name  # before 2024
            if value is not None and rope.setdefault(name, value) != value:
                raise _refusal(f"{field}.{name}", value, f"{json.dumps(rope[name])}, as elsewhere")
    kind = rope.pop("rope_type", "default")
    _expect("rope_type", kind, list(ROPE_FIELDS), " or ".join(ROPE_FIELDS))
    names = ROPE_FIELDS[kind] | dict(rope_theta="rope_theta")
    _refuse_all(rope, ROPE_ONLY, set(names.values()))
    missing = ROPE_REQUIRED & set(names.values()) - rope.keys()
    if missing and kind != "yarn":
        raise ValueError(f"{', '.join(sorted(missing))}: missing, with rope_type={kind}")
    found = {ours: theirs for ours, theirs in names.items() if theirs in rope}
    rope = _our_fields(rope, found)
    stretched_len = _value(values, "max_sequence_length", int)
    original = rope.get("rope_original_len", seq_len)
    factor = rope.get("rope_factor", seq_len / original)
    if not factor:
        raise _refusal("factor", factor, "a number above 0")
    if kind == "linear":
        seq_len = max(seq_len, stretched_len)
        original = max(1, round(seq_len / factor))
    # max_position_embeddings may be the short one
    if kind in ("dynamic", "yarn"):
        seq_len = max(seq_len, round(original * factor))
    scaling = "none" if kind == "default" else kind
    return rope | dict(
        rope_scaling=scaling, rope_factor=factor, rope_original_len=original, seq_len=seq_len
    )


def _our_fields(values, names):
    """values: of their fields; names: {our field: theirs} -> {our field: value}; ValueError"""
    return {
        ours: _value(values, theirs, type(getattr(ModelConfig, ours)))
        for ours, theirs in names.items()
    }


def _refuse_all(given, only, known):
    """ValueError says of all fields that are unknown, or not what `only` says, what is expected"""
    refused = []
    for name, value in given.items():
        if name in only and value != only[name]:
            refused.append(_refusal(name, value, json.dumps(only[name])))
        elif name not in known:
            refused.append(
                _refusal(
                    name,
                    value,
                    "no such field, as it may change what the model computes; "
                    "if it does not, remove it",
                )
            )
    if refused:
        raise ValueError("; ".join(map(str, refused)))


def _expect(name, value, supported, expected):
    """ValueError where value is not in supported, a list; expected: what to say of that"""
    if value not in supported:
        raise _refusal(name, value, expected)


def _value(values, name, kind):
    """value of a field as kind, a key of KINDS; ValueError"""
    value = values.get(name)
    if value is None:
        raise ValueError(f"{name} is missing")
    fits = type(value) is kind or kind is float and type(value) is int
    least = 1 if kind is int else 0
    if not fits or not least <= value < math.inf:
        raise _refusal(name, value, KINDS[kind])
    return kind(value)


def _refusal(name, value, expected):
    return ValueError(f"{name}={json.dumps(value)[:80]}: not supported; expected {expected}")


def config_json(c, dtype, ends):
    """
    c: ModelConfig; dtype of the weights; ids that end a text -> dict that config.json is to hold
    """
    if c.partial_rotary_factor != 1:
        raise UserError(
            f"--model.partial_rotary_factor={c.partial_rotary_factor}: none of the families "
            f"{', '.join(FAMILIES)} rotates a part of a head; it cannot be exported"
        )
    model_type = model_type_of(c)
    family = FAMILIES[model_type]
    kind = "default" if c.rope_scaling == "none" else c.rope_scaling
    rope = dict(rope_type=kind)
    for ours, theirs in ROPE_FIELDS[kind].items():
        if value := getattr(c, ours):  # 0: derived
            rope[theirs] = value
    # Mixtral: intermediate_size is d_expert
    names = FIELDS | family.own_fields
    described = {theirs: getattr(c, ours) for ours, theirs in names.items()}
    if c.n_expert:
        share = c.n_expert_active / (c.n_layer - c.n_dense_layer)
        described["router_aux_loss_coef"] = round(c.balance_coef / share, 12)
    if "n_dense_layer" in names:
        described |= dict(decoder_sparse_step=1, mlp_only_layers=list(range(c.n_dense_layer)))
    if "n_shared_expert" in names:
        described["shared_expert_intermediate_size"] *= c.d_expert
    if model_type in WINDOWS:
        described["sliding_window"] = None
    if c.no_rope_every:
        described["no_rope_layers"] = _rotating_layers(c.no_rope_every, c.n_layer)
    return described | dict(
        model_type=model_type,
        architectures=[family.architecture],
        dtype=str(dtype).removeprefix("torch."),
        hidden_act="silu",
        bos_token_id=None,
        eos_token_id=one_or_all(ends),
        pad_token_id=None,
        max_position_embeddings=c.rope_original_len if kind == "dynamic" else c.seq_len,
        rope_theta=c.rope_theta,
        rope_scaling=None if kind == "default" else rope,  # before version 5
        rope_parameters=dict(rope, rope_theta=c.rope_theta),
    )


def one_or_all(ends):
    """As generation_config.json names one or several"""
    return ends[0] if len(ends) == 1 else list(ends)


def model_type_of(c):
    """c: ModelConfig -> key of FAMILIES; UserError where none computes that"""
    for model_type, family in FAMILIES.items():
        options = PLAIN | family.options
        fixed = options.keys() - family.own_fields
        if all(getattr(c, name) == options[name] for name in fixed):
            return model_type
    given = " ".join(f"--model.{name}={getattr(c, name)}" for name in (*PLAIN, "norm_topk"))
    raise UserError(
        f"{given}: no family of transformers that is known here has these together; it cannot be "
        "exported (with experts: qk_norm alone as Qwen3-MoE, shared_gate as Qwen2-MoE)"
    )
