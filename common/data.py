"""
Memory-mapped token sets and the batches of a run.

A set is a folder that data/prepare.py makes:

    train.npy, val.npy     token ids, document after document, each closed by the end token; uint16 or uint32
    token_bytes.npy        (V,) bytes of text per token
    meta.json              counts, vocab_size, end id, tokenizer fingerprint
    tokenizer_info.json    and the vocabulary file, if any

`batch(i)` is a pure function: the rows of micro-batch i on this rank follow from (seed, i) alone, so a
resumed run needs no replay. Step s of a run trains on samples [s, s + 1) * batch_size of the order, however
ranks and micro-batches divide them. An epoch visits every sample once, in an order of its own.
"""
import json
import math
import os

import numpy as np
import torch

from common.dist import UserError


def read_meta(data_dir):
    """-> the set's meta.json as a dict"""
    path = os.path.join(data_dir, "meta.json")
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        for name in ("vocab_size", "end", "fingerprint"):
            meta[name]
        for counts in meta["splits"].values():
            counts["tokens"]
        return meta
    except FileNotFoundError:
        raise UserError(f"--data_dir={data_dir}: no meta.json there; "
                        "make the set with data/prepare.py") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); prepare the set again") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not one of a token set ({error}); prepare the set again") from None


def open_array(path, count=None):
    """A read-only memory map of a .npy file that must hold `count` numbers."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; make the set with data/prepare.py") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: damaged or truncated ({error}); prepare the set again") from None
    if array.ndim != 1 or array.dtype.kind != "u":
        raise UserError(f"{path}: expected one row of unsigned integers, got {array.dtype} {array.shape}; "
                        "prepare the set again")
    if count is not None and len(array) != count:
        raise UserError(f"{path}: holds {len(array)} numbers, meta.json says {count}; prepare the set again")
    return array


class TokenData:
    """
    Windows of seq_len tokens over data_dir/<split>.npy, next to each other, with the next token as target.

    batch(i) -> tokens, targets (B, T) int64, mask (B, T) bool, docs (B, T) int64 or None; on device.
        mask    False: this target does not count
        docs    with doc_mask: the document's number in the row; what follows the end token is not a target

    num_samples     per epoch; total: samples that the run may use (rows past it are masked), None = no end
    tokens are checked against vocab_size as they are read.
    """

    def __init__(self, data_dir, split, seq_len, micro_batch_size, rank=0, world_size=1, device="cpu", seed=0,
                 doc_mask=False, total=None):
        meta = read_meta(data_dir)
        if split not in meta["splits"]:
            raise UserError(f"--data_dir={data_dir}: the set has no {split} split "
                            "(prepare it with --val_frac or --val_input)")
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
        self.seq_len, self.micro_batch_size = seq_len, micro_batch_size
        self.rank, self.world_size = rank, world_size
        self.device, self.seed, self.doc_mask = torch.device(device), seed, doc_mask
        self.total = math.inf if total is None else total
        self.epoch, self.order = None, None

    def sample_ids(self, i):
        """Which windows make micro-batch i here: (B,) sample numbers in their epoch, and which count."""
        first = (i * self.world_size + self.rank) * self.micro_batch_size
        position = np.arange(first, first + self.micro_batch_size)
        ids = np.array([self._order(epoch)[k] for epoch, k in zip(*np.divmod(position, self.num_samples))])
        return ids, position < self.total

    def _order(self, epoch):
        if epoch != self.epoch:  # a cache only: the order is a function of (seed, epoch)
            generator = np.random.default_rng([self.seed, epoch])
            self.epoch, self.order = epoch, generator.permutation(self.num_samples)
        return self.order

    def batch(self, i):
        ids, counts = self.sample_ids(i)
        rows = self.windows[ids * self.seq_len].astype(np.int64)                  # (B, T + 1)
        if rows.max() >= self.vocab_size:
            row, column = np.argwhere(rows >= self.vocab_size)[0]
            raise UserError(f"{self.path}: token {ids[row] * self.seq_len + column} is {rows[row, column]}, "
                            f"but the vocabulary has {self.vocab_size}; prepare the set again")
        rows, counts = torch.from_numpy(rows), torch.from_numpy(counts)
        if self.device.type == "cuda":
            rows, counts = rows.pin_memory(), counts.pin_memory()
        rows = rows.to(self.device, non_blocking=True)
        mask = counts.to(self.device, non_blocking=True)[:, None].expand(-1, self.seq_len)
        tokens, targets, docs = rows[:, :-1], rows[:, 1:], None
        if self.doc_mask:
            ends = tokens == self.end
            docs = ends.cumsum(1) - ends.long()               # the end token still belongs to its document
            mask = mask & ~ends
        return tokens.contiguous(), targets.contiguous(), mask, docs
