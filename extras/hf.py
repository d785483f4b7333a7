"""
Folders of transformers (Hugging Face): Llama, Qwen2 (and 2.5), Qwen3 and their mixtures of experts, read and
written.

    python train_sft.py --init_from=Qwen2.5-0.5B --data_dir=...             # any stage, and sample.py
    python -m extras.hf import --hf_dir=Qwen2.5-0.5B --out_dir=out/qwen     # convert it into a run directory
    python -m extras.hf export --init_from=out/sft --hf_dir=out/sft_hf      # for transformers

Our fused tensors (queries, keys and values; gate and up) are theirs stacked. Both sides rotate halves, so no
rows are permuted. Needs the optional dependency `hf` (safetensors).

Every field of config.json is honoured, or known to change nothing (IGNORED), or an error that names it: a
model that computes something else than its authors' would be worse than none. Honoured are the fields of
FIELDS, EXPERT_FIELDS and

    model_type, architectures, max_position_embeddings (max_sequence_length), and the rotary ones:
    rope_parameters (transformers 5), rope_theta and rope_scaling (before), of rope_type default, linear,
    dynamic, yarn, llama3
    router_aux_loss_coef, mlp_only_layers (the first ones only); Qwen2-MoE: qkv_bias and
    shared_expert_intermediate_size

and the fields of ONLY, with the one value listed there.
"""
import hashlib
import json
import math
import os
import shutil
import sys
from dataclasses import asdict, dataclass, replace

import torch

from common import checkpoint, dist
from common.config import parse_config
from common.errors import UserError, show_user_errors
from common.logger import check_run_directory
from common.model import GPT, ModelConfig
from common.tokenizer import load_tokenizer

# model_type: class
FAMILIES = dict(llama="LlamaForCausalLM", mixtral="MixtralForCausalLM", qwen2="Qwen2ForCausalLM",
                qwen2_moe="Qwen2MoeForCausalLM", qwen3="Qwen3ForCausalLM", qwen3_moe="Qwen3MoeForCausalLM")
# what sets a family apart for us
OPTIONS = dict(qwen2=dict(attn_bias=True), qwen3=dict(qk_norm=True), qwen3_moe=dict(qk_norm=True))
# our field: theirs
FIELDS = dict(
    vocab_size="vocab_size", n_embd="hidden_size", d_ff="intermediate_size", n_layer="num_hidden_layers",
    n_head="num_attention_heads", n_kv_head="num_key_value_heads", head_dim="head_dim",
    norm_eps="rms_norm_eps", attn_dropout="attention_dropout", tie_embeddings="tie_word_embeddings")
QWEN_MOE = dict(n_expert="num_experts", n_expert_active="num_experts_per_tok",
                d_expert="moe_intermediate_size", norm_topk="norm_topk_prob")
MIXTRAL = dict(n_expert="num_local_experts", n_expert_active="num_experts_per_tok",
               d_expert="intermediate_size")
EXPERT_FIELDS = dict(mixtral=MIXTRAL, qwen2_moe=QWEN_MOE, qwen3_moe=QWEN_MOE)
# rope_type: {their field: ours}
LINEAR = dict(factor="rope_factor")
STRETCH = dict(LINEAR, original_max_position_embeddings="rope_original_len")
ROPE_FIELDS = dict(
    default={}, linear=LINEAR, dynamic=LINEAR,
    llama3=dict(STRETCH, low_freq_factor="rope_low_freq_factor", high_freq_factor="rope_high_freq_factor"),
    yarn=dict(STRETCH, beta_fast="yarn_beta_fast", beta_slow="yarn_beta_slow", mscale="yarn_mscale",
              attention_factor="yarn_attention_factor", mscale_all_dim="yarn_mscale_all_dim"))
# of a rope_type that has them; yarn's factor may follow from the lengths
ROPE_REQUIRED = {"factor", "low_freq_factor", "high_freq_factor"}
ROPE_ONLY = dict(partial_rotary_factor=1.0, truncate=True)
# values of absent fields, from the classes of transformers; some depend on the family
DEFAULTS = dict(
    rms_norm_eps=1e-6, rope_theta=1e4, attention_dropout=0.0, tie_word_embeddings=False,
    max_sequence_length=1, norm_topk_prob=False, router_aux_loss_coef=0.001, qkv_bias=True)
FAMILY_DEFAULTS = dict(mixtral=dict(rms_norm_eps=1e-5, rope_theta=1e6), qwen3=dict(head_dim=128))
# fields that must have this value, if they are there
ONLY = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False,
            partial_rotary_factor=1.0, use_mrope=False, is_decoder=False, add_cross_attention=False,
            decoder_sparse_step=1, router_jitter_noise=0.0, rope_interleaved=False, activation="swiglu")
FAMILY_ONLY = dict(
    mixtral=dict(sliding_window=None),                        # in use there without use_sliding_window
    qwen3_moe=dict(qkv_bias=False, shared_expert_intermediate_size=0, use_qk_norm=True))
# fields that change nothing in what these models compute: bookkeeping, initialisation, defaults of text
# generation; the tokenizer reads the end token for itself; windows are in use with use_sliding_window only
IGNORED = set("""
    _name_or_path transformers_version torch_dtype dtype use_cache initializer_range pretraining_tp
    bos_token_id eos_token_id pad_token_id max_window_layers sliding_window output_attentions
    output_hidden_states return_dict id2label label2id _attn_implementation_autoset unsloth_fixed
    unsloth_version output_router_logits is_llama_config transformers.js_config
    """.split())
KINDS = {bool: "true or false", int: "a number (int), at least 1", float: "a number (float), not negative"}
SHARD_BYTES = 5 * 10**9                # of an exported file, about


@dataclass(frozen=True)
class Config:
    hf_dir: str = ""                   # Hugging Face folder; export writes it, and it must not exist
    init_from: str = ""                # export: run or checkpoint of ours
    out_dir: str = ""                  # import: run directory to write, must be new or empty


def source(folder):
    """-> checkpoint.Source of a folder of transformers"""
    return checkpoint.Source(folder, dict(model=read_config(folder)),
                             lambda model: load_weights(folder, model),
                             lambda: load_tokenizer(folder).fingerprint, lambda: weights_id(folder))


def load_weights(folder, model):
    """
    Fill model, of the folder's config but for a larger vocabulary: additional rows of embedding and head are
    the mean of the folder's rows plus the model's own initialisation, so that they differ. Prints how many.
    """
    weights, ours = read_weights(folder), model.state_dict()
    for name, weight in weights.items():
        expected = ours[name]
        added = expected[len(weight):]
        may_grow = name in ("embed.weight", "untied_head.weight")
        if weight.shape != (expected[:len(weight)] if may_grow else expected).shape:
            raise UserError(f"{folder}: {name} (as it is called here) has the shape {list(weight.shape)}; "
                            f"config.json says {list(expected.shape)}")
        if len(added):
            mean = weight.float().mean(dim=0).to(added)
            weights[name] = torch.cat([weight.to(added), mean + added])
            if name == "embed.weight" and dist.world()[0] == 0:
                print(f"{folder}: {len(added)} rows are added for tokens that its embedding lacks")
    model.load_state_dict({**ours, **weights})                # ours: vision, which no folder has


def weights_id(folder):
    """-> sha256 of config and weights, as hex"""
    sha = hashlib.sha256()
    for name in sorted(os.listdir(folder)):
        if name == "config.json" or name.endswith(".safetensors"):
            with open(os.path.join(folder, name), "rb") as file:
                sha.update(name.encode() + hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()


# -----------------------------------------------------------------------------
# config.json

def read_config(folder):
    """-> dict of ModelConfig's fields. UserError names what is not supported."""
    path = os.path.join(folder, "config.json")
    given = _read_json(path)
    try:
        return _our_config({name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _our_config(given):
    """given: config.json without nulls -> dict of ModelConfig's fields; ValueError"""
    family = given.get("model_type")
    if family not in list(FAMILIES):
        raise _refusal("model_type", family, " or ".join(FAMILIES))
    only = ONLY | FAMILY_ONLY.get(family, {}) | dict(architectures=[FAMILIES[family]])
    _check_only(given, only)
    defaults = DEFAULTS | FAMILY_DEFAULTS.get(family, {})
    read = {"model_type", "layer_types", "rope_parameters", "rope_scaling", *only}

    def take(name, kind=int):
        read.add(name)
        return _value(name, given.get(name, defaults.get(name)), kind)

    def take_all(names):
        return {ours: take(theirs, type(getattr(ModelConfig, ours))) for ours, theirs in names.items()}
    n_head = take("num_attention_heads")
    defaults.setdefault("head_dim", take("hidden_size") // n_head)
    layers = given.get("layer_types")
    if layers not in (None, ["full_attention"] * take("num_hidden_layers")):
        raise _refusal("layer_types", layers, "full_attention for all")
    if family == "llama":                                     # Qwen's class has a default that no model uses
        defaults["num_key_value_heads"] = n_head
    config = OPTIONS.get(family, {}) | take_all(FIELDS)
    config |= _read_rope(given, take("max_position_embeddings"), take("max_sequence_length"),
                         take("rope_theta", float))
    if family in EXPERT_FIELDS:
        names = dict(EXPERT_FIELDS[family])
        for name in ("num_experts", "num_local_experts"):
            if name in given:
                names["n_expert"] = name
        dense = given.get("mlp_only_layers", [])
        read.add("mlp_only_layers")
        if dense not in [list(range(n)) for n in range(config["n_layer"])]:
            raise _refusal("mlp_only_layers", dense, "the first layers, 0 to n - 1")
        config |= take_all(names) | dict(n_dense_layer=len(dense))
        # even routing costs k times theirs, whatever the number of layers, and ours for each layer
        share = config["n_expert_active"] / (config["n_layer"] - len(dense))
        config["balance_coef"] = round(take("router_aux_loss_coef", float) * share, 12)
    if family == "qwen2_moe":
        name, d_expert = "shared_expert_intermediate_size", config["d_expert"]
        n_shared, rest = divmod(take(name), d_expert)
        if rest:
            raise _refusal(name, given[name], f"a multiple of moe_intermediate_size={d_expert}")
        config |= dict(n_shared_expert=n_shared, shared_gate=True, attn_bias=take("qkv_bias", bool))
    for name in given:
        if name not in read | IGNORED:
            raise _refusal(name, given[name], "no such field, as it may change what the model computes; if "
                           "it does not, remove it")
    return config


def _read_rope(given, seq_len, stretched_len, theta):
    """
    given: config.json; stretched_len: a longer seq_len that some name besides; theta: where rope_parameters
    has none -> ModelConfig's fields about rotary positions, with seq_len
    """
    rope = {}
    for field in ("rope_parameters", "rope_scaling"):
        if not isinstance(values := given.get(field, {}), dict):
            raise _refusal(field, values, "an object")
        for name, value in values.items():
            name = "rope_type" if name == "type" else name    # before 2024
            if value is not None and rope.setdefault(name, value) != value:
                raise _refusal(f"{field}.{name}", value, f"{json.dumps(rope[name])}, as elsewhere")
    theta = _value("rope_theta", rope.pop("rope_theta", theta), float)
    kind = rope.pop("rope_type", "default")
    if kind not in list(ROPE_FIELDS):
        raise _refusal("rope_type", kind, " or ".join(ROPE_FIELDS))
    _check_only(rope, ROPE_ONLY)
    config = {}
    for name in sorted(rope.keys() - ROPE_ONLY):
        ours = ROPE_FIELDS[kind].get(name)
        if not ours:
            raise _refusal(name, rope[name], f"no such field with rope_type={kind}")
        config[ours] = _value(name, rope[name], type(getattr(ModelConfig, ours)))
    missing = ROPE_REQUIRED & ROPE_FIELDS[kind].keys() - rope.keys()
    if missing and kind != "yarn":
        raise ValueError(f"{', '.join(sorted(missing))}: missing, with rope_type={kind}")
    original = config.get("rope_original_len", seq_len)
    factor = config.get("rope_factor", seq_len / original)
    if kind == "linear":
        seq_len = max(seq_len, stretched_len)
        original = max(1, round(seq_len / factor))
    if kind in ("dynamic", "yarn"):                           # max_position_embeddings may be the short one
        seq_len = max(seq_len, round(original * factor))
    return config | dict(rope_scaling="none" if kind == "default" else kind, rope_theta=theta,
                         rope_factor=factor, rope_original_len=original, seq_len=seq_len)


def _check_only(given, only):
    """ValueError where a field of given has another value than in only"""
    for name, value in only.items():
        if given.get(name, value) != value:
            raise _refusal(name, given[name], json.dumps(value))


def _value(name, value, kind):
    """value of a field as kind, a key of KINDS; ValueError"""
    if value is None:
        raise ValueError(f"{name} is missing")
    fits = type(value) is kind or kind is float and type(value) is int
    least = 1 if kind is int else 0
    if not fits or not least <= value < math.inf:
        raise _refusal(name, value, KINDS[kind])
    return kind(value)


def _refusal(name, value, expected):
    return ValueError(f"{name}={json.dumps(value)[:80]}: not supported; expected {expected}")


def config_json(c, dtype, end):
    """c: ModelConfig; dtype of the weights; id of the end token -> dict that config.json is to hold"""
    if c.partial_rotary_factor != 1:
        raise UserError(f"--model.partial_rotary_factor={c.partial_rotary_factor}: none of the families "
                        f"{', '.join(FAMILIES)} rotates a part of a head; it cannot be exported")
    family, kind = _family(c), c.rope_scaling
    if kind == "none":
        kind = "default"
    rope = dict(rope_type=kind)
    for theirs, ours in ROPE_FIELDS[kind].items():
        if value := getattr(c, ours):                         # 0: derived
            rope[theirs] = value
    names = FIELDS | EXPERT_FIELDS.get(family, {})            # Mixtral: intermediate_size is d_expert
    described = {theirs: getattr(c, ours) for ours, theirs in names.items()}
    if c.n_expert:
        share = c.n_expert_active / (c.n_layer - c.n_dense_layer)
        described["router_aux_loss_coef"] = round(c.balance_coef * share**-1, 12)
    if family in ("qwen2_moe", "qwen3_moe"):
        described |= dict(decoder_sparse_step=1, mlp_only_layers=list(range(c.n_dense_layer)))
    if family == "qwen2_moe":
        described |= dict(shared_expert_intermediate_size=c.n_shared_expert * c.d_expert,
                          qkv_bias=c.attn_bias)
    return described | dict(
        model_type=family, architectures=[FAMILIES[family]], dtype=str(dtype).removeprefix("torch."),
        hidden_act="silu", sliding_window=None, bos_token_id=None, eos_token_id=end, pad_token_id=None,
        max_position_embeddings=c.rope_original_len if kind == "dynamic" else c.seq_len,
        rope_theta=c.rope_theta, rope_scaling=None if kind == "default" else rope,     # before version 5
        rope_parameters=dict(rope, rope_theta=c.rope_theta))


def _family(c):
    """c: ModelConfig -> model_type; UserError where no family computes that"""
    bias, norm, experts = c.attn_bias, c.qk_norm, c.n_expert > 0
    shared = experts and c.n_shared_expert
    fits = dict(
        llama=not (bias or norm or experts),
        qwen2=bias and not (norm or experts),
        qwen3=norm and not (bias or experts),
        qwen3_moe=experts and norm and not (bias or shared),
        mixtral=experts and c.norm_topk and not (bias or norm or shared or c.n_dense_layer),
        qwen2_moe=shared and c.shared_gate and not norm)
    for family, fit in fits.items():
        if fit:
            return family
    options = ("attn_bias", "qk_norm", "n_expert", "n_shared_expert", "shared_gate", "norm_topk",
               "n_dense_layer")
    raise UserError(" ".join(f"--model.{name}={getattr(c, name)}" for name in options)
                    + ": no family of transformers that is known here has these together; it cannot be "
                    "exported (with experts: qk_norm alone as Qwen3-MoE, shared_gate as Qwen2-MoE)")


# -----------------------------------------------------------------------------
# weights

def names(c):
    """c: ModelConfig. Yield (our name, {their name: rows}) for each tensor; ours is theirs stacked"""
    C, q, kv = c.n_embd, c.n_head * c.head_dim, c.n_kv_head * c.head_dim
    yield "embed.weight", {"model.embed_tokens.weight": c.vocab_size}
    for i in range(c.n_layer):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        for part in ("weight", "bias") if c.attn_bias else ("weight",):
            yield f"{ours}.attn.qkv.{part}", {f"{theirs}.self_attn.{x}_proj.{part}": rows
                                              for x, rows in (("q", q), ("k", kv), ("v", kv))}
        yield f"{ours}.attn.out.weight", {f"{theirs}.self_attn.o_proj.weight": C}
        for x in "qk" if c.qk_norm else "":
            yield f"{ours}.attn.{x}_norm.weight", {f"{theirs}.self_attn.{x}_norm.weight": c.head_dim}
        if c.n_expert and i >= c.n_dense_layer:
            yield from _expert_names(c, f"{ours}.mlp", theirs)
        else:
            yield from _mlp_names(f"{ours}.mlp", f"{theirs}.mlp", c.d_ff, C)
        yield f"{ours}.attn_norm.weight", {f"{theirs}.input_layernorm.weight": C}
        yield f"{ours}.mlp_norm.weight", {f"{theirs}.post_attention_layernorm.weight": C}
    yield "norm.weight", {"model.norm.weight": C}
    if not c.tie_embeddings:
        yield "untied_head.weight", {"lm_head.weight": c.vocab_size}


def _mlp_names(ours, theirs, d_ff, C):
    yield f"{ours}.gate_up.weight", {f"{theirs}.{x}_proj.weight": d_ff for x in ("gate", "up")}
    yield f"{ours}.down.weight", {f"{theirs}.down_proj.weight": C}


def _expert_names(c, ours, layer):
    """The part of `names` about the experts of one layer; each of theirs is a tensor of its own"""
    experts, F = range(c.n_expert), c.d_expert
    theirs, gate, up, down = f"{layer}.mlp", "gate_proj", "up_proj", "down_proj"
    if _family(c) == "mixtral":
        theirs, gate, up, down = f"{layer}.block_sparse_moe", "w1", "w3", "w2"
    yield f"{ours}.router", {f"{theirs}.gate.weight": c.n_expert}
    yield f"{ours}.gate_up", {f"{theirs}.experts.{e}.{x}.weight": F for e in experts for x in (gate, up)}
    yield f"{ours}.down", {f"{theirs}.experts.{e}.{down}.weight": c.n_embd for e in experts}
    if c.n_shared_expert:
        yield from _mlp_names(f"{ours}.shared", f"{theirs}.shared_expert", c.n_shared_expert * F, c.n_embd)
        yield f"{ours}.shared_gate.weight", {f"{theirs}.shared_expert_gate.weight": 1}


def read_weights(folder):
    """
    -> our state dict, in the dtype of the files. UserError names a tensor that is missing, left over or of
    another shape.
    """
    c, files, weights = ModelConfig(**read_config(folder)), _open_tensors(folder), {}
    for ours, parts in names(c):
        tensors = []
        for name, rows in parts.items():
            if name not in files:
                raise UserError(f"{folder}: the tensor {name} is missing")
            tensors.append(files.pop(name).get_tensor(name))
            shape, first = list(tensors[-1].shape), list(tensors[0].shape)
            if shape[:1] != [rows] or shape[1:] != first[1:]:
                raise UserError(f"{folder}: {name} has the shape {shape}; expected {rows} rows as "
                                f"config.json says, of {first[1:]} numbers")
        weights[ours] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
        if ours.endswith(("mlp.gate_up", "mlp.down")):        # of experts: one more axis
            weights[ours] = weights[ours].unflatten(0, (c.n_expert, -1))
    if c.tie_embeddings:
        files.pop("lm_head.weight", None)                     # a copy of the embedding, in some files
    left = [name for name in files if not name.endswith(".rotary_emb.inv_freq")]        # computed anew
    if left:
        raise UserError(f"{folder}: {left[0]}: unknown tensor ({len(left)} in all); what it does is not "
                        "supported")
    return weights


def _open_tensors(folder):
    """-> dict of tensor name to the open file that holds it: those of the index, or one file"""
    safetensors = _safetensors()

    def open_file(name):
        path = os.path.join(folder, name)
        try:
            return safetensors.safe_open(path, "pt")
        except (OSError, safetensors.SafetensorError) as error:
            raise UserError(f"{path}: missing or damaged ({error})") from None
    index = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.exists(index):
        if not os.path.exists(os.path.join(folder, "model.safetensors")):
            raise UserError(f"{folder}: no model.safetensors and no index of several; other formats, "
                            "such as pytorch_model.bin, are not read")
        file = open_file("model.safetensors")
        return dict.fromkeys(file.keys(), file)
    where, tensors = _read_json(index).get("weight_map"), {}
    if not isinstance(where, dict) or any(not isinstance(name, str) or os.path.basename(name) != name
                                          for name in where.values()):
        raise UserError(f"{index}: expected a weight_map of tensor names to files beside it")
    for name in sorted(set(where.values())):
        file = open_file(name)
        tensors |= {tensor: file for tensor in file.keys() if where.get(tensor) == name}
    for tensor, name in where.items():
        if tensor not in tensors:
            raise UserError(f"{index}: {tensor} is not in {name}")
    return tensors


def write(folder, c, weights, end, files, shard_bytes=SHARD_BYTES):
    """
    Write a folder that transformers loads, whole or not at all. c: ModelConfig, resolved; weights: our state
    dict; end: id of the end token; files: {name: bytes}, the tokenizer's.
    """
    save_file = _safetensors().torch.save_file
    partial = folder.rstrip("/") + ".partial"
    if os.path.exists(folder):
        raise UserError(f"{folder}: already there; remove it or choose another")
    shards = _shards(c, weights, shard_bytes)
    described = config_json(c, weights["embed.weight"].dtype, end)
    texts = {"config.json": described, "generation_config.json": dict(eos_token_id=end)}
    if len(shards) > 1:
        sizes = [tensor.nbytes for shard in shards.values() for tensor in shard.values()]
        texts["model.safetensors.index.json"] = dict(
            metadata=dict(total_size=sum(sizes)),
            weight_map={tensor: name for name, shard in shards.items() for tensor in shard})
    files = files | {name: (json.dumps(value, indent=1) + "\n").encode() for name, value in texts.items()}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        for name, content in files.items():
            with open(os.path.join(partial, name), "wb") as file:
                file.write(content)
        for name, shard in shards.items():
            save_file(shard, os.path.join(partial, name), metadata={"format": "pt"})
        os.rename(partial, folder)
    except Exception as error:                                # OSError, or safetensors' own on a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder}: cannot be written ({error})") from None


def _shards(c, weights, shard_bytes):
    """weights: our state dict -> {name of a file: {their name: tensor}}"""
    shards, size = [{}], 0
    for ours, parts in names(c):
        weight = weights[ours]
        if weight.ndim == 3:                                  # of experts
            weight = weight.flatten(0, 1)
        for name, tensor in zip(parts, weight.split(list(parts.values()))):
            if size and size + tensor.nbytes > shard_bytes:
                shards.append({})
                size = 0
            shards[-1][name] = tensor.contiguous()
            size += tensor.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("safetensors is missing, which reads and writes Hugging Face's files: "
                        'pip install safetensors, or this package with its extra "hf"') from None
    return safetensors


def _read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if not isinstance(content, dict):
            raise ValueError("expected an object")
        return content
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or damaged ({error})") from None


# -----------------------------------------------------------------------------
# from the command line

def export_run(init_from, hf_dir):
    """init_from: run or checkpoint of ours -> text, what has been written to hf_dir"""
    saved = checkpoint.checkpoint_source(checkpoint.find(init_from))
    dtype = getattr(torch, saved.manifest["config"].get("param_dtype", "float32"))
    model = GPT(ModelConfig(**saved.manifest["model"])).to(dtype)
    saved.load(model)
    tokenizer = load_tokenizer(saved.folder)
    write(hf_dir, model.config, model.state_dict(), tokenizer.end, tokenizer.files())
    return f"{hf_dir}: {model.size()} of {saved.folder}"


def import_folder(hf_dir, out_dir):
    """hf_dir: folder of transformers -> text, what has been written to out_dir, as a run of ours"""
    check_run_directory(out_dir, False)
    config, tokenizer = ModelConfig(**read_config(hf_dir)), load_tokenizer(hf_dir)
    torch.manual_seed(0)                                      # of additional rows, for our own tokens
    model = GPT(replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size)))
    load_weights(hf_dir, model)
    os.makedirs(out_dir, exist_ok=True)
    info = dict(model=asdict(model.config), config={}, identity={}, fingerprint=tokenizer.fingerprint)
    checkpoint.save(out_dir, 0, model, None, info, tokenizer.files(), last=True)
    return f"{out_dir}: {model.size()} of {hf_dir}"


if __name__ == "__main__":
    show_user_errors()
    command, *options = sys.argv[1:] or ["--help"]
    cfg = parse_config(Config, [command, *options] if command.startswith("-") else options)
    if command == "export" and cfg.init_from and cfg.hf_dir:
        print(export_run(cfg.init_from, cfg.hf_dir))
    elif command == "import" and cfg.hf_dir and cfg.out_dir:
        print(import_folder(cfg.hf_dir, cfg.out_dir))
    else:
        raise UserError("expected: python -m extras.hf import --hf_dir=FOLDER --out_dir=RUN, or "
                        "export --init_from=RUN --hf_dir=FOLDER")
