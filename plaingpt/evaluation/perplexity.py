"""Perplexity and bits per byte, of the validation split or of a text."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from configurator import UserError
from model import GPT
from plaingpt.checksums import sha256_of
from plaingpt.evaluation.loss import bits_per_byte, mean_loss
from plaingpt.evaluation.results import Result
from plaingpt.runtime import Runtime
from plaingpt.text.dataset import Dataset
from plaingpt.text.shards import Split
from plaingpt.text.text_files import read_text
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.training.batches import validation_batches
from plaingpt.wording import quantity

BATCH_SIZE = 8  # windows per batch
Window = tuple[int, int, int]  # first token, end, first token that is scored
Batch = tuple[Tensor, Tensor, Tensor]  # inputs, targets and mask of the targets, each (B, T)


def of_split(
    model: GPT, data: Dataset, stride: int | None, max_windows: int | None, rt: Runtime
) -> Result:
    """The perplexity of the validation split of prepared data, over at most `max_windows` windows.

    Without a `stride`, this is the loss of training: windows do not overlap and, if there is a
    limit, are evenly spaced. Raises UserError if no token counts in the loss, and for a model whose
    loss is not finite.
    """
    split, block_size = data.split("val"), model.config.block_size
    protocol = protocol_of(block_size, stride) + (", answers only" if split.has_mask else "")
    windows = list(islice(windows_of(len(split), block_size, stride), max_windows))
    batches = batches_of(split, windows, rt)
    if stride is None:
        max_tokens = max_windows and max_windows * block_size
        batches = validation_batches(
            split, BATCH_SIZE, block_size, max_tokens, rt.rank, rt.world_size
        )
    loss, tokens = loss_of(model, batches, len(windows), rt)
    if not tokens:
        raise UserError(f"no token of {data.folder}, up to limit, counts in the loss")
    return result_of(protocol, loss, tokens, data.bytes_per_token(split), data.hashes("val"))


@dataclass(frozen=True)
class EncodedText:
    task: str  # the name of its result
    path: str
    ids: np.ndarray
    tokenizer: Tokenizer
    digest: str


def encoded(task: str, path: str, tokenizer: Tokenizer) -> EncodedText:
    """Raises UserError for a file that is not UTF-8, or shorter than two tokens."""
    text = "".join(read_text(path))
    ids = np.array(tokenizer.encode(text), dtype=np.int64)
    if len(ids) < 2:
        raise UserError(f"{path} has {quantity(len(ids), 'token')}: expected at least 2")
    return EncodedText(task, path, ids, tokenizer, sha256_of(Path(path)))


def of_text(
    model: GPT, text: EncodedText, stride: int | None, max_windows: int | None, rt: Runtime
) -> Result:
    """The perplexity of a text, over at most its first `max_windows` windows.

    Raises UserError for a model whose loss is not finite.
    """
    block_size = model.config.block_size
    windows = list(islice(windows_of(len(text.ids), block_size, stride), max_windows))
    loss, tokens = loss_of(model, batches_of(text.ids, windows, rt), len(windows), rt)
    protocol = protocol_of(block_size, stride)
    read = text.ids[: windows[-1][1]]
    bytes_per_token = text.tokenizer.count_bytes(read) / len(read)
    found = result_of(protocol, loss, tokens, bytes_per_token, {text.path: text.digest})
    return replace(found, task=text.task)


def windows_of(tokens: int, block_size: int, stride: int | None) -> Iterator[Window]:
    """Windows that score every token but the first exactly once (with a stride of block_size, not
    the first of each window).

    With a `stride`, windows of block_size tokens begin every `stride` tokens and score those that
    no window before them had: the recipe of transformers' documentation. Otherwise a window reads
    block_size tokens and scores as many, from its second to the first of the next window.
    """
    span, step = (block_size + 1, block_size) if stride is None else (block_size, stride)
    scored = 1
    for start in range(0, tokens, step):
        end = min(start + span, tokens)
        yield start, end, scored
        scored = end
        if end == tokens:
            break


def loss_of(model: GPT, batches: Iterator[Batch], windows: int, rt: Runtime) -> tuple[float, int]:
    """The mean loss in nats per scored token, and their number, with a progress bar."""
    total = math.ceil(windows / (BATCH_SIZE * rt.world_size))
    bar = tqdm(batches, "perplexity", total, unit=" batches", disable=rt.hides_progress)
    return mean_loss(model, bar, rt, stoppable=False)


def batches_of(tokens: Split | np.ndarray, windows: list[Window], rt: Runtime) -> Iterator[Batch]:
    """This process's share of the windows, padded at the end."""
    mine = windows[rt.rank :: rt.world_size]
    for first in range(0, len(mine), BATCH_SIZE):
        batch = mine[first : first + BATCH_SIZE]
        length = max(end - start for start, end, _ in batch)
        ids = np.zeros((len(batch), length), dtype=np.int64)
        mask = np.zeros((len(batch), length), dtype=np.float32)
        for row, (start, end, scored) in enumerate(batch):
            ids[row, : end - start] = tokens[start:end]
            counts = tokens.mask(scored, end) if isinstance(tokens, Split) else None
            mask[row, scored - start : end - start] = 1 if counts is None else counts
        x, y, counts = ids[:, :-1].copy(), ids[:, 1:].copy(), mask[:, 1:].copy()
        yield torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(counts)


# --- figures


def protocol_of(block_size: int, stride: int | None) -> str:
    windows = f"windows of {quantity(block_size, 'token')}"
    if stride is None:
        return f"{windows} that do not overlap"
    first = ", but never the first of a window" if stride == block_size else ""
    return f"{windows} every {stride:,}, only new tokens scored{first}"


def result_of(
    protocol: str, loss: float, tokens: int, bytes_per_token: float | None, data: dict[str, str]
) -> Result:
    """The figures that follow from a loss in nats per token, the mean over `tokens`.

    Raises UserError for a loss that is not finite.
    """
    if not math.isfinite(loss):
        raise UserError(f"the loss is {loss}: the weights of the checkpoint are too large")
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 700)), "tokens": tokens}
    if bytes_per_token:
        figures["bits_per_byte"] = bits_per_byte(loss, bytes_per_token)
    return Result("perplexity", protocol, figures, data=data)


def summary(result: Result) -> str:
    figures = result.figures
    text = f"perplexity {figures['perplexity']:.4g}, {figures['loss']:.4f} nats per token"
    if "bits_per_byte" in figures:
        text += f", {figures['bits_per_byte']:.4f} bits per byte"
    return f"{text} ({quantity(int(figures['tokens']), 'token')}; {result.protocol})"
