"""
Hugging Face directories: Llama, Qwen2 (and 2.5), Qwen3 in, and out again.

    python -m common.hf export --init_from=out/sft --hf_dir=out/sft_hf          # for transformers

    model = GPT(ModelConfig(**hf.read_config("Qwen2.5-0.5B")))                  # and in
    model.load_state_dict(hf.read_weights("Qwen2.5-0.5B"))

Tensors of ours that are fused (queries, keys and values; gate and up) are theirs one below the other; both
rotate halves, so no rows are permuted. Needs the extra `hf` (safetensors).

Every field of config.json is honoured, or known to change nothing (IGNORED), or an error that names it: a
model that computes something else than its authors' would be worse than none. Honoured are

    model_type, architectures, vocab_size, hidden_size, intermediate_size, num_hidden_layers,
    num_attention_heads, num_key_value_heads, head_dim, max_position_embeddings, rms_norm_eps,
    tie_word_embeddings, attention_dropout, and the rotary ones: rope_parameters (transformers 5), rope_theta
    and rope_scaling (before), of rope_type default, linear, dynamic, yarn, llama3
"""
import contextlib
import hashlib
import importlib
import json
import os
import shutil
import sys

import torch

from common.dist import UserError

FAMILIES = {"llama": ("LlamaForCausalLM", {}),                # model_type: class, what sets it apart for us
            "qwen2": ("Qwen2ForCausalLM", dict(attn_bias=True)),
            "qwen3": ("Qwen3ForCausalLM", dict(qk_norm=True))}
# fields that must have this value, if they are there
ONLY = dict(hidden_act="silu", attention_bias=False, mlp_bias=False, use_sliding_window=False,
            partial_rotary_factor=1.0, use_mrope=False, is_decoder=False, add_cross_attention=False)
# fields that change nothing in what these models compute: bookkeeping, initialisation, text generation's
# defaults; the tokenizer reads the end token for itself; windows are in use with use_sliding_window only
IGNORED = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache", "initializer_range",
           "pretraining_tp", "bos_token_id", "eos_token_id", "pad_token_id", "max_window_layers",
           "sliding_window", "output_attentions", "output_hidden_states", "return_dict", "id2label",
           "label2id", "_attn_implementation_autoset", "unsloth_fixed", "unsloth_version"}
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


def is_folder(path):
    """Whether path is a folder in Hugging Face's format"""
    return os.path.isfile(os.path.join(path, "config.json")) and \
        "model_type" in _read_json(os.path.join(path, "config.json"))


def fingerprint(folder):
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
    if (family := left.pop("model_type", None)) not in FAMILIES:
        raise _refusal(path, "model_type", family, " or ".join(FAMILIES))
    architecture, options = FAMILIES[family]
    for name, value in dict(ONLY, architectures=[architecture]).items():
        if (given := left.pop(name, value)) != value:
            raise _refusal(path, name, given, json.dumps(value))
    if set(given := left.pop("layer_types", ())) - {"full_attention"}:
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
        norm_eps=take("rms_norm_eps", float, 1e-6), attn_dropout=take("attention_dropout", float, 0.0),
        tie_embeddings=take("tie_word_embeddings", bool, False),
        **_read_rope(path, left, take("max_position_embeddings")))
    for name, value in left.items():
        raise _refusal(path, name, value, "no such field, as it may change what the model computes; if it "
                       "does not, remove it")
    return config


def _read_rope(path, left, seq_len):
    """Take what is about rotary positions out of left, a config.json -> ModelConfig's fields, with seq_len"""
    rope = {}
    for field in ("rope_parameters", "rope_scaling"):
        for name, value in left.pop(field, {}).items():
            name = "rope_type" if name == "type" else name                 # before 2024
            if value is not None and rope.setdefault(name, value) != value:
                raise _refusal(path, f"{field}.{name}", value, f"{json.dumps(rope[name])}, as elsewhere")
    theta = left.pop("rope_theta", 10_000.0)
    config = dict(seq_len=seq_len, rope_original_len=seq_len, rope_factor=1.0, rope_scaling="none",
                  rope_theta=_number(path, "rope_theta", rope.pop("rope_theta", theta), float))
    if (kind := rope.pop("rope_type", "default")) not in ROPE_FIELDS:
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
        original = max(1, int(seq_len / factor))
    if kind in ("dynamic", "yarn"):                           # the short length may stand there still
        seq_len = max(seq_len, int(original * factor))
    return config | dict(rope_scaling=kind, rope_factor=factor, rope_original_len=original, seq_len=seq_len)


def _number(path, name, value, kind):
    """value as kind (int or float); UserError unless it is one, and not negative"""
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or value < 0:
        raise _refusal(path, name, value, f"a number ({kind.__name__}) that is not negative")
    return kind(value)


def _refusal(path, name, value, expected):
    return UserError(f"{path}: {name}={json.dumps(value)[:80]}: not supported; expected {expected}")


def config_json(config, dtype, end):
    """ModelConfig's fields, dtype of the weights, id of the end token -> dict that config.json is to hold"""
    c = config
    if c["partial_rotary_factor"] != 1:
        raise UserError(f"--model.partial_rotary_factor={c['partial_rotary_factor']}: none of the families "
                        f"{', '.join(FAMILIES)} rotates a part of a head; it cannot be exported")
    apart = {name: True for name in ("attn_bias", "qk_norm") if c[name]}
    family = next((family for family, (_, options) in FAMILIES.items() if options == apart), None)
    if not family:
        raise UserError("--model.attn_bias=true --model.qk_norm=true: no family has both; "
                        "it cannot be exported")
    kind = {"none": "default"}.get(c["rope_scaling"], c["rope_scaling"])
    rope = {theirs: c[ours] for theirs, ours in ROPE_FIELDS[kind].items()}
    rope = {"rope_type": kind, **{name: value for name, value in rope.items() if value}}    # 0: derived
    return dict(
        model_type=family, architectures=[FAMILIES[family][0]], dtype=str(dtype).removeprefix("torch."),
        vocab_size=c["vocab_size"], hidden_size=c["n_embd"], intermediate_size=c["d_ff"],
        num_hidden_layers=c["n_layer"], num_attention_heads=c["n_head"], num_key_value_heads=c["n_kv_head"],
        head_dim=c["head_dim"], hidden_act="silu", rms_norm_eps=c["norm_eps"],
        max_position_embeddings=c["rope_original_len"] if kind == "dynamic" else c["seq_len"],
        rope_theta=c["rope_theta"], rope_scaling=rope if kind != "default" else None,       # before version 5
        rope_parameters=dict(rope, rope_theta=c["rope_theta"]), attention_dropout=c["attn_dropout"],
        tie_word_embeddings=c["tie_embeddings"], bos_token_id=None, eos_token_id=end, pad_token_id=None)


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
        yield f"{ours}.mlp.gate_up.weight", {f"{theirs}.mlp.{x}_proj.weight": F for x in ("gate", "up")}
        yield f"{ours}.mlp.down.weight", {f"{theirs}.mlp.down_proj.weight": C}
        yield f"{ours}.attn_norm.weight", {f"{theirs}.input_layernorm.weight": C}
        yield f"{ours}.mlp_norm.weight", {f"{theirs}.post_attention_layernorm.weight": C}
    yield "norm.weight", {"model.norm.weight": C}
    if not c["tie_embeddings"]:
        yield "untied_head.weight", {"lm_head.weight": c["vocab_size"]}


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
                if len(tensors[-1]) != rows:
                    raise UserError(f"{folder}: {name} has {len(tensors[-1])} rows; config.json says {rows}")
            weights[ours] = torch.cat(tensors) if len(tensors) > 1 else tensors[0]
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
        if not isinstance(where, dict) or any(os.path.basename(name) != name for name in where.values()):
            raise UserError(f"{index}: expected a weight_map of tensor names to files beside it")
        opened = {name: open_file(os.path.join(folder, name)) for name in sorted(set(where.values()))}
        for tensor, name in where.items():
            if tensor not in opened[name].keys():
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
        theirs |= zip(parts, weights[ours].split(list(parts.values())))
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
    from dataclasses import asdict, dataclass

    from common import checkpoint
    from common.config import parse_config
    from common.model import GPT, ModelConfig
    from common.tokenizer import load_tokenizer

    @dataclass(frozen=True)
    class Config:
        init_from: str = ""                # run or checkpoint of ours
        hf_dir: str = ""                   # folder to write for transformers, must not exist

    command, *options = sys.argv[1:] or [""]
    cfg = parse_config(Config, options)
    if command != "export" or not cfg.init_from or not cfg.hf_dir:
        raise UserError("expected: python -m common.hf export --init_from=RUN --hf_dir=FOLDER")
    source = checkpoint.find(cfg.init_from)
    model = GPT(ModelConfig(**checkpoint.read_manifest(source)["model"]))
    checkpoint.load_weights(source, model)
    tokenizer = load_tokenizer(source)
    write(cfg.hf_dir, asdict(model.config), model.state_dict(), tokenizer.end, tokenizer.files())
    print(f"{cfg.hf_dir}: {model.num_parameters():,} parameters of {source}")
