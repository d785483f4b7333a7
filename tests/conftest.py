"""Shared by all tests: the repository's root, running scripts as a user does, and a small token set."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)                       # results must not depend on how many tests share the cores


def run(*args, ranks=1, check=True, timeout=300, **kwargs):
    """Run a script of ours, e.g. run("train_pretrain.py", "--num_steps=2"); ranks > 1 uses torchrun."""
    launcher = [sys.executable] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run([*launcher, *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True,
                            timeout=timeout, **kwargs)
    if check:
        assert result.returncode == 0, f"exit code {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder with corpus.jsonl: 60 short documents with some non-ASCII in them."""
    import json
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
