"""A layout of one's own is an edit of `Layout`: the example of common/attention.py, a sliding window."""
import pytest
import torch
from test_model import HEADS, random_tokens, tiny_model

from common.attention import Layout

W = 5


@pytest.fixture
def window(monkeypatch):
    """The edit that the docstring of common/attention.py describes."""
    rule = Layout.may_look

    def may_look(self, i, j):
        return rule(self, i, j) & (j[:, None, None, :] > i[:, None, :, None] - W)

    def last(self, n, S, device, repeat=1):
        j = torch.arange(S, device=device)[None]
        return dict(attn_mask=self.may_look(j[:, S - n:].repeat(1, repeat), j))
    monkeypatch.setattr(Layout, "may_look", may_look)
    monkeypatch.setattr(Layout, "last", last)
    monkeypatch.setattr(Layout, "varlen_window", (W - 1, 0))


@pytest.mark.parametrize("heads", HEADS)
def test_a_window_in_one_layer_is_a_row_of_its_last_tokens(heads, request):
    """Rotary positions are relative: a query that sees W tokens is the last of a row of W."""
    model, tokens = tiny_model(n_layer=1, n_kv_head=HEADS[heads]), random_tokens(2, 20)
    with torch.no_grad():
        expected = [model(tokens[:, max(0, t + 1 - W):t + 1])[:, -1] for t in range(20)]
        whole = model(tokens)
        request.getfixturevalue("window")
        hidden = model(tokens)
    torch.testing.assert_close(hidden, torch.stack(expected, 1), atol=2e-6, rtol=1e-5)
    assert (hidden - whole).abs().max() > 0.1


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("chunks", [[11], [1] * 11, [8, 1, 1, 1], [3, 8]], ids=str)
def test_a_window_in_a_cache(window, chunks, heads):
    model, tokens = tiny_model(n_kv_head=HEADS[heads]), random_tokens(3, 11)
    cache = model.new_cache(3, 11)
    with torch.no_grad():
        hidden = torch.cat([model(part, cache=cache) for part in tokens.split(chunks, 1)], 1)
        torch.testing.assert_close(hidden, model(tokens), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("heads", HEADS)
def test_a_window_in_forked_rows(window, heads):
    """Prompts of 8 and 4, two samples each, then 1, 2 and 3 tokens of their own."""
    model, prompts, own = tiny_model(n_kv_head=HEADS[heads]), random_tokens(2, 8), random_tokens(4, 6, seed=5)
    cache, lengths = model.new_cache(2, 8), [8, 4]
    with torch.no_grad():
        model(prompts, cache=cache)
        cache.fork(lengths, 2, 6)
        hidden = torch.cat([model(part, cache=cache) for part in own.split([1, 2, 3], 1)], 1)
        for row in range(4):
            whole = torch.cat([prompts[row // 2, :lengths[row // 2]], own[row]])[None]
            torch.testing.assert_close(hidden[row], model(whole)[0, -6:], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("longest", [0, 1000], ids=["a call each", "a mask"])
def test_a_window_in_packed_documents(window, monkeypatch, longest, heads):
    model, tokens = tiny_model(n_kv_head=HEADS[heads]), random_tokens(1, 20)
    docs = torch.tensor([[1] * 9 + [2] * 3 + [3] * 8])
    monkeypatch.setattr("common.attention.by_documents", lambda *args: (False, longest))
    with torch.no_grad():
        alone = torch.cat([model(part) for part in tokens.split([9, 3, 8], 1)], 1)
        torch.testing.assert_close(model(tokens, docs), alone, atol=2e-6, rtol=1e-5)
