"""progress.json: how far an interrupted prepare.py got, with its settings and inputs."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configurator import UserError
from plaingpt import files
from plaingpt.text.sources import find_source

NAME = "progress.json"


@dataclass(frozen=True)
class Progress:
    """What a run has saved in its folder, and saves there."""

    folder: Path
    settings: dict[str, Any]
    inputs: dict[str, Any]  # as `inputs_of`, and the hash of each dataset of the hub
    notes: dict[str, Any]  # `splits` and `streams` of an earlier run; {} to start anew

    def save(self, splits: dict[str, Any], streams: list[dict[str, Any]]) -> None:
        header = {"settings": self.settings, "inputs": self.inputs}
        files.write_json(self.folder / NAME, header | {"splits": splits, "streams": streams})

    @property
    def was_saved(self) -> bool:
        return (self.folder / NAME).exists()


def read_progress(
    folder: Path, settings: dict[str, Any], inputs: dict[str, Any], overwrite: bool
) -> Progress:
    """The progress of an earlier run with the same settings and inputs.

    Raises UserError if they differ; with `overwrite` the run starts anew instead.
    """
    fresh = Progress(folder, settings, inputs, {})
    if not fresh.was_saved:
        return fresh
    try:
        notes = files.read_json(folder / NAME)
        before = notes["settings"]
        if settings["bad_records"] == "skip":  # none was refused so far, so nothing changes
            before = before | {"bad_records": "skip"}
        check_settings_unchanged(folder.parent, "was begun", before, settings)
        for path in sorted(inputs.keys() | notes["inputs"].keys()):
            if inputs.get(path) != notes["inputs"].get(path):
                raise UserError(
                    f"{path} is new, has changed or has gone since {folder.parent} was begun: "
                    "--overwrite starts over"
                )
    except UserError:
        if overwrite:
            return fresh
        raise
    return Progress(folder, settings, inputs, notes)


def check_settings_unchanged(
    folder: Path, what: str, old: dict[str, Any], now: dict[str, Any]
) -> None:
    """Raises a UserError that names the settings that differ."""
    changed = [
        f"{name} was {old.get(name)!r}, is now {now[name]!r}"
        for name in now
        if old.get(name) != now[name]
    ]
    if changed:
        raise UserError(
            f"{folder} {what} with other settings: {'; '.join(changed)}. "
            "Use --overwrite, or another --data_dir"
        )


def inputs_of(sources: tuple[str, ...]) -> dict[str, list[int]]:
    """Size and time of change of every local file that the sources read."""
    found = [find_source(name) for name in sources]
    stats = {file.path: os.stat(file.path) for source in found for file in source.files}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in sorted(stats.items())}


def digest_of(inputs: dict[str, list[int]]) -> str:
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]
