"""
Sources → documents → token ids: read in order, judged, and encoded ahead by threads.

A document is a text file or a record. Long ones travel in pieces, so memory stays flat.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from configurator import UserError
from plaingpt.text.sources import BLOCK, Position, Source, TextFile, cut_long, find_source, is_text
from plaingpt.text.templates import FIELDS, Segment, TemplateName, segments
from plaingpt.text.tokenizer import Tokenizer

CHUNK = 1 << 19  # bytes of text that a thread encodes at once
# More than one per core: the thread that reads and writes leaves its core to them while it waits.
DEFAULT_THREADS = (os.cpu_count() or 1) + 1


@dataclass(frozen=True)
class Reading:
    """How items become documents."""

    template: TemplateName
    text_field: str
    val_fraction: float  # of sources that are split into training and validation
    seed: int


@dataclass
class Stream:
    """A source as it is read, and how far: all that a later run needs to go on with it."""

    source: Source
    val_files: frozenset[TextFile]  # the text files to validate on
    all_val: bool = False  # a source of val_sources
    position: Position = field(default_factory=Position)
    ended: bool = False
    documents: int = 0
    tokens: int = 0
    dropped: dict[str, list[Any]] = field(default_factory=dict)  # reason → [count, where first]

    def drop(self, reason: str, where: str) -> None:
        known = self.dropped.setdefault(reason, [0, where])
        known[0] += 1

    def notes(self) -> dict[str, Any]:
        """What `restore` needs, as JSON can carry it."""
        names = ("position", "ended", "documents", "tokens", "dropped")
        return {name: getattr(self, name) for name in names}

    def restore(self, notes: dict[str, Any]) -> None:
        for name, value in notes.items():
            setattr(self, name, value)
        self.position = Position(*notes["position"])

    def summary(self) -> dict[str, Any]:
        names = ("documents", "tokens", "dropped", "ended")
        return {"source": self.source.name} | {name: getattr(self, name) for name in names}


class Piece(NamedTuple):
    """A document, or a part of a long one, or a record that is none."""

    segments: list[Segment]
    where: str
    bytes: int
    val: bool
    after: Position
    digest: int | None = None  # of the whole document, on its last piece
    problem: str | None = None  # why the record is none
    whole: bool = False  # must be judged as a whole before any of it is written


def open_streams(
    names: tuple[str, ...], val_names: tuple[str, ...], reading: Reading
) -> list[Stream]:
    """Look up all sources; choose the text files to validate on.

    Raises UserError for sources that are nothing or hold nothing, and for weights on some only.
    Files that hold nothing are counted as dropped.
    """
    streams: list[Stream] = []
    seen: dict[str, bool] = {}  # path → whether it is of val_names
    for given, all_val in ((names, False), (val_names, True)):
        found: list[Source] = []
        for source in map(find_source, given):
            for file in source.files:
                if seen.setdefault(os.path.realpath(file.path), all_val) != all_val:
                    raise UserError(f"{file.path} is in sources and in val_sources")
            known = {os.path.realpath(file.path) for each in found for file in each.files}
            new = tuple(file for file in source.files if os.path.realpath(file.path) not in known)
            if source.weight and not source.hub and not new:
                raise UserError(f"source {source.name!r} has a weight, but no text of its own")
            found.append(replace(source, files=new))
        if given and not any(source.hub or source.files for source in found):
            raise UserError(f"there is no text in {', '.join(map(repr, given))}")
        if all_val:
            streams += [Stream(source, frozenset(), all_val=True) for source in found]
        else:
            streams += [Stream(*draw(source, reading)) for source in found]
    for stream in streams:
        for path in stream.source.empty:
            stream.drop("an empty file", path)
    weights = [stream.source.weight for stream in streams if not stream.all_val]
    if None in weights and weights.count(None) < len(weights):
        raise UserError("give a weight to all sources or to none")
    return streams


def draw(source: Source, reading: Reading) -> tuple[Source, frozenset[TextFile]]:
    """Choose text files to validate on: whole ones, drawn at random until they hold that fraction
    of the bytes. A single file is cut instead, at the end of a line. They come first, so that a
    limit on tokens or documents leaves some."""
    texts = [file for file in source.files if is_text(file.path)]
    if not texts or not reading.val_fraction:
        return source, frozenset()
    if len(source.files) == 1:
        only = texts[0]
        cut = place_to_cut(only, reading.val_fraction)
        rest = round(only.size * reading.val_fraction)
        train = replace(only, stop=cut, size=only.size - rest)
        val = replace(only, start=cut, size=rest)
        return replace(source, files=(val, train)), frozenset([val])
    wanted = reading.val_fraction * sum(file.size for file in texts)
    drawn: list[TextFile] = []
    size = 0
    for index in np.random.default_rng(reading.seed).permutation(len(texts))[1:]:
        if size < wanted and texts[index].size <= wanted:  # none that alone is more
            drawn.append(texts[index])
            size += texts[index].size
    val_files = frozenset(drawn or [min(texts, key=lambda file: file.size)])
    ordered = sorted(source.files, key=lambda file: file not in val_files)
    return replace(source, files=tuple(ordered)), val_files


def place_to_cut(file: TextFile, fraction: float) -> int:
    """The character behind the last line end before `1 - fraction` of a text, or that place where
    the lines are too long for that."""
    target = round(sum(map(len, file.pieces())) * (1 - fraction))
    cut = at = 0
    for piece in file.pieces():
        newline = piece.rfind("\n", 0, max(0, target - at))
        cut = at + newline + 1 if newline >= 0 else cut
        at += len(piece)
    return cut if at - cut <= 2 * (at - target) else target


def read_pieces(stream: Stream, reading: Reading) -> Iterator[Piece]:
    """The documents of a source from the stream's position on."""
    start, fraction = stream.position, reading.val_fraction
    fields = FIELDS.get(reading.template, (reading.text_field,))
    for item, after in stream.source.items(start, fields):
        digest, size = hashlib.blake2b(digest_size=8, key=b"%d" % reading.seed), 0
        if isinstance(item, TextFile):
            val = stream.all_val or item in stream.val_files
            done = start.characters if after.items == start.items + 1 else 0
            characters = 0
            for text in item.pieces():
                content = text.encode()
                digest.update(content)
                characters += len(text)
                if characters > done:
                    place = Position(after.items - 1, characters, after.read + characters)
                    text_only = [Segment(text, ended=False)]
                    yield Piece(text_only, item.path, len(content), val, place)
            after = after._replace(read=after.read + item.size)
            yield Piece(
                [Segment("")], item.path, 0, val, after, int.from_bytes(digest.digest(), "little")
            )
            continue
        try:
            if item.problem:
                raise UserError(item.problem)
            parts = segments(item.value, reading.template, reading.text_field)
        except ValueError as error:
            yield Piece([], item.where, 0, False, after, problem=str(error))
            continue
        parts = [part._replace(text=without_surrogates(part.text)) for part in parts]
        for part in parts:
            content = part.text.encode()
            digest.update(content + b"\0" * (part is not parts[-1]))
            size += len(content)
        number = int.from_bytes(digest.digest(), "little")
        # Equal documents fall to the same side. The second falls to validation, so that even a
        # small source has some.
        drawn = fraction > 0 and (number < fraction * 2**64 or after.items == 2)
        shape = Piece(parts, item.where, size, stream.all_val or drawn, after, number, whole=True)
        if size <= BLOCK:
            yield shape
            continue
        short = [
            Segment(text, part.counted, part.ended and last)
            for part in parts
            for text, last in with_last(cut_long(part.text))
        ]
        for segment, last in with_last(short):
            yield shape._replace(
                segments=[segment],
                bytes=len(segment.text.encode()),
                digest=number if last else None,
            )


def with_last(values: list[Any]) -> Iterator[tuple[Any, bool]]:
    return ((value, index == len(values) - 1) for index, value in enumerate(values))


def without_surrogates(text: str) -> str:
    """Halves of surrogate pairs, which JSON can spell and UTF-8 cannot, become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def sample_texts(streams: list[Stream], reading: Reading, max_bytes: int) -> Iterator[str]:
    """Training text, from each source as much, text files in a random order."""
    training = [stream for stream in streams if not stream.all_val]
    for stream in training:
        files = stream.source.files
        order = np.random.default_rng(reading.seed).permutation(len(files))
        shuffled = replace(stream.source, files=tuple(files[index] for index in order))
        taken = 0
        for piece in read_pieces(replace(stream, source=shuffled), reading):
            if not piece.val:
                yield from (segment.text for segment in piece.segments)
                taken += piece.bytes
            if taken >= max_bytes / len(training):
                break


# --- tokens


Encoded = tuple[Piece, np.ndarray, np.ndarray | None]  # a piece, its ids, its loss mask


def encoded(
    stream: Stream, reading: Reading, tokenizer: Tokenizer, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[Encoded]:
    """The pieces of a stream with their ids, in order; threads encode `ahead` chunks."""
    waiting: deque[tuple[list[Piece], Future]] = deque()
    for chunk in chunks(read_pieces(stream, reading)):
        waiting.append((chunk, pool.submit(encode, chunk, tokenizer, reading.template != "text")))
        if len(waiting) > ahead:
            yield from unpacked(*waiting.popleft())
    while waiting:
        yield from unpacked(*waiting.popleft())


def chunks(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    chunk: list[Piece] = []
    size = 0
    for piece in pieces:
        chunk.append(piece)
        size += piece.bytes + 10  # a record costs something even if it is empty
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encode(
    chunk: list[Piece], tokenizer: Tokenizer, masked: bool
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Ids of a chunk, their mask, and where each piece ends in them. A record that the tokenizer
    refuses becomes one that is none."""
    parts = [part for piece in chunk for part in piece.segments]
    try:
        ids, ends = tokenizer.encode_joined([part.text for part in parts])
    except ValueError:
        for number, piece in enumerate(chunk):
            try:
                tokenizer.encode_joined([part.text for part in piece.segments])
            except ValueError as error:
                if not piece.whole:
                    raise UserError(f"{piece.where}: {error}") from None
                chunk[number] = piece._replace(segments=[], problem=str(error))
        return encode(chunk, tokenizer, masked)
    ended = np.array([part.ended for part in parts], dtype=bool)
    lengths = np.diff(ends, prepend=0)
    mask = None
    if masked:
        counted = np.array([part.counted for part in parts], dtype=np.uint8)
        mask = np.repeat(counted, lengths)
    if not ended.all():
        keep = np.ones(len(ids), dtype=bool)
        keep[ends[~ended] - 1] = False
        ids, mask = ids[keep], None if mask is None else mask[keep]
    stops = np.append(0, np.cumsum(lengths - ~ended))
    return ids, mask, stops[np.cumsum([len(piece.segments) for piece in chunk])]


def unpacked(chunk: list[Piece], future: Future) -> Iterator[Encoded]:
    ids, mask, stops = future.result()
    start = 0
    for piece, stop in zip(chunk, stops.tolist()):
        yield piece, ids[start:stop], None if mask is None else mask[start:stop]
        start = stop
