"""
Sources → documents → token ids, in order; threads encode ahead of the writer.

A text file streams: its `Part`s are written as they come, and an `End` closes it. A record comes
whole, because all of it is judged before any of it is written: as one `Record`, or one `Bad`.
"""

import hashlib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from configurator import UserError
from plaingpt.text.dataset import SourceEntry
from plaingpt.text.progress import StreamNotes
from plaingpt.text.records import Row
from plaingpt.text.sources import Position, Source, find_source
from plaingpt.text.templates import FIELDS, Segment, TemplateName, segments
from plaingpt.text.text_files import TextFile
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.text.validation import HeldOut, Validation

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

    Raises UserError for sources that cannot be read or are empty, and for weights on only some.
    Empty files are counted as dropped.
    """
    streams: list[Stream] = []
    seen: dict[str, bool] = {}  # path → whether it comes from val_names
    validation = reading.validation
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
        hold_out = validation.hold_out_all if all_val else validation.hold_out_part
        streams += [Stream(*hold_out(source), all_val) for source in found]
    for stream in streams:
        for path in stream.source.empty:
            stream.drop("an empty file", path)
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
    after: Position  # where reading resumes behind it


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
    fields = FIELDS.get(reading.template, (reading.text_field,))
    for item, after in stream.source.items(start, fields):
        if isinstance(item, TextFile):
            done = start.characters if after.items == start.items + 1 else 0
            yield from read_file(item, after, done, stream.held_out, reading.validation.seed)
        else:
            yield read_record(item, after, stream.held_out, reading)


def read_file(
    file: TextFile, after: Position, done: int, held_out: HeldOut, seed: int
) -> Iterator[Item]:
    """The parts of a text file behind its first `done` characters, and its end."""
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
    return Record(parts, size, is_held_out, number, row.where, after)


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
    """Training text, the same amount of each source, its text files in random order."""
    training = [stream for stream in streams if not stream.all_val]
    for stream in training:
        files = stream.source.files
        order = np.random.default_rng(reading.validation.seed).permutation(len(files))
        shuffled = replace(stream.source, files=tuple(files[index] for index in order))
        taken = 0
        for item in read_items(replace(stream, source=shuffled), reading):
            if isinstance(item, Record | Part) and not item.held_out:
                yield from (segment.text for segment in item.segments)
                taken += item.bytes
            if taken >= max_bytes / len(training):
                break


# --- tokens


Encoded = tuple[Item, np.ndarray, np.ndarray | None]  # an item, its ids, their loss mask


def encoded(
    stream: Stream, reading: Reading, tokenizer: Tokenizer, pool: ThreadPoolExecutor, ahead: int
) -> Iterator[Encoded]:
    """The items of a stream with their ids, in order; threads encode `ahead` chunks."""
    waiting: deque[tuple[list[Item], Future]] = deque()
    for chunk in chunks(read_items(stream, reading)):
        waiting.append((chunk, pool.submit(encode, chunk, tokenizer, reading.template != "text")))
        if len(waiting) > ahead:
            yield from unpacked(*waiting.popleft())
    while waiting:
        yield from unpacked(*waiting.popleft())


def chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
    chunk: list[Item] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += item.bytes + 10  # a record costs something even if it is empty
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def encode(
    chunk: list[Item], tokenizer: Tokenizer, masked: bool
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Ids of a chunk, their mask, and where each item ends in them.

    A record that the tokenizer refuses becomes a `Bad` in the chunk; for a text file this raises
    UserError.
    """
    parts = [part for item in chunk for part in item.segments]
    try:
        ids, ends = tokenizer.encode_joined([part.text for part in parts])
    except UserError:
        refuse_unencodable(chunk, tokenizer)
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
    return ids, mask, stops[np.cumsum([len(item.segments) for item in chunk])]


def refuse_unencodable(chunk: list[Item], tokenizer: Tokenizer) -> None:
    """Replace the records of a chunk that the tokenizer refuses."""
    for number, item in enumerate(chunk):
        try:
            tokenizer.encode_joined([part.text for part in item.segments])
        except UserError as error:
            if isinstance(item, Record):
                chunk[number] = Bad(str(error), item.where, item.after)
            elif isinstance(item, Part):
                raise UserError(f"{item.where}: {error}") from None


def unpacked(chunk: list[Item], future: Future) -> Iterator[Encoded]:
    ids, mask, stops = future.result()
    start = 0
    for item, stop in zip(chunk, stops.tolist()):
        yield item, ids[start:stop], None if mask is None else mask[start:stop]
        start = stop
