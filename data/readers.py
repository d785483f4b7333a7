"""
What `data/prepare.py` reads: files to documents (text or token ids) or rows (lines of a .jsonl),
and these to tokens, one class for each kind of set.

Text must be UTF-8; nothing is normalised. A row that cannot be used raises ValueError, or `BadRow`
where it is not malformed; `Report` ends the run there, or counts the row.
"""

import contextlib
import glob
import gzip
import io
import json
import operator
import os
import pickle
import random
import re
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.chat import check_conversation, encode_chat, with_thoughts
from common.errors import UserError

# characters of text or bytes of rows that are in memory at once
BLOCK = 1 << 20
# characters that --val_frac moves a border at most, to the start of a line
NEAR = 1000
TXT_FILES, ROW_FILES, ID_FILES = (".txt", ".txt.gz"), (".jsonl", ".jsonl.gz"), (".npy", ".pkl")
# an escape that may be half a character
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True)
class SetConfig:
    # fmt: off
    input: tuple[str, ...] = ()        # files and globs to train on, separated by commas
    val_input: tuple[str, ...] = ()    # files and globs to validate on
    val_frac: float = 0.0              # instead: fraction of the rows to hold out
    tokenizer: str = "bytes"           # the run to be trained further, or as in `text --help`
    out_dir: str = "out/data"          # folder to write, must not exist
    bad_rows: Literal["error", "skip"] = "error"  # bad rows: stop, or skip and count them
    seed: int = 1337                   # of the random choice that --val_frac makes
    # fmt: on


@dataclass(frozen=True)
class ExampleConfig(SetConfig):
    # fmt: off
    answer_tags: bool = True           # put <answer> and </answer> around what an assistant says
    max_len: int = 0                   # maximum length in tokens, tags included; 0 = no limit
    long_rows: Literal["error", "skip", "cut"] = "error"  # longer rows: stop, skip, cut the end
    # fmt: on

    def __post_init__(self):
        if self.max_len < 0 or self.long_rows != "error" and not self.max_len:
            raise UserError(
                f"--max_len={self.max_len}: expected a number of tokens, "
                "or 0 = no limit and no --long_rows"
            )


# -----------------------------------------------------------------------------
# files


def find_files(patterns, endings, option="--input"):
    """-> paths that globs match, in order, without repeats; UserError where one matches nothing"""
    paths = []
    for pattern in patterns:
        found = [pattern]
        if not os.path.isfile(pattern):
            found = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
        if not found:
            what = "no such file"
            if os.path.isdir(pattern):
                what = f"a folder; give {pattern}/*.jsonl, {pattern}/*.txt or the like"
            raise UserError(f"{option}={pattern}: {what}")
        paths += found
    if not paths and option == "--input":
        raise UserError("--input: give files to read, e.g. --input=books/*.txt")
    for path in paths:
        if not path.endswith(endings):
            hint = ""
            if path.removesuffix(".gz").endswith((".json", ".csv", ".tsv")):
                hint = '; README.md, "Data formats", makes .jsonl of .json and .csv'
            raise UserError(f"{option}={path}: expected one of {', '.join(endings)}{hint}")
    return list(dict.fromkeys(paths))


def inputs_of(cfg, endings):
    """-> dict of path to split; UserError where the options contradict each other"""
    if cfg.val_input and cfg.val_frac or not 0 <= cfg.val_frac < 1:
        raise UserError(
            f"--val_frac={cfg.val_frac}: must be a fraction below 1, "
            "and not together with --val_input"
        )
    inputs = dict.fromkeys(find_files(cfg.input, endings), "train")
    for path in find_files(cfg.val_input, endings, "--val_input"):
        if path in inputs:
            raise UserError(f"--val_input: {path} is in --input too; give it to one of them")
        inputs[path] = "val"
    return inputs


@contextlib.contextmanager
def open_bytes(path):
    """The file, unzipped; UserError where it is damaged."""
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
        try:
            yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: damaged or truncated ({error})") from None


class BadRow(ValueError):
    """A row that is left out for another reason than being malformed."""

    def __init__(self, message, reason):
        super().__init__(message)
        self.reason = reason


class Report:
    """What was left out: counts, and where the first ones are."""

    def __init__(self, bad_rows):
        """bad_rows: the option, or None where there is no such option"""
        self.bad_rows, self.counts, self.first = bad_rows, Counter(), defaultdict(list)

    def left_out(self):
        return {reason: n for reason, n in self.counts.items() if not reason.startswith("cut")}

    def bad(self, where, error, got=""):
        """error: ValueError that says what is wrong. got: what there is instead"""
        if self.bad_rows != "skip":
            hint = ", or leave such rows out with --bad_rows=skip" if self.bad_rows else ""
            raise UserError(f"{where}: {error}{got}; mend it{hint}")
        self.skip(error.reason if isinstance(error, BadRow) else "malformed", where)

    def skip(self, reason, where):
        self.counts[reason] += 1
        if self.counts[reason] <= 5:
            self.first[reason].append(where)

    def print(self):
        for reason, count in self.counts.items():
            verb = "" if reason.startswith("cut") else "left out "
            more = ", ..." if count > 5 else ""
            print(f"{verb}{count:,} {reason}: {', '.join(self.first[reason])}{more}")


# -----------------------------------------------------------------------------
# documents: yield (number in its file, text or array of ids, its length), long ones in pieces


def read_txt(path):
    """One document, in blocks that end with a line (unless the line is longer than a block)."""
    with open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        try:
            # an empty file is an empty document
            block = text.read(BLOCK) + text.readline(BLOCK)
            yield 0, block, len(block)
            while block := text.read(BLOCK) + text.readline(BLOCK):
                yield 0, block, len(block)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: not UTF-8 text ({error.reason} near byte {file.tell()}); "
                "convert it first, e.g. with iconv"
            ) from None


class OnlyLists(pickle.Unpickler):
    """Reads lists and ints. A pickle that asks for anything by name could run code."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_ids(path):
    """The documents of a .npy or .pkl, as arrays of token ids."""
    try:
        if path.endswith(".npy"):
            documents = np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
        else:
            documents = load_pkl(path)
    except Exception as error:  # damaged pickles raise nearly anything
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: refused or damaged ({reason})") from None
    if isinstance(documents, np.ndarray):
        if documents.ndim not in (1, 2) or documents.dtype.kind not in "iu":
            raise UserError(
                f"{path}: expected an integer array of one or two dimensions, "
                f"got {documents.dtype} {documents.shape}"
            )
        documents = np.atleast_2d(documents)
    for number, ids in enumerate(documents):
        for start in range(0, max(1, len(ids)), BLOCK):
            yield number, ids[start : start + BLOCK], BLOCK


def load_pkl(path):
    """A list of token ids, or of such lists -> list of arrays"""
    with open(path, "rb") as file:
        documents = OnlyLists(file).load()
    if not isinstance(documents, list):
        raise ValueError(f"a {type(documents).__name__}, not a list")
    if not documents or not isinstance(documents[0], (list, tuple)):
        documents = [documents]
    for number, ids in enumerate(documents):
        if not isinstance(ids, (list, tuple)) or {type(i) for i in ids} - {int}:
            raise ValueError(f"document {number} is not a list of token ids")
        documents[number] = np.array(ids, np.int64)
    return documents


# -----------------------------------------------------------------------------
# rows


def read_rows(path, report, parse, kind=""):
    """
    Yield (line number, parse(row), bytes of the line) for every line of a .jsonl. A line that is
    not JSON, or for which parse raises ValueError, is reported. kind: the command that reads it
    """
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = None
            try:
                row = load_row(line)
                parsed = parse(row if isinstance(row, dict) else {"messages": row})
            except ValueError as error:
                report.bad(f"{path}:{number}", error, f", got {shown(row, line, kind)}")
                continue
            yield number, parsed, len(line)


def load_row(line):
    """-> what a line says; ValueError"""
    try:
        # files may begin with a byte order mark
        row = json.loads(line.decode("utf-8-sig"))
        if SURROGATE.search(line):
            # half a character is not text
            json.dumps(row, ensure_ascii=False).encode()
        return row
    except UnicodeDecodeError as error:
        raise ValueError(
            f"not UTF-8 ({error.reason}; convert the whole file, e.g. with iconv)"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({error}), one row a line") from None


# the keys of rows, and whose they are
HINTS = {"chosen rejected": "pairs", "prompt answer": "prompts", "messages": "chat", "text": "text"}


def shown(row, line, kind):
    """A row for a message: its start, or its keys if it is long; and which command reads it."""
    text = line.decode("utf-8-sig", "replace").strip()
    if not isinstance(row, dict):
        return text if len(text) <= 60 else text[:57] + "..."
    if len(text) > 60:
        text = f"a row with {', '.join(row)[:60]}"
    if "conversations" in row:
        return text + (
            ', which is ShareGPT\'s form; call "conversations" "messages", '
            '"from" "role" and "value" "content"'
        )
    kinds = [name for keys, name in HINTS.items() if row.keys() >= set(keys.split())]
    if kind and kinds and kind not in kinds:
        text += f", which is for `data/prepare.py {kinds[0]}`"
    return text


# -----------------------------------------------------------------------------
# what a tokenizer learns from


def read_lines(paths, fields):
    """Yield the lines of text of files; of rows, those of `texts_of`."""
    for path in paths:
        pieces = read_txt(path)
        if not path.endswith(TXT_FILES):
            pieces = read_rows(path, Report(None), lambda row: texts_of(row, fields))
        for _, text, _ in pieces:
            yield from filter(None, text.splitlines())


def texts_of(row, fields):
    """-> the fields that a row has, else what its messages say, a line or more each"""
    texts = [row[field] for field in fields if field in row]
    texts = texts or list(said(row.get("messages"), ("content", "think")))
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"expected a conversation or {', '.join(fields)} (--fields)")
    return "\n".join(texts)


def said(parts, keys):
    """Yield what messages say under these keys; a content may be a list of texts and images."""
    for part in parts if isinstance(parts, list) else ():
        for key in keys:
            if not isinstance(part, dict) or key not in part:
                continue
            if isinstance(part[key], list):
                yield from said(part[key], ("text",))
            else:
                yield part[key]


# -----------------------------------------------------------------------------
# from files to tokens


def read_encoded(kind, inputs, report):
    """
    Yield (split, "file:number", content, encoded) of what files hold: what kind.read and
    kind.encode give. inputs: dict of path to split
    """
    draw = random.Random(kind.cfg.seed)
    for path, home in inputs.items():
        for block in blocks(divide(path, home, kind, draw, report)):
            for item, tokens in zip(block, encoded_block(kind, block, path, report)):
                split, number, content, _ = item
                if tokens is not None:
                    yield split, f"{path}:{number}", content, tokens


def encoded_block(kind, block, path, report):
    """-> list of what kind.encode gives; None for what it refuses, which is reported"""
    try:
        return kind.encode([content for _, _, content, _ in block])
    except ValueError:
        # one at a time: which one it is
        encoded = []
        for _, number, content, _ in block:
            encoded.append(None)
            try:
                encoded[-1:] = kind.encode([content])
            except ValueError as error:
                report.bad(f"{path}:{number}", error)
        return encoded


def blocks(items):
    """Yield lists of items, of about BLOCK characters or bytes each, with which an item ends."""
    block, total = [], 0
    for item in items:
        block.append(item)
        total += item[-1]
        if total >= BLOCK:
            yield block
            block, total = [], 0
    if block:
        yield block


def divide(path, home, kind, draw, report):
    """Yield (split, number, content, size). A document goes to one split, but a .txt is divided."""
    val_frac, previous = kind.cfg.val_frac, None
    if val_frac and path.endswith(TXT_FILES):
        yield from divide_txt(path, val_frac)
        return
    for number, content, size in kind.read(path, report):
        if number != previous:
            split = "val" if draw.random() < val_frac else home
        previous = number
        yield split, number, content, size


def divide_txt(path, val_frac):
    """The last val_frac of the characters are held out, from a line's start."""
    border, seen = round((1 - val_frac) * sum(size for _, _, size in read_txt(path))), 0
    for number, piece, size in read_txt(path):
        at = min(max(0, border - seen), size)
        line = piece.rfind("\n", 0, at) + 1
        # a line's start that is far away would change the share
        if at < size and at - line <= NEAR and (line or seen):
            at = line
        if at or not piece:
            yield "train", number, piece[:at], size
        if at < size:
            yield "val", number, piece[at:], size
        seen += size


# -----------------------------------------------------------------------------
# kinds of sets


@dataclass
class Example:
    """
    A row in tokens. The prompt and one of the replies make a sequence; a conversation is a reply
    without a prompt. Each is (ids, learn), lists of int and bool: learn where an id is a target
    """

    replies: list
    prompt: tuple = ([], [])

    def length(self):
        """-> tokens of the longest sequence"""
        return len(self.prompt[0]) + max((len(ids) for ids, _ in self.replies), default=0)


class Kind:
    """
    A kind of set.

    name, unit     of its sets; what its rows are called
    meta           what meta.json says besides
    endings        of the files that read(path, report) takes -> iterator of (number, content, size)
    parse(row, folder of its file) -> the content, which `encode` and `store` take, or ValueError;
                   parse_text(row) -> the same, for a kind that has no images
    encode(list of contents) -> list of Example
    store(array) -> function of (content, Example) that stores what belongs to it beside the tokens,
                   or raises BadRow; array(name, dtype, shape of an entry) opens a file
    counts(*those arrays) -> dict of what meta.json counts of a split besides
    """

    endings, meta = ROW_FILES, {}

    def __init__(self, cfg, tokenizer):
        self.cfg, self.tokenizer = cfg, tokenizer
        # messages whose thoughts were written in their text
        self.num_thoughts = 0

    def read(self, path, report):
        folder = os.path.dirname(path)
        return read_rows(path, report, lambda row: self.parse(row, folder), self.name)

    def parse(self, row, folder):
        if row.get("images"):
            raise ValueError("images are for `data/prepare.py images` and train_sft.py only")
        return self.parse_text(row)

    def two_fields(self, whose):
        """-> the names that --fields gives"""
        fields = self.cfg.fields
        if len(fields) != 2:
            raise UserError(f"--fields={','.join(fields)}: give two names, of {whose}")
        return fields

    def conversation(self, role, content):
        """content: a text, which is this role's, or messages -> list of messages; ValueError"""
        if isinstance(content, str):
            content = [{"role": role, "content": content}]
        check_conversation(content)
        return self.find_thoughts(content)

    def find_thoughts(self, messages):
        """-> messages, with the thoughts that stand at the beginning of a text as such"""
        found = [with_thoughts(message) for message in messages]
        self.num_thoughts += sum(map(operator.ne, found, messages))
        return found

    def template(self, conversations, **how):
        return encode_chat(self.tokenizer, conversations, self.cfg.answer_tags, **how)

    def prompts(self, conversations):
        encoded = self.template(conversations, reply=True)
        return [Example([], (ids, [False] * len(ids))) for ids, _ in encoded]

    def store(self, array):
        return lambda row, example: None

    def counts(self, *arrays):
        return {}


class Text(Kind):
    """Contents are texts or arrays of ids, and so is what they are encoded to."""

    name, unit = "text", "documents"
    endings = TXT_FILES + ROW_FILES + ID_FILES

    def read(self, path, report):
        if path.endswith(TXT_FILES):
            return read_txt(path)
        if path.endswith(ID_FILES):
            return read_ids(path)
        return super().read(path, report)

    def parse(self, row, folder):
        if not isinstance(row.get("text"), str):
            raise ValueError('expected {"text": "..."}')
        return row["text"]

    def encode(self, contents):
        """-> list of arrays or lists of ids"""
        if not isinstance(contents[0], str):
            return contents
        if self.tokenizer.kind == "bytes":
            return [np.frombuffer(text.encode(), np.uint8) for text in contents]
        return self.tokenizer.encode_batch(contents)


class Chats(Kind):
    name, unit = "chat", "conversations"

    def parse_text(self, row):
        if self.cfg.fields:
            question, answer = self.two_fields("the user's text and the assistant's")
            texts = row.get(question), row.get(answer)
            if not all(isinstance(text, str) for text in texts):
                raise ValueError(f"expected texts {question} and {answer} as --fields says")
            question, answer = map(self.conversation, ("user", "assistant"), texts)
            return question + answer
        messages = row.get("messages")
        if not isinstance(messages, list):
            raise ValueError(
                'expected [messages] or {"messages": [...]}, or --fields for rows of two texts'
            )
        return check_reply(self.conversation("", messages))

    def encode(self, rows):
        return [Example([chat]) for chat in self.template(rows)]


class Prompts(Kind):
    name = unit = "prompts"

    def parse_text(self, row):
        prompt, answer = self.two_fields("the prompt and the answer")
        if not isinstance(row.get(answer), str):
            raise ValueError(f"expected {prompt} and {answer} (--fields), the second a text")
        return {"prompt": self.conversation("user", row.get(prompt)), "answer": row[answer]}

    def encode(self, rows):
        return self.prompts([row["prompt"] for row in rows])

    def store(self, array):
        """The rows themselves, as JSON."""
        rows, offsets = array("_rows", np.uint8), array("_row_offsets", np.uint64)
        offsets.write([0])

        def add(row, example):
            rows.write(np.frombuffer(json.dumps(row).encode(), np.uint8))
            offsets.write([rows.count])

        return add


class Pairs(Kind):
    """Rows are (prompt, chosen, rejected), lists of messages; the last two start with a reply."""

    name = unit = "pairs"

    def parse_text(self, row):
        if not {"chosen", "rejected"} <= row.keys():
            raise ValueError('expected {"chosen": ..., "rejected": ...}')
        chosen = self.conversation("assistant", row["chosen"])
        rejected = self.conversation("assistant", row["rejected"])
        prompt = row.get("prompt")
        prompt = [] if prompt in (None, []) else self.conversation("user", prompt)
        return split_pair(prompt, chosen, rejected)

    def encode(self, rows):
        """The prompt, up to <assistant>, and what follows it in either conversation."""
        examples = self.prompts([row[0] for row in rows])
        for side in (1, 2):
            chats = self.template([row[0] + row[side] for row in rows])
            for example, (ids, learn) in zip(examples, chats):
                n = len(example.prompt[0])
                if ids[:n] != example.prompt[0]:
                    raise ValueError("the folder's chat template writes an answered prompt anew")
                example.replies.append((ids[n:], learn[n:]))
        return examples


def split_pair(prompt, chosen, rejected):
    """-> prompt, chosen, rejected, where what both begin with is the prompt; ValueError"""
    if chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        # the conversations begin with it themselves
        prompt = []
    elif prompt and prompt[-1]["role"] == chosen[0]["role"] == "user" and len(chosen) > 1:
        raise ValueError("chosen begins with a user's message, but not with the prompt")
    while chosen and rejected and chosen[0] == rejected[0]:
        prompt, chosen, rejected = [*prompt, chosen[0]], chosen[1:], rejected[1:]
    reason = "without two replies to one prompt"
    if not prompt:
        raise BadRow('expected a "prompt", or chosen and rejected that begin alike', reason)
    if not (chosen and rejected and chosen[0]["role"] == rejected[0]["role"] == "assistant"):
        raise BadRow("chosen and rejected must differ, first in an assistant's turn", reason)
    return prompt, chosen, rejected


def check_reply(messages):
    """-> the messages; BadRow where there is nothing to learn"""
    if all(message["role"] != "assistant" for message in messages):
        raise BadRow("expected an assistant's turn", "without an assistant turn")
    return messages
