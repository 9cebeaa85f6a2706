"""Documents → the shards of both splits, within the limits and with saved progress."""

import shutil
import struct
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from configurator import UserError
from plaingpt.text.blocks import GrowingFile
from plaingpt.text.dataset import SplitEntries, SplitEntry
from plaingpt.text.documents import Bad, Encoded, End, Part, Reading, Record, Stream, encoded
from plaingpt.text.progress import NAME, Progress, SplitNotes, SplitsNotes
from plaingpt.text.shards import ShardWriter, Split, shard_paths
from plaingpt.text.tokenizer import MAX_VOCAB_SIZE, Tokenizer
from plaingpt.wording import byte_size, quantity

DOCUMENT = np.dtype([("digest", "<u8"), ("tokens", "<u8"), ("bytes", "<u8")])
pack_document = struct.Struct("<3Q").pack  # the same, much faster than an array of one
CUT = 0  # digest of a document that was cut short, which equals no other
KEPT = "kept"  # folder of validation shards without the documents that are trained on
SAVE_SECONDS = 5.0  # between two saves of the progress


@dataclass(frozen=True)
class Limits:
    """Where to stop; inf where there is no limit."""

    max_tokens: float  # of all sources except validation sources
    max_documents: float
    max_record_tokens: float
    shard_tokens: int


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
        self._file.write(pack_document(digest, *self.open))
        self.documents += 1
        self.open = (0, 0)

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


class SplitBuilder:
    """Writes both splits from the streams, resuming from saved progress."""

    def __init__(
        self,
        progress: Progress,
        tokenizer: Tokenizer,
        streams: list[Stream],
        reading: Reading,
        limits: Limits,
    ) -> None:
        self.progress, self.tokenizer, self.streams = progress, tokenizer, streams
        self.reading, self.limits, self.validation = reading, limits, reading.validation
        masked, splits = reading.template != "text", progress.notes.splits
        self.train, self.val = (
            SplitWriter(progress.folder, name, limits.shard_tokens, masked, notes)
            for name, notes in (("train", splits.train), ("val", splits.val))
        )
        before = progress.notes.streams
        if before and len(before) != len(streams):
            raise UserError(f"{NAME} has other sources: remove {progress.folder} to start over")
        for stream, known in zip(streams, before):
            stream.restore(known)
        self.saved = self.began = time.monotonic()
        self.began_tokens, self.began_bytes = self.tokens, self.bytes
        sizes = [stream.source.size for stream in streams]
        self.counts_tokens = limits.max_tokens < float("inf")
        self.bar = tqdm(
            total=limits.max_tokens if self.counts_tokens else sum(sizes) if all(sizes) else None,
            initial=self.done,
            unit="tok" if self.counts_tokens else "B",
            unit_scale=True,
            delay=1,
            mininterval=0.5 if sys.stderr.isatty() else 60,  # seconds; a log gets a line a minute
        )

    @property
    def tokens(self) -> int:
        return self.train.tokens + self.val.tokens

    @property
    def bytes(self) -> int:
        return self.train.bytes + self.val.bytes

    @property
    def done(self) -> int:
        """What the progress bar counts: tokens towards max_tokens, else bytes of the sources."""
        if self.counts_tokens:
            return self.tokens
        return sum(stream.position.read for stream in self.streams)

    def run(self, threads: int) -> None:
        """Read all streams to their end or to the limits, validation sources last."""
        with ThreadPoolExecutor(threads) as pool, self.bar:
            for all_val in (False, True):
                streams = [stream for stream in self.streams if stream.all_val == all_val]
                readers = [
                    encoded(stream, self.reading, self.tokenizer, pool, threads + 1)
                    for stream in streams
                ]
                while not self.is_enough(all_val) and (stream := self.next_stream(streams)):
                    self.take_document(stream, readers[streams.index(stream)])
            self.save()

    def room(self, all_val: bool) -> float:
        """Tokens that may still be written from validation sources, or from the others."""
        if all_val:
            return self.validation.max_tokens - self.val.tokens
        return self.limits.max_tokens - self.tokens

    def is_enough(self, all_val: bool) -> bool:
        documents = 0 if all_val else self.train.documents + self.val.documents
        return self.room(all_val) <= 0 or documents >= self.limits.max_documents

    def next_stream(self, streams: list[Stream]) -> Stream | None:
        """The first that has not ended; with weights the one furthest behind, until one ends."""
        for stream in streams:
            if stream.position.characters:  # in the middle of a document
                return stream
        if streams and streams[0].source.weight and not streams[0].all_val:
            if any(stream.ended for stream in streams):
                return None
            return min(streams, key=lambda stream: stream.tokens / (stream.source.weight or 1))
        return next((stream for stream in streams if not stream.ended), None)

    def take_document(self, stream: Stream, reader: Iterator[Encoded]) -> None:
        """Write the next document of a stream, or count its next bad record."""
        limit = self.limits.max_record_tokens
        for item, ids, mask in reader:
            stream.position = item.after
            if isinstance(item, Record) and len(ids) > limit:
                item = Bad(f"more than {quantity(int(limit), 'token')}", item.where, item.after)
            if isinstance(item, Bad):
                self.drop(stream, item)
                return
            self.write(stream, item, ids, mask)
            is_last = not isinstance(item, Part) or self.is_enough(stream.all_val)
            if is_last:
                split = self.val if self.val.in_document else self.train
                split.end_document(CUT if isinstance(item, Part) else item.digest)
                stream.documents += 1
            self.bar.update(self.done - self.bar.n)
            if time.monotonic() - self.saved > SAVE_SECONDS:
                self.save()
            if is_last:
                return
        stream.ended = True
        stream.position = stream.position._replace(read=stream.source.size)

    def write(
        self, stream: Stream, item: Record | Part | End, ids: np.ndarray, mask: np.ndarray | None
    ) -> None:
        """Write an item as far as there is room: a record to one split, a part to validation until
        that is full and then to training."""
        start, end = 0, int(min(len(ids), self.room(stream.all_val)))
        stream.tokens += end
        while start < end:
            split, stop = self.split_of(item), end
            if split is self.val and isinstance(item, Part):
                stop = int(min(end, start + self.validation.max_tokens - self.val.tokens))
            some = ids[start:stop]
            size = item.bytes if len(some) == len(ids) else self.tokenizer.count_bytes(some)
            split.write(some, None if mask is None else mask[start:stop], size)
            start = stop

    def split_of(self, item: Record | Part | End) -> SplitWriter:
        """Where the next tokens go: a document that is held out to validation, until that is full.
        The rest of a text file is then a training document."""
        if self.train.in_document:
            return self.train
        if self.val.in_document and not isinstance(item, Part):
            return self.val
        if item.held_out and not self.validation.is_full(self.val.tokens, self.val.documents):
            return self.val
        if self.val.in_document:
            self.val.end_document(CUT)
        return self.train

    def drop(self, stream: Stream, bad: Bad) -> None:
        if self.reading.bad_records == "refuse":
            raise UserError(
                f"{bad.where}: {bad.reason} (--bad_records=skip leaves such records out)"
            )
        stream.drop(bad.reason, bad.where)
        if stream.dropped[bad.reason][0] <= 3:
            self.bar.write(f"skipped {bad.where}: {bad.reason}", file=sys.stderr)

    def save(self) -> None:
        splits = SplitsNotes(self.train.notes(), self.val.notes())
        self.progress.save(splits, tuple(stream.notes() for stream in self.streams))
        self.saved = time.monotonic()
        seconds = max(self.saved - self.began, 1e-9)
        mb_per_s = (self.bytes - self.began_bytes) / seconds / 1e6
        mtok_per_s = (self.tokens - self.began_tokens) / seconds / 1e6
        self.bar.set_postfix_str(
            f"{mb_per_s:.1f} MB/s, {mtok_per_s:.2f}M tok/s, {quantity(self.tokens, 'token')}, "
            f"{byte_size(2 * self.tokens)} written",
            refresh=False,
        )

    def finish(self) -> SplitEntries:
        """Close the shards; take documents that are trained on out of the validation split."""
        train, val = self.train.close(), self.val.close()
        both = in_both(self.train.path, self.val.path)
        if both.any():
            return SplitEntries(train, without_documents(self.progress.folder, self.val, both))
        return SplitEntries(train if train.documents else None, val if val.documents else None)


def in_both(train: Path, val: Path) -> np.ndarray:
    """For each validation document, whether it is also a training document."""
    wanted = np.fromfile(val, DOCUMENT)["digest"]
    found = np.zeros(len(wanted), dtype=bool)
    with train.open("rb") as file:
        while len(some := np.fromfile(file, DOCUMENT, count=1 << 20)):
            found |= np.isin(wanted, some["digest"])
    return found & (wanted != CUT)


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
