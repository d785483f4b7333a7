"""`data/prepare.py images`, data/vqa.py: what a row may look like, what is stored, cut, left out, refused."""
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, run
from launch import launch

from common.tokenizer import load_tokenizer

Image = pytest.importorskip("PIL.Image", reason="the extra images")
sys.path[:0] = [str(ROOT), str(ROOT / "data")]

import vqa  # noqa: E402  (data/vqa.py)

from extras.image_rows import with_paths  # noqa: E402

BYTES = load_tokenizer("bytes")
IMAGE = BYTES.special["image"]
A = dict(role="assistant", content="x")


def user(content, **more):
    return dict(role="user", content=content, **more)


def text(text):
    return dict(type="text", text=text)


def image(path):
    return dict(type="image", path=path)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Four pictures, two of which are the same, and a file that is none"""
    monkeypatch.chdir(tmp_path)
    os.mkdir("in")
    for name, colour in dict(red="red", red_again="red", blue="blue", lime="lime").items():
        Image.new("RGB", (8, 8), colour).save(f"in/{name}.png")
    with open("in/broken.png", "wb") as file:
        file.write(open("in/red.png", "rb").read()[:40])
    return tmp_path


def prepare(rows, *options, command="images", check=True):
    with open("in/rows.jsonl", "w") as file:
        file.writelines((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    result = launch([ROOT / "data/prepare.py", command, "--input=in/rows.jsonl", "--out_dir=set", *options,
                     *["--image_size=8"] * (command == "images" and "--image_size" not in str(options)),
                     *["--tokens_per_image=2"] * (command == "images" and "--tokens" not in str(options))],
                    cwd=os.getcwd())
    assert not check or result.returncode == 0, result.stderr
    return result


def stored():
    """-> conversations as text with <image>, colours of each one's pictures, number of pictures stored"""
    tokens, offsets = np.load("set/train.npy"), np.load("set/train_offsets.npy")
    ids, borders = np.load("set/train_image_ids.npy"), np.load("set/train_image_offsets.npy")
    pixels = np.load("set/train_images.npy", mmap_mode="r")
    names = {(255, 0, 0): "red", (0, 0, 255): "blue", (0, 255, 0): "lime"}
    assert len(offsets) == len(borders) and borders[-1] == len(ids)
    texts = [BYTES.decode(tokens[a:b], show_special=True) for a, b in zip(offsets, offsets[1:])]
    colours = [names[tuple(pixels[i, 3, 3].tolist())] for i in ids]
    return texts, [colours[a:b] for a, b in zip(borders, borders[1:])], len(pixels)


ROWS = {
    "parts": [user([text("see "), image("red.png"), text("?")]), A],
    "marks of a message": [user("see <image>?", images=["red.png"]), A],
    "marks of a row": dict(messages=[user("see <image>?"), A], images=["red.png"])}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_three_ways_to_show_a_picture(folder, row):
    result = prepare([row])
    assert stored() == (["<user>see <image><image>?<end><assistant><answer>x</answer><end>"], [["red"]], 1)
    assert result.stdout.endswith("images 1, pictures 1, vocabulary 266\n")
    tokens, mask = np.load("set/train.npy"), np.load("set/train_mask.npy")
    assert not mask[tokens == IMAGE].any() and mask.sum() == 4
    meta = json.loads((folder / "set/meta.json").read_text())
    assert meta["kind"] == "chat" and meta["images"] == dict(
        image_size=8, tokens_per_image=2, resize="stretch", mean=[0.5] * 3, std=[0.5] * 3, token=IMAGE)


def test_pictures_come_in_the_order_of_their_marks_and_are_stored_once(folder):
    rows = [dict(messages=[user("<image>a<image>"), A, user("<image>", images=["lime.png"]), A,
                           user("<image>"), A], images=["red.png", "blue.png", "red_again.png"]),
            [user("none"), A], [user([image("blue.png"), image("blue.png")]), A],
            [dict(role="system", content=[image("lime.png")]), user("b"), A]]
    prepare(rows)
    texts, colours, pictures = stored()
    assert colours == [["red", "blue", "lime", "red"], [], ["blue", "blue"], ["lime"]] and pictures == 3
    assert texts[0].startswith("<user><image><image>a<image><image><end>") and "image" not in texts[1]


def test_rows_as_other_tools_write_them(folder):
    """Images without a path take the next of the row's; text parts are text; empty columns are none"""
    both = [user([dict(type="image"), text("a"), image("blue.png")]),
            dict(role="assistant", content=[text("x"), text("y")])]
    prepare([dict(messages=both, images=["red.png"]),
             dict(messages=[user([text("b")], images=None), A], images=[])])
    texts, colours, _ = stored()
    assert colours == [["red", "blue"], []]
    assert texts == ["<user><image><image>a<image><image><end><assistant><answer>xy</answer><end>",
                     "<user>b<end><assistant><answer>x</answer><end>"]


def test_without_images_a_mark_is_text(folder):
    prepare([[user("a <image> b"), A], dict(messages=[user([text("<image>"), image("red.png")]), A])])
    texts, colours, _ = stored()
    tokens = np.load("set/train.npy")
    assert (tokens == IMAGE).sum() == 2 and colours == [[], ["red"]]
    assert texts[0].startswith("<user>a <image> b<end>")
    assert texts[1].startswith("<user><image><image><image><end>")


BAD = {
    "more marks": ([user("<image><image>", images=["red.png"]), A], 'more "<image>" than the 1 in "images"'),
    "fewer marks": ([user("<image>", images=["red.png"] * 2), A], 'fewer "<image>" than the 2 in "images"'),
    "no mark": (dict(messages=[user("a"), A], images=["red.png"]), 'fewer "<image>" than the 1 in "images"'),
    "more marks than the row has": (
        dict(messages=[user("<image>"), A, user("<image>"), A], images=["red.png"]),
        'more "<image>" than the 1 in "images"'),
    "no paths": ([user("<image>", images="red.png"), A], '"images" is a list of paths'),
    "numbers": ([user("<image>", images=[1]), A], '"images" is a list of paths'),
    "no path": ([user([dict(type="image")]), A], 'an image is {"type": "image", "path": "..."}'),
    "another part": ([user([dict(type="audio")]), A], 'a message is {"role": "...", "content": "..."}'),
    "text that is none": ([user([dict(type="text", text=1)]), A], "a message is"),
    "an assistant's image": ([user("a"), dict(role="assistant", content=[image("red.png")])],
                             "an assistant's content is text"),
    "an assistant's mark": (dict(messages=[user("a"), dict(role="assistant", content="<image>")],
                                 images=["red.png"]), "an assistant's content is text"),
    "no list": (dict(prompt="a"), "expected [messages]"),
    "a number": ([7, A], "a message is")}
NUL = [user([image("a\0.png")]), A], "cannot be read (embedded null byte)"
MISSING = [user([image("nowhere.png")]), A], "in/nowhere.png: cannot be read (No such file or directory)"
NO_PICTURE = [user([image("broken.png")]), A], "in/broken.png: not a picture that can be read"


@pytest.mark.parametrize("row, message", [*BAD.values(), NUL, MISSING, NO_PICTURE],
                         ids=[*BAD, "no name", "missing file", "no picture"])
def test_a_bad_row_is_one_line_with_file_and_line(folder, row, message):
    result = prepare([ROWS["parts"], row], check=False)
    assert result.returncode == 2 and result.stderr.startswith("error: in/rows.jsonl:2: ")
    assert message in result.stderr and result.stderr.count("\n") == 1 and not os.path.exists("set")


def test_bad_rows_can_be_left_out(folder):
    rows = [row for row, _ in BAD.values()]
    result = prepare([ROWS["parts"], *rows, MISSING[0], NO_PICTURE[0], ROWS["marks of a row"]],
                     "--bad_rows=skip")
    assert stored()[1:] == ([["red"], ["red"]], 1)
    assert f"left out {len(rows)} malformed: in/rows.jsonl:2, " in result.stdout
    first = len(rows) + 2
    assert f"left out 2 with unreadable images: in/rows.jsonl:{first}, in/rows.jsonl:{first + 1}\n" \
        in result.stdout


def test_a_set_without_a_readable_picture_is_an_error(folder):
    result = prepare([NO_PICTURE[0]], "--bad_rows=skip", check=False)
    assert result.returncode == 2 and "no conversations left to train on" in result.stderr
    assert not os.path.exists("set") and not os.path.exists("set.partial")


def test_a_cut_never_goes_through_an_image(folder):
    """<user>a<end><assistant><answer>x</answer><end>, 8 tokens, <user>b, then the image at 10 and 11"""
    row = [user("a"), A, user([text("b"), image("red.png"), text("cd")]), A]
    for most in range(9, 15):
        result = prepare([[user("a"), A], row], f"--max_len={most}", "--long_rows=cut", "--bad_rows=skip")
        texts, colours, _ = stored()
        counts = [conversation.count("<image>") for conversation in texts]
        assert counts == [2 * len(shown) for shown in colours]
        assert not any(conversation.endswith("<image>") for conversation in texts)
        across = f"left out 1 with an image across the first {most} tokens: in/rows.jsonl:2\n"
        assert (across in result.stdout) == (most in (11, 12))
        assert len(texts) == (1 if most in (11, 12) else 2)
        subprocess.run(["rm", "-r", "set"], check=True)
    result = prepare([[user("a"), A], row], "--max_len=12", "--long_rows=skip")
    assert "left out 1 longer than 12 tokens: in/rows.jsonl:2" in result.stdout


@pytest.mark.parametrize("command, row", [
    ("chat", ROWS["parts"]), ("chat", ROWS["marks of a message"]), ("chat", ROWS["marks of a row"]),
    ("pairs", dict(prompt=[ROWS["parts"][0]], chosen="a", rejected="b")),
    ("pairs", dict(prompt="<image>", chosen="a", rejected="b", images=["red.png"])),
    ("prompts", dict(prompt=[ROWS["parts"][0]], answer="")),
    ("prompts", dict(prompt="<image>", answer="", images=["red.png"]))])
def test_other_commands_say_where_images_go(folder, command, row):
    result = prepare([row], command=command, check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "rows.jsonl:1: images are for `data/prepare.py images` and train_sft.py only" in result.stderr


@pytest.mark.parametrize("options, message", [
    (["--image_size=0"], "--image_size=0: must be at least 1"),
    (["--tokens_per_image=0"], "--tokens_per_image=0: must be at least 1"),
    (["--mean=0.5"], "--mean=0.5: expected three numbers"),
    (["--std=1,1,0"], "--std=1.0,1.0,0.0: expected three numbers, above 0"),
    (["--resize=fit"], "--resize=fit: expected stretch or crop or pad")])
def test_options_that_cannot_be_are_refused(folder, options, message):
    result = prepare([ROWS["parts"]], *options, check=False)
    assert result.returncode == 2 and message in result.stderr and not os.path.exists("set")


def test_splits_have_pictures_of_their_own(folder):
    prepare([[user([image(f"{name}.png")]), A] for name in ("red", "blue", "lime") * 20], "--val_frac=0.3")
    meta = json.loads((folder / "set/meta.json").read_text())
    for split in ("train", "val"):
        counts, pixels = meta["splits"][split], np.load(f"set/{split}_images.npy")
        assert counts["images"] == counts["conversations"] > 3 and counts["pictures"] == len(pixels) == 3
    assert meta["splits"]["train"]["images"] + meta["splits"]["val"]["images"] == 60


def test_memory_does_not_grow_with_the_pictures(folder):
    """150 MiB of pixels are written by a process that may have 40 MiB more than one with a single picture."""
    for n in range(50):
        Image.new("RGB", (8, 8), (n, 0, 0)).save(f"in/{n}.png")

    def peak(n):
        prepare([[user([image(f"{i}.png")]), A] for i in range(n)], "--image_size=1024", f"--out_dir=set{n}")
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    assert peak(50) - peak(1) < 40
    assert os.path.getsize("set50/train_images.npy") == 128 + 50 * 3 * 2**20


def test_a_tokenizer_learns_from_the_text_of_the_parts(folder):
    rows = [[user([image("red.png"), text(f"word{i} something")]), A] for i in range(40)]
    with open("in/rows.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    launch([ROOT / "data/prepare.py", "tokenizer", "--input=in/rows.jsonl", "--vocab_size=300",
            "--out=t.model"], cwd=os.getcwd())
    assert len(load_tokenizer("t.model").encode("something")) < 5


def test_paths_are_those_of_the_files_folder():
    (first, _) = with_paths([user([image("b/c.png"), image("/abs.png")]), A], "a")
    assert [part["path"] for part in first["content"]] == ["a/b/c.png", "/abs.png"]


# -----------------------------------------------------------------------------
# data/vqa.py

def test_questions_become_conversations():
    turns = [("q1", "a1"), ("q2", "a2"), ("q3", "a3")]
    splits = dict(train={f"{i}.png": turns for i in range(10)}, test={"t.png": turns})
    rows = vqa.build(vqa.Config(val=3, yes_no=1, shuffles=4, turns=0), splits)
    assert [len(rows[split]) for split in ("train", "val", "test")] == [7 * 4, 3, 3]
    assert not {path for path, _ in rows["train"]} & {path for path, _ in rows["val"]}
    assert all(sorted(of_row) == turns for _, of_row in rows["train"] + rows["val"])
    assert len({tuple(of_row) for _, of_row in rows["train"]}) > 3
    assert [of_row for _, of_row in rows["test"]] == [[turn] for turn in turns]
    for turns_each, lengths in ((1, [1, 1, 1]), (2, [2, 1])):
        some = vqa.build(vqa.Config(val=3, yes_no=1, turns=turns_each), splits)["train"]
        assert [len(of_row) for path, of_row in some if path == some[0][0]] == lengths
        assert sorted(turn for path, of_row in some for turn in of_row if path == some[0][0]) == turns
    assert vqa.conversation("p.png", turns[:2]) == [
        user([image("p.png"), text("q1")]), dict(role="assistant", content="a1"),
        user("q2"), dict(role="assistant", content="a2")]


@pytest.mark.parametrize("blank", [False, True])
def test_the_package_is_read(tmp_path, blank):
    pytest.importorskip("easy_vqa", reason="easy-vqa")
    run("data/vqa.py", f"--out_dir={tmp_path}/vqa", "--turns=0", "--yes_no=1", "--val=100",
        f"--blank={blank}".lower())
    rows = [json.loads(line) for line in open(tmp_path / "vqa/test.jsonl")]
    paths = {row[0]["content"][0]["path"] for row in rows}
    assert len(rows) == 9673 and len(paths) == (1 if blank else 1000)
    colours = {Image.open(tmp_path / "vqa" / path).getpixel((32, 32)) for path in paths}
    assert colours == {(128, 128, 128)} if blank else len(colours) > 100
    assert len(open(tmp_path / "vqa/train.jsonl").readlines()) == 3900


def test_without_the_package_it_says_what_to_install(tmp_path):
    code = ("import runpy, sys; sys.modules['easy_vqa'] = None; sys.argv = ['x', *sys.argv[1:]]; "
            f"runpy.run_path({str(ROOT / 'data/vqa.py')!r}, run_name='__main__')")
    (tmp_path / "without.py").write_text(code)
    result = run(tmp_path / "without.py", f"--out_dir={tmp_path}/x", check=False)
    assert result.returncode == 2 and "pip install easy-vqa==1.0 is needed for this" in result.stderr
