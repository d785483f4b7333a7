"""
Images for a language model: a tower turns pixels into features, a projector turns these into embeddings.

    model.vision = Vision(VisionConfig(), model.config.n_embd, images)    # images: of the set's meta.json
    hidden = model(tokens, images=(pixels, which))

A tower of somebody's own is Python, which no checkpoint names: it has to be given again.

An image stands in the tokens as tokens_per_image copies of the token <image>; `Vision.place` puts its
features there instead of their embeddings. The tower is the small ViT (2010.11929) below, or any callable of
yours.

`images` is a dict that data/prepare.py writes and a checkpoint keeps, so that training and sampling see the
same: image_size (pixels a side), tokens_per_image, resize (stretch, crop, pad), mean and std of red, green
and blue (0 to 1), token (id of <image>).
Shapes: N images, S pixels a side, P patches, D channels of the tower, k tokens an image, C of the model.
"""
import math
import re
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError


@dataclass(frozen=True)
class VisionConfig:
    tower: str = ""                    # path/to/file.py:function, without arguments, that gives a tower
    patch_size: int = 8                # pixels a side of a patch, a power of 2; this and the rest: our own
    n_layer: int = 4                   # blocks of the vision transformer
    n_head: int = 4                    # heads, divides n_embd
    n_embd: int = 128                  # channels

    def continued(self, wanted):
        """wanted: this config with what the user asked for -> wanted; UserError where weights do not fit"""
        for f in fields(self):
            if f.name != "tower" and getattr(wanted, f.name) != getattr(self, f.name):
                raise UserError(f"--vision.{f.name}={getattr(wanted, f.name)}: the checkpoint has "
                                f"{getattr(self, f.name)}, which cannot change")
        self.check_tower(wanted.tower)
        return wanted

    def check_tower(self, tower, option="vision.tower"):
        """tower: what the user names now, which alone is run; UserError where the weights are another's"""
        if tower and not self.tower:
            raise UserError(f"--{option}={tower}: the checkpoint has the usual tower; leave it out")
        if self.tower and not tower:
            raise UserError(f"--{option}: the checkpoint has a tower of your own, {self.tower} when it was "
                            f"trained; give it, --{option}=path/to/file.py:name")


class Vision(nn.Module):
    """
    forward(pixels (N, S, S, 3) uint8) -> (N, k, C): tower, mean of neighbouring features, RMSNorm, linear map

    make_tower() -> callable, an nn.Module or not, of normalised pixels (N, 3, S, S) that gives (N, P, D); it
    is asked once for its shape. None: the ViT below.
    """
    def __init__(self, config, n_embd, images, make_tower=None):
        super().__init__()
        self.config, self.images, self.token = config, images, images["token"]
        if make_tower and replace(config, tower="") != VisionConfig():
            raise UserError("--vision.tower: is a tower of yours; patch_size, n_layer, n_head and n_embd are "
                            "of the usual one; leave them out")
        self.image_size, self.tokens_per_image = images["image_size"], images["tokens_per_image"]
        self.tower = self.ask(make_tower) if make_tower else Tower(config, self.image_size)
        shape = self.ask(lambda: tuple(self.probe(
            lambda: self.tower(torch.zeros(2, 3, *[self.image_size] * 2))).shape))
        if len(shape) != 3 or shape[0] != 2 or shape[1] < self.tokens_per_image:
            raise UserError(f"--vision: the tower gives {shape} for 2 images of {self.image_size} pixels a "
                            f"side, expected (2, N, D) with N at least {self.tokens_per_image}, the set's "
                            "tokens_per_image")
        self.shape = shape[1:]                                # features, channels
        self.norm = nn.RMSNorm(shape[2], eps=1e-6)
        self.out = nn.Linear(shape[2], n_embd)
        # as large as the embeddings beside them in a new model
        nn.init.normal_(self.out.weight, std=0.02 / math.sqrt(shape[2]))
        nn.init.zeros_(self.out.bias)

    @torch.no_grad()
    def probe(self, function):
        """-> function(), in eval mode: what a tower counts in training stays as it is"""
        was_training = self.training
        self.eval()
        try:
            return function()
        finally:
            self.train(was_training)

    def check_ranks(self, world_size):
        """UserError where training would move a buffer of the tower, which several ranks do not share"""
        if world_size == 1 or not isinstance(self.tower, nn.Module) or not self.tower.training:
            return
        if not (before := {name: buffer.clone() for name, buffer in self.tower.named_buffers()}):
            return
        with torch.no_grad():
            self.ask(lambda: self.tower(torch.ones(2, 3, *[self.image_size] * 2)))
        moved = [name for name, buffer in self.tower.named_buffers() if not buffer.equal(before[name])]
        if moved:
            raise UserError(f"--vision.tower={self.config.tower}: training moves its buffer {moved[0]}, "
                            "which ranks do not share; use another norm, --freeze_tower=true, or one rank")

    def ask(self, function):
        """-> function(), of what the user has written; UserError when that raises"""
        try:
            return function()
        except Exception as error:  # whatever the user's tower raises
            raise UserError(f"--vision.tower={self.config.tower}: raised {type(error).__name__}: "
                            f"{' '.join(str(error).split())[:200]}") from error

    def forward(self, pixels):
        mean, std = (torch.tensor(self.images[name], device=pixels.device) for name in ("mean", "std"))
        x = (pixels.float() / 255 - mean) / std                                    # (N, S, S, 3)
        x = self.tower(x.permute(0, 3, 1, 2).to(self.out.weight.dtype))            # (N, P, D)
        return self.out(self.norm(pool(x, self.tokens_per_image).to(self.out.weight.dtype)))     # (N, k, C)

    def train(self, mode=True):
        """As of any module, but that a tower without a parameter that learns stays in eval mode"""
        super().train(mode)
        if isinstance(self.tower, nn.Module) and not any(p.requires_grad for p in self.tower.parameters()):
            self.tower.eval()
        return self

    @torch.compiler.disable
    def place(self, x, tokens, images):
        """
        x (B, T, C), the embeddings of tokens (B, T), with those of <image> replaced. images: None, or pixels
        (U, S, S, 3) uint8 and which (n,) int64: the n images of tokens, row after row, are pixels[which], so
        that one which comes often is computed once; or, for pixels, what `forward` has made of them
        (U, k, C). ValueError where the numbers do not fit
        """
        if images is None and tokens.shape[1] == 1:
            return x                                          # a step of sampling: where no image begins
        here, n = tokens == self.token, 0 if images is None else len(images[1])
        if (found := int(here.sum())) != n * self.tokens_per_image:
            raise ValueError(f"{found} image tokens for {n} images of {self.tokens_per_image} each")
        if n == 0:
            return x
        pixels, which = images
        features = pixels if pixels.is_floating_point() else self(pixels)
        features = features[which].flatten(0, 1)                                   # (n * k, C)
        return x.masked_scatter(here[..., None], features.to(x.dtype))

    def flops_per_image(self):
        """FLOPs of an image in training: forward, and twice that backward where the tower learns"""
        learns = any(p.requires_grad for name, p in self.named_parameters() if name.startswith("tower."))
        grey = torch.zeros(1, self.image_size, self.image_size, 3, dtype=torch.uint8,
                           device=self.out.weight.device)
        with FlopCounterMode(display=False) as counter:
            self.probe(lambda: self(grey))
        return counter.get_total_flops() * (3 if learns else 1)

    def info(self):
        """-> plain values for a checkpoint, from which `Vision` is made again"""
        return dict(config=asdict(self.config), images=self.images)


def pool(x, k):
    """Means of neighbouring features: x (N, P, D) -> (N, k, D), on the grid where both numbers are squares"""
    P = x.shape[1]
    if P == k:
        return x
    side, small, x = math.isqrt(P), math.isqrt(k), x.transpose(1, 2)               # (N, D, P)
    if side**2 == P and small**2 == k:
        x = F.adaptive_avg_pool2d(x.unflatten(2, (side, side)), small).flatten(2)
    else:
        x = F.adaptive_avg_pool1d(x, k)
    return x.transpose(1, 2)


class Tower(nn.Module):
    """
    A vision transformer: pixels (N, 3, S, S) -> (N, P, D), row after row of patches. Small convolutions that
    halve the sides embed the patches (2106.14881): shapes are learned sooner than with one linear map
    """
    def __init__(self, c, image_size):
        super().__init__()
        for name in ("patch_size", "n_layer", "n_head", "n_embd"):
            if getattr(c, name) < 1:
                raise UserError(f"--vision.{name}={getattr(c, name)}: must be positive")
        halvings = c.patch_size.bit_length() - 1
        if halvings < 1 or c.patch_size != 1 << halvings or image_size % c.patch_size:
            raise UserError(f"--vision.patch_size={c.patch_size}: must be a power of 2, at least 2, and "
                            f"divide the set's image_size, {image_size}")
        if c.n_embd % c.n_head:
            raise UserError(f"--vision.n_head={c.n_head}: must divide --vision.n_embd={c.n_embd}")
        side = image_size // c.patch_size
        widths = [3, *(max(1, c.n_embd >> i) for i in reversed(range(halvings)))]  # the last: n_embd
        self.patch = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1)
                                   for a, b in zip(widths, widths[1:]))
        self.row = nn.Parameter(torch.randn(side, 1, c.n_embd) * 0.02)             # 2-D positions
        self.column = nn.Parameter(torch.randn(1, side, c.n_embd) * 0.02)
        self.blocks = nn.ModuleList(Block(c) for _ in range(c.n_layer))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x):
        for i, conv in enumerate(self.patch):
            x = conv(F.gelu(x) if i else x)
        x = x.flatten(2).transpose(1, 2)                                           # (N, P, D)
        x = x + (self.row + self.column).flatten(0, 1)
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    """Attention of every patch to all, then an MLP, each behind a norm"""
    def __init__(self, c):
        super().__init__()
        self.n_head = c.n_head
        self.attn_norm, self.mlp_norm = nn.LayerNorm(c.n_embd), nn.LayerNorm(c.n_embd)
        self.qkv, self.attn_out = nn.Linear(c.n_embd, 3 * c.n_embd), nn.Linear(c.n_embd, c.n_embd)
        self.up, self.down = nn.Linear(c.n_embd, 4 * c.n_embd), nn.Linear(4 * c.n_embd, c.n_embd)

    def forward(self, x):
        qkv = self.qkv(self.attn_norm(x)).unflatten(2, (3, self.n_head, -1))       # (N, P, 3, H, D / H)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4).unbind(0))  # (N, H, P, D / H)
        x = x + self.attn_out(y.transpose(1, 2).flatten(2))                        # (N, P, D)
        return x + self.down(F.gelu(self.up(self.mlp_norm(x))))


# -----------------------------------------------------------------------------
# files

def pillow():
    """-> the package that reads pictures; a UserError where it is missing"""
    try:
        from PIL import Image, ImageOps
        return Image, ImageOps
    except ImportError:
        raise UserError("Pillow is missing, which reads pictures: pip install pillow, or this package with "
                        'its extra "images"') from None


def load_image(source, images):
    """source: path or binary file -> (S, S, 3) uint8, resized as `images` says; ValueError when it is none"""
    Image, ImageOps = pillow()
    size = (images["image_size"], images["image_size"])
    try:
        with Image.open(source) as file:
            image = ImageOps.exif_transpose(file)             # as the camera was held
            if image.mode[0] in "IF":                         # Pillow would clip them to white
                raise ValueError(f"pixels of mode {image.mode}; convert it to 8 bits a channel first")
            if image.mode != "RGB":                           # what is transparent lies on white
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
            if images["resize"] == "stretch":
                image = image.resize(size, Image.Resampling.BICUBIC)
            elif images["resize"] == "crop":                  # the middle, as large as fits
                image = ImageOps.fit(image, size, Image.Resampling.BICUBIC)
            else:                                             # all of it, with black beside it
                image = ImageOps.pad(image, size, Image.Resampling.BICUBIC)
            return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(*size, 3)
    except FileNotFoundError:
        raise ValueError("no such file") from None
    except Exception as error:  # Pillow raises many kinds at what is damaged, huge or no picture
        why = re.sub(r" <_io\..*>", "", " ".join(str(error).split()))[:80]       # the address of a buffer
        raise ValueError(f"not a picture that can be read ({why})") from None
