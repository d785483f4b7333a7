"""
Sampling with a KV cache: one step on logits, batches of prompts, and streamed text.

    for rows, tokens, *_ in generate(model, prompts, SamplingConfig(max_new_tokens=64),
    tokenizer.ends): ... for text in stream(model, tokenizer, "KING HENRY:\n"): print(text, end="",
    flush=True)

Every row draws from a random stream of its own, seeded by (seed, row): its text does not depend on
which rows share the batch, nor on the training random state, which is left alone.
"""

import copy
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch
import torch.nn as nn

from common.errors import UserError


@dataclass(frozen=True)
class SamplingConfig:
    # fmt: off
    # sampling, applied in this order: suppress, repetition penalty, temperature, top-k, top-p
    max_new_tokens: int = 256      # tokens per sample at most
    suppress: tuple[int, ...] = ()  # token ids that are never produced
    repetition_penalty: float = 1.0  # divides (> 0) or multiplies earlier tokens' logits
    temperature: float = 0.8       # 0 = greedy
    top_k: int = 0                 # keep the k most likely tokens; 0 = all
    top_p: float = 1.0  # keep the most likely tokens that together reach this probability
    packed: bool = False           # x86 CPUs: products with weights in float16, faster, error 3e-4
    # fmt: on

    def __post_init__(self):
        for name, ok, expected in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
        ):
            if not ok:
                raise UserError(f"--{name}={getattr(self, name)}: expected {expected}")


def sample_next(logits, cfg, u, seen=None):
    """
    One token per row. logits (B, V) float32; u (B,) uniform in [0, 1), decides the draw; seen (B,
    V) bool, tokens that the repetition penalty applies to -> tokens (B,) int64, logps (B,) under
    the distribution that was sampled from (greedy: under the softmax at temperature 1), and what
    top-k and top-p have left: None or ids (B, k), most likely first, and how many of each row's
    count (B,)
    """
    if cfg.suppress:
        logits = logits.index_fill(1, torch.tensor(cfg.suppress, device=logits.device), -torch.inf)
    # CTRL, 1909.05858 eq. 1, for logits of either sign
    if cfg.repetition_penalty != 1 and seen is not None:
        penalised = torch.where(
            logits > 0, logits / cfg.repetition_penalty, logits * cfg.repetition_penalty
        )
        logits = torch.where(seen, penalised, logits)
    if cfg.temperature == 0:
        logps, tokens = logits.log_softmax(-1).max(-1)
        return tokens, logps, None
    logits = logits / cfg.temperature
    ids = None
    if cfg.top_k or cfg.top_p < 1:
        k = min(cfg.top_k or logits.shape[-1], logits.shape[-1])
        logits, ids = logits.topk(k)  # sorted, most likely first
    probs = logits.softmax(-1)
    if cfg.top_p < 1:
        before = probs.cumsum(-1) - probs
        probs = torch.where(before < cfg.top_p, probs, 0.0)  # the first is always kept
        probs = probs / probs.sum(-1, keepdim=True)
    cdf = probs.cumsum(-1)
    # the first index whose cumulative probability exceeds u: its own is > 0, so it is inside the
    # support
    index = torch.searchsorted(cdf, (u[:, None] * cdf[:, -1:]), right=True)  # (B, 1)
    logps = probs.gather(-1, index).log()[:, 0]
    if ids is None:
        return index[:, 0], logps, None
    return ids.gather(-1, index)[:, 0], logps, (ids, (probs > 0).sum(-1))


def uniforms(seed, row, n):
    """(n,) numbers in [0, 1) for the draws of one row: a function of (seed, row) alone"""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + row) % 2**63)
    # so that u * total < total in fp32
    return torch.rand(n, generator=generator).clamp_(max=1 - 2**-22)


class SamplingLinear(nn.Module):
    """
    An nn.Linear as a CPU multiplies a few rows fastest: weight times rows, not rows times weight,
    or with the weight packed as float16 (products and sums are in fp32 all the same).
    """

    def __init__(self, linear, packed):
        super().__init__()
        self.linear, self.pack = linear, None
        if packed:
            self.pack = torch.ops.quantized.linear_prepack_fp16(linear.weight.detach(), linear.bias)

    def forward(self, x):
        if self.pack is not None:
            return torch.ops.quantized.linear_dynamic_fp16(x, self.pack)
        y = (self.linear.weight @ x.flatten(0, -2).T).T.contiguous().view(*x.shape[:-1], -1)
        return y if self.linear.bias is None else y + self.linear.bias


def for_sampling(model, packed):
    """
    A copy of model with the same parameters (not copies of them) whose matrix products are
    SamplingLinear; packed ones hold the weights as they are now. Anywhere but in fp32 on a CPU:
    model itself.
    """
    weight = model.head
    fp32 = (
        weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
    )
    if packed and not (fp32 and "fbgemm" in torch.backends.quantized.supported_engines):
        raise UserError("--packed=true: for float32 on an x86 CPU only; leave it out")
    if not fp32:
        return model
    others = [child for name, child in model.named_children() if name != "blocks"]
    shared = [*model.parameters(), *model.buffers(), *others]
    fast = copy.deepcopy(model, {id(x): x for x in shared})
    if fast.untied_head is None:
        fast.untied_head = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
        # the embedding; only this copy's logits ask it
        fast.untied_head.weight = weight
    linears = [
        (module, name, child)
        for module in (fast, *fast.blocks.modules())
        for name, child in module.named_children()
        if isinstance(child, nn.Linear)
    ]
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # packing one takes one thread
        for (module, name, _), fast_one in zip(
            linears,
            pool.map(
                lambda linear: SamplingLinear(linear, packed), [child for *_, child in linears]
            ),
        ):
            setattr(module, name, fast_one)
    return fast


@torch.inference_mode()
def generate(
    model, prompts, cfg, ends=(), num_samples=1, seed=0, numbers=None, room=None, inputs=None
):
    """
    Continue prompts (list of non-empty lists of ids, any lengths), num_samples of each; row p *
    num_samples + g is sample g of prompt p. A row stops after one of `ends` (a container of ids),
    after max_new_tokens, or when the model's context is full, and then leaves the batch. Each
    prompt is computed once, and its cache is shared by its samples.

    numbers: of the prompts, from which the rows' random streams follow (default 0, 1, ...), so that
    other batches give a prompt the same samples; room: tokens that each row may get, at most
    max_new_tokens; inputs (P, T, C): in place of the embeddings of the prompts, padded on the right
    to the longest

    -> iterator of (rows, tokens, logps, support): lists of the rows still going, in any order, and
    of what each got in this step; support: what it was drawn from, see `sample_next`
    """
    was_training, device, limit = model.training, model.head.device, model.config.seq_len
    lengths = torch.tensor([len(p) for p in prompts])
    if min(map(len, prompts)) < 1 or max(map(len, prompts)) > limit:
        raise ValueError(
            f"prompts of 1 to {limit} tokens (the model's seq_len), got "
            f"{sorted(set(map(len, prompts)))}"
        )
    model.eval()
    try:
        fast, G = for_sampling(model, cfg.packed), num_samples
        tokens = nn.utils.rnn.pad_sequence([torch.tensor(p) for p in prompts], batch_first=True)
        cache = fast.new_cache(len(prompts), min(limit, tokens.shape[1] + cfg.max_new_tokens))
        # (P, T, C)
        hidden = fast(tokens.to(device), cache=cache, inputs=inputs)
        hidden = hidden[torch.arange(len(prompts)), lengths - 1].repeat_interleave(G, 0)
        if G > 1 or lengths.min() < lengths.max():
            cache.fork(lengths, G, min(limit - int(lengths.min()), cfg.max_new_tokens))
        rows = list(range(len(prompts) * G))
        room = [
            min(r, cfg.max_new_tokens, limit - len(prompts[row // G]) + 1)
            for row, r in zip(rows, room or [limit] * len(rows))
        ]
        streams = [
            (n if numbers is None else int(numbers[n])) * G + g
            for n in range(len(prompts))
            for g in range(G)
        ]
        u = torch.stack([uniforms(seed, stream, cfg.max_new_tokens) for stream in streams]).to(
            device
        )
        seen = None
        if cfg.repetition_penalty != 1:
            seen = torch.zeros(len(rows), len(model.head), dtype=torch.bool, device=device)
            for row in rows:
                seen[row, prompts[row // G]] = True
        for n in range(cfg.max_new_tokens):
            tokens, logps, support = sample_next(fast.logits(hidden).float(), cfg, u[:, n], seen)
            values = tokens.tolist()
            yield rows, values, logps.tolist(), support
            going = [i for i, row in enumerate(rows) if values[i] not in ends and n + 1 < room[row]]
            if not going:
                return
            # the last ones move where others have left
            if len(going) < len(rows):
                stay = range(len(going))
                movers = iter([i for i in going if i not in stay])
                present = set(going)
                keep = [i if i in present else next(movers) for i in stay]
                rows, keep = [rows[i] for i in keep], torch.tensor(keep, device=device)
                tokens, u, seen = tokens[keep], u[keep], seen[keep] if seen is not None else None
                cache.select(keep)
            if seen is not None:
                seen.scatter_(1, tokens[:, None], True)
            hidden = fast(tokens[:, None], cache=cache)[:, 0]
    finally:
        model.train(was_training)


def complete(
    model, prompts, cfg, ends=(), num_samples=1, seed=0, numbers=None, room=None, inputs=None
):
    """
    Collect `generate` -> lists of one list per row: tokens (end token included), their log-probs,
    and the ids that top-k and top-p have left for each, int32 tensors; no such tensors without
    top-k and top-p
    """
    completions, all_logps, supports = (
        [[] for _ in range(len(prompts) * num_samples)] for _ in range(3)
    )
    for rows, tokens, logps, support in generate(
        model, prompts, cfg, ends, num_samples, seed, numbers, room, inputs
    ):
        for i, (row, token, logp) in enumerate(zip(rows, tokens, logps)):
            completions[row].append(token)
            all_logps[row].append(logp)
            if support:
                ids, counts = support
                supports[row].append(ids[i, : counts[i]].int().cpu())
    return completions, all_logps, supports


@dataclass
class Answer:
    """
    What a model has answered to a prompt; N tokens are its own, what an environment said is not.
    """

    tokens: list  # all, int
    learned: list  # bool each: the model's own
    logps: list  # (N,) float, the sampler's
    support: list  # (N,) tensors of ids, as `complete` has them, or []
    ended: bool  # not cut by max_new_tokens or the context

    def texts(self, tokenizer):
        """-> the answer as text with all tags, without its end token; the texts of its N tokens"""
        whole = self.tokens[:-1] if self.tokens[-1] in tokenizer.ends else self.tokens
        own = [token for token, is_own in zip(self.tokens, self.learned) if is_own]
        pieces = [tokenizer.decode([token], show_special=True) for token in own]
        return tokenizer.decode(whole, show_special=True), pieces


def answer_prompts(model, prompts, cfg, ends, num_samples=1, seed=0, numbers=None, room=None):
    """-> Answers, num_samples to each of prompts; arguments as of `generate`"""
    samples = complete(model, prompts, cfg, ends, num_samples, seed, numbers, room)
    return [
        Answer(tokens, [True] * len(tokens), logps, support, tokens[-1] in ends)
        for tokens, logps, support in zip(*samples)
    ]


def for_vocabulary(cfg, model, tokenizer):
    """
    cfg, with what is no token of a text suppressed: ids for other inputs, rows beyond the
    vocabulary
    """
    for token in cfg.suppress:
        if not 0 <= token < tokenizer.vocab_size:
            raise UserError(
                f"--suppress={token}: no such token, expected 0 to {tokenizer.vocab_size - 1}"
            )
    beyond = range(tokenizer.vocab_size, len(model.head))
    return replace(cfg, suppress=(*cfg.suppress, *model.input_only, *beyond))


def stream_tokens(model, tokenizer, ids, cfg=SamplingConfig(), seed=0, inputs=None):
    """
    Yield the tokens that continue ids (list of int), until an end token, which is left out, or
    max_new_tokens. When the context is full the second half of it becomes the new prompt, so a
    model of 256 positions can write for as long as one likes; it begins behind an input
    (`GPT.input_only`) that it would cut. inputs (1, T, C): in place of the embeddings of ids
    """
    # no prompt: as after the end of a document
    ids = list(ids) or tokenizer.begin or [tokenizer.end]
    limit, left, part = model.config.seq_len, cfg.max_new_tokens, 0
    cfg = for_vocabulary(cfg, model, tokenizer)
    while left > 0:
        window, given = ids, None
        if len(ids) >= limit:
            window = ids[-max(1, limit // 2) :]
            for token, length in model.input_only.items():
                while window.count(token) % length:
                    window = window[1:]
        if inputs is not None and window:
            written = model.embed.weight.detach()[ids[inputs.shape[1] :]]  # (T', C)
            given = torch.cat([inputs, written[None]], dim=1)[:, -len(window) :]
        for _, (token,), *_ in generate(
            model,
            [window or [tokenizer.end]],
            replace(cfg, max_new_tokens=left),
            tokenizer.ends,
            seed=seed + 7919 * part,
            inputs=given,
        ):
            if token in tokenizer.ends:
                return
            ids.append(token)
            left -= 1
            yield token
        part += 1


def stream(model, tokenizer, prompt, cfg=SamplingConfig(), seed=0, inputs=None):
    """
    Yield pieces of text that continue prompt (str, or a list of ids), each as soon as its
    characters are complete; see `stream_tokens`. inputs: see there, for a prompt of ids
    """
    ids = tokenizer.begin + tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    decoder = tokenizer.stream(continues=bool(prompt))
    for token in stream_tokens(model, tokenizer, ids, cfg, seed, inputs):
        yield decoder.put(token)
    yield decoder.end()
