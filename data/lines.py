"""
Lines to order: an instruction task whose answers a program can check, made of the bundled corpus.

    python data/lines.py --out_dir=out/lines

The user asks for a verse line that starts with a given letter, has a given number of words and
ends with a given mark; the assistant gives a real line that does. Writes train.jsonl, val.jsonl and
test.jsonl for `data/prepare.py chat`, train_pairs.jsonl, ... for `data/prepare.py pairs`: a real
line against a near miss, and train_prompts.jsonl, ... for `data/prepare.py prompts`, with `reward`
here. What val and test ask for never occurs in train: some triples are held out.
"""

import functools
import gzip
import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

# it must be on the path first
ROOT = Path(__file__).absolute().parents[1]
sys.path.insert(0, str(ROOT))

from common.config import parse_config  # noqa: E402
from common.errors import UserError  # noqa: E402
from data.prepare import chat_row, whole_or_nothing, write_rows  # noqa: E402

MARKS = ".,?!;:"
REQUESTS = (
    "A line from {letter}, {words} words, ending in {mark}",
    "{words} words. First letter {letter}, last mark {mark}",
    "Begin with {letter}, end with {mark}, use {words} words",
    "Give me {words} words that start with {letter} and stop at {mark}",
)
PATTERNS = {
    "letter": "(?P<letter>[A-Z])",
    "words": r"(?P<words>\d+)",
    "mark": "(?P<mark>[.,?!;:])",
}
PARTS = tuple(PATTERNS)
# one verse line, nothing but words and marks
LINE = re.compile(r"[A-Z][A-Za-z' ,;:.!?-]*[.,?!;:]")
SPEAKER_OR_HEADING = re.compile(r"\b[A-Z]{2,}\b")
MARKS_INSIDE = re.compile(r"[.,?!;:]|(?<!\w)-+|--")
# marks side by side, digits or symbols
NO_VERSE = re.compile(r"[.,?!;:]['\s]*[.,?!;:]|[^\w\s.,?!;:'-]|[\d_]")


@dataclass(frozen=True)
class Config:
    # fmt: off
    corpus: str = "data/shakespeare"   # folder with train.jsonl.gz
    out_dir: str = "out/lines"         # folder to write, must not exist
    held_out: int = 50                 # (letter, words, mark) triples for val, and as many for test
    most: int = 40                     # lines of a triple at most: frequent ones must not dominate
    pairs: int = 4000                  # training pairs
    seed: int = 1337                   # which triples, lines, phrasings and misses
    # fmt: on


def triple_of(line):
    """-> (first letter, number of words, last mark)"""
    return line[0], len(line.split()), line[-1]


def by_triple(lines):
    """-> dict of triple to its lines"""
    groups = {}
    for line in lines:
        groups.setdefault(triple_of(line), []).append(line)
    return groups


def request(triple, phrasing):
    """The user's words for (letter, words, mark); phrasing: 0..3"""
    return REQUESTS[phrasing].format(**dict(zip(PARTS, triple)))


def parse_request(text):
    """-> the (letter, words, mark) that a request asks for; ValueError when it is none"""
    for form in REQUESTS:
        pattern = form.replace(".", r"\.").format(**PATTERNS)
        if found := re.fullmatch(pattern, text):
            return found["letter"], int(found["words"]), found["mark"]
    raise ValueError(f"not a request for a line: {text!r}")


def met(text, answer):
    """text: the request; answer: what the model wrote -> dict of PARTS to bool"""
    letter, words, mark = parse_request(text)
    answer = answer.strip()
    return dict(
        letter=answer[:1] == letter,
        words=len(answer.split()) == words and "\n" not in answer,
        mark=answer[-1:] == mark,
    )


def reward(prompts, completions, answers):
    """For train_grpo.py: share of letter, words and mark that is met, less for what is no verse."""
    rewards = []
    for prompt, completion in zip(prompts, completions):
        text = re.sub(r"</?answer>", "", completion)
        parts = met(prompt[-1]["content"], text)
        rewards.append(sum(parts.values()) / len(PARTS) * verse_share(text))
    return rewards


@functools.cache
def corpus_words():
    return set(words_of("\n".join(verse_lines(ROOT / "data/shakespeare"))))


def words_of(line):
    return re.findall(r"[a-z']+", line.lower())


def verse_share(line):
    """
    The share of a line's words that occur in the corpus and have come neither twice nor just
    before; 0 where there are digits or symbols, or marks side by side or after more than half of
    the words: what a policy finds that is paid for less
    """
    words, marks = words_of(line), MARKS_INSIDE.findall(line[:-1])
    if NO_VERSE.search(line) or 2 * len(marks) > len(words):
        return 0.0
    good = 0
    for i, word in enumerate(words):
        repeated = word in words[max(0, i - 2) : i] or words[:i].count(word) >= 2
        good += word in corpus_words() and not repeated
    return good / max(1, len(words))


def verse_lines(corpus):
    """Lines of 3 to 10 words that start with a capital and end with a mark, each once, in order."""
    path = f"{corpus}/train.jsonl.gz"
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            works = [json.loads(line)["text"] for line in file]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--corpus={corpus}: cannot read {path} ({error or 'damaged'})") from None
    lines = dict.fromkeys(" ".join(line.split()) for work in works for line in work.split("\n"))
    return [
        line
        for line in lines
        if LINE.fullmatch(line)
        and 3 <= len(line.split()) <= 10
        and not SPEAKER_OR_HEADING.search(line)
    ]


def build(cfg):
    """-> dict of split to list of (request, line)"""
    rng, groups = random.Random(cfg.seed), by_triple(verse_lines(cfg.corpus))
    common = sorted(triple for triple, lines in groups.items() if len(lines) >= 10)
    if not 1 <= 2 * cfg.held_out <= len(common) or cfg.most < 1:
        raise UserError(
            f"--held_out={cfg.held_out} --most={cfg.most}: "
            f"expected 1 to {len(common) // 2}, and at least 1"
        )
    drawn = rng.sample(common, 2 * cfg.held_out)
    splits = {"train": [], "val": [], "test": []}
    for triple, lines in sorted(groups.items()):
        split, most = "train", cfg.most
        if triple in drawn:
            split = "val" if triple in drawn[: cfg.held_out] else "test"
            # each phrasing once
            most = len(REQUESTS)
        for i, line in enumerate(rng.sample(lines, min(len(lines), most))):
            splits[split].append((request(triple, i % len(REQUESTS)), line))
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def near_miss(line, rng, groups, words):
    """
    A line that nearly does what `line` does: half of them miss the number of words, as models
    mostly do, the others the letter, the mark or a word's letters. groups: dict of triple to lines;
    words: some to put in
    """
    parts, (letter, count, mark) = line.split(), triple_of(line)
    i = rng.randrange(1, count - 1)
    kind = rng.choice(("few", "many", "count", "letter", "mark", "broken"))
    if kind == "letter":
        return rng.choice(sorted(set("ABCDEFGHILMNOPSTW") - {letter})) + line[1:]
    if kind == "mark":
        return line[:-1] + rng.choice(sorted(set(MARKS) - {mark}))
    # a real line, of a word or two more or less
    if kind == "count":
        others = [groups.get((letter, count + n, mark), []) for n in (-2, -1, 1, 2)]
        return rng.choice(sum(others, []) or [line])
    if kind == "few":
        del parts[i]
    elif kind == "many":
        parts.insert(i, rng.choice(words))
    else:
        letters = list(parts[i])
        rng.shuffle(letters)
        parts[i] = "".join(letters)
    return " ".join(parts)


def build_pairs(rows, train, number, seed):
    """
    -> list of (request, real line, near miss) from the first rows, without the misses that are the
    line itself; train: rows to take other lines from
    """
    rng, lines = random.Random(seed), [line for _, line in train]
    groups, words = by_triple(lines), re.findall(r"\b[a-z]+\b", "\n".join(lines))
    pairs = []
    for text, line in rows[:number]:
        miss = near_miss(line, rng, groups, words)
        if miss != line:
            pairs.append((text, line, miss))
    return pairs


if __name__ == "__main__":
    cfg = parse_config(Config)
    with whole_or_nothing(cfg.out_dir) as folder:
        splits = build(cfg)
        for split, rows in splits.items():
            write_rows(folder, split, [chat_row(*row) for row in rows])
            prompts = [dict(prompt=text, answer=line) for text, line in rows]
            write_rows(folder, f"{split}_prompts", prompts)
            pairs = [
                dict(prompt=text, chosen=line, rejected=miss)
                for text, line, miss in build_pairs(rows, splits["train"], cfg.pairs, cfg.seed)
            ]
            write_rows(folder, f"{split}_pairs", pairs)
    sizes = ", ".join(f"{len(rows):,} {split}" for split, rows in splits.items())
    print(f"{cfg.out_dir}: {sizes}")
