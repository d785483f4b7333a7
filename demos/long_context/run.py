"""
Context extension: a model trained on rows of 256 bytes meets rows of 1024, by each kind of scaling.

    python demos/long_context/run.py

Prints the validation loss per byte of whole rows and of their last quarter, 768 bytes and more into them:
right after the extension, and after 50 steps on rows of 1024. "none" is plain RoPE. Everything goes to
out/long_context; runs that are there are not made again.
"""
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from common import checkpoint, dist, losses  # noqa: E402  (the root must be on the path first)
from common.data import TokenData  # noqa: E402
from common.model import GPT, ModelConfig  # noqa: E402

OUT = Path("out/long_context")
# options of the model; plain RoPE in rows of 1024 is linear scaling of an original length of 1024: by 1
KINDS = {"none": dict(rope_scaling="linear", rope_original_len=1024), "linear": dict(rope_scaling="linear"),
         "dynamic": dict(rope_scaling="dynamic"), "yarn": dict(rope_scaling="yarn")}


def run(*command):
    """Run a script of the repository; this ends where one fails."""
    print("\n$ python " + " ".join(map(str, command)), flush=True)
    if code := subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode:
        sys.exit(code)


@torch.no_grad()
def val_losses(name, options, seq_len, rows=128):
    """Of a run's latest weights, extended as train_*.py extends them -> of all, of the last quarter"""
    folder = checkpoint.find(str(ROOT / OUT / name))
    config = ModelConfig(**checkpoint.read_manifest(folder)["model"])
    model = GPT(config.continued(replace(config, **options), seq_len)).eval()
    checkpoint.load_weights(folder, model)
    data, logps = TokenData(str(ROOT / OUT / "bytes"), "val", seq_len, 16), []
    for i in range(rows * 1024 // seq_len // 16):
        batch = data.batch(i)                                       # (B, T) each
        logps.append(losses.token_logps(model(batch.tokens), model.head, batch.targets))
    logps = torch.cat(logps)
    return -logps.mean().item(), -logps[:, -seq_len // 4:].mean().item()


if __name__ == "__main__":
    dist.init("cpu")
    if not (ROOT / OUT / "bytes").exists():
        run("data/prepare.py", "text", "--input=data/shakespeare/train.jsonl.gz",
            "--val_input=data/shakespeare/val.jsonl.gz", f"--out_dir={OUT}/bytes")
    run("train_pretrain.py", "demos/long_context/pretrain.py", "--resume=true")
    table = []
    for kind, options in KINDS.items():
        run("train_pretrain.py", "demos/long_context/pretrain.py", f"--init_from={OUT}/256",
            f"--out_dir={OUT}/{kind}", "--resume=true", "--seq_len=1024", "--batch_size=4", "--num_steps=50",
            "--lr=3e-4", "--warmup_steps=10", "--eval_seqs=0",
            *(f"--model.{name}={value}" for name, value in options.items()))
        table.append((kind, *val_losses("256", options, 1024), *val_losses(kind, {}, 1024)))
    print(f"\nvalidation loss per byte; rows of 256: {val_losses('256', {}, 256)[0]:.3f}\n"
          f"{'rows of 1024':<14}{'at once':>10}{'last 256':>10}{'50 steps':>10}{'last 256':>10}")
    for kind, *values in table:
        print(f"{kind:<14}" + "".join(f"{value:>10.3f}" for value in values))
