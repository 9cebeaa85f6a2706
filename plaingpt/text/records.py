"""Records of .jsonl, .json, .csv and .parquet files, read one at a time."""

import codecs
import csv
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from configurator import UserError
from plaingpt.text.text_files import (
    CONVERT,
    MAX_LINE,
    open_bytes,
    read_text,
    refuse_damaged,
    refuse_foreign,
    suffix,
    text_lines,
)

RECORD_SUFFIXES = {".jsonl", ".json", ".csv", ".parquet"}
BATCH = 500  # rows of parquet files and of the hub that are read at once


class Row(NamedTuple):
    """A record, or the `problem` that kept it from being read."""

    where: str  # for messages: file and line or row
    value: Any
    problem: str | None = None
    size: int = 0  # bytes on disk, where known


def rows(path: str, fields: tuple[str, ...]) -> Iterator[Row]:
    """The records of a file; of parquet files only the columns `fields`, if it has any of them.

    Raises UserError if the content does not match the suffix, and for a field with two columns.
    """
    with refuse_damaged(path):
        if suffix(path) == ".parquet":
            yield from parquet_rows(path, fields)
            return
        refuse_foreign(path)
        yield from csv_rows(path, fields) if suffix(path) == ".csv" else json_rows(path)


def line_rows(path: str) -> Iterator[Row]:
    with open_bytes(path) as file:
        lines = iter(lambda: file.readline(MAX_LINE + 1), b"")
        for number, line in enumerate(lines, 1):
            if len(line) > MAX_LINE:
                raise UserError(f"{path}, line {number} is longer than {MAX_LINE >> 20} MiB")
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            where, value, problem = f"{path}, line {number}", None, None
            try:
                value = json.loads(line.decode())
            except UnicodeDecodeError:
                problem = f"not UTF-8: {CONVERT}"
            except (ValueError, RecursionError):
                comma = line.rstrip().endswith(b",")  # in a list that lacks its brackets
                problem = "not JSON: a comma ends the line" if comma else "not JSON"
            yield Row(where, value, problem, len(line))


def json_rows(path: str) -> Iterator[Row]:
    """One array of records, which is held in memory, or a record per line."""
    with open_bytes(path) as file:
        start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
        if start.partition(b"\n")[0].strip() == b"{":
            raise UserError(
                f"{path} begins with a JSON object over several lines: expected an array of "
                "records, or one record per line"
            )
        if not start.startswith(b"["):
            yield from line_rows(path)
            return
    text = "".join(read_text(path))
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    for number, value in enumerate(values, 1):
        yield Row(f"{path}, record {number:,}", value)


def csv_rows(path: str, fields: tuple[str, ...]) -> Iterator[Row]:
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
            yield Row(f"{path}, line {lines.line_num:,}", None, f"not CSV ({error})")
            continue
        if not names:
            refuse_twins(path, values, fields)
            names = values
        elif values:
            same = len(values) == len(names)
            problem = None if same else "a different number of fields from the header"
            yield Row(f"{path}, line {lines.line_num:,}", dict(zip(names, values)), problem)


def parquet_rows(path: str, fields: tuple[str, ...]) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile  # not at the top: 0.2 s

    try:
        with open_bytes(path) as file:
            table = ParquetFile(file)
            refuse_twins(path, table.schema_arrow.names, fields)
            columns = [name for name in table.schema_arrow.names if name in fields] or None
            batches = table.iter_batches(BATCH, columns=columns)
            values = (value for batch in batches for value in batch.to_pylist())
            for number, value in enumerate(values, 1):
                yield Row(f"{path}, row {number:,}", value)
    except UserError:
        raise
    except Exception as error:  # pyarrow's own kinds
        raise UserError(f"{path} cannot be read as parquet: {error}") from None


def refuse_twins(path: str, columns: list[str], fields: tuple[str, ...]) -> None:
    if twins := [name for name in fields if columns.count(name) > 1]:
        raise UserError(f"{path} has two columns {twins[0]!r}: rename or remove one")
