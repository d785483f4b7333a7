"""
Memory-mapped token sets and the batches of a run.

A set is a folder that data/prepare.py makes:

    train.npy, val.npy     token ids, document after document, each closed by the end token; uint16 or uint32
    meta.json              kind of set, counts, vocab_size, end and pad id, tokenizer fingerprint
    tokenizer_info.json    and the vocabulary file, if any
    token_bytes.npy        text: (V,) bytes of text per token
    train_mask.npy         chat, pairs: 1 where a token is to be learned, else 0; uint8, as long as train.npy
    train_offsets.npy      chat: where each conversation begins, and where the last one ends; uint64
                           pairs: the same of the prompt, the chosen and the rejected answer of each pair
    train_images.npy       chat, with "images" in meta.json (see vision.py): pixels (N, S, S, 3) uint8, with
                           train_image_ids.npy, which of them stand in the tokens, and
                           train_image_offsets.npy, where each conversation's begin among these
    train_rows.npy         prompts: {"prompt": messages, "answer": text} of each as JSON, one after the other,
                           with train_row_offsets.npy

`batch(i)` is a pure function: the rows of micro-batch i on this rank follow from (seed, i) alone, so a
resumed run needs no replay. Step s of a run trains on samples [s, s + 1) * batch_size of the order, however
ranks and micro-batches divide them. An epoch visits every sample once, in an order of its own.
"""
import functools
import json
import math
import os
from dataclasses import dataclass

import numpy as np
import torch

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
        for name in ("image_size", "tokens_per_image", "token", "resize", "mean", "std"):
            meta["images"][name] if "images" in meta else None
        return meta
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"--data_dir={data_dir}: no meta.json there; "
                        "make the set with data/prepare.py") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); prepare the set again") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not one of a token set ({error}); prepare the set again") from None


def open_array(path, count=None, row=()):
    """A read-only memory map of a .npy file that must hold `count` numbers, or rows of that shape."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; make the set with data/prepare.py") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged or truncated ({error}); prepare the set again") from None
    if array.shape[1:] != row or array.ndim < 1 or array.dtype.kind != "u":
        raise UserError(f"{path}: expected {f'rows of {row}' if row else 'one row of'} unsigned integers, "
                        f"got {array.dtype} {array.shape}; prepare the set again")
    if count is not None and len(array) != count:
        raise UserError(f"{path}: holds {len(array)} numbers, meta.json says {count}; prepare the set again")
    return array


def read_split(data_dir, split, kind):
    """-> meta.json of a set of that kind (text, chat, pairs, prompts) which has the split, or a UserError"""
    meta = read_meta(data_dir)
    if meta["kind"] != kind:
        images = " with images, which only train_sft.py takes" * ("images" in meta)
        raise UserError(f"--data_dir={data_dir}: a set of kind {meta['kind']}{images}, expected {kind}; "
                        f"make one with data/prepare.py {kind}")
    unit = {"text": "tokens", "chat": "conversations"}.get(kind, kind)
    if "pad" not in meta and kind != "text" or any(unit not in counts for counts in meta["splits"].values()):
        raise UserError(f"{data_dir}/meta.json: lacks pad or {unit}; prepare the set again")
    if split not in meta["splits"]:
        raise UserError(f"--data_dir={data_dir}: the set has no {split} split "
                        "(prepare it with --val_frac or --val_input, or train with --eval_seqs=0)")
    return meta


def positions(i, data):
    """Places in the run's order of samples that micro-batch i of this rank takes: (B,)"""
    first = (i * data.world_size + data.rank) * data.micro_batch_size
    return np.arange(first, first + data.micro_batch_size)


@functools.lru_cache(maxsize=8)
def epoch_order(seed, epoch, n):
    """The order of n samples in an epoch; cached, as many batches ask for it"""
    return np.random.default_rng([seed, epoch]).permutation(n)


def samples_at(places, data):
    """Sample numbers at places (B,) of the run's order -> (B,)"""
    return np.array([epoch_order(data.seed, int(epoch), data.num_samples)[k]
                     for epoch, k in zip(*np.divmod(places, data.num_samples))])


def to_device(device, *arrays):
    tensors = [torch.from_numpy(array) for array in arrays]
    if device.type == "cuda":
        tensors = [tensor.pin_memory() for tensor in tensors]
    return [tensor.to(device, non_blocking=True) for tensor in tensors]


class TokenData:
    """
    Windows of seq_len tokens over data_dir/<split>.npy, next to each other, with the next token as target.

    batch(i) -> tokens, targets (B, T) int64, mask (B, T) bool, docs (B, T) int64 or None; on device.
        mask    False: this target does not count
        docs    with doc_mask: the document's number in the row; what follows the end token is not a target

    num_samples     rows per epoch, of num_tokens tokens; total: rows that a run may use (later ones are
                    masked)
    mean_context    positions that a token's attention spans; target_frac: of tokens; both for their cost
    view            what else decides on the meaning of a loss, by name
    tokens are checked against vocab_size as they are read.
    """

    def __init__(self, data_dir, split, seq_len, micro_batch_size, rank=0, world_size=1, device="cpu", seed=0,
                 doc_mask=False, total=math.inf):
        meta = read_split(data_dir, split, "text")
        self.path = os.path.join(data_dir, f"{split}.npy")
        self.tokens = open_array(self.path, meta["splits"][split]["tokens"])
        self.token_bytes = torch.from_numpy(open_array(os.path.join(data_dir, "token_bytes.npy"),
                                                       meta["vocab_size"]).astype(np.int64)).to(device)
        self.fingerprint, self.end, self.vocab_size = meta["fingerprint"], meta["end"], meta["vocab_size"]
        self.num_samples = (len(self.tokens) - 1) // seq_len
        if self.num_samples < 1:
            raise UserError(f"{self.path}: {len(self.tokens)} tokens, fewer than --seq_len={seq_len} + 1; "
                            "lower --seq_len or prepare more text")
        self.windows = np.lib.stride_tricks.sliding_window_view(self.tokens, seq_len + 1)
        self.num_tokens, self.mean_context, self.target_frac = self.num_samples * seq_len, seq_len, 1.0
        self.view = dict(doc_mask=doc_mask)
        self.seq_len, self.micro_batch_size = seq_len, micro_batch_size
        self.rank, self.world_size, self.total = rank, world_size, total
        self.device, self.seed, self.doc_mask = torch.device(device), seed, doc_mask

    def sample_ids(self, i):
        """Which windows make micro-batch i here: (B,) sample numbers in their epoch, and which count."""
        position = positions(i, self)
        return samples_at(position, self), position < self.total

    def places(self, i):
        """-> (B, T) int64: where micro-batch i's tokens lie in the file"""
        ids, _ = self.sample_ids(i)
        return torch.from_numpy(ids[:, None] * self.seq_len + np.arange(self.seq_len))

    def prompts(self, i, max_new_tokens):
        """
        What micro-batch i's rows start with, for a model to continue with max_new_tokens -> list of arrays,
        numbers (of the rows in the run), which of them count. With doc_mask the last document only.
        """
        ids, counts = self.sample_ids(i)
        starts = self.windows[ids * self.seq_len][:, :self.seq_len + 1 - max_new_tokens]
        if self.doc_mask:
            starts = [row[np.append(-1, np.flatnonzero(row[:-1] == self.end))[-1] + 1:] for row in starts]
        return starts, positions(i, self), counts

    def batch(self, i):
        ids, counts = self.sample_ids(i)
        rows = self.windows[ids * self.seq_len].astype(np.int64)                  # (B, T + 1)
        if rows.max() >= self.vocab_size:
            row, column = np.argwhere(rows >= self.vocab_size)[0]
            raise UserError(f"{self.path}: token {ids[row] * self.seq_len + column} is {rows[row, column]}, "
                            f"but the vocabulary has {self.vocab_size}; prepare the set again")
        rows, counts = to_device(self.device, rows, counts)
        mask = counts[:, None].expand(-1, self.seq_len)
        tokens, targets, docs = rows[:, :-1], rows[:, 1:], None
        if self.doc_mask:
            ends = tokens == self.end
            docs = ends.cumsum(1) - ends.long()               # the end token still belongs to its document
            mask = mask & ~ends
        return tokens.contiguous(), targets.contiguous(), mask, docs


def open_examples(data_dir, split, num_tokens, num_examples):
    """-> path, tokens, which of them are to be learned, where each example begins and the last one ends"""
    path = os.path.join(data_dir, f"{split}.npy")
    tokens = open_array(path, num_tokens)
    learn = open_array(os.path.join(data_dir, f"{split}_mask.npy"), num_tokens)
    offsets = open_array(os.path.join(data_dir, f"{split}_offsets.npy"), num_examples + 1)
    if np.diff(offsets.astype(np.int64)).min() < 1 or offsets[0] != 0 or offsets[-1] != len(tokens):
        raise UserError(f"{path}: its offsets do not fit; prepare the set again")
    return path, tokens, learn, offsets.astype(np.int64)


def continuations(prompts, answers, counts, seq_len, device):
    """
    Prompts with answers to them (lists of lists of ids), cut to seq_len positions, next to each other ->
    tokens, targets (1, T) int64, mask (1, T): answers to prompts that count (counts), docs (1, T)
    """
    rows = [np.append(prompt, answer).astype(np.int64)[:seq_len + 1]
            for prompt, answer in zip(prompts, answers)]
    mask = [counted & (np.arange(1, len(row)) >= len(prompt))
            for row, prompt, counted in zip(rows, prompts, counts)]
    docs = np.repeat(np.arange(len(rows)), [len(row) - 1 for row in rows])
    parts = (*(np.concatenate(part) for part in ([r[:-1] for r in rows], [r[1:] for r in rows], mask)), docs)
    return to_device(device, *(part[None] for part in parts))


class ChatData:
    """
    The conversations of data_dir/<split>.npy in rows of seq_len positions: whole, several to a row, with
    hardly any padding (`pack`). A conversation of n tokens takes n - 1 positions: its last is only a target.

    batch(i) -> tokens, targets (B, T) int64, mask (B, T) bool, docs (B, T) int64; on device.
        mask    True: the target counts. With mask_prompt an assistant's words and their end, else every token
        docs    the conversation's number in the row: tokens see only their own; padding is -1

    num_samples, num_tokens, total, mean_context, target_frac, view    as in TokenData; an epoch has every
                    conversation once
    images_per_token    None for a set without images; with_images: sets with images are taken
    """

    def __init__(self, data_dir, split, seq_len, micro_batch_size, rank=0, world_size=1, device="cpu", seed=0,
                 mask_prompt=True, total=math.inf, with_images=False):
        meta = read_split(data_dir, split, "chat")
        if "images" in meta and not with_images:
            raise UserError(f"--data_dir={data_dir}: a set with images; only train_sft.py learns from these")
        self.path, self.tokens, self.learn, self.offsets = open_examples(
            data_dir, split, meta["splits"][split]["tokens"], meta["splits"][split]["conversations"])
        self.lengths = np.diff(self.offsets) - 1                                  # (conversations,) positions
        if self.lengths.min() < 1:
            raise UserError(f"{self.path}: its offsets do not fit; prepare the set again")
        if too_long := int((self.lengths > seq_len).sum()):
            raise UserError(f"--seq_len={seq_len}: {too_long} of {len(self.lengths)} conversations have over "
                            f"{seq_len + 1} tokens (up to {self.lengths.max() + 1}); raise it, or prepare "
                            f"the set with --max_len={seq_len + 1} and --long_rows=cut or skip")
        self.num_tokens = int(self.lengths.sum())
        self.mean_context = float((self.lengths**2).sum() / self.num_tokens)
        self.target_frac = int((np.asarray(self.learn) != 0).sum()) / self.num_tokens if mask_prompt else 1.0
        self.doc_mask, self.view = True, dict(mask_prompt=mask_prompt)
        self.vocab_size, self.pad, self.mask_prompt = meta["vocab_size"], meta["pad"], mask_prompt
        self.seq_len, self.micro_batch_size = seq_len, micro_batch_size
        self.rank, self.world_size, self.total = rank, world_size, total
        self.device, self.seed = torch.device(device), seed
        self.image, self.images_per_token = None, None        # id of the token that stands for images
        if "images" in meta:
            self._open_images(data_dir, split, meta["images"], meta["splits"][split])
        self.epoch, self.rows = None, None
        self.num_samples = len(self._rows(0))

    def _open_images(self, data_dir, split, info, counts):
        def path(name):
            return os.path.join(data_dir, f"{split}_{name}.npy")
        self.image, size = info["token"], info["image_size"]
        self.pixels = open_array(path("images"), counts["pictures"], (size, size, 3))
        self.image_ids = open_array(path("image_ids"), counts["images"])
        self.image_offsets = open_array(path("image_offsets"), len(self.lengths) + 1).astype(np.int64)
        borders = self.image_offsets
        shown = np.add.reduceat(np.asarray(self.tokens) == self.image, self.offsets[:-1], dtype=np.int64)
        if borders[0] or borders[-1] != len(self.image_ids) or np.diff(borders).min() < 0 or \
                len(self.image_ids) and self.image_ids.max() >= len(self.pixels) or \
                (shown != info["tokens_per_image"] * np.diff(borders)).any():
            raise UserError(f"{path('images')}: does not fit its ids and offsets; prepare the set again")
        self.images_per_token = len(self.image_ids) / self.num_tokens

    def _rows(self, epoch):
        if epoch != self.epoch:  # a cache only: the rows are a function of (seed, epoch)
            generator = np.random.default_rng([self.seed, epoch])
            order = generator.permutation(len(self.lengths))
            rows = pack(self.lengths[order], self.seq_len)
            self.epoch = epoch
            self.rows = [order[rows[k]] for k in generator.permutation(len(rows))]
        return self.rows

    def examples(self, i):
        """-> list of (epoch, conversations in it) of the rows of micro-batch i, which rows count"""
        position = positions(i, self)
        rows = [(epoch, self._rows(epoch)[k]) for epoch, k in zip(*np.divmod(position, self.num_samples))]
        return rows, position < self.total

    def places(self, i):
        """-> (B, T) int64: where micro-batch i's tokens lie in the file; 0 for padding"""
        rows, _ = self.examples(i)
        places = torch.zeros(len(rows), self.seq_len, dtype=torch.int64)
        for row, (_, examples) in enumerate(rows):
            at = np.concatenate([np.arange(self.offsets[e], self.offsets[e + 1] - 1) for e in examples])
            places[row, :len(at)] = torch.from_numpy(at)
        return places

    def prompts(self, i, max_new_tokens):
        """
        The conversations of micro-batch i up to their last answer, for a model to give it -> list of arrays,
        numbers (of the conversations in the run), which of them count
        """
        prompts, numbers, counted = [], [], []
        for (epoch, examples), counts in zip(*self.examples(i)):
            for e in examples:
                start, end = self.offsets[e:e + 2].tolist()
                learn = self.learn[start:end] != 0
                first = np.flatnonzero(np.diff(learn, prepend=False) & learn)     # of the answers
                if len(first) and first[-1]:
                    prompts.append(np.asarray(self.tokens[start:start + first[-1]]))
                    numbers.append(int(epoch) * len(self.lengths) + int(e))
                    counted.append(bool(counts))
        return prompts, np.array(numbers), np.array(counted)

    def images(self, i):
        """
        -> the images of micro-batch i as the model takes them: pixels (U, S, S, 3) uint8, each picture once;
        which (n,) int64 of them each image is, row after row; None where there are none
        """
        if self.image is None:
            return None
        rows, _ = self.examples(i)
        ids = np.concatenate([self.image_ids[self.image_offsets[e]:self.image_offsets[e + 1]]
                              for _, examples in rows for e in examples])
        pictures, which = np.unique(ids, return_inverse=True)
        return tuple(to_device(self.device, self.pixels[pictures], which)) if len(ids) else None

    def batch(self, i):
        (rows, counts), T = self.examples(i), self.seq_len
        tokens, targets, docs = (np.full((len(rows), T), x) for x in (self.pad, self.pad, 0))
        mask = np.zeros((len(rows), T), dtype=bool)
        for row, (_, examples) in enumerate(rows):
            at = 0
            for number, example in enumerate(examples):
                start, end = self.offsets[example:example + 2].tolist()
                here = slice(at, at + end - start - 1)
                tokens[row, here] = self.tokens[start:end - 1]
                targets[row, here] = self.tokens[start + 1:end]
                mask[row, here] = counts[row] & ((self.learn[start + 1:end] != 0) | (not self.mask_prompt))
                docs[row, here] = number
                at = here.stop
            docs[row, at:] = -1
        if max(tokens.max(), targets.max()) >= self.vocab_size:
            raise UserError(f"{self.path}: token id {max(tokens.max(), targets.max())} is there, "
                            f"but the vocabulary has {self.vocab_size}; prepare the set again")
        if self.image is not None:
            mask &= targets != self.image                     # what stands for an image is never a target
        return to_device(self.device, tokens, targets, mask, docs)


def pack(lengths, capacity):
    """
    Put items into as few rows of `capacity` as one easily can: longest first, each into the fullest row that
    still has room (best fit decreasing, within 2/9 of the optimum). lengths (N,), 1..capacity. How many rows
    it takes depends on the lengths, not on their order. -> list of arrays of item numbers
    """
    rows, by_space, open_spaces = [], [[] for _ in range(capacity + 1)], 0   # bit s: a row has s places left
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        if fitting := open_spaces >> length:
            space = length + (fitting & -fitting).bit_length() - 1          # the lowest bit: the fullest row
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


@dataclass
class Branches:
    """
    Answers to prompts in one row without padding, T positions: prompt, answer, ..., prompt, answer, ...

    A prompt, but for its last token, is a trunk that is computed once; each answer is a branch that starts
    with the prompt's last token, so that a position's target is the next token of its answer.
    """
    tokens: torch.Tensor               # (1, T) int64
    targets: torch.Tensor              # (1, T) int64
    mask: torch.Tensor                 # (1, T) bool, True: the target is a learned token of an answer
    docs: torch.Tensor                 # (1, T) int64, changes where a prompt or an answer starts
    branch: torch.Tensor               # (1, T) bool, True: in an answer
    answer: torch.Tensor               # (1, T) int64, number of the answer
    place: torch.Tensor                # (1, T) int64, of the target in its answer
    num_answers: int

    def padded(self, values):
        """values (N,) of the N tokens in mask -> (answers, longest), 0 where there is none"""
        answer, place = self.answer[self.mask], self.place[self.mask]
        longest = int(place.max()) + 1 if len(place) else 1
        out = torch.zeros(self.num_answers, longest, dtype=values.dtype, device=values.device)
        return out.index_put((answer, place), values)


def branches(groups, device):
    """groups: list of (prompt ids, [(answer ids, which are learned), ...]), arrays -> fields of Branches"""
    parts, num_answers = [], 0                           # tokens, targets, learned, branch, answer, place
    for prompt, answers in groups:
        n = len(prompt) - 1
        nothing = np.zeros(n, dtype=np.int64)
        parts.append((prompt[:-1], nothing, nothing > 0, False, num_answers, nothing))
        for ids, learn in answers:
            tokens = np.concatenate([prompt[-1:], ids[:-1]])
            parts.append((tokens, ids, learn, True, num_answers, np.arange(len(ids))))
            num_answers += 1
    lengths = [len(part[0]) for part in parts]
    tokens, targets, mask, place = (np.concatenate([part[k] for part in parts]) for k in (0, 1, 2, 5))
    branch, answer = (np.repeat([part[k] for part in parts], lengths) for k in (3, 4))
    docs = np.repeat(np.arange(len(parts)), lengths)
    rows = (tokens.astype(np.int64), targets.astype(np.int64), mask, docs, branch, answer, place)
    return *to_device(device, *(row[None] for row in rows)), num_answers


@dataclass
class Pairs(Branches):
    """A micro-batch of P pairs: answer 2 p is the chosen one of pair p, 2 p + 1 the rejected one."""
    ids: torch.Tensor                  # (P,) int64, the pairs' numbers in the set
    counts: torch.Tensor               # (P,) bool, False: past the run's last pair

    def per_answer(self, values):
        """Sum values (N,) of the N tokens in mask over each answer -> (P, 2): chosen, rejected"""
        return self.padded(values).sum(dim=1).view(-1, 2)


class PairData:
    """
    Pairs of answers to one prompt, micro_batch_size of them in one row; see Branches.

    batch(i) -> Pairs of micro-batch i
    num_samples, num_tokens, total, mean_context, target_frac, view    as in TokenData, of pairs, not rows
    """

    def __init__(self, data_dir, split, seq_len, micro_batch_size, rank=0, world_size=1, device="cpu", seed=0,
                 total=math.inf):
        meta = read_split(data_dir, split, "pairs")
        self.num_samples = meta["splits"][split]["pairs"]
        self.path, self.tokens, self.learn, self.offsets = open_examples(
            data_dir, split, meta["splits"][split]["tokens"], 3 * self.num_samples)
        prompt, *answers = np.diff(self.offsets).reshape(-1, 3).T                 # (pairs,) each
        if prompt.min() < 2:
            raise UserError(f"{self.path}: its offsets do not fit; prepare the set again")
        length = prompt + np.maximum(*answers)
        if too_long := int((length - 1 > seq_len).sum()):
            raise UserError(f"--seq_len={seq_len}: a prompt and one answer have over {seq_len + 1} tokens in "
                            f"{too_long} of {self.num_samples} pairs (up to {length.max()}); raise it, or "
                            f"prepare the set with --max_len={seq_len + 1} and --long_rows=cut or skip")
        trunk = prompt - 1
        self.num_tokens = int((trunk + sum(answers)).sum())
        attended = trunk**2 + sum(n * (n + 2 * trunk) for n in answers)           # twice the causal pairs
        self.mean_context = float(attended.sum() / self.num_tokens)
        self.target_frac, self.view = int((np.asarray(self.learn) != 0).sum()) / self.num_tokens, {}
        self.vocab_size, self.doc_mask, self.micro_batch_size = meta["vocab_size"], True, micro_batch_size
        self.rank, self.world_size, self.total = rank, world_size, total
        self.device, self.seed = torch.device(device), seed

    def batch(self, i):
        position = positions(i, self)
        return self.pairs(samples_at(position, self), position < self.total)

    def pairs(self, ids, counts):
        """ids (P,): numbers of pairs; counts (P,) bool -> Pairs"""
        groups = []
        for i, counted in zip(ids, counts):
            start, chosen, rejected, end = self.offsets[3 * i:3 * i + 4].tolist()
            groups.append((self.tokens[start:chosen], [
                (self.tokens[answer], (self.learn[answer] != 0) & counted)
                for answer in (slice(chosen, rejected), slice(rejected, end))]))
            largest = self.tokens[start:end].max()
            if largest >= self.vocab_size:
                raise UserError(f"{self.path}: token id {largest} is there, but the vocabulary has "
                                f"{self.vocab_size}; prepare the set again")
        return Pairs(*branches(groups, self.device), *to_device(self.device, ids, counts))


class PromptData:
    """
    Prompts for a model to answer.

    batch(i) -> ids (B,) of the prompts of micro-batch i, places (B,) in the run's order of samples, and which
    of them count; prompt(id) -> array of tokens, row(id) -> {"prompt": messages, "answer": text}
    num_samples, num_tokens, total, mean_context, target_frac, view    as in TokenData, of prompts
    """

    def __init__(self, data_dir, split, seq_len, micro_batch_size, rank=0, world_size=1, device="cpu", seed=0,
                 total=math.inf):
        meta = read_split(data_dir, split, "prompts")
        self.num_samples, self.num_tokens = (meta["splits"][split][name] for name in ("prompts", "tokens"))
        self.path, self.tokens, _, self.offsets = open_examples(data_dir, split, self.num_tokens,
                                                                self.num_samples)
        self.rows = open_array(os.path.join(data_dir, f"{split}_rows.npy"))
        self.row_offsets = open_array(os.path.join(data_dir, f"{split}_row_offsets.npy"),
                                      self.num_samples + 1)
        borders = self.row_offsets.astype(np.int64)
        if borders[0] or borders[-1] != len(self.rows) or np.diff(borders).min() < 1 or \
                self.rows.dtype != np.uint8:
            raise UserError(f"{self.path}: its row offsets do not fit; prepare the set again")
        if (longest := int(np.diff(self.offsets).max())) > seq_len:
            raise UserError(f"--seq_len: prompts have up to {longest} tokens, {seq_len} fit with an answer; "
                            f"raise it, or lower --max_new_tokens, or prepare with --max_len={seq_len} "
                            "--long_rows=skip")
        if self.tokens.max() >= meta["vocab_size"]:
            raise UserError(f"{self.path}: token id {self.tokens.max()} is there, but the vocabulary has "
                            f"{meta['vocab_size']}; prepare the set again")
        self.mean_context, self.target_frac = self.num_tokens / self.num_samples, 1.0
        self.doc_mask, self.view, self.micro_batch_size = True, {}, micro_batch_size
        self.rank, self.world_size, self.total = rank, world_size, total
        self.device, self.seed = torch.device(device), seed

    def batch(self, i):
        places = positions(i, self)
        return samples_at(places, self), places, places < self.total

    def prompt(self, i):
        return np.asarray(self.tokens[self.offsets[i]:self.offsets[i + 1]])

    def row(self, i):
        try:
            return json.loads(bytes(self.rows[int(self.row_offsets[i]):int(self.row_offsets[i + 1])]))
        except ValueError as error:
            raise UserError(f"{self.path}: row {i} is damaged ({error}); prepare the set again") from None
