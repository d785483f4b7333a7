"""
easy-VQA (github.com/vzhou842/easy-VQA): questions about pictures of one coloured shape, 64 x 64
pixels.

    python data/vqa.py --out_dir=out/vqa     # or --blank=true: the same questions to a grey picture

Writes train.jsonl and val.jsonl for `data/prepare.py images`: the questions about a picture in a
shuffled order, --turns in a conversation, --shuffles times over; test.jsonl, one a conversation;
and images/. Later answers of a conversation often follow from earlier ones, without a look at the
picture. Three quarters of the questions are answered by yes or no, which teaches little: --yes_no
of these are for training, new ones in every shuffle. The test pictures are the package's own; those
of val are held out from its training pictures.
"""

import os
import random
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

# the repository's root must be on the path first
sys.path.insert(0, str(Path(__file__).absolute().parents[1]))

from common.config import parse_config
from common.errors import UserError
from data.prepare import chat_row, whole_or_nothing, write_rows
from extras.images import pillow

PACKAGE = "easy-vqa==1.0"


@dataclass(frozen=True)
class Config:
    # fmt: off
    out_dir: str = "out/vqa"           # folder to write, must not exist
    val: int = 200                     # training pictures that are held out for validation
    turns: int = 1                     # questions in a training conversation at most; 0 = all
    yes_no: float = 0.25               # share of training questions with these answers that is kept
    shuffles: int = 1                  # times that the questions about a training picture come
    blank: bool = False                # every picture is grey: what the questions alone tell
    seed: int = 1337                   # which pictures are held out, orders of questions
    # fmt: on


def read_package():
    """-> dict of split (train, test) to dict of picture's path to list of (question, answer)"""
    try:
        import easy_vqa
    except ImportError as error:
        raise UserError(f"pip install {PACKAGE} is needed for this: {error}") from None
    splits = {}
    for split, questions, paths in (
        ("train", easy_vqa.get_train_questions(), easy_vqa.get_train_image_paths()),
        ("test", easy_vqa.get_test_questions(), easy_vqa.get_test_image_paths()),
    ):
        turns = splits[split] = {paths[number]: [] for number in sorted(paths)}
        for question, answer, number in zip(*questions):
            turns[paths[number]].append((question, answer))
    return splits


def conversation(path, turns):
    """A picture and (question, answer) pairs -> a row for `data/prepare.py images`"""
    messages = [message for turn in turns for message in chat_row(*turn)]
    first = messages[0]
    first["content"] = [dict(type="image", path=path), dict(type="text", text=first["content"])]
    return messages


def build(cfg, splits):
    """-> dict of split (train, val, test) to list of (picture's path, turns)"""
    rng, train = random.Random(cfg.seed), splits["train"]
    in_range = 1 <= cfg.val < len(train) and 0 <= cfg.yes_no <= 1
    if not in_range or cfg.shuffles < 1 or cfg.turns < 0:
        raise UserError(
            f"--val={cfg.val} --shuffles={cfg.shuffles} --turns={cfg.turns} --yes_no="
            f"{cfg.yes_no}: expected 1 to {len(train) - 1}, at least 1, at least 0, "
            "0 to 1"
        )
    held_out = set(rng.sample(list(train), cfg.val))
    test = [(path, [turn]) for path, turns in splits["test"].items() for turn in turns]
    rows = {"train": [], "val": [], "test": test}
    for path, turns in train.items():
        split = "val" if path in held_out else "train"
        for _ in range(cfg.shuffles if split == "train" else 1):
            order = [
                turn
                for turn in rng.sample(turns, len(turns))
                if split == "val" or turn[1] not in ("yes", "no") or rng.random() < cfg.yes_no
            ]
            most = cfg.turns or max(1, len(order))
            for start in range(0, len(order), most):
                rows[split].append((path, order[start : start + most]))
    return rows


def copy_pictures(folder, splits, blank):
    """Pictures, or a grey one, into folder/images -> dict of a picture's path to the one there"""
    os.mkdir(f"{folder}/images")
    names = {
        path: f"images/{split}_{os.path.basename(path)}"
        for split, pictures in splits.items()
        for path in pictures
    }
    if blank:
        grey = "images/grey.png"
        pillow()[0].new("RGB", (64, 64), (128, 128, 128)).save(f"{folder}/{grey}")
        return dict.fromkeys(names, grey)
    for path, name in names.items():
        shutil.copyfile(path, f"{folder}/{name}")
    return names


if __name__ == "__main__":
    cfg = parse_config(Config)
    with whole_or_nothing(cfg.out_dir) as folder:
        splits = read_package()
        rows = build(cfg, splits)
        names = copy_pictures(folder, splits, cfg.blank)
        for split, pairs in rows.items():
            chats = [conversation(names[path], turns) for path, turns in pairs]
            write_rows(folder, split, chats)
    sizes = ", ".join(f"{len(pairs):,} {split}" for split, pairs in rows.items())
    print(f"{cfg.out_dir}: {sizes}")
