"""
Context extension: a model trained on rows of 256 bytes meets rows of 1024, by each kind of scaling.

    python tests/bench/long_context/run.py

Prints the validation loss per byte of whole rows and of their last quarter, 768 bytes and more into
them: right after the extension, and after 50 steps on rows of 1024. "none" is plain RoPE.
Everything goes to out/long_context; runs that are there are not made again.
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

# the repository's root must be on the path first
sys.path.insert(0, str(Path(__file__).absolute().parents[3]))

from common import checkpoint, losses  # noqa: E402
from common.data import TokenData
from common.model import GPT, ModelConfig
from demos.shared import begin, prepare, print_row, run

OUT = "out/long_context"
# options of the model; plain RoPE in rows of 1024 is linear scaling of an original length of 1024
KINDS = {
    "none": dict(rope_scaling="linear", rope_original_len=1024),
    "linear": dict(rope_scaling="linear"),
    "dynamic": dict(rope_scaling="dynamic"),
    "yarn": dict(rope_scaling="yarn"),
}


@torch.no_grad()
def val_losses(name, options, seq_len):
    """
    Of 128 rows of 1024 bytes or as many bytes of shorter ones, by a run's latest weights, extended
    as train_*.py extends them -> of all, of the last quarter
    """
    folder = checkpoint.find(f"{OUT}/{name}")
    config = ModelConfig(**checkpoint.read_manifest(folder)["model"])
    model = GPT(config.continued(replace(config, **options), seq_len)).eval()
    checkpoint.load_weights(folder, model)
    data, logps = TokenData(f"{OUT}/bytes", "val", seq_len, 16), []
    for i in range(128 * 1024 // seq_len // 16):
        batch = data.batch(i)
        logps.append(losses.token_logps(model(batch.tokens), model.head, batch.targets))
    logps = torch.cat(logps)  # (rows, seq_len)
    return -logps.mean().item(), -logps[:, -seq_len // 4 :].mean().item()


if __name__ == "__main__":
    begin(OUT)
    prepare(run, "text", "data/shakespeare/*.jsonl.gz", f"{OUT}/bytes")
    run("train_pretrain.py", "tests/bench/long_context/pretrain.py", "--resume=true")
    table = [("rows of 1024", "at once", "last 256", "50 steps", "last 256")]
    for kind, options in KINDS.items():
        # the model of rows of 256 goes on
        run(
            "train_pretrain.py",
            "tests/bench/long_context/pretrain.py",
            "--resume=true",
            f"--init_from={OUT}/256",
            f"--out_dir={OUT}/{kind}",
            "--seq_len=1024",
            "--batch_size=4",
            "--num_steps=50",
            "--lr=3e-4",
            "--warmup_steps=10",
            "--eval_seqs=0",
            *(f"--model.{name}={value}" for name, value in options.items()),
        )
        table.append((kind, *val_losses("256", options, 1024), *val_losses(kind, {}, 1024)))
    print(f"\nvalidation loss per byte; rows of 256: {val_losses('256', {}, 256)[0]:.3f}")
    for row in table:
        print_row(*row, width=14, column=10)
