"""
What the processes of a group do: each encodes some of the sources into files, `parts`, and
process 0 puts these together, in the order of the sources and by the same rules as if it had
encoded everything itself. So the result does not depend on the number of processes.

A process that is free claims the next unit of a source (see sources.py). A part holds what it
encoded of that unit in a few seconds; the last one says so. After a restart, whoever claims the
unit goes on after the parts that are there.
"""

import contextlib
import itertools
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np

from configurator import UserError
from plaingpt.files import atomic_file
from plaingpt.text.documents import ITEM, Stream
from plaingpt.text.encoding import Encoded, Encoder
from plaingpt.text.group import ENDED, POLL_SECONDS, Group
from plaingpt.text.sources import Mark, Position, Unit

FOLDER = "parts"  # in the folder of what is half prepared
FAILED = ".failed"  # suffix of an empty file: the part beside it has an error
PART_SECONDS = 5.0  # of encoding
PART_TOKENS = 1 << 25  # at most, roughly
UNITS_AHEAD = 2  # that each process may be ahead of process 0


class Chunk(msgspec.Struct, frozen=True):
    """An Encoded as it is written; positions are counted from the beginning of its unit."""

    table: bytes
    ids: bytes
    mask: bytes | None
    problems: dict[int, tuple[str, str]]
    before: Position
    after: Position


class Part(msgspec.Struct, frozen=True):
    chunks: list[Chunk]
    before: Position
    after: Position
    is_last: bool  # of its unit
    error: str | None  # why reading ended before the end of the unit


def write_part(path: Path, part: Part) -> None:
    content = msgspec.msgpack.encode(part)
    with atomic_file(path) as partial, partial.open("wb") as file:
        file.write(zlib.crc32(content).to_bytes(4, "little"))
        file.write(content)


def read_part(path: Path) -> Part:
    """Raises UserError for a damaged file."""
    content = memoryview(path.read_bytes())
    try:
        if int.from_bytes(content[:4], "little") != zlib.crc32(content[4:]):
            raise ValueError("its checksum differs")
        return msgspec.msgpack.decode(content[4:], type=Part)
    except (ValueError, msgspec.MsgspecError) as error:
        raise UserError(
            f"{path} is damaged ({error}): remove {path.parent} to encode it again"
        ) from None


def placed(chunk: Chunk, items: int, read: int, mark: Mark) -> Encoded:
    """A chunk with its positions in the source; `items` and `read` are those before its unit."""
    before, after = (
        Position(items + each.items, each.characters, read + each.read, mark)
        for each in (chunk.before, chunk.after)
    )
    mask = None if chunk.mask is None else np.frombuffer(chunk.mask, np.uint8)
    table, ids = np.frombuffer(chunk.table, ITEM), np.frombuffer(chunk.ids, np.uint16)
    return Encoded(table, ids, mask, chunk.problems, before, after)


@dataclass
class Job:
    """What this process encodes of a source, unit by unit."""

    stream: Stream
    units: Sequence[Unit]
    unit: int = 0  # that it is encoding, or the next that may be free
    written: int = 0  # parts in all
    part: int = 0  # the next of that unit
    position: Position = field(default_factory=Position)  # of that part, in the unit
    chunks: Iterator[Encoded] | None = None  # of the unit from there on


class Parts:
    """The parts of all processes, and what this one encodes."""

    def __init__(
        self,
        folder: Path,
        group: Group,
        streams: list[Stream],
        fields: tuple[str, ...],
        encode: Encoder,
    ) -> None:
        self.folder, self.group, self.encode = folder, group, encode
        self.jobs = [Job(stream, stream.source.units(fields)) for stream in streams]
        self.removed = [0] * len(streams)  # units of which no part is left
        group.units = [stream.position.unit()[0] for stream in streams]
        folder.mkdir(exist_ok=True)
        if group.rank == 0:  # and no other encodes yet
            for mark in folder.glob(f"*{FAILED}"):  # what an earlier run could not read
                mark.with_suffix("").unlink(missing_ok=True)
                mark.unlink()

    def path(self, source: int, unit: int, part: int | str) -> Path:
        number = part if isinstance(part, str) else f"{part:06d}"
        return self.folder / f"{source:03d}_{unit:06d}_{number}"

    def claim_path(self, source: int, unit: int) -> Path:
        """The file that says which process encodes a unit."""
        return self.group.folder / f"{source:03d}_{unit:06d}"

    # --- encoding

    def help(self) -> None:
        """In processes other than 0: encode until process 0 is done.

        Raises UserError if process 0 ends or dies before.
        """
        try:
            while not self.group.is_done():
                if not self.work():
                    self.group.check(0)
                    time.sleep(POLL_SECONDS)
        except FileNotFoundError:
            if self.folder.exists() and self.group.folder.exists():
                raise
            raise UserError(ENDED) from None  # it removes both

    def work(self) -> bool:
        """Encode for some seconds, and write a part; False if there is nothing to do for now."""
        merging = self.group.merging()
        if not merging:
            return False
        order = [
            (job.stream.all_val, job.written if job.stream.is_weighed else 0, source)
            for source, job in enumerate(self.jobs)
            if merging[source] < len(job.units)
        ]
        for *_, source in sorted(order):
            if self.jobs[source].chunks or self.claim(source, merging[source]):
                self.write_next(source)
                return True
        return False

    def claim(self, source: int, merging: int) -> bool:
        """Find a unit that nobody encodes, not too far ahead, and begin with it."""
        job = self.jobs[source]
        ahead = merging + UNITS_AHEAD * self.group.size
        for unit in range(max(job.unit, merging), min(ahead, len(job.units))):
            with contextlib.suppress(FileExistsError):
                with self.claim_path(source, unit).open("x") as file:
                    file.write(str(self.group.rank))
                job.unit = unit
                if self.begin(source):
                    return True
        return False

    def begin(self, source: int) -> bool:
        """Begin with a unit, after what earlier runs have written of it, if that is not all."""
        job = self.jobs[source]
        job.part, job.position = 0, Position()
        while (path := self.path(source, job.unit, job.part)).exists():
            try:
                known = read_part(path)
            except FileNotFoundError:  # process 0 needs this unit no longer
                return False
            if known.is_last:
                return False
            job.part, job.position = job.part + 1, known.after
        unit = replace(job.stream.source, opened=(job.units[job.unit],))
        job.chunks = self.encode(replace(job.stream, source=unit, position=job.position))
        return True

    def write_next(self, source: int) -> None:
        job = self.jobs[source]
        assert job.chunks
        part = self.next_part(job.chunks, job.position)
        if self.group.is_done():
            return
        path = self.path(source, job.unit, job.part)
        if part.error:
            path.with_suffix(FAILED).touch()
        write_part(path, part)
        job.part, job.position, job.written = job.part + 1, part.after, job.written + 1
        if part.is_last:
            job.chunks = None

    def next_part(self, chunks: Iterator[Encoded], before: Position) -> Part:
        found, tokens, error, began = [], 0, None, time.monotonic()
        after, is_last = before, False
        try:
            for each in chunks:
                mask = None if each.mask is None else each.mask.tobytes()
                content = each.table.tobytes(), each.ids.tobytes(), mask
                found.append(Chunk(*content, each.problems, each.before, each.after))
                after, tokens = each.after, tokens + len(each.ids)
                is_enough = tokens > PART_TOKENS or time.monotonic() - began > PART_SECONDS
                if is_enough or self.group.is_done():
                    break
            else:
                is_last = True
        except UserError as problem:  # process 0 raises it, if it gets that far
            error, is_last = str(problem), True
        return Part(found, before, after, is_last, error)

    # --- putting together

    def merged(self, stream: Stream) -> Iterator[Encoded]:
        """In process 0: what all processes encoded of a source, from the stream's position on.

        While a part is missing, this process encodes its own share. Raises UserError if the process
        that has to write it has died.
        """
        source = next(at for at, job in enumerate(self.jobs) if job.stream is stream)
        if stream.all_val:  # which come last
            for at, job in enumerate(self.jobs):
                if not job.stream.all_val:
                    self.group.units[at] = len(job.units)
        start, units = stream.position, self.jobs[source].units
        first, items = start.unit()
        read = sum(unit.size for unit in units[:first])
        for unit in range(first, len(units)):
            self.group.units[source] = unit
            self.remove_saved(source)
            for part in self.parts_of(source, unit):
                for chunk in part.chunks:
                    rest = placed(chunk, items, read, Mark(items, None, unit)).beyond(start)
                    if len(rest.table):
                        yield rest
                if part.error:
                    raise UserError(part.error)
            items, read = items + part.after.items, read + units[unit].size

    def parts_of(self, source: int, unit: int) -> Iterator[Part]:
        before = Position()
        for number in itertools.count():
            path = self.path(source, unit, number)
            while not path.exists():
                if not self.work():
                    self.check_claim(source, unit)
                    time.sleep(POLL_SECONDS)
            part = read_part(path)
            if part.before != before:
                raise UserError(f"{path} does not follow the part before it: remove {self.folder}")
            yield part
            if part.is_last:
                return
            before = part.after

    def check_claim(self, source: int, unit: int) -> None:
        """Raises UserError if the process that encodes a unit has died."""
        rank = self.claim_path(source, unit).read_text()
        for each in [int(rank)] if rank else range(self.group.size):  # empty: it may have died then
            self.group.check(each)

    def remove_saved(self, source: int) -> None:
        """Remove the parts of units that will not be needed again, even after a kill."""
        job = self.jobs[source]
        saved, _ = job.stream.saved.unit()
        for unit in range(self.removed[source], saved):
            for path in self.folder.glob(self.path(source, unit, "*").name):
                path.unlink()
        self.removed[source] = saved
