"""Data folders: splits as the manifest lists them, what the manifest tells, what is refused."""

import json

import numpy as np
import pytest
from conftest import positions, write_shard

from configurator import UserError
from plaingpt import files
from plaingpt.text import dataset, shards
from plaingpt.text.dataset import Manifest, SplitEntries, SplitEntry, open_dataset


def refusal(folder, name="train") -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(folder).split(name)
    return str(caught.value)


def fingerprint(folder) -> str:
    return open_dataset(folder).fingerprint


def write_manifest(folder, train):
    split = SplitEntry(documents=1, bytes=50, tokens=50, shards=train)
    files.write_json(folder / "dataset.json", Manifest(splits=SplitEntries(split)))


# --- what is refused


def test_a_shard_that_the_manifest_names_must_exist(shard_folder):
    folder = shard_folder(train=[positions(9), positions(9)], val=[positions(9)])
    (folder / "train_000001.bin").unlink()
    assert refusal(folder) == f"{folder}/dataset.json lists train_000001.bin, which is missing"
    assert len(open_dataset(folder).split("val")) == 9


def test_a_shard_that_the_manifest_does_not_name_is_not_read(shard_folder):
    folder = shard_folder(train=[positions(9)])
    write_shard(folder / "train_000001.bin", positions(9))
    assert len(open_dataset(folder).split("train")) == 9


def test_a_missing_folder_and_one_without_shards_are_refused(shard_folder, tmp_path):
    folder = shard_folder(train=[positions(9)])
    assert refusal(folder, "val").startswith(f"{folder} has no val shards")
    missing = tmp_path / "missing"
    assert refusal(missing) == (
        f"there is no data in {missing}; python prepare.py --sources=FILES --data_dir={missing} "
        "makes it"
    )
    (tmp_path / "tales").mkdir()
    (tmp_path / "tales" / "dataset.json").touch()
    for empty in (missing, tmp_path):
        assert refusal(empty).startswith(f"there is no data in {empty}; ")
        assert refusal(empty).endswith(f" makes it (existing data: {tmp_path / 'tales'})")


def test_a_half_prepared_folder_is_refused(shard_folder):
    folder = shard_folder(train=[positions(9)], manifest=False)
    (folder / dataset.PARTIAL).mkdir()
    assert refusal(folder) == f"{folder} is half prepared: run its prepare.py command again"


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"3", b"{}"])
def test_a_damaged_manifest_is_refused(shard_folder, content):
    folder = shard_folder(train=[positions(9)])
    (folder / "dataset.json").write_bytes(content)
    assert refusal(folder).startswith(f"{folder}/dataset.json")
    assert refusal(folder).endswith("; prepare the data again")


def test_a_damaged_field_of_the_manifest_is_named(shard_folder):
    folder = shard_folder(train=[positions(9), positions(9)])
    path = folder / "dataset.json"
    path.write_text(path.read_text().replace('"tokens": 9', '"tokens": "9"', 1))
    assert refusal(folder) == (
        f"{path}: splits.train.shards[0].tokens: expected a whole number, got a string; "
        "prepare the data again"
    )


# --- the manifest


def test_the_fingerprint_is_that_of_the_training_tokens(shard_folder):
    one = fingerprint(shard_folder(train=[positions(9), positions(4)]))
    again = fingerprint(shard_folder(train=[positions(9), positions(4)], val=[[1]]))
    other = fingerprint(shard_folder(train=[positions(9), positions(4, 1)]))
    assert one == again != other
    folder = shard_folder(train=[positions(9)], manifest=False)
    longer = shard_folder(train=[positions(10)], manifest=False)
    assert fingerprint(folder) != fingerprint(longer)


def test_bytes_per_token_come_from_the_manifest(shard_folder):
    folder = shard_folder(train=[positions(10)])
    manifest = json.loads((folder / "dataset.json").read_text())
    manifest["splits"]["train"]["bytes"] = 35
    (folder / "dataset.json").write_text(json.dumps(manifest))

    def bytes_per_token(folder):
        data = open_dataset(folder)
        return data.bytes_per_token(data.split("train"))

    assert bytes_per_token(folder) == 3.5
    assert bytes_per_token(shard_folder(train=[[1]], manifest=False)) is None
    (folder / "train_000000.mask.bin").write_bytes(bytes(10))
    assert bytes_per_token(folder) is None


def test_the_manifest_is_read_once(shard_folder):
    folder = shard_folder(train=[positions(10)], val=[positions(4)])
    data = open_dataset(folder)
    (folder / "dataset.json").unlink()
    train = data.split("train")
    assert (len(train), len(data.split("val"))) == (10, 4)
    assert data.bytes_per_token(train) == 1 and data.statistics["val"]["tokens"] == 4


def test_a_missing_mask_is_not_a_mask_of_ones(tmp_path):
    writer = shards.ShardWriter(tmp_path, "train", 100, masked=True)
    writer.write(positions(50), np.zeros(50, np.uint8))
    write_manifest(tmp_path, writer.close())
    before = fingerprint(tmp_path)
    (tmp_path / "train_000000.mask.bin").unlink()
    assert "train_000000.mask.bin is missing" in refusal(tmp_path)
    writer = shards.ShardWriter(tmp_path, "train", 100, masked=True)
    writer.write(positions(50), np.ones(50, np.uint8))
    write_manifest(tmp_path, writer.close())
    assert fingerprint(tmp_path) != before
