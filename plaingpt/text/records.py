"""Records of .jsonl, .json, .csv and .parquet files, read in batches."""

import codecs
import contextlib
import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import islice
from types import MappingProxyType
from typing import IO, Any, NamedTuple

import msgspec

from configurator import UserError
from plaingpt.text import cutting
from plaingpt.text.text_files import (
    CONVERT,
    MAX_LINE,
    codec_of,
    open_bytes,
    read_text,
    refuse_damaged,
    refuse_foreign,
    suffix,
    text_lines,
)

RECORD_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet"}
BATCH = 500  # rows of parquet files and of the hub that are read at once
decode_lines = msgspec.json.Decoder().decode_lines  # far faster than json.loads on each


class Row(NamedTuple):
    """A record, or the `problem` that kept it from being read."""

    where: str  # for messages: file and line or row
    value: Any
    problem: str | None = None


class Rows(NamedTuple):
    """Consecutive records, at most a few thousand; those with a problem have no value."""

    values: Sequence[Any]
    label: str  # in messages: "a.jsonl, line"
    numbers: Sequence[int]  # in messages, counted from where reading began in the file
    problems: Mapping[int, str] = MappingProxyType({})  # by place: what kept it from being read
    size: int = 0  # bytes on disk, where known
    before: Callable[[], int] = int  # how many numbers there are before that place

    def where(self, place: int) -> str:
        return f"{self.label} {self.before() + self.numbers[place]:,}"

    def after(self, count: int) -> "Rows":
        """Without the first `count`."""
        problems = {at - count: problem for at, problem in self.problems.items() if at >= count}
        return self._replace(
            values=self.values[count:], numbers=self.numbers[count:], problems=problems
        )

    def each(self) -> Iterator[Row]:
        for place, value in enumerate(self.values):
            yield Row(self.where(place), value, self.problems.get(place))


def rows(path: str, fields: tuple[str, ...]) -> Iterator[Row]:
    """The records of a file one by one; see `batches`."""
    return (row for batch in batches(path, fields) for row in batch.each())


def batches(
    path: str, fields: tuple[str, ...], start: int = 0, stop: int | None = None
) -> Iterator[Rows]:
    """The records of a file; of parquet files only the columns `fields`, if it has any of them. Of
    a file that `has_lines`, only those that begin in its bytes `start` … `stop` - 1.

    Raises UserError if the content does not match the suffix, and for a field with two columns.
    """
    with refuse_damaged(path):
        if suffix(path) == ".parquet":
            yield from parquet_batches(path, fields)
            return
        refuse_foreign(path)
        if suffix(path) == ".csv":
            yield from csv_batches(path, fields)
        elif has_lines(path):
            yield from line_batches(path, start, stop)
        else:
            yield from array_batches(path)


# --- JSON


def has_lines(path: str) -> bool:
    """Whether a file of JSON holds a record per line, rather than one array of records.

    Raises UserError for an object over several lines.
    """
    with open_bytes(path) as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    if start.partition(b"\n")[0].strip() == b"{":
        raise UserError(
            f"{path} begins with a JSON object over several lines: expected an array of "
            "records, or one record per line"
        )
    return not start.startswith(b"[")


def can_be_split(path: str) -> bool:
    """Whether `batches` can read a part of a file."""
    return suffix(path) in (".jsonl", ".json") and not codec_of(path) and has_lines(path)


def line_rows(path: str) -> Iterator[Row]:
    return (row for batch in line_batches(path) for row in batch.each())


def line_batches(path: str, start: int = 0, stop: int | None = None) -> Iterator[Rows]:
    number, label, before = 1, f"{path}, line", cache(lambda: lines_before(path, start))
    with open_bytes(path) as file:
        for block in line_blocks(file, start, stop):
            if len(block) > MAX_LINE:
                lines = block.removesuffix(b"\n").split(b"\n")
                if len(line := max(lines, key=len)) > MAX_LINE:
                    place = before() + number + lines.index(line)
                    raise UserError(f"{label} {place:,} is longer than {MAX_LINE >> 20} MiB")
            if start == 0 and number == 1:
                block = block.removeprefix(codecs.BOM_UTF8)
            size, block = len(block), block.removesuffix(b"\n")
            numbers, values, problems = parsed(block, number)
            yield Rows(values, label, numbers, problems, size, before)
            number += block.count(b"\n") + 1


def lines_before(path: str, start: int) -> int:
    """The number of lines that begin in the first `start` bytes of a file."""
    if not start:
        return 0
    whole, rest = divmod(start - 1, cutting.BLOCK)
    with open(path, "rb") as file:
        return 1 + sum(file.read(size).count(b"\n") for size in [cutting.BLOCK] * whole + [rest])


def line_blocks(file: IO[bytes], start: int, stop: int | None) -> Iterator[bytes]:
    """Whole lines in blocks of about cutting.BLOCK bytes, and as the last block a line of more than
    MAX_LINE."""
    at = start
    if start:
        file.seek(start - 1)
        at += len(file.readline(MAX_LINE)) - 1  # the rest of a line that begins before
    while stop is None or at < stop:
        block = file.read(cutting.BLOCK if stop is None else min(cutting.BLOCK, stop - at))
        if not block:
            break
        if not block.endswith(b"\n"):
            block += file.readline(MAX_LINE)
        yield block
        at += len(block)


def parsed(block: bytes, number: int) -> tuple[Sequence[int], list[Any], dict[int, str]]:
    """The numbers of lines that are not blank, their values, and what is wrong with them, by place;
    the first line has the `number`."""
    with contextlib.suppress(msgspec.MsgspecError, ValueError, RecursionError):
        values = decode_lines(block)
        if len(values) == block.count(b"\n") + 1:  # so that each line has one
            return range(number, number + len(values)), values, {}
    numbers: list[int] = []
    values = []
    problems: dict[int, str] = {}
    for place, line in enumerate(block.split(b"\n"), number):
        if not line.strip():
            continue
        numbers.append(place)
        value = None
        try:
            value = json.loads(line.decode())
        except UnicodeDecodeError:
            problems[len(values)] = f"not UTF-8: {CONVERT}"
        except (ValueError, RecursionError):
            comma = line.rstrip().endswith(b",")  # in a list that lacks its brackets
            problems[len(values)] = "not JSON: a comma ends the line" if comma else "not JSON"
        values.append(value)
    return numbers, values, problems


def array_batches(path: str) -> Iterator[Rows]:
    """An array of records, which is held in memory."""
    text = "".join(read_text(path))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    for first in range(0, len(values), BATCH):
        some = values[first : first + BATCH]
        yield Rows(some, f"{path}, record", range(first + 1, first + 1 + len(some)))


# --- tables


def csv_batches(path: str, fields: tuple[str, ...]) -> Iterator[Rows]:
    records = csv_rows(path, fields)
    while some := list(islice(records, BATCH)):
        numbers, values, problems = zip(*some)
        found = {place: problem for place, problem in enumerate(problems) if problem}
        yield Rows(values, f"{path}, line", numbers, found)


def csv_rows(path: str, fields: tuple[str, ...]) -> Iterator[tuple[int, Any, str | None]]:
    """The line in which each record ends, its value, and what is wrong with it."""
    csv.field_size_limit(MAX_LINE)
    lines = csv.reader(text_lines(path), strict=True)
    names: list[str] = []
    while True:
        first = lines.line_num + 1  # of the next record
        try:
            values = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end of data" in str(error):
                raise UserError(
                    f"{path}, line {first:,}: a quote that opens in this record is never closed "
                    "and would swallow the rest of the file"
                ) from None
            yield lines.line_num, None, f"not CSV ({error})"
            continue
        if not names:
            refuse_twins(path, values, fields)
            names = values
        elif values:
            same = len(values) == len(names)
            problem = None if same else "a different number of fields from the header"
            yield lines.line_num, dict(zip(names, values)), problem


def parquet_batches(path: str, fields: tuple[str, ...]) -> Iterator[Rows]:
    from pyarrow.parquet import ParquetFile  # not at the top: 0.2 s

    try:
        with open_bytes(path) as file:
            table = ParquetFile(file)
            refuse_twins(path, table.schema_arrow.names, fields)
            columns = [name for name in table.schema_arrow.names if name in fields] or None
            number = 1
            for batch in table.iter_batches(BATCH, columns=columns):
                numbers = range(number, number + len(batch))
                yield Rows(values_of(batch), f"{path}, row", numbers)
                number += len(batch)
    except UserError:
        raise
    except Exception as error:  # pyarrow's own kinds
        raise UserError(f"{path} cannot be read as parquet: {error}") from None


def values_of(batch: Any) -> list[dict[str, Any]]:
    """`batch.to_pylist()` of a pyarrow.RecordBatch, but faster for strings."""
    from pyarrow import types

    is_text = [types.is_string(column.type) for column in batch.columns]
    columns = [
        column.to_numpy(zero_copy_only=False).tolist() if text else column.to_pylist()
        for column, text in zip(batch.columns, is_text)
    ]
    names = batch.schema.names
    return [dict(zip(names, values)) for values in zip(*columns)]


def refuse_twins(path: str, columns: list[str], fields: tuple[str, ...]) -> None:
    if twins := [name for name in fields if columns.count(name) > 1]:
        raise UserError(f"{path} has two columns {twins[0]!r}: rename or remove one")
