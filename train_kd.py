"""
Knowledge distillation: a student learns a teacher's distribution over the next token, mixed with
cross-entropy, on the text or conversations of a set, or on what the student says to their prompts.

    python train_kd.py --teacher=out/pretrain --data_dir=out/data --model.n_layer=4       # one CPU or GPU
    torchrun --standalone --nproc_per_node=8 train_kd.py --teacher=out/sft --data_dir=out/chat

Reads   data_dir, made by `python data/prepare.py text ...` or `chat`; teacher; init_from, a student's run
Writes  out_dir/{config.json, code/, metrics.jsonl, samples.jsonl, step_NNNNNN/}, and with cache_top_k a cache
Expect  `python configs/demo/kd_seeds.py`: the student with and without its teacher, in README.md, "Results"
"""
import hashlib
import inspect
import math
import os
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch

from common import checkpoint, dist, hf, losses, optim, sampling
from common.config import as_asked, as_dict, build, check_batch, count_steps, parse_config, read_overrides
from common.data import ChatData, TokenData, continuations, read_meta
from common.errors import UserError
from common.estimate import estimate
from common.logger import Logger, Timer, check_run_directory
from common.model import GPT, ModelConfig
from common.sampling import SamplingConfig, complete, for_vocabulary
from common.schedule import learning_rate
from common.teacher_cache import open_cache, write_cache
from common.tokenizer import encode_user, load_tokenizer
from common.zero1 import ShardedOptimizer

# -----------------------------------------------------------------------------
# config: every field is an option, the comment beside it its help (--help prints them)

@dataclass(frozen=True)
class Config:
    # files
    data_dir: str = "out/data"         # text or conversations prepared by data/prepare.py text or chat
    out_dir: str = "out/kd"            # run directory, must be new or empty unless resume
    init_from: str = ""                # where the student starts, as in other stages; "" = random weights
    resume: bool = False               # continue out_dir from its latest whole checkpoint, if it has one
    dry_run: bool = False              # check all, measure a micro-batch, say what the run takes, and exit
    # teacher
    teacher: str = ""                  # run, or Hugging Face folder; "" = teacher_logits in this script
    kd_frac: float = 0.5               # share of the divergence from the teacher; the rest is cross-entropy
    divergence: Literal["forward", "reverse", "jsd"] = "forward"  # KL(teacher, student), KL the other way
    jsd_beta: float = 0.5              # jsd: weight of the teacher in the mixture, above 0 and below 1
    temperature: float = 1.0           # of both distributions in the divergence
    on_policy_frac: float = 0.0        # of steps, on the student's own answers, without cross-entropy (GKD)
    max_new_tokens: int = 64           # tokens of such an answer; text: they continue the row's beginning
    cut_vocab: bool = False            # ignore the tail of the teacher's vocabulary that the student lacks
    cache_top_k: int = 0               # ask the teacher once, keep k tokens a position; 0 = at every step
    cache_dir: str = ""                # folder of that cache, which runs can share; "" = in out_dir
    # batch
    batch_size: int = 16               # rows per step, over all ranks and micro-batches
    micro_batch_size: int = 0          # rows per forward and rank; lower saves memory; 0 = all at once
    seq_len: int = 512                 # tokens per row; no conversation may be longer
    doc_mask: bool = False             # text: attend and count positions within each document only
    mask_prompt: bool = True           # chat: learn the assistant's words only; false: every token
    # optimization
    num_steps: int = 1000              # updates, unless num_epochs is set
    num_epochs: float = 0.0            # passes over the data; 0 = num_steps counts
    optimizer: Literal["adamw", "lion", "muon"] = "adamw"  # muon: for blocks' matrices, adamw for the rest
    lr: float = 1e-3                   # learning rate after the warm-up
    schedule: Literal["cosine", "restarts", "constant", "wsd"] = "cosine"    # how lr falls after the warm-up
    warmup_steps: int = 100            # updates until lr is reached
    initial_lr: float = 0.0            # where the warm-up starts
    min_lr_frac: float = 0.1           # lr of the last update / lr
    restart_steps: int = 0             # restarts: length of the first period, in steps; 0 = one period
    restart_mul: float = 1.0           # restarts: each period is this many times the one before
    wsd_decay_frac: float = 0.2        # wsd: fraction of the steps, at the end, in which lr falls
    weight_decay: float = 0.1          # on tensors of two or more dimensions
    beta1: float = 0.9                 # decay of the running mean of gradients
    beta2: float = 0.95                # decay of the running mean of squares (adamw), of the momentum (lion)
    grad_clip: float = 1.0             # largest global gradient norm; 0 = off
    zero1: bool = False                # each rank keeps and updates 1/N of the optimizer state
    critical_ids: tuple[int, ...] = ()  # target ids with a weight of their own in the loss
    critical_alpha: float = 1.0        # that weight
    # evaluation, logging, checkpoints
    eval_every: int = 250              # steps; 0 = only at the end
    eval_seqs: int = 256               # validation rows; 0 = no validation
    eval_prompts: tuple[str, ...] = ()  # answered or continued at every evaluation
    save_every: int = 500              # steps; 0 = only at the end
    keep_last: int = 2                 # latest checkpoints to keep, next to the best by validation loss
    log_every: int = 10                # steps between console lines (metrics.jsonl gets every step)
    wandb: str = ""                    # also log to this project of Weights & Biases
    tensorboard: bool = False          # also log to out_dir/tensorboard
    max_bad_steps: int = 20            # stop after so many skipped steps (loss or gradient nan/inf) in a row
    # system
    seed: int = 1337                   # of the weights, the order of the data and dropout
    device: str = "auto"               # auto, cpu, cuda, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # to compute in; auto: bfloat16 on GPUs
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of weights; bfloat16: optimizer keeps fp32 copy
    compile: bool = False              # torch.compile the training forward
    activation_checkpointing: bool = False    # recompute blocks in backward: less memory, a third more time
    # model
    model: ModelConfig = ModelConfig()


def teacher_logits(tokens, docs):
    """
    Yours to write, to learn from anything else than a run of ours: tokens, docs (B, T) int64 as `GPT.forward`
    takes them (docs may be None) -> logits (B, T, V)
    """
    raise UserError("--teacher: name a run to learn from, or write teacher_logits() in train_kd.py")


def find_teacher(path, tokenizer):
    """
    path: a run, a Hugging Face folder, or "": teacher_logits; tokenizer: the one to have -> ModelConfig, what
    identifies the weights, function that fills a model
    """
    if not path:
        return None, hashlib.sha256(inspect.getsource(teacher_logits).encode()).hexdigest(), None
    origin = hf if hf.is_folder(path) else checkpoint
    if load_tokenizer(folder := origin.find(path)).fingerprint != tokenizer.fingerprint:
        raise UserError(f"--teacher={path}: has another tokenizer than --data_dir")
    config = ModelConfig(**origin.read_manifest(folder)["model"])
    config = replace(config, vocab_size=max(config.vocab_size, tokenizer.vocab_size))
    return config, origin.weights_id(folder), lambda model: origin.load_weights(folder, model)


def student_rows(model, tokenizer, data, i, cfg):
    """
    The prompts of micro-batch i with the student's own answers -> as data.batch(i), but one row. An answer
    follows from (seed, its prompt's number in the run) and the weights.
    """
    prompts, numbers, counts = data.prompts(i, cfg.max_new_tokens)
    sampling_cfg = for_vocabulary(SamplingConfig(cfg.max_new_tokens, temperature=1.0), model, tokenizer)
    answers, *_ = complete(model, [prompt.tolist() for prompt in prompts], sampling_cfg, tokenizer.end, 1,
                           data.seed, numbers)
    return continuations(prompts, answers, counts, cfg.seq_len, data.device)


@torch.no_grad()
def evaluate(model, ask, data, kd_options, autocast):
    """-> validation loss (cross-entropy) and divergence per target: over the data.total rows, all ranks"""
    model.eval()
    total = torch.zeros(3, device=data.device)                      # nll sum, divergence sum, targets
    for i in range(-(-data.total // (data.micro_batch_size * data.world_size))):
        tokens, targets, mask, docs = data.batch(i)                 # (B, T) each
        with autocast:
            _, ce_sum, kd_sum = losses.linear_kd_loss(
                model(tokens, docs), model.head, ask("val", i, tokens, docs), targets, mask, **kd_options)
        total += torch.stack([ce_sum, kd_sum, mask.sum()])
    model.train()
    ce_sum, kd_sum, n_targets = dist.all_sum(total).tolist()
    return ce_sum / n_targets, kd_sum / n_targets


if __name__ == "__main__":
    # -------------------------------------------------------------------------
    # setup (identical in every stage)
    cfg = parse_config(Config)
    rank, world_size, device = dist.init(cfg.device)
    dist.check_equal("config", {**as_dict(cfg), "ranks": world_size})
    micro_batch_size, num_micro = check_batch(cfg, world_size)                # of a step, on this rank
    dist.from_rank_zero(lambda: check_run_directory(cfg.out_dir, cfg.resume))
    autocast, dtype = dist.autocast(device, cfg.dtype)
    meta, tokenizer = read_meta(cfg.data_dir), load_tokenizer(cfg.data_dir)
    if tokenizer.fingerprint != meta["fingerprint"]:
        raise UserError(f"--data_dir={cfg.data_dir}: was prepared with another tokenizer than lies beside it")
    previous = checkpoint.latest(cfg.out_dir) if cfg.resume else None         # where this run left off
    origin = hf if not previous and hf.is_folder(cfg.init_from) else checkpoint
    source = previous or (origin.find(cfg.init_from) if cfg.init_from else None)
    saved = origin.read_manifest(source) if source else None
    if source and load_tokenizer(source).fingerprint != tokenizer.fingerprint:
        raise UserError(f"{source}: was trained with another tokenizer than --data_dir={cfg.data_dir}; "
                        f"prepare the data with --tokenizer={source}")

    # -------------------------------------------------------------------------
    # data, which teacher
    chat = meta["kind"] == "chat"
    if meta["kind"] not in ("text", "chat") or (cfg.doc_mask if chat else not cfg.mask_prompt):
        raise UserError(f"--data_dir={cfg.data_dir}: a set of kind {meta['kind']}, expected text (only this "
                        "has --doc_mask) or chat (only this has --mask_prompt)")
    answer_fits = 0 < cfg.max_new_tokens <= cfg.seq_len or not cfg.on_policy_frac
    for name, ok, expected in (("kd_frac", 0 <= cfg.kd_frac <= 1, "0 to 1"),
                               ("on_policy_frac", 0 <= cfg.on_policy_frac <= 1, "0 to 1"),
                               ("jsd_beta", 0 < cfg.jsd_beta < 1, "above 0 and below 1"),
                               ("temperature", cfg.temperature > 0, "above 0"),
                               ("max_new_tokens", answer_fits, f"1 to --seq_len={cfg.seq_len}")):
        if not ok:
            raise UserError(f"--{name}={getattr(cfg, name)}: expected {expected}")
    if cfg.on_policy_frac and cfg.cache_top_k or cfg.cache_dir and not cfg.cache_top_k:
        raise UserError("--cache_top_k: --cache_dir needs it; with it --on_policy_frac must be 0, since no "
                        "cache has what the student will say")

    def load(split, seed):
        return (ChatData if chat else TokenData)(
            cfg.data_dir, split, cfg.seq_len, micro_batch_size, rank, world_size, device, seed,
            cfg.mask_prompt if chat else cfg.doc_mask)
    train_data, val_data = load("train", cfg.seed), load("val", 0) if cfg.eval_seqs else None
    eval_prompts = [encode_user(tokenizer, prompt) if chat else tokenizer.begin + tokenizer.encode(prompt)
                    for prompt in cfg.eval_prompts]
    critical_ids = losses.critical_ids(cfg.critical_ids, meta["vocab_size"], device)
    new_model = GPT                                                           # ModelConfig -> the model

    teacher_config, teacher_id, fill = find_teacher(cfg.teacher, tokenizer)
    if teacher_config and teacher_config.seq_len < cfg.seq_len:
        raise UserError(f"--seq_len={cfg.seq_len}: longer than the teacher's {teacher_config.seq_len}")
    train_data.view = {**train_data.view, "teacher": teacher_id}              # the same after a resume

    # -------------------------------------------------------------------------
    # model, optimizer (identical in every stage)
    num_steps, train_data.total = count_steps(cfg, train_data.num_samples)    # the last may be partial
    if val_data:
        val_data.total = min(cfg.eval_seqs, val_data.num_samples)
    if saved:
        old = ModelConfig(**saved["model"])
        wanted = build(old, read_overrides().get("model", {}), "model.")
        model_config = old.continued(wanted, cfg.seq_len, meta["vocab_size"])
        if previous and model_config != old:
            raise UserError(f"--resume: {previous} has another --model or a smaller --seq_len; "
                            "use --init_from instead")
    else:
        model_config = replace(cfg.model, vocab_size=cfg.model.vocab_size or meta["vocab_size"],
                               seq_len=cfg.model.seq_len or cfg.seq_len).resolved()
    model_config.check_data(meta["vocab_size"], cfg.seq_len, train_data.doc_mask, eval_prompts)
    torch.manual_seed(cfg.seed)                                               # the same weights on every rank
    model = new_model(model_config).to(device, getattr(torch, cfg.param_dtype))
    model.activation_checkpointing = cfg.activation_checkpointing
    if source:
        origin.load_weights(source, model)
    groups = optim.parameter_groups(model, cfg.optimizer, cfg.weight_decay, cfg.beta1, cfg.beta2)
    optimizer = ShardedOptimizer(groups, cfg.zero1, loss_scaling=dtype == torch.float16)
    # what the order of the data and the meaning of a step depend on, not to be changed by a resume
    identity = dict(kind=meta["kind"], data=meta["data_fingerprint"], seed=cfg.seed,
                    batch_size=cfg.batch_size, seq_len=cfg.seq_len, **train_data.view)
    start_step = checkpoint.resume(previous, identity, optimizer, num_steps) if previous else 0
    forward = torch.compile(model) if cfg.compile else model                  # forward() trains only
    token_flops = model.flops_per_token(train_data.mean_context, train_data.target_frac)
    peak_flops = dist.peak_flops(device) * world_size

    # -------------------------------------------------------------------------
    # teacher
    V = model_config.vocab_size
    teacher_vocab = (teacher_config.vocab_size if teacher_config else
                     teacher_logits(*train_data.batch(0)[::3]).shape[-1])
    if teacher_vocab < V or teacher_vocab > V and not cfg.cut_vocab:
        raise UserError(f"--teacher={cfg.teacher}: vocabulary of {teacher_vocab}, the student's has {V}; set "
                        "--model.vocab_size, or --cut_vocab=true to ignore what only the teacher has")
    if not 0 <= cfg.cache_top_k < V:
        raise UserError(f"--cache_top_k={cfg.cache_top_k}: expected 0 to {V - 1}, less than the vocabulary")
    for whose in (model_config, teacher_config or model_config):
        whose.check_data(0, 0, train_data.doc_mask or cfg.on_policy_frac, [])  # documents that share a row
    sets = dict(train=train_data, **dict(val=val_data) if val_data else {})
    cache_key = str([V, cfg.cache_top_k, dtype, cfg.seq_len, train_data.view,
                     [meta["splits"][split]["sha256"] for split in sets]])
    cache_dir = cfg.cache_dir or os.path.join(cfg.out_dir, "teacher_top_k")
    cache = open_cache(cache_dir, cache_key, V, device) if cfg.cache_top_k else None
    teacher = None
    if cfg.teacher and not cache:
        teacher = GPT(teacher_config).to(device).eval().requires_grad_(False)
        fill(teacher)
        token_flops += teacher.flops_per_token(train_data.mean_context, train_data.target_frac) / 3
    beside = dict(models=[teacher])                                           # what estimate() needs to know
    kd_options = dict(temperature=cfg.temperature, kind=cfg.divergence, jsd_beta=cfg.jsd_beta)

    def ask(split, i, tokens, docs):
        """What the teacher says to micro-batch i, as losses.linear_kd_loss takes it"""
        if cache:
            return cache.logits(split, sets[split].places(i))
        with torch.no_grad():
            if teacher:
                return losses.head_logits(teacher(tokens, docs), teacher.head[:V])
            return teacher_logits(tokens, docs)[..., :V].flatten(0, 1).__getitem__

    # -------------------------------------------------------------------------
    # run directory (identical in every stage)
    if cfg.dry_run:
        dist.leave(estimate(model, optimizer, train_data, cfg, num_steps, autocast, token_flops, **beside))
    log = Logger(cfg.out_dir, as_asked(cfg), __file__, cfg.resume, start_step, num_steps, cfg.log_every,
                 cfg.wandb, cfg.tensorboard)
    log.print_changes(as_dict(cfg), saved["config"] if previous else {})
    log.introduce(model.size(), optimizer.state_bytes(), train_data, source, previous)

    # -------------------------------------------------------------------------
    # train
    if cfg.cache_top_k and not cache:
        rows = {split: load(split, 0) for split in sets}
        write_cache(cache_dir, cache_key, cfg.cache_top_k, V, rows, ask, autocast)
        cache, teacher = open_cache(cache_dir, cache_key, V, device), None
    if cache:
        log.print(f"teacher: {cfg.cache_top_k} tokens a position in {cache_dir} have "
                  "{mass:.2%} of its probability; KL {kl:.5f}".format(**cache.info))
    dist.watch_signals()
    skipped, val_loss = 0, None
    for step in range(start_step, num_steps + 1):
        last_step = step == num_steps                                         # no update: evaluate and save
        stop = dist.stop_requested()
        save_now = last_step or (cfg.save_every and step and step % cfg.save_every == 0)
        eval_now = save_now or (cfg.eval_every and step % cfg.eval_every == 0)  # each save has a val_loss

        if eval_now and val_data:
            val_loss, val_kd = evaluate(model, ask, val_data, kd_options, autocast)
            log.metrics(step, val_loss=val_loss, val_kd=val_kd)
            log.print(f"step {step}/{num_steps} | val loss {val_loss:.4f} | val kd {val_kd:.4f}")
        if eval_now:
            for i, (prompt, ids) in enumerate(zip(cfg.eval_prompts, eval_prompts)):
                reply = list(sampling.stream_tokens(model, tokenizer, ids, seed=step * 1000 + i))
                log.sample(step, prompt, tokenizer.decode(reply, show_special=chat), "\n" * chat)
        if (save_now or stop) and step > start_step:
            info = dict(model=asdict(model_config), config=as_dict(cfg), identity=identity,
                        fingerprint=tokenizer.fingerprint)
            checkpoint.save(cfg.out_dir, step, model, optimizer, info, tokenizer.files(), cfg.keep_last,
                            val_loss if save_now else None, last=last_step or stop)
        if last_step or stop:
            break

        timer = Timer()
        dist.seed(cfg.seed, step)                                             # dropout follows from the step
        on_policy = bool(np.random.default_rng([cfg.seed, step]).random() < cfg.on_policy_frac)
        kd_frac = 1.0 if on_policy else cfg.kd_frac                           # its own words are no targets
        micro_numbers = range(step * num_micro, (step + 1) * num_micro)
        with torch.no_grad(), autocast:
            micro_batches = [student_rows(model, tokenizer, train_data, i, cfg) if on_policy
                             else train_data.batch(i) for i in micro_numbers]
        weights = [losses.critical_weights(targets, critical_ids, cfg.critical_alpha) if cfg.critical_ids
                   else None for _, targets, _, _ in micro_batches]           # (B, T) each
        n_targets = dist.all_sum(sum((mask if w is None else mask * w).sum()  # of this whole step, all ranks
                                     for w, (_, _, mask, _) in zip(weights, micro_batches)))
        n_tokens = dist.all_sum(sum((tokens != tokenizer.pad).sum() for tokens, _, _, _ in micro_batches))
        step_loss, sums = torch.zeros((), device=device), torch.zeros(2, device=device)
        for i, (tokens, targets, mask, docs), weight in zip(micro_numbers, micro_batches, weights):
            optimizer.sync = i == micro_numbers[-1]                           # travel in the last backward
            with autocast:
                loss_sum, ce_sum, kd_sum = losses.linear_kd_loss(
                    forward(tokens, docs), model.head, ask("train", i, tokens, docs), targets, mask, weight,
                    kd_frac, **kd_options)
            loss = loss_sum / n_targets.clamp(min=1)                          # divide once, by the full count
            ((loss + model.balance_loss() / n_tokens) * optimizer.loss_scale).backward()
            step_loss += loss.detach()
            sums += torch.stack([ce_sum, kd_sum])

        step_loss = dist.all_sum(step_loss).item()
        optimizer.lr = learning_rate(cfg.schedule, step, num_steps, cfg.lr, cfg.lr * cfg.min_lr_frac,
                                     cfg.warmup_steps, cfg.initial_lr, cfg.restart_steps, cfg.restart_mul,
                                     cfg.wsd_decay_frac)
        grad_norm = optimizer.step(cfg.grad_clip, apply=math.isfinite(step_loss))  # clip, update, gather
        means = (dist.all_sum(sums) / n_targets.clamp(min=1)).tolist()
        also = dict(zip(("ce", "kd"), means), on_policy=on_policy, **model.router_stats())
        log.train_step(step, n_tokens.item(), timer.lap(), token_flops, peak_flops, also,
                       loss=step_loss, kd=also.pop("kd"), lr=optimizer.lr, grad_norm=grad_norm)
        skipped = log.count_skipped(step, math.isfinite(grad_norm) and math.isfinite(step_loss), skipped,
                                    cfg.max_bad_steps)
    dist.finish()
