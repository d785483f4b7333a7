"""
What a teacher says to every token of a set, kept on disk: its k likeliest next tokens and their
log-probs, the rest of its probability spread evenly over the other tokens. Then a run needs no
teacher in memory.

    folder/
        arrays.json                       what it was made from, and how far from the teacher; last
        train_ids.npy, train_logps.npy    (N, k) for the N tokens; uint16 or int32, float16
        train_rest.npy                    (N,) float32, the log-prob of each other token

It appears whole or not at all (made in folder.*.partial, renamed) and is memory-mapped: it may be
larger than memory. Runs that make the same one at once keep the first; a killed run leaves its
.partial behind.
"""

import json
import math
import os
import shutil
import uuid
from dataclasses import dataclass

import numpy as np
import torch

from common import dist
from common.errors import UserError


def top_k(logits, k):
    """logits (n, V), k < V -> ids, log-probs (n, k) of the k likeliest, rest (n,): of each other"""
    logps = logits.log_softmax(-1)
    top, ids = logps.topk(k)
    rest = logps.scatter(1, ids, -torch.inf).logsumexp(-1) - math.log(logits.shape[-1] - k)
    return ids, top, rest


def top_k_logits(ids, logps, rest, vocab_size):
    """The way back: ids int64, logps (n, k), rest (n,) -> (n, V) log-probs, usable as logits"""
    return rest[:, None].repeat(1, vocab_size).scatter_(1, ids, logps)


@dataclass
class TeacherCache:
    """What `write_cache` left in a folder"""

    info: dict  # "mass", "kl"
    arrays: dict  # of name of the file to its array
    vocab_size: int
    device: torch.device

    def logits(self, split, places):
        """
        places (B, T) int64 of tokens in the split's file -> function of positions (n,) to logits
        (n, V), a teacher of losses.linear_kd_loss
        """

        def at(positions):
            rows = places.flatten()[positions.cpu()].numpy()
            ids, logps, rest = (
                torch.from_numpy(self.arrays[f"{split}_{name}"][rows]).to(self.device, dtype)
                for name, dtype in dict(
                    ids=torch.int64, logps=torch.float32, rest=torch.float32
                ).items()
            )
            if rest.isnan().any():
                raise UserError(
                    "--cache_dir: the teacher was not asked about all of these tokens; "
                    "remove the cache, and it is made again"
                )
            return top_k_logits(ids, logps, rest, self.vocab_size)

        return at


def open_cache(folder, key, vocab_size, device):
    """-> the TeacherCache that `write_cache` left in folder for this key (str), None without one"""

    def read():
        if not os.path.exists(folder):
            return None
        try:
            with open(f"{folder}/arrays.json", encoding="utf-8") as file:
                return json.load(file)
        except (OSError, ValueError) as error:
            raise UserError(
                f"--cache_dir={folder}: no cache of a teacher ({error}); name another folder"
            ) from None

    content = dist.from_rank_zero(read)
    if content is None:
        return None
    if content["key"] != key:
        raise UserError(
            f"--cache_dir={folder}: is of another teacher, other data or other "
            "options; name another folder, or remove it"
        )
    arrays = {}
    for name, shape in content["shapes"].items():
        try:
            arrays[name] = np.load(f"{folder}/{name}.npy", mmap_mode="r", allow_pickle=False)
            if list(arrays[name].shape) != shape:
                raise ValueError(f"{name} is {arrays[name].shape}")
        except (OSError, ValueError) as error:
            raise UserError(
                f"--cache_dir={folder}: damaged ({error}); remove it, and it is made again"
            ) from None
    return TeacherCache(content["info"], arrays, vocab_size, device)


@torch.no_grad()
def write_cache(folder, key, k, vocab_size, sets, ask, autocast):
    """
    Ask the teacher about every target of the sets, all ranks together. sets: dict split ->
    TokenData or ChatData; ask(split, i, batch) -> what it says to micro-batch i, as
    losses.linear_kd_loss takes it. Kept with it, averaged over the targets: mass, the probability
    of the k tokens; kl, KL(teacher || cache).
    """
    aside = dist.from_rank_zero(lambda: create(folder, k, vocab_size, sets))
    names = [f"{split}_{name}" for split in sets for name in ("ids", "logps", "rest")]
    arrays = {name: np.load(f"{aside}/{name}.npy", mmap_mode="r+") for name in names}
    # mass, divergence, targets
    total = torch.zeros(3, dtype=torch.float64)
    for split, data in sets.items():
        # each row once
        data.limit(data.num_rows)
        for i in range(data.num_batches):
            batch = data.batch(i)
            places = data.file_offsets(i).flatten()
            with autocast:
                logits_at = ask(split, i, batch)
                for at in batch.mask.flatten().nonzero()[:, 0].split(128):
                    logps = logits_at(at).float().log_softmax(-1)  # (n, V)
                    ids, top, rest = top_k(logps, k)
                    kept = top_k_logits(ids, top.half().float(), rest, vocab_size).log_softmax(-1)
                    kl = (logps.exp() * (logps - kept)).sum()
                    sums = torch.stack([top.exp().sum(), kl, kl.new_tensor(len(at))])
                    total += sums.double().cpu()
                    place = places[at.cpu()].numpy()
                    for name, values in dict(ids=ids, logps=top, rest=rest).items():
                        arrays[f"{split}_{name}"][place] = values.cpu().numpy()
    for array in arrays.values():
        array.flush()
    # and every rank is done
    mass, kl, n = dist.all_sum(total).tolist()
    shapes = {name: array.shape for name, array in arrays.items()}
    content = dict(key=key, info=dict(mass=mass / n, kl=kl / n), shapes=shapes)
    dist.from_rank_zero(lambda: publish(aside, folder, content))


def create(folder, k, vocab_size, sets):
    """Arrays that wait for their values -> their folder; another run may be making such, too"""
    aside = f"{folder.rstrip('/')}.{uuid.uuid4().hex[:8]}.partial"
    kinds = dict(
        ids=("uint16" if vocab_size <= 2**16 else "int32", [k]),
        logps=("float16", [k]),
        rest=("float32", []),
    )
    try:
        os.makedirs(aside)
        for split, data in sets.items():
            for name, (kind, row) in kinds.items():
                path, shape = f"{aside}/{split}_{name}.npy", (len(data.tokens), *row)
                array = np.lib.format.open_memmap(path, "w+", kind, shape)
                # not asked yet: never to be taught
                if name == "rest":
                    array[:] = np.nan
                array.flush()
        return aside
    except OSError as error:
        raise UserError(f"--cache_dir={folder}: cannot be written ({error.strerror})") from None


def publish(aside, folder, content):
    try:
        with open(f"{aside}/arrays.json", "w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.rename(aside, folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        # unless another run was first; its key is checked next
        if not os.path.exists(f"{folder}/arrays.json"):
            raise UserError(f"--cache_dir={folder}: cannot be written ({error.strerror})") from None
