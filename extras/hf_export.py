"""
A tokenizer of ours as files that transformers and tokenizers load, with our ids for any text:
tokenizer.json, tokenizer_config.json and chat_template.jinja.

Ids differ in three cases, all of SentencePiece. A vocabulary that normalises characters: tokenizers
looks them up by grapheme, and so differs on some with combining marks, jamo and half-width kana.
Unigram: of splits that are equally likely it may take another. User-defined pieces that the
normaliser changes are not found.

Where config.json has the model type qwen2, AutoTokenizer of transformers 5 reads vocabulary and
merges only; PreTrainedTokenizerFast.from_pretrained reads all.
"""

import base64
import json
import re
from itertools import compress, zip_longest
from string import Template

from common.errors import UserError
from common.tokenizer import PATTERNS
from extras.hf_tokenizer import _printable

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
# ignore_merges: as in tiktoken, a piece that is a token is that token
BYTE_LEVEL = """{
 "version": "1.0",
 "normalizer": $NORMALIZER,
 "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
  {"type": "Split", "pattern": {"Regex": $SPLIT}, "behavior": "Isolated", "invert": false},
  {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false}]},
 "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false},
 "model": {"type": "BPE", "vocab": $VOCAB, "merges": $MERGES, "ignore_merges": true}
}"""
# each kind of model reads the fields of "model" that it knows
SENTENCEPIECE = """{
 "version": "1.0",
 "normalizer": {"type": "Sequence", "normalizers": $NORMALIZERS},
 "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
  {"type": "Split", "pattern": {"Regex": $FROZEN}, "behavior": "Isolated", "invert": false},
  {"type": "Split", "pattern": {"Regex": $BYTES}, "behavior": "MergedWithPrevious",
   "invert": false}]},
 "decoder": {"type": "Sequence", "decoders": [
  {"type": "Replace", "pattern": {"String": $UNKNOWN}, "content": " \u2047 "},
  {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
  {"type": "ByteFallback"},
  {"type": "Fuse"},
  {"type": "Strip", "content": " ", "start": $DROPPED, "stop": 0}]},
 "model": {"type": $KIND, "vocab": $VOCAB, "merges": $MERGES, "byte_fallback": $FALLBACK,
  "unk_id": $UNKNOWN_ID, "unk_token": $UNKNOWN, "fuse_unk": true, "ignore_merges": $LONG}
}"""
# in the order of SentencePiece's Normalizer::Normalize; a vocabulary has some of these steps
NORMALIZERS = """[
 {"type": "Precompiled", "precompiled_charsmap": $CHARSMAP},
 {"type": "Replace", "pattern": {"Regex": "\\\\A +|[ \u2581]+\\\\z"}, "content": ""},
 {"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "},
 {"type": "Prepend", "prepend": "\u2581"},
 {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
]"""
FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
NEVER = "(?!)"  # as a regular expression


def tokenizer_files(tokenizer):
    """
    tokenizer: of common.tokenizer -> dict of file name to bytes. Files of the folder that the
    vocabulary is from (`tokenizer.originals`) say what they did, but for the tokens that we have
    added to its own.

    Our special tokens are written as <|llm:user|>; other text that looks like one stays text.
    UserError where a SentencePiece vocabulary is neither BPE nor unigram.
    """
    # of a tokenizer.model alone transformers makes a tokenizer with other ids
    files = dict(tokenizer.originals) if "tokenizer.json" in tokenizer.originals else {}
    names, added = _names(tokenizer)
    if files:
        theirs = tokenizer.extra["special"].values()
        added = {i: added[i] for i in tokenizer.special_names if i not in theirs}
        file = json.loads(files["tokenizer.json"])
        _extend(file, tokenizer, added, names)
    else:
        file = _build(tokenizer, names, added)
    files["tokenizer.json"] = json.dumps(file).encode()
    config = _fill(
        CONFIG,
        BOS=names[tokenizer.begin[0]] if tokenizer.begin else None,
        EOS=names[tokenizer.end],
        PAD=names[tokenizer.pad],
    )
    config = json.loads(files.get("tokenizer_config.json", config))
    if "added_tokens_decoder" in config:
        config["added_tokens_decoder"] |= {str(i): token for i, token in added.items()}
    files["tokenizer_config.json"] = json.dumps(config, indent=1).encode()
    if "chat_template" not in config:
        marks = {
            name: b"".join(tokenizer.token_bytes[i] or names[i].encode() for i in ids).decode()
            for name, ids in dict(tokenizer.markers, begin=tokenizer.begin).items()
        }
        template = tokenizer.template or _fill(CHAT, MARKS=marks)
        files["chat_template.jinja"] = template.encode()
    return files


def _fill(text, **values):
    """-> text with values, as JSON, in the places of their $NAMES"""
    values = {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}
    return Template(text).substitute(values)


def _names(tokenizer):
    """-> list of what stands for each id in the files; dict of id to added token"""
    texts = tokenizer.extra["added"] if tokenizer.extra else {}
    own = {}
    if tokenizer.template:
        # as its template writes them
        own = {i: text for text, i in tokenizer.extra["tokens"].items()}
    names, added, printable = [], {}, _printable()
    for i, token in enumerate(tokenizer.token_bytes):
        text = texts.get(str(i))
        name = text or own.get(i) or f"<|llm:{tokenizer.special_names.get(i, i)}|>"
        if text or not token:
            added[i] = dict(content=name, special=not text, **FLAGS)
        elif tokenizer.kind != "sentencepiece":
            name = "".join(printable[byte] for byte in token)
        elif not tokenizer.bpe.is_unknown(i):
            name = tokenizer.bpe.id_to_piece(i)
        names.append(name)
    return names, added


def _extend(file, tokenizer, added, names):
    """Enter our tokens into a folder's tokenizer.json, and bytes that its vocabulary lacks."""
    file["added_tokens"] += [dict(token, id=i) for i, token in added.items()]
    entries = {token["content"]: token["id"] for token in file["added_tokens"]}
    for name, i in entries.items():
        names[i] = name
    if tokenizer.kind == "tiktoken":
        vocab = file["model"]["vocab"]
        lacking = {char: byte for byte, char in _printable().items() if char not in vocab}
        for char, byte in lacking.items():
            entries[char] = tokenizer.token_bytes.index(bytes([byte]))
        # tokenizers numbers added tokens from the vocabulary's length on, whatever the file says
        if lacking or len(vocab | entries) < tokenizer.vocab_size:
            vocab |= entries


def _build(tokenizer, names, added):
    """names, added: of `_names` -> content of tokenizer.json"""
    # with the added ones, which would else be numbered from its length on, as in `_extend`
    vocab = {name: i for i, name in enumerate(names)}
    if tokenizer.kind == "sentencepiece":
        file = _sentencepiece(tokenizer, vocab)
    else:
        # in Oniguruma `$` ends a line, and {1,3}+ is {1,3} once or more
        known = PATTERNS.get(tokenizer.pattern, "").replace("{1,3}+", "{1,3}").replace("$", r"\z")
        nfc = tokenizer.extra and tokenizer.extra["nfc"]
        file = _fill(
            BYTE_LEVEL,
            NORMALIZER=dict(type="NFC") if nfc else None,
            SPLIT=known or tokenizer.pattern or r"[\s\S]+",
            VOCAB=vocab,
            MERGES=_merges(name for name, i in vocab.items() if i not in added),
        )
    file = json.loads(file)
    file["added_tokens"] = [dict(token, id=i) for i, token in added.items()]
    for i in tokenizer.begin:
        file["post_processor"] = json.loads(_fill(BEGIN, BOS=names[i], IDS=[i]))
    return file


def _merges(tokens):
    """
    tokens: str in the order of merging -> list of pairs: the two parts of each that earlier merges
    leave of it. No other pair makes it in any text, since merging inside a token does not depend
    on the text around it. A token that is left in more parts, or is one already, has no pair.
    """
    ranks, merges = {}, []
    for token in tokens:
        parts = [*token]
        while found := [
            (ranks[a + b], at) for at, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in ranks
        ]:
            _, at = min(found)
            parts[at : at + 2] = ["".join(parts[at : at + 2])]
        if len(parts) == 2:
            merges.append(parts)
        ranks[token] = len(ranks)
    return merges


def _sentencepiece(tokenizer, vocab):
    """vocab: name to id of all tokens -> text of tokenizer.json"""
    try:
        from sentencepiece.sentencepiece_model_pb2 import ModelProto
    except ImportError:
        raise UserError(
            "protobuf is missing, which reads a SentencePiece vocabulary for the export: "
            "pip install protobuf"
        ) from None
    proto = ModelProto.FromString(tokenizer.vocabulary)
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    is_unigram = trainer.model_type == trainer.UNIGRAM
    if not is_unigram and trainer.model_type != trainer.BPE or trainer.treat_whitespace_as_suffix:
        raise UserError(
            "this SentencePiece vocabulary is neither BPE nor unigram, or has spaces behind "
            "words, and cannot be exported"
        )
    # nothing is merged with these; the longest match counts
    frozen = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    frozen.sort(key=len, reverse=True)
    normal = [piece for piece in proto.pieces if piece.type == piece.NORMAL]
    normal.sort(key=lambda piece: -piece.score)
    scores = [piece.score for piece in proto.pieces]
    charsmap, spaces = rules.precompiled_charsmap, rules.remove_extra_whitespaces
    steps = json.loads(_fill(NORMALIZERS, CHARSMAP=base64.b64encode(charsmap).decode()))
    return _fill(
        SENTENCEPIECE,
        NORMALIZERS=[*compress(steps, (charsmap, spaces, spaces, rules.add_dummy_prefix, True))],
        FROZEN="|".join(map(re.escape, frozen)) or NEVER,
        # unigram of tokenizers reads the text <0x0A> as that byte
        BYTES="<(?=0x[0-9A-F]{2}>)" if is_unigram else NEVER,
        UNKNOWN=[*vocab][trainer.unk_id],
        UNKNOWN_ID=trainer.unk_id,
        DROPPED=int(tokenizer.drops_first_space),
        KIND="Unigram" if is_unigram else "BPE",
        VOCAB=[*zip_longest(vocab, scores, fillvalue=0)] if is_unigram else vocab,
        MERGES=_merges(piece.piece for piece in normal),
        FALLBACK=trainer.byte_fallback,
        # a frozen piece of several characters has no merges
        LONG=max(map(len, frozen), default=0) > 1,
    )
