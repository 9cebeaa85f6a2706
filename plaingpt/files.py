"""JSON, and files and folders that are written whole or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configurator import UserError

PARTIAL = ".partial_"  # prefix of a name while it is being written or removed


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write; once it is on disk, it replaces `path`.

    After an error `path` is as before, and the temporary file is gone.
    """
    partial = path.with_name(f"{PARTIAL}{path.name}")
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
    shutil.rmtree(doomed)


def remove_leftovers(folder: Path) -> None:
    """Delete what a killed process was writing or removing in `folder`."""
    for partial in folder.glob(f"{PARTIAL}*"):
        if partial.is_dir():
            shutil.rmtree(partial)
        else:
            partial.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write a file atomically. Raises ValueError for NaN and infinities, which JSON lacks."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    with atomic_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError if the file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it does not hold a JSON object")
    return content
