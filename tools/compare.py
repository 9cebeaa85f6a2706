"""
Compare runs: a table of their sizes, losses and costs, and a picture of their losses.

    python -m tools.compare --runs=out/small,out/large
    python -m tools.compare --runs=out/adamw,out/muon --out=muon.png

The picture shows the loss over the tokens read, over the arithmetic done and over the time taken:
thin lines for training, points for validation. The arithmetic is what --plan calls Compute. The
time is that of the training steps, without evaluations, samples, checkpoints and what a kill lost.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # for python tools/compare.py

import configurator
from configurator import PathName, UserError


@dataclass(frozen=True)
class CompareConfig:
    runs: tuple[PathName, ...] = ("out/stdlib",)  # run folders
    out: PathName = "compare.png"  # the picture


if __name__ == "__main__":
    configurator.answer_help(CompareConfig)  # before torch is imported, which takes a second

from plaingpt.checkpoint import folders
from plaingpt.checkpoint.hugging_face import read_config
from plaingpt.files import atomic_file
from plaingpt.training.log import Record
from plaingpt.training.run_folder import METRICS, read_records
from plaingpt.training.start import model_and_adapter, outline
from plaingpt.wording import compact, duration

UNKNOWN = "–"


@dataclass(frozen=True)
class Run:
    name: str
    parameters: int | None  # None: unknown, without a checkpoint
    records: list[Record]  # of metrics.jsonl, each with tokens, seconds and, if known, flops so far


def compare(cfg: CompareConfig) -> list[dict[str, str]]:
    """Print a table, draw the picture, and return the rows of the table.

    Raises UserError for a folder that is not a run's, and for damaged or missing figures.
    """
    problems = [] if cfg.runs else ["runs is empty"]
    if Path(cfg.out).suffix != ".png":
        problems.append(f"out={cfg.out!r} does not end with .png")
    if not Path(cfg.out).parent.is_dir():
        problems.append(f"the folder of {cfg.out} does not exist")
    configurator.validate(cfg, problems)
    runs = [read_run(Path(name)) for name in cfg.runs]
    rows = [figures(run) for run in runs]
    print(table(rows))
    draw(runs, Path(cfg.out))
    print(f"wrote {cfg.out}")
    return rows


def read_run(folder: Path) -> Run:
    """Raises UserError as `compare`."""
    path = folder / METRICS
    if not path.exists() and (folder.parent / METRICS).exists():
        raise UserError(f"{folder} is within a run: name its folder, {folder.parent}")
    if not folder.exists():
        raise UserError(f"{folder} {folders.missing(folder)}")
    if not path.exists():
        raise UserError(f"{folder} has no {METRICS}: name the folders of runs, such as out/stdlib")
    parameters, flops_per_token = sizes(folder)
    records, done, seconds = [], 0, 0.0
    for record in read_records(path):
        step, tokens, dt_ms = record["step"], record.get("tokens"), record.get("dt_ms")
        if step == 0:  # the baseline of a fine-tuning
            tokens, dt_ms = 0, 0.0
        if tokens is None or dt_ms is None:
            raise UserError(f"{path}: the record of step {step} has no tokens or no dt_ms")
        seconds += dt_ms / 1000 * (step - done)
        flops = None if flops_per_token is None else flops_per_token * tokens
        records.append(record | {"tokens": tokens, "seconds": seconds, "flops": flops})
        done = step
    if done == 0:
        raise UserError(f"{path} is empty: its run has not logged a step yet")
    return Run(str(folder), parameters, records)


def sizes(folder: Path) -> tuple[int | None, int | None]:
    """The parameters of a run's model and its floating-point operations per token, by its newest
    checkpoint; a line and (None, None) without one."""
    try:
        newest = folders.find(folder)
        base, adapter = model_and_adapter(newest)
        length = folders.read_state(newest).settings.get("block_size")
        config = read_config(base, length if isinstance(length, int) else None)
    except UserError as problem:
        print(f"the size of the model of {folder} is unknown: {problem}")
        return None, None
    return outline(config).num_params(), config.flops_per_token(frozen=adapter is not None)


def figures(run: Run) -> dict[str, str]:
    """A row of the table."""
    last = run.records[-1]
    evaluated = [r for r in run.records if r.get("val_loss") is not None]
    final = evaluated[-1] if evaluated else {}
    best = min(evaluated, key=lambda r: r["val_loss"]) if evaluated else {}

    def number(record: Record, name: str) -> str:
        return UNKNOWN if record.get(name) is None else f"{record[name]:.4f}"

    return {
        "run": run.name,
        "parameters": compact(run.parameters) if run.parameters else UNKNOWN,
        "steps": f"{last['step']:,}",
        "tokens": compact(last["tokens"]),
        "val loss": number(final, "val_loss"),
        "best": number(best, "val_loss"),
        "at step": f"{best['step']:,}" if best else UNKNOWN,
        "bits/byte": number(final, "val_bpb"),
        "best b/b": number(best, "val_bpb"),
        "FLOPs": f"{last['flops']:.3g}" if last["flops"] else UNKNOWN,
        "time": duration(last["seconds"]),
        "tokens/s": compact(last["tokens"] / last["seconds"]) if last["seconds"] else UNKNOWN,
    }


def table(rows: list[dict[str, str]]) -> str:
    """The rows below their names, the first column to the left and the others to the right."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
        for line in lines
    )


def draw(runs: list[Run], path: Path) -> None:
    """Draw the losses of the runs as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not at the top: 0.3 s
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    hours = max(run.records[-1]["seconds"] for run in runs) > 2 * 3600
    scales = {
        "tokens": ("tokens", 1),
        "flops": ("floating-point operations", 1),
        "seconds": ("hours of training steps", 3600) if hours else ("seconds of training steps", 1),
    }
    styles: dict[str, dict[str, Any]] = {
        "loss": {"linewidth": 0.7, "alpha": 0.6},
        "val_loss": {"marker": "o", "markersize": 4},
    }
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, len(scales), sharey=True)
    for axes, (name, (label, unit)) in zip(panels, scales.items()):
        for number, run in enumerate(runs):
            color = f"C{number % 10}"
            for loss, style in styles.items():
                known = [r for r in run.records if None not in (r.get(loss), r[name])]
                xs, ys = [r[name] / unit for r in known], [r[loss] for r in known]
                axes.plot(xs, ys, color=color, **style)
            axes.plot([], [], color=color, label=run.name)
        axes.set_xlabel(label)
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].legend(title="thin: training, points: validation")
    with atomic_file(path) as partial:
        FigureCanvasAgg(figure).print_png(str(partial))


def main(argv: list[str] | None = None) -> int:
    return configurator.command(CompareConfig, compare, argv)


if __name__ == "__main__":
    sys.exit(main())
