"""
What `data/prepare.py` reads: files to documents (text or token ids) or rows (lines of a .jsonl),
and rows to tokens, one class for each kind of row.

Text must be UTF-8; nothing is normalised. A row that cannot be used raises ValueError, or `BadRow`
where it is not malformed; `Report` ends the run there, or counts the row.
"""

import contextlib
import glob
import gzip
import io
import json
import os
import pickle
import re
import zlib
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.chat import check_conversation, encode_chat
from common.errors import UserError

# characters of text or bytes of rows that are in memory at once
BLOCK = 1 << 20
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


# -----------------------------------------------------------------------------
# files


def find_files(patterns, endings, option="--input"):
    """-> paths that globs match, in order, without repeats; UserError where one matches nothing"""
    paths = []
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        found = [path for path in found if os.path.isfile(path)]
        if not found and os.path.isdir(pattern):
            raise UserError(
                f"{option}={pattern}: a folder; give {pattern}/*.jsonl, {pattern}/*.txt or the like"
            )
        if not found:
            raise UserError(f"{option}={pattern}: no such file")
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
    """-> list of (split, path); UserError where the options contradict each other"""
    if cfg.val_input and cfg.val_frac or not 0 <= cfg.val_frac < 1:
        raise UserError(
            f"--val_frac={cfg.val_frac}: must be a fraction below 1, "
            "and not together with --val_input"
        )
    train = find_files(cfg.input, endings)
    val = find_files(cfg.val_input, endings, "--val_input")
    for path in val:
        if path in train:
            raise UserError(f"--val_input: {path} is in --input too; give it to one of them")
    return [("train", path) for path in train] + [("val", path) for path in val]


@contextlib.contextmanager
def open_bytes(path):
    """The file, unzipped; UserError where it is damaged."""
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
        try:
            yield file
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: damaged or truncated ({error})") from None


class Report:
    """What was left out: counts, and where the first ones are."""

    def __init__(self, bad_rows):
        """bad_rows: the option, or None where there is no such option"""
        self.bad_rows, self.counts, self.first = bad_rows, Counter(), defaultdict(list)

    def left_out(self):
        return {reason: n for reason, n in self.counts.items() if not reason.startswith("cut")}

    def bad(self, reason, where, what):
        if self.bad_rows != "skip":
            hint = ", or leave such rows out with --bad_rows=skip" if self.bad_rows else ""
            raise UserError(f"{where}: {what}; mend it{hint}")
        self.skip(reason, where)

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
# documents: yield (number in its file, text or array of ids), a long one in several pieces


def read_txt(path):
    """One document, in blocks that end with a line (unless the line is longer than a block)."""
    with open_bytes(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        try:
            # an empty file is an empty document
            yield 0, text.read(BLOCK) + text.readline(BLOCK)
            while block := text.read(BLOCK):
                yield 0, block + text.readline(BLOCK)
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
            yield number, ids[start : start + BLOCK]


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


class BadRow(ValueError):
    """A row that is left out for another reason than being malformed."""

    def __init__(self, message, reason):
        super().__init__(message)
        self.reason = reason


def read_rows(path, report, parse, kind=""):
    """
    Yield (line number, parse(row), bytes of the line) for every line of a .jsonl. A line that is
    not JSON, or for which parse raises ValueError, is reported. kind: the command that reads it
    """
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                row = json.loads(text)
                if SURROGATE.search(line):
                    # half a character is not text
                    json.dumps(row, ensure_ascii=False).encode()
            except UnicodeDecodeError as error:
                report.bad(
                    "malformed",
                    where,
                    f"not UTF-8 ({error.reason}); convert the whole file, e.g. with iconv",
                )
                continue
            except (ValueError, RecursionError) as error:
                report.bad("malformed", where, f"not JSON ({error}), one row a line")
                continue
            try:
                parsed = parse(row)
            except ValueError as error:
                reason = error.reason if isinstance(error, BadRow) else "malformed"
                report.bad(reason, where, f"{error}, got {shown(row, text.strip(), kind)}")
                continue
            yield number, parsed, len(line)


# the keys of rows, and whose they are
HINTS = {
    ("chosen", "rejected"): "pairs",
    ("prompt", "answer"): "prompts",
    ("messages",): "chat",
    ("text",): "text",
}


def shown(row, text, kind):
    """A row for a message: its start, or its keys if it is long; and which command reads it."""
    if not isinstance(row, dict):
        return text if len(text) <= 60 else text[:57] + "..."
    if len(text) > 60:
        text = f"a row with {', '.join(row)[:60]}"
    if "conversations" in row:
        return text + (
            ', which is ShareGPT\'s form; call "conversations" "messages", '
            '"from" "role" and "value" "content"'
        )
    kinds = [name for keys, name in HINTS.items() if row.keys() >= set(keys)]
    if kind and kinds and kind not in kinds:
        text += f", which is for `data/prepare.py {kinds[0]}`"
    return text


def text_of(row):
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ValueError('expected {"text": "..."}')
    return row["text"]


def texts_of(row, fields):
    """-> what a tokenizer learns from a row: the fields that it has, else what its messages say."""
    texts, messages = [], row
    if isinstance(row, dict):
        texts = [row[field] for field in fields if field in row]
        messages = row.get("messages")
    if not texts and isinstance(messages, list):
        messages = [message for message in messages if isinstance(message, dict)]
        said = [
            message[key] for message in messages for key in ("content", "think") if key in message
        ]
        texts = [text for text in said if not isinstance(text, list)]
        # a content may be a list of texts and images
        parts = [part for text in said if isinstance(text, list) for part in text]
        texts += [part["text"] for part in parts if isinstance(part, dict) and "text" in part]
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"expected a conversation or {', '.join(fields)} (--fields)")
    return texts


# -----------------------------------------------------------------------------
# kinds of rows that become examples


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
    A kind of rows.

    name, unit     of its sets; what the rows are called
    meta           what meta.json says besides
    parse(row, folder of its file) -> what `encode` and `store` take, or ValueError
    encode(list of these) -> list of Example
    store(array) -> function of (parsed row, Example) that stores what belongs to it beside the
                   tokens, or raises BadRow; array(name, dtype, shape of an entry) opens a file
    counts(*those arrays) -> what meta.json counts of them
    """

    meta = {}

    def __init__(self, cfg, tokenizer):
        self.cfg, self.tokenizer = cfg, tokenizer

    def template(self, conversations, **how):
        return encode_chat(self.tokenizer, conversations, self.cfg.answer_tags, **how)

    def prompts(self, conversations):
        encoded = self.template(conversations, reply=True)
        return [Example([], (ids, [False] * len(ids))) for ids, _ in encoded]

    def store(self, array):
        return lambda row, example: None

    def counts(self, *arrays):
        return {}


class Chats(Kind):
    name, unit = "chat", "conversations"

    def parse(self, row, folder):
        refuse_images(row)
        if self.cfg.fields:
            return chat_of_fields(row, *self.cfg.fields)
        messages = row["messages"] if isinstance(row, dict) and "messages" in row else row
        if isinstance(messages, dict):
            raise ValueError(
                'expected [messages] or {"messages": [...]}, or --fields for rows of two texts'
            )
        check_conversation(messages)
        return check_reply(messages)

    def encode(self, rows):
        return [Example([chat]) for chat in self.template(rows)]


class Prompts(Kind):
    name = unit = "prompts"

    def parse(self, row, folder):
        refuse_images(row)
        prompt, answer = self.cfg.fields
        if not isinstance(row, dict) or not isinstance(row.get(answer), str):
            raise ValueError(f"expected {prompt} and {answer} (--fields), the second a text")
        messages = as_messages("user", row.get(prompt))
        check_conversation(messages)
        return {"prompt": messages, "answer": row[answer]}

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

    def parse(self, row, folder):
        refuse_images(row)
        if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
            raise ValueError('expected {"chosen": ..., "rejected": ...}')
        chosen = as_messages("assistant", row["chosen"])
        rejected = as_messages("assistant", row["rejected"])
        prompt = as_messages("user", row.get("prompt"))
        check_conversation(chosen)
        check_conversation(rejected)
        if prompt is None:
            prompt = []
        elif prompt != []:
            check_conversation(prompt)
        return split_pair(prompt, chosen, rejected)

    def encode(self, rows):
        """The prompt, up to <assistant>, and what follows it in either conversation."""
        examples = self.prompts([row[0] for row in rows])
        for side in (1, 2):
            chats = self.template([row[0] + row[side] for row in rows])
            for example, (ids, learn) in zip(examples, chats):
                n = len(example.prompt[0])
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


def as_messages(role, content):
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def chat_of_fields(row, question, answer):
    if not isinstance(row, dict) or not all(
        isinstance(row.get(name), str) for name in (question, answer)
    ):
        raise ValueError(f"expected texts {question} and {answer} as --fields says")
    return as_messages("user", row[question]) + as_messages("assistant", row[answer])


def check_reply(messages):
    """-> the messages; BadRow where there is nothing to learn"""
    if all(message["role"] != "assistant" for message in messages):
        raise BadRow("expected an assistant's turn", "without an assistant turn")
    return messages


def refuse_images(row):
    if isinstance(row, dict) and row.get("images"):
        raise ValueError("images are for `data/prepare.py images` and train_sft.py only")
