"""Shards to the byte: read, written, continued, and refused where they are damaged."""

import os
import struct
import sys

import numpy as np
import pytest
from conftest import positions, split_of, write_shard

from configurator import UserError
from plaingpt.text import shards
from plaingpt.wording import quantity


def refusal(folder) -> str:
    with pytest.raises(UserError) as caught:
        split_of(folder)
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
    assert entry.file == "train_000000.bin" and entry.tokens == 4


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


def test_a_mask_of_an_empty_shard_is_empty(shard_folder):
    folder = shard_folder(train=[positions(4), positions(0)])
    (folder / "train_000000.mask.bin").write_bytes(bytes([1, 0, 0, 1]))
    (folder / "train_000001.mask.bin").write_bytes(b"")
    assert split_of(folder).mask(0, 4).tolist() == [1, 0, 0, 1]


def test_a_mask_of_another_length_is_refused(shard_folder):
    folder = shard_folder(train=[positions(6)])
    (folder / "train_000000.mask.bin").write_bytes(bytes(5))
    wanted = "train_000000.mask.bin has 5 bytes for the 6 tokens of train_000000.bin"
    assert f"{folder}/{wanted}" in refusal(folder)


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
def test_a_file_with_half_an_id_or_none_is_refused(tmp_path, size):
    (tmp_path / "train.bin").write_bytes(bytes(size))
    assert refusal(tmp_path).startswith(f"{tmp_path}/train.bin has {quantity(size, 'byte')},")


# --- ids


def test_an_id_beyond_the_vocabulary_is_found_when_it_is_read(shard_folder):
    folder = shard_folder(train=[positions(50), np.array([3, 61, 2, 60])])
    split_of(folder, vocab_size=62).check_ids()
    split = split_of(folder, vocab_size=61)
    assert len(split) == 54  # opening reads no tokens
    assert split[0:51].tolist() == [*range(50), 3] and split[52:54].tolist() == [2, 60]
    for read in (split.check_ids, lambda: split[0:54], lambda: split[51:52]):
        with pytest.raises(UserError) as caught:
            read()
        assert str(caught.value) == (
            f"{folder}/train_000001.bin: id 61 at token 1 is beyond the vocabulary of 61; "
            "the shard is damaged or belongs to another tokenizer"
        )


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX page faults and sparse files")
def test_opening_a_huge_split_touches_none_of_its_pages(tmp_path):
    import resource

    tokens = 2**31 - 1
    for number in range(5):  # 21 GB
        with (tmp_path / f"train_{number:06d}.bin").open("wb") as file:
            file.write(struct.pack("<256i", 20240520, 1, tokens, *[0] * 253))
            file.truncate(1024 + 2 * tokens)
    before = resource.getrusage(resource.RUSAGE_SELF)
    split = split_of(tmp_path, vocab_size=1)
    assert len(split) == 5 * tokens and split[3 * tokens - 2 : 3 * tokens + 2].tolist() == [0] * 4
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_minflt - before.ru_minflt + after.ru_majflt - before.ru_majflt < 500


# --- writing in parts


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("saved", [0, 3, 10, 25, 30])
def test_writing_resumes_from_a_saved_state(tmp_path, saved, masked):
    """Whatever was written after the state is cut off, complete shards included."""
    folders = [tmp_path / "whole", tmp_path / "parts"]
    tokens = positions(30)
    mask = (tokens % 3 == 0).astype(np.uint8) if masked else None
    state = None
    for folder in folders:
        folder.mkdir()
        writer = shards.ShardWriter(folder, "train", 10, masked, state)
        for start in range(0, 30, 5):
            if folder == folders[1] and start >= saved and state is None:
                state = writer.sync()
            part = slice(start, start + 5)
            writer.write(tokens[part], None if mask is None else mask[part])
        if folder == folders[0]:
            entries = writer.close()
        else:
            state = state or writer.sync()
    done = min(30, -(-saved // 5) * 5)
    again = shards.ShardWriter(folders[1], "train", 10, masked, state)
    again.write(tokens[done:], None if mask is None else mask[done:])
    assert again.close() == entries
    for path in folders[0].iterdir():
        assert (folders[1] / path.name).read_bytes() == path.read_bytes()
    assert len(list(folders[1].iterdir())) == 3 * (1 + masked)


def test_a_shard_shorter_than_its_saved_state_is_refused(tmp_path):
    writer = shards.ShardWriter(tmp_path, "train", 100)
    writer.write(positions(50))
    state = writer.sync()
    os.truncate(tmp_path / "train_000000.bin", 1024 + 98)
    with pytest.raises(ValueError, match="is cut off: remove"):
        shards.ShardWriter(tmp_path, "train", 100, state=state)


@pytest.mark.skipif(os.name == "nt", reason="pipes are POSIX")
@pytest.mark.parametrize("name", ["train_000000.bin", "train_000000.mask.bin"])
def test_a_pipe_in_place_of_a_shard_is_refused_at_once(shard_folder, name):
    folder = shard_folder(train=[positions(9)], manifest=False)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(ValueError, match=f"{name} is a pipe or a device: expected a file"):
        split_of(folder)
