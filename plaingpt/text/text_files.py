"""Text files of any size, read in pieces that encode to the same ids as the whole text."""

import codecs
import importlib
import sys
import tokenize
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from configurator import UserError
from plaingpt.text import cutting

TEXT_SUFFIXES = {".txt", ".md", ".rst", ".tex"}
TEXT_SUFFIXES |= {".py", ".c", ".h", ".cpp", ".java", ".js", ".ts", ".go", ".rs", ".sh"}
CONVERT = "convert it, for example with iconv -f windows-1252 -t utf-8"
MAX_LINE = 1 << 28  # of a file of records: a line is held in memory
COMPRESSED = {  # suffix → module; not zstandard, to which a file that was cut off looks whole
    ".gz": "gzip",
    ".bz2": "bz2",
    ".xz": "lzma",
    ".zst": "compression.zstd" if sys.version_info >= (3, 14) else "backports.zstd",
    ".lz4": "lz4.frame",
}
NOT_TEXT = {  # what files begin with that are not text, whatever their names say
    b"%PDF-": "a PDF: extract its text, for example with pdftotext",
    b"PK\x03\x04": "a zip archive or an Office document: save it as plain text",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
    b"\x1f\x8b": "compressed: its name must end with .gz",
    b"\x28\xb5\x2f\xfd": "compressed: its name must end with .zst",
    b"\xfd7zXZ": "compressed: its name must end with .xz",
    b"PAR1": "a parquet file: its name must end with .parquet",
}


@dataclass(frozen=True)
class TextFile:
    """A document: a whole file, or its characters from `start` to `stop`. Or a file of records; of
    one with a record per line also a part: the lines that begin in its bytes from `start` on."""

    path: str
    size: int  # bytes on disk
    start: int = 0
    stop: int | None = None

    def pieces(self) -> Iterator[str]:
        """The text in pieces of about BLOCK characters; joined, their ids are those of the whole.

        Raises UserError as `blocks`.
        """
        return cutting.in_pieces(self.blocks())

    def blocks(self) -> Iterator[str]:
        """The text as it is read, cut anywhere. Raises UserError for a file that is not UTF-8 (a
        .py file: not in the encoding that it declares)."""
        return clipped(read_text(self.path), self.start, self.stop)


def suffix(path: str) -> str:
    """`.jsonl` of `talks.jsonl.gz`."""
    name = Path(path)
    return (name.with_suffix("") if codec_of(path) else name).suffix.lower()


def is_text(path: str) -> bool:
    return suffix(path) in TEXT_SUFFIXES


# --- reading


def codec_of(path: str) -> str | None:
    """The module that reads a compressed file."""
    return COMPRESSED.get(Path(path).suffix.lower())


def open_bytes(path: str) -> IO[bytes]:
    if not (codec := codec_of(path)):
        return open(path, "rb")
    try:
        module = importlib.import_module(codec)
    except ImportError:
        package = codec.removesuffix(".frame")
        raise UserError(f"reading {path} needs a package: pip install {package}") from None
    return module.open(path, "rb")


@contextmanager
def refuse_damaged(path: str) -> Iterator[None]:
    """Turn whatever a decompressor raises into a UserError that names the file."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # OSError, EOFError, zlib.error, lzma.LZMAError, ZstdError, …
        is_disk_or_memory = isinstance(error, MemoryError) or getattr(error, "errno", None)
        if is_disk_or_memory or not codec_of(path):
            raise
        raise UserError(f"{path} is damaged, or not compressed as its name says: {error}") from None


def refuse_foreign(path: str) -> None:
    """Raises UserError if a file begins like something other than text in UTF-8."""
    with refuse_damaged(path), open_bytes(path) as file:
        head = file.read(512)
    for beginning, kind in NOT_TEXT.items():
        if head.startswith(beginning):
            raise UserError(f"{path} is not text, but {kind}")
    even, odd = head[::2].count(0), head[1::2].count(0)
    by_turns = max(even, odd) > 2 + len(head) / 4 > min(even, odd)  # a NUL in each ASCII character
    wide = head.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff"))
    if wide or by_turns or head.startswith((b"\xff\xfe", b"\xfe\xff")):
        bits = 32 if wide else 16
        raise UserError(
            f"{path} is not UTF-8, but UTF-{bits}: convert it, for example with "
            f"iconv -f utf-{bits} -t utf-8"
        )


def read_text(path: str) -> Iterator[str]:
    """Blocks of a file's text. Raises UserError for bytes that are not UTF-8."""
    if path.endswith(".py"):
        try:
            with tokenize.open(path) as file:
                yield file.read()
        except (UnicodeDecodeError, SyntaxError) as error:  # a wrong or unknown declaration
            raise UserError(f"{path}: {error}") from None
        return
    refuse_foreign(path)
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    done = 0
    with refuse_damaged(path), open_bytes(path) as file:
        while True:
            block = file.read(cutting.BLOCK)
            before = len(decoder.getstate()[0])
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                advice = "it seems to be a binary file" if b"\0" in error.object else CONVERT
                raise UserError(
                    f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at "
                    f"{done - before + error.start:,}; {advice}"
                ) from None
            done += len(block)
            if text:
                yield text
            if not block:
                return


def text_lines(path: str) -> Iterator[str]:
    """Raises UserError as `read_text`, and for a line of more than MAX_LINE characters."""
    begun: list[str] = []  # of the next line
    for block in read_text(path):
        *lines, rest = block.split("\n")
        for line in lines:
            yield "".join([*begun, line, "\n"])
            begun = []
        begun.append(rest)
        if sum(map(len, begun)) > MAX_LINE:
            raise UserError(f"{path} has a line longer than {MAX_LINE >> 20} MiB")
    if rest := "".join(begun):
        yield rest


def clipped(blocks: Iterator[str], start: int, stop: int | None) -> Iterator[str]:
    """Characters `start` … `stop` - 1 of a text that comes in blocks."""
    at = 0
    for block in blocks:
        if stop is not None and at >= stop:
            return
        yield block[max(0, start - at) : None if stop is None else stop - at]
        at += len(block)
