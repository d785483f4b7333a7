"""data/prepare.py: nothing is lost or read twice, bad input is one clear line, a set is whole or absent."""
import base64
import errno
import gzip
import hashlib
import importlib.util
import itertools
import json
import multiprocessing
import os
import pickle
import resource
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, launch, run

from common.chat import encode_chat
from common.data import ChatData, PairData, PromptData, TokenData
from common.errors import UserError
from common.tokenizer import load_tokenizer
from data import readers

spec = importlib.util.spec_from_file_location("prepare", ROOT / "data" / "prepare.py")
prepare = sys.modules["prepare"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(prepare)

END, VOCAB = 256, 266                  # of the byte tokenizer
DOCS = ["Good morrow.", "  zwei\n\nZeilen ", "\u4eca\u5929\u5929\u6c14", "\U0001F642e\u0301\0\u2028x", "x"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Each test works in an empty folder of its own, with plain file names."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def set_block(monkeypatch, size):
    """Characters or bytes that are held at once"""
    monkeypatch.setattr(readers, "BLOCK", size)


def make(*inputs, out="set", **options):
    """Prepare a set in this process -> its meta.json"""
    config = prepare.TextConfig(input=inputs, out_dir=out, **options)
    prepare.prepare_set(config, prepare.Text, prepare.TextWriter)
    return json.loads(Path(out, "meta.json").read_text())


def refusal(*inputs, make=make, **options):
    """The message of a refused preparation, which has left nothing behind."""
    with pytest.raises(UserError) as caught:
        make(*inputs, **options)
    assert "\n" not in str(caught.value)
    assert not Path("set").exists() and not Path("set.partial").exists()
    return str(caught.value)


def ids_of(split="train", out="set"):
    return np.load(f"{out}/{split}.npy").tolist()


def documents(split="train", out="set", end=END):
    """The set's documents as lists of ids, after checking that the end token closes the last one."""
    found, ids = [[]], ids_of(split, out)
    assert ids[-1] == end
    for i in ids:
        found[-1].append(i)
        if i == end:
            found.append([])
    return [document[:-1] for document in found[:-1]]


def texts(split="train", out="set"):
    return [bytes(document).decode() for document in documents(split, out)]


def write_jsonl(path, docs):
    content = "".join(json.dumps({"text": text, "id": i}) + "\n" for i, text in enumerate(docs)).encode()
    Path(path).write_bytes(gzip.compress(content, mtime=0) if path.endswith(".gz") else content)


# -----------------------------------------------------------------------------
# formats

def write_as(kind):
    """Write DOCS in one of the formats -> file name, the documents to expect"""
    encoded = [list(text.encode()) for text in DOCS]
    if kind in ("a.txt", "a.txt.gz"):
        content = DOCS[1].encode()
        Path(kind).write_bytes(gzip.compress(content, mtime=0) if kind.endswith(".gz") else content)
        return kind, [encoded[1]]
    if kind in ("a.jsonl", "a.jsonl.gz"):
        write_jsonl(kind, DOCS)
        return kind, encoded
    if kind == "1-D .npy":
        np.save("a.npy", np.array(encoded[1], np.int32))
        return "a.npy", [encoded[1]]
    if kind == "2-D .npy":
        np.save("a.npy", np.array([ids[:5] for ids in encoded[:4]], np.uint16))
        return "a.npy", [ids[:5] for ids in encoded[:4]]
    Path("a.pkl").write_bytes(pickle.dumps(encoded[1] if kind == "flat .pkl" else encoded))
    return "a.pkl", [encoded[1]] if kind == "flat .pkl" else encoded


@pytest.mark.parametrize("kind", [
    "a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "1-D .npy", "2-D .npy", "flat .pkl", "nested .pkl"])
def test_every_format_gives_its_documents(kind):
    path, expected = write_as(kind)
    meta = make(path)
    assert documents() == expected
    counts, n_bytes = meta["splits"]["train"], sum(map(len, expected))
    assert (counts["documents"], counts["bytes"]) == (len(expected), n_bytes)
    assert counts["tokens"] == n_bytes + len(expected)
    assert np.load("set/train.npy").dtype == np.uint16


@pytest.mark.parametrize("content", [
    b"one\r\ntwo\rthree\n", b"no newline at the end", b"\n\n \n", b"\xef\xbb\xbfmark\n"])
def test_a_txt_is_kept_to_the_byte(content):
    Path("a.txt").write_bytes(content)
    make("a.txt")
    assert bytes(ids_of()[:-1]) == content and ids_of()[-1] == END


def test_files_and_globs_of_mixed_formats_come_in_order_and_once():
    for name in ("b1.txt", "b2.txt", "a.txt", "sub/deep/c.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(name)
    write_jsonl("rows.jsonl", ["row 0", "row 1"])
    Path("ids.pkl").write_bytes(pickle.dumps([list(b"pkl 0"), list(b"pkl 1")]))
    make("rows.jsonl", "b*.txt", "ids.pkl", "*.txt", "sub/**/*.txt", "rows.jsonl")
    assert texts() == ["row 0", "row 1", "b1.txt", "b2.txt", "pkl 0", "pkl 1", "a.txt", "sub/deep/c.txt"]


def test_a_set_says_what_it_holds():
    write_jsonl("a.jsonl", DOCS)
    write_jsonl("b.jsonl", DOCS[:2])
    meta = make("a.jsonl", val_input=("b.jsonl",))
    assert (meta["vocab_size"], meta["end"]) == (VOCAB, END)
    assert meta["fingerprint"] == load_tokenizer("set").fingerprint == load_tokenizer("bytes").fingerprint
    for split, docs in (("train", DOCS), ("val", DOCS[:2])):
        assert texts(split) == docs and meta["splits"][split]["documents"] == len(docs)
        content = np.load(f"set/{split}.npy").tobytes()
        assert meta["splits"][split]["sha256"] == hashlib.sha256(content).hexdigest()
    assert np.load("set/token_bytes.npy").tolist() == [1] * 256 + [0] * 10
    assert TokenData("set", "train", 8, 1).batch(0).tokens.shape == (1, 8)
    assert make("a.jsonl", out="again")["data_fingerprint"] == meta["data_fingerprint"]
    assert make("b.jsonl", out="other")["data_fingerprint"] != meta["data_fingerprint"]


@pytest.mark.parametrize("num_merges, dtype", [(2**16 - 266, np.uint16), (2**16 - 265, np.uint32)])
def test_ids_are_uint32_where_the_vocabulary_does_not_fit_uint16(num_merges, dtype):
    tokens = [bytes([b]) for b in range(256)] + [bytes([i >> 8, i & 255]) for i in range(num_merges)]
    Path("x.tiktoken").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    last = num_merges + 265                            # of the special tokens
    np.save("a.npy", np.array([0, 65_535, last], np.int64))
    meta = make("a.npy", tokenizer="x.tiktoken:gpt2")
    assert meta["vocab_size"] == last + 1
    assert np.load("set/train.npy").dtype == dtype and ids_of() == [0, 65_535, last, meta["end"]]


# -----------------------------------------------------------------------------
# end tokens, pieces

@pytest.mark.parametrize("block", [1, 3, 4, 1 << 20])
@pytest.mark.parametrize("rows, expected", [
    ([[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]),                          # no end tokens of their own
    ([[1, 2, END], [4, 5, END]], [[1, 2], [4, 5]]),                            # all bring one
    ([[1, 2, END], [4, 5, 6]], [[1, 2], [4, 5, 6]]),                           # some do
    ([[1, END, 2], [END, 3, 4]], [[1], [2], [], [3, 4]]),                      # several documents in a row
])
def test_the_end_token_closes_every_document_once(monkeypatch, block, rows, expected):
    set_block(monkeypatch, block)
    np.save("two.npy", np.array(rows))
    np.save("one.npy", np.array(rows[0]))
    Path("nested.pkl").write_bytes(pickle.dumps(rows))
    Path("flat.pkl").write_bytes(pickle.dumps(rows[0]))
    for path in ("two.npy", "nested.pkl"):
        assert make(path, out=path + ".set")["splits"]["train"]["documents"] == 2
        assert documents(out=path + ".set") == expected
    for path in ("one.npy", "flat.pkl"):
        make(path, out=path + ".set")
        ids = ids_of(out=path + ".set")
        assert ids == rows[0] + [END] * (rows[0][-1] != END)


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_a_txt_of_many_pieces_gives_the_ids_of_one_piece(monkeypatch, block):
    text = "".join(f"line {i} \u4e2d\U0001F642\r\n" + "\n" * (i % 3) for i in range(60)) + "no newline"
    Path("a.txt").write_bytes(text.encode())
    whole = make("a.txt", out="whole")
    set_block(monkeypatch, block)
    pieces = make("a.txt", out="pieces")
    assert pieces["splits"] == whole["splits"]         # sha256 of the ids and all counts
    assert texts(out="pieces") == [text] and pieces["splits"]["train"]["documents"] == 1


def test_a_long_line_comes_in_pieces_too(monkeypatch):
    set_block(monkeypatch, 100)
    Path("a.txt").write_text("word " * 2000)
    sizes = [len(piece) for _, piece, _ in readers.read_txt("a.txt")]
    assert sum(sizes) == 10_000 and max(sizes) <= 200


@pytest.mark.parametrize("kind", ["2-D .npy", "nested .pkl"])
def test_a_document_of_many_pieces_counts_once_and_is_not_divided(monkeypatch, kind):
    rows = [[number] * 10 for number in range(40)]
    if kind == "2-D .npy":
        np.save("a.npy", np.array(rows))
    else:
        Path("a.pkl").write_bytes(pickle.dumps(rows))
    set_block(monkeypatch, 4)
    meta = make("a." + kind[-3:], val_frac=0.4)
    assert sum(counts["documents"] for counts in meta["splits"].values()) == 40
    assert sorted(documents("train") + documents("val")) == rows


# -----------------------------------------------------------------------------
# validation split

def test_val_frac_holds_out_whole_documents_and_loses_none():
    docs = [f"document {i}\n" + "x" * (i % 7) for i in range(400)]
    write_jsonl("a.jsonl", docs[:300])
    write_jsonl("b.jsonl.gz", docs[300:])
    make("a.jsonl", "b.jsonl.gz", val_frac=0.25)
    train, val = texts("train"), texts("val")
    assert sorted(train + val) == sorted(docs)                                 # each is in one of them, once
    assert [text for text in docs if text in train] == train and [text for text in docs if text in val] == val
    assert abs(len(val) - 100) < 35                                            # four standard deviations
    make("a.jsonl", "b.jsonl.gz", val_frac=0.25, out="again")
    assert texts("val", "again") == val
    make("a.jsonl", "b.jsonl.gz", val_frac=0.25, seed=1, out="other")
    assert texts("val", "other") != val


@pytest.mark.parametrize("block", [50, 1 << 20])
def test_val_frac_of_a_txt_is_its_end_from_the_start_of_a_line(monkeypatch, block):
    set_block(monkeypatch, block)
    text = "".join(f"line {i} \u4e2d\u6587\n" for i in range(100))
    Path("a.txt").write_text(text)
    for percent in range(2, 98, 3):                    # the border falls anywhere in a line and a piece
        make("a.txt", val_frac=percent / 100, out=f"set{percent}")
        (train,), (val,) = texts("train", f"set{percent}"), texts("val", f"set{percent}")
        assert train + val == text and train.endswith("\n"), percent
        assert -0.5 <= len(val) - percent / 100 * len(text) <= len("line 99 \u4e2d\u6587\n")


def test_a_txt_of_one_line_is_divided_all_the_same():
    Path("a.txt").write_text("x" * 90 + "y" * 10)
    make("a.txt", val_frac=0.1)
    assert (texts("train"), texts("val")) == (["x" * 90], ["y" * 10])


def test_val_input_is_kept_apart():
    write_jsonl("a.jsonl", DOCS)
    Path("v.txt").write_text("held out")
    make("a.jsonl", val_input=("v.txt",))
    assert (texts("train"), texts("val")) == (DOCS, ["held out"])


def test_a_file_cannot_be_training_and_validation_text():
    write_jsonl("a.jsonl", DOCS)
    write_jsonl("val.jsonl", ["held out"])
    assert "val.jsonl" in refusal("*.jsonl", val_input=("val.jsonl",))


@pytest.mark.parametrize("options", [dict(val_frac=1.0), dict(val_frac=-0.1), dict(val_frac=float("nan")),
                                     dict(val_frac=0.1, val_input=("a.txt",))])
def test_a_fraction_that_cannot_be_is_refused(options):
    Path("a.txt").write_text("x")
    assert refusal("a.txt", **options) == \
        f"--val_frac={options['val_frac']}: must be a fraction below 1, and not together with --val_input"


def test_holding_out_everything_is_refused():
    write_jsonl("a.jsonl", ["only one"])
    assert "everything went to validation; lower --val_frac" in refusal("a.jsonl", val_frac=0.999)


# -----------------------------------------------------------------------------
# rows that are left out

BAD_LINES = {
    "no json": b"text", "truncated": b'{"text": "abc', "list": b'["text"]', "number": b"3", "null": b"null",
    "no text": b'{"txt": "a"}', "number as text": b'{"text": 3}', "null as text": b'{"text": null}',
    "list as text": b'{"text": ["a"]}', "lone surrogate": b'{"text": "\\ud800"}',
    "not UTF-8": b'{"text": "\xff"}',
    "nested too deep": b"[" * 100_000,
}


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_malformed_line_is_refused_with_file_and_line(line):
    Path("a.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good"}\n')
    message = refusal("a.jsonl")
    assert message.startswith("a.jsonl:3: ") and "--bad_rows=skip" in message and len(message) < 250


@pytest.mark.parametrize("line", BAD_LINES.values(), ids=BAD_LINES)
def test_a_malformed_line_can_be_left_out(line):
    Path("a.jsonl").write_bytes(b'{"text": "first"}\n\n' + line + b'\n{"text": "last"}\n')
    meta = make("a.jsonl", bad_rows="skip")
    assert texts() == ["first", "last"] and meta["left_out"] == {"malformed": 1}


def test_lines_left_out_are_counted_and_the_first_ones_named(capsys):
    Path("a.jsonl").write_bytes(b'bad\n{"text": "good"}\nbad\n' + b"bad\n" * 10)
    Path("b.jsonl").write_bytes(b'bad\n{"text": "good"}\n')
    meta = make("a.jsonl", "b.jsonl", bad_rows="skip")
    assert meta["left_out"] == {"malformed": 13} and texts() == ["good", "good"]
    assert capsys.readouterr().out.startswith(
        "left out 13 malformed: a.jsonl:1, a.jsonl:3, a.jsonl:4, a.jsonl:5, a.jsonl:6, ...\n")


def test_empty_documents_are_counted_and_get_no_end_token(capsys):
    write_jsonl("a.jsonl", ["", "one", "", "two", ""])
    Path("b.pkl").write_bytes(pickle.dumps([[], [1], []]))
    Path("c.txt").write_bytes(b"")
    np.save("d.npy", np.zeros((2, 0), np.int64))
    meta = make("a.jsonl", "b.pkl", "c.txt", "d.npy")
    assert documents() == [list(b"one"), list(b"two"), [1]] and meta["splits"]["train"]["documents"] == 3
    out = capsys.readouterr().out
    assert "empty documents: a.jsonl:1, a.jsonl:3, a.jsonl:5, b.pkl:0, b.pkl:2, ...\n" in out
    assert meta["left_out"] == {"empty documents": 8}


@pytest.mark.parametrize("name, content", [("a.txt", b""), ("a.jsonl", b""), ("a.jsonl", b"\n\n"),
                                           ("a.jsonl", b'{"text": ""}\n'), ("a.pkl", pickle.dumps([])),
                                           ("a.pkl", pickle.dumps([[]])),
                                           ("a.txt.gz", gzip.compress(b"", mtime=0))])
def test_a_set_of_nothing_is_refused(name, content):
    Path(name).write_bytes(content)
    assert "no documents left to train on" in refusal(name)


# -----------------------------------------------------------------------------
# files that are refused

class Payload:
    """An object that runs a shell command when it is unpickled."""
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("value", [
    pytest.param(Payload(), id="payload"), pytest.param([Payload()], id="in a list"),
    pytest.param([[1, 2], [3, Payload()]], id="in a document"), pytest.param([np.arange(3)], id="an array"),
    pytest.param([{1, 2}], id="a set")])
def test_a_pickle_of_anything_but_lists_and_numbers_is_refused_and_nothing_runs(value, protocol):
    Path("a.pkl").write_bytes(pickle.dumps(value, protocol))
    assert refusal("a.pkl").startswith("a.pkl: ")
    assert not Path("ran").exists()


def test_the_payload_would_run_in_an_ordinary_unpickler():
    pickle.loads(pickle.dumps(Payload()))
    assert Path("ran").exists()


def test_an_npy_of_pickled_objects_is_refused_and_nothing_runs():
    np.save("a.npy", np.array([Payload()], object), allow_pickle=True)
    Path("b.npy").write_bytes(pickle.dumps([Payload()]))                       # a bare pickle
    for path in ("a.npy", "b.npy"):
        assert refusal(path).startswith(f"{path}: refused or damaged")
    assert not Path("ran").exists()


HEADER = b"{'descr': '<i8', 'fortran_order': False, 'shape': (3,), }".ljust(117) + b"\n"
NPY = b"\x93NUMPY\x01\x00" + bytes([len(HEADER), 0]) + HEADER
GZIP = gzip.compress(b"".join(json.dumps({"text": str(i * i)}).encode() + b"\n" for i in range(2000)))


@pytest.mark.parametrize("name, content", [
    pytest.param("a.npy", b"", id="npy empty"),
    pytest.param("a.npy", NPY + bytes(23), id="npy truncated"),
    pytest.param("a.npy", NPY[:60], id="npy header truncated"),
    pytest.param("a.npy", b"not an array", id="npy text"),
    pytest.param("a.pkl", b"", id="pkl empty"),
    pytest.param("a.pkl", pickle.dumps([[1, 2], [300, 4]])[:-3], id="pkl truncated"),
    pytest.param("a.pkl", b"not a pickle", id="pkl text"),
    pytest.param("a.pkl", b"\x80\x04\x95" + b"\xff" * 8 + b"].", id="pkl frame too long"),
    pytest.param("a.pkl", b"\x80\x04]\x8d" + b"\xff" * 7 + b"\x3fx.", id="pkl string too long"),
    pytest.param("a.txt", b"good\n\xff\xfe\n", id="txt not UTF-8"),
    pytest.param("a.jsonl.gz", b"not gzipped", id="gz text"),
    pytest.param("a.jsonl.gz", GZIP[:-20], id="gz truncated"),
    pytest.param("a.jsonl.gz", GZIP[:60] + b"\xff" * 40 + GZIP[100:], id="gz damaged"),
    pytest.param("a.jsonl.gz", GZIP[:-8] + b"\0" * 8, id="gz checksum"),
    pytest.param("a.txt.gz", GZIP[:-20], id="txt.gz truncated"),
])
def test_a_damaged_file_is_refused_by_name(name, content):
    Path(name).write_bytes(content)
    message = refusal(name)
    assert message.startswith(f"{name}:") and "None" not in message


@pytest.mark.parametrize("value", [
    {"a": [1]}, (1, 2), "text", 3, None,                                       # no list
    [1, [2]], [[1], 2], [[1], None], [[[1, 2], [3, 4]]], [{}], [{1: 2}],       # of neither ids nor lists
    ["ab"], [1.5], [[1.5]], [None], [True, False], [[2**70]],                  # ids that are none
], ids=repr)
def test_a_pickle_of_another_shape_is_refused_by_name(value):
    Path("a.pkl").write_bytes(pickle.dumps(value))
    assert refusal("a.pkl").startswith("a.pkl: ")


@pytest.mark.parametrize("array", [
    np.array(3), np.zeros((1, 2, 3), int), np.zeros(3), np.zeros(3, bool), np.array(["a"]),
    np.zeros(3, "i4,i4"),
], ids=lambda array: f"{array.dtype} {array.shape}")
def test_an_npy_of_another_shape_is_refused_by_name(array):
    np.save("a.npy", array)
    assert refusal("a.npy") == \
        f"a.npy: expected an integer array of one or two dimensions, got {array.dtype} {array.shape}"


@pytest.mark.parametrize("bad", [-1, VOCAB, 65_536 + 1, 2**63 - 1])
def test_an_id_outside_the_vocabulary_is_refused_with_file_and_document(bad):
    np.save("a.npy", np.array([[1, 2], [VOCAB - 1, bad]], np.int64))
    Path("a.pkl").write_bytes(pickle.dumps([[1, 2], [VOCAB - 1, bad]]))
    for path in ("a.npy", "a.pkl"):
        assert refusal(path) == f"{path}:1: a document with token id {bad}, but --tokenizer has " \
                                f"{VOCAB}; give the tokenizer that made these ids"


@pytest.mark.parametrize("name", ["a.tsv", "a.txt.zip", "a", "a.npy.gz", "a.pkl.gz"])
def test_a_file_of_another_kind_is_refused(name):
    Path(name).write_bytes(b"x")
    assert refusal(name).startswith(
        f"--input={name}: expected one of .txt, .txt.gz, .jsonl, .jsonl.gz, .json, ")


@pytest.mark.parametrize("patterns, message", [
    ((), "--input: give files to read, e.g. --input=books/*.txt"),
    (("no_such.txt",), "--input=no_such.txt: no such file"),
    (("a.txt", "no*.txt"), "--input=no*.txt: no such file"),
    ((".",), "--input=.: a folder; give ./*.jsonl, ./*.txt or the like"),
])
def test_input_that_is_not_there_is_named(patterns, message):
    Path("a.txt").write_text("x")
    assert refusal(*patterns) == message


def test_missing_validation_text_is_named():
    Path("a.txt").write_text("x")
    assert refusal("a.txt", val_input=("v.txt",)) == "--val_input=v.txt: no such file"


# -----------------------------------------------------------------------------
# whole or not at all

def snapshot(out):
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in Path(out).iterdir()}


def test_an_existing_set_is_never_touched():
    write_jsonl("a.jsonl", DOCS)
    make("a.jsonl")
    before = snapshot("set")
    with pytest.raises(UserError, match="^--out_dir=set: already there; remove it or choose another$"):
        make("a.jsonl")
    assert snapshot("set") == before and not Path("set.partial").exists()


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("moment", [
    "ArrayWriter.write", "ArrayWriter.close", "np.save", "json.dump", "os.rename"])
def test_a_killed_run_leaves_no_set_and_the_next_one_works(monkeypatch, moment):
    write_jsonl("a.jsonl", DOCS)
    with monkeypatch.context() as patch:
        patch.setattr(f"prepare.{moment}", die)
        child = multiprocessing.get_context("fork").Process(target=make, args=("a.jsonl",))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert sorted(os.listdir()) == ["a.jsonl", "set.partial"]
    Path("set.partial/left").write_text("from an older version")
    make("a.jsonl")
    make("a.jsonl", out="fresh")
    assert sorted(os.listdir()) == ["a.jsonl", "fresh", "set"]
    assert sorted(os.listdir("set")) == sorted(os.listdir("fresh"))
    assert texts() == DOCS


def test_a_set_cannot_be_put_under_a_file():
    Path("a.txt").write_text("x")
    result = run(ROOT / "data" / "prepare.py", "text", f"--input={os.getcwd()}/a.txt",
                 f"--out_dir={os.getcwd()}/a.txt/set", check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: --out_dir={os.getcwd()}/a.txt/set: cannot write there " \
                            "(Not a directory)\n"


def test_a_full_disk_ends_with_one_line_and_leaves_nothing():
    Path("a.txt").write_text("x" * 300_000)
    limit = 100_000                                    # bytes a file may have: more fails as on a full disk
    result = run("data/prepare.py", "text", f"--input={os.getcwd()}/a.txt", f"--out_dir={os.getcwd()}/set",
                 check=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {os.getcwd()}/set: File too large\n"
    assert os.listdir() == ["a.txt"]


PEAK = """
import sys
sys.path.insert(0, "data")
import prepare
config = prepare.TextConfig(input=(sys.argv[1],), out_dir=sys.argv[2])
prepare.prepare_set(config, prepare.Text, prepare.TextWriter)
# not ru_maxrss: a child inherits its parent's across exec
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads Linux's /proc")
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_memory_does_not_grow_with_the_corpus(folder, name):
    peaks = []
    for n_bytes in (4 << 20, 40 << 20):
        with open(name, "wb") as file:
            if name == "a.jsonl":
                file.write(b'{"text": "%s"}\n' % (b"words " * 170) * (n_bytes // 1034))
            else:
                file.write(b"words " * (n_bytes // 6))                         # one line
        out = run("-c", PEAK, folder / name, folder / f"set{n_bytes}").stdout
        peaks.append(int(out.split()[-1]) / 1024)                              # MiB
    assert abs(peaks[1] - peaks[0]) < 15, peaks


# -----------------------------------------------------------------------------
# the tokenizer command

CORPUS = [f"the cat number {i} sat on the mat  and said: hello,\nhello! \u4eca\u5929" for i in range(60)]


def train_tokenizer(*inputs, **options):
    options = dict(vocab_size=330, out="out/x.model") | options
    prepare.prepare_tokenizer(prepare.TokenizerConfig(inputs, **options))


def test_a_tokenizer_is_trained_and_a_set_made_with_it_decodes_to_its_input(capsys):
    write_jsonl("a.jsonl", CORPUS)
    train_tokenizer("a.jsonl")
    assert capsys.readouterr().out == "out/x.model: 330 tokens\n" and os.listdir("out") == ["x.model"]
    tokenizer = load_tokenizer("out/x.model")
    meta = make("a.jsonl", tokenizer="out/x.model", val_frac=0.2)
    assert (meta["vocab_size"], meta["fingerprint"]) == (tokenizer.vocab_size, tokenizer.fingerprint)
    assert tokenizer.vocab_size == 330
    both = [tokenizer.decode(ids) for split in meta["splits"] for ids in documents(split, end=tokenizer.end)]
    assert sorted(both) == sorted(CORPUS)
    n_bytes = sum(len(text.encode()) for text in CORPUS)
    assert sum(counts["bytes"] for counts in meta["splits"].values()) == n_bytes
    assert sum(counts["tokens"] for counts in meta["splits"].values()) < n_bytes / 2


def test_a_tokenizer_learns_from_several_files():
    Path("a.txt").write_text("\n".join(CORPUS[:30]))
    write_jsonl("b.jsonl.gz", CORPUS[30:])
    train_tokenizer("*.txt", "b.jsonl.gz")
    write_jsonl("both.jsonl", ["\n".join(CORPUS[:30])] + CORPUS[30:])
    train_tokenizer("both.jsonl", out="out/y.model")
    assert Path("out/x.model").read_bytes() == Path("out/y.model").read_bytes()


def test_an_existing_tokenizer_is_not_overwritten():
    Path("a.txt").write_text("\n".join(CORPUS))
    Path("x.model").write_text("precious")
    with pytest.raises(UserError, match="^--out=x.model: already there; remove it or choose another$"):
        train_tokenizer("a.txt", out="x.model")
    assert Path("x.model").read_text() == "precious"


@pytest.mark.parametrize("name, content, options, message", [
    ("a.jsonl", json.dumps({"text": CORPUS[0]}).encode() + b"\nbad\n", {}, "a.jsonl:2: "),
    ("a.txt", b"text\n\xff\n", {}, "a.txt: not UTF-8"),
    ("a.pkl", pickle.dumps([1]), {}, "--input=a.pkl: expected one of .txt, .txt.gz, .jsonl, .jsonl.gz"),
    ("a.txt", b"", {}, "--"),
    ("a.txt", b"some words", dict(vocab_size=1_000_000), "--vocab_size=1000000: "),
    ("a.txt", b"some words", dict(vocab_size=3), "--vocab_size=3: "),
    ("a.txt", b"some words\n" * 9, dict(vocab_size=276, out="a.txt/x.model"), "--out=a.txt/x.model: "),
    ("a.txt", b"some words\n" * 9, dict(vocab_size=276, out="out/x.tok"), "--out=out/x.tok: "),
], ids=["bad line", "not UTF-8", "ids", "nothing", "too large", "too small", "under a file", "wrong suffix"])
def test_a_tokenizer_that_cannot_be_made_is_refused_and_leaves_nothing(name, content, options, message):
    Path(name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        train_tokenizer(name, **options)
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)
    assert os.listdir() == [name]


# -----------------------------------------------------------------------------
# conversations

def user(content):
    return {"role": "user", "content": content}


def assistant(content, **think):
    return {"role": "assistant", "content": content, **think}


CHATS = [
    [user("Hi"), assistant("Ho \u4e2d")],
    [{"role": "system", "content": "Be brief."}, user("a <end>"), assistant("b", think="Hm\n"), user("c"),
     assistant("d\U0001F642")],
    [user("ends with"), assistant("the user"), user("so")],
    [user("?"), assistant("!")],
    [{"role": "system", "content": "Only this."}, user("and that"), assistant("so")],
]
BYTES = load_tokenizer("bytes")


def write_rows(path, rows):
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    Path(path).write_bytes(gzip.compress(content, mtime=0) if path.endswith(".gz") else content)


def make_chat(*inputs, out="set", **options):
    """Prepare conversations in this process -> the set's meta.json"""
    config = prepare.ChatConfig(input=inputs, out_dir=out, **options)
    prepare.prepare_set(config, prepare.Chats, prepare.ExampleWriter)
    return json.loads(Path(out, "meta.json").read_text())


def chats(split="train", out="set"):
    """The set's conversations as encode_chat gives them: (ids, counts) each."""
    ids, mask, offsets = (np.load(f"{out}/{split}{name}.npy") for name in ("", "_mask", "_offsets"))
    assert (mask.dtype, offsets.dtype) == (np.uint8, np.uint64) and mask.max() <= 1
    assert offsets[0] == 0 and offsets[-1] == len(ids) == len(mask)
    return [(ids[a:b].tolist(), mask[a:b].astype(bool).tolist())
            for a, b in itertools.pairwise(offsets.tolist())]


def encoded(rows, tokenizer=BYTES, answer_tags=True):
    return [encode_chat(tokenizer, [row], answer_tags)[0] for row in rows]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A SentencePiece model of CORPUS."""
    folder = tmp_path_factory.mktemp("trained")
    write_jsonl(f"{folder}/a.jsonl", CORPUS)
    train_tokenizer(f"{folder}/a.jsonl", out=f"{folder}/x.model")
    return f"{folder}/x.model"


@pytest.mark.parametrize("block", [1, 30, 1 << 20])
@pytest.mark.parametrize("tags", [True, False], ids=["tags", "no tags"])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_set_holds_each_conversation_as_the_template_encodes_it(monkeypatch, trained, kind, tags, block):
    set_block(monkeypatch, block)
    name = trained if kind == "sentencepiece" else "bytes"
    tokenizer, rows = load_tokenizer(name), CHATS + [[user(text), assistant(text[:9])] for text in CORPUS]
    write_rows("a.jsonl", rows)
    meta = make_chat("a.jsonl", tokenizer=name, answer_tags=tags)
    expected = encoded(rows, tokenizer, tags)
    assert chats() == expected and np.load("set/train.npy").dtype == np.uint16
    sha = meta["splits"]["train"].pop("sha256")
    assert meta["splits"] == {"train": dict(
        conversations=len(rows), tokens=sum(len(ids) for ids, _ in expected),
        targets=sum(sum(counts) for _, counts in expected), longest=max(len(ids) for ids, _ in expected))}
    assert (meta["kind"], meta["left_out"], meta["data_fingerprint"]) == ("chat", {}, sha[:16])
    assert (meta["vocab_size"], meta["end"], meta["pad"]) == (
        tokenizer.vocab_size, tokenizer.end, tokenizer.pad)
    assert meta["fingerprint"] == load_tokenizer("set").fingerprint == tokenizer.fingerprint
    batch = ChatData("set", "train", 256, 100).batch(0)
    targets, mask = batch.targets, batch.mask
    assert targets[mask].unique().tolist() == sorted({i for ids, counts in expected
                                                      for i, learn in zip(ids, counts) if learn})


def test_the_fingerprint_of_conversations_follows_their_tokens_and_borders():
    write_rows("a.jsonl", CHATS)
    write_rows("two.jsonl", [CHATS[0], CHATS[1]])
    write_rows("one.jsonl", [CHATS[0] + CHATS[1]])                     # the same ids, divided otherwise
    cases = itertools.product(["a.jsonl", "two.jsonl", "one.jsonl"], [False, True])
    marks = [make_chat(path, out=f"set{i}", answer_tags=tags)["data_fingerprint"]
             for i, (path, tags) in enumerate(cases)]
    assert len(set(marks)) == 6 and ids_of(out="set3") == ids_of(out="set5")
    assert make_chat("a.jsonl", out="again")["data_fingerprint"] == marks[1]


def test_conversations_with_ids_above_65535_survive():
    tokens = [bytes([b]) for b in range(256)] + [bytes([i >> 8, i & 255]) for i in range(2**16 - 256)]
    Path("x.tiktoken").write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)))
    write_rows("a.jsonl", CHATS)
    make_chat("a.jsonl", tokenizer="x.tiktoken:gpt2")
    assert chats() == encoded(CHATS, load_tokenizer("x.tiktoken:gpt2"))
    assert np.load("set/train.npy").dtype == np.uint32 and np.load("set/train.npy").max() > 65_535


def test_rows_of_both_forms_files_and_globs_come_in_order_and_once():
    write_rows("b1.jsonl", [CHATS[0], {"messages": CHATS[1], "id": 3}])
    write_rows("b2.jsonl.gz", [{"messages": CHATS[2]}])
    Path("a.jsonl").write_bytes(b"\n" + json.dumps(CHATS[3]).encode() + b"\r\n \n"
                                + json.dumps({"messages": CHATS[4]}).encode())   # no newline at the end
    make_chat("b1.jsonl", "b*.jsonl*", "*.jsonl", "b2.jsonl.gz")
    assert chats() == encoded(CHATS)


def test_conversations_are_encoded_a_block_at_a_time(monkeypatch):
    sizes = []

    def spy(tokenizer, conversations, *options):
        sizes.append(sum(len(message["content"]) for messages in conversations for message in messages))
        return encode_chat(tokenizer, conversations, *options)
    set_block(monkeypatch, 1000)
    monkeypatch.setattr(readers, "encode_chat", spy)
    write_rows("a.jsonl", [[user("x" * 300), assistant("y" * 100)]] * 50)
    assert make_chat("a.jsonl")["splits"]["train"]["conversations"] == 50
    assert sum(sizes) == 50 * 400 and max(sizes) < 1000 + 400


# -----------------------------------------------------------------------------
# conversations: rows of two texts, validation split

def test_fields_make_a_conversation_of_two_texts():
    write_rows("a.jsonl", [{"question": f"q{i}", "answer": f"a{i}", "messages": 3} for i in range(3)])
    make_chat("a.jsonl", fields=("question", "answer"))
    assert chats() == encoded([[user(f"q{i}"), assistant(f"a{i}")] for i in range(3)])


@pytest.mark.parametrize("row", [{"question": "q"}, {"question": "q", "answer": None}, ["q", "a"], CHATS[0],
                                 {"messages": CHATS[0]}], ids=str)
def test_rows_without_the_fields_are_malformed(row):
    write_rows("a.jsonl", [{"question": "q", "answer": "a"}, row])
    message = refusal("a.jsonl", make=make_chat, fields=("question", "answer"))
    assert message.startswith("a.jsonl:2: expected question, answer (--fields), got ")
    meta = make_chat("a.jsonl", fields=("question", "answer"), bad_rows="skip")
    assert meta["left_out"] == {"malformed": 1} and chats() == encoded([[user("q"), assistant("a")]])


@pytest.mark.parametrize("fields", [("question",), ("system", "question", "answer")])
def test_fields_are_two(fields):
    write_rows("a.jsonl", CHATS)
    assert refusal("a.jsonl", make=make_chat, fields=fields) == \
        f"--fields={','.join(fields)}: give two names, of the user's text and the assistant's"


def test_val_frac_holds_out_whole_conversations_and_loses_none():
    rows = [[user(f"number {i}"), assistant("x" * (1 + i % 7))] for i in range(400)]
    write_rows("a.jsonl", rows[:300])
    write_rows("b.jsonl.gz", rows[300:])
    meta = make_chat("a.jsonl", "b.jsonl.gz", val_frac=0.25)
    expected, train, val = encoded(rows), chats("train"), chats("val")
    assert train == [chat for chat in expected if chat not in val]             # each is in one of them, once,
    assert val == [chat for chat in expected if chat not in train]             # in order
    assert [len(train), len(val)] == [meta["splits"][split]["conversations"] for split in ("train", "val")]
    assert len(train) + len(val) == 400 and abs(len(val) - 100) < 35           # four standard deviations
    make_chat("a.jsonl", "b.jsonl.gz", val_frac=0.25, out="again")
    assert chats("val", "again") == val
    make_chat("a.jsonl", "b.jsonl.gz", val_frac=0.25, seed=1, out="other")
    assert chats("val", "other") != val


def test_val_input_of_conversations_is_kept_apart():
    write_rows("a.jsonl", CHATS[:3])
    write_rows("v.jsonl", CHATS[3:])
    assert "v.jsonl is in --input too" in refusal("*.jsonl", make=make_chat, val_input=("v.jsonl",))
    meta = make_chat("a.jsonl", val_input=("v.jsonl",))
    assert (chats("train"), chats("val")) == (encoded(CHATS[:3]), encoded(CHATS[3:]))
    assert [meta["splits"][split]["conversations"] for split in ("train", "val")] == [3, 2]


@pytest.mark.parametrize("rows, val_frac, message", [
    ([], 0.0, "--input: no conversations left to train on"),
    (CHATS[:1], 0.999, "--input: no conversations left to train on, everything went to validation; "
                       "lower --val_frac"),
    (CHATS[:2], 0.001, "--val_frac=0.001: none of the 2 conversations was drawn for validation; raise it, or "
                       "name files with --val_input"),
])
def test_a_split_of_no_conversations_is_refused(rows, val_frac, message):
    write_rows("a.jsonl", rows)
    assert refusal("a.jsonl", make=make_chat, val_frac=val_frac) == message


def test_a_file_of_another_kind_holds_no_conversations():
    for name in ("a.txt", "a.npy", "a.jsonl.zip"):
        Path(name).write_bytes(b"x")
        assert refusal(name, make=make_chat).startswith(f"--input={name}: expected one of .jsonl, .jsonl.gz")


# -----------------------------------------------------------------------------
# conversations that are left out

def chat_line(*messages):
    return json.dumps(messages).encode()


BAD_CHATS = {
    **{name: BAD_LINES[name] for name in ("no json", "truncated", "not UTF-8", "nested too deep")},
    "number": b"3", "null": b"null", "string": b'"text"', "empty list": b"[]", "strings": b'["a", "b"]',
    "a message": json.dumps(user("a")).encode(), "no messages": b'{"text": "a"}',
    "empty messages": b'{"messages": []}', "messages of text": b'{"messages": "a"}',
    "no content": chat_line(user("a"), {"role": "assistant"}), "no role": chat_line({"content": "a"}),
    "null content": chat_line(user(None), assistant("b")),
    "content in parts": chat_line(user([{"type": "text", "text": "a"}]), assistant("b")),
    "lone surrogate": chat_line(user("\ud800"), assistant("b")),
    "unknown role": chat_line(user("a"), {"role": "tool", "content": "b"}, assistant("c")),
    "list as role": chat_line({"role": ["user"], "content": "a"}, assistant("b")),
    "user thinks": chat_line({**user("a"), "think": "b"}, assistant("c")),
    "number as think": chat_line(user("a"), assistant("b", think=3)),
}
NO_REPLY = {"user only": chat_line(user("a")), "system only": b'[{"role": "system", "content": "a"}]',
            "user in messages": json.dumps({"messages": [user("a")]}).encode()}
NO_REPLY_REASON = "without an assistant turn"
LEFT_OUT = [pytest.param(line, reason, id=name)
            for lines, reason in ((BAD_CHATS, "malformed"), (NO_REPLY, NO_REPLY_REASON))
            for name, line in lines.items()]


@pytest.mark.parametrize("line, reason", LEFT_OUT)
def test_a_bad_conversation_is_refused_with_file_and_line_or_left_out(capsys, line, reason):
    first, last = (json.dumps(row).encode() for row in CHATS[:2])
    Path("a.jsonl").write_bytes(first + b"\n\n" + line + b"\n" + last + b"\n")
    message = refusal("a.jsonl", make=make_chat)
    assert message.startswith("a.jsonl:3: ") and "--bad_rows=skip" in message and len(message) < 250
    meta = make_chat("a.jsonl", bad_rows="skip")
    assert meta["left_out"] == {reason: 1} and chats() == encoded(CHATS[:2])
    assert capsys.readouterr().out.startswith(
        f"left out 1 {reason}: a.jsonl:3\nset/train.npy: conversations 2, ")


def test_no_conversation_disappears_without_being_counted(capsys):
    """Lines of every sort, in two files and two splits: what is kept and what is left out make them all."""
    lines = [json.dumps(row).encode() for row in CHATS] * 10 + [*BAD_CHATS.values(), *NO_REPLY.values()] * 2
    np.random.default_rng(0).shuffle(lines)
    Path("a.jsonl").write_bytes(b"\n".join(lines[:40]))
    Path("b.jsonl").write_bytes(b"\n".join(lines[40:]))
    meta = make_chat("a.jsonl", "b.jsonl", bad_rows="skip", max_len=25, long_rows="skip", val_frac=0.3)
    kept = sum(counts["conversations"] for counts in meta["splits"].values())
    assert len(chats("train")) + len(chats("val")) == kept
    assert sorted(chats("train") + chats("val")) == sorted(
        chat for chat in encoded(CHATS) * 10 if len(chat[0]) <= 25)
    too_long = 10 * sum(len(ids) > 25 for ids, _ in encoded(CHATS))
    assert meta["left_out"] == {"malformed": 2 * len(BAD_CHATS), NO_REPLY_REASON: 2 * len(NO_REPLY),
                                "longer than 25 tokens": too_long}
    assert kept + sum(meta["left_out"].values()) == len(lines) and kept and too_long
    places = {f"{name}:{number}": line for name, part in (("a.jsonl", lines[:40]), ("b.jsonl", lines[40:]))
              for number, line in enumerate(part, 1)}
    first = [place for place, line in places.items() if line in BAD_CHATS.values()][:5]
    assert f"left out {2 * len(BAD_CHATS)} malformed: {', '.join(first)}, ...\n" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# long conversations

LONG = [[user("a"), assistant("x" * n)] for n in (11, 12, 13, 41)]     # 18, 19, 20 and 48 tokens
LATE = [[user("a" * n), assistant("x")] for n in (14, 15)]             # replies from token 18 and 19 on


@pytest.mark.parametrize("long_rows", ["error", "skip", "cut"])
def test_a_conversation_of_just_max_len_tokens_stays_whole(capsys, long_rows):
    write_rows("a.jsonl", LONG[:2])
    meta = make_chat("a.jsonl", max_len=19, long_rows=long_rows)
    assert chats() == encoded(LONG[:2]) and meta["left_out"] == {}
    assert capsys.readouterr().out.startswith(
        "set/train.npy: conversations 2, tokens 37, targets 29, longest 19, ")


def test_a_longer_conversation_is_refused_with_file_line_and_length():
    write_rows("a.jsonl", LONG)
    assert refusal("a.jsonl", make=make_chat, max_len=19) == \
        "a.jsonl:3: 20 tokens, more than --max_len=19; raise it, or leave such rows out with " \
        "--long_rows=skip, or --long_rows=cut"


def test_longer_conversations_can_be_left_out_and_are_counted(capsys):
    write_rows("a.jsonl", LONG + LATE)
    meta = make_chat("a.jsonl", max_len=18, long_rows="skip")
    assert chats() == encoded(LONG[:1]) and meta["left_out"] == {"longer than 18 tokens": 5}
    assert capsys.readouterr().out.startswith(
        "left out 5 longer than 18 tokens: a.jsonl:2, a.jsonl:3, a.jsonl:4, a.jsonl:5, a.jsonl:6\n")


def test_longer_conversations_can_be_cut_and_go_where_no_reply_is_left(capsys):
    write_rows("a.jsonl", LONG + LATE)
    meta = make_chat("a.jsonl", max_len=18, long_rows="cut", answer_tags=False)
    whole = encoded(LONG + LATE, answer_tags=False)                    # 16, 17, 18, 46, 19 and 20 tokens
    assert chats() == [(ids[:18], counts[:18]) for ids, counts in whole[:5]]
    assert whole[4][1][:18] == [False] * 17 + [True] and not any(whole[5][1][:18])
    assert meta["left_out"] == {"without a reply in the first 18 tokens": 1}
    assert meta["splits"]["train"]["longest"] == 18
    assert meta["splits"]["train"]["targets"] == sum(sum(counts[:18]) for _, counts in whole)
    assert capsys.readouterr().out.startswith(
        "2 cut to 18 tokens: a.jsonl:4, a.jsonl:5\n"
        "left out 1 without a reply in the first 18 tokens: a.jsonl:6\n")


# -----------------------------------------------------------------------------
# conversations: whole or not at all

MANY = [[user("question " * 9), assistant(f"answer {i} " * 9)] for i in range(300)]


def at_call(n, action):
    """ExampleWriter.add that does its work n times, and then the action."""
    calls, add = itertools.count(), prepare.ExampleWriter.add

    def wrapped(*args):
        if next(calls) == n:
            action()
        add(*args)
    return wrapped


def test_an_existing_set_of_conversations_is_never_touched():
    write_rows("a.jsonl", CHATS)
    make_chat("a.jsonl")
    before = snapshot("set")
    with pytest.raises(UserError, match="^--out_dir=set: already there; remove it or choose another$"):
        make_chat("a.jsonl")
    assert snapshot("set") == before and not Path("set.partial").exists()


@pytest.mark.parametrize("moment", ["the middle", "ExampleWriter.close", "json.dump", "os.rename"])
def test_a_killed_run_leaves_no_set_of_conversations_and_the_next_one_works(monkeypatch, moment):
    write_rows("a.jsonl", MANY)
    with monkeypatch.context() as patch:
        if moment == "the middle":
            patch.setattr(prepare.ExampleWriter, "add", at_call(200, die))
        else:
            patch.setattr(f"prepare.{moment}", die)
        child = multiprocessing.get_context("fork").Process(target=make_chat, args=("a.jsonl",))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL
    assert sorted(os.listdir()) == ["a.jsonl", "set.partial"] and Path("set.partial/train.npy").stat().st_size
    make_chat("a.jsonl")
    make_chat("a.jsonl", out="fresh")
    assert chats() == encoded(MANY) and sorted(os.listdir("set")) == sorted(os.listdir("fresh"))
    assert sorted(os.listdir()) == ["a.jsonl", "fresh", "set"]


@pytest.mark.parametrize("error, shown, message", [
    (KeyboardInterrupt(), KeyboardInterrupt, ""), (RuntimeError("a mistake"), RuntimeError, "a mistake"),
    (OSError(errno.ENOSPC, "No space left on device"), UserError, "set: No space left on device"),
], ids=["Ctrl-C", "mistake", "disk full"])
def test_a_run_that_fails_midway_leaves_nothing_and_the_next_one_works(monkeypatch, error, shown, message):
    def fail():
        raise error
    write_rows("a.jsonl", MANY)
    with monkeypatch.context() as patch, pytest.raises(shown) as caught:
        patch.setattr(prepare.ExampleWriter, "add", at_call(200, fail))
        make_chat("a.jsonl")
    assert str(caught.value) == message and os.listdir() == ["a.jsonl"]
    make_chat("a.jsonl")
    assert chats() == encoded(MANY)


@pytest.mark.parametrize("last, message", [
    (b"not JSON\n", "a.jsonl.gz:301: not JSON "), (b"", "a.jsonl.gz: damaged or truncated (")])
def test_a_bad_end_of_a_long_file_leaves_nothing(last, message):
    content = gzip.compress("".join(json.dumps(row) + "\n" for row in MANY).encode() + last)
    Path("a.jsonl.gz").write_bytes(content if last else content[:-20])
    assert refusal("a.jsonl.gz", make=make_chat).startswith(message)


def test_conversations_on_a_full_disk_end_with_one_line_and_leave_nothing():
    write_rows("a.jsonl", [[user("x"), assistant("x" * 100_000)]])
    limit = 100_000                                    # bytes a file may have: more fails as on a full disk
    result = run("data/prepare.py", "chat", f"--input={os.getcwd()}/a.jsonl", f"--out_dir={os.getcwd()}/set",
                 check=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"error: {os.getcwd()}/set: File too large\n"
    assert os.listdir() == ["a.jsonl"]


def test_conversations_are_prepared_from_the_command_line(folder):
    write_rows("a.jsonl", [{"question": "q", "answer": "a" * n} for n in (1, 99)] + [{"question": "q"}])
    out = run("data/prepare.py", "chat", f"--input={folder}/a.jsonl", f"--out_dir={folder}/set",
              "--fields=question,answer", "--answer_tags=false", "--bad_rows=skip", "--max_len=20",
              "--long_rows=skip").stdout
    assert out == (f"left out 1 malformed: {folder}/a.jsonl:3\n"
                   f"left out 1 longer than 20 tokens: {folder}/a.jsonl:2\n"
                   f"{folder}/set/train.npy: conversations 1, tokens 6, targets 2, longest 6, "
                   "vocabulary 266\n")
    assert chats() == encoded([[user("q"), assistant("a")]], answer_tags=False)


# -----------------------------------------------------------------------------
# pairs of answers

def make_pairs(*inputs, out="set", **options):
    """Prepare pairs in this process -> the set's meta.json"""
    config = prepare.PairsConfig(input=inputs, out_dir=out, **options)
    prepare.prepare_set(config, prepare.Pairs, prepare.ExampleWriter)
    return json.loads(Path(out, "meta.json").read_text())


def pairs(split="train", out="set"):
    """The set's pairs: prompt, chosen and rejected answer, (ids, counts) each"""
    parts = chats(split, out)
    assert len(parts) % 3 == 0
    return [parts[i:i + 3] for i in range(0, len(parts), 3)]


def encoded_pair(prompt, chosen, rejected, tokenizer=BYTES, answer_tags=True):
    """Lists of messages -> the prompt as encode_chat gives it, and what follows it in each conversation"""
    (start, _), = encode_chat(tokenizer, [prompt], answer_tags, reply=True)
    whole, n = encoded([prompt + answer for answer in (chosen, rejected)], tokenizer, answer_tags), len(start)
    assert all(ids[:n] == start for ids, _ in whole)                   # an exact prefix
    return [(start, [False] * n), *((ids[n:], counts[n:]) for ids, counts in whole)]


SYSTEM = {"role": "system", "content": "Be brief."}
TWO_TURNS = [user("c"), assistant("d", think="Hm\n"), user("e")]
PAIRS = [                                              # a row, and the messages that it means
    ({"prompt": "Hi", "chosen": "Ho \u4e2d", "rejected": "<end>", "score": 3},
     ([user("Hi")], [assistant("Ho \u4e2d")], [assistant("<end>")])),
    ({"prompt": [SYSTEM, user("a")], "chosen": [assistant("b", think="")], "rejected": [assistant("b")]},
     ([SYSTEM, user("a")], [assistant("b", think="")], [assistant("b")])),
    ({"prompt": "a", "chosen": [assistant("b"), *TWO_TURNS], "rejected": "a longer answer\U0001F642"},
     ([user("a")], [assistant("b"), *TWO_TURNS], [assistant("a longer answer\U0001F642")])),
    ({"chosen": [SYSTEM, *TWO_TURNS, assistant("f")],
      "rejected": [SYSTEM, *TWO_TURNS, assistant("g"), *TWO_TURNS]},
     ([SYSTEM, *TWO_TURNS], [assistant("f")], [assistant("g"), *TWO_TURNS])),
    ({"prompt": [SYSTEM], "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
     ([SYSTEM, user("a")], [assistant("b")], [assistant("c")])),
    ({"prompt": [], "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
     ([user("a")], [assistant("b")], [assistant("c")])),
    ({"prompt": "?", "chosen": "!", "rejected": "x"}, ([user("?")], [assistant("!")], [assistant("x")])),
]
PAIR_ROWS, PAIR_MESSAGES = zip(*PAIRS)


@pytest.mark.parametrize("block", [1, 30, 1 << 20])
@pytest.mark.parametrize("tags", [True, False], ids=["tags", "no tags"])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_set_holds_each_pair_as_the_template_encodes_it(monkeypatch, trained, kind, tags, block):
    set_block(monkeypatch, block)
    name = trained if kind == "sentencepiece" else "bytes"
    tokenizer = load_tokenizer(name)
    write_rows("a.jsonl", PAIR_ROWS)
    meta = make_pairs("a.jsonl", tokenizer=name, answer_tags=tags)
    expected = [encoded_pair(*messages, tokenizer, tags) for messages in PAIR_MESSAGES]
    assert pairs() == expected and np.load("set/train.npy").dtype == np.uint16
    sha = meta["splits"]["train"].pop("sha256")
    assert meta["splits"] == {"train": dict(
        pairs=len(PAIRS), tokens=sum(len(ids) for pair in expected for ids, _ in pair),
        targets=sum(sum(counts) for pair in expected for _, counts in pair),
        longest=max(len(prompt[0]) + len(answer[0]) for prompt, *answers in expected for answer in answers))}
    assert (meta["kind"], meta["left_out"], meta["data_fingerprint"]) == ("pairs", {}, sha[:16])
    assert meta["fingerprint"] == load_tokenizer("set").fingerprint == tokenizer.fingerprint
    row = PairData("set", "train", meta["splits"]["train"]["longest"] - 1, len(PAIRS)).batch(0)
    assert row.mask.sum() == meta["splits"]["train"]["targets"]
    assert not np.load("set/train_mask.npy")[:len(expected[0][0][0])].any()


def test_the_parts_of_a_pair_are_those_of_a_table_by_hand():
    write_rows("a.jsonl", [PAIR_ROWS[2]])
    make_pairs("a.jsonl")
    special = BYTES.special

    def ids(*tokens):
        return [i for token in tokens for i in ([special[token]] if token in special else token.encode())]
    (prompt, chosen, rejected), = pairs()
    assert prompt == (ids("user", "a", "end", "assistant"), [False] * 4)
    expected = [(i, learn) for learn, *tokens in [
        (True, "answer", "b", "/answer", "end"), (False, "user", "c", "end", "assistant"),
        (True, "think", "Hm\n", "/think", "answer", "d", "/answer", "end"), (False, "user", "e", "end")]
        for i in ids(*tokens)]
    assert [*zip(*chosen)] == expected
    tokens = ids("answer", "a longer answer\U0001F642", "/answer", "end")
    assert rejected == (tokens, [True] * len(tokens))


def test_the_fingerprint_of_pairs_follows_which_answer_is_chosen():
    rows = [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "c", "rejected": "b"}]
    marks = []
    for i, row in enumerate(rows):
        write_rows(f"{i}.jsonl", [row])
        marks.append(make_pairs(f"{i}.jsonl", out=f"set{i}")["data_fingerprint"])
    assert marks[0] != marks[1] == make_pairs("1.jsonl", out="again")["data_fingerprint"]


def test_val_frac_holds_out_whole_pairs_and_loses_none():
    rows = [{"prompt": f"number {i}", "chosen": "x" * (1 + i % 7), "rejected": "y"} for i in range(400)]
    write_rows("a.jsonl", rows[:300])
    write_rows("b.jsonl.gz", rows[300:])
    meta = make_pairs("*.jsonl*", val_frac=0.25)
    expected = [encoded_pair([user(row["prompt"])], [assistant(row["chosen"])], [assistant(row["rejected"])])
                for row in rows]
    train, val = pairs("train"), pairs("val")
    assert train == [pair for pair in expected if pair not in val]             # each is in one of them, once,
    assert val == [pair for pair in expected if pair not in train]             # in order
    assert [len(train), len(val)] == [meta["splits"][split]["pairs"] for split in ("train", "val")]
    assert abs(len(val) - 100) < 35                                            # four standard deviations
    make_pairs("*.jsonl*", val_frac=0.25, out="again")
    assert pairs("val", "again") == val
    make_pairs("*.jsonl*", val_frac=0.25, seed=1, out="other")
    assert pairs("val", "other") != val


def test_val_input_of_pairs_is_kept_apart():
    write_rows("a.jsonl", PAIR_ROWS[:4])
    write_rows("v.jsonl", PAIR_ROWS[4:])
    make_pairs("a.jsonl", val_input=("v.jsonl",))
    assert pairs("train") + pairs("val") == [encoded_pair(*messages) for messages in PAIR_MESSAGES]
    assert len(pairs("train")) == 4


@pytest.mark.parametrize("rows, val_frac, message", [
    ([], 0.0, "--input: no pairs left to train on"),
    (PAIR_ROWS[:2], 0.001, "--val_frac=0.001: none of the 2 pairs was drawn for validation; raise it, or "
                           "name files with --val_input")])
def test_a_split_of_no_pairs_is_refused(rows, val_frac, message):
    write_rows("a.jsonl", rows)
    assert refusal("a.jsonl", make=make_pairs, val_frac=val_frac) == message


# -----------------------------------------------------------------------------
# pairs that are left out

MALFORMED_PAIRS = {
    "conversation": [user("a"), assistant("b")], "number": 3, "null": None,
    "no rejected": {"prompt": "a", "chosen": "b"}, "no chosen": {"prompt": "a", "rejected": "b"},
    "null answer": {"prompt": "a", "chosen": None, "rejected": "b"},
    "a number as answer": {"prompt": "a", "chosen": 3, "rejected": "c"},
    "empty answer": {"prompt": "a", "chosen": [], "rejected": [assistant("c")]},
    "empty conversation": {"chosen": [user("a"), assistant("b")], "rejected": []},
    "number as prompt": {"prompt": 3, "chosen": "b", "rejected": "c"},
    "strings as prompt": {"prompt": ["a"], "chosen": "b", "rejected": "c"},
    "unknown role": {"prompt": "a", "chosen": [{"role": "tool", "content": "b"}], "rejected": "c"},
    "no content": {"prompt": "a", "chosen": [assistant("b")], "rejected": [{"role": "assistant"}]},
    "user thinks": {"prompt": [{**user("a"), "think": "b"}], "chosen": "c", "rejected": "d"},
}
NO_CHOICE = {
    "the same text": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "the same messages": {"prompt": "a", "chosen": [assistant("b")], "rejected": "b"},
    "the same conversation": dict.fromkeys(("chosen", "rejected"), [user("a"), assistant("b")]),
    "other questions": {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
    "other instructions": {"chosen": [SYSTEM, user("a"), assistant("b")],
                           "rejected": [user("a"), assistant("c")]},
    "one goes on": {"chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
                    "rejected": [user("a"), assistant("b")]},
    "answers to nothing": {"chosen": "b", "rejected": "c"},
    "no prompt": {"prompt": None, "chosen": "b", "rejected": "c"},
    "empty prompt": {"prompt": [], "chosen": [assistant("b")], "rejected": [assistant("c")]},
    "no assistant": {"prompt": "a", "chosen": [user("b")], "rejected": [user("c")]},
    "another question first": {"prompt": "a", "chosen": "b", "rejected": [user("c"), assistant("d")]},
}
NO_CHOICE_REASON = "without two replies to one prompt"
LEFT_OUT_PAIRS = [
    *(pytest.param(BAD_LINES[name], "malformed", id=name) for name in ("no json", "truncated", "not UTF-8")),
    *(pytest.param(json.dumps(row).encode(), reason, id=name) for rows, reason in (
        (MALFORMED_PAIRS, "malformed"), (NO_CHOICE, NO_CHOICE_REASON)) for name, row in rows.items())]


@pytest.mark.parametrize("line, reason", LEFT_OUT_PAIRS)
def test_a_bad_pair_is_refused_with_file_and_line_or_left_out(capsys, line, reason):
    first, last = (json.dumps(row).encode() for row in PAIR_ROWS[:2])
    Path("a.jsonl").write_bytes(first + b"\n\n" + line + b"\n" + last + b"\n")
    message = refusal("a.jsonl", make=make_pairs)
    assert message.startswith("a.jsonl:3: ") and "--bad_rows=skip" in message and len(message) < 250
    meta = make_pairs("a.jsonl", bad_rows="skip")
    assert meta["left_out"] == {reason: 1}
    assert pairs() == [encoded_pair(*messages) for messages in PAIR_MESSAGES[:2]]
    assert capsys.readouterr().out.startswith(f"left out 1 {reason}: a.jsonl:3\nset/train.npy: pairs 2, ")


def test_a_prompt_of_null_is_none():
    row = {"prompt": None, "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
    write_rows("a.jsonl", [row])
    make_pairs("a.jsonl")
    assert pairs() == [encoded_pair([user("a")], [assistant("b")], [assistant("c")])]


def test_a_prompt_that_both_conversations_begin_with_too_is_taken_once():
    """As in UltraFeedback: {"prompt": question, "chosen": [question, answer], "rejected": ...}."""
    row = {"prompt": "a", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}
    write_rows("a.jsonl", [row])
    make_pairs("a.jsonl")
    assert pairs() == [encoded_pair([user("a")], [assistant("b")], [assistant("c")])]


def text_pair(prompt, chosen, rejected):
    """-> row, and its parts without tags: a prompt of n letters takes n + 3 tokens, an answer n + 1"""
    return (dict(prompt=prompt, chosen=chosen, rejected=rejected),
            encoded_pair([user(prompt)], [assistant(chosen)], [assistant(rejected)], answer_tags=False))


# tokens of prompt, chosen, rejected: 4 + 6, 3; 4 + 7, 7; 4 + 3, 8; 10 + 2, 3; 9 + 3, 2; 30 + 2, 2
LONG_PAIRS = [text_pair("a" * n, "x" * chosen, "y" * rejected) for n, chosen, rejected in (
    (1, 5, 2), (1, 6, 6), (1, 2, 7), (7, 1, 2), (6, 2, 1), (27, 1, 1))]


def test_a_longer_pair_is_refused_with_file_line_and_length_of_its_longer_answer():
    write_rows("a.jsonl", [row for row, _ in LONG_PAIRS])
    assert refusal("a.jsonl", make=make_pairs, max_len=11, answer_tags=False) == \
        "a.jsonl:3: 12 tokens, more than --max_len=11; raise it, or leave such rows out with " \
        "--long_rows=skip, or --long_rows=cut"
    assert refusal("a.jsonl", make=make_pairs, max_len=-1).startswith("--max_len=-1: expected a number")


def test_longer_pairs_can_be_left_out_and_are_counted(capsys):
    write_rows("a.jsonl", [row for row, _ in LONG_PAIRS])
    meta = make_pairs("a.jsonl", max_len=11, long_rows="skip", answer_tags=False)
    assert pairs() == [pair for _, pair in LONG_PAIRS[:2]]
    assert meta["left_out"] == {"longer than 11 tokens": 4}
    assert capsys.readouterr().out.startswith(
        "left out 4 longer than 11 tokens: a.jsonl:3, a.jsonl:4, a.jsonl:5, a.jsonl:6\n"
        "set/train.npy: pairs 2, tokens 31, targets 23, longest 11, ")


def test_longer_answers_can_be_cut_and_pairs_go_where_no_token_is_left_of_one(capsys):
    write_rows("a.jsonl", [row for row, _ in LONG_PAIRS])
    meta = make_pairs("a.jsonl", max_len=10, long_rows="cut", answer_tags=False)
    expected = [[prompt, *((ids[:room], counts[:room]) for ids, counts in answers)]
                for (_, (prompt, *answers)), room in zip(LONG_PAIRS, (6, 6, 6, 0, 1))]
    assert pairs() == [*expected[:3], expected[4]]                     # of the fourth only the prompt fits
    assert expected[2][1] == LONG_PAIRS[2][1][1]                       # the shorter answer stays whole
    assert all(sum(counts) for pair in pairs() for _, counts in pair[1:])
    assert meta["left_out"] == {"without a reply in the first 10 tokens": 2}
    assert meta["splits"]["train"]["longest"] == 10
    assert capsys.readouterr().out.startswith(
        "3 cut to 10 tokens: a.jsonl:2, a.jsonl:3, a.jsonl:5\n"
        "left out 2 without a reply in the first 10 tokens: a.jsonl:4, a.jsonl:6\n")


@pytest.mark.parametrize("tags, max_len", [(False, 8), (True, 6)], ids=["start", "tag only"])
def test_answers_that_are_the_same_once_they_are_cut_are_left_out(tags, max_len):
    write_rows("a.jsonl", [text_pair("?", "b", "x")[0], text_pair("aa", "same b", "same c")[0]])
    meta = make_pairs("a.jsonl", max_len=max_len, long_rows="cut", answer_tags=tags)
    assert len(pairs()) == 1 and sum(meta["left_out"].values()) == 1


# -----------------------------------------------------------------------------
# pairs: whole or not at all

MANY_PAIRS = [{"prompt": "question " * 9, "chosen": f"answer {i} " * 9, "rejected": "?"} for i in range(300)]


@pytest.mark.parametrize("moment", ["the middle", "ExampleWriter.close", "json.dump", "os.rename"])
def test_a_killed_run_leaves_no_set_of_pairs_and_the_next_one_works(monkeypatch, moment):
    write_rows("a.jsonl", MANY_PAIRS)
    with monkeypatch.context() as patch:
        if moment == "the middle":
            patch.setattr(prepare.ExampleWriter, "add", at_call(200, die))
        else:
            patch.setattr(f"prepare.{moment}", die)
        child = multiprocessing.get_context("fork").Process(target=make_pairs, args=("a.jsonl",))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL and sorted(os.listdir()) == ["a.jsonl", "set.partial"]
    make_pairs("a.jsonl")
    assert len(pairs()) == 300 and sorted(os.listdir()) == ["a.jsonl", "set"]
    before = snapshot("set")
    with pytest.raises(UserError, match="^--out_dir=set: already there; remove it or choose another$"):
        make_pairs("a.jsonl")
    assert snapshot("set") == before


def test_pairs_that_fail_midway_leave_nothing(monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")
    write_rows("a.jsonl", MANY_PAIRS)
    monkeypatch.setattr(prepare.ExampleWriter, "add", at_call(200, full))
    assert refusal("a.jsonl", make=make_pairs) == "set: No space left on device"
    assert os.listdir() == ["a.jsonl"]


def test_pairs_are_prepared_from_the_command_line(folder):
    rows = [text_pair("q", "a" * n, "b") for n in (2, 99, 1)]
    write_rows("a.jsonl", [row for row, _ in rows] + [{"prompt": "q"}])
    out = run("data/prepare.py", "pairs", f"--input={folder}/a.jsonl", f"--out_dir={folder}/set",
              "--answer_tags=false", "--bad_rows=skip", "--max_len=20", "--long_rows=skip").stdout
    assert out == (f"left out 1 malformed: {folder}/a.jsonl:4\n"
                   f"left out 1 longer than 20 tokens: {folder}/a.jsonl:2\n"
                   f"{folder}/set/train.npy: pairs 2, tokens 17, targets 9, longest 7, "
                   "vocabulary 266\n")
    assert pairs() == [rows[0][1], rows[2][1]]


# -----------------------------------------------------------------------------
# prompts

def make_prompts(*inputs, out="set", **options):
    """Prepare prompts in this process -> the set's meta.json"""
    config = prepare.PromptsConfig(input=inputs, out_dir=out, **options)
    prepare.prepare_set(config, prepare.Prompts, prepare.ExampleWriter)
    return json.loads(Path(out, "meta.json").read_text())


def prompts(split="train", out="set"):
    """The set's prompts, read by numpy alone: ids and row of each"""
    rows, offsets = (np.load(f"{out}/{split}_{name}.npy") for name in ("rows", "row_offsets"))
    assert (rows.dtype, offsets.dtype) == (np.uint8, np.uint64) and offsets[-1] == len(rows)
    assert not np.load(f"{out}/{split}_mask.npy").any()                # nothing to learn
    texts = [bytes(rows[a:b]) for a, b in itertools.pairwise(offsets.tolist())]
    return list(zip([ids for ids, _ in chats(split, out)], map(json.loads, texts), strict=True))


def encoded_prompts(rows, tokenizer=BYTES, answer_tags=True):
    """rows: (messages, answer) each -> what `prompts` gives"""
    return [(encode_chat(tokenizer, [messages], answer_tags, reply=True)[0][0],
             {"prompt": messages, "answer": answer}) for messages, answer in rows]


PROMPTS = [                                            # a row, its messages and answer
    ({"prompt": "Hi", "answer": "Ho", "level": 3}, ([user("Hi")], "Ho")),
    ({"prompt": [SYSTEM, user("1 + 1 = ?")], "answer": ""}, ([SYSTEM, user("1 + 1 = ?")], "")),
    ({"prompt": TWO_TURNS, "answer": "a\n<end> b"}, (TWO_TURNS, "a\n<end> b")),
    ({"answer": "\u4e2d\u6587\U0001F642", "prompt": "\u4eca\u5929 <user> \u00e9e\u0301"},
     ([user("\u4eca\u5929 <user> \u00e9e\u0301")], "\u4e2d\u6587\U0001F642")),
    ({"prompt": "?", "answer": "x"}, ([user("?")], "x")),
]
PROMPT_ROWS, PROMPT_MESSAGES = zip(*PROMPTS)


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
@pytest.mark.parametrize("tags", [True, False], ids=["tags", "no tags"])
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_set_holds_each_prompt_as_it_is_encoded_and_its_row(monkeypatch, trained, kind, tags, block):
    set_block(monkeypatch, block)
    name = trained if kind == "sentencepiece" else "bytes"
    tokenizer = load_tokenizer(name)
    write_rows("a.jsonl", PROMPT_ROWS[:2])
    write_rows("b.jsonl.gz", PROMPT_ROWS[2:])
    meta = make_prompts("*.jsonl*", tokenizer=name, answer_tags=tags)
    expected = encoded_prompts(PROMPT_MESSAGES, tokenizer, tags)
    assert prompts() == expected
    sha = meta["splits"]["train"].pop("sha256")
    assert meta["splits"] == {"train": dict(
        prompts=len(PROMPTS), tokens=sum(len(ids) for ids, _ in expected), targets=0,
        longest=max(len(ids) for ids, _ in expected))}
    assert (meta["kind"], meta["left_out"], meta["data_fingerprint"]) == ("prompts", {}, sha[:16])
    assert meta["fingerprint"] == load_tokenizer("set").fingerprint == tokenizer.fingerprint
    data = PromptData("set", "train", meta["splits"]["train"]["longest"], 1)
    assert [(data.prompt(i).tolist(), data.row(i)) for i in range(len(PROMPTS))] == expected


def test_the_tokens_of_a_prompt_are_those_of_a_table_by_hand():
    write_rows("a.jsonl", [{"prompt": [SYSTEM, user("c")], "answer": "d"}])
    make_prompts("a.jsonl")
    special = BYTES.special
    assert ids_of() == [special["system"], *b"Be brief.", special["end"], special["user"], *b"c",
                        special["end"], special["assistant"]]


def test_fields_name_the_prompt_and_the_answer():
    write_rows("a.jsonl", [{"question": "q", "prompt": "p", "solution": "s", "answer": 3},
                           {"question": [user("r")], "solution": "t"}])
    make_prompts("a.jsonl", fields=("question", "solution"))
    assert prompts() == encoded_prompts([([user("q")], "s"), ([user("r")], "t")])


@pytest.mark.parametrize("fields", [("prompt",), ("system", "prompt", "answer")])
def test_fields_of_prompts_are_two(fields):
    write_rows("a.jsonl", PROMPT_ROWS)
    assert refusal("a.jsonl", make=make_prompts, fields=fields) == \
        f"--fields={','.join(fields)}: give two names, of the prompt and the answer"


def test_the_fingerprint_of_prompts_follows_their_answers():
    marks = []
    for i, answer in enumerate(("b", "c")):
        write_rows(f"{i}.jsonl", [{"prompt": "a", "answer": answer}])
        marks.append(make_prompts(f"{i}.jsonl", out=f"set{i}")["data_fingerprint"])
    assert marks[0] != marks[1] == make_prompts("1.jsonl", out="again")["data_fingerprint"]


def test_val_frac_and_val_input_hold_out_whole_prompts_and_lose_none():
    rows = [{"prompt": f"number {i}", "answer": "x" * (i % 7)} for i in range(400)]
    write_rows("a.jsonl", rows[:300])
    write_rows("b.jsonl", rows[300:])
    expected = encoded_prompts([([user(row["prompt"])], row["answer"]) for row in rows])
    meta = make_prompts("a.jsonl", "b.jsonl", val_frac=0.25)
    train, val = prompts("train"), prompts("val")
    assert train == [prompt for prompt in expected if prompt not in val]       # each is in one of them, once,
    assert val == [prompt for prompt in expected if prompt not in train]       # in order
    assert [len(train), len(val)] == [meta["splits"][split]["prompts"] for split in ("train", "val")]
    assert abs(len(val) - 100) < 35                                            # four standard deviations
    make_prompts("a.jsonl", "b.jsonl", val_frac=0.25, seed=1, out="other")
    assert prompts("val", "other") != val
    make_prompts("a.jsonl", val_input=("b.jsonl",), out="apart")
    assert (prompts("train", "apart"), prompts("val", "apart")) == (expected[:300], expected[300:])


@pytest.mark.parametrize("rows, val_frac, message", [
    ([], 0.0, "--input: no prompts left to train on"),
    (PROMPT_ROWS[:2], 0.001, "--val_frac=0.001: none of the 2 prompts was drawn for validation; raise it, or "
                             "name files with --val_input")])
def test_a_split_of_no_prompts_is_refused(rows, val_frac, message):
    write_rows("a.jsonl", rows)
    assert refusal("a.jsonl", make=make_prompts, val_frac=val_frac) == message


MALFORMED_PROMPTS = {
    "conversation": [user("a")], "number": 3, "null": None, "no answer": {"prompt": "a"},
    "no prompt": {"answer": "a"}, "number as answer": {"prompt": "a", "answer": 3},
    "null answer": {"prompt": "a", "answer": None},
    "a message as answer": {"prompt": "a", "answer": user("b")},
    "null prompt": {"prompt": None, "answer": "b"}, "number as prompt": {"prompt": 3, "answer": "b"},
    "empty prompt": {"prompt": [], "answer": "b"}, "strings as prompt": {"prompt": ["a"], "answer": "b"},
    "a number as prompt": {"prompt": 3, "answer": "b"},
    "unknown role": {"prompt": [{"role": "tool", "content": "a"}], "answer": "b"},
    "no content": {"prompt": [{"role": "user"}], "answer": "b"},
    "user thinks": {"prompt": [{**user("a"), "think": "b"}], "answer": "c"},
    "lone surrogate": {"prompt": "\ud800", "answer": "b"},
}
LEFT_OUT_PROMPTS = [
    *(pytest.param(BAD_LINES[name], id=name) for name in ("no json", "truncated", "not UTF-8")),
    *(pytest.param(json.dumps(row).encode(), id=name) for name, row in MALFORMED_PROMPTS.items())]


@pytest.mark.parametrize("line", LEFT_OUT_PROMPTS)
def test_a_bad_prompt_is_refused_with_file_and_line_or_left_out(capsys, line):
    first, last = (json.dumps(row).encode() for row in PROMPT_ROWS[:2])
    Path("a.jsonl").write_bytes(first + b"\n\n" + line + b"\n" + last + b"\n")
    message = refusal("a.jsonl", make=make_prompts)
    assert message.startswith("a.jsonl:3: ") and "--bad_rows=skip" in message and len(message) < 250
    meta = make_prompts("a.jsonl", bad_rows="skip")
    assert meta["left_out"] == {"malformed": 1} and prompts() == encoded_prompts(PROMPT_MESSAGES[:2])
    assert capsys.readouterr().out.startswith("left out 1 malformed: a.jsonl:3\nset/train.npy: prompts 2, ")


LONG_PROMPTS = [{"prompt": "a" * n, "answer": "b" * 50} for n in (7, 8, 9, 40)]       # 10, 11, 12, 43 tokens


def test_longer_prompts_are_refused_or_left_out_and_counted_whatever_their_answers(capsys):
    write_rows("a.jsonl", LONG_PROMPTS)
    message = refusal("a.jsonl", make=make_prompts, max_len=11)
    assert message.startswith("a.jsonl:3: 12 tokens, more than --max_len=11; raise it, or leave such rows "
                              "out with --long_rows=skip")
    meta = make_prompts("a.jsonl", max_len=11, long_rows="skip")
    assert prompts() == encoded_prompts([([user("a" * n)], "b" * 50) for n in (7, 8)])
    assert meta["left_out"] == {"longer than 11 tokens": 2}
    assert capsys.readouterr().out.startswith("left out 2 longer than 11 tokens: a.jsonl:3, a.jsonl:4\n"
                                              "set/train.npy: prompts 2, tokens 21, targets 0, longest 11, ")


def test_a_killed_run_leaves_no_set_of_prompts_and_the_next_one_works(monkeypatch):
    write_rows("a.jsonl", [{"prompt": f"question {i}", "answer": "?"} for i in range(300)])
    with monkeypatch.context() as patch:
        patch.setattr(prepare.ExampleWriter, "add", at_call(200, die))
        child = multiprocessing.get_context("fork").Process(target=make_prompts, args=("a.jsonl",))
        child.start()
        child.join()
    assert child.exitcode == -signal.SIGKILL and sorted(os.listdir()) == ["a.jsonl", "set.partial"]
    make_prompts("a.jsonl")
    assert len(prompts()) == 300 and sorted(os.listdir()) == ["a.jsonl", "set"]


def test_prompts_are_prepared_from_the_command_line(folder):
    write_rows("a.jsonl", [*LONG_PROMPTS, {"prompt": "q"}])
    out = run("data/prepare.py", "prompts", f"--input={folder}/a.jsonl", f"--out_dir={folder}/set",
              "--bad_rows=skip", "--max_len=11", "--long_rows=skip").stdout
    assert out.startswith(f"left out 1 malformed: {folder}/a.jsonl:5\n"
                          f"left out 2 longer than 11 tokens: {folder}/a.jsonl:3, {folder}/a.jsonl:4\n"
                          f"{folder}/set/train.npy: prompts 2, tokens 21, targets 0, longest 11, ")
    assert prompts() == encoded_prompts([([user("a" * n)], "b" * 50) for n in (7, 8)])


# -----------------------------------------------------------------------------
# the command line

def test_without_arguments_it_says_how_it_is_used():
    plain = run("data/prepare.py")
    assert plain.stdout.startswith(prepare.__doc__.strip()) and plain.stderr == ""
    assert "python data/prepare.py COMMAND --help" in plain.stdout
    assert run("data/prepare.py", "--help").stdout == plain.stdout


def test_a_mistake_ends_with_exit_code_2_and_one_line_and_leaves_nothing(folder):
    (folder / "bad.jsonl").write_text('{"text": "good"}\n{"txt": "bad"}\n')
    (folder / "bad.tsv").write_text("a,b\n")
    (folder / "bad.pkl").write_bytes(pickle.dumps([Payload()]))
    for args, message in [
        (["texts"], "unknown command texts; expected one of text, chat, pairs, prompts, tokenizer, images\n"),
        (["text", "--input=bad.tsv"],
         "--input=bad.tsv: expected one of .txt, .txt.gz, .jsonl, .jsonl.gz, .json, "),
        (["text", "--input=bad.jsonl"], 'bad.jsonl:2: expected {"text": "..."}, or --fields, got '),
        (["text", "--input=bad.pkl"], "bad.pkl: refused or damaged (it asks for "),
    ]:
        args = [arg.replace("=", f"={folder}/") for arg in args]
        message = message.replace("bad.", f"{folder}/bad.", 1)
        result = run("data/prepare.py", *args, f"--out_dir={folder}/set", check=False)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("error: " + message) and result.stderr.count("\n") == 1
    assert sorted(os.listdir()) == ["bad.jsonl", "bad.pkl", "bad.tsv"] and not (ROOT / "ran").exists()


def test_a_negative_limit_and_validation_files_of_nothing_are_refused(tmp_path):
    write_rows("a.jsonl", CHATS)
    assert refusal("a.jsonl", make=make_chat, max_len=-1).startswith("--max_len=-1: expected a number")
    Path("empty.jsonl").write_text("")
    assert "--val_input=empty.jsonl: no conversations" in refusal("a.jsonl", make=make_chat,
                                                                  val_input=("empty.jsonl",))
    Path("t.txt").write_text("some text")
    Path("v.txt").write_text("")
    assert "--val_input=v.txt: no documents" in refusal("t.txt", val_input=("v.txt",))


def test_thoughts_count_for_how_much_is_held_at_once(monkeypatch):
    set_block(monkeypatch, 1000)
    sizes, encode = [], readers.encode_chat
    monkeypatch.setattr(readers, "encode_chat", lambda tokenizer, chats, *rest: sizes.append(len(chats)) or
                        encode(tokenizer, chats, *rest))
    write_rows("a.jsonl", [[user("?"), {**assistant("!"), "think": "x" * 500}]] * 20)
    make_chat("a.jsonl")
    assert max(sizes) == 2 and sum(sizes) == 20


def test_a_tokenizer_learns_from_conversations_and_named_fields():
    write_rows("a.jsonl", [*CHATS, {"messages": CHATS[0]}, {"question": "Wozu", "answer": "Dazu"}])
    texts = list(prepare.read_lines(["a.jsonl"], ("question", "answer")))
    said = [text for chat in [*CHATS, CHATS[0]] for message in chat for key, text in message.items()
            if key in ("content", "think") for text in text.splitlines()]
    assert texts == said + ["Wozu", "Dazu"]
    write_rows("b.jsonl", [{"txt": "bad"}])
    with pytest.raises(
            UserError, match=r"^b.jsonl:1: expected a conversation or text \(--fields\), got .*; mend it$"):
        list(prepare.read_lines(["b.jsonl"], ("text",)))


def test_what_to_do_with_long_rows_needs_a_length():
    write_rows("a.jsonl", CHATS)
    assert "--max_len=0" in refusal("a.jsonl", make=make_chat, long_rows="cut")


@pytest.mark.parametrize("prompt", ["q ", [user("q"), assistant("a"), user("r")]])
def test_a_prompt_that_the_conversations_do_not_begin_with_is_refused(prompt):
    write_rows("a.jsonl", [dict(prompt=prompt, chosen=[user("q"), assistant("a")],
                                rejected=[user("q"), assistant("b")])])
    assert "a.jsonl:1: chosen begins with a user's message, but not with the prompt" in refusal(
        "a.jsonl", make=make_pairs)


# -----------------------------------------------------------------------------
# what students bring

def prepared_from(kind, name, content):
    Path(name).write_bytes(content)
    return launch([ROOT / "data/prepare.py", kind, f"--input={name}", "--out_dir=set"], cwd=os.getcwd())


@pytest.mark.parametrize("kind, row, hint", [
    ("chat", '{"prompt": "a", "chosen": "b", "rejected": "c"}', "which is for `data/prepare.py pairs`"),
    ("pairs", '{"messages": [{"role": "user", "content": "a"}]}', "which is for `data/prepare.py chat`"),
    ("text", '{"prompt": "a", "answer": "b"}', "which is for `data/prepare.py prompts`"),
    ("chat", '{"conversations": [{"from": "human", "value": "a"}]}', "expected an assistant's turn"),
    ("chat", '{"messages": 3}', 'got {"messages": 3}; mend it')])
def test_rows_for_another_command_name_it(kind, row, hint):
    result = prepared_from(kind, "a.jsonl", row.encode())
    assert result.returncode == 2 and hint in result.stderr and result.stderr.count("\n") == 1, result.stderr


def test_a_byte_order_mark_before_the_first_row_is_none_of_it():
    assert prepared_from("text", "a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n').returncode == 0
    assert np.load("set/train.npy").tolist() == [97, 256, 98, 256]


@pytest.mark.parametrize("name, content, message", [
    ("a.jsonl", '{"text": "caf\xe9"}'.encode("latin-1"), "a.jsonl:1: not UTF-8"),
    ("a.jsonl", b'{\n "text": "a"\n}\n', "one row a line"),
    ("a.json", b"{}", "expected a list of rows"), ("a.csv", b"text,b\na", "a row of another length")])
def test_files_of_another_form_are_told_how_to_become_this_one(name, content, message):
    result = prepared_from("text", name, content)
    assert result.returncode == 2 and message in result.stderr and result.stderr.count("\n") == 1
