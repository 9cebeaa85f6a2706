"""The questions of a split, and their reference answers."""

from collections.abc import Iterator

import numpy as np

from plaingpt.text.shards import Split
from plaingpt.text.tokenizer import Tokenizer

Question = tuple[list[int], list[int]]  # ids of a question and of its reference answer


def questions(split: Split, tokenizer: Tokenizer, end: int | None = None) -> Iterator[Question]:
    """The questions among the first `end` tokens of a split (None: all), with their answers.

    A question is a run of tokens that do not count in the loss; its answer is the run that follows
    and does count, up to the end of the text. Text without a mask has none. Raises UserError for a
    damaged split.
    """
    mask = split.mask(0, min(end or len(split), len(split)))
    if mask is None:
        return
    counts = mask > 0
    edges = [0, *(np.flatnonzero(counts[1:] != counts[:-1]) + 1).tolist(), len(counts)]
    for start, middle, stop in zip(edges, edges[1:], edges[2:]):
        if not counts[start]:
            answer = split[middle:stop].tolist()
            if tokenizer.eot_id in answer:  # what follows may be a text that counts from its start
                answer = answer[: answer.index(tokenizer.eot_id)]
            yield split[start:middle].tolist(), answer
