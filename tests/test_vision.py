"""
extras/images.py, but for rows (test_images.py): features in the right places, gradients, what is frozen,
ranks, kill and resume, generation, sample.py, mistakes.
"""
import json
import os
import random
import re
import shutil
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from test_stages import (
    SEES,
    TINY,
    assert_one_line,
    assert_same_curve,
    final_weights,
    losses,
    make_stage,
    records,
    same_weights,
    start_and_signal,
)

from common.chat import encode_chat
from common.errors import UserError
from common.losses import linear_cross_entropy
from common.model import GPT, ModelConfig
from common.sampling import SamplingConfig, complete, stream, stream_tokens
from common.tokenizer import load_tokenizer
from extras.images import ImageData, SeeingGPT, Shown, Vision, VisionConfig, as_ids, load_image, pool

Image = pytest.importorskip("PIL.Image", reason="the extra images")

BYTES = load_tokenizer("bytes")
IMAGE = BYTES.special["image"]
INFO = dict(image_size=16, tokens_per_image=4, resize="stretch", mean=[0.5, 0.4, 0.3], std=[0.2, 0.3, 0.4],
            token=IMAGE)
TOWER = VisionConfig(patch_size=4, n_layer=2, n_head=2, n_embd=8)
PLAIN = SamplingConfig(temperature=0.0, max_new_tokens=8, suppress=(IMAGE,))


def new_model(info=INFO, tower=None, **options):
    torch.manual_seed(1)
    config = ModelConfig(vocab_size=BYTES.vocab_size, seq_len=64, n_layer=2, n_head=2, n_embd=16, **options)
    model = SeeingGPT(config, VisionConfig(tower="mine") if tower else TOWER, info, tower)
    with torch.no_grad():                                     # far from the small start, so that all counts
        for p in model.parameters():
            p.mul_(3)
    return model


def pictures(n, size=16, seed=0):
    return torch.randint(0, 256, (n, size, size, 3), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(seed))


# -----------------------------------------------------------------------------
# features and where they go

def naive_tower(tower, x, n_head):
    """The same by loops over images, patches, heads and queries: x (N, 3, S, S) -> (N, P, D)"""
    w = dict(tower.named_parameters())

    def norm(x, name):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]
    def gelu(x):
        return x * 0.5 * (1 + torch.erf(x / 2**0.5))

    def conv(x, name):                                        # (C, S, S) -> (C', S / 2, S / 2)
        x, S = torch.nn.functional.pad(x, (1, 1, 1, 1)), x.shape[1] // 2
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        return torch.stack([torch.stack([
            (weight * x[:, 2 * i:2 * i + 3, 2 * j:2 * j + 3]).sum(dim=(1, 2, 3)) + bias
            for j in range(S)], dim=1) for i in range(S)], dim=1)
    out = []
    for image in x:
        grid = conv(gelu(conv(image, "patch.0")), "patch.1")  # patches of 4 pixels
        side = grid.shape[1]
        h = torch.stack([grid[:, i, j] + w["row"][i, 0] + w["column"][0, j]
                         for i in range(side) for j in range(side)])              # (P, D)
        for layer in range(len(tower.blocks)):
            name = f"blocks.{layer}"
            q, k, v = linear(norm(h, f"{name}.attn_norm"), f"{name}.qkv").chunk(3, dim=-1)
            heads = []
            for q, k, v in zip(*(part.chunk(n_head, dim=-1) for part in (q, k, v))):
                heads.append(torch.stack([(k @ one / len(one)**0.5).softmax(0) @ v for one in q]))
            h = h + linear(torch.cat(heads, dim=-1), f"{name}.attn_out")
            inner = linear(norm(h, f"{name}.mlp_norm"), f"{name}.up")
            h = h + linear(gelu(inner), f"{name}.down")
        out.append(h)
    return torch.stack(out)


def naive_features(vision, pixels):
    x = (pixels.permute(0, 3, 1, 2).to(vision.out.weight.dtype) / 255
         - torch.tensor(INFO["mean"])[:, None, None]) / torch.tensor(INFO["std"])[:, None, None]
    x = naive_tower(vision.tower, x, 2)                    # (N, 16, D), on a grid of 4 x 4
    quarters = [x[:, [4 * (2 * i + a) + 2 * j + b for a in (0, 1) for b in (0, 1)]].mean(1)
                for i in (0, 1) for j in (0, 1)]
    x = torch.stack(quarters, dim=1)
    x = x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * vision.norm.weight
    return x @ vision.out.weight.T + vision.out.bias


def test_features_and_their_gradients_are_those_of_a_naive_tower():
    vision, pixels = new_model().vision.double(), pictures(3)
    weight = torch.randn(3, 4, 16, dtype=torch.float64)
    ours = vision(pixels)
    gradients = torch.autograd.grad((ours * weight).sum(), list(vision.parameters()))
    naive = naive_features(vision, pixels)
    expected = torch.autograd.grad((naive * weight).sum(), list(vision.parameters()))
    assert torch.allclose(ours, naive, atol=1e-5)             # mean and std are float32
    for (name, _), a, b in zip(vision.named_parameters(), gradients, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4), name
        assert a.abs().max() > 0, name


def test_a_loss_of_the_whole_model_reaches_the_tower_as_finite_differences_say():
    model = new_model().double()
    tokens = torch.tensor([[1, IMAGE, IMAGE, IMAGE, IMAGE, 7, 8]])
    images = pictures(1), torch.tensor([0])

    def loss():
        logits = model(tokens, images=images)[0] @ model.head.T
        return torch.nn.functional.cross_entropy(logits, tokens[0].roll(-1), reduction="sum")
    p = model.vision.tower.blocks[0].up.weight
    loss().backward()
    with torch.no_grad():                                     # the largest, as RMSNorm is in float32
        for place in p.grad.abs().flatten().topk(5).indices.tolist():
            place = divmod(place, p.shape[1])
            whole, step = p[place].item(), 1e-2
            values = []
            for sign in (1, -1):
                p[place] = whole + sign * step
                values.append(loss().item())
            p[place] = whole
            slope = (values[0] - values[1]) / (2 * step)
            assert p.grad[place].item() == pytest.approx(slope, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("P, k, groups", [
    (16, 16, [[i] for i in range(16)]), (16, 1, [list(range(16))]),
    (16, 4, [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]),
    (9, 4, [[0, 1, 3, 4], [1, 2, 4, 5], [3, 4, 6, 7], [4, 5, 7, 8]]),
    (6, 3, [[0, 1], [2, 3], [4, 5]]), (16, 8, [[2 * i, 2 * i + 1] for i in range(8)]),
    (5, 2, [[0, 1, 2], [2, 3, 4]])])
def test_pooling_is_a_mean_of_neighbours(P, k, groups):
    x = torch.randn(2, P, 3)
    assert torch.allclose(pool(x, k), torch.stack([x[:, group].mean(1) for group in groups], 1), atol=1e-6)


def rows_with(*numbers, T=24):
    """Rows of T tokens with so many images each, at places of their own -> (B, T)"""
    tokens = torch.randint(0, 200, (len(numbers), T), generator=torch.Generator().manual_seed(5))
    for row, number in enumerate(numbers):
        for n in range(number):
            at = 1 + row + n * (4 + row % 2)                  # next to each other in every second row
            tokens[row, at:at + 4] = IMAGE
    return tokens


@pytest.mark.parametrize("numbers", [(0, 1, 2), (2, 0, 1), (1, 1, 1), (0, 0, 2), (2, 2, 0)])
def test_features_stand_in_the_places_of_their_images(numbers):
    model, tokens = new_model(), rows_with(*numbers)
    pixels, which = pictures(3), torch.tensor([2, 0, 0, 1][:sum(numbers)])
    expected = model.embed(tokens).detach().clone()
    features, n = model.vision(pixels), 0
    for row, number in enumerate(numbers):
        places = (tokens[row] == IMAGE).nonzero()[:, 0].split(4)
        for place in places[:number]:
            expected[row, place] = features[which[n]]
            n += 1
    assert torch.equal(model.vision.place(model.embed(tokens), tokens, (pixels, which)), expected)
    with torch.no_grad():                                     # and the rows do not see each other's
        together, n = model(tokens, images=(pixels, which)), 0
        for row, number in enumerate(numbers):
            mine = (pixels, which[n:n + number]) if number else None
            alone = model(tokens[row:row + 1], images=mine)
            assert torch.allclose(together[row], alone[0], atol=1e-5)
            n += number


def test_numbers_that_do_not_fit_are_an_error():
    model, tokens = new_model(), rows_with(1, 2)
    with pytest.raises(ValueError, match="12 image tokens for 2 images of 4 each"):
        model(tokens, images=(pictures(2), torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="12 image tokens for 0 images of 4 each"):
        model(tokens)
    with pytest.raises(ValueError, match="0 image tokens for 1 images of 4 each"):
        model(rows_with(0), images=(pictures(1), torch.tensor([0])))
    blind = GPT(model.config)
    with pytest.raises(TypeError, match="images"):
        blind(tokens, images=(pictures(1), torch.tensor([0])))
    assert blind(tokens).shape == (2, 24, 16)


def test_a_picture_that_occurs_often_is_computed_once():
    model, seen = new_model(), []
    model.vision.tower.register_forward_hook(lambda tower, args, out: seen.append(len(out)))
    tokens, pixels = rows_with(2, 2), pictures(2)
    a = model(tokens, images=(pixels, torch.tensor([0, 1, 1, 0])))
    b = model(tokens, images=(pixels[[0, 1, 1, 0]], torch.arange(4)))
    assert seen == [2, 4] and torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("option", [
    pytest.param("compiled", marks=pytest.mark.slow), "checkpointed", "bfloat16"])
def test_compiled_recomputed_and_in_autocast_it_is_the_same(option):
    model, tokens = new_model(), rows_with(1, 0, 2, T=40)
    docs = (torch.arange(40) > 20).long().expand(3, -1)
    images = pictures(3), torch.tensor([0, 1, 2])

    def gradients(forward, **context):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=option == "bfloat16" and bool(context)):
            linear_cross_entropy(forward(tokens, docs, images=images), model.head, tokens).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])
    expected = gradients(model)
    model.activation_checkpointing = option == "checkpointed"
    found = gradients(torch.compile(model) if option == "compiled" else model, other=True)
    tolerance = 0.1 if option == "bfloat16" else 1e-4
    assert (found - expected).norm() < tolerance * expected.norm()


# -----------------------------------------------------------------------------
# towers of one's own

def strange_tower():
    """No module, and 9 features of 5 channels that are means of a 3 x 3 grid"""
    return lambda x: pool(x.flatten(2).transpose(1, 2), 9).repeat(1, 1, 2)[..., :5]


class BatchNorm(torch.nn.Module):
    """Has buffers that training moves, unless it is in eval mode"""
    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(3, 6, 8, stride=8), torch.nn.BatchNorm2d(6)

    def forward(self, x):
        return self.norm(self.conv(x)).flatten(2).transpose(1, 2)     # (N, 4, 6)


class PartlyFrozen(BatchNorm):
    """Holds a parameter that it does not want to learn"""
    def __init__(self):
        super().__init__()
        self.place = torch.nn.Parameter(torch.ones(4, 6), requires_grad=False)

    def forward(self, x):
        return super().forward(x) + self.place


def test_any_callable_is_a_tower():
    model = new_model(tower=strange_tower)
    assert model.vision(pictures(2)).shape == (2, 4, 16)
    assert not [name for name in model.state_dict() if name.startswith("vision.tower.")]
    assert model.vision.flops_per_image() > 0


@pytest.mark.parametrize("tower, message", [
    (lambda: lambda x: x.mean(dim=(2, 3)), r"the tower gives \(2, 3\) for 2 images of 16 pixels a side"),
    (lambda: lambda x: x.flatten(2)[..., :3], r"gives \(2, 3, 3\) .* N at least 4"),
    (lambda: lambda x: 1 / 0, "raised ZeroDivisionError: division by zero"),
    (lambda: [][1], "raised IndexError"), (lambda: None, "raised TypeError")])
def test_a_tower_that_gives_something_else_is_refused(tower, message):
    with pytest.raises(UserError, match=message):
        Vision(VisionConfig(tower="mine"), 16, INFO, tower)


@pytest.mark.parametrize("change, message", [
    (dict(patch_size=6), "--vision.patch_size=6: must be a power of 2"),
    (dict(patch_size=32), "--vision.patch_size=32: must be a power of 2, at least 2, and divide the set's"),
    (dict(patch_size=1), "--vision.patch_size=1: must be a power of 2"),
    (dict(patch_size=16), "expected \\(2, N, D\\) with N at least 4"),
    (dict(n_head=3), "--vision.n_head=3: must divide --vision.n_embd=8"),
    (dict(n_layer=0), "--vision.n_layer=0: must be positive")])
def test_a_tower_that_cannot_be_is_refused(change, message):
    with pytest.raises(UserError, match=message):
        Vision(replace(TOWER, **change), 16, INFO)


def test_a_model_and_its_cost_count_the_vision():
    model = new_model()
    vision = sum(p.numel() for p in model.vision.parameters())
    blind = GPT(model.config)
    assert model.num_parameters() == blind.num_parameters() + vision
    assert model.flops_per_token(64) == blind.flops_per_token(64)
    linear = sum(p.numel() for name, p in model.vision.named_parameters()
                 if p.ndim == 2 and name.startswith("tower."))
    assert 6 * 16 * linear < model.vision.flops_per_image() < 12 * 16 * linear   # 16 patches; attention, stem
    whole = model.vision.flops_per_image()
    model.vision.tower.requires_grad_(False)
    assert model.vision.flops_per_image() == whole / 3
    model.images_per_token = 0.25
    assert model.flops_per_token(64) == blind.flops_per_token(64) + model.vision.flops_per_image() / 4
    model.images_per_token = 0.0
    model.requires_grad_(False)
    assert model.flops_per_token(64) < blind.flops_per_token(64)
    # complete last in backward
    names = [name for name, _ in model.named_parameters()]
    of_vision = [f"vision.{name}" for name, _ in model.vision.named_parameters()]
    assert names == of_vision + [name for name, _ in blind.named_parameters()] == list(model.state_dict())


# -----------------------------------------------------------------------------
# data

def test_batches_have_the_images_of_their_tokens(image_set):
    meta = json.loads((image_set / "meta.json").read_text())
    kept = np.load(image_set / "train_images.npy")
    assert kept.shape == (12, 16, 16, 3) and meta["splits"]["train"]["pictures"] == 12
    rows = [json.loads(line) for line in open(image_set.parent / "rows.jsonl")]
    by_text = {}                                              # what was said -> the pictures' files
    for row in rows:
        by_text.setdefault(row["messages"][1]["content"], set()).add(tuple(row["images"]))
    files = {name: load_image(image_set.parent / name, meta["images"])
             for row in rows for name in row["images"]}
    data, seen = ImageData(str(image_set), "train", 150, 2), 0
    for i in range(2 * data.num_rows):
        batch = data.batch(i)
        tokens, docs = batch.tokens, batch.docs
        n = int((tokens == IMAGE).sum()) // 4
        assert not (batch.mask & (batch.targets == IMAGE)).any()
        if not batch.inputs:
            assert n == 0
            continue
        pixels, which = batch.inputs["images"]
        assert len(which) == n and len(pixels) == len(set(which.tolist())) and pixels.dtype == torch.uint8
        shown = iter(pixels[which])
        for row, of_doc in zip(tokens, docs):
            for number in range(int(of_doc.max()) + 1):
                ids = row[of_doc == number].tolist()
                mine = [next(shown) for _ in range(ids.count(IMAGE) // 4)]
                said = BYTES.decode(ids[ids.index(BYTES.special["answer"]):])
                assert any(len(names) == len(mine) and all(
                    torch.equal(files[name], image) for name, image in zip(names, mine))
                    for names in by_text[said])
                seen += len(mine)
    assert seen > 100


def test_with_mask_prompt_off_everything_but_images_is_learned(image_set):
    batch = ImageData(str(image_set), "train", 150, 4, mask_prompt=False).batch(0)
    is_image = batch.targets == IMAGE
    assert torch.equal(batch.mask, (batch.docs >= 0) & ~is_image) and is_image.any()


@pytest.mark.parametrize("name, array, message", [
    ("train_images", np.zeros((12, 16, 16), np.uint8), "expected rows of (16, 16, 3) unsigned integers"),
    ("train_images", np.zeros((11, 16, 16, 3), np.uint8), "holds 11 numbers, meta.json says 12"),
    ("train_image_ids", None, "does not fit its ids and offsets"),
    ("train_image_ids", "cut", "meta.json says"),
    ("train_image_offsets", None, "its offsets do not fit"),
    ("train_image_offsets", "moved", "does not fit its ids and offsets"),
    ("train_images", "missing", "no such file"), ("train_images", "cut", "damaged or truncated")])
def test_damaged_images_are_refused(image_set, tmp_path, name, array, message):
    shutil.copytree(image_set, tmp_path / "set")
    path = tmp_path / f"set/{name}.npy"
    if isinstance(array, np.ndarray):
        np.save(path, array)
    elif array == "missing":
        path.unlink()
    elif array == "moved":                                    # as many in all, at other conversations
        offsets = np.load(path)
        shown = np.diff(offsets).astype(np.uint64)
        np.save(path, np.concatenate([[0], shown[::-1].cumsum()]).astype(np.uint64))
    elif array == "cut" and name == "train_images":
        path.write_bytes(path.read_bytes()[:-10])
    elif array == "cut":
        np.save(path, np.load(path)[:-1])
    else:
        np.save(path, np.load(path) + 12)
    with pytest.raises(UserError) as error:
        ImageData(str(tmp_path / "set"), "train", 150, 1)
    assert message in str(error.value)


def test_a_set_whose_images_are_not_described_is_refused(image_set, tmp_path):
    shutil.copytree(image_set, tmp_path / "set")
    meta = json.loads((tmp_path / "set/meta.json").read_text())
    del meta["images"]["mean"]
    (tmp_path / "set/meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="meta.json: images lack mean; prepare the set again"):
        ImageData(str(tmp_path / "set"), "train", 150, 1)


# -----------------------------------------------------------------------------
# generation

def prompt_with(*images, text="what"):
    """-> ids of a prompt that shows so many images"""
    content = [dict(type="image") for _ in images] + [dict(type="text", text=text)]
    (ids, _), = encode_chat(BYTES, [as_ids(BYTES, [dict(role="user", content=content)], 4)], reply=True)
    return ids


def greedy(model, ids, images, n):
    """n tokens, everything computed anew for each"""
    ids, given = list(ids), (torch.stack(images), torch.arange(len(images))) if images else None
    for _ in range(n):
        with torch.no_grad():
            logits = model(torch.tensor([ids]), images=given)[0, -1] @ model.head.T
        logits[IMAGE] = -torch.inf
        ids.append(int(logits.argmax()))
    return ids[-n:]


@pytest.mark.parametrize("samples", [1, 2])
def test_cached_generation_is_the_uncached_one_and_asks_the_tower_once(samples):
    model, (a, b, c) = new_model(), pictures(3)
    shown = [[a], [b, c], [], [c, a], [a]]
    prompts = [prompt_with(*images, text="abc"[:n % 4]) for n, images in enumerate(shown)]
    seen = []
    model.vision.tower.register_forward_hook(lambda tower, args, out: seen.append(len(out)))
    inputs = model.inputs_of(prompts, shown)
    replies, *_ = complete(model, prompts, PLAIN, num_samples=samples, inputs=inputs)
    assert seen == [3]                                        # three pictures, all at once
    for n, (ids, images) in enumerate(zip(prompts, shown)):
        expected = greedy(model, ids, images, 8)
        assert all(replies[n * samples + g] == expected for g in range(samples))
    ours, other = (complete(model, prompts[:1], PLAIN, inputs=model.inputs_of(prompts[:1], [[image]]))[1][0]
                   for image in (a, b))
    assert max(abs(x - y) for x, y in zip(ours, other)) > 1e-3                    # it does look at them


def streamed_by_windows(model, ids, images, n, end):
    """What stream_tokens should give: each window computed by itself, from the images that it holds whole"""
    ids, start = list(ids), len(ids)
    while len(ids) < start + n:
        window = ids if len(ids) < 64 else ids[-32:]
        while window.count(IMAGE) % 4:
            window = window[1:]
        window = window or [end]
        shown = images[len(images) - window.count(IMAGE) // 4:]
        cfg = replace(PLAIN, max_new_tokens=start + n - len(ids))
        ids += complete(model, [window], cfg, (end,), inputs=model.inputs_of([window], [shown]))[0][0]
    return ids[start:]


def test_streaming_gives_the_same_and_goes_on_past_the_context(monkeypatch):
    model, (a, b, _) = new_model(), pictures(3)
    cfg, ids = replace(PLAIN, max_new_tokens=8), prompt_with(a, b)
    inputs = model.inputs_of([ids], [[a, b]])
    assert list(stream_tokens(model, BYTES, ids, cfg, inputs=inputs)) == \
        complete(model, [ids], cfg, BYTES.ends, inputs=inputs)[0][0]
    expected = BYTES.decode(greedy(model, ids, [a, b], 8))
    assert "".join(stream(model, BYTES, ids, cfg, inputs=inputs)) == expected
    windows, forward = [], SeeingGPT.forward

    def spy(self, tokens, **given):
        if tokens.shape[1] > 1:
            windows.append((tokens[0], given["inputs"][0]))
        return forward(self, tokens, **given)
    monkeypatch.setattr(SeeingGPT, "forward", spy)
    model.embed.weight.data[BYTES.end] = 0                    # never the likeliest: it does not end
    with torch.no_grad():
        features = model.vision(torch.stack([a, b])).flatten(0, 1)                # (8, C)
    for start in range(8):                                    # a window may begin at any token of an image
        windows.clear()
        ids = [1] * (26 + start) + [IMAGE] * 8 + [2] * 20
        cfg = replace(PLAIN, max_new_tokens=40)
        found = list(stream_tokens(model, BYTES, ids, cfg, inputs=model.inputs_of([ids], [[a, b]])))
        assert len(windows) >= 2 and len(found) == 40
        for tokens, given in windows:
            is_image = tokens == IMAGE
            n = int(is_image.sum())
            assert n in (0, 4, 8) and torch.equal(given[is_image], features[8 - n:])
            assert torch.equal(given[~is_image], model.embed.weight[tokens[~is_image]])
        assert found == streamed_by_windows(model, ids, [a, b], 40, BYTES.end)
    ids = [1] * 70 + [IMAGE] * 40                             # nothing is left of the first window but images
    inputs = model.inputs_of([ids], [[a, b] * 5])
    assert list(stream_tokens(model, BYTES, ids, cfg, inputs=inputs)) == \
        streamed_by_windows(model, ids, [a, b] * 5, 40, BYTES.end)


def test_an_image_larger_than_a_window_is_forgotten():
    model, (a, _, _) = new_model({**INFO, "tokens_per_image": 16}), pictures(3)
    model.embed.weight.data[BYTES.end] = 0
    model.input_only = {IMAGE: 40}                            # as if one image took as much
    cfg = replace(PLAIN, max_new_tokens=5)
    ids = [1] * 50 + [IMAGE] * 16
    inputs = model.inputs_of([ids], [[a]])
    assert list(stream_tokens(model, BYTES, ids + [IMAGE] * 16, cfg, inputs=inputs)) == \
        complete(model, [[BYTES.end]], cfg, BYTES.ends)[0][0]


def test_features_stand_for_their_pictures():
    """As sample.py has them: what the tower has made once"""
    model, (a, b, _) = new_model(), pictures(3)
    ids = prompt_with(a, b)
    with torch.no_grad():
        features = list(model.vision(torch.stack([a, b])))
    asked = []
    model.vision.tower.register_forward_hook(lambda *_: asked.append(1))
    ours = complete(model, [ids], PLAIN, inputs=model.inputs_of([ids], [features]))[0]
    assert not asked and ours == complete(model, [ids], PLAIN, inputs=model.inputs_of([ids], [[a, b]]))[0]


def test_a_prompt_has_its_own_pictures():
    model, (a, _, _) = new_model(), pictures(3)
    with pytest.raises(ValueError, match="prompt 0 has 4 tokens for 0 images of 4 each"):
        model.inputs_of([prompt_with(a), prompt_with()], [[], [a]])
    with pytest.raises(ValueError, match="4 image tokens for 0 images of 4 each"):
        complete(model, [prompt_with(a)], PLAIN)


def test_what_stands_for_an_image_is_never_sampled():
    model = new_model(tie_embeddings=False)
    model.untied_head.weight.data[:] = 0
    model.untied_head.weight.data[IMAGE] = model(torch.tensor([[1, 2]]))[0, -1].detach() * 9
    cfg = SamplingConfig(temperature=0.0, max_new_tokens=5)
    assert complete(model, [[1, 2]], replace(cfg, max_new_tokens=1))[0] == [[IMAGE]]
    assert IMAGE not in list(stream_tokens(model, BYTES, [1, 2], cfg))


# -----------------------------------------------------------------------------
# training through the command line

@pytest.fixture
def sees(request, tmp_path, image_set):
    """start(out, *options): train_sft.py on image_set"""
    start = make_stage("train_sft.py", request, tmp_path)
    start.data, start.options = image_set, [*TINY, "--seq_len=150", *SEES[1:]]
    return SimpleNamespace(start=lambda out, *options, **more: start(out, *SEES, *options, **more),
                           plain=lambda out, *options, **more: start(out, SEES[0], *options, **more),
                           stage=start, folder=tmp_path)


@pytest.mark.parametrize("frozen", [[], pytest.param(["--freeze_llm=true"], marks=pytest.mark.slow)],
                         ids=["all", "frozen"])
def test_layouts_give_the_same_also_where_a_rank_has_no_image(sees, image_set, frozen):
    """--seq_len=36: rows of one or two conversations, so that many micro-batches show nothing."""
    common = ["--num_steps=12", "--eval_every=6", "--seq_len=36", "--seed=1"]
    data = [ImageData(str(image_set), "train", 36, 1, rank, 2, seed=1) for rank in (0, 1)]
    none = [[not d.batch(i).inputs for d in data] for i in range(48)]
    assert {(True, False), (False, True), (True, True)} < set(map(tuple, none))
    layouts = {"1x8": (["--micro_batch_size=8"], 1), "8x1": (["--micro_batch_size=1"], 1),
               "2 ranks": (["--micro_batch_size=1"], 2),
               "2 ranks, zero1": (["--micro_batch_size=2", "--zero1=true"], 2)}
    for layout, (options, ranks) in layouts.items():
        sees.start(layout, *common, *options, *frozen, ranks=ranks)
    whole = final_weights(sees.folder / "1x8")
    for layout in layouts:
        assert_same_curve(sees.folder / "1x8", sees.folder / layout)
        weights = final_weights(sees.folder / layout)
        assert max((weights[k] - whole[k]).abs().max().item() for k in whole) < 1e-4


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_kill_9_and_resume_with_images_is_bit_for_bit(sees, ranks):
    options = ["--num_steps=30", "--save_every=5", "--eval_every=7", *["--zero1=true"] * (ranks > 1)]
    sees.start("straight", *options, ranks=ranks)
    code, _ = start_and_signal(sees.stage, "killed", *options, "--resume=true", number=signal.SIGKILL,
                               when=random.randint(7, 25), ranks=ranks)
    assert code == -signal.SIGKILL
    sees.start("killed", *options, "--resume=true", ranks=ranks)
    assert records(sees.folder / "killed") == records(sees.folder / "straight")
    assert same_weights(sees.folder / "killed", sees.folder / "straight")


@pytest.mark.parametrize("option, still", [
    ("--freeze_llm=true", lambda name: not name.startswith("vision.")),
    ("--freeze_tower=true", lambda name: name.startswith("vision.tower."))])
def test_what_is_frozen_stays_bit_for_bit_and_has_no_state(sees, option, still):
    sees.start("start", "--num_steps=3")
    start = f"--init_from={sees.folder / 'start'}"
    sees.start("run", "--num_steps=5", start, option)
    before, after = final_weights(sees.folder / "start"), final_weights(sees.folder / "run")
    assert before.keys() == after.keys()
    for name in before:
        assert torch.equal(before[name], after[name]) == still(name), name
    state = torch.load(sees.folder / "run/step_000005/optimizer_0_of_1.pt", weights_only=True)
    with_state = {name for group in state["groups"] for name, _ in group["parameters"]}
    assert with_state == {name for name in before if not still(name)}


def test_a_tower_of_ones_own_trains_or_stays_with_its_buffers(sees):
    tower = [f"--vision.tower={ROOT}/tests/test_vision.py:BatchNorm"]
    sees.plain("start", "--num_steps=3", *tower)
    sees.plain("frozen", "--num_steps=3", *tower, "--freeze_tower=true",
               f"--init_from={sees.folder / 'start'}")
    start, frozen = final_weights(sees.folder / "start"), final_weights(sees.folder / "frozen")
    names = [name for name in start if name.startswith("vision.tower.")]
    assert start["vision.tower.norm.running_mean"].abs().max() > 0
    assert all(torch.equal(start[name], frozen[name]) for name in names)
    ask = [f"--init_from={sees.folder / 'frozen'}", "--chat=true", "--prompt=what", "--device=cpu",
           "--max_new_tokens=5", f"--image={sees.stage.data.parent}/0.png"]
    run("sample.py", *ask, tower[0].replace("--vision.", "--"))
    # what a checkpoint names is never run: it has to be given again
    assert_one_line(run("sample.py", *ask, check=False), "give it, --tower=path/to/file.py:name")
    again = f"--init_from={sees.folder / 'start'}"
    assert_one_line(sees.plain("b", "--num_steps=3", again, check=False), "give it, --vision.tower=path")
    assert_one_line(sees.start("b", *tower, "--num_steps=3", check=False), "of the usual one")
    result = sees.plain("b", *tower, "--num_steps=3", ranks=2, check=False)
    assert result.returncode == 2 and "moves its buffer norm.running_mean, which ranks do" in result.stderr


@pytest.mark.slow
def test_a_tower_of_ones_own_goes_on_bit_for_bit_and_keeps_what_it_has_frozen(sees):
    options = [f"--vision.tower={ROOT}/tests/test_vision.py:PartlyFrozen", "--eval_every=3"]
    options += ["--schedule=constant"]
    sees.plain("straight", *options, "--num_steps=6")
    sees.plain("halves", *options, "--num_steps=3")
    sees.plain("halves", *options, "--num_steps=6", "--resume=true")
    assert same_weights(sees.folder / "halves", sees.folder / "straight")
    weights = final_weights(sees.folder / "straight")
    assert weights["vision.tower.norm.num_batches_tracked"] == 6                  # training steps only
    assert torch.equal(weights["vision.tower.place"], torch.ones(4, 6))


@pytest.mark.slow
def test_a_function_is_a_tower_on_several_ranks_too(sees):
    options = [f"--vision.tower={ROOT}/tests/test_vision.py:strange_tower", "--num_steps=4"]
    sees.plain("one", *options)
    sees.plain("two", *options, "--micro_batch_size=2", ranks=2)
    assert_same_curve(sees.folder / "one", sees.folder / "two")


@pytest.mark.parametrize("start", [[], ["--freeze_llm=true"]], ids=["all", "frozen"])
def test_a_dry_run_counts_the_pictures(sees, start):
    said = sees.start("run", "--num_steps=2", "--dry_run=true", *start).stdout
    assert "Nothing was written" in said and not (sees.folder / "run").exists()
    flops = [float(re.search(r"([\d.e+]+) FLOPs", text)[1]) for text in (said, sees.start(
        "run", "--num_steps=2", "--dry_run=true", "--vision.n_embd=64", *start).stdout)]
    assert flops[1] > 1.2 * flops[0]


@pytest.mark.slow
def test_config_json_of_a_run_starts_it_again(sees, request):
    """What was not asked for follows from where a run starts, in a set with images and in one without"""
    for name, stage, options in (("text", make_stage("train_sft.py", request, sees.folder), []),
                                 ("sees", sees.start, [])):
        stage(name, "--num_steps=2", *options)
        config = sees.folder / name / "config.json"
        run("train_sft.py", config, f"--out_dir={sees.folder / name}_again")
        assert same_weights(sees.folder / name, sees.folder / f"{name}_again")
    sees.start("more", "--num_steps=2", f"--init_from={sees.folder / 'sees'}")
    asked = json.loads((sees.folder / "more/config.json").read_text())
    assert asked["vision"].keys() == {"n_layer", "n_head", "n_embd"}              # no defaults, which differ
    run("train_sft.py", sees.folder / "more/config.json", f"--out_dir={sees.folder}/more_again")
    assert same_weights(sees.folder / "more", sees.folder / "more_again")


@pytest.mark.slow
def test_it_overfits_one_batch_of_pictures(sees, image_set, tmp_path):
    rows = (image_set.parent / "rows.jsonl").read_text().splitlines(keepends=True)[:6]
    (image_set.parent / "six.jsonl").write_text("".join(rows))
    run("data/prepare.py", "images", f"--input={image_set.parent}/six.jsonl", "--tokens_per_image=4",
        "--image_size=16", f"--out_dir={tmp_path}/six")
    sees.start("run", "--num_steps=150", f"--data_dir={tmp_path}/six", "--eval_seqs=0", "--eval_every=0",
               "--schedule=constant", "--batch_size=2", "--lr=1e-2", "--seq_len=300")
    curve = losses(sees.folder / "run")
    assert curve[0] > 3 and max(curve[-4:]) < 0.1


@pytest.mark.slow
def test_what_is_frozen_stays_on_two_ranks_with_shards_and_muon(sees):
    options = ["--zero1=true", "--optimizer=muon", "--micro_batch_size=1"]
    sees.start("start", "--num_steps=2", *options, ranks=2)
    sees.start("run", "--num_steps=4", f"--init_from={sees.folder / 'start'}", "--freeze_tower=true",
               *options, ranks=2)
    before, after = final_weights(sees.folder / "start"), final_weights(sees.folder / "run")
    for name in before:
        assert torch.equal(before[name], after[name]) == name.startswith("vision.tower."), name


def test_a_text_model_learns_to_see(sees, request, chat_set):
    text = make_stage("train_sft.py", request, sees.folder)
    text("text", "--num_steps=3")
    before = final_weights(sees.folder / "text")
    result = sees.start("seeing", "--num_steps=3", f"--init_from={sees.folder / 'text'}", "--freeze_llm=true")
    assert "weights of" in result.stdout and "of the parameters, random; " in result.stdout
    after = final_weights(sees.folder / "seeing")
    assert all(torch.equal(before[name], after[name]) for name in before) and len(after) > len(before)
    result = sees.start("more", "--num_steps=3", f"--init_from={sees.folder / 'seeing'}")
    assert "random" not in result.stdout
    result = text("blind", "--num_steps=3", f"--init_from={sees.folder / 'seeing'}", check=False)
    assert_one_line(result, "a model with vision; only train_sft.py, on a set with images, and sample.py")
    dpo = make_stage("train_dpo.py", request, sees.folder)
    assert_one_line(dpo("dpo", "--num_steps=1", f"--init_from={sees.folder / 'seeing'}", check=False),
                    "a model with vision")


@pytest.mark.parametrize("options, message", [
    (["--vision.patch_size=7"], "--vision.patch_size=7: must be a power of 2, at least 2, and divide"),
    (["--vision.patchsize=7"], "unknown option --vision.patchsize; did you mean --vision.patch_size?"),
    (["--vision.tower=nowhere.py:x"], "--vision.tower=nowhere.py:x: no file nowhere.py"),
    (["--vision.tower=tests/some_rewards.py:twice"], "--vision.tower=tests/some_rewards.py:twice: raised")])
def test_mistakes_are_answered_by_one_line(sees, options, message):
    assert_one_line(sees.plain("run", "--num_steps=2", *options, check=False), message)
    assert not (sees.folder / "run").exists()


def test_a_set_or_options_that_do_not_fit_are_refused(sees, request, image_set, tmp_path):
    sees.start("run", "--num_steps=2")
    start = f"--init_from={sees.folder / 'run'}"
    assert_one_line(sees.start("a", "--num_steps=2", start, "--vision.n_layer=2", check=False),
                    "--vision.n_layer=2: the checkpoint has 1, which cannot change")
    run("data/prepare.py", "images", f"--input={image_set.parent}/rows.jsonl", "--val_frac=0.2",
        "--image_size=32", "--tokens_per_image=4", f"--out_dir={tmp_path}/larger")
    assert_one_line(sees.start("a", "--num_steps=2", start, f"--data_dir={tmp_path}/larger", check=False),
                    "has seen images as {'image_size': 16")
    text = make_stage("train_sft.py", request, tmp_path)
    for option in ("--freeze_llm=true", "--freeze_tower=true", "--vision.n_layer=2"):
        assert_one_line(text("b", "--num_steps=2", option, check=False), "has no images")
    kd = make_stage("train_kd.py", request, tmp_path)
    assert_one_line(kd("c", "--num_steps=2", "--data_dir=image_set", check=False),
                    "a set with images; only train_sft.py learns from these")
    pre = make_stage("train_pretrain.py", request, tmp_path)
    assert_one_line(pre("d", "--num_steps=2", "--data_dir=image_set", check=False), "a set of kind chat")


# -----------------------------------------------------------------------------
# sample.py

@pytest.fixture(scope="module")
def seeing_run(image_set, tmp_path_factory):
    """A run that tells colours"""
    out = tmp_path_factory.mktemp("seeing") / "run"
    run("train_sft.py", *TINY, *SEES[1:], f"--data_dir={image_set}", f"--out_dir={out}", "--num_steps=250",
        "--seq_len=150", "--eval_every=0", "--model.n_embd=32")
    assert losses(out)[-1] < 0.1
    return out


def ask(seeing_run, image_set, images, *options, **more):
    return run("sample.py", f"--init_from={seeing_run}", "--chat=true", "--device=cpu", "--temperature=0",
               "--max_new_tokens=20", f"--image={','.join(str(image_set.parent / name) for name in images)}",
               *options, **more)


def test_a_picture_is_asked_about(seeing_run, image_set):
    for images, said in ((["0.png"], "red"), (["1.png"], "blue"), (["2.png", "3.png"], "lime,gold"),
                         (["3.png", "2.png"], "gold,lime")):
        for stream_it in ("true", "false"):
            result = ask(seeing_run, image_set, images, "--prompt=what", f"--stream={stream_it}")
            assert result.stdout == said + "\n"
    assert run("sample.py", f"--init_from={seeing_run}", "--chat=true", "--device=cpu", "--temperature=0",
               "--prompt=what", "--max_new_tokens=20").stdout == "none\n"
    plain = run("sample.py", f"--init_from={seeing_run}", "--device=cpu", "--max_new_tokens=5",
                "--prompt=abc", f"--image={image_set.parent}/0.png").stdout
    assert plain.startswith("abc")


def test_the_tower_looks_once_at_a_picture(seeing_run, image_set, monkeypatch, capsys):
    import sample as script
    model, tokenizer = script.load(str(seeing_run), "cpu")
    looks = []
    model.vision.tower.register_forward_hook(lambda tower, args, out: looks.append(len(out)))
    shown = Shown([str(image_set.parent / name) for name in ("0.png", "1.png")], model)
    turns, cfg = [], script.Config(chat=True, max_new_tokens=8, num_samples=3, temperature=0.0)
    for text in ("what", "what", "what"):
        script.reply(model, tokenizer, turns, text, cfg, shown)
    assert looks == [2] and capsys.readouterr().out.startswith("--- sample 1 of 3\nred,blu")


def test_a_prompt_with_a_picture_leaves_room_for_what_follows(seeing_run, image_set):
    for n, code in ((150 - 4, 2), (150 - 5, 0)):
        result = run("sample.py", f"--init_from={seeing_run}", "--device=cpu", f"--prompt={'a' * n}",
                     "--max_new_tokens=2", f"--image={image_set.parent}/0.png", check=False)
        assert result.returncode == code, result.stderr


def test_a_conversation_keeps_its_picture_until_it_is_forgotten(seeing_run, image_set, monkeypatch):
    said = ask(seeing_run, image_set, ["1.png"], input="what\n/reset\nwhat\n\n").stdout
    assert [reply.strip() for reply in said.split("you> ")[1:]] == ["blue", "(forgotten)", "blue", ""]
    import sample as script
    asked = []
    monkeypatch.setattr(script, "answer", lambda model, tokenizer, ids, cfg, seed, inputs:
                        asked.append((torch.tensor(ids) == IMAGE, inputs)) or [1, 2])
    model, tokenizer = script.load(str(seeing_run), "cpu")
    shown = Shown([str(image_set.parent / "1.png")], model)
    cfg, turns = script.Config(chat=True, max_new_tokens=30), []
    for number in range(20):
        script.reply(model, tokenizer, turns, f"who{number}?", cfg, shown)
    counts = [int(is_image.sum()) for is_image, _ in asked]
    assert counts == sorted(counts, reverse=True) and set(counts) == {4, 0}
    for (is_image, inputs), count in zip(asked, counts):
        assert inputs is None if count == 0 else torch.equal(inputs[0][is_image], shown.features[0])


@pytest.mark.parametrize("content, message", [
    (None, "no such file"), (b"GIF89a?", "not a picture that can be read")])
def test_a_picture_that_cannot_be_read_is_one_line(seeing_run, image_set, tmp_path, content, message):
    if content is not None:
        (tmp_path / "x.png").write_bytes(content)
    result = run("sample.py", f"--init_from={seeing_run}", "--chat=true", "--prompt=what", "--device=cpu",
                 f"--image={tmp_path}/x.png", check=False)
    assert_one_line(result, f"--image={tmp_path}/x.png: {message}")


def test_a_text_model_shows_no_pictures(teacher_run, image_set):
    result = run("sample.py", f"--init_from={teacher_run}", "--prompt=a", "--device=cpu",
                 f"--image={image_set.parent}/0.png", check=False)
    assert_one_line(result, "the model has no vision")


@pytest.mark.parametrize("resize", ["stretch", "crop", "pad"])
def test_pictures_become_squares(tmp_path, resize):
    image = Image.new("RGB", (60, 20), "lime")
    image.paste("red", (20, 0, 40, 20))
    image.save(tmp_path / "x.png")
    found = load_image(tmp_path / "x.png", {**INFO, "image_size": 12, "resize": resize})
    middle, corner = found[6, 6].tolist(), found[1, 1].tolist()
    assert middle == [255, 0, 0]
    assert corner == {"stretch": [0, 255, 0], "crop": [255, 0, 0], "pad": [0, 0, 0]}[resize]


def test_transparent_grey_and_turned_pictures_are_read(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    Image.new("L", (4, 4), 77).save(tmp_path / "grey.png")
    turned = Image.new("RGB", (8, 16), "red")
    turned.paste("blue", (0, 8, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 3                                          # held upside down
    turned.save(tmp_path / "turned.png", exif=exif)
    small = {**INFO, "image_size": 4}
    assert load_image(tmp_path / "clear.png", small)[0, 0].tolist() == [255, 255, 255]
    assert load_image(tmp_path / "grey.png", small)[0, 0].tolist() == [77, 77, 77]
    assert load_image(tmp_path / "turned.png", small)[0, 0].tolist() == [0, 0, 255]
    Image.new("I;16", (4, 4), 300).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="pixels of mode I;16; convert it to 8 bits"):
        load_image(tmp_path / "deep.png", small)


def test_without_pillow_it_says_what_to_install(image_set, tmp_path):
    code = ("import runpy, sys; sys.modules['PIL'] = None; sys.argv = ['x', *sys.argv[1:]]; "
            f"runpy.run_path({str(ROOT / 'data/prepare.py')!r}, run_name='__main__')")
    (tmp_path / "without.py").write_text(code)
    result = run(tmp_path / "without.py", "images", f"--input={image_set.parent}/rows.jsonl",
                 f"--out_dir={tmp_path}/x", check=False)
    assert_one_line(result, 'Pillow is missing, which reads pictures: pip install pillow')
    assert not os.path.exists(tmp_path / "x")
