"""
Group relative policy optimization: sample several answers to a prompt, raise those with the better rewards.

    python train_grpo.py --data_dir=out/prompts --init_from=out/sft --reward=my_rewards.py:good
    torchrun --standalone --nproc_per_node=8 train_grpo.py --data_dir=out/prompts --init_from=out/sft ...

Reads   data_dir, made by `python data/prepare.py prompts ...`; init_from, what to start from
Writes  out_dir/{config.json, code/, metrics.jsonl, samples.jsonl, step_NNNNNN/}
"""
import copy
import math
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch

from common import checkpoint, dist, hf, losses, optim, sampling
from common.config import as_asked, as_dict, build, check_batch, count_steps, parse_config, read_overrides
from common.data import Branches, PromptData, branches, read_meta
from common.errors import UserError
from common.estimate import estimate
from common.logger import Logger, Timer, check_run_directory
from common.model import GPT, ModelConfig
from common.rewards import load_function, score, summarize
from common.sampling import SamplingConfig, for_vocabulary, rollout
from common.schedule import learning_rate
from common.tokenizer import encode_user, load_tokenizer
from common.zero1 import ShardedOptimizer

# -----------------------------------------------------------------------------
# config: every field is an option, the comment beside it its help (--help prints them)

@dataclass(frozen=True)
class Config:
    # files
    data_dir: str = "out/prompts"      # prompts prepared by data/prepare.py prompts
    out_dir: str = "out/grpo"          # run directory, must be new or empty unless resume
    init_from: str = ""                # run, checkpoint or Hugging Face folder to start from; "" = random
    resume: bool = False               # continue out_dir from its latest whole checkpoint, if it has one
    dry_run: bool = False              # check all, measure a micro-batch, say what the run takes, and exit
    # batch
    batch_size: int = 16               # prompts per rollout, over all ranks and micro-batches
    micro_batch_size: int = 0          # prompts per forward and rank; lower saves memory; 0 = all at once
    seq_len: int = 512                 # tokens of a prompt and its answer at most
    num_samples: int = 8               # answers to each prompt: its group
    # rollouts and rewards
    reward: tuple[str, ...] = ("common/rewards.py:exact_match",)  # functions, path/to/file.py:name
    reward_weights: tuple[float, ...] = ()  # of the functions; () = 1 each
    max_new_tokens: int = 256          # tokens of an answer at most
    temperature: float = 1.0           # of sampling, and of the log-probs that are learned
    top_k: int = 0                     # sample from the k most likely tokens only; 0 = all
    top_p: float = 1.0                 # sample from the most likely that together reach this; log-probs too
    suppress: tuple[int, ...] = ()     # token ids that are never produced
    packed: bool = False               # x86 CPUs: sample with weights in float16; learn in full precision
    env: str = ""                      # path/to/file.py:name, text -> (done, feedback), asked after each turn
    missing_end_penalty: float = 0.0   # taken off the reward of an answer that max_new_tokens has cut
    mask_truncated: bool = False       # leave cut answers out of the loss
    drop_flat_groups: bool = False     # leave groups whose rewards are all the same out of the averages
    # policy gradient
    updates_per_rollout: int = 1       # steps that learn from the same answers
    loss: Literal["clip", "cispo"] = "clip"  # common/losses.py has the formulas
    level: Literal["token", "sequence"] = "token"  # probability ratios of tokens, or of answers (GSPO)
    aggregate: Literal["grpo", "dapo", "dr_grpo"] = "grpo"  # average over answers' means; tokens; a constant
    scale_rewards: Literal["group", "batch", "none"] = "group"  # what standard deviation divides advantages
    clip_low: float = 0.2              # ratios below 1 - clip_low gain nothing more
    clip_high: float = 0.2             # ratios above 1 + clip_high gain nothing more
    delta: float = 0.0                 # ratios above it are cut where the advantage is negative; 0 = off
    beta: float = 0.0                  # weight of the KL divergence from the reference, the initial policy
    ref_mix: float = 0.0               # share of the policy mixed into the reference every ref_every steps
    ref_every: int = 0                 # 0 = the reference stays
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
    # evaluation, logging, checkpoints
    eval_every: int = 250              # steps; 0 = only at the end
    eval_seqs: int = 256               # validation prompts, answered once each; 0 = no validation
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


def sample_answers(model, tokenizer, data, i, G, sampling_cfg, rewards, env_step, cfg):
    """
    G answers to each of the P prompts of micro-batch i, scored -> dict: prompts, answers (B), lengths (B,) of
    the model's own tokens, ended (B,): not cut, rewards (P, G), to_go (P, G, max_new_tokens): what of a
    reward comes at or after a token, counts (P,): which prompts count, reward_s: seconds of scoring
    """
    ids, places, counts = data.batch(i)
    prompts = [data.prompt(k).tolist() for k in ids]

    def say(text):                                            # after an end token that was sampled
        return tokenizer.markers["end"][1:] + encode_user(tokenizer, text, begin=False)
    answers = rollout(model, tokenizer, prompts, sampling_cfg, G, data.seed, places, env_step, say)
    timer = Timer()
    ended = torch.tensor([a.ended for a in answers])
    texts, pieces = map(list, zip(*(a.texts(tokenizer) for a in answers)))
    rows = [data.row(k) for k in ids for _ in range(G)]
    values, to_go = score(rewards, cfg.reward_weights or [1.0] * len(rewards), [r["prompt"] for r in rows],
                          texts, [r["answer"] for r in rows], pieces, cfg.max_new_tokens)
    penalty = cfg.missing_end_penalty * ~ended                                # (B,)
    return dict(prompts=prompts, answers=answers, lengths=torch.tensor([len(a.logps) for a in answers]),
                ended=ended, counts=torch.from_numpy(counts), rewards=(values - penalty).view(-1, G),
                to_go=(to_go - penalty[:, None]).view(-1, G, cfg.max_new_tokens), reward_s=timer.lap())


def as_branches(episodes, cfg, device):
    """
    The answers of a micro-batch in one row, each group after its prompt, masked where none is learned -> that
    row, and of its N learned tokens: the sampler's log-probs (N,), what it chose from (`token_logps` explains
    kept), and (2, N) which answer it is in and which of the answer's own tokens it is, from 0
    """
    G, learned = cfg.num_samples, episodes["counts"]                          # (P,)
    if cfg.drop_flat_groups:
        learned = learned & (episodes["to_go"] != episodes["to_go"][:, :1]).flatten(1).any(dim=1)
    learned = learned.repeat_interleave(G) & (episodes["ended"] | (not cfg.mask_truncated))         # (B,)
    parts = [(np.array(a.tokens), np.array(a.learned) & bool(keep))
             for a, keep in zip(episodes["answers"], learned)]
    groups = [(np.array(prompt), parts[p * G:(p + 1) * G]) for p, prompt in enumerate(episodes["prompts"])]
    own = [(i, a) for i, a in enumerate(episodes["answers"]) if learned[i]]
    sampled = torch.tensor([logp for _, a in own for logp in a.logps], device=device)
    index = torch.tensor([(i, n) for i, a in own for n in range(len(a.logps))], dtype=torch.int64).view(-1, 2)
    kept = [ids for _, a in own for ids in a.kept] or None
    if kept:
        kept = torch.cat(kept).to(device), torch.tensor([len(ids) for ids in kept], device=device)
    return Branches(*branches(groups, device)), sampled, kept, index.T


def answer_logps(model, rows, kept, sampling_cfg):
    """-> log-probs (N,) of the learned tokens under the distribution that they were sampled from"""
    hidden = model(rows.tokens, rows.docs, branch=rows.branch)[rows.mask]                         # (N, C)
    return losses.token_logps(hidden, model.head, rows.targets[rows.mask], sampling_cfg.temperature,
                              suppress=sampling_cfg.suppress, kept=kept)


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
    # data, rewards
    updates, steps = cfg.updates_per_rollout, (cfg.save_every, cfg.num_steps, cfg.eval_every)
    if updates < 1 or any(number % updates for number in steps) or updates > 1 and cfg.num_epochs:
        raise UserError(f"--updates_per_rollout={updates}: at least 1, and --save_every, --eval_every and "
                        "--num_steps (not --num_epochs) must be multiples of it: checkpoints hold no rollout")
    if cfg.max_new_tokens >= cfg.seq_len or cfg.temperature <= 0 or cfg.num_samples < 2:
        raise UserError(f"--max_new_tokens={cfg.max_new_tokens} --temperature={cfg.temperature} "
                        f"--num_samples={cfg.num_samples}: expected < --seq_len={cfg.seq_len}, > 0, >= 2")
    rewards = {name: load_function("reward", name) for name in cfg.reward}
    env_step = load_function("env", cfg.env) if cfg.env else None
    if cfg.reward_weights and len(cfg.reward_weights) != len(rewards):
        raise UserError(f"--reward_weights: {len(cfg.reward_weights)} for {len(rewards)} functions")

    def load(split, seed):
        return PromptData(cfg.data_dir, split, cfg.seq_len - cfg.max_new_tokens, micro_batch_size, rank,
                          world_size, device, seed)
    new_model = GPT                                                           # ModelConfig -> the model
    train_data, val_data = load("train", cfg.seed), load("val", 0) if cfg.eval_seqs else None
    train_data.view = dict(num_samples=cfg.num_samples, updates_per_rollout=updates)
    eval_prompts = [encode_user(tokenizer, prompt) for prompt in cfg.eval_prompts]

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
    # sampler, reference
    if model_config.attn_dropout:
        raise UserError("--model.attn_dropout: must be 0, or sampler and update were two policies")
    reference = copy.deepcopy(model).requires_grad_(False) if cfg.beta else None
    if reference and previous:
        checkpoint.load_weights(previous, reference, "reference.pt")
    sampling_cfg = for_vocabulary(SamplingConfig(                             # in the log-probs too
        cfg.max_new_tokens, cfg.suppress, temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p,
        packed=cfg.packed), model, tokenizer)

    def answers_to(data, i, G):
        with torch.no_grad(), autocast:
            return sample_answers(model, tokenizer, data, i, G, sampling_cfg, rewards, env_step, cfg)
    beside = dict(models=[reference], tokens=cfg.num_samples * cfg.max_new_tokens,
                  rollouts=num_micro / updates, rollout=lambda: answers_to(train_data, 0, cfg.num_samples))

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
        stop = step % updates == 0 and dist.stop_requested()
        save_now = last_step or (cfg.save_every and step and step % cfg.save_every == 0)
        eval_now = save_now or (cfg.eval_every and step % cfg.eval_every == 0)  # each save has a val_loss

        if eval_now and val_data:
            batches = range(-(-val_data.total // (micro_batch_size * world_size)))
            metrics = summarize(answered := [answers_to(val_data, i, 1) for i in batches])
            val_loss = -metrics["reward"]
            log.metrics(step, **{f"val_{name}": value for name, value in metrics.items()})
            log.print(f"step {step}/{num_steps} | val reward {-val_loss:.4f} | pass@1 {metrics['pass']:.3f}")
            if env_step:                                                      # one with all its turns
                whole = answered[0]["prompts"][0] + answered[0]["answers"][0].tokens
                log.sample(step, "", tokenizer.decode(whole, show_special=True))
        if eval_now:
            for i, (prompt, ids) in enumerate(zip(cfg.eval_prompts, eval_prompts)):
                reply = list(sampling.stream_tokens(model, tokenizer, ids, seed=step * 1000 + i))
                log.sample(step, prompt, tokenizer.decode(reply, show_special=True), between="\n")
        if (save_now or stop) and step > start_step:
            info = dict(model=asdict(model_config), config=as_dict(cfg), identity=identity,
                        fingerprint=tokenizer.fingerprint)
            files = tokenizer.files() | checkpoint.weights_file("reference.pt", reference)
            checkpoint.save(cfg.out_dir, step, model, optimizer, info, files, cfg.keep_last,
                            val_loss if save_now else None, last=last_step or stop)
        if last_step or stop:
            break

        timer = Timer()
        dist.seed(cfg.seed, step)                                             # dropout follows from the step
        rollout_s, first = 0.0, step // updates * num_micro
        if step % updates == 0:
            episodes = [answers_to(train_data, first + i, cfg.num_samples) for i in range(num_micro)]
            with torch.no_grad(), autocast:
                rows, sampled, kept, index = zip(*(as_branches(e, cfg, device) for e in episodes))
                old_logps = [None] * num_micro                                # the first update's own
                ref_logps = [reference and answer_logps(reference, *x, sampling_cfg) for x in zip(rows, kept)]
            ours = torch.cat([e["to_go"][e["counts"]] for e in episodes])     # (P, G, T)
            everyone = torch.cat(dist.gather_objects(ours)) if cfg.scale_rewards == "batch" else None
            advantages = [losses.group_advantages(e["to_go"], cfg.scale_rewards, everyone) for e in episodes]
            advantages = [a.flatten(0, 1)[tuple(which)].to(device) for a, which in zip(advantages, index)]
            n_answers, n_targets, n_tokens = dist.all_sum(sum(                # of each step, all ranks
                torch.stack([r.padded(r.mask[r.mask]).any(dim=1).sum(), r.mask.sum(), (r.tokens >= 0).sum()])
                for r in rows)).clamp(min=1)
            rollout_metrics = {**summarize(episodes), "reward_s": sum(e["reward_s"] for e in episodes)}
            rollout_s = timer.lap()                                           # rewards are part of it
        step_loss, sums = torch.zeros((), device=device), torch.zeros(4, device=device)
        for i, r in enumerate(rows):
            optimizer.sync = i == num_micro - 1                               # travel in the last backward
            with autocast:
                logps = answer_logps(forward, r, kept[i], sampling_cfg)       # (N,)
            old_logps[i] = logps.detach() if old_logps[i] is None else old_logps[i]
            now, old, ref, A = (None if x is None else r.padded(x)            # (B, T) each
                                for x in (logps, old_logps[i], ref_logps[i], advantages[i]))
            mask = r.padded(torch.ones_like(logps)) > 0                       # (B, T)
            token_loss = losses.grpo_token_loss(now, old, ref, A, mask, cfg.clip_low, cfg.clip_high,
                                                cfg.delta or None, cfg.beta, cfg.level, cfg.loss)  # (B, T)
            per_answer = token_loss.sum(dim=1)                                # (B,)
            if cfg.aggregate == "grpo":
                per_answer = per_answer / mask.sum(dim=1).clamp(min=1)
            count = {"grpo": n_answers, "dapo": n_targets, "dr_grpo": n_answers * cfg.max_new_tokens}
            loss = per_answer.sum() / count[cfg.aggregate]                    # divide once, by the full count
            ((loss + model.balance_loss() / n_tokens) * optimizer.loss_scale).backward()
            step_loss += loss.detach()
            ratio = (logps.detach() - old_logps[i]).exp()
            kl = losses.k3(logps.detach(), ref_logps[i]) if reference else torch.zeros(1, device=device)
            sums += torch.stack([((ratio < 1 - cfg.clip_low) | (ratio > 1 + cfg.clip_high)).sum(), kl.sum(),
                                 -logps.detach().sum(), (old_logps[i] - sampled[i]).abs().sum()])

        step_loss = dist.all_sum(step_loss).item()
        optimizer.lr = learning_rate(cfg.schedule, step, num_steps, cfg.lr, cfg.lr * cfg.min_lr_frac,
                                     cfg.warmup_steps, cfg.initial_lr, cfg.restart_steps, cfg.restart_mul,
                                     cfg.wsd_decay_frac)
        grad_norm = optimizer.step(cfg.grad_clip, apply=math.isfinite(step_loss))  # clip, update, gather
        if reference and cfg.ref_every and (step + 1) % cfg.ref_every == 0:
            for theirs, ours in zip(reference.parameters(), model.parameters()):
                theirs.lerp_(ours.detach(), cfg.ref_mix)
        means = (dist.all_sum(sums) / n_targets).tolist()
        also = dict(zip(("clip_frac", "kl", "entropy", "mismatch"), means), **rollout_metrics,
                    rollout_s=rollout_s, update_s=timer.lap(), **model.router_stats())
        log.train_step(step, n_tokens.item(), rollout_s + also["update_s"], token_flops, peak_flops, also,
                       loss=step_loss, reward=also.pop("reward"), lr=optimizer.lr, grad_norm=grad_norm)
        skipped = log.count_skipped(step, math.isfinite(grad_norm) and math.isfinite(step_loss), skipped,
                                    cfg.max_bad_steps)
    dist.finish()
