"""
Shards of tokens on disk, and the order in which a run reads them.

A shard is `{train,val}_000000.bin`: a header of 256 int32 (magic 20240520, version 1, number of
tokens) and then the tokens as little-endian uint16, the format of llm.c and modded-nanogpt. A file
without the magic is read as nanoGPT's, tokens only. Beside it, `…_000000.mask.bin` may hold a byte
a token, 1 where the token counts in the loss. `dataset.json` is the manifest; it is written last,
so a folder that has one is whole.

Shapes: B sequences, T tokens each (block_size).
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runtime import Runtime
from tokenizer import Tokenizer

MAGIC, VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
PARTIAL = ".partial"  # where prepare.py builds the files of a folder

Batch = tuple[Tensor, Tensor, Tensor | None]  # inputs, targets and their loss mask, each (B, T)


class Split:
    """The tokens of one split, "train" or "val", over all of its shards, memory-mapped.

    `split[a:b]` gives tokens as int64; `split.mask(a, b)` their loss mask, or None without one.
    """

    def __init__(self, data_dir: Path | str, name: str, vocab_size: int) -> None:
        """Raises ValueError for missing or truncated shards, and for ids from vocab_size on."""
        self.name, self.folder = name, Path(data_dir)
        folder = self.folder
        manifest = read_manifest(folder)
        paths = shard_paths(folder, name)
        if manifest:
            entries = manifest.get("splits", {}).get(name, {}).get("shards", [])
            for entry in entries:
                if folder / entry["file"] not in paths:
                    missing = f"{entry['file']}, which is missing"
                    raise ValueError(f"{folder}/dataset.json lists {missing}")
                mask = mask_path(folder / entry["file"])
                if "mask_sha256" in entry and not mask.exists():
                    raise ValueError(f"{mask} is missing: without it all would count in the loss")
            paths = [folder / entry["file"] for entry in entries]
        if not paths:
            raise ValueError(f"{folder} has no {name} shards ({name}_000000.bin, …)")
        self.shards = [open_shard(path) for path in paths]
        for path, shard in zip(paths, self.shards):
            largest = int(shard.max(initial=0))
            if largest >= vocab_size:
                where = int(np.argmax(shard >= vocab_size))
                raise ValueError(
                    f"{path}: id {int(shard[where])} at token {where} is beyond the vocabulary "
                    f"of {vocab_size}; the shard is damaged or of another tokenizer"
                )
        masks = [mask_path(path) for path in paths]
        self.masks = [
            open_mask(mask, len(shard)) if mask.exists() else None
            for mask, shard in zip(masks, self.shards)
        ]
        self.starts = np.cumsum([0] + [len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def has_mask(self) -> bool:
        """Whether some token may not count in the loss."""
        return any(mask is not None for mask in self.masks)

    def __getitem__(self, window: slice) -> np.ndarray:
        pieces = [self.shards[i][a:b] for i, a, b in self._pieces(window.start, window.stop)]
        return np.concatenate(pieces).astype(np.int64)

    def mask(self, start: int, stop: int) -> np.ndarray | None:
        """Float 0/1 of tokens start … stop - 1, or None if no shard of the split has a mask."""
        if not self.has_mask:
            return None
        pieces = []
        for i, a, b in self._pieces(start, stop):
            mask = self.masks[i]
            pieces.append(np.ones(b - a) if mask is None else mask[a:b])
        return np.concatenate(pieces).astype(np.float32)

    def _pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """(shard, from, to) that together are tokens start … stop - 1."""
        assert 0 <= start <= stop <= len(self)
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < stop:
            offset, end = int(self.starts[shard]), min(stop, int(self.starts[shard + 1]))
            yield shard, start - offset, end - offset
            start, shard = end, shard + 1


def mask_path(shard: Path) -> Path:
    return shard.with_name(f"{shard.stem}.mask.bin")


def shard_paths(folder: Path, name: str) -> list[Path]:
    """`train_000000.bin`, nanoGPT's `train.bin` or llm.c's `…_train_000000.bin`, in order."""
    pattern = re.compile(rf"(.*_)?{name}(_\d+)?\.bin")
    return sorted(path for path in folder.glob("*.bin") if pattern.fullmatch(path.name))


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


def open_shard(path: Path) -> np.ndarray:
    """Map the tokens of a shard, ours or nanoGPT's headerless one.

    Raises ValueError where the length is not what the header says.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header = np.frombuffer(file.read(HEADER_BYTES)[: size // 4 * 4], dtype="<i4")
    if len(header) == 0 or header[0] != MAGIC:
        if size == 0 or size % 2:
            raise ValueError(f"{path} has {size} bytes, which is not a whole number of uint16 ids")
        return np.memmap(path, dtype="<u2", mode="r")
    if len(header) < 256 or header[1] != VERSION:
        raise ValueError(f"{path} has a shard's magic, but not a header of version {VERSION}")
    tokens = int(header[2])
    if size != HEADER_BYTES + 2 * tokens:
        raise ValueError(
            f"{path} has {size:,} bytes, but its header promises {tokens:,} tokens = "
            f"{HEADER_BYTES + 2 * tokens:,} bytes: it was cut off or overwritten"
        )
    if tokens == 0:
        return np.empty(0, dtype="<u2")
    return np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES)


def open_mask(path: Path, tokens: int) -> np.ndarray:
    if path.stat().st_size != tokens:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes for {tokens:,} tokens")
    return np.memmap(path, dtype=np.uint8, mode="r") if tokens else np.empty(0, np.uint8)


def read_manifest(data_dir: Path | str) -> dict[str, Any]:
    """`dataset.json` of a folder, or {} for a folder of someone else's shards.

    Raises ValueError where the folder is missing or the manifest is not JSON.
    """
    folder = Path(data_dir)
    if not folder.is_dir():
        raise ValueError(f"there is no data in {folder}; prepare.py --data_dir={folder} makes it")
    try:
        manifest = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / PARTIAL).exists():
            raise ValueError(
                f"{folder} is half prepared: run its prepare.py command again"
            ) from None
        return {}
    except ValueError as error:
        raise ValueError(f"{folder}/dataset.json is damaged: {error}") from None
    if not isinstance(manifest, dict):
        raise ValueError(f"{folder}/dataset.json is damaged: it holds no object")
    return manifest


def load_tokenizer(data_dir: Path | str) -> Tokenizer:
    """The tokenizer of a folder. Shards of llm.c and nanoGPT come without one and are GPT-2's.

    Raises ValueError for a damaged one, and for nanoGPT's characters, which are no bytes.
    """
    folder = Path(data_dir)
    if (folder / "tokenizer.json").exists() or read_manifest(folder):
        return Tokenizer.load(folder)
    if not shard_paths(folder, "train"):
        raise ValueError(f"{folder} has no train shards ({folder}/train_000000.bin, …)")
    if (folder / "meta.pkl").exists():
        raise ValueError(
            f"{folder} holds nanoGPT's characters, whose table is a pickle: not read. "
            "Prepare its input.txt with --tokenizer=bytes"
        )
    print(f"{folder} has no tokenizer.json: taking its ids for GPT-2's")
    return Tokenizer.gpt2()


# --- the order of batches


def permute(index: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """Where a pseudo-random permutation of range(size), chosen by `key`, sends each index.

    Any position on demand in O(1) memory: a four-round Feistel network on the smallest even number
    of bits that holds `size`, walked until it lands inside (Black & Rogaway 2002).
    """
    half = max(1, math.ceil((size - 1).bit_length() / 2))
    low = np.uint64(2**half - 1)
    shift = np.uint64(half)
    rounds = np.random.SeedSequence(key).generate_state(4, np.uint64)
    result = index.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right = result[outside] >> shift, result[outside] & low
        for constant in rounds:
            left, right = right, left ^ (scramble(right + constant) & low)
        result[outside] = left << shift | right
        outside = result >= size
    return result.astype(np.int64)


def scramble(x: np.ndarray) -> np.ndarray:
    """A mixer of 64-bit integers whose every output bit depends on every input bit (splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Batches:
    """Training batches as a pure function of (seed, step): nothing to save, nothing to replay.

    Sequence number i = step · batch_size + position reads window i mod n of epoch i // n, where n
    windows start every `stride` tokens and each epoch has its own order.
    """

    split: Split
    batch_size: int
    block_size: int
    seed: int
    stride: int

    def __post_init__(self) -> None:
        """Raises ValueError for a split that holds less than one window."""
        check_length(self.split, self.block_size)

    @property
    def windows(self) -> int:
        return (len(self.split) - self.block_size - 1) // self.stride + 1

    def starts(self, step: int) -> np.ndarray:
        """The first token (B,) of each window of a step's batch."""
        number = step * self.batch_size + np.arange(self.batch_size)
        epochs, places = number // self.windows, number % self.windows
        order = np.empty_like(places)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            order[here] = permute(places[here], self.windows, (self.seed, int(epoch)))
        return order * self.stride

    def __call__(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """Inputs and targets, int64 (B, T), and the loss mask of the targets, float (B, T), or None
        if all count; of several processes each gets its share, B = batch_size / world_size."""
        share = self.batch_size // world_size
        starts = self.starts(step)[rank * share : (rank + 1) * share]
        return windows_at(self.split, starts, self.block_size)

    def ahead(self, steps: range, rt: Runtime) -> Iterator[Batch]:
        """This process's batch of each step, on its device. A thread reads the next one, and
        queues its copy to a GPU behind the step that runs."""

        def read(step: int) -> Batch:
            x, y, mask = self(step, rt.rank, rt.world_size)
            return on_device(x, rt), on_device(y, rt), None if mask is None else on_device(mask, rt)

        with ThreadPoolExecutor(1) as reader:
            coming = [reader.submit(read, step) for step in steps[:1]]
            for step in steps:
                batch = coming.pop().result()
                if step + 1 in steps:
                    coming.append(reader.submit(read, step + 1))
                yield batch


def on_device(tensor: Tensor, rt: Runtime) -> Tensor:
    if rt.device.type == "cuda":
        return tensor.pin_memory().to(rt.device, non_blocking=True)
    return tensor.to(rt.device)


def check_length(split: Split, block_size: int) -> None:
    """Raises ValueError for a split that holds less than one window."""
    if len(split) < block_size + 1:
        raise ValueError(
            f"the {split.name} split has {len(split):,} tokens, but one window takes "
            f"block_size + 1 = {block_size + 1:,}: use more text or a smaller --block_size"
        )


def windows_at(split: Split, starts: np.ndarray, block_size: int) -> Batch:
    tokens = torch.from_numpy(np.stack([split[s : s + block_size + 1] for s in starts]))
    masks = [split.mask(s + 1, s + block_size + 1) for s in starts]
    mask = None if masks[0] is None else torch.from_numpy(np.stack(masks))  # type: ignore[arg-type]
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask


def validation_batches(
    split: Split,
    batch_size: int,
    block_size: int,
    max_tokens: int | None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Fixed windows of a split, evenly spread, as (inputs, targets, mask), each (B, T).

    Raises ValueError for a split that holds less than one window.

    Without `max_tokens` every token but the first is the target of exactly one window: the last
    window reaches back to be full, and its mask leaves out what was counted before. Several
    processes take turns at the batches, each as many as the others: what is missing to that is a
    window whose mask is all zeros.
    """
    check_length(split, block_size)
    targets = len(split) - 1
    windows = math.ceil(targets / block_size)
    chosen = windows if max_tokens is None else min(windows, max(1, max_tokens // block_size))
    numbers = np.arange(chosen) * windows // chosen
    for first in range(0, chosen, batch_size * world_size):
        here = first + rank * batch_size
        wanted = numbers[here : here + batch_size] * block_size
        nothing = not len(wanted)
        wanted = numbers[:1] * block_size if nothing else wanted
        starts = np.minimum(wanted, targets - block_size)
        x, y, mask = windows_at(split, starts, block_size)
        mask = torch.ones(y.shape) if mask is None else mask
        for row, again in enumerate(wanted - starts):
            mask[row, : block_size if nothing else again] = 0
        yield x, y, mask
