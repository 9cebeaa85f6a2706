"""A data folder: its manifest (dataset.json), tokenizer and splits."""

import hashlib
from pathlib import Path

from configurator import UserError
from plaingpt.text.shards import PARTIAL, Split, read_manifest, shard_paths  # noqa: F401
from plaingpt.text.tokenizer import Tokenizer


def data_fingerprint(data_dir: Path | str) -> str:
    """The same for two folders exactly if they hold the same training tokens and masks.

    From the hashes in the manifest; from names and sizes for a folder that has none.
    """
    entries = read_manifest(data_dir).get("splits", {}).get("train", {}).get("shards")
    if entries is None:
        paths = shard_paths(Path(data_dir), "train")
        known = [f"{path.name} {path.stat().st_size}" for path in paths]
    else:
        known = [entry["sha256"] + entry.get("mask_sha256", "") for entry in entries]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()[:16]


def statistics(data_dir: Path | str) -> dict[str, dict[str, int]]:
    """Documents, bytes and tokens of each split, as far as a manifest counted them."""
    splits = read_manifest(data_dir).get("splits", {})
    names = ("documents", "bytes", "tokens")
    return {name: {key: split[key] for key in names} for name, split in splits.items()}


def bytes_per_token(split: Split) -> float | None:
    """Bytes of UTF-8 text per token of a split; None where no manifest counted them, and where a
    mask leaves tokens out."""
    counts = statistics(split.folder).get(split.name)
    if split.has_mask:
        return None
    return counts["bytes"] / counts["tokens"] if counts and counts["tokens"] else None


def load_tokenizer(data_dir: Path | str) -> Tokenizer:
    """The tokenizer of a folder. Shards of llm.c and nanoGPT come without one and are GPT-2's.

    Raises UserError for a damaged one, and for nanoGPT's characters, which are no bytes.
    """
    folder = Path(data_dir)
    if (folder / "tokenizer.json").exists() or read_manifest(folder):
        return Tokenizer.load(folder)
    if not shard_paths(folder, "train"):
        raise UserError(f"{folder} has no train shards ({folder}/train_000000.bin, …)")
    if (folder / "meta.pkl").exists():
        raise UserError(
            f"{folder} holds nanoGPT's characters, whose table is a pickle: not read. "
            "Prepare its input.txt with --tokenizer=bytes"
        )
    print(f"{folder} has no tokenizer.json: taking its ids for GPT-2's")
    return Tokenizer.gpt2()
