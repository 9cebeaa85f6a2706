"""What a model makes of multiple-choice and cloze items: its choices, and the figures."""

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from configurator import UserError
from model import GPT
from plaingpt.evaluation import likelihood
from plaingpt.evaluation.items import TaskItems
from plaingpt.evaluation.likelihood import Score, Sequence
from plaingpt.evaluation.results import Result
from plaingpt.evaluation.tasks import Item
from plaingpt.runtime import Runtime
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.wording import quantity


@dataclass(frozen=True)
class Encoded:
    """The items of a task as a model reads them: a sequence for each choice of each item."""

    asked: TaskItems
    sequences: list[list[Sequence]]


def encoded(asked: TaskItems, tokenizer: Tokenizer, block_size: int) -> Encoded:
    """Raises UserError for a continuation that is empty, or longer than the model's context."""
    sequences = []
    for item, place in zip(asked.items, asked.places):
        pairs = zip(item.contexts, item.continuations)
        sequences.append([likelihood.encode(tokenizer, *pair) for pair in pairs])
        for each in sequences[-1]:
            check(each, block_size, place)
    return Encoded(asked, sequences)


def measure(encoded: Encoded, model: GPT, rt: Runtime) -> Result:
    """Score every choice of every item. The processes share the work.

    Raises UserError, in every process, for a model whose logits are not finite.
    """
    asked = encoded.asked
    scores = likelihood.score(model, encoded.sequences, rt, asked.name)
    items = []
    for number, (item, place) in enumerate(zip(asked.items, asked.places)):
        lengths = [len(text) - 1 for text in item.continuations]  # without the space
        if asked.task.per_token:
            lengths = [each.scored for each in encoded.sequences[number]]
        found = outcome(item, scores[number], asked.task.figures, lengths)
        items.append({"item": place, **found})
    figures = {
        name: fmean(item[name] for item in items)
        for name in asked.task.figures
        if name != "perplexity"
    }
    if "perplexity" in asked.task.figures:
        loss = -fmean(item["log_likelihoods"][0] for item in items)
        figures["perplexity"] = math.exp(min(loss, 700))
    return Result(asked.name, protocol(asked), figures, items, asked.data)


def check(sequence: Sequence, block_size: int, place: str) -> None:
    """Raises UserError for a continuation that cannot be scored."""
    if not 1 <= sequence.scored <= block_size:
        length = quantity(sequence.scored, "token")
        raise UserError(f"{place}: a choice has {length}; the model's context is {block_size:,}")


def outcome(
    item: Item, scores: list[Score], figures: tuple[str, ...], lengths: list[int]
) -> dict[str, Any]:
    """How the model answers an item: its choice by each figure, and whether that is right.
    `lengths` of the choices are those that acc_norm divides by."""
    values = [each.log_likelihood for each in scores]
    found: dict[str, Any] = {"log_likelihoods": values}
    if "perplexity" in figures:  # a cloze
        return found | {"acc": int(scores[0].greedy)}
    found |= {"answer": item.answer, "choice": values.index(max(values))}
    found["acc"] = int(found["choice"] == item.answer)
    if "acc_norm" in figures:
        pairs = zip(values, lengths)
        normalized = [value / length if length else -math.inf for value, length in pairs]
        found["choice_norm"] = normalized.index(max(normalized))
        found["acc_norm"] = int(found["choice_norm"] == item.answer)
    return found


def protocol(asked: TaskItems) -> str:
    figures, shots = asked.task.figures, quantity(asked.shots, "shot")
    limited = asked.limit == len(asked.items)
    first = f", the first {quantity(len(asked.items), 'item')}" if limited else ""
    if "perplexity" in figures:
        meaning = "acc: every token of the continuation is the likeliest; perplexity: per item"
    elif "acc_norm" in figures:
        unit = "token" if asked.task.per_token else "character"
        meaning = f"acc: the likeliest choice; acc_norm: the likeliest per {unit}"
    else:
        meaning = "acc: the option that makes the rest of the sentence likelier"
    known = "as in llm.c" if asked.task.per_token else "as in lm-evaluation-harness 0.4"
    origin = known if asked.task.hub else "your own items"
    return f"{origin}, {shots}{first}; {meaning}"
