"""
Text to token ids and back: bytes, tiktoken and SentencePiece behind one small class.

    tokenizer = load_tokenizer("bytes")       # or x.model, x.tiktoken, a folder with vocab.json + merges.txt,
    ids = tokenizer.encode("Good morrow!")    # gpt2, a Hugging Face folder, any data set or checkpoint folder
    text = tokenizer.decode(ids)

Special tokens come after the base vocabulary and are ids only: what a user writes is encoded as plain text.
The vocabulary of a Hugging Face folder has special tokens of its own: their ids are kept, the one that ends
its model's texts is `end`, and so are <think> and </think> where it has these; the others of ours come after
them all. A text begins as its model has learned it (`begin`), roles are written so in ChatML (Qwen), Llama 3.

The chat template, the same in every stage: `<role>` body `<end>` for each message, where the body of an
assistant is `<think>thoughts</think>` (if it has any) and `<answer>content</answer>`. A prompt for the next
reply ends with `<assistant>`.

Decoding joins the bytes that each token stands for. So streamed text is exactly the whole text: `Stream`
holds back half a UTF-8 character, and SentencePiece's spaces are bytes like any other.
"""
import base64
import codecs
import glob
import hashlib
import io
import json
import os
import re
import unicodedata

import numpy as np
import sentencepiece
import tiktoken

from common.errors import UserError

# "end" closes a turn and a document; "pad" is another token on purpose (else padding swallows the end)
SPECIAL_TOKENS = ("end", "pad", "user", "assistant", "system", "think", "/think", "answer", "/answer",
                  "image")

# How tiktoken vocabularies split text before merging; a rank file does not say. From their own definitions.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
              r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": "|".join([
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+"]),
}
# gpt2 in what is left between digits, each of which is by itself
GPT2_DIGITS = r"'(?:[sdmt]|ll|ve|re)|\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s"
INFO = "tokenizer_info.json"  # in every data set and checkpoint, beside the vocabulary file it names


class Tokenizer:
    """
    kind: bytes, tiktoken, sentencepiece. vocabulary: file content (b"" for bytes). pattern: key of PATTERNS,
    or a regular expression. extra, of a Hugging Face folder: dict of `special`, name to id of those of ours
    that it has; `added`, id (as a str) to text, "" for special tokens; `nfc`, whether text is normalised so;
    `begin` and `markers`, see below.

    vocab_size      base vocabulary and special tokens
    special         dict of special token name to id, special_names the reverse; `end`, `pad` as attributes
    markers         dict of special token name to the list of ids that the chat template writes for it
    begin           list of ids that every text and conversation begins with: [] or a token
    token_bytes     list of the bytes that each id stands for, b"" for special ones
    fingerprint     where it is equal, ids mean the same
    """

    def __init__(self, kind, vocabulary=b"", pattern="", extra=None):
        self.kind, self.vocabulary, self.pattern, self.extra = kind, vocabulary, pattern, extra
        self.drops_first_space = False
        if kind == "bytes":
            base = [bytes([i]) for i in range(256)]
        elif kind == "tiktoken":
            ranks = {base64.b64decode(token): int(rank) for token, rank in
                     (line.split() for line in vocabulary.splitlines() if line.strip())}
            if not ranks.keys() >= {bytes([i]) for i in range(256)} or min(ranks.values()) < 0 or \
                    len(set(ranks.values())) < len(ranks):
                raise ValueError("each of the 256 bytes must be a token, and ranks must differ")
            # what an expression from a file does not match is a piece too; tiktoken would drop it
            split = PATTERNS.get(pattern) or f"(?:{pattern})|(?:(?!{pattern})[\\s\\S])+"
            self.bpe = tiktoken.Encoding("common", pat_str=split, mergeable_ranks=ranks, special_tokens={})
            base = [b""] * (max(ranks.values()) + 1)
            for token, rank in ranks.items():
                base[rank] = token
            if pattern == "gpt2" and len(base) == 50256:
                base.append(b"")  # GPT-2 counts its <|endoftext|> in: ids stay comparable
        else:
            self.bpe = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
            base = [self._piece_bytes(i) for i in range(self.bpe.get_piece_size())]
            self.drops_first_space = self.bpe.encode("a", out_type=str)[0].startswith("\u2581")
        theirs = extra["special"] if extra else {}
        for i, text in sorted((int(i), text) for i, text in extra["added"].items()) if extra else ():
            base += [b""] * (i + 1 - len(base))
            base[i] = text.encode()
        ours = [name for name in SPECIAL_TOKENS if name not in theirs]
        self.special = {**theirs, **{name: len(base) + i for i, name in enumerate(ours)}}
        self.special_names = {i: name for name, i in self.special.items()}
        self.end, self.pad = self.special["end"], self.special["pad"]
        self.markers = {name: [i] for name, i in self.special.items()} | (extra["markers"] if extra else {})
        self.begin = extra["begin"] if extra else []
        self.token_bytes = base + [b""] * len(ours)
        self.vocab_size = len(self.token_bytes)
        content = json.dumps([kind, pattern, SPECIAL_TOKENS, *[extra] * bool(extra)]).encode() + vocabulary
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]

    def _piece_bytes(self, i):
        if self.bpe.is_byte(i):                               # "<0x0A>"
            return bytes([int(self.bpe.id_to_piece(i)[3:-1], 16)])
        if self.bpe.is_control(i) or self.bpe.is_unused(i):
            return b""
        piece = " \u2047 " if self.bpe.is_unknown(i) else self.bpe.id_to_piece(i)
        return piece.replace("\u2581", " ").encode()

    def encode(self, text):
        """-> list of int; special tokens written in the text are text"""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts, num_threads=2):
        """-> list of lists of int"""
        if self.kind == "bytes":
            return [list(text.encode()) for text in texts]
        if self.extra and self.extra["nfc"]:
            texts = [unicodedata.normalize("NFC", text) for text in texts]
        if self.kind == "tiktoken":
            return self.bpe.encode_ordinary_batch(texts, num_threads=num_threads)
        return self.bpe.encode(texts, num_threads=num_threads)

    def decode(self, ids, **how):
        """-> str. Bytes that are not UTF-8 become U+FFFD. how: see Stream."""
        stream = self.stream(**how)
        return "".join(map(stream.put, ids)) + stream.end()

    def stream(self, **how):
        """An incremental decoder; see Stream."""
        return Stream(self, **how)

    def files(self):
        """What `load_tokenizer` needs to make this tokenizer again: dict of file name to bytes."""
        name = {"bytes": None, "tiktoken": "tokenizer.tiktoken",
                "sentencepiece": "tokenizer.model"}[self.kind]
        info = dict(kind=self.kind, file=name, pattern=self.pattern, fingerprint=self.fingerprint)
        if self.extra:
            info["extra"] = self.extra
        vocabulary = {name: self.vocabulary} if name else {}
        return {INFO: (json.dumps(info, indent=1) + "\n").encode(), **vocabulary}


class Stream:
    """
    Incremental decoding: put(id) -> the text complete now, end() -> the rest. Their sum is decode(ids).

    show_special: write special tokens as <name>. hide_think: leave out what stands between <think> and
    </think>. continues: the ids go on from earlier text, so a leading space is a space (SentencePiece drops
    the first one of a text, which it has put there itself).
    """

    def __init__(self, tokenizer, show_special=False, hide_think=False, continues=False):
        self.tokenizer, self.show_special, self.hide_think = tokenizer, show_special, hide_think
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.drop_space, self.thinking = tokenizer.drops_first_space and not continues, False

    def put(self, token):
        t = self.tokenizer
        if name := t.special_names.get(token):                # a text ends here, and another one begins
            self.drop_space = t.drops_first_space
            text = "" if self.thinking else self.utf8.decode(b"", final=True)
            self.utf8.reset()
            if name in ("think", "/think"):
                self.thinking = self.hide_think and name == "think"
            return text + f"<{name}>" * self.show_special
        piece = t.token_bytes[token]
        if self.drop_space and piece:
            piece, self.drop_space = piece.removeprefix(b" "), False
        return "" if self.thinking else self.utf8.decode(piece)

    def end(self):
        return self.utf8.decode(b"", final=True)


# -----------------------------------------------------------------------------
# chat

ROLES = ("system", "user", "assistant")


def check_conversation(messages, with_images=False):
    """ValueError says what is wrong with a list of {"role", "content", "think"?}, where something is."""
    def is_part(part):
        return isinstance(part, dict) and part.get("type") in ("text", "image") and \
            isinstance(part.get("text"), str) == (part["type"] == "text")
    if not isinstance(messages, list) or not messages:
        raise ValueError("expected a list of messages")
    for message in messages:
        if isinstance(message, dict) and (isinstance(message.get("content"), list) or "images" in message) \
                and not with_images:
            raise ValueError("images are for `data/prepare.py images` and train_sft.py only")
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(content, str) and not (isinstance(content, list) and all(map(is_part, content))):
            raise ValueError('a message is {"role": "...", "content": "..."}')
        if message.get("role") not in ROLES:
            raise ValueError(f"unknown role {str(message.get('role'))[:40]!r}, expected {', '.join(ROLES)}")
        if unknown := message.keys() - {"role", "content", "think"}:
            raise ValueError(f"a message has role, content and maybe think, not {', '.join(sorted(unknown))}")
        if "think" in message and (message["role"] != "assistant" or not isinstance(message["think"], str)):
            raise ValueError('"think" is text, and an assistant\'s')
        if message["role"] == "assistant" and not isinstance(content, str):
            raise ValueError("an assistant's content is text")


def encode_chat(tokenizer, conversations, answer_tags=True, reply=False, tokens_per_image=0, begin=True):
    """
    The chat template. conversations: list of lists of {"role", "content", "think"?}. answer_tags: put
    <answer> tags around an assistant's content. reply: end with <assistant>, for the model to go on.
    tokens_per_image: a content may be a list of {"type": "text", "text": ...} and {"type": "image"}, and this
    is how many <image> stand for the latter. begin: False for messages that go on with a conversation.

    -> list of (ids, counts), one per conversation. counts: list of bool, True where the id is to be learned:
    an assistant's body and the <end> after it, not the <assistant> before it, and nothing of other roles.
    Raises ValueError where a conversation is not one.
    """
    chats = [list(_template(messages, answer_tags, tokens_per_image)) + [("assistant", "", False)] * reply
             for messages in conversations]
    texts = iter(tokenizer.encode_batch([text for chat in chats for special, text, _ in chat if not special]))
    encoded = []
    for chat in chats:
        ids = list(tokenizer.begin) if begin else []
        counts = [False] * len(ids)
        for special, _, learn in chat:
            new = tokenizer.markers[special] if special else next(texts)
            ids += new
            counts += [learn] * len(new)
            if special == "end":                              # generation stops there, whatever is to follow
                counts[len(counts) - len(new) + 1:] = [False] * (len(new) - 1)
        encoded.append((ids, counts))
    return encoded


def encode_user(tokenizer, content, tokens_per_image=0, begin=True):
    """-> ids of a user's message and of the <assistant> after it; see `encode_chat`"""
    return encode_chat(tokenizer, [[{"role": "user", "content": content}]], reply=True,
                       tokens_per_image=tokens_per_image, begin=begin)[0][0]


def _template(messages, answer_tags, tokens_per_image):
    """Yield (special token, "", counts) or ("", text, counts)."""
    check_conversation(messages, with_images=tokens_per_image > 0)
    for message in messages:
        learn = message["role"] == "assistant"
        yield message["role"], "", False
        if "think" in message:
            yield "think", "", True
            yield "", message["think"], True
            yield "/think", "", True
        if learn and answer_tags:
            yield "answer", "", True
        if isinstance(message["content"], str):
            yield "", message["content"], learn
        else:
            for part in message["content"]:
                yield from [("", part["text"], False)] if part["type"] == "text" else \
                    [("image", "", False)] * tokens_per_image
        if learn and answer_tags:
            yield "/answer", "", True
        yield "end", "", learn


# -----------------------------------------------------------------------------
# where tokenizers come from

def load_tokenizer(source):
    """
    source: "bytes"; a SentencePiece .model; a .tiktoken rank file (x.tiktoken:PATTERN where its name does not
    tell gpt2, cl100k or o200k); a folder with GPT-2's vocab.json and merges.txt; a Hugging Face folder, with
    tokenizer.json or tokenizer.model; a data set, run or checkpoint of ours; or a name that tiktoken knows,
    such as gpt2. -> Tokenizer. Raises UserError.
    """
    if source == "bytes":
        return Tokenizer("bytes")
    if in_run := sorted(glob.glob(os.path.join(glob.escape(source), "step_*", INFO))):
        source = os.path.dirname(in_run[-1])                  # the same in every checkpoint of a run
    path, colon, pattern = source.rpartition(":")
    if not colon or pattern not in PATTERNS:
        path, pattern = source, ""
    try:
        if os.path.isfile(os.path.join(path, INFO)):
            return _load_saved(path)
        if any(os.path.isfile(os.path.join(path, name)) for name in ("tokenizer.json", "tokenizer.model")):
            return _load_hf(path)
        if os.path.isfile(os.path.join(path, "vocab.json")):
            return Tokenizer("tiktoken", _ranks_from_gpt2_files(path), "gpt2")
        if path.endswith(".model"):
            return Tokenizer("sentencepiece", _read(path))
        if path.endswith(".tiktoken"):
            return Tokenizer("tiktoken", _read(path), pattern or _pattern_of(path))
    except OSError as error:
        raise UserError(f"--tokenizer={source}: cannot read {error.filename} ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"--tokenizer={source}: not a vocabulary of that kind, or damaged "
                        f"({error})") from None
    if os.path.isdir(path):
        raise UserError(f"{source}: no tokenizer there: tokenizer.json, tokenizer.model, vocab.json with "
                        f"merges.txt, or {INFO}")
    return _load_known(source)


def _read(path):
    with open(path, "rb") as file:
        return file.read()


def _load_saved(folder):
    info = json.loads(_read(os.path.join(folder, INFO)))
    content = _read(os.path.join(folder, info["file"])) if info["file"] else b""
    tokenizer = Tokenizer(info["kind"], content, info["pattern"], info.get("extra"))
    if tokenizer.fingerprint != info["fingerprint"]:
        raise UserError(f"{folder}: the tokenizer files do not match their fingerprint; "
                        "they were changed or damaged")
    return tokenizer


def _pattern_of(path):
    name = os.path.basename(path)
    for pattern, marks in (("gpt2", ("gpt2", "r50k", "p50k")), ("cl100k", ("cl100k",)),
                           ("o200k", ("o200k",))):
        if any(mark in name for mark in marks):
            return pattern
    raise UserError(f"--tokenizer={path}: its name does not tell how text is split; "
                    f"write {path}:PATTERN with PATTERN one of {', '.join(PATTERNS)}")


def _ranks_from_gpt2_files(folder):
    """GPT-2's vocab.json and merges.txt -> the same as a .tiktoken rank file (lines of base64 and rank)."""
    kind = _optional_json(folder, "tokenizer_config.json").get("tokenizer_class", "GPT2Tokenizer")
    if not kind.startswith("GPT2"):                           # splits text in another way
        raise UserError(f"--tokenizer={folder}: a {kind} with vocab.json and merges.txt only; "
                        "its tokenizer.json is needed")
    merges = _read(os.path.join(folder, "merges.txt")).decode().splitlines()
    return _ranks(json.loads(_read(os.path.join(folder, "vocab.json"))),
                  [line.split() for line in merges if line and not line.startswith("#version")])


def _printable():
    """
    -> dict of byte to the character that stands for it in GPT-2's files: the visible ones for themselves, for
    the others U+0100 and on
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(0x100 + i) for i, b in enumerate(hidden)}


def _ranks(vocab, merges, others=()):
    """
    vocab: dict of token, written in printable characters, to id; merges: list of pairs; others: tokens that
    no pair makes -> lines of base64 and rank
    """
    to_byte = {c: b for b, c in _printable().items()}
    merged = [vocab["".join(pair)] for pair in merges]
    if merged != sorted(merged):
        raise ValueError("ids do not follow the order of merges, which is not supported")
    tokens = {*to_byte, *map("".join, merges), *others}
    ranks = sorted((vocab[token], bytes(to_byte[c] for c in token)) for token in tokens)
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in ranks)


def _optional_json(folder, name):
    path = os.path.join(folder, name)
    content = json.loads(_read(path)) if os.path.isfile(path) else {}
    if not isinstance(content, dict):
        raise ValueError(f"{name}: expected an object")
    return content


def _load_hf(folder):
    """A folder with tokenizer.json (byte-level BPE) or tokenizer.model (SentencePiece) -> Tokenizer"""
    file = _optional_json(folder, "tokenizer.json")
    config = _optional_json(folder, "tokenizer_config.json")
    added = {i: token for i, token in config.get("added_tokens_decoder", {}).items()}
    added |= {str(token["id"]): token for token in file.get("added_tokens", [])}
    texts = {i: "" if token["special"] else token["content"] for i, token in added.items()}
    ids = {token["content"]: int(i) for i, token in added.items()}
    byte_level = "ByteLevel" in json.dumps(file.get("pre_tokenizer"))
    if byte_level:
        pattern, nfc, lines = _read_byte_level(file, ids, folder)
        tokenizer = "tiktoken", lines, pattern
    elif not os.path.isfile(os.path.join(folder, "tokenizer.model")):
        raise UserError(f"--tokenizer={folder}: tokenizer.json is not byte-level BPE, and there is no "
                        "SentencePiece tokenizer.model; other kinds are not supported")
    else:
        tokenizer, nfc = ("sentencepiece", _read(os.path.join(folder, "tokenizer.model")), ""), False
        pieces = Tokenizer(*tokenizer).bpe
        ids |= {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    # an instructed model has several ends; that of the tokenizer ends a turn
    ends = next((ends for name in ("generation_config.json", "config.json")
                 if (ends := _optional_json(folder, name).get("eos_token_id")) is not None), [])
    ends = ends if isinstance(ends, list) else [ends]
    named = config.get("eos_token")
    named = ids.get(named["content"] if isinstance(named, dict) else named)
    end = named if named is not None and (named in ends or not ends) else ends[0] if ends else None
    known = {*ids.values(), *(file["model"]["vocab"].values() if byte_level else ())}
    if end is not None and end not in known:
        raise UserError(f"--tokenizer={folder}: eos_token_id={json.dumps(end)}: not an id of this vocabulary")
    special = {name: ids[f"<{name}>"] for name in ("think", "/think") if f"<{name}>" in ids} \
        if {"<think>", "</think>"} <= ids.keys() else {}
    special |= {} if end is None else {"end": end}
    texts |= {str(i): "" for i in special.values()}
    plain = Tokenizer(*tokenizer, dict(special=special, added=texts, nfc=nfc, begin=[], markers={}))
    return Tokenizer(*tokenizer, plain.extra | dict(begin=_begin(file, config, ids),
                                                    markers=_role_markers(plain, ids)))


def _begin(file, config, ids):
    """tokenizer.json and tokenizer_config.json, ids of tokens -> ids that every text begins with"""
    steps = file.get("post_processor") or {}
    for step in steps.get("processors", [steps]):
        first = (step.get("single") or [{}])[0]
        if step.get("type") == "TemplateProcessing" and "SpecialToken" in first:
            return [ids[first["SpecialToken"]["id"]]]
    bos = config.get("bos_token")
    bos = bos["content"] if isinstance(bos, dict) else bos
    return [ids[bos]] if config.get("add_bos_token") and bos in ids else []


def _role_markers(tokenizer, ids):
    """ids: dict of a folder's added tokens -> what its models read as roles and ends of turns, where known"""
    def marker(*parts):
        return [i for part in parts for i in ([ids[part]] if part in ids else tokenizer.encode(part))]
    if {"<|im_start|>", "<|im_end|>"} <= ids.keys() and tokenizer.end == ids["<|im_end|>"]:          # ChatML
        return {role: marker("<|im_start|>", role + "\n") for role in ROLES} | {
            "end": marker("<|im_end|>", "\n")}
    if {"<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"} <= ids.keys() \
            and tokenizer.end == ids["<|eot_id|>"]:                                                  # Llama 3
        return {role: marker("<|start_header_id|>", role, "<|end_header_id|>", "\n\n") for role in ROLES}
    return {}


def _read_byte_level(file, added, folder):
    """tokenizer.json, dict of added tokens to ids -> pattern, whether it normalises to NFC, lines of ranks"""
    def refuse(name, value):
        raise UserError(f"--tokenizer={folder}: tokenizer.json has {name} {json.dumps(value)[:120]}, "
                        "which is not supported")
    model, normalizer = file["model"], file.get("normalizer")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            refuse(name, model[name])
    if model.get("type", "BPE") != "BPE":
        refuse("a model", model["type"])
    steps = [normalizer] if normalizer and normalizer["type"] != "Sequence" else \
        normalizer["normalizers"] if normalizer else []
    if [step["type"] for step in steps] not in ([], ["NFC"]):
        refuse("a normalizer", normalizer)
    pre = file["pre_tokenizer"]
    *splits, last = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    kinds, pattern = [split["type"] for split in splits], None
    if last["type"] == "ByteLevel" and not last["add_prefix_space"]:
        if last.get("use_regex", True):
            pattern = "gpt2" if not splits else GPT2_DIGITS if splits == [
                {"type": "Digits", "individual_digits": True}] else None
        elif kinds == ["Split"] and splits[0]["behavior"] == "Isolated" and not splits[0]["invert"]:
            pattern = splits[0]["pattern"].get("Regex")
    if not pattern:
        refuse("a pre_tokenizer", pre)
    merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    alphabet, others = set(_printable().values()), ()
    if model.get("ignore_merges"):                            # a piece that is a token is that token
        others = [token for token in model["vocab"] if alphabet.issuperset(token) and token not in added]
    return pattern, bool(steps), _ranks(model["vocab"], merges, others)


def _load_known(name):
    if name not in tiktoken.list_encoding_names():
        raise UserError(f"--tokenizer={name}: no such file or run, and not bytes or one of "
                        f"{', '.join(tiktoken.list_encoding_names())}")
    pattern = {"gpt2": "gpt2", "r50k_base": "gpt2", "p50k_base": "gpt2", "cl100k_base": "cl100k",
               "o200k_base": "o200k"}.get(name)
    if not pattern:
        raise UserError(f"--tokenizer={name}: not supported; use gpt2, cl100k_base or o200k_base")
    try:
        ranks = tiktoken.get_encoding(name)._mergeable_ranks
    except Exception as error:  # requests' many ways to say that there is no network
        raise UserError(f"--tokenizer={name}: not in tiktoken's cache and the download failed "
                        f"({type(error).__name__}). Copy its .tiktoken file (or vocab.json and merges.txt) "
                        "here from a machine with internet and give that path") from None
    by_rank = sorted(ranks.items(), key=lambda kv: kv[1])
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank)
    return Tokenizer("tiktoken", b"".join(lines), pattern)


def train_sentencepiece(lines, vocab_size):
    """
    Train a BPE vocabulary on an iterable of lines. vocab_size counts our special tokens too, so that it is
    the model's. -> content of a .model file. Lossless (but for a literal U+2581): no
    normalisation, no added spaces, bytes for what is not in the vocabulary.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe",
            vocab_size=vocab_size - len(SPECIAL_TOKENS), byte_fallback=True, character_coverage=0.9995,
            normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True, split_digits=True, user_defined_symbols=["\n"],
            bos_id=-1, eos_id=-1, pad_id=-1, max_sentence_length=1 << 16, input_sentence_size=2_000_000,
            shuffle_input_sentence=True, num_threads=os.cpu_count(), minloglevel=2)
    except RuntimeError as error:
        most = re.search(r"value <= (\d+)", str(error))
        if few := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            least = int(few[1]) + len(SPECIAL_TOKENS)
            raise UserError(f"--vocab_size={vocab_size}: bytes and this text's characters alone take {least} "
                            f"tokens; give more, such as {-(-2 * least // 1024) * 1024}") from None
        raise UserError(f"--vocab_size={vocab_size}: " + (
            f"this text has words for {int(most[1]) + len(SPECIAL_TOKENS)} tokens at most; "
            "lower it or give more text"
            if most else f"SentencePiece refuses ({str(error).splitlines()[-1]})")) from None
    return model.getvalue()


def token_byte_counts(tokenizer):
    """-> (V,) uint16 array: bytes of text each token stands for, to turn nats per token into bits per byte"""
    return np.array([len(b) for b in tokenizer.token_bytes], dtype=np.uint16)
