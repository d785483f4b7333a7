"""
Hugging Face directories: Llama, Qwen2 (and 2.5), Qwen3, and their mixtures of experts in, and out again.

    python train_sft.py --init_from=Qwen2.5-0.5B --data_dir=...                 # any stage, and sample.py
    python -m common.hf import --hf_dir=Qwen2.5-0.5B --out_dir=out/qwen         # as a run of ours
    python -m common.hf export --init_from=out/sft --hf_dir=out/sft_hf          # for transformers

Tensors of ours that are fused (queries, keys and values; gate and up) are theirs one below the other; both
rotate halves, so no rows are permuted. Needs the extra `hf` (safetensors).

Every field of config.json is honoured, or known to change nothing (IGNORED), or an error that names it: a
model that computes something else than its authors' would be worse than none. Honoured are

    model_type, architectures, vocab_size, hidden_size, intermediate_size, num_hidden_layers,
    num_attention_heads, num_key_value_heads, head_dim, max_position_embeddings (max_sequence_length),
    rms_norm_eps, tie_word_embeddings, attention_dropout, and the rotary ones: rope_parameters (transformers
    5), rope_theta and rope_scaling (before), of rope_type default, linear, dynamic, yarn, llama3

those of ONLY with the value that stands there, and of mixtures of experts num_experts (num_local_experts),
num_experts_per_tok, moe_intermediate_size, norm_topk_prob, router_aux_loss_coef, mlp_only_layers (the first
ones), and of Qwen2-MoE qkv_bias and shared_expert_intermediate_size.
"""
import contextlib
import hashlib
import importlib
import json
import math
import os
import shutil
import sys

import torch

from common import dist
from common.checkpoint import Source
from common.errors import UserError, show_user_errors
from common.tokenizer import load_tokenizer

FAMILIES = {                                                  # model_type: class, what sets it apart for us
    "llama": ("LlamaForCausalLM", {}), "mixtral": ("MixtralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", dict(attn_bias=True)), "qwen2_moe": ("Qwen2MoeForCausalLM", {}),
    "qwen3": ("Qwen3ForCausalLM", dict(qk_norm=True)),
    "qwen3_moe": ("Qwen3MoeForCausalLM", dict(qk_norm=True))}
# fields that must have this value, if they are there
ONLY = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False,
            partial_rotary_factor=1.0, use_mrope=False, is_decoder=False, add_cross_attention=False,
            decoder_sparse_step=1, router_jitter_noise=0.0, rope_interleaved=False, activation="swiglu")
ONLY_QWEN3_MOE = dict(qkv_bias=False, shared_expert_intermediate_size=0, use_qk_norm=True)
# fields that change nothing in what these models compute: bookkeeping, initialisation, text generation's
# defaults; the tokenizer reads the end token for itself; windows are in use with use_sliding_window only
IGNORED = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range",
           "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id", "max_window_layers",
           "sliding_window", "output_attentions", "output_hidden_states", "return_dict", "id2label",
           "label2id", "_attn_implementation_autoset", "unsloth_fixed", "unsloth_version",
           "output_router_logits", "is_llama_config", "transformers.js_config"}
ROPE_FIELDS = {                                               # rope_type: its fields, and ours
    "default": {},
    "linear": dict(factor="rope_factor"),
    "dynamic": dict(factor="rope_factor"),
    "llama3": dict(factor="rope_factor", original_max_position_embeddings="rope_original_len",
                   low_freq_factor="rope_low_freq_factor", high_freq_factor="rope_high_freq_factor"),
    "yarn": dict(factor="rope_factor", original_max_position_embeddings="rope_original_len",
                 beta_fast="yarn_beta_fast", beta_slow="yarn_beta_slow", mscale="yarn_mscale",
                 attention_factor="yarn_attention_factor", mscale_all_dim="yarn_mscale_all_dim")}
SHARD_BYTES = 5 * 10**9                                       # of an exported file, about


def source(folder):
    """-> checkpoint.Source of a folder in Hugging Face's format"""
    return Source(folder, dict(model=read_config(folder)), lambda model: load_weights(folder, model),
                  lambda: load_tokenizer(folder).fingerprint, lambda: weights_id(folder))


def load_weights(folder, model):
    """
    Fill model, of the folder's config but for a larger vocabulary: further rows of embedding and head are the
    mean of the folder's plus what the model has there, its own initialisation, so that they differ. Says so.
    """
    weights, ours = read_weights(folder), model.state_dict()
    for name in ("embed.weight", "untied_head.weight"):
        if name in weights and len(ours[name]) > (n := len(weights[name])) \
                and ours[name].shape[1:] == weights[name].shape[1:]:
            mean = weights[name].float().mean(dim=0).to(ours[name])
            weights[name] = torch.cat([weights[name].to(ours[name]), mean + ours[name][n:]])
            if name == "embed.weight" and dist.world()[0] == 0:
                print(f"{folder}: {len(ours[name]) - n} rows are added for tokens that its embedding lacks")
    for name, weight in weights.items():
        if weight.shape != ours[name].shape:
            raise UserError(f"{folder}: {name} (as it is called here) has the shape {list(weight.shape)}; "
                            f"config.json says {list(ours[name].shape)}")
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
    left = {name: value for name, value in _read_json(path).items()
            if value is not None and name not in IGNORED}
    family = left.pop("model_type", None)
    if not isinstance(family, str) or family not in FAMILIES:
        raise _refusal(path, "model_type", family, " or ".join(FAMILIES))
    architecture, options = FAMILIES[family]
    if family == "mixtral" and _read_json(path).get("sliding_window") is not None:     # no use_sliding_window
        raise _refusal(path, "sliding_window", _read_json(path)["sliding_window"], "null")
    only = ONLY | (ONLY_QWEN3_MOE if family == "qwen3_moe" else {})
    for name, value in dict(only, architectures=[architecture]).items():
        if (given := left.pop(name, value)) != value:
            raise _refusal(path, name, given, json.dumps(value))
    given = left.pop("layer_types", [])
    if not isinstance(given, list) or any(kind != "full_attention" for kind in given):
        raise _refusal(path, "layer_types", given, "full_attention for all")

    def take(name, kind=int, default=None):
        if kind is bool and not isinstance(left.get(name, default), bool):
            raise _refusal(path, name, left[name], "true or false")
        if kind is bool:
            return left.pop(name, default)
        if name not in left and default is None:
            raise UserError(f"{path}: {name} is missing")
        return _number(path, name, left.pop(name, default), kind)
    n_head, n_embd = take("num_attention_heads"), take("hidden_size")
    # defaults are those of transformers' classes; Qwen's n_kv_head has one that no model uses
    config = dict(
        options, n_head=n_head, n_embd=n_embd, vocab_size=take("vocab_size"),
        n_layer=take("num_hidden_layers"), d_ff=take("intermediate_size"),
        n_kv_head=take("num_key_value_heads", default=n_head if family == "llama" else None),
        head_dim=take("head_dim", default=128 if family == "qwen3" else n_embd // n_head),
        norm_eps=take("rms_norm_eps", float, 1e-5 if family == "mixtral" else 1e-6),
        attn_dropout=take("attention_dropout", float, 0.0),
        tie_embeddings=take("tie_word_embeddings", bool, False),
        **_read_rope(path, left, take("max_position_embeddings"), take("max_sequence_length", default=1),
                     1e6 if family == "mixtral" else 1e4))
    if family == "mixtral" or family.endswith("_moe"):
        name = "num_local_experts" if "num_local_experts" in left else "num_experts"
        config |= dict(n_expert=take(name), n_expert_active=take("num_experts_per_tok"))
        dense = left.pop("mlp_only_layers", [])
        if not isinstance(dense, list) or dense != list(range(min(len(dense), config["n_layer"] - 1))):
            raise _refusal(path, "mlp_only_layers", dense, "the first layers, 0 to n - 1")
        config |= dict(n_dense_layer=len(dense), d_expert=config["d_ff"]) if family == "mixtral" else dict(
            n_dense_layer=len(dense), d_expert=take("moe_intermediate_size"),
            norm_topk=take("norm_topk_prob", bool, False))
        config["balance_coef"] = _balance(config, take("router_aux_loss_coef", float, 0.001), 1)
    if family == "qwen2_moe":
        shared = take("shared_expert_intermediate_size")
        if shared % config["d_expert"]:
            raise _refusal(path, "shared_expert_intermediate_size", shared, "a multiple of "
                           f"moe_intermediate_size={config['d_expert']}")
        config |= dict(n_shared_expert=shared // config["d_expert"], shared_gate=True,
                       attn_bias=take("qkv_bias", bool, True))
    for name, value in left.items():
        raise _refusal(path, name, value, "no such field, as it may change what the model computes; if it "
                       "does not, remove it")
    return config


def _read_rope(path, left, seq_len, stretched_len, theta):
    """
    Take what is about rotary positions out of left, a config.json -> ModelConfig's fields, with seq_len.
    stretched_len: a longer one that some name besides; theta: where none is given
    """
    rope = {}
    for field in ("rope_parameters", "rope_scaling"):
        if not isinstance(given := left.pop(field, {}), dict):
            raise _refusal(path, field, given, "an object")
        for name, value in given.items():
            name = "rope_type" if name == "type" else name                 # before 2024
            if value is not None and rope.setdefault(name, value) != value:
                raise _refusal(path, f"{field}.{name}", value, f"{json.dumps(rope[name])}, as elsewhere")
    theta = left.pop("rope_theta", theta)
    config = dict(seq_len=seq_len, rope_original_len=seq_len, rope_factor=1.0, rope_scaling="none",
                  rope_theta=_number(path, "rope_theta", rope.pop("rope_theta", theta), float))
    kind = rope.pop("rope_type", "default")
    if not isinstance(kind, str) or kind not in ROPE_FIELDS:
        raise _refusal(path, "rope_type", kind, " or ".join(ROPE_FIELDS))
    for name, value in (("partial_rotary_factor", 1.0), ("truncate", True)):
        if (given := rope.pop(name, value)) != value:
            raise _refusal(path, name, given, json.dumps(value))
    for name, value in rope.items():
        if name not in ROPE_FIELDS[kind]:
            raise _refusal(path, name, value, f"no such field with rope_type={kind}")
        number = int if name == "original_max_position_embeddings" else float
        config[ROPE_FIELDS[kind][name]] = _number(path, name, value, number)
    if kind == "default":
        return config
    original, factor = config["rope_original_len"], config["rope_factor"]
    if missing := {"factor", *["low_freq_factor", "high_freq_factor"] * (kind == "llama3")} - rope.keys():
        if kind != "yarn":
            raise UserError(f"{path}: {', '.join(sorted(missing))}: missing, with rope_type={kind}")
        factor = seq_len / original
    if kind == "linear":
        seq_len = max(seq_len, stretched_len)
        original = max(1, round(seq_len / factor))
    if kind in ("dynamic", "yarn"):                           # the short length may stand there still
        seq_len = max(seq_len, round(original * factor))
    return config | dict(rope_scaling=kind, rope_factor=factor, rope_original_len=original, seq_len=seq_len)


def _number(path, name, value, kind):
    """value as kind; UserError unless it is an int of at least 1, or a finite float that is not negative"""
    if isinstance(value, bool) or not isinstance(value, (int, kind)) \
            or not (kind is int) <= value < math.inf:
        raise _refusal(path, name, value, f"a number ({kind.__name__}), "
                       + ("at least 1" if kind is int else "not negative"))
    return kind(value)


def _refusal(path, name, value, expected):
    return UserError(f"{path}: {name}={json.dumps(value)[:80]}: not supported; expected {expected}")


def config_json(config, dtype, end):
    """ModelConfig's fields, dtype of the weights, id of the end token -> dict that config.json is to hold"""
    c = config
    if c["partial_rotary_factor"] != 1:
        raise UserError(f"--model.partial_rotary_factor={c['partial_rotary_factor']}: none of the families "
                        f"{', '.join(FAMILIES)} rotates a part of a head; it cannot be exported")
    family = _family(c)
    kind = {"none": "default"}.get(c["rope_scaling"], c["rope_scaling"])
    rope = {theirs: c[ours] for theirs, ours in ROPE_FIELDS[kind].items()}
    rope = {"rope_type": kind, **{name: value for name, value in rope.items() if value}}    # 0: derived
    return dict(
        model_type=family, architectures=[FAMILIES[family][0]], dtype=str(dtype).removeprefix("torch."),
        vocab_size=c["vocab_size"], hidden_size=c["n_embd"],
        intermediate_size=c["d_expert"] if family == "mixtral" else c["d_ff"], **_experts_json(c, family),
        num_hidden_layers=c["n_layer"], num_attention_heads=c["n_head"], num_key_value_heads=c["n_kv_head"],
        head_dim=c["head_dim"], hidden_act="silu", rms_norm_eps=c["norm_eps"],
        max_position_embeddings=c["rope_original_len"] if kind == "dynamic" else c["seq_len"],
        rope_theta=c["rope_theta"], rope_scaling=rope if kind != "default" else None,       # before version 5
        rope_parameters=dict(rope, rope_theta=c["rope_theta"]), attention_dropout=c["attn_dropout"],
        tie_word_embeddings=c["tie_embeddings"], bos_token_id=None, eos_token_id=end, pad_token_id=None)


def _family(c):
    """ModelConfig's fields -> model_type; UserError where no family computes that"""
    bias, norm, experts = (bool(c.get(name)) for name in ("attn_bias", "qk_norm", "n_expert"))
    shared = experts and bool(c.get("n_shared_expert"))
    if not experts and not (bias and norm):
        return "qwen2" if bias else "qwen3" if norm else "llama"
    if experts and not shared and not bias:
        if norm:
            return "qwen3_moe"
        if c.get("norm_topk", True) and not c.get("n_dense_layer"):
            return "mixtral"
    if shared and c.get("shared_gate") and not norm:
        return "qwen2_moe"
    options = ("attn_bias", "qk_norm", "n_expert", "n_shared_expert", "shared_gate", "norm_topk",
               "n_dense_layer")
    raise UserError(" ".join(f"--model.{name}={c[name]}" for name in options)
                    + ": no family of transformers that is known here has these together; it cannot be "
                    "exported (with experts: qk_norm alone as Qwen3-MoE, shared_gate as Qwen2-MoE)")


def _balance(c, coef, sign):
    """
    Their router_aux_loss_coef as our balance_coef (sign 1), or back (-1): even routing costs k times theirs,
    whatever the number of layers, and ours for each layer
    """
    return round(coef * (c["n_expert_active"] / (c["n_layer"] - c["n_dense_layer"]))**sign, 12)


def _experts_json(c, family):
    """-> the fields of config.json about experts"""
    if not c["n_expert"]:
        return {}
    if family == "mixtral":
        return dict(num_local_experts=c["n_expert"], num_experts_per_tok=c["n_expert_active"],
                    router_aux_loss_coef=_balance(c, c["balance_coef"], -1), sliding_window=None)
    fields = dict(num_experts=c["n_expert"], num_experts_per_tok=c["n_expert_active"],
                  moe_intermediate_size=c["d_expert"], norm_topk_prob=c["norm_topk"], decoder_sparse_step=1,
                  router_aux_loss_coef=_balance(c, c["balance_coef"], -1),
                  mlp_only_layers=list(range(c["n_dense_layer"])))
    if family == "qwen2_moe":
        fields |= dict(shared_expert_intermediate_size=c["n_shared_expert"] * c["d_expert"],
                       qkv_bias=c["attn_bias"])
    return fields


# -----------------------------------------------------------------------------
# weights

def names(config):
    """Yield (our name, {their name: rows}) for each tensor; theirs stand in ours one below the other"""
    c = config
    C, q, kv, F = c["n_embd"], c["n_head"] * c["head_dim"], c["n_kv_head"] * c["head_dim"], c["d_ff"]
    yield "embed.weight", {"model.embed_tokens.weight": c["vocab_size"]}
    for i in range(c["n_layer"]):
        ours, theirs = f"blocks.{i}", f"model.layers.{i}"
        for part in ("weight", "bias") if c.get("attn_bias") else ("weight",):
            yield f"{ours}.attn.qkv.{part}", {f"{theirs}.self_attn.{x}_proj.{part}": rows
                                              for x, rows in (("q", q), ("k", kv), ("v", kv))}
        yield f"{ours}.attn.out.weight", {f"{theirs}.self_attn.o_proj.weight": C}
        for x in "qk" if c.get("qk_norm") else "":
            yield f"{ours}.attn.{x}_norm.weight", {f"{theirs}.self_attn.{x}_norm.weight": c["head_dim"]}
        if c.get("n_expert") and i >= c["n_dense_layer"]:
            yield from _expert_names(c, ours, theirs)
        else:
            yield f"{ours}.mlp.gate_up.weight", {f"{theirs}.mlp.{x}_proj.weight": F for x in ("gate", "up")}
            yield f"{ours}.mlp.down.weight", {f"{theirs}.mlp.down_proj.weight": C}
        yield f"{ours}.attn_norm.weight", {f"{theirs}.input_layernorm.weight": C}
        yield f"{ours}.mlp_norm.weight", {f"{theirs}.post_attention_layernorm.weight": C}
    yield "norm.weight", {"model.norm.weight": C}
    if not c["tie_embeddings"]:
        yield "untied_head.weight", {"lm_head.weight": c["vocab_size"]}


def _expert_names(c, ours, theirs):
    """The part of `names` about the experts of one layer; each of theirs is a tensor of its own"""
    C, E, F, shared = c["n_embd"], c["n_expert"], c["d_expert"], c.get("n_shared_expert", 0)
    mixtral = _family(c) == "mixtral"
    theirs += ".block_sparse_moe" if mixtral else ".mlp"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    yield f"{ours}.mlp.router", {f"{theirs}.gate.weight": E}
    yield f"{ours}.mlp.gate_up", {f"{theirs}.experts.{e}.{x}.weight": F for e in range(E) for x in (gate, up)}
    yield f"{ours}.mlp.down", {f"{theirs}.experts.{e}.{down}.weight": C for e in range(E)}
    if shared:
        yield f"{ours}.mlp.shared.gate_up.weight", {
            f"{theirs}.shared_expert.{x}.weight": shared * F for x in (gate, up)}
        yield f"{ours}.mlp.shared.down.weight", {f"{theirs}.shared_expert.{down}.weight": C}
        yield f"{ours}.mlp.shared_gate.weight", {f"{theirs}.shared_expert_gate.weight": 1}


def read_weights(folder):
    """
    -> our state dict, in the dtype of the files. UserError names a tensor that is missing, left over or of
    another shape.
    """
    config, weights = read_config(folder), {}
    with _open_tensors(folder) as files:                      # name -> open file
        for ours, parts in names(config):
            tensors = []
            for name, rows in parts.items():
                if name not in files:
                    raise UserError(f"{folder}: the tensor {name} is missing")
                tensors.append(files.pop(name).get_tensor(name))
                shape = list(tensors[-1].shape)
                if shape[:1] != [rows] or shape[1:] != list(tensors[0].shape[1:]):
                    raise UserError(f"{folder}: {name} has the shape {shape}; expected {rows} rows as "
                                    f"config.json says, of {list(tensors[0].shape[1:])} numbers")
            weights[ours] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
            if ours.endswith(("mlp.gate_up", "mlp.down")):    # of experts: one more axis
                weights[ours] = weights[ours].unflatten(0, (config["n_expert"], -1))
        if config["tie_embeddings"]:
            files.pop("lm_head.weight", None)                 # a copy of the embedding, in some files
        left = [name for name in files if not name.endswith(".rotary_emb.inv_freq")]        # computed anew
        if left:
            raise UserError(f"{folder}: {left[0]}: unknown tensor ({len(left)} in all); what it does is not "
                            "supported")
    return weights


@contextlib.contextmanager
def _open_tensors(folder):
    """Gives a dict of tensor name to the open file that holds it: those of the index, or of one file"""
    safetensors = _safetensors()
    single = os.path.join(folder, "model.safetensors")
    index = single + ".index.json"
    with contextlib.ExitStack() as stack:
        def open_file(path):
            try:
                return stack.enter_context(safetensors.safe_open(path, "pt"))
            except (OSError, safetensors.SafetensorError) as error:
                raise UserError(f"{path}: missing or damaged ({error})") from None
        if not os.path.exists(index):
            if not os.path.exists(single):
                raise UserError(f"{folder}: no model.safetensors and no index of several; other formats, "
                                "such as pytorch_model.bin, are not read")
            file = open_file(single)
            yield dict.fromkeys(file.keys(), file)
            return
        where = _read_json(index).get("weight_map")
        if not isinstance(where, dict) or any(not isinstance(name, str) or os.path.basename(name) != name
                                              for name in where.values()):
            raise UserError(f"{index}: expected a weight_map of tensor names to files beside it")
        opened = {name: open_file(os.path.join(folder, name)) for name in sorted(set(where.values()))}
        held = {name: set(file.keys()) for name, file in opened.items()}
        for tensor, name in where.items():
            if tensor not in held[name]:
                raise UserError(f"{index}: {tensor} is not in {name}")
        yield {tensor: opened[name] for tensor, name in where.items()}


def write(folder, config, weights, end, files, shard_bytes=SHARD_BYTES):
    """
    Write a folder that transformers loads, whole or not at all. config: dict of ModelConfig's (resolved)
    fields; weights: our state dict; end: id of the end token; files: {name: bytes}, the tokenizer's.
    """
    save_file, partial = _safetensors("safetensors.torch").save_file, folder.rstrip("/") + ".partial"
    if os.path.exists(folder):
        raise UserError(f"{folder}: already there; remove it or choose another")
    theirs = {}
    for ours, parts in names(config):
        rows = weights[ours].flatten(0, 1) if weights[ours].ndim == 3 else weights[ours]
        theirs |= zip(parts, rows.split(list(parts.values())))
    shards, size = [{}], 0
    for name, tensor in theirs.items():
        if size and size + tensor.nbytes > shard_bytes:
            shards, size = [*shards, {}], 0
        shards[-1][name], size = tensor, size + tensor.nbytes
    described = config_json(config, weights["embed.weight"].dtype, end)
    texts = {"config.json": described, "generation_config.json": dict(eos_token_id=end)}
    files_of = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) > 1:
        texts["model.safetensors.index.json"] = dict(
            metadata=dict(total_size=sum(tensor.nbytes for tensor in theirs.values())),
            weight_map={name: file for file, shard in zip(files_of, shards) for name in shard})
    files = files | {name: (json.dumps(value, indent=1) + "\n").encode() for name, value in texts.items()}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        os.makedirs(partial)
        for name, content in files.items():
            with open(os.path.join(partial, name), "wb") as file:
                file.write(content)
        for name, shard in zip(files_of, shards):
            save_file({key: tensor.contiguous() for key, tensor in shard.items()},
                      os.path.join(partial, name), metadata={"format": "pt"})
        os.rename(partial, folder)
    except Exception as error:                                # OSError, or safetensors' own on a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder}: cannot be written ({error})") from None


def _safetensors(module="safetensors"):
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError("safetensors is missing, which reads and writes Hugging Face's files: "
                        'pip install safetensors, or this package with its extra "hf"') from None


def _read_json(path):
    try:
        with open(path, encoding="utf-8") as file:
            content = json.load(file)
        if not isinstance(content, dict):
            raise ValueError("expected an object")
        return content
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or damaged ({error})") from None


if __name__ == "__main__":  # the only part that knows other modules
    from dataclasses import asdict, dataclass, replace

    from common import checkpoint
    from common.config import parse_config
    from common.logger import check_run_directory
    from common.model import GPT, ModelConfig

    @dataclass(frozen=True)
    class Config:
        hf_dir: str = ""                   # Hugging Face folder; export writes it, and it must not exist
        init_from: str = ""                # export: run or checkpoint of ours
        out_dir: str = ""                  # import: run directory to write, must be new or empty

    show_user_errors()
    command, *options = sys.argv[1:] or ["--help"]
    cfg = parse_config(Config, [command, *options] if command.startswith("-") else options)
    if command == "export" and cfg.init_from and cfg.hf_dir:
        saved = checkpoint.read_manifest(source := checkpoint.find(cfg.init_from))
        dtype = getattr(torch, saved["config"].get("param_dtype", "float32"))
        model = GPT(ModelConfig(**saved["model"])).to(dtype)
        checkpoint.load_weights(source, model)
        tokenizer = load_tokenizer(source)
        write(cfg.hf_dir, asdict(model.config), model.state_dict(), tokenizer.end, tokenizer.files())
        print(f"{cfg.hf_dir}: {model.size()} of {source}")
    elif command == "import" and cfg.hf_dir and cfg.out_dir:
        check_run_directory(cfg.out_dir, False)
        config, tokenizer = ModelConfig(**read_config(cfg.hf_dir)), load_tokenizer(cfg.hf_dir)
        torch.manual_seed(0)                                  # of what rows for our own tokens begin with
        model = GPT(replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size)))
        load_weights(cfg.hf_dir, model)
        os.makedirs(cfg.out_dir, exist_ok=True)
        info = dict(model=asdict(model.config), config={}, identity={}, fingerprint=tokenizer.fingerprint)
        checkpoint.save(cfg.out_dir, 0, model, None, info, tokenizer.files(), last=True)
        print(f"{cfg.out_dir}: {model.size()} of {cfg.hf_dir}")
    else:
        raise UserError("expected: python -m common.hf import --hf_dir=FOLDER --out_dir=RUN, or "
                        "export --init_from=RUN --hf_dir=FOLDER")
