#!/bin/bash
# tokenizers 0.23.3 against sentencepiece 0.2.3: the same normaliser ("Precompiled", the table of nmt_nfkc) gives
# another text for some sequences.
#
# Expected: tokenizers normalises as SentencePiece does, of whose file it reads the table. Seen: it looks whole
# graphemes up, and takes what the table has for their beginning, where SentencePiece takes the longest match at
# each position: a character with a combining mark that the table does not have as a whole loses the mark.
# A tokenizer.json made from a SentencePiece model with a normaliser cannot give the model's ids for such texts.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check \
    tokenizers==0.23.3 sentencepiece==0.2.3 protobuf==7.36.2
"$folder/venv/bin/python" - <<'PYTHON'
import io
import sentencepiece
import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers.normalizers import Precompiled

model = io.BytesIO()
sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(["one two three four five six seven"] * 50), model_writer=model, vocab_size=40,
    minloglevel=2, normalization_rule_name="nmt_nfkc", add_dummy_prefix=False, model_type="bpe")
proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
theirs = Precompiled(proto.normalizer_spec.precompiled_charsmap)
normalizer = sentencepiece.SentencePieceNormalizer(model_proto=model.getvalue())
seen = {}
for text in ("\u2460", "\u2460\u0301", "\uff76", "\uff76\uff9e"):
    one, other = normalizer.normalize(text), theirs.normalize_str(text)
    seen[text] = one == other
    print(f"{ascii(text)}: sentencepiece {sentencepiece.__version__} {ascii(one)}, "
          f"tokenizers {tokenizers.__version__} {ascii(other)}")
assert list(seen.values()) == [True, False, True, False], "this has changed"
PYTHON
