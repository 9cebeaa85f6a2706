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
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

import checkpoint
import configurator
import data
from documents import (
    DEFAULT_THREADS,
    Encoded,
    Piece,
    Reading,
    Stream,
    encoded,
    open_streams,
    sample_texts,
)
from shards import CUT, KEPT, SplitWriter, in_both, sha256_of, without_documents
from sources import find_source, hub_hash
from templates import CHAT_TEMPLATES, TemplateName
from tokenizer import MAX_VOCAB_SIZE, Tokenizer

SAMPLE_BYTES = 50_000_000  # text that a BPE is trained on, at most
SAVE_SECONDS = 5.0  # between two notes of how far it is


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

    Raises ValueError for settings or sources that cannot be used, OSError as the disk and the
    network do. What was noted until then stays, and the same command goes on from there; before
    the first note nothing is left behind.
    """
    if cfg.inspect is not None:
        return inspect(Path(cfg.inspect))
    check_settings(cfg)
    folder = Path(cfg.data_dir)
    partial = folder / data.PARTIAL
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
        check_same(partial.parent, "was begun", data.read_manifest(partial)["settings"], settings)
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
        checkpoint.write_json(partial / "dataset.json", manifest)
    except BaseException:
        if not (partial / "progress.json").exists():
            shutil.rmtree(partial, ignore_errors=True)
            if not existed:
                shutil.rmtree(folder, ignore_errors=True)
            elif repairing:  # still the mark of a folder that is half ours
                partial.mkdir()
        raise


def check_settings(cfg: PrepareConfig) -> None:
    """Raises ValueError that lists all values out of range."""
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
        raise ValueError("; ".join(problems))


def check_target(folder: Path, settings: dict[str, Any], overwrite: bool) -> dict[str, Any]:
    """The manifest already in `folder`, or {}.

    Raises ValueError where writing there would destroy or mix what others made.
    """
    if not folder.is_dir():
        if folder.exists():
            raise ValueError(f"data_dir {folder} is a file")
        return {}
    if not (folder / "dataset.json").exists():
        foreign = [*folder.glob("*.bin"), *folder.glob("tokenizer.json")]
        if foreign and not (folder / data.PARTIAL).exists():
            raise ValueError(
                f"{folder} holds {min(foreign).name}, which prepare.py did not make: "
                "use another data_dir"
            )
        return {}
    old = data.read_manifest(folder)
    if "settings" not in old:
        raise ValueError(f"{folder}/dataset.json is not of prepare.py: use another data_dir")
    if not overwrite:
        check_same(folder, "was prepared", old["settings"], settings)
    return old


def check_same(folder: Path, what: str, old: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ValueError that names the settings that differ."""
    changed = [
        f"{name} was {old.get(name)!r}, is now {now[name]!r}"
        for name in now
        if old.get(name) != now[name]
    ]
    if changed:
        raise ValueError(
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
    """Raises ValueError where files have changed since they were prepared. Where they are not here
    any more there is nothing to check."""
    try:
        now = digest_of(inputs_of(cfg))
    except (ValueError, OSError):
        return
    if manifest.get("inputs", now) != now:
        raise ValueError(
            f"files of {', '.join(cfg.sources)} have changed since {cfg.data_dir} was prepared: "
            "--overwrite prepares it again"
        )


def read_notes(
    partial: Path, settings: dict[str, Any], inputs: dict[str, Any], overwrite: bool
) -> dict[str, Any]:
    """How far an earlier run with the same settings and files came, or {} to begin anew.

    Raises ValueError, unless told to overwrite, where they are not the same.
    """
    path = partial / "progress.json"
    if not path.exists():
        return {}
    try:
        notes = checkpoint.read_json(path)
        before = notes["settings"]
        if settings["bad_records"] == "skip":  # until now none was refused, so nothing changes
            before = before | {"bad_records": "skip"}
        check_same(partial.parent, "was begun", before, settings)
        for path in sorted(inputs.keys() | notes["inputs"].keys()):
            if inputs.get(path) != notes["inputs"].get(path):
                raise ValueError(
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
        raise ValueError(
            f"tokenizer {cfg.tokenizer!r} is none of bpe, bytes, gpt2, nor a folder or file"
        )
    return Tokenizer.load(cfg.tokenizer)


# --- the splits


class Work:
    """The writing of both splits, with notes of how far it is."""

    def __init__(
        self,
        cfg: PrepareConfig,
        partial: Path,
        tokenizer: Tokenizer,
        streams: list[Stream],
        header: dict[str, Any],
        notes: dict[str, Any],
    ) -> None:
        self.cfg, self.partial, self.tokenizer = cfg, partial, tokenizer
        self.streams, self.header = streams, header
        self.val_tokens = cfg.val_tokens or math.inf
        self.val_documents = math.inf
        if not cfg.val_sources:
            if cfg.max_tokens:
                self.val_tokens = min(self.val_tokens, round(cfg.val_fraction * cfg.max_tokens))
            if cfg.max_documents:
                self.val_documents = math.ceil(cfg.val_fraction * cfg.max_documents)
        splits = notes.get("splits", {})
        self.train, self.val = (
            SplitWriter(
                partial, name, cfg.shard_tokens, cfg.template != "text", splits.get(name, {})
            )
            for name in ("train", "val")
        )
        for stream, known in zip(streams, notes.get("streams", [])):
            stream.restore(known)
        self.saved = time.monotonic()
        self.began_bytes, self.began = self.train.bytes + self.val.bytes, self.saved
        self.began_tokens = self.tokens
        sizes = [stream.source.size for stream in streams]
        self.bar = tqdm(
            total=cfg.max_tokens or (sum(sizes) if all(sizes) else None),
            initial=self.done,
            unit="tok" if cfg.max_tokens else "B",
            unit_scale=True,
            delay=1,
            mininterval=0.5 if sys.stderr.isatty() else 60,  # seconds; a log gets a line a minute
        )

    @property
    def tokens(self) -> int:
        return self.train.tokens + self.val.tokens

    @property
    def done(self) -> int:
        """What the progress bar counts: tokens towards max_tokens, else bytes of the sources."""
        if self.cfg.max_tokens:
            return self.tokens
        return sum(stream.position.read for stream in self.streams)

    def run(self, reading: Reading) -> None:
        """Read all streams to their end, or to the limits of the settings."""
        threads = self.cfg.workers or DEFAULT_THREADS
        with ThreadPoolExecutor(threads) as pool, self.bar:
            for validation in (False, True):
                streams = [stream for stream in self.streams if stream.all_val == validation]
                readers = [
                    encoded(stream, reading, self.tokenizer, pool, threads + 1)
                    for stream in streams
                ]
                while not self.enough(validation) and (stream := self.next_stream(streams)):
                    self.take_document(stream, readers[streams.index(stream)])
            self.save()

    def enough(self, validation: bool) -> bool:
        if validation:
            return self.val.tokens >= self.val_tokens
        documents = self.train.documents + self.val.documents
        enough_tokens = self.tokens >= (self.cfg.max_tokens or math.inf)
        return enough_tokens or documents >= (self.cfg.max_documents or math.inf)

    def next_stream(self, streams: list[Stream]) -> Stream | None:
        """The first that has not ended; with weights the one most behind, until one has ended."""
        for stream in streams:
            if stream.position.characters:  # in the middle of a document
                return stream
        if streams and streams[0].source.weight and not streams[0].all_val:
            if any(stream.ended for stream in streams):
                return None
            return min(streams, key=lambda stream: stream.tokens / (stream.source.weight or 1))
        return next((stream for stream in streams if not stream.ended), None)

    def take_document(self, stream: Stream, reader: Iterator[Encoded]) -> None:
        """Write the next document of a stream, or count the next record that is none."""
        held: list[Encoded] = []
        for piece, ids, mask in reader:
            held.append((piece, ids, mask))
            if piece.whole and piece.digest is None:
                continue
            problem = next((each[0].problem for each in held if each[0].problem), None)
            tokens = sum(len(each[1]) for each in held)
            limit = self.cfg.max_record_tokens
            if piece.whole and limit and tokens > limit:
                problem = f"more than {limit:,} tokens"
            stream.position = piece.after
            if problem:
                self.drop(stream, problem, piece.where)
                return
            self.write(stream, held)
            held = []
            done = piece.digest is not None or self.enough(stream.all_val)
            if done:
                split = self.val if self.val.open[0] else self.train
                split.end_document(piece.digest or CUT)
                stream.documents += 1
            self.bar.update(self.done - self.bar.n)
            if time.monotonic() - self.saved > SAVE_SECONDS:
                self.save()
            if done:
                return
        stream.ended = True
        stream.position = stream.position._replace(read=stream.source.size)

    def write(self, stream: Stream, pieces: list[Encoded]) -> None:
        for piece, ids, mask in pieces:
            start, end = 0, len(ids)
            if self.cfg.max_tokens and not stream.all_val:
                end = min(end, self.cfg.max_tokens - self.tokens)
            if self.cfg.val_tokens and stream.all_val:
                end = min(end, self.cfg.val_tokens - self.val.tokens)
            stream.tokens += end
            while start < end:
                split, stop = self.split_of(piece), end
                if split is self.val and piece.bytes and not piece.whole:
                    stop = int(min(end, start + self.val_tokens - self.val.tokens))
                part = ids[start:stop]
                cut = len(part) < len(ids)
                size = self.tokenizer.count_bytes(part) if cut else piece.bytes
                split.write(part, None if mask is None else mask[start:stop], size)
                start = stop

    def split_of(self, piece: Piece) -> SplitWriter:
        """Where a piece goes: to validation, if its document fell to it and until that has enough.
        What is left of a text then is trained on."""
        if self.train.open[0]:  # the document goes on
            return self.train
        if self.val.open[0] and (piece.whole or not piece.bytes):
            return self.val
        full = self.val.tokens >= self.val_tokens or self.val.documents >= self.val_documents
        if piece.val and not full:
            return self.val
        if self.val.open[0]:
            self.val.end_document(CUT)
        return self.train

    def drop(self, stream: Stream, reason: str, where: str) -> None:
        if self.cfg.bad_records == "refuse":
            raise ValueError(f"{where}: {reason} (--bad_records=skip leaves such records out)")
        stream.drop(reason, where)
        if stream.dropped[reason][0] <= 3:
            self.bar.write(f"skipped {where}: {reason}", file=sys.stderr)

    def save(self) -> None:
        splits = {"train": self.train.notes(), "val": self.val.notes()}
        streams = [stream.notes() for stream in self.streams]
        checkpoint.write_json(
            self.partial / "progress.json", self.header | {"splits": splits, "streams": streams}
        )
        self.saved = time.monotonic()
        seconds, read = (
            max(self.saved - self.began, 1e-9),
            self.train.bytes + self.val.bytes - self.began_bytes,
        )
        rates = (read / seconds / 1e6, (self.tokens - self.began_tokens) / seconds / 1e6)
        speed = "{:.1f} MB/s, {:.2f}M tok/s".format(*rates)
        written = tqdm.format_sizeof(2 * self.tokens, "B")
        self.bar.set_postfix_str(
            f"{speed}, {self.tokens:,} tokens, {written} written", refresh=False
        )

    def finish(self) -> dict[str, Any]:
        """Close the shards; take documents that are trained on out of the validation split."""
        splits = {"train": self.train.close(), "val": self.val.close()}
        both = in_both(self.train.path, self.val.path)
        if both.any():
            splits["val"] = without_documents(self.partial, self.val, splits["val"], both)
        return {name: split for name, split in splits.items() if split["documents"] or any(both)}


# --- the folder


def install(partial: Path, folder: Path) -> dict[str, Any]:
    """Move the finished files from `partial` to `folder`, the manifest last; return it.

    A kill in the middle leaves `partial` but no manifest: data.py refuses such a folder, and
    prepare.py goes on with the move.
    """
    manifest = json.loads((partial / "dataset.json").read_text(encoding="utf-8"))
    shards = [shard["file"] for split in manifest["splits"].values() for shard in split["shards"]]
    masks = [data.mask_path(Path(name)).name for name in shards] * (manifest["template"] != "text")
    names = [*shards, *masks, "tokenizer.json", "tokenizer_config.json"]
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

    Raises ValueError for whatever is wrong.
    """
    manifest = data.read_manifest(folder)
    tokenizer = data.load_tokenizer(folder)
    if manifest:
        report(manifest)
        for split in manifest["splits"].values():
            for shard in split["shards"]:
                path = folder / shard["file"]
                hashes = {path: shard["sha256"]}
                if "mask_sha256" in shard:
                    hashes[data.mask_path(path)] = shard["mask_sha256"]
                for each, wanted in hashes.items():
                    if sha256_of(each) != wanted:
                        raise ValueError(f"{each} is not what was written (sha256)")
        if tokenizer.fingerprint != manifest["tokenizer"]:
            raise ValueError(f"{folder}/tokenizer.json is not the tokenizer of the shards")
    for name in ("train", "val"):
        if not data.shard_paths(folder, name):
            continue
        split = data.Split(folder, name, tokenizer.vocab_size)
        checked = "all hashes as written" if manifest else "no manifest to check against"
        print(f"\n{name}: {len(split):,} tokens, {checked}; it begins")
        print(marked(split, tokenizer, 300))
    return manifest


def marked(split: data.Split, tokenizer: Tokenizer, length: int) -> str:
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
