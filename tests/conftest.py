"""Shared by all tests: the repository's root, running scripts as a user does, and a small token set."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import launch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                       # results must not depend on how many tests share the cores


def run(*args, ranks=1, check=True, timeout=300, input="", **kwargs):
    """Run a script of ours, e.g. run("train_pretrain.py", "--num_steps=2"), on one or more ranks."""
    if kwargs or args[0] == "-c":              # limits, ...: a process from scratch
        result = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, capture_output=True, text=True,
                                env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=timeout, input=input,
                                **kwargs)
    else:
        result = launch(args, ranks, timeout=timeout, input=input)
    if check:
        assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with corpus.jsonl: 60 short documents with some non-ASCII in them."""
    folder = tmp_path_factory.mktemp("corpus")
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        for i in range(60):
            words = " ".join(f"word{(i * 7 + j * j) % 50}" for j in range(20 + i % 13))
            text = f"Document {i}: {words}. Ende, fin, 結尾.\n"
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return folder


@pytest.fixture(scope="session")
def token_set(corpus):
    """A prepared byte-level set with a train and a val split."""
    run("data/prepare.py", "text", f"--input={corpus}/corpus.jsonl", "--val_frac=0.2",
        f"--out_dir={corpus}/set")
    return corpus / "set"


def prepared(tmp_path_factory, kind, rows):
    """Rows, of what JSON can hold -> folder of a byte-level set of that kind, with a train and a val split"""
    folder = tmp_path_factory.mktemp(kind)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("data/prepare.py", kind, f"--input={folder}/rows.jsonl", "--val_frac=0.2", f"--out_dir={folder}/set")
    return folder / "set"


@pytest.fixture(scope="session")
def chat_set(tmp_path_factory):
    """Conversations of many lengths"""
    def chat(i):
        question = {"role": "user", "content": f"{i % 10}" + "?" * (i % 4)}
        answer = {"role": "assistant", "content": f"{i % 10}" * (1 + i * i % 7)}
        start = [{"role": "system", "content": "count"}] * (i % 5 == 0)
        return start + [question, answer] * (1 + i % 3)
    return prepared(tmp_path_factory, "chat", map(chat, range(160)))


@pytest.fixture(scope="session")
def image_set(tmp_path_factory):
    """Conversations with no, one and two images of 16 x 16 pixels, of 12 pictures; 4 tokens each"""
    Image = pytest.importorskip("PIL.Image", reason="the extra images")
    folder, colours = tmp_path_factory.mktemp("images"), ("red", "blue", "lime", "gold")

    def chat(i):
        shown = [f"{(i // 3 * 5 + n * (1 + i // 9)) % 12}.png" for n in range(i % 3)]
        said = ",".join(colours[int(name[:-4]) % 4] for name in shown) or "none"
        return {"messages": [{"role": "user", "content": "?" * (i % 4) + "<image>" * len(shown) + "what"},
                             {"role": "assistant", "content": said}], "images": shown}
    for n in range(12):
        image = Image.new("RGB", (16, 16), colours[n % 4])
        image.putpixel((n, n), (0, 0, 0))
        image.save(folder / f"{n}.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(chat(i)) + "\n" for i in range(160)))
    run("data/prepare.py", "images", f"--input={folder}/rows.jsonl", "--val_frac=0.2", "--image_size=16",
        "--tokens_per_image=4", f"--out_dir={folder}/set")
    return folder / "set"


@pytest.fixture(scope="session")
def pair_set(tmp_path_factory):
    """Pairs of answers of many lengths"""
    return prepared(tmp_path_factory, "pairs", [
        dict(prompt=f"{i % 10}" + "?" * (i % 4), chosen=f"{i % 10}" * (1 + i * i % 7),
             rejected="abc"[i % 3] * (1 + i % 5)) for i in range(160)])


@pytest.fixture(scope="session")
def prompt_set(tmp_path_factory):
    """Prompts of several lengths"""
    return prepared(tmp_path_factory, "prompts", [
        dict(prompt=f"{i % 10}" * (1 + i % 4), answer="a") for i in range(100)])


@pytest.fixture(scope="session")
def teacher_run(token_set, tmp_path_factory):
    """A run to learn from, a little trained, with room for conversations of 150 tokens"""
    out = tmp_path_factory.mktemp("teacher") / "run"
    run("train_pretrain.py", f"--data_dir={token_set}", f"--out_dir={out}", "--model.n_layer=2",
        "--model.n_head=2", "--model.n_embd=32", "--seq_len=150", "--batch_size=8", "--num_steps=60",
        "--lr=1e-2", "--warmup_steps=5", "--eval_seqs=0", "--device=cpu")
    return out
