"""
Tokenizers of Hugging Face folders: byte-level BPE in tokenizer.json, SentencePiece in
tokenizer.model, or GPT-2's vocab.json and merges.txt. `common.tokenizer.load_tokenizer` calls
`load` for such a folder; what comes of it is saved beside sets and checkpoints as plain data, and
needs this file no more.
"""

import base64
import json
import os

from common.chat import ROLES
from common.errors import UserError
from common.tokenizer import Tokenizer, read_file

# how GPT-2's pattern splits what is left between digits, each of which is a piece by itself
GPT2_DIGITS = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s"


def load(folder):
    """-> Tokenizer; UserError, or ValueError, KeyError, TypeError where a file is damaged"""
    file = _read_json(folder, "tokenizer.json")
    config = _read_json(folder, "tokenizer_config.json")
    has_model = os.path.isfile(os.path.join(folder, "tokenizer.model"))
    if not os.path.isfile(os.path.join(folder, "tokenizer.json")) and not has_model:
        return Tokenizer("tiktoken", _read_gpt2_files(folder, config), "gpt2")
    added = dict(config.get("added_tokens_decoder", {}))  # id (as a str): token
    added |= {str(token["id"]): token for token in file.get("added_tokens", [])}
    texts = {i: "" if token["special"] else token["content"] for i, token in added.items()}
    ids = {token["content"]: int(i) for i, token in added.items()}
    known, nfc = set(), False
    if "ByteLevel" in json.dumps(file.get("pre_tokenizer")):
        pattern, nfc, lines = _read_byte_level(file, ids, folder)
        vocabulary = "tiktoken", lines, pattern
        known |= set(file["model"]["vocab"].values())
    elif has_model:
        vocabulary = "sentencepiece", read_file(os.path.join(folder, "tokenizer.model")), ""
        pieces = Tokenizer(*vocabulary).bpe
        ids |= {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    else:
        raise UserError(
            f"--tokenizer={folder}: tokenizer.json is not byte-level BPE, and there is no "
            "SentencePiece tokenizer.model; other kinds are not supported"
        )
    end = _end(folder, config, ids)
    if end is not None and end not in known | set(ids.values()):
        raise UserError(
            f"--tokenizer={folder}: eos_token_id={json.dumps(end)}: not an id of this vocabulary"
        )
    special = {}
    if {"<think>", "</think>"} <= ids.keys():
        special = {"think": ids["<think>"], "/think": ids["</think>"]}
    if end is not None:
        special["end"] = end
    texts |= {str(i): "" for i in special.values()}
    extra = dict(special=special, added=texts, nfc=nfc, begin=[], markers={})
    markers = _role_markers(Tokenizer(*vocabulary, extra), ids)
    return Tokenizer(*vocabulary, extra | dict(begin=_begin(file, config, ids), markers=markers))


def _end(folder, config, ids):
    """
    -> id that ends a turn, or None. An instructed model has several; the tokenizer's own is
    preferred
    """
    for name in ("generation_config.json", "config.json"):
        ends = _read_json(folder, name).get("eos_token_id")
        if ends is not None:
            break
    if not isinstance(ends, list):
        ends = [] if ends is None else [ends]
    named = ids.get(_content(config.get("eos_token")))
    if named is not None and (named in ends or not ends):
        return named
    return ends[0] if ends else None


def _content(token):
    """token: of tokenizer_config.json, a str or an object"""
    return token["content"] if isinstance(token, dict) else token


def _begin(file, config, ids):
    """tokenizer.json and tokenizer_config.json, ids of tokens -> ids that every text begins with"""
    steps = file.get("post_processor") or {}
    for step in steps.get("processors", [steps]):
        first = (step.get("single") or [{}])[0]
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in first:
            return [ids[first["SpecialToken"]["id"]]]
    bos = _content(config.get("bos_token"))
    return [ids[bos]] if config.get("add_bos_token") and bos in ids else []


def _role_markers(tokenizer, ids):
    """
    ids: dict of a folder's added tokens -> the ids its models read as roles and ends of turns, if
    known
    """

    def marker(*parts):
        return [
            i for part in parts for i in ([ids[part]] if part in ids else tokenizer.encode(part))
        ]

    def ends_with(end, *others):
        return {end, *others} <= ids.keys() and tokenizer.end == ids[end]

    if ends_with("<|im_end|>", "<|im_start|>"):  # ChatML
        markers = {role: marker("<|im_start|>", role + "\n") for role in ROLES}
        return markers | dict(end=marker("<|im_end|>", "\n"))
    if ends_with("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"):  # Llama 3
        return {
            role: marker("<|start_header_id|>", role, "<|end_header_id|>", "\n\n") for role in ROLES
        }
    return {}


def _read_byte_level(file, added, folder):
    """
    tokenizer.json, dict of added tokens to ids -> pattern, whether it normalises to NFC, lines of
    ranks
    """

    def refuse(name, value):
        raise UserError(
            f"--tokenizer={folder}: tokenizer.json has {name} {json.dumps(value)[:120]}, "
            "which is not supported"
        )

    model = file["model"]
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            refuse(name, model[name])
    if model.get("type", "BPE") != "BPE":
        refuse("a model", model["type"])
    normalizer = file.get("normalizer") or dict(type="Sequence", normalizers=[])
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    kinds = [step["type"] for step in steps]
    if kinds not in ([], ["NFC"]):
        refuse("a normalizer", normalizer)
    pattern = _split_pattern(file["pre_tokenizer"])
    if not pattern:
        refuse("a pre_tokenizer", file["pre_tokenizer"])
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    alphabet, others = set(_printable().values()), ()
    # a piece that is a token is that token
    if model.get("ignore_merges"):
        others = [
            token for token in model["vocab"] if alphabet.issuperset(token) and token not in added
        ]
    return pattern, bool(kinds), _ranks(model["vocab"], merges, others)


def _split_pattern(pre):
    """
    pre: pre_tokenizer of tokenizer.json -> pattern of Tokenizer, or None where it is not supported
    """
    *splits, last = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    if last.get("use_regex", True):
        digits = splits == [{"type": "Digits", "individual_digits": True}]
        if digits:
            return GPT2_DIGITS
        return None if splits else "gpt2"
    if [split["type"] for split in splits] == ["Split"]:
        (split,) = splits
        if split["behavior"] == "Isolated" and not split["invert"]:
            return split["pattern"].get("Regex")
    return None


def _read_gpt2_files(folder, config):
    """vocab.json and merges.txt -> the same as a .tiktoken rank file"""
    kind = config.get("tokenizer_class", "GPT2Tokenizer")
    if not kind.startswith("GPT2"):  # splits text in another way
        raise UserError(
            f"--tokenizer={folder}: a {kind} with vocab.json and merges.txt only; "
            "its tokenizer.json is needed"
        )
    merges = read_file(os.path.join(folder, "merges.txt")).decode().splitlines()
    return _ranks(
        json.loads(read_file(os.path.join(folder, "vocab.json"))),
        [line.split() for line in merges if line and not line.startswith("#version")],
    )


def _printable():
    """
    -> dict of byte to the character that stands for it in GPT-2's files: the visible ones for
    themselves, for the others U+0100 and on
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(0x100 + i) for i, b in enumerate(hidden)}


def _ranks(vocab, merges, others=()):
    """
    vocab: dict of token, written in printable characters, to id; merges: list of pairs; others:
    tokens that no pair makes -> lines of base64 and rank
    """
    to_byte = {c: b for b, c in _printable().items()}
    merged = [vocab["".join(pair)] for pair in merges]
    if merged != sorted(merged):
        raise ValueError("ids do not follow the order of merges, which is not supported")
    tokens = {*to_byte, *map("".join, merges), *others}
    ranks = sorted((vocab[token], bytes(to_byte[c] for c in token)) for token in tokens)
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in ranks)


def _read_json(folder, name):
    """-> dict, {} where there is no such file"""
    path = os.path.join(folder, name)
    content = json.loads(read_file(path)) if os.path.isfile(path) else {}
    if not isinstance(content, dict):
        raise ValueError(f"{name}: expected an object")
    return content
