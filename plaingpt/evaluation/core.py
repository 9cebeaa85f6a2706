"""
CORE of DCLM (arXiv 2406.11794), as nanochat measures it: how much better than guessing a model
solves 22 tasks, most of them with solved examples before each item.

The bundle of its files has core.yaml (the tasks), eval_data (their items) and eval_meta_data.csv
(how many items guessing solves).
"""

import csv
from dataclasses import dataclass
from pathlib import Path
from random import Random
from statistics import fmean
from typing import Annotated, Any, Literal

import msgspec

from configurator import UserError, one_line
from model import GPT
from plaingpt.evaluation import likelihood
from plaingpt.evaluation.choices import check
from plaingpt.evaluation.items import read_split, solved
from plaingpt.evaluation.likelihood import Sequence, common_prefix
from plaingpt.evaluation.results import Result
from plaingpt.evaluation.tasks import Item, Task
from plaingpt.files import Count, as_record, read_bytes
from plaingpt.runtime import Runtime
from plaingpt.text.tokenizer import Tokenizer
from plaingpt.wording import quantity

ORDER_SEED, SHOTS_SEED = 1337, 1234  # nanochat's


class Choice(msgspec.Struct, frozen=True):
    query: str
    choices: list[str]
    gold: int


class Schema(msgspec.Struct, frozen=True):
    context_options: list[str]
    continuation: str
    gold: int


class Cloze(msgspec.Struct, frozen=True):
    context: str
    continuation: str


KINDS: dict[str, type[msgspec.Struct]] = {
    "multiple_choice": Choice,
    "schema": Schema,
    "language_modeling": Cloze,
}


class CoreTask(msgspec.Struct, frozen=True):
    """An entry of core.yaml."""

    label: str
    dataset_uri: str
    num_fewshot: Annotated[list[Count], msgspec.Meta(min_length=1)]
    icl_task_type: Literal["multiple_choice", "schema", "language_modeling"]
    continuation_delimiter: str = " "

    @property
    def shots(self) -> int:
        return self.num_fewshot[0]

    def item(self, record: Any) -> Item:
        between = self.continuation_delimiter
        if isinstance(record, Choice):
            endings = tuple(f"{between}{choice}" for choice in record.choices)
            return Item((record.query,) * len(endings), endings, record.gold)
        if isinstance(record, Schema):
            options = tuple(record.context_options)
            return Item(options, (f"{between}{record.continuation}",) * len(options), record.gold)
        return Item((record.context.strip(),), (f"{between}{record.continuation}",))


class Listed(msgspec.Struct, frozen=True):
    """core.yaml."""

    icl_tasks: Annotated[list[CoreTask], msgspec.Meta(min_length=1)]


@dataclass(frozen=True)
class CoreItems:
    task: CoreTask
    guessing: float  # the share of items that it solves
    items: list[Item]
    places: list[str]
    rows: list[list[Sequence]]  # a sequence for each choice of each item
    digest: str


def read(bundle: Path, limit: int | None, tokenizer: Tokenizer, block_size: int) -> list[CoreItems]:
    """The tasks of a bundle, each with the first `limit` items (None: all) in nanochat's order.

    Raises UserError for files that are missing or malformed, and for a continuation that is longer
    than the model's context.
    """
    tasks, guessing = read_list(bundle / "core.yaml"), baselines(bundle / "eval_meta_data.csv")
    found = []
    for task in tasks:
        if not 0 <= guessing.get(task.label, 1) < 1:
            raise UserError(f"eval_meta_data.csv has no random baseline for {task.label}")
        path = bundle / "eval_data" / task.dataset_uri
        split = read_split(path, Task(KINDS[task.icl_task_type], task.item, ()), None)
        both = list(zip(split.items, split.places))
        Random(ORDER_SEED).shuffle(both)
        items, places = map(list, zip(*both[:limit]))
        if task.shots >= len(items):
            few = f"{path} has too few items" if limit is None else f"limit={limit} is too small"
            raise UserError(f"{few} for the {quantity(task.shots, 'shot')} of {task.label}")
        rows = []
        for number, place in enumerate(places):
            row = encode(task, items, number, tokenizer)
            for sequence in row:
                check(sequence, block_size - 1, place)
            rows.append([Sequence(one.ids[-block_size:], one.scored) for one in row])
        found.append(CoreItems(task, guessing[task.label], items, places, rows, split.digest))
    return found


def measure(asked: list[CoreItems], model: GPT, rt: Runtime) -> Result:
    """The accuracy of each task, centered so that guessing has 0 and a model that solves all items
    1, and the mean of all tasks. The processes share the work.

    Raises UserError for a model whose logits are not finite.
    """
    figures: dict[str, float] = {}
    found: list[dict[str, Any]] = []
    for each in asked:
        label, rows = each.task.label, each.rows
        scores = likelihood.score(model, rows, rt, label)
        for item, place, row, choices in zip(each.items, each.places, rows, scores):
            values = [choice.log_likelihood for choice in choices]
            means = [value / sequence.scored for value, sequence in zip(values, row)]
            best = means.index(max(means)) == item.answer
            right = best if len(choices) > 1 else choices[0].greedy
            centered = (right - each.guessing) / (1 - each.guessing)
            found.append({"item": place, "log_likelihoods": values, label: centered})
        figures[label] = fmean(item[label] for item in found[-len(rows) :])
    protocol = f"as in nanochat; accuracy in {quantity(len(asked), 'task')}, centered on guessing"
    data = {each.task.dataset_uri: each.digest for each in asked}
    return Result("core", protocol, {"core": fmean(figures.values())} | figures, found, data)


def read_list(path: Path) -> list[CoreTask]:
    import yaml  # not at the top: no other task needs it

    try:
        return as_record(yaml.safe_load(read_bytes(path)), Listed, str(path)).icl_tasks
    except yaml.YAMLError as error:
        raise UserError(f"{path} is damaged: {one_line(error)}") from None


def baselines(path: Path) -> dict[str, float]:
    """The share of items that guessing solves, by task."""
    rows = csv.DictReader(read_bytes(path).decode(errors="replace").splitlines())
    try:
        return {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in rows}
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: expected Eval Task and Random baseline ({error!r})") from None


def encode(task: CoreTask, items: list[Item], number: int, tokenizer: Tokenizer) -> list[Sequence]:
    """The whole text of each choice of an item, behind examples from the other items. What counts
    is what the texts do not begin with in common; of a schema, what they end with in common; of a
    single text, what follows its context."""
    shots = Random(SHOTS_SEED + number).sample(range(len(items) - 1), task.shots)
    before = "".join(solved(items[other + (other >= number)]) for other in shots)
    pairs = zip(items[number].contexts, items[number].continuations)
    rows = [[tokenizer.eot_id, *tokenizer.encode(before + "".join(pair))] for pair in pairs]
    if task.icl_task_type == "multiple_choice":
        same = common_prefix(rows)
        counts = [len(row) - same for row in rows]
    elif task.icl_task_type == "schema":
        counts = [common_prefix([row[::-1] for row in rows])] * len(rows)
    else:
        context = (before + items[number].contexts[0] + task.continuation_delimiter).strip()
        counts = [len(rows[0]) - 1 - len(tokenizer.encode(context))]
    return [Sequence(row, max(count, 1)) for row, count in zip(rows, counts)]
