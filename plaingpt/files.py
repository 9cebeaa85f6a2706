"""JSON and folders that are written whole or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors

from configurator import UserError

PARTIAL = ".partial_"  # prefix of a folder still being written, or already being removed


@contextlib.contextmanager
def whole_or_not_at_all(folder: Path) -> Iterator[Path]:
    """A folder to write into that gets the name `folder` in the end, once the disk has all of it.

    Raises OSError where the disk does not take it, and leaves nothing.
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
        if isinstance(error, (safetensors.SafetensorError, RuntimeError, OSError)):
            raise OSError(f"could not write {folder}: {error}") from error
        raise
    flush(folder.parent)


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all, and on the disk."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    flush(new)
    new.replace(path)


def flush(path: Path) -> None:
    """Have the disk hold what was written to a file or folder (folders: POSIX only)."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(folder: Path) -> None:
    """Delete a checkpoint so that no moment shows half of one under its final name."""
    doomed = folder.with_name(f"{PARTIAL}old_{folder.name}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def remove_leftovers(out_dir: Path) -> None:
    for partial in out_dir.glob(f"{PARTIAL}*"):
        shutil.rmtree(partial)


def read_json(path: Path) -> dict[str, Any]:
    """Raises UserError where a checkpoint's JSON file is missing or damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is no checkpoint: it has no {path.name}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no object")
    return content
