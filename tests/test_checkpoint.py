"""Checkpoints: whole or not at all, whatever fails in writing; damaged ones are refused (PITFALLS 18, 19)."""
import errno
import io
import json
import os
import pickle
import signal
import zipfile

import numpy as np
import pytest
import torch

from common import checkpoint
from common.errors import UserError
from common.model import GPT, ModelConfig
from common.optim import parameter_groups
from common.zero1 import ShardedOptimizer

FAULT_POINTS = [(os, "fsync"), (os, "rename"), (torch, "save"), (os, "makedirs"), (os.path, "getsize")]


def new_run(seed=0):
    torch.manual_seed(seed)
    model = GPT(ModelConfig(vocab_size=11, seq_len=8, n_layer=1, n_head=2, n_embd=8))
    return model, ShardedOptimizer(parameter_groups(model))


def train_a_little(model, optimizer):
    optimizer.lr = 1e-2
    model(torch.arange(8)[None]).square().sum().backward()
    optimizer.step(1.0)


def save(folder, step, model, optimizer, val_loss=None, keep_last=5):
    info = dict(model={}, config={}, identity={}, fingerprint="f")
    return checkpoint.save(str(folder), step, model, optimizer, info, {"tokenizer_info.json": b"{}"},
                           keep_last, val_loss)


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def loaded(folder):
    model, optimizer = new_run(seed=99)
    checkpoint.load_weights(folder, model)
    checkpoint.load_optimizer(folder, optimizer)
    return model, optimizer


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def fail_at(monkeypatch, number, action):
    """From now on the number-th call of any fault point does action() first. -> list that counts the calls"""
    calls = []
    for module, name in FAULT_POINTS:
        def wrapped(*args, name=name, original=getattr(module, name), **kwargs):
            calls.append(name)
            if len(calls) == number:
                action()
            return original(*args, **kwargs)
        monkeypatch.setattr(module, name, wrapped)
    return calls


def disk_full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_checkpoint_brings_back_weights_and_optimizer_bit_for_bit(tmp_path):
    model, optimizer = new_run()
    train_a_little(model, optimizer)
    assert save(tmp_path, 1, model, optimizer)
    again, its_optimizer = loaded(checkpoint.latest(str(tmp_path)))
    assert equal(model, again)
    train_a_little(model, optimizer)
    train_a_little(again, its_optimizer)
    assert equal(model, again) and its_optimizer.num_updates == 2


def test_disk_full_at_any_point_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, capsys):
    model, optimizer = new_run()
    assert save(tmp_path, 1, model, optimizer)
    before = weights(model)
    train_a_little(model, optimizer)
    after = weights(model)
    for number in range(1, 100):
        with monkeypatch.context() as patch:
            calls = fail_at(patch, number, disk_full)
            ok = save(tmp_path, 2, model, optimizer)
        folder = checkpoint.latest(str(tmp_path))
        again, _ = loaded(folder)
        expected = after if folder.endswith("2") else before
        assert all(torch.equal(a, b) for a, b in zip(expected, weights(again), strict=True))
        if folder.endswith("2"):  # whole, so only what follows the rename can have failed
            assert ok or (calls[number - 1] == "fsync" and "rename" in calls[:number]), (number, calls)
            break
        assert not ok
    assert number > 10, "the faults were not reached"
    assert "earlier checkpoints are untouched" in capsys.readouterr().err


def test_kill_9_at_any_point_keeps_a_whole_checkpoint(tmp_path, monkeypatch):
    model, optimizer = new_run()
    assert save(tmp_path, 1, model, optimizer)
    before = weights(model)
    train_a_little(model, optimizer)
    after = weights(model)
    killed = 0
    for number in range(1, 100):
        child = os.fork()
        if child == 0:
            fail_at(monkeypatch, number, lambda: os.kill(os.getpid(), signal.SIGKILL))
            save(tmp_path, 2, model, optimizer)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        folder = checkpoint.latest(str(tmp_path))
        again, _ = loaded(folder)
        expected = after if folder.endswith("2") else before
        assert all(torch.equal(a, b) for a, b in zip(expected, weights(again), strict=True))
        if not os.WIFSIGNALED(status):
            break
        killed += 1
    assert killed > 10 and folder.endswith("2")
    assert not list(tmp_path.glob(".step*")), "what killed saves left was not cleaned up"


@pytest.mark.parametrize("name", ["model.pt", "optimizer_0_of_1.pt", "tokenizer_info.json",
                                  "checkpoint.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_a_damaged_file_is_refused_and_the_checkpoint_before_is_used(tmp_path, name, damage, capsys):
    model, optimizer = new_run()
    assert save(tmp_path, 1, model, optimizer) and save(tmp_path, 2, model, optimizer)
    path = tmp_path / "step_000002" / name
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content if damage == "flip" else content[:len(content) // 2])
    if (name, damage) != ("checkpoint.json", "flip"):  # one flipped bit of JSON may still be the same JSON
        assert checkpoint.latest(str(tmp_path)).endswith("step_000001")
        assert "step_000002" in capsys.readouterr().err
        with pytest.raises(UserError, match="step_000002"):
            checkpoint.verify(str(tmp_path / "step_000002"))


def test_a_missing_shard_is_refused(tmp_path):
    model, optimizer = new_run()
    assert save(tmp_path, 1, model, optimizer)
    folder = tmp_path / "step_000001"
    manifest = json.loads((folder / "checkpoint.json").read_text())
    (folder / "optimizer_0_of_1.pt").rename(folder / "optimizer_0_of_2.pt")
    state = torch.load(folder / "optimizer_0_of_2.pt", weights_only=True)
    torch.save({**state, "shards": 2}, folder / "optimizer_0_of_2.pt")
    manifest["files"] = {"optimizer_0_of_2.pt": {}}
    (folder / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="1 of its 2 shards"):
        checkpoint.load_optimizer(str(folder), optimizer)


def test_a_malicious_file_is_refused_and_does_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)
    model, optimizer = new_run()
    assert save(tmp_path, 1, model, optimizer)
    path = tmp_path / "step_000001" / "model.pt"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, pickle.dumps(Payload()) if name.endswith("data.pkl") else content)
    with pytest.raises(UserError, match="model.pt: refused or damaged"):
        checkpoint.load_weights(str(path.parent), model)
    assert not (tmp_path / "owned").exists()


def test_the_last_k_and_the_best_are_kept(tmp_path):
    model, optimizer = new_run()
    for step, val_loss in enumerate([3.0, 1.0, 2.0, 2.5, 2.2], start=1):
        assert save(tmp_path, step, model, optimizer, val_loss, keep_last=2)
    kept = [os.path.basename(f) for f in checkpoint.steps(str(tmp_path))]
    assert kept == ["step_000002", "step_000004", "step_000005"]


def test_the_checkpoint_just_saved_stays_when_later_ones_are_damaged(tmp_path):
    model, optimizer = new_run()
    for step in (1, 4, 5):
        assert save(tmp_path, step, model, optimizer)
    for step in (4, 5):
        (tmp_path / f"step_00000{step}" / "model.pt").write_bytes(b"damaged")
    assert save(tmp_path, 2, model, optimizer, keep_last=1)
    assert checkpoint.latest(str(tmp_path)).endswith("step_000002")


def test_a_loss_that_is_not_a_number_is_never_the_best(tmp_path):
    model, optimizer = new_run()
    for step, val_loss in enumerate([float("nan"), 2.0, 3.0], start=1):
        assert save(tmp_path, step, model, optimizer, val_loss, keep_last=1)
    assert [os.path.basename(f) for f in checkpoint.steps(str(tmp_path))] == ["step_000002", "step_000003"]
    assert checkpoint.read_manifest(str(tmp_path / "step_000002"))["val_loss"] == 2.0


def test_a_run_with_damaged_checkpoints_only_is_not_started_again(tmp_path):
    model, optimizer = new_run()
    assert checkpoint.latest(str(tmp_path)) is None
    assert save(tmp_path, 1, model, optimizer)
    (tmp_path / "step_000001" / "model.pt").unlink()
    with pytest.raises(UserError, match="none of its checkpoints is whole"):
        checkpoint.latest(str(tmp_path))


def test_another_architecture_is_named(tmp_path):
    model, optimizer = new_run()
    assert save(tmp_path, 1, model, optimizer)
    other = GPT(ModelConfig(vocab_size=11, seq_len=8, n_layer=2, n_head=2, n_embd=8))
    with pytest.raises(UserError, match=r"another architecture: blocks.1.attn.* is absent there"):
        checkpoint.load_weights(str(tmp_path / "step_000001"), other)


def test_another_models_weights_lie_beside_those_of_the_run_and_come_back_bit_for_bit(tmp_path):
    model, optimizer = new_run()
    train_a_little(model, optimizer)
    reference = new_run(seed=5)[0].to(torch.bfloat16)
    files = checkpoint.weights_file("reference.pt", reference)
    assert list(files) == ["reference.pt"] and not equal(model, reference)
    info = dict(model={}, config={}, identity={}, fingerprint="f")
    assert checkpoint.save(str(tmp_path), 1, model, optimizer, info, {"tokenizer_info.json": b"{}"} | files)
    folder = checkpoint.latest(str(tmp_path))
    again = new_run(seed=9)[0].to(torch.bfloat16)
    checkpoint.load_weights(folder, again, "reference.pt")
    assert equal(again, reference) and equal(loaded(folder)[0], model)
    (tmp_path / "step_000001" / "reference.pt").write_bytes(files["reference.pt"][:-1] + b"x")
    with pytest.raises(UserError, match="none of its checkpoints is whole"):
        checkpoint.latest(str(tmp_path))


def test_a_file_of_weights_does_not_follow_the_model_and_no_model_has_none():
    model, optimizer = new_run()
    files, before = checkpoint.weights_file("a.pt", model), weights(model)
    train_a_little(model, optimizer)
    assert checkpoint.weights_file("a.pt", model) != files
    kept = torch.load(io.BytesIO(files["a.pt"]), weights_only=True)
    assert all(map(torch.equal, [kept[name] for name, _ in model.named_parameters()], before))
    assert checkpoint.weights_file("a.pt", None) == {}


@pytest.mark.parametrize("make, message", [
    (lambda p: str(p / "nowhere"), "no such run or checkpoint"),
    (lambda p: str(p), "no whole checkpoint there")])
def test_a_path_without_a_checkpoint_is_one_clear_line(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        checkpoint.find(make(tmp_path))


# -----------------------------------------------------------------------------
# the fingerprint of weights

class Weights(torch.nn.Module):
    """A model of these tensors, by name."""
    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def test_a_fingerprint_follows_every_weight_and_survives_a_reload(tmp_path):
    model, optimizer = new_run()
    prints = {checkpoint.fingerprint(model)}
    assert save(tmp_path, 1, model, optimizer)
    for weight in model.parameters():
        for at in (0, -1):
            flat = weight.detach().view(-1)
            before = flat[at].clone()
            flat[at] = torch.nextafter(before, before + 1)              # by its last bit
            prints.add(checkpoint.fingerprint(model))
            flat[at] = before
    assert len(prints) == 1 + 2 * len(list(model.parameters()))
    again, _ = loaded(checkpoint.latest(str(tmp_path)))
    assert checkpoint.fingerprint(again) == checkpoint.fingerprint(model) in prints
    assert checkpoint.fingerprint(new_run(seed=1)[0]) not in prints


def test_a_fingerprint_follows_names_shapes_dtypes_and_order():
    x, y = torch.arange(6.0), -torch.arange(6.0)
    models = [Weights(a=x, b=y), Weights(a=y, b=x), Weights(a=x, c=y), Weights(a=x), Weights(a=x, b=y[:5]),
              Weights(a=x.view(2, 3), b=y), Weights(a=x.view(3, 2), b=y), Weights(a=torch.cat([x, y])),
              Weights(a=x.view(torch.int32), b=y), Weights(a=x.double(), b=y), Weights(a=x.bfloat16(), b=y),
              Weights(a=x.bfloat16().view(torch.int16), b=y)]
    assert len({checkpoint.fingerprint(model) for model in models}) == len(models)
    strided = torch.stack([x, y], dim=1)[:, 0]                          # the same numbers, not side by side
    assert checkpoint.fingerprint(Weights(a=strided, b=y)) == checkpoint.fingerprint(models[0])


def test_a_bfloat16_model_has_a_fingerprint_too():
    model, other = (new_run()[0].bfloat16() for _ in range(2))
    assert checkpoint.fingerprint(model) == checkpoint.fingerprint(other)
    assert checkpoint.fingerprint(model) != checkpoint.fingerprint(new_run()[0])
    other.embed.weight.data[3, 5] += 1
    assert checkpoint.fingerprint(model) != checkpoint.fingerprint(other)


# -----------------------------------------------------------------------------
# arrays that belong to something

ARRAYS = dict(train=np.linspace(-90, -1, 4000, dtype=np.float32).reshape(2000, 2),
              val=np.zeros((0, 2), np.float32))


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "arrays.npz")


def same_arrays(arrays):
    return arrays is not None and list(arrays) == list(ARRAYS) and all(
        arrays[name].dtype == array.dtype and np.array_equal(arrays[name], array)
        for name, array in ARRAYS.items())


def test_arrays_come_back_for_their_own_key_only(path):
    assert checkpoint.read_arrays(path, "weights data") is None         # there is no file
    checkpoint.write_arrays(path, "weights data", ARRAYS)
    assert same_arrays(checkpoint.read_arrays(path, "weights data"))
    assert os.listdir(os.path.dirname(path)) == ["arrays.npz"]
    for key in ("weights", "weights data ", "Weights data", "", "other"):
        assert checkpoint.read_arrays(path, key) is None
    checkpoint.write_arrays(path, "other", dict(train=ARRAYS["train"] + 1))
    assert checkpoint.read_arrays(path, "weights data") is None
    again = checkpoint.read_arrays(path, "other")
    assert list(again) == ["train"] and np.array_equal(again["train"], ARRAYS["train"] + 1)


def test_arrays_cut_short_and_files_of_another_kind_hold_none(path):
    checkpoint.write_arrays(path, "key", ARRAYS)
    with open(path, "rb") as file:
        content = file.read()
    others = [b"", b"text", b"\x00" * 500, b"PK\x03\x04", pickle.dumps(ARRAYS), content[100:]]
    for damaged in [content[:n] for n in (*range(0, len(content), 397), len(content) - 1)] + others:
        with open(path, "wb") as file:
            file.write(damaged)
        assert checkpoint.read_arrays(path, "key") is None
    np.savez(path, **ARRAYS)                                            # without a key
    assert checkpoint.read_arrays(path, "key") is None
    os.unlink(path)
    os.mkdir(path)
    assert checkpoint.read_arrays(path, "key") is None


DAMAGES = {                                            # content, place of the zip directory -> content
    "a digit of a shape": lambda x, at: x.replace(b"(2000, 2)", b"(1000, 2)"),
    "zip version": lambda x, at: x[:at + 6] + b"\xff" + x[at + 7:],
    "encrypted": lambda x, at: x[:at + 8] + b"\x01" + x[at + 9:],
    "a comment that hides the rest": lambda x, at: x[:at + 32] + b"\xff" + x[at + 33:],
}


@pytest.mark.parametrize("damage", [*DAMAGES, "a bit", ".npy"])
def test_damaged_arrays_are_none_or_as_they_were(path, damage):
    checkpoint.write_arrays(path, "key", ARRAYS)
    with open(path, "rb") as file:
        content = file.read()
    if damage == "a bit":
        rng, contents = np.random.default_rng(0), []
        for at, bit in zip(rng.integers(-400, 400, 200), rng.integers(0, 8, 200)):   # around both ends
            damaged = bytearray(content)
            damaged[at] ^= 1 << int(bit)
            contents.append(bytes(damaged))
    elif damage == ".npy":
        contents = [content[content.index(b"\x93NUMPY"):]]
    else:
        contents = [DAMAGES[damage](content, content.index(b"PK\x01\x02"))]
    for damaged in contents:
        assert damaged != content
        with open(path, "wb") as file:
            file.write(damaged)
        arrays = checkpoint.read_arrays(path, "key")
        assert arrays is None or same_arrays(arrays)


def test_pickled_arrays_are_refused_and_do_not_run(path, tmp_path):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)
    np.savez(path, key=np.array("key"), train=np.array([Payload()], object))
    assert checkpoint.read_arrays(path, "key") is None
    np.savez(path, key=np.array(Payload(), object), train=ARRAYS["train"])
    assert checkpoint.read_arrays(path, "key") is None
    with open(path, "wb") as file:
        pickle.dump(Payload(), file)
    assert checkpoint.read_arrays(path, "key") is None
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(Payload()))
    assert (tmp_path / "owned").exists()                                # an ordinary unpickler runs it


@pytest.mark.parametrize("name", ["fsync", "replace"])
def test_a_disk_that_fills_leaves_the_arrays_before_as_they_were(path, monkeypatch, name):
    checkpoint.write_arrays(path, "old", ARRAYS)
    with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left"):
        patch.setattr(os, name, lambda *args, **kwargs: disk_full())
        checkpoint.write_arrays(path, "new", ARRAYS)
    assert same_arrays(checkpoint.read_arrays(path, "old"))
    checkpoint.write_arrays(path, "new", ARRAYS)
    assert same_arrays(checkpoint.read_arrays(path, "new"))
    assert os.listdir(os.path.dirname(path)) == ["arrays.npz"]


def test_kill_9_while_arrays_are_written_leaves_those_before(path, monkeypatch):
    checkpoint.write_arrays(path, "old", ARRAYS)
    for name in ("fsync", "replace"):
        child = os.fork()
        if child == 0:
            monkeypatch.setattr(os, name, lambda *args: os.kill(os.getpid(), signal.SIGKILL))
            checkpoint.write_arrays(path, "new", ARRAYS)
            os._exit(0)
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
        assert same_arrays(checkpoint.read_arrays(path, "old"))
    checkpoint.write_arrays(path, "new", ARRAYS)
    assert same_arrays(checkpoint.read_arrays(path, "new"))
