"""
Folders of transformers (Hugging Face): Llama, Mistral, Qwen2 (and 2.5), Qwen3, their mixtures of
experts, SmolLM3 and OLMo 2, read and written. Mistral's are written as Llama's, which is the same.

    python train_sft.py --init_from=Qwen2.5-0.5B --data_dir=...             # any stage, and
                                                                            sample.py
    python -m extras.hf import --hf_dir=Qwen2.5-0.5B --out_dir=out/qwen     # convert it into a run
                                                                            directory
    python -m extras.hf export --init_from=out/sft --hf_dir=out/sft_hf      # for transformers

Our fused tensors (queries, keys and values; gate and up) are theirs stacked. Both sides rotate
halves, so no rows are permuted. Needs the optional dependency `hf` (safetensors).
"""

import hashlib
import json
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common import checkpoint, dist
from common.config import parse_config
from common.errors import UserError, show_user_errors
from common.logger import check_run_directory
from common.model import GPT, ModelConfig
from common.tokenizer import load_tokenizer
from extras.hf_config import FAMILIES, config_json, model_type_of, one_or_all, our_config
from extras.hf_export import tokenizer_files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# our tensor, of a layer without its number: theirs, which ours is the stack of; *: number of an
# expert
TENSORS = {
    "embed.weight": "model.embed_tokens.weight",
    "attn.qkv.weight": "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight",
    "attn.qkv.bias": "self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias",
    "attn.out.weight": "self_attn.o_proj.weight",
    "attn.q_norm.weight": "self_attn.q_norm.weight",
    "attn.k_norm.weight": "self_attn.k_norm.weight",
    "mlp.gate_up.weight": "mlp.gate_proj.weight mlp.up_proj.weight",
    "mlp.down.weight": "mlp.down_proj.weight",
    "mlp.router": "mlp.gate.weight",
    "mlp.gate_up": "mlp.experts.*.gate_proj.weight mlp.experts.*.up_proj.weight",
    "mlp.down": "mlp.experts.*.down_proj.weight",
    "mlp.shared.gate_up.weight": "mlp.shared_expert.gate_proj.weight "
    "mlp.shared_expert.up_proj.weight",
    "mlp.shared.down.weight": "mlp.shared_expert.down_proj.weight",
    "mlp.shared_gate.weight": "mlp.shared_expert_gate.weight",
    "attn_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "norm.weight": "model.norm.weight",
    "untied_head.weight": "lm_head.weight",
}


@dataclass(frozen=True)
class Config:
    # fmt: off
    hf_dir: str = ""                   # Hugging Face folder; export writes it, so it must not exist
    init_from: str = ""                # export: run or checkpoint of ours
    out_dir: str = ""                  # import: run directory to write, must be new or empty
    # fmt: on


def source(folder):
    """-> checkpoint.Source of a folder of transformers"""
    return checkpoint.Source(
        folder,
        dict(model=read_config(folder)),
        lambda model: load_weights(folder, model),
        lambda: load_tokenizer(folder).fingerprint,
        lambda: weights_id(folder),
    )


def load_weights(folder, model):
    """
    Fill model, of the folder's config but for a larger vocabulary: additional rows of embedding and
    head are the mean of the folder's rows plus the model's own initialisation, so that they differ.
    Prints how many.
    """
    weights, theirs = model.state_dict(), read_weights(folder)  # ours with vision: no folder has it
    tied = _read_json(Path(folder, "config.json")).get("tie_word_embeddings")
    if tied and "untied_head.weight" in theirs and dist.world()[0] == 0:
        print(
            f"{folder}: lm_head.weight is not the embedding, though config.json ties them: "
            "it is used, untied"
        )
    for name, weight in theirs.items():
        expected = weights[name]
        may_grow = name in ("embed.weight", "untied_head.weight")
        rows = len(weight if may_grow else expected)
        if weight.shape != expected[:rows].shape:
            raise UserError(
                f"{folder}: {name} (as it is called here) has the shape {list(weight.shape)}; "
                f"config.json says {list(expected.shape)}"
            )
        added = expected[rows:]
        if len(added):
            mean = weight.float().mean(dim=0).to(added)
            weight = torch.cat([weight.to(added), mean + added])
            if name == "embed.weight" and dist.world()[0] == 0:
                print(f"{folder}: {len(added)} rows are added for tokens that its embedding lacks")
        weights[name] = weight
    model.load_state_dict(weights)


def weights_id(folder):
    """-> sha256 of config and weights, as hex"""
    sha = hashlib.sha256()
    for path in sorted(Path(folder).iterdir()):
        if path.name == "config.json" or path.suffix == ".safetensors":
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").digest()
            sha.update(path.name.encode() + digest)
    return sha.hexdigest()


def read_config(folder):
    """-> dict of ModelConfig's fields. UserError names what is not supported."""
    path = Path(folder, "config.json")
    given = _read_json(path)
    try:
        config = our_config(given)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return config | dict(tie_embeddings=config["tie_embeddings"] and not _has_own_head(folder))


def _has_own_head(folder):
    """Whether its files hold a head that is not the embedding, whatever config.json says"""
    if not any(Path(folder, name).exists() for name in (INDEX, SINGLE)):
        return False
    tensors, names = _open_tensors(folder), ("model.embed_tokens.weight", "lm_head.weight")
    if not set(names) <= tensors.keys():
        return False
    return not torch.equal(*(tensors[name].get_tensor(name) for name in names))


def _read_json(path):
    try:
        content = json.loads(path.read_text("utf-8"))
        if not isinstance(content, dict):
            raise ValueError("expected an object")
        return content
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: missing or damaged ({error})") from None


# -----------------------------------------------------------------------------
# weights


def names(c):
    """
    c: ModelConfig. Yield (our name, their names, their rows) for each tensor; ours is
    theirs stacked
    """
    table = TENSORS | FAMILIES[model_type_of(c)].tensors
    with torch.device("meta"):
        weights = GPT(c).state_dict()
    for ours, weight in weights.items():
        name, prefix = ours, ""
        if ours.startswith("blocks."):
            _, layer, name = ours.split(".", 2)
            prefix = f"model.layers.{layer}."
        theirs = [prefix + tensor for tensor in table[name].split()]
        if weight.ndim == 3:  # of experts
            theirs = [x.replace("*", str(e)) for e in range(len(weight)) for x in theirs]
            weight = weight.flatten(0, 1)
        rows = [len(weight) // len(theirs)] * len(theirs)
        if name.startswith("attn.qkv."):
            rows = [n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head)]
        yield ours, theirs, rows


def read_weights(folder):
    """
    -> our state dict, in the dtype of the files. UserError names a tensor that is missing, left
    over or of another shape.
    """
    c, files, weights = ModelConfig(**read_config(folder)), _open_tensors(folder), {}
    for ours, theirs, sizes in names(c):
        tensors = []
        for name, rows in zip(theirs, sizes):
            if name not in files:
                raise UserError(f"{folder}: the tensor {name} is missing")
            tensors.append(files.pop(name).get_tensor(name))
            shape, columns = list(tensors[-1].shape), list(tensors[0].shape[1:])
            if shape != [rows, *columns]:
                raise UserError(
                    f"{folder}: {name} has the shape {shape}; expected {rows} rows as "
                    f"config.json says, of {columns} numbers"
                )
        weights[ours] = torch.cat(tensors)
        if ours.endswith(("mlp.gate_up", "mlp.down")):  # of experts: one more axis
            weights[ours] = weights[ours].unflatten(0, (c.n_expert, -1))
    if c.tie_embeddings:
        # a copy of the embedding, in some files
        files.pop("lm_head.weight", None)
    # computed anew
    left = [name for name in files if not name.endswith(".rotary_emb.inv_freq")]
    if left:
        raise UserError(
            f"{folder}: {left[0]}: unknown tensor ({len(left)} in all); what it does is not "
            "supported"
        )
    return weights


def _open_tensors(folder):
    """-> dict of tensor name to the open file that holds it: those of the index, or one file"""
    index, single = Path(folder, INDEX), Path(folder, SINGLE)
    if not index.exists() and not single.exists():
        raise UserError(
            f"{folder}: no model.safetensors and no index of several; other formats, such "
            "as pytorch_model.bin, are not read"
        )
    if not index.exists():
        return _open_file(single)
    where, tensors = _read_json(index).get("weight_map"), {}
    if not isinstance(where, dict) or any(Path(str(name)).name != name for name in where.values()):
        raise UserError(f"{index}: expected a weight_map of tensor names to files beside it")
    files = {name: _open_file(Path(folder, name)) for name in sorted(set(where.values()))}
    for tensor, name in where.items():
        if tensor not in files[name]:
            raise UserError(f"{index}: {tensor} is not in {name}")
        tensors[tensor] = files[name][tensor]
    return tensors


def _open_file(path):
    """-> dict of each tensor's name to the open file"""
    safetensors = _safetensors()
    try:
        file = safetensors.safe_open(path, "pt")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path}: missing or damaged ({error})") from None
    return dict.fromkeys(file.keys(), file)


def write(folder, c, weights, ends, files, shard_bytes=5 * 10**9):
    """
    Write a folder that transformers loads, whole or not at all. c: ModelConfig, resolved; weights:
    our state dict; ends: ids that end a text; files: {name: bytes}, the tokenizer's.
    """
    save_file = _safetensors().torch.save_file
    folder, partial = Path(folder), Path(f"{Path(folder)}.partial")
    if folder.exists():
        raise UserError(f"{folder}: already there; remove it or choose another")
    shards, index = _shards(c, weights, shard_bytes)
    texts = {
        "config.json": config_json(c, weights["embed.weight"].dtype, ends),
        "generation_config.json": dict(eos_token_id=one_or_all(ends)),
    }
    if len(shards) > 1:
        texts[INDEX] = index
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, content in files.items():
            (partial / name).write_bytes(content)
        for name, content in texts.items():
            (partial / name).write_text(json.dumps(content, indent=1) + "\n")
        for name, shard in shards.items():
            save_file(shard, partial / name, metadata={"format": "pt"})
            # safetensors writes for the owner alone
            (partial / name).chmod((partial / "config.json").stat().st_mode)
        partial.rename(folder)
    # OSError, or safetensors' own on a full disk
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder}: cannot be written ({error})") from None


def _shards(c, weights, shard_bytes):
    """weights: our state dict -> {name of a file: {their name: tensor}}, and the index of these"""
    shards, total, room = [], 0, -1
    for ours, theirs, rows in names(c):
        weight = weights[ours]
        if weight.ndim == 3:  # of experts
            weight = weight.flatten(0, 1)
        for name, tensor in zip(theirs, weight.split(rows)):
            if tensor.nbytes > room:
                shards.append({})
                room = shard_bytes
            shards[-1][name] = tensor.contiguous()
            room -= tensor.nbytes
            total += tensor.nbytes
    n = len(shards)
    files = {f"model-{i:05d}-of-{n:05d}.safetensors": shard for i, shard in enumerate(shards, 1)}
    if n == 1:
        files = {SINGLE: shards[0]}
    where = {tensor: name for name, shard in files.items() for tensor in shard}
    return files, dict(metadata=dict(total_size=total), weight_map=where)


def _safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(
            "safetensors is missing, which reads and writes Hugging Face's files: "
            'pip install safetensors, or this package with its extra "hf"'
        ) from None
    return safetensors


# -----------------------------------------------------------------------------
# from the command line


def export_run(init_from, hf_dir):
    """init_from: run or checkpoint of ours -> text, what has been written to hf_dir"""
    saved = checkpoint.checkpoint_source(checkpoint.find(init_from))
    dtype = getattr(torch, saved.manifest["config"].get("param_dtype", "float32"))
    model = GPT(ModelConfig(**saved.manifest["model"])).to(dtype)
    saved.load(model)
    tokenizer = load_tokenizer(saved.folder)
    files = tokenizer.files() | tokenizer_files(tokenizer)
    write(hf_dir, model.config, model.state_dict(), tokenizer.ends, files)
    return f"{hf_dir}: {model.size()} of {saved.folder}"


def import_folder(hf_dir, out_dir):
    """hf_dir: folder of transformers -> text, what has been written to out_dir, as a run of ours"""
    check_run_directory(out_dir, False)
    config = ModelConfig(**read_config(hf_dir)).resolved()
    tokenizer = load_tokenizer(hf_dir)
    # of additional rows, for our own tokens
    torch.manual_seed(0)
    model = GPT(config.continued(config, config.seq_len, tokenizer.vocab_size))
    load_weights(hf_dir, model)
    Path(out_dir).mkdir(parents=True, exist_ok=True)
    info = dict(
        model=asdict(model.config), config={}, identity={}, fingerprint=tokenizer.fingerprint
    )
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
        raise UserError(
            "expected: python -m extras.hf import --hf_dir=FOLDER --out_dir=RUN, or "
            "export --init_from=RUN --hf_dir=FOLDER"
        )
