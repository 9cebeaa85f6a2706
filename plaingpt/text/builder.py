"""Documents → the shards of both splits, within the limits and with saved progress."""

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from configurator import UserError
from plaingpt.text.dataset import SplitEntries
from plaingpt.text.documents import BAD, PART, RECORD, Reading, Stream, are_held_out
from plaingpt.text.encoding import Encoded, Encoder
from plaingpt.text.progress import NAME, Progress, SplitsNotes
from plaingpt.text.splits import CUT, DOCUMENT, SplitWriter, in_both, without_documents
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.wording import byte_size, quantity

SAVE_SECONDS = 5.0  # between two saves of the progress


@dataclass(frozen=True)
class Limits:
    """Where to stop; inf where there is no limit."""

    max_tokens: float  # of all sources except validation sources
    max_documents: float
    shard_tokens: int


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

    def run(self, encode: Encoder) -> None:
        """Write all streams, which `encode` reads, to their end or to the limits, validation
        sources last."""
        with self.bar:
            for all_val in (False, True):
                streams = [stream for stream in self.streams if stream.all_val == all_val]
                readers = [Reader(encode(stream)) for stream in streams]
                while not self.is_enough(all_val) and (stream := self.next_stream(streams)):
                    self.take(stream, readers[streams.index(stream)], streams)
                    self.bar.update(self.done - self.bar.n)
                    if time.monotonic() - self.saved > SAVE_SECONDS:
                        self.save()
            self.save()

    def room(self, all_val: bool) -> float:
        """Tokens that may still be written from validation sources, or from the others."""
        if all_val:
            return self.validation.max_tokens - self.val.tokens
        return self.limits.max_tokens - self.tokens

    def room_for_documents(self, all_val: bool) -> float:
        written = self.train.documents + self.val.documents
        return math.inf if all_val else self.limits.max_documents - written

    def is_enough(self, all_val: bool) -> bool:
        return self.room(all_val) <= 0 or self.room_for_documents(all_val) <= 0

    def next_stream(self, streams: list[Stream]) -> Stream | None:
        """The first that has not ended; with weights the one furthest behind, until one ends."""
        for stream in streams:
            if stream.position.characters:  # in the middle of a document
                return stream
        if streams and streams[0].is_weighed:
            if any(stream.ended for stream in streams):
                return None
            return min(streams, key=share_of)
        return next((stream for stream in streams if not stream.ended), None)

    def take(self, stream: Stream, reader: "Reader", streams: list[Stream]) -> None:
        """Write what comes next in a stream: records, for as long as it is the next of `streams`,
        or a part or the end of a text file. Or count a bad record."""
        if not (chunk := reader.advance()):
            stream.ended = True
            stream.position = stream.position._replace(read=stream.source.size)
            return
        at, kind = reader.at, chunk.table["kind"][reader.at]
        reader.at += self.take_records(stream, reader, streams) if kind == RECORD else 1
        stream.position = chunk.position(reader.at)
        if kind == BAD:
            self.drop(stream, *chunk.problems[at])
        elif kind != RECORD:
            self.take_text(stream, chunk, at)

    def take_records(self, stream: Stream, reader: "Reader", streams: list[Stream]) -> int:
        """Write records up to the next other item, to a limit, or until it is the turn of another
        stream; return how many. The last may be cut short."""
        chunk, at, room = reader.chunk, reader.at, self.room(stream.all_val)
        assert chunk
        table, first = chunk.table[at : chunk.records_end[at]], int(chunk.stops[at])
        ends = chunk.stops[at + 1 : at + 1 + len(table)] - first
        most = int(min(len(table), self.room_for_documents(stream.all_val)))
        count = min(most, 1 + int(ends.searchsorted(room)), 1 + turn(stream, ends, streams))
        tokens = np.diff(np.minimum(ends[:count], room).astype(np.int64), prepend=0)
        documents = np.zeros(count, DOCUMENT)
        documents["digest"], documents["tokens"] = table["digest"][:count], tokens
        documents["bytes"] = table["bytes"][:count]
        written = int(tokens.sum())
        ids = chunk.ids[first : first + written]
        if written < ends[count - 1]:
            documents["bytes"][-1] = self.tokenizer.count_bytes(ids[written - int(tokens[-1]) :])
        mask = None if chunk.mask is None else chunk.mask[first : first + written]
        held_out = are_held_out(table[:count], int(chunk.numbers[at]), stream.held_out)
        to_val = held_out & ~self.is_val_full(np.where(held_out, tokens, 0), held_out)
        for split, chosen in ((self.train, ~to_val), (self.val, to_val)):
            if chosen.any():
                some = picked(ids, tokens, chosen)
                some_mask = None if mask is None else picked(mask, tokens, chosen)
                split.write_documents(some, some_mask, documents[chosen])
        stream.tokens += written
        stream.documents += count
        return count

    def is_val_full(self, tokens: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """For each of some documents, whether validation is full before it, if it takes those
        before; `tokens` and `documents` are what each adds."""
        return self.validation.is_full(
            self.val.tokens + np.cumsum(tokens) - tokens,
            self.val.documents + np.cumsum(documents) - documents,
        )

    def take_text(self, stream: Stream, chunk: Encoded, at: int) -> None:
        """Write a part or the end of a text file as far as there is room: to validation until that
        is full and then to training."""
        item, stop = chunk.table[at], int(chunk.stops[at + 1])
        start = int(chunk.stops[at])
        end = int(min(stop, start + self.room(stream.all_val)))
        is_part = item["kind"] == PART
        stream.tokens += end - start
        while start < end:
            split, until = self.split_of(bool(item["held_out"]), is_part), end
            if split is self.val and is_part:
                until = int(min(end, start + self.validation.max_tokens - self.val.tokens))
            ids = chunk.ids[start:until]
            whole = start == chunk.stops[at] and until == stop
            size = int(item["bytes"]) if whole else self.tokenizer.count_bytes(ids)
            split.write(ids, None if chunk.mask is None else chunk.mask[start:until], size)
            start = until
        if not is_part or self.is_enough(stream.all_val):
            split = self.val if self.val.in_document else self.train
            split.end_document(CUT if is_part else int(item["digest"]))
            stream.documents += 1

    def split_of(self, held_out: bool, is_part: bool) -> SplitWriter:
        """Where the next tokens of a text file go: to validation if it is held out, until that is
        full. The rest is then a training document."""
        if self.train.in_document:
            return self.train
        if self.val.in_document and not is_part:
            return self.val
        if held_out and not self.validation.is_full(self.val.tokens, self.val.documents):
            return self.val
        if self.val.in_document:
            self.val.end_document(CUT)
        return self.train

    def drop(self, stream: Stream, reason: str, where: str) -> None:
        if self.reading.bad_records == "refuse":
            raise UserError(f"{where}: {reason} (--bad_records=skip leaves such records out)")
        stream.drop(reason, where)
        if stream.dropped[reason][0] <= 3:
            self.bar.write(f"skipped {where}: {reason}", file=sys.stderr)

    def save(self) -> None:
        splits = SplitsNotes(self.train.notes(), self.val.notes())
        self.progress.save(splits, tuple(stream.notes() for stream in self.streams))
        for stream in self.streams:
            stream.saved = stream.position
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


class Reader:
    """The encoded items of a stream, and how many of the current chunk have been written."""

    def __init__(self, chunks: Iterator[Encoded]) -> None:
        self.chunks = chunks
        self.chunk: Encoded | None = None
        self.at = 0

    def advance(self) -> Encoded | None:
        """A chunk with items that have not been written; None at the end of the stream."""
        while self.chunk is None or self.at == len(self.chunk.table):
            self.chunk, self.at = next(self.chunks, None), 0
            if self.chunk is None:
                break
        return self.chunk


def picked(values: np.ndarray, lengths: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """The values of the chosen documents, given how many values each document has."""
    edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))  # begin, end, begin, …
    places = np.append(0, np.cumsum(lengths))[edges].tolist()
    return np.concatenate([values[a:b] for a, b in zip(places[::2], places[1::2])])


def share_of(stream: Stream) -> float:
    """How far a weighed stream is."""
    return stream.tokens / (stream.source.weight or 1)


def turn(stream: Stream, ends: np.ndarray, streams: list[Stream]) -> int:
    """How many records, of which `ends` tokens have been written after each, it takes until another
    of the weighed streams is furthest behind."""
    if not stream.is_weighed:
        return len(ends)
    shares, own = (stream.tokens + ends) / (stream.source.weight or 1), streams.index(stream)
    earlier = min(map(share_of, streams[:own]), default=math.inf)
    later = min(map(share_of, streams[own + 1 :]), default=math.inf)
    return int(min(shares.searchsorted(earlier), shares.searchsorted(later, side="right")))
