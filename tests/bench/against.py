"""
Speed and memory of this tree against another revision, in turns, each time in a fresh process.

    python tests/bench/against.py d4435a4 [step loss_128 kd rollout pairs]

Prints the medians of REPEATS processes of each, their ratio (below 1: this tree is faster), and the
peak memory. Nothing else may run meanwhile.
"""
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 5
PREFACE = """
import sys, time, torch
sys.path.insert(0, sys.argv[1])
from common import losses, optim
from common.model import GPT, ModelConfig
from common.dist import tune_malloc
tune_malloc()
torch.manual_seed(0)
config = ModelConfig(vocab_size=6400, n_layer=8, n_head=8, n_embd=512, d_ff=1408, seq_len=512)
def measure(function, n):
    function()
    times = []
    for _ in range(n):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(sorted(times)[len(times) // 2], int(peak) / 1024)
"""
WORK = {
    "step": """
from common.zero1 import ShardedOptimizer
model = GPT(config)
optimizer = ShardedOptimizer(optim.parameter_groups(model))
optimizer.lr = 1e-4
tokens = torch.randint(0, 6400, (8, 513))
def step():
    loss = losses.linear_cross_entropy(model(tokens[:, :-1]), model.head, tokens[:, 1:])
    ((loss + model.balance_loss()) / 4096).backward()
    optimizer.step(1.0)
measure(step, 3)
""",
    "loss_128": """
hidden = torch.randn(128, 768, requires_grad=True)
weight = torch.randn(50304, 768, requires_grad=True)
targets = torch.randint(0, 50304, (128,))
def loss():
    hidden.grad = weight.grad = None
    losses.linear_cross_entropy(hidden, weight, targets).backward()
measure(loss, 15)
""",
    "kd": """
V = 50304
hidden, theirs = torch.randn(512, 256, requires_grad=True), torch.randn(512, 512)
weight, head = torch.randn(V, 256, requires_grad=True), torch.randn(V, 512)
targets = torch.randint(0, V, (512,))
def loss():
    hidden.grad = weight.grad = None
    teacher = losses.head_logits(theirs, head)
    losses.linear_kd_loss(hidden, weight, teacher, targets)[0].backward()
measure(loss, 5)
""",
    "rollout": """
from common.sampling import SamplingConfig, complete
model, cfg = GPT(config).eval(), SamplingConfig(max_new_tokens=64, temperature=1.0)
prompts = torch.randint(0, 6400, (4, 64)).tolist()
measure(lambda: complete(model, prompts, cfg, num_samples=8), 3)
""",
    "pairs": """
import numpy as np
try:
    from common.branches import Branches, branches
except ImportError:
    from common.data import Branches, branches
model, rng = GPT(config), np.random.default_rng(0)
def ids(n): return rng.integers(0, 6400, n)
groups = [(ids(256), [(ids(64), np.ones(64, bool)) for _ in range(2)]) for _ in range(8)]
rows = Branches(*branches(groups, torch.device("cpu")))
def step():
    hidden = model(rows.tokens, rows.docs, branch=rows.branch)[rows.mask]
    losses.token_logps(hidden, model.head, rows.targets[rows.mask]).sum().backward()
measure(step, 3)
""",
}


def run(tree, code):
    """-> seconds, MiB at the peak"""
    command = [sys.executable, "-c", PREFACE + code, str(tree)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True)
    return tuple(map(float, done.stdout.split()))


if __name__ == "__main__":
    revision, *names = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        archive = subprocess.run(["git", "archive", revision], cwd=ROOT, capture_output=True, check=True)
        subprocess.run(["tar", "x", "-C", folder], input=archive.stdout, check=True)
        print(f"| work | {revision}, s | here, s | ratio | {revision}, MiB | here, MiB |")
        print("|---|---|---|---|---|---|", flush=True)
        for name in names or WORK:
            theirs, ours = [], []
            for _ in range(REPEATS):
                theirs.append(run(folder, WORK[name]))
                ours.append(run(ROOT, WORK[name]))
            (a, m), (b, n) = (map(statistics.median, zip(*rows)) for rows in (theirs, ours))
            print(f"| {name} | {a:.4f} | {b:.4f} | {b / a:.3f} | {m:,.0f} | {n:,.0f} |", flush=True)
