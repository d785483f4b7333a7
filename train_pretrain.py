"""
Pretraining: next-token cross-entropy on a memory-mapped token set.

    python train_pretrain.py configs/shakespeare_cpu.py                                   # one CPU or GPU
    torchrun --standalone --nproc_per_node=8 train_pretrain.py configs/gpt2_124m.py --zero1=true

Reads   data_dir, made by `python data/prepare.py text ...`; with init_from, what to start from
Writes  out_dir/{config.json, code/, metrics.jsonl, samples.jsonl, step_NNNNNN/}
Expect  configs/shakespeare_cpu.py: the validation loss in README.md, "Results"
"""
import math
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

from common import checkpoint, dist, hf, losses, optim, sampling
from common.config import as_asked, as_dict, build, check_batch, count_steps, parse_config, read_overrides
from common.data import TokenData, read_meta
from common.errors import UserError
from common.estimate import estimate
from common.logger import Logger, Timer, check_run_directory
from common.model import GPT, ModelConfig
from common.schedule import learning_rate
from common.tokenizer import load_tokenizer
from common.zero1 import ShardedOptimizer

# -----------------------------------------------------------------------------
# config: every field is an option, the comment beside it its help (--help prints them)

@dataclass(frozen=True)
class Config:
    # files
    data_dir: str = "out/data"         # token set made by data/prepare.py text
    out_dir: str = "out/pretrain"      # run directory, must be new or empty unless resume
    init_from: str = ""                # run, checkpoint or Hugging Face folder to start from; "" = random
    resume: bool = False               # continue out_dir from its latest whole checkpoint, if it has one
    dry_run: bool = False              # check all, measure a micro-batch, say what the run takes, and exit
    # batch
    batch_size: int = 64               # sequences per step, over all ranks and micro-batches
    micro_batch_size: int = 0          # sequences per forward and rank; lower saves memory; 0 = all at once
    seq_len: int = 512                 # tokens per sequence
    doc_mask: bool = False             # attend and count positions within each document only
    # optimization
    num_steps: int = 2000              # updates, unless num_epochs is set
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
    eval_seqs: int = 256               # validation sequences; 0 = no validation
    eval_prompts: tuple[str, ...] = ()  # continued at every evaluation, into samples.jsonl
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


@torch.no_grad()
def evaluate(model, data, autocast):
    """-> validation loss per token, bits per byte: over the data.total sequences, all ranks together"""
    model.eval()
    total = torch.zeros(3, device=data.device)                      # nll sum, targets, bytes of the targets
    for i in range(-(-data.total // (data.micro_batch_size * data.world_size))):
        tokens, targets, mask, docs = data.batch(i)                 # (B, T) each
        with autocast:
            nll_sum = losses.linear_cross_entropy(model(tokens, docs), model.head, targets, mask)
        total += torch.stack([nll_sum, mask.sum(), (data.token_bytes[targets] * mask).sum()])
    model.train()
    nll_sum, n_tokens, n_bytes = dist.all_sum(total).tolist()
    return nll_sum / n_tokens, nll_sum / math.log(2) / n_bytes


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
    # data
    def load(split, seed):
        return TokenData(cfg.data_dir, split, cfg.seq_len, micro_batch_size, rank, world_size, device, seed,
                         cfg.doc_mask)
    train_data, val_data = load("train", cfg.seed), load("val", 0) if cfg.eval_seqs else None
    eval_prompts = [tokenizer.begin + tokenizer.encode(prompt) for prompt in cfg.eval_prompts]
    critical_ids = losses.critical_ids(cfg.critical_ids, meta["vocab_size"], device)
    beside = {}                                                               # nothing that estimate() lacks
    new_model = GPT                                                           # ModelConfig -> the model

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
    # run directory (identical in every stage)
    if cfg.dry_run:
        dist.leave(estimate(model, optimizer, train_data, cfg, num_steps, autocast, token_flops, **beside))
    log = Logger(cfg.out_dir, as_asked(cfg), __file__, cfg.resume, start_step, num_steps, cfg.log_every,
                 cfg.wandb, cfg.tensorboard)
    log.print_changes(as_dict(cfg), saved["config"] if previous else {})
    log.introduce(model.size(), optimizer.state_bytes(), train_data, source, previous)

    # -------------------------------------------------------------------------
    # train
    dist.watch_signals()
    skipped, val_loss = 0, None
    for step in range(start_step, num_steps + 1):
        last_step = step == num_steps                                         # no update: evaluate and save
        stop = dist.stop_requested()
        save_now = last_step or (cfg.save_every and step and step % cfg.save_every == 0)
        eval_now = save_now or (cfg.eval_every and step % cfg.eval_every == 0)  # each save has a val_loss

        if eval_now and val_data:
            val_loss, bits_per_byte = evaluate(model, val_data, autocast)
            log.metrics(step, val_loss=val_loss, val_bits_per_byte=bits_per_byte)
            log.print(f"step {step}/{num_steps} | val loss {val_loss:.4f} | "
                      f"{bits_per_byte:.3f} bits per byte")
        if eval_now:
            for i, (prompt, ids) in enumerate(zip(cfg.eval_prompts, eval_prompts)):
                text = "".join(sampling.stream(model, tokenizer, ids, seed=step * 1000 + i))
                log.sample(step, prompt, text)
        if (save_now or stop) and step > start_step:
            info = dict(model=asdict(model_config), config=as_dict(cfg), identity=identity,
                        fingerprint=tokenizer.fingerprint)
            checkpoint.save(cfg.out_dir, step, model, optimizer, info, tokenizer.files(), cfg.keep_last,
                            val_loss if save_now else None, last=last_step or stop)
        if last_step or stop:
            break

        timer = Timer()
        dist.seed(cfg.seed, step)                                             # dropout follows from the step
        micro_batches = [train_data.batch(step * num_micro + i) for i in range(num_micro)]
        weights = [losses.critical_weights(targets, critical_ids, cfg.critical_alpha) if cfg.critical_ids
                   else None for _, targets, _, _ in micro_batches]           # (B, T) each
        n_targets = dist.all_sum(sum((mask if w is None else mask * w).sum()  # of this whole step, all ranks
                                     for w, (_, _, mask, _) in zip(weights, micro_batches)))
        n_tokens = cfg.batch_size * cfg.seq_len
        step_loss = torch.zeros((), device=device)
        for i, ((tokens, targets, mask, docs), weight) in enumerate(zip(micro_batches, weights)):
            optimizer.sync = i == num_micro - 1                               # travel in the last backward
            with autocast:
                hidden = forward(tokens, docs)                                # (B, T, C)
                loss_sum = losses.linear_cross_entropy(hidden, model.head, targets, mask, weight)
            loss = loss_sum / n_targets.clamp(min=1)                          # divide once, by the full count
            ((loss + model.balance_loss() / n_tokens) * optimizer.loss_scale).backward()
            step_loss += loss.detach()

        step_loss = dist.all_sum(step_loss).item()
        optimizer.lr = learning_rate(cfg.schedule, step, num_steps, cfg.lr, cfg.lr * cfg.min_lr_frac,
                                     cfg.warmup_steps, cfg.initial_lr, cfg.restart_steps, cfg.restart_mul,
                                     cfg.wsd_decay_frac)
        grad_norm = optimizer.step(cfg.grad_clip, apply=math.isfinite(step_loss))  # clip, update, gather
        log.train_step(step, n_tokens, timer.lap(), token_flops, peak_flops,
                       also=model.router_stats(), loss=step_loss, lr=optimizer.lr, grad_norm=grad_norm)
        skipped = log.count_skipped(step, math.isfinite(grad_norm) and math.isfinite(step_loss), skipped,
                                    cfg.max_bad_steps)
    dist.finish()
