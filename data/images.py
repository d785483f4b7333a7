"""
Conversations with images, for `python data/prepare.py images`, which stores every picture once.

    .jsonl  a conversation a line, as for `chat`, where a content is a list of {"type": "text", "text": "..."} and
            {"type": "image", "path": "a.png"}, or a text in which each "<image>" stands for one of the paths in
            "images": [...] of the message or of the row; paths are relative to the file's folder

In a conversation without "images" the text "<image>" is text. Assistants show no images.
"""
import hashlib
import io
import os
from dataclasses import dataclass
from typing import Literal

from common.dist import UserError
from common.tokenizer import check_conversation
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
    resize: Literal["stretch", "crop", "pad"] = "stretch"  # to a square: as it is, its middle, black beside it
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)  # of red, green and blue (0 to 1), taken off
    std: tuple[float, ...] = (0.5, 0.5, 0.5)  # what the channels are divided by then
    answer_tags: bool = True           # put <answer> and </answer> around what an assistant says
    max_len: int = 0                   # tokens in a conversation at most, tags and images too; 0 = no limit
    long_rows: Literal["error", "skip", "cut"] = "error"  # longer ones: stop, leave out, or cut the end off
    bad_rows: Literal["error", "skip"] = "error"  # malformed rows, unreadable pictures: stop, or count and skip
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
    if isinstance(messages, dict):
        raise ValueError('expected [messages] or {"messages": [...]}')
    of_row = paths_in(row, "the row's") if isinstance(row, dict) else None
    left, result = iter(of_row or []), []
    used = 0
    for message in messages if isinstance(messages, list) else [messages]:
        own = paths_in(message, "a message's") if isinstance(message, dict) else None
        if isinstance(message, dict):
            message = {key: value for key, value in message.items() if key != "images"}
        content = message.get("content") if isinstance(message, dict) else None
        if isinstance(content, str) and (own or of_row) is not None and MARK in content:
            texts = content.split(MARK)
            marks = len(texts) - 1
            paths = own if own is not None else [path for _, path in zip(range(marks), left)]
            used += 0 if own is not None else marks
            if own is None and len(paths) < marks or own is not None and len(own) != marks:
                raise ValueError(f'{marks} "{MARK}" for {len(paths)} images')
            parts = [dict(type="text", text=texts[0])]
            for path, text in zip(paths, texts[1:]):
                parts += [dict(type="image", path=path), dict(type="text", text=text)]
            message = {**message, "content": [part for part in parts if part.get("text") != ""]}
        elif own:
            raise ValueError(f'no "{MARK}" for {len(own)} images')
        result.append(message)
    if of_row is not None and used != len(of_row):
        raise ValueError(f'{used} "{MARK}" for {len(of_row)} images')
    check_conversation(result if isinstance(messages, list) else messages, with_images=True)
    for message in result:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image":
                if not isinstance(part.get("path"), str):
                    raise ValueError('an image is {"type": "image", "path": "..."}')
                part["path"] = os.path.join(folder, part["path"])
    return result


def paths_in(holder, whose):
    """-> "images" of a message or row, None where it has none; ValueError when these are not paths"""
    paths = holder.get("images")
    if paths is not None and not (isinstance(paths, list) and all(isinstance(path, str) for path in paths)):
        raise ValueError(f'{whose} "images" are a list of paths')
    return paths


def paths_of(messages):
    """-> paths of the images in messages from `with_paths`, in order"""
    return [part["path"] for message in messages if isinstance(message["content"], list)
            for part in message["content"] if part["type"] == "image"]


class Pictures:
    """Every picture once, as it comes: of those that are stored, 16 bytes of their files' hash stay in memory."""

    def __init__(self, pixels, info):
        """pixels: a writer of (S, S, 3) uint8 rows; info: see `images_info`"""
        self.pixels, self.info, self.known = pixels, info, {}

    def number(self, path):
        """-> number of the picture in pixels; BadImage"""
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            raise BadImage(f"{path}: cannot be read ({error.strerror})") from None
        key = hashlib.sha256(content).digest()[:16]
        if key not in self.known:
            try:
                image = load_image(io.BytesIO(content), self.info)
            except ValueError as error:
                raise BadImage(f"{path}: {error}") from None
            self.known[key] = self.pixels.count
            self.pixels.write(image.numpy()[None])
        return self.known[key]
