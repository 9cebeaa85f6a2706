"""A data folder: its manifest (dataset.json), its tokenizer and its splits."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import msgspec

from configurator import UserError
from plaingpt import files
from plaingpt.files import Count, Settings
from plaingpt.text.recipe import command_for
from plaingpt.text.shards import ShardEntry, Split, mask_path, shard_paths
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.wording import quantity

MANIFEST = "dataset.json"
PARTIAL = ".partial"  # folder in which prepare.py builds the files of a data folder
SplitName = Literal["train", "val"]


class SplitEntry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    documents: Count
    bytes: Count  # of text
    tokens: Count
    trained_on: Count = 0  # documents left out because they are trained on
    shards: tuple[ShardEntry, ...]

    def __post_init__(self) -> None:
        if self.tokens != sum(shard.tokens for shard in self.shards):
            raise ValueError("tokens is not the sum over its shards")


class SplitEntries(msgspec.Struct, frozen=True, omit_defaults=True):
    train: SplitEntry | None = None
    val: SplitEntry | None = None

    def items(self) -> list[tuple[SplitName, SplitEntry]]:
        """The splits that exist, by name."""
        found: list[tuple[SplitName, SplitEntry]] = []
        if self.train:
            found.append(("train", self.train))
        if self.val:
            found.append(("val", self.val))
        return found


class SourceEntry(msgspec.Struct, frozen=True):
    source: str
    documents: Count
    tokens: Count
    dropped: dict[str, tuple[Count, str]]  # reason → count, place of the first
    ended: bool  # whether it was read to its end


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """dataset.json: what prepare.py made, and from what."""

    format: int = 1
    settings: Settings | None = None  # prepare.py's; None if something else wrote the file
    template: str | None = None
    vocab_size: Count | None = None
    tokenizer: str | None = None  # its fingerprint
    splits: SplitEntries
    sources: tuple[SourceEntry, ...] = ()
    inputs: str | None = None  # `progress.digest_of` the local files

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of every shard and mask, by file name."""
        found = {}
        for _, split in self.splits.items():
            for shard in split.shards:
                found[shard.file] = shard.sha256
                if shard.mask_sha256:
                    found[mask_path(Path(shard.file)).name] = shard.mask_sha256
        return found


@dataclass(frozen=True)
class Dataset:
    """An opened data folder."""

    folder: Path
    manifest: Manifest | None  # None where others wrote the shards

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The folder's tokenizer; GPT-2's for shards of llm.c and nanoGPT, which come without one.

        Raises UserError for a damaged one, and for nanoGPT's character-level data.
        """
        if (self.folder / "tokenizer.json").exists() or self.manifest:
            return Tokenizer.load(self.folder)
        if (self.folder / "meta.pkl").exists():
            raise UserError(
                f"{self.folder} holds nanoGPT's characters, whose table is a pickle: not read. "
                "Prepare its input.txt with --tokenizer=bytes"
            )
        print(f"{self.folder} has no tokenizer.json: assuming GPT-2's ids")
        return Tokenizer.gpt2()

    def split(self, name: SplitName) -> Split:
        """Open "train" or "val". Raises UserError for missing and truncated shards."""
        paths, entries = self._shard_paths(name), self._entries(name)
        split = Split(name, paths, self.tokenizer.vocab_size, entries)
        for entry, shard, path in zip(entries, split.shards, paths):
            if len(shard) != entry.tokens:
                found = quantity(len(shard), "token")
                counts = f"has {found}, but {MANIFEST} counts {entry.tokens:,}"
                raise UserError(f"{path} {counts}: prepare the data again")
        return split

    def _entries(self, name: SplitName) -> tuple[ShardEntry, ...]:
        split = getattr(self.manifest.splits, name) if self.manifest else None
        return split.shards if split else ()

    def _shard_paths(self, name: SplitName) -> list[Path]:
        """The shards that the manifest lists, or all that are found without a manifest."""
        paths = shard_paths(self.folder, name)
        if self.manifest:
            entries = self._entries(name)
            for entry in entries:
                path = self.folder / entry.file
                if path not in paths:
                    raise UserError(
                        f"{self.folder}/{MANIFEST} lists {entry.file}, which is missing"
                    )
                mask = mask_path(path)
                if entry.mask_sha256 and not mask.exists():
                    raise UserError(
                        f"{mask} is missing: without it every token would count in the loss"
                    )
            paths = [self.folder / entry.file for entry in entries]
        if not paths:
            where = f"in its {MANIFEST}" if self.manifest else f"({name}_000000.bin, …)"
            raise UserError(f"{self.folder} has no {name} shards {where}")
        return paths

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two folders exactly if their training tokens and masks are equal.

        Made from the hashes in the manifest; without one, from names and sizes of the shards.
        """
        if self.manifest:
            known = [entry.sha256 + (entry.mask_sha256 or "") for entry in self._entries("train")]
        else:
            paths = shard_paths(self.folder, "train")
            known = [f"{path.name} {path.stat().st_size}" for path in paths]
        return hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]

    def hashes(self, split: SplitName) -> dict[str, str]:
        """The SHA-256 of each file of a split, as the manifest has them."""
        known = self.manifest.hashes() if self.manifest else {}
        return {file: digest for file, digest in known.items() if file.startswith(f"{split}_")}

    @property
    def statistics(self) -> dict[str, dict[str, int]]:
        """Documents, bytes and tokens of each split, as the manifest counts them."""
        splits = self.manifest.splits.items() if self.manifest else []
        names = ("documents", "bytes", "tokens")
        return {name: {key: getattr(split, key) for key in names} for name, split in splits}

    def bytes_per_token(self, split: Split) -> float | None:
        """Bytes of UTF-8 text per token of a split; None without a manifest, and where a mask
        leaves tokens out."""
        counts = self.statistics.get(split.name)
        if split.has_mask or not counts or not counts["tokens"]:
            return None
        return counts["bytes"] / counts["tokens"]


def open_dataset(data_dir: Path | str) -> Dataset:
    """Raises UserError for a folder that is missing or half prepared, and a damaged manifest."""
    folder = Path(data_dir)
    return Dataset(folder, read_manifest(folder))


def read_manifest(folder: Path) -> Manifest | None:
    """`dataset.json` of a folder, None where others wrote the shards. Raises as `open_dataset`."""
    if (folder / MANIFEST).exists():
        return files.read_json(folder / MANIFEST, Manifest, "prepare the data again")
    if (folder / PARTIAL).exists():
        raise UserError(f"{folder} is half prepared: run its prepare.py command again")
    if not (shard_paths(folder, "train") or shard_paths(folder, "val")):
        near = sorted(folder.glob(f"*/{MANIFEST}")) or sorted(folder.parent.glob(f"*/{MANIFEST}"))
        found = ", ".join(str(path.parent) for path in near[:3])
        there = f" (existing data: {found})" if found else ""
        raise UserError(f"there is no data in {folder}; {command_for(folder)} makes it{there}")
    return None
