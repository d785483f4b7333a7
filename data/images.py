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

from common.chat import check_conversation
from common.errors import UserError
from common.vision import load_image

MARK = "<image>"


@dataclass(frozen=True)
class ImagesConfig:
    input: tuple[str, ...] = ()        # files and globs of training conversations (.jsonl)
    val_input: tuple[str, ...] = ()    # files and globs of validation conversations, when kept apart
    val_frac: float = 0.0              # else: held-out fraction of conversations
    tokenizer: str = "bytes"           # that of the model to be trained: its run, or as in `text --help`
    image_size: int = 64               # pixels a side that every picture is resized to
    tokens_per_image: int = 16         # positions that an image takes
    resize: Literal["stretch", "crop", "pad"] = "stretch"  # to a square: all, the middle, all on black
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of red, green and blue (0 to 1), taken off
    std: tuple[float, ...] = (0.5, 0.5, 0.5)  # what the channels are divided by then
    answer_tags: bool = True           # put <answer> and </answer> around what an assistant says
    max_len: int = 0                   # tokens in a conversation at most, tags and images too; 0 = no limit
    long_rows: Literal["error", "skip", "cut"] = "error"  # longer ones: stop, leave out, or cut the end off
    bad_rows: Literal["error", "skip"] = "error"  # malformed lines, unreadable pictures: stop, or count, skip
    out_dir: str = "out/images"        # the set, must not exist
    seed: int = 1337                   # which conversations are held out


class BadImage(Exception):
    """A picture cannot be read; the message says which and why."""


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
        """-> number of the picture in pixels; BadImage"""
        try:
            with open(path, "rb") as file:
                content = file.read()
        except (OSError, ValueError) as error:                # ValueError: no file is called so
            raise BadImage(f"{path}: cannot be read ({getattr(error, 'strerror', error)})") from None
        key = hashlib.sha256(content).digest()[:16]
        if key not in self.known:
            try:
                image = load_image(io.BytesIO(content), self.info)
            except ValueError as error:
                raise BadImage(f"{path}: {error}") from None
            self.known[key] = self.pixels.count
            self.pixels.write(image.numpy()[None])
        return self.known[key]
