"""The order of batches, seen where each token is its own position; memory that stays flat."""

import queue
import struct
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import positions, split_of

from configurator import UserError
from plaingpt.runtime import Runtime
from plaingpt.training import batches
from plaingpt.training.batches import Batches

# --- the order of batches


def batches_of(folder, batch_size=4, block_size=8, seed=0, stride=None):
    return Batches(split_of(folder), batch_size, block_size, seed, stride or block_size)


def first_tokens(batches, steps):
    return [int(x[0]) for step in steps for x in batches(step)[0]]


@pytest.fixture(scope="module")
def folder(shard_folder):
    """20 windows of 8 tokens, and the target of the last, in shards that cut windows."""
    return shard_folder(train=[positions(50), positions(1, 50), positions(110, 51)])


def test_inputs_and_targets_are_neighbours(folder):
    batches = batches_of(folder)
    for step in range(20):
        x, y, mask = batches(step)
        assert x.shape == y.shape == (4, 8) and x.dtype == y.dtype == torch.int64
        assert torch.equal(y, x + 1) and mask is None
        assert torch.equal(x, x[:, :1] + torch.arange(8))


def test_an_epoch_has_every_window_once(folder):
    batches = batches_of(folder)
    assert batches.windows == 20
    for epoch in range(10):
        starts = first_tokens(batches, range(5 * epoch, 5 * epoch + 5))
        assert sorted(starts) == list(range(0, 160, 8))


def test_an_epoch_may_end_within_a_batch(folder):
    starts = first_tokens(batches_of(folder, batch_size=6), range(10))
    for epoch in range(3):
        assert sorted(starts[20 * epoch : 20 * epoch + 20]) == list(range(0, 160, 8))


def test_a_batch_may_hold_several_epochs(folder):
    starts = first_tokens(batches_of(folder, batch_size=50), [0])
    assert sorted(starts[:20]) == sorted(starts[20:40]) == list(range(0, 160, 8))
    assert starts[:20] != starts[20:40]


def test_the_batch_size_does_not_change_the_order_of_windows(folder):
    one = first_tokens(batches_of(folder, batch_size=1), range(48))
    for batch_size in (2, 6, 48):
        batches = batches_of(folder, batch_size=batch_size)
        assert first_tokens(batches, range(48 // batch_size)) == one


def test_the_order_depends_on_the_seed_only(folder):
    order = first_tokens(batches_of(folder, seed=1), range(5))
    np.random.seed(5)
    torch.manual_seed(5)
    assert first_tokens(batches_of(folder, seed=1), range(5)) == order
    assert first_tokens(batches_of(folder, seed=2), range(5)) != order


def test_epochs_have_orders_of_their_own(folder):
    batches = batches_of(folder)
    epochs = [tuple(first_tokens(batches, range(5 * e, 5 * e + 5))) for e in range(8)]
    assert len(set(epochs)) == 8
    assert tuple(range(0, 160, 8)) not in epochs


def test_a_batch_does_not_depend_on_the_calls_before(folder):
    batches = batches_of(folder)
    forward = [batches(step)[0] for step in range(12)]
    for step in (11, 3, 3, 0, 7):
        assert torch.equal(batches(step)[0], forward[step])
    assert torch.equal(batches_of(folder)(9)[0], forward[9])


def test_a_late_step_costs_no_more_than_the_first(folder):
    batches = batches_of(folder)
    x, y, _ = batches(10**12)
    assert torch.equal(y, x + 1)


def test_a_stride_makes_windows_overlap(folder):
    batches = batches_of(folder, batch_size=1, stride=3)
    starts = first_tokens(batches, range(batches.windows))
    assert sorted(starts) == list(range(0, 153, 3))  # the last window ends at token 160
    exact = batches_of(folder, batch_size=1, stride=1)
    assert exact.windows == 153


def test_masks_are_those_of_the_targets(shard_folder):
    folder = shard_folder(train=[positions(6), positions(6, 6), positions(4, 12)])
    (folder / "train_000001.mask.bin").write_bytes(bytes([1, 0, 0, 1, 1, 0]))
    counted = [1.0] * 6 + [1, 0, 0, 1, 1, 0] + [1] * 4
    _, y, mask = batches.windows_at(split_of(folder), np.array([4, 8]), 5)
    assert mask.tolist() == [counted[5:10], counted[9:14]]
    assert y.tolist() == [[5, 6, 7, 8, 9], [9, 10, 11, 12, 13]]


def test_an_id_beyond_the_vocabulary_is_reported_by_the_batch_that_reads_it(shard_folder):
    folder = shard_folder(train=[positions(50), [*range(50, 60), 99, *range(61, 81)]])
    batches = Batches(split_of(folder, vocab_size=99), 1, 8, 0, 8)
    failed = []
    for step in range(batches.windows):
        try:
            batches(step)
        except UserError as error:
            assert str(error).startswith(
                f"{folder}/train_000001.bin: id 99 at token 10 is beyond the vocabulary of 99"
            )
            failed.append(int(batches.starts(step)[0]))
    assert failed == [56]  # the window of tokens 56 … 64; id 99 is token 60


@pytest.mark.parametrize("tokens, windows", [(9, 1), (16, 1), (17, 2), (24, 2), (25, 3)])
def test_windows_are_those_that_are_whole(shard_folder, tokens, windows):
    batches = batches_of(shard_folder(train=[positions(tokens)]), batch_size=1)
    assert batches.windows == windows
    assert sorted(first_tokens(batches, range(windows))) == list(range(0, 8 * windows, 8))


def test_less_than_a_window_is_refused(shard_folder):
    split = split_of(shard_folder(train=[positions(8)]))
    message = "the train split has 8 tokens, but one window takes block_size \\+ 1 = 9: use more"
    with pytest.raises(ValueError, match=message):
        Batches(split, 4, 8, 0, 8)
    with pytest.raises(ValueError, match=message):
        list(batches.validation_batches(split, 4, 8, None))


@pytest.mark.parametrize("key", [(0, 0), (1337, 1)])
def test_permute_hits_everything_once(key):
    for size in [*range(1, 301), 4095, 4096, 4097, 65537, 100_003]:
        assert np.array_equal(np.sort(batches.permute(np.arange(size), size, key)), np.arange(size))


@pytest.mark.parametrize("size", [2**31, 2**40 + 1, 2**62])
def test_permute_is_one_to_one_on_large_ranges(size):
    index = np.concatenate([np.arange(5000), size - 1 - np.arange(5000)])
    sent = batches.permute(index, size, (0,))
    assert len(np.unique(sent)) == 10_000 and sent.min() >= 0 and sent.max() < size
    assert np.array_equal(batches.permute(index[77:78], size, (0,)), sent[77:78])


def test_permute_looks_random():
    sent = batches.permute(np.arange(10_000), 10_000, (3, 4))
    assert abs(np.corrcoef(np.arange(10_000), sent)[0, 1]) < 0.05
    assert abs(np.corrcoef(sent[:-1], sent[1:])[0, 1]) < 0.05
    counts, _ = np.histogram(sent[:1000], bins=10, range=(0, 10_000))
    assert counts.min() > 50


# --- validation


def counted(batches):
    return [
        int(target)
        for _, y, mask in batches
        for target, counts in zip(y.flatten(), mask.flatten())
        if counts
    ]


@pytest.mark.parametrize("tokens", [9, 10, 16, 17, 18, 24, 25, 26, 63, 64, 65, 66, 100])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_validation_counts_every_target_once(shard_folder, tokens, batch_size):
    split = split_of(shard_folder(train=[], val=[positions(tokens)]), "val")
    found = list(batches.validation_batches(split, batch_size, 8, None))
    for x, y, mask in found:
        assert x.shape == y.shape == mask.shape == found[0][0].shape
        assert x.shape[1] == 8 and len(x) <= batch_size
        assert torch.equal(y, x + 1)
    assert sorted(counted(found)) == list(range(1, tokens))


def test_validation_is_the_same_each_time_and_for_every_batch_size(shard_folder):
    split = split_of(shard_folder(train=[], val=[positions(100), positions(100, 100)]), "val")
    for max_tokens in (None, 64):
        one = counted(batches.validation_batches(split, 1, 8, max_tokens))
        assert one == counted(batches.validation_batches(split, 1, 8, max_tokens))
        assert one == counted(batches.validation_batches(split, 7, 8, max_tokens))


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_processes_share_validation_and_see_as_many_batches(shard_folder, world_size, batch_size):
    split = split_of(shard_folder([positions(100)]))
    shares = [
        list(batches.validation_batches(split, batch_size, 8, None, rank, world_size))
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    assert len({x.shape for share in shares for x, _, _ in share}) == 1
    assert sorted(target for share in shares for target in counted(share)) == list(range(1, 100))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_processes_share_each_batch_in_order(folder, world_size):
    batches = batches_of(folder)
    parts = [batches(3, rank, world_size)[0] for rank in range(world_size)]
    assert [len(part) for part in parts] == [4 // world_size] * world_size
    assert torch.equal(torch.cat(parts), batches(3)[0])


def test_batches_come_in_order_each_read_while_the_step_before_runs(folder, monkeypatch):
    batches, really, read = batches_of(folder), Batches.__call__, queue.Queue()

    def noted(self, step, *place):
        read.put(step)
        if step == 6:
            raise OSError("the disk is gone")
        return really(self, step, *place)

    monkeypatch.setattr(Batches, "__call__", noted)
    coming = batches.ahead(range(3, 9), Runtime(torch.device("cpu"), torch.float32))
    for step in range(3, 6):
        x, _, mask = next(coming)
        assert torch.equal(x, really(batches, step)[0]) and mask is None
        if step == 3:
            assert read.get(timeout=10) == 3
        assert read.get(timeout=10) == step + 1
    with pytest.raises(OSError, match="the disk is gone"):  # in the thread
        next(coming)


@pytest.mark.parametrize(
    "max_tokens, windows", [(8, 1), (1, 1), (15, 1), (16, 2), (40, 5), (96, 12), (104, 13)]
)
def test_max_tokens_bounds_validation_and_spreads_it(shard_folder, max_tokens, windows):
    split = split_of(shard_folder(train=[], val=[positions(101)]), "val")
    targets = counted(batches.validation_batches(split, 4, 8, max_tokens))
    assert len(targets) == len(set(targets)) == min(8 * windows, 100)
    starts = sorted({(target - 1) // 8 for target in targets})
    assert len(starts) == windows and starts[0] == 0
    gaps = np.diff([*starts, 13])
    assert gaps.max() - gaps.min() <= 1


def test_max_tokens_beyond_the_split_is_all_of_it(shard_folder):
    split = split_of(shard_folder(train=[], val=[positions(30)]), "val")
    assert counted(batches.validation_batches(split, 4, 8, 10**9)) == list(range(1, 30))


def test_validation_keeps_the_masks_of_the_shards(shard_folder):
    folder = shard_folder(train=[], val=[positions(21)])
    mask = np.arange(21) % 3 == 0
    mask.astype(np.uint8).tofile(folder / "val_000000.mask.bin")
    split = split_of(folder, "val")
    wanted = [position for position in range(1, 21) if position % 3 == 0]
    for _ in range(2):  # what the last window leaves out is not written to the file
        assert sorted(counted(batches.validation_batches(split, 2, 8, None))) == wanted


# --- memory


@pytest.mark.skipif(sys.platform == "win32", reason="truncate does not make sparse files there")
def test_memory_stays_flat_on_a_gigabyte(tmp_path):
    tokens = 2**29
    with (tmp_path / "train_000000.bin").open("wb") as file:
        file.write(struct.pack("<256i", 20240520, 1, tokens, *[0] * 253))
        file.truncate(1024 + 2 * tokens)
    tracemalloc.start()
    batches = Batches(split_of(tmp_path, vocab_size=1), 8, 64, 0, 64)
    for step in range(20):
        assert batches(step)[0].shape == (8, 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert batches.windows == (tokens - 65) // 64 + 1
    assert peak < 2**20
