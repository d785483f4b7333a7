"""
Attention. `attend` is the only place where the language model computes it; a layout says which
position may look at which, and is made once in a forward, for all layers:

    Causal       whole rows
    Documents    rows of packed documents, which do not see each other, and branches of them
    KVCache      rows that continue what it stores, each row its own past or several rows one trunk

All layouts follow one rule, `Layout.may_look`, and where a fused kernel knows that rule, the choice
of the kernel stands beside it. So another kind of attention is an edit of `Layout` alone. A sliding
window of W positions, for training (packed or not) and sampling:

    varlen_window    (W - 1, 0)
    may_look         and j > i - W
    last             without its two shortcuts
    keys_per_query   W, about

W may be a line of ModelConfig: self.c.window.

Shapes: B sequences, T positions, H query heads, K key/value heads, D head dim, S keys, N positions
of all rows, one row after the other. Positions count from the start of a sequence.
"""

import functools
import inspect
import math

import torch
import torch.nn.functional as F

try:
    from torch.nn.attention.varlen import varlen_attn

    VARLEN = "window_size" in inspect.signature(varlen_attn).parameters  # torch 2.11 or newer
except ImportError:
    VARLEN = False

# in rows up to this, a mask costs less than going by documents
DENSE_MASK_LEN = 128
# the same on a GPU that needs a call for each document: many small calls cost most
DENSE_MASK_LEN_GPU = 2048

FUTURE = torch.iinfo(torch.int64).max  # a position that nobody may look at


def attend(q, k, v, layout, dropout=0.0, layer=0):
    """
    q (B, H, T, D), k, v (B, K, T, D) of the positions of a forward, in this layer -> (B, H, T, D).
    dropout: of attention weights, in training
    """
    B, H, T, D = q.shape
    if layout.lengths:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (N, H or K, D)
        if layout.kernel:
            y = in_one_kernel(q, k, v, layout)
        else:
            y = one_by_one(q, k, v, layout, dropout)
        return y.view(B, T, H, D).transpose(1, 2)
    if not isinstance(layout, KVCache):
        return sdpa(q, k, v, layout.looks, dropout)
    q, k, v = layout.add(layer, q, k, v)
    y = with_trunk(q, k, v, layout, layer) if layout.trunk else sdpa(q, k, v, layout.looks)
    return y.reshape(B, H, T, D)


def sdpa(q, k, v, looks, dropout=0.0):
    """looks: what `Layout.last` gives"""
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, enable_gqa=gqa, **looks)


def in_one_kernel(q, k, v, layout):
    """q (N, H, D), k, v (N, K, D) -> (N, H, D): FlashAttention for documents"""
    (_, H, D), K = q.shape, k.shape[1]
    k, v = (x[layout.places, :, None] for x in (k, v))  # (keys, K, 1, D)
    k, v = (x.expand(-1, K, H // K, D).flatten(1, 2) for x in (k, v))  # (keys, H, D)
    return varlen_attn(
        q,
        k,
        v,
        layout.borders,
        layout.key_borders,
        max(layout.lengths),
        max(layout.num_keys),
        window_size=layout.varlen_window,
    )


def one_by_one(q, k, v, layout, dropout):
    """q (N, H, D), k, v (N, K, D) -> (N, H, D): a call for each document"""
    out, trunk = [], None
    parts = (x.split(layout.lengths) for x in (q, k, v))
    for *qkv, n_keys, looks in zip(*parts, layout.num_keys, layout.looks):
        # (1, H or K, n, D)
        q, k, v = (x.transpose(0, 1)[None] for x in qkv)
        if n_keys > q.shape[2]:
            k, v = (torch.cat(pair, dim=2) for pair in zip(trunk, (k, v)))
        else:
            trunk = k, v
        out.append(sdpa(q, k, v, looks, dropout)[0].transpose(0, 1))  # (n, H, D)
    return torch.cat(out)


def with_trunk(q, k, v, cache, layer):
    """
    q (B, K, n, D), a row's own k, v (B, K, S, D) -> (B, K, n, D): of its trunk and its own
    positions
    """
    trunk_k, trunk_v = (x[layer] for x in cache.trunk)  # (P, K, S0, D)
    trunk_scores = cache.by_row(cache.by_trunk(q) @ trunk_k.mT)  # (B, K, n, S0)
    scores = torch.cat([trunk_scores, q @ k.mT], dim=3)
    scores = torch.where(cache.mask, scores, -torch.inf)
    p = (scores.float() / math.sqrt(q.shape[3])).softmax(dim=3).to(v.dtype)
    trunk_p, own_p = p.split([trunk_k.shape[2], k.shape[2]], dim=3)
    return cache.by_row(cache.by_trunk(trunk_p) @ trunk_v) + own_p @ v


# -----------------------------------------------------------------------------
# layouts


class Layout:
    """
    The rule of all layouts: a position looks at itself and at those before it.

    positions (B or 1, T): of the tokens of a forward; rope_length: of the sequence, for the scaling
    of rotary positions. c: resolved ModelConfig
    """

    # keys before and after a query: all, none
    varlen_window = (-1, 0)
    # of documents, where each is computed alone
    lengths = None

    def __init__(self, c):
        self.c = c

    def may_look(self, i, j):
        """
        i (B, T), j (B, S): positions of queries and of keys -> bool (B, 1, T, S), for all heads
        """
        return j[:, None, None, :] <= i[:, None, :, None]

    def last(self, n, S, device, repeat=1):
        """
        -> what SDPA is told where the queries are the last n of S positions: its arguments.
        repeat: so many queries in each position, position after position in turns
        """
        if n == S:
            return dict(is_causal=True)
        if n == 1:
            return {}
        j = torch.arange(S, device=device)[None]
        return dict(attn_mask=self.may_look(j[:, S - n :].repeat(1, repeat), j))

    def keys_per_query(self, T):
        """Mean number of keys that a query of T positions looks at, for FLOPs"""
        return T / 2


class Causal(Layout):
    """Whole rows of T positions"""

    def __init__(self, c, T, device):
        super().__init__(c)
        self.positions, self.rope_length = torch.arange(T, device=device)[None], T
        self.looks = self.last(T, T, device)


class Documents(Layout):
    """
    Rows of documents that do not see each other. A branch sees its trunk too: the last document
    before it that is none. Short rows have a mask. Long ones go by documents, so that work and
    memory grow with what is attended: in one kernel for all, where there is one, or in a call for
    each.
    """

    def __init__(self, c, docs, branch, dtype, dropout):
        """docs, branch (B, T) or None: see `documents`; dtype, dropout: of `attend`"""
        super().__init__(c)
        self.positions, start, trunk_start = documents(docs, branch)
        self.rope_length = longest = docs.shape[1]
        if not torch.compiler.is_compiling():
            self.kernel, longest = by_documents(docs.device, dtype, c.head_dim, dropout)
        if self.rope_length > longest:
            self.divide(start, trunk_start)
            return
        seen = start[:, None, :]
        mask = (seen == start[:, :, None]) | (seen == trunk_start[:, :, None])  # (B, T, T)
        mask = mask[:, None] & self.may_look(self.positions, self.positions)
        self.looks = dict(attn_mask=mask)

    def divide(self, start, trunk_start):
        """
        Which positions of all rows, one row after the other, a document has, and which it looks at
        """
        N, device = start.numel(), start.device
        index = torch.arange(start.shape[1], device=device)
        starts = (index == start).flatten().nonzero()[:, 0]  # (documents,)
        # positions of its trunk
        before = self.positions.flatten()[starts]
        # (documents + 1,)
        self.borders = F.pad(starts, (0, 1), value=N).int()
        own = self.borders.diff()
        self.key_borders = F.pad((before + own).cumsum(0), (1, 0)).int()
        self.lengths, self.num_keys = torch.stack([own, before + own]).tolist()
        if not self.kernel:
            last = functools.cache(lambda n, S: self.last(n, S, device))
            self.looks = [last(n, S) for n, S in zip(self.lengths, self.num_keys)]
        self.places = slice(None)  # of the keys
        if self.kernel and self.num_keys != self.lengths:
            document = torch.arange(len(starts), device=device).repeat_interleave(before + own)
            n = torch.arange(len(document), device=device) - self.key_borders[document]
            to_trunk = (start - trunk_start).flatten()[starts]
            back = torch.where(n < before[document], to_trunk[document], before[document])
            self.places = starts[document] + n - back


def documents(docs, branch=None):
    """
    docs (B, T): a number that changes where a document starts; branch (B, T) bool: it branches off
    the last document before it that is none, its trunk -> (B, T) each: positions of the tokens in
    their documents, a branch's after its trunk; index where the document starts, and where its
    trunk does
    """
    index = torch.arange(docs.shape[1], device=docs.device)[None]  # (1, T)

    def last(event):
        """Index of the latest event up to each place; event (B, T) bool, one at 0 -> (B, T)"""
        return torch.where(event, index, 0).cummax(dim=1).values

    first = docs.diff(dim=1, prepend=docs[:, :1] - 1) != 0
    start = last(first)
    positions = index - start
    if branch is None:
        return positions, start, start
    trunk_start = last(first & ~branch)
    # its first branch starts
    trunk_end = last(branch & ~F.pad(branch, (1, -1)))
    positions = torch.where(branch, positions + trunk_end - trunk_start, positions)
    return positions, start, trunk_start


def by_documents(device, dtype, D, dropout):
    """
    -> whether one kernel attends all documents of long rows; longest row for which a mask is better
    """
    # which lacks dropout
    kernel = not dropout and varlen_kernel(device, dtype, D)
    few_calls = kernel or device.type == "cpu"
    return kernel, DENSE_MASK_LEN if few_calls else DENSE_MASK_LEN_GPU


def varlen_kernel(device, dtype, D):
    """Whether torch has FlashAttention for documents in a row of heads of D channels there"""
    if not VARLEN or device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return D % 8 == 0 and D <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)


class KVCache(Layout):
    """
    Keys and values of the past, (L, B, K, S, D) each, preallocated; all rows are equally long.
    `fork` makes the past the trunk of several rows each, which keep only what they add: a prompt is
    there once however many samples continue it, and prompts may have different lengths.
    """

    def __init__(self, c, B, S, device, dtype):
        super().__init__(c)
        shape = (c.n_layer, B, c.n_kv_head, S, c.head_dim)
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.used, self.rope_length = 0, S
        self.key_positions = torch.arange(S, device=device)[None]  # (1, S)
        self.trunk = None  # [k, v] (L, P, K, S0, D), once forked

    @property
    def capacity(self):
        return self.k.shape[3]

    def begin(self, T):
        """Make room for T more tokens a row -> this cache, as the layout of their forward"""
        end = self.used + T
        if end > self.capacity:
            raise ValueError(
                f"cache of {self.capacity} positions is full: {self.used} used, {T} more asked"
            )
        self.used = end
        # the first forward attends as it is; later, query heads that share keys are more positions
        first = end == T and not self.trunk
        repeat = 1 if first else self.c.n_head // self.c.n_kv_head
        keys = self.key_positions[:, : self.key_positions.shape[1] - self.capacity + end]
        self.positions = keys[:, -T:]  # (B or 1, T)
        if self.trunk:
            self.mask = self.may_look(self.positions.repeat(1, repeat), keys)
        else:
            self.looks = self.last(T, end, self.k.device, repeat)
        return self

    def add(self, layer, q, k, v):
        """
        Store k, v (B, K, T, D) of the tokens begun -> what to attend with: all keys and values of a
        row's own, q (B, H, T, D) as (B, K, H/K T, D)
        """
        start = self.used - k.shape[2]
        self.k[layer, :, :, start : self.used], self.v[layer, :, :, start : self.used] = k, v
        if not start and not self.trunk:
            return q, k, v
        k, v = self.k[layer, :, :, : self.used], self.v[layer, :, :, : self.used]
        return q.reshape(*k.shape[:2], -1, k.shape[3]).to(k.dtype), k, v

    def fork(self, lengths, num_samples, room):
        """
        Go on with num_samples rows for each row so far, row p * num_samples + g for row p, and room
        for so many positions more. lengths (B,): of the rows so far, what lies behind was padding
        """
        L, B, K, _, D = self.k.shape
        device = self.k.device
        self.trunk = [x[:, :, :, : self.used].contiguous() for x in (self.k, self.v)]
        lengths = torch.as_tensor(lengths, device=device)[:, None]  # (B, 1)
        index = torch.arange(self.used, device=device)[None]
        index = torch.where(index < lengths, index, FUTURE)
        key_positions = torch.cat([index, lengths + torch.arange(room, device=device)], dim=1)
        self.key_positions = key_positions.repeat_interleave(num_samples, dim=0)  # (B', S0 + room)
        # (B',) trunk of each
        self.group = torch.arange(B, device=device).repeat_interleave(num_samples)
        self.k, self.v = (x.new_zeros(L, B * num_samples, K, room, D) for x in self.trunk)
        self.used = 0
        self.place_rows()

    def place_rows(self):
        """Where the rows stand when each trunk's rows are side by side"""
        kept = self.group.unique()
        if 4 * len(kept) < 3 * self.trunk[0].shape[1]:  # drop trunks without rows
            self.trunk = [x[:, kept] for x in self.trunk]
            self.group = torch.searchsorted(kept, self.group)
        P = self.trunk[0].shape[1]
        member = F.one_hot(self.group, P)  # (B, P)
        # (B,) in its trunk
        place = member.cumsum(dim=0).gather(1, self.group[:, None])[:, 0] - 1
        n = int(place.max()) + 1
        self.slot = self.group * n + place
        self.slots = self.group.new_zeros(P, n)  # the rows there
        self.slots.view(-1)[self.slot] = torch.arange(len(place), device=place.device)

    def by_trunk(self, x):
        """
        x (B, K, n, X) -> (P, K, slots * n, X), so that a product with a trunk is one for all its
        rows
        """
        _, K, n, X = x.shape
        P, slots = self.slots.shape
        return x[self.slots].transpose(1, 2).reshape(P, K, slots * n, X)

    def by_row(self, x):
        """And back"""
        (P, K, _, X), slots = x.shape, self.slots.shape[1]
        return x.view(P, K, slots, -1, X).transpose(1, 2).flatten(0, 1)[self.slot]

    def select(self, rows):
        """
        Keep these rows only, in this order. rows (B',) int64, no more than there are; few should
        move
        """
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for x in (self.k, self.v):
            x[:, moved, :, : self.used] = x[:, rows[moved], :, : self.used]
        self.k, self.v = self.k[:, : len(rows)], self.v[:, : len(rows)]
        if self.trunk:
            self.group, self.key_positions = self.group[rows], self.key_positions[rows]
            self.place_rows()
