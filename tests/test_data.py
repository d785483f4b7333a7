"""Batches: each sample once per epoch, the same samples in each step for any layout, damaged sets refused."""
import json
import re

import numpy as np
import pytest
import torch

from common.branches import Branches, branches
from common.data import (
    Batch,
    ChatData,
    PairData,
    PromptData,
    TokenData,
    open_array,
    pack,
    read_meta,
)
from common.errors import UserError
from common.losses import linear_cross_entropy
from common.model import GPT, ModelConfig
from train_dpo import answer_logps

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


def open_data(folder, micro_batch_size=1, rank=0, world_size=1, seq_len=SEQ_LEN, total=np.inf, **options):
    return TokenData(folder, "train", seq_len, micro_batch_size, rank, world_size, **options).limit(total)


def parts(batch):
    return batch.tokens, batch.targets, batch.mask, batch.docs


def windows(data, i):
    """Numbers of the windows in micro-batch i, read off the tokens themselves."""
    return (data.batch(i).tokens[:, 0] // SEQ_LEN).tolist()


each_layout = pytest.mark.parametrize("micro_batch_size, world_size", [
    (8, 1), (4, 1), (2, 1), (1, 1), (4, 2), (1, 2), (2, 4), (1, 8), (3, 2), (5, 1)])


# -----------------------------------------------------------------------------
# which samples

@each_layout
def test_every_sample_comes_once_per_epoch(counting, micro_batch_size, world_size):
    ranks = [open_data(counting, micro_batch_size, rank, world_size) for rank in range(world_size)]
    per_round, epochs = micro_batch_size * world_size, 4
    assert ranks[0].num_rows == 13
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
            pairs = zip(parts(fresh.batch(i)), parts(first[i]), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), i


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
    tokens, targets, mask, docs = parts(open_data(counting, 13).batch(0))
    assert tokens.shape == targets.shape == mask.shape == (13, SEQ_LEN) and docs is None
    assert tokens.dtype == targets.dtype == torch.int64 and mask.dtype == torch.bool
    assert mask.all() and (targets == tokens + 1).all()
    assert sorted(tokens.flatten().tolist()) == list(range(13 * SEQ_LEN))  # windows touch


def test_the_last_token_is_a_target_only(tmp_path):
    exact = open_data(make_set(tmp_path / "exact", range(2 * SEQ_LEN + 1)))
    assert exact.num_rows == 2
    assert max(exact.batch(i).targets.max().item() for i in range(2)) == 2 * SEQ_LEN
    assert open_data(make_set(tmp_path / "short", range(2 * SEQ_LEN))).num_rows == 1


@each_layout
def test_total_masks_the_rest_of_a_partial_last_step(counting, micro_batch_size, world_size):
    total = 21                                         # samples: one epoch and 8 of the next
    ranks = [open_data(counting, micro_batch_size, rank, world_size, total=total)
             for rank in range(world_size)]
    free = open_data(counting)
    counted = []
    for i in range(-(-24 // (micro_batch_size * world_size))):
        for data in ranks:
            tokens, _, mask, _ = parts(data.batch(i))
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
    tokens, targets, mask, docs = parts(data.batch(0))
    if tokens[0, 0] != 1:
        tokens, targets, mask, docs = (x.flip(0) for x in (tokens, targets, mask, docs))
    assert tokens.tolist() == [TOKENS[:5], TOKENS[5:10]]
    assert targets.tolist() == [TOKENS[1:6], TOKENS[6:11]]
    assert docs.tolist() == DOCS and docs.dtype == torch.int64
    assert mask.tolist() == [[bool(c) for c in row] for row in COUNTS]


def test_without_doc_mask_every_target_counts(tmp_path):
    _, _, mask, docs = parts(open_data(make_set(tmp_path / "docs", TOKENS, end=9), 2).batch(0))
    assert docs is None and mask.all()


def test_doc_mask_and_total_work_together(tmp_path):
    folder = make_set(tmp_path / "docs", TOKENS, end=9)
    _, _, every, _ = parts(open_data(folder, 2, doc_mask=True).batch(0))
    _, _, mask, _ = parts(open_data(folder, 2, doc_mask=True, total=1).batch(0))
    assert torch.equal(mask[0], every[0]) and not mask[1].any()


def test_ids_above_65535_survive(tmp_path):
    ids = [0, 65_535, 65_536, 131_071, 1, 199_999, 7, 8, 9, 10, 11]
    folder = make_set(tmp_path / "large", ids, np.uint32, vocab_size=200_000, end=199_999)
    data = open_data(folder, seq_len=10)
    tokens, targets, _, _ = parts(data.batch(0))
    assert tokens.tolist() == [ids[:10]] and targets.tolist() == [ids[1:]]


def test_splits_are_read_apart(tmp_path):
    folder = make_set(tmp_path / "both", range(50), splits=("train", "val"))
    np.save(tmp_path / "both" / "val.npy", np.arange(100, 150, dtype=np.uint16))
    assert TokenData(folder, "val", SEQ_LEN, 9).batch(0).tokens.min() == 100
    assert TokenData(folder, "train", SEQ_LEN, 9).batch(0).tokens.max() < 50


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
        f"--data_dir={folder}: the set has no val split (prepare it with --val_frac or --val_input, " \
        "or train with --eval_seqs=0)"


def test_a_set_shorter_than_a_sequence_is_refused_with_the_mend(tmp_path):
    folder = make_set(tmp_path / "set", range(10))
    assert open_data(folder, seq_len=9).num_rows == 1
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


# -----------------------------------------------------------------------------
# conversations

CHAT_LEN = 12                                          # tokens per row
# 61 conversations, 2 to 13 tokens long; their ids are 0, 1, 2, ...: a token tells where it comes from
LENGTHS = np.r_[2, 13, 13, 12, np.random.default_rng(0).integers(2, 14, 57)]
STARTS, N = np.cumsum(LENGTHS) - LENGTHS, int(LENGTHS.sum())
LEARN = np.random.default_rng(1).integers(0, 2, N)
PAD = N + 1


def make_chat_set(folder, lengths=LENGTHS, tokens=None, learn=None, dtype=np.uint16, vocab_size=N + 2,
                  splits=("train",), **arrays):
    """A set of conversations on disk, written by numpy alone; arrays: others than the right ones."""
    folder.mkdir(exist_ok=True)
    n = int(sum(lengths))
    tokens = np.arange(n) if tokens is None else np.array(tokens)
    learn = LEARN[:n] if learn is None else np.array(learn)
    files = dict(train=tokens.astype(dtype), train_mask=learn.astype(np.uint8),
                 train_offsets=np.cumsum([0, *lengths]).astype(np.uint64)) | arrays
    for split in splits:
        for name, array in files.items():
            np.save(folder / f"{name.replace('train', split)}.npy", array)
    counts = {split: dict(conversations=len(lengths), tokens=n, targets=int(learn.sum())) for split in splits}
    meta = dict(kind="chat", vocab_size=vocab_size, end=vocab_size - 2, pad=vocab_size - 1, fingerprint="f",
                splits=counts)
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    return make_chat_set(tmp_path_factory.mktemp("sets") / "chats")


def open_chats(folder, micro_batch_size=1, rank=0, world_size=1, seq_len=CHAT_LEN, total=np.inf, **options):
    return ChatData(folder, "train", seq_len, micro_batch_size, rank, world_size, **options).limit(total)


def rows_of(data, i):
    """Micro-batch i as a list of rows, each a tuple of tokens, targets, mask, docs."""
    batch = [tensor.tolist() for tensor in parts(data.batch(i))]
    return [tuple(map(tuple, row)) for row in zip(*batch)]


def members(row):
    """Numbers of the conversations in a row, read off its tokens."""
    return [int(np.searchsorted(STARTS, token, "right")) - 1 for token in row[0] if token in STARTS]


@each_layout
def test_every_conversation_comes_once_per_epoch(chats, micro_batch_size, world_size):
    ranks = [open_chats(chats, micro_batch_size, rank, world_size) for rank in range(world_size)]
    per_round, num_rows = micro_batch_size * world_size, ranks[0].num_rows
    order = [row for i in range(-(-num_rows * 3 // per_round)) for data in ranks for row in rows_of(data, i)]
    but_the_last = np.delete(np.arange(N), STARTS + LENGTHS - 1).tolist()
    for epoch in range(3):
        rows = order[num_rows * epoch:num_rows * (epoch + 1)]
        assert sorted(number for row in rows for number in members(row)) == list(range(61))
        assert sorted(token for row in rows for token in row[0] if token != PAD) == but_the_last


@pytest.mark.parametrize("micro_batch_size, world_size", [
    (8, 1), (4, 1), (2, 1), (1, 1), (4, 2), (2, 2), (1, 2), (2, 4), (1, 8)])
def test_a_step_of_8_has_the_same_rows_in_every_layout(chats, micro_batch_size, world_size):
    whole = open_chats(chats, 8, total=60)
    num_micro = 8 // (micro_batch_size * world_size)
    ranks = [open_chats(chats, micro_batch_size, rank, world_size, total=60) for rank in range(world_size)]
    for step in range(8):                              # more than an epoch, the last one partial
        steps = range(step * num_micro, (step + 1) * num_micro)
        assert [row for i in steps for data in ranks for row in rows_of(data, i)] == rows_of(whole, step)
    assert whole.num_rows < 60


def test_each_epoch_and_each_seed_packs_and_orders_anew(chats):
    num_rows = open_chats(chats).num_rows
    epochs = [rows_of(open_chats(chats, num_rows, seed=seed), epoch) for seed in (0, 1) for epoch in range(4)]
    assert len({tuple(rows) for rows in epochs}) == 8
    assert len({frozenset(frozenset(members(row)) for row in rows) for rows in epochs}) == 8  # other company
    assert rows_of(open_chats(chats, num_rows, seed=1), 2) == epochs[6]
    longest = [[max(LENGTHS[members(row)]) for row in rows] for rows in epochs]
    assert all(lengths != sorted(lengths, reverse=True) for lengths in longest)  # as `pack` leaves them


def test_a_batch_of_conversations_is_a_pure_function(chats):
    forward, backward = open_chats(chats, 5), open_chats(chats, 5)
    first = {i: forward.batch(i) for i in range(16)}
    for i in [*reversed(range(16)), 3, 3, 11, 0]:
        for fresh in (backward, open_chats(chats, 5)):
            pairs = zip(parts(fresh.batch(i)), parts(first[i]), strict=True)
            assert all(torch.equal(a, b) for a, b in pairs), i


@pytest.mark.parametrize("mask_prompt", [True, False])
def test_rows_hold_whole_conversations_with_their_own_next_tokens_as_targets(chats, mask_prompt):
    data = open_chats(chats, 6, mask_prompt=mask_prompt)
    paddings = 0
    for i in range(-(-data.num_rows // 6)):
        batch = parts(data.batch(i))
        assert [x.dtype for x in batch] == [torch.int64, torch.int64, torch.bool, torch.int64]
        assert all(x.shape == (6, CHAT_LEN) for x in batch)
        for row in rows_of(data, i):
            at, expected = 0, []
            for number in members(row):
                ids = range(STARTS[number], STARTS[number] + LENGTHS[number])
                expected += [(x, x + 1, bool(LEARN[x + 1]) or not mask_prompt) for x in ids[:-1]]
                (doc,) = set(row[3][at:at + len(ids) - 1])                        # one number for all of it
                assert doc not in row[3][:at] + row[3][at + len(ids) - 1:]        # and for nothing else
                at += len(ids) - 1
            padding = CHAT_LEN - at
            assert list(zip(*row[:3])) == expected + [(PAD, PAD, False)] * padding
            assert len(set(row[3][at:])) == min(padding, 1)
            paddings += padding
    assert 0 < paddings < 0.1 * data.num_rows * CHAT_LEN


@each_layout
def test_conversations_in_rows_past_total_do_not_count(chats, micro_batch_size, world_size):
    ranks = [open_chats(chats, micro_batch_size, rank, world_size, total=21) for rank in range(world_size)]
    free, counted = open_chats(chats), []
    for i in range(-(-24 // (micro_batch_size * world_size))):
        for data in ranks:
            counted += [sum(row[2]) for row in rows_of(data, i)]
    assert counted[:21] == [sum(rows_of(free, i)[0][2]) for i in range(21)] and not any(counted[21:])


def test_a_set_of_conversations_says_how_much_it_holds(chats):
    data = open_chats(chats)
    assert data.num_tokens == N - 61
    # n positions of a conversation look at n each, as a causal sequence of n does
    assert data.mean_context == pytest.approx(sum(n * n for n in LENGTHS - 1) / (N - 61))
    assert sum(len(members(row)) for i in range(data.num_rows) for row in rows_of(data, i)) == 61


def test_the_splits_of_conversations_are_read_apart(tmp_path):
    folder = make_chat_set(tmp_path / "both", splits=("train", "val"))
    np.save(tmp_path / "both" / "val.npy", np.full(N, 7, np.uint16))
    data = ChatData(folder, "val", CHAT_LEN, 1)
    assert {token for i in range(data.num_rows) for token in data.batch(i).tokens[0].tolist()} == {7, PAD}
    assert refusal(ChatData, make_chat_set(tmp_path / "one"), "val", CHAT_LEN, 1) == \
        f"--data_dir={tmp_path}/one: the set has no val split (prepare it with --val_frac or --val_input, " \
        "or train with --eval_seqs=0)"


def test_ids_above_65535_survive_in_conversations(tmp_path):
    ids = [0, 65_535, 65_536, 131_071, 199_997]
    folder = make_chat_set(tmp_path / "large", [5], ids, np.ones(5), np.uint32, vocab_size=200_000)
    tokens, targets, _, _ = parts(open_chats(folder).batch(0))
    assert tokens[0, :4].tolist() == ids[:4] and targets[0, :4].tolist() == ids[1:]


@pytest.mark.parametrize("longest", [40, 200], ids=["short rows", "long rows"])
def test_the_loss_of_packed_conversations_is_the_sum_of_their_own(tmp_path, longest):
    rng = np.random.default_rng(0)
    lengths = rng.integers(2, longest, 12)
    tokens, learn = rng.integers(0, 50, lengths.sum()), rng.integers(0, 2, lengths.sum())
    folder = make_chat_set(tmp_path / "set", lengths, tokens, learn, vocab_size=52)
    data = open_chats(folder, seq_len=longest)
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=52, n_layer=2, n_head=2, n_embd=16, seq_len=longest))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    packed, single = 0.0, 0.0
    with torch.no_grad():
        for i in range(data.num_rows):
            ids, targets, mask, docs = parts(data.batch(i))
            packed += linear_cross_entropy(model(ids, docs), model.head, targets, mask).item()
        for ids, counts in zip(*(np.split(x, lengths.cumsum()[:-1]) for x in (tokens, learn))):
            ids, counts = torch.from_numpy(ids)[None], torch.from_numpy(counts)[None]
            logp = (model(ids[:, :-1]) @ model.head.T).log_softmax(-1)
            single -= logp.gather(2, ids[:, 1:, None])[..., 0][counts[:, 1:] == 1].sum().item()
    assert data.num_rows < 12 and packed == pytest.approx(single, rel=1e-5)


# -----------------------------------------------------------------------------
# packing

def best_fit_decreasing(lengths, capacity):
    """The textbook's loop: each item, longest first, into the row where it leaves the least room."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return rooms


PACKS = {                                              # capacity, lengths
    "one": (5, [3]), "all full": (5, [5] * 7), "ones": (5, [1] * 12), "capacity of 1": (1, [1] * 4),
    "halves": (10, [5, 5, 5, 6, 4, 6]), "just too long for two": (10, [6] * 9),
    **{f"{kind} {seed}": (capacity, draw(np.random.default_rng(seed)))
       for seed in range(3) for kind, capacity, draw in [
           ("uniform", 100, lambda rng: rng.integers(1, 101, 300)),
           ("short", 512, lambda rng: rng.integers(1, 200, 400)),
           ("long", 64, lambda rng: rng.integers(20, 65, 300)),
           ("skewed", 256, lambda rng: np.minimum(256, 1 + rng.exponential(40, 400).astype(int)))]}}


@pytest.mark.parametrize("case", PACKS)
def test_packing_is_best_fit_decreasing_whatever_the_order(case):
    capacity, lengths = PACKS[case]
    lengths, rng, rooms = np.array(lengths), np.random.default_rng(0), best_fit_decreasing(*PACKS[case][::-1])
    for _ in range(4):
        rows = pack(lengths, capacity)
        assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
        assert sorted(capacity - lengths[row].sum() for row in rows) == sorted(rooms)
        lengths = rng.permutation(lengths)
    assert min(rooms) >= 0
    if case.startswith(("short", "skewed")):
        assert len(rows) <= 1.02 * lengths.sum() / capacity + 1                   # next to no padding


# -----------------------------------------------------------------------------
# sets of conversations that are refused

def test_conversations_longer_than_a_row_are_refused_with_their_count(chats):
    over = int((LENGTHS > 12).sum())
    assert refusal(open_chats, chats, seq_len=11) == \
        f"--seq_len=11: {over} of 61 conversations have over 12 tokens (up to 13); raise it, or prepare " \
        "the set with --max_len=12 and --long_rows=cut or skip"
    assert over >= 2 and open_chats(chats, seq_len=12).num_rows > 0           # 13 tokens take 12 positions


def test_a_set_of_the_other_kind_is_refused(chats, counting):
    assert refusal(open_data, chats) == f"--data_dir={chats}: a set of kind chat, expected text; " \
                                        "make one with data/prepare.py text"
    assert refusal(open_chats, counting) == f"--data_dir={counting}: a set of kind text, expected chat; " \
                                            "make one with data/prepare.py chat"


CHAT_FILES = ["train.npy", "train_mask.npy", "train_offsets.npy"]


@pytest.mark.parametrize("keep", [0, 5, 60, 128, 128 + 20, -1])
@pytest.mark.parametrize("name", CHAT_FILES)
def test_a_truncated_array_of_conversations_is_refused(tmp_path, name, keep):
    folder = make_chat_set(tmp_path / "set")
    path = tmp_path / "set" / name
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(open_chats, folder)
    assert str(path) in message and "prepare the set again" in message


@pytest.mark.parametrize("name", CHAT_FILES)
def test_a_missing_array_of_conversations_is_named(tmp_path, name):
    folder = make_chat_set(tmp_path / "set")
    (tmp_path / "set" / name).unlink()
    assert refusal(open_chats, folder) == f"{folder}/{name}: no such file; make the set with data/prepare.py"


@pytest.mark.parametrize("name", CHAT_FILES)
@pytest.mark.parametrize("array", [np.arange(40, dtype=np.uint64), np.arange(4000, dtype=np.uint64)])
def test_an_array_of_conversations_of_another_length_is_refused(tmp_path, name, array):
    folder = make_chat_set(tmp_path / "set", **{name.removesuffix(".npy"): array})
    expected = 62 if "offsets" in name else N
    assert refusal(open_chats, folder) == f"{folder}/{name}: holds {len(array)} numbers, meta.json says " \
                                          f"{expected}; prepare the set again"


@pytest.mark.parametrize("name", CHAT_FILES)
@pytest.mark.parametrize("change", [
    pytest.param(lambda x: x.astype(float), id="floats"), pytest.param(lambda x: x > 0, id="bools"),
    pytest.param(lambda x: x.astype(np.int64), id="signed"),
    pytest.param(lambda x: x[None], id="two dimensions")])
def test_an_array_of_conversations_that_holds_no_row_of_counts_is_refused(tmp_path, name, change):
    folder = make_chat_set(tmp_path / "set")
    np.save(tmp_path / "set" / name, change(np.load(tmp_path / "set" / name)))
    message = refusal(open_chats, folder)
    assert message.startswith(f"{folder}/{name}: expected one row of unsigned integers, got ")


@pytest.mark.parametrize("offsets", [[1, 3, 6, 9], [0, 3, 6, 8], [0, 3, 6, 10], [0, 6, 3, 9], [0, 3, 3, 9],
                                     [0, 3, 8, 9]], ids=str)
def test_offsets_that_do_not_divide_the_tokens_into_conversations_are_refused(tmp_path, offsets):
    """Not from the first to the last token, not rising, or with a conversation too short for a target."""
    folder = make_chat_set(tmp_path / "set", [3, 3, 3], train_offsets=np.array(offsets, np.uint64))
    assert refusal(open_chats, folder) == f"{folder}/train.npy: its offsets do not fit; prepare the set again"


@pytest.mark.parametrize("at", [0, 4, 8])
def test_an_id_outside_the_vocabulary_in_a_conversation_is_refused(tmp_path, at):
    tokens = np.arange(9)
    tokens[at] = 20
    data = open_chats(make_chat_set(tmp_path / "set", [9], tokens, vocab_size=20))
    assert refusal(data.batch, 0) == f"{data.path}: token id 20 is there, but the vocabulary has 20; " \
                                     "prepare the set again"
    tokens[at] = 19
    open_chats(make_chat_set(tmp_path / "good", [9], tokens, vocab_size=20)).batch(0)


# -----------------------------------------------------------------------------
# pairs of answers

# 13 pairs: tokens of the prompt, the chosen and the rejected answer; ids are 0, 1, 2, ... as above
PARTS = np.r_[[(2, 1, 1), (9, 1, 8), (3, 11, 2)], np.random.default_rng(0).integers(2, 9, (10, 3))]
PAIR_STARTS, PAIR_N = np.cumsum(PARTS.sum(1)) - PARTS.sum(1), int(PARTS.sum())
PAIR_LEARN = np.random.default_rng(1).integers(0, 2, PAIR_N)
PAIR_LEN = 16                                          # the longest: 9 + 8 tokens, 3 + 11


def make_pair_set(folder, parts=PARTS, tokens=None, learn=None, dtype=np.uint16, vocab_size=PAIR_N + 2,
                  splits=("train",), **arrays):
    """A set of pairs on disk, written by numpy alone; arrays: others than the right ones."""
    n = int(np.sum(parts))
    make_chat_set(folder, np.ravel(parts), np.arange(n) if tokens is None else tokens,
                  PAIR_LEARN[:n] if learn is None else learn, dtype, vocab_size, splits, **arrays)
    meta = json.loads((folder / "meta.json").read_text()) | dict(kind="pairs")
    for counts in meta["splits"].values():
        counts["pairs"] = counts.pop("conversations") // 3
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    return make_pair_set(tmp_path_factory.mktemp("sets") / "pairs")


def open_pairs(folder, micro_batch_size=1, rank=0, world_size=1, seq_len=PAIR_LEN, total=np.inf, **options):
    return PairData(folder, "train", seq_len, micro_batch_size, rank, world_size, **options).limit(total)


def numbers(data, i):
    """Numbers of the pairs in micro-batch i, read off the tokens that begin their prompts."""
    return [int(np.searchsorted(PAIR_STARTS, token)) for token in data.batch(i).tokens[0].tolist()
            if token in PAIR_STARTS]


@each_layout
def test_every_pair_comes_once_per_epoch_whatever_the_layout(numbered, micro_batch_size, world_size):
    ranks = [open_pairs(numbered, micro_batch_size, rank, world_size) for rank in range(world_size)]
    one, rounds = open_pairs(numbered), -(-13 * 3 // (micro_batch_size * world_size))
    order = [pair for i in range(rounds) for data in ranks for pair in numbers(data, i)]
    for epoch in range(3):
        assert sorted(order[13 * epoch:13 * (epoch + 1)]) == list(range(13))
    assert order == [numbers(one, i)[0] for i in range(len(order))]


def test_each_epoch_and_each_seed_has_an_order_of_pairs_of_its_own(numbered):
    orders = [tuple(numbers(open_pairs(numbered, 13, seed=seed), epoch))
              for seed in (0, 1) for epoch in range(5)]
    assert len(set(orders)) == 10 and tuple(range(13)) not in orders


def tensors(pairs):
    return [x for x in vars(pairs).values() if torch.is_tensor(x)]


def test_a_batch_of_pairs_is_a_pure_function(numbered):
    forward, backward = open_pairs(numbered, 5, total=30), open_pairs(numbered, 5, total=30)
    first = {i: forward.batch(i) for i in range(8)}
    for i in [*reversed(range(8)), 3, 3, 7, 0]:
        for fresh in (backward, open_pairs(numbered, 5, total=30)):
            assert all(map(torch.equal, tensors(fresh.batch(i)), tensors(first[i]))), i


def test_a_row_holds_prompts_and_answers_whose_targets_are_their_own_next_tokens(numbered):
    data = open_pairs(numbered, 5)
    for i in range(6):
        pairs, expected = data.batch(i), []
        assert [x.dtype for x in tensors(pairs)] == [torch.int64, torch.int64, torch.bool, torch.int64,
                                                     torch.bool, *[torch.int64] * 3, torch.bool]
        assert pairs.num_answers == 10
        assert pairs.ids.tolist() == numbers(data, i) and pairs.valid.tolist() == [True] * 5
        for p, number in enumerate(pairs.ids.tolist()):
            prompt, chosen, rejected = PARTS[number]
            start = PAIR_STARTS[number]
            expected += [(x, None, False, 3 * p, False) for x in range(start, start + prompt - 1)]
            last = start + prompt - 1                          # of the prompt: predicts both first tokens
            for side, (first, n) in enumerate([(last + 1, chosen), (last + 1 + chosen, rejected)]):
                for target in range(first, first + n):
                    token = last if target == first else target - 1
                    expected.append((token, target, bool(PAIR_LEARN[target]), 3 * p + 1 + side, 2 * p + side))
        tokens, targets, mask, docs, branch, answer = (x[0].tolist() for x in tensors(pairs)[:6])
        assert tokens == [row[0] for row in expected] and mask == [row[2] for row in expected]
        assert branch == [row[1] is not None for row in expected]
        assert docs == [row[3] for row in expected]
        assert [(t, a) for t, a, b in zip(targets, answer, branch) if b] == \
            [(row[1], row[4]) for row in expected if row[1] is not None]
        assert all(x.shape == (1, len(expected)) for x in tensors(pairs)[:6])                # no padding


@each_layout
def test_pairs_past_total_do_not_count(numbered, micro_batch_size, world_size):
    ranks = [open_pairs(numbered, micro_batch_size, rank, world_size, total=21) for rank in range(world_size)]
    free, counted, learned = open_pairs(numbered), [], []
    for i in range(-(-24 // (micro_batch_size * world_size))):
        for data in ranks:
            pairs = data.batch(i)
            counted += pairs.valid.tolist()
            learned += [int(pairs.mask[pairs.answer // 2 == p].sum()) for p in range(micro_batch_size)]
    assert counted[:21] == [True] * 21 and not any(counted[21:])
    assert learned[:21] == [int(free.batch(i).mask.sum()) for i in range(21)] and not any(learned[21:])


def test_a_set_of_pairs_says_how_much_it_holds(tmp_path):
    data = open_pairs(make_pair_set(tmp_path / "set", [(3, 2, 4), (2, 1, 5)]), 2)
    # trunks of 2 and 1; a causal sequence of n looks at n^2 / 2, a branch at its trunk besides
    assert data.num_tokens == (2 + 2 + 4) + (1 + 1 + 5) == data.batch(0).tokens.numel()
    assert data.num_rows == 2
    looks = (2**2 + (2**2 + 2 * 2 * 2) + (4**2 + 2 * 4 * 2)) + (1 + (1 + 2 * 1 * 1) + (5**2 + 2 * 5 * 1))
    assert data.mean_context == pytest.approx(looks / 15)


def test_the_splits_of_pairs_are_read_apart(tmp_path):
    folder = make_pair_set(tmp_path / "both", splits=("train", "val"))
    np.save(tmp_path / "both" / "val.npy", np.full(PAIR_N, 7, np.uint16))
    assert set(PairData(folder, "val", PAIR_LEN, 13).batch(0).tokens[0].tolist()) == {7}
    assert 7 < open_pairs(folder, 13).batch(0).tokens.max()


def test_ids_above_65535_survive_in_pairs(tmp_path):
    ids = [0, 65_535, 65_536, 131_071, 199_997]
    folder = make_pair_set(tmp_path / "large", [(2, 1, 2)], ids, np.ones(5), np.uint32, vocab_size=200_000)
    pairs = open_pairs(folder).batch(0)
    assert pairs.tokens[0].tolist() == [0, 65_535, 65_535, 131_071]
    assert pairs.targets[0, 1:].tolist() == [65_536, 131_071, 199_997]


def some_pairs(folder, longest):
    """A set of 6 random pairs, its model, and the parts: (ids, learned) of a prompt and both its answers"""
    rng = np.random.default_rng(0)
    lengths = np.r_[[(longest, longest, 3), (2, 1, longest)], rng.integers(2, longest, (4, 3))]
    tokens, learn = rng.integers(0, 50, lengths.sum()), rng.integers(0, 2, lengths.sum())
    starts = np.cumsum(lengths) - lengths.ravel()              # parts begin here
    learn[starts] = 1
    learn[1] = 1                                               # in a prompt, where it must not be read
    turn = starts[1] + longest // 3                            # a user's turn in the first chosen answer
    learn[turn:turn + longest // 3] = 0
    torch.manual_seed(0)
    model = GPT(ModelConfig(vocab_size=52, n_layer=2, n_head=4, n_kv_head=2, n_embd=16, seq_len=2 * longest))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    parts = zip(*(map(torch.from_numpy, np.split(x, np.cumsum(lengths)[:-1])) for x in (tokens, learn)))
    return make_pair_set(folder, lengths, tokens, learn, vocab_size=52), model, list(parts)


def logps_in_rows_of_their_own(model, parts):
    """-> (pairs, 2): the sums of learned tokens' log-probs, from a plain row of prompt and answer for each"""
    sums = []
    for i in range(0, len(parts), 3):
        prompt, _ = parts[i]
        for answer, learned in parts[i + 1:i + 3]:
            ids = torch.cat([prompt, answer])[None]
            logits = model(ids[:, :-1]) @ model.head.T                             # (1, T, V)
            logps = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[0, :, 0]
            sums.append(logps[-len(answer):][learned == 1].sum())
    return torch.stack(sums).view(-1, 2)


def gradients_of(model, sums, weights):
    model.zero_grad()
    (sums * weights).sum().backward()
    return [p.grad.clone() for p in model.parameters()]


rows_of_length = pytest.mark.parametrize("longest", [15, 80], ids=["short rows", "long rows"])


@rows_of_length
def test_a_shared_prompt_gives_the_logps_and_gradients_of_a_row_for_each_answer(tmp_path, longest):
    folder, model, parts = some_pairs(tmp_path / "set", longest)
    pairs = open_pairs(folder, 6, seq_len=2 * longest).batch(0)
    sums, weights = pairs.per_answer(answer_logps(model, pairs)), torch.randn(6, 2)
    expected = logps_in_rows_of_their_own(model, parts)[pairs.ids]
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(gradients_of(model, sums, weights), gradients_of(model, expected, weights)):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    # a user's turn in an answer is read, not learned
    learned = sum(int(counts.sum()) for i, (_, counts) in enumerate(parts) if i % 3)
    assert pairs.mask.sum() == learned < sum(len(ids) for i, (ids, _) in enumerate(parts) if i % 3)


@rows_of_length
def test_the_logps_of_a_pair_do_not_depend_on_the_pairs_beside_it(tmp_path, longest):
    folder, model, _ = some_pairs(tmp_path / "set", longest)
    alone, found = {}, []
    with torch.no_grad():
        for size in (1, 2, 3, 6):
            data = open_pairs(folder, size, seq_len=2 * longest, seed=size)
            for i in range(-(-12 // size)):
                pairs = data.batch(i)
                sums = pairs.per_answer(answer_logps(model, pairs))
                for number, row in zip(pairs.ids.tolist(), sums):
                    torch.testing.assert_close(row, alone.setdefault(number, row), rtol=1e-5, atol=1e-5)
                    found.append(number)
    assert sorted(found) == sorted([*range(6)] * 8) and torch.stack([*alone.values()]).std() > 1


# -----------------------------------------------------------------------------
# sets of pairs that are refused

def test_pairs_longer_than_a_row_are_refused_with_their_count(numbered):
    lengths = PARTS[:, 0] + PARTS[:, 1:].max(1)
    assert refusal(open_pairs, numbered, seq_len=11) == \
        f"--seq_len=11: a prompt and one answer have over 12 tokens in {(lengths > 12).sum()} of 13 pairs " \
        "(up to 17); raise it, or prepare the set with --max_len=12 and --long_rows=cut or skip"
    assert (lengths > 12).sum() >= 3
    assert "over 16 tokens in 1 of 13 pairs (up to 17)" in refusal(open_pairs, numbered, seq_len=15)
    data = open_pairs(numbered, 13, seq_len=16)                  # 17 tokens take 16 positions
    assert data.batch(0).tokens.numel() == data.num_tokens


def test_a_set_of_another_kind_holds_no_pairs(chats, counting, numbered):
    for folder, kind in ((chats, "chat"), (counting, "text")):
        assert refusal(open_pairs, folder) == f"--data_dir={folder}: a set of kind {kind}, expected pairs; " \
                                              "make one with data/prepare.py pairs"
    assert "a set of kind pairs, expected chat" in refusal(open_chats, numbered)
    assert refusal(PairData, numbered, "val", PAIR_LEN, 1).startswith(
        f"--data_dir={numbered}: the set has no val split")


@pytest.mark.parametrize("name", CHAT_FILES)
@pytest.mark.parametrize("damage", ["missing", "truncated", "too long"])
def test_a_damaged_array_of_pairs_is_refused_by_name(tmp_path, name, damage):
    folder, path = make_pair_set(tmp_path / "set"), tmp_path / "set" / name
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        np.save(path, np.r_[np.load(path), np.load(path)[-1:]])
    message = refusal(open_pairs, folder)
    assert message.startswith(f"{folder}/{name}: ") and message.endswith(
        "make the set with data/prepare.py" if damage == "missing" else "prepare the set again")


@pytest.mark.parametrize("offsets", [[1, 3, 6, 9], [0, 3, 6, 8], [0, 6, 3, 9], [0, 3, 3, 9]], ids=str)
def test_offsets_that_do_not_divide_the_tokens_into_parts_are_refused(tmp_path, offsets):
    folder = make_pair_set(tmp_path / "set", [(3, 3, 3)], train_offsets=np.array(offsets, np.uint64))
    assert refusal(open_pairs, folder) == f"{folder}/train.npy: its offsets do not fit; prepare the set again"


@pytest.mark.parametrize("at", [0, 1, 2, 4, 5, 8])
def test_an_id_outside_the_vocabulary_in_a_pair_is_refused(tmp_path, at):
    tokens = np.arange(9)
    tokens[at] = 20
    data = open_pairs(make_pair_set(tmp_path / "set", [(2, 3, 4)], tokens, vocab_size=20))
    assert refusal(data.batch, 0) == f"{data.path}: token id 20 is there, but the vocabulary has 20; " \
                                     "prepare the set again"
    tokens[at] = 19
    open_pairs(make_pair_set(tmp_path / "good", [(2, 3, 4)], tokens, vocab_size=20)).batch(0)


# -----------------------------------------------------------------------------
# answers in one row

def learned(*flags):
    return np.array(flags, dtype=bool)


GROUPS = [(np.array([10, 11, 12]), [(np.array([20, 21, 22]), learned(1, 0, 1)),
                                    (np.array([30]), learned(1))]),
          (np.array([13, 14]), [(np.array([40, 41]), learned(0, 0)),
                                (np.array([50, 51, 52, 53]), learned(0, 1, 1, 0))])]


def row_of(groups):
    return Branches(*branches(groups, torch.device("cpu")))


def test_a_row_of_branches_is_that_of_a_table_by_hand():
    rows, table = row_of(GROUPS), [
        # token, target, learned, document, branch, answer, place; without the targets of trunks
        (10, None, 0, 0, 0), (11, None, 0, 0, 0),
        (12, 20, 1, 1, 1, 0, 0), (20, 21, 0, 1, 1, 0, 1), (21, 22, 1, 1, 1, 0, 2), (12, 30, 1, 2, 1, 1, 0),
        (13, None, 0, 3, 0),
        (14, 40, 0, 4, 1, 2, 0), (40, 41, 0, 4, 1, 2, 1),
        (14, 50, 0, 5, 1, 3, 0), (50, 51, 1, 5, 1, 3, 1), (51, 52, 1, 5, 1, 3, 2), (52, 53, 0, 5, 1, 3, 3)]
    assert rows.num_answers == 4
    for k, x in ((0, rows.tokens), (2, rows.mask), (3, rows.docs), (4, rows.branch)):
        assert x.shape == (1, 13) and x[0].tolist() == [line[k] for line in table]
    for k, x in ((1, rows.targets), (5, rows.answer), (6, rows.place)):
        assert x[rows.branch].tolist() == [line[k] for line in table if line[4]]


def test_padded_values_land_at_their_answer_and_place_and_so_do_their_gradients():
    rows = row_of(GROUPS)
    values = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64, requires_grad=True)
    padded = rows.padded(values)
    assert padded.tolist() == [[1, 0, 2], [3, 0, 0], [0, 0, 0], [0, 4, 5]] and padded.dtype == values.dtype
    weights = torch.arange(12.0).view(4, 3)
    (padded * weights).sum().backward()
    assert values.grad.tolist() == weights[[0, 0, 1, 3, 3], [0, 2, 0, 1, 2]].tolist()
    assert rows.padded(torch.tensor([1, 2, 3, 4, 5])).sum() == 15              # integers as well


def test_where_nothing_is_learned_padded_is_a_column_of_zeros_that_can_be_differentiated():
    groups = [(prompt, [(ids, learn & False) for ids, learn in answers]) for prompt, answers in GROUPS]
    values = torch.ones(0, requires_grad=True)
    padded = row_of(groups).padded(values)
    assert padded.shape == (4, 1) and not padded.any()
    padded.sum().backward()
    assert values.grad.shape == (0,)


# -----------------------------------------------------------------------------
# prompts

PROMPT_LENGTHS = np.r_[3, 12, 4, np.random.default_rng(2).integers(3, 12, 10)]         # 13, up to 12 tokens
PROMPT_STARTS, PROMPT_N = np.cumsum(PROMPT_LENGTHS) - PROMPT_LENGTHS, int(PROMPT_LENGTHS.sum())
ROWS = [dict(prompt=[dict(role="user", content=f"Wie viel? {i} \u4e2d" * (i % 3 + 1))], answer=str(i) * i)
        for i in range(13)]


def make_prompt_set(folder, lengths=PROMPT_LENGTHS, rows=ROWS, splits=("train",), **arrays):
    """A set of prompts on disk, written by numpy alone; arrays: others than the right ones."""
    texts = [json.dumps(row).encode() for row in rows]
    files = dict(train_rows=np.frombuffer(b"".join(texts), np.uint8),
                 train_row_offsets=np.cumsum([0, *map(len, texts)]).astype(np.uint64)) | arrays
    make_chat_set(folder, lengths, learn=np.zeros(sum(lengths)), splits=splits, **files)
    meta = json.loads((folder / "meta.json").read_text()) | dict(kind="prompts")
    for counts in meta["splits"].values():
        counts["prompts"] = counts.pop("conversations")
    (folder / "meta.json").write_text(json.dumps(meta))
    return str(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return make_prompt_set(tmp_path_factory.mktemp("sets") / "prompts")


def open_prompts(folder, micro_batch_size=1, rank=0, world_size=1, seq_len=12, total=np.inf, **options):
    return PromptData(folder, "train", seq_len, micro_batch_size, rank, world_size, **options).limit(total)


@each_layout
def test_every_prompt_comes_once_per_epoch_whatever_the_layout(prompts, micro_batch_size, world_size):
    ranks = [open_prompts(prompts, micro_batch_size, rank, world_size, total=30)
             for rank in range(world_size)]
    one, rounds = open_prompts(prompts), -(-13 * 3 // (micro_batch_size * world_size))
    ids, places, counts = (np.concatenate(x) for x in zip(*(
        data.batch(i) for i in range(rounds) for data in ranks)))
    for epoch in range(3):
        assert sorted(ids[13 * epoch:13 * (epoch + 1)]) == list(range(13))
    assert ids.tolist() == [one.batch(i)[0].item() for i in range(len(ids))]
    assert places.tolist() == list(range(len(ids))) and counts.tolist() == [p < 30 for p in places]


def test_each_epoch_and_each_seed_has_an_order_of_prompts_of_its_own(prompts):
    orders = [tuple(open_prompts(prompts, 13, seed=seed).batch(epoch)[0])
              for seed in (0, 1) for epoch in range(5)]
    assert len(set(orders)) == 10 and tuple(range(13)) not in orders


def test_a_batch_of_prompts_is_a_pure_function(prompts):
    data = open_prompts(prompts, 5, total=30)
    first = {i: data.batch(i) for i in range(8)}
    for i in [*reversed(range(8)), 3, 3, 7, 0]:
        for other in (data, open_prompts(prompts, 5, total=30)):
            assert all(map(np.array_equal, other.batch(i), first[i])), i


def test_prompts_and_rows_are_those_of_the_set(prompts):
    data = open_prompts(prompts)
    for i in [*range(13), 4, 0]:
        start = PROMPT_STARTS[i]
        assert data.prompt(i).tolist() == list(range(start, start + PROMPT_LENGTHS[i]))
        assert data.row(i) == data.row(np.int64(i)) == ROWS[i]
    assert (data.num_rows, data.num_tokens, data.identity) == (13, PROMPT_N, {}) and data.total == np.inf


def test_the_splits_of_prompts_are_read_apart(tmp_path):
    folder = make_prompt_set(tmp_path / "set", splits=("train", "val"))
    np.save(tmp_path / "set" / "val.npy", np.full(PROMPT_N, 7, np.uint16))
    assert set(PromptData(folder, "val", 12, 1).prompt(1).tolist()) == {7}
    assert open_prompts(folder).prompt(12).max() == PROMPT_N - 1


# -----------------------------------------------------------------------------
# sets of prompts that are refused

def test_prompts_that_are_too_long_are_refused_with_their_length(prompts):
    assert refusal(open_prompts, prompts, seq_len=11) == \
        "--seq_len: prompts have up to 12 tokens, 11 fit with an answer; raise it, or lower " \
        "--max_new_tokens, or prepare with --max_len=11 --long_rows=skip"


def test_a_set_of_another_kind_holds_no_prompts(chats, numbered, prompts):
    for folder, kind in ((chats, "chat"), (numbered, "pairs")):
        assert refusal(open_prompts, folder) == f"--data_dir={folder}: a set of kind {kind}, expected " \
                                                "prompts; make one with data/prepare.py prompts"
    assert "a set of kind prompts, expected chat" in refusal(open_chats, prompts)
    assert "has no val split" in refusal(PromptData, prompts, "val", 12, 1)


@pytest.mark.parametrize("name", [*CHAT_FILES, "train_rows.npy", "train_row_offsets.npy"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "a pickle", "floats"])
def test_a_damaged_array_of_prompts_is_refused_by_name(tmp_path, name, damage):
    folder, path = make_prompt_set(tmp_path / "set"), tmp_path / "set" / name
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        np.save(path, np.array([{}]) if damage == "a pickle" else np.load(path).astype(float))
    message = refusal(open_prompts, folder)
    assert message.startswith(f"{folder}/{name}: ") and message.endswith(
        "make the set with data/prepare.py" if damage == "missing" else "prepare the set again")


@pytest.mark.parametrize("name", [*CHAT_FILES, "train_row_offsets.npy"])
def test_an_array_of_prompts_of_another_length_is_refused(tmp_path, name):
    folder, path = make_prompt_set(tmp_path / "set"), tmp_path / "set" / name
    np.save(path, np.load(path)[:-1])
    expected = 14 if "offsets" in name else PROMPT_N
    assert refusal(open_prompts, folder) == f"{path}: holds {expected - 1} numbers, meta.json says " \
                                            f"{expected}; prepare the set again"


def test_an_id_outside_the_vocabulary_in_a_prompt_is_refused(tmp_path):
    tokens, vocab_size = np.arange(PROMPT_N, dtype=np.uint16), N + 2
    tokens[-1] = vocab_size
    folder = make_prompt_set(tmp_path / "set", train=tokens)
    assert refusal(open_prompts, folder) == f"{folder}/train.npy: token id {vocab_size} is there, but the " \
                                            f"vocabulary has {vocab_size}; prepare the set again"
    tokens[-1] -= 1
    open_prompts(make_prompt_set(tmp_path / "good", train=tokens))


# -----------------------------------------------------------------------------
# critical tokens

def test_critical_weights_give_the_weighted_mean_of_a_hand_computed_table(counting):
    targets = torch.tensor([[2, 0, 1], [1, 1, 2]])
    weights = open_data(counting, critical_ids=(1, 5), critical_alpha=3).weights(targets)
    assert weights.tolist() == [[1, 1, 3], [3, 3, 1]] and weights.dtype == torch.float32
    assert open_data(counting).weights(targets) is None
    # probabilities 1/2, 1/4, 1/4 everywhere: nll = ln 2 for token 0, 2 ln 2 for the others
    hidden, weight = torch.ones(2, 3, 1), torch.tensor([[0.5], [0.25], [0.25]]).log()
    mask = torch.tensor([[True, True, True], [True, False, True]])
    batch = Batch(targets, targets, mask, None, weights)
    loss = linear_cross_entropy(hidden, weight, targets, mask, weights) / batch.n_targets
    # w nll / ln 2 = 2, 1, 6; 6, -, 2 -> 17 over w = 1 + 1 + 3 + 3 + 1
    assert loss.item() == pytest.approx(17 / 9 * 0.6931471805599453, rel=1e-6)


@pytest.mark.parametrize("ids", [(5, VOCAB), (-1,)])
def test_critical_ids_are_ids(counting, ids):
    assert refusal(open_data, counting, critical_ids=ids) == \
        f"--critical_ids={ids[-1]}: no such token, expected 0 to {VOCAB - 1}"
