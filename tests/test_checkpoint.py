"""Checkpoints: whole or not at all, whatever fails in writing; damaged ones are refused (PITFALLS 18, 19)."""
import errno
import json
import os
import pickle
import signal
import zipfile

import pytest
import torch

from common import checkpoint
from common.dist import UserError
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


@pytest.mark.parametrize("make, message", [
    (lambda p: str(p / "nowhere"), "no such run or checkpoint"),
    (lambda p: str(p), "no whole checkpoint there")])
def test_a_path_without_a_checkpoint_is_one_clear_line(tmp_path, make, message):
    with pytest.raises(UserError, match=message):
        checkpoint.find(make(tmp_path))
