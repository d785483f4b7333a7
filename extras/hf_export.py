"""
A tokenizer of ours as files that transformers and tokenizers load, with our ids for any text:
tokenizer.json, tokenizer_config.json and chat_template.jinja.
"""

import base64
import io
import json
import re
from string import Template

from common.errors import UserError
from common.tokenizer import PATTERNS
from extras.hf_tokenizer import _printable

# PATTERNS for Oniguruma, where $ ends a line and {1,3}+ is {1,3} once or more
SPLITS = {
    name: pattern.replace("{1,3}+", "{1,3}").replace("$", r"\z")
    for name, pattern in PATTERNS.items()
}

# common/chat.py; transformers' name for thoughts will do too. $MARKS: texts of special tokens
CHAT = """\
{%- set mark = $MARKS -%}
{%- set tags = answer_tags | default(true) -%}
{{- mark["begin"] -}}
{%- for message in messages -%}
  {%- if message.role not in ["system", "user", "assistant"] -%}
    {{- raise_exception("unknown role " ~ message.role) -}}
  {%- endif -%}
  {{- mark[message.role] -}}
  {%- set think = message.think if message.think is defined else message.reasoning_content -%}
  {%- if think is string -%}
    {{- mark["think"] + think + mark["/think"] -}}
  {%- endif -%}
  {%- if message.role == "assistant" and tags -%}
    {{- mark["answer"] + message.content + mark["/answer"] + mark["end"] -}}
  {%- else -%}
    {{- message.content + mark["end"] -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- mark["assistant"] -}}
{%- endif -%}
"""

CONFIG = """{
 "tokenizer_class": "PreTrainedTokenizerFast",
 "bos_token": $BOS,
 "eos_token": $EOS,
 "pad_token": $PAD,
 "model_input_names": ["input_ids", "attention_mask"],
 "clean_up_tokenization_spaces": false
}"""
BEGIN = """{
 "type": "TemplateProcessing",
 "single": [{"SpecialToken": {"id": $BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
 "pair": [{"SpecialToken": {"id": $BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
  {"Sequence": {"id": "B", "type_id": 1}}],
 "special_tokens": {$BOS: {"id": $BOS, "ids": $IDS, "tokens": [$BOS]}}
}"""
BYTE_LEVEL = """{
 "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
  {"type": "Split", "pattern": {"Regex": $SPLIT}, "behavior": "Isolated", "invert": false},
  {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}]},
 "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false}
}"""
# steps of SentencePiece's Normalizer::Normalize. (?!) in the others: nothing
NORMALIZERS = """[
 {"type": "Precompiled", "precompiled_charsmap": $CHARSMAP},
 {"type": "Replace", "pattern": {"Regex": "\\\\A +|[ \u2581]+\\\\z"}, "content": ""},
 {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
 {"type": "Prepend", "prepend": "\u2581"},
 {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
]"""
SENTENCEPIECE = """{
 "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
  {"type": "Split", "pattern": {"Regex": $FROZEN}, "behavior": "Isolated", "invert": false},
  {"type": "Split", "pattern": {"Regex": $BYTES}, "behavior": "MergedWithPrevious",
   "invert": false}]},
 "decoder": {"type": "Sequence", "decoders": [
  {"type": "Replace", "pattern": {"String": $UNKNOWN}, "content": " \u2047 "},
  {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
  {"type": "ByteFallback"},
  {"type": "Fuse"},
  {"type": "Strip", "content": " ", "start": $DROPPED, "stop": 0}]}
}"""
UNIGRAM, BPE = 1, 2  # of sentencepiece_model.proto, as are the numbers of fields below
USER_DEFINED = 4


def tokenizer_files(tokenizer, ends=None):
    """
    tokenizer: of common.tokenizer; ends: ids that end a text, the first of which is eos_token, or
    None -> dict of file name to bytes. Files of the folder that the vocabulary is from
    (`tokenizer.originals`) say what they did, but for the tokens that we have added to its own.

    Our special tokens are written as <|llm:user|>; other text that looks like one stays text.
    UserError where a SentencePiece vocabulary is neither BPE nor unigram.
    """
    files = dict(getattr(tokenizer, "originals", {}))
    names, added = _names(tokenizer)
    if files.keys() & {"tokenizer.json", "tokenizer.model"}:
        ours = tokenizer.special_names.keys() - tokenizer.extra["special"].values()
        added = [token for token in added if token["id"] in ours]
    if "tokenizer.json" in files:
        file = json.loads(files["tokenizer.json"])
        _extend(file, tokenizer, added)
        for token in file["added_tokens"]:
            names[token["id"]] = token["content"]
        files["tokenizer.json"] = _json(file)
    elif "tokenizer.model" not in files:
        files["tokenizer.json"] = _json(_build(tokenizer, names, added))
    end = ends[0] if ends else tokenizer.end
    bos = [names[i] for i in tokenizer.begin] or [None]
    config = _fill(CONFIG, BOS=bos[0], EOS=names[end], PAD=names[tokenizer.pad])
    config = json.loads(files.get("tokenizer_config.json", config))
    if "added_tokens_decoder" in config:
        for token in added:
            fields = dict(token)
            config["added_tokens_decoder"][str(fields.pop("id"))] = fields
    files["tokenizer_config.json"] = _json(config)
    if not any("chat_template" in name for name in (*files, *config)):
        files["chat_template.jinja"] = _chat(tokenizer, names).encode()
    return files


def _json(content):
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def _fill(text, **values):
    """-> text with values, as JSON, in the places of their $NAMES"""
    values = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    return Template(text).substitute(values)


def _chat(tokenizer, names):
    marks = {}
    for name, ids in dict(tokenizer.markers, begin=tokenizer.begin).items():
        marks[name] = b"".join(tokenizer.token_bytes[i] or names[i].encode() for i in ids).decode()
    return _fill(CHAT, MARKS=marks)


def _names(tokenizer):
    """-> list of what is written for each id; list of tokenizer.json's added tokens"""
    texts = tokenizer.extra["added"] if tokenizer.extra else {}
    names, added, printable = [], [], _printable()
    for i, token in enumerate(tokenizer.token_bytes):
        text = texts.get(str(i))
        name = f"<|llm:{tokenizer.special_names.get(i, i)}|>"
        if text or not token:
            name = text or name
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            added.append(dict(id=i, content=name, special=not text, **flags))
        elif tokenizer.kind != "sentencepiece":
            name = "".join(printable[byte] for byte in token)
        elif i != tokenizer.bpe.unk_id():
            name = tokenizer.bpe.id_to_piece(i)
        names.append(name)
    return names, added


def _extend(file, tokenizer, ours):
    """Enter our tokens into a folder's tokenizer.json, and bytes that its vocabulary lacks."""
    vocab = file["model"]["vocab"]
    file["added_tokens"] += ours
    if tokenizer.kind == "tiktoken":
        for byte, char in _printable().items():
            if char not in vocab:
                vocab[char] = tokenizer.token_bytes.index(bytes([byte]))
    missing = {t["content"]: t["id"] for t in file["added_tokens"] if t["content"] not in vocab}
    counted = range(len(vocab), len(vocab) + len(missing))
    # tokenizers counts them on from the vocabulary's length, whatever ids the file says
    if isinstance(vocab, dict) and [*missing.values()] != [*counted]:
        vocab |= missing


def _build(tokenizer, names, added):
    """names, added: of `_names` -> content of tokenizer.json"""
    base = set(range(len(names))) - {token["id"] for token in added}
    if tokenizer.kind == "sentencepiece":
        file = _sentencepiece(tokenizer, names, base)
    else:
        split = SPLITS.get(tokenizer.pattern, tokenizer.pattern or r"[\s\S]+")
        file = json.loads(_fill(BYTE_LEVEL, SPLIT=split))
        if tokenizer.extra and tokenizer.extra["nfc"]:
            file["normalizer"] = dict(type="NFC")
        # a piece that is a token is that token
        file["model"] = dict(ignore_merges=True, merges=_merges([names[i] for i in sorted(base)]))
    # all in the vocabulary: an added token that is not has the next free id, not its own
    file["model"].setdefault("type", "BPE")
    file["model"].setdefault("vocab", {name: i for i, name in enumerate(names)})
    if tokenizer.begin:
        (i,) = tokenizer.begin
        file["post_processor"] = json.loads(_fill(BEGIN, BOS=names[i], IDS=[i]))
    return dict(version="1.0", added_tokens=added, **file)


def _merges(tokens):
    """
    tokens: list of str in the order of merging -> list of pairs: the two parts of each that earlier
    merges leave of it. In no text can it come from others: what is merged inside of a token does
    not depend on what is around it.
    """
    ranks, merges = {token: rank for rank, token in enumerate(tokens)}, []
    for token, rank in ranks.items():
        parts = [*token]
        while len(parts) > 2:
            joined = [a + b for a, b in zip(parts, parts[1:])]
            found = [ranks.get(pair, rank) for pair in joined]
            best = min(found)
            if best >= rank:
                break
            at = found.index(best)
            parts[at : at + 2] = [joined[at]]
        if len(parts) == 2 and ranks.keys() >= {*parts}:
            merges.append(parts)
    return merges


def _sentencepiece(tokenizer, names, base):
    """base: ids of the pieces that stand for text -> fields of tokenizer.json"""
    bpe, proto = tokenizer.bpe, [*_fields(tokenizer.vocabulary)]
    trainer, rules = (dict(_fields(dict(proto).get(number, b""))) for number in (2, 3))
    kind = trainer.get(3, UNIGRAM)
    if kind not in (UNIGRAM, BPE) or trainer.get(24):
        raise UserError(
            "a SentencePiece vocabulary that is neither BPE nor unigram, or has spaces behind "
            "words, cannot be exported"
        )
    pieces = [dict(_fields(value)) for number, value in proto if number == 1]
    frozen = [piece[1].decode() for piece in pieces if piece.get(3) == USER_DEFINED]
    frozen.sort(key=len, reverse=True)
    unknown = names[bpe.unk_id()]
    file = json.loads(
        _fill(
            SENTENCEPIECE,
            FROZEN="|".join(map(re.escape, frozen)) or "(?!)",
            # tokenizers' unigram takes the text <0x0A> for the byte
            BYTES="<(?=0x[0-9A-F]{2}>)" if kind == UNIGRAM else "(?!)",
            UNKNOWN=unknown,
            DROPPED=int(tokenizer.drops_first_space),
        )
    )
    charsmap, spaces = rules.get(2, b""), rules.get(4, 1)
    steps = json.loads(_fill(NORMALIZERS, CHARSMAP=base64.b64encode(charsmap).decode()))
    wanted = zip(steps, (charsmap, spaces, spaces, rules.get(3, 1), True))
    steps = [step for step, is_wanted in wanted if is_wanted]
    file["normalizer"] = dict(type="Sequence", normalizers=steps)
    scores = [bpe.get_score(i) for i in range(len(bpe))] + [0.0] * (len(names) - len(bpe))
    model = dict(byte_fallback="<0x00>" in names)
    if kind == UNIGRAM:
        model |= dict(type="Unigram", vocab=[*zip(names, scores)], unk_id=bpe.unk_id())
    else:
        by_score = sorted(base, key=lambda i: (-scores[i], i))
        merged = [names[i] for i in by_score if not bpe.is_byte(i) and names[i] not in frozen]
        model |= dict(merges=_merges(merged), unk_token=unknown, fuse_unk=True)
        # a longer piece of these is a token that nothing is merged to
        model["ignore_merges"] = any(len(piece) > 1 for piece in frozen)
    return dict(file, model=model)


def _fields(message):
    """protobuf -> pairs of a field's number and its value, an int or bytes"""
    stream = io.BytesIO(message)
    while stream.tell() < len(message):
        number, wire = divmod(_varint(stream), 8)
        value = {1: 8, 5: 4}.get(wire) or _varint(stream)
        yield number, stream.read(value) if wire else value


def _varint(stream):
    value, shift, byte = 0, 0, 128
    while byte >= 128:
        (byte,) = stream.read(1)
        value |= byte % 128 << shift
        shift += 7
    return value
