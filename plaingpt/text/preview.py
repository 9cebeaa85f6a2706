"""
A first look at each source: if nothing in it can become text, say why before anything is written,
with the settings that help.
"""

import re
import shlex
from typing import Any

from configurator import UserError
from plaingpt.text.documents import Reading, Stream
from plaingpt.text.records import Row
from plaingpt.text.sources import Position
from plaingpt.text.templates import FIELDS, fits, segments
from plaingpt.text.text_files import TextFile
from plaingpt.wording import shorten

LOOK = 1000  # bad records to skip in search of a good one


def check_source(stream: Stream, reading: Reading) -> None:
    """Read a source as far as its first document.

    Raises UserError if the first LOOK records hold none, or if the first record is bad and bad
    records are refused.
    """
    source, problem, count, kind = stream.source, "", 0, "has no records"
    for item, _ in source.items(Position(), reading.fields):
        if isinstance(item, TextFile):
            if any(block.strip() for block in item.blocks()):
                return
            kind = "is all white space"
            continue
        if not (reason := what_is_wrong(item, reading)):
            return
        count += 1
        if count == 1:
            problem = f"{item.where}: {reason}"
            template, text_field = reading.template, reading.text_field
            if isinstance(item.value, dict) and not fits(template, item.value, text_field):
                problem += remedy(item.value)
            elif reading.bad_records == "refuse":
                problem += " (--bad_records=skip leaves such records out)"
        if reading.bad_records == "refuse":
            raise UserError(problem)
        if count == LOOK:
            break
    if problem:
        raise UserError(f"{source.name!r} has no good record among its first {count:,}; {problem}")
    if source.hub or source.files:
        raise UserError(f"there is no text in source {source.name!r}: it {kind}")


def what_is_wrong(row: Row, reading: Reading) -> str | None:
    """Why a record cannot become a document, or None."""
    if row.problem:
        return row.problem
    try:
        segments(row.value, reading.template, reading.text_field)
    except UserError as error:
        return str(error)
    return None


def remedy(record: dict[str, Any]) -> str:
    """The fields of a record, and how to make text of them."""
    names = ", ".join(map(repr, record)) or "none"
    said = f" (its fields: {shorten(names, 200)})"
    texts = [name for name, value in record.items() if isinstance(value, str)]
    texts = ["text"] if "text" in texts else texts
    if len(record) == 1 and (found := re.search(r"[;\t|]", next(iter(record)))):
        return f"{said}; its separator seems to be {found[0]!r}, but only commas are read as one"
    if fitting := [f"--template={name}" for name in FIELDS if fits(name, record)]:
        settings = fitting[:1]
    elif len(texts) == 1:
        settings = ["--template=text", f"--text_field={texts[0]}"]
    elif texts:
        return (
            f"{said}; choose one with --text_field, or rename question and answer to instruction "
            "and output and use --template=alpaca"
        )
    else:
        return said
    return f"{said}; use {shlex.join(settings)}"
