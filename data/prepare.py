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
chat, pairs, prompts:
    rows of a .jsonl, of a .json that is a list, of a .csv or a .parquet: conversations as messages,
    [{"role": "user", "content": "..."}, {"role": "assistant", ...}] or {"messages": [...]}, or in
    the forms of ShareGPT and Alpaca, or two texts; see data/forms.py. A pair has "chosen" and
    "rejected" for an answer. What goes to the reward function with a completion is a prompt's
    answer ("" if it needs none).
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
import os
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
    ROW_FILES,
    TXT_FILES,
    BadRow,
    Chats,
    ExampleConfig,
    Pairs,
    Prompts,
    Report,
    SetConfig,
    Text,
    find_files,
    inputs_of,
    read_encoded,
    read_lines,
)
from data.train_tokenizer import train_sentencepiece  # noqa: E402


class TextConfig(SetConfig):
    """The options of every set; --help prints the docstring of this file."""


@dataclass(frozen=True)
class ChatConfig(ExampleConfig):
    # fmt: off
    out_dir: str = "out/chat"          # folder to write, must not exist
    # fmt: on


@dataclass(frozen=True)
class PairsConfig(ExampleConfig):
    # fmt: off
    out_dir: str = "out/pairs"         # folder to write, must not exist
    # fmt: on


@dataclass(frozen=True)
class PromptsConfig(ExampleConfig):
    # fmt: off
    out_dir: str = "out/prompts"       # folder to write, must not exist
    long_rows: Literal["error", "skip"] = "error"  # longer rows: stop, or skip
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
        raise UserError(f"{error.filename or out_dir}: {error.strerror}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


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
    counts = [counts[unit] for counts in splits.values()]
    if all(counts):
        return
    # it may say why
    report.print()
    if not any(counts):
        raise UserError(f"--input: no {unit} left to train on")
    train, _ = counts
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


def prepare_set(cfg, kind_class, writer_class):
    """Files into cfg.out_dir; see common/data.py for what is in there."""
    with whole_or_nothing(cfg.out_dir) as folder:
        inputs = inputs_of(cfg, kind_class.endings)
        kind, report = kind_class(cfg, load_tokenizer(cfg.tokenizer)), Report(cfg.bad_rows)
        wanted = ["train", "val"] if cfg.val_frac or cfg.val_input else ["train"]
        writers = {split: writer_class(folder, split, kind, report) for split in wanted}
        start = last = time.time()
        for split, where, content, encoded in read_encoded(kind, inputs, report):
            writers[split].add(where, content, encoded)
            now = time.time()
            if now - last >= 10:
                last = now
                tokens = sum(writer.tokens.count for writer in writers.values())
                print(
                    f"{where} | {tokens:,} tokens | {tokens / (now - start):,.0f} tok/s",
                    file=sys.stderr,
                    flush=True,
                )
        splits = {split: writer.close() for split, writer in writers.items()}
        check_splits(splits, cfg, kind.unit, report)
        describe(folder, cfg, kind, splits, report)
    report.print()
    if kind.num_thoughts:
        print(f"{kind.num_thoughts:,} answers begin with <think>...</think>: read as thoughts")
    for split, counts in splits.items():
        counts = ", ".join(f"{name} {n:,}" for name, n in counts.items() if name != "sha256")
        print(f"{cfg.out_dir}/{split}.npy: {counts}, vocabulary {kind.tokenizer.vocab_size:,}")
    forms = [f"{form}: {n:,} rows" for form, n in kind.forms.items() if form not in kind.own_forms]
    if forms and not cfg.fields:
        print("read as " + "; ".join(forms))
    if kind.unread:
        names = ", ".join(f"{name} ({n:,} rows)" for name, n in kind.unread.items())
        print(f"not read: {names}")


class SetWriter:
    """The arrays of a split; tokens is the first. counts: what meta.json says of it besides."""

    def __init__(self, folder, split, kind, report):
        self.path, self.kind, self.report = os.path.join(folder, split), kind, report
        self.arrays, self.count, self.counts = [], 0, {}
        wide = kind.tokenizer.vocab_size > 2**16
        self.tokens = self.array("", np.uint32 if wide else np.uint16)

    def array(self, name, dtype, entry=()):
        self.arrays.append(ArrayWriter(f"{self.path}{name}.npy", dtype, entry))
        return self.arrays[-1]

    def close(self):
        """-> what meta.json says of the split"""
        for array in self.arrays:
            array.close()
        sums = [array.sha.hexdigest() for array in self.arrays]
        sha = sums[0]
        if len(sums) > 1:
            sha = hashlib.sha256("".join(sums).encode()).hexdigest()
        return {
            self.kind.unit: self.count,
            "tokens": self.tokens.count,
            **self.counts,
            "sha256": sha,
        }


class TextWriter(SetWriter):
    """Documents, one after the other, each closed by the end token."""

    def __init__(self, *args):
        super().__init__(*args)
        self.byte_counts = token_byte_counts(self.kind.tokenizer)
        self.counts["bytes"] = 0
        # last: the latest token; nothing is open yet
        self.where, self.last = None, self.kind.tokenizer.end

    def add(self, where, content, ids):
        """where: of a document, whose ids may come in several pieces"""
        ids, tokenizer = np.asarray(ids), self.kind.tokenizer
        if not len(ids):
            self.report.skip("empty documents", where)
            return
        for wrong in (ids.min(), ids.max()):
            if not 0 <= wrong < tokenizer.vocab_size:
                raise UserError(
                    f"{where}: a document with token id {wrong}, but --tokenizer has "
                    f"{tokenizer.vocab_size}; give the tokenizer that made these ids"
                )
        if where != self.where:
            self.end_document()
            self.where, self.count = where, self.count + 1
            # token ids may bring this themselves
            if ids[:1].tolist() != tokenizer.begin:
                self.write(tokenizer.begin)
        self.write(ids)
        self.last = ids[-1]

    def write(self, ids):
        ids = np.asarray(ids, self.tokens.dtype)
        self.tokens.write(ids)
        self.counts["bytes"] += int(self.byte_counts[ids].sum(dtype=np.int64))

    def end_document(self):
        if self.last != self.kind.tokenizer.end:
            self.write([self.kind.tokenizer.end])

    def close(self):
        self.end_document()
        # the same for each split
        np.save(os.path.join(os.path.dirname(self.path), "token_bytes.npy"), self.byte_counts)
        return super().close()


class ExampleWriter(SetWriter):
    """Examples, one after the other: tokens, which of them are targets, where each part begins."""

    def __init__(self, *args):
        super().__init__(*args)
        self.mask, self.offsets = self.array("_mask", np.uint8), self.array("_offsets", np.uint64)
        self.offsets.write([0])
        self.store = self.kind.store(self.array)
        self.counts.update(targets=0, longest=0)

    def add(self, where, row, example):
        """Nothing is added where the example is too long or `Kind.store` raises BadRow."""
        if not cut_to_fit(example, where, self.kind, self.report):
            return
        try:
            self.store(row, example)
        except BadRow as error:
            self.report.bad(where, error)
            return
        for ids, learn in (example.prompt, *example.replies):
            if not ids:
                continue
            self.tokens.write(ids)
            self.mask.write(learn)
            self.offsets.write([self.tokens.count])
            self.counts["targets"] += sum(learn)
        self.counts["longest"] = max(self.counts["longest"], example.length())
        self.count += 1

    def close(self):
        self.counts.update(self.kind.counts(*self.arrays[3:]))
        return super().close()


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
    elif replies[0] in replies[1:]:
        reason = f"with two replies alike in the first {most} tokens"
    else:
        reason = f"cut to {most} tokens"
        example.replies = replies
    report.skip(reason, where)
    return example.replies is replies


# -----------------------------------------------------------------------------
# tokenizers


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
    "text": (TextConfig, Text, TextWriter),
    "chat": (ChatConfig, Chats, ExampleWriter),
    "pairs": (PairsConfig, Pairs, ExampleWriter),
    "prompts": (PromptsConfig, Prompts, ExampleWriter),
}


if __name__ == "__main__":
    show_user_errors()
    command, *options = sys.argv[1:] or ["--help"]
    if command in ("-h", "--help"):
        print(__doc__.strip())
        print("\nThe options of a command: python data/prepare.py COMMAND --help")
    elif command == "tokenizer":
        prepare_tokenizer(parse_config(TokenizerConfig, options))
    elif command == "images":
        # read here alone: it needs Pillow
        from extras.image_rows import ImageChats, ImagesConfig

        prepare_set(parse_config(ImagesConfig, options), ImageChats, ExampleWriter)
    elif command in COMMANDS:
        config_class, *classes = COMMANDS[command]
        prepare_set(parse_config(config_class, options), *classes)
    else:
        known = ", ".join(COMMANDS)
        raise UserError(f"unknown command {command}; expected one of {known}, tokenizer, images")
