"""
Text → shards of tokens, in data_dir.

    python prepare.py                                           # Python's standard library
    python prepare.py --sources=novel.txt --tokenizer=bytes --data_dir=data/novel
    python prepare.py --sources="notes/,books/*.txt" --data_dir=data/mine --vocab_size=8192
    python prepare.py --sources=train.txt --val_sources=val.txt --tokenizer=gpt2

A source is `stdlib` (the source files of the interpreter that runs this), a .txt file, a pattern
of them, or a folder that is searched for them. Each file is a document; `<|endoftext|>` follows it.
"""

import glob
import json
import os
import re
import shutil
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

import configurator
import data
from tokenizer import MAX_VOCAB_SIZE, Tokenizer

OUR_SHARD = re.compile(r"(train|val)_\d{6}(\.mask)?\.bin")
FOREIGN = re.compile(r".*\.bin|tokenizer\.json")  # in a data_dir without our manifest
BATCH_BYTES = 1 << 22  # text tokenized at once: bounds the memory
SAMPLE_BYTES = 100_000_000  # text that a BPE is trained on, at most


@dataclass(frozen=True)
class PrepareConfig:
    sources: tuple[str, ...] = ("stdlib",)  # what to read: stdlib, files.txt, patterns, folders
    val_sources: tuple[str, ...] = ()  # what to validate on; none: a part of sources
    data_dir: str = "data/stdlib"  # where the shards go
    tokenizer: Literal["bpe", "bytes", "gpt2"] = "bpe"  # bpe is trained on the training text
    vocab_size: int = 4096  # of a trained bpe, at most 65,536
    val_fraction: float = 0.05  # share of the text to validate on, without val_sources
    shard_tokens: int = 100_000_000  # tokens in a shard
    workers: int = 0  # threads that tokenize; 0: one per core
    seed: int = 1337  # chooses the documents to validate on
    overwrite: bool = False  # replace a data_dir that was made with other settings


# --- sources


def paths_of(source: str) -> list[str]:
    if source == "stdlib":
        return stdlib_paths()
    if os.path.isdir(source):
        return sorted(str(path) for path in Path(source).rglob("*.txt") if path.is_file())
    if os.path.isfile(source):
        if not source.endswith(".txt"):
            raise ValueError(f"source {source!r}: only .txt files are read")
        return [source]
    return sorted(path for path in glob.glob(source, recursive=True) if path.endswith(".txt"))


def stdlib_paths() -> list[str]:
    """The standard library's .py files that people wrote, without tests (not every Python has
    them) and without generated tables and texts (encodings, pydoc_data)."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    left_out |= {"encodings", "pydoc_data"}
    return sorted(
        str(path)
        for path in root.rglob("*.py")
        if not left_out.intersection(path.relative_to(root).parts)
    )


def read(path: str) -> str:
    """A document's text: UTF-8, or for Python files the encoding that they declare.

    Raises ValueError for bytes that are not that.
    """
    try:
        if path.endswith(".py"):
            with tokenize.open(path) as file:
                return file.read()
        with open(path, encoding="utf-8", newline="") as file:
            return file.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8: byte {error.object[error.start]:#04x} at {error.start:,}; "
            "convert it, as with iconv -t utf-8"
        ) from None
    except SyntaxError as error:  # a Python file that declares no known encoding
        raise ValueError(f"{path}: {error.msg}") from None


@dataclass(frozen=True)
class Document:
    """A file, or the part of one from character `start` to `stop`, as slices count."""

    path: str
    size: int  # bytes of the file
    start: int | None = None
    stop: int | None = None

    def text(self) -> str:
        return read(self.path)[self.start : self.stop]


def find_documents(sources: tuple[str, ...]) -> list[Document]:
    """All documents of `sources` that hold something, none twice.

    Raises ValueError for a source that is nothing, and when all is empty.
    """
    paths: dict[str, None] = {}  # real ones, so that none is read twice
    for source in sources:
        found = paths_of(source)
        if not found:
            raise ValueError(
                f"source {source!r}: no such .txt file, nor a folder or pattern of some"
            )
        paths.update(dict.fromkeys(os.path.realpath(path) for path in found))
    documents = [Document(path, os.path.getsize(path)) for path in paths]
    if not any(document.size for document in documents):
        raise ValueError(f"there is no text in {', '.join(map(repr, sources))}")
    return [document for document in documents if document.size]


def split_documents(
    documents: list[Document], fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Part documents into training and validation: whole documents, drawn at random until they
    hold that fraction of the bytes. A single document is cut instead, at the end of a line."""
    if len(documents) == 1:
        only = documents[0]
        text = only.text()
        target = round(len(text) * (1 - fraction))
        cut = text.rfind("\n", 0, target) + 1 or target
        return [replace(only, stop=cut)], [replace(only, start=cut)]
    wanted = fraction * sum(document.size for document in documents)
    val, drawn = set(), 0
    for index in np.random.default_rng(seed).permutation(len(documents))[1:]:
        if drawn >= wanted:
            break
        val.add(int(index))
        drawn += documents[index].size
    parts: tuple[list[Document], list[Document]] = ([], [])
    for index, document in enumerate(documents):
        parts[index in val].append(document)
    return parts


# --- tokens


def write_split(
    folder: Path, name: str, documents: list[Document], tokenizer: Tokenizer, cfg: PrepareConfig
) -> dict[str, Any]:
    """Tokenize `documents` into the shards of a split; return its part of the manifest."""
    shards: list[dict[str, Any]] = []
    buffer, filled = np.empty(cfg.shard_tokens, dtype=np.uint16), 0
    tokens = text_bytes = 0
    for texts, ids in tokenized(documents, tokenizer, cfg.workers or os.cpu_count() or 1, name):
        tokens += len(ids)
        text_bytes += sum(len(text.encode()) for text in texts)
        while len(ids):
            taken = ids[: len(buffer) - filled]
            buffer[filled : filled + len(taken)] = taken
            filled, ids = filled + len(taken), ids[len(taken) :]
            if filled == len(buffer):
                shards.append(data.write_shard(shard_path(folder, name, len(shards)), buffer))
                filled = 0
    if filled:
        shards.append(data.write_shard(shard_path(folder, name, len(shards)), buffer[:filled]))
    counts = {"documents": len(documents), "bytes": text_bytes, "tokens": tokens}
    return {**counts, "shards": shards}


def shard_path(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}_{number:06d}.bin"


def tokenized(
    documents: list[Document], tokenizer: Tokenizer, threads: int, name: str
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Batches of texts with their ids, uint16, `<|endoftext|>` behind each text."""
    total = sum(document.size for document in documents)
    with tqdm(total=total, desc=name, unit="B", unit_scale=True, disable=None) as bar:
        for batch in batched(documents):
            texts = [document.text() for document in batch]
            ids: list[int] = []
            for encoded in tokenizer.encode_batch(texts, threads):
                ids += encoded
                ids.append(tokenizer.eot_id)
            yield texts, np.array(ids, dtype=np.uint16)
            bar.update(sum(document.size for document in batch))


def batched(documents: list[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += document.size
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def make_tokenizer(cfg: PrepareConfig, documents: list[Document]) -> Tokenizer:
    if cfg.tokenizer == "gpt2":
        return Tokenizer.gpt2()
    if cfg.tokenizer == "bytes":
        return Tokenizer.bytes()
    return Tokenizer.train(sample_texts(documents, cfg.seed), cfg.vocab_size)


def sample_texts(documents: list[Document], seed: int) -> Iterator[str]:
    """Documents in a random order, up to SAMPLE_BYTES."""
    taken = 0
    for index in np.random.default_rng(seed).permutation(len(documents)):
        if taken >= SAMPLE_BYTES:
            break
        taken += documents[index].size
        yield documents[index].text()


# --- the command


def prepare(cfg: PrepareConfig) -> dict[str, Any]:
    """Make `cfg.data_dir`, unless it is already there; return its manifest.

    Raises ValueError for settings or sources that cannot be used, and OSError as the disk does;
    either way nothing of this run is left behind.
    """
    check_settings(cfg)
    folder = Path(cfg.data_dir)
    settings = {
        k: v for k, v in asdict(cfg).items() if k not in ("data_dir", "workers", "overwrite")
    }
    old = check_target(folder, settings, cfg.overwrite)
    if old and not cfg.overwrite:
        print(f"{folder} is already prepared with these settings (--overwrite to do it again)")
        return old
    train, val = find_documents(cfg.sources), []
    if cfg.val_sources:
        val = find_documents(cfg.val_sources)
        both = {document.path for document in train} & {document.path for document in val}
        if both:
            raise ValueError(f"{min(both)} is in sources and in val_sources")
    elif cfg.val_fraction:
        train, val = split_documents(train, cfg.val_fraction, cfg.seed)

    partial = folder / data.PARTIAL
    existed, repairing = folder.exists(), partial.exists()
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        tokenizer = make_tokenizer(cfg, train)
        tokenizer.save(partial)
        splits = {"train": write_split(partial, "train", train, tokenizer, cfg)}
        if val:
            splits["val"] = write_split(partial, "val", val, tokenizer, cfg)
        manifest = {
            "format": 1,
            "settings": settings,
            "template": None,
            "vocab_size": tokenizer.vocab_size,
            "tokenizer": tokenizer.fingerprint,
            "splits": splits,
        }
        text = json.dumps(manifest, indent=1) + "\n"
        (partial / "dataset.json").write_text(text, encoding="utf-8")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if not existed:
            shutil.rmtree(folder, ignore_errors=True)
        elif repairing:  # still the mark of a folder that is half ours
            partial.mkdir()
        raise
    install(partial, folder)
    report(folder, manifest)
    return manifest


def check_settings(cfg: PrepareConfig) -> None:
    """Raises ValueError that lists all values out of range."""
    problems = []
    if not cfg.sources:
        problems.append("sources is empty")
    if not 257 <= cfg.vocab_size <= MAX_VOCAB_SIZE:
        problems.append(f"vocab_size must be from 257 to {MAX_VOCAB_SIZE}, not {cfg.vocab_size}")
    if not 0 <= cfg.val_fraction < 1:
        problems.append(f"val_fraction must be in [0, 1), not {cfg.val_fraction}")
    if not 1 <= cfg.shard_tokens < 2**31:
        problems.append(f"shard_tokens must be from 1 to 2**31 - 1, not {cfg.shard_tokens}")
    for name in ("workers", "seed"):
        if getattr(cfg, name) < 0:
            problems.append(f"{name} must not be negative")
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
        foreign = sorted(path.name for path in folder.glob("*") if FOREIGN.fullmatch(path.name))
        if foreign and not (folder / data.PARTIAL).exists():
            raise ValueError(
                f"{folder} holds {foreign[0]}, which prepare.py did not make: use another data_dir"
            )
        return {}
    old = data.read_manifest(folder)
    if "settings" not in old:
        raise ValueError(f"{folder}/dataset.json is not of prepare.py: use another data_dir")
    now = json.loads(json.dumps(settings))
    changed = [name for name in now if old["settings"].get(name) != now[name]]
    if changed and not overwrite:
        words = [
            f"{name} was {old['settings'].get(name)!r}, is now {now[name]!r}" for name in changed
        ]
        raise ValueError(
            f"{folder} was prepared with other settings: {'; '.join(words)}. "
            "Use --overwrite, or another --data_dir"
        )
    return old


def install(partial: Path, folder: Path) -> None:
    """Move the finished files from `partial` to `folder`, the manifest last.

    A kill in the middle leaves `partial` but no manifest: data.py refuses such a folder, and
    prepare.py may do it again.
    """
    (folder / "dataset.json").unlink(missing_ok=True)
    for path in folder.glob("*.bin"):
        if OUR_SHARD.fullmatch(path.name):
            path.unlink()
    for path in sorted(partial.iterdir(), key=lambda path: path.name == "dataset.json"):
        path.replace(folder / path.name)
    partial.rmdir()


def report(folder: Path, manifest: dict[str, Any]) -> None:
    for name, split in manifest["splits"].items():
        print(
            f"{name}: {split['documents']:,} documents, {split['bytes']:,} bytes, "
            f"{split['tokens']:,} tokens ({split['bytes'] / split['tokens']:.2f} bytes per token)"
        )
    print(f"wrote {folder}, with a vocabulary of {manifest['vocab_size']:,} ids")


def main(argv: list[str] | None = None) -> int:
    return configurator.command(PrepareConfig, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
