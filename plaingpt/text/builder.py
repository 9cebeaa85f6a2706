"""What prepare.py drives: documents → the shards of both splits, with notes of how far it is."""

import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from configurator import UserError
from plaingpt import files
from plaingpt.text.documents import DEFAULT_THREADS, Encoded, Piece, Reading, Stream, encoded
from plaingpt.text.shards import ShardWriter, Split, reopen, shard_paths
from plaingpt.text.tokenizer import MAX_VOCAB_SIZE, Tokenizer

if TYPE_CHECKING:
    from prepare import PrepareConfig

DOCUMENT = np.dtype([("digest", "<u8"), ("tokens", "<u8"), ("bytes", "<u8")])
CUT = 0  # digest of a document that was cut short: like no other
KEPT = "kept"  # folder of validation shards without the documents that are trained on
SAVE_SECONDS = 5.0  # between two notes of how far it is


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


class Work:
    """The writing of both splits, with notes of how far it is."""

    def __init__(
        self,
        cfg: "PrepareConfig",
        partial: Path,
        tokenizer: Tokenizer,
        streams: list[Stream],
        header: dict[str, Any],
        notes: dict[str, Any],
    ) -> None:
        self.cfg, self.partial, self.tokenizer = cfg, partial, tokenizer
        self.streams, self.header = streams, header
        self.val_tokens = cfg.val_tokens or math.inf
        self.val_documents = math.inf
        if not cfg.val_sources:
            if cfg.max_tokens:
                self.val_tokens = min(self.val_tokens, round(cfg.val_fraction * cfg.max_tokens))
            if cfg.max_documents:
                self.val_documents = math.ceil(cfg.val_fraction * cfg.max_documents)
        splits = notes.get("splits", {})
        self.train, self.val = (
            SplitWriter(
                partial, name, cfg.shard_tokens, cfg.template != "text", splits.get(name, {})
            )
            for name in ("train", "val")
        )
        for stream, known in zip(streams, notes.get("streams", [])):
            stream.restore(known)
        self.saved = time.monotonic()
        self.began_bytes, self.began = self.train.bytes + self.val.bytes, self.saved
        self.began_tokens = self.tokens
        sizes = [stream.source.size for stream in streams]
        self.bar = tqdm(
            total=cfg.max_tokens or (sum(sizes) if all(sizes) else None),
            initial=self.done,
            unit="tok" if cfg.max_tokens else "B",
            unit_scale=True,
            delay=1,
            mininterval=0.5 if sys.stderr.isatty() else 60,  # seconds; a log gets a line a minute
        )

    @property
    def tokens(self) -> int:
        return self.train.tokens + self.val.tokens

    @property
    def done(self) -> int:
        """What the progress bar counts: tokens towards max_tokens, else bytes of the sources."""
        if self.cfg.max_tokens:
            return self.tokens
        return sum(stream.position.read for stream in self.streams)

    def run(self, reading: Reading) -> None:
        """Read all streams to their end, or to the limits of the settings."""
        threads = self.cfg.workers or DEFAULT_THREADS
        with ThreadPoolExecutor(threads) as pool, self.bar:
            for validation in (False, True):
                streams = [stream for stream in self.streams if stream.all_val == validation]
                readers = [
                    encoded(stream, reading, self.tokenizer, pool, threads + 1)
                    for stream in streams
                ]
                while not self.enough(validation) and (stream := self.next_stream(streams)):
                    self.take_document(stream, readers[streams.index(stream)])
            self.save()

    def enough(self, validation: bool) -> bool:
        if validation:
            return self.val.tokens >= self.val_tokens
        documents = self.train.documents + self.val.documents
        enough_tokens = self.tokens >= (self.cfg.max_tokens or math.inf)
        return enough_tokens or documents >= (self.cfg.max_documents or math.inf)

    def next_stream(self, streams: list[Stream]) -> Stream | None:
        """The first that has not ended; with weights the one most behind, until one has ended."""
        for stream in streams:
            if stream.position.characters:  # in the middle of a document
                return stream
        if streams and streams[0].source.weight and not streams[0].all_val:
            if any(stream.ended for stream in streams):
                return None
            return min(streams, key=lambda stream: stream.tokens / (stream.source.weight or 1))
        return next((stream for stream in streams if not stream.ended), None)

    def take_document(self, stream: Stream, reader: Iterator[Encoded]) -> None:
        """Write the next document of a stream, or count the next record that is none."""
        held: list[Encoded] = []
        for piece, ids, mask in reader:
            held.append((piece, ids, mask))
            if piece.whole and piece.digest is None:
                continue
            problem = next((each[0].problem for each in held if each[0].problem), None)
            tokens = sum(len(each[1]) for each in held)
            limit = self.cfg.max_record_tokens
            if piece.whole and limit and tokens > limit:
                problem = f"more than {limit:,} tokens"
            stream.position = piece.after
            if problem:
                self.drop(stream, problem, piece.where)
                return
            self.write(stream, held)
            held = []
            done = piece.digest is not None or self.enough(stream.all_val)
            if done:
                split = self.val if self.val.open[0] else self.train
                split.end_document(piece.digest or CUT)
                stream.documents += 1
            self.bar.update(self.done - self.bar.n)
            if time.monotonic() - self.saved > SAVE_SECONDS:
                self.save()
            if done:
                return
        stream.ended = True
        stream.position = stream.position._replace(read=stream.source.size)

    def write(self, stream: Stream, pieces: list[Encoded]) -> None:
        for piece, ids, mask in pieces:
            start, end = 0, len(ids)
            if self.cfg.max_tokens and not stream.all_val:
                end = min(end, self.cfg.max_tokens - self.tokens)
            if self.cfg.val_tokens and stream.all_val:
                end = min(end, self.cfg.val_tokens - self.val.tokens)
            stream.tokens += end
            while start < end:
                split, stop = self.split_of(piece), end
                if split is self.val and piece.bytes and not piece.whole:
                    stop = int(min(end, start + self.val_tokens - self.val.tokens))
                part = ids[start:stop]
                cut = len(part) < len(ids)
                size = self.tokenizer.count_bytes(part) if cut else piece.bytes
                split.write(part, None if mask is None else mask[start:stop], size)
                start = stop

    def split_of(self, piece: Piece) -> SplitWriter:
        """Where a piece goes: to validation, if its document fell to it and until that has enough.
        What is left of a text then is trained on."""
        if self.train.open[0]:  # the document goes on
            return self.train
        if self.val.open[0] and (piece.whole or not piece.bytes):
            return self.val
        full = self.val.tokens >= self.val_tokens or self.val.documents >= self.val_documents
        if piece.val and not full:
            return self.val
        if self.val.open[0]:
            self.val.end_document(CUT)
        return self.train

    def drop(self, stream: Stream, reason: str, where: str) -> None:
        if self.cfg.bad_records == "refuse":
            raise UserError(f"{where}: {reason} (--bad_records=skip leaves such records out)")
        stream.drop(reason, where)
        if stream.dropped[reason][0] <= 3:
            self.bar.write(f"skipped {where}: {reason}", file=sys.stderr)

    def save(self) -> None:
        splits = {"train": self.train.notes(), "val": self.val.notes()}
        streams = [stream.notes() for stream in self.streams]
        files.write_json(
            self.partial / "progress.json", self.header | {"splits": splits, "streams": streams}
        )
        self.saved = time.monotonic()
        seconds, read = (
            max(self.saved - self.began, 1e-9),
            self.train.bytes + self.val.bytes - self.began_bytes,
        )
        rates = (read / seconds / 1e6, (self.tokens - self.began_tokens) / seconds / 1e6)
        speed = "{:.1f} MB/s, {:.2f}M tok/s".format(*rates)
        written = tqdm.format_sizeof(2 * self.tokens, "B")
        self.bar.set_postfix_str(
            f"{speed}, {self.tokens:,} tokens, {written} written", refresh=False
        )

    def finish(self) -> dict[str, Any]:
        """Close the shards; take documents that are trained on out of the validation split."""
        splits = {"train": self.train.close(), "val": self.val.close()}
        both = in_both(self.train.path, self.val.path)
        if both.any():
            splits["val"] = without_documents(self.partial, self.val, splits["val"], both)
        return {name: split for name, split in splits.items() if split["documents"] or any(both)}


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
    whole = Split("val", shard_paths(partial, "val"), MAX_VOCAB_SIZE)
    stops = np.cumsum(known["tokens"]).tolist()
    for stop, length, out in zip(stops, known["tokens"].tolist(), left_out):
        if out:
            continue
        for start in range(stop - length, stop, 1 << 20):
            end = min(start + (1 << 20), stop)
            writer.write(whole.tokens(start, end), whole.flags(start, end))
    kept = known[~left_out]
    return {
        "documents": len(kept),
        "bytes": int(kept["bytes"].sum()),
        "tokens": int(kept["tokens"].sum()),
        "trained_on": int(left_out.sum()),  # documents that were left out for it
        "shards": writer.close(),
    }
