"""progress.json: how far an interrupted prepare.py got, with its settings and inputs."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

import msgspec

from configurator import UserError
from plaingpt import files
from plaingpt.files import Count, Settings
from plaingpt.text.blocks import BlockSums
from plaingpt.text.shards import ShardsSoFar
from plaingpt.text.sources import Position, find_source, folder_for

NAME = "progress.json"
DEFAULT = Path("data/stdlib")  # the data_dir of whoever names none

Inputs = dict[str, tuple[int, int] | str | None]  # `inputs_of`, and a hash per dataset of the hub


class SplitNotes(msgspec.Struct, frozen=True, kw_only=True):
    """How far a split has been written."""

    shards: ShardsSoFar = ShardsSoFar()
    documents: Count = 0
    tokens: Count = 0
    bytes: Count = 0
    open: tuple[Count, Count] = (0, 0)  # tokens and bytes of the unfinished document
    crc32: BlockSums = ""  # of its list of documents

    def __post_init__(self) -> None:
        written = self.shards.filled + sum(shard.tokens for shard in self.shards.shards)
        if self.tokens != written:
            raise ValueError("tokens is not the sum over its shards")


class SplitsNotes(msgspec.Struct, frozen=True):
    train: SplitNotes = SplitNotes()
    val: SplitNotes = SplitNotes()


class StreamNotes(msgspec.Struct, frozen=True):
    """How far a source has been read."""

    position: Position
    ended: bool
    documents: Count
    tokens: Count
    dropped: dict[str, tuple[Count, str]]


class Notes(msgspec.Struct, frozen=True):
    """The content of progress.json."""

    settings: Settings
    inputs: Inputs
    splits: SplitsNotes = SplitsNotes()
    streams: tuple[StreamNotes, ...] = ()


@dataclass(frozen=True)
class Progress:
    """The saved state of a preparation, and where it is saved."""

    folder: Path
    notes: Notes  # of an earlier run; no streams: start anew

    def save(self, splits: SplitsNotes, streams: tuple[StreamNotes, ...]) -> None:
        notes = Notes(self.notes.settings, self.notes.inputs, splits, streams)
        files.write_json(self.folder / NAME, notes, seal=True)

    @property
    def was_saved(self) -> bool:
        return (self.folder / NAME).exists()


def read_progress(folder: Path, settings: Settings, inputs: Inputs, overwrite: bool) -> Progress:
    """The progress of an earlier run with the same settings and inputs.

    Raises UserError if they differ; with `overwrite` the run starts anew instead.
    """
    fresh = Progress(folder, Notes(settings, inputs))
    if not fresh.was_saved:
        return fresh
    try:
        notes = files.read_json(folder / NAME, Notes, "--overwrite starts over")
        before = notes.settings
        if settings["bad_records"] == "skip":  # none was refused so far, so nothing changes
            before = before | {"bad_records": "skip"}
        check_settings_unchanged(folder.parent, "was started", before, settings)
        for path in sorted(inputs.keys() | notes.inputs.keys()):
            if inputs.get(path) != notes.inputs.get(path):
                raise UserError(
                    f"{path} is new, has changed or is gone since {folder.parent} was started: "
                    "--overwrite starts over"
                )
    except UserError:
        if overwrite:
            return fresh
        raise
    return Progress(folder, msgspec.structs.replace(notes, settings=settings))


def changed_settings(old: Settings, now: Settings) -> list[str]:
    """The settings that differ, each with both values."""
    return [
        f"{name} was {old.get(name)!r}, is now {now[name]!r}"
        for name in now
        if old.get(name) != now[name]
    ]


def check_settings_unchanged(folder: Path, what: str, old: Settings, now: Settings) -> None:
    """Raises a UserError that names the settings that differ, and the way out."""
    if changed := changed_settings(old, now):
        advice, sources = "Use --overwrite to replace it, or another --data_dir", now["sources"]
        if folder == DEFAULT and old.get("sources") != sources:  # nobody chose to replace it
            assert isinstance(sources, tuple)
            advice = f"Use a folder of its own: --data_dir={folder_for(sources[0])}"
        raise UserError(f"{folder} {what} with other settings: {'; '.join(changed)}. {advice}")


def inputs_of(sources: tuple[str, ...]) -> Inputs:
    """Size and modification time of every local file of the sources."""
    found = [find_source(name) for name in sources]
    stats = {file.path: os.stat(file.path) for source in found for file in source.files}
    return {path: (stat.st_size, stat.st_mtime_ns) for path, stat in sorted(stats.items())}


def digest_of(inputs: Inputs) -> str:
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
