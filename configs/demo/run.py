"""
The demo: every stage in turn on the bundled corpus, then a table of what each one changed.

    python configs/demo/run.py          # or `make demo`, which makes an environment first

Everything goes to out/demo. A stage whose result is there is not run again; remove out/demo to start over.
Writes out/demo/summary.json: for every stage what was measured, before and after, and its seconds.
"""
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OUT = Path("out/demo")
CORPUS = "data/shakespeare"
PROMPTS = ["ROMEO.\n", "KING HENRY.\nOnce more"]


def run(*command):
    """Run a script of the repository; what it prints goes to the terminal. The demo ends where one fails."""
    print("\n$ python " + " ".join(map(str, command)), flush=True)
    code = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def once(name, function):
    """function() -> summary row, kept in out/demo/NAME.json so that a second run only reads it."""
    path = ROOT / OUT / f"{name}.json"
    if not path.exists():
        start = time.time()
        row = function()
        path.write_text(json.dumps({**row, "seconds": round(time.time() - start, 1)}))
    return json.loads(path.read_text())


def prepare():
    tokenizer, data = OUT / "tokenizer.model", OUT / "data"
    if not (ROOT / tokenizer).exists():
        run("data/prepare.py", "tokenizer", f"--input={CORPUS}/train.jsonl.gz", "--vocab_size=2048",
            f"--out={tokenizer}")
    if not (ROOT / data).exists():
        run("data/prepare.py", "text", f"--input={CORPUS}/train.jsonl.gz",
            f"--val_input={CORPUS}/val.jsonl.gz", f"--tokenizer={tokenizer}", f"--out_dir={data}")
    split = json.loads((ROOT / data / "meta.json").read_text())["splits"]["train"]
    return dict(measure="bytes per token", before=1.0, after=split["bytes"] / split["tokens"])


def pretrain():
    run("train_pretrain.py", "configs/demo/pretrain.py", "--resume=true")
    rows = [json.loads(line) for line in open(ROOT / OUT / "pretrain/metrics.jsonl")]
    bits = [row["val_bits_per_byte"] for row in rows if "val_bits_per_byte" in row]
    return dict(measure="validation bits per byte", before=bits[0], after=bits[-1])


STAGES = {"prepare": prepare, "pretrain": pretrain}

if __name__ == "__main__":
    (ROOT / OUT).mkdir(parents=True, exist_ok=True)
    summary = {name: once(name, stage) for name, stage in STAGES.items()}
    for prompt in PROMPTS:
        run("sample.py", f"--init_from={OUT}/pretrain", f"--prompt={prompt}", "--max_new_tokens=120",
            "--top_k=50", "--temperature=0.7")
    print(f"\n{'stage':<12}{'measured':<28}{'before':>10}{'after':>10}{'seconds':>10}")
    for name, row in summary.items():
        print(f"{name:<12}{row['measure']:<28}{row['before']:>10.3f}{row['after']:>10.3f}"
              f"{row['seconds']:>10.1f}")
    (ROOT / OUT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"\nThe same in {OUT}/summary.json")
