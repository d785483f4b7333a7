"""extras/teacher_cache.py: two runs that make one cache at once, places that no teacher was asked about."""
import contextlib
from types import SimpleNamespace

import pytest
import torch

from common.errors import UserError
from extras.teacher_cache import open_cache, write_cache

V, K, N = 11, 4, 40
LOGITS = torch.randn(N, V, generator=torch.Generator().manual_seed(0))


def rows():
    """A set of N tokens, 8 a micro-batch; the last one is no target."""
    def batch(i):
        mask = torch.arange(8 * i, 8 * i + 8)[None] < N - 1
        return SimpleNamespace(mask=mask)
    return SimpleNamespace(tokens=range(N), num_rows=5, num_batches=5, batch=batch,
                           limit=lambda num_rows: None,
                           file_offsets=lambda i: torch.arange(8 * i, 8 * i + 8)[None])


def ask(split, i, batch):
    return lambda at: LOGITS[8 * i + at]


def write(folder, asked=ask):
    write_cache(str(folder), "key", K, V, dict(train=rows()), asked, contextlib.nullcontext())


def taught(folder):
    """-> (N - 1, V) log-probs of the cache, and what it says of itself"""
    cache = open_cache(str(folder), "key", V, torch.device("cpu"))
    logits = cache.logits("train", torch.arange(N))(torch.arange(N - 1))
    return logits.log_softmax(-1), cache.info


def test_two_runs_that_make_one_cache_at_once_leave_a_whole_one(tmp_path):
    """The second starts and ends while the first is half way; both then read what a run alone has written."""
    write(tmp_path / "alone")

    def interrupted(split, i, batch):
        if i == 2:
            write(tmp_path / "shared")
        return ask(split, i, batch)
    write(tmp_path / "shared", interrupted)
    expected, info = taught(tmp_path / "alone")
    actual, theirs = taught(tmp_path / "shared")
    assert torch.equal(actual, expected) and theirs == info
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "shared"]
    top, ids = LOGITS[:N - 1].log_softmax(-1).topk(K)
    torch.testing.assert_close(expected.gather(1, ids), top, atol=2e-3, rtol=0)          # kept as float16


def test_a_killed_run_that_was_making_a_cache_does_not_disturb_the_next(tmp_path):
    def killed(split, i, batch):
        if i == 2:
            raise KeyboardInterrupt
        return ask(split, i, batch)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "cache", killed)
    assert open_cache(str(tmp_path / "cache"), "key", V, torch.device("cpu")) is None
    write(tmp_path / "cache")
    assert taught(tmp_path / "cache")[0].isfinite().all()


def test_what_the_teacher_was_not_asked_is_never_taught(tmp_path):
    write(tmp_path / "cache")
    cache = open_cache(str(tmp_path / "cache"), "key", V, torch.device("cpu"))
    with pytest.raises(UserError, match="not asked about all of these tokens"):
        cache.logits("train", torch.arange(N))(torch.tensor([3, N - 1]))
