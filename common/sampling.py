"""
Sampling with a KV cache: one step on logits, batches of prompts, and streamed text.

    for rows, tokens, logps in generate(model, prompts, SamplingConfig(max_new_tokens=64), tokenizer.end): ...
    for text in stream(model, tokenizer, "KING HENRY:\n"): print(text, end="", flush=True)

Every row draws from a random stream of its own, seeded by (seed, row): its text does not depend on which rows
share the batch, nor on the training random state, which is left alone.
"""
from dataclasses import dataclass, replace

import torch

from common.dist import UserError


@dataclass(frozen=True)
class SamplingConfig:
    # sampling, applied in this order: suppress, repetition penalty, temperature, top-k, top-p
    max_new_tokens: int = 256          # tokens per sample at most
    suppress: tuple[int, ...] = ()     # token ids that are never produced
    repetition_penalty: float = 1.0    # logits of earlier tokens are divided (if > 0) or multiplied by this
    temperature: float = 0.8           # 0 = greedy
    top_k: int = 0                     # keep the k most likely tokens; 0 = all
    top_p: float = 1.0                 # keep the most likely tokens that together reach this probability

    def __post_init__(self):
        for name, ok, expected in (("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
                                   ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
                                   ("temperature", self.temperature >= 0, "at least 0"),
                                   ("top_k", self.top_k >= 0, "at least 0"),
                                   ("top_p", 0 < self.top_p <= 1, "above 0, at most 1")):
            if not ok:
                raise UserError(f"--{name}={getattr(self, name)}: expected {expected}")


def sample_next(logits, cfg, u, seen=None):
    """
    One token per row. logits (B, V) float32; u (B,) uniform in [0, 1), decides the draw; seen (B, V) bool,
    tokens that the repetition penalty applies to -> tokens (B,) int64, logps (B,) under the distribution that
    was sampled from (greedy: under the softmax at temperature 1).
    """
    if cfg.suppress:
        logits = logits.index_fill(1, torch.tensor(cfg.suppress, device=logits.device), -torch.inf)
    if cfg.repetition_penalty != 1 and seen is not None:  # CTRL, 1909.05858 eq. 1, for logits of either sign
        penalised = torch.where(logits > 0, logits / cfg.repetition_penalty, logits * cfg.repetition_penalty)
        logits = torch.where(seen, penalised, logits)
    if cfg.temperature == 0:
        logps, tokens = logits.log_softmax(-1).max(-1)
        return tokens, logps
    logits = logits / cfg.temperature
    ids = None
    if cfg.top_k or cfg.top_p < 1:
        k = min(cfg.top_k or logits.shape[-1], logits.shape[-1])
        logits, ids = logits.topk(k)                          # sorted, most likely first
    probs = logits.softmax(-1)
    if cfg.top_p < 1:
        before = probs.cumsum(-1) - probs
        probs = torch.where(before < cfg.top_p, probs, 0.0)   # the first is always kept
        probs = probs / probs.sum(-1, keepdim=True)
    cdf = probs.cumsum(-1)
    # the first index whose cumulative probability exceeds u: its own is > 0, so it is inside the support
    index = torch.searchsorted(cdf, (u[:, None] * cdf[:, -1:]), right=True)               # (B, 1)
    logps = probs.gather(-1, index).log()[:, 0]
    return (index if ids is None else ids.gather(-1, index))[:, 0], logps


def uniforms(seed, row, n):
    """(n,) numbers in [0, 1) for the draws of one row: a function of (seed, row) alone"""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63)
    return torch.rand(n, generator=generator).clamp_(max=1 - 2**-22)      # so that u * total < total in fp32


@torch.inference_mode()
def generate(model, prompts, cfg, end=None, num_samples=1, seed=0, numbers=None):
    """
    Continue prompts (list of non-empty lists of ids, any lengths), num_samples of each; row p * num_samples +
    g is sample g of prompt p. A row stops after `end`, after max_new_tokens, or when the model's context is
    full, and then leaves the batch. Each prompt is prefilled once. numbers: of the prompts, from which the
    rows' random streams follow (default 0, 1, ...), so that other batches give a prompt the same samples.

    -> iterator of (rows, tokens, logps), lists of the rows still going and what each got in this step
    """
    was_training, device, limit = model.training, model.head.device, model.config.seq_len
    lengths = torch.tensor([len(p) for p in prompts])
    if min(map(len, prompts)) < 1 or max(map(len, prompts)) > limit:
        raise ValueError(f"prompts of 1 to {limit} tokens (the model's seq_len), got "
                         f"{sorted(set(map(len, prompts)))}")
    model.eval()
    try:
        tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)
        cache = model.new_cache(len(prompts), min(limit, tokens.shape[1] + cfg.max_new_tokens))
        hidden = model(tokens.to(device), cache=cache)                                        # (P, T, C)
        cache.set_lengths(lengths)
        hidden = hidden[torch.arange(len(prompts)), lengths - 1].repeat_interleave(num_samples, 0)
        cache.select(torch.arange(len(prompts), device=device).repeat_interleave(num_samples))
        rows = list(range(len(prompts) * num_samples))
        room = [min(cfg.max_new_tokens, limit - len(prompts[row // num_samples]) + 1) for row in rows]
        streams = [(n if numbers is None else int(numbers[n])) * num_samples + g
                   for n in range(len(prompts)) for g in range(num_samples)]
        u = torch.stack([uniforms(seed, stream, cfg.max_new_tokens) for stream in streams]).to(device)
        seen = None
        if cfg.repetition_penalty != 1:
            seen = torch.zeros(len(rows), len(model.head), dtype=torch.bool, device=device)
            for row in rows:
                seen[row, prompts[row // num_samples]] = True
        for n in range(cfg.max_new_tokens):
            logits = (hidden @ model.head.T).float()
            tokens, logps = sample_next(logits, cfg, u[:, n], seen)
            values = tokens.tolist()
            yield rows, values, logps.tolist()
            going = [i for i, row in enumerate(rows) if values[i] != end and n + 1 < room[row]]
            if not going:
                return
            if len(going) < len(rows):
                rows, keep = [rows[i] for i in going], torch.tensor(going, device=device)
                tokens, u, seen = tokens[keep], u[keep], seen[keep] if seen is not None else None
                cache.select(keep)
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            hidden = model(tokens[:, None], cache=cache)[:, 0]
    finally:
        model.train(was_training)


def complete(model, prompts, cfg, end=None, num_samples=1, seed=0, numbers=None):
    """Collect `generate` -> list of token lists, list of log-prob lists, one per row (end token included)."""
    completions = [[] for _ in range(len(prompts) * num_samples)]
    all_logps = [[] for _ in completions]
    for rows, tokens, logps in generate(model, prompts, cfg, end, num_samples, seed, numbers):
        for row, token, logp in zip(rows, tokens, logps):
            completions[row].append(token)
            all_logps[row].append(logp)
    return completions, all_logps


def for_vocabulary(cfg, model, tokenizer):
    """cfg, with what stands for nothing suppressed: rows of a head padded beyond the vocabulary"""
    return replace(cfg, suppress=cfg.suppress + tuple(range(tokenizer.vocab_size, len(model.head))))


def stream_tokens(model, tokenizer, ids, cfg=SamplingConfig(), seed=0):
    """
    Yield the tokens that continue ids (list of int), until the end token, which is left out, or
    max_new_tokens. When the context is full the second half of it becomes the new prompt, so a model of 256
    positions can write for as long as one likes.
    """
    ids = list(ids) or [tokenizer.end]                        # no prompt: as after the end of a document
    limit, left, part = model.config.seq_len, cfg.max_new_tokens, 0
    cfg = for_vocabulary(cfg, model, tokenizer)
    while left > 0:
        window = ids if len(ids) < limit else ids[-max(1, limit // 2):]
        config = replace(cfg, max_new_tokens=left)
        for _, (token,), _ in generate(model, [window], config, tokenizer.end, seed=seed + 7919 * part):
            if token == tokenizer.end:
                return
            ids.append(token)
            left -= 1
            yield token
        part += 1


def stream(model, tokenizer, prompt, cfg=SamplingConfig(), seed=0):
    """
    Yield pieces of text that continue prompt (str, or a list of ids), each as soon as its characters are
    complete; see `stream_tokens`.
    """
    ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    decoder = tokenizer.stream(continues=bool(prompt))
    for token in stream_tokens(model, tokenizer, ids, cfg, seed):
        yield decoder.put(token)
    yield decoder.end()
