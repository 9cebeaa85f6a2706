"""Files that differ from their checksums are refused, and files without any are opened."""

import json
import shutil
import subprocess
import zlib

import numpy as np
import pytest

from configurator import UserError
from plaingpt import checksums, files
from plaingpt.text import blocks


def test_the_sums_are_those_of_sha256sum(tmp_path):
    for name, content in {"a": b"", "ä b": b"x" * 3_000_000}.items():
        (tmp_path / name).write_bytes(content)
    hashes = {name: checksums.sha256_of(tmp_path / name) for name in ("a", "ä b")}
    checksums.write_sums(tmp_path, hashes)
    if shutil.which("sha256sum"):
        run = subprocess.run(["sha256sum", "-c", checksums.SUMS], cwd=tmp_path, check=False)
        assert run.returncode == 0
    for name in hashes:
        checksums.check_sum(tmp_path / name)


def test_a_listed_file_that_changed_is_refused_by_name_and_others_are_not(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    checksums.check_sum(path)  # nothing is listed
    checksums.write_sums(tmp_path, {"a.json": checksums.sha256_of(path)})
    (tmp_path / "b.json").write_text("not listed")
    checksums.check_sum(tmp_path / "b.json")
    path.write_text('{"a": 2}')
    with pytest.raises(UserError) as refused:
        checksums.check_sum(path)
    assert str(refused.value) == (
        f"{path} is damaged or was edited: it does not match SHA256SUMS. Restore it or, if the "
        f"change is intended, delete {tmp_path}/SHA256SUMS"
    )
    (tmp_path / checksums.SUMS).unlink()
    checksums.check_sum(path)


@pytest.mark.parametrize("indent", [None, 1])
def test_any_bit_of_a_sealed_object_counts(indent):
    """But for those of the seal, which may stop being one."""
    value = {"a": [1, 2.5], "b": {"ü": None}}
    content = checksums.sealed(json.dumps(value, indent=indent) + "\n").encode()
    sealed = json.loads(content)
    assert len(sealed.pop("crc32")) == 8 and sealed == value
    checksums.check_seal(content)
    noticed = 0
    for bit in range(8 * len(content)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            checksums.check_seal(bytes(changed))
            found = json.loads(changed)
        except ValueError:
            noticed += 1
        else:
            assert value.items() <= found.items()
    assert noticed > 0.8 * 8 * len(content)


def test_an_object_without_a_seal_is_taken():
    checksums.check_seal(b'{"a": 1}')


# --- blocks


@pytest.mark.parametrize("header", [0, 3])
@pytest.mark.parametrize("size", [0, 1, 4, 5, 12, 13])
def test_the_sums_of_blocks_do_not_depend_on_how_they_were_written(
    tmp_path, monkeypatch, size, header
):
    monkeypatch.setattr(blocks, "BLOCK", 4)
    content = bytes(range(size))
    wanted = "".join(f"{zlib.crc32(content[at : at + 4]):08x}" for at in range(0, size, 4))
    for step in (1, 3, 4, 20):
        for reopened in (False, True):
            file, sums = blocks.GrowingFile(tmp_path / "a", header), ""
            for start in range(0, size, step):
                if reopened and start:
                    file.write(b"to be cut off")
                    file.close(bytes(header))
                    file = blocks.GrowingFile(tmp_path / "a", header, start, sums)
                file.write(content[start : start + step])
                sums = file.sums
            file.close(b"h" * header)
            assert file.sums == wanted
            assert (tmp_path / "a").read_bytes() == b"h" * header + content


def test_a_file_that_changed_is_not_continued(tmp_path):
    file = blocks.GrowingFile(tmp_path / "a")
    file.write(b"abc")
    file.close()
    (tmp_path / "a").write_bytes(b"abd")
    with pytest.raises(UserError, match="a has changed since it was written: remove"):
        blocks.GrowingFile(tmp_path / "a", 0, 3, file.sums)
    blocks.GrowingFile(tmp_path / "a", 0, 3).close()  # as an older version left it, without sums


def test_a_block_is_compared_when_it_is_first_read(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 4)
    content = np.arange(10, dtype=np.uint8)
    sums = "".join(f"{zlib.crc32(content[at : at + 4]):08x}" for at in range(0, 10, 4))
    check = blocks.BlockCheck(tmp_path / "a", 100, content, sums)
    check(4, 8)
    content[5] = content[9] = 77
    for start, stop in ((0, 0), (0, 8), (4, 5)):  # its bitmap remembers the middle block
        check(start, stop)
    for start, stop in ((7, 9), (9, 10)):
        with pytest.raises(UserError, match="a is damaged: bytes 108 to 109 have changed"):
            check(start, stop)
    with pytest.raises(UserError, match="differ in length"):
        blocks.BlockCheck(tmp_path / "a", 100, content, sums[8:])
