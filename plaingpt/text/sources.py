"""
Where text comes from: a source string → its files, or a dataset on the hub → items, in order.

    stdlib                                       the source files of the Python that runs this
    novel.txt  talks.jsonl.gz  notes/  books/*.txt   a file, a folder, a pattern
    hf:OWNER/NAME[:CONFIG][@REVISION][#SPLIT]    a dataset on the Hugging Face hub, streamed
    SOURCE=0.3                                   any of them, with a weight for mixing

An item is a `TextFile` (one document, however large, read in pieces) or a `Row` (a record of a
.jsonl, .json, .csv or .parquet file or of the hub). Files may be compressed (.gz, .bz2, .xz, .zst,
…). Nothing is held in memory but the item at hand; a .json file that is one array is the exception.
"""

import codecs
import copy
import csv
import glob
import json
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from configurator import UserError

TEXT_SUFFIXES = {".txt", ".py"}
RECORD_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet"}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".lz4"}
HUB = re.compile(
    r"hf:(?P<path>[^\s:@#]+)(:(?P<config>[^\s@#]+))?(@(?P<revision>[^\s#]+))?(#(?P<split>\S+))?"
)
WEIGHT = re.compile(r"(.+)=(\d+(?:\.\d*)?|\.\d+)")
BLOCK = 1 << 20  # bytes read at once, and about the size of a piece
BATCH = 500  # rows of parquet and of the hub that are read at once
# Where a text may be cut and still give the same ids: GPT-2's pattern ends a token before ASCII
# white space that follows something else, and between a letter or digit and ASCII punctuation.
BOUNDARY = re.compile(r"(?<=\S)(?=[ \t\r\n])|(?<=[^\W_])(?=[!-/:-@\[-`{-~])")


@dataclass(frozen=True)
class TextFile:
    """A document: a whole file, or its characters from `start` to `stop`."""

    path: str
    size: int  # bytes on the disk
    start: int = 0
    stop: int | None = None

    def pieces(self) -> Iterator[str]:
        """The text in pieces of about BLOCK characters whose ids, joined, are those of the whole.

        Raises UserError for bytes that are not UTF-8 (in a .py file: not what it declares).
        """
        return in_pieces(clipped(read_text(self.path), self.start, self.stop))


class Row(NamedTuple):
    """A record, or an exception's text where there should be one."""

    where: str  # for messages: file and line or row
    value: Any
    problem: str | None = None
    size: int = 0  # bytes on the disk, where they are known


class Position(NamedTuple):
    """A place in a source."""

    items: int = 0  # read whole
    characters: int = 0  # of the next item, a text file, that were read too
    read: int = 0  # bytes on the disk so far, about
    mark: tuple[int, Any] | None = None  # of a streamed dataset: (items, its state then)


@dataclass(frozen=True)
class Source:
    """One source string, looked up: local `files` in order, or `hub` arguments."""

    name: str
    weight: float | None
    files: tuple[TextFile, ...] = ()
    empty: tuple[str, ...] = ()  # paths of files that hold nothing
    hub: dict[str, str | None] | None = None

    @property
    def size(self) -> int:
        """Bytes on the disk; 0 for the hub."""
        return sum(file.size for file in self.files)

    def items(
        self, start: Position, fields: tuple[str, ...] = ()
    ) -> Iterator[tuple[TextFile | Row, Position]]:
        """Items from `start` on, each with the position behind it. Columns that are not of
        `fields` may be left out."""
        if self.hub:
            yield from hub_items(self.name, self.hub, start, fields)
            return
        number = before = 0
        for file in self.files:
            read = before
            for item in [file] if is_text(file.path) else rows(file.path, fields):
                number += 1
                if isinstance(item, Row):
                    read = min(read + item.size, before + file.size)
                if number > start.items:
                    yield item, Position(number, read=read)
            before += file.size


def find_source(text: str) -> Source:
    """Look up a source string. Raises UserError for one that is nothing."""
    weight = None
    if (weighed := WEIGHT.fullmatch(text)) and not os.path.exists(text):
        text, weight = weighed[1], float(weighed[2])
        if weight == 0:
            raise UserError(f"source {text!r}: a weight must be above 0")
    if text.startswith("hf:"):
        if not (named := HUB.fullmatch(text)):
            raise UserError(f"source {text!r}: write hf:OWNER/NAME[:CONFIG][@REVISION][#SPLIT]")
        return Source(text, weight, hub=named.groupdict())
    paths = stdlib_paths() if text == "stdlib" else find_paths(text)
    real = {os.path.realpath(path): os.path.abspath(path) for path in reversed(paths)}  # none twice
    files = tuple(TextFile(path, os.path.getsize(path)) for path in sorted(real.values()))
    empty = tuple(file.path for file in files if not file.size)
    return Source(text, weight, tuple(file for file in files if file.size), empty)


def find_paths(text: str) -> list[str]:
    kinds = ", ".join(sorted({".txt"} | RECORD_SUFFIXES))
    if os.path.isfile(text):
        if not readable(text):
            raise UserError(f"source {text!r}: only {kinds} files are read, or compressed ones")
        return [text]
    if os.path.isdir(text):
        found = [str(path) for path in Path(text).rglob("*") if path.is_file()]
    else:
        found = [path for path in glob.glob(text, recursive=True) if os.path.isfile(path)]
    paths = sorted(path for path in found if readable(path))
    if not paths:
        raise UserError(f"source {text!r}: no such file, nor a folder or pattern of {kinds}")
    return paths


def stdlib_paths() -> list[str]:
    """The standard library's .py files that people wrote, without tests (not every Python has
    them) and without generated tables and texts (encodings, pydoc_data)."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    left_out |= {"encodings", "pydoc_data"}
    return sorted(
        str(path)
        for path in root.rglob("*.py")
        if not left_out.intersection(path.relative_to(root).parts) and path.stat().st_size
    )


def suffix(path: str) -> str:
    """`.jsonl` of `talks.jsonl.gz`."""
    name = Path(path)
    return (name.with_suffix("") if name.suffix in COMPRESSED else name).suffix.lower()


def is_text(path: str) -> bool:
    return suffix(path) in TEXT_SUFFIXES


def readable(path: str) -> bool:
    return suffix(path) in RECORD_SUFFIXES | {".txt"}


# --- text files


def open_bytes(path: str) -> IO[bytes]:
    if Path(path).suffix not in COMPRESSED:
        return open(path, "rb")
    import fsspec  # not at the top: only compressed files need it

    try:
        return fsspec.open(path, "rb", compression="infer").open()
    except ValueError as error:  # fsspec knows the codec by name, but its package is not there
        raise UserError(f"{path}: {error}") from None


def read_text(path: str) -> Iterator[str]:
    """Blocks of a file's text. Raises UserError for bytes that are not UTF-8."""
    if path.endswith(".py"):
        try:
            with tokenize.open(path) as file:
                yield file.read()
        except (UnicodeDecodeError, SyntaxError) as error:  # not what it declares, or unknown
            raise UserError(f"{path}: {error}") from None
        return
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    done = 0
    with whole(path), open_bytes(path) as file:
        while True:
            block = file.read(BLOCK)
            before = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at "
                    f"{done - before + error.start:,}; convert it, as with iconv -t utf-8"
                ) from None
            done += len(block)
            if text:
                yield text
            if not block:
                return


@contextmanager
def whole(path: str) -> Iterator[None]:
    """Make a ValueError that names the file of whatever its decompressor raises."""
    try:
        yield
    except ValueError:
        raise
    except Exception as error:  # OSError, EOFError, zlib.error, lzma.LZMAError, ZstdError, …
        if Path(path).suffix not in COMPRESSED:
            raise
        raise UserError(f"{path} is damaged: {error}") from None


def clipped(blocks: Iterator[str], start: int, stop: int | None) -> Iterator[str]:
    """Characters `start` … `stop` - 1 of a text that comes in blocks."""
    at = 0
    for block in blocks:
        if stop is not None and at >= stop:
            return
        yield block[max(0, start - at) : None if stop is None else stop - at]
        at += len(block)


def last_boundary(text: str) -> int:
    """The last place where BOUNDARY allows a cut, or 0."""
    for tail in (1 << 12, 2 * BLOCK + 2):  # what is before was searched when it was the end
        first = max(1, len(text) - tail)
        places = [match.start() for match in BOUNDARY.finditer(text, first)]
        if places:
            return places[-1]
    return 0


def in_pieces(blocks: Iterable[str]) -> Iterator[str]:
    """A text that comes in blocks, in pieces of about BLOCK characters whose ids, joined, are those
    of the whole."""
    rest = ""
    for block in blocks:
        rest += block
        if len(rest) >= BLOCK and (cut := last_boundary(rest)):
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


def cut_long(text: str) -> list[str]:
    """A text in pieces of about BLOCK characters, as TextFile.pieces."""
    return list(in_pieces(text[at : at + BLOCK] for at in range(0, len(text) or 1, BLOCK)))


# --- records


def rows(path: str, fields: tuple[str, ...]) -> Iterator[Row]:
    """The records of a file. Raises UserError for a file that is not of its kind at all."""
    read = {".csv": csv_rows, ".jsonl": line_rows, ".json": json_rows}
    with whole(path):
        if suffix(path) == ".parquet":
            yield from parquet_rows(path, fields)
        else:
            yield from read[suffix(path)](path)


def line_rows(path: str) -> Iterator[Row]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            where, value, problem = f"{path}, line {number}", None, None
            try:
                value = json.loads(line.decode())
            except (ValueError, RecursionError) as error:
                problem = "not UTF-8" if isinstance(error, UnicodeDecodeError) else "not JSON"
            yield Row(where, value, problem, len(line))


def json_rows(path: str) -> Iterator[Row]:
    """One array of records, or a record a line."""
    with open_bytes(path) as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        if not start.startswith(b"["):
            yield from line_rows(path)
            return
    with open_bytes(path) as file:
        try:
            values = json.loads(file.read().removeprefix(codecs.BOM_UTF8))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} is not JSON: {error}") from None
    for number, value in enumerate(values, 1):
        yield Row(f"{path}, record {number:,}", value)


def csv_rows(path: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    lines = csv.reader(text_lines(path), strict=True)
    names: list[str] = []
    while True:
        try:
            values = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            yield Row(f"{path}, line {lines.line_num:,}", None, f"not CSV ({error})")
            continue
        if not names:
            names = values
        elif values:
            same = len(values) == len(names)
            problem = None if same else "another number of fields than the header"
            yield Row(f"{path}, line {lines.line_num:,}", dict(zip(names, values)), problem)


def text_lines(path: str) -> Iterator[str]:
    rest = ""
    for block in read_text(path):
        *lines, rest = (rest + block).split("\n")
        yield from (line + "\n" for line in lines)
    if rest:
        yield rest


def parquet_rows(path: str, fields: tuple[str, ...]) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile  # not at the top: 0.2 s

    try:
        with open_bytes(path) as file:
            table = ParquetFile(file)
            columns = [name for name in table.schema_arrow.names if name in fields] or None
            batches = table.iter_batches(BATCH, columns=columns)
            values = (value for batch in batches for value in batch.to_pylist())
            for number, value in enumerate(values, 1):
                yield Row(f"{path}, row {number:,}", value)
    except Exception as error:  # pyarrow's own kinds
        raise UserError(f"{path} is not a parquet file that can be read: {error}") from None


# --- the hub, by the library `datasets`


def streamed(builder: Any, fields: tuple[str, ...]) -> dict[str, Any]:
    """The splits of a `datasets` builder as streams. Of parquet files only the columns `fields`
    are read, if there are such, and BATCH rows at once, as some files are a single row group."""
    if hasattr(builder.config, "columns"):
        builder.config.batch_size = BATCH
        splits = builder.as_streaming_dataset()
        there = next(iter(splits.values())).column_names or []
        wanted = [name for name in fields if name in there]
        if not wanted or set(wanted) == set(there):
            return splits
        builder.config.columns = wanted
    return builder.as_streaming_dataset()


def rows_of(batch: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    names = list(batch)
    return (dict(zip(names, values)) for values in zip(*batch.values()))


def hub_items(
    name: str, hub: dict[str, str | None], start: Position, fields: tuple[str, ...]
) -> Iterator[tuple[Row, Position]]:
    """A streamed dataset's records. `datasets` itself tries for minutes when a connection breaks.

    Raises UserError for a dataset, config or split that is not there, and OSError when the
    network stays away.
    """
    stream = hub_stream(name, hub, fields)
    number, state = start.mark or (0, None)
    if state:
        stream.load_state_dict(state)
    mark = start.mark
    try:
        for batch in stream.iter(BATCH):
            for value in rows_of(batch):
                number += 1
                if number > start.items:
                    yield Row(f"{name}, record {number:,}", value), Position(number, mark=mark)
            mark = (number, copy.deepcopy(stream.state_dict()))
    except Exception as error:  # the hub's, fsspec's, pyarrow's and httpx' own kinds
        raise OSError(
            f"source {name!r}: reading ended after record {number:,} ({type(error).__name__}: "
            f"{error}); the same command goes on from where it was noted last"
        ) from error


def hub_builder(hub: dict[str, str | None]) -> Any:
    import datasets  # not at the top: it takes a second

    return datasets.load_dataset_builder(hub["path"], hub["config"], revision=hub["revision"])


def hub_hash(source: Source) -> str:
    """The state of a dataset of the hub: another where its files are others."""
    try:
        return hub_builder(source.hub or {}).hash
    except Exception as error:  # hub_stream says what is wrong, in its words
        return type(error).__name__


def hub_stream(name: str, hub: dict[str, str | None], fields: tuple[str, ...]) -> Any:
    """A dataset of the hub as a `datasets.IterableDataset`: the named split, else `train`, else
    all splits one after another."""
    import datasets  # not at the top: it takes a second

    try:
        splits = streamed(hub_builder(hub), fields)
    except ConnectionError as error:
        raise ConnectionError(
            f"source {name!r}: {error}; is there a network? (a dataset that was downloaded "
            "before is a folder, and a folder is a source)"
        ) from None
    except Exception as error:  # no such dataset or config, a private one, …: many kinds
        raise UserError(f"source {name!r}: {error}") from None
    wanted = hub["split"] or "train"
    if wanted in splits:
        return splits[wanted]
    if hub["split"]:
        raise UserError(f"source {name!r}: no split {wanted!r}, but {', '.join(splits)}")
    return datasets.concatenate_datasets(list(splits.values()))
