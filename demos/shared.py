"""What the demos have in common: running scripts, results that are kept, answers, tables."""

import json
import os
import subprocess
import sys
from pathlib import Path

from common import dist
from common.chat import encode_chat
from common.errors import show_user_errors
from common.sampling import complete, for_vocabulary

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
    code = subprocess.run([sys.executable, *command]).returncode
    if code:
        sys.exit(code)


def prepare(run, kind, rows, out_dir, *options):
    """A set of files like "rows/*.jsonl", where * is train or val, unless it is there"""
    if not Path(out_dir).exists():
        run(
            "data/prepare.py",
            kind,
            f"--input={rows.replace('*', 'train')}",
            f"--val_input={rows.replace('*', 'val')}",
            f"--out_dir={out_dir}",
            *options,
        )


def kept(path, make, *args):
    """-> what make(*args) returns, kept as JSON for a second run"""
    path = Path(path)
    if not path.exists():
        path.write_text(json.dumps(make(*args)))
    return json.loads(path.read_text())


def read_rows(path):
    """-> list of what the lines of a .jsonl hold"""
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def replies(model, tokenizer, chats, cfg, num_samples=1):
    """-> ids of num_samples replies to each of these conversations, in order"""
    prompts = [ids for ids, _ in encode_chat(tokenizer, chats, reply=True)]
    cfg = for_vocabulary(cfg, model, tokenizer)
    answers, *_ = complete(model, prompts, cfg, tokenizer.ends, num_samples)
    return answers


def print_row(name, *values, width=60, column=8):
    """A line of a table: fractions with three digits"""
    cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in values]
    print(f"{name:<{width}}" + "".join(f"{cell:>{column}}" for cell in cells))
