"""
How likely a model finds continuations of texts.

The sequences of an item (one for each choice) usually begin alike. They are read as one tree: their
common prefix once, then what follows it in each, where attention sees the prefix but not the other
branches.

Shapes: B items of a batch, T tokens of a tree, C channels, H heads, D channels per head, N scored
tokens, R sequences.
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
LARGEST = 2048  # tokens of a tree, whose attention grows with their square
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
    def length(self) -> int:
        """The tokens of its tree: the prefix, and what follows it in each sequence."""
        return self.prefix + sum(len(each.ids) - 1 - self.prefix for each in self.sequences)


class Tree(KVCache):
    """Takes the place of a cache: says which of the tokens being read see each other, and keeps
    none of them. `branches` (B, T) numbers the branches: 0 is the prefix, -1 padding."""

    def __init__(self, model: GPT, positions: Tensor, branches: Tensor) -> None:
        config, (B, T) = model.config, positions.shape
        self.positions = positions  # (B, T)
        same = (branches[:, :, None] == branches[:, None]) | (branches[:, None] == 0)  # (B, T, T)
        self.seen = same.tril()[:, None]
        # Compiled blocks keep the entries of a branch here, over those of the branch before it.
        shape = (1, B, 2, config.n_head, T, config.n_embd // config.n_head)
        self.entries = torch.empty(shape).expand(config.n_layer, *shape[1:])

    def reserve(self, B: int, T: int) -> Tensor:
        return self.positions

    def extend(self, layer: int, kv: Tensor) -> tuple[Tensor, Tensor]:
        k, v = kv.permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        return k, v


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
    batches = list(in_batches(grouped(items, model.config.block_size), rt))
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
        group = Group(rows, cut, common_prefix([each.ids[:-1] for each in cut]))
        if group.prefix and group.length <= LARGEST:
            yield group
        else:
            for number, each in zip(rows, cut):
                yield Group([number], [each], len(each.ids) - 1)


def tokens_read(items: list[list[Sequence]], block_size: int) -> int:
    """How many tokens a model reads to score all sequences of the items."""
    return sum(group.length for group in grouped(items, block_size))


def common_prefix(rows: list[list[int]]) -> int:
    """The number of ids with which all rows begin."""
    return sum(1 for _ in takewhile(lambda ids: len({*ids}) == 1, zip(*rows)))


def in_batches(groups: Iterator[Group], rt: Runtime) -> Iterator[list[Group]]:
    """Groups of similar lengths, the longest first, so that little is padded."""
    budget = CPU_TOKENS if rt.device.type == "cpu" else GPU_TOKENS
    batch: list[Group] = []
    for group in sorted(groups, key=lambda group: -group.length):
        if batch and (len(batch) + 1) * batch[0].length > budget:
            yield batch
            batch = []
        batch.append(group)
    if batch:
        yield batch


# --- one batch


@torch.inference_mode()
def score_batch(model: GPT, batch: list[Group], rt: Runtime) -> Tensor:
    """Log-likelihood, and 1 or 0 for greedy, of each row: (R, 2)."""
    ids, positions, branches = [], [], []  # of each tree
    # places in the batch, what follows there, how many per row
    scored, targets, counts = [], [], []
    longest = batch[0].length
    for item, group in enumerate(batch):
        P = group.prefix
        ids.append(group.sequences[0].ids[:P])
        positions.append(list(range(P)))
        branches.append([0] * P)
        for branch, sequence in enumerate(group.sequences, 1):
            tail = len(sequence.ids) - 1 - P
            end = item * longest + len(ids[item]) + tail
            inside = min(sequence.scored, tail)  # the rest is within the prefix
            fork = item * longest + P
            scored += [*range(fork - sequence.scored + inside, fork), *range(end - inside, end)]
            targets += sequence.ids[-sequence.scored :]
            counts.append(sequence.scored)
            ids[item] += sequence.ids[P:-1]
            positions[item] += range(P, P + tail)
            branches[item] += [branch] * tail
    with rt.autocast():
        idx = padded(ids, 0, rt.device)
        tree = Tree(model, padded(positions, 0, rt.device), padded(branches, -1, rt.device))
        hidden = model.transformer(idx, tree).flatten(0, 1)  # (B·T, C)
        wanted = torch.tensor(targets, device=rt.device)
        found = token_scores(model, hidden[torch.tensor(scored, device=rt.device)], wanted)
    owners = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    sums = torch.zeros(len(counts), 2, dtype=torch.float64).index_add_(0, owners, found)
    sums[:, 1] = sums[:, 1] == torch.tensor(counts)
    return sums


def padded(rows: list[list[int]], filler: int, device: torch.device) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [filler] * (longest - len(row)) for row in rows], device=device)


def token_scores(model: GPT, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-likelihood, and 1 or 0 for being the likeliest, of each target: (N, 2), on the CPU."""
    found = []
    for states, wanted in zip(hidden.split(HEAD_TOKENS), targets.split(HEAD_TOKENS)):
        logits = model.lm_head(states).float()
        losses = F.cross_entropy(logits, wanted, reduction="none")
        found.append(torch.stack((-losses, (logits.argmax(1) == wanted).float()), 1))
    return torch.cat(found).cpu().double()
