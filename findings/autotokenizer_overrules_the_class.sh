#!/bin/bash
# transformers 5.23.0: AutoTokenizer does not load the tokenizer.json of a folder as it is where config.json has
# model_type qwen2, whatever tokenizer_class says.
#
# Expected: with "tokenizer_class": "PreTrainedTokenizerFast" the file is read as it stands, as for other types.
# Seen: a Qwen2Tokenizer is built from vocabulary and merges, with Qwen's rule for splitting text and its NFC, so
# that a folder with another rule (here: up to three digits are one piece) gets other ids, without a warning.
# PreTrainedTokenizerFast.from_pretrained reads the file.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0
"$folder/venv/bin/python" - "$folder" <<'PYTHON' 2>"$folder/log" || { cat "$folder/log"; exit 1; }
import json
import sys
from pathlib import Path
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
vocab = {char: i for i, char in enumerate([*alphabet, "12", "123"])}
t = Tokenizer(models.BPE(vocab, [("1", "2"), ("12", "3")]))
t.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\P{N}+"), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
t.decoder = decoders.ByteLevel()
ids = {}
for model_type in ("llama", "qwen2"):
    folder = Path(sys.argv[1], model_type)
    folder.mkdir()
    t.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    ids[model_type] = len(loaded.encode("123"))
    direct = transformers.PreTrainedTokenizerFast.from_pretrained(folder).encode("123")
    print(f"transformers {transformers.__version__}, model_type {model_type}: AutoTokenizer gives a "
          f"{type(loaded).__name__} and {ids[model_type]} ids for '123'; PreTrainedTokenizerFast {len(direct)}")
    assert len(direct) == 1
assert ids == dict(llama=1, qwen2=3), "this has changed"
PYTHON
