"""What a run reads: its splits, the prompts of its samples, and its tasks."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from plaingpt.text.dataset import Dataset
from plaingpt.text.shards import Split
from plaingpt.training.batches import Batches, check_length, windows_at
from plaingpt.training.samples import Prompt, prompts_for
from plaingpt.training.tasks import Task, open_tasks


@dataclass(frozen=True)
class Data:
    dataset: Dataset
    batches: Batches
    held_out: Split
    eval_tokens: int | None  # of the held-out split, at each evaluation; None: all
    prompts: list[Prompt]  # of the samples
    tasks: list[Task]

    def try_reading(self, step: int) -> None:
        """Read the batch of a step and a held-out window. Raises UserError if that fails: at the
        start, before --overwrite has removed anything."""
        self.batches(step)
        windows_at(self.held_out, np.zeros(1, np.int64), self.batches.block_size)


def open_data(dataset: Dataset, settings: dict[str, Any], block_size: int) -> Data:
    """What a run with these settings of train.py reads.

    Raises UserError if a split is missing, damaged, or holds less than one window, and for a file
    of prompts or of a task that is missing or malformed; OSError if a task cannot be downloaded.
    """
    stride = settings["stride"] or block_size
    train, held_out = dataset.split("train"), dataset.split("val")
    batches = Batches(train, settings["batch_size"], block_size, settings["seed"], stride)
    check_length(held_out, block_size)
    prompts = prompts_for(dataset, settings["sample_prompts"])
    tasks = open_tasks(dataset, settings, block_size)
    return Data(dataset, batches, held_out, settings["eval_tokens"], prompts, tasks)
