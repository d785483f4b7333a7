"""
Images for a language model: a tower turns pixels into features, a projector turns these into
embeddings.

    model = SeeingGPT(ModelConfig(...), VisionConfig(), images)   # images: of the set's meta.json
    hidden = model(tokens, images=(pixels, which))                # see Vision.place
    complete(model, prompts, cfg, inputs=model.inputs_of(prompts, images))

An image stands in the tokens as tokens_per_image copies of the token <image>, whose embeddings its
features replace. The tower is the small vision transformer below (2010.11929), or a callable of
yours: code, which no checkpoint holds, so it must be given again.

`images` is a dict that `data/prepare.py images` writes and checkpoints keep, so that training and
sampling treat pictures alike: image_size (pixels a side), tokens_per_image, resize (stretch, crop,
pad), mean and std of red, green and blue (0 to 1), token (id of <image>).

Shapes: N images, S pixels a side, P patches, D channels of the tower, k tokens an image; B
sequences, T positions, C channels of the model. Pictures are read with Pillow, the extra `images`.
"""

import math
import re
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from common.config import build
from common.data import ChatData, open_array, to_device
from common.errors import UserError
from common.model import GPT
from common.rewards import load_function

# what `images` holds, beside token
INFO = ("image_size", "tokens_per_image", "resize", "mean", "std")


# -----------------------------------------------------------------------------
# tower and projector


@dataclass(frozen=True)
class VisionConfig:
    # fmt: off
    tower: str = ""                    # path/to/file.py:function that returns a tower of your own
    patch_size: int = 8                # pixels a side of a patch, a power of 2; for our own tower,
    n_layer: int = 4                   # as what follows: its blocks
    n_head: int = 4                    # heads, divides n_embd
    n_embd: int = 128                  # channels
    # fmt: on

    def check_continued(self, wanted):
        """wanted: this config with what the user asked for; UserError where weights do not fit"""
        for name, old in asdict(self).items():
            new = getattr(wanted, name)
            if name != "tower" and new != old:
                raise UserError(
                    f"--vision.{name}={new}: the checkpoint has {old}, which cannot change"
                )

    def load_tower(self, path, option):
        """
        path: as the user names it -> `make_tower`, None for the usual tower; UserError where the
        weights are another one's
        """
        if path and not self.tower:
            raise UserError(f"--{option}={path}: the checkpoint has the usual tower; leave it out")
        if self.tower and not path:
            raise UserError(
                f"--{option}: the checkpoint has a tower of your own, {self.tower} "
                f"when it was trained; give it, --{option}=path/to/file.py:name"
            )
        return load_function(option, path) if path else None


class Vision(nn.Module):
    """
    forward(pixels (N, S, S, 3) uint8) -> (N, k, C): tower, mean of neighbouring features, RMSNorm,
    linear map

    make_tower() -> callable, an nn.Module or not, of normalised pixels (N, 3, S, S) that returns
    (N, P, D); it is called once to learn its shape. None: `Tower`.
    """

    def __init__(self, config, n_embd, images, make_tower=None):
        super().__init__()
        self.config, self.images, self.token = config, images, images["token"]
        self.image_size, self.tokens_per_image = images["image_size"], images["tokens_per_image"]
        if make_tower and replace(config, tower="") != VisionConfig():
            raise UserError(
                "--vision.tower: is a tower of yours; patch_size, n_layer, n_head and "
                "n_embd are of the usual one; leave them out"
            )
        tower = self.guard(make_tower) if make_tower else Tower(config, self.image_size)
        if not isinstance(tower, nn.Module):
            # a function becomes a module without parameters
            function, tower = tower, nn.Module()
            tower.forward = function
        self.tower = tower
        shape = self.guard(lambda: self.probe(self.look))
        if len(shape) != 3 or shape[0] != 2 or shape[1] < self.tokens_per_image:
            raise UserError(
                f"--vision: the tower gives {shape} for 2 images of {self.image_size} "
                f"pixels a side, expected (2, N, D) with N at least "
                f"{self.tokens_per_image}, the set's tokens_per_image"
            )
        self.shape, D = shape[1:], shape[2]  # (P, D)
        self.norm = nn.RMSNorm(D, eps=1e-6)
        self.out = nn.Linear(D, n_embd)
        # as large as the embeddings beside them in a new model
        nn.init.normal_(self.out.weight, std=0.02 / math.sqrt(D))
        nn.init.zeros_(self.out.bias)

    @torch.no_grad()
    def look(self):
        """-> shape of what the tower makes of two images"""
        S = self.image_size
        return tuple(self.tower(torch.ones(2, 3, S, S)).shape)

    @torch.no_grad()
    def probe(self, function):
        """-> function(), in eval mode: what a tower counts in training stays as it is"""
        was_training = self.training
        self.eval()
        try:
            return function()
        finally:
            self.train(was_training)

    def guard(self, function):
        """-> function(), which runs the user's code; UserError where that raises"""
        try:
            return function()
        except Exception as error:  # whatever the user's tower raises
            message = " ".join(str(error).split())[:200]
            raise UserError(
                f"--vision.tower={self.config.tower}: raised {type(error).__name__}: {message}"
            ) from error

    def check_ranks(self, world_size):
        """UserError where training would move a buffer of the tower, which ranks do not share"""
        if world_size == 1 or not self.tower.training:
            return
        before = {name: buffer.clone() for name, buffer in self.tower.named_buffers()}
        self.guard(self.look)
        for name, buffer in self.tower.named_buffers():
            if not buffer.equal(before[name]):
                raise UserError(
                    f"--vision.tower={self.config.tower}: training moves its buffer "
                    f"{name}, which ranks do not share; use another norm, "
                    "--freeze_tower=true, or one rank"
                )

    def learns(self):
        """-> whether the tower has a parameter that learns"""
        return any(p.requires_grad for p in self.tower.parameters())

    def forward(self, pixels):
        dtype = self.out.weight.dtype
        scale = [self.images["mean"], self.images["std"]]
        mean, std = torch.tensor(scale, device=pixels.device)
        x = (pixels.float() / 255 - mean) / std  # (N, S, S, 3)
        x = self.tower(x.permute(0, 3, 1, 2).to(dtype))  # (N, P, D)
        x = pool(x, self.tokens_per_image).to(dtype)
        return self.out(self.norm(x))  # (N, k, C)

    def train(self, mode=True):
        """As of any module, but a tower that does not learn stays in eval mode"""
        super().train(mode)
        self.tower.train(mode and self.learns())
        return self

    @torch.compiler.disable
    def place(self, x, tokens, images):
        """
        -> x (B, T, C), the embeddings of tokens (B, T), those of <image> replaced. images: None
        or pixels (U, S, S, 3) uint8 and which (n,) int64: the n images of tokens, row after row,
        are pixels[which], so a picture that comes often is computed once; instead of pixels, what
        `forward` has made of them (U, k, C). ValueError where the numbers do not fit
        """
        if images is None and tokens.shape[1] == 1:
            return x  # a step of sampling
        here, n = tokens == self.token, 0 if images is None else len(images[1])
        if (found := int(here.sum())) != n * self.tokens_per_image:
            raise ValueError(f"{found} image tokens for {n} images of {self.tokens_per_image} each")
        if n == 0:
            return x
        pixels, which = images
        features = pixels if pixels.is_floating_point() else self(pixels)
        features = features[which].flatten(0, 1)  # (n * k, C)
        return x.masked_scatter(here[..., None], features.to(x.dtype))

    def flops_per_image(self):
        """FLOPs of an image in training: forward, and twice that backward where the tower learns"""
        S = self.image_size
        black = self.out.weight.new_zeros(1, S, S, 3)
        with FlopCounterMode(display=False) as counter:
            self.probe(lambda: self(black))
        return counter.get_total_flops() * (3 if self.learns() else 1)


def pool(x, k):
    """Means of neighbours: x (N, P, D) -> (N, k, D), on a grid where P and k are squares"""
    P = x.shape[1]
    if P == k:
        return x
    height, low = math.isqrt(P), math.isqrt(k)
    if height**2 != P or low**2 != k:
        # in a line
        height = low = 1
    x = x.transpose(1, 2).unflatten(2, (height, -1))  # (N, D, height, width)
    x = F.adaptive_avg_pool2d(x, (low, k // low))
    return x.flatten(2).transpose(1, 2)


class Tower(nn.Module):
    """
    A vision transformer: pixels (N, 3, S, S) -> (N, P, D), row after row of patches. Small
    convolutions that halve the sides embed the patches (2106.14881): shapes are learned sooner than
    with one linear map
    """

    def __init__(self, c, image_size):
        super().__init__()
        for name in ("patch_size", "n_layer", "n_head", "n_embd"):
            if getattr(c, name) < 1:
                raise UserError(f"--vision.{name}={getattr(c, name)}: must be positive")
        D, patch = c.n_embd, c.patch_size
        halvings = patch.bit_length() - 1
        if patch < 2 or patch != 1 << halvings or image_size % patch:
            raise UserError(
                f"--vision.patch_size={patch}: must be a power of 2, at least 2, "
                f"and divide the set's image_size, {image_size}"
            )
        if D % c.n_head:
            raise UserError(f"--vision.n_head={c.n_head}: must divide --vision.n_embd={D}")
        self.patch, channels = nn.ModuleList(), 3
        # channels double up to n_embd
        for i in reversed(range(halvings)):
            wider = max(1, D >> i)
            self.patch.append(nn.Conv2d(channels, wider, 3, stride=2, padding=1))
            channels = wider
        side = image_size // patch
        self.row = nn.Parameter(torch.randn(side, 1, D) * 0.02)  # 2-D positions
        self.column = nn.Parameter(torch.randn(1, side, D) * 0.02)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x):
        for i, conv in enumerate(self.patch):
            x = conv(F.gelu(x) if i else x)
        x = x.flatten(2).transpose(1, 2)  # (N, P, D)
        x = x + (self.row + self.column).flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    """Attention of every patch to all, then an MLP, each behind a norm"""

    def __init__(self, c):
        super().__init__()
        D, self.n_head = c.n_embd, c.n_head
        self.attn_norm, self.mlp_norm = nn.LayerNorm(D), nn.LayerNorm(D)
        self.qkv, self.attn_out = nn.Linear(D, 3 * D), nn.Linear(D, D)
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x):
        # (N, P, 3, H, D / H), then (N, H, P, D / H) each
        qkv = self.qkv(self.attn_norm(x)).unflatten(2, (3, self.n_head, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.attn_out(y.transpose(1, 2).flatten(2))  # (N, P, D)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


# -----------------------------------------------------------------------------
# the model


class SeeingGPT(GPT):
    """
    A GPT that takes images. config: ModelConfig; vision_config, images, make_tower: see Vision

    images_per_token: of the data, for flops_per_token; about: what `size` says of the vision
    """

    optional = "vision."  # weights that a text model lacks
    images_per_token, about = 0.0, ""

    def __init__(self, config, vision_config, images, make_tower=None):
        super().__init__(config)
        vision = Vision(vision_config, self.config.n_embd, images, make_tower)
        # first among the parameters, as its gradients are complete last; checkpoints of optimizers
        # depend on the order
        self._modules = {"vision": vision, **self._modules}
        self.input_only = {vision.token: vision.tokens_per_image}

    def forward(self, tokens, docs=None, cache=None, branch=None, images=None, inputs=None):
        """As GPT.forward. images: those of tokens, see Vision.place"""
        if inputs is None:
            inputs = self.vision.place(self.embed(tokens), tokens, images)
        hidden = super().forward(tokens, docs, cache, branch, inputs)
        if self.training and torch.is_grad_enabled() and not hidden.requires_grad:
            # the language model is frozen and no image is shown: there must be a backward all the
            # same, in which other ranks wait for this one
            hidden = hidden + 0 * self.vision.out.bias.sum()
        return hidden

    def inputs_of(self, prompts, images):
        """
        prompts: lists of ids; images: of each prompt, in the order of their tokens, a list of uint8
        tensors (S, S, 3), or of features (k, C) that `vision` has made of them -> `inputs` for
        sampling, (P, T, C). An image that occurs often, as one tensor, is computed once. ValueError
        where numbers do not fit
        """
        k, device = self.vision.tokens_per_image, self.head.device
        for n, (prompt, of_prompt) in enumerate(zip(prompts, images)):
            found = prompt.count(self.vision.token)
            if found != k * len(of_prompt):
                raise ValueError(
                    f"prompt {n} has {found} tokens for {len(of_prompt)} images of {k} each"
                )
        tokens = [torch.tensor(prompt, device=device) for prompt in prompts]
        tokens = nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        flat, shown = sum(images, []), None
        if flat:
            unique = {id(image): image for image in flat}
            keys = list(unique)
            which = torch.tensor([keys.index(id(image)) for image in flat], device=device)
            shown = torch.stack(list(unique.values())).to(device), which
        return self.vision.probe(lambda: self.vision.place(self.embed(tokens), tokens, shown))

    def flops_per_token(self, T, head_frac=1.0):
        of_images = self.images_per_token * self.vision.flops_per_image()
        return super().flops_per_token(T, head_frac) + of_images

    def size(self):
        return f"{super().size()} ({self.about})"

    def describe(self):
        vision = dict(config=asdict(self.vision.config), images=self.vision.images)
        return dict(super().describe(), vision=vision)


def saved_model(config, info, tower):
    """config: ModelConfig; info: a checkpoint's "vision"; tower: as the user names it"""
    vision_config = VisionConfig(**info["config"])
    make_tower = vision_config.load_tower(tower, "tower")
    return SeeingGPT(config, vision_config, info["images"], make_tower)


def new_model(run):
    """-> function of a ModelConfig, for `run.model`; UserError where options do not fit"""
    cfg, images, source = run.cfg, run.meta.get("images"), run.source
    seen = source and source.manifest.get("vision")
    if not images:
        raise UserError(
            f"--data_dir={cfg.data_dir}: has no images, so --freeze_llm, "
            "--freeze_tower and --vision say nothing; leave them out"
        )
    if seen and seen["images"] != images:
        raise UserError(
            f"{source.folder}: has seen images as {seen['images']}, "
            f"--data_dir={cfg.data_dir} has them as {images}; prepare them alike"
        )
    old = VisionConfig(**seen["config"]) if seen else VisionConfig()
    # a tower is code: it runs where the user names it, not because a checkpoint does
    config = build(old, {"tower": "", **cfg.vision}, "vision.")
    if seen:
        old.check_continued(config)
    else:
        old = config

    def make(model_config):
        make_tower = old.load_tower(config.tower, "vision.tower")
        model = SeeingGPT(model_config, config, images, make_tower)
        model.images_per_token = run.train_data.images_per_token
        for part in model.children():
            if cfg.freeze_llm and part is not model.vision:
                part.requires_grad_(False)
        if cfg.freeze_tower:
            model.vision.tower.requires_grad_(False)
        model.train().vision.check_ranks(run.world_size)
        vision = sum(p.numel() for p in model.vision.parameters())
        learned = sum(p.numel() for p in model.parameters() if p.requires_grad)
        stay = cfg.freeze_llm and not source or cfg.freeze_tower and not seen and not config.tower
        P, D = model.vision.shape
        model.about = (
            f"vision: {vision:,} of the parameters{'' if seen else ', random'}; "
            f"{learned:,} learn{', some random ones stay so' if stay else ''}; "
            f"{P} features of {D} channels a picture"
        )
        return model

    return make


# -----------------------------------------------------------------------------
# the set in training


class ImageData(ChatData):
    """
    ChatData of a set with images, which the batches hold as inputs; no target stands for an image.
    images_per_token: how many there are

    train_images.npy         pictures (N, S, S, 3) uint8, each once
    train_image_ids.npy      the pictures that stand in the tokens, in order
    train_image_offsets.npy  where each conversation's begin among these
    """

    images = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        info = self.meta["images"]
        if lacking := {*INFO, "token"} - info.keys():
            raise UserError(
                f"{self.data_dir}/meta.json: images lack {min(lacking)}; prepare the set again"
            )
        self.image, S = info["token"], info["image_size"]
        self.pixels = open_array(self.file("images"), self.counts["pictures"], (S, S, 3))
        self.image_ids = open_array(self.file("image_ids"), self.counts["images"])
        n = len(self.image_ids)
        self.image_offsets = self.open_offsets("image_offsets", len(self.lengths), n, least=0)
        shown = np.diff(self.image_offsets)  # (conversations,)
        is_image = np.asarray(self.tokens) == self.image
        positions = np.add.reduceat(is_image, self.offsets[:-1], dtype=np.int64)
        missing = self.image_ids >= len(self.pixels)
        if missing.any() or (positions != info["tokens_per_image"] * shown).any():
            raise UserError(
                f"{self.file('images')}: does not fit its ids and offsets; prepare the set again"
            )
        self.images_per_token = n / self.num_tokens

    def batch(self, i):
        """-> Batch; inputs: images as Vision.place takes them, or nothing where there are none"""
        batch = super().batch(i)
        batch.mask &= batch.targets != self.image
        rows, _ = self.examples(i)
        ids = np.concatenate(
            [
                self.image_ids[self.image_offsets[e] : self.image_offsets[e + 1]]
                for _, examples in rows
                for e in examples
            ]
        )
        if len(ids):
            pictures, which = np.unique(ids, return_inverse=True)
            images = to_device(self.device, self.pixels[pictures], which)
            batch.inputs = dict(images=tuple(images))
        return batch


# -----------------------------------------------------------------------------
# pictures


class Shown:
    """
    Pictures that sample.py shows before a text or in the first turn, looked at once. ids: of their
    tokens; UserError where the model has no vision or a picture cannot be read
    """

    def __init__(self, paths, model):
        if not isinstance(model, SeeingGPT):
            raise UserError(
                f"--image={paths[0]}: the model has no vision; train one on a set with images"
            )
        self.model, vision, pixels = model, model.vision, []
        for path in paths:
            try:
                pixels.append(load_image(path, vision.images))
            except ValueError as error:
                raise UserError(f"--image={path}: {error}") from None
        with torch.inference_mode():
            self.features = list(vision(torch.stack(pixels).to(model.head.device)))
        self.ids = [vision.token] * vision.tokens_per_image * len(paths)

    def inputs(self, ids):
        """-> `inputs` for sampling; None where ids show no pictures (any more)"""
        shows = self.model.vision.token in ids
        return self.model.inputs_of([ids], [self.features]) if shows else None


def as_ids(tokenizer, messages, tokens_per_image):
    """-> messages, each content of parts as the ids of its texts and images, for `encode_chat`"""
    image, result = [tokenizer.special["image"]] * tokens_per_image, []
    for message in messages:
        if isinstance(message["content"], list):
            ids = []
            for part in message["content"]:
                ids += image if part["type"] == "image" else tokenizer.encode(part["text"])
            message = dict(message, content=tuple(ids))
        result.append(message)
    return result


def pillow():
    """-> the package that reads pictures; UserError where it is missing"""
    try:
        from PIL import Image, ImageOps

        return Image, ImageOps
    except ImportError:
        raise UserError(
            "Pillow is missing, which reads pictures: pip install pillow, "
            'or this package with its extra "images"'
        ) from None


def load_image(source, images):
    """source: path or binary file -> (S, S, 3) uint8, resized as `images` says; ValueError"""
    Image, ImageOps = pillow()
    S = images["image_size"]
    # stretched, the middle as large as fits, all of it with black beside it
    fit = dict(stretch=Image.Image.resize, crop=ImageOps.fit, pad=ImageOps.pad)[images["resize"]]
    try:
        with Image.open(source) as file:
            # as the camera was held
            image = ImageOps.exif_transpose(file)
            # modes that Pillow would clip to white
            if image.mode[0] in "IF":
                raise ValueError(
                    f"pixels of mode {image.mode}; convert it to 8 bits a channel first"
                )
            # what is transparent lies on white
            if image.mode != "RGB":
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image).convert("RGB")
            image = fit(image, (S, S), Image.Resampling.BICUBIC)
            return torch.from_numpy(np.array(image))
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except Exception as error:  # Pillow raises many kinds at what is damaged, huge or no picture
        # without the address of a buffer
        why = re.sub(r" <_io\..*>", "", " ".join(str(error).split()))[:80]
        raise ValueError(f"not a picture that can be read ({why})") from None
