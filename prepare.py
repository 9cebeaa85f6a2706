"""
Text → shards of tokens, in data_dir.

    python prepare.py                                           # Python's standard library
    python prepare.py --sources="novel.txt,notes/" --data_dir=data/mine --vocab_size=8192
    python prepare.py --sources=talks.jsonl --template=chat --tokenizer=gpt2 --data_dir=data/talks
    python prepare.py config/data_fineweb.py                    # a recipe for a dataset of the hub
    torchrun --nproc_per_node=4 prepare.py config/data_fineweb.py    # in several processes
    python prepare.py --inspect=data/mine                       # describe a folder and check it
    python prepare.py --inspect="def main():" --tokenizer=bpe,gpt2,bytes  # a text in their tokens

plaingpt/text/sources.py says what a source can be, templates.py what a template does. Documents
are separated by `<|endoftext|>`. Killed at any moment, the same command resumes and ends with the
same bytes.
"""

import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import configurator
from configurator import Folder, FractionBelow1, NonNegativeInt, PathName, PositiveInt, Range
from plaingpt.text.templates import TemplateName

Sources = Annotated[tuple[PathName, ...], Range("non-empty", bool)]
VocabSize = Annotated[int, Range("from 257 to 65,536", lambda value: 257 <= value <= 65_536)]
ShardTokens = Annotated[int, Range("from 1 to 2**31 - 1", lambda value: 1 <= value < 2**31)]


@dataclass(frozen=True)
class PrepareConfig:
    # text
    sources: Sources = ("stdlib",)  # stdlib, files, folders, patterns, hf:…; …=0.3: weight
    val_sources: tuple[PathName, ...] = ()  # what to validate on; empty: a share of sources
    template: TemplateName = "text"  # how a record becomes text: text, alpaca, chat, synth
    text_field: str = "text"  # the record's field that template=text takes
    bad_records: Literal["refuse", "skip"] = "refuse"  # what to do with malformed records
    max_record_tokens: PositiveInt | None = None  # longer records are bad; None: no limit
    # how much of it
    val_fraction: FractionBelow1 = 0.05  # share to validate on if val_sources is empty
    val_tokens: PositiveInt | None = None  # at most, of sources; the rest is trained on
    max_tokens: PositiveInt | None = None  # tokens to take from sources; None: all
    max_documents: PositiveInt | None = None  # documents to take from sources; None: all
    # tokens
    tokenizer: PathName = "bpe"  # bpe (trained on the text), bytes, gpt2, a run, a tokenizer.json
    vocab_size: VocabSize = 4096  # of a trained bpe, at most 65,536
    # output
    data_dir: Folder = "data/stdlib"  # where the shards go
    shard_tokens: ShardTokens = 100_000_000  # tokens per shard
    seed: NonNegativeInt = 1337  # chooses the documents to validate on
    overwrite: bool = False  # replace a data_dir that was made with other settings
    workers: NonNegativeInt = 0  # threads that tokenize in each process; 0: one more than its cores
    inspect: Folder | None = None  # a data_dir to describe and check, or a text to show as tokens


if __name__ == "__main__":
    configurator.answer_help(PrepareConfig)  # before the imports that take longer than the help

import math
import os
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from configurator import UserError
from plaingpt.checkpoint.folders import step_folders
from plaingpt.environment import rank_and_size, restartable
from plaingpt.files import Settings, write_json
from plaingpt.locks import locked
from plaingpt.prompts import read_prompt
from plaingpt.text import dataset
from plaingpt.text.builder import Limits, SplitBuilder
from plaingpt.text.comparison import compare
from plaingpt.text.dataset import Manifest
from plaingpt.text.documents import Reading, Stream, open_streams, sample_texts
from plaingpt.text.encoding import Encoder, default_threads, encoded
from plaingpt.text.group import Group
from plaingpt.text.hub import hub_hash, impatient
from plaingpt.text.inspection import inspect, report
from plaingpt.text.parts import FOLDER as PARTS
from plaingpt.text.parts import Parts
from plaingpt.text.preview import check_source
from plaingpt.text.progress import (
    Progress,
    changed_settings,
    check_settings_unchanged,
    digest_of,
    inputs_of,
    read_progress,
)
from plaingpt.text.sources import folder_for
from plaingpt.text.target import (
    check_inputs,
    check_outside,
    check_target,
    install,
    only_install_left,
)
from plaingpt.text.templates import CHAT_TEMPLATES
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.text.validation import Validation
from plaingpt.wording import byte_size

SAMPLE_BYTES = 50_000_000  # text that a BPE is trained on, at most


def prepare(cfg: PrepareConfig) -> Manifest | None:
    """Make `cfg.data_dir`, unless it has been made already; return its manifest.

    Raises UserError for settings or sources that cannot be used and if another process prepares the
    folder, OSError for trouble with the disk or the network. The same command then resumes from the
    last saved progress; if nothing was saved yet, nothing is left behind.
    """
    configurator.validate(cfg, problems_of(cfg))
    if cfg.inspect and is_text(cfg.inspect):
        compare(read_prompt(cfg.inspect, "inspect"), named_tokenizers(cfg))
        return None
    if cfg.inspect is not None:
        return inspect(Path(cfg.inspect))
    rank, size = rank_and_size()
    folder = Path(cfg.data_dir)
    partial = folder / dataset.PARTIAL
    unsaved = ("data_dir", "workers", "overwrite", "inspect")
    settings = {name: value for name, value in asdict(cfg).items() if name not in unsaved}
    old = check_target(folder)
    if old and not cfg.overwrite:
        if changed_settings(old.settings or {}, settings):
            # Report their mistakes first.
            open_streams(cfg.sources, cfg.val_sources, reading_of(cfg))
        check_settings_unchanged(folder, "was prepared", old.settings or {}, settings)
        check_inputs(old, (*cfg.sources, *cfg.val_sources), folder)
        if rank == 0:
            print(f"{folder} is already prepared with these settings (--overwrite to do it again)")
        return old
    group = Group(folder, rank, size, digest_of(settings))
    if rank > 0:
        return assist(cfg, folder, group, settings)
    with locked(folder), group.beating():
        if check_target(folder) != old:
            raise UserError(f"{folder} was prepared by another process: run this command again")
        if not only_install_left(partial, settings, cfg.overwrite):
            build(cfg, folder, group, settings)
        group.stage = "done"
        group.wait_for_others()
        manifest = install(partial, folder)
    report(manifest)
    print(f"wrote {folder}, with a vocabulary of {manifest.vocab_size:,} ids")
    return manifest


def build(cfg: PrepareConfig, folder: Path, group: Group, settings: Settings) -> None:
    """Write everything to the folder PARTIAL, from where an earlier run left off."""
    reading, partial = reading_of(cfg), folder / dataset.PARTIAL
    streams = open_streams(cfg.sources, cfg.val_sources, reading)
    check_outside(folder, [stream.source.name for stream in streams])
    local = inputs_of((*cfg.sources, *cfg.val_sources))
    with impatient([stream.source.hub for stream in streams if stream.source.hub]):
        hub = {s.source.name: hub_hash(s.source.hub) for s in streams if s.source.hub}
        progress = read_progress(partial, settings, {**local, **hub}, cfg.overwrite)
        if not progress.notes.streams:
            for stream in streams:
                check_source(stream, reading)
    announce_left_out(cfg, streams)
    repairing = partial.exists()
    try:
        tokenizer = open_tokenizer(cfg, progress, streams, reading)
        announce_size(cfg, streams, folder)
        builder = SplitBuilder(progress, tokenizer, streams, reading, limits_of(cfg))
        with encoder(cfg, reading, tokenizer) as encode:
            if group.size == 1:
                builder.run(encode)
            else:
                parts = Parts(partial / PARTS, group, streams, reading.fields, encode)
                group.stage = "encoding"
                builder.run(parts.merged)
        manifest = Manifest(
            settings=settings,
            template=cfg.template,
            vocab_size=tokenizer.vocab_size,
            tokenizer=tokenizer.fingerprint,
            splits=builder.finish(),
            sources=tuple(stream.summary() for stream in streams),
            inputs=digest_of(local),
        )
        write_json(partial / dataset.MANIFEST, manifest)
    except BaseException:
        if not progress.was_saved:
            shutil.rmtree(partial, ignore_errors=True)
            if repairing:  # its presence marks an unfinished data folder
                partial.mkdir()
        raise


def assist(cfg: PrepareConfig, folder: Path, group: Group, settings: Settings) -> Manifest | None:
    """In processes other than 0: encode a share of the sources, which process 0 puts in place."""

    def is_prepared() -> bool:
        old = None if cfg.overwrite else check_target(folder)
        return old is not None and not changed_settings(old.settings or {}, settings)

    if not group.wait_for_first(is_prepared):
        return check_target(folder)
    with group.beating():
        if not group.is_done():
            partial, reading = folder / dataset.PARTIAL, reading_of(cfg)
            streams = open_streams(cfg.sources, cfg.val_sources, reading)
            with encoder(cfg, reading, Tokenizer.load(partial)) as encode:
                Parts(partial / PARTS, group, streams, reading.fields, encode).help()
        group.stage = "done"
    return None


@contextmanager
def encoder(cfg: PrepareConfig, reading: Reading, tokenizer: Tokenizer) -> Iterator[Encoder]:
    """A function that reads a stream and encodes it in threads."""
    threads = cfg.workers or default_threads()
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as hasher:
        yield lambda stream: encoded(stream, reading, tokenizer, pool, hasher, threads + 1)


def problems_of(cfg: PrepareConfig) -> Iterator[str]:
    """Problems that no `Range` can express."""
    if cfg.val_sources and cfg.val_fraction not in (0, PrepareConfig.val_fraction):
        yield "val_fraction does not combine with val_sources: leave it out"
    if cfg.overwrite and restartable():  # a restart could not tell what to replace
        yield f"--overwrite does not combine with --max-restarts: remove {cfg.data_dir}"


def reading_of(cfg: PrepareConfig) -> Reading:
    return Reading(
        cfg.template,
        cfg.text_field,
        cfg.bad_records,
        validation_of(cfg),
        cfg.max_record_tokens or math.inf,
    )


def folder_of(cfg: PrepareConfig) -> str:
    """The data_dir that was given, or one that suits the sources."""
    return folder_for(cfg.sources[0]) if cfg.data_dir == PrepareConfig.data_dir else cfg.data_dir


def validation_of(cfg: PrepareConfig) -> Validation:
    """Without val_sources, max_tokens and max_documents limit validation in proportion."""
    tokens, documents = cfg.val_tokens or math.inf, math.inf
    if cfg.val_sources:
        return Validation(0.0, cfg.seed, tokens, documents)
    if cfg.max_tokens:
        tokens = min(tokens, round(cfg.val_fraction * cfg.max_tokens))
    if cfg.max_documents:
        documents = math.ceil(cfg.val_fraction * cfg.max_documents)
    return Validation(cfg.val_fraction, cfg.seed, tokens, documents)


def limits_of(cfg: PrepareConfig) -> Limits:
    return Limits(
        max_tokens=cfg.max_tokens or math.inf,
        max_documents=cfg.max_documents or math.inf,
        shard_tokens=cfg.shard_tokens,
    )


def open_tokenizer(
    cfg: PrepareConfig, progress: Progress, streams: list[Stream], reading: Reading
) -> Tokenizer:
    """The tokenizer of the run being resumed, or a new one, for which the folder is emptied."""
    if progress.notes.streams:
        print(f"resuming {progress.folder.parent}")
        return Tokenizer.load(progress.folder)
    shutil.rmtree(progress.folder, ignore_errors=True)
    progress.folder.mkdir(parents=True)
    tokenizer = make_tokenizer(cfg, streams, reading)
    tokenizer.chat_template = CHAT_TEMPLATES.get(cfg.template)
    tokenizer.save(progress.folder)
    return tokenizer


def make_tokenizer(cfg: PrepareConfig, streams: list[Stream], reading: Reading) -> Tokenizer:
    if cfg.tokenizer != "bpe":
        return find_tokenizer(cfg.tokenizer)
    tokenizer = Tokenizer.train(sample_texts(streams, reading, SAMPLE_BYTES), cfg.vocab_size)
    if tokenizer.vocab_size < cfg.vocab_size:
        size = f"{tokenizer.vocab_size:,} ids, not {cfg.vocab_size:,}"
        print(f"BPE: {size}: the text is too short or too uniform for more", file=sys.stderr)
    return tokenizer


def find_tokenizer(name: str) -> Tokenizer:
    """One that exists: gpt2, bytes, or that of a run or a folder. Raises UserError without one."""
    if name == "gpt2":
        return Tokenizer.gpt2()
    if name == "bytes":
        return Tokenizer.bytes()
    if not Path(name).exists():
        raise UserError(f"tokenizer={name!r} is not bpe, bytes or gpt2, and does not exist")
    steps = step_folders(name)  # of a run, which all have the same
    return Tokenizer.load(steps[-1] if steps else name)


# --- a text to show as tokens


def is_text(inspected: str) -> bool:
    """Whether --inspect holds a text, as FILE:path or itself, and not a folder or what looks like
    its path: words without white space and with a slash."""
    if inspected.startswith("FILE:"):
        return True
    like_a_path = re.fullmatch(r"\S*[/\\]\S*" if os.sep == "\\" else r"\S*/\S*", inspected)
    return not (os.path.isdir(inspected) or like_a_path)


def named_tokenizers(cfg: PrepareConfig) -> dict[str, Tokenizer]:
    """The tokenizers that --tokenizer names, several with commas between; bpe: that of data_dir.

    Raises UserError if one cannot be found.
    """
    found = {}
    for name in cfg.tokenizer.split(","):
        if name == "bpe":
            found[cfg.data_dir] = dataset.open_dataset(cfg.data_dir).tokenizer
        else:
            found[name] = find_tokenizer(name)
    return found


def announce_left_out(cfg: PrepareConfig, streams: list[Stream]) -> None:
    """Say which files are left out, and if the template applies to none."""
    for stream in streams:
        for reason, (count, where) in stream.dropped.items():
            left_out = f"left out {count:,}: {reason} (the first: {where})"
            print(f"{stream.source.name}: {left_out}", file=sys.stderr)
    if cfg.template != "text" and all(stream.is_plain_text for stream in streams):
        what = "text files, and all of their text counts in the loss"
        print(f"--template={cfg.template} is for records: the sources are {what}", file=sys.stderr)


def announce_size(cfg: PrepareConfig, streams: list[Stream], folder: Path) -> None:
    """Say how much room the shards will take, where that can be estimated."""
    sizes = [stream.source.size for stream in streams]
    free = shutil.disk_usage(folder).free
    per_byte = 2.0 if cfg.tokenizer == "bytes" else 0.6  # bytes of shards per byte of text, roughly
    if cfg.max_tokens:
        needed: float = 2 * cfg.max_tokens
    elif all(sizes) and not any(stream.source.is_compressed for stream in streams):
        needed = per_byte * sum(sizes)
    else:
        return
    room = f"{byte_size(free)} free in {folder}"
    print(f"about {byte_size(needed)} of shards to write, {room}", file=sys.stderr)


def main(argv: list[str] | None = None) -> int:
    return configurator.command(PrepareConfig, prepare, argv)


if __name__ == "__main__":
    sys.exit(main())
