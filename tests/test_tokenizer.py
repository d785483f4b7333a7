"""Tokenizers: nothing is lost, user text never becomes a special token, streamed text is the whole text."""
import base64
import io
import json
import random
import re

import numpy as np
import pytest
import regex
import sentencepiece
import tiktoken
import tiktoken_ext.openai_public
from conftest import run

from common.errors import UserError
from common.tokenizer import (
    INFO,
    PATTERNS,
    SPECIAL_TOKENS,
    Tokenizer,
    load_tokenizer,
)
from data import train_tokenizer
from data.prepare import token_byte_counts
from data.train_tokenizer import train_sentencepiece

TEXTS = {
    "empty": "",
    "plain": "Good morrow, cousin. Is the day so young?",
    "leading space": " one  two   three ",
    "many spaces": "    \t  x\t\ty    ",
    "newlines": "\n\na\r\nb\n \n\n  c\n",
    "nul": "a\0b\0\0",
    "chinese": "\u4eca\u5929\u5929\u6c14\u5f88\u597d\uff0c\u6211\u4eec\u53bb\u516c\u56ed\u3002",
    "emoji": "ok \U0001F642\U0001F469\u200d\U0001F469\u200d\U0001F467 \U0001F1E9\U0001F1EA!",
    "combining": "e\u0301 \u0301 n\u0303 \u0e01\u0e33 \ud55c \u1112\u1161\u11ab",      # no normalisation
    "scripts": "\u041f\u0440\u0438\u0432\u0435\u0442 \u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd "
               "\u0928\u092e\u0938\u094d\u0924\u0947 \u00fcber na\u00efve \ufb01 \u2460",
    "numbers": "In 1984, 12345678 + 3.14 = don't I'LL we've",
    "borders": "\x7f\x80\u07ff\u0800\uffff\U00010000\U0010ffff\ufeff",                 # of UTF-8's lengths
}
MARKUP = ["<|end|>", "<end>", "<pad>", "<user>", "<assistant>", "<think>x</think>", "<answer>", "<image>",
          "<s>", "</s>", "<unk>", "<0x0A>", "<|endoftext|>", "<|im_start|>user", "[INST] hi [/INST]"]
CORPUS = [f"{text} the cat number {i} sat on the mat, and the other cat said hello hello."
          for i in range(30) for text in ("Good morrow, cousin.", TEXTS["chinese"], TEXTS["scripts"])]


def rank_lines(tokens):
    """The content of a .tiktoken file: a line of base64 and rank per token."""
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def write_ranks(path, tokens):
    path.write_bytes(rank_lines(tokens))
    return str(path)


BYTES = [bytes([b]) for b in range(256)]
MERGES = [b"th", b"the", b" the", b"he", b"ll", b"hell", b"hello", b" c", b"at", b" cat", b"  ", b"\n\n",
          b"12", b"\xe5\xa4", b"\xe5\xa4\xa9", b"\xe5\xa4\xa9\xe5\xa4\xa9", b"\xf0\x9f", b"\xf0\x9f\x99"]


def train_plain_sentencepiece(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model,
                                             model_type="bpe", minloglevel=2, **options)
    return model.getvalue()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """kind -> what load_tokenizer is given"""
    folder = tmp_path_factory.mktemp("vocabularies")
    (folder / "trained.model").write_bytes(train_sentencepiece(CORPUS, 430))
    # as Llama's: SentencePiece puts a space before each text
    (folder / "dummy.model").write_bytes(train_plain_sentencepiece(
        vocab_size=420, byte_fallback=True, add_dummy_prefix=True, remove_extra_whitespaces=False,
        normalization_rule_name="identity"))
    # SentencePiece's defaults: folds characters and spaces, and has no bytes for what it does not know
    (folder / "default.model").write_bytes(train_plain_sentencepiece(vocab_size=200))
    return {"bytes": "bytes", "tiktoken": write_ranks(folder / "tiny_gpt2.tiktoken", BYTES + MERGES),
            "trained": str(folder / "trained.model"), "dummy": str(folder / "dummy.model"),
            "default": str(folder / "default.model")}


@pytest.fixture(scope="module")
def tokenizers(sources):
    return {kind: load_tokenizer(source) for kind, source in sources.items()}


KINDS = ["bytes", "tiktoken", "trained", "dummy"]      # the lossless ones
each_kind = pytest.mark.parametrize("kind", KINDS)
each_text = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)


# -----------------------------------------------------------------------------
# encode and decode

@each_kind
@each_text
def test_decode_of_encode_is_the_text(tokenizers, kind, text):
    t = tokenizers[kind]
    ids = t.encode(text)
    assert t.decode(ids) == text
    assert all(type(i) is int and 0 <= i < t.end for i in ids)


@each_kind
def test_a_batch_is_encoded_as_its_texts_are_one_by_one(tokenizers, kind):
    t = tokenizers[kind]
    assert t.encode_batch(list(TEXTS.values())) == [t.encode(text) for text in TEXTS.values()]


@each_kind
@pytest.mark.parametrize("text", MARKUP)
def test_special_tokens_in_a_user_s_text_stay_text(tokenizers, kind, text):
    t = tokenizers[kind]
    for text in (text, f"a{text}b", f" {text}\n{text}{text}"):
        ids = t.encode(text)
        assert max(ids) < min(t.special.values())
        assert t.decode(ids) == text           # a control token would decode to nothing, <0x0A> to a newline
        assert t.decode(ids, show_special=True) == text


@each_kind
def test_special_tokens_follow_the_base_vocabulary(tokenizers, kind):
    t = tokenizers[kind]
    assert list(t.special) == list(SPECIAL_TOKENS)
    assert list(t.special.values()) == list(range(t.vocab_size - len(SPECIAL_TOKENS), t.vocab_size))
    assert (t.end, t.pad) == (t.special["end"], t.special["pad"]) and t.end != t.pad
    assert len(t.token_bytes) == t.vocab_size and all(t.token_bytes[i] == b"" for i in t.special.values())


@each_kind
def test_special_tokens_are_shown_on_request_only(tokenizers, kind):
    t = tokenizers[kind]
    ids = [t.special["user"], *t.encode("hi"), t.end, t.special["/think"]]
    assert t.decode(ids) == "hi"
    assert t.decode(ids, show_special=True).replace("> hi", ">hi") == "<user>hi<end></think>"


def test_bytes_are_their_own_ids():
    t = load_tokenizer("bytes")
    assert t.encode("h\u00e9\n") == [0x68, 0xC3, 0xA9, 0x0A]
    assert t.vocab_size == 266 and t.special == dict(zip(SPECIAL_TOKENS, range(256, 266)))


def naive_bpe(piece, ranks):
    """Merge the neighbours whose joint token has the lowest rank, leftmost first, until there are none."""
    parts = [bytes([b]) for b in piece]
    while len(parts) > 1:
        rank, at = min((ranks.get(parts[i] + parts[i + 1], 1 << 30), i) for i in range(len(parts) - 1))
        if rank == 1 << 30:
            break
        parts[at:at + 2] = [parts[at] + parts[at + 1]]
    return [ranks[part] for part in parts]


@each_text
def test_a_rank_file_encodes_as_a_naive_merge_loop(tokenizers, text):
    ranks = {token: rank for rank, token in enumerate(BYTES + MERGES)}
    pieces = regex.findall(PATTERNS["gpt2"], text)
    expected = [i for piece in pieces for i in naive_bpe(piece.encode(), ranks)]
    assert tokenizers["tiktoken"].encode(text) == expected


def test_a_rank_file_uses_its_merges(tokenizers):
    t = tokenizers["tiktoken"]
    assert t.encode("hello the cat") == [256 + MERGES.index(token) for token in (b"hello", b" the", b" cat")]
    assert t.vocab_size == 256 + len(MERGES) + len(SPECIAL_TOKENS)


@pytest.mark.parametrize("pattern, encoding", [
    ("gpt2", "gpt2"), ("gpt2", "r50k_base"), ("gpt2", "p50k_base"), ("cl100k", "cl100k_base"),
    ("o200k", "o200k_base"),
])
def test_patterns_are_tiktoken_s_own(monkeypatch, pattern, encoding):
    for reader in ("load_tiktoken_bpe", "data_gym_to_mergeable_bpe_ranks"):         # they download
        monkeypatch.setattr(tiktoken_ext.openai_public, reader, lambda *args, **kwargs: {})
    assert PATTERNS[pattern] == getattr(tiktoken_ext.openai_public, encoding)()["pat_str"]


def test_a_folder_of_gpt2_files_encodes_as_its_reference_implementation(tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="the reference; comes with pip install .[test]")
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(CORPUS, vocab_size=500, min_frequency=2, show_progress=False)
    made.save_model(str(tmp_path))
    assert (tmp_path / "merges.txt").read_text(encoding="utf-8").count("\n") > 100
    reference = tokenizers.ByteLevelBPETokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    ours = load_tokenizer(str(tmp_path))
    for text in [*TEXTS.values(), *MARKUP, *CORPUS[:4], "".join(TEXTS.values())]:
        assert ours.encode(text) == reference.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == text
    assert ours.vocab_size == reference.get_vocab_size() + len(SPECIAL_TOKENS)


def test_gpt2_files_whose_ids_do_not_follow_the_merges_are_refused(tmp_path):
    letters = [*map(chr, range(0x21, 0x7F)), *map(chr, range(0xA1, 0xAD)), *map(chr, range(0xAE, 0x144))]
    vocab = {letter: i for i, letter in enumerate(letters)}                # GPT-2's names of the 256 bytes
    assert len(vocab) == 256
    (tmp_path / "merges.txt").write_text("#version: 0.2\nt h\na t\n")
    (tmp_path / "vocab.json").write_text(json.dumps({**vocab, "th": 256, "at": 257}))
    assert load_tokenizer(str(tmp_path)).encode("that") == [256, 257]
    (tmp_path / "vocab.json").write_text(json.dumps({**vocab, "th": 257, "at": 256}))
    with pytest.raises(UserError, match="ids do not follow the order of merges"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("kind", ["trained", "dummy", "default"])
@each_text
def test_sentencepiece_text_decodes_as_sentencepiece_does(tokenizers, kind, text):
    t = tokenizers[kind]
    ids = t.bpe.encode(text)
    assert t.encode(text) == ids and t.decode(ids) == t.bpe.decode(ids)


def test_a_trained_vocabulary_has_the_size_asked_for_and_no_control_tokens(tokenizers):
    t = tokenizers["trained"]
    assert t.vocab_size == 430
    assert not any(t.bpe.is_control(i) for i in range(t.bpe.get_piece_size()))


# -----------------------------------------------------------------------------
# streaming

def in_pieces(stream, ids):
    return [*map(stream.put, ids), stream.end()]


@each_kind
@each_text
def test_streamed_text_is_the_whole_text_and_never_half_a_character(tokenizers, kind, text):
    t = tokenizers[kind]
    pieces = in_pieces(t.stream(), t.encode(text))
    assert "".join(pieces) == text
    assert pieces[-1] == "" and not any("\ufffd" in piece for piece in pieces)


def test_a_character_is_streamed_with_its_last_byte():
    t = load_tokenizer("bytes")
    assert in_pieces(t.stream(), t.encode("a\u00e9\u4e2d\U0001F642")) == \
        ["a", "", "\u00e9", "", "", "\u4e2d", "", "", "", "\U0001F642", ""]


def texts_of(t, ids):
    """The runs of ids between special tokens: each is a text of its own."""
    parts = [[]]
    for i in ids:
        if i >= t.end:
            parts.append([])
        else:
            parts[-1].append(i)
    return parts


@pytest.mark.parametrize("kind", ["bytes", "tiktoken"])
@pytest.mark.parametrize("seed", range(5))
def test_random_ids_stream_as_python_decodes_their_bytes_at_once(tokenizers, kind, seed):
    t, rng = tokenizers[kind], random.Random(seed)
    base = (BYTES + MERGES)[:t.end]
    ids = [rng.choice([rng.randrange(t.vocab_size), rng.randrange(0x80, 0x100)]) for _ in range(400)]
    whole = "".join(b"".join(base[i] for i in part).decode("utf-8", "replace") for part in texts_of(t, ids))
    assert "\ufffd" in whole                                  # the ids do contain what is not UTF-8
    assert "".join(in_pieces(t.stream(), ids)) == t.decode(ids) == whole


@pytest.mark.parametrize("kind", ["trained", "dummy"])
@pytest.mark.parametrize("seed", range(5))
def test_random_sentencepiece_ids_stream_as_their_bytes(tokenizers, kind, seed):
    t, rng = tokenizers[kind], random.Random(seed)
    ids = [rng.randrange(t.vocab_size) for _ in range(400)]
    whole = ""
    for part in texts_of(t, ids):
        content = b""
        for i in part:
            piece = t.bpe.id_to_piece(i)
            if t.bpe.is_byte(i):
                content += bytes([int(piece[3:5], 16)])
            elif not t.bpe.is_control(i):
                content += (" \u2047 " if t.bpe.is_unknown(i) else piece.replace("\u2581", " ")).encode()
        if kind == "dummy":
            content = content.removeprefix(b" ")
        whole += content.decode("utf-8", "replace")
    assert "".join(in_pieces(t.stream(), ids)) == t.decode(ids) == whole


@each_kind
def test_shown_special_tokens_stream_in_place_after_a_broken_character(tokenizers, kind):
    t = tokenizers[kind]
    ids = [t.special["user"], *t.encode("\u4e2d")[:-1], t.end, *t.encode("\u4e2d")]
    whole = t.decode(ids, show_special=True)
    assert "".join(in_pieces(t.stream(show_special=True), ids)) == whole
    before, after = whole.split("<end>")
    assert before.startswith("<user>") and before.endswith("\ufffd") and after.strip() == "\u4e2d"


@each_kind
def test_text_that_continues_keeps_its_first_space(tokenizers, kind):
    t = tokenizers[kind]
    text = "hello the  cat said\nhello hello"
    ids = t.encode(text)
    for cut in range(1, len(ids)):
        head, tail = t.decode(ids[:cut]), t.decode(ids[cut:], continues=True)
        assert head + tail == text
        assert "".join(in_pieces(t.stream(continues=True), ids[cut:])) == tail


def test_only_the_space_that_sentencepiece_put_before_a_text_is_dropped(tokenizers):
    t = tokenizers["dummy"]
    ids = t.encode("hello")
    assert t.bpe.id_to_piece(ids[0]).startswith("\u2581")
    assert (t.decode(ids), t.decode(ids, continues=True)) == ("hello", " hello")
    assert t.decode([t.end, *ids]) == "hello", "a special token before it changes nothing"
    assert t.decode(t.encode(" hello")) == " hello"
    t = tokenizers["trained"]
    assert t.decode(t.encode(" hello")) == t.decode(t.encode(" hello"), continues=True) == " hello"


# -----------------------------------------------------------------------------
# what ids mean: fingerprints, saved tokenizers, byte counts

def test_the_ids_and_fingerprint_of_bytes_never_change():
    # sets and checkpoints on people's disks hold this fingerprint: a change of it makes them unusable
    assert load_tokenizer("bytes").fingerprint == "659a20f95d5cf9b4"
    assert (load_tokenizer("bytes").end, load_tokenizer("bytes").pad) == (256, 257)


@each_kind
def test_loading_again_gives_the_same_ids_and_fingerprint(sources, tokenizers, kind):
    again = load_tokenizer(sources[kind])
    assert again.fingerprint == tokenizers[kind].fingerprint
    assert all(again.encode(text) == tokenizers[kind].encode(text) for text in TEXTS.values())


def test_training_again_on_the_same_text_gives_the_same_vocabulary(tokenizers):
    assert train_sentencepiece(CORPUS, 430) == tokenizers["trained"].vocabulary


def test_different_vocabularies_have_different_fingerprints(tmp_path, tokenizers):
    ranks = write_ranks(tmp_path / "a.tiktoken", BYTES + MERGES)
    swapped = write_ranks(tmp_path / "b.tiktoken", BYTES[1:] + BYTES[:1] + MERGES)
    fewer = write_ranks(tmp_path / "c.tiktoken", BYTES + MERGES[:-1])
    others = [load_tokenizer(f"{path}:{pattern}") for path, pattern in
              [(ranks, "gpt2"), (ranks, "cl100k"), (ranks, "o200k"), (swapped, "gpt2"), (fewer, "gpt2")]]
    fingerprints = [t.fingerprint for t in [*tokenizers.values(), *others]]
    assert others[0].fingerprint == tokenizers["tiktoken"].fingerprint
    assert len(set(fingerprints)) == len(fingerprints) - 1


def save(tokenizer, folder):
    folder.mkdir(exist_ok=True)
    for name, content in tokenizer.files().items():
        (folder / name).write_bytes(content)
    return str(folder)


@pytest.mark.parametrize("kind", [*KINDS, "default"])
def test_saved_files_make_the_same_tokenizer_again(tmp_path, tokenizers, kind):
    t, again = tokenizers[kind], load_tokenizer(save(tokenizers[kind], tmp_path / "saved"))
    assert (again.fingerprint, again.special, again.token_bytes) == (t.fingerprint, t.special, t.token_bytes)
    for text in [*TEXTS.values(), *MARKUP]:
        assert again.encode(text) == t.encode(text)


@pytest.mark.parametrize("kind", ["tiktoken", "trained"])
@pytest.mark.parametrize("damage", ["a changed byte", "a lost line", "an empty file", "no file"])
def test_a_damaged_vocabulary_is_refused(tmp_path, tokenizers, kind, damage):
    folder = save(tokenizers[kind], tmp_path / "saved")
    name = next(name for name in tokenizers[kind].files() if name != INFO)
    path = tmp_path / "saved" / name
    content = bytearray(path.read_bytes())
    if damage == "a changed byte":
        at = content.index(b"hell") if kind == "trained" else 0
        content[at] = content[at] ^ 1
    path.write_bytes({"a changed byte": content, "a lost line": content[:content.rindex(b"\n", 0, -1) + 1],
                      "an empty file": b"", "no file": b""}[damage])
    if damage == "no file":
        path.unlink()
    with pytest.raises(UserError) as caught:
        load_tokenizer(folder)
    assert "saved" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("info", [
    "", "{", "[]", "3", "null", "{}", '{"kind": "bytes"}',
    '{"kind": "words", "file": null, "pattern": "", "fingerprint": "0"}',
    '{"kind": "bytes", "file": null, "pattern": "", "fingerprint": "0"}',
    '{"kind": "tiktoken", "file": null, "pattern": "gpt3", "fingerprint": "0"}',
])
def test_damaged_tokenizer_information_is_refused(tmp_path, info):
    (tmp_path / INFO).write_text(info)
    with pytest.raises(UserError, match=str(tmp_path)):
        load_tokenizer(str(tmp_path))


@each_kind
def test_token_byte_counts_add_up_to_the_text_s_bytes(tokenizers, kind):
    t = tokenizers[kind]
    counts = token_byte_counts(t)
    assert counts.shape == (t.vocab_size,) and counts.dtype == np.uint16 and not counts[t.end:].any()
    for text in TEXTS.values():
        space_of_its_own = kind == "dummy" and text != ""
        assert counts[t.encode(text)].sum() == len(text.encode()) + space_of_its_own


# -----------------------------------------------------------------------------
# what cannot be loaded

def refusal(source):
    with pytest.raises(UserError) as caught:
        load_tokenizer(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("source, part", [
    ("gpt5", "--tokenizer=gpt5: no such file or run, and not bytes or one of gpt2, "),
    ("p50k_edit", "--tokenizer=p50k_edit: not supported; use gpt2, cl100k_base or o200k_base"),
    ("no/such.model", "--tokenizer=no/such.model: cannot read no/such.model (No such file or directory)"),
    ("no/such_gpt2.tiktoken", "cannot read no/such_gpt2.tiktoken (No such file or directory)"),
    ("no/such.tiktoken:cl100k", "cannot read no/such.tiktoken (No such file or directory)"),
])
def test_what_is_not_there_is_named(source, part):
    assert part in refusal(source)


def test_a_rank_file_of_unknown_pattern_is_refused_with_the_mend(tmp_path):
    path = write_ranks(tmp_path / "mine.tiktoken", BYTES)
    assert refusal(path) == f"--tokenizer={path}: its name does not tell how text is split; " \
                            f"write {path}:PATTERN with PATTERN one of gpt2, cl100k, o200k"
    assert load_tokenizer(f"{path}:cl100k").encode("ab") == [97, 98]


@pytest.mark.parametrize("name, content", [
    pytest.param("x.model", b"", id="empty model"),
    pytest.param("x.model", b"no model at all", id="no model"),
    pytest.param("gpt2.tiktoken", b"", id="empty ranks"),
    pytest.param("gpt2.tiktoken", b"IQ==\n", id="no rank"),
    pytest.param("gpt2.tiktoken", b"IQ== one\n", id="rank no number"),
    pytest.param("gpt2.tiktoken", b"I 0\n", id="no base64"),
    pytest.param("gpt2.tiktoken", rank_lines(BYTES) + base64.b64encode(b"ab") + b" 5\n", id="rank twice"),
    pytest.param("gpt2.tiktoken", rank_lines(BYTES) + base64.b64encode(b"ab") + b" -5\n", id="rank negative"),
    # text with the other bytes in it would have no tokens
    pytest.param("gpt2.tiktoken", rank_lines(BYTES[:128]), id="bytes missing"),
])
def test_a_damaged_vocabulary_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert str(tmp_path / name) in refusal(str(tmp_path / name))


def test_a_folder_with_half_of_gpt2_s_files_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text('{"a": 0}')
    assert "merges.txt (No such file or directory)" in refusal(str(tmp_path))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n")
    assert "not a vocabulary of that kind, or damaged" in refusal(str(tmp_path))


@pytest.fixture
def offline(monkeypatch):
    def no_network(name):
        raise ConnectionError("Max retries exceeded:\n no route to host")
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)


@pytest.mark.parametrize("name", ["gpt2", "cl100k_base", "o200k_base"])
def test_a_known_name_without_cache_and_network_says_how_to_get_the_file(offline, name):
    message = refusal(name)
    assert message.startswith(f"--tokenizer={name}: not in tiktoken's cache and the download failed")
    assert "vocab.json and merges.txt" in message


def test_a_known_name_is_not_looked_for_in_the_working_directory(offline, tokenizers, tmp_path, monkeypatch):
    save(tokenizers["trained"], tmp_path / "saved")
    monkeypatch.chdir(tmp_path / "saved")
    assert "not in tiktoken's cache" in refusal("gpt2")


def test_a_known_name_loads_what_tiktoken_has(monkeypatch, tokenizers):
    encoding = tiktoken.Encoding("gpt2", pat_str=PATTERNS["gpt2"], special_tokens={},
                                 mergeable_ranks={token: rank for rank, token in enumerate(BYTES + MERGES)})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: {"gpt2": encoding}[name])
    assert load_tokenizer("gpt2").fingerprint == tokenizers["tiktoken"].fingerprint


@pytest.mark.parametrize("vocab_size, reason", [
    (5, "SentencePiece refuses"), (10, "SentencePiece refuses"), (100, "bytes and this text"),
    (100_000, "this text has words for"),
])
def test_a_vocabulary_size_that_cannot_be_is_refused(vocab_size, reason):
    with pytest.raises(UserError, match=rf"^--vocab_size={vocab_size}: {reason}.+$"):
        train_sentencepiece(CORPUS[:5], vocab_size)


def test_the_largest_vocabulary_size_is_named_and_works():
    with pytest.raises(UserError) as caught:
        train_sentencepiece(CORPUS, 100_000)
    most = int(regex.search(r"for (\d+) tokens", str(caught.value))[1])
    assert len(token_byte_counts(Tokenizer("sentencepiece", train_sentencepiece(CORPUS, most)))) == most
    with pytest.raises(UserError):
        train_sentencepiece(CORPUS, most + 1)


def test_a_wrong_tokenizer_ends_a_command_with_exit_code_2_and_one_line(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    result = run("data/prepare.py", "text", f"--input={tmp_path}/a.txt", "--tokenizer=gpt5",
                 f"--out_dir={tmp_path}/set", check=False)
    assert result.returncode == 2 and result.stderr.startswith("error: --tokenizer=gpt5: no such file")
    assert result.stderr.count("\n") == 1 and not (tmp_path / "set").exists()


def test_a_vocabulary_smaller_than_the_alphabet_says_how_large_it_must_be():
    """Chinese: thousands of characters"""
    text = ["".join(chr(0x4E00 + (i * 7 + j) % 900) for j in range(40)) for i in range(400)]
    with pytest.raises(UserError) as caught:
        train_sentencepiece(text, 500)
    found = re.search(r"this text's characters alone take (\d+) tokens; give more", str(caught.value))
    least = int(found[1])
    assert 900 < least < 1300
    train_sentencepiece(text, least + 10)


# -----------------------------------------------------------------------------
# what a new vocabulary is learned from

def test_lines_are_cut_to_what_sentencepiece_takes(monkeypatch):
    monkeypatch.setattr(train_tokenizer, "LONGEST", 10)
    for line in ("", "short", "a b c d e f g h", "x" * 35, "one " + "y" * 12 + " two", " " * 25, "漢字" * 20):
        pieces = list(train_tokenizer.sentences([line]))
        assert "".join(pieces) == line and all(0 < len(piece) <= 10 for piece in pieces)
    assert list(train_tokenizer.sentences(["alpha beta gamma"])) == ["alpha", " beta", " gamma"]
    assert list(train_tokenizer.sentences(["a\u2581b", "c\u2585\u2585d"])) == ["a", "b", "c", "d"]


@pytest.mark.parametrize("make", [lambda text: text, lambda text: text.replace(" ", "\u2581 "),
                                  lambda text: text.replace(" ", " \u2585 ")],
                         ids=["one long line", "U+2581", "U+2585"])
def test_a_vocabulary_is_learned_from_lines_that_the_library_would_leave_out(make):
    """Without a word: lines above a length, and those with a character that it uses itself."""
    draw = random.Random(0)
    words = ["".join(draw.choices("αβγδεζηθικ", k=draw.randint(3, 7))) for _ in range(200)]
    text = " ".join(draw.choices(words, k=20_000))
    assert len(text.encode()) > 1 << 17
    others = ["abcdefghij " * 5] * 50
    tokenizer = Tokenizer("sentencepiece", train_tokenizer.train_sentencepiece([make(text), *others], 700))
    sample = text[:3000]
    ids = tokenizer.encode(sample)
    assert len(ids) < 0.7 * len(sample) and tokenizer.decode(ids) == sample
