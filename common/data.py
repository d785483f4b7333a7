"""
Memory-mapped token sets and the batches of a run.

A set is a folder that data/prepare.py makes:

    train.npy, val.npy     token ids, document after document, each closed by the end token; uint16
                           or uint32
    meta.json              kind of set, counts, vocab_size, end and pad id, tokenizer fingerprint
    tokenizer_info.json    and the vocabulary file, if any
    token_bytes.npy        text: (V,) bytes of text per token
    train_mask.npy         chat, pairs: 1 where a token is to be learned, else 0; uint8, as long as
                           train.npy
    train_offsets.npy      chat: where each conversation begins, and where the last one ends; uint64
                           pairs: the same of the prompt, the chosen and the rejected answer of each
                           pair
    train_rows.npy         prompts: {"prompt": messages, "answer": text} of each as JSON, one after
                           the other, with train_row_offsets.npy

`batch(i)` is a pure function: the rows of micro-batch i on this rank follow from (seed, i) alone,
so a resumed run needs no replay. Step s of a run trains on rows [s, s + 1) * batch_size of the
run's order, however ranks and micro-batches divide them. An epoch visits every row once, in an
order of its own.
"""

import functools
import json
import math
import os
from dataclasses import dataclass, field

import numpy as np
import torch

from common.branches import Pairs, branches, to_device
from common.errors import UserError


def read_meta(data_dir):
    """-> the set's meta.json as a dict"""
    path = os.path.join(data_dir, "meta.json")
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        for name in ("kind", "vocab_size", "end", "fingerprint"):
            meta[name]
        for counts in meta["splits"].values():
            counts["tokens"]
        return meta
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"--data_dir={data_dir}: no meta.json there; make the set with data/prepare.py"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); prepare the set again") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path}: not one of a token set ({error}); prepare the set again"
        ) from None


def open_array(path, count=None, row=()):
    """
    A read-only memory map of a .npy file that must hold `count` numbers, or rows of that shape.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; make the set with data/prepare.py") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged or truncated ({error}); prepare the set again") from None
    if array.shape[1:] != row or array.ndim < 1 or array.dtype.kind != "u":
        raise UserError(
            f"{path}: expected {f'rows of {row}' if row else 'one row of'} unsigned integers, "
            f"got {array.dtype} {array.shape}; prepare the set again"
        )
    if count is not None and len(array) != count:
        raise UserError(
            f"{path}: holds {len(array)} numbers, meta.json says {count}; prepare the set again"
        )
    return array


def read_split(data_dir, split, kind):
    """
    -> meta.json of a set of that kind (text, chat, pairs, prompts) which has the split, or a
    UserError
    """
    meta = read_meta(data_dir)
    if meta["kind"] != kind:
        raise UserError(
            f"--data_dir={data_dir}: a set of kind {meta['kind']}, expected {kind}; "
            f"make one with data/prepare.py {kind}"
        )
    unit = {"text": "tokens", "chat": "conversations"}.get(kind, kind)
    if (
        "pad" not in meta
        and kind != "text"
        or any(unit not in counts for counts in meta["splits"].values())
    ):
        raise UserError(f"{data_dir}/meta.json: lacks pad or {unit}; prepare the set again")
    if split not in meta["splits"]:
        raise UserError(
            f"--data_dir={data_dir}: the set has no {split} split "
            "(prepare it with --val_frac or --val_input, or train with --eval_seqs=0)"
        )
    return meta


@functools.lru_cache(maxsize=8)
def epoch_order(seed, epoch, n):
    """The order of n rows in an epoch; cached, as many batches ask for it"""
    return np.random.default_rng([seed, epoch]).permutation(n)


@dataclass
class Batch:
    """A micro-batch of rows, on the run's device."""

    tokens: torch.Tensor  # (B, T) int64
    targets: torch.Tensor  # (B, T) int64
    mask: torch.Tensor  # (B, T) bool, True: the target counts
    # (B, T) int64, changes where a document starts; -1 is padding
    docs: torch.Tensor | None
    weight: torch.Tensor | None = None  # (B, T) float32, of critical targets; None: 1 for each
    inputs: dict = field(default_factory=dict)  # what else a forward takes, by name

    @property
    def n_targets(self):
        """-> their number, or with critical tokens the sum of their weights; scalar tensor"""
        return self.mask.sum() if self.weight is None else (self.mask * self.weight).sum()


class Rows:
    """
    One split of a set as the rows of a run. This is all that run.py, the scripts and the cost of a
    run (extras/capacity.py) ask of a kind of data:

    batch(i)        micro-batch i of this rank; see each kind
    num_rows        rows of an epoch
    limit(total)    from here on rows past the first `total` of the run do not count; num_batches:
                    micro-batches that hold those, on each rank
    num_tokens      of an epoch; mean_context: positions that a token's attention spans, on average;
                    target_frac: of tokens that have a target
    doc_mask        whether documents share rows; images: whether batches have some
    identity        dict of what else decides on the meaning of a step

    critical_ids    target ids whose loss has the weight critical_alpha, others 1: sum(w nll) /
                    sum(w)
    """

    # of the set: text, chat, pairs, prompts
    kind = ""
    doc_mask, images = True, False

    def __init__(
        self,
        data_dir,
        split,
        seq_len,
        micro_batch_size,
        rank=0,
        world_size=1,
        device="cpu",
        seed=0,
        critical_ids=(),
        critical_alpha=1.0,
    ):
        self.meta = read_split(data_dir, split, self.kind)
        self.counts, self.vocab_size = self.meta["splits"][split], self.meta["vocab_size"]
        self.data_dir, self.split, self.seq_len = data_dir, split, seq_len
        self.path = os.path.join(data_dir, f"{split}.npy")
        self.micro_batch_size, self.rank, self.world_size = micro_batch_size, rank, world_size
        self.device, self.seed, self.total = torch.device(device), seed, math.inf
        self.target_frac, self.identity = 1.0, {}
        for i in critical_ids:
            if not 0 <= i < self.vocab_size:
                raise UserError(
                    f"--critical_ids={i}: no such token, expected 0 to {self.vocab_size - 1}"
                )
        self.critical_ids = torch.tensor(critical_ids, dtype=torch.int64, device=self.device)
        self.critical_alpha = float(critical_alpha)

    def file(self, name):
        """-> path of an array of the split, such as train_mask.npy for the name mask"""
        return os.path.join(self.data_dir, f"{self.split}_{name}.npy")

    def limit(self, total):
        self.total = total
        return self

    @property
    def num_batches(self):
        return -(-self.total // (self.micro_batch_size * self.world_size))

    def run_order(self, i):
        """
        -> numbers (B,) in the run's order of the rows of micro-batch i, which of these count (B,)
        """
        first = (i * self.world_size + self.rank) * self.micro_batch_size
        numbers = np.arange(first, first + self.micro_batch_size)
        return numbers, numbers < self.total

    def rows_at(self, numbers):
        """numbers in the run's order (B,) -> those of the rows in the set (B,)"""
        epochs, places = np.divmod(numbers, self.num_rows)
        return np.array(
            [
                epoch_order(self.seed, int(epoch), self.num_rows)[place]
                for epoch, place in zip(epochs, places)
            ]
        )

    def check_ids(self, tokens, place=None):
        """
        tokens: array of ids, UserError where one is too large; place: function of its index -> in
        the file
        """
        if tokens.max() < self.vocab_size:
            return
        what = f"token id {tokens.max()} is there"
        if place:
            index = int(np.argmax(tokens >= self.vocab_size))
            what = f"token {place(index)} is {tokens.reshape(-1)[index]}"
        raise UserError(
            f"{self.path}: {what}, but the vocabulary has {self.vocab_size}; prepare the set again"
        )

    def weights(self, targets):
        """targets (...) int64 -> (...) float32, of each target's loss; None where all are 1"""
        if not len(self.critical_ids):
            return None
        return torch.where(torch.isin(targets, self.critical_ids), self.critical_alpha, 1.0)

    def make_batch(self, tokens, targets, mask, docs):
        """arrays (B, T) -> Batch"""
        tokens, targets, mask, docs = to_device(self.device, tokens, targets, mask, docs)
        return Batch(tokens, targets, mask, docs, self.weights(targets))

    def continued(self, prompts, answers, valid):
        """
        Prompts with answers to them (lists of lists of ids), cut to seq_len positions, next to each
        other -> Batch of one row, (1, T). Targets are the answers to prompts that are valid, list
        of bool
        """
        rows = [
            np.append(prompt, answer).astype(np.int64)[: self.seq_len + 1]
            for prompt, answer in zip(prompts, answers)
        ]
        mask = [
            counts & (np.arange(1, len(row)) >= len(prompt))
            for row, prompt, counts in zip(rows, prompts, valid)
        ]
        docs = np.repeat(np.arange(len(rows)), [len(row) - 1 for row in rows])
        parts = [row[:-1] for row in rows], [row[1:] for row in rows], mask
        tokens, targets, mask = (np.concatenate(part)[None] for part in parts)
        return self.make_batch(tokens, targets, mask, docs[None])


class TokenData(Rows):
    """
    Windows of seq_len tokens over data_dir/<split>.npy, next to each other, with the next token as
    target.

    batch(i) -> Batch. doc_mask: tokens see only their own document, and what follows its end is not
    a target
    """

    kind = "text"

    def __init__(self, *args, doc_mask=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens = open_array(self.path, self.counts["tokens"])
        token_bytes = open_array(os.path.join(self.data_dir, "token_bytes.npy"), self.vocab_size)
        self.token_bytes = torch.from_numpy(token_bytes.astype(np.int64)).to(self.device)
        self.end, self.doc_mask = self.meta["end"], doc_mask
        self.num_rows = (len(self.tokens) - 1) // self.seq_len
        if self.num_rows < 1:
            raise UserError(
                f"{self.path}: {len(self.tokens)} tokens, fewer than --seq_len={self.seq_len} "
                "+ 1; lower --seq_len or prepare more text"
            )
        self.windows = np.lib.stride_tricks.sliding_window_view(self.tokens, self.seq_len + 1)
        self.num_tokens, self.mean_context = self.num_rows * self.seq_len, self.seq_len
        self.identity = dict(doc_mask=doc_mask)

    def file_offsets(self, i):
        """-> (B, T) int64: where micro-batch i's tokens lie in the file"""
        starts = self.rows_at(self.run_order(i)[0]) * self.seq_len
        return torch.from_numpy(starts[:, None] + np.arange(self.seq_len))

    def prompts(self, i, max_new_tokens):
        """
        What micro-batch i's rows start with, for a model to continue with max_new_tokens -> list of
        arrays, numbers (of the rows in the run), which of them count. With doc_mask the last
        document only.
        """
        numbers, valid = self.run_order(i)
        rows = self.windows[self.rows_at(numbers) * self.seq_len]
        starts = rows[:, : self.seq_len + 1 - max_new_tokens]
        if self.doc_mask:
            starts = [
                row[np.append(-1, np.flatnonzero(row[:-1] == self.end))[-1] + 1 :] for row in starts
            ]
        return starts, numbers, valid

    def batch(self, i):
        numbers, valid = self.run_order(i)
        starts = self.rows_at(numbers) * self.seq_len
        rows = self.windows[starts].astype(np.int64)  # (B, T + 1)
        self.check_ids(rows, lambda k: starts[k // rows.shape[1]] + k % rows.shape[1])
        rows, valid = to_device(self.device, rows, valid)
        mask = valid[:, None].expand(-1, self.seq_len)
        tokens, targets, docs = rows[:, :-1].contiguous(), rows[:, 1:].contiguous(), None
        if self.doc_mask:
            ends = tokens == self.end
            # the end token still belongs to its document
            docs = ends.cumsum(1) - ends.long()
            mask = mask & ~ends
        return Batch(tokens, targets, mask, docs, self.weights(targets))


class Examples(Rows):
    """
    Kinds whose examples have lengths of their own. num_examples: that the arrays hold, one after
    the other; offsets: where each begins and the last one ends; learn: which tokens are to be
    learned
    """

    def open_examples(self, num_examples):
        num_tokens = self.counts["tokens"]
        self.tokens = open_array(self.path, num_tokens)
        self.learn = open_array(self.file("mask"), num_tokens)
        self.offsets = self.open_offsets("offsets", num_examples, num_tokens)

    def open_offsets(self, name, count, end, least=1):
        """
        -> (count + 1,) int64; UserError unless they go from 0 to end in steps of at least `least`
        """
        offsets = open_array(self.file(name), count + 1).astype(np.int64)
        if np.diff(offsets).min() < least or offsets[0] != 0 or offsets[-1] != end:
            raise UserError(f"{self.path}: its offsets do not fit; prepare the set again")
        return offsets

    def learned_frac(self):
        return int((np.asarray(self.learn) != 0).sum()) / self.num_tokens


class ChatData(Examples):
    """
    The conversations of data_dir/<split>.npy in rows of seq_len positions: whole, several to a row,
    with hardly any padding (`pack`). A conversation of n tokens takes n - 1 positions: its last is
    only a target.

    batch(i) -> Batch; docs: the conversation's number in the row. With mask_prompt an assistant's
    words and their end are targets, else every token. An epoch has every conversation once
    """

    kind = "chat"

    def __init__(self, *args, mask_prompt=True, **kwargs):
        super().__init__(*args, **kwargs)
        if "images" in self.meta and not self.images:
            raise UserError(
                f"--data_dir={self.data_dir}: a set with images; only train_sft.py learns from "
                "these"
            )
        self.open_examples(self.counts["conversations"])
        # (conversations,) positions
        self.lengths = np.diff(self.offsets) - 1
        if self.lengths.min() < 1:
            raise UserError(f"{self.path}: its offsets do not fit; prepare the set again")
        if too_long := int((self.lengths > self.seq_len).sum()):
            most = self.seq_len + 1
            raise UserError(
                f"--seq_len={self.seq_len}: {too_long} of {len(self.lengths)} conversations have "
                f"over {most} tokens (up to {self.lengths.max() + 1}); raise it, or prepare "
                f"the set with --max_len={most} and --long_rows=cut or skip"
            )
        self.num_tokens = int(self.lengths.sum())
        self.mean_context = float((self.lengths**2).sum() / self.num_tokens)
        self.target_frac = self.learned_frac() if mask_prompt else 1.0
        self.pad, self.mask_prompt, self.identity = (
            self.meta["pad"],
            mask_prompt,
            dict(mask_prompt=mask_prompt),
        )
        self.epoch, self.rows = None, None
        self.num_rows = len(self.rows_of(0))

    def rows_of(self, epoch):
        """-> list of arrays of the conversations in each row; the last epoch's are kept"""
        if epoch != self.epoch:
            generator = np.random.default_rng([self.seed, epoch])
            order = generator.permutation(len(self.lengths))
            rows = pack(self.lengths[order], self.seq_len)
            self.epoch = epoch
            self.rows = [order[rows[k]] for k in generator.permutation(len(rows))]
        return self.rows

    def examples(self, i):
        """-> list of (epoch, conversations in it) of the rows of micro-batch i, which rows count"""
        numbers, valid = self.run_order(i)
        rows = [
            (epoch, self.rows_of(epoch)[k]) for epoch, k in zip(*np.divmod(numbers, self.num_rows))
        ]
        return rows, valid

    def places(self, i):
        """
        -> where micro-batch i's tokens lie in the file (B, T), 0 for padding; the conversation's
        number in the row (B, T), -1 for padding; which rows count (B,)
        """
        rows, valid = self.examples(i)
        offsets, docs = np.zeros((2, len(rows), self.seq_len), dtype=np.int64)
        docs -= 1
        for row, (_, examples) in enumerate(rows):
            lengths = self.lengths[examples]
            starts = self.offsets[examples] - (lengths.cumsum() - lengths)
            n = lengths.sum()
            docs[row, :n] = np.arange(len(examples)).repeat(lengths)
            offsets[row, :n] = np.arange(n) + starts[docs[row, :n]]
        return offsets, docs, valid

    def file_offsets(self, i):
        """-> (B, T) int64: where micro-batch i's tokens lie in the file; 0 for padding"""
        return torch.from_numpy(self.places(i)[0])

    def prompts(self, i, max_new_tokens):
        """
        The conversations of micro-batch i up to their last answer, for a model to give it -> list
        of arrays, numbers (of the conversations in the run), which of them count
        """
        prompts, numbers, valid = [], [], []
        for (epoch, examples), counts in zip(*self.examples(i)):
            for e in examples:
                start, end = self.offsets[e : e + 2].tolist()
                learn = self.learn[start:end] != 0
                first = np.flatnonzero(np.diff(learn, prepend=False) & learn)  # of the answers
                if len(first) and first[-1]:
                    prompts.append(np.asarray(self.tokens[start : start + first[-1]]))
                    numbers.append(int(epoch) * len(self.lengths) + int(e))
                    valid.append(bool(counts))
        return prompts, np.array(numbers), np.array(valid)

    def batch(self, i):
        offsets, docs, valid = self.places(i)
        real = docs >= 0
        tokens, targets = (
            np.where(real, self.tokens[offsets + k].astype(np.int64), self.pad) for k in (0, 1)
        )
        self.check_ids(np.maximum(tokens, targets))
        mask = real & valid[:, None]
        if self.mask_prompt:
            mask &= self.learn[offsets + 1] != 0
        return self.make_batch(tokens, targets, mask, docs)


def pack(lengths, capacity):
    """
    Put items into as few rows of `capacity` as one easily can: longest first, each into the fullest
    row that still has room (best fit decreasing, within 2/9 of the optimum). lengths (N,),
    1..capacity. How many rows it takes depends on the lengths, not on their order. -> list of
    arrays of item numbers
    """
    # bit s: a row has s places left
    rows, by_space, open_spaces = [], [[] for _ in range(capacity + 1)], 0
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        if fitting := open_spaces >> length:
            # the lowest bit: the fullest row
            space = length + (fitting & -fitting).bit_length() - 1
            row = by_space[space].pop()
            if not by_space[space]:
                open_spaces -= 1 << space
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        by_space[space - length].append(row)
        open_spaces |= 1 << (space - length)
    return [np.array(row) for row in rows]


class PairData(Examples):
    """
    Pairs of answers to one prompt, micro_batch_size of them in one row; see Branches. num_rows:
    pairs

    batch(i) -> Pairs of micro-batch i
    """

    kind = "pairs"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_rows = self.counts["pairs"]
        self.open_examples(3 * self.num_rows)
        prompt, *answers = np.diff(self.offsets).reshape(-1, 3).T  # (pairs,) each
        if prompt.min() < 2:
            raise UserError(f"{self.path}: its offsets do not fit; prepare the set again")
        length, most = prompt + np.maximum(*answers), self.seq_len + 1
        if too_long := int((length > most).sum()):
            raise UserError(
                f"--seq_len={self.seq_len}: a prompt and one answer have over {most} tokens in "
                f"{too_long} of {self.num_rows} pairs (up to {length.max()}); raise it, or "
                f"prepare the set with --max_len={most} and --long_rows=cut or skip"
            )
        trunk = prompt - 1
        self.num_tokens = int((trunk + sum(answers)).sum())
        # twice the causal pairs
        attended = trunk**2 + sum(n * (n + 2 * trunk) for n in answers)
        self.mean_context = float(attended.sum() / self.num_tokens)
        self.target_frac = self.learned_frac()

    def batch(self, i):
        numbers, valid = self.run_order(i)
        return self.pairs(self.rows_at(numbers), valid)

    def pairs(self, ids, valid):
        """ids (P,): numbers of pairs; valid (P,) bool -> Pairs"""
        groups = []
        for i, counts in zip(ids, valid):
            start, chosen, rejected, end = self.offsets[3 * i : 3 * i + 4].tolist()
            self.check_ids(self.tokens[start:end])
            answers = [
                (self.tokens[answer], (self.learn[answer] != 0) & counts)
                for answer in (slice(chosen, rejected), slice(rejected, end))
            ]
            groups.append((self.tokens[start:chosen], answers))
        return Pairs(*branches(groups, self.device), *to_device(self.device, ids, valid))


class PromptData(Examples):
    """
    Prompts for a model to answer. num_rows: prompts

    batch(i) -> ids (B,) of the prompts of micro-batch i, numbers (B,) in the run's order, and which
    of them count; prompt(id) -> array of tokens, row(id) -> {"prompt": messages, "answer": text}
    """

    kind = "prompts"

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.num_rows, self.num_tokens = self.counts["prompts"], self.counts["tokens"]
        self.open_examples(self.num_rows)
        self.rows = open_array(self.file("rows"))
        self.row_offsets = self.open_offsets("row_offsets", self.num_rows, len(self.rows))
        if self.rows.dtype != np.uint8:
            raise UserError(f"{self.path('rows')}: expected bytes; prepare the set again")
        if (longest := int(np.diff(self.offsets).max())) > self.seq_len:
            raise UserError(
                f"--seq_len: prompts have up to {longest} tokens, {self.seq_len} fit with an "
                f"answer; raise it, or lower --max_new_tokens, or prepare with "
                f"--max_len={self.seq_len} --long_rows=skip"
            )
        self.check_ids(self.tokens)
        self.mean_context = self.num_tokens / self.num_rows

    def batch(self, i):
        numbers, valid = self.run_order(i)
        return self.rows_at(numbers), numbers, valid

    def prompt(self, i):
        return np.asarray(self.tokens[self.offsets[i] : self.offsets[i + 1]])

    def row(self, i):
        try:
            return json.loads(bytes(self.rows[self.row_offsets[i] : self.row_offsets[i + 1]]))
        except ValueError as error:
            raise UserError(
                f"{self.path}: row {i} is damaged ({error}); prepare the set again"
            ) from None
