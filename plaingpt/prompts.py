"""Texts that are given to a command: one from the command line or a file, or a file of many."""

from pathlib import Path

import msgspec

from configurator import UserError
from plaingpt.files import parse_json, size_of

MAX_BYTES = 40_000_000  # of a file


class Line(msgspec.Struct, frozen=True):
    """A line of a .jsonl file."""

    prompt: str


def read_prompt(given: str, setting: str = "start") -> str:
    """The text that a setting gives, itself or as FILE:path. Raises UserError if it is not UTF-8,
    or its file cannot be read."""
    if given.startswith("FILE:"):
        name = given.removeprefix("FILE:")
        if not name:
            raise UserError(f"{setting}=FILE: lacks a file name: write --{setting}=FILE:prompt.txt")
        return read_text(Path(name).expanduser())
    try:
        given.encode()
    except UnicodeEncodeError:
        raise UserError(f"{setting} is not UTF-8") from None
    return given


def read_prompts(name: str) -> list[str]:
    """The prompts of a file, one per line: as {"prompt": "…"} if its name ends in .jsonl, otherwise
    as they are. Blank lines are skipped.

    Raises UserError for a line that is not a prompt, and for a file without any.
    """
    path = Path(name)
    numbered = enumerate(read_text(path).split("\n"), start=1)
    lines = [(number, line) for number, line in numbered if line.strip()]
    if not lines:
        raise UserError(f"there are no prompts in {path}")
    if path.suffix != ".jsonl":
        return [line for _, line in lines]
    where = f"{path}, line "
    return [parse_json(line.encode(), Line, f"{where}{number:,}").prompt for number, line in lines]


def read_text(path: Path) -> str:
    """Raises UserError for a file that is too long for prompts, or not UTF-8."""
    if size_of(path) > MAX_BYTES:
        raise UserError(f"{path} has over {MAX_BYTES:,} bytes: too many for prompts")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 (byte {error.start:,})") from None
