"""
easy-VQA (github.com/vzhou842/easy-VQA): questions about pictures of one coloured shape, 64 x 64 pixels.

    python data/vqa.py --out_dir=out/vqa             # or --blank=true: the same questions to a grey picture

Writes train.jsonl and val.jsonl for `data/prepare.py images`: the questions about a picture in a shuffled
order, --turns in a conversation, --shuffles times over; test.jsonl, one a conversation; and images/. Later
answers of a conversation often follow from earlier ones, without a look at the picture. Three quarters of the
questions are answered by yes or no, which teaches little: --yes_no of these are for training, new ones in
every shuffle. The test pictures are the package's own; those of val are held out from its training pictures.
"""
import json
import os
import random
import shutil
import sys
from dataclasses import dataclass

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from common.config import parse_config  # noqa: E402  (the repository's root must be on the path first)
from common.errors import UserError  # noqa: E402
from extras.images import pillow  # noqa: E402

PACKAGE = "easy-vqa==1.0"


@dataclass(frozen=True)
class Config:
    out_dir: str = "out/vqa"           # folder to write, must not exist
    val: int = 200                     # training pictures that are held out for validation
    turns: int = 1                     # questions in a training conversation at most; 0 = all about a picture
    yes_no: float = 0.25               # share of the training questions with these answers that is kept
    shuffles: int = 1                  # times that the questions about a training picture come
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
    if not 1 <= cfg.val < len(train) or cfg.shuffles < 1 or cfg.turns < 0 or not 0 <= cfg.yes_no <= 1:
        raise UserError(f"--val={cfg.val} --shuffles={cfg.shuffles} --turns={cfg.turns} --yes_no="
                        f"{cfg.yes_no}: expected 1 to {len(train) - 1}, at least 1, at least 0, 0 to 1")
    held_out = set(rng.sample(list(train), cfg.val))
    rows = {"train": [], "val": [], "test": [(path, [turn]) for path, turns in splits["test"].items()
                                             for turn in turns]}
    for path, turns in train.items():
        for _ in range(1 if path in held_out else cfg.shuffles):
            order = [turn for turn in rng.sample(turns, len(turns))
                     if path in held_out or turn[1] not in ("yes", "no") or rng.random() < cfg.yes_no]
            most = cfg.turns or max(1, len(order))
            rows["val" if path in held_out else "train"] += [
                (path, order[start:start + most]) for start in range(0, len(order), most)]
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
