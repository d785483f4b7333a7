"""
Text to token ids and back: bytes, tiktoken and SentencePiece behind one small class.

    tokenizer = load_tokenizer("bytes")       # or x.model, x.tiktoken, a folder with vocab.json +
                                              merges.txt,
    ids = tokenizer.encode("Good morrow!")    # gpt2, a Hugging Face folder, any data set or
                                              checkpoint folder
    text = tokenizer.decode(ids)

Special tokens come after the base vocabulary and are ids only: what a user writes is encoded as
plain text. The vocabulary of a Hugging Face folder has special tokens of its own: their ids are
kept, the one that ends its model's texts is `end`, and so are <think> and </think> where it has
these; the others of ours come after them all. Tokens that it has added without calling them special
are one id wherever they are written. A text begins as its model has learned it (`begin`), ends with
any of `ends`, and a conversation is written as its chat template says (`template`).

Decoding joins the bytes that each token stands for. So streamed text is exactly the whole text:
`Stream` holds back half a UTF-8 character, and SentencePiece's spaces are bytes like any other.
"""

import base64
import codecs
import glob
import hashlib
import json
import os
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor

import sentencepiece
import tiktoken

from common.errors import BadText, UserError

# "end" closes a turn and a document; "pad" is another token on purpose (else padding swallows the
# end)
SPECIAL_TOKENS = (
    "end",
    "pad",
    "user",
    "assistant",
    "system",
    "think",
    "/think",
    "answer",
    "/answer",
    "image",
)

# How tiktoken vocabularies split text before merging; a rank file does not say. From their own
# definitions.
PATTERNS = {
    "gpt2": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+"
    r"| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": "|".join(
        [
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
            r"\p{N}{1,3}",
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            r"\s*[\r\n]+",
            r"\s+(?!\S)",
            r"\s+",
        ]
    ),
}
# one of them: extras/hf_tokenizer.py
FOLDER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
# in every data set and checkpoint, beside the vocabulary file it names
INFO = "tokenizer_info.json"
# before a folder's own files there
ORIGINAL = "original_"
# characters of white space in a row: libraries have limits of their own
LONGEST_SPACE = 100_000


class Tokenizer:
    """
    kind: bytes, tiktoken, sentencepiece. vocabulary: file content (b"" for bytes). pattern: key of
    PATTERNS, or a regular expression. extra, of a Hugging Face folder: dict of `special`, name to
    id of those of ours that it has; `added`, id (as a str) to text, "" for special tokens; `nfc`,
    whether text is normalised so; `splits`, patterns that split it before `pattern` does; `tokens`,
    dict of text to id of all that are added, `literal`, of those that are no special ones; `begin`,
    `ends`, `markers` and `template`, see below. originals: dict of file name to bytes, its files.

    vocab_size      base vocabulary and special tokens
    special         dict of special token name to id, special_names the reverse; `end`, `pad` as
                    attributes
    ends            tuple of ids that end what a model writes; `end` is the first
    markers         dict of special token name to the list of ids that the chat template writes for
                    it
    template        chat template (jinja) in place of ours, or ""
    begin           list of ids that every text and conversation begins with: [] or a token
    token_bytes     list of the bytes that each id stands for, b"" for special ones
    fingerprint     where it is equal, ids mean the same
    """

    def __init__(self, kind, vocabulary=b"", pattern="", extra=None, originals=None):
        self.kind, self.vocabulary, self.pattern, self.extra = kind, vocabulary, pattern, extra
        self.originals = originals or {}
        self.drops_first_space = False
        if kind == "bytes":
            base = [bytes([i]) for i in range(256)]
        elif kind == "tiktoken":
            ranks = _read_ranks(vocabulary)
            # what an expression from a file does not match is a piece too; tiktoken would drop it
            split = PATTERNS.get(pattern) or f"(?:{pattern})|(?:(?!{pattern})[\\s\\S])+"
            self.bpe = tiktoken.Encoding(
                "common", pat_str=split, mergeable_ranks=ranks, special_tokens={}
            )
            base = [b""] * (max(ranks.values()) + 1)
            for token, rank in ranks.items():
                base[rank] = token
            if pattern == "gpt2" and len(base) == 50256:
                base.append(b"")  # GPT-2 counts its <|endoftext|> in: ids stay comparable
        else:
            self.bpe = sentencepiece.SentencePieceProcessor(model_proto=vocabulary)
            base = [self._piece_bytes(i) for i in range(self.bpe.get_piece_size())]
            self.drops_first_space = self.bpe.encode("a", out_type=str)[0].startswith("\u2581")
        known = extra or dict(special={}, added={}, begin=[], markers={})
        for i, text in sorted((int(i), text) for i, text in known["added"].items()):
            base += [b""] * (i + 1 - len(base))
            base[i] = text.encode()
        ours = [name for name in SPECIAL_TOKENS if name not in known["special"]]
        self.special = known["special"] | {name: len(base) + i for i, name in enumerate(ours)}
        self.special_names = {i: name for name, i in self.special.items()}
        self.end, self.pad = self.special["end"], self.special["pad"]
        self.markers = {name: [i] for name, i in self.special.items()} | known["markers"]
        self.begin, self.template = known["begin"], known.get("template", "")
        self.ends = tuple(dict.fromkeys([self.end, *known.get("ends", [])]))
        self.splits = []
        if known.get("splits"):
            # tiktoken needs it, so it is there
            import regex

            self.splits = [regex.compile(split) for split in known["splits"]]
        self.literal = known.get("literal", {})
        self.is_literal = re.compile(f"({any_of(self.literal)})") if self.literal else None
        self.token_bytes = base + [b""] * len(ours)
        self.vocab_size = len(self.token_bytes)
        meaning = [kind, pattern, SPECIAL_TOKENS]
        if extra:
            meaning.append(extra)
        self.fingerprint = hashlib.sha256(json.dumps(meaning).encode() + vocabulary).hexdigest()[
            :16
        ]

    def _piece_bytes(self, i):
        if self.bpe.is_byte(i):  # "<0x0A>"
            return bytes([int(self.bpe.id_to_piece(i)[3:-1], 16)])
        if self.bpe.is_control(i) or self.bpe.is_unused(i):
            return b""
        piece = " \u2047 " if self.bpe.is_unknown(i) else self.bpe.id_to_piece(i)
        return piece.replace("\u2581", " ").encode()

    def encode(self, text):
        """-> list of int; special tokens written in the text are text"""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts, num_threads=2):
        """-> list of lists of int. BadText: white space above LONGEST_SPACE"""
        if self.kind == "bytes":
            return [list(text.encode()) for text in texts]
        if self.kind == "sentencepiece":
            return self.bpe.encode(texts, num_threads=num_threads)
        for text in texts:
            if len(text) > LONGEST_SPACE and re.search(rf"(?<!\s)\s{{{LONGEST_SPACE}}}", text):
                raise BadText(f"over {LONGEST_SPACE:,} characters of white space in a row")
        if not self.extra:
            return self.bpe.encode_ordinary_batch(texts, num_threads=num_threads)
        with ThreadPoolExecutor(num_threads) as pool:
            return list(pool.map(self._encode_parts, texts))

    def _encode_parts(self, text):
        ids = []
        for part in self._parts(text):
            ids += [part] if isinstance(part, int) else self.bpe.encode_ordinary(part)
        return ids

    def _parts(self, text):
        """Yield the ids of added tokens in a text, and what is between them, split in advance."""
        for piece in self.is_literal.split(text) if self.literal else [text]:
            if piece in self.literal:
                yield self.literal[piece]
                continue
            pieces = [unicodedata.normalize("NFC", piece) if self.extra["nfc"] else piece]
            for split in self.splits:
                pieces = [part for piece in pieces for part in matches_and_gaps(split, piece)]
            yield from filter(None, pieces)

    def decode(self, ids, **how):
        """-> str. Bytes that are not UTF-8 become U+FFFD. how: see Stream."""
        stream = self.stream(**how)
        return "".join(map(stream.put, ids)) + stream.end()

    def stream(self, **how):
        """An incremental decoder; see Stream."""
        return Stream(self, **how)

    def files(self):
        """What `load_tokenizer` needs to make this tokenizer again: dict of file name to bytes."""
        name = {
            "bytes": None,
            "tiktoken": "tokenizer.tiktoken",
            "sentencepiece": "tokenizer.model",
        }[self.kind]
        info = dict(kind=self.kind, file=name, pattern=self.pattern, fingerprint=self.fingerprint)
        files = {name: self.vocabulary} if name else {}
        if self.extra:
            info |= dict(extra=self.extra, originals=list(self.originals))
            files |= {ORIGINAL + name: content for name, content in self.originals.items()}
        return {INFO: (json.dumps(info, indent=1) + "\n").encode(), **files}


class Stream:
    """
    Incremental decoding: put(id) -> the text complete now, end() -> the rest. Their sum is
    decode(ids).

    show_special: write special tokens as <name>. hide_think: leave out what stands between <think>
    and </think>. continues: the ids go on from earlier text, so a leading space is a space
    (SentencePiece drops the first one of a text, which it has put there itself).
    """

    def __init__(self, tokenizer, show_special=False, hide_think=False, continues=False):
        self.tokenizer, self.show_special, self.hide_think = tokenizer, show_special, hide_think
        self.utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self.drop_space, self.thinking = tokenizer.drops_first_space and not continues, False

    def put(self, token):
        t = self.tokenizer
        # a text ends here, and another one begins
        if name := t.special_names.get(token):
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
# where tokenizers come from


def load_tokenizer(source):
    """
    source: "bytes"; a SentencePiece .model; a .tiktoken rank file (x.tiktoken:PATTERN where its
    name does not tell gpt2, cl100k or o200k); a folder with GPT-2's vocab.json and merges.txt; a
    Hugging Face folder, with tokenizer.json or tokenizer.model; a data set, run or checkpoint of
    ours; or a name that tiktoken knows, such as gpt2. -> Tokenizer. Raises UserError.
    """
    if source == "bytes":
        return Tokenizer("bytes")
    if in_run := sorted(glob.glob(os.path.join(glob.escape(source), "step_*", INFO))):
        # the same in every checkpoint of a run
        source = os.path.dirname(in_run[-1])
    path, colon, pattern = source.rpartition(":")
    if not colon or pattern not in PATTERNS:
        path, pattern = source, ""
    try:
        if os.path.isfile(os.path.join(path, INFO)):
            return _load_saved(path)
        if any(os.path.isfile(os.path.join(path, name)) for name in FOLDER_FILES):
            from extras import hf_tokenizer

            return hf_tokenizer.load(path)
        if path.endswith(".model"):
            return Tokenizer("sentencepiece", read_file(path))
        if path.endswith(".tiktoken"):
            return Tokenizer("tiktoken", read_file(path), pattern or _pattern_of(path))
    except OSError as error:
        raise UserError(
            f"--tokenizer={source}: cannot read {error.filename} ({error.strerror})"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"--tokenizer={source}: not a vocabulary of that kind, or damaged ({error})"
        ) from None
    if os.path.isdir(path):
        raise UserError(
            f"{source}: no tokenizer there: tokenizer.json, tokenizer.model, vocab.json with "
            f"merges.txt, or {INFO}"
        )
    return _load_known(source)


def matches_and_gaps(pattern, text):
    """Yield what a compiled pattern matches and what lies between, in order; some may be empty"""
    end = 0
    for match in pattern.finditer(text):
        yield from (text[end : match.start()], match[0])
        end = match.end()
    yield text[end:]


def any_of(texts):
    """-> regular expression that matches any of these texts, the longest where several fit"""
    return "|".join(map(re.escape, sorted(texts, key=len, reverse=True)))


def read_file(path):
    with open(path, "rb") as file:
        return file.read()


def _load_saved(folder):
    info = json.loads(read_file(os.path.join(folder, INFO)))
    content = read_file(os.path.join(folder, info["file"])) if info["file"] else b""
    originals = {
        name: read_file(os.path.join(folder, ORIGINAL + name)) for name in info.get("originals", [])
    }
    tokenizer = Tokenizer(info["kind"], content, info["pattern"], info.get("extra"), originals)
    if tokenizer.fingerprint != info["fingerprint"]:
        raise UserError(
            f"{folder}: the tokenizer files do not match their fingerprint; "
            "they were changed or damaged"
        )
    return tokenizer


def _read_ranks(vocabulary):
    """vocabulary: content of a .tiktoken file, lines of base64 and rank -> dict of token to rank"""
    pairs = [line.split() for line in vocabulary.splitlines() if line.strip()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    numbers = set(ranks.values())
    if (
        not ranks.keys() >= {bytes([i]) for i in range(256)}
        or min(numbers) < 0
        or len(numbers) < len(ranks)
    ):
        raise ValueError("each of the 256 bytes must be a token, and ranks must differ")
    return ranks


def _pattern_of(path):
    name = os.path.basename(path)
    for pattern, marks in (
        ("gpt2", ("gpt2", "r50k", "p50k")),
        ("cl100k", ("cl100k",)),
        ("o200k", ("o200k",)),
    ):
        if any(mark in name for mark in marks):
            return pattern
    raise UserError(
        f"--tokenizer={path}: its name does not tell how text is split; "
        f"write {path}:PATTERN with PATTERN one of {', '.join(PATTERNS)}"
    )


def _load_known(name):
    if name not in tiktoken.list_encoding_names():
        raise UserError(
            f"--tokenizer={name}: no such file or run, and not bytes or one of "
            f"{', '.join(tiktoken.list_encoding_names())}"
        )
    pattern = {
        "gpt2": "gpt2",
        "r50k_base": "gpt2",
        "p50k_base": "gpt2",
        "cl100k_base": "cl100k",
        "o200k_base": "o200k",
    }.get(name)
    if not pattern:
        raise UserError(f"--tokenizer={name}: not supported; use gpt2, cl100k_base or o200k_base")
    try:
        ranks = tiktoken.get_encoding(name)._mergeable_ranks
    except Exception as error:  # requests' many ways to say that there is no network
        raise UserError(
            f"--tokenizer={name}: not in tiktoken's cache and the download failed "
            f"({type(error).__name__}). Copy its .tiktoken file (or vocab.json and merges.txt) "
            "here from a machine with internet and give that path"
        ) from None
    by_rank = sorted(ranks.items(), key=lambda kv: kv[1])
    lines = (base64.b64encode(token) + b" %d\n" % rank for token, rank in by_rank)
    return Tokenizer("tiktoken", b"".join(lines), pattern)
