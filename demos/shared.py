"""What the demos have in common: running scripts, results that are kept, answers, tables."""

import json
import os
import subprocess
import sys
from pathlib import Path

from common import dist
from common.chat import encode_chat
from common.errors import show_user_errors
from common.sampling import SamplingConfig, complete, for_vocabulary
from sample import load

ROOT = Path(__file__).absolute().parents[1]


def begin(out):
    """Start a demo: in the repository's root, with a folder `out`"""
    show_user_errors()
    dist.tune_malloc()
    os.chdir(ROOT)
    Path(out).mkdir(parents=True, exist_ok=True)


def run(*command):
    """Run a script, which prints to the terminal. The demo ends where it fails."""
    print("\n$ python " + " ".join(command), flush=True)
    if code := subprocess.run([sys.executable, *command]).returncode:
        sys.exit(code)


def make(run, path, *command):
    """Run a script that makes `path`, unless it is there"""
    if not Path(path).exists():
        run(*command)


def train_tokenizer(run, text, vocab_size, path):
    """A tokenizer of a .jsonl file's text, unless it is there"""
    make(
        run,
        path,
        "data/prepare.py",
        "tokenizer",
        f"--input={text}",
        f"--vocab_size={vocab_size}",
        f"--out={path}",
    )


def prepare(run, kind, rows, out_dir, *options):
    """A set of files like "rows/*.jsonl", where * is train or val, unless it is there"""
    make(
        run,
        out_dir,
        "data/prepare.py",
        kind,
        f"--input={rows.replace('*', 'train')}",
        f"--val_input={rows.replace('*', 'val')}",
        f"--out_dir={out_dir}",
        *options,
    )


def kept(path, function, *args):
    """-> what function(*args) returns, kept as JSON for a second run"""
    path = Path(path)
    if not path.exists():
        path.write_text(json.dumps(function(*args)))
    return json.loads(path.read_text())


def read_rows(path):
    """-> list of what the lines of a .jsonl hold"""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def replies(run_dir, chats, num_samples, temperature, max_new_tokens, **how):
    """
    -> texts of num_samples replies of a run's model to each of these conversations, in order; how:
    see Tokenizer.decode
    """
    model, tokenizer = load(run_dir, "cpu")
    prompts = [ids for ids, _ in encode_chat(tokenizer, chats, reply=True)]
    cfg = SamplingConfig(max_new_tokens=max_new_tokens, temperature=temperature)
    cfg = for_vocabulary(cfg, model, tokenizer)
    answers, *_ = complete(model, prompts, cfg, tokenizer.ends, num_samples)
    return [tokenizer.decode(ids, **how) for ids in answers]


def print_row(name, *values, width=60, column=8):
    """A line of a table: fractions with three digits"""
    cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in values]
    print(f"{name:<{width}}" + "".join(f"{cell:>{column}}" for cell in cells))
