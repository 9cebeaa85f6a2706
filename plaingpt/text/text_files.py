"""Text files of any size, read in pieces that encode to the same ids as the whole text."""

import codecs
import re
import tokenize
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from configurator import UserError

TEXT_SUFFIXES = {".txt", ".py"}
COMPRESSED = {".gz", ".bz2", ".xz", ".zst", ".lz4"}
BLOCK = 1 << 20  # bytes per read, and roughly the size of a piece
# Where a text may be cut without changing its ids: GPT-2's pattern ends a token before ASCII
# white space that follows something else, and between a letter or digit and ASCII punctuation.
BOUNDARY = re.compile(r"(?<=\S)(?=[ \t\r\n])|(?<=[^\W_])(?=[!-/:-@\[-`{-~])")


@dataclass(frozen=True)
class TextFile:
    """A document: a whole file, or its characters from `start` to `stop`."""

    path: str
    size: int  # bytes on disk
    start: int = 0
    stop: int | None = None

    def pieces(self) -> Iterator[str]:
        """The text in pieces of about BLOCK characters, whose ids join to those of the whole.

        Raises UserError for bytes that are not UTF-8 (in a .py file: not what it declares).
        """
        return in_pieces(clipped(read_text(self.path), self.start, self.stop))


def suffix(path: str) -> str:
    """`.jsonl` of `talks.jsonl.gz`."""
    name = Path(path)
    return (name.with_suffix("") if name.suffix in COMPRESSED else name).suffix.lower()


def is_text(path: str) -> bool:
    return suffix(path) in TEXT_SUFFIXES


# --- reading


def open_bytes(path: str) -> IO[bytes]:
    if Path(path).suffix not in COMPRESSED:
        return open(path, "rb")
    import fsspec  # not at the top: only compressed files need it

    try:
        return fsspec.open(path, "rb", compression="infer").open()
    except ValueError as error:  # fsspec knows the codec by name, but its package is missing
        raise UserError(f"{path}: {error}") from None


@contextmanager
def refuse_damaged(path: str) -> Iterator[None]:
    """Turn whatever a decompressor raises into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # OSError, EOFError, zlib.error, lzma.LZMAError, ZstdError, …
        if Path(path).suffix not in COMPRESSED:
            raise
        raise UserError(f"{path} is damaged: {error}") from None


def read_text(path: str) -> Iterator[str]:
    """Blocks of a file's text. Raises UserError for bytes that are not UTF-8."""
    if path.endswith(".py"):
        try:
            with tokenize.open(path) as file:
                yield file.read()
        except (UnicodeDecodeError, SyntaxError) as error:  # a wrong or unknown declaration
            raise UserError(f"{path}: {error}") from None
        return
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    done = 0
    with refuse_damaged(path), open_bytes(path) as file:
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


def text_lines(path: str) -> Iterator[str]:
    rest = ""
    for block in read_text(path):
        *lines, rest = (rest + block).split("\n")
        yield from (line + "\n" for line in lines)
    if rest:
        yield rest


def clipped(blocks: Iterator[str], start: int, stop: int | None) -> Iterator[str]:
    """Characters `start` … `stop` - 1 of a text that comes in blocks."""
    at = 0
    for block in blocks:
        if stop is not None and at >= stop:
            return
        yield block[max(0, start - at) : None if stop is None else stop - at]
        at += len(block)


# --- cutting


def in_pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Regroup a text that comes in blocks, as `TextFile.pieces` promises."""
    rest = ""
    for block in blocks:
        rest += block
        if len(rest) >= BLOCK and (cut := last_boundary(rest)):
            yield rest[:cut]
            rest = rest[cut:]
    yield rest


def last_boundary(text: str) -> int:
    """The last place where BOUNDARY allows a cut, or 0."""
    for tail in (1 << 12, 2 * BLOCK + 2):  # anything before was searched when it was the end
        first = max(1, len(text) - tail)
        places = [match.start() for match in BOUNDARY.finditer(text, first)]
        if places:
            return places[-1]
    return 0
