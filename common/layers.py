"""
What the blocks of a transformer are made of besides attention: RMSNorm (1910.07467), rotary
positions (2104.09864) and their scalings, the SwiGLU MLP (2002.05202).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, computed in fp32."""

    def forward(self, x):
        y = F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps)
        return y.to(x.dtype)


# -----------------------------------------------------------------------------
# rotary position embedding


def rope_frequencies(c, length):
    """
    Angle per position of each rotated channel pair, and a factor for cos and sin.

    c: resolved ModelConfig; length: number of positions in the sequence, for dynamic scaling
    -> (D'/2,) float32 on the CPU, float. Formulas: RoPE eq. 15; "dynamic NTK"; YaRN (2309.00071)
    eq. 17-22; Llama 3.1's, as in transformers.
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
        turns = c.rope_original_len * inv / (2 * math.pi)  # in the original length
        low, high = c.rope_low_freq_factor, c.rope_high_freq_factor
        inv = stretch_slow_pairs(inv, c, (turns - low) / (high - low))
    if c.rope_scaling != "yarn":
        return inv.float(), 1.0

    def pair(turns):
        """Index of the pair that turns this often in the original length"""
        wavelength = c.rope_original_len / (turns * 2 * math.pi)
        return d * math.log(wavelength) / (2 * math.log(theta))

    low = max(math.floor(pair(c.yarn_beta_fast)), 0)
    high = min(math.ceil(pair(c.yarn_beta_slow)), d - 1)
    inv = stretch_slow_pairs(inv, c, 1 - (i - low) / max(high - low, 0.001))

    def mscale(m):
        return 0.1 * m * math.log(c.rope_factor) + 1

    factor = c.yarn_attention_factor or mscale(1.0)
    if c.yarn_mscale and c.yarn_mscale_all_dim and not c.yarn_attention_factor:
        factor = mscale(c.yarn_mscale) / mscale(c.yarn_mscale_all_dim)
    return inv.float(), factor


def stretch_slow_pairs(inv, c, keep):
    """
    Divide frequencies by rope_factor where keep is 0, leave them where it is 1, blend between.
    """
    keep = keep.clamp(0, 1)
    return keep * inv + (1 - keep) * inv / c.rope_factor


def rotary(x, cos, sin):
    """
    Rotate-half RoPE: x (B, T, H, D), cos and sin (B or 1, T, 1, D'/2) -> (B, T, H, D). Channels i
    and i + D'/2 form a pair; channels past D' stay.
    """
    if not torch.compiler.is_compiling():
        return Rotate.apply(x, cos, sin)
    half, cos, sin = cos.shape[-1], cos.to(x.dtype), sin.to(x.dtype)
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
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
        a, b = x[..., :half], x[..., half : 2 * half]
        out = torch.empty_like(x)
        torch.mul(a, cos, out=out[..., :half]).addcmul_(b, sin, value=-1)
        torch.mul(b, cos, out=out[..., half : 2 * half]).addcmul_(a, sin)
        if 2 * half < x.shape[-1]:
            out[..., 2 * half :] = x[..., 2 * half :]
        return out


# -----------------------------------------------------------------------------
# SwiGLU


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
    """
    swiglu for (N, 2F) on a CPU: a few rows at a time, so that intermediates stay in its cache.
    """

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        y = x.new_empty(len(x), x.shape[1] // 2)
        for x_rows, y_rows in zip(row_blocks(x), row_blocks(y)):
            gate, up = x_rows.chunk(2, dim=-1)
            torch.sigmoid(gate, out=y_rows).mul_(gate).mul_(up)
        return y

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        for x_rows, dx_rows, g in zip(row_blocks(x), row_blocks(dx), row_blocks(grad)):
            gate, up = x_rows.chunk(2, dim=-1)
            d_gate, d_up = dx_rows.chunk(2, dim=-1)
            s = torch.sigmoid(gate)
            # silu(gate), for the moment
            torch.mul(gate, s, out=d_up)
            torch.addcmul(s, d_up, 1 - s, out=d_gate).mul_(up).mul_(g)  # silu' = s + silu (1 - s)
            d_up.mul_(g)
        return dx


def row_blocks(x, rows=128):
    return x.split(rows)
