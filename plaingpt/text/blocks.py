"""
CRC-32s of the blocks of large files, which are read in pieces, so that a changed bit is noticed
when its block is first read.
"""

import os
import zlib
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from configurator import UserError

BLOCK = 128 * 1024  # bytes: about what an operating system reads at once
BUFFER = 1 << 20  # bytes between two writes of a file
BlockSums = Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{8})*$")]  # the CRC-32s, in order


class GrowingFile:
    """A file that grows at its end, possibly over several processes, and the checksums of the
    blocks after its header."""

    def __init__(self, path: Path, header: int = 0, size: int = 0, sums: BlockSums = "") -> None:
        """Start a new file if `size` is 0. Otherwise keep the header and the `size` bytes after it,
        cut off the rest and continue there.

        Raises UserError if the file is shorter, or does not match `sums` ("" from older versions,
        which kept none).
        """
        self.size, self.header = 0, header
        self._sums: list[int] = []
        if size == 0:
            self._file = path.open("wb", buffering=BUFFER)
            self._file.write(bytes(header))
            return
        self._file = path.open("r+b", buffering=BUFFER)
        try:
            if self._file.seek(0, os.SEEK_END) < header + size:
                raise UserError(f"{path} is cut off: remove {path.parent} to start over")
            self._file.truncate(header + size)
            self._count(np.memmap(path, np.uint8, "r", header, size).data)
            if sums not in ("", self.sums):
                raise UserError(
                    f"{path} has changed since it was written: remove {path.parent} to start over"
                )
        except UserError:
            self._file.close()
            raise
        self._file.seek(header + size)

    @property
    def sums(self) -> BlockSums:
        return np.array(self._sums, ">u4").tobytes().hex()

    def write(self, content: bytes | memoryview) -> None:
        self._file.write(content)
        self._count(memoryview(content))

    def _count(self, content: memoryview) -> None:
        while len(content):
            room = BLOCK - self.size % BLOCK
            if room == BLOCK:
                self._sums.append(0)
            part, content = content[:room], content[room:]
            self._sums[-1] = zlib.crc32(part, self._sums[-1])
            self.size += len(part)

    def sync(self) -> None:
        """Flush everything to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self, header: bytes = b"") -> None:
        """Write the header, flush everything to disk and close the file."""
        assert len(header) == self.header
        if header:
            self._file.seek(0)
            self._file.write(header)
        self.sync()
        self._file.close()


class BlockCheck:
    """Compares each block of a mapped file with its checksum when the block is first read."""

    def __init__(self, path: Path, header: int, content: np.ndarray, sums: BlockSums) -> None:
        """`content` is the file after its header. Raises UserError unless there is one checksum per
        block."""
        self.path, self.header, self.content = path, header, content.view(np.uint8)
        self.sums = np.frombuffer(bytes.fromhex(sums), ">u4")
        self.unread = np.ones(len(self.sums), bool)
        if len(self.sums) != -(-len(self.content) // BLOCK):
            raise UserError(f"{path} and its checksums differ in length: prepare the data again")

    def __call__(self, start: int, stop: int) -> None:
        """Raises UserError if a block that holds any of the bytes start … stop - 1 has changed."""
        for block in range(start // BLOCK, -(-stop // BLOCK)):
            if self.unread[block]:
                content = self.content[block * BLOCK : (block + 1) * BLOCK]
                if zlib.crc32(content.data) != self.sums[block]:
                    first = self.header + block * BLOCK
                    raise UserError(
                        f"{self.path} is damaged: bytes {first:,} to {first + len(content) - 1:,} "
                        "have changed since they were prepared. Restore it, or prepare the data "
                        "again"
                    )
                self.unread[block] = False
