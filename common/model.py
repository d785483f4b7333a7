"""
A decoder-only transformer in the form of Llama, Qwen2, Qwen3, SmolLM3 and OLMo 2: RMSNorm, rotary
positions, grouped-query attention, SwiGLU, dense or as a mixture of experts.

    model = GPT(ModelConfig(vocab_size=6400, seq_len=512))
    hidden = model(tokens)                         # (B, T) int64 -> (B, T, C), after the final norm
    logits = hidden @ model.head.T                 # (B, T, V); the losses do this in chunks, never
                                                   whole

    cache = model.new_cache(B, T)                  # room for T positions
    hidden = model(tokens[:, :9], cache=cache)     # prefill, then token by token; the same numbers

Needs attention.py, moe.py, layers.py, dist.py and errors.py. Grouped-query attention: 2305.13245.
Shapes: B sequences, T positions, C channels, V vocabulary, H query heads, K key/value heads, D head
dim, L layers, E experts.
"""

from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

from common import dist
from common.attention import Causal, Documents, KVCache, Layout, attend
from common.errors import UserError
from common.layers import MLP, RMSNorm, rope_frequencies, rotary
from common.moe import MoE, Routing


@dataclass(frozen=True)
class ModelConfig:
    # fmt: off
    vocab_size: int = 0            # tokens, special ones included; 0 = the data set's
    n_layer: int = 8               # transformer blocks
    n_head: int = 8                # query heads
    n_kv_head: int = 0             # key/value heads, divides n_head; 0 = n_head, 1 = multi-query
    n_embd: int = 512              # channels of the residual stream
    head_dim: int = 0              # channels per head, even; 0 = n_embd / n_head
    d_ff: int = 0  # hidden channels of the MLP; 0 = 8/3 n_embd, up to a multiple of 32
    seq_len: int = 0               # longest sequence, in tokens; 0 = the run's seq_len
    tie_embeddings: bool = True    # the output head is the token embedding
    qk_norm: bool = False          # RMSNorm on every query and key head, as in Qwen3
    qk_norm_all: bool = False      # RMSNorm on all query heads together, all key heads: OLMo 2
    post_norm: bool = False        # norms after attention and MLP, not before them: OLMo 2
    no_rope_every: int = 0         # every n-th block has no rotary positions: SmolLM3; 0 = none
    attn_bias: bool = False        # biases on queries, keys and values, as in Qwen2
    n_expert: int = 0              # routed experts in a block; 0 = one MLP for every token
    n_expert_active: int = 2       # routed experts that a token goes to
    n_shared_expert: int = 0       # experts that every token goes to as well
    shared_gate: bool = False      # what these give is multiplied by a sigmoid, as in Qwen2-MoE
    n_dense_layer: int = 0         # first blocks that have one MLP in any case
    d_expert: int = 0  # hidden channels of an expert; 0 = so that d_ff are active in a token
    norm_topk: bool = True         # weights of a token's routed experts sum to 1
    balance_coef: float = 0.01     # weight of the load-balance loss; 0 = off
    attn_dropout: float = 0.0      # probability of dropping an attention weight in training
    norm_eps: float = 1e-6         # added to the mean square in RMSNorm
    rope_theta: float = 10_000.0   # base of the rotary wavelengths
    partial_rotary_factor: float = 1.0  # fraction of head_dim that is rotated
    rope_scaling: Literal["none", "linear", "dynamic", "yarn", "llama3"] = "none"  # to go further
    rope_factor: float = 0.0       # stretch of the context; 0 = seq_len / rope_original_len
    rope_original_len: int = 0     # sequence length before the stretch, in tokens; 0 = seq_len
    rope_low_freq_factor: float = 1.0  # llama3: pairs that turn less often are stretched
    rope_high_freq_factor: float = 4.0  # llama3: pairs that turn more often stay
    yarn_beta_fast: float = 32.0  # pairs that turn more often than this in the original length stay
    yarn_beta_slow: float = 1.0  # pairs that turn less often than this are stretched by rope_factor
    yarn_attention_factor: float = 0.0  # of cos, sin; 0 = from mscales, or 0.1 ln(factor) + 1
    yarn_mscale: float = 0.0       # with yarn_mscale_all_dim: their ratio is the attention factor
    yarn_mscale_all_dim: float = 0.0  # see yarn_mscale
    # fmt: on

    def resolved(self):
        """
        A copy with every 0 that means "derived" filled in; UserError where numbers do not fit.
        """
        for name in ("vocab_size", "n_layer", "n_head", "n_embd", "seq_len"):
            if getattr(self, name) < 1:
                raise UserError(f"--model.{name}={getattr(self, name)}: must be positive")
        for name in (
            "n_kv_head",
            "head_dim",
            "d_ff",
            "rope_original_len",
            "n_expert",
            "n_shared_expert",
            "n_dense_layer",
            "d_expert",
            "balance_coef",
            "no_rope_every",
        ):
            if getattr(self, name) < 0:
                raise UserError(f"--model.{name}={getattr(self, name)}: must be positive, or 0")
        if not 0 <= self.attn_dropout < 1:
            raise UserError(
                f"--model.attn_dropout={self.attn_dropout}: must be at least 0 and below 1"
            )
        if self.rope_theta <= 1 or self.norm_eps <= 0:
            raise UserError(
                f"--model.rope_theta={self.rope_theta} --model.norm_eps={self.norm_eps}: "
                "must be above 1 and above 0"
            )
        if not self.head_dim and self.n_embd % self.n_head:
            raise UserError(
                f"--model.n_head={self.n_head}: must divide n_embd={self.n_embd}, "
                "or set --model.head_dim"
            )
        if self.rope_high_freq_factor <= self.rope_low_freq_factor:
            raise UserError(
                f"--model.rope_high_freq_factor={self.rope_high_freq_factor}: must be above "
                f"rope_low_freq_factor={self.rope_low_freq_factor}"
            )
        if self.qk_norm and self.qk_norm_all:
            raise UserError("--model.qk_norm and qk_norm_all: only one of them")
        active = self.n_expert_active + self.n_shared_expert
        if self.n_expert and not (
            0 < self.n_expert_active <= self.n_expert and self.n_dense_layer < self.n_layer
        ):
            raise UserError(
                f"--model.n_expert_active={self.n_expert_active} --model.n_dense_layer="
                f"{self.n_dense_layer}: expected 1 to n_expert={self.n_expert}, and fewer "
                f"than n_layer={self.n_layer}"
            )
        if not self.n_expert and (self.n_shared_expert or self.n_dense_layer or self.d_expert):
            raise UserError(
                "--model.n_shared_expert, n_dense_layer, d_expert: only with --model.n_expert"
            )
        if self.shared_gate and not self.n_shared_expert:
            raise UserError(
                "--model.shared_gate=true: there are no shared experts; set --model.n_shared_expert"
            )
        original = self.rope_original_len or self.seq_len
        d_ff = self.d_ff or -(-8 * self.n_embd // 3 // 32) * 32
        c = replace(
            self,
            n_kv_head=self.n_kv_head or self.n_head,
            head_dim=self.head_dim or self.n_embd // self.n_head,
            d_ff=d_ff,
            d_expert=self.d_expert or self.n_expert and -(-d_ff // active // 8) * 8,
            rope_original_len=original,
            rope_factor=self.rope_factor or self.seq_len / original,
        )
        if c.n_head % c.n_kv_head:
            raise UserError(f"--model.n_kv_head={c.n_kv_head}: must divide n_head={c.n_head}")
        rotated = int(c.head_dim * c.partial_rotary_factor)
        if c.head_dim % 2 or rotated % 2 or not 0 < rotated <= c.head_dim:
            raise UserError(
                f"--model.head_dim={c.head_dim} "
                f"--model.partial_rotary_factor={c.partial_rotary_factor}: "
                f"head_dim and its rotated part, {rotated}, must be even and positive"
            )
        if c.rope_factor < 1:
            raise UserError(
                f"--model.rope_factor={c.rope_factor}: must be at least 1 "
                "(seq_len / rope_original_len)"
            )
        return c

    def continued(self, wanted, seq_len, vocab_size=0):
        """
        The config to go on from a checkpoint of this (resolved) config: wanted is this one with
        what the user asked for. Only what leaves the tensors as they are may differ; a longer
        seq_len needs a rope_scaling. The vocabulary may grow to vocab_size: checkpoints of others
        know nothing of our special tokens.
        """
        for f in fields(self):
            if not f.name.startswith(
                ("rope_", "yarn_", "seq_len", "attn_dropout", "balance_coef")
            ) and getattr(wanted, f.name) != getattr(self, f.name):
                raise UserError(
                    f"--model.{f.name}={getattr(wanted, f.name)}: the checkpoint has "
                    f"{getattr(self, f.name)}, which cannot change"
                )
        if wanted.seq_len < self.seq_len:
            raise UserError(
                f"--model.seq_len={wanted.seq_len}: the checkpoint has {self.seq_len}, which "
                "cannot shrink; --seq_len may be shorter"
            )
        longest = max(wanted.seq_len, seq_len)
        if longest > self.seq_len and wanted.rope_scaling == "none":
            raise UserError(
                f"--seq_len={longest}: the checkpoint was trained at {self.seq_len}; "
                "lower it, or add --model.rope_scaling=yarn (or linear) to go further"
            )
        factor, same = wanted.rope_factor, wanted.rope_original_len == self.rope_original_len
        if (
            factor == self.rope_factor
            and same
            and wanted.rope_scaling == self.rope_scaling != "none"
        ):
            # a stretch of its own goes on from there
            factor *= longest / self.seq_len
        elif factor == self.rope_factor and (longest > self.seq_len or not same):
            factor = 0.0
        return replace(
            wanted,
            seq_len=longest,
            rope_factor=factor,
            vocab_size=max(wanted.vocab_size, vocab_size),
        ).resolved()

    def check_data(self, vocab_size, seq_len, packed, prompts):
        """
        UserError where this (resolved) model cannot take the data: its vocabulary, rows, or a
        prompt
        """
        if self.vocab_size < vocab_size or self.seq_len < seq_len:
            raise UserError(
                f"--model.vocab_size={self.vocab_size} --model.seq_len={self.seq_len}: smaller "
                f"than the data's {vocab_size} or --seq_len={seq_len}"
            )
        if packed and self.rope_scaling == "dynamic":
            raise UserError(
                "--model.rope_scaling=dynamic: follows the length of the row, so it does not go "
                "with documents that share one; use yarn or linear"
            )
        if (longest := max(map(len, prompts), default=0)) > self.seq_len:
            raise UserError(
                f"--eval_prompts: {longest} tokens, more than the model's {self.seq_len}"
            )


# -----------------------------------------------------------------------------
# blocks


class Attention(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.n_head, self.n_kv_head, self.head_dim = c.n_head, c.n_kv_head, c.head_dim
        self.dropout, self.layer = c.attn_dropout, layer
        heads = c.n_head + 2 * c.n_kv_head
        self.qkv = nn.Linear(c.n_embd, heads * c.head_dim, bias=c.attn_bias)
        self.out = nn.Linear(c.n_head * c.head_dim, c.n_embd, bias=False)
        self.rotates = not c.no_rope_every or (layer + 1) % c.no_rope_every > 0
        self.q_norm = self.k_norm = None
        if c.qk_norm or c.qk_norm_all:
            # in one norm: a head, or all of them
            H, K = (1, 1) if c.qk_norm else (c.n_head, c.n_kv_head)
            self.q_norm = RMSNorm(H * c.head_dim, c.norm_eps)
            self.k_norm = RMSNorm(K * c.head_dim, c.norm_eps)

    def forward(self, x, cos, sin, layout):
        """x (B, T, C); cos, sin: see `rotary`; layout: see common/attention.py -> (B, T, C)"""
        B, T, _ = x.shape
        H, K, D = self.n_head, self.n_kv_head, self.head_dim
        qkv = self.qkv(x).view(B, T, H + 2 * K, D)
        # (B, T, H + K, D), (B, T, K, D)
        qk, v = qkv.split([H + K, K], dim=2)
        if self.q_norm is not None:
            q, k = normed(self.q_norm, qk[:, :, :H]), normed(self.k_norm, qk[:, :, H:])
            qk = torch.cat([q, k], dim=2)
        if self.rotates:
            qk = rotary(qk, cos, sin)
        # gradients stay in the order of the rows
        if layout.lengths:
            q, k = (x.transpose(1, 2) for x in qk.split([H, K], dim=2))
        else:
            # (B, H, T, D), (B, K, T, D)
            q, k = qk.transpose(1, 2).split([H, K], dim=1)
        dropout = self.dropout if self.training else 0.0
        y = attend(q, k, v.transpose(1, 2), layout, dropout, self.layer)
        return self.out(y.transpose(1, 2).reshape(B, T, H * D))


def normed(norm, x):
    """x (B, T, H, D), norm over the D channels of a head or over those of all heads"""
    return norm(x.reshape(*x.shape[:2], -1, norm.normalized_shape[0])).view(x.shape)


class Block(nn.Module):
    def __init__(self, c, layer):
        super().__init__()
        self.post_norm = c.post_norm
        self.attn_norm = RMSNorm(c.n_embd, c.norm_eps)
        self.attn = Attention(c, layer)
        self.mlp_norm = RMSNorm(c.n_embd, c.norm_eps)
        routed = c.n_expert and layer >= c.n_dense_layer
        self.mlp = MoE(c) if routed else MLP(c.n_embd, c.d_ff)

    def forward(self, x, cos, sin, layout):
        """-> x (B, T, C), and what a router did: see MoE, or None"""
        if self.post_norm:
            x = x + self.attn_norm(self.attn(x, cos, sin, layout))
        else:
            x = x + self.attn(self.attn_norm(x), cos, sin, layout)
        y, routed = self.mlp(x if self.post_norm else self.mlp_norm(x)), None
        if isinstance(y, tuple):
            y, routed = y
        return x + (self.mlp_norm(y) if self.post_norm else y), routed


class GPT(nn.Module):
    """
    model(tokens, docs=None, cache=None, branch=None, inputs=None) -> hidden states (B, T, C);
    `head` (V, C) makes logits.

    config (resolved ModelConfig) describes it completely. Set `activation_checkpointing = True` to
    recompute each block in backward instead of keeping its activations. Of models that take other
    inputs than tokens: input_only: ids that stand for such an input, never sampled, and how many of
    each in a row make one; optional: how names of weights begin that a checkpoint may lack
    """

    input_only, optional = {}, ()

    def __init__(self, config):
        super().__init__()
        self.config = c = config.resolved()
        self.activation_checkpointing = False
        self.routing = Routing(c)
        self.embed = nn.Embedding(c.vocab_size, c.n_embd)
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.norm = RMSNorm(c.n_embd, c.norm_eps)
        self.untied_head = None
        if not c.tie_embeddings:
            self.untied_head = nn.Linear(c.n_embd, c.vocab_size, bias=False)
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
        tokens (B, T) int64; docs, branch (B, T): see `documents` - tokens see only their own
        document, whose positions start at 0, and in a branch its trunk; cache: a KVCache that holds
        the past; inputs (B, T, C): in place of the tokens' embeddings -> (B, T, C)
        """
        layout = self.layout(tokens, docs, cache, branch)
        inv, scale = rope_frequencies(self.config, layout.rope_length)
        # (B or 1, T, 1, D'/2)
        angles = layout.positions[..., None, None] * inv.to(tokens.device)
        cos, sin = angles.cos() * scale, angles.sin() * scale

        x = self.embed(tokens) if inputs is None else inputs  # (B, T, C)
        routers = []
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x, routed = checkpoint(block, x, cos, sin, layout, use_reentrant=False)
            else:
                x, routed = block(x, cos, sin, layout)
            if routed is not None:
                routers.append(routed)
        if routers and self.training and torch.is_grad_enabled():
            self.routing.note(routers, layout.positions.expand(tokens.shape), docs)
        return self.norm(x)

    def layout(self, tokens, docs, cache, branch):
        """-> which tokens may look at which, see common/attention.py; arguments: of forward"""
        c, weight = self.config, self.embed.weight
        if branch is not None and docs is None:
            raise ValueError("branch says nothing without docs")
        if docs is not None and (cache is not None or c.rope_scaling == "dynamic"):
            raise ValueError(
                "packed documents go neither with a cache nor with rope_scaling=dynamic, "
                "which follows the length of the whole row"
            )
        if docs is not None:
            dropout = self.training and c.attn_dropout
            return Documents(c, docs, branch, dist.compute_dtype(weight), dropout)
        if cache is not None:
            return cache.begin(tokens.shape[1])
        return Causal(c, tokens.shape[1], tokens.device)

    def balance_loss(self):
        """See Routing.balance_loss. 0.0 without experts"""
        return self.routing.balance_loss()

    def router_stats(self):
        """See Routing.stats. {} without experts"""
        return self.routing.stats()

    def train(self, mode=True):
        # or a copy made in between could not be
        self.routing.balance = 0.0
        return super().train(mode)

    def logits(self, hidden):
        """hidden (..., C) -> (..., V), of the few positions that sampling asks for"""
        return hidden @ self.head.T if self.untied_head is None else self.untied_head(hidden)

    def new_cache(self, B, T):
        """
        An empty KVCache for B sequences of up to T positions, in the dtype that attention computes
        in.
        """
        weight = self.embed.weight
        return KVCache(self.config, B, T, weight.device, dist.compute_dtype(weight))

    def num_parameters(self):
        return sum(p.numel() for p in self.parameters())

    def idle_parameters(self):
        """Those of experts that a token does not go to"""
        return sum(m.idle_parameters() for m in self.modules() if isinstance(m, MoE))

    def describe(self):
        """-> plain values for a checkpoint, of which the model can be made again"""
        return dict(model=asdict(self.config))

    def size(self):
        """-> text for the first line of a run"""
        total, idle = self.num_parameters(), self.idle_parameters()
        text = f"{total:,} parameters"
        return f"{text} ({total - idle:,} active in a token)" if idle else text

    def flops_per_token(self, T, head_frac=1.0):
        """
        FLOPs that one trained token of a causal sequence of T costs, forward and backward: 6 per
        weight of a matrix product, 4 where it is frozen (the head's for the fraction of tokens that
        have a target), and of attention's T x T products those that its mask needs (PaLM, appendix
        B; counting all is common, and flatters).
        """
        c = self.config
        weights = sum(p.numel() for p in self.blocks.parameters() if p.ndim > 1)
        weights = weights - self.idle_parameters() + head_frac * self.head.numel()
        attention = 12 * c.n_layer * c.n_head * c.head_dim * Layout(c).keys_per_query(T)
        return (6 if self.head.requires_grad else 4) * weights + attention
