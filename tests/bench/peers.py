"""
Rollouts and whole GRPO steps against transformers and trl, with the same weights and the same work, in turns.

Needs both (requirements-dev.txt). python tests/bench/bench.py rollout grpo_step
"""
import statistics
import tempfile
import time
from dataclasses import replace
from types import SimpleNamespace

import torch
from bench import MODEL_26M, alternate

from common import losses, optim
from common.model import GPT
from common.sampling import SamplingConfig, complete, rollout
from common.zero1 import ShardedOptimizer
from train_grpo import answer_logps, as_branches

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
            complete(model, prompts.tolist(), cfg, None, G, room=lengths)
        plain_s, packed_s, peer_s = alternate(lambda: ours(False), lambda: ours(True), theirs, repeats=5)
        print(f"rollout: {P} prompts of {prompt} x {G} samples of {name} tokens: transformers "
              f"{peer_s:.2f} s, fp32 {plain_s:.2f} s, {peer_s / plain_s:.2f}x, packed {packed_s:.2f} s, "
              f"{peer_s / packed_s:.2f}x")


def our_step(model, prompts):
    """-> function that makes one GRPO step, the parts that train_grpo.py has"""
    optimizer = ShardedOptimizer(optim.parameter_groups(model))
    optimizer.lr = 1e-6
    cfg = SamplingConfig(max_new_tokens=NEW, temperature=1.0, packed=True)
    stage = SimpleNamespace(num_samples=G, drop_flat_groups=False, mask_truncated=False)

    def step():
        answers = rollout(model, SimpleNamespace(end=None), prompts, cfg, G)
        rewards = torch.tensor([float(len(set(a.tokens))) for a in answers]).view(P, G)
        rows, _, kept, index = as_branches(
            dict(prompts=prompts, answers=answers, counts=torch.ones(P, dtype=torch.bool), rewards=rewards,
                 ended=torch.ones(P * G, dtype=torch.bool)), stage, torch.device("cpu"))
        logps = answer_logps(model, rows, kept, cfg)
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
    """-> median seconds of our step and of trl's; ours is made after each of its steps"""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    torch.manual_seed(0)
    model = GPT(replace(MODEL_26M, seq_len=prompt + NEW))
    peer = llama(model)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(6400)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w1")
    ids = torch.randint(2, 6400, (P, prompt))
    rows = Dataset.from_dict({"prompt": [" ".join(f"w{i}" for i in row) for row in ids.tolist()]})
    step, times = our_step(model, ids.tolist()), {"ours": [], "theirs": []}

    class Turns(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            self.start = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            times["theirs"].append(time.perf_counter() - self.start)
            start = time.perf_counter()
            step()
            times["ours"].append(time.perf_counter() - start)
    with tempfile.TemporaryDirectory() as folder:
        GRPOTrainer(
            model=peer, processing_class=tokenizer, train_dataset=rows, callbacks=[Turns()],
            reward_funcs=lambda completions, **_: [float(len(set(text.split()))) for text in completions],
            args=GRPOConfig(
                output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
                per_device_train_batch_size=P * G, num_generations=G, max_completion_length=NEW, beta=0.0,
                max_steps=repeats + 1, learning_rate=1e-6, logging_strategy="no", save_strategy="no",
                disable_tqdm=True, temperature=1.0, top_k=0,
                generation_kwargs=dict(min_new_tokens=NEW))).train()
    return (statistics.median(times[name][1:]) for name in ("ours", "theirs"))
