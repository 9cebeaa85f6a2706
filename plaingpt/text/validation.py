"""
Which documents are held out for validation: decided here and nowhere else.

Text files are held out whole, or one in part where all are too large; records are drawn by their
digest. Sources that are validation sources are held out entirely. Validation takes what is held out
until it is full; the rest is trained on.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from plaingpt.text.sources import Source
from plaingpt.text.text_files import TextFile, is_text


@dataclass(frozen=True)
class HeldOut:
    """What is held out of one source."""

    files: frozenset[TextFile]
    fraction: float  # of the records

    def has_records(self, numbers: np.ndarray, digests: np.ndarray) -> np.ndarray:
        """Whether each of some records is held out, by its number in the source, from 1, and its
        digest, uint64.

        Equal documents have equal digests and stay together. The second record is always held
        out, so that even a small source has one.
        """
        if not self.fraction:
            return np.zeros(len(numbers), bool)
        most = math.ceil(self.fraction * 2**64) - 1
        return (digests <= np.uint64(most)) | (numbers == 2)


@dataclass(frozen=True)
class Validation:
    """How much is held out, drawn by the seed, and when validation is full."""

    fraction: float  # of every source that is not a validation source
    seed: int
    max_tokens: float  # inf: no limit
    max_documents: float

    def is_full(self, tokens: Any, documents: Any) -> Any:
        """Whether that much is enough: a bool, or one for each of an array."""
        return (tokens >= self.max_tokens) | (documents >= self.max_documents)

    def hold_out_all(self, source: Source) -> tuple[Source, HeldOut]:
        return source, HeldOut(frozenset(source.files), 1.0)

    def hold_out_part(self, source: Source) -> tuple[Source, HeldOut]:
        """Choose text files at random until they hold the fraction of the bytes; if all are too
        large for it, the smallest is cut at the end of a line instead. What is held out comes first
        in the source that is returned, so that a limit on tokens or documents leaves some of it."""
        texts = [file for file in source.files if is_text(file.path)]
        if not texts or not self.fraction:
            return source, HeldOut(frozenset(), self.fraction)
        wanted = self.fraction * sum(file.size for file in texts)
        smallest = min(texts, key=lambda file: file.size)
        drawn: list[TextFile] = []
        size = 0
        for index in np.random.default_rng(self.seed).permutation(len(texts))[1:]:
            if size < wanted and texts[index].size <= wanted:  # a larger file is too much
                drawn.append(texts[index])
                size += texts[index].size
        if not drawn and smallest.size > wanted:
            cut = place_to_cut(smallest, wanted / smallest.size)
            train = replace(smallest, stop=cut, size=smallest.size - round(wanted))
            val = replace(smallest, start=cut, size=round(wanted))
            others = [train if file is smallest else file for file in source.files]
            return replace(source, files=(val, *others)), HeldOut(frozenset([val]), self.fraction)
        files = frozenset(drawn or [smallest])
        ordered = sorted(source.files, key=lambda file: file not in files)
        return replace(source, files=tuple(ordered)), HeldOut(files, self.fraction)


def place_to_cut(file: TextFile, fraction: float) -> int:
    """The character after the last line end before `1 - fraction` of a text, or exactly that place
    where the lines are too long for it."""
    target = round(sum(map(len, file.blocks())) * (1 - fraction))
    cut = at = 0
    for block in file.blocks():
        newline = block.rfind("\n", 0, max(0, target - at))
        cut = at + newline + 1 if newline >= 0 else cut
        at += len(block)
    return cut if at - cut <= 2 * (at - target) else target
