"""
data/lines.py: requests can be read back, real lines meet them, near misses do not, what is held out stays out
of training.
"""
import json
import random
import sys
from collections import Counter

import pytest
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "data"))
import lines  # noqa: E402  (data/lines.py)

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The rows of each file that the script writes, by the file's name."""
    folder = tmp_path_factory.mktemp("lines") / "out"
    run("data/lines.py", f"--out_dir={folder}")
    return {path.name: [json.loads(line) for line in open(path)] for path in folder.iterdir()}


@pytest.fixture(scope="module")
def splits(made):
    return {split: made[f"{split}.jsonl"] for split in SPLITS}


@pytest.fixture(scope="module")
def pairs(made):
    return {split: [(row["prompt"], row["chosen"], row["rejected"]) for row in made[f"{split}_pairs.jsonl"]]
            for split in SPLITS}


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


def test_pairs_are_a_splits_own_lines_with_a_near_miss_each(splits, pairs):
    for split in SPLITS:
        rows = [(user["content"], assistant["content"]) for user, assistant in splits[split][:4000]]
        chosen, later = [(request, line) for request, line, _ in pairs[split]], iter(rows)
        assert all(row in later for row in chosen)                          # in order, each once
        assert len(chosen) > 0.9 * len(rows)                                # some misses are the line again
        assert all(line != miss for _, line, miss in pairs[split])
    held_out = {split: {lines.parse_request(request) for request, _, _ in pairs[split]} for split in SPLITS}
    assert not held_out["train"] & (held_out["val"] | held_out["test"])
    assert not held_out["val"] & held_out["test"]
    assert len(held_out["val"]) == len(held_out["test"]) == 50


def test_no_line_that_is_held_out_is_shown_in_training_pairs(splits, pairs):
    held_out = {row[1]["content"] for split in ("val", "test") for row in splits[split]}
    assert not held_out & {line for _, *answers in pairs["train"] for line in answers}


def test_a_near_miss_misses_one_part_of_its_request_or_breaks_a_word(pairs):
    """What `met` says of the misses: only a broken word is not seen."""
    for split in SPLITS:
        missed = Counter()
        for request, line, miss in pairs[split]:
            assert all(lines.met(request, line).values())
            wrong = [part for part, ok in lines.met(request, miss).items() if not ok]
            assert len(wrong) <= 1
            if not wrong:                                                # the same words, one shuffled inside
                words = list(zip(line.split(), miss.split(), strict=True))
                (place,) = [i for i, (a, b) in enumerate(words) if a != b] or [1]
                assert 0 < place < len(words) - 1 and sorted(words[place][0]) == sorted(words[place][1])
            missed[wrong[0] if wrong else "nothing"] += 1
        share = {part: count / len(pairs[split]) for part, count in missed.items()}
        assert 0.4 < share["words"] < 0.65 and share["nothing"] < 0.2
        assert 0.1 < share["letter"] < 0.25 and 0.1 < share["mark"] < 0.3


def test_a_near_miss_has_other_words_than_the_line(pairs):
    assert all(line.split() != miss.split() for split in SPLITS for _, line, miss in pairs[split])


def test_pairs_follow_from_their_rows_and_the_seed():
    train = [("", f"A {'word ' * n}{end}.") for n in range(1, 7) for end in ("cat", "dog", "cow")]
    rows = [(f"request {i}", line) for i, (_, line) in enumerate(train)]
    first = lines.build_pairs(rows, train, 12, 3)
    assert first == lines.build_pairs(rows, train, 12, 3) != lines.build_pairs(rows, train, 12, 4)
    assert lines.build_pairs(rows[:12], train, 99, 3) == first and {text for text, _, _ in first} <= {
        f"request {i}" for i in range(12)}


def test_a_near_miss_of_the_number_of_words_is_a_real_line_of_a_word_or_two_more_or_less():
    line, near, far = "All is well today.", ["All is well.", "All is well in here now."], "All a b c d e f."
    by_triple = {lines.triple_of(other): [other] for other in (*near, line, far, "Be well in here now.")}
    rng = random.Random(0)
    misses = {lines.near_miss(line, rng, by_triple, ["new"]) for _ in range(500)}
    real = {miss for miss in misses if miss in (*near, far)}
    assert real == set(near)
    assert {"All well today.", "All is today.", "All new is well today.", "All is new well today."} <= misses
    alone = {lines.near_miss(line, rng, {}, ["new"]) for _ in range(500)}
    assert line in alone and not alone & real                           # build_pairs leaves such out


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


def rewards_of(*rows):
    """rows: (request, completion) each -> their rewards"""
    return lines.reward([[dict(role="user", content=text)] for text, _ in rows], [text for _, text in rows],
                        [""] * len(rows))


def test_a_real_line_of_its_request_gets_the_whole_reward_with_tags_or_without(made):
    rows = [(row["prompt"], row["answer"]) for split in SPLITS for row in made[f"{split}_prompts.jsonl"]]
    values = rewards_of(*rows)
    for (_, line), value in zip(rows, values):               # a few say a word again, or are full of marks
        words, inside = lines.words_of(line), sum(line[:-1].count(mark) for mark in [*lines.MARKS, "--"])
        again = sum(words[:i].count(word) > 1 or word in words[max(i - 2, 0):i]
                    for i, word in enumerate(words))
        close = line.replace(" ", "").replace("'", "")
        full = inside > len(words) / 2 or any({a, b} <= set(lines.MARKS) for a, b in zip(close, close[1:]))
        assert value == pytest.approx(0 if full else 1 - again / len(words))
    assert sum(value == 1 for value in values) > 0.93 * len(rows) and sum(values) > 0.97 * len(rows)
    assert rewards_of(*((text, f"<answer>{line}</answer>") for text, line in rows)) == values


def test_prompts_are_a_splits_requests_with_their_lines(made, splits):
    for split in SPLITS:
        assert [(row["prompt"], row["answer"]) for row in made[f"{split}_prompts.jsonl"]] == \
            [(user["content"], assistant["content"]) for user, assistant in splits[split]]


@pytest.mark.parametrize("completion, thirds, share", [
    ("To be, or not to;", 3, 1), (" To be, or not to; ", 3, 1), ("<answer>To be, or not to;</answer>", 3, 1),
    ("to be, or not to;", 2, 1), ("To be, or not;", 2, 1), ("To be, or not to.", 2, 1),
    ("To be, or not to be that", 1, 1), ("to be or", 0, 1), ("To be,\nor not to;", 2, 1),
    ("To be, xyzzy not to;", 3, 4 / 5), ("To qwqw, xyzzy not to;", 3, 3 / 5), ("Tq qw, xy zz qx;", 3, 0),
    # what a policy would find that is paid for the parts alone
    ("To to, be not to;", 3, 3 / 5), ("To to, TO to to;", 3, 1 / 5), ("To be, be to not;", 3, 4 / 5),
    ("To,, be or not;", 3, 0), ("To be, , or not;", 3, 0), ("To be or not so,;", 3, 0),
    ("To, be, or not, so;", 3, 0), ("To be.--Or not so;", 2, 1), ("To, be, or not so;", 3, 1),
    ("T 1 2 3 ;", 3, 0), ("The * * * so;", 3, 0), ("The - - - so;", 3, 0),
    ("", 0, 0), ("<answer></answer>", 0, 0), ("   ", 0, 0), ("- - - - ;", 2, 0)])
def test_rewards_are_thirds_of_the_parts_met_times_the_share_of_good_words(completion, thirds, share):
    request = lines.request(("T", 5, ";"), 2)
    assert rewards_of((request, completion)) == [pytest.approx(thirds / 3 * share)]


def test_a_reward_looks_at_the_last_message_of_its_own_prompt():
    first, last = (dict(role="user", content=lines.request(("T", 2, mark), 0)) for mark in ".!")
    between = dict(role="assistant", content="To be.")
    assert lines.reward([[first, between, last], [first]], ["To be!", "To be!"], ["", ""]) == [
        1, pytest.approx(2 / 3)]


def test_what_is_no_request_is_refused():
    with pytest.raises(ValueError, match="not a request"):
        lines.parse_request("A line from T, many words, ending in .")


def test_an_existing_folder_is_left_alone(tmp_path):
    result = run("data/lines.py", f"--out_dir={tmp_path}", check=False)
    assert result.returncode == 2 and "already there" in result.stderr and not list(tmp_path.iterdir())
