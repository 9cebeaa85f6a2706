"""
Shards of tokens: the one reader (`Split`) and the one writer (`ShardWriter`) of the format.

A shard is a header of 256 int32 (magic, version, token count, zeros), then its tokens as
little-endian uint16: the format of llm.c and modded-nanogpt. A `….mask.bin` beside it holds one
byte per token, 1 where the token counts in the loss. nanoGPT's headerless files are read as well.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from configurator import UserError
from plaingpt.checksums import sha256_of
from plaingpt.files import Count, open_regular, size_of
from plaingpt.text.blocks import BlockCheck, BlockSums, GrowingFile
from plaingpt.wording import quantity

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4


class ShardEntry(msgspec.Struct, frozen=True, omit_defaults=True):
    """A complete shard."""

    file: Annotated[str, msgspec.Meta(pattern=r"^(train|val)_\d{6,}\.bin$")]
    tokens: Count
    sha256: str
    mask_sha256: str | None = None
    crc32: BlockSums | None = None  # of the blocks of its tokens; None in older folders
    mask_crc32: BlockSums | None = None


class ShardsSoFar(msgspec.Struct, frozen=True):
    """Where a ShardWriter continues."""

    shards: tuple[ShardEntry, ...] = ()  # complete
    filled: Count = 0  # tokens in the open shard
    crc32: BlockSums = ""  # of its blocks so far
    mask_crc32: BlockSums = ""


# --- the format


def encode_header(tokens: int) -> bytes:
    header = np.zeros(HEADER_BYTES // 4, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header.tobytes()


def decode_header(path: Path) -> int | None:
    """The token count in a shard's header, or None for a headerless file.

    Raises UserError for a header that is cut off or of another version.
    """
    with open_regular(path) as file:
        content = file.read(HEADER_BYTES)
    header = np.frombuffer(content[: len(content) // 4 * 4], dtype="<i4")
    if len(header) == 0 or header[0] != MAGIC:
        return None
    if len(content) < HEADER_BYTES or header[1] != VERSION:
        raise UserError(f"{path} has a shard's magic, but not a header of version {VERSION}")
    return int(header[2])


def mask_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}.mask.bin")


def shard_paths(folder: Path, name: str) -> list[Path]:
    """`train_000000.bin`, nanoGPT's `train.bin` or llm.c's `…_train_000000.bin`, in order."""
    pattern = re.compile(rf"(.*_)?{name}(_\d+)?\.bin")
    return sorted(path for path in folder.glob("*.bin") if pattern.fullmatch(path.name))


# --- reading


class Split:
    """The tokens of one split, "train" or "val", over all of its shards, memory-mapped.

    Opening reads nothing but headers. `split[a:b]` gives tokens as int64; `split.mask(a, b)` gives
    their loss mask, or None for a split without masks.
    """

    def __init__(
        self,
        name: str,
        paths: list[Path],
        vocab_size: int,
        entries: Sequence[ShardEntry] = (),
    ) -> None:
        """`entries` are the manifest's shards; what is read is compared with their checksums.

        Raises UserError for shards and masks of the wrong length.
        """
        self.name, self.paths, self.vocab_size = name, paths, vocab_size
        self.shards = [open_shard(path) for path in paths]
        masks = [mask_path(path) for path in paths]
        self.masks = [
            open_mask(mask, len(shard)) if mask.exists() else None
            for mask, shard in zip(masks, self.shards)
        ]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])
        self.checks: dict[Path, BlockCheck] = {}
        for path, shard, mask, entry in zip(paths, self.shards, self.masks, entries):
            if entry.crc32 is not None:
                self.checks[path] = BlockCheck(path, HEADER_BYTES, shard, entry.crc32)
            if mask is not None and entry.mask_crc32 is not None:
                file = mask_path(path)
                self.checks[file] = BlockCheck(file, 0, mask, entry.mask_crc32)

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def has_mask(self) -> bool:
        """Whether some token may not count in the loss."""
        return any(mask is not None for mask in self.masks)

    def __getitem__(self, window: slice) -> np.ndarray:
        return self.tokens(window.start, window.stop).astype(np.int64)

    def mask(self, start: int, stop: int) -> np.ndarray | None:
        """Loss mask of tokens start … stop - 1, float 0 or 1; None for a split without masks."""
        flags = self.flags(start, stop)
        return None if flags is None else flags.astype(np.float32)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens start … stop - 1 as stored, uint16. Raises UserError for an id out of range and
        for tokens that have changed."""
        parts = list(self._parts(start, stop))
        for i, a, b in parts:
            if check := self.checks.get(self.paths[i]):
                check(2 * a, 2 * b)
        tokens = np.concatenate([self.shards[i][a:b] for i, a, b in parts])
        if tokens.max(initial=0) >= self.vocab_size:
            for part in parts:
                self._check_ids(*part)
        return tokens

    def flags(self, start: int, stop: int) -> np.ndarray | None:
        """`mask` as stored, uint8. Raises UserError for one that has changed."""
        if not self.has_mask:
            return None
        parts = []
        for i, a, b in self._parts(start, stop):
            mask = self.masks[i]
            if check := self.checks.get(mask_path(self.paths[i])):
                check(a, b)
            parts.append(np.ones(b - a, np.uint8) if mask is None else mask[a:b])
        return np.concatenate(parts)

    def check_ids(self) -> None:
        """Read every token. Raises UserError for an id out of range."""
        for number, shard in enumerate(self.shards):
            self._check_ids(number, 0, len(shard))

    def _check_ids(self, number: int, start: int, stop: int) -> None:
        ids = self.shards[number][start:stop]
        if ids.max(initial=0) >= self.vocab_size:
            first = int(np.argmax(ids >= self.vocab_size))
            raise UserError(
                f"{self.paths[number]}: id {int(ids[first])} at token {start + first} is beyond "
                f"the vocabulary of {self.vocab_size}; the shard is damaged or belongs to another "
                "tokenizer"
            )

    def _parts(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, from, to) that together are tokens start … stop - 1."""
        assert 0 <= start <= stop <= len(self)
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            offset, end = int(self.starts[shard]), min(stop, int(self.starts[shard + 1]))
            yield shard, start - offset, end - offset
            start, shard = end, shard + 1


def open_shard(path: Path) -> np.ndarray:
    """Map the tokens of a shard. Raises UserError if its length contradicts its header."""
    size, tokens = size_of(path), decode_header(path)
    if tokens is None:
        if size == 0 or size % 2:
            raise UserError(
                f"{path} has {quantity(size, 'byte')}, which is not a whole number of uint16 ids"
            )
        return np.memmap(path, dtype="<u2", mode="r")
    if size != HEADER_BYTES + 2 * tokens:
        raise UserError(
            f"{path} has {quantity(size, 'byte')}, but its header promises "
            f"{quantity(tokens, 'token')} = {quantity(HEADER_BYTES + 2 * tokens, 'byte')}: "
            "it was cut off or overwritten"
        )
    if tokens == 0:
        return np.empty(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


def open_mask(path: Path, tokens: int) -> np.ndarray:
    if (size := size_of(path)) != tokens:
        shard = path.name.replace(".mask.bin", ".bin")
        found, wanted = quantity(size, "byte"), quantity(tokens, "token")
        raise UserError(f"{path} has {found} for the {wanted} of {shard}")
    return np.memmap(path, dtype=np.uint8, mode="r") if tokens else np.empty(0, np.uint8)


# --- writing


class ShardWriter:
    """Appends tokens to `{name}_000000.bin`, `…_000001.bin`, …, `shard_tokens` in each.

    Given a `state` that `sync` once returned, it continues from there: whatever was written after
    that is cut off.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        shard_tokens: int,
        masked: bool = False,
        state: ShardsSoFar | None = None,
    ) -> None:
        """Raises UserError if files are shorter than `state` says, or have changed."""
        assert shard_tokens < 2**31
        self.folder, self.name, self.shard_tokens, self.masked = folder, name, shard_tokens, masked
        state = state or ShardsSoFar()
        if state.filled >= shard_tokens:
            filled = quantity(state.filled, "token")
            raise UserError(
                f"{folder}: the open shard already holds {filled}: remove the folder to start over"
            )
        self.shards, self.filled = state.shards, state.filled
        self._file: GrowingFile | None = None
        self._mask_file: GrowingFile | None = None
        kept = {shard.file for shard in self.shards}
        for path in folder.glob(f"{name}_*.bin"):
            if path.name.replace(".mask.bin", ".bin") not in kept | {self._path.name}:
                path.unlink()
        if self.filled:
            self._open(state)

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.name}_{len(self.shards):06d}.bin"

    def _open(self, state: ShardsSoFar) -> None:
        size, path = state.filled, self._path
        self._file = GrowingFile(path, HEADER_BYTES, 2 * size, state.crc32)
        if self.masked:
            self._mask_file = GrowingFile(mask_path(path), 0, size, state.mask_crc32)

    def write(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append uint16 tokens and, for a `masked` writer, their uint8 mask."""
        assert tokens.dtype == np.uint16 and self.masked == (mask is not None)
        while len(tokens):
            if self._file is None:
                self._open(ShardsSoFar())
            assert self._file
            room = self.shard_tokens - self.filled
            part, tokens = tokens[:room], tokens[room:]
            self._file.write(part.astype("<u2", copy=False).view(np.uint8).data)
            if mask is not None and self._mask_file:
                self._mask_file.write(mask[:room].data)
                mask = mask[room:]
            self.filled += len(part)
            if self.filled == self.shard_tokens:
                self._finish()

    def sync(self) -> ShardsSoFar:
        """Flush everything to disk; return the state from which a later writer continues."""
        sums = []
        for file in (self._file, self._mask_file):
            if file:
                file.sync()
            sums.append(file.sums if file else "")
        return ShardsSoFar(self.shards, self.filled, *sums)

    def close(self) -> tuple[ShardEntry, ...]:
        """Finish the last shard; return the manifest's entries of all shards."""
        if self.filled:
            self._finish()
        return self.shards

    def _finish(self) -> None:
        assert self._file
        path, mask = self._path, mask_path(self._path)
        self._file.close(encode_header(self.filled))
        entry = ShardEntry(path.name, self.filled, sha256_of(path), crc32=self._file.sums)
        if self._mask_file:
            self._mask_file.close()
            about = {"mask_sha256": sha256_of(mask), "mask_crc32": self._mask_file.sums}
            entry = msgspec.structs.replace(entry, **about)
        self._file = self._mask_file = None
        self.shards, self.filled = (*self.shards, entry), 0
