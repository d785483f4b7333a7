"""
Checkpoints: directories that appear whole or not at all.

    out_dir/step_000500/
        model.pt               weights, by name
        optimizer_0_of_2.pt    one file per ZeRO-1 shard (optimizer_0_of_1.pt when replicated)
        tokenizer_info.json    and the vocabulary file
        checkpoint.json        step, val_loss, configs, and size and sha256 of every file above;
                               written last

A checkpoint is written to a folder aside, flushed to disk and renamed, so a crash at any moment
leaves the earlier ones as they were. Loading checks every file first; `latest` steps back to the
one before when something is damaged. Files are read with weights_only=True: they can hold tensors
and plain values, never code.
"""

import hashlib
import io
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from common import dist
from common.errors import UserError

MANIFEST = "checkpoint.json"


# -----------------------------------------------------------------------------
# writing


def save(out_dir, step, model, optimizer, info, files, keep_last=2, val_loss=None, last=False):
    """
    Write out_dir/step_NNNNNN on all ranks together. info: plain values that a resume compares or
    needs (model config, config, data). files: dict of name to bytes, such as tokenizer.files().
    optimizer: None where there is none. keep_last: how many of the latest to keep, next to the best
    by val_loss. -> True, or False when it could not be written (disk full): the run may go on,
    nothing is lost. last: the run ends here, so that a failure is a UserError.
    """
    name = f"step_{step:06d}"
    target, aside = os.path.join(out_dir, name), os.path.join(out_dir, f".{name}.partial")
    sums, error = {}, None
    if val_loss is not None and not math.isfinite(val_loss):
        # JSON has no nan, and it is not the best
        val_loss = None
    try:
        dist.from_rank_zero(lambda: _make_room(out_dir, aside))
        if dist.world()[0] == 0:
            for file_name, content in files.items():
                sums[file_name] = _write(
                    aside, file_name, lambda f, content=content: f.write(content)
                )
            sums["model.pt"] = _write(
                aside, "model.pt", lambda f: torch.save(_on_cpu(model.state_dict()), f)
            )
        state = optimizer.state_dict() if optimizer else None
        if state and (dist.world()[0] == 0 or state["shards"] > 1):
            shard = f"optimizer_{state['shard']}_of_{state['shards']}.pt"
            sums[shard] = _write(aside, shard, lambda f: torch.save(_on_cpu(state), f))
    # torch.save turns a failed write into a RuntimeError
    except (OSError, RuntimeError) as problem:
        error = f"{type(problem).__name__}: {str(problem).splitlines()[0]}"
    everyone = dist.gather_objects((sums, error))
    error = next((e for _, e in everyone if e), None)

    def publish():
        if error:
            return error
        try:
            manifest = dict(
                step=step,
                val_loss=val_loss,
                **info,
                files={k: v for s, _ in everyone for k, v in s.items()},
            )
            _write(
                aside, MANIFEST, lambda f: f.write((json.dumps(manifest, indent=1) + "\n").encode())
            )
            _sync_folder(aside)
            # damaged, or the run would have resumed from it
            if os.path.exists(target):
                shutil.rmtree(target + ".damaged", ignore_errors=True)
                os.rename(target, target + ".damaged")
            os.rename(aside, target)
            _sync_folder(out_dir)
            _prune(out_dir, keep_last, target)
        except OSError as problem:
            return f"{type(problem).__name__}: {problem}"
        return None

    error = dist.from_rank_zero(publish)
    if error and dist.world()[0] == 0:
        print(
            f"warning: {target} was not saved ({error}); earlier checkpoints are untouched",
            file=sys.stderr,
            flush=True,
        )
        shutil.rmtree(aside, ignore_errors=True)
    if error and last:
        raise UserError(
            f"--out_dir={out_dir}: the last checkpoint could not be saved; "
            "make room and continue with --resume=true"
        )
    return error is None


def _write(folder, name, write):
    path = os.path.join(folder, name)
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    return dict(bytes=os.path.getsize(path), sha256=_sha256(path))


def _sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(path):
    """A rename is on disk only once the folder that holds the name is."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _on_cpu(value):
    """
    Tensors to the CPU, views cut out of the buffer they look into (torch.save would write all of
    it).
    """
    if torch.is_tensor(value):
        value = value.detach().cpu()
        whole = value.untyped_storage().nbytes() // value.element_size()
        return value if value.numel() == whole else value.clone()
    if isinstance(value, dict):
        return {k: _on_cpu(v) for k, v in value.items()}
    return [_on_cpu(v) for v in value] if isinstance(value, list) else value


def _make_room(out_dir, aside):
    """Make the folder aside, and remove what killed saves have left."""
    for name in os.listdir(out_dir):
        if re.fullmatch(r"\.step_\d+\.partial", name):
            shutil.rmtree(os.path.join(out_dir, name))
    os.makedirs(aside)


def _prune(out_dir, keep_last, newest):
    """
    Keep the last keep_last checkpoints up to `newest`, just saved, and that with the lowest
    val_loss.
    """
    folders = steps(out_dir)
    # later ones are damaged: left for the user to see
    folders = folders[: folders.index(newest) + 1]
    losses = {}
    for folder in folders:
        try:
            losses[folder] = read_manifest(folder)["val_loss"]
        except UserError:
            # damaged: not the best of anything, and left too
            continue
    scored = [f for f in losses if losses[f] is not None]
    keep = {newest, *folders[-keep_last:]} | ({min(scored, key=losses.get)} if scored else set())
    for folder in losses:
        if folder not in keep:
            shutil.rmtree(folder)


# -----------------------------------------------------------------------------
# reading


def steps(out_dir):
    """The checkpoint folders of a run, oldest first."""
    names = os.listdir(out_dir) if os.path.isdir(out_dir) else []
    found = sorted((int(m[1]), name) for name in names if (m := re.fullmatch(r"step_(\d+)", name)))
    return [os.path.join(out_dir, name) for _, name in found]


def read_manifest(folder):
    """-> checkpoint.json as a dict"""
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
        manifest["files"], manifest["step"], manifest["val_loss"], manifest["model"]
        return manifest
    except FileNotFoundError:
        raise UserError(f"{folder}: not a checkpoint (no {MANIFEST})") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error})") from None


def verify(folder):
    """
    Compare files with their recorded size and sha256; UserError names the first to differ. ->
    manifest
    """
    manifest = read_manifest(folder)
    for name, expected in manifest["files"].items():
        path = os.path.join(folder, name)
        if not os.path.isfile(path):
            raise UserError(f"{folder}: damaged checkpoint, {name} is missing")
        if os.path.getsize(path) != expected["bytes"] or _sha256(path) != expected["sha256"]:
            raise UserError(f"{folder}: damaged checkpoint, {name} is not what was saved")
    return manifest


def latest(out_dir):
    """The newest checkpoint of a run that is whole, or None. Says which ones it passed over."""

    def search():
        for folder in reversed(steps(out_dir)):
            try:
                verify(folder)
                return folder
            except UserError as error:
                print(f"warning: {error}; trying the one before", file=sys.stderr, flush=True)
        if steps(out_dir):
            raise UserError(
                f"{out_dir}: none of its checkpoints is whole; train it again, in a new folder"
            )
        return None

    return dist.from_rank_zero(search)


def find(path):
    """
    path: a run directory (its latest whole checkpoint) or one checkpoint folder -> the folder,
    verified
    """
    if not os.path.isdir(path):
        raise UserError(
            f"{path}: no such run or checkpoint; expected a stage's --out_dir, or a step_* in it"
        )
    if os.path.exists(os.path.join(path, MANIFEST)):
        dist.from_rank_zero(lambda: verify(path) and None)
        return path
    folder = latest(path)
    if folder is None:
        raise UserError(f"{path}: no whole checkpoint there; is it a run of train_*.py?")
    return folder


@dataclass
class Source:
    """Where weights come from: a checkpoint of ours, or a folder of transformers."""

    folder: str
    # "model": fields of ModelConfig; of a checkpoint of ours, what `save` was given
    manifest: dict
    # load(model) fills a model with the weights; UserError where they do not fit
    load: Callable
    fingerprint: Callable  # () -> that of the tokenizer
    weights_id: Callable  # () -> sha256 of the weights, as hex

    def fill(self, model):
        """`load`, and UserError where a weight is not finite"""
        self.load(model)
        for name, weight in model.named_parameters():
            if not weight.isfinite().all():
                raise UserError(
                    f"{self.folder}: {name} is not finite everywhere; take an earlier checkpoint"
                )


def source(path):
    """
    path: a run (its latest whole checkpoint), a checkpoint, or a folder of transformers -> Source
    """
    if is_transformers_folder(path):
        from extras import hf

        return hf.source(path)
    return checkpoint_source(find(path))


def checkpoint_source(folder):
    """folder: of a checkpoint that is whole -> Source"""
    manifest = read_manifest(folder)
    return Source(
        folder,
        manifest,
        lambda model: load_weights(folder, model),
        lambda: manifest["fingerprint"],
        lambda: manifest["files"]["model.pt"]["sha256"],
    )


def is_transformers_folder(path):
    """Whether path has a config.json with a model_type, which runs of ours do not have in theirs"""
    try:
        with open(os.path.join(path, "config.json"), encoding="utf-8") as file:
            return "model_type" in json.load(file)
    except (OSError, ValueError, TypeError):
        return False


def load_weights(folder, model, name="model.pt"):
    """
    Fill model with the weights of a checkpoint folder; UserError when it is of another
    architecture. Where none of the model's `optional` weights are there, these stay as they are.
    """
    weights, ours = _load(os.path.join(folder, name)), model.state_dict()
    if "vision.out.weight" in weights and "vision.out.weight" not in ours:
        raise UserError(
            f"{folder}: a model with vision; only train_sft.py, on a set with images, and "
            "sample.py take it"
        )
    optional = {name: weight for name, weight in ours.items() if name.startswith(model.optional)}
    if not optional.keys() & weights.keys():
        weights |= optional
    for name in [*ours, *weights]:
        if name not in weights or name not in ours or weights[name].shape != ours[name].shape:
            theirs = tuple(weights[name].shape) if name in weights else "absent"
            mine = tuple(ours[name].shape) if name in ours else "absent"
            raise UserError(
                f"{folder}: of another architecture: {name} is {theirs} there and {mine} here"
            )
    model.load_state_dict(weights)


def weights_file(name, model):
    """
    -> {name: bytes} for the files of `save`, which `load_weights` reads again; {} for no model
    """
    content = io.BytesIO()
    if model is not None:
        torch.save(_on_cpu(model.state_dict()), content)
    return {name: content.getvalue()} if model is not None else {}


def fingerprint(model):
    """-> sha256 of a model's weights, names and all, as hex"""
    sha = hashlib.sha256()
    for name, weight in model.state_dict().items():
        sha.update(f"{name} {weight.dtype} {tuple(weight.shape)} ".encode())
        sha.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return sha.hexdigest()


def check_resume(folder, identity, num_steps):
    """
    -> the step that a run goes on from. identity: dict of what may not change between the parts of
    a run; UserError where it has, or the run is past num_steps.
    """
    manifest = read_manifest(folder)
    old = manifest["identity"]
    if other := [
        f"{name}={old.get(name)}" for name in old | identity if old.get(name) != identity.get(name)
    ]:
        raise UserError(
            f"--resume: the run has {', '.join(other)}; give it the same options and data"
        )
    if manifest["step"] > num_steps:
        raise UserError(f"--num_steps={num_steps}: the run is at step {manifest['step']} already")
    return manifest["step"]


def load_optimizer(folder, optimizer):
    """Give optimizer its part of the state in a checkpoint folder, however many ranks wrote it."""
    names = [name for name in read_manifest(folder)["files"] if name.startswith("optimizer_")]
    try:
        optimizer.load_state_dict([_load(os.path.join(folder, name)) for name in names])
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None


def _load(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged or malicious file makes torch.load raise
        raise UserError(f"{path}: refused or damaged ({type(error).__name__})") from None


# -----------------------------------------------------------------------------
# arrays that belong to something: log-probs of a reference, ...


def write_arrays(path, key, arrays):
    """
    Write a dict of arrays to path, whole or not at all: 32 bytes of SHA-256 over the rest, which is
    a .npz. key: str, what they were computed from
    """
    content = io.BytesIO()
    np.savez(content, key=np.array(key), **arrays)
    content = content.getvalue()
    try:
        _write(
            os.path.dirname(path),
            os.path.basename(path) + ".partial",
            lambda file: file.write(hashlib.sha256(content).digest() + content),
        )
        os.replace(path + ".partial", path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def read_arrays(path, key):
    """
    -> the dict of arrays, or None where path holds none, damaged ones, or those of another key
    """
    try:
        with open(path, "rb") as file:
            checksum, content = file.read(32), file.read()
    except OSError:
        return None
    if hashlib.sha256(content).digest() != checksum:
        return None
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        arrays = dict(file)
    return arrays if arrays.pop("key") == key else None
