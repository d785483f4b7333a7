"""
Pretraining: next-token cross-entropy on a memory-mapped token set.

    python train_pretrain.py configs/shakespeare_cpu.py                          # one CPU or GPU
    torchrun --standalone --nproc_per_node=8 train_pretrain.py configs/gpt2_124m.py --zero1=true

Reads   data_dir, made by `python data/prepare.py text ...`; with init_from, what to start from
Writes  out_dir/{config.json, code/, metrics.jsonl, samples.jsonl, step_NNNNNN/}
Expect  configs/shakespeare_cpu.py: the validation loss in docs/results.md
"""

import math
from dataclasses import dataclass

import torch

from common import dist, losses
from common.config import parse_config
from common.data import TokenData
from common.model import GPT
from common.run import RunConfig, begin

# -----------------------------------------------------------------------------
# config: these, and the options of every stage in common/run.py; --help prints all


# fmt: off
@dataclass(frozen=True)
class Config(RunConfig):
    data_dir: str = "out/data"         # token set made by data/prepare.py text
    out_dir: str = "out/pretrain"      # run directory, must be new or empty unless resume
    batch_size: int = 64               # sequences per step, over all ranks and micro-batches
    num_steps: int = 2000              # updates, unless num_epochs is set
    # text
    doc_mask: bool = False             # attend and count positions within each document only
    critical_ids: tuple[int, ...] = ()  # target ids with a weight of their own in the loss
    critical_alpha: float = 1.0        # that weight
# fmt: on


@torch.no_grad()
def evaluate(model, data, autocast):
    """-> validation loss per token, bits per byte; over all ranks"""
    model.eval()
    total = torch.zeros(3, device=data.device)  # nll sum, targets, bytes of the targets
    for i in range(data.num_batches):
        batch = data.batch(i)
        with autocast:
            hidden = model(batch.tokens, batch.docs)
            nll_sum = losses.linear_cross_entropy(hidden, model.head, batch.targets, batch.mask)
        n_bytes = (data.token_bytes[batch.targets] * batch.mask).sum()
        total += torch.stack([nll_sum, batch.mask.sum(), n_bytes])
    model.train()
    nll_sum, n_tokens, n_bytes = dist.all_sum(total).tolist()
    return nll_sum / n_tokens, nll_sum / math.log(2) / n_bytes


if __name__ == "__main__":
    cfg = parse_config(Config)
    run = begin(cfg, __file__)
    train_data, val_data = run.data(
        TokenData,
        doc_mask=cfg.doc_mask,
        critical_ids=cfg.critical_ids,
        critical_alpha=cfg.critical_alpha,
    )
    model = run.model(GPT)
    optimizer = run.optimizer(model)
    run.start(model, optimizer)
    forward = torch.compile(model) if cfg.compile else model  # forward() trains only
    n_tokens = cfg.batch_size * cfg.seq_len

    val_loss = None
    for step in run.steps():
        if step.evaluate and val_data:
            val_loss, bits_per_byte = evaluate(model, val_data, run.autocast)
            run.evaluated(
                step,
                f"val loss {val_loss:.4f} | {bits_per_byte:.3f} bits per byte",
                val_loss=val_loss,
                val_bits_per_byte=bits_per_byte,
            )
        if step.evaluate:
            run.sample(step, model)
        if step.save:
            run.save(step, model, optimizer, val_loss)
        if step.last:
            break

        step.start()
        first = step.number * run.num_micro
        micro_batches = [train_data.batch(first + i) for i in range(run.num_micro)]
        # of this whole step, over all micro-batches and ranks
        n_targets = dist.all_sum(sum(batch.n_targets for batch in micro_batches))
        step_loss = torch.zeros((), device=run.device)
        for i, batch in enumerate(micro_batches):
            # gradients travel during the last backward
            optimizer.sync = i == run.num_micro - 1
            with run.autocast:
                hidden = forward(batch.tokens, batch.docs)  # (B, T, C)
                loss_sum = losses.linear_cross_entropy(
                    hidden, model.head, batch.targets, batch.mask, batch.weight
                )
            loss = loss_sum / n_targets.clamp(min=1)  # divide once, by the global count
            ((loss + model.balance_loss() / n_tokens) * optimizer.loss_scale).backward()
            step_loss += loss.detach()

        step_loss = dist.all_sum(step_loss).item()
        optimizer.lr = run.learning_rate(step)
        # clip by the global norm, update, gather
        grad_norm = optimizer.step(cfg.grad_clip, apply=math.isfinite(step_loss))
        run.record(step, n_tokens, loss=step_loss, lr=optimizer.lr, grad_norm=grad_norm)
    dist.finish()
