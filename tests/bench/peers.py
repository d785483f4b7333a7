"""
Training steps and rollouts against torch's, transformers' and trl's, with the same weights and the same work,
in turns. `python tests/bench/bench.py` names and explains them.

Needs the packages (requirements-dev.txt).
"""
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as td
from bench import MODEL_26M, alternate, child, pair_step, peak_memory, training_step
from torch.distributed.optim import ZeroRedundancyOptimizer

from common import dist, losses, optim
from common.model import GPT
from common.sampling import SamplingConfig, answer_prompts, complete
from common.zero1 import ShardedOptimizer
from train_grpo import Rollout, answer_logps, learned_rows

P, G, NEW = 4, 8, 64                   # prompts, samples of each, new tokens


def llama(model):
    """-> transformers' model of the same weights"""
    from transformers import LlamaConfig, LlamaForCausalLM
    c = model.config
    peer = LlamaForCausalLM(LlamaConfig(
        vocab_size=c.vocab_size, hidden_size=c.n_embd, intermediate_size=c.d_ff, num_hidden_layers=c.n_layer,
        num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_dim,
        max_position_embeddings=c.seq_len, rms_norm_eps=c.norm_eps, rope_theta=c.rope_theta,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=0))
    weights = {"model.embed_tokens.weight": model.embed.weight, "model.norm.weight": model.norm.weight,
               "lm_head.weight": model.head}
    heads = [n * c.head_dim for n in (c.n_head, c.n_kv_head, c.n_kv_head)]
    for i, block in enumerate(model.blocks):
        q, k, v = block.attn.qkv.weight.split(heads)
        gate, up = block.mlp.gate_up.weight.chunk(2)
        names = {"self_attn.q_proj": q, "self_attn.k_proj": k, "self_attn.v_proj": v,
                 "self_attn.o_proj": block.attn.out.weight, "mlp.gate_proj": gate, "mlp.up_proj": up,
                 "mlp.down_proj": block.mlp.down.weight, "input_layernorm": block.attn_norm.weight,
                 "post_attention_layernorm": block.mlp_norm.weight}
        weights.update({f"model.layers.{i}.{name}.weight": w for name, w in names.items()})
    peer.load_state_dict(weights)
    tokens = torch.randint(0, c.vocab_size, (2, 50))
    with torch.no_grad():
        assert (peer(tokens).logits - model(tokens) @ model.head.T).abs().max() < 1e-4
    return peer.eval()


def their_step(config, B, device="cpu", compile=False):
    """-> function that makes one whole update of transformers' model, on a GPU in bfloat16"""
    torch.manual_seed(0)
    peer = llama(GPT(config)).to(device).train()
    forward = torch.compile(peer) if compile else peer
    adamw = torch.optim.AdamW(peer.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, config.vocab_size, (B, config.seq_len + 1), device=device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def step():
        targets = tokens[:, 1:].contiguous()
        with autocast:
            loss = forward(input_ids=tokens[:, :-1], labels=targets, shift_labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=True)
    return step


def bench_transformers(B=8):
    ours_s, theirs_s = alternate(training_step(MODEL_26M, B)[0], their_step(MODEL_26M, B), repeats=5)
    memory = {who: int(child("transformers", who, B)) / 2**20 for who in ("ours", "theirs")}
    print(f"transformers: step of {B} x {MODEL_26M.seq_len} tokens: LlamaForCausalLM + AdamW(fused=True) "
          f"{theirs_s:.2f} s, ours {ours_s:.2f} s, {theirs_s / ours_s:.2f}x; peak memory of a process "
          f"{memory['theirs']:.0f} -> {memory['ours']:.0f} MiB")


def child_transformers(who, B):
    step = training_step(MODEL_26M, int(B))[0] if who == "ours" else their_step(MODEL_26M, int(B))
    for _ in range(3):
        step()
    print(peak_memory())


def bench_ranks(repeats=7):
    """Two processes of one thread each: ours, replicated and zero1, against two optimizers under DDP"""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    result = subprocess.run([*torchrun, Path(__file__).with_name("bench.py"), "child", "ranks", str(repeats)],
                            capture_output=True, text=True, check=True)
    print(result.stdout.strip())


def child_ranks(repeats):
    dist.init("cpu")
    tokens = torch.randint(0, MODEL_26M.vocab_size, (2, 513))

    def ours(zero1):
        model = GPT(MODEL_26M)
        optimizer = ShardedOptimizer(optim.parameter_groups(model), zero1=zero1)
        optimizer.lr = 1e-4

        def step():
            loss = losses.linear_cross_entropy(model(tokens[:, :-1]), model.head, tokens[:, 1:])
            (loss / (2 * tokens[:, 1:].numel())).backward()
            optimizer.step(1.0)
        return step

    def ddp(zero):
        model = GPT(MODEL_26M)
        wrapped = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        how = dict(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        adamw = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, **how) if zero else \
            torch.optim.AdamW(model.parameters(), **how)

        def step():                                           # the same model and loss
            loss = losses.linear_cross_entropy(wrapped(tokens[:, :-1]), model.head, tokens[:, 1:])
            (loss / tokens[:, 1:].numel()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            adamw.step()
            adamw.zero_grad(set_to_none=False)
        return step
    steps = {"ours": ours(False), "ours, zero1": ours(True), "DDP + AdamW(fused=True)": ddp(False),
             "DDP + ZeroRedundancyOptimizer": ddp(True)}
    times = dict(zip(steps, alternate(*steps.values(), repeats=int(repeats))))
    if td.get_rank() == 0:
        print("ranks: 2 x (2 x 512) tokens a step: " + ", ".join(
            f"{name} {seconds * 1000:.0f} ms" for name, seconds in times.items()))
    dist.finish()


def word_tokenizer():
    """-> transformers' tokenizer of the words w2, w3, ..., an id each"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    names = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, 6400))]
    words = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    assert tokenizer(sentence(range(2, 6400))).input_ids == list(range(2, 6400))
    return tokenizer


def sentence(ids):
    return " ".join(f"w{i}" for i in ids)


def in_turns(make_trainer, config, step, repeats, **options):
    """
    Train with one of trl's trainers; after each of its steps ours is made -> median seconds of ours, of its.
    make_trainer(callbacks, args); options: of the class config beside what they have in common
    """
    from transformers import TrainerCallback
    times = {"ours": [], "theirs": []}

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            times["theirs"].append(time.perf_counter() - self.start)
            start = time.perf_counter()
            step()
            times["ours"].append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        make_trainer([Turns()], config(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            max_steps=repeats + 1, learning_rate=1e-6, logging_strategy="no", save_strategy="no",
            disable_tqdm=True, **options)).train()
    return (statistics.median(times[name][1:]) for name in ("ours", "theirs"))


def bench_sft_step(B=8, T=256, repeats=5):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    torch.manual_seed(0)
    config = replace(MODEL_26M, seq_len=T)
    rows = Dataset.from_dict({"input_ids": torch.randint(2, 6400, (B * (repeats + 1), T)).tolist()})
    ours, theirs = in_turns(
        lambda callbacks, args: SFTTrainer(llama(GPT(config)), args, train_dataset=rows, callbacks=callbacks,
                                           processing_class=word_tokenizer()),
        SFTConfig, training_step(config, B)[0], repeats, per_device_train_batch_size=B, max_length=T)
    print(f"sft_step: {B} x {T} tokens: trl {theirs:.2f} s, ours {ours:.2f} s, {theirs / ours:.2f}x")


def bench_dpo_step(P=4, repeats=5):
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    for prompt, answer in ((128, 128), (256, 64)):
        torch.manual_seed(0)
        ids = torch.randint(2, 6400, (P * (repeats + 1), prompt + 2 * answer)).tolist()
        rows = Dataset.from_list([dict(
            prompt=sentence(row[:prompt]), chosen=" " + sentence(row[prompt:prompt + answer]),
            rejected=" " + sentence(row[prompt + answer:])) for row in ids])
        ours, theirs = in_turns(
            lambda callbacks, args: DPOTrainer(
                llama(GPT(replace(MODEL_26M, seq_len=prompt + answer + 1))), args=args, train_dataset=rows,
                callbacks=callbacks, processing_class=word_tokenizer()),
            DPOConfig, pair_step("shared", prompt, answer, P), repeats, per_device_train_batch_size=P,
            max_length=None, precompute_ref_log_probs=True)
        print(f"dpo_step: {P} pairs of {prompt} + 2 x {answer} tokens: trl {theirs:.2f} s, "
              f"ours {ours:.2f} s, {theirs / ours:.2f}x")


def bench_rollout():
    from transformers import StoppingCriteria

    class Lengths(StoppingCriteria):
        """A row is done once it has so many new tokens, as if it had ended there."""
        def __init__(self, prompt, lengths):
            self.prompt, self.lengths = prompt, torch.tensor(lengths)

        def __call__(self, input_ids, scores, **kwargs):
            return input_ids.shape[1] - self.prompt >= self.lengths
    torch.manual_seed(0)
    model = GPT(MODEL_26M).eval()
    peer = llama(model)
    even, spread = [NEW] * P * G, [8 + 56 * i // (P * G - 1) for i in range(P * G)]
    spread = [spread[i * 13 % (P * G)] for i in range(P * G)]            # of every group, short and long
    for prompt, name, lengths in ((64, "64 each", even), (256, "64 each", even), (256, "8 to 64", spread)):
        prompts = torch.randint(0, 6400, (P, prompt))

        def theirs():
            peer.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=True, top_k=0,
                          temperature=1.0, num_return_sequences=G, max_new_tokens=NEW,
                          stopping_criteria=[Lengths(prompt, lengths)])

        def ours(packed):
            cfg = SamplingConfig(max_new_tokens=NEW, temperature=1.0, packed=packed)
            complete(model, prompts.tolist(), cfg, (), G, room=lengths)
        plain_s, packed_s, peer_s = alternate(lambda: ours(False), lambda: ours(True), theirs, repeats=5)
        print(f"rollout: {P} prompts of {prompt} x {G} samples of {name} tokens: transformers "
              f"{peer_s:.2f} s, fp32 {plain_s:.2f} s, {peer_s / plain_s:.2f}x, packed {packed_s:.2f} s, "
              f"{peer_s / packed_s:.2f}x")


def our_step(model, prompts):
    """-> function that makes one GRPO step, the parts that train_grpo.py has"""
    optimizer = ShardedOptimizer(optim.parameter_groups(model))
    optimizer.lr = 1e-6
    cfg = SamplingConfig(max_new_tokens=NEW, temperature=1.0, packed=True)
    stage = SimpleNamespace(drop_flat_groups=False, mask_truncated=False)

    def step():
        answers = answer_prompts(model, prompts, cfg, (), G)
        rewards = torch.tensor([float(len(set(a.tokens))) for a in answers]).view(P, G)
        valid = torch.ones(P, dtype=torch.bool)
        rows = learned_rows(Rollout(prompts, answers, valid, rewards, rewards[..., None], 0.0), stage,
                            torch.device("cpu"))
        logps = answer_logps(model, rows, cfg)
        now = rows.padded(logps)
        loss = losses.grpo_token_loss(now, now.detach(), None, losses.group_advantages(rewards).flatten(),
                                      rows.padded(torch.ones_like(logps)) > 0)
        (loss.sum(dim=1) / NEW).mean().backward()
        optimizer.step(1.0)
    return step


def bench_grpo_step(repeats=5):
    for prompt in (64, 256):
        ours, theirs = trl_against_ours(prompt, repeats)
        print(f"grpo_step: {P} prompts of {prompt} x {G} samples of {NEW} tokens: trl {theirs:.2f} s, "
              f"ours {ours:.2f} s, {theirs / ours:.2f}x")


def trl_against_ours(prompt, repeats):
    """-> median seconds of our step and of trl's"""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer
    torch.manual_seed(0)
    model = GPT(replace(MODEL_26M, seq_len=prompt + NEW))
    peer, ids = llama(model), torch.randint(2, 6400, (P, prompt)).tolist()
    rows = Dataset.from_dict({"prompt": [sentence(row) for row in ids]})
    return in_turns(
        lambda callbacks, args: GRPOTrainer(
            model=peer, processing_class=word_tokenizer(), train_dataset=rows, callbacks=callbacks, args=args,
            reward_funcs=lambda completions, **_: [float(len(set(text.split()))) for text in completions]),
        GRPOConfig, our_step(model, ids), repeats, per_device_train_batch_size=P * G, num_generations=G,
        max_completion_length=NEW, beta=0.0, temperature=1.0, top_k=0,
        generation_kwargs=dict(min_new_tokens=NEW))
