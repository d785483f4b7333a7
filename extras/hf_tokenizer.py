"""
Tokenizers of Hugging Face folders: byte-level BPE in tokenizer.json, SentencePiece in
tokenizer.model, or GPT-2's vocab.json and merges.txt. `common.tokenizer.load_tokenizer` calls
`load` for such a folder; what comes of it is saved beside sets and checkpoints as plain data, and
needs this file no more.
"""

import base64
import json
import os
import re

from common.chat import ROLES, encode_chat
from common.errors import UserError
from common.tokenizer import Tokenizer, read_file
from extras import hf_chat

# larger than any vocabulary
MOST_IDS = 10_000_000
# what a folder's tokenizer is made of, which an export copies
ORIGINALS = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def load(folder):
    """-> Tokenizer; UserError, or ValueError, KeyError, TypeError where a file is damaged"""
    paths = {name: os.path.join(folder, name) for name in ORIGINALS}
    files = {name: read_file(path) for name, path in paths.items() if os.path.isfile(path)}
    file = _read_json(folder, "tokenizer.json")
    config = _read_json(folder, "tokenizer_config.json")
    if not file and "tokenizer.model" not in files:
        vocabulary = "tiktoken", _read_gpt2_files(folder, config), "gpt2"
        return Tokenizer(*vocabulary)
    added = dict(config.get("added_tokens_decoder", {}))  # id (as a str): token
    added |= {str(token["id"]): token for token in file.get("added_tokens", [])}
    tokens = {token["content"]: int(i) for i, token in added.items()}
    ids, splits, nfc = dict(tokens), [], False
    if "ByteLevel" in json.dumps(file.get("pre_tokenizer")):
        pattern, splits, nfc, lines = _read_byte_level(file, tokens, folder)
        vocabulary = "tiktoken", lines, pattern
        ids |= file["model"]["vocab"]
    elif "tokenizer.model" in files:
        vocabulary = "sentencepiece", files["tokenizer.model"], ""
        pieces = Tokenizer(*vocabulary).bpe
        ids |= {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    else:
        raise UserError(
            f"--tokenizer={folder}: tokenizer.json is not byte-level BPE, and there is no "
            "SentencePiece tokenizer.model; other kinds are not supported"
        )
    template = _template(files, config)
    ends = _ends(folder, config, ids)
    known = set(ids.values())
    for end in ends:
        if end not in known:
            raise UserError(
                f"--tokenizer={folder}: eos_token_id={json.dumps(end)}: not an id of this "
                "vocabulary"
            )
    names = {name: _content(config.get(name)) or "" for name in ("bos_token", "eos_token")}
    tokens |= {text: ids[text] for text in names.values() if text in ids}
    if not all(isinstance(text, str) and 0 <= i < MOST_IDS for text, i in tokens.items()):
        raise ValueError("an added token without a text, or with an id that cannot be")
    special = {"end": ends[0]} if ends else {}
    if {"<think>", "</think>"} <= ids.keys():
        special |= {"think": ids["<think>"], "/think": ids["</think>"]}
    silent = {*special.values(), *ends}
    texts = {i: "" if token["special"] else token["content"] for i, token in added.items()}
    texts |= {str(i): "" for i in silent}
    extra = dict(
        special=special,
        added=texts,
        nfc=nfc,
        splits=splits,
        tokens=tokens,
        literal=_literal(folder, added.values(), tokens, template, ends),
        begin=[],
        ends=ends,
        markers={},
        template=template,
        names=names,
    )
    tokenizer = Tokenizer(*vocabulary, extra)
    begin = _begin(file, config, ids)
    if template:
        begin, turn_end = _of_template(tokenizer, begin)
        ends += [end for end in turn_end if end not in ends]
    else:
        extra["markers"] = _role_markers(tokenizer, ids)
    return Tokenizer(*vocabulary, extra | dict(begin=begin, ends=ends), files)


def _template(files, config):
    """-> the folder's chat template, or \"\"; of several named ones the default"""
    template = config.get("chat_template") or ""
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}.get("default", "")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode()
    try:
        hf_chat.compiled(template)
    except Exception as error:  # of jinja, or a template that is no text
        raise ValueError(f"chat_template: {' '.join(str(error).split())}") from None
    return template


def _of_template(tokenizer, begin):
    """
    -> ids that a text begins with: `begin`, or the bos_token where the template writes it; the ids
    that end an assistant's turn there, [] where none does
    """
    said = [dict(role="user", content="a"), dict(role="assistant", content="b")]
    try:
        ((ids, learned),) = encode_chat(tokenizer, [said], answer_tags=False)
    except ValueError:  # a template that wants other conversations
        return begin, []
    bos = tokenizer.extra["tokens"].get(tokenizer.extra["names"]["bos_token"])
    last = [i for i, learn in zip(ids, learned) if learn][-1]
    # a token that opens every turn (SmolLM2's) begins no text
    begins = [bos] if ids[:1] == [bos] and ids.count(bos) == 1 else begin
    return begins, [last] if last in tokenizer.extra["tokens"].values() else []


def _literal(folder, added, tokens, template, ends):
    """-> dict of text to id of the added tokens that are read in a text; UserError"""
    literal = {}
    for token in added:
        if token["special"] and token["content"] not in template:
            continue
        if token.get("lstrip") or token.get("rstrip") or token.get("single_word"):
            raise UserError(
                f"--tokenizer={folder}: the added token {token['content']!r} has lstrip, rstrip or "
                "single_word, which is not supported"
            )
        # whatever a file says of an end: nobody types it
        if not token["special"] and tokens[token["content"]] not in ends:
            literal[token["content"]] = tokens[token["content"]]
    return literal


def _ends(folder, config, ids):
    """
    -> list of the ids that end a text, from all files that name some; the tokenizer's own is the
    first if the model's files know it
    """
    ends = []
    for name in ("generation_config.json", "config.json"):
        named = _read_json(folder, name).get("eos_token_id")
        ends += named if isinstance(named, list) else [named]
    ends = [end for end in ends if end is not None]
    own = ids.get(_content(config.get("eos_token")))
    if own is None:
        return list(dict.fromkeys(ends))
    return list(dict.fromkeys([own, *ends] if own in ends or not ends else [*ends, own]))


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
    tokenizer.json, dict of added tokens to ids -> pattern, patterns that split before it, whether
    it normalises to NFC, lines of ranks
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
    *splits, pattern = _split_patterns(file["pre_tokenizer"]) or [None]
    if not pattern:
        refuse("a pre_tokenizer", file["pre_tokenizer"])
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    alphabet, others = set(_printable().values()), ()
    # a piece that is a token is that token
    if model.get("ignore_merges"):
        others = [
            token for token in model["vocab"] if alphabet.issuperset(token) and token not in added
        ]
    first_free = 1 + max([*model["vocab"].values(), *added.values()], default=-1)
    return pattern, splits, bool(kinds), _ranks(model["vocab"], merges, others, first_free)


def _split_patterns(pre):
    """
    pre: pre_tokenizer of tokenizer.json -> patterns of Tokenizer, which split a text one after the
    other; None where it is not supported
    """
    *steps, last = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    if last["type"] != "ByteLevel" or last["add_prefix_space"]:
        return None
    patterns = []
    for step in steps:
        if step == {"type": "Digits", "individual_digits": True}:
            patterns.append(r"\p{N}")
            continue
        # what a pattern matches is a piece, and in the second form nothing else may be left
        forms = ("Isolated", False), ("Removed", True)
        if step["type"] != "Split" or (step["behavior"], step["invert"]) not in forms:
            return None
        patterns.append(step["pattern"].get("Regex") or re.escape(step["pattern"]["String"]))
    return [*patterns, "gpt2"] if last.get("use_regex", True) else patterns


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


def _ranks(vocab, merges, others=(), first_free=0):
    """
    vocab: dict of token, written in printable characters, to id; merges: list of pairs; others:
    tokens that no pair makes; first_free: id of the first byte that is no token, for texts that
    have it all the same -> lines of base64 and rank
    """
    to_byte = {c: b for b, c in _printable().items()}
    merged = [vocab["".join(pair)] for pair in merges]
    if merged != sorted(merged):
        raise ValueError("ids do not follow the order of merges, which is not supported")
    lacking = [c for c in to_byte if c not in vocab]
    if len(lacking) == 256 or lacking and not first_free:
        raise ValueError(f"{len(lacking)} of the 256 bytes are no tokens")
    vocab = vocab | {c: first_free + i for i, c in enumerate(lacking)}
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
