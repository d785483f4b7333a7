"""
Knowledge distillation: a student learns a teacher's distribution over the next token, mixed with
cross-entropy, on the text or conversations of a set, or on what the student says to their prompts.

    python train_kd.py --teacher=out/pretrain --data_dir=out/data --model.n_layer=4    # one CPU or
                                                                                       GPU
    torchrun --standalone --nproc_per_node=8 train_kd.py --teacher=out/sft --data_dir=out/chat

Reads   data_dir, made by `python data/prepare.py text ...` or `chat`; teacher; init_from, a
        student's run
Writes  out_dir/{config.json, code/, metrics.jsonl, samples.jsonl, step_NNNNNN/}, and with
        cache_top_k a cache
Expect  `python tests/bench/kd_seeds.py`: the student with and without its teacher, in
        docs/results.md
"""
import hashlib
import inspect
import math
import os
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from common import checkpoint, dist, losses
from common.config import parse_config
from common.data import ChatData, TokenData
from common.errors import UserError
from common.model import GPT, ModelConfig
from common.run import RunConfig, begin
from common.sampling import SamplingConfig, complete, for_vocabulary

# -----------------------------------------------------------------------------
# config: these, and the options of every stage in common/run.py; --help prints all

@dataclass(frozen=True)
class Config(RunConfig):
    data_dir: str = "out/data"  # text or conversations prepared by data/prepare.py text or chat
    out_dir: str = "out/kd"            # run directory, must be new or empty unless resume
    # text and conversations
    doc_mask: bool = False             # text: attend and count positions within each document only
    mask_prompt: bool = True           # chat: learn the assistant's words only; false: every token
    critical_ids: tuple[int, ...] = ()  # target ids with a weight of their own in the loss
    critical_alpha: float = 1.0        # that weight
    # teacher
    teacher: str = ""  # run, or Hugging Face folder; "" = teacher_logits in this script
    kd_frac: float = 0.5  # share of the divergence from the teacher; the rest: cross-entropy
    divergence: Literal["forward", "reverse", "jsd"] = "forward"  # KL(teacher, student), or back
    jsd_beta: float = 0.5  # jsd: weight of the teacher in the mixture, above 0 and below 1
    temperature: float = 1.0           # of both distributions in the divergence
    on_policy_frac: float = 0.0  # of steps, on the student's own answers, without ce (GKD)
    max_new_tokens: int = 64  # tokens of such an answer; text: they continue the row's beginning
    cut_vocab: bool = False  # ignore the tail of the teacher's vocabulary the student lacks
    cache_top_k: int = 0  # ask the teacher once, keep k tokens a position; 0 = at every step
    cache_dir: str = ""                # folder of that cache, which runs can share; "" = in out_dir


def teacher_logits(tokens, docs):
    """
    Yours to write, to learn from anything else than a run of ours: tokens, docs (B, T) int64 as
    `GPT.forward` takes them (docs may be None) -> logits (B, T, V)
    """
    raise UserError("--teacher: name a run to learn from, or write teacher_logits() in train_kd.py")


def find_teacher(cfg, tokenizer):
    """
    -> Source of the teacher, its ModelConfig, what identifies its weights; None, None, ... of a
    function
    """
    if not cfg.teacher:
        return None, None, hashlib.sha256(inspect.getsource(teacher_logits).encode()).hexdigest()
    source = checkpoint.source(cfg.teacher)
    if source.fingerprint() != tokenizer.fingerprint:
        raise UserError(f"--teacher={cfg.teacher}: has another tokenizer than --data_dir")
    config = ModelConfig(**source.manifest["model"])
    config = replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size))
    if config.seq_len < cfg.seq_len:
        raise UserError(f"--seq_len={cfg.seq_len}: longer than the teacher's {config.seq_len}")
    return source, config, source.weights_id()


def check_options(cfg, kind):
    """UserError where options of this stage are out of range or do not fit the set"""
    if kind not in ("text", "chat") or (cfg.doc_mask if kind == "chat" else not cfg.mask_prompt):
        raise UserError(f"--data_dir={cfg.data_dir}: a set of kind {kind}, expected text (only "
                        "this has --doc_mask) or chat (only this has --mask_prompt)")
    answer_fits = 0 < cfg.max_new_tokens <= cfg.seq_len or not cfg.on_policy_frac
    for name, ok, expected in (("kd_frac", 0 <= cfg.kd_frac <= 1, "0 to 1"),
                               ("on_policy_frac", 0 <= cfg.on_policy_frac <= 1, "0 to 1"),
                               ("jsd_beta", 0 < cfg.jsd_beta < 1, "above 0 and below 1"),
                               ("temperature", cfg.temperature > 0, "above 0"),
                               ("max_new_tokens", answer_fits, f"1 to --seq_len={cfg.seq_len}")):
        if not ok:
            raise UserError(f"--{name}={getattr(cfg, name)}: expected {expected}")
    if cfg.on_policy_frac and cfg.cache_top_k or cfg.cache_dir and not cfg.cache_top_k:
        raise UserError("--cache_top_k: --cache_dir needs it; with it --on_policy_frac must be 0, "
                        "since no cache has what the student will say")


def student_rows(model, tokenizer, data, i, max_new_tokens):
    """
    The prompts of micro-batch i with the student's own answers -> Batch of one row. An answer
    follows from (seed, its prompt's number in the run) and the weights.
    """
    prompts, numbers, valid = data.prompts(i, max_new_tokens)
    sampling_cfg = for_vocabulary(SamplingConfig(max_new_tokens, temperature=1.0), model, tokenizer)
    prompt_ids = [prompt.tolist() for prompt in prompts]
    answers, *_ = complete(model, prompt_ids, sampling_cfg, tokenizer.ends, 1, data.seed, numbers)
    return data.continued(prompts, answers, valid)


@torch.no_grad()
def evaluate(model, ask, data, kd_options, autocast):
    """-> validation loss (cross-entropy) and divergence per target; over all ranks"""
    model.eval()
    total = torch.zeros(3, device=data.device)  # nll sum, divergence sum, targets
    for i in range(data.num_batches):
        batch = data.batch(i)
        with autocast:
            hidden = model(batch.tokens, batch.docs)
            _, ce_sum, kd_sum = losses.linear_kd_loss(hidden, model.head, ask("val", i, batch),
                                                      batch.targets, batch.mask, **kd_options)
        total += torch.stack([ce_sum, kd_sum, batch.mask.sum()])
    model.train()
    ce_sum, kd_sum, n_targets = dist.all_sum(total).tolist()
    return ce_sum / n_targets, kd_sum / n_targets


if __name__ == "__main__":
    cfg = parse_config(Config)
    run = begin(cfg, __file__)
    kind = run.meta["kind"]
    check_options(cfg, kind)
    source, teacher_config, teacher_id = find_teacher(cfg, run.tokenizer)
    Data, options = TokenData, dict(doc_mask=cfg.doc_mask)
    if kind == "chat":
        Data, options = ChatData, dict(mask_prompt=cfg.mask_prompt)
    options |= dict(critical_ids=cfg.critical_ids, critical_alpha=cfg.critical_alpha)
    train_data, val_data = run.data(Data, identity=dict(teacher=teacher_id), **options)
    model = run.model(GPT)
    optimizer = run.optimizer(model)
    forward = torch.compile(model) if cfg.compile else model  # forward() trains only

    V = model.config.vocab_size
    if source:
        teacher_vocab = teacher_config.vocab_size
    else:
        batch = train_data.batch(0)
        teacher_vocab = teacher_logits(batch.tokens, batch.docs).shape[-1]
    if teacher_vocab < V or teacher_vocab > V and not cfg.cut_vocab:
        raise UserError(f"--teacher={cfg.teacher}: vocabulary of {teacher_vocab}, the student's "
                        f"has {V}; set --model.vocab_size, or --cut_vocab=true to ignore what only "
                        "the teacher has")
    if not 0 <= cfg.cache_top_k < V:
        raise UserError(f"--cache_top_k={cfg.cache_top_k}: expected 0 to {V - 1}, less than the "
                        "vocabulary")
    for config in (model.config, teacher_config or model.config):
        config.check_data(0, 0, train_data.doc_mask or cfg.on_policy_frac, [])

    sets = {"train": train_data, "val": val_data} if val_data else {"train": train_data}
    cache = teacher = None
    if cfg.cache_top_k:
        from extras import teacher_cache
        cache_dir = cfg.cache_dir or os.path.join(cfg.out_dir, "teacher_top_k")
        cache_key = str([V, cfg.cache_top_k, run.dtype, cfg.seq_len,
                         dict(train_data.identity, teacher=teacher_id),
                         [run.meta["splits"][split]["sha256"] for split in sets]])
        cache = teacher_cache.open_cache(cache_dir, cache_key, V, run.device)
    if source and not cache:
        teacher = GPT(teacher_config).to(run.device).eval().requires_grad_(False)
        source.fill(teacher)
        flops = teacher.flops_per_token(train_data.mean_context, train_data.target_frac)
        run.token_flops += flops / 3  # no backward
    kd_options = dict(temperature=cfg.temperature, kind=cfg.divergence, jsd_beta=cfg.jsd_beta)

    @torch.no_grad()
    def ask(split, i, batch):
        """What the teacher says to micro-batch i, as losses.linear_kd_loss takes it"""
        if cache:
            return cache.logits(split, sets[split].file_offsets(i))
        if teacher:
            return losses.head_logits(teacher(batch.tokens, batch.docs), teacher.head[:V])
        return teacher_logits(batch.tokens, batch.docs)[..., :V].flatten(0, 1).__getitem__

    log = run.start(model, optimizer, models=[teacher])
    if cfg.cache_top_k and not cache:
        shape = cfg.seq_len, run.micro_batch_size, run.rank, run.world_size, run.device
        every_row = {split: Data(cfg.data_dir, split, *shape, **options) for split in sets}
        teacher_cache.write_cache(cache_dir, cache_key, cfg.cache_top_k, V, every_row, ask,
                                  run.autocast)
        cache, teacher = teacher_cache.open_cache(cache_dir, cache_key, V, run.device), None
    if cache:
        log.print(f"teacher: {cfg.cache_top_k} tokens a position in {cache_dir} have "
                  f"{cache.info['mass']:.2%} of its probability; KL {cache.info['kl']:.5f}")

    val_loss = None
    for step in run.steps():
        if step.evaluate and val_data:
            val_loss, val_kd = evaluate(model, ask, val_data, kd_options, run.autocast)
            run.evaluated(step, f"val loss {val_loss:.4f} | val kd {val_kd:.4f}", val_loss=val_loss,
                          val_kd=val_kd)
        if step.evaluate:
            run.sample(step, model)
        if step.save:
            run.save(step, model, optimizer, val_loss)
        if step.last:
            break

        step.start()
        draw = np.random.default_rng([cfg.seed, step.number]).random()
        on_policy = bool(draw < cfg.on_policy_frac)
        kd_frac = 1.0 if on_policy else cfg.kd_frac  # its own words are no targets
        first = step.number * run.num_micro
        numbers = range(first, first + run.num_micro)
        if on_policy:
            with torch.no_grad(), run.autocast:
                micro_batches = [
                    student_rows(model, run.tokenizer, train_data, i, cfg.max_new_tokens)
                    for i in numbers
                ]
        else:
            micro_batches = [train_data.batch(i) for i in numbers]
        # of this whole step, over all micro-batches and ranks
        n_targets = dist.all_sum(sum(batch.n_targets for batch in micro_batches))
        n_tokens = dist.all_sum(sum((b.tokens != run.tokenizer.pad).sum() for b in micro_batches))
        step_loss, sums = torch.zeros((), device=run.device), torch.zeros(2, device=run.device)
        for i, batch in zip(numbers, micro_batches):
            # gradients travel during the last backward
            optimizer.sync = i == numbers[-1]
            with run.autocast:
                hidden = forward(batch.tokens, batch.docs)  # (B, T, C)
                teacher_at = ask("train", i, batch)
                loss_sum, ce_sum, kd_sum = losses.linear_kd_loss(
                    hidden, model.head, teacher_at, batch.targets, batch.mask, batch.weight,
                    kd_frac, **kd_options)
            loss = loss_sum / n_targets.clamp(min=1)  # divide once, by the global count
            ((loss + model.balance_loss() / n_tokens) * optimizer.loss_scale).backward()
            step_loss += loss.detach()
            sums += torch.stack([ce_sum, kd_sum])

        step_loss = dist.all_sum(step_loss).item()
        optimizer.lr = run.learning_rate(step)
        # clip by the global norm, update, gather
        grad_norm = optimizer.step(cfg.grad_clip, apply=math.isfinite(step_loss))
        ce, kd = (dist.all_sum(sums) / n_targets.clamp(min=1)).tolist()
        run.record(step, n_tokens, dict(ce=ce, on_policy=on_policy), loss=step_loss, kd=kd,
                   lr=optimizer.lr, grad_norm=grad_norm)
    dist.finish()
