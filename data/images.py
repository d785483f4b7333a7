"""
Conversations with images, for `python data/prepare.py images`, which stores every picture once.

    .jsonl  a conversation a line, as for `chat`, where a content is a list of {"type": "text", "text": "..."}
            and {"type": "image", "path": "a.png"}, or a text in which each "<image>" stands for one of the
            paths in "images": [...] of the message or of the row, as may {"type": "image"}; paths are
            relative to the file's folder

In a conversation without "images" the text "<image>" is text. Assistants show no images.
"""
import hashlib
import io
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np

from common.errors import UserError
from common.tokenizer import check_conversation
from common.vision import load_image, pillow
from data.readers import BadRow, Example, ExampleConfig, Kind, check_reply

MARK = "<image>"
UNREADABLE = "with unreadable images"


@dataclass(frozen=True)
class ImagesConfig(ExampleConfig):
    out_dir: str = "out/images"        # folder to write, must not exist
    max_len: int = 0                   # maximum length in tokens, tags and images too; 0 = no limit
    image_size: int = 64               # pixels a side that every picture is resized to
    tokens_per_image: int = 16         # positions that an image takes
    resize: Literal["stretch", "crop", "pad"] = "stretch"  # to a square: all, the middle, all on black
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of red, green and blue (0 to 1), taken off
    std: tuple[float, ...] = (0.5, 0.5, 0.5)  # what the channels are divided by then


class ImageChats(Kind):
    """Conversations whose pictures are stored beside the tokens; see `Kind`."""
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
        """Every picture of the split once, and which of them each conversation shows, in order."""
        size = self.info["image_size"]
        pictures = Pictures(array("_images", np.uint8, (size, size, 3)), self.info)
        ids, offsets = array("_image_ids", np.uint32), array("_image_offsets", np.uint64)
        offsets.write([0])

        def add(row, example):
            (tokens, _), = example.replies
            # those before a cut
            shown = tokens.count(self.info["token"]) // self.info["tokens_per_image"]
            ids.write([pictures.number(path) for path in paths_of(row)[:shown]])
            offsets.write([ids.count])
        return add

    def counts(self, images, ids, _):
        """images, ids: the arrays of `store` -> what meta.json counts of a split"""
        return dict(images=ids.count, pictures=images.count)


def images_info(cfg, token):
    """-> "images" of meta.json; UserError where numbers do not fit. token: id of <image>"""
    for name, least in (("image_size", 1), ("tokens_per_image", 1)):
        if getattr(cfg, name) < least:
            raise UserError(f"--{name}={getattr(cfg, name)}: must be at least {least}")
    for name, ok in (("mean", True), ("std", min(cfg.std, default=0) > 0)):
        if len(getattr(cfg, name)) != 3 or not ok:
            raise UserError(f"--{name}={','.join(map(str, getattr(cfg, name)))}: expected three numbers"
                            + ", above 0" * (name == "std"))
    return dict(image_size=cfg.image_size, tokens_per_image=cfg.tokens_per_image, resize=cfg.resize,
                mean=list(cfg.mean), std=list(cfg.std), token=token)


def with_paths(row, folder):
    """A row of a .jsonl in that folder -> messages whose images are parts with a path; ValueError"""
    messages = row["messages"] if isinstance(row, dict) and "messages" in row else row
    if not isinstance(messages, list):
        raise ValueError('expected [messages] or {"messages": [...]}')
    of_row, result = paths_in(row), []
    left = None if of_row is None else list(of_row)
    for message in messages:
        own = paths_in(message)
        given, paths = (of_row, left) if own is None else (own, list(own))
        if isinstance(message, dict):
            message = {key: value for key, value in message.items() if key != "images"}
            if paths is not None and number_of_images(message.get("content")) > len(paths):
                raise ValueError(f'more "{MARK}" than the {len(given)} in "images"')
            message["content"] = parts_of(message.get("content"), paths)
        if own is not None and paths:
            raise ValueError(f'fewer "{MARK}" than the {len(own)} in "images"')
        result.append(message)
    if left:
        raise ValueError(f'fewer "{MARK}" than the {len(of_row)} in "images"')
    check_conversation(result, with_images=True)
    return [{**message, "content": [at(part, folder) for part in message["content"]]}
            if isinstance(message["content"], list) else message for message in result]


def needs_path(part):
    return isinstance(part, dict) and part.get("type") == "image" and "path" not in part


def number_of_images(content):
    """-> how many paths of "images" a content takes"""
    return content.count(MARK) if isinstance(content, str) else \
        sum(map(needs_path, content)) if isinstance(content, list) else 0


def parts_of(content, paths):
    """
    A content as the row has it -> text, or list of parts. paths: those of "images" that are left, from which
    its images are taken; None: the text "<image>" is text
    """
    if isinstance(content, str) and paths is not None and MARK in content:
        first, *texts = content.split(MARK)
        content = [dict(type="text", text=first)]
        for text in texts:
            content += [dict(type="image"), dict(type="text", text=text)]
    if not isinstance(content, list):
        return content
    if all(isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
           for part in content):
        return "".join(part["text"] for part in content)
    return [{**part, "path": paths.pop(0)} if paths is not None and needs_path(part) else part
            for part in content]


def at(part, folder):
    """A part of a content whose path is relative to the folder -> the same to here"""
    if part["type"] == "text":
        return part
    if not isinstance(part.get("path"), str):
        raise ValueError('an image is {"type": "image", "path": "..."}')
    return {**part, "path": os.path.join(folder, part["path"])}


def paths_in(holder):
    """-> "images" of a message or row, None where it has none; ValueError when these are not paths"""
    paths = holder.get("images") if isinstance(holder, dict) else None
    if paths is not None and not (isinstance(paths, list) and all(isinstance(path, str) for path in paths)):
        raise ValueError('"images" is a list of paths')
    return paths


def paths_of(messages):
    """-> paths of the images in messages from `with_paths`, in order"""
    return [part["path"] for message in messages if isinstance(message["content"], list)
            for part in message["content"] if part["type"] == "image"]


class Pictures:
    """Every picture once, as it comes; 16 bytes of its file's hash stay in memory."""

    def __init__(self, pixels, info):
        """pixels: a writer of (S, S, 3) uint8 rows; info: see `images_info`"""
        self.pixels, self.info, self.known = pixels, info, {}

    def number(self, path):
        """-> number of the picture in pixels; BadRow"""
        try:
            with open(path, "rb") as file:
                content = file.read()
        except (OSError, ValueError) as error:                # ValueError: no file is called so
            raise BadRow(f"{path}: cannot be read "
                         f"({getattr(error, 'strerror', error)})", UNREADABLE) from None
        key = hashlib.sha256(content).digest()[:16]
        if key not in self.known:
            try:
                image = load_image(io.BytesIO(content), self.info)
            except ValueError as error:
                raise BadRow(f"{path}: {error}", UNREADABLE) from None
            self.known[key] = self.pixels.count
            self.pixels.write(image.numpy()[None])
        return self.known[key]
