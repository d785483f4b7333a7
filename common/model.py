"""
A decoder-only transformer in the form of Llama, Qwen2 and Qwen3: RMSNorm before each block, rotary
positions, grouped-query attention, SwiGLU, dense or as a mixture of experts.

    model = GPT(ModelConfig(vocab_size=6400, seq_len=512))
    hidden = model(tokens)                         # (B, T) int64 -> (B, T, C), after the final norm
    logits = hidden @ model.head.T                 # (B, T, V); the losses do this in chunks, never whole

    cache = model.new_cache(B, T)                  # room for T positions
    hidden = model(tokens[:, :9], cache=cache)     # prefill, then token by token; the same numbers

Papers: RMSNorm 1910.07467, RoPE 2104.09864, GQA 2305.13245, SwiGLU 2002.05202, YaRN 2309.00071, mixture of
experts 2101.03961 and 2401.06066.
Shapes: B sequences, T positions, C channels, V vocabulary, H query heads, K key/value heads, D head dim,
L layers, E experts.
"""
import functools
import inspect
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

try:
    from torch.nn.attention.varlen import varlen_attn
    VARLEN = "window_size" in inspect.signature(varlen_attn).parameters   # torch 2.11 or newer
except ImportError:
    VARLEN = False

from common import dist
from common.errors import UserError

DENSE_MASK_LEN = 128                   # in rows up to this, a mask costs less than going by documents
DENSE_MASK_LEN_GPU = 2048              # the same on a GPU that needs a call for each: many small ones cost


@dataclass(frozen=True)
class ModelConfig:
    vocab_size: int = 0                # tokens, special ones included; 0 = the data set's
    n_layer: int = 8                   # transformer blocks
    n_head: int = 8                    # query heads
    n_kv_head: int = 0                 # key/value heads, divides n_head; 0 = n_head, 1 = multi-query
    n_embd: int = 512                  # channels of the residual stream
    head_dim: int = 0                  # channels per head, even; 0 = n_embd / n_head
    d_ff: int = 0                      # hidden channels of the MLP; 0 = 8/3 n_embd, up to a multiple of 32
    seq_len: int = 0                   # longest sequence, in tokens; 0 = the run's seq_len
    tie_embeddings: bool = True        # the output head is the token embedding
    qk_norm: bool = False              # RMSNorm on every query and key head, as in Qwen3
    attn_bias: bool = False            # biases on queries, keys and values, as in Qwen2
    n_expert: int = 0                  # routed experts in a block; 0 = one MLP for every token
    n_expert_active: int = 2           # routed experts that a token goes to
    n_shared_expert: int = 0           # experts that every token goes to as well
    shared_gate: bool = False          # what these give is multiplied by a sigmoid, as in Qwen2-MoE
    n_dense_layer: int = 0             # first blocks that have one MLP in any case
    d_expert: int = 0                  # hidden channels of an expert; 0 = so that d_ff are active in a token
    norm_topk: bool = True             # weights of a token's routed experts sum to 1
    balance_coef: float = 0.01         # weight of the load-balance loss; 0 = off
    attn_dropout: float = 0.0          # probability of dropping an attention weight in training
    norm_eps: float = 1e-6             # added to the mean square in RMSNorm
    rope_theta: float = 10_000.0       # base of the rotary wavelengths
    partial_rotary_factor: float = 1.0  # fraction of head_dim that is rotated
    rope_scaling: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none"  # of long contexts
    rope_factor: float = 0.0           # stretch of the context; 0 = seq_len / rope_original_len
    rope_original_len: int = 0         # sequence length before the stretch, in tokens; 0 = seq_len
    rope_low_freq_factor: float = 1.0  # llama3: pairs that turn less often are stretched
    rope_high_freq_factor: float = 4.0  # llama3: pairs that turn more often stay
    yarn_beta_fast: float = 32.0       # pairs that turn more often than this in the original length stay
    yarn_beta_slow: float = 1.0        # pairs that turn less often than this are stretched by rope_factor
    yarn_attention_factor: float = 0.0  # multiplies cos and sin; 0 = from the mscales, or 0.1 ln(factor) + 1
    yarn_mscale: float = 0.0           # with yarn_mscale_all_dim: their ratio is the attention factor
    yarn_mscale_all_dim: float = 0.0   # see yarn_mscale

    def resolved(self):
        """A copy with every 0 that means "derived" filled in; UserError where numbers do not fit."""
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "seq_len"):
            if getattr(self, name) < 1:
                raise UserError(f"--model.{name}={getattr(self, name)}: must be positive")
        for name in ("n_kv_head", "head_dim", "d_ff", "rope_original_len", "n_expert", "n_shared_expert",
                     "n_dense_layer", "d_expert", "balance_coef"):
            if getattr(self, name) < 0:
                raise UserError(f"--model.{name}={getattr(self, name)}: must be positive, or 0")
        if not 0 <= self.attn_dropout < 1:
            raise UserError(f"--model.attn_dropout={self.attn_dropout}: must be at least 0 and below 1")
        if self.rope_theta <= 1 or self.norm_eps <= 0:
            raise UserError(f"--model.rope_theta={self.rope_theta} --model.norm_eps={self.norm_eps}: "
                            "must be above 1 and above 0")
        if not self.head_dim and self.n_embd % self.n_head:
            raise UserError(f"--model.n_head={self.n_head}: must divide n_embd={self.n_embd}, "
                            "or set --model.head_dim")
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise UserError(f"--model.rope_high_freq_factor={self.rope_high_freq_factor}: must be above "
                            f"rope_low_freq_factor={self.rope_low_freq_factor}")
        active = self.n_expert_active + self.n_shared_expert
        if self.n_expert and not (0 < self.n_expert_active <= self.n_expert
                                  and self.n_dense_layer < self.n_layer):
            raise UserError(f"--model.n_expert_active={self.n_expert_active} --model.n_dense_layer="
                            f"{self.n_dense_layer}: expected 1 to n_expert={self.n_expert}, and fewer "
                            f"than n_layer={self.n_layer}")
        if not self.n_expert and (self.n_shared_expert or self.n_dense_layer or self.d_expert):
            raise UserError("--model.n_shared_expert, n_dense_layer, d_expert: only with --model.n_expert")
        if self.shared_gate and not self.n_shared_expert:
            raise UserError("--model.shared_gate=true: there are no shared experts; set "
                            "--model.n_shared_expert")
        original = self.rope_original_len or self.seq_len
        d_ff = self.d_ff or -(-8 * self.n_embd // 3 // 32) * 32
        c = replace(self, n_kv_head=self.n_kv_head or self.n_head,
                    head_dim=self.head_dim or self.n_embd // self.n_head,
                    d_ff=d_ff, d_expert=self.d_expert or self.n_expert and -(-d_ff // active // 8) * 8,
                    rope_original_len=original, rope_factor=self.rope_factor or self.seq_len / original)
        if c.n_head % c.n_kv_head:
            raise UserError(f"--model.n_kv_head={c.n_kv_head}: must divide n_head={c.n_head}")
        rotated = int(c.head_dim * c.partial_rotary_factor)
        if c.head_dim % 2 or rotated % 2 or not 0 < rotated <= c.head_dim:
            raise UserError(f"--model.head_dim={c.head_dim} "
                            f"--model.partial_rotary_factor={c.partial_rotary_factor}: "
                            f"head_dim and its rotated part, {rotated}, must be even and positive")
        if c.rope_factor < 1:
            raise UserError(f"--model.rope_factor={c.rope_factor}: must be at least 1 "
                            "(seq_len / rope_original_len)")
        return c

    def continued(self, wanted, seq_len, vocab_size=0):
        """
        The config to go on from a checkpoint of this (resolved) config: wanted is this one with what the user
        asked for. Only what leaves the tensors as they are may differ; a longer seq_len needs a rope_scaling.
        The vocabulary may grow to vocab_size: checkpoints of others know nothing of our special tokens.
        """
        for f in fields(self):
            if not f.name.startswith(("rope_", "yarn_", "seq_len", "attn_dropout", "balance_coef")) \
                    and getattr(wanted, f.name) != getattr(self, f.name):
                raise UserError(f"--model.{f.name}={getattr(wanted, f.name)}: the checkpoint has "
                                f"{getattr(self, f.name)}, which cannot change")
        if wanted.seq_len < self.seq_len:
            raise UserError(f"--model.seq_len={wanted.seq_len}: the checkpoint has {self.seq_len}, which "
                            "cannot shrink; --seq_len may be shorter")
        longest = max(wanted.seq_len, seq_len)
        if longest > self.seq_len and wanted.rope_scaling == "none":
            raise UserError(f"--seq_len={longest}: the checkpoint was trained at {self.seq_len}; "
                            "lower it, or add --model.rope_scaling=yarn (or linear) to go further")
        factor, same = wanted.rope_factor, wanted.rope_original_len == self.rope_original_len
        if factor == self.rope_factor and same and wanted.rope_scaling == self.rope_scaling != "none":
            factor *= longest / self.seq_len                  # a stretch of its own goes on from there
        elif factor == self.rope_factor and (longest > self.seq_len or not same):
            factor = 0.0
        return replace(wanted, seq_len=longest, rope_factor=factor,
                       vocab_size=max(wanted.vocab_size, vocab_size)).resolved()

    def check_data(self, vocab_size, seq_len, packed, prompts):
        """UserError where this (resolved) model cannot take the data: its vocabulary, rows, or a prompt"""
        if self.vocab_size < vocab_size or self.seq_len < seq_len:
            raise UserError(f"--model.vocab_size={self.vocab_size} --model.seq_len={self.seq_len}: smaller "
                            f"than the data's {vocab_size} or --seq_len={seq_len}")
        if packed and self.rope_scaling == "dynamic":
            raise UserError("--model.rope_scaling=dynamic: follows the length of the row, so it does not go "
                            "with documents that share one; use yarn or linear")
        if (longest := max(map(len, prompts), default=0)) > self.seq_len:
            raise UserError(f"--eval_prompts: {longest} tokens, more than the model's {self.seq_len}")


# -----------------------------------------------------------------------------
# rotary position embedding

def rope_frequencies(c, length):
    """
    Angle per position of each rotated channel pair, and what multiplies cos and sin.

    c: resolved ModelConfig; length: number of positions in the sequence (only dynamic scaling looks at it)
    -> (D'/2,) float32 on the CPU, float. Formulas: RoPE eq. 15; "dynamic NTK"; YaRN eq. 17-22;
    Llama 3.1's, as in transformers.
    """
    d = int(c.head_dim * c.partial_rotary_factor)
    theta = c.rope_theta
    if c.rope_scaling == "dynamic" and length > c.rope_original_len and d > 2:
        stretch = c.rope_factor * length / c.rope_original_len - (c.rope_factor - 1)
        theta = theta * stretch ** (d / (d - 2))
    i = torch.arange(d // 2, dtype=torch.float64)
    inv = theta ** (-2 * i / d)
    if c.rope_scaling == "linear":
        inv = inv / c.rope_factor
    if c.rope_scaling == "llama3":
        turns = c.rope_original_len * inv / (2 * math.pi)             # in the original length
        low, high = c.rope_low_freq_factor, c.rope_high_freq_factor
        keep = ((turns - low) / (high - low)).clamp(0, 1)             # 1: as trained, 0: stretched
        inv = keep * inv + (1 - keep) * inv / c.rope_factor
    if c.rope_scaling != "yarn":
        return inv.float(), 1.0

    def dim(rotations):                               # the pair that turns so often in the original length
        return d * math.log(c.rope_original_len / (rotations * 2 * math.pi)) / (2 * math.log(theta))
    low = max(math.floor(dim(c.yarn_beta_fast)), 0)
    high = min(math.ceil(dim(c.yarn_beta_slow)), d - 1)
    keep = 1 - ((i - low) / max(high - low, 0.001)).clamp(0, 1)   # 1: as trained, 0: stretched
    inv = keep * inv + (1 - keep) * inv / c.rope_factor

    def mscale(m):
        return 0.1 * m * math.log(c.rope_factor) + 1
    if c.yarn_attention_factor:
        return inv.float(), c.yarn_attention_factor
    if c.yarn_mscale and c.yarn_mscale_all_dim:
        return inv.float(), mscale(c.yarn_mscale) / mscale(c.yarn_mscale_all_dim)
    return inv.float(), mscale(1.0)


def rotary(x, cos, sin):
    """
    Rotate-half RoPE: x (B, T, H, D), cos and sin (B or 1, T, 1, D'/2) -> (B, T, H, D). Channels i and i +
    D'/2 form a pair; channels past D' stay.
    """
    if not torch.compiler.is_compiling():
        return Rotate.apply(x, cos, sin)
    half, cos, sin = cos.shape[-1], cos.to(x.dtype), sin.to(x.dtype)
    a, b, rest = x[..., :half], x[..., half:2 * half], x[..., 2 * half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


class Rotate(torch.autograd.Function):
    """`rotary` in four passes over memory instead of nine; its backward is the turn by -angle."""
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return Rotate.turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return Rotate.turn(grad, cos, -sin), None, None

    @staticmethod
    def turn(x, cos, sin):
        half, cos, sin = cos.shape[-1], cos.to(x.dtype), sin.to(x.dtype)
        a, b = x[..., :half], x[..., half:2 * half]
        out = torch.empty_like(x)
        torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=out[..., half:2 * half]).addcmul_(a, sin)
        if 2 * half < x.shape[-1]:
            out[..., 2 * half:] = x[..., 2 * half:]
        return out


# -----------------------------------------------------------------------------
# blocks

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in fp32."""
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = c.n_head, c.n_kv_head, c.head_dim
        self.dropout = c.attn_dropout
        self.qkv = nn.Linear(c.n_embd, (c.n_head + 2 * c.n_kv_head) * c.head_dim, bias=c.attn_bias)
        self.out = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.norm_eps) if c.qk_norm else None

    def forward(self, x, cos, sin, mask, cache=None, layer=0):
        """x (B, T, C); mask: None = causal; bool (B, 1, T, S), True = may look; or Segments -> (B, T, C)"""
        B, T, _ = x.shape
        H, K, D = self.n_head, self.n_kv_head, self.head_dim
        qkv = self.qkv(x).view(B, T, H + 2 * K, D)
        qk, v = qkv.split([H + K, K], dim=2)                              # (B, T, H + K, D), (B, T, K, D)
        if self.q_norm is not None:
            qk = torch.cat([self.q_norm(qk[:, :, :H]), self.k_norm(qk[:, :, H:])], dim=2)
        qk = rotary(qk, cos, sin)
        if isinstance(mask, Segments):
            return self.out(mask.attend(qk, v, H, self.dropout if self.training else 0.0))
        q, k = qk.transpose(1, 2).split([H, K], dim=1)                    # (B, H, T, D), (B, K, T, D)
        v = v.transpose(1, 2)                                             # (B, K, T, D)
        if cache is not None:
            y = cache.attend(layer, q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, self.dropout if self.training else 0.0,
                                               is_causal=mask is None and T > 1, enable_gqa=H != K)
        return self.out(y.transpose(1, 2).reshape(B, T, H * D))


class Segments:
    """
    Causal attention within each of the documents that lie next to each other in rows, without a T x T mask:
    work and memory grow with what is attended. A branch sees the trunk before it as well: the last document
    that is none. One kernel for all documents, or one call for each, to the same result.
    """
    def __init__(self, first, branch=None, kernel=False):
        """first (B, T) bool: a document starts here; branch (B, T) bool: it is a branch"""
        starts = first.flatten().nonzero()[:, 0]                                   # rows one after the other
        self.borders = F.pad(starts, (0, 1), value=first.numel()).int()            # (documents + 1,)
        self.lengths = self.borders.diff().tolist()
        self.is_branch = None if branch is None else branch.flatten()[starts]      # (documents,)
        self.kernel, self.masks = kernel, {}                                       # masks: by shape

    @functools.cached_property
    def keys(self):
        """-> what the documents' queries see, one after the other: its places (N,), borders, longest"""
        if self.is_branch is None:
            return slice(None), self.borders, max(self.lengths)
        own, starts = self.borders.diff(), self.borders[:-1]
        trunk = torch.arange(len(own), device=own.device).masked_fill(self.is_branch, 0).cummax(0).values
        before = torch.where(self.is_branch, own[trunk], 0)                        # of the trunk's places
        borders = F.pad((before + own).cumsum(0), (1, 0)).int()
        document = torch.arange(len(own), device=own.device).repeat_interleave(borders.diff())
        n = torch.arange(len(document), device=own.device) - borders[document]     # of a document's keys
        places = n + torch.where(n < before[document], starts[trunk][document], (starts - before)[document])
        return places, borders, int(borders.diff().max())

    def mask(self, n, S, device):
        """(n, S) bool, True = may look: the n last of S positions, each up to itself"""
        if (n, S) not in self.masks:
            self.masks[n, S] = torch.ones(n, S, dtype=torch.bool, device=device).tril(S - n)
        return self.masks[n, S]

    def attend(self, qk, v, H, dropout):
        """qk (B, T, H + K, D), v (B, T, K, D) -> (B, T, H * D)"""
        B, T, K, D = v.shape
        if self.kernel:
            places, borders, longest = self.keys
            q, k = qk.flatten(0, 1).split([H, K], dim=1)                           # (B * T, H or K, D)
            k, v = (x[places, :, None] for x in (k, v.flatten(0, 1)))              # (N, K, 1, D)
            k, v = (x.expand(-1, K, H // K, D).flatten(1, 2) for x in (k, v))      # (N, H, D)
            y = varlen_attn(q, k, v, self.borders, borders, max(self.lengths), longest, window_size=(-1, 0))
            return y.reshape(B, T, H * D)                     # causal: the last query sees the last key
        out, trunk, is_branch = [], None, [] if self.is_branch is None else self.is_branch.tolist()
        for i, (qk, v) in enumerate(zip(*(x.flatten(0, 1).split(self.lengths) for x in (qk, v)))):
            q, k = qk.transpose(0, 1)[None].split([H, K], dim=1)                   # (1, H or K, n, D)
            v, mask = v.transpose(0, 1)[None], None
            if is_branch and is_branch[i]:
                k, v = (torch.cat(pair, dim=2) for pair in zip(trunk, (k, v)))     # (1, K, trunk + n, D)
                mask = self.mask(q.shape[2], k.shape[2], q.device)
            else:
                trunk = k, v
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None,
                                               enable_gqa=H != K)
            out.append(y[0].transpose(0, 1))                                       # (n, H, D)
        return torch.cat(out).view(B, T, H * D)


def documents(docs, branch=None):
    """
    docs (B, T): a number that changes where a document starts; branch (B, T) bool: it branches off the last
    document before it that is none, its trunk -> first (B, T) bool, where one starts; positions (B, T), each
    token's within its document, a branch's after its trunk; number (B, T) of the document, and of its trunk
    """
    index = torch.arange(docs.shape[1], device=docs.device)[None]                  # (1, T)

    def last(event):
        """Index of the latest event up to each place; events (B, T) bool, one at 0 -> (B, T)"""
        return torch.where(event, index, 0).cummax(dim=1).values
    first = docs.diff(dim=1, prepend=docs[:, :1] - 1) != 0
    number = first.cumsum(dim=1)
    positions = index - last(first)
    if branch is None:
        return first, positions, number, number
    trunk_start = last(first & ~branch)
    trunk_end = last(branch & ~F.pad(branch, (1, -1)))                             # its first branch starts
    positions = torch.where(branch, positions + trunk_end - trunk_start, positions)
    return first, positions, number, number.gather(1, trunk_start)


def varlen_kernel(device, dtype, D):
    """Whether torch has FlashAttention for documents in a row of heads of D channels there"""
    return (VARLEN and device.type == "cuda" and dtype in (torch.float16, torch.bfloat16) and D % 8 == 0
            and D <= 256 and torch.cuda.get_device_capability(device) >= (8, 0))


class MLP(nn.Module):
    def __init__(self, n_embd, d_ff):
        super().__init__()
        self.gate_up = nn.Linear(n_embd, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, n_embd, bias=False)

    def forward(self, x):
        return self.down(swiglu(self.gate_up(x)))


def swiglu(x):
    """x (..., 2F), gate then up -> silu(gate) * up (..., F)"""
    if x.device.type == "cpu" and not torch.compiler.is_compiling():
        return SwiGLUInCache.apply(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


class SwiGLUInCache(torch.autograd.Function):
    """swiglu for (N, 2F) on a CPU: a few rows at a time, so that what is in between stays in cache."""
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        y = x.new_empty(len(x), x.shape[1] // 2)
        for x_rows, y_rows in zip(in_cache(x), in_cache(y)):
            gate, up = x_rows.chunk(2, dim=-1)
            torch.sigmoid(gate, out=y_rows).mul_(gate).mul_(up)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, = ctx.saved_tensors
        dx = torch.empty_like(x)
        for x_rows, dx_rows, g in zip(in_cache(x), in_cache(dx), in_cache(grad)):
            (gate, up), (d_gate, d_up) = x_rows.chunk(2, dim=-1), dx_rows.chunk(2, dim=-1)
            s = torch.sigmoid(gate)
            torch.mul(gate, s, out=d_up)                                  # silu(gate), for the moment
            torch.addcmul(s, d_up, 1 - s, out=d_gate).mul_(up).mul_(g)    # silu' = s + silu (1 - s)
            d_up.mul_(g)
        return dx


def in_cache(x, rows=128):
    return x.split(rows)


class MoE(nn.Module):
    """
    A router sends each token to n_expert_active of E experts and weights what they give; shared experts see
    every token. Tokens are sorted by expert, so that an expert is a matrix product over its own rows: work
    grows with the active experts, and no token is ever dropped.
    """
    def __init__(self, c):
        super().__init__()
        self.n_active, self.norm_topk = c.n_expert_active, c.norm_topk
        self.router = nn.Parameter(torch.empty(c.n_expert, c.n_embd))
        self.gate_up = nn.Parameter(torch.empty(c.n_expert, 2 * c.d_expert, c.n_embd))
        self.down = nn.Parameter(torch.empty(c.n_expert, c.n_embd, c.d_expert))
        self.shared = MLP(c.n_embd, c.n_shared_expert * c.d_expert) if c.n_shared_expert else None
        self.shared_gate = nn.Linear(c.n_embd, 1, bias=False) if c.shared_gate else None
        for weight in (self.router, self.gate_up, self.down):
            nn.init.normal_(weight, std=0.02)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C), and of the router the probabilities (B * T, E), the choices (B * T, k)"""
        rows = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):    # bfloat16 would send near ties anywhere
            probs = F.linear(rows.float(), self.router.float()).softmax(-1)
        weight, expert = probs.topk(self.n_active)                                 # (N, k) each
        if self.norm_topk:
            weight = weight / weight.sum(-1, keepdim=True)
        y = self.experts(rows, weight, expert).view(x.shape)
        if self.shared is not None:
            shared = self.shared(x)
            y = y + (shared if self.shared_gate is None else self.shared_gate(x).sigmoid() * shared)
        return y, (probs, expert)

    @torch.compiler.disable                                   # rows per expert are only known as it runs
    def experts(self, x, weight, expert):
        """x (N, C), weight and expert (N, k) -> sum of the experts' weighted outputs (N, C)"""
        (N, k), C, E = expert.shape, x.shape[1], len(self.router)
        x = x.to(dist.compute_dtype(x))
        order = expert.flatten().argsort(stable=True)                              # (N k,) choices, by expert
        back = torch.empty_like(order)
        back[order] = torch.arange(N * k, device=x.device)
        sizes = expert.flatten().bincount(minlength=E).tolist()
        h = TakeRows.apply(x, order, back, k)                                      # (N k, C)
        h = swiglu(GroupedLinear.apply(h, self.gate_up.to(x.dtype), sizes))
        h = GroupedLinear.apply(h, self.down.to(x.dtype), sizes)
        return (TakeRows.apply(h, back, order, 1).view(N, k, C) * weight.to(h.dtype)[..., None]).sum(dim=1)


class TakeRows(torch.autograd.Function):
    """x[order // k] of x (N, C), where order (N k,) is a permutation and back its inverse: -> (N k, C)"""
    @staticmethod
    def forward(ctx, x, order, back, k):
        ctx.save_for_backward(back)
        ctx.k = k
        return x.index_select(0, order if k == 1 else order // k)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.index_select(0, ctx.saved_tensors[0])     # scattering is slow, on GPUs random
        return grad if ctx.k == 1 else grad.view(-1, ctx.k, grad.shape[1]).sum(dim=1), None, None, None


class GroupedLinear(torch.autograd.Function):
    """x (N, I), its first sizes[0] rows times weight[0].T, the next times weight[1].T, ... -> (N, O)"""
    @staticmethod
    def forward(ctx, x, weight, sizes):
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        y = x.new_empty(len(x), weight.shape[1])
        for rows, w, out in zip(x.split(sizes), weight.unbind(0), y.split(sizes)):
            torch.mm(rows, w.T, out=out)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        dx, dw = (torch.empty_like(t) if needed else None
                  for t, needed in zip((x, weight), ctx.needs_input_grad))
        start = 0
        for e, size in enumerate(ctx.sizes):
            here, start = slice(start, start + size), start + size
            if dx is not None:
                torch.mm(grad[here], weight[e], out=dx[here])
            if dw is not None:
                torch.mm(grad[here].T, x[here], out=dw[e])    # zero where there are no rows
        return dx, dw, None


def load_balance(probs, expert, sequence, num_sequences):
    """
    How evenly a router spreads its tokens (Switch Transformer, 2101.03961 eq. 4-6, for each sequence by
    itself as in DeepSeek-V3, 2412.19437 eq. 17-20): sum over sequences of T sum_e f_e P_e, T tokens, f_e =
    (choices of e) E / (T k), P_e = mean of e's probability. 1 a token where it is even.

    probs (N, E), expert (N, k); sequence (N,) number of the token's, num_sequences or more: padding, does
    not count -> scalar with a gradient in probs, choices of each expert (E,)
    """
    E, k, S = probs.shape[1], expert.shape[1], num_sequences
    sequence = sequence.clamp(max=S)
    sums = probs.new_zeros(S + 1, E).index_add(0, sequence, probs)[:S]             # T P
    chosen = (sequence[:, None] * E + expert).flatten().bincount(minlength=(S + 1) * E).view(S + 1, E)[:S]
    tokens = (chosen.sum(dim=1, keepdim=True) / k).clamp(min=1)
    return (chosen * sums / tokens).sum() * E / k, chosen.sum(dim=0)


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.attn_norm, self.attn = RMSNorm(c.n_embd, c.norm_eps), Attention(c)
        self.mlp_norm = RMSNorm(c.n_embd, c.norm_eps)
        self.mlp = MoE(c) if c.n_expert and layer >= c.n_dense_layer else MLP(c.n_embd, c.d_ff)

    def forward(self, x, *context):
        """-> x (B, T, C), and what a router did: see MoE, or None"""
        x = x + self.attn(self.attn_norm(x), *context)
        y = self.mlp(self.mlp_norm(x))
        y, routed = y if isinstance(y, tuple) else (y, None)
        return x + y, routed


class GPT(nn.Module):
    """
    model(tokens, docs=None, cache=None, branch=None, inputs=None) -> hidden states (B, T, C); `head` (V, C)
    makes logits.

    config (resolved ModelConfig) describes it completely. Set `activation_checkpointing = True` to recompute
    each block in backward instead of keeping its activations. Of models that take other inputs than tokens:
    input_only: ids that stand for such an input, never sampled, and how many of each in a row make one
    optional: how names of weights begin that a checkpoint may lack
    """
    input_only, optional = {}, ()

    def __init__(self, config):
        super().__init__()
        self.config = c = config.resolved()
        self.activation_checkpointing = False
        self.balance, self.routed_so_far = 0.0, None          # see balance_loss, router_stats
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.norm = RMSNorm(c.n_embd, c.norm_eps)
        self.untied_head = None if c.tie_embeddings else nn.Linear(c.n_embd, c.vocab_size, bias=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @property
    def head(self):
        return self.embed.weight if self.untied_head is None else self.untied_head.weight

    def forward(self, tokens, docs=None, cache=None, branch=None, inputs=None):
        """
        tokens (B, T) int64; docs, branch (B, T): see `documents` - tokens see only their own document, whose
        positions start at 0, and in a branch its trunk; cache: a KVCache that holds the past; inputs
        (B, T, C): in place of the tokens' embeddings -> (B, T, C)
        """
        B, T = tokens.shape
        positions = torch.arange(T, device=tokens.device)[None]                    # (1, T)
        mask, length = None, T
        if branch is not None and docs is None:
            raise ValueError("branch says nothing without docs")
        if docs is not None and (cache is not None or self.config.rope_scaling == "dynamic"):
            raise ValueError("packed documents go neither with a cache nor with rope_scaling=dynamic, which "
                             "follows the length of the whole row")
        if docs is not None:
            first, positions, number, trunk = documents(docs, branch)
            kernel, longest = (False, T) if torch.compiler.is_compiling() else self.attending_documents()
            if T <= longest:
                seen = number[:, None, :]                                          # (B, 1, T)
                mask = ((seen == number[:, :, None]) | (seen == trunk[:, :, None])).tril()[:, None]
            else:
                mask = Segments(first, branch, kernel)
        if cache is not None:
            positions, length = cache.begin(T)
        inv, scale = rope_frequencies(self.config, length)
        angles = positions[..., None, None] * inv.to(tokens.device)                # (B or 1, T, 1, D'/2)
        cos, sin = angles.cos() * scale, angles.sin() * scale

        x, routers = self.embed(tokens) if inputs is None else inputs, []          # (B, T, C)
        for layer, block in enumerate(self.blocks):
            if self.activation_checkpointing and self.training:
                x, routed = checkpoint(block, x, cos, sin, mask, use_reentrant=False)
            else:
                x, routed = block(x, cos, sin, mask, cache, layer)
            routers += [routed] if routed is not None else []
        if cache is not None:
            cache.end(T)
        if routers and self.training and torch.is_grad_enabled():
            begins = positions.expand(B, T) == 0 if branch is None else first & ~branch
            sequence = begins.flatten().cumsum(0) - 1
            if docs is not None:
                sequence = sequence.masked_fill(docs.flatten() < 0, B * T)
            self.watch(routers, sequence, B if docs is None else int(begins.sum()))
        return self.norm(x)

    @torch.compiler.disable
    def watch(self, routers, sequence, num_sequences):
        """Note what routers, a list of (probs, expert), did, for balance_loss and router_stats"""
        c = self.config
        balance, chosen = zip(*(load_balance(*routed, sequence, num_sequences) for routed in routers))
        self.balance = c.balance_coef * sum(balance)
        seen = torch.cat([torch.stack(balance).detach()[:, None], torch.stack(chosen)], dim=1)   # (L, 1 + E)
        self.routed_so_far = seen if self.routed_so_far is None else self.routed_so_far + seen

    def balance_loss(self):
        """
        balance_coef times `load_balance` of the training forward just made, a SUM over its tokens and layers,
        to be divided by all tokens of the step and added to the loss. A sequence is a document with its
        branches, or a row where there are no docs; negative docs are padding. 0.0 without experts
        """
        balance, self.balance = self.balance, 0.0             # given once: it holds on to the forward
        return balance

    def router_stats(self):
        """
        -> what routers did since the last call, over all ranks (which call it together): balance, mean of
        `load_balance` a token and layer (1 = even); expert_frac, list by layer of the share of the choices
        that each expert got; dropped tokens, none ever. {} without experts
        """
        if self.routed_so_far is None:
            return {}
        seen, self.routed_so_far = dist.all_sum(self.routed_so_far), None
        balance, chosen = seen[:, 0], seen[:, 1:]
        total = chosen.sum(dim=1, keepdim=True).clamp(min=1)                       # choices: tokens times k
        balance = (balance * self.config.n_expert_active / total[:, 0]).mean()
        return dict(balance=balance.item(), expert_frac=(chosen / total).tolist(), dropped=0)

    def train(self, mode=True):
        self.balance = 0.0                                    # or a copy made in between could not be
        return super().train(mode)

    def logits(self, hidden):
        """hidden (..., C) -> (..., V), of the few positions that sampling asks for"""
        return hidden @ self.head.T if self.untied_head is None else self.untied_head(hidden)

    def new_cache(self, B, T):
        """An empty KVCache for B sequences of up to T positions, in the dtype that attention computes in."""
        c, weight = self.config, self.embed.weight
        return KVCache((c.n_layer, B, c.n_kv_head, T, c.head_dim), weight.device, dist.compute_dtype(weight))

    def attending_documents(self):
        """-> whether one kernel attends all documents of long rows; longest row for which a mask is better"""
        c, weight = self.config, self.embed.weight
        dropout = self.training and c.attn_dropout            # which that kernel lacks
        kernel = not dropout and varlen_kernel(weight.device, dist.compute_dtype(weight), c.head_dim)
        few_calls = kernel or weight.device.type == "cpu"
        return kernel, DENSE_MASK_LEN if few_calls else DENSE_MASK_LEN_GPU

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def idle_parameters(self):
        """Those of experts that a token does not go to"""
        c, routed = self.config, [m for m in self.modules() if isinstance(m, MoE)]
        return sum(m.gate_up.numel() + m.down.numel() for m in routed) * (c.n_expert - c.n_expert_active) \
            // max(1, c.n_expert)

    def describe(self):
        """-> plain values for a checkpoint, of which the model can be made again"""
        return dict(model=asdict(self.config))

    def size(self):
        """-> text for the first line of a run"""
        idle = self.idle_parameters()
        return f"{self.num_parameters():,} parameters" \
            + f" ({self.num_parameters() - idle:,} active in a token)" * bool(idle)

    def flops_per_token(self, T, head_frac=1.0):
        """
        FLOPs that one trained token of a causal sequence of T costs, forward and backward: 6 per weight of a
        matrix product, 4 where it is frozen (the head's for the fraction of tokens that have a target), and
        the half of attention's T x T products that a causal mask needs (PaLM, appendix B; counting all is
        common, and flatters).
        """
        c = self.config
        weights = sum(p.numel() for p in self.blocks.parameters() if p.ndim > 1) - self.idle_parameters()
        weights += head_frac * self.head.numel()
        return (6 if self.head.requires_grad else 4) * weights + 6 * c.n_layer * c.n_head * c.head_dim * T


class KVCache:
    """
    Keys and values of the past, (L, B, K, S, D) each, preallocated; all rows are equally long. `fork` makes
    the past the trunk of several rows each, which keep only what they add: a prompt is there once however
    many samples continue it, and prompts may have different lengths.
    """
    def __init__(self, shape, device, dtype):
        self.k = torch.zeros(shape, device=device, dtype=dtype)
        self.v = torch.zeros(shape, device=device, dtype=dtype)
        self.used, self.rope_length = 0, shape[3]
        self.trunk = None                                     # k, v (L, P, K, S0, D), once forked

    @property
    def capacity(self):
        return self.k.shape[3]

    def begin(self, T):
        """Make room for T more tokens a row -> positions (B or 1, T), length for RoPE"""
        end, device = self.used + T, self.k.device
        if end > self.capacity:
            raise ValueError(f"cache of {self.capacity} positions is full: {self.used} used, {T} more asked")
        self.mask = None if T == 1 else torch.ones(T, end, dtype=torch.bool, device=device).tril(self.used)
        positions = torch.arange(self.used, end, device=device)[None]
        if self.trunk:
            positions = positions + self.trunk_lengths[self.group][:, None]
        return positions, self.rope_length

    def attend(self, layer, q, k, v):
        """Store k, v (B, K, T, D) of the tokens begun -> what q (B, H, T, D) gets from all up to them"""
        (B, H, T, D), (K, end) = q.shape, (k.shape[1], self.used + k.shape[2])
        self.k[layer, :, :, self.used:end], self.v[layer, :, :, self.used:end] = k, v
        if not self.used and not self.trunk:
            return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1, enable_gqa=H != K)
        k, v = self.k[layer, :, :, :end], self.v[layer, :, :, :end]
        q = q.reshape(B, K, -1, D).to(k.dtype)                # the heads that share keys, as more positions
        mask = None if self.mask is None else self.mask.repeat(H // K, 1)
        y = self.forked(layer, q, k, v, mask) if self.trunk else F.scaled_dot_product_attention(q, k, v, mask)
        return y.reshape(B, H, T, D)

    def forked(self, layer, q, k, v, mask):
        """Attention of q (B, K, N, D) to its trunk, and to its own k, v (B, K, S, D) -> (B, K, N, D)"""
        trunk_k, trunk_v = self.trunk[0][layer], self.trunk[1][layer]                     # (P, K, S0, D)
        (P, K, S0, D), (slots, N) = trunk_k.shape, (self.slots.shape[1], q.shape[2])
        own = q @ k.transpose(2, 3)                                                       # (B, K, N, S)
        if mask is not None:
            own = own.masked_fill(~mask, -torch.inf)

        def by_trunk(x):              # (B, K, N, X) -> (P, K, slots * N, X): one product for all its rows
            return x[self.slots].transpose(1, 2).reshape(P, K, slots * N, -1)

        def by_row(x):                # and back
            return x.view(P, K, slots, N, -1).transpose(1, 2).flatten(0, 1)[self.slot]
        past = by_row((by_trunk(q) @ trunk_k.transpose(2, 3)).masked_fill(self.beyond, -torch.inf))
        p = (torch.cat([past, own], dim=3).float() / math.sqrt(D)).softmax(dim=3).to(v.dtype)
        past, own = p.split([S0, own.shape[3]], dim=3)
        return by_row(by_trunk(past) @ trunk_v) + own @ v

    def end(self, T):
        self.used += T

    def fork(self, lengths, num_samples, room):
        """
        Go on with num_samples rows for each row so far, row p * num_samples + g for row p, and room for so
        many positions more. lengths (B,): of the rows so far, what lies behind was padding
        """
        L, B, K, _, D = self.k.shape
        self.trunk = [x[:, :, :, :self.used].contiguous() for x in (self.k, self.v)]
        self.trunk_lengths = torch.as_tensor(lengths, device=self.k.device)
        self.group = torch.arange(B, device=self.k.device).repeat_interleave(num_samples)  # (B',) of each row
        self.k, self.v = (x.new_zeros(L, B * num_samples, K, room, D) for x in self.trunk)
        self.used = 0
        self.place_rows()

    def place_rows(self):
        """Where the rows stand when each trunk's rows are side by side"""
        if 4 * len(self.group.unique()) < 3 * len(self.trunk_lengths):         # drop those without rows
            kept, self.group = self.group.unique(return_inverse=True)
            self.trunk = [x[:, kept] for x in self.trunk]
            self.trunk_lengths = self.trunk_lengths[kept]
        members = [[] for _ in self.trunk_lengths]
        for row, trunk in enumerate(self.group.tolist()):
            members[trunk].append(row)
        slots = max(map(len, members))
        slot = [trunk * slots + n for trunk, rows in enumerate(members) for n in range(len(rows))]
        rows = [row for rows in members for row in rows]
        device = self.k.device
        self.slot = torch.empty(len(rows), dtype=torch.int64, device=device)   # (B,) of each row
        self.slot[rows] = torch.tensor(slot, device=device)
        padded = [rows + [0] * (slots - len(rows)) for rows in members]
        self.slots = torch.tensor(padded, device=device)                       # (P, slots) the rows there
        index = torch.arange(self.trunk[0].shape[3], device=device)
        self.beyond = (index >= self.trunk_lengths[:, None])[:, None, None]    # (P, 1, 1, S0)

    def select(self, rows):
        """Keep these rows only, in this order. rows (B',) int64, no more than there are; few should move"""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0]
        for x in (self.k, self.v):
            x[:, moved, :, :self.used] = x[:, rows[moved], :, :self.used]
        self.k, self.v = self.k[:, :len(rows)], self.v[:, :len(rows)]
        if self.trunk:
            self.group = self.group[rows]
            self.place_rows()
