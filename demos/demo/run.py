"""
The demo: every stage in turn on the bundled corpus, then what each one changed: numbers, and what
the models write before and after.

    python demos/demo/run.py          # or `make demo`, which makes an environment first

Everything goes to out/demo. A stage whose result is there is not run again; remove out/demo to
start over. Writes out/demo/
    report.html     table, curves (with matplotlib, the extra `plot`) and samples on one page
    summary.json    for every stage what was measured, before and after, and its seconds
    log.txt         all that the scripts have printed
"""

import collections
import functools
import itertools
import json
import re
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import torch

# the repository's root must be on the path first
sys.path.insert(0, str(Path(__file__).absolute().parents[2]))

from common.dist import short_time
from common.sampling import SamplingConfig
from data import lines
from demos.demo import report
from demos.shared import begin, kept, prepare, print_row, read_rows, replies
from sample import load

OUT = "out/demo"
CORPUS = "data/shakespeare"
# on two CPU cores, about
SECONDS = dict(prepare=12, pretrain=180, sft=135, dpo=75, grpo=115, kd=75)


class Progress:
    """
    Where the demo is, in one line: on a terminal it is written over, a log file gets one every 20
    seconds. How long the rest takes follows from SECONDS and from how long what is done has taken.
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
            # the next run of this stage
            self.runs += step < self.step
            self.step, self.total = step, total
            self.show(f"step {step}/{total}")

    def show(self, what, wait=True):
        now = time.time()
        if wait and now - self.shown < (0.2 if self.is_tty else 20):
            return
        self.shown = now
        at = self.stages.index(self.stage)
        num_runs = 2 if self.stage == "kd" else 1
        of_stage = min(1.0, (self.runs + self.step / self.total) / num_runs)
        usual = [SECONDS[stage] for stage in self.stages]
        done = sum(usual[:at]) + of_stage * usual[at]
        # SECONDS a second
        speed = done / (now - self.started) if done > 5 else 1.0
        stage_time = short_time(now - self.stage_started)
        time_left = short_time((sum(usual) - done) / speed)
        place = f"[{at + 1}/{len(self.stages)}] {self.stage:<8}"
        self.print(
            f"{place} | {what:<13} | {stage_time:>6} | whole demo: "
            f"{short_time(now - self.started)} done, eta {time_left}",
            end="" if self.is_tty else "\n",
        )

    def end(self, rows):
        changes = [f"{row['measure']} {row['before']:.3f} -> {row['after']:.3f}" for row in rows]
        stage_time = short_time(time.time() - self.stage_started)
        self.print(f"{self.stage}: {stage_time}; {', '.join(changes)}")

    def print(self, line, end="\n"):
        blank = f"\r{'':<100}\r" if self.is_tty else ""
        print(blank + line, end=end, flush=True)


def run_script(watch, *command):
    """Run a script: each line that it prints goes to watch and to out/demo/log.txt"""
    with open(f"{OUT}/log.txt", "a", encoding="utf-8") as log:
        print("\n$ python " + " ".join(command), file=log, flush=True)
        process = subprocess.Popen(
            [sys.executable, *command],
            text=True,
            encoding="utf-8",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        last = collections.deque(maxlen=10)
        for line in process.stdout:
            print(line, end="", file=log, flush=True)
            watch(line)
            last.append(line)
    if process.wait():
        print(f"\n{''.join(last)}{command[0]} failed; all it has printed is in {OUT}/log.txt")
        sys.exit(process.returncode)


def measure_stage(name, progress):
    """Run a stage -> its row of the summary"""
    progress.begin(name)
    start = time.time()
    measures = STAGES[name](functools.partial(run_script, progress.watch))
    seconds = round(time.time() - start, 1)
    progress.end(measures)
    first, *also = measures
    return {**first, "also": also, "seconds": seconds}


def measure(what, before, after):
    return dict(measure=what, before=before, after=after)


def metrics(name, key):
    """-> the values of one key in a run's metrics.jsonl, in order"""
    return [row[key] for row in read_rows(f"{OUT}/{name}/metrics.jsonl") if key in row]


@functools.cache
def lines_met(name, temperature, num_samples):
    """How a run's replies to the held-out requests do -> shares by part, verse, all; requests"""
    model, tokenizer = load(f"{OUT}/{name}", "cpu")
    chats = [chat[:1] for chat in read_rows(f"{OUT}/lines/test.jsonl")]
    cfg = SamplingConfig(max_new_tokens=48, temperature=temperature)
    texts = [tokenizer.decode(ids) for ids in replies(model, tokenizer, chats, cfg, num_samples)]
    met = [lines.met(chats[i // num_samples][0]["content"], text) for i, text in enumerate(texts)]
    shares = {part: sum(m[part] for m in met) / len(met) for part in lines.PARTS}
    shares["verse"] = sum(map(lines.verse_share, texts)) / len(texts)
    shares["all"] = sum(all(m.values()) for m in met) / len(met)
    return shares, len(chats)


def compare(part, what, first, last, temperature=1.0, num_samples=4):
    """-> row about a share of two runs' replies; what: with {n} for the number of requests"""
    before, n = lines_met(first, temperature, num_samples)
    after, _ = lines_met(last, temperature, num_samples)
    return measure(what.format(n=n), before[part], after[part])


WHOLE = "all", "whole request met, T = 1, {n} x 4"


# -----------------------------------------------------------------------------
# stages: run(script, options) -> rows of what was measured


def prepare_text(run):
    tokenizer, data = f"{OUT}/tokenizer.model", f"{OUT}/data"
    if not Path(tokenizer).exists():
        run(
            "data/prepare.py",
            "tokenizer",
            f"--input={CORPUS}/train.jsonl.gz",
            "--vocab_size=2048",
            f"--out={tokenizer}",
        )
    prepare(run, "text", f"{CORPUS}/*.jsonl.gz", data, f"--tokenizer={tokenizer}")
    split = splits_of("data")["train"]
    return [measure("bytes per token", 1.0, split["bytes"] / split["tokens"])]


def splits_of(name):
    return json.loads(Path(OUT, name, "meta.json").read_text())["splits"]


def pretrain(run):
    run("train_pretrain.py", "demos/demo/pretrain.py", "--resume=true")
    bits = metrics("pretrain", "val_bits_per_byte")
    return [measure("validation bits per byte", bits[0], bits[-1])]


def prepare_lines(run):
    """The lines-to-order task, as conversations, pairs and prompts."""
    if not Path(OUT, "lines").exists():
        run("data/lines.py", f"--corpus={CORPUS}", f"--out_dir={OUT}/lines")
    for kind, rows in (("chat", "*"), ("pairs", "*_pairs"), ("prompts", "*_prompts")):
        prepare(
            run, kind, f"{OUT}/lines/{rows}.jsonl", f"{OUT}/{kind}", f"--tokenizer={OUT}/pretrain"
        )


def sft(run):
    prepare_lines(run)
    run("train_sft.py", "demos/demo/sft.py", "--resume=true")
    rows = [compare(*WHOLE, "pretrain", "sft")]
    for part in lines.PARTS:
        what = part + " right, greedy, {n}"
        rows.append(compare(part, what, "pretrain", "sft", temperature=0.0, num_samples=1))
    return rows


def dpo(run):
    run("train_dpo.py", "demos/demo/dpo.py", "--resume=true")
    n = splits_of("pairs")["val"]["pairs"]
    accuracy, ranking = metrics("dpo", "val_accuracy"), metrics("dpo", "val_ranking")
    return [
        measure(f"pair accuracy by reward, {n} pairs", accuracy[0], accuracy[-1]),
        measure(f"better answer is likelier, {n} pairs", ranking[0], ranking[-1]),
        compare(*WHOLE, "sft", "dpo"),
    ]


def grpo(run):
    # faster, but an error on GPUs and on other processors than x86
    fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    packed = "true" if fbgemm and not torch.cuda.is_available() else "false"
    run("train_grpo.py", "demos/demo/grpo.py", f"--packed={packed}", "--resume=true")
    return [
        compare(*WHOLE, "dpo", "grpo"),
        compare("verse", "words that are verse, T = 1", "dpo", "grpo"),
    ]


def student(run, name, taught, seed=1337):
    """-> validation loss of a small model after the run out/demo/NAME, taught or alone"""
    script = ["train_pretrain.py", "demos/demo/student.py"]
    if taught:
        script = ["train_kd.py", "demos/demo/student.py", "demos/demo/kd.py"]
    run(*script, f"--out_dir={OUT}/{name}", f"--seed={seed}", "--resume=true")
    return metrics(name, "val_loss")[-1]


def kd(run):
    alone, taught = student(run, "kd_alone", False), student(run, "kd", True)
    return [measure("student's val loss: alone, taught", alone, taught)]


STAGES = {
    "prepare": prepare_text,
    "pretrain": pretrain,
    "sft": sft,
    "dpo": dpo,
    "grpo": grpo,
    "kd": kd,
}
RUNS = {
    "pretrain": ["pretrain"],
    "sft": ["sft"],
    "dpo": ["dpo"],
    "grpo": ["grpo"],
    "kd": ["kd_alone", "kd"],
}


# -----------------------------------------------------------------------------
# what the models write


def samples(stage):
    """
    -> list of (prompt, text before the stage, after it), from what its runs wrote at their first
    and last evaluation; of the student's two runs the last of each
    """
    first, last = RUNS[stage][0], RUNS[stage][-1]
    before = texts_at(first, min if first == last else max)
    return [(prompt, before[prompt], text) for prompt, text in texts_at(last, max).items()]


def texts_at(name, which):
    """-> dict of prompt to text at a run's first (min) or last (max) evaluation"""
    rows = read_rows(f"{OUT}/{name}/samples.jsonl")
    step = which(row["step"] for row in rows)
    return {row["prompt"]: row["text"] for row in rows if row["step"] == step}


def wrapped(text, width):
    parts = []
    for line in text.strip().splitlines():
        parts += textwrap.wrap(line, width) or [""]
    return parts


def print_side_by_side(prompt, before, after):
    width = (min(shutil.get_terminal_size((110, 24)).columns, 130) - 3) // 2
    print(f"\n  {prompt!r}")
    rows = itertools.zip_longest(wrapped(before, width), wrapped(after, width), fillvalue="")
    # the page has all
    for left, right in itertools.islice(rows, 12):
        print(f"{left:<{width}} | {right}")


def print_table(summary):
    row_of = functools.partial(print_row, width=52, column=10)
    print()
    row_of(f"{'stage':<12}measured on held-out data", "before", "after", "seconds")
    for name, row in summary.items():
        seconds = f"{row['seconds']:.1f}"
        row_of(f"{name:<12}{row['measure']}", row["before"], row["after"], seconds)
        for more in row["also"]:
            row_of(f"{'':<12}{more['measure']}", more["before"], more["after"])
    seconds = sum(row["seconds"] for row in summary.values())
    row_of("all", "", "", f"{seconds:.1f}")


if __name__ == "__main__":
    begin(OUT)
    results = {name: Path(OUT, f"{name}.json") for name in STAGES}
    progress = Progress([name for name, path in results.items() if not path.exists()])
    summary = {name: kept(path, measure_stage, name, progress) for name, path in results.items()}
    Path(OUT, "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    texts = {stage: samples(stage) for stage in RUNS}
    for stage, rows in texts.items():
        titles = "alone | taught" if stage == "kd" else "before | after"
        print(f"\n{'-' * 40} {stage}: {titles}")
        for row in rows:
            print_side_by_side(*row)
    print_table(summary)
    report.write(Path(OUT), summary, texts, RUNS)
    print(
        f"\n{OUT}/report.html has this and the curves. Talk to the last model:\n"
        f"    {Path(sys.executable).name} sample.py --init_from={OUT}/grpo --chat=true"
    )
