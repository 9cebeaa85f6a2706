"""JSON as typed records, and files and folders that are written whole or not at all."""

import contextlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

import msgspec

from configurator import UserError
from plaingpt.checksums import check_seal, check_sum, sealed

PARTIAL = ".partial_"  # prefix of a name while it is being written or removed


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; once it is on disk, it replaces `path`.

    After an error `path` is as before, and the temporary file is gone.
    """
    partial = path.with_name(f"{PARTIAL}{path.name}")
    partial.unlink(missing_ok=True)  # never written through, be it a link or a pipe
    try:
        yield partial
        flush(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder to write into; once it is on disk, it is renamed to `folder`.

    After an error the temporary folder is gone. Raises OSError if the disk refuses the files.
    """
    partial = folder.with_name(f"{PARTIAL}{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in [*partial.iterdir(), partial]:
            flush(path)
        partial.rename(folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(f"could not write {folder}: {error}") from error
        raise
    flush(folder.parent)


def flush(path: Path) -> None:
    """Force a file, or on POSIX the entries of a folder, to disk."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_folder(folder: Path) -> None:
    """Rename a folder, then delete it, so that its own name never stands for a part of it."""
    doomed = folder.with_name(f"{PARTIAL}old_{folder.name}")
    folder.rename(doomed)
    remove(doomed)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process was writing or removing in `folder`."""
    for partial in folder.glob(f"{PARTIAL}*"):
        remove(partial)


def remove(path: Path) -> None:
    """Delete a file, a folder, or a link but not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


# --- reading

MAX_BYTES = 128 << 20  # of a file that is read whole: far above the largest tokenizer.json


def size_of(path: Path) -> int:
    """The size of a file in bytes. Raises UserError if it is missing, or is a folder, a pipe or a
    device, which might never end."""
    try:
        found = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}") from None
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        raise UserError(f"{path} is {kind}: expected a file")
    return found.st_size


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading. Raises UserError as `size_of`."""
    size_of(path)
    return path.open("rb")


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises UserError as `size_of` and `check_sum` do, and if it is larger
    than MAX_BYTES."""
    if size_of(path) > MAX_BYTES:
        raise UserError(f"{path} is larger than {MAX_BYTES >> 20} MiB: not read")
    check_sum(path)
    with path.open("rb") as file:
        return file.read(MAX_BYTES)


# --- JSON

Record = TypeVar("Record")
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
Setting = bool | int | float | str | tuple[str, ...] | None
Settings = dict[str, Setting]
WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
}


def write_json(path: Path, value: Any, seal: bool = False) -> None:
    """Write a record atomically, with a `seal` if later runs rewrite the file.

    Raises ValueError for NaN and infinities, which JSON lacks.
    """
    text = json.dumps(value, indent=1, allow_nan=False, default=msgspec.to_builtins)
    text = f"{sealed(text) if seal else text}\n"
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: Path, kind: type[Record], advice: str = "") -> Record:
    """The content of a JSON file as a record of type `kind`, usually a msgspec.Struct.

    Raises UserError as `read_bytes` does, and one that ends with `advice` if the file is not JSON
    or not such a record.
    """
    return parse_json(read_bytes(path), kind, str(path), advice)


def parse_json(content: bytes, kind: type[Record], where: str, advice: str = "") -> Record:
    """`read_json` for bytes, which messages call `where`."""
    # msgspec's own parser would reject file names that are not UTF-8, which Python represents with
    # halves of surrogate pairs.
    try:
        check_seal(content)
        text = content.decode()
        value = json.loads(text, parse_float=finite_number, parse_constant=finite_number)
    except (ValueError, RecursionError) as error:
        problem = f"{where} is damaged: {str(error)[:150]}"
        raise UserError(f"{problem}; {advice}" if advice else problem) from None
    return as_record(value, kind, where, advice)


def as_record(value: Any, kind: type[Record], where: str, advice: str = "") -> Record:
    """`read_json` for JSON that is already parsed."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, UnicodeEncodeError) as error:
        problem = f"{where}: {reworded(str(error)[:200])}"
        raise UserError(f"{problem}; {advice}" if advice else problem) from None


def finite_number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:20]} is not a finite number")
    return number


def reworded(problem: str) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.a.b[0]`" as "a.b[0]: expected a whole number,
    got a string"."""
    what, _, place = problem.partition(" - at ")
    what = what.replace("Object missing required field", "missing field")
    what = what.replace(r"matching regex '\\S'", "that is not blank")
    what = re.sub(r"`([\w |]+)`", lambda found: in_words(found[1]), what)
    field = place.rpartition("`$")[2].strip("`.").replace("[...]", "[…]")
    return f"{field}: {what[0].lower()}{what[1:]}" if field else what[0].lower() + what[1:]


def in_words(kinds: str) -> str:
    return " or ".join(WORDS.get(kind, kind) for kind in kinds.split(" | "))
