"""The items of a task, read from files or from the hub, with few-shot examples before them."""

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from configurator import UserError
from plaingpt.checksums import sha256_of
from plaingpt.evaluation.tasks import OWN, TASKS, Item, Task
from plaingpt.files import as_record
from plaingpt.text.hub import BrokenStream, HubDataset, hub_rows, impatient
from plaingpt.text.records import Row, rows
from plaingpt.wording import quantity

SUFFIXES = (".jsonl", ".json", ".parquet")  # of files of items
TEXT_SUFFIXES = (".txt", ".raw")  # of texts, whose perplexity is a task as well
SHOTS_SEED = 1234  # lm-evaluation-harness's


@dataclass(frozen=True)
class TaskItems:
    """A task and its items, each with the place it was read from."""

    name: str
    task: Task
    items: list[Item]
    places: list[str]
    shots: int
    limit: int | None  # the first so many; None: all
    data: dict[str, str]  # what was read → its SHA-256
    warning: str | None = None  # about examples that are under test


@dataclass(frozen=True)
class Split:
    """The records of a split as they are, as items, and their places."""

    records: list[msgspec.Struct]
    items: list[Item]
    places: list[str]
    digest: str


def unknown(names: Iterable[str], others: Iterable[str]) -> Iterator[str]:
    """What is wrong with the names of tasks: those of TASKS, `others`, and files."""
    known = [*others, *TASKS]
    for name in names:
        if Path(name).suffix in (*SUFFIXES, *TEXT_SUFFIXES):
            if not Path(name).is_file():
                yield f"{name} is not a file"
        elif name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            kinds = ", ".join((*SUFFIXES, *TEXT_SUFFIXES))
            listed = f"expected a file ({kinds}) or one of {', '.join(known)}"
            yield f"unknown task {name!r}; " + (f"did you mean {close[0]!r}?" if close else listed)


def is_text(name: str) -> bool:
    return Path(name).suffix in TEXT_SUFFIXES


def read(name: str, task_dir: str | None, shots: int, limit: int | None) -> TaskItems:
    """The first `limit` items of a task that is in TASKS, or of a file of your own.

    Raises UserError for files that are missing, empty or malformed, and OSError if the hub cannot
    be read.
    """
    source = find(name, task_dir)
    task = TASKS.get(name) or own_task(source)
    held_out = read_split(source, task, limit)
    data, items, warning = {address(source): held_out.digest}, held_out.items, None
    if shots:
        pool_source = training(source)
        pool = read_split(pool_source, task, None)
        data[address(pool_source)] = pool.digest
        items = with_shots(held_out, pool, shots, spare=not task.hub or task.hub.split != "test")
        solved = {*pool.items}
        if known := sum(item in solved for item in held_out.items):
            which = f"{known:,} of the {quantity(len(items), 'item')} under test"
            warning = f"{name}: the examples in {address(pool_source)} include {which}"
    return TaskItems(name, task, items, held_out.places, shots, limit, data, warning)


def find(name: str, task_dir: str | None) -> Path | HubDataset:
    """Where the items of a task are. Raises UserError if task_dir lacks them."""
    task = TASKS.get(name)
    if task is None or task.hub is None:
        return Path(name)
    if task_dir is None:
        return task.hub
    folder, files = Path(task_dir), [f"{task.file or name}{suffix}" for suffix in SUFFIXES]
    clone = folder / Path(task.hub.path).name
    for file in files:
        if (folder / file).exists():
            return folder / file
    if clone.is_dir():
        return replace(task.hub, path=str(clone))
    names = ", ".join(files)
    raise UserError(f"{task_dir} has no {names}, and {clone} is not a copy of {task.hub.path}")


def training(source: Path | HubDataset) -> Path | HubDataset:
    """Where few-shot examples come from. Raises UserError if there is no such file."""
    if isinstance(source, HubDataset):
        return replace(source, split="train")
    path = source.with_name(f"{source.stem}_train{source.suffix}")
    if not path.exists():
        raise UserError(f"examples for --shots come from {path}, which does not exist")
    return path


def own_task(source: Path | HubDataset) -> Task:
    """The task of a file of your own, by the fields of its first record."""
    first = next(rows_of(source, ()), None)
    if first is None:
        raise UserError(f"{source} has no items")
    if kinds := kinds_of(first.value):
        return OWN[kinds[0]]
    wanted = " or ".join(f"{{{', '.join(task.record.__struct_fields__)}}}" for task in OWN.values())
    raise UserError(f"{first.where}: {first.problem or f'expected {wanted}'}")


def kinds_of(value: Any) -> list[str]:
    """The fields of a record that tell the kinds of your own items apart."""
    return [field for field in OWN if isinstance(value, dict) and value.get(field) is not None]


def read_split(source: Path | HubDataset, task: Task, limit: int | None) -> Split:
    """Raises UserError for a record that does not fit the task, or whose right answer is not among
    its choices."""
    digest = hashlib.sha256()
    records, items, places = [], [], []
    fields = task.record.__struct_fields__ if task.hub else ()  # (): all
    for row in islice(rows_of(source, fields), limit):
        if row.problem:
            raise UserError(f"{row.where}: {row.problem}")
        others = [kind for kind in kinds_of(row.value) if OWN[kind] is not task]
        if others and task in OWN.values():
            mine = next(field for field, kind in OWN.items() if kind is task)
            problem = f"has {others[0]}, but the items of this file have {mine}"
            raise UserError(f"{row.where} {problem}: a file holds one kind of items")
        record = as_record(row.value, task.record, row.where)
        item = task.item(record)
        if not 0 <= item.answer < len(item.continuations):
            choices = quantity(len(item.continuations), "choice")
            raise UserError(f"{row.where}: the right answer is not among its {choices}")
        records.append(record)
        items.append(item)
        places.append(row.where)
        digest.update(json.dumps(msgspec.to_builtins(record)).encode())
    if not items:
        raise UserError(f"{address(source)} has no items")
    whole = sha256_of(source) if isinstance(source, Path) else digest.hexdigest()
    return Split(records, items, places, whole)


def rows_of(source: Path | HubDataset, fields: tuple[str, ...]) -> Iterator[Row]:
    """Raises UserError for a file that cannot be read, OSError for a hub that does not answer."""
    if isinstance(source, Path):
        if not source.is_file():
            raise UserError(f"{source} is not a file")
        yield from rows(str(source), fields)
        return
    try:
        with impatient([source]):
            yield from hub_rows(address(source), source, fields)
    except ConnectionError as error:
        raise ConnectionError(f"{error} (without one, --task_dir reads items from files)") from None
    except BrokenStream as error:
        raise OSError(f"{error}; the same command reads the items from the beginning") from error


def address(source: Path | HubDataset) -> str:
    if isinstance(source, Path):
        return str(source)
    where = source.path if Path(source.path).is_dir() else f"hf:{source.path}"
    config = f":{source.config}" if source.config else ""
    return f"{where}{config}#{source.split}"


def with_shots(held_out: Split, pool: Split, shots: int, spare: bool) -> list[Item]:
    """Each item behind `shots` solved examples from `pool`, drawn as lm-evaluation-harness does:
    one generator for all items in turn, and with `spare` one more example is drawn, in case the
    item itself is among them.

    Raises UserError if the pool is too small.
    """
    random, found = Random(SHOTS_SEED), []
    numbers = list(range(len(pool.items)))
    for item, record in zip(held_out.items, held_out.records):
        drawn = sampled(random, numbers, shots + spare)
        if spare:
            drawn = [number for number in drawn if pool.records[number] != record][:shots]
        if len(drawn) < shots:  # the pool has several copies of the item
            others = [number for number in numbers if pool.records[number] != record]
            drawn = sampled(random, others, shots)
        prefix = "".join(solved(pool.items[number]) for number in drawn)
        found.append(replace(item, contexts=tuple(prefix + each for each in item.contexts)))
    return found


def sampled(random: Random, numbers: list[int], count: int) -> list[int]:
    if len(numbers) < count:
        found = f"{len(numbers):,}, expected at least {count:,}"
        raise UserError(f"too few training items for --shots: {found}")
    return random.sample(numbers, count)


def solved(item: Item) -> str:
    return f"{item.contexts[item.answer]}{item.continuations[item.answer]}\n\n"
