"""Printed summaries of a data folder, and checks that nothing in it has changed."""

from itertools import pairwise
from pathlib import Path

import numpy as np

from configurator import UserError
from plaingpt.checksums import sha256_of
from plaingpt.text.dataset import MANIFEST, Manifest, SplitName, open_dataset
from plaingpt.text.shards import Split, shard_paths
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.wording import quantity

BEGINNING = 300  # tokens of a split that are shown


def inspect(folder: Path) -> Manifest | None:
    """Print a folder's summary, check all hashes and ids, show how the splits begin; return the
    manifest.

    Raises UserError for the first thing that is wrong.
    """
    data = open_dataset(folder)
    manifest, tokenizer = data.manifest, data.tokenizer
    if manifest:
        report(manifest)
        check_hashes(folder, manifest)
        if tokenizer.fingerprint != manifest.tokenizer:
            raise UserError(f"{folder}/tokenizer.json is not the tokenizer in {MANIFEST}")
    names: tuple[SplitName, ...] = ("train", "val")
    for name in names:
        if not shard_paths(folder, name):
            continue
        split = data.split(name)
        split.check_ids()
        checked = "all hashes match" if manifest else "no manifest to check against"
        print(f"\n{name}: {quantity(len(split), 'token')}, {checked}; it begins")
        if len(split):
            print(beginning(split, tokenizer))
    return manifest


def report(manifest: Manifest) -> None:
    """Print what each source gave, and how much each split holds."""
    for source in manifest.sources:
        rest = "" if source.ended else ", not read to the end"
        documents, tokens = quantity(source.documents, "document"), quantity(source.tokens, "token")
        print(f"{source.source}: {documents}, {tokens}{rest}")
        for reason, (count, where) in source.dropped.items():
            print(f"  skipped {count:,}: {reason} (the first: {where})")
    splits = manifest.splits
    for name, split in splits.items():
        rate = split.bytes / max(1, split.tokens)
        print(
            f"{name}: {quantity(split.documents, 'document')}, {quantity(split.bytes, 'byte')}, "
            f"{quantity(split.tokens, 'token')} ({rate:.2f} bytes per token)"
        )
        if split.trained_on:
            left_out = quantity(split.trained_on, "document")
            print(f"  {left_out} left out: also in the training split")
    if not (splits.train and splits.train.bytes):
        print("train: empty, but train.py needs some: use more documents")
    if not (splits.val and splits.val.bytes):
        print("val: empty, but train.py needs some: try --val_fraction, or more documents")


def check_hashes(folder: Path, manifest: Manifest) -> None:
    """Raises UserError for a shard or mask whose hash differs from the manifest's."""
    for name, wanted in manifest.hashes().items():
        if sha256_of(folder / name) != wanted:
            raise UserError(f"{folder / name} has changed since it was written (sha256)")


def beginning(split: Split, tokenizer: Tokenizer) -> str:
    """The first tokens of a split as text; those that count in the loss are between ⟦ and ⟧."""
    stop = min(BEGINNING, len(split))
    ids, mask = split[0:stop], split.mask(0, stop)
    if mask is None:
        return tokenizer.decode(ids.tolist())
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), stop]
    parts = []
    for start, end in pairwise(edges):
        text = tokenizer.decode(ids[start:end].tolist())
        parts.append(f"⟦{text}⟧" if mask[start] else text)
    return "".join(parts)
