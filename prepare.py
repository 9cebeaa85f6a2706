"""
Text → shards of tokens, in data_dir.

    python prepare.py                                           # Python's standard library
    python prepare.py --sources="novel.txt,notes/" --data_dir=data/mine --vocab_size=8192
    python prepare.py --sources=talks.jsonl --template=chat --tokenizer=gpt2 --data_dir=data/talks
    python prepare.py config/data_fineweb.py                    # a recipe for a dataset of the hub
    python prepare.py --inspect=data/mine                       # say what is there, and check it

What a source can be is said in sources.py, what a template does in templates.py. Documents are
separated by `<|endoftext|>`. Killed at any moment, the same command goes on where it was and ends
with the same bytes.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

import configurator
from configurator import UserError
from plaingpt import files
from plaingpt.text import dataset, shards
from plaingpt.text.builder import KEPT, Work
from plaingpt.text.documents import (
    Reading,
    Stream,
    open_streams,
    sample_texts,
)
from plaingpt.text.shards import mask_path, sha256_of
from plaingpt.text.sources import find_source, hub_hash
from plaingpt.text.templates import CHAT_TEMPLATES, TemplateName
from plaingpt.text.tokenizer import MAX_VOCAB_SIZE, Tokenizer

SAMPLE_BYTES = 50_000_000  # text that a BPE is trained on, at most


@dataclass(frozen=True)
class PrepareConfig:
    # text
    sources: tuple[str, ...] = ("stdlib",)  # stdlib, files, folders, patterns, hf:…; =0.3 mixes
    val_sources: tuple[str, ...] = ()  # what to validate on; none: a part of sources
    template: TemplateName = "text"  # how a record becomes text: text, alpaca, chat, synth
    text_field: str = "text"  # the record's field that template=text takes
    bad_records: Literal["refuse", "skip"] = "refuse"  # malformed, empty or too long ones
    max_record_tokens: int | None = None  # longer records are bad; None: no limit
    # how much of it
    val_fraction: float = 0.05  # share of the documents to validate on, without val_sources
    val_tokens: int | None = None  # at most so many tokens of those; the rest is trained on
    max_tokens: int | None = None  # tokens to take from sources; None: all
    max_documents: int | None = None  # documents to take from sources; None: all
    # tokens
    tokenizer: str = "bpe"  # bpe (trained on the training text), bytes, gpt2, or a tokenizer.json
    vocab_size: int = 4096  # of a trained bpe, at most 65,536
    # output
    data_dir: str = "data/stdlib"  # where the shards go
    shard_tokens: int = 100_000_000  # tokens in a shard
    seed: int = 1337  # chooses the documents to validate on
    overwrite: bool = False  # replace a data_dir that was made with other settings
    workers: int = 0  # threads that tokenize; 0: one more than there are cores
    inspect: str | None = None  # a data_dir to describe and check; nothing is prepared


def prepare(cfg: PrepareConfig) -> dict[str, Any]:
    """Make `cfg.data_dir`, unless it is already there; return its manifest.

    Raises UserError for settings or sources that cannot be used, OSError as the disk and the
    network do. What was noted until then stays, and the same command goes on from there; before
    the first note nothing is left behind.
    """
    if cfg.inspect is not None:
        return inspect(Path(cfg.inspect))
    check_settings(cfg)
    folder = Path(cfg.data_dir)
    partial = folder / dataset.PARTIAL
    unsaved = ("data_dir", "workers", "overwrite", "inspect")
    settings = json.loads(json.dumps({k: v for k, v in asdict(cfg).items() if k not in unsaved}))
    old = check_target(folder, settings, cfg.overwrite)
    if old and not cfg.overwrite:
        check_inputs(old, cfg)
        print(f"{folder} is already prepared with these settings (--overwrite to do it again)")
        return old
    if not moving(partial, settings, cfg.overwrite):
        make(cfg, folder, partial, settings)
    manifest = install(partial, folder)
    report(manifest)
    print(f"wrote {folder}, with a vocabulary of {manifest['vocab_size']:,} ids")
    return manifest


def moving(partial: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether nothing is left of an earlier run with these settings but to move its files."""
    if not (partial / "dataset.json").exists():
        return False
    try:
        check_same(
            partial.parent, "was begun", dataset.read_manifest(partial)["settings"], settings
        )
    except ValueError:
        if not overwrite:
            raise
        shutil.rmtree(partial)
        partial.mkdir()
        return False
    return True


def make(cfg: PrepareConfig, folder: Path, partial: Path, settings: dict[str, Any]) -> None:
    """Do all of the work in `partial`, from where its notes say that it is."""
    fraction = 0.0 if cfg.val_sources else cfg.val_fraction
    reading = Reading(cfg.template, cfg.text_field, fraction, cfg.seed)
    streams = open_streams(cfg.sources, cfg.val_sources, reading)
    inputs: dict[str, Any] = inputs_of(cfg)
    for hub in (stream.source for stream in streams if stream.source.hub):
        inputs[hub.name] = hub_hash(hub)
    notes = read_notes(partial, settings, inputs, cfg.overwrite)
    existed, repairing = folder.exists(), partial.exists()
    try:
        if notes:
            print(f"going on with {folder}")
            tokenizer = Tokenizer.load(partial)
        else:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            tokenizer = make_tokenizer(cfg, streams, reading)
            tokenizer.chat_template = CHAT_TEMPLATES.get(cfg.template)
            tokenizer.save(partial)
        announce(cfg, streams, folder)
        header = {"settings": settings, "inputs": inputs}
        work = Work(cfg, partial, tokenizer, streams, header, notes)
        work.run(reading)
        manifest = {
            "format": 1,
            "settings": settings,
            "template": cfg.template,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.fingerprint,
            "splits": work.finish(),
            "sources": [stream.summary() for stream in streams],
            "inputs": digest_of(inputs_of(cfg)),
        }
        dataset.write_manifest(partial, manifest)
    except BaseException:
        if not (partial / "progress.json").exists():
            shutil.rmtree(partial, ignore_errors=True)
            if not existed:
                shutil.rmtree(folder, ignore_errors=True)
            elif repairing:  # still the mark of a folder that is half ours
                partial.mkdir()
        raise


def check_settings(cfg: PrepareConfig) -> None:
    """Raises UserError that lists all values out of range."""
    problems = []
    for name in ("sources", "data_dir", "tokenizer"):
        if not getattr(cfg, name):
            problems.append(f"{name} is empty")
    if not 257 <= cfg.vocab_size <= MAX_VOCAB_SIZE:
        problems.append(f"vocab_size must be from 257 to {MAX_VOCAB_SIZE}, not {cfg.vocab_size}")
    if not 0 <= cfg.val_fraction < 1:
        problems.append(f"val_fraction must be in [0, 1), not {cfg.val_fraction}")
    if not 1 <= cfg.shard_tokens < 2**31:
        problems.append(f"shard_tokens must be from 1 to 2**31 - 1, not {cfg.shard_tokens}")
    for name in ("workers", "seed"):
        if not 0 <= getattr(cfg, name) < 2**63:
            problems.append(f"{name} must be from 0 to 2**63 - 1")
    for name in ("max_tokens", "max_documents", "val_tokens", "max_record_tokens"):
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1:
            problems.append(f"{name} must be at least 1, not {getattr(cfg, name)}")
    if problems:
        raise UserError("; ".join(problems))


def check_target(folder: Path, settings: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """The manifest already in `folder`, or {}.

    Raises UserError where writing there would destroy or mix what others made.
    """
    if not folder.is_dir():
        if folder.exists():
            raise UserError(f"data_dir {folder} is a file")
        return {}
    if not (folder / "dataset.json").exists():
        foreign = [*folder.glob("*.bin"), *folder.glob("tokenizer.json")]
        if foreign and not (folder / dataset.PARTIAL).exists():
            raise UserError(
                f"{folder} holds {min(foreign).name}, which prepare.py did not make: "
                "use another data_dir"
            )
        return {}
    old = dataset.read_manifest(folder)
    if "settings" not in old:
        raise UserError(f"{folder}/dataset.json is not of prepare.py: use another data_dir")
    if not overwrite:
        check_same(folder, "was prepared", old["settings"], settings)
    return old


def check_same(folder: Path, what: str, old: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises UserError that names the settings that differ."""
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


def inputs_of(cfg: PrepareConfig) -> dict[str, list[int]]:
    """Size and time of change of every local file that is read."""
    sources = [find_source(name) for name in (*cfg.sources, *cfg.val_sources)]
    stats = {file.path: os.stat(file.path) for source in sources for file in source.files}
    return {path: [stat.st_size, stat.st_mtime_ns] for path, stat in sorted(stats.items())}


def digest_of(inputs: dict[str, list[int]]) -> str:
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:16]


def check_inputs(manifest: dict[str, Any], cfg: PrepareConfig) -> None:
    """Raises UserError where files have changed since they were prepared. Where they are not here
    any more there is nothing to check."""
    try:
        now = digest_of(inputs_of(cfg))
    except (ValueError, OSError):
        return
    if manifest.get("inputs", now) != now:
        raise UserError(
            f"files of {', '.join(cfg.sources)} have changed since {cfg.data_dir} was prepared: "
            "--overwrite prepares it again"
        )


def read_notes(
    partial: Path, settings: dict[str, Any], inputs: dict[str, Any], overwrite: bool
) -> dict[str, Any]:
    """How far an earlier run with the same settings and files came, or {} to begin anew.

    Raises UserError, unless told to overwrite, where they are not the same.
    """
    path = partial / "progress.json"
    if not path.exists():
        return {}
    try:
        notes = files.read_json(path)
        before = notes["settings"]
        if settings["bad_records"] == "skip":  # until now none was refused, so nothing changes
            before = before | {"bad_records": "skip"}
        check_same(partial.parent, "was begun", before, settings)
        for path in sorted(inputs.keys() | notes["inputs"].keys()):
            if inputs.get(path) != notes["inputs"].get(path):
                raise UserError(
                    f"{path} is new, has changed or has gone since {partial.parent} was begun: "
                    "--overwrite starts over"
                )
    except ValueError:
        if overwrite:
            return {}
        raise
    return notes


def make_tokenizer(cfg: PrepareConfig, streams: list[Stream], reading: Reading) -> Tokenizer:
    if cfg.tokenizer == "gpt2":
        return Tokenizer.gpt2()
    if cfg.tokenizer == "bytes":
        return Tokenizer.bytes()
    if cfg.tokenizer == "bpe":
        return Tokenizer.train(sample_texts(streams, reading, SAMPLE_BYTES), cfg.vocab_size)
    if not Path(cfg.tokenizer).exists():
        raise UserError(
            f"tokenizer {cfg.tokenizer!r} is none of bpe, bytes, gpt2, nor a folder or file"
        )
    return Tokenizer.load(cfg.tokenizer)


# --- the splits


# --- the folder


def install(partial: Path, folder: Path) -> dict[str, Any]:
    """Move the finished files from `partial` to `folder`, the manifest last; return it.

    A kill in the middle leaves `partial` but no manifest: data.py refuses such a folder, and
    prepare.py goes on with the move.
    """
    manifest = dataset.read_manifest(partial)
    names = [shard["file"] for split in manifest["splits"].values() for shard in split["shards"]]
    masks = [mask_path(Path(name)).name for name in names] * (manifest["template"] != "text")
    names = [*names, *masks, "tokenizer.json", "tokenizer_config.json"]
    (folder / "dataset.json").unlink(missing_ok=True)
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
    (partial / "progress.json").unlink(missing_ok=True)  # nothing is left to go on with
    (partial / "dataset.json").replace(folder / "dataset.json")
    shutil.rmtree(partial)
    return manifest


def announce(cfg: PrepareConfig, streams: list[Stream], folder: Path) -> None:
    """Say how much there is to read, and how much room it will take."""
    sizes = [stream.source.size for stream in streams]
    free = shutil.disk_usage(folder).free
    per_byte = 2.0 if cfg.tokenizer == "bytes" else 0.6  # of shards per byte of text, about
    if cfg.max_tokens:
        needed: float = 2 * cfg.max_tokens
    elif all(sizes):
        needed = per_byte * sum(sizes)
    else:
        return
    wanted, there = (tqdm.format_sizeof(size, "B") for size in (needed, free))
    print(f"about {wanted} of shards to write, {there} free in {folder}", file=sys.stderr)


def report(manifest: dict[str, Any]) -> None:
    """The summary table."""
    for source in manifest.get("sources", []):
        rest = "" if source["ended"] else ", and there is more"
        counts = f"{source['documents']:,} documents, {source['tokens']:,} tokens"
        print(f"{source['source']}: {counts}{rest}")
        for reason, (count, where) in source["dropped"].items():
            print(f"  skipped {count:,}: {reason} (the first: {where})")
    for name, split in manifest["splits"].items():
        rate = split["bytes"] / max(1, split["tokens"])
        print(
            f"{name}: {split['documents']:,} documents, {split['bytes']:,} bytes, "
            f"{split['tokens']:,} tokens ({rate:.2f} bytes per token)"
        )
        if split.get("trained_on"):
            print(f"  {split['trained_on']:,} documents left out, as they are trained on")
    missing = {"train": "more documents", "val": "--val_fraction, or --val_sources"}
    for name, remedy in missing.items():
        if not manifest["splits"].get(name, {}).get("tokens"):
            print(f"{name}: nothing; train.py needs some: {remedy}")


def inspect(folder: Path) -> dict[str, Any]:
    """Print a folder's summary, check every hash and id, and show the beginnings of documents.

    Raises UserError for whatever is wrong.
    """
    data = dataset.open_dataset(folder)
    manifest, tokenizer = data.manifest, data.tokenizer
    if manifest:
        report(manifest)
        for split in manifest["splits"].values():
            for shard in split["shards"]:
                path = folder / shard["file"]
                hashes = {path: shard["sha256"]}
                if "mask_sha256" in shard:
                    hashes[shards.mask_path(path)] = shard["mask_sha256"]
                for each, wanted in hashes.items():
                    if sha256_of(each) != wanted:
                        raise UserError(f"{each} is not what was written (sha256)")
        if tokenizer.fingerprint != manifest["tokenizer"]:
            raise UserError(f"{folder}/tokenizer.json is not the tokenizer of the shards")
    for name in ("train", "val"):
        if not shards.shard_paths(folder, name):
            continue
        split = data.split(name)
        split.check_ids()
        checked = "all hashes as written" if manifest else "no manifest to check against"
        print(f"\n{name}: {len(split):,} tokens, {checked}; it begins")
        print(marked(split, tokenizer, 300))
    return manifest


def marked(split: shards.Split, tokenizer: Tokenizer, length: int) -> str:
    """The first tokens of a split as text; what counts in the loss is between ⟦ and ⟧."""
    stop = min(length, len(split))
    ids, mask = split[0:stop], split.mask(0, stop)
    if mask is None:
        return tokenizer.decode(ids.tolist())
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), stop]
    parts = []
    for start, end in pairwise(edges):
        text = tokenizer.decode(ids[start:end].tolist())
        parts.append(f"⟦{text}⟧" if mask[start] else text)
    return "".join(parts)


def main(argv: list[str] | None = None) -> int:
    return configurator.command(PrepareConfig, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
