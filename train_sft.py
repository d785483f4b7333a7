"""
Supervised fine-tuning: cross-entropy on what the assistant says, in conversations, with images or
without, packed without padding.

    python train_sft.py --data_dir=out/chat --init_from=out/pretrain             # one CPU or GPU
    torchrun --standalone --nproc_per_node=8 train_sft.py --data_dir=out/chat
    --init_from=out/pretrain

Reads   data_dir, made by `python data/prepare.py chat ...` or `images ...`; init_from, what to
        start from
Writes  out_dir/{config.json, code/, metrics.jsonl, samples.jsonl, step_NNNNNN/}
Expect  `make demo`: how often its model meets requests for a line, in docs/results.md
"""

import math
from dataclasses import dataclass, field

import torch

from common import dist, losses
from common.config import parse_config
from common.data import ChatData
from common.model import GPT
from common.run import RunConfig, begin

# -----------------------------------------------------------------------------
# config: these, and the options of every stage in common/run.py; --help prints all


# fmt: off
@dataclass(frozen=True)
class Config(RunConfig):
    data_dir: str = "out/chat"         # conversations prepared by data/prepare.py chat or images
    out_dir: str = "out/sft"           # run directory, must be new or empty unless resume
    lr: float = 3e-4                   # learning rate after the warm-up
    # conversations
    mask_prompt: bool = True           # learn the assistant's words only; false: every token
    critical_ids: tuple[int, ...] = ()  # target ids with a weight of their own in the loss
    critical_alpha: float = 1.0        # that weight
    # images: for a set that has some
    freeze_llm: bool = False  # the language model stays as it is: tower and projector learn
    freeze_tower: bool = False         # the tower stays as it is
    vision: dict = field(default_factory=dict)  # --vision.NAME=...: see extras/images.py
# fmt: on


@torch.no_grad()
def evaluate(model, data, autocast):
    """-> validation loss per target; over all ranks"""
    model.eval()
    total = torch.zeros(2, device=data.device)  # nll sum, targets
    for i in range(data.num_batches):
        batch = data.batch(i)
        with autocast:
            hidden = model(batch.tokens, batch.docs, **batch.inputs)
            nll_sum = losses.linear_cross_entropy(hidden, model.head, batch.targets, batch.mask)
        total += torch.stack([nll_sum, batch.mask.sum()])
    model.train()
    nll_sum, n_targets = dist.all_sum(total).tolist()
    return nll_sum / n_targets


if __name__ == "__main__":
    cfg = parse_config(Config)
    run = begin(cfg, __file__)
    Data, new_model = ChatData, GPT
    if "images" in run.meta or cfg.freeze_llm or cfg.freeze_tower or cfg.vision:
        from extras import images

        Data, new_model = images.ImageData, images.new_model(run)
    train_data, val_data = run.data(
        Data,
        mask_prompt=cfg.mask_prompt,
        critical_ids=cfg.critical_ids,
        critical_alpha=cfg.critical_alpha,
    )
    model = run.model(new_model)
    optimizer = run.optimizer(model)
    run.start(model, optimizer)
    forward = torch.compile(model) if cfg.compile else model  # forward() trains only

    val_loss = None
    for step in run.steps():
        if step.evaluate and val_data:
            val_loss = evaluate(model, val_data, run.autocast)
            run.evaluated(step, f"val loss {val_loss:.4f}", val_loss=val_loss)
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
        n_tokens = dist.all_sum(sum((b.tokens != run.tokenizer.pad).sum() for b in micro_batches))
        step_loss = torch.zeros((), device=run.device)
        for i, batch in enumerate(micro_batches):
            # gradients travel during the last backward
            optimizer.sync = i == run.num_micro - 1
            with run.autocast:
                hidden = forward(batch.tokens, batch.docs, **batch.inputs)  # (B, T, C)
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
