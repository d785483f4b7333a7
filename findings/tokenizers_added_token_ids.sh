#!/bin/bash
# tokenizers 0.23.3: the ids of "added_tokens" in a tokenizer.json are not honoured where they lie beyond the
# vocabulary's length; they are counted on from there.
#
# Expected: an added token written with "id": 10 is encoded as 10. Seen: it is encoded as 3, the length of the
# vocabulary. Who writes a tokenizer.json for a model whose vocabulary has holes, or drops unused entries, gets a
# tokenizer whose special tokens point at other rows of the embedding, without a warning. What helps: enter added
# tokens in model.vocab too.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PYTHON'
import json
import tokenizers

vocab = {"a": 0, "b": 1, "ab": 2}
flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)


def encode(vocab):
    file = dict(version="1.0", added_tokens=[dict(id=10, content="<end>", **flags)],
                model=dict(type="BPE", vocab=vocab, merges=[["a", "b"]]))
    return tokenizers.Tokenizer.from_str(json.dumps(file)).encode("ab<end>").ids


outside, inside = encode(vocab), encode(vocab | {"<end>": 10})
print(f"tokenizers {tokenizers.__version__}: id 10 in added_tokens alone: {outside}; in model.vocab too: {inside}")
assert (outside, inside) == ([2, 3], [2, 10]), "this has changed"
PYTHON
