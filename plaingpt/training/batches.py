"""The windows of a split, and the order in which a run reads them.

Shapes: B sequences, T tokens each (block_size).
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configurator import UserError
from plaingpt.runtime import Runtime
from plaingpt.text.shards import Split
from plaingpt.wording import quantity

Batch = tuple[Tensor, Tensor, Tensor | None]  # inputs, targets and their loss mask, each (B, T)


def permute(index: np.ndarray, size: int, key: tuple[int, ...]) -> np.ndarray:
    """The image of each index under a pseudo-random permutation of range(size), chosen by `key`.

    Any position is computed on demand in O(1) memory: a four-round Feistel network on the smallest
    even number of bits that holds `size`, iterated until it lands inside (Black & Rogaway 2002).
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
    """Mix 64-bit integers so that each output bit depends on every input bit (splitmix64)."""
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
        """Raises UserError if the split holds less than one window."""
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
        if all count. Each process gets its share: B = batch_size / world_size.

        Raises UserError for ids outside the vocabulary.
        """
        share = self.batch_size // world_size
        starts = self.starts(step)[rank * share : (rank + 1) * share]
        return windows_at(self.split, starts, self.block_size)

    def ahead(self, steps: range, rt: Runtime) -> Iterator[Batch]:
        """The batch of each step, on this process's device. While a step runs, a thread reads the
        next batch and queues its copy to a GPU."""

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
    """Raises UserError if a split holds less than one window."""
    if len(split) < block_size + 1:
        raise UserError(
            f"the {split.name} split has {quantity(len(split), 'token')}, but one window takes "
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
    """Fixed windows of a split, evenly spaced, as (inputs, targets, mask), each (B, T).

    Without `max_tokens` every token but the first is the target of exactly one window: the last
    window reaches back to be full, and its mask excludes the targets counted before. Processes take
    turns at the batches, all the same number of times. All batches have the same shape: rows for
    which no window is left have a mask of zeros.

    Raises UserError if the split holds less than one window.
    """
    check_length(split, block_size)
    targets = len(split) - 1
    windows = math.ceil(targets / block_size)
    chosen = windows if max_tokens is None else min(windows, max(1, max_tokens // block_size))
    numbers = np.arange(chosen) * windows // chosen
    rows = min(batch_size, math.ceil(chosen / world_size))
    for first in range(0, chosen, rows * world_size):
        here = first + rank * rows
        wanted = numbers[here : here + rows] * block_size
        starts = np.zeros(rows, np.int64)
        starts[: len(wanted)] = np.minimum(wanted, targets - block_size)
        x, y, mask = windows_at(split, starts, block_size)
        mask = torch.ones(y.shape) if mask is None else mask
        mask[len(wanted) :] = 0
        for row, repeated in enumerate(wanted - starts[: len(wanted)]):
            mask[row, :repeated] = 0
        yield x, y, mask
