"""Shards to the byte; the order of batches where each token is its own position."""

import json
import os
import queue
import struct
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import write_shard

from plaingpt.runtime import Runtime
from plaingpt.text import dataset, shards
from plaingpt.text.shards import Split
from plaingpt.training import batches
from plaingpt.training.batches import Batches

VOCAB = 65536


def positions(count, start=0):
    return np.arange(start, start + count, dtype=np.uint16)


def split_of(folder, name="train", vocab_size=VOCAB):
    return Split(folder, name, vocab_size)


def refusal(folder, name="train", vocab_size=VOCAB) -> str:
    with pytest.raises(ValueError) as caught:
        Split(folder, name, vocab_size)
    return str(caught.value)


# --- the format


def test_a_shard_is_llm_cs_to_the_byte(tmp_path):
    tokens = np.array([0, 1, 258, 65535], dtype=np.uint16)
    writer = shards.ShardWriter(tmp_path, "train", shard_tokens=100)
    writer.write(tokens)
    [entry] = writer.close()
    content = (tmp_path / "train_000000.bin").read_bytes()
    header = struct.pack("<256i", 20240520, 1, 4, *[0] * 253)
    assert content == header + b"\x00\x00\x01\x00\x02\x01\xff\xff"
    assert entry["file"] == "train_000000.bin" and entry["tokens"] == 4


def test_a_written_shard_reads_back(shard_folder):
    split = split_of(shard_folder(train=[positions(1000)]))
    assert len(split) == 1000
    assert split[0:1000].tolist() == list(range(1000))
    assert split[990:1000].dtype == np.int64


def test_nanogpts_tokens_without_header_read_too(tmp_path):
    positions(1000).astype("<u2").tofile(tmp_path / "train.bin")
    split = split_of(tmp_path)
    assert len(split) == 1000 and split[3:6].tolist() == [3, 4, 5]
    (tmp_path / "train.bin").write_bytes(b"\x07\x00")
    assert split_of(tmp_path)[0:1].tolist() == [7]


def test_llm_cs_names_are_found_and_other_files_are_not(tmp_path):
    names = ["fineweb_train_000001.bin", "fineweb_train_000002.bin", "x_val_000000.bin"]
    for number, name in enumerate([*names, "train_000001.mask.bin", "trained.bin", "train.txt"]):
        write_shard(tmp_path / name, positions(4, 10 * number))
    assert [path.name for path in shards.shard_paths(tmp_path, "train")] == names[:2]
    assert [path.name for path in shards.shard_paths(tmp_path, "val")] == names[2:]
    assert split_of(tmp_path)[0:8].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


def test_a_range_runs_across_shards(shard_folder):
    sizes = [7, 1, 0, 12, 5]
    ends = np.cumsum(sizes)
    arrays = [positions(size, end - size) for size, end in zip(sizes, ends)]
    split = split_of(shard_folder(train=arrays))
    for start in range(25):
        for stop in range(start + 1, 26):
            assert split[start:stop].tolist() == list(range(start, stop))


# --- masks


def test_a_mask_lies_beside_its_shard_and_absent_means_all(shard_folder):
    folder = shard_folder(train=[positions(6), positions(6, 6), positions(4, 12)])
    assert split_of(folder).mask(0, 16) is None
    (folder / "train_000001.mask.bin").write_bytes(bytes([1, 0, 0, 1, 1, 0]))
    split = split_of(folder)
    wanted = [1.0] * 6 + [1, 0, 0, 1, 1, 0] + [1] * 4
    assert split.mask(0, 16).tolist() == wanted
    assert split.mask(5, 9).tolist() == wanted[5:9]
    assert split.mask(0, 16).dtype == np.float32
    _, y, mask = batches.windows_at(split, np.array([4, 8]), 5)
    assert mask.tolist() == [wanted[5:10], wanted[9:14]]  # of the targets
    assert y.tolist() == [[5, 6, 7, 8, 9], [9, 10, 11, 12, 13]]


def test_a_mask_of_an_empty_shard_is_empty(shard_folder):
    folder = shard_folder(train=[positions(4), positions(0)])
    (folder / "train_000000.mask.bin").write_bytes(bytes([1, 0, 0, 1]))
    (folder / "train_000001.mask.bin").write_bytes(b"")
    assert split_of(folder).mask(0, 4).tolist() == [1, 0, 0, 1]


def test_a_mask_of_another_length_is_refused(shard_folder):
    folder = shard_folder(train=[positions(6)])
    (folder / "train_000000.mask.bin").write_bytes(bytes(5))
    assert f"{folder}/train_000000.mask.bin has 5 bytes for 6 tokens" in refusal(folder)


# --- what is refused


def test_a_truncated_shard_is_refused(shard_folder):
    folder = shard_folder(train=[positions(1000), positions(1000)])
    path = folder / "train_000001.bin"
    os.truncate(path, path.stat().st_size - 2)
    message = refusal(folder)
    assert message.startswith(f"{path} has 3,022 bytes") and "1,000 tokens = 3,024" in message
    os.truncate(path, 500)
    assert str(path) in refusal(folder)


def test_a_shard_with_more_than_its_header_says_is_refused(shard_folder):
    folder = shard_folder(train=[positions(10)])
    with (folder / "train_000000.bin").open("ab") as file:
        file.write(b"\0\0")
    assert "its header promises 10 tokens" in refusal(folder)


def test_another_version_is_refused(shard_folder):
    folder = shard_folder(train=[positions(10)])
    with (folder / "train_000000.bin").open("r+b") as file:
        file.seek(4)
        file.write(b"\2")
    assert refusal(folder) == (
        f"{folder}/train_000000.bin has a shard's magic, but not a header of version 1"
    )


@pytest.mark.parametrize("size", [0, 1, 3, 1001])
def test_a_file_that_is_no_whole_number_of_ids_is_refused(tmp_path, size):
    (tmp_path / "train.bin").write_bytes(bytes(size))
    assert refusal(tmp_path).startswith(f"{tmp_path}/train.bin has {size} bytes")


def test_an_id_beyond_the_vocabulary_is_refused(shard_folder):
    folder = shard_folder(train=[positions(50), np.array([3, 61, 2, 60])])
    assert len(split_of(folder, vocab_size=62)) == 54
    assert refusal(folder, vocab_size=61).startswith(
        f"{folder}/train_000001.bin: id 61 at token 1 is beyond the vocabulary of 61"
    )


def test_a_shard_that_the_manifest_names_must_be_there(shard_folder):
    folder = shard_folder(train=[positions(9), positions(9)], val=[positions(9)])
    (folder / "train_000001.bin").unlink()
    assert refusal(folder) == f"{folder}/dataset.json lists train_000001.bin, which is missing"
    assert len(split_of(folder, "val")) == 9


def test_a_shard_that_the_manifest_does_not_name_is_not_read(shard_folder):
    folder = shard_folder(train=[positions(9)])
    write_shard(folder / "train_000001.bin", positions(9))
    assert len(split_of(folder)) == 9


def test_a_folder_without_shards_or_none_at_all_is_refused(shard_folder, tmp_path):
    folder = shard_folder(train=[positions(9)])
    assert refusal(folder, "val").startswith(f"{folder} has no val shards")
    missing = tmp_path / "missing"
    assert refusal(missing) == (
        f"there is no data in {missing}; prepare.py --data_dir={missing} makes it"
    )


def test_a_half_prepared_folder_is_refused(shard_folder):
    folder = shard_folder(train=[positions(9)], manifest=False)
    (folder / dataset.PARTIAL).mkdir()
    assert refusal(folder) == f"{folder} is half prepared: run its prepare.py command again"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"3"])
def test_a_damaged_manifest_is_refused(shard_folder, content):
    folder = shard_folder(train=[positions(9)])
    (folder / "dataset.json").write_bytes(content)
    assert refusal(folder).startswith(f"{folder}/dataset.json is damaged")


# --- the manifest


def test_the_fingerprint_is_that_of_the_training_tokens(shard_folder):
    one = dataset.data_fingerprint(shard_folder(train=[positions(9), positions(4)]))
    again = dataset.data_fingerprint(shard_folder(train=[positions(9), positions(4)], val=[[1]]))
    other = dataset.data_fingerprint(shard_folder(train=[positions(9), positions(4, 1)]))
    assert one == again != other
    folder = shard_folder(train=[positions(9)], manifest=False)
    longer = shard_folder(train=[positions(10)], manifest=False)
    assert dataset.data_fingerprint(folder) != dataset.data_fingerprint(longer)


def test_bytes_per_token_come_from_the_manifest(shard_folder):
    folder = shard_folder(train=[positions(10)])
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["splits"]["train"]["bytes"] = 35
    (folder / "dataset.json").write_text(json.dumps(manifest))
    train, bare = shards.Split(folder, "train", 257), shard_folder(train=[[1]], manifest=False)
    assert dataset.bytes_per_token(train) == 3.5
    assert dataset.bytes_per_token(shards.Split(bare, "train", 257)) is None
    (folder / "train_000000.mask.bin").write_bytes(bytes(len(train)))
    assert dataset.bytes_per_token(shards.Split(folder, "train", 257)) is None


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
        assert x.shape == y.shape == mask.shape and x.shape[1] == 8 and len(x) <= batch_size
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
    batches = Batches(Split(tmp_path, "train", 1), 8, 64, 0, 64)
    for step in range(20):
        assert batches(step)[0].shape == (8, 64)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert batches.windows == (tokens - 65) // 64 + 1
    assert peak < 2**20


def test_a_mask_that_is_missing_is_no_mask_of_ones(tmp_path):
    writer = shards.ShardWriter(tmp_path, "train", 100, masked=True)
    writer.write(positions(50), np.zeros(50, np.uint8))
    (tmp_path / "dataset.json").write_text(
        json.dumps({"splits": {"train": {"shards": writer.close()}}})
    )
    before = dataset.data_fingerprint(tmp_path)
    (tmp_path / "train_000000.mask.bin").unlink()
    assert "train_000000.mask.bin is missing" in refusal(tmp_path)
    writer = shards.ShardWriter(tmp_path, "train", 100, masked=True)
    writer.write(positions(50), np.ones(50, np.uint8))
    (tmp_path / "dataset.json").write_text(
        json.dumps({"splits": {"train": {"shards": writer.close()}}})
    )
    assert dataset.data_fingerprint(tmp_path) != before


# --- writing in parts


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("noted", [0, 3, 10, 25, 30])
def test_writing_goes_on_where_it_was_noted(tmp_path, noted, masked):
    """What was written behind the note is cut off, whole shards and all."""
    folders = [tmp_path / "whole", tmp_path / "parts"]
    tokens = positions(30)
    mask = (tokens % 3 == 0).astype(np.uint8) if masked else None
    state = None
    for folder in folders:
        folder.mkdir()
        writer = shards.ShardWriter(folder, "train", 10, masked, state)
        for start in range(0, 30, 5):
            if folder == folders[1] and start >= noted and state is None:
                state = json.loads(json.dumps(writer.sync()))
            part = slice(start, start + 5)
            writer.write(tokens[part], None if mask is None else mask[part])
        if folder == folders[0]:
            entries = writer.close()
        else:
            state = state or json.loads(json.dumps(writer.sync()))
    done = min(30, -(-noted // 5) * 5)
    again = shards.ShardWriter(folders[1], "train", 10, masked, state)
    again.write(tokens[done:], None if mask is None else mask[done:])
    assert again.close() == entries
    for path in folders[0].iterdir():
        assert (folders[1] / path.name).read_bytes() == path.read_bytes()
    assert len(list(folders[1].iterdir())) == 3 * (1 + masked)


def test_a_shard_that_lost_what_was_noted_is_refused(tmp_path):
    writer = shards.ShardWriter(tmp_path, "train", 100)
    writer.write(positions(50))
    state = writer.sync()
    os.truncate(tmp_path / "train_000000.bin", 1024 + 98)
    with pytest.raises(ValueError, match="has lost its end"):
        shards.ShardWriter(tmp_path, "train", 100, state=state)
