"""
easy-VQA (github.com/vzhou842/easy-VQA): questions about pictures of one coloured shape, 64 x 64 pixels.

    python data/vqa.py --out_dir=out/vqa             # or --blank=true: the same questions to a grey picture

Writes train.jsonl and val.jsonl for `data/prepare.py images`: a conversation is a picture and all questions
about it in a shuffled order, --shuffles times over; test.jsonl, one question a conversation; and images/.
The test pictures are the package's own; those of val are held out from its training pictures.
"""
import json
import os
import random
import shutil
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common.config import parse_config  # noqa: E402  (the repository's root must be on the path first)
from common.dist import UserError  # noqa: E402
from common.vision import pillow  # noqa: E402

PACKAGE = "easy-vqa==1.0"


@dataclass(frozen=True)
class Config:
    out_dir: str = "out/vqa"           # folder to write, must not exist
    val: int = 200                     # training pictures that are held out for validation
    shuffles: int = 4                  # conversations about each training picture
    blank: bool = False                # every picture is the same grey: what the questions alone tell
    seed: int = 1337                   # which pictures are held out, orders of questions


def read_package():
    """-> dict of split (train, test) to dict of picture's path to list of (question, answer)"""
    try:
        import easy_vqa
    except ImportError as error:
        raise UserError(f"pip install {PACKAGE} is needed for this: {error}") from None
    splits = {}
    for split, questions, paths in (
            ("train", easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
            ("test", easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths())):
        splits[split] = {paths[number]: [] for number in sorted(paths)}
        for question, answer, number in zip(*questions):
            splits[split][paths[number]].append((question, answer))
    return splits


def conversation(path, turns):
    """A picture and (question, answer) pairs -> a row for `data/prepare.py images`"""
    messages = [dict(role=role, content=text) for turn in turns
                for role, text in zip(("user", "assistant"), turn)]
    messages[0]["content"] = [dict(type="image", path=path), dict(type="text", text=messages[0]["content"])]
    return messages


def build(cfg, splits):
    """-> dict of split (train, val, test) to list of (picture's path, turns)"""
    rng, train = random.Random(cfg.seed), splits["train"]
    if not 1 <= cfg.val < len(train) or cfg.shuffles < 1:
        raise UserError(f"--val={cfg.val} --shuffles={cfg.shuffles}: expected 1 to {len(train) - 1}, and at "
                        "least 1")
    held_out = set(rng.sample(list(train), cfg.val))
    rows = {"train": [], "val": [], "test": [(path, [turn]) for path, turns in splits["test"].items()
                                             for turn in turns]}
    for path, turns in train.items():
        for _ in range(1 if path in held_out else cfg.shuffles):
            rows["val" if path in held_out else "train"].append((path, rng.sample(turns, len(turns))))
    return rows


if __name__ == "__main__":
    cfg = parse_config(Config)
    if os.path.exists(cfg.out_dir):
        raise UserError(f"--out_dir={cfg.out_dir}: already there; remove it or choose another")
    splits, aside = read_package(), cfg.out_dir.rstrip("/") + ".partial"
    rows = build(cfg, splits)
    try:
        shutil.rmtree(aside, ignore_errors=True)              # of a run that was killed
        names = {path: f"images/{split}_{os.path.basename(path)}"
                 for split in splits for path in splits[split]}
        os.makedirs(os.path.join(aside, "images"))
        if cfg.blank:
            names = dict.fromkeys(names, "images/grey.png")
            pillow()[0].new("RGB", (64, 64), (128, 128, 128)).save(os.path.join(aside, "images/grey.png"))
        else:
            for path, name in names.items():
                shutil.copyfile(path, os.path.join(aside, name))
        for split, conversations in rows.items():
            with open(os.path.join(aside, f"{split}.jsonl"), "w", encoding="utf-8") as file:
                for path, turns in conversations:
                    file.write(json.dumps(conversation(names[path], turns)) + "\n")
        os.rename(aside, cfg.out_dir)
    except OSError as error:
        raise UserError(f"--out_dir={cfg.out_dir}: cannot write there ({error.strerror})") from None
    print(f"{cfg.out_dir}: " + ", ".join(f"{len(rows[split]):,} {split}" for split in rows))
