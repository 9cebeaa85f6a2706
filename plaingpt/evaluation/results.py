"""What a task measured: its figures, the table on the console, and the JSON file."""

import math
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from plaingpt.files import write_json


@dataclass(frozen=True)
class Result:
    """The outcome of a task.

    `items` has a dict for each item, in the order of the data. Where a figure is a mean over the
    items, each of them has its own value under the name of the figure, from which the standard
    error follows.
    """

    task: str
    protocol: str  # how the figures come about, in a sentence
    figures: dict[str, float]
    items: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, str] = field(default_factory=dict)  # the SHA-256 of each file that was read

    def standard_error(self, figure: str) -> float | None:
        """Of a figure that is a mean over at least two items; None for others."""
        values = [float(item[figure]) for item in self.items if figure in item]
        if len(values) < 2:
            return None
        return statistics.stdev(values) / math.sqrt(len(values))

    @property
    def scores(self) -> dict[str, float]:
        """The figures that are not counts."""
        return {name: value for name, value in self.figures.items() if isinstance(value, float)}

    def in_words(self) -> str:
        """The scores with their standard errors: acc 0.2500 ± 0.0306, acc_norm 0.2650 ± 0.0312."""
        spreads = {name: spread(self.standard_error(name)) for name in self.scores}
        words = [f"{name} {shown(value)} {spreads[name]}" for name, value in self.scores.items()]
        return ", ".join(word.rstrip() for word in words)


def shown(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if value < 1e6 else f"{value:.3e}"


def spread(error: float | None) -> str:
    return f"± {error:.4f}" if error else ""  # 0: the items are all alike


def table(results: list[Result]) -> str:
    """A row for each figure: task, figure, value ± standard error, number of items."""
    rows = [("task", "figure", "value", "", "items")]
    for result in results:
        for name, value in result.figures.items():
            items = sum(name in item for item in result.items) or len(result.items)
            count = f"{items:,}" if items else ""
            error = spread(result.standard_error(name))
            rows.append((result.task, name, shown(value), error, count))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    aligns = ("<", "<", ">", "<", ">")
    lines = [
        "  ".join(f"{cell:{align}{width}}" for cell, align, width in zip(row, aligns, widths))
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def write_results(path: Path, results: list[Result], about: dict[str, Any]) -> None:
    """Write all results, with every item and what they are `about` (checkpoint, settings,
    versions), as one JSON file. Raises OSError if the disk refuses it."""
    tasks = []
    for result in results:
        errors = {name: result.standard_error(name) for name in result.figures}
        known = {name: error for name, error in errors.items() if error is not None}
        tasks.append(asdict(result) | {"standard_errors": known})
    write_json(path, about | {"results": tasks})
