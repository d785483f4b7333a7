"""
Lines to order: an instruction task whose answers a program can check, made of the bundled corpus.

    python data/lines.py --out_dir=out/lines

The user asks for a verse line that starts with a given letter, has a given number of words and ends with a
given mark; the assistant gives a real line that does. Writes train.jsonl, val.jsonl and test.jsonl for
`data/prepare.py chat`, train_pairs.jsonl, ... for `data/prepare.py pairs`: a real line against a near miss,
and train_prompts.jsonl, ... for `data/prepare.py prompts`, with `reward` here. What val and test ask for
never occurs in train: some triples are held out.
"""
import functools
import gzip
import json
import os
import random
import re
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common.config import parse_config  # noqa: E402  (the repository's root must be on the path first)
from common.errors import UserError  # noqa: E402

MARKS = ".,?!;:"
REQUESTS = ("A line from {letter}, {words} words, ending in {mark}",
            "{words} words. First letter {letter}, last mark {mark}",
            "Begin with {letter}, end with {mark}, use {words} words",
            "Give me {words} words that start with {letter} and stop at {mark}")
LINE = re.compile(r"[A-Z][A-Za-z' ,;:.!?-]*[.,?!;:]")        # one verse line, nothing but words and marks
PARTS = ("letter", "words", "mark")


@dataclass(frozen=True)
class Config:
    corpus: str = "data/shakespeare"   # folder with train.jsonl.gz
    out_dir: str = "out/lines"         # folder to write, must not exist
    held_out: int = 50                 # (letter, words, mark) triples for val, and as many for test
    most: int = 40                     # lines of one triple at most: frequent ones must not drown the others
    pairs: int = 4000                  # training pairs
    seed: int = 1337                   # which triples, lines, phrasings and misses


def triple_of(line):
    """-> (first letter, number of words, last mark)"""
    return line[0], len(line.split()), line[-1]


def request(triple, phrasing):
    """The user's words for (letter, words, mark); phrasing: 0..3"""
    letter, words, mark = triple
    return REQUESTS[phrasing].format(letter=letter, words=words, mark=mark)


def parse_request(text):
    """-> the (letter, words, mark) that a request asks for; ValueError when it is none"""
    for form in REQUESTS:
        pattern = re.escape(form)
        for name, wanted in (("letter", "[A-Z]"), ("words", r"\d+"), ("mark", "[.,?!;:]")):
            pattern = pattern.replace(rf"\{{{name}\}}", f"(?P<{name}>{wanted})")
        if found := re.fullmatch(pattern, text):
            return found["letter"], int(found["words"]), found["mark"]
    raise ValueError(f"not a request for a line: {text!r}")


def met(text, answer):
    """text: the request; answer: what the model wrote -> dict of PARTS to bool"""
    letter, words, mark = parse_request(text)
    answer = answer.strip()
    return dict(letter=answer[:1] == letter, words=len(answer.split()) == words and "\n" not in answer,
                mark=answer[-1:] == mark)


def reward(prompts, completions, answers):
    """For train_grpo.py: the share of letter, words and mark that is met, less for what is no verse."""
    texts = [re.sub(r"</?answer>", "", completion) for completion in completions]
    return [sum(met(prompt[-1]["content"], text).values()) / len(PARTS) * verse_share(text)
            for prompt, text in zip(prompts, texts)]


@functools.cache
def corpus_words():
    root = os.path.dirname(os.path.abspath(__file__))
    return {word for line in verse_lines(os.path.join(root, "shakespeare")) for word in words_of(line)}


def words_of(line):
    return re.findall(r"[a-z']+", line.lower())


def verse_share(line):
    """
    The share of a line's words that occur in the corpus and have come neither twice nor just before; 0 where
    there are digits or symbols, or marks side by side or after more than half of the words: what a policy
    finds that is paid for less
    """
    words, inside = words_of(line), re.findall(r"[.,?!;:]|(?<!\w)-+|--", line[:-1])
    if re.search(r"[.,?!;:]['\s]*[.,?!;:]|[^\w\s.,?!;:'-]|[\d_]", line) or 2 * len(inside) > len(words):
        return 0.0
    good = [word in corpus_words() and word not in words[max(0, i - 2):i] and words[:i].count(word) < 2
            for i, word in enumerate(words)]
    return sum(good) / max(1, len(good))


def verse_lines(corpus):
    """Lines of 3 to 10 words that start with a capital and end with a mark, each once, in order."""
    path = os.path.join(corpus, "train.jsonl.gz")
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            works = [json.loads(line)["text"] for line in file]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--corpus={corpus}: cannot read {path} ({error or 'damaged'})") from None
    lines = dict.fromkeys(" ".join(line.split()) for work in works for line in work.split("\n"))
    return [line for line in lines if LINE.fullmatch(line) and 3 <= len(line.split()) <= 10
            and not re.search(r"\b[A-Z]{2,}\b", line)]        # no speakers and headings


def build(cfg):
    """-> dict of split to list of (request, line)"""
    rng, by_triple = random.Random(cfg.seed), {}
    for line in verse_lines(cfg.corpus):
        by_triple.setdefault(triple_of(line), []).append(line)
    common = sorted(triple for triple, lines in by_triple.items() if len(lines) >= 10)
    if not 1 <= 2 * cfg.held_out <= len(common) or cfg.most < 1:
        raise UserError(f"--held_out={cfg.held_out} --most={cfg.most}: expected 1 to {len(common) // 2}, "
                        "and at least 1")
    drawn = rng.sample(common, 2 * cfg.held_out)
    home = {**dict.fromkeys(drawn[:cfg.held_out], "val"), **dict.fromkeys(drawn[cfg.held_out:], "test")}
    splits = {"train": [], "val": [], "test": []}
    for triple in sorted(by_triple):
        split, lines = home.get(triple, "train"), by_triple[triple]
        most = cfg.most if split == "train" else len(REQUESTS)            # held out: each phrasing once
        for i, line in enumerate(rng.sample(lines, min(len(lines), most))):
            splits[split].append((request(triple, i % len(REQUESTS)), line))
    for rows in splits.values():
        rng.shuffle(rows)
    return splits


def near_miss(line, rng, lines, words):
    """
    A line that nearly does what `line` does: half of them miss the number of words, as models mostly do, the
    others the letter, the mark or a word's letters. lines: dict of triple to lines; words: some to put in
    """
    parts, (letter, count, mark) = line.split(), triple_of(line)
    inside = rng.randrange(1, len(parts) - 1)
    kind = rng.choice(("few", "many", "count", "letter", "mark", "broken"))
    if kind == "few":
        return " ".join(parts[:inside] + parts[inside + 1:])
    if kind == "many":
        return " ".join([*parts[:inside], rng.choice(words), *parts[inside:]])
    if kind == "count":                                       # a real line, of a word or two more or less
        others = [other for n in (-2, -1, 1, 2) for other in lines.get((letter, count + n, mark), ())]
        return rng.choice(others or [line])
    if kind == "letter":
        return rng.choice(sorted(set("ABCDEFGHILMNOPSTW") - {letter})) + line[1:]
    if kind == "mark":
        return line[:-1] + rng.choice(sorted(set(MARKS) - {mark}))
    broken = list(parts[inside])
    rng.shuffle(broken)
    return " ".join([*parts[:inside], "".join(broken), *parts[inside + 1:]])


def build_pairs(rows, train, number, seed):
    """-> list of (request, real line, near miss) from the first rows; train: rows to take other lines from"""
    rng, lines = random.Random(seed), {}
    for _, line in train:
        lines.setdefault(triple_of(line), []).append(line)
    words = [word for _, line in train for word in re.findall(r"\b[a-z]+\b", line)]
    pairs = [(text, line, near_miss(line, rng, lines, words)) for text, line in rows[:number]]
    return [(text, line, miss) for text, line, miss in pairs if miss != line]


def write(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    cfg = parse_config(Config)
    if os.path.exists(cfg.out_dir):
        raise UserError(f"--out_dir={cfg.out_dir}: already there; remove it or choose another")
    splits, aside = build(cfg), cfg.out_dir.rstrip("/") + ".partial"
    try:
        os.makedirs(aside, exist_ok=True)
        for split, rows in splits.items():
            write(os.path.join(aside, f"{split}.jsonl"), [
                [dict(role="user", content=text), dict(role="assistant", content=line)]
                for text, line in rows])
            write(os.path.join(aside, f"{split}_pairs.jsonl"), [
                dict(prompt=text, chosen=line, rejected=miss)
                for text, line, miss in build_pairs(rows, splits["train"], cfg.pairs, cfg.seed)])
            write(os.path.join(aside, f"{split}_prompts.jsonl"), [
                dict(prompt=text, answer=line) for text, line in rows])
        os.rename(aside, cfg.out_dir)
    except OSError as error:
        raise UserError(f"--out_dir={cfg.out_dir}: cannot write there ({error.strerror})") from None
    print(f"{cfg.out_dir}: " + ", ".join(f"{len(rows):,} {split}" for split, rows in splits.items()))
