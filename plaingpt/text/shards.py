"""Shards of tokens: one reader and one writer of the format."""

import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from configurator import UserError

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4


PARTIAL = ".partial"  # where prepare.py builds the files of a folder


class Split:
    """The tokens of one split, "train" or "val", over all of its shards, memory-mapped.

    `split[a:b]` gives tokens as int64; `split.mask(a, b)` their loss mask, or None without one.
    """

    def __init__(self, data_dir: Path | str, name: str, vocab_size: int) -> None:
        """Raises UserError for missing or truncated shards, and for ids from vocab_size on."""
        self.name, self.folder = name, Path(data_dir)
        folder = self.folder
        manifest = read_manifest(folder)
        paths = shard_paths(folder, name)
        if manifest:
            entries = manifest.get("splits", {}).get(name, {}).get("shards", [])
            for entry in entries:
                if folder / entry["file"] not in paths:
                    missing = f"{entry['file']}, which is missing"
                    raise UserError(f"{folder}/dataset.json lists {missing}")
                mask = mask_path(folder / entry["file"])
                if "mask_sha256" in entry and not mask.exists():
                    raise UserError(f"{mask} is missing: without it all would count in the loss")
            paths = [folder / entry["file"] for entry in entries]
        if not paths:
            raise UserError(f"{folder} has no {name} shards ({name}_000000.bin, …)")
        self.shards = [open_shard(path) for path in paths]
        for path, shard in zip(paths, self.shards):
            largest = int(shard.max(initial=0))
            if largest >= vocab_size:
                where = int(np.argmax(shard >= vocab_size))
                raise UserError(
                    f"{path}: id {int(shard[where])} at token {where} is beyond the vocabulary "
                    f"of {vocab_size}; the shard is damaged or of another tokenizer"
                )
        masks = [mask_path(path) for path in paths]
        self.masks = [
            open_mask(mask, len(shard)) if mask.exists() else None
            for mask, shard in zip(masks, self.shards)
        ]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def has_mask(self) -> bool:
        """Whether some token may not count in the loss."""
        return any(mask is not None for mask in self.masks)

    def __getitem__(self, window: slice) -> np.ndarray:
        pieces = [self.shards[i][a:b] for i, a, b in self._pieces(window.start, window.stop)]
        return np.concatenate(pieces).astype(np.int64)

    def mask(self, start: int, stop: int) -> np.ndarray | None:
        """Float 0/1 of tokens start … stop - 1, or None if no shard of the split has a mask."""
        if not self.has_mask:
            return None
        pieces = []
        for i, a, b in self._pieces(start, stop):
            mask = self.masks[i]
            pieces.append(np.ones(b - a) if mask is None else mask[a:b])
        return np.concatenate(pieces).astype(np.float32)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, from, to) that together are tokens start … stop - 1."""
        assert 0 <= start <= stop <= len(self)
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            offset, end = int(self.starts[shard]), min(stop, int(self.starts[shard + 1]))
            yield shard, start - offset, end - offset
            start, shard = end, shard + 1


def mask_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}.mask.bin")


def shard_paths(folder: Path, name: str) -> list[Path]:
    """`train_000000.bin`, nanoGPT's `train.bin` or llm.c's `…_train_000000.bin`, in order."""
    pattern = re.compile(rf"(.*_)?{name}(_\d+)?\.bin")
    return sorted(path for path in folder.glob("*.bin") if pattern.fullmatch(path.name))


def open_shard(path: Path) -> np.ndarray:
    """Map the tokens of a shard, ours or nanoGPT's headerless one.

    Raises UserError where the length is not what the header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES)[: size // 4 * 4], dtype="<i4")
    if len(header) == 0 or header[0] != MAGIC:
        if size == 0 or size % 2:
            raise UserError(f"{path} has {size} bytes, which is not a whole number of uint16 ids")
        return np.memmap(path, dtype="<u2", mode="r")
    if len(header) < 256 or header[1] != VERSION:
        raise UserError(f"{path} has a shard's magic, but not a header of version {VERSION}")
    tokens = int(header[2])
    if size != HEADER_BYTES + 2 * tokens:
        raise UserError(
            f"{path} has {size:,} bytes, but its header promises {tokens:,} tokens = "
            f"{HEADER_BYTES + 2 * tokens:,} bytes: it was cut off or overwritten"
        )
    if tokens == 0:
        return np.empty(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


def open_mask(path: Path, tokens: int) -> np.ndarray:
    if path.stat().st_size != tokens:
        raise UserError(f"{path} has {path.stat().st_size:,} bytes for {tokens:,} tokens")
    return np.memmap(path, dtype=np.uint8, mode="r") if tokens else np.empty(0, np.uint8)


BUFFER = 1 << 20  # bytes between two writes of a file


class ShardWriter:
    """Appends tokens to `{name}_000000.bin`, `…_000001.bin`, …, `shard_tokens` in each.

    With `state`, what `sync` returned once, it goes on from there, whatever was written since.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        shard_tokens: int,
        masked: bool = False,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Raises UserError where files lack what `state` says they hold."""
        assert shard_tokens < 2**31
        self.folder, self.name, self.shard_tokens, self.masked = folder, name, shard_tokens, masked
        state = state or {"shards": [], "filled": 0}
        self.shards: list[dict[str, Any]] = list(state["shards"])
        self.filled: int = state["filled"]  # tokens in the shard that is open
        self._file: IO[bytes] | None = None
        self._mask_file: IO[bytes] | None = None
        kept = {shard["file"] for shard in self.shards}
        for path in folder.glob(f"{name}_*.bin"):
            if path.name.replace(".mask.bin", ".bin") not in kept | {self._path.name}:
                path.unlink()
        if self.filled:
            self._file = reopen(self._path, HEADER_BYTES + 2 * self.filled)
            if masked:
                self._mask_file = reopen(mask_path(self._path), self.filled)

    @property
    def _path(self) -> Path:
        return self.folder / f"{self.name}_{len(self.shards):06d}.bin"

    def write(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Append uint16 tokens, and where the writer is `masked` their mask, uint8."""
        assert tokens.dtype == np.uint16 and self.masked == (mask is not None)
        while len(tokens):
            if self._file is None:
                self._file = self._path.open("wb", buffering=BUFFER)
                self._file.write(shard_header(0).data)
                self._mask_file = mask_path(self._path).open("wb") if self.masked else None
            room = self.shard_tokens - self.filled
            part, tokens = tokens[:room], tokens[room:]
            self._file.write(part.astype("<u2", copy=False).data)
            if mask is not None and self._mask_file:
                self._mask_file.write(mask[:room].data)
                mask = mask[room:]
            self.filled += len(part)
            if self.filled == self.shard_tokens:
                self._finish()

    def sync(self) -> dict[str, Any]:
        """Flush everything to the disk; return what a later writer needs to go on."""
        for file in (self._file, self._mask_file):
            if file:
                file.flush()
                os.fsync(file.fileno())
        return {"shards": self.shards, "filled": self.filled}

    def close(self) -> list[dict[str, Any]]:
        """Finish the last shard; return the entries of all for the manifest."""
        if self.filled:
            self._finish()
        return self.shards

    def _finish(self) -> None:
        assert self._file
        path, entry = self._path, {"file": self._path.name, "tokens": self.filled}
        self._file.seek(0)
        self._file.write(shard_header(self.filled).data)
        self.sync()
        self._file.close()
        entry["sha256"] = sha256_of(path)
        if self._mask_file:
            self._mask_file.close()
            entry["mask_sha256"] = sha256_of(mask_path(path))
        self._file = self._mask_file = None
        self.shards, self.filled = [*self.shards, entry], 0


def shard_header(tokens: int) -> np.ndarray:
    header = np.zeros(256, dtype="<i4")
    header[:3] = MAGIC, VERSION, tokens
    return header


def reopen(path: Path, size: int) -> IO[bytes]:
    """A file to append to behind its first `size` bytes; what follows them is cut off."""
    file = path.open("r+b", buffering=BUFFER)
    if file.seek(0, os.SEEK_END) < size:
        raise UserError(f"{path} has lost its end: remove {path.parent} to start over")
    file.truncate(size)
    file.seek(size)
    return file


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def read_manifest(data_dir: Path | str) -> dict[str, Any]:
    """`dataset.json` of a folder, or {} for a folder of someone else's shards.

    Raises UserError where the folder is missing or the manifest is not JSON.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise UserError(f"there is no data in {folder}; prepare.py --data_dir={folder} makes it")
    try:
        manifest = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / PARTIAL).exists():
            raise UserError(
                f"{folder} is half prepared: run its prepare.py command again"
            ) from None
        return {}
    except ValueError as error:
        raise UserError(f"{folder}/dataset.json is damaged: {error}") from None
    if not isinstance(manifest, dict):
        raise UserError(f"{folder}/dataset.json is damaged: it holds no object")
    return manifest
