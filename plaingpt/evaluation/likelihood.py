"""
How likely a model finds continuations of texts.

The sequences of an item (one for each choice) usually begin alike, so their common prefix is read
once, and its keys and values are copied for what follows.

Shapes: B items of a batch, R sequences (rows), P tokens of a common prefix, T tokens that follow
it, C channels, N scored tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from configurator import UserError
from model import GPT, KVCache
from plaingpt.generation import NOT_FINITE
from plaingpt.runtime import Runtime
from plaingpt.text.tokenizer import Tokenizer

CPU_TOKENS, GPU_TOKENS = 2048, 16384  # per batch
HEAD_TOKENS = 512  # whose logits, 50,257 numbers each, are in memory at once


@dataclass(frozen=True)
class Sequence:
    """The ids of a context and its continuation; the last `scored` are the continuation."""

    ids: list[int]
    scored: int


class Score(NamedTuple):
    log_likelihood: float  # of the continuation, in nats
    greedy: bool  # whether each of its tokens is the likeliest


@dataclass(frozen=True)
class Group:
    """Sequences that are scored together because their inputs share the first `prefix` tokens."""

    rows: list[int]  # their numbers among all sequences
    sequences: list[Sequence]
    prefix: int

    @property
    def tail(self) -> int:
        """The most input tokens that follow the prefix."""
        return max(len(sequence.ids) for sequence in self.sequences) - 1 - self.prefix


def encode(tokenizer: Tokenizer, context: str, continuation: str) -> Sequence:
    """The ids of the whole text, split where those of the context end.

    As in lm-evaluation-harness, white space at the end of a context belongs to the continuation,
    and an empty context becomes `<|endoftext|>`.
    """
    kept = context.rstrip()
    before, ids = tokenizer.encode(kept), tokenizer.encode(context + continuation)
    if not before:
        before, ids = [tokenizer.eot_id], [tokenizer.eot_id, *ids]
    return Sequence(ids, len(ids) - len(before))


def score(model: GPT, items: list[list[Sequence]], rt: Runtime, name: str) -> list[list[Score]]:
    """The score of each sequence of each item. A sequence that exceeds the model's context loses
    its beginning. The processes share the work; `name` labels the progress bar.

    Every continuation must have at least one token, and at most block_size. Raises UserError for a
    model whose logits are not finite.
    """
    batches = list(in_batches(grouped(items, model.config.block_size), model, rt))
    mine = batches[rt.rank :: rt.world_size]
    found = torch.zeros(sum(map(len, items)), 2, dtype=torch.float64)
    rows = sum(len(group.rows) for batch in mine for group in batch)
    with tqdm(total=rows, desc=name, unit=" choices", disable=rt.hides_progress) as bar:
        for batch in mine:
            numbers = [row for group in batch for row in group.rows]
            found[numbers] = score_batch(model, batch, rt)
            bar.update(len(numbers))
    found = rt.sum(found)
    if not found.isfinite().all():
        raise UserError(NOT_FINITE)
    scores = iter([Score(value, bool(greedy)) for value, greedy in found.tolist()])
    return [[next(scores) for _ in item] for item in items]


def grouped(items: list[list[Sequence]], block_size: int) -> Iterator[Group]:
    """A group for each item; one for each sequence where they begin differently."""
    row = 0
    for item in items:
        cut = [Sequence(each.ids[-block_size - 1 :], each.scored) for each in item]
        rows = list(range(row, row + len(item)))
        row += len(item)
        if prefix := common_prefix([each.ids[:-1] for each in cut]):
            yield Group(rows, cut, prefix)
        else:
            for number, each in zip(rows, cut):
                yield Group([number], [each], len(each.ids) - 1)


def tokens_read(items: list[list[Sequence]], block_size: int) -> int:
    """How many tokens a model reads to score all sequences of the items."""
    return sum(
        group.prefix + sum(len(each.ids) - 1 - group.prefix for each in group.sequences)
        for group in grouped(items, block_size)
    )


def common_prefix(rows: list[list[int]]) -> int:
    """The number of ids with which all rows begin."""
    return sum(1 for _ in takewhile(lambda ids: len({*ids}) == 1, zip(*rows)))


def in_batches(groups: Iterator[Group], model: GPT, rt: Runtime) -> Iterator[list[Group]]:
    """Groups of similar lengths, the longest first, so that little is padded."""
    budget = CPU_TOKENS if rt.device.type == "cpu" else GPU_TOKENS
    batch: list[Group] = []
    for group in sorted(groups, key=lambda group: (-group.prefix, -group.tail)):
        joined = [*batch, group]
        length = joined[0].prefix + max(each.tail for each in joined)
        rows = sum(len(each.rows) for each in joined)
        if batch and (rows * length > budget or length > model.config.block_size):
            yield batch
            joined = [group]
        batch = joined
    if batch:
        yield batch


# --- one batch


@torch.inference_mode()
def score_batch(model: GPT, batch: list[Group], rt: Runtime) -> Tensor:
    """Log-likelihood, and 1 or 0 for greedy, of each row: (R, 2)."""
    hidden, targets, counts = [], [], []
    with rt.autocast():
        before, after = read(model, batch, rt)
        row = 0
        for item, group in enumerate(batch):
            for sequence in group.sequences:
                end = len(sequence.ids) - 1  # of the inputs
                start = end - sequence.scored
                hidden.append(before[item, start : min(end, group.prefix)])
                if end > group.prefix:
                    tail = slice(max(start - group.prefix, 0), end - group.prefix)
                    hidden.append(after[row, tail])
                targets += sequence.ids[-sequence.scored :]
                counts.append(sequence.scored)
                row += 1
        found = token_scores(model, torch.cat(hidden), torch.tensor(targets, device=rt.device))
    log_likelihoods, greedy = found.unbind(1)
    return torch.stack(
        [
            torch.stack((values.sum(), hits.min()))
            for values, hits in zip(log_likelihoods.split(counts), greedy.split(counts))
        ]
    )


def read(model: GPT, batch: list[Group], rt: Runtime) -> tuple[Tensor, Tensor]:
    """The final hidden states of the prefixes, (B, P, C), and of what follows them, (R, T, C)."""
    prefixes = padded([group.sequences[0].ids[: group.prefix] for group in batch], rt.device)
    tails = padded(
        [each.ids[group.prefix : -1] for group in batch for each in group.sequences], rt.device
    )
    (B, P), (R, T) = prefixes.shape, tails.shape
    if T == 0:
        return model.transformer(prefixes), torch.empty(R, 0, 0)
    cache = KVCache(model, B, P)
    cache.entries = cache.entries.to(rt.dtype)
    before = model.transformer(prefixes, cache)
    owners = [item for item, group in enumerate(batch) for _ in group.sequences]
    branches = KVCache(model, R, P + T)
    branches.entries = branches.entries.to(rt.dtype)
    branches.entries[..., :P, :] = cache.entries[:, owners]
    # Padding after a prefix is overwritten by what follows it, or never seen.
    branches.lengths = torch.tensor([batch[item].prefix for item in owners], device=rt.device)
    branches.end = P
    return before, model.transformer(tails, branches)


def padded(rows: list[list[int]], device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device).long()


def token_scores(model: GPT, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-likelihood, and 1 or 0 for being the likeliest, of each target: (N, 2), on the CPU."""
    found = []
    for states, wanted in zip(hidden.split(HEAD_TOKENS), targets.split(HEAD_TOKENS)):
        logits = model.lm_head(states).float()
        losses = F.cross_entropy(logits, wanted, reduction="none")
        found.append(torch.stack((-losses, (logits.argmax(1) == wanted).float()), 1))
    return torch.cat(found).cpu().double()
