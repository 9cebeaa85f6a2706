"""
Sources → documents → token ids, in order; threads encode ahead of the writer.

A text file streams: its `Part`s are written as they come, and an `End` closes it. A record comes
whole, because all of it is judged before any of it is written: as one `Record`, or one `Bad`.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from configurator import UserError
from plaingpt.text import cutting
from plaingpt.text.dataset import SourceEntry
from plaingpt.text.progress import StreamNotes
from plaingpt.text.records import Row
from plaingpt.text.sources import Position, Source, find_source
from plaingpt.text.templates import FIELDS, Segment, TemplateName, segments
from plaingpt.text.text_files import TextFile, is_text
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.text.validation import HeldOut, Validation

T = TypeVar("T")
CHUNK = 1 << 19  # bytes of text that a thread encodes at once
# One more than the cores, because the thread that reads and writes often waits.
DEFAULT_THREADS = (os.cpu_count() or 1) + 1


@dataclass(frozen=True)
class Reading:
    """How items become documents."""

    template: TemplateName
    text_field: str
    bad_records: Literal["refuse", "skip"]
    validation: Validation

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields of a record that are read."""
        return FIELDS.get(self.template, (self.text_field,))


@dataclass
class Stream:
    """A source as it is read, and how far: everything that a later run needs to resume it."""

    source: Source
    held_out: HeldOut
    all_val: bool  # whether it is a validation source
    position: Position = field(default_factory=Position)
    ended: bool = False
    documents: int = 0
    tokens: int = 0
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)  # reason → count, first

    @property
    def is_plain_text(self) -> bool:
        """Whether there are no records, to which a template could apply."""
        return not self.source.hub and all(is_text(file.path) for file in self.source.files)

    def drop(self, reason: str, where: str) -> None:
        count, first = self.dropped.get(reason, (0, where))
        self.dropped[reason] = (count + 1, first)

    def notes(self) -> StreamNotes:
        """What `restore` needs."""
        return StreamNotes(self.position, self.ended, self.documents, self.tokens, self.dropped)

    def restore(self, notes: StreamNotes) -> None:
        for name in notes.__struct_fields__:
            setattr(self, name, getattr(notes, name))

    def summary(self) -> SourceEntry:
        name = self.source.name
        return SourceEntry(name, self.documents, self.tokens, self.dropped, self.ended)


def open_streams(
    names: tuple[str, ...], val_names: tuple[str, ...], reading: Reading
) -> list[Stream]:
    """Look up all sources and choose what to validate on.

    Raises UserError for sources that are not found, empty or given twice, and for weights on only
    some. Empty files, and those that are left out for other reasons, are counted as dropped.
    """
    streams: list[Stream] = []
    seen: dict[str, bool] = {}  # path → whether it comes from val_names
    validation = reading.validation
    for given, all_val in ((names, False), (val_names, True)):
        hold_out = validation.hold_out_all if all_val else validation.hold_out_part
        for source in map(find_source, given):
            if any(source.name == known.source.name for known in streams):
                raise UserError(f"source {source.name!r} is given twice")
            if not source.hub and not source.files:
                raise UserError(f"there is no text in source {source.name!r}: it is empty")
            new: list[TextFile] = []
            old: list[TextFile] = []  # in an earlier source as well
            for file in source.files:
                path = os.path.realpath(file.path)
                if seen.get(path, all_val) != all_val:
                    raise UserError(f"{file.path} is in sources and in val_sources")
                (old if path in seen else new).append(file)
                seen[path] = all_val
            if source.weight and not source.hub and not new:
                raise UserError(f"source {source.name!r} has a weight, but no text of its own")
            stream = Stream(*hold_out(replace(source, files=tuple(new))), all_val)
            for reason, paths in (
                ("an empty file", source.empty),
                ("a file of an unsupported kind", source.others),
                ("a file that an earlier source already has", [file.path for file in old]),
            ):
                for path in paths:
                    stream.drop(reason, path)
            streams.append(stream)
    weights = [stream.source.weight for stream in streams if not stream.all_val]
    if None in weights and weights.count(None) < len(weights):
        raise UserError("give a weight to all sources or to none")
    return streams


# --- documents


class Record(NamedTuple):
    """A document to be judged, and written or dropped, as a whole."""

    segments: list[Segment]
    bytes: int  # of its text
    held_out: bool
    digest: int
    where: str  # for messages
    after: Position  # where reading resumes after it


class Part(NamedTuple):
    """The next text of a text file, to be written as it comes."""

    text: str
    bytes: int
    held_out: bool
    where: str
    after: Position

    @property
    def segments(self) -> list[Segment]:
        return [Segment(self.text, ended=False)]


class End(NamedTuple):
    """The end of a text file: its `<|endoftext|>`, and the digest of all of its text."""

    held_out: bool
    digest: int
    after: Position
    segments: Sequence[Segment] = (Segment(""),)
    bytes: int = 0


class Bad(NamedTuple):
    """A record that cannot become a document."""

    reason: str
    where: str
    after: Position
    segments: Sequence[Segment] = ()
    bytes: int = 0


Item = Record | Part | End | Bad


def read_items(stream: Stream, reading: Reading) -> Iterator[Item]:
    """The documents of a source from the stream's position on."""
    start = stream.position
    for item, after in stream.source.items(start, reading.fields):
        if isinstance(item, TextFile):
            done = start.characters if after.items == start.items + 1 else 0
            yield from read_file(item, after, done, stream.held_out, reading.validation.seed)
        else:
            yield read_record(item, after, stream.held_out, reading)


def read_file(
    file: TextFile, after: Position, done: int, held_out: HeldOut, seed: int
) -> Iterator[Item]:
    """The parts of a text file after its first `done` characters, and its end."""
    digest = document_hash(seed)
    is_held_out = file in held_out.files
    characters = 0
    for text in file.pieces():
        content = text.encode()
        digest.update(content)
        characters += len(text)
        if characters > done:
            place = Position(after.items - 1, characters, after.read + characters)
            yield Part(text, len(content), is_held_out, file.path, place)
    yield End(is_held_out, number_of(digest), after._replace(read=after.read + file.size))


def read_record(row: Row, after: Position, held_out: HeldOut, reading: Reading) -> Record | Bad:
    if row.problem:
        return Bad(row.problem, row.where, after)
    try:
        parts = segments(row.value, reading.template, reading.text_field)
    except UserError as error:
        return Bad(str(error), row.where, after)
    parts = [part._replace(text=without_surrogates(part.text)) for part in parts]
    digest, size = document_hash(reading.validation.seed), 0
    for part in parts:
        content = part.text.encode()
        digest.update(content + b"\0" * (part is not parts[-1]))
        size += len(content)
    number = number_of(digest)
    is_held_out = held_out.has_record(after.items, number)
    pieces = [piece for part in parts for piece in pieces_of(part)]
    return Record(pieces, size, is_held_out, number, row.where, after)


def pieces_of(segment: Segment) -> list[Segment]:
    """A segment, cut into pieces if it is long: threads share them, and a sample can end after
    any."""
    if len(segment.text) <= cutting.BLOCK:
        return [segment]
    *pieces, last = cutting.in_pieces(cutting.blocks_of(segment.text))
    unended = [Segment(piece, segment.counted, ended=False) for piece in pieces]
    return [*unended, segment._replace(text=last)]


def document_hash(seed: int) -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=8, key=b"%d" % seed)


def number_of(digest: hashlib.blake2b) -> int:
    return int.from_bytes(digest.digest(), "little")


def without_surrogates(text: str) -> str:
    """Halves of surrogate pairs, which JSON can spell and UTF-8 cannot, become U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def sample_texts(streams: list[Stream], reading: Reading, max_bytes: int) -> Iterator[str]:
    """Training text: equal amounts from each source, whose text files come in random order."""
    training = [stream for stream in streams if not stream.all_val]
    for stream in training:
        files = stream.source.files
        order = np.random.default_rng(reading.validation.seed).permutation(len(files))
        shuffled = replace(stream.source, files=tuple(files[index] for index in order))
        taken = 0
        for text in training_texts(replace(stream, source=shuffled), reading):
            yield text
            taken += len(text.encode())
            if taken >= max_bytes / len(training):
                break


def training_texts(stream: Stream, reading: Reading) -> Iterator[str]:
    for item in read_items(stream, reading):
        if isinstance(item, Record | Part) and not item.held_out:
            yield from (segment.text for segment in item.segments)


# --- tokens


Encoded = tuple[Item, np.ndarray, np.ndarray | None]  # an item, its ids, their loss mask


def encoded(
    stream: Stream, reading: Reading, tokenizer: Tokenizer, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[Encoded]:
    """The items of a stream with their ids, in order; threads encode `ahead` chunks."""
    waiting: deque[tuple[list[Item], list[Future]]] = deque()
    masked = reading.template != "text"
    for chunk in chunks(read_items(stream, reading), lambda item: item.bytes):
        parts = [part for item in chunk for part in item.segments]
        # One share of the threads' work, or several if a record is long.
        shares = list(chunks(parts, lambda part: len(part.text))) or [[]]
        futures = [pool.submit(encode, share, tokenizer, masked) for share in shares]
        waiting.append((chunk, futures))
        if len(waiting) > ahead:
            yield from unpacked(*waiting.popleft())
    while waiting:
        yield from unpacked(*waiting.popleft())


def chunks(items: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Groups of items that have CHUNK bytes or more, except the last."""
    chunk: list[T] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += size_of(item) + 10  # an item costs something even if it is empty
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encode(
    parts: list[Segment], tokenizer: Tokenizer, masked: bool
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Ids of segments, their mask, and the number of ids of each segment."""
    ids, ends = tokenizer.encode_joined([part.text for part in parts])
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
    return ids, mask, lengths - ~ended


def unpacked(chunk: list[Item], futures: list[Future]) -> Iterator[Encoded]:
    ids, masks, lengths = zip(*(future.result() for future in futures))
    all_ids = np.concatenate(ids)
    mask = None if masks[0] is None else np.concatenate(masks)
    stops = np.append(0, np.cumsum(np.concatenate(lengths)))
    start = 0
    for item, stop in zip(chunk, stops[np.cumsum([len(item.segments) for item in chunk])].tolist()):
        yield item, all_ids[start:stop], None if mask is None else mask[start:stop]
        start = stop
