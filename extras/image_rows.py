"""
Conversations with images, for `python data/prepare.py images`, which stores every picture once.

Files are .jsonl with a conversation a line, as for `chat`. A content may be a list of
{"type": "text", "text": "..."} and {"type": "image", "path": "a.png"}, or a text in which each
"<image>" stands for the next of the paths in "images": [...] of the message or of the row;
{"type": "image"} without a path takes the next one too. Paths are relative to the file's folder.
Without "images" the text "<image>" is text. Assistants show no images.
"""

import hashlib
import io
import math
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.chat import check_conversation
from common.errors import UserError
from data.readers import BadRow, Example, ExampleConfig, Kind, check_reply
from extras.images import INFO, load_image, pillow

MARK = "<image>"
UNREADABLE = "with unreadable images"


@dataclass(frozen=True)
class ImagesConfig(ExampleConfig):
    # fmt: off
    out_dir: str = "out/images"        # folder to write, must not exist
    max_len: int = 0                   # maximum length in tokens, tags and images too; 0 = no limit
    image_size: int = 64               # pixels a side that every picture is resized to
    tokens_per_image: int = 16         # positions that an image takes
    resize: Literal["stretch", "crop", "pad"] = "stretch"  # to a square: all, middle, all on black
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of red, green and blue (0 to 1), taken off
    std: tuple[float, ...] = (0.5, 0.5, 0.5)  # what the channels are divided by then
    # fmt: on


class ImageChats(Kind):
    """Conversations whose pictures are stored beside the tokens; see `Kind`"""

    name, unit = "chat", "conversations"

    def __init__(self, cfg, tokenizer):
        super().__init__(cfg, tokenizer)
        pillow()
        self.info = images_info(cfg, tokenizer.special["image"])
        self.meta = dict(images=self.info)

    def parse(self, row, folder):
        return check_reply(with_paths(row, folder))

    def encode(self, rows):
        chats = self.template(rows, tokens_per_image=self.cfg.tokens_per_image)
        return [Example([chat]) for chat in chats]

    def store(self, array):
        """Every picture of the split once, and which of them each conversation shows, in order"""
        S = self.info["image_size"]
        pixels = array("_images", np.uint8, (S, S, 3))
        ids, offsets = array("_image_ids", np.uint32), array("_image_offsets", np.uint64)
        offsets.write([0])
        # numbers of the pictures, by 16 bytes of their file's hash
        known = {}

        def number(path):
            content = read_picture(path)
            key = hashlib.sha256(content).digest()[:16]
            if key not in known:
                try:
                    image = load_image(io.BytesIO(content), self.info)
                except ValueError as error:
                    raise BadRow(f"{path}: {error}", UNREADABLE) from None
                known[key] = pixels.count
                pixels.write(image.numpy()[None])
            return known[key]

        def add(row, example):
            ((tokens, _),) = example.replies
            # those before a cut
            shown = tokens.count(self.info["token"]) // self.info["tokens_per_image"]
            ids.write([number(path) for path in paths_of(row)[:shown]])
            offsets.write([ids.count])

        return add

    def counts(self, images, ids, _):
        """images, ids: the arrays of `store` -> what meta.json counts of a split"""
        return dict(images=ids.count, pictures=images.count)


def read_picture(path):
    """-> bytes of the file; BadRow"""
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: no file is called so
        why = getattr(error, "strerror", error)
        raise BadRow(f"{path}: cannot be read ({why})", UNREADABLE) from None


def images_info(cfg, token):
    """-> "images" of meta.json; UserError where numbers do not fit. token: id of <image>"""
    info = {name: getattr(cfg, name) for name in INFO}
    for name in ("image_size", "tokens_per_image"):
        if info[name] < 1:
            raise UserError(f"--{name}={info[name]}: must be at least 1")
    for name, expected, least in (
        ("mean", "three numbers", -math.inf),
        ("std", "three numbers, above 0", 0),
    ):
        if len(info[name]) != 3 or min(info[name]) <= least:
            raise UserError(f"--{name}={','.join(map(str, info[name]))}: expected {expected}")
        info[name] = list(info[name])
    return dict(info, token=token)


def with_paths(row, folder):
    """row: of a .jsonl in folder -> messages whose images are parts with a path; ValueError"""
    messages = row["messages"] if isinstance(row, dict) and "messages" in row else row
    if not isinstance(messages, list):
        raise ValueError('expected [messages] or {"messages": [...]}')
    of_row, waiting, result = paths_in(row), [], []
    for message in messages:
        own = paths_in(message)
        if isinstance(message, dict):
            content = parts_of(message.get("content"), own is not None or of_row is not None)
            message = {key: value for key, value in message.items() if key != "images"}
            message["content"] = content
            pathless = [part for part in images_in(content) if "path" not in part]
            if own is None:
                waiting += pathless
            else:
                give(own, pathless)
        result.append(message)
    if of_row is not None:
        give(of_row, waiting)
    check_conversation(result, with_images=True)
    for part in (part for message in result for part in images_in(message["content"])):
        if not isinstance(part.get("path"), str):
            raise ValueError('an image is {"type": "image", "path": "..."}')
        part["path"] = os.path.join(folder, part["path"])
    return result


def paths_in(holder):
    """-> "images" of a message or row, None where it has none; ValueError if these are not paths"""
    paths = holder.get("images") if isinstance(holder, dict) else None
    if paths is None or isinstance(paths, list) and all(isinstance(path, str) for path in paths):
        return paths
    raise ValueError('"images" is a list of paths')


def parts_of(content, marks):
    """content: as the row has it -> text or list of parts. marks: whether "<image>" is an image"""
    if isinstance(content, str) and marks and MARK in content:
        first, *texts = content.split(MARK)
        parts = [dict(type="text", text=first)]
        for text in texts:
            parts += [dict(type="image"), dict(type="text", text=text)]
        return parts
    if not isinstance(content, list):
        return content
    if all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
        for part in content
    ):
        return "".join(part["text"] for part in content)
    return [dict(part) if isinstance(part, dict) else part for part in content]


def images_in(content):
    """-> those of its parts that are images"""
    parts = content if isinstance(content, list) else []
    return [part for part in parts if isinstance(part, dict) and part.get("type") == "image"]


def give(paths, parts):
    """Give each of the parts its path; ValueError unless there are as many"""
    if len(parts) != len(paths):
        word = "more" if len(parts) > len(paths) else "fewer"
        raise ValueError(f'{word} "{MARK}" than the {len(paths)} in "images"')
    for part, path in zip(parts, paths):
        part["path"] = path


def paths_of(messages):
    """-> paths of the images in messages from `with_paths`, in order"""
    return [part["path"] for message in messages for part in images_in(message["content"])]
