"""
Prepare data: text to memory-mapped token sets, and new tokenizers.

    python data/prepare.py tokenizer --input=books/*.txt --vocab_size=4096 --out=out/tok.model
    python data/prepare.py text --input=books/*.txt,more.jsonl --val_frac=0.05 --tokenizer=out/tok.model
    python data/prepare.py chat --input=chats.jsonl --val_frac=0.05 --tokenizer=out/tok.model
    python data/prepare.py pairs --input=pairs.jsonl --val_frac=0.05 --tokenizer=out/tok.model
    python data/prepare.py prompts --input=prompts.jsonl --val_frac=0.05 --tokenizer=out/tok.model
    python data/prepare.py images --input=chats.jsonl --val_frac=0.05 --tokenizer=out/tok.model

--input takes files and globs, separated by commas, in any mix (all but .npy and .pkl also gzipped, .gz).
text:
    .txt    one document a file                   .npy  token ids: (n,) one document, (documents, n) one a row
    .jsonl  one document a line, {"text": "..."}  .pkl  a list of token ids, or a list of such lists
chat:
    .jsonl  a conversation a line, [{"role": "user", "content": "..."}, {"role": "assistant", ...}] or
            {"messages": [...]}; roles: system, user, assistant, the last with "think": "..." if it has any
pairs:
    .jsonl  a pair a line, {"chosen": [messages], "rejected": [messages]}, two conversations that start alike,
            or {"prompt": ..., "chosen": ..., "rejected": ...}, each a text or a list of messages
prompts:
    .jsonl  a prompt a line, {"prompt": ..., "answer": "..."}: a text or a list of messages, and what a reward
            function is given with the completion ("" if it needs nothing)
images:
    .jsonl  as for chat, and a content may show images: see data/images.py
--tokenizer: bytes, x.model (SentencePiece), x.tiktoken, a folder with vocab.json and merges.txt, or gpt2.

--out_dir appears whole or not at all; an existing one is never touched. Memory does not grow with the input.
"""
import contextlib
import dataclasses
import glob
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import shutil
import sys
import time
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common.chat import check_conversation, encode_chat  # noqa: E402  (the root must be on the path first)
from common.config import parse_config  # noqa: E402
from common.errors import UserError, show_user_errors  # noqa: E402
from common.tokenizer import load_tokenizer, token_byte_counts, train_sentencepiece  # noqa: E402
from common.vision import pillow  # noqa: E402
from data.images import (  # noqa: E402
    BadImage,
    ImagesConfig,
    Pictures,
    images_info,
    paths_of,
    with_paths,
)

BLOCK = 1 << 20                        # characters of text that are held and tokenized at once
NEAR = 1000                            # characters that --val_frac moves a border at most, to a line's start


@dataclass(frozen=True)
class TextConfig:
    input: tuple[str, ...] = ()        # files and globs of training text
    val_input: tuple[str, ...] = ()    # files and globs of validation text, when it is kept apart
    val_frac: float = 0.0              # else: held-out fraction of documents (.txt: of characters at the end)
    tokenizer: str = "bytes"           # bytes, x.model, x.tiktoken, folder with vocab.json + merges.txt, gpt2
    out_dir: str = "out/data"          # the set, must not exist
    bad_rows: Literal["error", "skip"] = "error"  # malformed lines: stop at the first, or count and skip them
    seed: int = 1337                   # which documents are held out


@dataclass(frozen=True)
class ChatConfig:
    input: tuple[str, ...] = ()        # files and globs of training conversations (.jsonl)
    val_input: tuple[str, ...] = ()    # files and globs of validation conversations, when kept apart
    val_frac: float = 0.0              # else: held-out fraction of conversations
    fields: tuple[str, ...] = ()       # for rows of two texts: names of the user's, the assistant's
    tokenizer: str = "bytes"           # that of the model to be trained: its run, or as in `text --help`
    answer_tags: bool = True           # put <answer> and </answer> around what an assistant says
    max_len: int = 0                   # tokens in a conversation at most, tags included; 0 = no limit
    long_rows: Literal["error", "skip", "cut"] = "error"  # longer ones: stop, leave out, or cut the end off
    bad_rows: Literal["error", "skip"] = "error"  # malformed lines: stop at the first, or count and skip them
    out_dir: str = "out/chat"          # the set, must not exist
    seed: int = 1337                   # which conversations are held out


@dataclass(frozen=True)
class PairsConfig:
    input: tuple[str, ...] = ()        # files and globs of training pairs (.jsonl)
    val_input: tuple[str, ...] = ()    # files and globs of validation pairs, when they are kept apart
    val_frac: float = 0.0              # else: held-out fraction of pairs
    tokenizer: str = "bytes"           # that of the model to be trained: its run, or as in `text --help`
    answer_tags: bool = True           # put <answer> and </answer> around what an assistant says
    max_len: int = 0                   # tokens of prompt and one answer at most, tags included; 0 = no limit
    long_rows: Literal["error", "skip", "cut"] = "error"  # longer ones: stop, leave out, or cut the end off
    bad_rows: Literal["error", "skip"] = "error"  # malformed lines: stop at the first, or count and skip them
    out_dir: str = "out/pairs"         # the set, must not exist
    seed: int = 1337                   # which pairs are held out


@dataclass(frozen=True)
class PromptsConfig:
    input: tuple[str, ...] = ()        # files and globs of training prompts (.jsonl)
    val_input: tuple[str, ...] = ()    # files and globs of validation prompts, when they are kept apart
    val_frac: float = 0.0              # else: held-out fraction of prompts
    fields: tuple[str, ...] = ("prompt", "answer")  # names of the prompt's text and the answer's in a row
    tokenizer: str = "bytes"           # that of the model to be trained: its run, or as in `text --help`
    answer_tags: bool = True           # <answer> and </answer> around what an assistant has said in prompts
    max_len: int = 0                   # tokens in a prompt at most, tags included; 0 = no limit
    long_rows: Literal["error", "skip"] = "error"  # longer ones: stop, or leave out
    bad_rows: Literal["error", "skip"] = "error"  # malformed lines: stop at the first, or count and skip them
    out_dir: str = "out/prompts"       # the set, must not exist
    seed: int = 1337                   # which prompts are held out


@dataclass(frozen=True)
class TokenizerConfig:
    input: tuple[str, ...] = ()        # files and globs of text (.txt, .jsonl)
    fields: tuple[str, ...] = ("text",)  # texts of a .jsonl row to learn from; of conversations: all
    vocab_size: int = 4096             # tokens, the special ones included
    out: str = "out/tokenizer.model"   # SentencePiece model to write, must not exist


# -----------------------------------------------------------------------------
# reading: every reader yields (document number in its file, piece of text or array of ids);
# a document may come in pieces

def find_files(patterns, option="--input"):
    """Expand globs, in order and without repeats; a pattern that matches nothing is an error."""
    paths = []
    for pattern in patterns:
        found = [pattern] if os.path.isfile(pattern) else sorted(glob.glob(pattern, recursive=True))
        found = [path for path in found if os.path.isfile(path)]
        if not found:
            folder = f"a folder; give {pattern}/*.jsonl, {pattern}/*.txt or the like"
            raise UserError(f"{option}={pattern}: {folder if os.path.isdir(pattern) else 'no such file'}")
        paths += [path for path in found if path not in paths]
    if not paths:
        raise UserError(f"{option}: give files to read, e.g. {option}=books/*.txt")
    return paths


def kind_of(path):
    return os.path.splitext(path.removesuffix(".gz"))[1]


def inputs_of(cfg, kinds):
    """-> list of (split, path), each of one of the kinds; UserError where files or fractions do not fit."""
    if cfg.val_input and cfg.val_frac or not 0 <= cfg.val_frac < 1:
        raise UserError(f"--val_frac={cfg.val_frac}: a fraction below 1, and not together with --val_input")
    inputs = [("train", path) for path in find_files(cfg.input)]
    inputs += [("val", path) for path in (find_files(cfg.val_input, "--val_input") if cfg.val_input else [])]
    for home, path in inputs:
        if kind_of(path) not in kinds or path.endswith((".npy.gz", ".pkl.gz")):
            expected = " or ".join(filter(None, [", ".join(kinds[:-1]), kinds[-1]]))
            other = "; README.md, \"Data formats\", makes .jsonl of .json and .csv" \
                if kind_of(path) in (".json", ".csv", ".tsv") else ""
            raise UserError(f"--{'val_' * (home == 'val')}input={path}: expected {expected} ("
                            + ".txt and " * (".txt" in kinds) + f".jsonl also gzipped, as .gz){other}")
        if home == "val" and ("train", path) in inputs:
            raise UserError(f"--val_input: {path} is in --input too; give it to one of them")
    return inputs


def open_bytes(path):
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def read_txt(path, report):
    """One document, in blocks that end at the end of a line (unless the line is longer than a block)."""
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8", newline="") as file:
        try:
            yield 0, file.read(BLOCK) + file.readline(BLOCK)                  # "" for an empty file
            while block := file.read(BLOCK):
                yield 0, block + file.readline(BLOCK)
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason} near byte {file.buffer.tell()}); "
                            "convert it first, e.g. with iconv") from None


def read_json_rows(path, report):
    """Yield (line number, value) of every line that is JSON."""
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                json.dumps(row, ensure_ascii=False).encode()  # a lone surrogate is not text
            except UnicodeDecodeError as error:
                report.bad("malformed", f"{path}:{number}", f"not UTF-8 ({error.reason}); convert the whole "
                           "file, e.g. with iconv")
                continue
            except (ValueError, RecursionError) as error:
                report.bad("malformed", f"{path}:{number}", f"not JSON ({error}), one row a line")
                continue
            yield number, row


def read_jsonl(path, report):
    """One document a line."""
    for number, row in read_json_rows(path, report):
        if isinstance(row, dict) and isinstance(row.get("text"), str):
            yield number, row["text"]
        else:
            what = f'expected {{"text": "..."}}, got {shown(row, "text")}'
            report.bad("malformed", f"{path}:{number}", what)


def read_all_texts(path, fields):
    """For a tokenizer: the fields of every line that has one of them, else what its messages say."""
    for number, row in read_json_rows(path, Report("error")):
        texts = [row[field] for field in fields if field in row] if isinstance(row, dict) else []
        messages = row.get("messages", []) if isinstance(row, dict) else row
        if not texts and isinstance(messages, list):
            said = [message[key] for message in messages if isinstance(message, dict)
                    for key in ("content", "think") if key in message]
            parts = [part for text in said if isinstance(text, list) for part in text]   # text or image
            texts = [text for text in said if not isinstance(text, list)]
            texts += [part["text"] for part in parts if isinstance(part, dict) and "text" in part]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise UserError(f"{path}:{number}: expected a conversation or {', '.join(fields)} (--fields), "
                            f"got {shown(row)}")
        yield from ((number, text) for text in texts)


def shown(row, kind=""):
    """
    The start of a row, for a message: its keys, which say most, when it is long; and the command that takes
    such rows, if it is not this one (kind)
    """
    keys = set(row) if isinstance(row, dict) else set()
    home = next((name for name, its in (("pairs", {"chosen", "rejected"}), ("prompts", {"prompt", "answer"}),
                                        ("chat", {"messages"}), ("text", {"text"})) if its <= keys), kind)
    hint = f", which is for `data/prepare.py {home}`" if kind and home != kind else \
        ', ShareGPT\'s form; call "conversations" "messages", "from" "role" and "value" "content"' \
        if "conversations" in keys else ""
    text = json.dumps(row, ensure_ascii=False)
    if keys and len(text) > 60:
        return f"a row with {', '.join(row)[:60]}{hint}"
    return (text if len(text) <= 60 else text[:57] + "...") + hint


class OnlyLists(pickle.Unpickler):
    """Reads lists, dicts, tuples, ints, strings. What asks for anything by name could run code: refused."""
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_ids(path, report):
    """.npy or .pkl: documents as arrays of token ids."""
    try:
        if path.endswith(".npy"):
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
                raise UserError(f"{path}: expected an integer array of one or two dimensions, "
                                f"got {array.dtype} {array.shape}")
            documents = array[None] if array.ndim == 1 else array
        else:
            with open(path, "rb") as file:
                documents = OnlyLists(file).load()
            if not isinstance(documents, list):
                raise UserError(f"{path}: expected a list of token ids, or of lists of them, "
                                f"got {type(documents).__name__}")
            if not documents or not isinstance(documents[0], (list, tuple)):
                documents = [documents]
    except (pickle.UnpicklingError, EOFError, ValueError, OSError, AttributeError, IndexError, KeyError,
            TypeError, OverflowError, MemoryError) as error:  # what damaged pickles raise
        raise UserError(f"{path}: refused or damaged ({error or type(error).__name__})") from None
    for number, ids in enumerate(documents):
        if not isinstance(ids, (list, tuple, np.ndarray)):
            raise UserError(f"{path}: document {number} is a {type(ids).__name__}, not a list of token ids")
        for start in range(0, max(1, len(ids)), BLOCK):
            piece = ids[start:start + BLOCK]
            if isinstance(piece, (list, tuple)) and (wrong := {type(i) for i in piece} - {int}):
                raise UserError(f"{path}: document {number} holds {wrong.pop().__name__}, not token ids")
            try:
                yield number, np.asarray(piece, None if isinstance(piece, np.ndarray) else np.int64)
            except OverflowError:
                raise UserError(f"{path}: document {number} holds ids of more than 64 bits") from None


READERS = {".txt": read_txt, ".jsonl": read_jsonl, ".npy": read_ids, ".pkl": read_ids}


class Report:
    """What was left out: counts, and where the first ones are."""

    def __init__(self, on_bad):
        self.on_bad, self.counts, self.first = on_bad, {}, {}

    def left_out(self):
        return {reason: count for reason, count in self.counts.items() if not reason.startswith("cut")}

    def bad(self, reason, where, what):
        if self.on_bad == "error":
            raise UserError(f"{where}: {what}; mend it, or leave such rows out with --bad_rows=skip")
        self.skip(reason, where)

    def skip(self, reason, where):
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, []).append(where)
        del self.first[reason][5:]

    def print(self):
        for reason, count in self.counts.items():
            what = f"{count:,} {reason}" if reason.startswith("cut") else f"left out {count:,} {reason}"
            print(f"{what}: {', '.join(self.first[reason])}{', ...' * (count > 5)}")


class Progress:
    """A line on a terminal, or one every ten seconds in a log file."""

    def __init__(self, paths):
        self.total, self.done, self.start = sum(map(os.path.getsize, paths)), 0, time.time()
        self.tty, self.last = sys.stderr.isatty(), time.time()

    def show(self, tokens, done_file=None):
        if done_file:
            self.done += os.path.getsize(done_file)
        if time.time() - self.last < (0.2 if self.tty else 10):
            return
        self.last = time.time()
        print(f"{self.done / 2**20:,.0f} of {self.total / 2**20:,.0f} MiB of files | {tokens:,} tokens | "
              f"{tokens / (time.time() - self.start):,.0f} tok/s",
              end="\r" if self.tty else "\n", file=sys.stderr, flush=True)


# -----------------------------------------------------------------------------
# writing

class ArrayWriter:
    """
    A .npy of unknown length, written front to back: room is left for the header, filled in at the end.
    row: shape of what it is a list of
    """
    HEADER = 128

    def __init__(self, path, dtype, row=()):
        self.file, self.dtype, self.count, self.sha = open(path, "wb"), np.dtype(dtype), 0, hashlib.sha256()
        self.row = row
        self.file.write(b" " * self.HEADER)

    def write(self, values):
        content = np.ascontiguousarray(values, self.dtype).tobytes()
        self.file.write(content)
        self.sha.update(content)
        self.count += len(values)

    def close(self):
        shape = (self.count, *self.row)
        text = f"{{'descr': '{self.dtype.str}', 'fortran_order': False, 'shape': {shape}, }}"
        self.file.seek(0)
        self.file.write(b"\x93NUMPY\x01\x00" + (self.HEADER - 10).to_bytes(2, "little")
                        + text.ljust(self.HEADER - 11).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


@contextlib.contextmanager
def whole_or_nothing(out_dir):
    """Gives a folder to write into; it becomes out_dir at the end, or goes when anything fails."""
    if os.path.exists(out_dir):
        raise UserError(f"--out_dir={out_dir}: already there; remove it or choose another")
    aside = out_dir.rstrip("/") + ".partial"
    shutil.rmtree(aside, ignore_errors=True)                  # what a killed run has left
    try:
        os.makedirs(aside)
        yield aside
        os.rename(aside, out_dir)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{error.filename or out_dir}: {error.strerror}") from None
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def describe(folder, kind, tokenizer, splits, report, cfg, **more):
    """Write what goes with the arrays of a set: the tokenizer's files and meta.json. more: for meta.json"""
    for name, content in tokenizer.files().items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    meta = dict(kind=kind, vocab_size=tokenizer.vocab_size, end=tokenizer.end, pad=tokenizer.pad,
                fingerprint=tokenizer.fingerprint, data_fingerprint=splits["train"]["sha256"][:16],
                splits=splits, left_out=report.left_out(), made_with=dataclasses.asdict(cfg), **more)
    with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)


def prepare_text(cfg):
    """Tokenize everything into cfg.out_dir; see data.py for what is in there."""
    with whole_or_nothing(cfg.out_dir) as folder:
        inputs = inputs_of(cfg, (".txt", ".jsonl", ".npy", ".pkl"))
        tokenizer, report = load_tokenizer(cfg.tokenizer), Report(cfg.bad_rows)
        splits = write_tokens(inputs, tokenizer, cfg, report, folder)
        np.save(os.path.join(folder, "token_bytes.npy"), token_byte_counts(tokenizer))
        describe(folder, "text", tokenizer, splits, report, cfg)
    report.print()
    for split, count in splits.items():
        print(f"{cfg.out_dir}/{split}.npy: {count['documents']:,} documents, {count['bytes']:,} bytes, "
              f"{count['tokens']:,} tokens, vocabulary of {tokenizer.vocab_size:,}")


def write_tokens(inputs, tokenizer, cfg, report, folder):
    """-> dict split -> counts. Each document goes to a split whole, but a .txt is divided by position."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    byte_counts, draw = token_byte_counts(tokenizer), random.Random(cfg.seed)
    progress = Progress([path for _, path in inputs])
    writers = {}
    counts = {}

    def put(split, ids):
        if split not in writers:
            writers[split] = ArrayWriter(os.path.join(folder, f"{split}.npy"), dtype)
            counts[split] = dict(documents=0, tokens=0, bytes=0)
        writers[split].write(ids)
        counts[split]["bytes"] += int(byte_counts[ids].sum(dtype=np.int64))

    def finish(split, last):
        if last != tokenizer.end:                             # token ids may bring their own end tokens
            put(split, np.array([tokenizer.end]))
        counts[split]["documents"] += 1

    for home, path in inputs:
        pieces = divide_txt(path, home, cfg.val_frac, report) if kind_of(path) == ".txt" else \
            divide_documents(path, home, cfg.val_frac, draw, report)
        document, last = None, None                           # the document that is being written
        for split, number, ids in tokenize(damage_named(pieces, path), tokenizer, path):
            if document is not None and document != (split, number):
                finish(document[0], last)
                document = None
            if not len(ids):
                if document is None:
                    report.skip("empty documents", f"{path}:{number}")
                continue
            if document is None and list(ids[:1]) != tokenizer.begin:       # token ids may bring this too
                put(split, np.array(tokenizer.begin, dtype=np.int64))
            put(split, ids)
            document, last = (split, number), ids[-1]
            progress.show(sum(w.count for w in writers.values()))
        if document is not None:
            finish(document[0], last)
        progress.show(sum(w.count for w in writers.values()), done_file=path)
    check_splits(counts, cfg, "documents", report)
    for split, writer in writers.items():
        writer.close()
        counts[split] |= dict(tokens=writer.count, sha256=writer.sha.hexdigest())
    return counts


def check_splits(splits, cfg, what, report):
    """UserError when a split that was asked for has got nothing."""
    splits = {split: counts for split, counts in splits.items() if counts[what]}
    if "train" not in splits or (cfg.val_frac or cfg.val_input) and "val" not in splits:
        report.print()                                        # it may say why
    if "train" not in splits:
        raise UserError(f"--input: no {what} left to train on" + (
            ", everything went to validation; lower --val_frac" if "val" in splits else ""))
    if cfg.val_frac and "val" not in splits:
        raise UserError(f"--val_frac={cfg.val_frac}: none of the {splits['train'][what]} {what} "
                        "was drawn for validation; raise it, or name files with --val_input")
    if cfg.val_input and "val" not in splits:
        raise UserError(f"--val_input={','.join(cfg.val_input)}: no {what} in there")


def damage_named(pieces, path):
    """The same pieces; what gzip raises on a damaged file becomes a UserError that names it."""
    try:
        yield from pieces
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged or truncated ({error})") from None


def divide_documents(path, home, val_frac, draw, report):
    """Yield (split, number, text or ids): a held-out document is drawn once, however many its pieces."""
    previous, split = None, home
    for number, piece in READERS[kind_of(path)](path, report):
        if number != previous and val_frac:
            split = "val" if draw.random() < val_frac else "train"
        previous = number
        yield split, number, piece


def divide_txt(path, home, val_frac, report):
    """Yield (split, number, text): the last val_frac of the characters, from a line's start, is held out."""
    cut = None
    if val_frac:
        cut = round((1 - val_frac) * sum(len(piece) for _, piece in read_txt(path, report)))
    seen = 0
    for number, piece in read_txt(path, report):
        if cut is None or seen + len(piece) <= cut:
            yield home, number, piece
        elif seen >= cut:
            yield "val", number, piece
        else:
            at = piece.rfind("\n", 0, cut - seen) + 1 or (0 if seen else cut - seen)
            if cut - seen - at > NEAR:                        # a far line start would change the share
                at = cut - seen
            yield home, number, piece[:at]
            yield "val", number, piece[at:]
        seen += len(piece)


def tokenize(pieces, tokenizer, path):
    """(split, number, text or ids) -> (split, number, array of ids), many texts in one call; ids checked."""
    waiting, size = [], 0
    for split, number, piece in pieces:
        if isinstance(piece, str):
            waiting.append((split, number, piece))
            size += len(piece)
            if size >= BLOCK:
                yield from encode_all(waiting, tokenizer)
                waiting, size = [], 0
            continue
        if piece.size and not 0 <= piece.min() <= piece.max() < tokenizer.vocab_size:
            wrong = piece.min() if piece.min() < 0 else piece.max()
            raise UserError(f"{path}: document {number} has token id {wrong}, but --tokenizer has "
                            f"{tokenizer.vocab_size}; give the tokenizer that made these ids")
        yield split, number, piece
    yield from encode_all(waiting, tokenizer)


def encode_all(waiting, tokenizer):
    if tokenizer.kind == "bytes":
        encoded = [np.frombuffer(text.encode(), np.uint8) for _, _, text in waiting]
    else:
        encoded = tokenizer.encode_batch([text for _, _, text in waiting])
    for (split, number, _), ids in zip(waiting, encoded):
        yield split, number, np.asarray(ids)


# -----------------------------------------------------------------------------
# conversations

class ExampleWriter:
    """Examples of any length, one after the other: tokens, which of them are learned, where each begins."""

    def __init__(self, folder, split, dtype, keep_rows=False):
        self.keep_rows, kinds = keep_rows, [("", dtype), ("_mask", np.uint8), ("_offsets", np.uint64)]
        kinds += [("_rows", np.uint8), ("_row_offsets", np.uint64)] * keep_rows
        self.writers = [ArrayWriter(os.path.join(folder, f"{split}{name}.npy"), kind) for name, kind in kinds]
        self.tokens, self.mask, self.offsets, *_ = self.writers
        for writer in self.writers[2::2]:                     # where the first one begins
            writer.write([0])
        self.longest = self.targets = self.count = 0

    def add(self, parts, row):
        """parts: list of (ids, counts), each an example; the first and any one other make one sequence"""
        if self.keep_rows:
            _, _, _, rows, row_offsets = self.writers
            rows.write(np.frombuffer(json.dumps(row).encode(), np.uint8))
            row_offsets.write([rows.count])
        for ids, counts in parts:
            self.tokens.write(ids)
            self.mask.write(counts)
            self.offsets.write([self.tokens.count])
            self.targets += sum(counts)
        lengths = [len(ids) for ids, _ in parts]
        self.longest = max(self.longest, lengths[0] + max(lengths[1:], default=0))
        self.count += 1

    def close(self, what):
        """-> what meta.json says of them; what: their name"""
        for writer in self.writers:
            writer.close()
        sums = "".join(writer.sha.hexdigest() for writer in self.writers)
        return dict({what: self.count}, tokens=self.tokens.count, targets=self.targets,
                    longest=self.longest, sha256=hashlib.sha256(sums.encode()).hexdigest())


class ImageExampleWriter(ExampleWriter):
    """Conversations, the pictures in them, and which of these each has, in the order of the tokens."""

    def __init__(self, folder, split, dtype, info):
        super().__init__(folder, split, dtype)
        pixels, self.image_ids, self.image_offsets = more = [
            ArrayWriter(os.path.join(folder, f"{split}_{name}.npy"), *kind) for name, kind in (
                ("images", (np.uint8, (info["image_size"], info["image_size"], 3))),
                ("image_ids", (np.uint32,)), ("image_offsets", (np.uint64,)))]
        self.writers += more
        self.image_offsets.write([0])
        self.info, self.pictures = info, Pictures(pixels, info)

    def add(self, parts, row):
        """BadImage, and no conversation is added, where a picture cannot be read"""
        (ids, _), = parts
        shown = ids.count(self.info["token"]) // self.info["tokens_per_image"]    # those before a cut
        self.image_ids.write([self.pictures.number(path) for path in paths_of(row)[:shown]])
        self.image_offsets.write([self.image_ids.count])
        super().add(parts, row)

    def close(self, what):
        return dict(super().close(what), images=self.image_ids.count, pictures=self.pictures.pixels.count)


def prepare_examples(cfg, kind, what, read, encode, keep_rows=False, images=None):
    """
    Conversations, pairs or prompts into cfg.out_dir; see data.py for what is in there. what: their name.
    read(path, report) yields ("file:line", row); encode(tokenizer, rows) -> for each a list of (ids, counts),
    the parts that are stored one after the other, of which the first and any one other follow each other in
    use. keep_rows: store the rows themselves too. images: function of the tokenizer that gives the set's
    `images_info`.
    """
    if cfg.max_len < 0 or cfg.long_rows != "error" and not cfg.max_len:
        raise UserError(f"--max_len={cfg.max_len}: expected a number of tokens, or 0 = no limit "
                        "and no --long_rows")
    with whole_or_nothing(cfg.out_dir) as folder:
        inputs = inputs_of(cfg, (".jsonl",))
        tokenizer, report = load_tokenizer(cfg.tokenizer), Report(cfg.bad_rows)
        dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
        progress, writers = Progress([path for _, path in inputs]), {}
        info = images(tokenizer) if images else None
        for split, where, row, parts in encode_rows(inputs, tokenizer, cfg, read, encode, report, progress):
            parts = cut_to_fit(where, parts, cfg, report, image=info and info["token"])
            if not parts:
                continue
            if split not in writers:
                writers[split] = ImageExampleWriter(folder, split, dtype, info) if images else \
                    ExampleWriter(folder, split, dtype, keep_rows)
            try:
                writers[split].add(parts, row)
            except BadImage as error:
                report.bad("with unreadable images", where, str(error))
            progress.show(sum(writer.tokens.count for writer in writers.values()))
        splits = {split: writer.close(what) for split, writer in writers.items()}
        check_splits(splits, cfg, what, report)
        describe(folder, kind, tokenizer, splits, report, cfg, **dict(images=info) if images else {})
    report.print()
    for split, count in splits.items():
        learned = f"{count['targets']:,} to learn, " * (kind != "prompts")
        print(f"{cfg.out_dir}/{split}.npy: {count[what]:,} {what} of up to {count['longest']:,} tokens, "
              f"{count['tokens']:,} in all, {learned}vocabulary of {tokenizer.vocab_size:,}"
              + (f", {count['images']:,} images of {count['pictures']:,} pictures" if images else ""))


def prepare_chat(cfg):
    if len(cfg.fields) not in (0, 2):
        raise UserError(f"--fields={','.join(cfg.fields)}: two names, the user's text and the assistant's")
    prepare_examples(cfg, "chat", "conversations",
                     read=lambda path, report: read_chats(path, cfg.fields, report),
                     encode=lambda tokenizer, rows: [[chat] for chat in encode_chat(
                         tokenizer, rows, cfg.answer_tags)])


def prepare_images(cfg):
    pillow()                                                  # says so where it is missing
    prepare_examples(cfg, "chat", "conversations",
                     read=lambda path, report: read_chats(path, (), report, with_images=True),
                     encode=lambda tokenizer, rows: [[chat] for chat in encode_chat(
                         tokenizer, rows, cfg.answer_tags, tokens_per_image=cfg.tokens_per_image)],
                     images=lambda tokenizer: images_info(cfg, tokenizer.special["image"]))


def prepare_pairs(cfg):
    def encode(tokenizer, rows):
        """The prompt, up to <assistant>, and what follows it in the chosen and the rejected conversation."""
        prompts = encode_chat(tokenizer, [prompt for prompt, _, _ in rows], cfg.answer_tags, reply=True)
        chats = encode_chat(tokenizer, [prompt + answer for prompt, *answers in rows for answer in answers],
                            cfg.answer_tags)
        pairs = []
        for (prompt, _), chosen, rejected in zip(prompts, chats[::2], chats[1::2]):
            n = len(prompt)
            answers = [(ids[n:], counts[n:]) for ids, counts in (chosen, rejected)]
            pairs.append([(prompt, [False] * n), *answers])
        return pairs
    prepare_examples(cfg, "pairs", "pairs", read_pairs, encode)


def prepare_prompts(cfg):
    if len(cfg.fields) != 2:
        raise UserError(f"--fields={','.join(cfg.fields)}: two names, the prompt's and the answer's")
    prepare_examples(cfg, "prompts", "prompts", keep_rows=True,
                     read=lambda path, report: read_prompts(path, cfg.fields, report),
                     encode=lambda tokenizer, rows: [[(ids, [False] * len(ids))] for ids, _ in encode_chat(
                         tokenizer, [row["prompt"] for row in rows], cfg.answer_tags, reply=True)])


def cut_to_fit(where, parts, cfg, report, image=None):
    """
    -> the parts, cut where --max_len and --long_rows ask for it; None when they are to be left out. image: id
    of what stands for images, which are not cut
    """
    (first, *rest), most = parts, cfg.max_len
    length = len(first[0]) + max((len(ids) for ids, _ in rest), default=0)
    if not most or length <= most:
        return parts
    if cfg.long_rows == "error":
        cut = ", or --long_rows=cut" * any(any(counts) for _, counts in parts)      # prompts cannot be cut
        raise UserError(f"{where}: {length} tokens, more than --max_len={most}; raise it, "
                        f"or leave such rows out with --long_rows=skip{cut}")
    room = max(0, most - len(first[0])) if rest else most
    kept = [(ids[:room], counts[:room]) for ids, counts in rest or [first]]
    if cfg.long_rows == "skip":
        report.skip(f"longer than {most} tokens", where)
    elif not all(any(counts) for _, counts in kept):
        report.skip(f"without a reply in the first {most} tokens", where)
    elif image is not None and kept[0][0][-1] == image:       # its last token would be a target, not shown
        report.skip(f"with an image across the first {most} tokens", where)
    elif rest and kept[0] == kept[1]:
        report.skip(f"with two replies alike in the first {most} tokens", where)
    else:
        report.skip(f"cut to {most} tokens", where)
        return [first, *kept] if rest else kept
    return None


def encode_rows(inputs, tokenizer, cfg, read, encode, report, progress):
    """Yield (split, "file:line", row, parts) of every row, many of them tokenized in one call."""
    draw = random.Random(cfg.seed)

    def flush():
        for (split, where, row), parts in zip(waiting, encode(tokenizer, [row for _, _, row in waiting])):
            yield split, where, row, parts
    for home, path in inputs:
        waiting, size = [], 0
        for where, row in damage_named(read(path, report), path):
            split = "val" if cfg.val_frac and draw.random() < cfg.val_frac else home
            waiting.append((split, where, row))
            size += len(json.dumps(row))
            if size >= BLOCK:
                yield from flush()
                waiting, size = [], 0
        yield from flush()
        progress.show(0, done_file=path)


def read_chats(path, fields, report, with_images=False):
    """Yield ("file:line", messages) of every line with a reply to learn from."""
    for number, row in read_json_rows(path, report):
        where = f"{path}:{number}"
        try:
            messages = row["messages"] if isinstance(row, dict) and "messages" in row else row
            if with_images:
                messages = with_paths(row, os.path.dirname(path))
            else:
                check_no_images(row)
            if isinstance(messages, dict) and not fields:
                raise ValueError('expected [messages] or {"messages": [...]}, or --fields for rows of '
                                 "two texts")
            if fields:
                if not isinstance(row, dict) or not all(isinstance(row.get(f), str) for f in fields):
                    raise ValueError(f"expected texts {' and '.join(fields)} as --fields says")
                messages = [{"role": "user", "content": row[fields[0]]},
                            {"role": "assistant", "content": row[fields[1]]}]
            check_conversation(messages, with_images)
        except ValueError as error:
            report.bad("malformed", where, f"{error}, got {shown(row, 'images' if with_images else 'chat')}")
            continue
        if all(message["role"] != "assistant" for message in messages):
            report.bad("without an assistant turn", where, f"no assistant turn in {shown(row)}")
            continue
        yield where, messages


def check_no_images(row):
    if isinstance(row, dict) and row.get("images"):
        raise ValueError("images are for `data/prepare.py images` and train_sft.py only")


def read_prompts(path, fields, report):
    """Yield ("file:line", {"prompt": messages, "answer": text}) of every line."""
    for number, row in read_json_rows(path, report):
        where = f"{path}:{number}"
        try:
            check_no_images(row)
            if not isinstance(row, dict) or not isinstance(row.get(fields[1]), str):
                raise ValueError(f"expected {fields[0]} and {fields[1]} (--fields), the second a text")
            prompt = row.get(fields[0])
            prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            check_conversation(prompt)
        except ValueError as error:
            report.bad("malformed", where, f"{error}, got {shown(row, 'prompts')}")
            continue
        yield where, {"prompt": prompt, "answer": row[fields[1]]}


def read_pairs(path, report):
    """Yield ("file:line", (prompt, chosen, rejected)), lists of messages; the answers start with a reply."""
    for number, row in read_json_rows(path, report):
        where = f"{path}:{number}"
        try:
            check_no_images(row)
            if not isinstance(row, dict) or not {"chosen", "rejected"} <= row.keys():
                raise ValueError('expected {"chosen": ..., "rejected": ...}')
            prompt, chosen, rejected = (
                [{"role": role, "content": part}] if isinstance(part, str) else part for part, role in
                ((row.get("prompt"), "user"), (row["chosen"], "assistant"), (row["rejected"], "assistant")))
            prompt = [] if prompt is None else prompt
            for messages in (chosen, rejected, *[prompt] * (prompt != [])):
                check_conversation(messages)
            if chosen[:len(prompt)] == prompt == rejected[:len(prompt)]:
                prompt = []                                   # they hold it themselves
            elif prompt and prompt[-1]["role"] == chosen[0]["role"] == "user" and len(chosen) > 1:
                raise ValueError("chosen begins with a user's message, but not with the prompt")
        except ValueError as error:
            report.bad("malformed", where, f"{error}, got {shown(row, 'pairs')}")
            continue
        while chosen and rejected and chosen[0] == rejected[0]:   # what both begin with belongs to the prompt
            prompt, chosen, rejected = [*prompt, chosen[0]], chosen[1:], rejected[1:]
        if not prompt:
            report.bad("without two replies to one prompt", where,
                       f'no "prompt", and chosen and rejected do not begin alike, in {shown(row)}')
            continue
        if not (chosen and rejected and chosen[0]["role"] == rejected[0]["role"] == "assistant"):
            report.bad("without two replies to one prompt", where,
                       f"chosen and rejected must differ, first in an assistant's turn, in {shown(row)}")
            continue
        yield where, (prompt, chosen, rejected)


def prepare_tokenizer(cfg):
    """Train a SentencePiece BPE vocabulary on lines of text."""
    if os.path.exists(cfg.out):
        raise UserError(f"--out={cfg.out}: already there; remove it or choose another")
    if not cfg.out.endswith(".model"):
        raise UserError(f"--out={cfg.out}: must end in .model, by which --tokenizer knows it")
    paths, mistakes = find_files(cfg.input), []

    def lines():
        try:
            for path in paths:
                if kind_of(path) not in (".txt", ".jsonl"):
                    raise UserError(f"--input={path}: a tokenizer learns from text (.txt, .jsonl)")
                pieces = read_txt(path, None) if kind_of(path) == ".txt" else read_all_texts(path, cfg.fields)
                for _, piece in damage_named(pieces, path):
                    yield from (line for line in piece.splitlines() if line)
        except UserError as error:
            mistakes.append(error)                            # SentencePiece would hide it
            return
    try:
        model = train_sentencepiece(lines(), cfg.vocab_size)
    finally:
        if mistakes:
            raise mistakes[0] from None
    try:
        os.makedirs(os.path.dirname(cfg.out) or ".", exist_ok=True)
        with open(cfg.out + ".partial", "wb") as file:
            file.write(model)
        os.replace(cfg.out + ".partial", cfg.out)
    except OSError as error:
        raise UserError(f"--out={cfg.out}: {error.strerror}") from None
    print(f"{cfg.out}: {load_tokenizer(cfg.out).vocab_size} tokens")


COMMANDS = {"text": (TextConfig, prepare_text), "chat": (ChatConfig, prepare_chat),
            "pairs": (PairsConfig, prepare_pairs), "prompts": (PromptsConfig, prepare_prompts),
            "images": (ImagesConfig, prepare_images), "tokenizer": (TokenizerConfig, prepare_tokenizer)}

if __name__ == "__main__":
    show_user_errors()
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        if sys.argv[1:] and sys.argv[1] not in ("-h", "--help"):
            raise UserError(f"unknown command {sys.argv[1]}; expected one of {', '.join(COMMANDS)}")
        print(__doc__.strip() + "\n\nThe options of a command: python data/prepare.py COMMAND --help")
        sys.exit(0)
    config_class, command = COMMANDS[sys.argv[1]]
    command(parse_config(config_class, sys.argv[2:]))
