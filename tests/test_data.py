"""Batches: each sample once per epoch, the same samples in each step for any layout, damaged sets refused."""
import json
import re

import numpy as np
import pytest
import torch

from common.data import TokenData, open_array, read_meta
from common.dist import UserError

SEQ_LEN, VOCAB = 5, 300
END = VOCAB - 1


def make_set(folder, tokens, dtype=np.uint16, vocab_size=VOCAB, end=END, splits=("train",)):
    """A set on disk, written by numpy alone; tokens: ids of each split."""
    folder.mkdir(exist_ok=True)
    for split in splits:
        np.save(folder / f"{split}.npy", np.array(tokens, dtype))
    np.save(folder / "token_bytes.npy", np.ones(vocab_size, np.uint16))
    counts = {split: dict(documents=1, tokens=len(tokens), bytes=len(tokens)) for split in splits}
    meta = dict(kind="text", vocab_size=vocab_size, end=end, fingerprint="f", splits=counts)
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """13 windows of SEQ_LEN over the tokens 0, 1, 2, ...: a window's first token tells which one it is."""
    return make_set(tmp_path_factory.mktemp("sets") / "counting", range(13 * SEQ_LEN + 3))


def open_data(folder, micro_batch_size=1, rank=0, world_size=1, seq_len=SEQ_LEN, **options):
    return TokenData(folder, "train", seq_len, micro_batch_size, rank, world_size, **options)


def windows(data, i):
    """Numbers of the windows in micro-batch i, read off the tokens themselves."""
    return (data.batch(i)[0][:, 0] // SEQ_LEN).tolist()


each_layout = pytest.mark.parametrize("micro_batch_size, world_size", [
    (8, 1), (4, 1), (2, 1), (1, 1), (4, 2), (1, 2), (2, 4), (1, 8), (3, 2), (5, 1)])


# -----------------------------------------------------------------------------
# which samples

@each_layout
def test_every_sample_comes_once_per_epoch(counting, micro_batch_size, world_size):
    ranks = [open_data(counting, micro_batch_size, rank, world_size) for rank in range(world_size)]
    per_round, epochs = micro_batch_size * world_size, 4
    assert ranks[0].num_samples == 13
    order = [w for i in range(-(-13 * epochs // per_round)) for data in ranks for w in windows(data, i)]
    for epoch in range(epochs):                        # 13 is prime: batches cross every epoch's border
        assert sorted(order[13 * epoch:13 * (epoch + 1)]) == list(range(13))


@each_layout
def test_the_order_of_samples_does_not_depend_on_the_layout(counting, micro_batch_size, world_size):
    one = open_data(counting)
    ranks = [open_data(counting, micro_batch_size, rank, world_size) for rank in range(world_size)]
    count = 5 * micro_batch_size * world_size
    order = [w for i in range(5) for data in ranks for w in windows(data, i)]
    assert order == [windows(one, i)[0] for i in range(count)]


@pytest.mark.parametrize("micro_batch_size, world_size", [
    (8, 1), (4, 1), (2, 1), (1, 1), (4, 2), (2, 2), (1, 2), (2, 4), (1, 8)])
def test_a_step_of_8_has_the_same_samples_in_every_layout(counting, micro_batch_size, world_size):
    whole = open_data(counting, 8)
    num_micro = 8 // (micro_batch_size * world_size)
    ranks = [open_data(counting, micro_batch_size, rank, world_size) for rank in range(world_size)]
    for step in range(6):
        rows = [w for data in ranks for i in range(num_micro) for w in windows(data, step * num_micro + i)]
        assert sorted(rows) == sorted(windows(whole, step))


def test_batch_is_a_pure_function(counting):
    forward, backward = open_data(counting, 4, doc_mask=True), open_data(counting, 4, doc_mask=True)
    first = {i: forward.batch(i) for i in range(12)}
    for i in [*reversed(range(12)), 3, 3, 11, 0]:
        for fresh in (backward, open_data(counting, 4, doc_mask=True)):
            assert all(torch.equal(a, b) for a, b in zip(fresh.batch(i), first[i], strict=True)), i


def test_the_global_random_states_are_neither_read_nor_moved(counting):
    orders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()
        orders.append(windows(open_data(counting, 13), 0))
        assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    assert orders[0] == orders[1]


def test_each_epoch_and_each_seed_has_an_order_of_its_own(counting):
    data = open_data(counting, 13)
    epochs = [tuple(windows(data, epoch)) for epoch in range(10)]
    other = [tuple(windows(open_data(counting, 13, seed=1), epoch)) for epoch in range(10)]
    assert len({*epochs, *other}) == 20
    assert tuple(range(13)) not in epochs


def test_an_epoch_border_inside_a_micro_batch_is_crossed_in_order(counting):
    epochs = [windows(open_data(counting, 13), epoch) for epoch in range(2)]
    data = open_data(counting, 8)
    assert windows(data, 1) == epochs[0][8:] + epochs[1][:3]
    assert windows(data, 0) == epochs[0][:8], "going back over the border"
    assert windows(open_data(counting, 39), 0) == epochs[0] + epochs[1] + windows(open_data(counting, 13), 2)


# -----------------------------------------------------------------------------
# what is in a batch

def test_targets_are_the_next_tokens(counting):
    tokens, targets, mask, docs = open_data(counting, 13).batch(0)
    assert tokens.shape == targets.shape == mask.shape == (13, SEQ_LEN) and docs is None
    assert tokens.dtype == targets.dtype == torch.int64 and mask.dtype == torch.bool
    assert mask.all() and (targets == tokens + 1).all()
    assert sorted(tokens.flatten().tolist()) == list(range(13 * SEQ_LEN))  # windows touch


def test_the_last_token_is_a_target_only(tmp_path):
    exact = open_data(make_set(tmp_path / "exact", range(2 * SEQ_LEN + 1)))
    assert exact.num_samples == 2
    assert max(exact.batch(i)[1].max().item() for i in range(2)) == 2 * SEQ_LEN
    assert open_data(make_set(tmp_path / "short", range(2 * SEQ_LEN))).num_samples == 1


@each_layout
def test_total_masks_the_rest_of_a_partial_last_step(counting, micro_batch_size, world_size):
    total = 21                                         # samples: one epoch and 8 of the next
    ranks = [open_data(counting, micro_batch_size, rank, world_size, total=total)
             for rank in range(world_size)]
    free = open_data(counting)
    counted = []
    for i in range(-(-24 // (micro_batch_size * world_size))):
        for data in ranks:
            tokens, _, mask, _ = data.batch(i)
            assert (mask.all(1) | ~mask.any(1)).all()                       # rows count whole or not at all
            counted += (tokens[mask[:, 0], 0] // SEQ_LEN).tolist()
    assert counted == [windows(free, i)[0] for i in range(total)]


# 9 is the end token. Row 0: a document that began before the row ends in it; row 1: two ends side by side (an
# empty document) and one at the row's last place
TOKENS = [1, 2, 9, 3, 4,
          9, 9, 5, 6, 9,
          7]
DOCS = [[0, 0, 0, 1, 1],
        [0, 1, 2, 2, 2]]
COUNTS = [[1, 1, 0, 1, 1],                             # what follows an end token is not a target
          [0, 0, 1, 1, 0]]


def test_documents_are_numbered_and_targets_across_their_border_do_not_count(tmp_path):
    data = open_data(make_set(tmp_path / "docs", TOKENS, end=9), 2, doc_mask=True)
    tokens, targets, mask, docs = data.batch(0)
    if tokens[0, 0] != 1:
        tokens, targets, mask, docs = (x.flip(0) for x in (tokens, targets, mask, docs))
    assert tokens.tolist() == [TOKENS[:5], TOKENS[5:10]]
    assert targets.tolist() == [TOKENS[1:6], TOKENS[6:11]]
    assert docs.tolist() == DOCS and docs.dtype == torch.int64
    assert mask.tolist() == [[bool(c) for c in row] for row in COUNTS]


def test_without_doc_mask_every_target_counts(tmp_path):
    _, _, mask, docs = open_data(make_set(tmp_path / "docs", TOKENS, end=9), 2).batch(0)
    assert docs is None and mask.all()


def test_doc_mask_and_total_work_together(tmp_path):
    folder = make_set(tmp_path / "docs", TOKENS, end=9)
    _, _, every, _ = open_data(folder, 2, doc_mask=True).batch(0)
    _, _, mask, _ = open_data(folder, 2, doc_mask=True, total=1).batch(0)
    assert torch.equal(mask[0], every[0]) and not mask[1].any()


def test_ids_above_65535_survive(tmp_path):
    ids = [0, 65_535, 65_536, 131_071, 1, 199_999, 7, 8, 9, 10, 11]
    folder = make_set(tmp_path / "large", ids, np.uint32, vocab_size=200_000, end=199_999)
    data = open_data(folder, seq_len=10)
    tokens, targets, _, _ = data.batch(0)
    assert tokens.tolist() == [ids[:10]] and targets.tolist() == [ids[1:]]


def test_splits_are_read_apart(tmp_path):
    folder = make_set(tmp_path / "both", range(50), splits=("train", "val"))
    np.save(tmp_path / "both" / "val.npy", np.arange(100, 150, dtype=np.uint16))
    assert TokenData(folder, "val", SEQ_LEN, 9).batch(0)[0].min() == 100
    assert TokenData(folder, "train", SEQ_LEN, 9).batch(0)[0].max() < 50


# -----------------------------------------------------------------------------
# what is refused

def refusal(function, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("keep", [0, 5, 60, 128, 128 + 20, -1])
@pytest.mark.parametrize("name", ["train.npy", "token_bytes.npy"])
def test_a_truncated_array_is_refused(tmp_path, name, keep):
    folder = make_set(tmp_path / "set", range(50))
    path = tmp_path / "set" / name
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(open_data, folder)
    assert str(path) in message and "prepare the set again" in message


@pytest.mark.parametrize("name", ["train.npy", "token_bytes.npy"])
@pytest.mark.parametrize("array", [np.arange(40, dtype=np.uint16), np.arange(400, dtype=np.uint16)])
def test_an_array_of_another_length_than_meta_json_says_is_refused(tmp_path, name, array):
    folder = make_set(tmp_path / "set", range(50))
    np.save(tmp_path / "set" / name, array)
    expected = 50 if name == "train.npy" else VOCAB
    assert refusal(open_data, folder) == f"{tmp_path}/set/{name}: holds {len(array)} numbers, " \
                                         f"meta.json says {expected}; prepare the set again"


@pytest.mark.parametrize("array", [
    pytest.param(np.ones(50), id="floats"), pytest.param(np.ones((50, 2), np.uint16), id="two dimensions")])
def test_an_array_that_does_not_hold_a_row_of_ids_is_refused(tmp_path, array):
    folder = make_set(tmp_path / "set", range(50))
    np.save(tmp_path / "set" / "train.npy", array)
    message = refusal(lambda: open_data(folder).batch(0))
    assert "train.npy" in message and "prepare the set again" in message


def test_an_array_of_pickled_objects_is_refused_and_not_run(tmp_path):
    class Payload:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)
    np.save(tmp_path / "x.npy", np.array([Payload()], object), allow_pickle=True)
    (tmp_path / "y.npy").write_bytes((tmp_path / "x.npy").read_bytes()[128:])        # a bare pickle
    for name in ("x.npy", "y.npy"):
        assert name in refusal(open_array, str(tmp_path / name))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["train.npy", "token_bytes.npy", "meta.json"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = make_set(tmp_path / "set", range(50))
    (tmp_path / "set" / name).unlink()
    message = refusal(open_data, folder)
    assert name in message and folder in message and "make the set with data/prepare.py" in message


def test_a_folder_that_is_not_there_is_named():
    assert refusal(open_data, "no/such/set") == "--data_dir=no/such/set: no meta.json there; " \
                                                "make the set with data/prepare.py"


@pytest.mark.parametrize("content", ["", "{", '{"vocab_size": 3', "[]", "3", "null", "{}", '{"splits": {}}',
                                     '{"splits": {"train": {}}}', "\x00\xff"])
def test_a_meta_json_that_is_not_one_of_ours_is_refused(tmp_path, content):
    folder = make_set(tmp_path / "set", range(50))
    (tmp_path / "set" / "meta.json").write_text(content, encoding="latin-1")
    message = refusal(open_data, folder)
    assert folder in message and "prepare" in message


def test_a_missing_split_is_refused_with_the_mend(tmp_path):
    folder = make_set(tmp_path / "set", range(50))
    assert refusal(TokenData, folder, "val", SEQ_LEN, 1) == \
        f"--data_dir={folder}: the set has no val split (prepare it with --val_frac or --val_input)"


def test_a_set_shorter_than_a_sequence_is_refused_with_the_mend(tmp_path):
    folder = make_set(tmp_path / "set", range(10))
    assert open_data(folder, seq_len=9).num_samples == 1
    assert refusal(open_data, folder, seq_len=10) == \
        f"{folder}/train.npy: 10 tokens, fewer than --seq_len=10 + 1; lower --seq_len or prepare more text"


@pytest.mark.parametrize("bad", [VOCAB, 65_535])
def test_an_id_outside_the_vocabulary_is_refused_with_file_and_position(tmp_path, bad):
    tokens = np.arange(31)
    tokens[17] = bad
    data = open_data(make_set(tmp_path / "set", tokens), 6)
    assert refusal(data.batch, 0) == f"{data.path}: token 17 is {bad}, but the vocabulary has {VOCAB}; " \
                                     "prepare the set again"
    good = np.arange(31)
    good[17] = VOCAB - 1
    open_data(make_set(tmp_path / "good", good), 6).batch(0)


def test_meta_json_is_what_prepare_wrote(token_set):
    meta = read_meta(str(token_set))
    assert set(meta["splits"]) == {"train", "val"} and meta["vocab_size"] == 266 and meta["end"] == 256
    for split, counts in meta["splits"].items():
        data = TokenData(str(token_set), split, 16, 1)
        assert len(data.tokens) == counts["tokens"] and data.tokens.dtype == np.uint16
        assert (data.tokens == meta["end"]).sum() == counts["documents"]
        assert data.token_bytes[torch.from_numpy(data.tokens.astype(np.int64))].sum() == counts["bytes"]
        text = bytes(data.tokens[data.tokens < 256].astype(np.uint8)).decode()
        assert len(re.findall(r"Document \d+:", text)) == counts["documents"]
