"""Documents → token ids, in order; threads encode ahead of the writer."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, TypeVar

import numpy as np

from plaingpt.environment import from_environment
from plaingpt.text import cutting
from plaingpt.text.documents import (
    BAD,
    PART,
    RECORD,
    Items,
    Reading,
    Stream,
    hash_items,
    read_items,
)
from plaingpt.text.sources import Position
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.wording import quantity

T = TypeVar("T")
CHUNK = 1 << 19  # bytes of text that a thread encodes at once


@dataclass(frozen=True)
class Encoded:
    """Consecutive items of a source with their ids."""

    table: np.ndarray  # documents.ITEM
    ids: np.ndarray  # of all items, uint16
    mask: np.ndarray | None  # of the loss, uint8
    problems: dict[int, tuple[str, str]]  # by bad item: reason and place
    before: Position
    after: Position

    @cached_property
    def stops(self) -> np.ndarray:
        """Where the ids of each item end, after a 0: those of item i are stops[i] … stops[i + 1]"""
        return np.append(0, np.cumsum(self.table["tokens"], dtype=np.int64))

    @cached_property
    def records_end(self) -> np.ndarray:
        """For each item, where the records end that begin with it."""
        others = np.append(np.flatnonzero(self.table["kind"] != RECORD), len(self.table))
        return others[np.searchsorted(others, np.arange(len(self.table)))]

    @cached_property
    def numbers(self) -> np.ndarray:
        """How many items of the source have been read before each, and at the end: a text file is
        one item."""
        done = np.append(0, np.cumsum(self.table["kind"] != PART, dtype=np.int64))
        return self.before.items + done

    def position(self, count: int) -> Position:
        """The position after the first `count` items, at least one."""
        before, share = self.before, count / len(self.table)
        return before._replace(
            items=int(self.numbers[count]),
            characters=int(self.table["characters"][count - 1]),
            read=before.read + round(share * (self.after.read - before.read)),
        )

    def beyond(self, place: Position) -> "Encoded":
        """What comes after a place, which may be all of it, or nothing."""
        numbers, characters = self.numbers[1:], self.table["characters"]
        is_next = (numbers == place.items) & (characters <= place.characters)
        done = int(np.count_nonzero((numbers < place.items) | is_next))
        if not done:
            return self
        first = int(self.stops[done])
        mask = None if self.mask is None else self.mask[first:]
        problems = {at - done: each for at, each in self.problems.items() if at >= done}
        before = self.position(done)
        return Encoded(self.table[done:], self.ids[first:], mask, problems, before, self.after)


class Share(NamedTuple):
    """The texts that one thread encodes."""

    texts: list[str]
    items: np.ndarray  # of each text: its item
    counted: np.ndarray  # as in Items
    ended: np.ndarray


Encoder = Callable[[Stream], Iterator[Encoded]]


def default_threads() -> int:
    """One more than this process's share of the cores, because the thread that reads and writes
    often waits."""
    processes = from_environment("LOCAL_WORLD_SIZE", default=1, least=1)
    return (os.cpu_count() or 1) // processes + 1


def encoded(
    stream: Stream,
    reading: Reading,
    tokenizer: Tokenizer,
    pool: ThreadPoolExecutor,
    hasher: ThreadPoolExecutor,
    ahead: int,
) -> Iterator[Encoded]:
    """The items of a stream with their ids, in order; the threads of `pool` encode `ahead` chunks.
    `hasher` has a single thread, because it must hash the parts of a file in order."""
    waiting: deque[tuple[list[Items], Future, list[tuple[Share, Future]]]] = deque()
    masked = reading.template != "text"
    for chunk in chunks(read_items(stream, reading), lambda items: items.size):
        hashed = hasher.submit(hash_all, chunk, reading.validation.seed)
        futures = [(each, pool.submit(encode, each, tokenizer, masked)) for each in shares(chunk)]
        waiting.append((chunk, hashed, futures))
        if len(waiting) > ahead:
            yield joined(*waiting.popleft(), reading.max_record_tokens)
    while waiting:
        yield joined(*waiting.popleft(), reading.max_record_tokens)


def chunks(items: Iterable[T], size_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Groups of items that have CHUNK bytes or more, except the last."""
    chunk: list[T] = []
    size = 0
    for item in items:
        chunk.append(item)
        size += size_of(item)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def shares(chunk: list[Items]) -> Iterator[Share]:
    """The texts of a chunk in one share, or in several if they are long."""
    texts = [text for items in chunk for text in items.texts]
    counted = np.concatenate([items.counted for items in chunk])
    ended = np.concatenate([items.ended for items in chunk])
    starts = np.cumsum([0, *(len(items.table) for items in chunk)])
    owners = np.concatenate([items.owners + start for items, start in zip(chunk, starts)])
    if sum(map(len, texts)) <= 2 * CHUNK:
        yield Share(texts, owners, counted, ended)
        return
    for pieces in chunks(pieces_of(texts), lambda piece: len(piece[0]) + 10):
        some, numbers, last = zip(*pieces)
        places = np.array(numbers)
        yield Share(list(some), owners[places], counted[places], ended[places] & last)


def pieces_of(texts: list[str]) -> Iterator[tuple[str, int, bool]]:
    """Texts, cut into pieces where they are long: each piece, the number of its text, and whether
    it is the last of it."""
    for number, text in enumerate(texts):
        long = len(text) > 2 * cutting.BLOCK  # longer than a piece of a text file
        *pieces, last = cutting.in_pieces(cutting.blocks_of(text)) if long else [text]
        yield from ((piece, number, False) for piece in pieces)
        yield last, number, True


def hash_all(chunk: list[Items], seed: int) -> None:
    for items in chunk:
        hash_items(items, seed)


def encode(
    share: Share, tokenizer: Tokenizer, masked: bool
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Ids of the texts of a share, their mask, and the number of ids of each text."""
    ids, ends = tokenizer.encode_joined(share.texts)
    lengths = np.diff(ends, prepend=0)
    mask = np.repeat(share.counted, lengths) if masked else None
    if not share.ended.all():
        keep = np.ones(len(ids), dtype=bool)
        keep[ends[~share.ended] - 1] = False
        ids, mask = ids[keep], None if mask is None else mask[keep]
    return ids, mask, lengths - ~share.ended


def joined(
    chunk: list[Items], hashed: Future, futures: list[tuple[Share, Future]], limit: float
) -> Encoded:
    """A chunk with its ids; records of more than `limit` tokens are bad."""
    hashed.result()
    table = np.concatenate([items.table for items in chunk])
    done = [future.result() for _, future in futures]
    for (share, _), (_, _, lengths) in zip(futures, done):
        table["tokens"] += np.bincount(share.items, lengths, len(table)).astype(np.uint64)
    long = (table["tokens"] > limit) & (table["kind"] == RECORD)
    problems: dict[int, tuple[str, str]] = {}
    start = 0
    for items in chunk:
        reasons = dict(items.reasons)
        for place in np.flatnonzero(long[start : start + len(items.table)]).tolist():
            reasons[place] = f"more than {quantity(int(limit), 'token')}"
        problems |= {start + at: (reason, items.where(at)) for at, reason in reasons.items()}
        start += len(items.table)
    table["kind"][long] = BAD
    ids = np.concatenate([each[0] for each in done])
    mask = np.concatenate([each[1] for each in done]) if done[0][1] is not None else None
    return Encoded(table, ids, mask, problems, chunk[0].before, chunk[-1].after)
