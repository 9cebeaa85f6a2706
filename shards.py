"""
Writing shards: token by token, noted on the disk, and gone on with where the last note says.

Beside the shards of a split a file `{name}.documents` has the digest, tokens and bytes of each
document until all is done, so that no document of the validation split is trained on as well.
"""

import hashlib
import os
import shutil
from pathlib import Path
from typing import IO, Any

import numpy as np

from data import HEADER_BYTES, MAGIC, VERSION, Split, mask_path
from tokenizer import MAX_VOCAB_SIZE

DOCUMENT = np.dtype([("digest", "<u8"), ("tokens", "<u8"), ("bytes", "<u8")])
CUT = 0  # digest of a document that was cut short: like no other
BUFFER = 1 << 20  # bytes between two writes of a file
KEPT = "kept"  # folder of validation shards without the documents that are trained on


class ShardWriter:
    """Appends tokens to `{name}_000000.bin`, `…_000001.bin`, …, `shard_tokens` in each.

    With `state`, what `sync` returned once, it goes on from there, whatever was written since.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        shard_tokens: int,
        masked: bool = False,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Raises ValueError where files lack what `state` says they hold."""
        assert shard_tokens < 2**31
        self.folder, self.name, self.shard_tokens, self.masked = folder, name, shard_tokens, masked
        state = state or {"shards": [], "filled": 0}
        self.shards: list[dict[str, Any]] = list(state["shards"])
        self.filled: int = state["filled"]  # tokens in the shard that is open
        self._file: IO[bytes] | None = None
        self._mask_file: IO[bytes] | None = None
        kept = {shard["file"] for shard in self.shards}
        for path in folder.glob(f"{name}_*.bin"):
            if path.name.replace(".mask.bin", ".bin") not in kept | {self._path.name}:
                path.unlink()
        if self.filled:
            self._file = reopen(self._path, HEADER_BYTES + 2 * self.filled)
            if masked:
                self._mask_file = reopen(mask_path(self._path), self.filled)

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.name}_{len(self.shards):06d}.bin"

    def write(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append uint16 tokens, and where the writer is `masked` their mask, uint8."""
        assert tokens.dtype == np.uint16 and self.masked == (mask is not None)
        while len(tokens):
            if self._file is None:
                self._file = self._path.open("wb", buffering=BUFFER)
                self._file.write(shard_header(0).data)
                self._mask_file = mask_path(self._path).open("wb") if self.masked else None
            room = self.shard_tokens - self.filled
            part, tokens = tokens[:room], tokens[room:]
            self._file.write(part.astype("<u2", copy=False).data)
            if mask is not None and self._mask_file:
                self._mask_file.write(mask[:room].data)
                mask = mask[room:]
            self.filled += len(part)
            if self.filled == self.shard_tokens:
                self._finish()

    def sync(self) -> dict[str, Any]:
        """Flush everything to the disk; return what a later writer needs to go on."""
        for file in (self._file, self._mask_file):
            if file:
                file.flush()
                os.fsync(file.fileno())
        return {"shards": self.shards, "filled": self.filled}

    def close(self) -> list[dict[str, Any]]:
        """Finish the last shard; return the entries of all for the manifest."""
        if self.filled:
            self._finish()
        return self.shards

    def _finish(self) -> None:
        assert self._file
        path, entry = self._path, {"file": self._path.name, "tokens": self.filled}
        self._file.seek(0)
        self._file.write(shard_header(self.filled).data)
        self.sync()
        self._file.close()
        entry["sha256"] = sha256_of(path)
        if self._mask_file:
            self._mask_file.close()
            entry["mask_sha256"] = sha256_of(mask_path(path))
        self._file = self._mask_file = None
        self.shards, self.filled = [*self.shards, entry], 0


def shard_header(tokens: int) -> np.ndarray:
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header


def reopen(path: Path, size: int) -> IO[bytes]:
    """A file to append to behind its first `size` bytes; what follows them is cut off."""
    file = path.open("r+b", buffering=BUFFER)
    if file.seek(0, os.SEEK_END) < size:
        raise ValueError(f"{path} has lost its end: remove {path.parent} to start over")
    file.truncate(size)
    file.seek(size)
    return file


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class SplitWriter:
    """A split as it is written: its shards, and digest, tokens and bytes of each document."""

    def __init__(
        self, folder: Path, name: str, shard_tokens: int, masked: bool, notes: dict[str, Any]
    ) -> None:
        self.documents = notes.get("documents", 0)
        self.tokens = notes.get("tokens", 0)
        self.bytes = notes.get("bytes", 0)
        self.open = notes.get("open", [0, 0])  # tokens and bytes of a document not ended yet
        self.shards = ShardWriter(folder, name, shard_tokens, masked, notes.get("shards"))
        self.path = folder / f"{name}.documents"
        self.path.touch()
        self._file = reopen(self.path, DOCUMENT.itemsize * self.documents)

    def write(self, ids: np.ndarray, mask: np.ndarray | None, size: int) -> None:
        self.shards.write(ids, mask)
        self.tokens += len(ids)
        self.bytes += size
        self.open = [self.open[0] + len(ids), self.open[1] + size]

    def end_document(self, digest: int) -> None:
        self._file.write(np.array((digest, *self.open), DOCUMENT).tobytes())
        self.documents += 1
        self.open = [0, 0]

    def notes(self) -> dict[str, Any]:
        """Flush all to the disk; return what the next writer of this split needs."""
        self._file.flush()
        os.fsync(self._file.fileno())
        names = ("documents", "tokens", "bytes", "open")
        return {"shards": self.shards.sync()} | {name: getattr(self, name) for name in names}

    def close(self) -> dict[str, Any]:
        """The split's part of the manifest."""
        self._file.close()
        counts = {"documents": self.documents, "bytes": self.bytes, "tokens": self.tokens}
        return counts | {"shards": self.shards.close()}


def in_both(train: Path, val: Path) -> np.ndarray:
    """For each validation document whether it is a training document too."""
    wanted = np.fromfile(val, DOCUMENT)["digest"]
    found = np.zeros(len(wanted), dtype=bool)
    with train.open("rb") as file:
        while len(some := np.fromfile(file, DOCUMENT, count=1 << 20)):
            found |= np.isin(wanted, some["digest"])
    return found & (wanted != CUT)


def without_documents(
    partial: Path, split: SplitWriter, entry: dict[str, Any], left_out: np.ndarray
) -> dict[str, Any]:
    """Write a split again, in a folder KEPT, without some documents; return its new entry."""
    known = np.fromfile(split.path, DOCUMENT)
    shutil.rmtree(partial / KEPT, ignore_errors=True)
    (partial / KEPT).mkdir()
    writer = ShardWriter(partial / KEPT, "val", split.shards.shard_tokens, split.shards.masked)
    whole = Split(partial, "val", MAX_VOCAB_SIZE)
    stops = np.cumsum(known["tokens"]).tolist()
    for stop, length, out in zip(stops, known["tokens"].tolist(), left_out):
        if out:
            continue
        for start in range(stop - length, stop, 1 << 20):
            end = min(start + (1 << 20), stop)
            mask = whole.mask(start, end) if split.shards.masked else None
            writer.write(
                whole[start:end].astype(np.uint16),
                None if mask is None else mask.astype(np.uint8),
            )
    kept = known[~left_out]
    return {
        "documents": len(kept),
        "bytes": int(kept["bytes"].sum()),
        "tokens": int(kept["tokens"].sum()),
        "trained_on": int(left_out.sum()),  # documents that were left out for it
        "shards": writer.close(),
    }
