"""
Sources → documents, in order.

A text file streams: its parts are written as they come, and an end closes it. A record comes whole,
because all of it is judged before any of it is written. Items travel in batches, because what
Python does for each of a million short records takes longer than to encode them.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import filterfalse, pairwise
from typing import Literal

import numpy as np

from configurator import UserError
from plaingpt.text import cutting
from plaingpt.text.dataset import SourceEntry
from plaingpt.text.progress import StreamNotes
from plaingpt.text.records import Rows
from plaingpt.text.sources import Position, Source, find_source
from plaingpt.text.templates import (
    FIELDS,
    Segment,
    TemplateName,
    plain_texts,
    segments,
)
from plaingpt.text.text_files import TextFile, is_text
from plaingpt.text.validation import HeldOut, Validation


@dataclass(frozen=True)
class Reading:
    """How items become documents."""

    template: TemplateName
    text_field: str
    bad_records: Literal["refuse", "skip"]
    validation: Validation
    max_record_tokens: float = math.inf  # longer records are bad

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
    saved: Position = field(default_factory=Position)  # where a later run would resume it
    ended: bool = False
    documents: int = 0
    tokens: int = 0
    dropped: dict[str, tuple[int, str]] = field(default_factory=dict)  # reason → count, first

    @property
    def is_weighed(self) -> bool:
        """Whether it takes turns with others."""
        return bool(self.source.weight and not self.all_val)

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
        self.saved = self.position

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

RECORD, BAD, PART, END = range(4)  # kinds of items
ITEM = np.dtype(
    [
        ("kind", "u1"),
        ("held_out", "?"),  # a part or an end; of records, number and digest decide
        ("tokens", "<u8"),
        ("bytes", "<u8"),  # of text
        ("digest", "<u8"),  # of a record, or at its end of a text file
        ("characters", "<u8"),  # of the text file so far, 0 at its end
    ]
)


@dataclass(frozen=True)
class Items:
    """Consecutive items of a source, of records or of one text file, and their texts. The table has
    no tokens yet, and no bytes and digests until `hash_items`."""

    table: np.ndarray  # ITEM
    texts: list[str]
    owners: np.ndarray  # of each text: its item
    counted: np.ndarray  # of each text: 1 if it counts in the loss, uint8
    ended: np.ndarray  # of each text: whether <|endoftext|> ends it
    reasons: dict[int, str]  # by item: why it is bad
    where: Callable[[int], str]  # the place of an item, for messages
    before: Position
    after: Position
    digest: blake2b | None = None  # running, shared by all items of their text file

    @property
    def size(self) -> int:
        """Roughly, the bytes of text. An item costs something even if it is empty."""
        return sum(map(len, self.texts)) + 10 * len(self.table)


def read_items(stream: Stream, reading: Reading) -> Iterator[Items]:
    """The items of a source from the stream's position on."""
    start = stream.position
    for item, before, after in stream.source.batches(start, reading.fields):
        if isinstance(item, TextFile):
            done = start.characters if before.items == start.items else 0
            held_out = item in stream.held_out.files
            yield from read_file(item, before, done, held_out, reading.validation.seed)
        else:
            yield read_records(item, before, after, reading)


def read_file(
    file: TextFile, before: Position, done: int, held_out: bool, seed: int
) -> Iterator[Items]:
    """The parts of a text file after its first `done` characters, and its end."""
    owner, one, places = np.zeros(1, np.int64), np.ones(1, np.uint8), (lambda _: file.path)
    digest = blake2b(digest_size=8, key=b"%d" % seed)
    characters = 0
    place = before._replace(characters=done, read=before.read + done)
    for text in file.pieces():
        characters += len(text)
        if characters <= done:
            digest.update(text.encode())
            continue
        table = np.array([(PART, held_out, 0, 0, 0, characters)], ITEM)
        after = before._replace(characters=characters, read=before.read + characters)
        yield Items(table, [text], owner, one, one == 0, {}, places, place, after, digest)
        place = after
    table = np.array([(END, held_out, 0, 0, 0, 0)], ITEM)
    after = before._replace(items=before.items + 1, read=before.read + file.size)
    yield Items(table, [""], owner, one, one == 1, {}, places, place, after, digest)


def read_records(rows: Rows, before: Position, after: Position, reading: Reading) -> Items:
    table, reasons = np.zeros(len(rows.values), ITEM), dict(rows.problems)
    is_simple = reading.template == "text" and not reasons
    if is_simple and (found := plain_texts(rows.values, reading.text_field)):
        texts, owners, one = without_surrogates(found), np.arange(len(found)), np.ones(len(found))
        counted, ended = one.astype(np.uint8), one == 1
        return Items(table, texts, owners, counted, ended, {}, rows.where, before, after)
    parts: list[Segment] = []
    owned: list[int] = []
    for place, value in enumerate(rows.values):
        if place not in reasons:
            try:
                new = segments(value, reading.template, reading.text_field)
                parts += new
                owned += [place] * len(new)
            except UserError as error:
                reasons[place] = str(error)
    table["kind"][list(reasons)] = BAD
    texts = without_surrogates([part.text for part in parts])
    counted = np.array([part.counted for part in parts], np.uint8)
    ended = np.array([part.ended for part in parts], bool)
    owners = np.array(owned, np.int64)
    return Items(table, texts, owners, counted, ended, reasons, rows.where, before, after)


def without_surrogates(texts: list[str]) -> list[str]:
    """Halves of surrogate pairs, which JSON can spell and UTF-8 cannot, become U+FFFD."""
    try:
        "".join(filterfalse(str.isascii, texts)).encode()
    except UnicodeEncodeError:
        pairs = [text.encode("utf-16", "surrogatepass") for text in texts]
        return [text.decode("utf-16", "replace") for text in pairs]
    return texts


def hash_items(items: Items, seed: int) -> None:
    """Fill in bytes and digests. The items of a text file must come in order, each once."""
    table, key = items.table, b"%d" % seed
    if items.digest:
        content = items.texts[0].encode()
        items.digest.update(content)
        table["bytes"] = len(content)
        if table["kind"][0] == END:
            table["digest"] = int.from_bytes(items.digest.digest(), "little")
        return
    good = table["kind"] == RECORD
    if not good.any():
        return
    contents = [text.encode() for text in items.texts]
    if len(contents) > good.sum():  # records of several texts
        starts = np.searchsorted(items.owners, np.flatnonzero(good)).tolist()
        table["bytes"] = np.bincount(items.owners, list(map(len, contents)), len(table))
        contents = [b"\0".join(contents[a:b]) for a, b in pairwise([*starts, len(contents)])]
    else:
        table["bytes"][good] = list(map(len, contents))
    begun, digests = blake2b(digest_size=8, key=key), []
    for content in contents:
        digest = begun.copy()  # faster than to begin anew
        digest.update(content)
        digests.append(digest.digest())
    table["digest"][good] = np.frombuffer(b"".join(digests), "<u8")


def are_held_out(table: np.ndarray, before: int, held_out: HeldOut) -> np.ndarray:
    """Whether each of some items, ITEM, is held out; `before` is the number of items before them in
    the source."""
    numbers = before + np.cumsum(table["kind"] != PART)
    drawn = held_out.has_records(numbers, table["digest"])
    return np.where(table["kind"] == RECORD, drawn, table["held_out"])


# --- a sample, to train a BPE on


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
    for items in read_items(stream, reading):
        hash_items(items, reading.validation.seed)
        held_out = are_held_out(items.table, items.before.items, stream.held_out)
        for text, owner in zip(items.texts, items.owners.tolist()):
            if text and not held_out[owner]:
                yield from cutting.in_pieces(cutting.blocks_of(text))
