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
from data import lines
from demos.demo import report
from demos.shared import (
    begin,
    kept,
    make,
    prepare,
    print_row,
    read_rows,
    replies,
    train_tokenizer,
)

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
        self.stages, self.started = stages, time.time()
        self.every, self.clear, self.end_line = 20, "", "\n"
        # written over
        if sys.stdout.isatty():
            self.every, self.clear, self.end_line = 0.2, f"\r{'':<100}\r", ""

    def begin(self, stage):
        self.stage, self.stage_started = stage, time.time()
        self.runs = self.step = 0
        self.show("preparing", 0)

    def watch(self, line):
        """A line that a script has printed"""
        if match := re.match(r"step +(\d+)/(\d+) \|", line):
            step, total = map(int, match.groups())
            # the next run of this stage
            self.runs += step < self.step
            self.step = step
            if time.time() - self.shown >= self.every:
                self.show(f"step {step}/{total}", self.runs + step / total)

    def show(self, what, runs):
        """runs: how many of this stage are done, a fraction"""
        now = self.shown = time.time()
        at = self.stages.index(self.stage)
        usual = [SECONDS[stage] for stage in self.stages]
        done = sum(usual[:at]) + usual[at] * runs / (2 if self.stage == "kd" else 1)
        # SECONDS a second
        speed = done / (now - self.started) if done > 5 else 1.0
        eta = short_time((sum(usual) - done) / speed)
        line = (
            f"[{at + 1}/{len(usual)}] {self.stage:<8} | {what:<13} | "
            f"{short_time(now - self.stage_started):>6} | whole demo: "
            f"{short_time(now - self.started)} done, eta {eta}"
        )
        print(self.clear + line, end=self.end_line, flush=True)

    def end(self, rows):
        changes = [f"{row['measure']} {row['before']:.3f} -> {row['after']:.3f}" for row in rows]
        stage_time = short_time(time.time() - self.stage_started)
        print(f"{self.clear}{self.stage}: {stage_time}; {', '.join(changes)}", flush=True)


def run_script(watch, *command):
    """Run a script: each line that it prints goes to watch and to out/demo/log.txt"""
    printed = []
    with open(f"{OUT}/log.txt", "a", encoding="utf-8") as log:
        print("\n$ python " + " ".join(command), file=log, flush=True)
        process = subprocess.Popen(
            [sys.executable, *command],
            encoding="utf-8",
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for line in process.stdout:
            print(line, end="", file=log, flush=True)
            watch(line)
            printed.append(line)
    if process.wait():
        last = "".join(printed[-10:])
        print(f"\n{last}{command[0]} failed; all it has printed is in {OUT}/log.txt")
        sys.exit(process.returncode)


def measure_stage(name, progress):
    """Run a stage -> its row of the summary"""
    progress.begin(name)
    measures = STAGES[name](functools.partial(run_script, progress.watch))
    seconds = round(time.time() - progress.stage_started, 1)
    progress.end(measures)
    first, *also = measures
    return {**first, "also": also, "seconds": seconds}


def measure(what, before, after):
    return dict(measure=what, before=before, after=after)


def values_of(name, key):
    """-> the values of one key in a run's metrics.jsonl, in order"""
    return [row[key] for row in read_rows(f"{OUT}/{name}/metrics.jsonl") if key in row]


def progress_of(what, name, key):
    """-> row about a run's first and last evaluation"""
    values = values_of(name, key)
    return measure(what, values[0], values[-1])


@functools.cache
def lines_met(name, greedy):
    """
    How a run's replies to the held-out requests do, one greedy or four sampled ones to each ->
    shares by part, verse, all; n: requests
    """
    chats = [chat[:1] for chat in read_rows(f"{OUT}/lines/test.jsonl")]
    num_samples, temperature = (1, 0.0) if greedy else (4, 1.0)
    texts = replies(f"{OUT}/{name}", chats, num_samples, temperature, max_new_tokens=48)
    met = [lines.met(chats[i // num_samples][0]["content"], text) for i, text in enumerate(texts)]
    shares = {part: sum(m[part] for m in met) / len(met) for part in lines.PARTS}
    shares["verse"] = sum(map(lines.verse_share, texts)) / len(texts)
    shares["all"] = sum(all(m.values()) for m in met) / len(met)
    return {**shares, "n": len(chats)}


def compare(part, what, first, last, greedy=False):
    """-> row about a share of two runs' replies; what: with {n} for the number of requests"""
    before, after = lines_met(first, greedy), lines_met(last, greedy)
    return measure(what.format(**before), before[part], after[part])


def whole_met(first, last):
    return compare("all", "whole request met, T = 1, {n} x 4", first, last)


# -----------------------------------------------------------------------------
# stages: run(script, options) -> rows of what was measured


def prepare_text(run):
    tokenizer, data = f"{OUT}/tokenizer.model", f"{OUT}/data"
    train_tokenizer(run, f"{CORPUS}/train.jsonl.gz", 2048, tokenizer)
    prepare(run, "text", f"{CORPUS}/*.jsonl.gz", data, f"--tokenizer={tokenizer}")
    split = splits_of("data")["train"]
    return [measure("bytes per token", 1.0, split["bytes"] / split["tokens"])]


def splits_of(name):
    return json.loads(Path(OUT, name, "meta.json").read_text())["splits"]


def pretrain(run):
    run("train_pretrain.py", "demos/demo/pretrain.py", "--resume=true")
    return [progress_of("validation bits per byte", "pretrain", "val_bits_per_byte")]


def sft(run):
    folder = f"{OUT}/lines"
    make(run, folder, "data/lines.py", f"--corpus={CORPUS}", f"--out_dir={folder}")
    for kind, rows in (("chat", "*"), ("pairs", "*_pairs"), ("prompts", "*_prompts")):
        prepare(run, kind, f"{folder}/{rows}.jsonl", f"{OUT}/{kind}", f"--tokenizer={OUT}/pretrain")
    run("train_sft.py", "demos/demo/sft.py", "--resume=true")
    rows = [whole_met("pretrain", "sft")]
    for part in lines.PARTS:
        rows.append(compare(part, f"{part} right, greedy, {{n}}", "pretrain", "sft", greedy=True))
    return rows


def dpo(run):
    run("train_dpo.py", "demos/demo/dpo.py", "--resume=true")
    n = splits_of("pairs")["val"]["pairs"]
    return [
        progress_of(f"pair accuracy by reward, {n} pairs", "dpo", "val_accuracy"),
        progress_of(f"better answer is likelier, {n} pairs", "dpo", "val_ranking"),
        whole_met("sft", "dpo"),
    ]


def grpo(run):
    # faster, but an error on GPUs and on other processors than x86
    fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    packed = "true" if fbgemm and not torch.cuda.is_available() else "false"
    run("train_grpo.py", "demos/demo/grpo.py", f"--packed={packed}", "--resume=true")
    return [
        whole_met("dpo", "grpo"),
        compare("verse", "words that are verse, T = 1", "dpo", "grpo"),
    ]


def student(run, name, taught, seed=1337):
    """-> validation loss of a small model after the run out/demo/NAME, taught or alone"""
    script = ["train_pretrain.py", "demos/demo/student.py"]
    if taught:
        script = ["train_kd.py", "demos/demo/student.py", "demos/demo/kd.py"]
    run(*script, f"--out_dir={OUT}/{name}", f"--seed={seed}", "--resume=true")
    return values_of(name, "val_loss")[-1]


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
RUNS = {stage: [stage] for stage in STAGES if stage != "prepare"}
RUNS["kd"] = ["kd_alone", "kd"]


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
    parts = [textwrap.wrap(line, width) or [""] for line in text.strip().splitlines()]
    return itertools.chain(*parts)


def print_side_by_side(prompt, before, after):
    width = (min(shutil.get_terminal_size((110, 24)).columns, 130) - 3) // 2
    print(f"\n  {prompt!r}")
    rows = itertools.zip_longest(wrapped(before, width), wrapped(after, width), fillvalue="")
    # the page has all
    for left, right in itertools.islice(rows, 12):
        print(f"{left:<{width}} | {right}")


def print_table(summary):
    print()
    seconds = sum(row["seconds"] for row in summary.values())
    total = "all", "", "", "", f"{seconds:.1f}"
    for stage, what, *values in (*report.table_rows(summary, digits=1), total):
        print_row(f"{stage:<12}{what}", *values, width=52, column=10)


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
