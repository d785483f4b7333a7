"""
Direct preference optimization and its family: raise chosen answers' log-probs over rejected ones'. The
reference is the policy as training started, after a resume too; a prompt is computed once for both answers.

    python train_dpo.py --data_dir=out/pairs --init_from=out/sft                          # one CPU or GPU
    torchrun --standalone --nproc_per_node=8 train_dpo.py --data_dir=out/pairs --init_from=out/sft

Reads   data_dir, made by `python data/prepare.py pairs ...`; init_from, what to start from
Writes  out_dir/{config.json, code/, metrics.jsonl, step_NNNNNN/}, ref_logps.bin: the reference's log-probs
Expect  `make demo`: accuracy on held-out pairs, in README.md, "Results"
"""
import copy
import json
import math
import os
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch

from common import checkpoint, dist, hf, losses, optim, sampling
from common.config import as_asked, as_dict, build, check_batch, count_steps, parse_config, read_overrides
from common.data import PairData, read_meta
from common.errors import UserError
from common.estimate import estimate
from common.logger import Logger, Timer, check_run_directory
from common.model import GPT, ModelConfig
from common.schedule import learning_rate
from common.tokenizer import encode_user, load_tokenizer
from common.zero1 import ShardedOptimizer

# -----------------------------------------------------------------------------
# config: every field is an option, the comment beside it its help (--help prints them)

@dataclass(frozen=True)
class Config:
    # files
    data_dir: str = "out/pairs"        # pairs of answers prepared by data/prepare.py pairs
    out_dir: str = "out/dpo"           # run directory, must be new or empty unless resume
    init_from: str = ""                # run, checkpoint or Hugging Face folder to start from; "" = random
    resume: bool = False               # continue out_dir from its latest whole checkpoint, if it has one
    dry_run: bool = False              # check all, measure a micro-batch, say what the run takes, and exit
    # batch
    batch_size: int = 32               # pairs per step, over all ranks and micro-batches
    micro_batch_size: int = 0          # pairs per forward and rank; lower saves memory; 0 = all at once
    seq_len: int = 512                 # tokens of a prompt and one answer at most
    # preferences
    loss: Literal["sigmoid", "ipo", "hinge", "simpo", "orpo"] = "sigmoid"  # common/losses.py has the formulas
    beta: float = 0.1                  # pull to the reference; simpo: reward scale, try 2; orpo: weight
    label_smoothing: float = 0.0       # sigmoid: share of pairs that may be the wrong way round
    gamma: float = 0.5                 # simpo: margin between the answers' rewards
    nll_coef: float = 0.0              # adds this much of the chosen answers' cross-entropy
    ref_online: bool = False           # keep a second model and ask it each time, instead of once before
    # optimization
    num_steps: int = 1000              # updates, unless num_epochs is set
    num_epochs: float = 0.0            # passes over the data; 0 = num_steps counts
    optimizer: Literal["adamw", "lion", "muon"] = "adamw"  # muon: for blocks' matrices, adamw for the rest
    lr: float = 1e-5                   # learning rate after the warm-up
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
    critical_ids: tuple[int, ...] = ()  # target ids with a weight of their own in the nll_coef term
    critical_alpha: float = 1.0        # that weight
    # evaluation, logging, checkpoints
    eval_every: int = 250              # steps; 0 = only at the end
    eval_seqs: int = 256               # validation pairs; 0 = no validation
    eval_prompts: tuple[str, ...] = ()  # answered at every evaluation, into samples.jsonl
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


def answer_logps(model, pairs):
    """-> log-probs (N,) of the answers' learned tokens"""
    hidden = model(pairs.tokens, pairs.docs, branch=pairs.branch)[pairs.mask]                     # (N, C)
    return losses.token_logps(hidden, model.head, pairs.targets[pairs.mask])


def preference(logps, pairs, ref, critical_ids, cfg):
    """logps (N,) of the policy; ref (P, 2) summed log-probs -> loss (P,), dict of metrics (P,)"""
    sums, lengths = pairs.per_answer(logps), pairs.per_answer(torch.ones_like(logps)).clamp(min=1)
    means = sums / lengths                                                    # (P, 2)
    if cfg.loss == "simpo":
        loss, rewards = losses.simpo_loss(*means.T, cfg.beta, cfg.gamma), cfg.beta * means
    elif cfg.loss == "orpo":
        loss, rewards = losses.orpo_loss(*means.T, cfg.beta), cfg.beta * means
    else:
        loss = losses.dpo_loss(*sums.T, *ref.T, cfg.beta, cfg.label_smoothing, cfg.loss)
        rewards = cfg.beta * (sums - ref)
    # cross-entropy of the chosen answer, divided by its length (RPO, 2404.19733 eq. 1)
    weights = losses.critical_weights(pairs.targets[pairs.mask], critical_ids, cfg.critical_alpha)
    nll = -(pairs.per_answer(logps * weights) / pairs.per_answer(weights).clamp(min=1e-6))[:, 0]
    loss = loss + cfg.nll_coef * nll
    metrics = dict(zip(("reward_chosen", "reward_rejected", "logps_chosen", "logps_rejected"),
                       torch.cat([rewards, sums], dim=1).detach().T))
    metrics["nll"] = nll.detach()
    metrics["margin"] = metrics["reward_chosen"] - metrics["reward_rejected"]
    metrics["accuracy"] = (metrics["margin"].sign() + 1) / 2                  # undecided: half right
    metrics["ranking"] = ((metrics["logps_chosen"] - metrics["logps_rejected"]).sign() + 1) / 2
    if ref is not None:  # as if the answers were the reference's samples: KL(reference || policy) per token
        metrics["kl"] = ((ref - sums.detach()) / lengths).mean(dim=1)
    return loss, metrics


@torch.no_grad()
def summed_logps(model, data, autocast):
    """-> (pairs of the set, 2) float32: log-probs of all chosen and rejected answers, all ranks together"""
    model.eval()
    sums, size = torch.zeros(data.num_samples, 2, device=data.device), data.micro_batch_size
    for start in range(data.rank * size, data.num_samples, data.world_size * size):
        ids = np.arange(start, min(start + size, data.num_samples))
        pairs = data.pairs(ids, np.ones(len(ids), dtype=bool))
        with autocast:
            sums[pairs.ids] = pairs.per_answer(answer_logps(model, pairs))
    model.train()
    return dist.all_sum(sums)


@torch.no_grad()
def evaluate(model, data, ref, critical_ids, cfg, autocast):
    """-> dict of the validation loss and metrics, means over the data.total pairs, all ranks together"""
    model.eval()
    total = 0.0
    for i in range(-(-data.total // (data.micro_batch_size * data.world_size))):
        pairs = data.batch(i)
        with autocast:
            logps = answer_logps(model, pairs)
            loss, metrics = preference(logps, pairs, ref("val", pairs), critical_ids, cfg)
        total += (torch.stack([loss, *metrics.values()]) * pairs.counts).sum(dim=1)
    model.train()
    means = (dist.all_sum(total) / data.total).tolist()
    return {f"val_{name}": mean for name, mean in zip(["loss", *metrics], means)}


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
    if cfg.beta <= 0 or cfg.nll_coef < 0 or not 0 <= cfg.label_smoothing < 0.5:
        raise UserError("--beta, --nll_coef, --label_smoothing: expected > 0; >= 0; >= 0 and < 0.5")
    if cfg.label_smoothing and cfg.loss != "sigmoid":
        raise UserError(f"--label_smoothing: only with --loss=sigmoid, not {cfg.loss}")

    def load(split, seed):
        return PairData(cfg.data_dir, split, cfg.seq_len, micro_batch_size, rank, world_size, device, seed)
    train_data, val_data = load("train", cfg.seed), load("val", 0) if cfg.eval_seqs else None
    eval_prompts = [encode_user(tokenizer, prompt) for prompt in cfg.eval_prompts]
    critical_ids = losses.critical_ids(cfg.critical_ids, meta["vocab_size"], device)
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
    # reference: the initial policy, by the log-probs it gave, or as a second model
    cached = reference = ref_arrays = None
    path = os.path.join(cfg.out_dir, "ref_logps.bin")
    sets = {split: data for split, data in (("train", train_data), ("val", val_data)) if data}
    initial_weights = saved["initial_weights"] if previous else checkpoint.fingerprint(model)
    key = json.dumps([initial_weights, asdict(model_config), str(dtype),
                      {split: meta["splits"][split]["sha256"] for split in sets}])
    if cfg.loss not in ("simpo", "orpo"):
        cached = None if cfg.ref_online else dist.from_rank_zero(lambda: checkpoint.read_arrays(path, key))
        if cached is None:
            reference = copy.deepcopy(model) if previous or cfg.ref_online else model
            if previous:                                                      # back to where the run began
                torch.manual_seed(cfg.seed)
                reference.load_state_dict(GPT(model_config).state_dict())
                if cfg.init_from:
                    first = hf if hf.is_folder(cfg.init_from) else checkpoint
                    first.load_weights(first.find(cfg.init_from), reference)
                if checkpoint.fingerprint(reference) != initial_weights:
                    raise UserError(f"--init_from={cfg.init_from}: not the weights that this run began with; "
                                    "its reference needs those again")
        if cached is None and not cfg.ref_online and not cfg.dry_run:
            if rank == 0:
                print(f"reference: log-probs of {sum(d.num_samples for d in sets.values()):,} pairs")
            ref_arrays = {split: summed_logps(reference, data, autocast) for split, data in sets.items()}
            reference = None
        elif cached:
            ref_arrays = {split: torch.from_numpy(array).to(device) for split, array in cached.items()}

    beside = dict(models=[reference] * cfg.ref_online)                        # what estimate() needs to know

    def ref(split, pairs):                                                    # -> (P, 2), None without one
        if reference is not None:
            with torch.no_grad(), autocast:
                return pairs.per_answer(answer_logps(reference, pairs))
        return ref_arrays[split][pairs.ids] if ref_arrays else None

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
    if ref_arrays and not cached:
        numpy_arrays = {split: array.cpu().numpy() for split, array in ref_arrays.items()}
        dist.from_rank_zero(lambda: checkpoint.write_arrays(path, key, numpy_arrays))
    dist.watch_signals()
    skipped, val_loss = 0, None
    for step in range(start_step, num_steps + 1):
        last_step = step == num_steps                                         # no update: evaluate and save
        stop = dist.stop_requested()
        save_now = last_step or (cfg.save_every and step and step % cfg.save_every == 0)
        eval_now = save_now or (cfg.eval_every and step % cfg.eval_every == 0)  # each save has a val_loss

        if eval_now and val_data:
            log.metrics(step, **(metrics := evaluate(model, val_data, ref, critical_ids, cfg, autocast)))
            val_loss = metrics["val_loss"]
            log.print(f"step {step}/{num_steps} | val loss {val_loss:.4f} | "
                      f"accuracy {metrics['val_accuracy']:.3f}")
        if eval_now:
            for i, (prompt, ids) in enumerate(zip(cfg.eval_prompts, eval_prompts)):
                reply = list(sampling.stream_tokens(model, tokenizer, ids, seed=step * 1000 + i))
                log.sample(step, prompt, tokenizer.decode(reply, show_special=True), between="\n")
        if (save_now or stop) and step > start_step:
            info = dict(model=asdict(model_config), config=as_dict(cfg), identity=identity,
                        fingerprint=tokenizer.fingerprint, initial_weights=initial_weights)
            checkpoint.save(cfg.out_dir, step, model, optimizer, info, tokenizer.files(), cfg.keep_last,
                            val_loss if save_now else None, last=last_step or stop)
        if last_step or stop:
            break

        timer = Timer()
        dist.seed(cfg.seed, step)                                             # dropout follows from the step
        micro_batches = [train_data.batch(step * num_micro + i) for i in range(num_micro)]
        n_pairs, n_tokens = dist.all_sum(sum(                                 # of this whole step, all ranks
            torch.stack([pairs.counts.sum(), (pairs.tokens >= 0).sum()]) for pairs in micro_batches))
        step_loss, step_metrics = torch.zeros((), device=device), 0.0
        for i, pairs in enumerate(micro_batches):
            optimizer.sync = i == num_micro - 1                               # travel in the last backward
            with autocast:
                logps = answer_logps(forward, pairs)                          # (N,)
                pair_loss, metrics = preference(logps, pairs, ref("train", pairs), critical_ids, cfg)
            loss = (pair_loss * pairs.counts).sum() / n_pairs                 # divide once, by the full count
            ((loss + model.balance_loss() / n_tokens) * optimizer.loss_scale).backward()
            step_loss += loss.detach()
            step_metrics += (torch.stack([*metrics.values()]) * pairs.counts).sum(dim=1)

        step_loss = dist.all_sum(step_loss).item()
        optimizer.lr = learning_rate(cfg.schedule, step, num_steps, cfg.lr, cfg.lr * cfg.min_lr_frac,
                                     cfg.warmup_steps, cfg.initial_lr, cfg.restart_steps, cfg.restart_mul,
                                     cfg.wsd_decay_frac)
        grad_norm = optimizer.step(cfg.grad_clip, apply=math.isfinite(step_loss))  # clip, update, gather
        metrics = dict(zip(metrics, (dist.all_sum(step_metrics) / n_pairs).tolist()), **model.router_stats())
        log.train_step(step, n_tokens.item(), timer.lap(), token_flops, peak_flops, also=metrics,
                       loss=step_loss, lr=optimizer.lr, grad_norm=grad_norm,
                       accuracy=metrics.pop("accuracy"), margin=metrics.pop("margin"))
        skipped = log.count_skipped(step, math.isfinite(grad_norm) and math.isfinite(step_loss), skipped,
                                    cfg.max_bad_steps)
    dist.finish()
