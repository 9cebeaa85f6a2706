"""Checksums, which reveal a changed bit when it is read.

The files of a finished folder are listed in its SHA256SUMS, which `sha256sum -c` also reads. A JSON
object in a file that is rewritten or grows ends with a seal: its own CRC-32. (The checksums of
shards, which are read in pieces, are in plaingpt/text/blocks.py.)
"""

import hashlib
import re
import zlib
from pathlib import Path

from configurator import UserError

SUMS = "SHA256SUMS"
SEAL = re.compile(rb', "crc32": "([0-9a-f]{8})"\}\s*\Z')


# --- SHA256SUMS


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex. Raises UserError for anything but a regular file."""
    if not path.is_file():
        raise UserError(f"{path} is not a file")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_sums(folder: Path, hashes: dict[str, str] | None = None) -> None:
    """Write a folder's SHA256SUMS from `hashes` by file name, or by hashing all of its files."""
    if hashes is None:
        hashes = {path.name: sha256_of(path) for path in sorted(folder.iterdir())}
    text = "".join(f"{digest}  {name}\n" for name, digest in hashes.items())
    (folder / SUMS).write_bytes(text.encode())


def check_sum(path: Path) -> None:
    """Raises UserError if a file does not match the SHA256SUMS beside it. Without that list, or if
    the list does not name the file, nothing is checked."""
    sums = path.with_name(SUMS)
    if not (sums.exists() and path.is_file()):
        return
    if not sums.is_file():
        raise UserError(f"{sums} is not a file")
    for line in sums.read_bytes().splitlines():
        digest, _, name = line.partition(b"  ")
        if name == path.name.encode() and digest != sha256_of(path).encode():
            raise UserError(
                f"{path} is damaged or was edited: it does not match {SUMS}. Restore it or, if the "
                f"change is intended, delete {sums}"
            )


# --- seals


def sealed(text: str) -> str:
    """The text of a non-empty JSON object, with a seal as its last field."""
    body = text.rstrip().removesuffix("}").rstrip()
    return f'{body}, "crc32": "{zlib.crc32(body.encode()):08x}"}}'


def check_seal(content: bytes) -> None:
    """Raises ValueError for a sealed object that has changed; one without a seal is not checked."""
    seal = SEAL.search(content)
    if seal and zlib.crc32(content[: seal.start()]) != int(seal[1], 16):
        raise ValueError('its checksum differs (after an intended edit, remove its field "crc32")')
