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
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.chat import check_conversation
from common.errors import UserError
from data.forms import check_order
from data.readers import BadRow, Chats, ExampleConfig, check_reply
from extras.images import INFO, as_ids, load_image, pillow

MARK = "<image>"


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


class ImageChats(Chats):
    """Conversations whose pictures are stored beside the tokens; see `Kind`"""

    def __init__(self, cfg, tokenizer):
        super().__init__(cfg, tokenizer)
        pillow()
        info = {name: getattr(cfg, name) for name in INFO}
        for name in ("image_size", "tokens_per_image"):
            if info[name] < 1:
                raise UserError(f"--{name}={info[name]}: must be at least 1")
        for name, expected, least in (
            ("mean", "three numbers", -math.inf),
            ("std", "three numbers, above 0", 0),
        ):
            if len(info[name]) != 3 or min(info[name]) <= least:
                given = ",".join(map(str, info[name]))
                raise UserError(f"--{name}={given}: expected {expected}")
        self.info = dict(info, token=tokenizer.special["image"])
        self.meta = dict(images=self.info)

    def parse(self, row, folder):
        return check_reply(self.find_thoughts(with_paths(row, folder)))

    def template(self, rows):
        k = self.cfg.tokens_per_image
        return super().template([as_ids(self.tokenizer, row, k) for row in rows])

    def store(self, array):
        """Every picture of the split once, and which of them each conversation shows, in order"""
        S = self.info["image_size"]
        pixels = array("_images", np.uint8, (S, S, 3))
        ids, offsets = array("_image_ids", np.uint32), array("_image_offsets", np.uint64)
        offsets.write([0])
        # numbers of the pictures, by 16 bytes of their file's hash
        known = {}

        def number(path):
            try:
                content = read_picture(path)
                key = hashlib.sha256(content).digest()[:16]
                if key not in known:
                    image = load_image(io.BytesIO(content), self.info)
                    known[key] = pixels.count
                    pixels.write(image[None])
            except ValueError as error:
                raise BadRow(f"{path}: {error}", "with unreadable images") from None
            return known[key]

        def add(row, example):
            ((tokens, _),) = example.replies
            # those before a cut
            shown = tokens.count(self.info["token"]) // self.info["tokens_per_image"]
            ids.write([number(image["path"]) for image in images_in(row)[:shown]])
            offsets.write([ids.count])

        return add

    def counts(self, images, ids, _):
        """images, ids: the arrays of `store` -> what meta.json counts of a split"""
        return dict(images=ids.count, pictures=images.count)


def read_picture(path):
    """-> bytes of the file; ValueError"""
    try:
        with open(path, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: no file is called so
        raise ValueError(f"cannot be read ({getattr(error, 'strerror', error)})") from None


def with_paths(row, folder):
    """
    row: of a .jsonl in folder -> its messages, changed in place: each image is a part with the path
    of a file; ValueError
    """
    messages = row["messages"] if isinstance(row, dict) and "messages" in row else row
    if not isinstance(messages, list):
        raise ValueError('expected [messages] or {"messages": [...]}')
    # others are refused below
    usual = [message for message in messages if isinstance(message, dict)]
    if isinstance(row, dict):
        without = [message for message in usual if message.get("images") is None]
        give_paths(without, row.get("images"))
    for message in usual:
        give_paths([message], message.pop("images", None))
        content = message.get("content")
        if isinstance(content, list) and all(is_part(part, ["text"]) for part in content):
            message["content"] = "".join(part["text"] for part in content)
    check_parts(messages)
    for image in images_in(messages):
        if not isinstance(image.get("path"), str):
            raise ValueError('an image is {"type": "image", "path": "..."}')
        image["path"] = os.path.join(folder, image["path"])
    return messages


def check_parts(messages):
    """ValueError where messages are no conversation whose users' contents may be lists of parts"""
    as_text = []
    for message in messages:
        in_parts = isinstance(message, dict) and isinstance(message.get("content"), list)
        if in_parts and not all(map(is_part, message["content"])):
            raise ValueError('a message is {"role": "...", "content": "..."}')
        if in_parts and message.get("role") == "assistant":
            raise ValueError("an assistant's content is text")
        as_text.append(dict(message, content=MARK) if in_parts else message)
    check_conversation(as_text)
    check_order(as_text)


def is_part(part, kinds=("text", "image")):
    """-> whether it is a part of a content, and of one of these kinds"""
    if not isinstance(part, dict) or part.get("type") not in kinds:
        return False
    return isinstance(part.get("text"), str) == (part["type"] == "text")


def give_paths(messages, paths):
    """
    Each "<image>" in a text becomes an image; those without a path take the next of paths, which
    is "images" of the row or the message, None where there is none. ValueError
    """
    if paths is None:
        return
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError('"images" is a list of paths')
    for message in messages:
        if isinstance(message.get("content"), str):
            message["content"] = parts_of(message["content"])
    images = [image for image in images_in(messages) if "path" not in image]
    if len(images) != len(paths):
        compared = "more" if len(images) > len(paths) else "fewer"
        raise ValueError(f'{compared} "{MARK}" than the {len(paths)} in "images"')
    for image, path in zip(images, paths):
        image["path"] = path


def parts_of(text):
    """-> list of parts: the texts between "<image>", and the images"""
    return [
        dict(type="image") if piece == MARK else dict(type="text", text=piece)
        for piece in re.split(f"({MARK})", text)
    ]


def images_in(messages):
    """-> the images among the parts of messages, in order"""
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part for part in parts if is_part(part, ["image"])]
