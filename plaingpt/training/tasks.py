"""The tasks that a run measures on its way: those of tools.eval, on their first few items."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from configurator import UserError
from model import GPT
from plaingpt.evaluation import choices, items, likelihood, perplexity, questions
from plaingpt.evaluation.results import Result
from plaingpt.runtime import Runtime
from plaingpt.text.dataset import Dataset
from plaingpt.training import parallel
from plaingpt.wording import quantity


@dataclass(frozen=True)
class Task:
    """A task that has been read and encoded."""

    name: str
    size: str  # 200 items
    tokens: int  # that the model reads, or for answers writes at most
    measure: Callable[..., Result]  # of model and rt

    def __str__(self) -> str:
        return f"{self.name} ({self.size})"


def problems_of(names: tuple[str, ...]) -> Iterator[str]:
    """What is wrong with the setting `tasks`."""
    yield from items.unknown(names, ["answers"])
    for name, times in Counter(map(name_of, names)).items():
        if times > 1:
            yield f"{times} tasks are named {name}: their figures need names of their own"


def name_of(task: str) -> str:
    """What the figures of a task are called: for a file, its name without folder and suffix."""
    return Path(task).stem if Path(task).suffix else task


def open_tasks(dataset: Dataset, settings: dict[str, Any], block_size: int) -> list[Task]:
    """The tasks that the settings of train.py name, for a model of that context.

    Raises UserError for files that are missing or malformed, a choice that is longer than the
    context, and data without questions; OSError if the hub cannot be read.
    """
    limit, tokenizer, found = settings["task_limit"], dataset.tokenizer, []
    for task in settings["tasks"]:
        if task == "answers":
            asked = questions.read(dataset, limit)
            size = quantity(len(asked), "question")
            tokens = sum(len(ids) + len(ref) + questions.EXTRA_TOKENS for ids, ref in asked)
            measure = partial(questions.measure, data=dataset, asked=asked, path=None)
        elif items.is_text(task):
            text = perplexity.encoded(task, task, tokenizer)
            tokens = min(len(text.ids), (limit or len(text.ids)) * block_size)
            size = quantity(tokens, "token")
            measure = partial(perplexity.of_text, text=text, stride=None, max_windows=limit)
        else:
            read = items.read(task, settings["task_dir"], 0, limit)
            encoded = choices.encoded(read, tokenizer, block_size)
            tokens = likelihood.tokens_read(encoded.sequences, block_size)
            size = quantity(len(read.items), "item")
            measure = partial(choices.measure, encoded=encoded)
        found.append(Task(name_of(task), size, tokens, measure))
    return found


def measure_tasks(model: GPT, tasks: list[Task], step: int, rt: Runtime) -> dict[str, float]:
    """Print and return the figures of the tasks, each under TASK/FIGURE. The processes share the
    work.

    A line says so where a model whose logits are not finite has no figures.
    """
    rt = replace(rt, progress=False)
    found: dict[str, float] = {}
    model.eval()
    with parallel.unsharded(model, rt):
        for task in tasks:
            began = time.perf_counter()
            try:
                result = task.measure(model=model, rt=rt)
            except UserError as problem:
                print(f"step {step}: {task.name}: not measured: {problem}")
                continue
            seconds = time.perf_counter() - began
            print(f"step {step}: {task.name}: {result.in_words()} ({task.size}, {seconds:.1f} s)")
            found |= {f"{task.name}/{name}": value for name, value in result.scores.items()}
    model.train()
    return found
