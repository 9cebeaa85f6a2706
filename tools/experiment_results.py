"""The results of an experiment (tools/experiment.py): its records, its table, its figure."""

import json
import math
import statistics
import textwrap
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from configurator import UserError
from plaingpt import lora
from plaingpt.checkpoint import folders
from plaingpt.checkpoint.hugging_face import read_config
from plaingpt.files import Count, Settings, atomic_file, parse_json
from plaingpt.training.run_folder import METRICS, read_records
from plaingpt.training.start import model_and_adapter, outline
from plaingpt.wording import compact, duration, quantity

POINTS = 20  # of a recorded curve, at most


@dataclass(frozen=True)
class Run:
    variant: str
    seed: int
    settings: Settings  # that the experiment gives train.py
    folder: Path

    @property
    def name(self) -> str:
        return self.folder.name


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A finished run: a line of the records. Losses are of validation, in nats per token."""

    variant: str
    seed: Count
    settings: Settings
    steps: Count
    tokens: Count
    parameters: Count  # the trained ones
    loss: float  # at the last step
    lowest: float  # of all evaluations
    bits_per_byte: float | None = None  # at the last step; None if unknown
    seconds: float  # of the training steps
    device: str
    versions: dict[str, str] = {}
    revision: str | None = None  # of this code
    curve: tuple[tuple[int, int, float], ...]  # step, tokens, loss


def measured(run: Run, threads: int) -> Result:
    """The result of a finished run, which had that many threads if it ran on a CPU. Raises
    UserError for damaged files, and if the last loss is not finite."""
    curve, bits, seconds, done = [], None, 0.0, 0
    for each in read_records(run.folder / METRICS):
        seconds += (each.get("dt_ms") or 0.0) / 1000 * (each["step"] - done)
        done, bits = each["step"], each.get("val_bpb")
        if each.get("val_loss") is not None:
            curve.append((done, each.get("tokens", 0), round(each["val_loss"], 5)))
    if not curve or curve[-1][0] != done:
        raise UserError(f"{run.folder}: the validation loss of step {done:,} is not finite")
    start = folders.read_starts(run.folder)[-1]
    device = [start.device, start.dtype.removeprefix("torch.")]
    device += [quantity(threads, "thread")] if start.device == "cpu" else []
    return Result(
        variant=run.variant,
        seed=run.seed,
        settings=run.settings,
        steps=done,
        tokens=curve[-1][1],
        parameters=trained_parameters(run.folder),
        loss=curve[-1][2],
        lowest=min(loss for _, _, loss in curve),
        bits_per_byte=None if bits is None else round(bits, 5),
        seconds=round(seconds, 2),
        device=", ".join(device),
        versions=start.versions,
        revision=start.revision,
        curve=tuple(curve[:: -math.ceil(len(curve) / POINTS)][::-1]),
    )


def trained_parameters(run_folder: Path) -> int:
    base, adapter = model_and_adapter(folders.find(run_folder))
    model = outline(read_config(base))
    if adapter:
        with torch.device("meta"):
            lora.add(model, adapter.config, seed=0)
    return model.num_params(trained=True)


def read(runs: list[Run], path: Path) -> list[Result]:
    """The results of those runs that are recorded. Raises UserError for a damaged line, and if a
    run was trained with other settings than it has now."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    found = [parse_json(line, Result, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    by_name = {(each.variant, each.seed): each for each in found}
    results = []
    for run in runs:
        if result := by_name.get((run.variant, run.seed)):
            check_unchanged(run, result.settings, f"{path} and {run.folder}")
            results.append(result)
    return results


def check_unchanged(run: Run, before: Settings, where: str) -> None:
    names = [n for n in {**before, **run.settings} if before.get(n) != run.settings.get(n)]
    if names:
        changes = (f"{n} is {run.settings.get(n)} and was {before.get(n)}" for n in names)
        raise UserError(
            f"{run.name} was trained with other settings: {'; '.join(changes)}. Give the variant "
            f"another name, or remove its runs from {where} to train them again"
        )


def add(result: Result, path: Path) -> None:
    """Add a line to the records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    line = json.dumps(msgspec.to_builtins(result))
    with atomic_file(path) as partial:
        partial.write_text(f"{before}{line}\n", encoding="utf-8")


# --- the table


def table(results: list[Result], seeds: int) -> str:
    """A row for each variant, in Markdown, and how to read them. A row of fewer than `seeds` runs
    says so."""
    by_variant = grouped(results)
    unit, first = unit_of(results), next(iter(by_variant.values()))
    rows = [row(mine, first, unit, seeds) for mine in by_variant.values()]
    names = [name for name in rows[0] if any(each[name] for each in rows)]
    names = ["variant", *names[1:]]
    lines = [names, ["---"] * len(names), *([each[name] for name in names] for each in rows)]
    used = ", ".join(map(str, sorted({result.seed for result in results})))
    places = dict.fromkeys(f"{r.device}, PyTorch {r.versions.get('torch')}" for r in results)
    notes = (
        f"Validation losses at the last step are in nats per token: mean ± standard deviation over "
        f"the seeds {used}. Differences to the first row are in {unit}: mean ± standard error over "
        f"runs of the same seed. Times are those of the training steps ({'; '.join(places)})."
    )
    markdown = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{markdown}\n\n{textwrap.fill(notes, 100, break_on_hyphens=False)}"


def row(mine: list[Result], first: list[Result], unit: str, seeds: int) -> dict[str, str]:
    """The cells of a variant by the names of their columns; a column may be empty."""
    loss, lowest = (statistics.mean(getattr(r, name) for r in mine) for name in ("loss", "lowest"))
    bits = [result.bits_per_byte for result in mine if result.bits_per_byte is not None]
    missing = f" ({len(mine)} of {quantity(seeds, 'seed')})" if len(mine) < seeds else ""
    others = {result.seed: measure(result, unit) for result in first}
    pairs = [measure(r, unit) - others[r.seed] for r in mine if r.seed in others]
    difference = "" if mine is first or not pairs else spread(pairs, len(pairs) ** 0.5, "+")
    return {
        "variant": mine[0].variant + missing,
        "parameters": compact(mine[0].parameters),
        "tokens": compact(mine[0].tokens),
        "loss": spread([result.loss for result in mine]),
        "lowest": f"{lowest:.4f}" if lowest < loss else "",
        "bits per byte": spread(bits) if len(bits) == len(mine) else "",
        "difference": difference,
        "ms per step": f"{statistics.mean(1000 * r.seconds / r.steps for r in mine):.0f}",
        "time": duration(statistics.mean(result.seconds for result in mine)),
    }


def spread(values: list[float], divisor: float = 1.0, sign: str = "") -> str:
    """The mean, and the standard deviation divided by `divisor` if there are two values or more."""
    mean = f"{statistics.mean(values):{sign}.4f}"
    return f"{mean} ± {statistics.stdev(values) / divisor:.4f}" if len(values) > 1 else mean


def grouped(results: list[Result]) -> dict[str, list[Result]]:
    variants = dict.fromkeys(result.variant for result in results)
    return {name: [each for each in results if each.variant == name] for name in variants}


def unit_of(results: list[Result]) -> str:
    """Bits per byte compare between tokenizers, but are unknown where a mask leaves tokens out."""
    known = all(result.bits_per_byte is not None for result in results)
    return "bits per byte" if known else "nats per token"


def measure(result: Result, unit: str) -> float:
    if unit == "bits per byte":
        assert result.bits_per_byte is not None
        return result.bits_per_byte
    return result.loss


# --- the figure


def draw(results: list[Result], path: Path) -> None:
    """Draw the validation loss of every run over its tokens, as a PNG file; a variant has a
    colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not at the top: 0.3 s
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, unit = figure.subplots(), unit_of(results)
    for number, (variant, mine) in enumerate(grouped(results).items()):
        style = f"C{number % 10}.{('-', '--', ':')[number // 10 % 3]}"
        for result in mine:
            scale = measure(result, unit) / result.loss
            points = [(tokens, scale * loss) for _, tokens, loss in result.curve]
            label = variant if result is mine[0] else None
            axes.plot(*zip(*points), style, label=label, linewidth=1)
    axes.set(xlabel="tokens", ylabel=f"validation loss ({unit})")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_file(path) as partial:
        FigureCanvasAgg(figure).print_png(str(partial))
