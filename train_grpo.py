"""
Group relative policy optimization: sample several answers to a prompt, raise those with the better
rewards.

    python train_grpo.py --data_dir=out/prompts --init_from=out/sft --reward=my_rewards.py:good
    torchrun --standalone --nproc_per_node=8 train_grpo.py --data_dir=out/prompts
    --init_from=out/sft ...

Reads   data_dir, made by `python data/prepare.py prompts ...`; init_from, what to start from
Writes  out_dir/{config.json, code/, metrics.jsonl, samples.jsonl, step_NNNNNN/}
"""
import copy
import math
import time
from dataclasses import dataclass
from typing import Literal

import torch

from common import checkpoint, dist, losses
from common.branches import sampled_rows
from common.config import parse_config
from common.data import PromptData
from common.errors import UserError
from common.model import GPT
from common.rewards import load_function, score, summarize
from common.run import RunConfig, begin
from common.sampling import SamplingConfig, answer_prompts, for_vocabulary

# -----------------------------------------------------------------------------
# config: these, and the options of every stage in common/run.py; --help prints all

@dataclass(frozen=True)
class Config(RunConfig):
    data_dir: str = "out/prompts"      # prompts prepared by data/prepare.py prompts
    out_dir: str = "out/grpo"          # run directory, must be new or empty unless resume
    batch_size: int = 16               # prompts per rollout, over all ranks and micro-batches
    seq_len: int = 512                 # tokens of a prompt and its answer at most
    lr: float = 1e-5                   # learning rate after the warm-up
    num_samples: int = 8               # answers to each prompt: its group
    # rollouts and rewards
    reward: tuple[str, ...] = ("common/rewards.py:exact_match",)  # functions, path/to/file.py:name
    reward_weights: tuple[float, ...] = ()  # of the functions; () = 1 each
    max_new_tokens: int = 256          # tokens of an answer at most
    temperature: float = 1.0           # of sampling, and of the log-probs that are learned
    top_k: int = 0                     # sample from the k most likely tokens only; 0 = all
    top_p: float = 1.0                 # sample from the most likely that together reach this
    suppress: tuple[int, ...] = ()     # token ids that are never produced
    packed: bool = False  # x86 CPUs: sample with float16 weights; learn in full precision
    env: str = ""  # path/to/file.py:name, text -> (done, feedback), after each turn
    missing_end_penalty: float = 0.0  # taken off the reward of an answer that is cut
    mask_truncated: bool = False       # leave cut answers out of the loss
    drop_flat_groups: bool = False  # leave groups of equal rewards out of the averages
    # policy gradient
    updates_per_rollout: int = 1       # steps that learn from the same answers
    loss: Literal["clip", "cispo"] = "clip"  # see common/losses.py
    level: Literal["token", "sequence"] = "token"  # ratios of tokens, or of answers (GSPO)
    aggregate: Literal["grpo", "dapo", "dr_grpo"] = "grpo"  # means of answers; tokens; constant
    scale_rewards: Literal["group", "batch", "none"] = "group"  # whose deviation divides advantages
    clip_low: float = 0.2              # ratios below 1 - clip_low gain nothing more
    clip_high: float = 0.2             # ratios above 1 + clip_high gain nothing more
    delta: float = 0.0                 # ratios above it are cut where the advantage is < 0; 0 = off
    beta: float = 0.0                  # weight of the KL divergence from the initial policy
    ref_mix: float = 0.0               # share of the policy mixed into it every ref_every steps
    ref_every: int = 0                 # 0 = the reference stays


@dataclass
class Rollout:
    """Answers to the P prompts of a micro-batch and their rewards, G a prompt: B = P * G."""
    prompts: list                       # P lists of ids
    answers: list                       # B sampling.Answer, group after group
    valid: torch.Tensor                 # (P,) bool: the prompts that count
    rewards: torch.Tensor               # (P, G)
    to_go: torch.Tensor                 # (P, G, T): what of it comes at or after each token
    reward_s: float                     # seconds of scoring


def collect(model, tokenizer, data, i, G, sampling_cfg, rewards, env_step, cfg):
    """-> Rollout of micro-batch i: G answers to each of its prompts"""
    ids, numbers, valid = data.batch(i)
    prompts = [data.prompt(k).tolist() for k in ids]
    answers = answer_prompts(model, prompts, sampling_cfg, tokenizer.ends, G, data.seed, numbers)
    if env_step:
        from extras.environment import continue_turns
        continue_turns(env_step, answers, model, tokenizer, prompts, sampling_cfg, data.seed,
                       numbers)
    start = time.perf_counter()
    texts, pieces = map(list, zip(*(answer.texts(tokenizer) for answer in answers)))
    rows = [data.row(k) for k in ids for _ in range(G)]
    weights = cfg.reward_weights or [1.0] * len(rewards)
    values, to_go = score(rewards, weights, [row["prompt"] for row in rows], texts,
                          [row["answer"] for row in rows], pieces, cfg.max_new_tokens)
    penalty = cfg.missing_end_penalty * torch.tensor([not answer.ended for answer in answers])
    return Rollout(prompts, answers, torch.from_numpy(valid), (values - penalty).view(-1, G),
                   (to_go - penalty[:, None]).view(-1, G, cfg.max_new_tokens),
                   time.perf_counter() - start)


def learned_rows(r, cfg, device):
    """Rollout -> Sampled, where each answer that does not count is no target"""
    groups = r.valid  # (P,)
    if cfg.drop_flat_groups:
        groups = groups & (r.to_go != r.to_go[:, :1]).flatten(1).any(dim=1)
    learn = groups.repeat_interleave(len(r.answers) // len(r.prompts)).tolist()  # (B,)
    if cfg.mask_truncated:
        learn = [keep and answer.ended for keep, answer in zip(learn, r.answers)]
    return sampled_rows(r.prompts, r.answers, learn, device)


def answer_logps(model, rows, sampling_cfg):
    """-> log-probs (N,) of the learned tokens under the distribution that they were sampled from"""
    hidden = model(rows.tokens, rows.docs, branch=rows.branch)[rows.mask]  # (N, C)
    return losses.token_logps(hidden, model.head, rows.targets[rows.mask], sampling_cfg.temperature,
                              suppress=sampling_cfg.suppress, support=rows.support)


def check_options(cfg):
    """UserError where options of this stage are out of range or do not fit each other"""
    updates = cfg.updates_per_rollout
    multiples = cfg.save_every, cfg.num_steps, cfg.eval_every
    if updates < 1 or any(n % updates for n in multiples) or updates > 1 and cfg.num_epochs:
        raise UserError(f"--updates_per_rollout={updates}: at least 1, and --save_every, "
                        "--eval_every and --num_steps (not --num_epochs) must be multiples of it: "
                        "checkpoints hold no rollout")
    if cfg.max_new_tokens >= cfg.seq_len or cfg.temperature <= 0 or cfg.num_samples < 2:
        raise UserError(f"--max_new_tokens={cfg.max_new_tokens} --temperature={cfg.temperature} "
                        f"--num_samples={cfg.num_samples}: expected < --seq_len={cfg.seq_len}, "
                        "> 0, >= 2")
    if cfg.reward_weights and len(cfg.reward_weights) != len(cfg.reward):
        raise UserError(f"--reward_weights: {len(cfg.reward_weights)} for {len(cfg.reward)} "
                        "functions")


if __name__ == "__main__":
    cfg = parse_config(Config)
    check_options(cfg)
    rewards = {name: load_function("reward", name) for name in cfg.reward}
    env_step = load_function("env", cfg.env) if cfg.env else None
    run = begin(cfg, __file__)
    updates, G = cfg.updates_per_rollout, cfg.num_samples
    train_data, val_data = run.data(PromptData, seq_len=cfg.seq_len - cfg.max_new_tokens,
                                    identity=dict(num_samples=G, updates_per_rollout=updates))
    model = run.model(GPT)
    optimizer = run.optimizer(model)
    forward = torch.compile(model) if cfg.compile else model  # forward() trains only
    if model.config.attn_dropout:
        raise UserError("--model.attn_dropout: must be 0, or sampler and update were two policies")
    reference = copy.deepcopy(model).requires_grad_(False) if cfg.beta else None
    if reference and run.previous:
        checkpoint.load_weights(run.previous.folder, reference, "reference.pt")
    # the log-probs are those of the sampler's distribution
    sampling_cfg = SamplingConfig(cfg.max_new_tokens, cfg.suppress, temperature=cfg.temperature,
                                  top_k=cfg.top_k, top_p=cfg.top_p, packed=cfg.packed)
    sampling_cfg = for_vocabulary(sampling_cfg, model, run.tokenizer)

    @torch.no_grad()
    def answers_to(data, i, G):
        with run.autocast:
            return collect(model, run.tokenizer, data, i, G, sampling_cfg, rewards, env_step, cfg)

    log = run.start(model, optimizer, models=[reference], tokens=G * cfg.max_new_tokens,
                    rollouts=run.num_micro / updates, rollout=lambda: answers_to(train_data, 0, G))

    val_loss = None
    for step in run.steps(every=updates):  # checkpoints hold no rollout
        if step.evaluate and val_data:
            rollouts = [answers_to(val_data, i, 1) for i in range(val_data.num_batches)]
            metrics = summarize(rollouts)
            val_loss = -metrics["reward"]
            run.evaluated(step, f"val reward {-val_loss:.4f} | pass@1 {metrics['pass']:.3f}",
                          **{f"val_{name}": value for name, value in metrics.items()})
            if env_step:  # one with all its turns
                whole = rollouts[0].prompts[0] + rollouts[0].answers[0].tokens
                log.sample(step.number, "", run.tokenizer.decode(whole, show_special=True))
        if step.evaluate:
            run.sample(step, model)
        if step.save:
            files = checkpoint.weights_file("reference.pt", reference)
            run.save(step, model, optimizer, val_loss, files)
        if step.last:
            break

        step.start()
        rollout_s = 0.0
        if step.number % updates == 0:
            first = step.number // updates * run.num_micro
            rollouts = [answers_to(train_data, first + i, G) for i in range(run.num_micro)]
            micro_batches = [learned_rows(r, cfg, run.device) for r in rollouts]
            if reference:
                with torch.no_grad(), run.autocast:
                    for rows in micro_batches:
                        rows.ref_logps = answer_logps(reference, rows, sampling_cfg)
            everyone = None
            if cfg.scale_rewards == "batch":
                ours = torch.cat([r.to_go[r.valid] for r in rollouts])  # (P, G, T)
                everyone = torch.cat(dist.gather_objects(ours))
            for r, rows in zip(rollouts, micro_batches):
                advantages = losses.group_advantages(r.to_go, cfg.scale_rewards, everyone)
                rows.advantages = advantages.flatten(0, 1)[rows.index].to(run.device)
            n_answers, n_targets, n_tokens = dist.all_sum(sum(  # of each step, over all ranks
                torch.stack([rows.padded(rows.mask[rows.mask]).any(dim=1).sum(),
                             rows.mask.sum(), (rows.tokens >= 0).sum()])
                for rows in micro_batches)).clamp(min=1)
            rollout_metrics = dict(summarize(rollouts), reward_s=sum(r.reward_s for r in rollouts))
            rollout_s = step.lap()  # rewards are part of it
        denominator = {"grpo": n_answers, "dapo": n_targets,
                       "dr_grpo": n_answers * cfg.max_new_tokens}[cfg.aggregate]
        step_loss, sums = torch.zeros((), device=run.device), torch.zeros(4, device=run.device)
        for i, rows in enumerate(micro_batches):
            # gradients travel during the last backward
            optimizer.sync = i == run.num_micro - 1
            with run.autocast:
                logps = answer_logps(forward, rows, sampling_cfg)  # (N,)
            if rows.old_logps is None:
                rows.old_logps = logps.detach()
            ref = rows.padded(rows.ref_logps) if reference else None  # (B, T), as the next
            now, old, A = map(rows.padded, (logps, rows.old_logps, rows.advantages))
            mask = rows.padded(torch.ones_like(logps)) > 0
            token_loss = losses.grpo_token_loss(now, old, ref, A, mask, cfg.clip_low, cfg.clip_high,
                                                cfg.delta or None, cfg.beta, cfg.level, cfg.loss)
            per_answer = token_loss.sum(dim=1)  # (B,)
            if cfg.aggregate == "grpo":
                per_answer = per_answer / mask.sum(dim=1).clamp(min=1)
            loss = per_answer.sum() / denominator  # divide once, by the global count
            ((loss + model.balance_loss() / n_tokens) * optimizer.loss_scale).backward()
            step_loss += loss.detach()
            logps = logps.detach()
            ratio = (logps - rows.old_logps).exp()
            clipped = (ratio < 1 - cfg.clip_low) | (ratio > 1 + cfg.clip_high)
            kl = torch.zeros_like(step_loss)
            if reference:
                kl = losses.k3(logps, rows.ref_logps).sum()
            mismatch = (rows.old_logps - rows.sampler_logps).abs().sum()
            sums += torch.stack([clipped.sum(), kl, -logps.sum(), mismatch])

        step_loss = dist.all_sum(step_loss).item()
        optimizer.lr = run.learning_rate(step)
        # clip by the global norm, update, gather
        grad_norm = optimizer.step(cfg.grad_clip, apply=math.isfinite(step_loss))
        if reference and cfg.ref_every and (step.number + 1) % cfg.ref_every == 0:
            for theirs, ours in zip(reference.parameters(), model.parameters()):
                theirs.lerp_(ours.detach(), cfg.ref_mix)
        means = (dist.all_sum(sums) / n_targets).tolist()
        also = dict(zip(("clip_frac", "kl", "entropy", "mismatch"), means), **rollout_metrics)
        reward, update_s = also.pop("reward"), step.lap()
        also |= dict(rollout_s=rollout_s, update_s=update_s)
        run.record(step, n_tokens, also, rollout_s + update_s, loss=step_loss, reward=reward,
                   lr=optimizer.lr, grad_norm=grad_norm)
    dist.finish()
