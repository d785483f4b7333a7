"""
Direct preference optimization and its family: raise chosen answers' log-probs over rejected ones'.
The reference is the policy as training started, after a resume too; a prompt is computed once for
both answers.

    python train_dpo.py --data_dir=out/pairs --init_from=out/sft                 # one CPU or GPU
    torchrun --standalone --nproc_per_node=8 train_dpo.py --data_dir=out/pairs --init_from=out/sft

Reads   data_dir, made by `python data/prepare.py pairs ...`; init_from, what to start from
Writes  out_dir/{config.json, code/, metrics.jsonl, step_NNNNNN/}, ref_logps.bin: the reference's
        log-probs
Expect  `make demo`: accuracy on held-out pairs, in docs/results.md
"""

import copy
import json
import math
import os
from dataclasses import asdict, dataclass
from typing import Literal

import numpy as np
import torch

from common import checkpoint, dist, losses
from common.config import parse_config
from common.data import PairData
from common.errors import UserError
from common.model import GPT
from common.run import RunConfig, begin

# -----------------------------------------------------------------------------
# config: these, and the options of every stage in common/run.py; --help prints all


# fmt: off
@dataclass(frozen=True)
class Config(RunConfig):
    data_dir: str = "out/pairs"        # pairs of answers prepared by data/prepare.py pairs
    out_dir: str = "out/dpo"           # run directory, must be new or empty unless resume
    batch_size: int = 32               # pairs per step, over all ranks and micro-batches
    seq_len: int = 512                 # tokens of a prompt and one answer at most
    lr: float = 1e-5                   # learning rate after the warm-up
    # preferences
    loss: Literal["sigmoid", "ipo", "hinge", "simpo", "orpo"] = "sigmoid"  # see common/losses.py
    beta: float = 0.1  # pull to the reference; simpo: reward scale, try 2; orpo: weight
    label_smoothing: float = 0.0       # sigmoid: share of pairs that may be the wrong way round
    gamma: float = 0.5                 # simpo: margin between the answers' rewards
    nll_coef: float = 0.0              # adds this much of the chosen answers' cross-entropy
    ref_online: bool = False           # keep a second model and ask it each time, not once before
    critical_ids: tuple[int, ...] = ()  # target ids with a weight of their own in the nll_coef term
    critical_alpha: float = 1.0        # that weight
# fmt: on


def answer_logps(model, pairs):
    """-> log-probs (N,) of the answers' learned tokens"""
    hidden = model(pairs.tokens, pairs.docs, branch=pairs.branch)[pairs.mask]  # (N, C)
    return losses.token_logps(hidden, model.head, pairs.targets[pairs.mask])


def preference(logps, pairs, ref, weights, cfg):
    """
    logps (N,) of the policy; ref (P, 2) summed log-probs, or None; weights (N,) of critical tokens,
    or None
    -> loss (P,), dict of metrics (P,)
    """
    weights = torch.ones_like(logps) if weights is None else weights
    sums = pairs.per_answer(logps)  # (P, 2)
    lengths = pairs.per_answer(torch.ones_like(logps)).clamp(min=1)
    means = sums / lengths
    if cfg.loss == "simpo":
        loss, rewards = losses.simpo_loss(*means.T, cfg.beta, cfg.gamma), cfg.beta * means
    elif cfg.loss == "orpo":
        loss, rewards = losses.orpo_loss(*means.T, cfg.beta), cfg.beta * means
    else:
        loss = losses.dpo_loss(*sums.T, *ref.T, cfg.beta, cfg.label_smoothing, cfg.loss)
        rewards = cfg.beta * (sums - ref)
    # cross-entropy of the chosen answer, divided by its length (RPO, 2404.19733 eq. 1)
    nll = pairs.per_answer(logps * weights) / pairs.per_answer(weights).clamp(min=1e-6)
    nll = -nll[:, 0]
    loss = loss + cfg.nll_coef * nll
    names = "reward_chosen", "reward_rejected", "logps_chosen", "logps_rejected"
    metrics = dict(zip(names, torch.cat([rewards, sums], dim=1).detach().T))
    metrics["nll"] = nll.detach()
    metrics["margin"] = metrics["reward_chosen"] - metrics["reward_rejected"]
    # an undecided pair is half right
    metrics["accuracy"] = (metrics["margin"].sign() + 1) / 2
    metrics["ranking"] = ((metrics["logps_chosen"] - metrics["logps_rejected"]).sign() + 1) / 2
    if ref is not None:
        # as if the answers were the reference's samples: KL(reference || policy) per token
        metrics["kl"] = ((ref - sums.detach()) / lengths).mean(dim=1)
    return loss, metrics


@torch.no_grad()
def summed_logps(model, data, autocast):
    """
    -> (pairs of the set, 2) float32: log-probs of all chosen and rejected answers, over all ranks
    """
    model.eval()
    sums, size = torch.zeros(data.num_rows, 2, device=data.device), data.micro_batch_size
    for start in range(data.rank * size, data.num_rows, data.world_size * size):
        ids = np.arange(start, min(start + size, data.num_rows))
        pairs = data.pairs(ids, np.ones(len(ids), dtype=bool))
        with autocast:
            sums[pairs.ids] = pairs.per_answer(answer_logps(model, pairs))
    model.train()
    return dist.all_sum(sums)


@torch.no_grad()
def evaluate(model, data, ref, cfg, autocast):
    """-> dict of the validation loss and metrics, means over the pairs of all ranks"""
    model.eval()
    total = 0.0
    for i in range(data.num_batches):
        pairs = data.batch(i)
        with autocast:
            logps, weights = answer_logps(model, pairs), data.weights(pairs.targets[pairs.mask])
            loss, metrics = preference(logps, pairs, ref("val", pairs), weights, cfg)
        total += (torch.stack([loss, *metrics.values()]) * pairs.valid).sum(dim=1)
    model.train()
    means = (dist.all_sum(total) / data.total).tolist()
    return {f"val_{name}": mean for name, mean in zip(["loss", *metrics], means)}


def initial_policy(run, model, initial_weights):
    """-> a model with the weights that this run began with, however far it is now"""
    cfg = run.cfg
    if not run.previous and not cfg.ref_online:
        return model  # asked before it is trained
    reference = copy.deepcopy(model)
    if not run.previous:
        return reference
    torch.manual_seed(cfg.seed)
    reference.load_state_dict(GPT(model.config).state_dict())
    if cfg.init_from:
        checkpoint.source(cfg.init_from).load(reference)
    if checkpoint.fingerprint(reference) != initial_weights:
        raise UserError(
            f"--init_from={cfg.init_from}: not the weights that this run began with; "
            "its reference needs those again"
        )
    return reference


if __name__ == "__main__":
    cfg = parse_config(Config)
    if cfg.beta <= 0 or cfg.nll_coef < 0 or not 0 <= cfg.label_smoothing < 0.5:
        raise UserError("--beta, --nll_coef, --label_smoothing: expected > 0; >= 0; >= 0 and < 0.5")
    if cfg.label_smoothing and cfg.loss != "sigmoid":
        raise UserError(f"--label_smoothing: only with --loss=sigmoid, not {cfg.loss}")
    run = begin(cfg, __file__)
    train_data, val_data = run.data(
        PairData, critical_ids=cfg.critical_ids, critical_alpha=cfg.critical_alpha
    )
    model = run.model(GPT)
    optimizer = run.optimizer(model)
    forward = torch.compile(model) if cfg.compile else model  # forward() trains only

    # the reference, the initial policy: log-probs that it gave once, or a second model
    if run.previous:
        initial_weights = run.previous.manifest["initial_weights"]
    else:
        initial_weights = checkpoint.fingerprint(model)
    sets = {"train": train_data, "val": val_data} if val_data else {"train": train_data}
    sums_of_sets = {split: run.meta["splits"][split]["sha256"] for split in sets}
    key = json.dumps([initial_weights, asdict(model.config), str(run.dtype), sums_of_sets])
    path = os.path.join(cfg.out_dir, "ref_logps.bin")
    has_reference = cfg.loss not in ("simpo", "orpo")
    reference = arrays = None
    if has_reference and not cfg.ref_online:
        arrays = dist.from_rank_zero(lambda: checkpoint.read_arrays(path, key))
    on_disk = arrays is not None
    if has_reference and not on_disk:
        reference = initial_policy(run, model, initial_weights)
    if reference and not cfg.ref_online and not cfg.dry_run:
        if run.rank == 0:
            n_pairs = sum(data.num_rows for data in sets.values())
            print(f"reference: log-probs of {n_pairs:,} pairs")
        arrays = {
            split: summed_logps(reference, data, run.autocast).cpu().numpy()
            for split, data in sets.items()
        }
        reference = None
    tensors = {
        split: torch.from_numpy(array).to(run.device) for split, array in (arrays or {}).items()
    }

    def ref(split, pairs):
        """-> the reference's summed log-probs (P, 2), None where there is none"""
        if reference:
            with torch.no_grad(), run.autocast:
                return pairs.per_answer(answer_logps(reference, pairs))
        return tensors[split][pairs.ids] if tensors else None

    run.start(model, optimizer, models=[reference] if cfg.ref_online else [])
    if arrays and not on_disk:
        dist.from_rank_zero(lambda: checkpoint.write_arrays(path, key, arrays))

    val_loss = None
    for step in run.steps():
        if step.evaluate and val_data:
            metrics = evaluate(model, val_data, ref, cfg, run.autocast)
            val_loss, accuracy = metrics["val_loss"], metrics["val_accuracy"]
            run.evaluated(step, f"val loss {val_loss:.4f} | accuracy {accuracy:.3f}", **metrics)
        if step.evaluate:
            run.sample(step, model)
        if step.save:
            run.save(step, model, optimizer, val_loss, initial_weights=initial_weights)
        if step.last:
            break

        step.start()
        first = step.number * run.num_micro
        micro_batches = [train_data.batch(first + i) for i in range(run.num_micro)]
        # of this whole step, over all micro-batches and ranks
        n_pairs, n_tokens = dist.all_sum(
            sum(
                torch.stack([pairs.valid.sum(), (pairs.tokens >= 0).sum()])
                for pairs in micro_batches
            )
        )
        step_loss, step_metrics = torch.zeros((), device=run.device), 0.0
        for i, pairs in enumerate(micro_batches):
            # gradients travel during the last backward
            optimizer.sync = i == run.num_micro - 1
            with run.autocast:
                logps = answer_logps(forward, pairs)  # (N,)
                weights = train_data.weights(pairs.targets[pairs.mask])
                pair_loss, metrics = preference(logps, pairs, ref("train", pairs), weights, cfg)
            loss = (pair_loss * pairs.valid).sum() / n_pairs  # divide once, by the global count
            ((loss + model.balance_loss() / n_tokens) * optimizer.loss_scale).backward()
            step_loss += loss.detach()
            step_metrics += (torch.stack([*metrics.values()]) * pairs.valid).sum(dim=1)

        step_loss = dist.all_sum(step_loss).item()
        optimizer.lr = run.learning_rate(step)
        # clip by the global norm, update, gather
        grad_norm = optimizer.step(cfg.grad_clip, apply=math.isfinite(step_loss))
        metrics = dict(zip(metrics, (dist.all_sum(step_metrics) / n_pairs).tolist()))
        shown = {name: metrics.pop(name) for name in ("accuracy", "margin")}
        run.record(
            step, n_tokens, metrics, loss=step_loss, lr=optimizer.lr, grad_norm=grad_norm, **shown
        )
    dist.finish()
