"""
Where text comes from: a source string → local files, or a dataset of the hub → items, in order.

    stdlib                                       the source files of the Python that runs this
    novel.txt  talks.jsonl.gz  notes/  src/**/*.py   a file, a folder, a pattern
    hf:OWNER/NAME[:CONFIG][@REVISION][#SPLIT]    a dataset of the Hugging Face hub, streamed
    SOURCE=0.3                                   any of them, with a weight for mixing

An item is a `TextFile` (one document, however large, read in pieces) or a record of a .jsonl,
.json, .csv or .parquet file or of the hub; records are read in batches, `Rows`. Files may be
compressed (.gz, .bz2, .xz, .zst, …). Memory holds a piece or a batch at a time, except for a JSON
file that is one array.
"""

import difflib
import glob
import os
import re
import sysconfig
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from configurator import UserError
from plaingpt.files import Count
from plaingpt.text import records
from plaingpt.text.hub import BrokenStream, HubDataset, Shard, hub_shards, parse_address
from plaingpt.text.records import RECORD_SUFFIXES, Row, Rows
from plaingpt.text.text_files import TEXT_SUFFIXES, TextFile, codec_of, is_text, suffix

KINDS = RECORD_SUFFIXES | {".txt"}  # suffixes of files that are read without being named
UNIT = 1 << 26  # bytes of files that are read together; saved positions count units: do not change
T = TypeVar("T")
WEIGHT = re.compile(r"(.+)=(-?(?:\d+(?:\.\d*)?|\.\d+))")


class Mark(NamedTuple):
    """A place in a source where reading can begin."""

    items: Count  # before it
    state: Any  # that its unit needs to begin there; None: the beginning of the unit
    unit: Count | None = None  # None in notes of older versions, whose states are of other things


class Position(NamedTuple):
    """A place in a source."""

    items: Count = 0  # read completely
    characters: Count = 0  # read of the next item, a text file
    read: Count = 0  # bytes on disk so far, roughly
    mark: Mark | None = None  # at or before this place; None: the beginning of the source

    def beginning(self) -> tuple[int, Any, int]:
        """Where reading begins: the items before, the state and the unit."""
        items, state, unit = Mark(*self.mark) if self.mark else Mark(0, None)
        return (0, None, 0) if unit is None else (items, state, unit)

    def unit(self) -> tuple[int, int]:
        """The unit that this place is in or before, and the items before that unit."""
        items, state, unit = self.beginning()
        return unit, items - (state[0] if state else 0)


@dataclass(frozen=True)
class Files:
    """Files that are read together."""

    files: tuple[TextFile, ...]

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    def batches(
        self, fields: tuple[str, ...], state: None = None
    ) -> Iterator[tuple[TextFile | Rows, None]]:
        """Text files, and records in batches."""
        for file in self.files:
            if is_text(file.path):
                yield file, None
            else:
                for batch in records.batches(file.path, fields, file.start, file.stop):
                    yield batch, None


Unit = Files | Shard


@dataclass(frozen=True)
class Source:
    """One source string, looked up: local `files` in order, or a dataset of the `hub`."""

    name: str
    weight: float | None
    files: tuple[TextFile, ...] = ()
    empty: tuple[str, ...] = ()  # paths of empty files
    others: tuple[str, ...] = ()  # paths of files that are not read
    hub: HubDataset | None = None
    opened: tuple[Unit, ...] | None = None  # the only units that are read

    @property
    def size(self) -> int:
        """Bytes on disk; 0 for the hub."""
        return sum(file.size for file in self.files)

    @property
    def is_compressed(self) -> bool:
        """Whether the text may be much longer than the files."""
        return any(codec_of(f.path) or suffix(f.path) == ".parquet" for f in self.files)

    def units(self, fields: tuple[str, ...] = ()) -> Sequence[Unit]:
        """The parts that can be read apart from each other, in order: shards of a dataset of the
        hub, or about UNIT bytes of local files. Columns other than `fields` may be left out."""
        if self.opened is not None:
            return self.opened
        if self.hub:
            return hub_shards(self.name, self.hub, fields)
        units: list[list[TextFile]] = [[]]
        room = UNIT
        for part in (part for file in self.files for part in parts_of(file)):
            if room < part.size and units[-1]:
                units.append([])
                room = UNIT
            units[-1].append(part)
            room -= part.size
        return [Files(tuple(unit)) for unit in units]

    def batches(
        self, start: Position, fields: tuple[str, ...] = ()
    ) -> Iterator[tuple[TextFile | Rows, Position, Position]]:
        """Text files and batches of records from `start` on, with the positions before and after
        each. Columns other than `fields` may be left out."""
        number, state, first = start.beginning()
        units = self.units(fields)
        read = sum(unit.size for unit in units[:first])
        for place, unit in enumerate(units[first:], first):
            done, read = read, read + unit.size
            mark = Mark(number, state, place)
            for item, begin in resumable(unit.batches(fields, state)):
                mark = mark if begin is None else Mark(number, begin, place)
                before = Position(number, read=done, mark=mark)
                number += 1 if isinstance(item, TextFile) else len(item.values)
                done = min(read, done + item.size)
                skip = start.items - before.items
                if number > start.items and skip > 0:
                    assert isinstance(item, Rows)
                    item, before = item.after(skip), before._replace(items=start.items)
                if number > start.items:
                    yield item, before, Position(number, read=done, mark=mark)
            state = None

    def items(
        self, start: Position, fields: tuple[str, ...] = ()
    ) -> Iterator[tuple[TextFile | Row, Position]]:
        """Items from `start` on one by one, each with the position after it."""
        for item, before, after in self.batches(start, fields):
            if isinstance(item, TextFile):
                yield item, after
            else:
                for number, row in enumerate(item.each(), before.items + 1):
                    yield row, after._replace(items=number)


def resumable(batches: Iterator[T]) -> Iterator[T]:
    """The same, with advice if a stream breaks."""
    try:
        yield from batches
    except BrokenStream as error:
        advice = "the same command resumes from the last saved progress"
        raise OSError(f"{error}; {advice}") from error


def parts_of(file: TextFile) -> list[TextFile]:
    """A large file with a record per line in parts of at most UNIT bytes; any other as it is."""
    if file.size <= UNIT or not records.can_be_split(file.path):
        return [file]
    stops = [*range(UNIT, file.size, UNIT), file.size]
    return [replace(file, start=a, stop=b, size=b - a) for a, b in pairwise([0, *stops])]


def find_source(text: str) -> Source:
    """Look up a source string. Raises UserError if it matches no readable file."""
    weight = None
    if (weighed := WEIGHT.fullmatch(text)) and not os.path.exists(text):
        text, weight = weighed[1], float(weighed[2])
        if weight <= 0:
            raise UserError(f"source {text!r}: a weight must be above 0")
    if text.startswith("hf:"):
        return Source(text, weight, hub=parse_address(text))
    if text == "stdlib":
        paths, others = stdlib_paths(), []
    else:
        found = find_paths(text)
        kinds = KINDS if os.path.isdir(text) else KINDS | TEXT_SUFFIXES & {suffix(text)}
        paths = [path for path in found if suffix(path) in kinds and os.path.isfile(path)]
        others = sorted({*found} - {*paths})  # of other kinds, broken links, pipes
        if not paths:
            raise UserError(f"source {text!r} {nothing_read(text, sorted(kinds), others)}")
    real = {os.path.realpath(path): os.path.abspath(path) for path in reversed(paths)}  # once each
    files = tuple(TextFile(path, os.path.getsize(path)) for path in sorted(real.values()))
    empty = tuple(file.path for file in files if not file.size)
    return Source(text, weight, tuple(file for file in files if file.size), empty, tuple(others))


def find_paths(text: str) -> list[str]:
    """All files that a path or a pattern leads to, without those that macOS, editors and Jupyter
    hide in folders (._a.txt, .ipynb_checkpoints). Raises OSError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise error

    if os.path.isdir(text):
        found = []
        for folder, inner, names in os.walk(text, onerror=refuse):
            inner[:] = [name for name in inner if not name.startswith(".")]
            found += [os.path.join(folder, name) for name in names if not name.startswith(".")]
    else:
        found = [text] if os.path.lexists(text) else glob.glob(text, recursive=True)
    return sorted(path for path in found if not os.path.isdir(path))


def nothing_read(text: str, kinds: list[str], others: list[str]) -> str:
    """Why a source string leads to no file of these kinds, and what to do about it."""
    read = ", ".join(kinds)
    if os.path.lexists(text) and not os.path.isdir(text) and not os.path.isfile(text):
        return "is not a file but a pipe, a device or a broken link"
    if others == [text]:
        return (
            f"is of an unsupported kind: only {read} files are read, compressed or not; "
            "convert it to one of these, plain text with a name that ends in .txt"
        )
    if others:
        said = f"matches {counted_suffixes(others)}, but no file of these kinds: {read}"
        if texts := Counter(suffix(path) for path in others if is_text(path)).most_common(1):
            pattern = os.path.join(text if os.path.isdir(text) else "FOLDER", f"**/*{texts[0][0]}")
            return f"{said}; other text needs a pattern, such as {pattern!r}"
        return f"{said}; convert them to one of these, plain text with names that end in .txt"
    said = f"matches no file of these kinds: {read}"
    if "://" in text:
        return f"{said}; download it first, or write hf:OWNER/NAME for a dataset of the hub"
    parent = Path(text).parent
    known = [path.name for path in parent.iterdir()] if parent.is_dir() else []
    known += ["stdlib"] * (parent == Path())
    if close := difflib.get_close_matches(Path(text).name, known, n=1):
        return f"{said}; did you mean {str(parent / close[0])!r}?"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not parent.exists():
        return f"{said}; for a dataset on the hub, write hf:{text}"
    return said


def counted_suffixes(paths: Iterable[str]) -> str:
    """Such as `12 .pdf, 3 .docx`."""
    counts = Counter(suffix(path) or "without a suffix" for path in paths)
    return ", ".join(f"{count:,} {kind}" for kind, count in counts.most_common(5))


def folder_for(source: str) -> str:
    """A data_dir to propose for a source, such as `data/novel` for `books/novel.txt`."""
    name = Path(re.sub(r"^hf:|[:@#].*$", "", source)).name.partition(".")[0]
    return "data/" + (re.sub(r"\W+", "_", name).strip("_") or "mine")


def stdlib_paths() -> list[str]:
    """The hand-written .py files of the standard library: without tests, which some Pythons lack,
    and without generated tables and texts (encodings, pydoc_data)."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    left_out |= {"encodings", "pydoc_data"}
    return sorted(
        str(path)
        for path in root.rglob("*.py")
        if not left_out.intersection(path.relative_to(root).parts) and path.stat().st_size
    )
