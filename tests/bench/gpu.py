"""
Speed and memory on an NVIDIA GPU, in turns with transformers' LlamaForCausalLM of the same weights; medians.

    python tests/bench/gpu.py [NAME ...]

    gemm        a large matrix product in bfloat16: what is there to be had
    step        a training step of 124 M parameters (GPT-2's size), 16 x 1024 tokens in bfloat16, with
                torch.compile and without; their loss is the model's own, their optimizer AdamW(fused=True)
    documents   the same step on rows of documents that do not see each other: in one kernel, under a mask
    branches    forward and backward of 16 prompts of 256 tokens with 8 answers of 256 each, a prompt once: in
                one kernel, in one call for each answer, and against a row for each answer
    generate    256 tokens after 64, for 1 and for 64 prompts, in bfloat16
"""
import gc
import sys

import torch
from bench import alternate, training_step  # puts the root on the path
from peers import llama, their_step

from common import attention, losses
from common.model import GPT, ModelConfig
from common.sampling import SamplingConfig, complete

MODEL_124M = ModelConfig(vocab_size=50304, n_layer=12, n_head=12, n_embd=768, seq_len=1024)
BATCH = 16


def timed(function, n=5):
    """-> function that calls this one n times and waits for the GPU"""
    def repeat():
        for _ in range(n):
            function()
        torch.cuda.synchronize()
    return repeat


def peak(step):
    """MiB that a step takes at most, with what is there already"""
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() / 2**20


def bench_gemm(n=8192):
    a, b = torch.randn(2, n, n, device="cuda", dtype=torch.bfloat16)
    seconds, = alternate(timed(lambda: a @ b, 10))
    print(f"gemm: {n} squared, bfloat16: {10 * 2 * n**3 / seconds / 1e12:.0f} TFLOP/s")


def our_step(compile=False, docs=None):
    return training_step(MODEL_124M, BATCH, "cuda", compile, docs)[0]


def bench_step():
    flops = GPT(MODEL_124M).flops_per_token(MODEL_124M.seq_len)
    for compile in (False, True):
        memory, steps = [], []
        for make in (our_step, lambda compile: their_step(MODEL_124M, BATCH, "cuda", compile)):
            before = torch.cuda.memory_allocated() / 2**20
            steps.append(make(compile))
            steps[-1]()
            memory.append(peak(steps[-1]) - before)
        ours, theirs = (BATCH * MODEL_124M.seq_len * 5 / s for s in alternate(*map(timed, steps), repeats=5))
        del steps
        gc.collect()                                          # buckets and their groups know each other
        print(f"step: 124 M, {BATCH} x 1024, compile={compile}: ours {ours:,.0f} tok/s "
              f"({ours * flops / 1e12:.0f} TFLOP/s, {memory[0]:,.0f} MiB), transformers {theirs:,.0f} tok/s "
              f"({memory[1]:,.0f} MiB), {ours / theirs:.2f}x", flush=True)


def bench_documents():
    docs = (torch.rand(BATCH, MODEL_124M.seq_len, device="cuda") < 4 / MODEL_124M.seq_len).cumsum(dim=1)
    steps = [our_step(), our_step(docs=docs)]
    whole, one = alternate(*map(timed, steps), repeats=5)
    attention.DENSE_MASK_LEN, before = MODEL_124M.seq_len, attention.DENSE_MASK_LEN
    whole_2, mask = alternate(*map(timed, steps), repeats=5)
    attention.DENSE_MASK_LEN = before
    print(f"documents: about 5 in a row of 1024: in one kernel {one / whole:.2f} of the time of whole rows, "
          f"under a mask {mask / whole_2:.2f}")


def bench_branches(P=16, G=8, prompt=256, answer=256):
    torch.manual_seed(0)
    model = GPT(MODEL_124M).cuda()
    prompts = torch.randint(0, 50304, (P, prompt), device="cuda")
    answers = torch.randint(0, 50304, (P, G, answer), device="cuda")
    shared = torch.cat([prompts, answers.flatten(1)], dim=1).view(1, -1)
    lengths = torch.tensor([prompt] + [answer] * G)
    place = torch.arange(G + 1).repeat_interleave(lengths).repeat(P)[None].cuda()         # 0: the prompt
    docs = place + (G + 1) * torch.arange(P, device="cuda").repeat_interleave(prompt + G * answer)
    rows = torch.cat([prompts[:, None].expand(-1, G, -1), answers], dim=2).flatten(0, 1)

    def update(hidden):
        losses.token_logps(hidden, model.head, answers.flatten()).sum().backward()

    def in_one_row():
        with torch.autocast("cuda", torch.bfloat16):
            update(model(shared, docs, branch=place > 0)[place > 0])

    def in_calls():
        kernel, attention.varlen_kernel = attention.varlen_kernel, lambda *args: False
        in_one_row()
        attention.varlen_kernel = kernel

    def in_rows():
        with torch.autocast("cuda", torch.bfloat16):
            update(model(rows)[:, prompt:].flatten(0, 1))
    times = alternate(*(timed(f, 2) for f in (in_one_row, in_calls, in_rows)), repeats=5)
    one, calls, plain = (seconds / 2 * 1000 for seconds in times)
    memory = [peak(f) for f in (in_one_row, in_rows)]
    print(f"branches: in one kernel {one:.0f} ms, a call each {calls:.0f} ms, a row each {plain:.0f} ms: "
          f"{plain / one:.2f}x; peak memory {memory[1]:,.0f} -> {memory[0]:,.0f} MiB")


def bench_generate(new=256):
    torch.manual_seed(0)
    model = GPT(MODEL_124M).eval()
    peer = llama(model).cuda().bfloat16()
    model = model.cuda().bfloat16()
    for B in (1, 64):
        prompts = torch.randint(0, 50304, (B, 64))

        @torch.inference_mode()
        def theirs():
            peer.generate(prompts.cuda(), attention_mask=torch.ones_like(prompts).cuda(), do_sample=True,
                          top_k=50, temperature=1.0, max_new_tokens=new, min_new_tokens=new)
        cfg = SamplingConfig(max_new_tokens=new, temperature=1.0, top_k=50)
        ours_s, theirs_s = alternate(lambda: complete(model, prompts.tolist(), cfg), theirs, repeats=3)
        print(f"generate: {B} x {new} tokens: ours {B * new / ours_s:,.0f} tok/s, transformers "
              f"{B * new / theirs_s:,.0f}, {theirs_s / ours_s:.2f}x")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")                # as dist.init does
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    benches = dict(gemm=bench_gemm, step=bench_step, documents=bench_documents, branches=bench_branches,
                   generate=bench_generate)
    for name in sys.argv[1:] or benches:
        benches[name]()
