"""
What only an NVIDIA GPU shows: it computes what the CPU does, in fp32 and nearly so in bfloat16; documents in
one kernel; every stage in mixed precision. Skipped where there is none: `pytest tests/test_gpu.py`.
"""
import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run
from test_stages import SEES, STAGES, make_stage
from test_stages import losses as step_losses

from common import attention, losses, optim
from common.model import GPT, ModelConfig
from common.sampling import SamplingConfig, complete
from common.zero1 import ShardedOptimizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
CONFIG = ModelConfig(vocab_size=1000, n_layer=3, n_head=4, n_kv_head=2, n_embd=128, seq_len=400)
KINDS = {"dense": {}, "qwen": dict(qk_norm=True, attn_bias=True, tie_embeddings=False),
         "moe": dict(n_expert=4, n_shared_expert=1, n_dense_layer=1)}


@pytest.fixture(autouse=True)
def exact_products():
    """fp32 means fp32, not the TF32 that dist.init allows"""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def batch(T, layout):
    """-> tokens, targets, mask, docs, branch (2, T) for a layout of documents"""
    g = torch.Generator().manual_seed(0)
    tokens, targets = torch.randint(0, CONFIG.vocab_size, (2, 2, T), generator=g)
    docs = branch = None
    if layout != "whole":
        docs = (torch.rand(2, T, generator=g) < 4 / T).cumsum(dim=1)
    if layout == "branches":                                  # of every three, the last two branch off
        branch = docs % 3 > 0
    return tokens, targets, torch.rand(2, T, generator=g) < 0.7, docs, branch


def loss_and_gradients(model, data):
    device = model.head.device
    tokens, targets, mask, docs, branch = (x if x is None else x.to(device) for x in data)
    hidden = model(tokens, docs, branch=branch)
    loss = losses.linear_cross_entropy(hidden, model.head, targets, mask) / mask.sum() + \
        model.balance_loss() / tokens.numel()
    loss.backward()
    return loss.item(), {name: p.grad.cpu() for name, p in model.named_parameters()}


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize("layout", ["whole", "documents", "branches"])
@pytest.mark.parametrize("T", [100, 400])                     # under a mask, and document by document
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_equal_the_cpus(kind, T, layout):
    torch.manual_seed(0)
    here = GPT(ModelConfig(**{**vars(CONFIG), **KINDS[kind]}))
    there = copy.deepcopy(here).cuda()
    loss, gradients = loss_and_gradients(here, batch(T, layout))
    gpu_loss, gpu_gradients = loss_and_gradients(there, batch(T, layout))
    assert gpu_loss == pytest.approx(loss, rel=1e-5)
    assert max(relative(gpu_gradients[name], g) for name, g in gradients.items()) < 1e-3
    there.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        low_loss, low_gradients = loss_and_gradients(there, batch(T, layout))
    assert low_loss == pytest.approx(loss, rel=1e-2) and low_loss != gpu_loss
    if kind != "moe":                                         # where a near tie sends a token elsewhere
        assert max(relative(low_gradients[name], g) for name, g in gradients.items()) < 0.1


@pytest.mark.parametrize("layout", ["documents", "branches"])
def test_documents_in_one_kernel_equal_one_call_each(monkeypatch, layout):
    if not attention.varlen_kernel(torch.device("cuda"), torch.bfloat16, 32):
        pytest.skip("no such kernel in torch before 2.11, or on GPUs before Ampere")
    torch.manual_seed(0)
    model = GPT(CONFIG).cuda()
    tokens, *rest = batch(400, layout)
    calls, kernel = [], attention.varlen_attn
    monkeypatch.setattr(attention, "varlen_attn", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    with torch.autocast("cuda", torch.bfloat16):
        loss, one = loss_and_gradients(model, (tokens, *rest))
        assert len(calls) == CONFIG.n_layer
        docs, other = rest[2].cuda(), tokens.cuda()
        with torch.no_grad():                                 # what the first document sees is the same
            a, b = (model(x, docs, branch=None if rest[3] is None else rest[3].cuda())[docs == 0]
                    for x in (other, torch.where(docs == 0, other, 7)))
        assert torch.equal(a, b)
        model.zero_grad()
        monkeypatch.setattr(attention, "varlen_kernel", lambda *args: False)
        monkeypatch.setattr(attention, "DENSE_MASK_LEN_GPU", 0)
        loss_each, each = loss_and_gradients(model, (tokens, *rest))
    assert loss == pytest.approx(loss_each, rel=1e-3)
    assert max(relative(one[name], g) for name, g in each.items()) < 0.03


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_losses_equal_those_of_whole_logits_in_float64(dtype, tolerance):
    torch.manual_seed(0)
    N, C, V = 9000, 64, 517                                   # more than two chunks, the last one partial
    hidden, weight = torch.randn(N, C).cuda(), torch.randn(V, C).cuda() / 8
    targets, mask = torch.randint(0, V, (N,)).cuda(), torch.rand(N).cuda() < 0.9
    teacher = torch.randn(N, V).cuda()

    def ours(h, w, name):
        h, w = h.to(dtype), w.to(dtype)
        if name == "ce":
            return losses.linear_cross_entropy(h, w, targets, mask)
        if name == "logps":
            return losses.token_logps(h, w, targets, 0.7)[mask].sum()
        return losses.linear_kd_loss(h, w, lambda at: teacher[at], targets, mask, temperature=2.0)[0]

    def plain(h, w, name):
        logits = h.double() @ w.double().T
        if name == "ce":
            return F.cross_entropy(logits[mask], targets[mask], reduction="sum")
        if name == "logps":
            return (logits / 0.7).log_softmax(-1).gather(1, targets[:, None])[mask].sum()
        kd = losses.kd_loss(logits, teacher.double(), 2.0)[mask].sum()
        return 0.5 * F.cross_entropy(logits[mask], targets[mask], reduction="sum") + 0.5 * kd
    for name in ("ce", "logps", "kd"):
        results = []
        for function in (ours, plain):
            inputs = [x.clone().requires_grad_() for x in (hidden, weight)]
            value = function(*inputs, name)
            value.backward()
            results.append([value.detach().double(), *(x.grad.double() for x in inputs)])
        assert all(relative(a, b) < tolerance for a, b in zip(*results)), name


@pytest.mark.parametrize("rule", ["adamw", "lion", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_updates_equal_the_cpus(rule, dtype):
    torch.manual_seed(0)
    here = GPT(CONFIG).to(dtype)
    models = [here, copy.deepcopy(here).cuda()]
    before, gradients = here.head.detach().float().clone(), [torch.randn(p.shape) for p in here.parameters()]
    for model in models:
        optimizer = ShardedOptimizer(optim.parameter_groups(model, rule))
        optimizer.lr = 1e-2
        for _ in range(3):
            for p, g in zip(model.parameters(), gradients):
                (p.float() * g.to(p.device)).sum().backward()
            optimizer.step(1.0)
    assert relative(models[1].head.float().cpu(), before) > 0.1
    worst = max(relative(b.float().cpu(), a.float()) for a, b in zip(*(m.parameters() for m in models)))
    assert worst < (1e-4 if dtype == torch.float32 and rule != "muon" else 2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_equals_the_cpus(kind):
    torch.manual_seed(0)
    model = GPT(ModelConfig(**{**vars(CONFIG), **KINDS[kind]}))
    for p in model.parameters():                              # far from ties
        p.data.mul_(3 if p.ndim > 1 else 1)
    prompts = [list(range(5)), list(range(50, 67)), [3]]
    for cfg in (SamplingConfig(max_new_tokens=30, temperature=0),
                SamplingConfig(max_new_tokens=30, temperature=1.0, top_k=50, top_p=0.9,
                               repetition_penalty=1.1, suppress=(4,))):
        tokens, logps, _ = complete(model.cpu(), prompts, cfg, ends=(9,), num_samples=3, seed=5)
        gpu_tokens, gpu_logps, _ = complete(model.cuda(), prompts, cfg, ends=(9,), num_samples=3, seed=5)
        assert tokens == gpu_tokens
        assert sum(logps, []) == pytest.approx(sum(gpu_logps, []), abs=1e-3)


ON_GPU = ["--device=cuda", "--num_steps=20", "--save_every=10"]


OPTIONS = [(script, options) for script in STAGES for options in (
    [], ["--dtype=float16"], ["--dtype=float32", "--optimizer=muon"], ["--param_dtype=bfloat16"],
    ["--activation_checkpointing=true", "--micro_batch_size=4", "--model.n_expert=4"])] + [
    ("train_pretrain.py", ["--compile=true"]), ("train_pretrain.py", ["--doc_mask=true", "--seq_len=160"]),
    ("train_pretrain.py", ["--doc_mask=true", "--compile=true"]), ("train_sft.py", ["--compile=true"]),
    ("train_sft.py", SEES), ("train_sft.py", [*SEES, "--freeze_llm=true"]),
    ("train_dpo.py", ["--ref_online=true"]), ("train_grpo.py", ["--beta=0.01", "--top_k=50", "--top_p=0.9"]),
    ("train_grpo.py", ["--env=tests/some_rewards.py:twice"]), ("train_kd.py", ["--cache_top_k=20"]),
    ("train_kd.py", ["--on_policy_frac=0.5"])]


@pytest.mark.parametrize("script, options", OPTIONS, ids=lambda x: x if isinstance(x, str) else " ".join(x))
def test_a_stage_learns_resumes_and_its_checkpoint_is_read_on_a_cpu(script, options, request, tmp_path):
    stage = make_stage(script, request, tmp_path)

    def train(out, *more):
        stage(out, *ON_GPU, *options, *more)
        return step_losses(tmp_path / out)
    whole = train("a")
    assert len(whole) == 20
    if script in ("train_pretrain.py", "train_sft.py", "train_kd.py") and "--freeze_llm=true" not in options:
        assert sum(whole[-5:]) < 0.95 * sum(whole[:5])
    half = train("b", "--schedule=constant", "--num_steps=10")
    more = train("b", "--schedule=constant", "--resume=true")
    assert len(half) == 10 and len(more) == 20
    if script in ("train_pretrain.py", "train_sft.py"):       # sums on a GPU differ a little from run to run
        assert more[10:] == pytest.approx(train("c", "--schedule=constant")[10:], rel=0.03)
    if SEES[0] not in options:
        for device in ("cpu", "cuda"):
            run("sample.py", f"--init_from={tmp_path / 'a'}", "--prompt=12", "--max_new_tokens=5",
                f"--device={device}")


def test_one_rank_under_torchrun_is_the_same_run(request, tmp_path):
    stage = make_stage("train_pretrain.py", request, tmp_path)
    stage("a", *ON_GPU)
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1",
                    stage.script, *stage.options, f"--data_dir={stage.data}", f"--out_dir={tmp_path / 'b'}",
                    *ON_GPU, "--zero1=true"], cwd=ROOT, check=True, timeout=300)
    assert step_losses(tmp_path / "b") == pytest.approx(step_losses(tmp_path / "a"), rel=0.02)


def test_a_dry_run_is_near_the_memory_that_a_run_takes(request, tmp_path):
    code = ("import runpy, sys, torch; sys.argv = sys.argv[1:]\n"
            "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
            "except SystemExit: pass\n"
            "print('peak MiB', torch.cuda.max_memory_allocated() / 2**20)")
    args = ["train_pretrain.py", f"--data_dir={request.getfixturevalue('token_set')}", "--num_steps=2",
            f"--out_dir={tmp_path / 'a'}", "--eval_seqs=0", "--seq_len=128", "--batch_size=16",
            "--model.n_layer=8", "--model.n_embd=512"]
    said = run(*args, "--dry_run=true").stdout
    peak = float(run("-c", code, *args).stdout.split()[-1])
    told = float(next(line.split()[1] for line in said.splitlines() if line.startswith("memory"))
                 .replace(",", ""))
    assert 0.8 * peak < told < 1.1 * peak
