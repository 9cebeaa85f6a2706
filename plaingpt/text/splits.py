"""A split as it is written, and what of validation is left once training is complete."""

import shutil
from pathlib import Path

import numpy as np

from configurator import UserError
from plaingpt.text.blocks import GrowingFile
from plaingpt.text.dataset import SplitEntry
from plaingpt.text.progress import NAME, SplitNotes
from plaingpt.text.shards import ShardWriter, Split, shard_paths
from plaingpt.text.tokenizer import MAX_VOCAB_SIZE

DOCUMENT = np.dtype([("digest", "<u8"), ("tokens", "<u8"), ("bytes", "<u8")])
CUT = 0  # digest of a document that was cut short, which equals no other
KEPT = "kept"  # folder of validation shards without the documents that are trained on


class SplitWriter:
    """A split being written: its shards, plus the digest, tokens and bytes of each document."""

    def __init__(
        self, folder: Path, name: str, shard_tokens: int, masked: bool, notes: SplitNotes
    ) -> None:
        self.documents, self.tokens, self.bytes = notes.documents, notes.tokens, notes.bytes
        self.open = notes.open  # tokens and bytes of the unfinished document
        self.shards = ShardWriter(folder, name, shard_tokens, masked, notes.shards)
        self.path = folder / f"{name}.documents"
        size = DOCUMENT.itemsize * self.documents
        self._file = GrowingFile(self.path, 0, size, notes.crc32)
        known = np.fromfile(self.path, DOCUMENT)
        counted = (known["tokens"].sum() + self.open[0], known["bytes"].sum() + self.open[1])
        if counted != (self.tokens, self.bytes):
            raise UserError(f"{self.path} does not match {NAME}: remove {folder} to start over")

    @property
    def in_document(self) -> bool:
        return self.open[0] > 0

    def write(self, ids: np.ndarray, mask: np.ndarray | None, size: int) -> None:
        self.shards.write(ids, mask)
        self.tokens += len(ids)
        self.bytes += size
        self.open = (self.open[0] + len(ids), self.open[1] + size)

    def end_document(self, digest: int) -> None:
        self._list(np.array([(digest, *self.open)], DOCUMENT))
        self.open = (0, 0)

    def write_documents(
        self, ids: np.ndarray, mask: np.ndarray | None, documents: np.ndarray
    ) -> None:
        """Write whole DOCUMENTs, which have these ids in all."""
        self.shards.write(ids, mask)
        self.tokens += len(ids)
        self.bytes += int(documents["bytes"].sum())
        self._list(documents)

    def _list(self, documents: np.ndarray) -> None:
        self._file.write(documents.tobytes())
        self.documents += len(documents)

    def notes(self) -> SplitNotes:
        """Flush everything to disk; return what the next writer of this split needs."""
        self._file.sync()
        return SplitNotes(
            crc32=self._file.sums,
            shards=self.shards.sync(),
            documents=self.documents,
            tokens=self.tokens,
            bytes=self.bytes,
            open=self.open,
        )

    def close(self) -> SplitEntry:
        """The split's part of the manifest."""
        self._file.close()
        return SplitEntry(
            documents=self.documents,
            bytes=self.bytes,
            tokens=self.tokens,
            shards=self.shards.close(),
        )


def in_both(train: Path, val: Path) -> np.ndarray:
    """For each validation document, whether it is also a training document."""
    wanted = np.fromfile(val, DOCUMENT)["digest"]
    known = np.unique(wanted[wanted != CUT])
    found = np.zeros(len(known) + 1, dtype=bool)
    with train.open("rb") as file:
        while len(some := np.fromfile(file, DOCUMENT, count=1 << 20)):
            digests = np.sort(some["digest"])  # searching is several times as fast in order
            places = known.searchsorted(digests)
            equal = known.take(places, mode="clip") == digests if len(known) else places < 0
            found[places[equal]] = True
    return found[known.searchsorted(wanted)] & (wanted != CUT)


def without_documents(partial: Path, split: SplitWriter, left_out: np.ndarray) -> SplitEntry:
    """Write the validation split again, to the folder KEPT, without some of its documents; return
    its new part of the manifest."""
    known = np.fromfile(split.path, DOCUMENT)
    shutil.rmtree(partial / KEPT, ignore_errors=True)
    (partial / KEPT).mkdir()
    writer = ShardWriter(partial / KEPT, "val", split.shards.shard_tokens, split.shards.masked)
    whole = Split("val", shard_paths(partial, "val"), MAX_VOCAB_SIZE)
    stops = np.cumsum(known["tokens"]).tolist()
    for stop, length, out in zip(stops, known["tokens"].tolist(), left_out):
        if out:
            continue
        for start in range(stop - length, stop, 1 << 20):
            end = min(start + (1 << 20), stop)
            writer.write(whole.tokens(start, end), whole.flags(start, end))
    kept = known[~left_out]
    return SplitEntry(
        documents=len(kept),
        bytes=int(kept["bytes"].sum()),
        tokens=int(kept["tokens"].sum()),
        trained_on=int(left_out.sum()),
        shards=writer.close(),
    )
