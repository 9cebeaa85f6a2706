"""The folder that prepare.py writes to: whether it may, and moving the finished files there."""

import re
import shutil
from pathlib import Path

from configurator import UserError
from plaingpt.checksums import SUMS, sha256_of, write_sums
from plaingpt.files import Settings, flush
from plaingpt.text import progress
from plaingpt.text.dataset import MANIFEST, PARTIAL, Manifest, read_manifest
from plaingpt.text.progress import check_settings_unchanged
from plaingpt.text.splits import KEPT


def check_target(folder: Path) -> Manifest | None:
    """The manifest in `folder`, or None if it has none.

    Raises UserError if writing there would destroy files that prepare.py did not make.
    """
    if not folder.is_dir():
        return None
    if (folder / "run.json").exists():
        raise UserError(f"{folder} holds a training run: use another data_dir")
    if not (folder / MANIFEST).exists():
        foreign = [*folder.glob("*.bin"), *folder.glob("tokenizer.json")]
        if foreign and not (folder / PARTIAL).exists():
            raise UserError(
                f"{folder} holds {min(foreign).name}, which prepare.py did not make: "
                "use another data_dir"
            )
        return None
    old = read_manifest(folder)
    if old is None or old.settings is None:
        raise UserError(f"{folder}/{MANIFEST} was not made by prepare.py: use another data_dir")
    return old


def check_outside(folder: Path, sources: list[str]) -> None:
    """Raises UserError if `folder` lies in a source: what is written there would be read as text
    when the command resumes or is repeated."""
    for source in sources:
        if Path(source).is_dir() and folder.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(
                f"{folder} lies in the source {source!r} and would be read as a part of it: use a "
                f"data_dir outside, or a pattern such as --sources='{source.rstrip('/')}/*.txt'"
            )


def check_inputs(manifest: Manifest, sources: tuple[str, ...], folder: Path) -> None:
    """Raises UserError if files have changed since they were prepared. Files that no longer
    exist cannot be compared."""
    try:
        now = progress.digest_of(progress.inputs_of(sources))
    except (UserError, OSError):
        return
    if manifest.inputs not in (None, now):
        raise UserError(
            f"files of {', '.join(sources)} have changed since {folder} was prepared: choose "
            "another --data_dir, or replace it with --overwrite (runs that were trained on it "
            "cannot be resumed then)"
        )


def only_install_left(partial: Path, settings: Settings, overwrite: bool) -> bool:
    """Whether an earlier run with these settings did everything but move its files.

    Raises UserError if its settings differ; with `overwrite`, its files are removed instead.
    """
    if not (partial / MANIFEST).exists():
        return False
    try:
        old = read_manifest(partial)
        before = old.settings if old else None
        check_settings_unchanged(partial.parent, "was started", before or {}, settings)
    except UserError:
        if not overwrite:
            raise
        shutil.rmtree(partial)
        partial.mkdir()
        return False
    return True


def install(partial: Path, folder: Path) -> Manifest:
    """Move the finished files from `partial` to `folder`, the manifest last; return it.

    A kill in the middle leaves `partial` but no manifest: such a folder cannot be opened, and
    prepare.py finishes the move.
    """
    manifest = read_manifest(partial)
    assert manifest
    hashes = manifest.hashes()
    names = [*hashes, "tokenizer.json", "tokenizer_config.json"]
    for name in (MANIFEST, SUMS):
        (folder / name).unlink(missing_ok=True)
    if (partial / KEPT).is_dir():
        for path in partial.glob("val_*.bin"):
            path.unlink()
    for path in folder.glob("*.bin"):
        if re.fullmatch(r"(train|val)_\d{6,}(\.mask)?\.bin", path.name) and path.name not in names:
            path.unlink()
    for name in names:
        for place in (partial / KEPT, partial):
            if (place / name).exists():
                (place / name).replace(folder / name)
    (partial / progress.NAME).unlink(missing_ok=True)  # there is nothing left to resume
    hashes |= {name: sha256_of(folder / name) for name in names if name.endswith(".json")}
    hashes[MANIFEST] = sha256_of(partial / MANIFEST)
    write_sums(partial, hashes)
    flush(partial / SUMS)
    for name in (SUMS, MANIFEST):
        (partial / name).replace(folder / name)
    shutil.rmtree(partial)
    return manifest
