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
from data import forms
from data.forms import BadRow

# characters of text or bytes of rows that are in memory at once
BLOCK = 1 << 20
# characters that --val_frac moves a border at most, to the start of a line
NEAR = 1000
TXT_FILES, ID_FILES = (".txt", ".txt.gz"), (".npy", ".pkl")
ROW_FILES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
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
    fields: tuple[str, ...] = ()       # columns to read, where no known form names them
    ignore: tuple[str, ...] = ()       # columns to leave out, which would change what rows mean
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
            raise UserError(f"{option}={path}: expected one of {', '.join(endings)}")
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
    Yield (number, parse(row), bytes or characters of the row) for every row of a file. One that is
    no JSON, or for which parse raises ValueError, is reported. kind: the command that reads it
    """
    for number, load, text in raw_rows(path):
        row = None
        try:
            row = load()
            parsed = parse(row if isinstance(row, dict) else {"messages": row})
        except ValueError as error:
            report.bad(f"{path}:{number}", error, f", got {shown(row, text, kind)}")
            continue
        yield number, parsed, len(text)


def raw_rows(path):
    """Yield (number, function that returns the row or raises ValueError, its bytes) of a file."""
    if path.endswith(".parquet"):
        for number, row in enumerate(parquet_rows(path), 1):
            yield number, lambda row=row: row, str(row).encode()
        return
    with open_bytes(path) as file:
        if path.endswith((".jsonl", ".jsonl.gz")):
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, lambda line=line: load_row(line), line
            return
        reader = csv_rows if path.endswith((".csv", ".csv.gz")) else list_rows
        for number, row in reader(path, file):
            yield number, lambda row=row: row, str(row).encode("utf-8", "replace")


def list_rows(path, file):
    """Yield (number, row) of a .json that is a list of rows; UserError"""
    try:
        rows = load_row(file.read())
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: expected a list of rows; a row a line is a .jsonl")
    yield from enumerate(rows, 1)


def csv_rows(path, file):
    """Yield (line, dict of column to text) of a .csv whose first line names columns; UserError"""
    import csv

    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        reader = csv.DictReader(text, strict=True)
        names = reader.fieldnames or []
        if len(set(names)) < len(names):
            raise UserError(f"{path}: its first line names a column twice")
        for row in reader:
            if None in row or None in row.values():
                raise UserError(
                    f"{path}:{reader.line_num}: a row of another length than the first, "
                    f"which names {len(reader.fieldnames)} columns"
                )
            yield reader.line_num, row
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a .csv in UTF-8 ({error})") from None


def parquet_rows(path):
    """Yield the rows of a .parquet, dicts; UserError"""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"{path}: pyarrow is missing, which reads it: pip install pyarrow, "
            'or this package with its extra "parquet"'
        ) from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: damaged, or no parquet file ({error!r:.80})") from None


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
    kinds = [name for keys, name in HINTS.items() if row.keys() >= set(keys.split())]
    if kind and kinds and kind not in kinds:
        text += f", which is for `data/prepare.py {kinds[0]}`"
    return text


# -----------------------------------------------------------------------------
# what a tokenizer learns from

# columns and fields of messages that hold what is said
SAID = ("system", "messages", "conversations", "history", *forms.QUESTIONS, "input", *forms.ANSWERS)
SAID += ("chosen", "rejected", "content", "value", "think", "reasoning_content", "text")


def read_lines(paths, fields):
    """Yield the lines of text of files; of rows, those of `texts_of`."""
    for path in paths:
        pieces = read_txt(path)
        if not path.endswith(TXT_FILES):
            pieces = read_rows(path, Report(None), lambda row: texts_of(row, fields))
        for _, text, _ in pieces:
            yield from filter(None, text.splitlines())


def texts_of(row, fields):
    """-> the fields that a row has, else all that its conversation says, a line or more each"""
    texts = [row[field] for field in fields if field in row]
    texts = texts or list(said({name: row.get(name) for name in SAID if name in row}))
    if not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"expected a conversation or {', '.join(fields)} (--fields)")
    return "\n".join(texts)


def said(value):
    """Yield the texts of a row, message or part, or of a list of them"""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from said(one)
    elif isinstance(value, dict):
        for name in SAID:
            yield from said(value.get(name))


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
    fields         what --fields names
    form(Columns, names of --fields) -> name of the row's form, what `check` takes; see forms.py
    check(this) -> the content, which `encode` and `store` take, or ValueError. Or all in one:
    parse(row, folder of its file) -> the content
    encode(list of contents) -> list of Example
    store(array) -> function of (content, Example) that stores what belongs to it beside the tokens,
                   or raises BadRow; array(name, dtype, shape of an entry) opens a file
    counts(*those arrays) -> dict of what meta.json counts of a split besides
    """

    endings, meta = ROW_FILES, {}
    # forms that need no word
    own_forms = ("messages", "prompt, answer", "prompt, pairs", "pairs", "text")

    def __init__(self, cfg, tokenizer):
        self.cfg, self.tokenizer = cfg, tokenizer
        # messages whose thoughts were written in their text; rows of each form, with each column
        # that is not read
        self.num_thoughts, self.forms, self.unread = 0, Counter(), Counter()
        if cfg.fields and len(cfg.fields) != len(self.fields):
            *first, last = self.fields
            number = {1: "one name", 2: "two names", 3: "three names"}[len(self.fields)]
            whose = f"{', '.join(first)} and {last}" if first else last
            raise UserError(f"--fields={','.join(cfg.fields)}: give {number}, of {whose}")

    def read(self, path, report):
        folder = os.path.dirname(path)
        return read_rows(path, report, lambda row: self.parse(row, folder), self.name)

    def parse(self, row, folder):
        columns = forms.Columns(row, self.cfg.ignore)
        if columns.row.get("images"):
            raise ValueError("images are for `data/prepare.py images` and train_sft.py only")
        form, content = self.form(columns, self.cfg.fields)
        content = self.check(content)
        for name in columns.unread():
            if name in forms.MEANT and name not in self.cfg.ignore:
                raise ValueError(f"the column {name} is not read; --ignore={name} leaves it out")
            self.unread[name] += 1
        self.forms[form] += 1
        return content

    def conversation(self, messages, is_prompt=False):
        """-> messages, with their thoughts as such; ValueError where they are no conversation"""
        check_conversation(messages)
        messages = self.find_thoughts(messages)
        forms.check_order(messages, is_prompt)
        return messages

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

    name, unit, fields = "text", "documents", ("the text",)
    endings = TXT_FILES + ROW_FILES + ID_FILES

    def read(self, path, report):
        if path.endswith(TXT_FILES):
            return read_txt(path)
        if path.endswith(ID_FILES):
            return read_ids(path)
        return super().read(path, report)

    def form(self, columns, fields):
        name = fields[0] if fields else "text"
        return name, columns.take(name)

    def check(self, text):
        if not isinstance(text, str):
            raise ValueError('expected {"text": "..."}, or --fields')
        return text

    def encode(self, contents):
        """-> list of arrays or lists of ids"""
        if not isinstance(contents[0], str):
            return contents
        if self.tokenizer.kind == "bytes":
            return [np.frombuffer(text.encode(), np.uint8) for text in contents]
        return self.tokenizer.encode_batch(contents)


class Chats(Kind):
    name, unit = "chat", "conversations"
    fields = "the user's text", "the assistant's"
    form = staticmethod(forms.chat)

    def check(self, messages):
        return check_reply(self.conversation(messages))

    def encode(self, rows):
        return [Example([chat]) for chat in self.template(rows)]


class Prompts(Kind):
    name = unit = "prompts"
    fields = "the prompt", "the answer"
    form = staticmethod(forms.prompts)

    def check(self, row):
        return dict(row, prompt=self.conversation(row["prompt"], is_prompt=True))

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
    fields = "the prompt", "the better answer", "the worse one"
    form = staticmethod(forms.pairs)

    def check(self, sides):
        for messages in filter(None, sides):
            check_conversation(messages)
        prompt, *replies = split_pair(*sides)
        for reply in replies:
            forms.check_order(prompt + reply)
        prompt = self.conversation(prompt, is_prompt=True)
        return prompt, *map(self.find_thoughts, replies)

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
