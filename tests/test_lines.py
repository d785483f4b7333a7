"""data/lines.py: requests can be read back, real lines meet them, what is held out stays out of training."""
import json
import sys

import pytest
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "data"))
import lines  # noqa: E402  (data/lines.py)


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lines") / "out"
    run("data/lines.py", f"--out_dir={folder}")
    return {split: [json.loads(line) for line in open(folder / f"{split}.jsonl")]
            for split in ("train", "val", "test")}


def asked(rows):
    return [lines.parse_request(row[0]["content"]) for row in rows]


def test_every_line_meets_its_request(splits):
    for rows in splits.values():
        for user, assistant in rows:
            assert user["role"] == "user" and assistant["role"] == "assistant"
            assert all(lines.met(user["content"], assistant["content"]).values())


def test_what_is_held_out_is_never_asked_for_in_training(splits):
    train, val, test = (set(asked(splits[split])) for split in ("train", "val", "test"))
    assert len(val) == len(test) == 50 and not train & val and not train & test and not val & test
    assert len(splits["test"]) == len({row[0]["content"] for row in splits["test"]}) == 200
    texts = [row[1]["content"] for rows in splits.values() for row in rows]
    assert len(set(texts)) == len(texts) > 15_000


@pytest.mark.parametrize("phrasing", range(len(lines.REQUESTS)))
@pytest.mark.parametrize("triple", [("A", 3, "."), ("W", 10, "?"), ("T", 7, ":"), ("O", 4, "!")])
def test_a_request_can_be_read_back(phrasing, triple):
    assert lines.parse_request(lines.request(triple, phrasing)) == triple


@pytest.mark.parametrize("answer, letter, words, mark", [
    ("To be, or not to;", True, True, True), ("to be, or not to;", False, True, True),
    ("To be, or not;", True, False, True), ("To be, or not to.", True, True, False),
    ("To be,\nor not to;", True, False, True), ("  To be, or not to;\n", True, True, True),
    ("", False, False, False), ("To", True, False, False)])
def test_each_part_of_a_request_is_checked(answer, letter, words, mark):
    assert lines.met(lines.request(("T", 5, ";"), 0), answer) == dict(letter=letter, words=words, mark=mark)


def test_what_is_no_request_is_refused():
    with pytest.raises(ValueError, match="not a request"):
        lines.parse_request("A line from T, many words, ending in .")


def test_an_existing_folder_is_left_alone(tmp_path):
    result = run("data/lines.py", f"--out_dir={tmp_path}", check=False)
    assert result.returncode == 2 and "already there" in result.stderr and not list(tmp_path.iterdir())
