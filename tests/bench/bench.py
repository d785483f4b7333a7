"""
Speed and memory as ratios against named references, both measured in the same run, alternating, median of 7.

    make bench                                  # all; or: python tests/bench/bench.py NAME [NAME ...]

    step_26m, step_384     FLOP/s of a training step as a fraction of a large matrix product's
    moe                    a training step with 8 experts, 2 active, against the dense model of as many active
                           parameters, and with 32 experts
    profile                where the time of those steps goes
    loss_128, loss_512     linear_cross_entropy against plain logits + F.cross_entropy, V = 50,304
    chunked                cross-entropy in plain PyTorch through losses.chunked against
                           linear_cross_entropy, which is made by hand
    kd                     linear_kd_loss against plain logits of both models, cross_entropy and kd_loss,
                           V = 151,936, 1024 tokens
    packing                target tokens a second of packed conversations against padded ones; needs the set
                           out/gsm8k (README, "Results", says how to make it)
    pairs                  a DPO step on prompt | chosen | rejected against two rows a pair, and its memory
    loader                 seconds of a batch against a step
    optimizer              one rank's ShardedOptimizer against clip_grad_norm_ + torch.optim.AdamW(fused=True)
    malloc                 a training step with and without the allocator setting of dist.tune_malloc
    generate               128 tokens with the KV cache against the whole context again for each, context 512
    transformers           a training step, and its memory, against transformers' LlamaForCausalLM
    rollout                sampling for GRPO against transformers.generate, with the same weights
    sft_step, dpo_step, grpo_step    whole steps against those of trl's trainers
    ranks                  a step of two ranks against DistributedDataParallel and ZeroRedundancyOptimizer
    overlap                two ranks: how much of the gradients' travel lies inside backward

The machine must be otherwise idle. Absolute times do not travel between machines; ratios nearly do. On a GPU:
gpu.py.
"""
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common import dist, losses, optim  # noqa: E402  (the root must be on the path first)
from common.data import ChatData, TokenData  # noqa: E402
from common.model import GPT, ModelConfig  # noqa: E402
from common.sampling import SamplingConfig, complete  # noqa: E402
from common.zero1 import ShardedOptimizer  # noqa: E402

MODEL_26M = ModelConfig(vocab_size=6400, n_layer=8, n_head=8, n_kv_head=2, n_embd=512, d_ff=1408, seq_len=512)
MODEL_384 = ModelConfig(vocab_size=320, n_layer=6, n_head=6, n_embd=384, seq_len=256)


def alternate(*functions, repeats=7):
    """Median seconds of each function; they take turns, after one untimed turn each."""
    times = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, kept in zip(functions, times):
            start = time.perf_counter()
            function()
            if turn:
                kept.append(time.perf_counter() - start)
    return [statistics.median(kept) for kept in times]


def training_step(config, B, device="cpu", compile=False, docs=None):
    """-> (function that makes one whole update, on a GPU in bfloat16, its FLOPs)"""
    torch.manual_seed(0)
    model, T = GPT(config).to(device), config.seq_len
    forward = torch.compile(model) if compile else model
    optimizer = ShardedOptimizer(optim.parameter_groups(model))
    optimizer.lr = 1e-4
    tokens = torch.randint(0, config.vocab_size, (B, T + 1), device=device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def step():
        with autocast:
            loss = losses.linear_cross_entropy(forward(tokens[:, :-1], docs), model.head, tokens[:, 1:])
        ((loss + model.balance_loss()) / (B * T)).backward()
        optimizer.step(1.0)
    return step, B * T * model.flops_per_token(T)


def gemm(n=2048):
    a, b, out = torch.randn(n, n), torch.randn(n, n), torch.empty(n, n)
    return lambda: torch.mm(a, b, out=out), 2 * n**3


def bench_step(name, config, B):
    step, step_flops = training_step(config, B)
    product, product_flops = gemm()
    # a product before and after each step: the machine's speed drifts
    step_s, product_s = alternate(step, lambda: [product() for _ in range(8)])
    peak = 8 * product_flops / product_s
    print(f"{name}: {step_s:.3f} s a step, {step_flops / step_s / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s = "
          f"{step_flops / step_s / peak:.1%} of the matrix product's "
          f"(fp32, {torch.get_num_threads()} threads)")


def bench_moe(B=4):
    configs = [MODEL_26M, replace(MODEL_26M, n_expert=8), replace(MODEL_26M, n_expert=32)]
    times = alternate(*(training_step(config, B)[0] for config in configs))
    for config, seconds in zip(configs, times):
        print(f"moe: {config.n_expert or 'no'} experts, {GPT(config).size()}: {seconds:.2f} s a step of "
              f"{B} x {config.seq_len} tokens, {seconds / times[0]:.2f}x")


def bench_profile():
    for name, config, B in (("26m", MODEL_26M, 8), ("384", MODEL_384, 16)):
        step, _ = training_step(config, B)
        step()
        with torch.profiler.profile() as profile:
            step()
        times = {"matrix products": 0.0, "attention": 0.0, "element-wise and the rest": 0.0}
        for event in profile.key_averages():
            kind = "matrix products" if event.key in ("aten::mm", "aten::addmm_") else \
                "attention" if "attention" in event.key else "element-wise and the rest"
            times[kind] += event.self_cpu_time_total
        print(f"profile {name}: " + ", ".join(f"{k} {v / sum(times.values()):.1%}" for k, v in times.items()))


def loss_inputs(C, N, V=50304):
    torch.manual_seed(0)
    return (torch.randn(N, C, requires_grad=True), (torch.randn(V, C) * 0.02).requires_grad_(),
            torch.randint(0, V, (N,)))


def plain_cross_entropy(hidden, weight, targets):
    return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")


def bench_loss(name, C, N):
    memory = {kind: int(child("memory", kind, C, N)) for kind in ("nothing", "ours", "plain")}
    above = {kind: (memory[kind] - memory["nothing"]) / 2**20 for kind in ("ours", "plain")}
    print(f"{name}: {N} tokens x {C} channels: peak memory above inputs {above['plain']:.0f} -> "
          f"{above['ours']:.0f} MiB, {above['ours'] / above['plain']:.2f} of plain's")
    for keep, allocator in (("", "tuned malloc"), ("1", "glibc's defaults")):
        ours, plain, products = map(float, child("loss", C, N, KEEP_MALLOC=keep).split())
        print(f"{name}: {allocator} for both: plain {plain * 1000:.0f} ms, ours {ours * 1000:.0f} ms, "
              f"{plain / ours:.2f}x; the three matrix products alone {products * 1000:.0f} ms")


def chunked_cross_entropy(hidden, weight, targets):
    def loss_of(logits, targets):
        return F.cross_entropy(logits, targets, reduction="none")
    return losses.chunked(loss_of, hidden, weight, targets)


def bench_chunked():
    for V, C, N in ((6400, 512, 2048), (50304, 128, 768), (50304, 512, 2048)):
        nothing, ours, plain = (int(child("memory", kind, C, N, V)) / 2**20
                                for kind in ("nothing", "ours", "chunked"))
        inputs = loss_inputs(C, N, V)

        def backward(loss):
            inputs[0].grad = inputs[1].grad = None
            loss(*inputs).backward()
        hand_s, plain_s = alternate(lambda: backward(losses.linear_cross_entropy),
                                    lambda: backward(chunked_cross_entropy))
        print(f"chunked: V = {V:,}, {N} tokens x {C} channels: "
              f"plain PyTorch {plain_s * 1000:.0f} ms, by hand {hand_s * 1000:.0f} ms, "
              f"{plain_s / hand_s:.2f}x; peak memory above inputs: "
              f"plain PyTorch {plain - nothing:.0f} MiB, by hand {ours - nothing:.0f} MiB, "
              f"{(plain - nothing) / (ours - nothing):.2f}x")


def child_loss(C, N):
    inputs = loss_inputs(int(C), int(N))
    hidden, weight, logits = inputs[0].detach(), inputs[1].detach(), torch.empty(int(N), 50304)
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def backward(loss):
        inputs[0].grad = inputs[1].grad = None
        loss(*inputs).backward()

    def products():
        torch.mm(hidden, weight.T, out=logits)
        torch.mm(logits, weight, out=d_hidden)
        torch.mm(logits.T, hidden, out=d_weight)
    print(*alternate(lambda: backward(losses.linear_cross_entropy), lambda: backward(plain_cross_entropy),
                     products))


def child_memory(kind, C, N, V=50304):
    """Peak RSS of a fresh process. Weight and gradient buffers are there from the start, as in training."""
    hidden, weight, targets = loss_inputs(int(C), int(N), int(V))
    hidden.grad, weight.grad = torch.zeros_like(hidden), torch.zeros_like(weight)
    loss = {"ours": losses.linear_cross_entropy, "plain": plain_cross_entropy,
            "chunked": chunked_cross_entropy}.get(kind)
    if loss:
        loss(hidden, weight, targets).backward()
    print(peak_memory())


def kd_inputs(V=151_936, N=1024, C=256, teacher_C=512):
    torch.manual_seed(0)
    return (torch.randn(N, C, requires_grad=True), (torch.randn(V, C) * 0.02).requires_grad_(),
            torch.randn(N, teacher_C), torch.randn(V, teacher_C) * 0.02, torch.randint(0, V, (N,)))


def ours_kd(hidden, weight, teacher_hidden, teacher_weight, targets, temperature=2.0):
    return losses.linear_kd_loss(hidden, weight, losses.head_logits(teacher_hidden, teacher_weight), targets,
                                 temperature=temperature)[0]


def plain_kd(hidden, weight, teacher_hidden, teacher_weight, targets, temperature=2.0):
    logits, teacher_logits = hidden @ weight.T, teacher_hidden @ teacher_weight.T
    kd = losses.kd_loss(logits, teacher_logits, temperature).sum()
    return 0.5 * F.cross_entropy(logits, targets, reduction="sum") + 0.5 * kd


def bench_kd():
    memory = {kind: int(child("kd", kind)) for kind in ("nothing", "ours", "plain")}
    above = {kind: (memory[kind] - memory["nothing"]) / 2**20 for kind in ("ours", "plain")}
    inputs = kd_inputs()

    def backward(loss, temperature):
        inputs[0].grad = inputs[1].grad = None
        loss(*inputs, temperature).backward()
    print(f"kd: 1024 tokens, V = 151,936, 256 channels against the teacher's 512: peak memory above weights "
          f"and inputs {above['plain']:.0f} -> {above['ours']:.0f} MiB, "
          f"{above['ours'] / above['plain']:.2f} of plain's")
    for temperature in (1.0, 2.0):
        ours_s, plain_s = alternate(lambda: backward(ours_kd, temperature),
                                    lambda: backward(plain_kd, temperature), repeats=5)
        print(f"kd: temperature {temperature}: plain {plain_s:.2f} s, ours {ours_s:.2f} s, "
              f"{plain_s / ours_s:.2f}x")


def child_kd(kind):
    """Peak RSS of a fresh process; weight and gradient buffers are there from the start, as in training."""
    inputs = kd_inputs()
    for x in inputs[:2]:
        x.grad = torch.zeros_like(x)
    loss = {"ours": ours_kd, "plain": plain_kd}.get(kind)
    if loss:
        loss(*inputs).backward()
    print(peak_memory())


def peak_memory():
    """Peak RSS of this process, bytes. (getrusage's goes on from the process that started it.)"""
    return int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))) * 1024


def bench_packing(rows=8):
    """The same model and conversations: packed, and one a row, padded to the batch's longest."""
    if not Path("out/gsm8k").exists():
        return print("packing: skipped, there is no set out/gsm8k")
    longest = json.loads(Path("out/gsm8k/meta.json").read_text())["splits"]["train"]["longest"]
    config = replace(MODEL_26M, seq_len=-(-longest // 64) * 64)
    data = ChatData("out/gsm8k", "train", config.seq_len, rows)
    torch.manual_seed(0)
    model, numbers = GPT(config), itertools.count()
    order = np.random.default_rng(0).permutation(len(data.lengths))
    per_batch = round(rows * len(data.lengths) / data.num_rows)    # as many conversations as the rows hold
    targets_seen = {"packed": 0, "padded": 0}

    def train(name, tokens, targets, mask, docs):
        hidden = model(tokens, docs)
        (losses.linear_cross_entropy(hidden, model.head, targets, mask) / mask.sum()).backward()
        targets_seen[name] += int(mask.sum())

    def packed():
        batch = data.batch(next(numbers))
        train("packed", batch.tokens, batch.targets, batch.mask, batch.docs)

    def padded():
        i = next(numbers) * per_batch % (len(order) - per_batch)
        examples = [slice(*data.offsets[e:e + 2].astype(int)) for e in order[i:i + per_batch]]
        tokens, learn = (torch.nn.utils.rnn.pad_sequence(
            [torch.from_numpy(array[e].astype(np.int64)) for e in examples], batch_first=True)
            for array in (data.tokens, data.learn))
        train("padded", tokens[:, :-1], tokens[:, 1:], learn[:, 1:].bool(), None)
    packed_s, padded_s = alternate(packed, padded)
    speed = {name: targets_seen[name] / 8 / s for name, s in (("packed", packed_s), ("padded", padded_s))}
    waste = 1 - data.num_tokens / data.num_rows / config.seq_len
    print(f"packing: {speed['padded']:.0f} target tok/s padded, {speed['packed']:.0f} packed, "
          f"{speed['packed'] / speed['padded']:.2f}x; {waste:.2%} of the packed positions are padding")


def pair_step(form, prompt, answer, P=8):
    """
    -> function that makes one DPO update of the 26 M model on P pairs, in the form "shared" (the prompt once,
    as train_dpo.py has it) or "two rows" (prompt and answer, for each answer)
    """
    torch.manual_seed(0)
    model = GPT(replace(MODEL_26M, seq_len=prompt + answer))
    optimizer = ShardedOptimizer(optim.parameter_groups(model))
    optimizer.lr = 1e-4
    prompts, answers = torch.randint(0, 6400, (P, prompt)), torch.randint(0, 6400, (P, 2, answer))
    ref = torch.full((P,), -8.7 * answer)
    rows = torch.cat([prompts[:, None].expand(-1, 2, -1), answers], dim=2).flatten(0, 1)       # (2P, T + 1)
    branches = torch.cat([prompts[:, None, -1:].expand(-1, 2, -1), answers[:, :, :-1]], dim=2)  # (P, 2, n)
    shared = torch.cat([prompts[:, :-1], branches.flatten(1)], dim=1).view(1, -1)
    place = torch.tensor([0] * (prompt - 1) + [1] * answer + [2] * answer).repeat(P)[None]
    docs = place + 3 * torch.arange(P).repeat_interleave(prompt - 1 + 2 * answer)

    def step():
        if form == "shared":
            hidden = model(shared, docs, branch=place > 0)[place > 0]
        else:
            hidden = model(rows[:, :-1])[:, -answer:].flatten(0, 1)
        sums = losses.token_logps(hidden, model.head, answers.flatten()).view(P, 2, answer).sum(dim=2)
        (losses.dpo_loss(*sums.T, ref, ref).sum() / P).backward()
        optimizer.step(1.0)
    return step


def bench_pairs():
    for prompt, answer in ((256, 64), (512, 64)):
        forms = ("shared", "two rows")
        shared_s, two_s = alternate(*(pair_step(form, prompt, answer) for form in forms), repeats=5)
        memory = [int(child("pairs", form, prompt, answer)) / 2**20 for form in forms]
        print(f"pairs: 8 of {prompt} + 2 x {answer} tokens: two rows {two_s:.2f} s a step, "
              f"shared prompt {shared_s:.2f} s, {two_s / shared_s:.2f}x; peak memory {memory[1]:.0f} -> "
              f"{memory[0]:.0f} MiB")


def child_pairs(form, prompt, answer):
    step = pair_step(form, int(prompt), int(answer))
    step()
    step()
    print(peak_memory())


def bench_loader():
    config, B = MODEL_26M, 8
    with tempfile.TemporaryDirectory() as folder:
        ids = np.random.default_rng(0).integers(0, 6400, 20_000_000, dtype=np.uint16)
        np.save(f"{folder}/train.npy", ids)
        np.save(f"{folder}/token_bytes.npy", np.ones(6400, dtype=np.uint16))
        Path(folder, "meta.json").write_text('{"kind": "text", "vocab_size": 6400, "end": 0, '
                                             '"fingerprint": "", "splits": {"train": {"tokens": 20000000}}}')
        data = TokenData(folder, "train", config.seq_len, B)
        numbers = iter(range(10**6))
        step, _ = training_step(config, B)
        batch_s, step_s = alternate(lambda: data.batch(next(numbers)), step, repeats=5)
    print(f"loader: {batch_s * 1e6:.0f} us a batch of 8 x 512, {batch_s / step_s:.3%} of a step")


def bench_optimizer():
    torch.manual_seed(0)
    model, reference = GPT(MODEL_26M), GPT(MODEL_26M)
    optimizer = ShardedOptimizer(optim.parameter_groups(model))
    optimizer.lr = 1e-4
    matrices = [p for p in reference.parameters() if p.ndim >= 2]
    vectors = [p for p in reference.parameters() if p.ndim < 2]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    adamw = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    for p in reference.parameters():
        p.grad = torch.zeros_like(p)

    def plain():
        torch.nn.utils.clip_grad_norm_(reference.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad(set_to_none=False)                    # both leave zeros behind
    ours_s, plain_s = alternate(lambda: optimizer.step(1.0), plain, repeats=15)
    print(f"optimizer: 26 M parameters, one rank: clip_grad_norm_ + AdamW(fused=True) "
          f"{plain_s * 1000:.1f} ms, ours {ours_s * 1000:.1f} ms, {plain_s / ours_s:.2f}x")


def bench_malloc():
    for name in ("step_26m", "nanogpt_50k"):
        times = {"1": [], "": []}
        for _ in range(5):
            for keep in times:
                times[keep].append(float(child("malloc", name, KEEP_MALLOC=keep)))
        glibc, tuned = (statistics.median(times[keep]) for keep in ("1", ""))
        print(f"malloc: {name}: glibc's defaults {glibc * 1000:.0f} ms a step, tuned {tuned * 1000:.0f} ms, "
              f"{glibc / tuned:.2f}x")


def child_malloc(name):
    config, B = (MODEL_26M, 8) if name == "step_26m" else (
        ModelConfig(vocab_size=50304, n_layer=4, n_head=4, n_embd=128, seq_len=64), 12)
    step, _ = training_step(config, B)
    print(alternate(step, repeats=2 if name == "step_26m" else 9)[0])


def bench_generate():
    torch.manual_seed(0)
    model, prompt = GPT(MODEL_26M).eval(), list(range(384))

    @torch.inference_mode()
    def uncached():
        tokens = torch.tensor([prompt])
        for _ in range(128):
            logits = model(tokens)[:, -1] @ model.head.T
            tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    greedy = SamplingConfig(max_new_tokens=128, temperature=0)
    cached_s, uncached_s = alternate(lambda: complete(model, [prompt], greedy), uncached, repeats=5)
    print(f"generate: 128 tokens after 384: uncached {uncached_s:.2f} s, cached {cached_s:.2f} s, "
          f"{uncached_s / cached_s:.1f}x, {128 / cached_s:.0f} tok/s")


def bench_overlap():
    for zero1 in ("", "zero1"):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        result = subprocess.run([*torchrun, __file__, "child", "overlap", zero1], capture_output=True,
                                text=True, check=True)
        print(result.stdout.strip())


def child_overlap(zero1):
    """Timestamps of one step on rank 0: when each bucket left, when backward and the wait after it ended."""
    rank, world_size, _ = dist.init("cpu")
    model = GPT(MODEL_26M)
    optimizer = ShardedOptimizer(optim.parameter_groups(model), zero1=bool(zero1))
    tokens, left = torch.randint(0, 6400, (2, 513)), []
    for bucket in optimizer.buckets:
        def reduce(shards, bucket=bucket, original=bucket.reduce):
            original(shards)
            left.append(time.perf_counter())
        bucket.reduce = reduce
    for _ in range(3):
        left.clear()
        loss = losses.linear_cross_entropy(model(tokens[:, :-1]), model.head, tokens[:, 1:])
        start = time.perf_counter()
        loss.backward()
        end = time.perf_counter()
        arrived = [bucket.work.is_completed() for bucket in optimizer.buckets]
        for bucket in optimizer.buckets:
            bucket.wait()
        done = time.perf_counter()
        optimizer.step(1.0)
    if rank == 0:
        print(f"overlap: 2 ranks{', zero1' if zero1 else ''}: backward {(end - start) * 1000:.0f} ms; "
              f"{len(left)} buckets left at {', '.join(f'{(t - start) * 1000:.0f}' for t in left)} ms; "
              f"{sum(arrived)} had arrived when it ended; {(done - end) * 1000:.0f} ms of waiting after it; "
              f"{optimizer.state_bytes() / 2**20:.1f} MiB of optimizer state a rank")
    dist.finish()


def child(*args, **env):
    """Run child_NAME in a fresh process -> what it prints"""
    return subprocess.run([sys.executable, __file__, "child", *map(str, args)], env={**os.environ, **env},
                          capture_output=True, text=True, check=True).stdout


def of_peers(name):
    """-> a function of peers.py, which needs more packages"""
    def function(*args):
        import peers
        getattr(peers, name)(*args)
    return function


BENCHES = {"step_26m": lambda: bench_step("step_26m", MODEL_26M, 8),
           "step_384": lambda: bench_step("step_384", MODEL_384, 16),
           "moe": bench_moe, "profile": bench_profile,
           "loss_128": lambda: bench_loss("loss_128", 128, 768),
           "loss_512": lambda: bench_loss("loss_512", 512, 2048),
           "chunked": bench_chunked,
           "kd": bench_kd, "packing": bench_packing, "pairs": bench_pairs, "loader": bench_loader,
           "optimizer": bench_optimizer, "malloc": bench_malloc, "generate": bench_generate,
           **{name: of_peers(f"bench_{name}") for name in ("transformers", "rollout", "sft_step", "dpo_step",
                                                           "grpo_step", "ranks")}, "overlap": bench_overlap}

if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        name = sys.argv[2]
        if name not in ("overlap", "ranks"):
            dist.init("cpu")
        {"memory": child_memory, "kd": child_kd, "pairs": child_pairs, "loss": child_loss,
         "malloc": child_malloc, "overlap": child_overlap, "ranks": of_peers("child_ranks"),
         "transformers": of_peers("child_transformers")}[name](*sys.argv[3:])
    else:
        dist.init("cpu")
        for name in sys.argv[1:] or BENCHES:
            BENCHES[name]()
