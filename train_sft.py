"""
Supervised fine-tuning: cross-entropy on what the assistant says, in conversations, with images or without,
packed without padding.

    python train_sft.py --data_dir=out/chat --init_from=out/pretrain                      # one CPU or GPU
    torchrun --standalone --nproc_per_node=8 train_sft.py --data_dir=out/chat --init_from=out/pretrain

Reads   data_dir, made by `python data/prepare.py chat ...` or `images ...`; init_from, what to start from
Writes  out_dir/{config.json, code/, metrics.jsonl, samples.jsonl, step_NNNNNN/}
Expect  `make demo`: how often its model meets requests for a line, in README.md, "Results"
"""
import math
from dataclasses import asdict, dataclass, replace
from typing import Literal

import torch

from common import checkpoint, dist, hf, losses, optim, sampling
from common.config import as_asked, as_dict, build, check_batch, count_steps, parse_config, read_overrides
from common.data import ChatData, read_meta
from common.errors import UserError
from common.estimate import estimate
from common.logger import Logger, Timer, check_run_directory
from common.model import GPT, ModelConfig
from common.rewards import load_function
from common.schedule import learning_rate
from common.tokenizer import encode_user, load_tokenizer
from common.vision import Vision, VisionConfig
from common.zero1 import ShardedOptimizer

# -----------------------------------------------------------------------------
# config: every field is an option, the comment beside it its help (--help prints them)

@dataclass(frozen=True)
class Config:
    # files
    data_dir: str = "out/chat"         # conversations prepared by data/prepare.py chat or images
    out_dir: str = "out/sft"           # run directory, must be new or empty unless resume
    init_from: str = ""                # run, checkpoint or Hugging Face folder to start from; "" = random
    resume: bool = False               # continue out_dir from its latest whole checkpoint, if it has one
    dry_run: bool = False              # check all, measure a micro-batch, say what the run takes, and exit
    # batch
    batch_size: int = 16               # rows per step, over all ranks and micro-batches; each is packed
    micro_batch_size: int = 0          # rows per forward and rank; lower saves memory; 0 = all at once
    seq_len: int = 512                 # tokens per row; no conversation may be longer
    mask_prompt: bool = True           # learn the assistant's words only; false: every token
    # optimization
    num_steps: int = 1000              # updates, unless num_epochs is set
    num_epochs: float = 0.0            # passes over the data; 0 = num_steps counts
    optimizer: Literal["adamw", "lion", "muon"] = "adamw"  # muon: for blocks' matrices, adamw for the rest
    lr: float = 3e-4                   # learning rate after the warm-up
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
    eval_seqs: int = 256               # rows of validation conversations; 0 = no validation
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
    # images: for a set that has some
    freeze_llm: bool = False           # the language model stays as it is: the tower and projector learn
    freeze_tower: bool = False         # the tower stays as it is
    vision: VisionConfig = VisionConfig()  # vision
    # model
    model: ModelConfig = ModelConfig()


@torch.no_grad()
def evaluate(model, data, autocast):
    """-> validation loss per target: over the data.total rows, all ranks together"""
    model.eval()
    total = torch.zeros(2, device=data.device)                      # nll sum, targets
    for i in range(-(-data.total // (data.micro_batch_size * data.world_size))):
        tokens, targets, mask, docs = data.batch(i)                 # (B, T) each
        with autocast:
            hidden = model(tokens, docs, images=data.images(i))
            nll_sum = losses.linear_cross_entropy(hidden, model.head, targets, mask)
        total += torch.stack([nll_sum, mask.sum()])
    model.train()
    nll_sum, n_targets = dist.all_sum(total).tolist()
    return nll_sum / n_targets


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
        return ChatData(cfg.data_dir, split, cfg.seq_len, micro_batch_size, rank, world_size, device, seed,
                        cfg.mask_prompt, with_images=True)
    train_data, val_data = load("train", cfg.seed), load("val", 0) if cfg.eval_seqs else None
    eval_prompts = [encode_user(tokenizer, prompt) for prompt in cfg.eval_prompts]
    critical_ids = losses.critical_ids(cfg.critical_ids, meta["vocab_size"], device)

    # -------------------------------------------------------------------------
    # vision, where the set has images
    images, seen, vision_config = meta.get("images"), saved and saved.get("vision"), cfg.vision
    if not images and (cfg.freeze_llm or cfg.freeze_tower or read_overrides().get("vision")):
        raise UserError(f"--data_dir={cfg.data_dir}: has no images, so --freeze_llm, --freeze_tower and "
                        "--vision say nothing; leave them out")
    if images and seen:
        if seen["images"] != images:
            raise UserError(f"{source}: has seen images as {seen['images']}, --data_dir={cfg.data_dir} has "
                            f"them as {images}; prepare them alike")
        old = VisionConfig(**seen["config"])
        asked = {"tower": "", **read_overrides().get("vision", {})}           # code is run if you name it
        vision_config = old.continued(build(old, asked, "vision."))

    def new_model(config):
        model = GPT(config).requires_grad_(not cfg.freeze_llm)
        if images:
            tower = vision_config.tower
            model.vision = Vision(vision_config, config.n_embd, images,
                                  load_function("vision.tower", tower) if tower else None)
            if cfg.freeze_tower and isinstance(model.vision.tower, torch.nn.Module):
                model.vision.tower.requires_grad_(False)
            model.vision.train().check_ranks(world_size)
        return model.train()                                                  # what is frozen stays in eval

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
    # what pictures cost
    image_flops, beside = 0, {}                                               # what estimate() needs to know
    if images:
        image_flops = model.vision.flops_per_image()
    if images and cfg.dry_run:
        tokens, _, _, docs = train_data.batch(0)
        beside = dict(batch=(tokens, docs, train_data.images(0)), image_flops=image_flops)

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
    if images:
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        stay = cfg.freeze_llm and not source or cfg.freeze_tower and not seen and not cfg.vision.tower
        log.print(f"vision: {sum(p.numel() for p in model.vision.parameters()):,} of the parameters"
                  + ", random" * (not seen) + f"; {learned:,} learn" + ", some random ones stay so" * stay
                  + "; {} features of {} channels a picture".format(*model.vision.shape))
    dist.watch_signals()
    skipped, val_loss = 0, None
    for step in range(start_step, num_steps + 1):
        last_step = step == num_steps                                         # no update: evaluate and save
        stop = dist.stop_requested()
        save_now = last_step or (cfg.save_every and step and step % cfg.save_every == 0)
        eval_now = save_now or (cfg.eval_every and step % cfg.eval_every == 0)  # each save has a val_loss

        if eval_now and val_data:
            val_loss = evaluate(model, val_data, autocast)
            log.metrics(step, val_loss=val_loss)
            log.print(f"step {step}/{num_steps} | val loss {val_loss:.4f}")
        if eval_now:
            for i, (prompt, ids) in enumerate(zip(cfg.eval_prompts, eval_prompts)):
                reply = list(sampling.stream_tokens(model, tokenizer, ids, seed=step * 1000 + i))
                log.sample(step, prompt, tokenizer.decode(reply, show_special=True), between="\n")
        if (save_now or stop) and step > start_step:
            info = dict(model=asdict(model_config), config=as_dict(cfg), identity=identity,
                        fingerprint=tokenizer.fingerprint, vision=model.vision.info() if images else None)
            checkpoint.save(cfg.out_dir, step, model, optimizer, info, tokenizer.files(), cfg.keep_last,
                            val_loss if save_now else None, last=last_step or stop)
        if last_step or stop:
            break

        timer = Timer()
        dist.seed(cfg.seed, step)                                             # dropout follows from the step
        micro_numbers = range(step * num_micro, (step + 1) * num_micro)
        micro_batches = [train_data.batch(i) for i in micro_numbers]
        shown = [train_data.images(i) for i in micro_numbers]                 # of each, or None
        weights = [losses.critical_weights(targets, critical_ids, cfg.critical_alpha) if cfg.critical_ids
                   else None for _, targets, _, _ in micro_batches]           # (B, T) each
        n_targets = dist.all_sum(sum((mask if w is None else mask * w).sum()  # of this whole step, all ranks
                                     for w, (_, _, mask, _) in zip(weights, micro_batches)))
        n_tokens = dist.all_sum(sum((tokens != tokenizer.pad).sum() for tokens, _, _, _ in micro_batches))
        n_pictures = dist.all_sum(sum(len(of[0]) for of in shown if of)) if images else 0
        step_loss = torch.zeros((), device=device)
        for i, ((tokens, targets, mask, docs), weight) in enumerate(zip(micro_batches, weights)):
            optimizer.sync = i == num_micro - 1                               # travel in the last backward
            with autocast:
                hidden = forward(tokens, docs, images=shown[i])               # (B, T, C)
                loss_sum = losses.linear_cross_entropy(hidden, model.head, targets, mask, weight)
            loss = loss_sum / n_targets.clamp(min=1)                          # divide once, by the full count
            if not loss.requires_grad:                                        # freeze_llm, and no image here;
                loss = loss + 0 * model.vision.out.bias.sum()                 # other ranks wait for backward
            ((loss + model.balance_loss() / n_tokens) * optimizer.loss_scale).backward()
            step_loss += loss.detach()

        step_loss = dist.all_sum(step_loss).item()
        optimizer.lr = learning_rate(cfg.schedule, step, num_steps, cfg.lr, cfg.lr * cfg.min_lr_frac,
                                     cfg.warmup_steps, cfg.initial_lr, cfg.restart_steps, cfg.restart_mul,
                                     cfg.wsd_decay_frac)
        grad_norm = optimizer.step(cfg.grad_clip, apply=math.isfinite(step_loss))  # clip, update, gather
        log.train_step(step, n_tokens.item(), timer.lap(),
                       token_flops + float(image_flops * n_pictures / n_tokens), peak_flops,
                       also=model.router_stats(), loss=step_loss, lr=optimizer.lr, grad_norm=grad_norm)
        skipped = log.count_skipped(step, math.isfinite(grad_norm) and math.isfinite(step_loss), skipped,
                                    cfg.max_bad_steps)
    dist.finish()
