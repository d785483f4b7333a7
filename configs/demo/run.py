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
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import lines  # noqa: E402  (data/lines.py; the root must be on the path first)

from common import dist  # noqa: E402
from common.sampling import SamplingConfig, complete  # noqa: E402
from common.tokenizer import encode_chat  # noqa: E402
from sample import load  # noqa: E402

OUT = Path("out/demo")
CORPUS = "data/shakespeare"
PROMPTS = ["ROMEO.\n", "KING HENRY.\nOnce more"]
REQUESTS = ["A line from T, 7 words, ending in .", "5 words. First letter W, last mark ?"]


def run(*command):
    """Run a script of the repository; what it prints goes to the terminal. The demo ends where one fails."""
    print("\n$ python " + " ".join(map(str, command)), flush=True)
    code = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT).returncode
    if code:
        sys.exit(code)


def once(name, stage):
    """stage() -> summary row, kept in out/demo/NAME.json so that a second run only reads it."""
    path = ROOT / OUT / f"{name}.json"
    if not path.exists():
        start = time.time()
        measures = stage()
        row = {**measures[0], "also": measures[1:], "seconds": round(time.time() - start, 1)}
        path.write_text(json.dumps(row))
    return json.loads(path.read_text())


def measure(what, before, after):
    return dict(measure=what, before=before, after=after)


def metrics(stage, key):
    """-> the values of one key in a run's metrics.jsonl, in order"""
    rows = [json.loads(line) for line in open(ROOT / OUT / stage / "metrics.jsonl", encoding="utf-8")]
    return [row[key] for row in rows if key in row]


def lines_met(run, temperature, num_samples):
    """How a run's replies to the held-out requests do -> (shares of each part and of "all", requests)"""
    model, tokenizer = load(str(ROOT / OUT / run), "cpu")
    rows = [json.loads(line) for line in open(ROOT / OUT / "lines/test.jsonl", encoding="utf-8")]
    requests = [messages[0]["content"] for messages in rows]
    prompts = [ids for ids, _ in encode_chat(tokenizer, [messages[:1] for messages in rows], reply=True)]
    cfg = SamplingConfig(max_new_tokens=48, temperature=temperature)
    replies, *_ = complete(model, prompts, cfg, tokenizer.end, num_samples)
    texts = [tokenizer.decode(ids) for ids in replies]
    met = [lines.met(requests[i // num_samples], text) for i, text in enumerate(texts)]
    shares = {part: sum(m[part] for m in met) / len(met) for part in lines.PARTS}
    shares["verse"] = sum(map(lines.verse_share, texts)) / len(texts)
    return {**shares, "all": sum(all(m.values()) for m in met) / len(met)}, len(requests)


def prepare():
    tokenizer, data = OUT / "tokenizer.model", OUT / "data"
    if not (ROOT / tokenizer).exists():
        run("data/prepare.py", "tokenizer", f"--input={CORPUS}/train.jsonl.gz", "--vocab_size=2048",
            f"--out={tokenizer}")
    if not (ROOT / data).exists():
        run("data/prepare.py", "text", f"--input={CORPUS}/train.jsonl.gz",
            f"--val_input={CORPUS}/val.jsonl.gz", f"--tokenizer={tokenizer}", f"--out_dir={data}")
    split = json.loads((ROOT / data / "meta.json").read_text())["splits"]["train"]
    return [measure("bytes per token", 1.0, split["bytes"] / split["tokens"])]


def pretrain():
    run("train_pretrain.py", "configs/demo/pretrain.py", "--resume=true")
    bits = metrics("pretrain", "val_bits_per_byte")
    return [measure("validation bits per byte", bits[0], bits[-1])]


def prepare_lines():
    """The lines-to-order task, as conversations, pairs and prompts."""
    if not (ROOT / OUT / "lines").exists():
        run("data/lines.py", f"--corpus={CORPUS}", f"--out_dir={OUT}/lines")
    for kind, train, val in (("chat", "train", "val"), ("pairs", "train_pairs", "val_pairs"),
                             ("prompts", "train_prompts", "val_prompts")):
        if not (ROOT / OUT / kind).exists():
            run("data/prepare.py", kind, f"--input={OUT}/lines/{train}.jsonl",
                f"--val_input={OUT}/lines/{val}.jsonl", f"--tokenizer={OUT}/pretrain",
                f"--out_dir={OUT}/{kind}")


def sft():
    prepare_lines()
    run("train_sft.py", "configs/demo/sft.py", "--resume=true")
    before, n = lines_met("pretrain", 1.0, 4)
    after, _ = lines_met("sft", 1.0, 4)
    rows = [measure(f"whole request met, T = 1, {n} x 4", before["all"], after["all"])]
    before, _ = lines_met("pretrain", 0.0, 1)
    after, _ = lines_met("sft", 0.0, 1)
    return rows + [measure(f"{part} right, greedy, {n}", before[part], after[part]) for part in lines.PARTS]


def dpo():
    run("train_dpo.py", "configs/demo/dpo.py", "--resume=true")
    n = json.loads((ROOT / OUT / "pairs/meta.json").read_text())["splits"]["val"]["pairs"]
    rows = [measure(f"{what}, {n} pairs", values[0], values[-1]) for what, values in (
        ("pair accuracy by reward", metrics("dpo", "val_accuracy")),
        ("better answer is likelier", metrics("dpo", "val_ranking")))]
    before, n = lines_met("sft", 1.0, 4)
    after, _ = lines_met("dpo", 1.0, 4)
    return rows + [measure(f"whole request met, T = 1, {n} x 4", before["all"], after["all"])]


def grpo():
    run("train_grpo.py", "configs/demo/grpo.py", "--resume=true")
    before, n = lines_met("dpo", 1.0, 4)
    after, _ = lines_met("grpo", 1.0, 4)
    return [measure(f"whole request met, T = 1, {n} x 4", before["all"], after["all"]),
            measure("words that are verse, T = 1", before["verse"], after["verse"])]


def student(name, taught, seed=1337):
    """-> validation loss of a small model after the run out/demo/NAME, taught by the pretrained or alone"""
    script = ["train_kd.py", "configs/demo/student.py", "configs/demo/kd.py"] if taught else \
        ["train_pretrain.py", "configs/demo/student.py"]
    run(*script, f"--out_dir={OUT}/{name}", f"--seed={seed}", "--resume=true")
    return metrics(name, "val_loss")[-1]


def kd():
    return [measure("student's val loss: alone, taught", student("kd_alone", False), student("kd", True))]


STAGES = {"prepare": prepare, "pretrain": pretrain, "sft": sft, "dpo": dpo, "grpo": grpo, "kd": kd}

if __name__ == "__main__":
    dist.tune_malloc()
    (ROOT / OUT).mkdir(parents=True, exist_ok=True)
    summary = {name: once(name, stage) for name, stage in STAGES.items()}
    for prompt in PROMPTS:
        run("sample.py", f"--init_from={OUT}/pretrain", f"--prompt={prompt}", "--max_new_tokens=120",
            "--top_k=50", "--temperature=0.7")
    for request in REQUESTS:
        run("sample.py", f"--init_from={OUT}/grpo", "--chat=true", f"--prompt={request}", "--num_samples=3")
    print(f"\n{'stage':<12}{'measured on held-out data':<40}{'before':>10}{'after':>10}{'seconds':>10}")
    for name, row in summary.items():
        print(f"{name:<12}{row['measure']:<40}{row['before']:>10.3f}{row['after']:>10.3f}"
              f"{row['seconds']:>10.1f}")
        for more in row.get("also", []):
            print(f"{'':<12}{more['measure']:<40}{more['before']:>10.3f}{more['after']:>10.3f}")
    (ROOT / OUT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(f"\nThe same in {OUT}/summary.json")
