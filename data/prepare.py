"""
Prepare data: text to memory-mapped token sets, and new tokenizers.

    python data/prepare.py tokenizer --input=books/*.txt --vocab_size=4096 --out=out/tok.model
    python data/prepare.py text --input=books/*.txt,a.jsonl --val_frac=0.1 --tokenizer=out/tok.model
    python data/prepare.py chat --input=chats.jsonl --val_frac=0.05 --tokenizer=out/tok.model
    python data/prepare.py pairs --input=pairs.jsonl --val_frac=0.05 --tokenizer=out/tok.model
    python data/prepare.py prompts --input=prompts.jsonl --val_frac=0.05 --tokenizer=out/tok.model
    python data/prepare.py images --input=chats.jsonl --val_frac=0.05 --tokenizer=out/tok.model

--input takes files and globs, separated by commas, in any mix; .txt and .jsonl also gzipped (.gz).
text:
    .txt    one document a file                  .npy  token ids: (n,) one document, (documents, n)
    .jsonl  {"text": "..."}, a document a line   .pkl  a list of token ids, or a list of such lists
chat:
    .jsonl  a conversation a line, [{"role": "user", "content": "..."}, {"role": "assistant", ...}]
            or {"messages": [...]}. Roles: system, user, assistant; the last may "think": "..."
pairs:
    .jsonl  a pair a line, {"chosen": [messages], "rejected": [messages]}, two conversations that
            begin alike, or {"prompt": ..., "chosen": ..., "rejected": ...}, each a text or messages
prompts:
    .jsonl  a prompt a line, {"prompt": ..., "answer": "..."}. The prompt is a text or messages; the
            answer goes to the reward function with the completion ("" if it needs none)
images:
    .jsonl  as for chat, and a content may show images: see `images --help`
--tokenizer: bytes, x.model (SentencePiece), x.tiktoken, a folder with vocab.json and merges.txt,
gpt2, or a run.

Text must be UTF-8; nothing is normalised. --out_dir appears complete or not at all, and an existing
one is never touched. Memory does not grow with the input.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import random
import shutil
import sys
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

# the repository's root must be on the path first
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common.config import parse_config  # noqa: E402
from common.errors import UserError, show_user_errors  # noqa: E402
from common.tokenizer import load_tokenizer  # noqa: E402
from data.readers import (  # noqa: E402
    BLOCK,
    ID_FILES,
    ROW_FILES,
    TXT_FILES,
    BadRow,
    Chats,
    ExampleConfig,
    Kind,
    Pairs,
    Prompts,
    Report,
    SetConfig,
    find_files,
    inputs_of,
    read_ids,
    read_rows,
    read_txt,
    text_of,
    texts_of,
)
from data.train_tokenizer import train_sentencepiece  # noqa: E402

# characters that --val_frac moves a border at most, to the start of a line
NEAR = 1000


@dataclass(frozen=True)
class TextConfig(SetConfig):
    # fmt: off
    val_frac: float = 0.0              # instead: fraction to hold out (.txt: of its end)
    tokenizer: str = "bytes"           # bytes, x.model, x.tiktoken, folder, gpt2, run: see above
    # fmt: on


@dataclass(frozen=True)
class ChatConfig(ExampleConfig):
    # fmt: off
    out_dir: str = "out/chat"          # folder to write, must not exist
    fields: tuple[str, ...] = ()       # rows of two texts: the names of the user's, the assistant's
    # fmt: on


@dataclass(frozen=True)
class PairsConfig(ExampleConfig):
    # fmt: off
    out_dir: str = "out/pairs"         # folder to write, must not exist
    max_len: int = 0                   # maximum of prompt and one answer in tokens; 0 = no limit
    # fmt: on


@dataclass(frozen=True)
class PromptsConfig(ExampleConfig):
    # fmt: off
    out_dir: str = "out/prompts"       # folder to write, must not exist
    long_rows: Literal["error", "skip"] = "error"  # longer rows: stop, or skip
    fields: tuple[str, ...] = ("prompt", "answer")  # names of the prompt, the answer
    # fmt: on


@dataclass(frozen=True)
class TokenizerConfig:
    # fmt: off
    input: tuple[str, ...] = ()        # files and globs of text (.txt, .jsonl)
    fields: tuple[str, ...] = ("text",)  # what to learn from in a .jsonl row; of conversations: all
    vocab_size: int = 4096             # number of tokens, special ones included
    out: str = "out/tokenizer.model"   # SentencePiece model to write, must not exist
    # fmt: on


# -----------------------------------------------------------------------------
# sets


class Progress:
    """A line every ten seconds: the file that is read, and how much has been written."""

    def __init__(self):
        self.start = self.last = time.time()

    def show(self, path, writers):
        now = time.time()
        if now - self.last < 10:
            return
        self.last = now
        tokens = sum(writer.tokens.count for writer in writers.values())
        print(
            f"{path} | {tokens:,} tokens | {tokens / (now - self.start):,.0f} tok/s",
            file=sys.stderr,
            flush=True,
        )


def token_byte_counts(tokenizer):
    """
    -> (V,) uint16: bytes of text each token stands for, to turn nats per token into bits per byte
    """
    return np.array([len(b) for b in tokenizer.token_bytes], dtype=np.uint16)


class ArrayWriter:
    """
    A .npy of unknown length, written front to back: room is left for the header, which comes last.
    entry: the shape of what it is a list of
    """

    HEADER = 128

    def __init__(self, path, dtype, entry=()):
        self.file, self.sha = open(path, "wb"), hashlib.sha256()
        self.dtype, self.entry, self.count = np.dtype(dtype), entry, 0
        self.file.write(b" " * self.HEADER)

    def write(self, values):
        content = np.ascontiguousarray(values, self.dtype).tobytes()
        self.file.write(content)
        self.sha.update(content)
        self.count += len(values)

    def close(self):
        header = dict(descr=self.dtype.str, fortran_order=False, shape=(self.count, *self.entry))
        self.file.seek(0)
        np.lib.format.write_array_header_1_0(self.file, header)
        assert self.file.tell() == self.HEADER, header
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


@contextlib.contextmanager
def whole_or_nothing(out_dir):
    """Gives a folder to write into; it becomes out_dir at the end, or goes when anything fails."""
    if os.path.exists(out_dir):
        raise UserError(f"--out_dir={out_dir}: already there; remove it or choose another")
    aside = out_dir.rstrip("/") + ".partial"
    # what a killed run has left
    shutil.rmtree(aside, ignore_errors=True)
    try:
        os.makedirs(aside)
    except OSError as error:
        raise UserError(f"--out_dir={out_dir}: cannot write there ({error.strerror})") from None
    try:
        yield aside
        os.rename(aside, out_dir)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"{error.filename or out_dir}: {error.strerror}") from None
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def write_rows(folder, name, rows):
    """Rows, of what JSON can hold, to folder/NAME.jsonl"""
    path = os.path.join(folder, f"{name}.jsonl")
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def chat_row(question, answer):
    """-> a conversation of one turn, as `chat` reads it"""
    return [dict(role="user", content=question), dict(role="assistant", content=answer)]


def describe(folder, cfg, kind, splits, report):
    """Write what goes with the arrays of a set: the tokenizer's files and meta.json."""
    tokenizer = kind.tokenizer
    for name, content in tokenizer.files().items():
        with open(os.path.join(folder, name), "wb") as file:
            file.write(content)
    meta = dict(
        kind=kind.name,
        vocab_size=tokenizer.vocab_size,
        end=tokenizer.end,
        pad=tokenizer.pad,
        fingerprint=tokenizer.fingerprint,
        data_fingerprint=splits["train"]["sha256"][:16],
        splits=splits,
        left_out=report.left_out(),
        made_with=dataclasses.asdict(cfg),
        **kind.meta,
    )
    with open(os.path.join(folder, "meta.json"), "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=1)


def check_splits(splits, cfg, unit, report):
    """UserError when a split that was asked for has got nothing."""
    train, val = (splits.get(split, {}).get(unit, 0) for split in ("train", "val"))
    if train and (val or not (cfg.val_frac or cfg.val_input)):
        return
    # it may say why
    report.print()
    if not train and not val:
        raise UserError(f"--input: no {unit} left to train on")
    if not train:
        raise UserError(
            f"--input: no {unit} left to train on, everything went to validation; lower --val_frac"
        )
    if cfg.val_frac:
        raise UserError(
            f"--val_frac={cfg.val_frac}: none of the {train} {unit} was drawn for "
            "validation; raise it, or name files with --val_input"
        )
    raise UserError(f"--val_input={','.join(cfg.val_input)}: no {unit} in there")


def prepare_set(cfg, kind_class, endings, read, writer_class):
    """
    Files with these endings into cfg.out_dir; see common/data.py for what is in there.
    read(path, split, kind, draw, report) -> iterator of (split, "file:number", what is written)
    """
    with whole_or_nothing(cfg.out_dir) as folder:
        inputs = inputs_of(cfg, endings)
        kind, report = kind_class(cfg, load_tokenizer(cfg.tokenizer)), Report(cfg.bad_rows)
        progress, draw, writers = Progress(), random.Random(cfg.seed), {}
        for home, path in inputs:
            for split, where, item in read(path, home, kind, draw, report):
                if split not in writers:
                    writers[split] = writer_class(folder, split, kind)
                try:
                    writers[split].add(where, item)
                except BadRow as error:
                    report.bad(error.reason, where, str(error))
                progress.show(path, writers)
        splits = {split: writer.close() for split, writer in writers.items()}
        check_splits(splits, cfg, kind.unit, report)
        describe(folder, cfg, kind, splits, report)
    report.print()
    for split, counts in splits.items():
        counts = ", ".join(f"{name} {n:,}" for name, n in counts.items() if name != "sha256")
        print(f"{cfg.out_dir}/{split}.npy: {counts}, vocabulary {kind.tokenizer.vocab_size:,}")


class SetWriter:
    """The arrays of a split; tokens is the first."""

    def __init__(self, folder, split, kind):
        self.folder, self.split, self.kind = folder, split, kind
        self.arrays, self.count = [], 0
        wide = kind.tokenizer.vocab_size > 2**16
        self.tokens = self.array("", np.uint32 if wide else np.uint16)

    def array(self, name, dtype, entry=()):
        path = os.path.join(self.folder, f"{self.split}{name}.npy")
        self.arrays.append(ArrayWriter(path, dtype, entry))
        return self.arrays[-1]


def blocks(items, size):
    """Yield lists of items, each of about BLOCK characters or bytes. size: function of an item"""
    block, total = [], 0
    for item in items:
        block.append(item)
        total += size(item)
        if total >= BLOCK:
            yield block
            block, total = [], 0
    if block:
        yield block


# -----------------------------------------------------------------------------
# text


class Text(Kind):
    name, unit = "text", "documents"

    def encode(self, contents):
        """List of texts, or of arrays of ids -> a sequence of ids each"""
        if not isinstance(contents[0], str):
            return contents
        if self.tokenizer.kind == "bytes":
            return [np.frombuffer(text.encode(), np.uint8) for text in contents]
        return self.tokenizer.encode_batch(contents)


class TextWriter(SetWriter):
    """Documents, one after the other, each closed by the end token."""

    def __init__(self, *args):
        super().__init__(*args)
        self.byte_counts = token_byte_counts(self.kind.tokenizer)
        self.where, self.last, self.bytes = None, None, 0

    def add(self, where, ids):
        """where: of a document, whose ids may come in several pieces"""
        if where != self.where:
            self.end_document()
            # token ids may bring this themselves
            if list(ids[:1]) != self.kind.tokenizer.begin:
                self.write(self.kind.tokenizer.begin)
        self.write(ids)
        self.where, self.last = where, ids[-1]

    def write(self, ids):
        ids = np.asarray(ids, self.tokens.dtype)
        self.tokens.write(ids)
        self.bytes += int(self.byte_counts[ids].sum(dtype=np.int64))

    def end_document(self):
        if self.where is None:
            return
        if self.last != self.kind.tokenizer.end:
            self.write([self.kind.tokenizer.end])
        self.count += 1

    def close(self):
        """-> what meta.json says of them"""
        self.end_document()
        self.tokens.close()
        # the same for each split
        np.save(os.path.join(self.folder, "token_bytes.npy"), self.byte_counts)
        return dict(
            documents=self.count,
            tokens=self.tokens.count,
            bytes=self.bytes,
            sha256=self.tokens.sha.hexdigest(),
        )


def documents_of(path, home, kind, draw, report):
    """Yield (split, "file:number", ids) of a file's documents, a long one in several pieces."""
    limit = kind.tokenizer.vocab_size
    for block in blocks(divide(path, home, kind, draw, report), lambda piece: len(piece[2])):
        encoded = kind.encode([content for _, _, content in block])
        for (split, number, _), ids in zip(block, encoded):
            where = f"{path}:{number}"
            if not len(ids):
                report.skip("empty documents", where)
                continue
            if path.endswith(ID_FILES) and not 0 <= ids.min() <= ids.max() < limit:
                wrong = ids.min() if ids.min() < 0 else ids.max()
                raise UserError(
                    f"{where}: a document with token id {wrong}, but --tokenizer has "
                    f"{limit}; give the tokenizer that made these ids"
                )
            yield split, where, ids


def divide(path, home, kind, draw, report):
    """Yield (split, number, text or ids). A document goes to one split, but a .txt is divided."""
    val_frac = kind.cfg.val_frac
    if path.endswith(TXT_FILES):
        yield from divide_txt(path, home, val_frac)
        return
    if path.endswith(ID_FILES):
        pieces = read_ids(path)
    else:
        pieces = read_rows(path, report, text_of, "text")
    previous, split = None, home
    for number, piece, *_ in pieces:
        if val_frac and number != previous:
            split = "val" if draw.random() < val_frac else home
        previous = number
        yield split, number, piece


def divide_txt(path, home, val_frac):
    """Yield (split, number, text). The last val_frac, from the start of a line, is held out."""
    border, seen = math.inf, 0
    if val_frac:
        border = round((1 - val_frac) * sum(len(piece) for _, piece in read_txt(path)))
    for number, piece in read_txt(path):
        room = border - seen
        if room >= len(piece):
            yield home, number, piece
        elif room <= 0:
            yield "val", number, piece
        else:
            at = piece.rfind("\n", 0, room) + 1
            # a line's start that is far away would change the share
            if room - at > NEAR or not (at or seen):
                at = room
            if at:
                yield home, number, piece[:at]
            yield "val", number, piece[at:]
        seen += len(piece)


def prepare_text(cfg):
    prepare_set(cfg, Text, TXT_FILES + ROW_FILES + ID_FILES, documents_of, TextWriter)


# -----------------------------------------------------------------------------
# conversations, pairs, prompts


class ExampleWriter(SetWriter):
    """Examples, one after the other: tokens, which of them are targets, where each part begins."""

    def __init__(self, *args):
        super().__init__(*args)
        self.mask, self.offsets = self.array("_mask", np.uint8), self.array("_offsets", np.uint64)
        self.offsets.write([0])
        self.store = self.kind.store(self.array)
        self.longest = self.targets = 0

    def add(self, where, item):
        """item: (row, Example). BadRow, and nothing is added, where `Kind.store` raises it"""
        row, example = item
        self.store(row, example)
        for ids, learn in (example.prompt, *example.replies):
            if not ids:
                continue
            self.tokens.write(ids)
            self.mask.write(learn)
            self.offsets.write([self.tokens.count])
            self.targets += sum(learn)
        self.longest = max(self.longest, example.length())
        self.count += 1

    def close(self):
        """-> what meta.json says of them"""
        for array in self.arrays:
            array.close()
        sums = "".join(array.sha.hexdigest() for array in self.arrays)
        more = self.kind.counts(*self.arrays[3:])
        return dict(
            {self.kind.unit: self.count},
            tokens=self.tokens.count,
            targets=self.targets,
            longest=self.longest,
            sha256=hashlib.sha256(sums.encode()).hexdigest(),
            **more,
        )


def examples_of(path, home, kind, draw, report):
    """Yield (split, "file:line", (row, Example)) of a file's rows, many tokenized in one call."""
    cfg, folder = kind.cfg, os.path.dirname(path)
    rows = read_rows(path, report, lambda row: kind.parse(row, folder), kind.name)
    for block in blocks(rows, lambda row: row[2]):
        examples = kind.encode([row for _, row, _ in block])
        for (number, row, _), example in zip(block, examples):
            split = "val" if cfg.val_frac and draw.random() < cfg.val_frac else home
            where = f"{path}:{number}"
            if cut_to_fit(example, where, kind, report):
                yield split, where, (row, example)


def cut_to_fit(example, where, kind, report):
    """-> whether the example stays. It is cut where --max_len and --long_rows ask for it."""
    most, long_rows, length = kind.cfg.max_len, kind.cfg.long_rows, example.length()
    if not most or length <= most:
        return True
    if long_rows == "error":
        # prompts cannot be cut
        cut = ", or --long_rows=cut" if example.replies else ""
        raise UserError(
            f"{where}: {length} tokens, more than --max_len={most}; raise it, "
            f"or leave such rows out with --long_rows=skip{cut}"
        )
    room = max(0, most - len(example.prompt[0]))
    replies = [(ids[:room], learn[:room]) for ids, learn in example.replies]
    if long_rows == "skip":
        reason = f"longer than {most} tokens"
    elif not all(any(learn) for _, learn in replies):
        reason = f"without a reply in the first {most} tokens"
    elif replies[0][0][-1] == kind.tokenizer.special["image"]:
        # the last token is only a target: images end before it
        reason = f"with an image across the first {most} tokens"
    elif len(replies) == 2 and replies[0] == replies[1]:
        reason = f"with two replies alike in the first {most} tokens"
    else:
        reason = f"cut to {most} tokens"
        example.replies = replies
    report.skip(reason, where)
    return example.replies is replies


def prepare_examples(cfg, kind_class):
    if cfg.max_len < 0 or cfg.long_rows != "error" and not cfg.max_len:
        raise UserError(
            f"--max_len={cfg.max_len}: expected a number of tokens, "
            "or 0 = no limit and no --long_rows"
        )
    prepare_set(cfg, kind_class, ROW_FILES, examples_of, ExampleWriter)


def prepare_chat(cfg):
    if len(cfg.fields) not in (0, 2):
        raise UserError(
            f"--fields={','.join(cfg.fields)}: give two names, "
            "of the user's text and the assistant's"
        )
    prepare_examples(cfg, Chats)


def prepare_pairs(cfg):
    prepare_examples(cfg, Pairs)


def prepare_prompts(cfg):
    if len(cfg.fields) != 2:
        raise UserError(
            f"--fields={','.join(cfg.fields)}: give two names, of the prompt and the answer"
        )
    prepare_examples(cfg, Prompts)


# -----------------------------------------------------------------------------
# tokenizers


def read_lines(paths, fields):
    """Yield the lines of text that a vocabulary is learned from."""
    for path in paths:
        if path.endswith(TXT_FILES):
            pieces = ([text] for _, text in read_txt(path))
        else:
            rows = read_rows(path, Report(None), lambda row: texts_of(row, fields))
            pieces = (texts for _, texts, _ in rows)
        for texts in pieces:
            for text in texts:
                yield from filter(None, text.splitlines())


def prepare_tokenizer(cfg):
    """Train a SentencePiece BPE vocabulary on lines of text."""
    if os.path.exists(cfg.out):
        raise UserError(f"--out={cfg.out}: already there; remove it or choose another")
    if not cfg.out.endswith(".model"):
        raise UserError(f"--out={cfg.out}: must end in .model, by which --tokenizer knows it")
    paths, mistakes = find_files(cfg.input, TXT_FILES + ROW_FILES), []

    def lines():
        try:
            yield from read_lines(paths, cfg.fields)
        except UserError as error:
            # SentencePiece would hide it
            mistakes.append(error)

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


COMMANDS = {
    "text": (TextConfig, prepare_text),
    "chat": (ChatConfig, prepare_chat),
    "pairs": (PairsConfig, prepare_pairs),
    "prompts": (PromptsConfig, prepare_prompts),
    "tokenizer": (TokenizerConfig, prepare_tokenizer),
}


if __name__ == "__main__":
    show_user_errors()
    command, *options = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__.strip())
        print("\nThe options of a command: python data/prepare.py COMMAND --help")
    elif command == "images":
        # read here alone: it needs Pillow
        from extras.image_rows import ImageChats, ImagesConfig

        prepare_examples(parse_config(ImagesConfig, options), ImageChats)
    elif command in COMMANDS:
        config_class, prepare = COMMANDS[command]
        prepare(parse_config(config_class, options))
    else:
        raise UserError(f"unknown command {command}; expected one of {', '.join(COMMANDS)}, images")
