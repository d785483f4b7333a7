"""
What every stage does around its loop: values and the files of a run, so that a script holds only
what makes it a stage. Nothing here calls forward, a loss, backward or `optimizer.step`, and any
line of a script that calls `run` may be replaced by one's own.

    run = begin(parse_config(Config), __file__)       # or begin(Config(lr=1e-3), __file__), from
                                                      Python
    train_data, val_data = run.data(TokenData)
    model = run.model(GPT)
    optimizer = run.optimizer(model)
    run.start(model, optimizer)                       # with --dry_run=true: what the run takes, and
                                                      exit
    for step in run.steps():                          # what is due before update step.number
        if step.evaluate: ...
        if step.save: run.save(step, model, optimizer, val_loss)
        if step.last: break
        step.start()
        ...                                           # batch, forward, loss, backward
        optimizer.lr = run.learning_rate(step)
        grad_norm = optimizer.step(cfg.grad_clip)
        run.record(step, n_tokens, loss=loss, lr=optimizer.lr, grad_norm=grad_norm)
    dist.finish()
"""

import math
import time
from dataclasses import dataclass, replace
from typing import Literal

import torch

from common import checkpoint, dist, optim, sampling, schedule
from common.chat import encode_user
from common.config import as_dict, asked, build
from common.data import read_meta
from common.errors import UserError
from common.logger import Logger, check_run_directory
from common.model import ModelConfig
from common.tokenizer import load_tokenizer
from common.zero1 import ShardedOptimizer


# fmt: off
@dataclass(frozen=True)
class RunConfig:
    # files
    data_dir: str = "out/data"     # set made by data/prepare.py
    out_dir: str = "out/run"       # run directory, must be new or empty unless resume
    init_from: str = ""  # run, checkpoint or Hugging Face folder to start from; "" = random
    resume: bool = False  # continue out_dir from its latest whole checkpoint, if it has one
    dry_run: bool = False  # check all, measure a micro-batch, print what the run takes, exit
    # batch
    batch_size: int = 16           # samples per step, over all ranks and micro-batches
    micro_batch_size: int = 0  # samples per forward and rank; lower saves memory; 0 = all at once
    seq_len: int = 512             # tokens per sequence
    # optimization
    num_steps: int = 1000          # updates, unless num_epochs is set
    num_epochs: float = 0.0        # passes over the data; 0 = num_steps counts
    optimizer: Literal["adamw", "lion", "muon"] = "adamw"  # muon: blocks' matrices, the rest adamw
    lr: float = 1e-3               # learning rate after the warm-up
    schedule: Literal["cosine", "restarts", "constant", "wsd"] = "cosine"  # how lr falls after it
    warmup_steps: int = 100        # updates until lr is reached
    initial_lr: float = 0.0        # where the warm-up starts
    min_lr_frac: float = 0.1       # lr of the last update / lr
    restart_steps: int = 0         # restarts: length of the first period, in steps; 0 = one period
    restart_mul: float = 1.0       # restarts: each period is this many times the one before
    wsd_decay_frac: float = 0.2    # wsd: fraction of the steps, at the end, in which lr falls
    weight_decay: float = 0.1      # on tensors of two or more dimensions
    beta1: float = 0.9             # decay of the running mean of gradients
    beta2: float = 0.95            # decay of the mean of squares (adamw), of the momentum (lion)
    grad_clip: float = 1.0         # largest global gradient norm; 0 = off
    zero1: bool = False            # each rank keeps and updates 1/N of the optimizer state
    # evaluation, logging, checkpoints
    eval_every: int = 250          # steps; 0 = only at the end
    eval_seqs: int = 256           # validation samples; 0 = no validation
    eval_prompts: tuple[str, ...] = ()  # continued or answered at evaluations, into samples.jsonl
    save_every: int = 500          # steps; 0 = only at the end
    keep_last: int = 2             # latest checkpoints to keep, next to the best by validation loss
    log_every: int = 10            # steps between console lines (metrics.jsonl gets every step)
    wandb: str = ""                # also log to this project of Weights & Biases
    tensorboard: bool = False      # also log to out_dir/tensorboard
    max_bad_steps: int = 20  # stop after so many skipped steps (loss or norm nan/inf) in a row
    # system
    seed: int = 1337               # of the weights, the order of the data and dropout
    device: str = "auto"           # auto, cpu, cuda, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: bfloat16 on GPUs
    param_dtype: Literal["float32", "bfloat16"] = "float32"  # of weights; bfloat16: + fp32 copy
    compile: bool = False          # torch.compile the training forward
    activation_checkpointing: bool = False  # recompute blocks in backward: saves memory, 1/3 slower
    # model
    model: ModelConfig = ModelConfig()
# fmt: on


@dataclass
class Step:
    """What is due before update `number`; last: no update follows"""

    number: int
    evaluate: bool
    save: bool
    last: bool
    seed: int

    def start(self):
        """
        Start the clock, and dropout from a state that follows from the step alone (after a resume
        too)
        """
        self.clock = time.perf_counter()
        dist.seed(self.seed, self.number)

    def lap(self):
        """-> seconds since `start` or the last call"""
        before, self.clock = self.clock, time.perf_counter()
        return self.clock - before


def begin(cfg, script):
    """
    cfg: a RunConfig; script: path of the file that runs, kept with the run -> Run

    Joins the ranks, and checks what can be checked without data in memory. UserError.
    """
    rank, world_size, device = dist.init(cfg.device)
    dist.check_equal("config", {**as_dict(cfg), "ranks": world_size})
    check_options(cfg, world_size)
    dist.from_rank_zero(lambda: check_run_directory(cfg.out_dir, cfg.resume))
    return Run(cfg, script, rank, world_size, device)


def check_options(cfg, world_size):
    """
    UserError where an option is out of range or does not fit another one, or the number of ranks
    """
    least = dict(
        seq_len=1,
        batch_size=world_size,
        micro_batch_size=0,
        lr=0,
        eval_seqs=0,
        seed=0,
        keep_last=1,
        log_every=1,
        max_bad_steps=1,
    )
    for name, limit in least.items():
        if getattr(cfg, name) < limit:
            raise UserError(f"--{name}={getattr(cfg, name)}: must be at least {limit}")
    micro_batch_size = cfg.micro_batch_size or cfg.batch_size // world_size
    if cfg.batch_size % (micro_batch_size * world_size):
        raise UserError(
            f"--batch_size={cfg.batch_size}: must be a multiple of ranks x micro_batch_size = "
            f"{world_size} x {cfg.micro_batch_size or 1}"
        )
    if min(cfg.num_steps, cfg.num_epochs) < 0 or not (cfg.num_steps or cfg.num_epochs):
        raise UserError(
            f"--num_steps={cfg.num_steps} --num_epochs={cfg.num_epochs}: set one of them"
        )


class Run:
    """
    rank, world_size, device        of this process
    micro_batch_size, num_micro     samples of a micro-batch, micro-batches of a step; on this rank
    autocast, dtype                 context manager to compute in, and the dtype it computes in
    meta, tokenizer, prompts        of the set; ids of the eval prompts
    previous                        Source that a resumed run goes on from, or None
    source                          Source that the weights come from: previous, init_from, or None
    num_steps, start_step           updates of the whole run, and those made before (after `data`,
                                    `model`)
    log                             Logger (after `start`)
    """

    def __init__(self, cfg, script, rank, world_size, device):
        self.cfg, self.script = cfg, script
        self.rank, self.world_size, self.device = rank, world_size, device
        self.micro_batch_size = cfg.micro_batch_size or cfg.batch_size // world_size
        self.num_micro = cfg.batch_size // (self.micro_batch_size * world_size)
        self.autocast, self.dtype = dist.autocast(device, cfg.dtype)
        self.meta, self.tokenizer = read_meta(cfg.data_dir), load_tokenizer(cfg.data_dir)
        if self.tokenizer.fingerprint != self.meta["fingerprint"]:
            raise UserError(
                f"--data_dir={cfg.data_dir}: was prepared with another tokenizer than lies "
                "beside it"
            )
        folder = checkpoint.latest(cfg.out_dir) if cfg.resume else None
        self.previous = self.source = folder and checkpoint.checkpoint_source(folder)
        if not folder and cfg.init_from:
            self.source = checkpoint.source(cfg.init_from)
        if self.source and self.source.fingerprint() != self.tokenizer.fingerprint:
            folder = self.source.folder
            raise UserError(
                f"{folder}: was trained with another tokenizer than --data_dir={cfg.data_dir}; "
                f"prepare the data with --tokenizer={folder}"
            )
        self.prompts = [self._encode(prompt) for prompt in cfg.eval_prompts]
        self.skipped = 0

    def _encode(self, prompt):
        if self.meta["kind"] == "text":
            return self.tokenizer.begin + self.tokenizer.encode(prompt)
        return encode_user(self.tokenizer, prompt)

    def data(self, kind, seq_len=0, identity=None, **options):
        """
        kind: a class of data.py; options: of this kind; identity: dict of what else decides on the
        meaning of a step, which a resume must not change -> its train and its val split; val: None
        without --eval_seqs
        """
        cfg = self.cfg
        shape = (
            seq_len or cfg.seq_len,
            self.micro_batch_size,
            self.rank,
            self.world_size,
            self.device,
        )
        train = kind(cfg.data_dir, "train", *shape, seed=cfg.seed, **options)
        self.num_steps, total = count_steps(cfg, train.num_rows)
        val = None
        if cfg.eval_seqs:
            val = kind(cfg.data_dir, "val", *shape, seed=0, **options)
            val.limit(min(cfg.eval_seqs, val.num_rows))
        self.train_data = train.limit(total)
        self.identity = dict(
            kind=self.meta["kind"],
            data=self.meta["data_fingerprint"],
            seed=cfg.seed,
            batch_size=cfg.batch_size,
            seq_len=cfg.seq_len,
            **train.identity,
            **(identity or {}),
        )
        return train, val

    def model(self, new_model):
        """
        new_model: function of a ModelConfig, such as GPT -> the model: random (the same on all
        ranks), or with the weights of --init_from or of the checkpoint that is resumed. UserError
        where these do not fit
        """
        cfg, vocab_size, data = self.cfg, self.meta["vocab_size"], self.train_data
        if self.source:
            old = ModelConfig(**self.source.manifest["model"])
            wanted = build(old, asked(cfg).get("model", {}), "model.")
            config = old.continued(wanted, cfg.seq_len, vocab_size)
            if self.previous and config != old:
                raise UserError(
                    f"--resume: {self.previous.folder} has another --model or a smaller "
                    "--seq_len; use --init_from instead"
                )
        else:
            config = replace(
                cfg.model,
                vocab_size=cfg.model.vocab_size or vocab_size,
                seq_len=cfg.model.seq_len or cfg.seq_len,
            ).resolved()
        config.check_data(vocab_size, cfg.seq_len, data.doc_mask, self.prompts)
        torch.manual_seed(cfg.seed)
        model = new_model(config).to(self.device, getattr(torch, cfg.param_dtype))
        model.activation_checkpointing = cfg.activation_checkpointing
        if self.source:
            self.source.fill(model)
        self.start_step = 0
        if self.previous:
            self.start_step = checkpoint.check_resume(
                self.previous.folder, self.identity, self.num_steps
            )
        self.token_flops = model.flops_per_token(data.mean_context, data.target_frac)
        self.peak_flops = dist.peak_flops(self.device) * self.world_size
        return model

    def optimizer(self, model):
        """-> ShardedOptimizer of --optimizer for what learns in the model"""
        cfg = self.cfg
        groups = optim.parameter_groups(
            model, cfg.optimizer, cfg.weight_decay, cfg.beta1, cfg.beta2
        )
        return ShardedOptimizer(groups, cfg.zero1, loss_scaling=self.dtype == torch.float16)

    def start(self, model, optimizer, **for_estimate):
        """
        Give the optimizer its state when a run is resumed, and make the run directory. With
        --dry_run: print what the run takes and exit (for_estimate: see extras/capacity.py,
        estimate). -> Logger
        """
        cfg, previous = self.cfg, self.previous
        if previous:
            checkpoint.load_optimizer(previous.folder, optimizer)
        if cfg.dry_run:
            from extras.capacity import estimate

            dist.leave(
                estimate(
                    model,
                    optimizer,
                    self.train_data,
                    cfg,
                    self.num_steps,
                    self.autocast,
                    self.token_flops,
                    **for_estimate,
                )
            )
        given = {
            name: asked(cfg).get(name, {}) if isinstance(value, dict) else value
            for name, value in as_dict(cfg).items()
        }
        self.log = Logger(
            cfg.out_dir,
            given,
            self.script,
            cfg.resume,
            self.start_step,
            self.num_steps,
            cfg.log_every,
            cfg.wandb,
            cfg.tensorboard,
        )
        if previous:
            self.log.print_changes(as_dict(cfg), previous.manifest["config"])
        self.log.introduce(
            model.size(),
            optimizer.state_bytes(),
            self.train_data,
            self.source and self.source.folder,
            bool(previous),
        )
        self.router_stats = model.router_stats
        return self.log

    def steps(self, every=1):
        """
        Yield a Step for each update that is left, and one more; a signal makes that the last which
        comes next, among the multiples of `every`.
        """
        cfg = self.cfg
        dist.watch_signals()
        for number in range(self.start_step, self.num_steps + 1):
            end = number == self.num_steps
            stop = number % every == 0 and dist.stop_requested()
            save = end or is_due(number, cfg.save_every) and number > 0
            evaluate = save or is_due(number, cfg.eval_every)  # each save has a val_loss
            fresh = number > self.start_step
            yield Step(number, evaluate, (save or stop) and fresh, end or stop, cfg.seed)
            if end or stop:
                return

    def learning_rate(self, step):
        """-> that of the update after `step`, a pure function of its number"""
        cfg = self.cfg
        return schedule.learning_rate(
            cfg.schedule,
            step.number,
            self.num_steps,
            cfg.lr,
            cfg.lr * cfg.min_lr_frac,
            cfg.warmup_steps,
            cfg.initial_lr,
            cfg.restart_steps,
            cfg.restart_mul,
            cfg.wsd_decay_frac,
        )

    def evaluated(self, step, text, **values):
        """Record and print what an evaluation gave"""
        self.log.metrics(step.number, **values)
        self.log.print(f"step {step.number}/{self.num_steps} | {text}")

    def sample(self, step, model):
        """
        Continue or answer the eval prompts, into samples.jsonl; the training random state is left
        alone
        """
        chat = self.meta["kind"] != "text"
        for i, (prompt, ids) in enumerate(zip(self.cfg.eval_prompts, self.prompts)):
            seed = step.number * 1000 + i
            reply = list(sampling.stream_tokens(model, self.tokenizer, ids, seed=seed))
            text = self.tokenizer.decode(reply, show_special=chat, continues=not chat and bool(ids))
            self.log.sample(step.number, prompt, text, between="\n" if chat else "")

    def save(self, step, model, optimizer, val_loss=None, files=None, **more):
        """
        Write a checkpoint. files: {name: bytes} to lie in it; more: plain values for its manifest
        """
        info = dict(
            model.describe(),
            config=as_dict(self.cfg),
            identity=self.identity,
            fingerprint=self.tokenizer.fingerprint,
            **more,
        )
        checkpoint.save(
            self.cfg.out_dir,
            step.number,
            model,
            optimizer,
            info,
            self.tokenizer.files() | (files or {}),
            self.cfg.keep_last,
            val_loss if step.evaluate else None,
            last=step.last,
        )

    def record(self, step, n_tokens, also=None, seconds=None, **values):
        """
        Record the update just made. n_tokens: of the whole step, all ranks; values: loss, lr,
        grad_norm and what else to print; also: what to record only; seconds: default, since
        step.start(). UserError after --max_bad_steps in a row without a finite loss and norm
        """
        self.log.train_step(
            step.number,
            int(n_tokens),
            seconds or step.lap(),
            self.token_flops,
            self.peak_flops,
            {**(also or {}), **self.router_stats()},
            **values,
        )
        finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        self.skipped = self.log.count_skipped(
            step.number, finite, self.skipped, self.cfg.max_bad_steps
        )


def is_due(number, every):
    return every > 0 and number % every == 0


def count_steps(cfg, num_rows):
    """
    -> number of updates, number of rows that the run may use (inf = no end); num_rows: of an epoch
    """
    num_steps, total = cfg.num_steps, math.inf
    if cfg.num_epochs:
        total = round(cfg.num_epochs * num_rows)
        num_steps = -(-total // cfg.batch_size)
    if total < 1:
        raise UserError(f"--num_epochs={cfg.num_epochs}: not one of {num_rows} sequences")
    if cfg.warmup_steps >= num_steps and dist.world()[0] == 0:
        print(
            f"note: --warmup_steps={cfg.warmup_steps} in a run of {num_steps} steps: lr never gets "
            f"to {cfg.lr:g}; try --warmup_steps={num_steps // 10}",
            flush=True,
        )
    return num_steps, total
