"""
The demo: every stage in turn on the bundled corpus, then what each one changed: numbers, and what the models
write before and after.

    python demos/demo/run.py          # or `make demo`, which makes an environment first

Everything goes to out/demo. A stage whose result is there is not run again; remove out/demo to start over.
Writes out/demo/
    report.html     table, curves (with matplotlib, the extra `plot`) and samples on one page of its own
    summary.json    for every stage what was measured, before and after, and its seconds
    log.txt         all that the scripts have printed
"""
import functools
import json
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import lines  # noqa: E402  (data/lines.py; the root must be on the path first)
import report  # noqa: E402  (beside this file)
import torch  # noqa: E402

from common import dist  # noqa: E402
from common.chat import encode_chat  # noqa: E402
from common.dist import short_time  # noqa: E402
from common.errors import show_user_errors  # noqa: E402
from common.sampling import SamplingConfig, complete  # noqa: E402
from sample import load  # noqa: E402

OUT = Path("out/demo")
CORPUS = "data/shakespeare"
SECONDS = dict(prepare=12, pretrain=180, sft=135, dpo=75, grpo=115, kd=75)   # on two CPU cores, about


class Progress:
    """
    Where the demo is, in one line: on a terminal it is written over, a log file gets one every 20 seconds.
    How long the rest takes follows from SECONDS and from how long what is done has taken here.
    """
    def __init__(self, stages):
        self.stages, self.is_tty = stages, sys.stdout.isatty()
        self.started, self.shown = time.time(), 0.0

    def begin(self, stage):
        self.stage, self.runs, self.step, self.total = stage, 0, 0, 1
        self.stage_started = time.time()
        self.show("preparing", wait=False)

    def watch(self, line):
        """A line that a script has printed"""
        if match := re.match(r"step +(\d+)/(\d+) \|", line):
            step, total = map(int, match.groups())
            self.runs += step < self.step                     # the next run of this stage
            self.step, self.total = step, total
            self.show(f"step {step}/{total}")

    def show(self, what, wait=True):
        now = time.time()
        if wait and now - self.shown < (0.2 if self.is_tty else 20):
            return
        self.shown, at = now, self.stages.index(self.stage)
        of_stage = min(1.0, (self.runs + self.step / self.total) / (2 if self.stage == "kd" else 1))
        usual = [SECONDS[stage] for stage in self.stages]
        done = sum(usual[:at]) + of_stage * usual[at]
        speed = done / (now - self.started) if done > 5 else 1.0              # SECONDS a second
        line = f"[{at + 1}/{len(self.stages)}] {self.stage:<8} | {what:<13} | " \
               f"{short_time(now - self.stage_started):>6} | whole demo: {short_time(now - self.started)} " \
               f"done, eta {short_time((sum(usual) - done) / speed)}"
        print(f"\r{line:<100}" if self.is_tty else line, end="" if self.is_tty else "\n", flush=True)

    def end(self, rows):
        text = ", ".join(f"{row['measure']} {row['before']:.3f} -> {row['after']:.3f}" for row in rows)
        line = f"{self.stage}: {short_time(time.time() - self.stage_started)}; {text}"
        print(f"\r{'':<100}\r{line}" if self.is_tty else line, flush=True)


def run(watch, *command):
    """Run a script of the repository: each line that it prints goes to watch and to out/demo/log.txt"""
    with open(ROOT / OUT / "log.txt", "a", encoding="utf-8") as log:
        print("\n$ python " + " ".join(map(str, command)), file=log, flush=True)
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, text=True,
                                   encoding="utf-8", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        lines = []
        for line in process.stdout:
            print(line, end="", file=log, flush=True)
            watch(line)
            lines = [*lines[-9:], line]
    if process.wait():
        print("\n" + "".join(lines) + f"{command[0]} failed; all it has printed is in {OUT}/log.txt")
        sys.exit(process.returncode)


def once(name, stage, progress):
    """stage(watch) -> summary row, kept in out/demo/NAME.json so that a second run only reads it."""
    path = ROOT / OUT / f"{name}.json"
    if not path.exists():
        progress.begin(name)
        start = time.time()
        measures = stage(progress.watch)
        row = {**measures[0], "also": measures[1:], "seconds": round(time.time() - start, 1)}
        path.write_text(json.dumps(row))
        progress.end(measures)
    return json.loads(path.read_text())


def measure(what, before, after):
    return dict(measure=what, before=before, after=after)


def metrics(stage, key):
    """-> the values of one key in a run's metrics.jsonl, in order"""
    rows = [json.loads(line) for line in open(ROOT / OUT / stage / "metrics.jsonl", encoding="utf-8")]
    return [row[key] for row in rows if key in row]


@functools.cache
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


def prepare(watch):
    tokenizer, data = OUT / "tokenizer.model", OUT / "data"
    if not (ROOT / tokenizer).exists():
        run(watch, "data/prepare.py", "tokenizer", f"--input={CORPUS}/train.jsonl.gz", "--vocab_size=2048",
            f"--out={tokenizer}")
    if not (ROOT / data).exists():
        run(watch, "data/prepare.py", "text", f"--input={CORPUS}/train.jsonl.gz",
            f"--val_input={CORPUS}/val.jsonl.gz", f"--tokenizer={tokenizer}", f"--out_dir={data}")
    split = json.loads((ROOT / data / "meta.json").read_text())["splits"]["train"]
    return [measure("bytes per token", 1.0, split["bytes"] / split["tokens"])]


def pretrain(watch):
    run(watch, "train_pretrain.py", "demos/demo/pretrain.py", "--resume=true")
    bits = metrics("pretrain", "val_bits_per_byte")
    return [measure("validation bits per byte", bits[0], bits[-1])]


def prepare_lines(watch):
    """The lines-to-order task, as conversations, pairs and prompts."""
    if not (ROOT / OUT / "lines").exists():
        run(watch, "data/lines.py", f"--corpus={CORPUS}", f"--out_dir={OUT}/lines")
    for kind, train, val in (("chat", "train", "val"), ("pairs", "train_pairs", "val_pairs"),
                             ("prompts", "train_prompts", "val_prompts")):
        if not (ROOT / OUT / kind).exists():
            run(watch, "data/prepare.py", kind, f"--input={OUT}/lines/{train}.jsonl",
                f"--val_input={OUT}/lines/{val}.jsonl", f"--tokenizer={OUT}/pretrain",
                f"--out_dir={OUT}/{kind}")


def sft(watch):
    prepare_lines(watch)
    run(watch, "train_sft.py", "demos/demo/sft.py", "--resume=true")
    before, n = lines_met("pretrain", 1.0, 4)
    after, _ = lines_met("sft", 1.0, 4)
    rows = [measure(f"whole request met, T = 1, {n} x 4", before["all"], after["all"])]
    before, _ = lines_met("pretrain", 0.0, 1)
    after, _ = lines_met("sft", 0.0, 1)
    return rows + [measure(f"{part} right, greedy, {n}", before[part], after[part]) for part in lines.PARTS]


def dpo(watch):
    run(watch, "train_dpo.py", "demos/demo/dpo.py", "--resume=true")
    n = json.loads((ROOT / OUT / "pairs/meta.json").read_text())["splits"]["val"]["pairs"]
    rows = [measure(f"{what}, {n} pairs", values[0], values[-1]) for what, values in (
        ("pair accuracy by reward", metrics("dpo", "val_accuracy")),
        ("better answer is likelier", metrics("dpo", "val_ranking")))]
    before, n = lines_met("sft", 1.0, 4)
    after, _ = lines_met("dpo", 1.0, 4)
    return rows + [measure(f"whole request met, T = 1, {n} x 4", before["all"], after["all"])]


def grpo(watch):
    # faster, but an error on GPUs and on other processors than x86
    packed = not torch.cuda.is_available() and "fbgemm" in torch.backends.quantized.supported_engines
    run(watch, "train_grpo.py", "demos/demo/grpo.py", f"--packed={str(packed).lower()}", "--resume=true")
    before, n = lines_met("dpo", 1.0, 4)
    after, _ = lines_met("grpo", 1.0, 4)
    return [measure(f"whole request met, T = 1, {n} x 4", before["all"], after["all"]),
            measure("words that are verse, T = 1", before["verse"], after["verse"])]


def student(watch, name, taught, seed=1337):
    """-> validation loss of a small model after the run out/demo/NAME, taught by the pretrained or alone"""
    script = ["train_kd.py", "demos/demo/student.py", "demos/demo/kd.py"] if taught else \
        ["train_pretrain.py", "demos/demo/student.py"]
    run(watch, *script, f"--out_dir={OUT}/{name}", f"--seed={seed}", "--resume=true")
    return metrics(name, "val_loss")[-1]


def kd(watch):
    return [measure("student's val loss: alone, taught", student(watch, "kd_alone", False),
                    student(watch, "kd", True))]


STAGES = {"prepare": prepare, "pretrain": pretrain, "sft": sft, "dpo": dpo, "grpo": grpo, "kd": kd}
RUNS = {"pretrain": ["pretrain"], "sft": ["sft"], "dpo": ["dpo"], "grpo": ["grpo"], "kd": ["kd_alone", "kd"]}


def samples(stage):
    """
    -> list of (prompt, text before the stage, after it), from what its runs wrote at their first and last
    evaluation; of the student's two runs the last of each
    """
    def texts(name, which):
        with open(ROOT / OUT / name / "samples.jsonl", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        step = which(row["step"] for row in rows)
        return {row["prompt"]: row["text"] for row in rows if row["step"] == step}
    first, last = RUNS[stage][0], RUNS[stage][-1]
    before = texts(first, min if first == last else max)
    return [(prompt, before[prompt], text) for prompt, text in texts(last, max).items()]


def print_side_by_side(prompt, before, after):
    width = (min(shutil.get_terminal_size((110, 24)).columns, 130) - 3) // 2
    columns = [[part for line in text.strip().splitlines() for part in textwrap.wrap(line, width) or [""]]
               for text in (before, after)]
    print(f"\n  {prompt!r}")
    for i in range(min(12, max(map(len, columns)))):             # the page has all
        left, right = (column[i] if i < len(column) else "" for column in columns)
        print(f"{left:<{width}} | {right}")


if __name__ == "__main__":
    show_user_errors()
    dist.tune_malloc()
    (ROOT / OUT).mkdir(parents=True, exist_ok=True)
    progress = Progress([name for name in STAGES if not (ROOT / OUT / f"{name}.json").exists()])
    summary = {name: once(name, stage, progress) for name, stage in STAGES.items()}
    (ROOT / OUT / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    texts = {stage: samples(stage) for stage in RUNS}
    for stage, rows in texts.items():
        before, after = ("alone", "taught") if stage == "kd" else ("before", "after")
        print(f"\n{'-' * 40} {stage}: {before} | {after}")
        for row in rows:
            print_side_by_side(*row)
    print(f"\n{'stage':<12}{'measured on held-out data':<40}{'before':>10}{'after':>10}{'seconds':>10}")
    for name, row in summary.items():
        print(f"{name:<12}{row['measure']:<40}{row['before']:>10.3f}{row['after']:>10.3f}"
              f"{row['seconds']:>10.1f}")
        for more in row["also"]:
            print(f"{'':<12}{more['measure']:<40}{more['before']:>10.3f}{more['after']:>10.3f}")
    print(f"{'all':<92}{sum(row['seconds'] for row in summary.values()):>10.1f}")
    report.write(ROOT / OUT, summary, texts, RUNS)
    print(f"\n{OUT}/report.html has this and the curves. Talk to the last model:\n"
          f"    {Path(sys.executable).name} sample.py --init_from={OUT}/grpo --chat=true")
