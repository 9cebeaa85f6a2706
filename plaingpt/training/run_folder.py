"""What a run leaves beside its checkpoints: run.json, metrics.jsonl, loss.png, samples.jsonl, and
what a tracker gets."""

import contextlib
import importlib
import json
import math
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from configurator import UserError
from plaingpt import runtime
from plaingpt.checkpoint import folders
from plaingpt.checkpoint.folders import Best, RunStart
from plaingpt.checksums import sealed
from plaingpt.files import (
    Settings,
    as_record,
    atomic_file,
    flush,
    open_regular,
    parse_json,
    read_json,
    remove_folder,
    remove_leftovers,
    write_json,
)
from plaingpt.locks import locked
from plaingpt.runtime import Runtime
from plaingpt.training.log import Metrics, Record, finite
from plaingpt.training.samples import Sample

METRICS, SAMPLES, RUN = "metrics.jsonl", "samples.jsonl", "run.json"
SHARES = ("/acc", "/acc_norm", "/exact", "/f1")  # figures of tasks, between 0 and 1


@contextlib.contextmanager
def claimed(out_dir: Path, rt: Runtime) -> Iterator[None]:
    """Keep other trainings out of a run folder; the main process holds the lock for all processes.

    Raises UserError or OSError, in every process, if the main process cannot get it.
    """
    problem: UserError | OSError | None = None
    with contextlib.ExitStack() as held:
        if rt.is_main:
            try:
                held.enter_context(locked(out_dir))
            except (UserError, OSError) as error:
                problem = error
        if rt.any(problem is not None):
            raise problem or UserError(f"the main process cannot use {out_dir}")
        yield


class RunLog:
    """Writes the records of a run to metrics.jsonl, loss.png and a tracker, its samples to
    samples.jsonl, and its `starts` and its best checkpoint to run.json.

    metrics.jsonl has one record per line, in the order of the steps and without repetition: it
    starts with the `earlier` records, and a resumed run replaces those after its first step.
    """

    def __init__(
        self,
        out_dir: Path,
        earlier: list[Record],
        tracker: "Tracker | None" = None,
        starts: Sequence[dict[str, Any]] = (),
    ) -> None:
        self.out_dir, self.records, self.tracker = out_dir, list(earlier), tracker
        self.starts, self.links = starts, True
        self.best: Best | None = None
        write_lines(out_dir / METRICS, self.records)

    def add(self, record: Record) -> None:
        """Add a record; non-finite numbers become null. A validation loss redraws the plot."""
        written = {key: finite(value) for key, value in record.items()}
        self.records.append(written)
        append_lines(self.out_dir / METRICS, [written])
        if "val_loss" in record and record["step"] > 0:
            plot(self.records, self.out_dir / "loss.png")
        if self.tracker:
            self.tracker.log(record)

    def add_samples(self, samples: list[Sample]) -> None:
        append_lines(self.out_dir / SAMPLES, [msgspec.to_builtins(each) for each in samples])

    def sync(self) -> None:
        """Flush the records so far to disk: a few ms, too long for every step on a GPU."""
        for name in (METRICS, SAMPLES):
            if (path := self.out_dir / name).exists():
                flush(path)

    def name_best(self) -> None:
        """Write run.json, which names the best checkpoint, and point the link `best` at it;
        print it if it is new."""
        before, self.best = self.best, folders.best_of(self.out_dir)
        about = {"starts": self.starts} | ({"best": self.best} if self.best else {})
        write_json(self.out_dir / RUN, about, seal=True)
        if self.best and self.links:
            try:
                folders.link_best(self.out_dir, self.best.checkpoint)
            except OSError as error:
                self.links = False
                print(f"no link to the best checkpoint ({error}); {RUN} names it")
        if self.best and self.best != before:
            self.print_best("the best checkpoint so far")

    def print_best(self, words: str) -> None:
        if self.best:
            folder, loss = self.out_dir / self.best.checkpoint, self.best.val_loss
            print(f"{words}: {folder}, validation loss {loss:.4f}")

    def finish(self) -> None:
        newest = folders.step_folders(self.out_dir)[-1:]
        if self.best and self.best.checkpoint not in [folder.name for folder in newest]:
            self.print_best("the best checkpoint")
        if self.tracker:
            self.tracker.finish(newest)


def begin_run(
    out_dir: Path,
    start: RunStart,
    source: Path | None,
    tracker: str | None,
    splits: dict[str, Any],
) -> RunLog:
    """Create or continue a run folder, and write down its `start` (see describe_start).

    A resumed run takes its earlier starts, metrics and samples from the run folder of its
    checkpoint, `source`. `splits` are the statistics of the data, for the tracker.
    Raises UserError if the tracker cannot be started, ImportError without matplotlib.
    """
    os.environ.pop("MPLBACKEND", None)  # a notebook sets one that its programs may not have
    import matplotlib.figure  # noqa: F401  # a run should end here rather than at its first plot

    about = msgspec.to_builtins(start)
    starts, earlier, samples = [about], [], []
    if source and start.step:
        before = folders.read_starts(source.parent)
        # as they are in the file, with fields that this version may not know
        raw = read_json(source.parent / RUN, dict[str, Any])["starts"] if before else []
        starts = [each for each, typed in zip(raw, before) if typed.step <= start.step] + starts
        earlier = records_until(start.step, source.parent / METRICS, Metrics)
        samples = records_until(start.step, source.parent / SAMPLES, Sample)
    out_dir.mkdir(parents=True, exist_ok=True)
    remove_leftovers(out_dir)
    running = None
    if tracker:
        name = f"{out_dir.name}-{starts[0].get('time', '')}"
        running = Tracker(tracker, name, out_dir, about | {"splits": splits})
    if start.step == 0:
        folders.unlink_best(out_dir)
        for folder in folders.step_folders(out_dir):  # left by a run that --overwrite replaces
            remove_folder(folder)
    if samples:
        write_lines(out_dir / SAMPLES, samples)
    else:
        (out_dir / SAMPLES).unlink(missing_ok=True)
    log = RunLog(out_dir, earlier, running, starts)
    log.name_best()
    return log


def check_out_dir(out_dir: Path, step: int) -> None:
    """Raises UserError for a folder that is not one for runs, and if something would be in the way
    of a checkpoint after `step`."""
    name = str(out_dir.absolute())
    if name != name.encode(errors="ignore").decode():
        raise UserError(f"out_dir={name!r} is not UTF-8, which safetensors needs: choose another")
    if (out_dir / "dataset.json").exists():
        raise UserError(
            f"out_dir={out_dir} is a data folder: choose another, as out/{out_dir.name}"
        )
    if folders.within_checkpoint(out_dir):
        raise UserError(f"out_dir={out_dir} is inside a checkpoint: choose another")
    if (out_dir / "config.json").exists() or folders.is_adapter(out_dir):
        ways = "--resume --out_dir=OTHER continues its run from there"
        if not (out_dir / "state.json").exists():  # exported, or made elsewhere
            ways = "--out_dir=OTHER starts a new run from it"
        where = shlex.quote(str(out_dir))
        raise UserError(f"out_dir={out_dir} is a checkpoint; --init_from={where} {ways}")
    for path in sorted(out_dir.glob("step_*")):
        named = folders.STEP_FOLDER.fullmatch(path.name)
        if named and int(named[1]) > step and not (path / "state.json").exists():
            raise UserError(
                f"{path} is in the way of a checkpoint and is not one (it has no state.json): "
                "move it, or choose another --out_dir"
            )


def describe_start(settings: Settings, rt: Runtime, step: int, fingerprint: str) -> RunStart:
    """What it takes to repeat a run, for run.json and the tracker."""
    return RunStart(
        time=time.strftime("%Y-%m-%dT%H-%M-%SZ", time.gmtime()),
        step=step,
        command=shlex.join(sys.argv),
        settings=settings,
        data=fingerprint,
        device=str(rt.device),
        dtype=str(rt.dtype),
        world_size=rt.world_size,
        versions=runtime.versions(),
        revision=runtime.revision(),
    )


def write_lines(path: Path, records: Iterable[Record]) -> None:
    with atomic_file(path) as partial:
        lines = [f"{sealed(json.dumps(record))}\n" for record in records]
        partial.write_text("".join(lines), encoding="utf-8")


def append_lines(path: Path, records: Iterable[Record]) -> None:
    """Append records to a file that `write_lines` may have begun. A kill may tear the line that is
    being written, no other; a power cut may lose what was not yet flushed to disk."""
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(f"{sealed(json.dumps(record))}\n")
            file.flush()


def records_until(step: int, path: Path, kind: type) -> list[Record]:
    return [record for record in read_records(path, kind) if record["step"] <= step]


def read_records(path: Path, kind: type = Metrics) -> list[Record]:
    """The records of a metrics.jsonl, or of another `kind`, without a last line that a kill cut
    short. Raises UserError for a damaged line."""
    if not path.exists():
        return []
    records = []
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            try:
                record = parse_json(line, dict[str, Any], f"{path}:{number}")
                as_record(record, kind, f"{path}:{number}")
            except UserError:
                if line.endswith(b"\n") or b"}" in line.partition(b'"crc32"')[2]:
                    raise
                break
            record.pop("crc32", None)
            records.append(record)
    return records


def plot(records: list[Record], path: Path) -> None:
    """Draw the losses, the shares of items that tasks report (if any), the learning rate and the
    gradient norm over the steps, as a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not at the top: 0.3 s
    from matplotlib.figure import Figure

    figures = sorted({key for record in records for key in record})
    texts = [key for key in figures if key.endswith("/loss")]
    shares = [key for key in figures if key.endswith(SHARES)]
    heights = (4, 2, 1, 1) if shares else (4, 1, 1)
    figure = Figure(figsize=(7, sum(heights)), layout="constrained")
    losses, *tasks, rates, norms = figure.subplots(len(heights), sharex=True, height_ratios=heights)
    lines = [
        (losses, "loss", "training", "C0-"),
        (losses, "val_loss", "validation", "C1o-"),
        (rates, "lr", None, "C2-"),
        (norms, "grad_norm", None, "C3-"),
        *((losses, key, key, f"C{n % 8 + 2}o-") for n, key in enumerate(texts)),
        *((axes, key, key, f"C{n % 10}o-") for axes in tasks for n, key in enumerate(shares)),
    ]
    for axes, key, label, style in lines:
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=3, linewidth=1)
        axes.grid(alpha=0.3)
    losses.set_ylabel("loss (nats per token)")
    if losses.lines:
        losses.legend()
    for axes in tasks:
        axes.set_ylabel("share of items")
        axes.legend(fontsize="small", ncols=2)
    rates.set_ylabel("lr")
    norms.set(xlabel="step", ylabel="norm")
    with atomic_file(path) as partial:
        FigureCanvasAgg(figure).print_png(str(partial))


class Tracker:
    """A run in wandb or trackio, which share one API."""

    def __init__(self, library: str, name: str, out_dir: Path, config: dict[str, Any]) -> None:
        """Start or continue the run of that name. Raises UserError if the library is not installed
        or does not start."""
        try:
            self.library = importlib.import_module(library)
        except ImportError:
            raise UserError(
                f"--tracker={library} needs a library that is not installed: pip install {library}"
            ) from None
        self.name = re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)
        places = {"id": self.name, "dir": str(out_dir)} if library == "wandb" else {}
        try:
            self.library.init(
                project="plaingpt", name=self.name, config=config, resume="allow", **places
            )
        except Exception as error:  # the library's own kinds
            raise UserError(f"--tracker={library} does not start: {error}") from error

    def log(self, record: Record) -> None:
        """Send the record of a step, with the perplexities of its losses."""
        values = {key: value for key, value in record.items() if finite(value) is not None}
        step = values.pop("step")
        for key in ("loss", "val_loss"):
            if key in values:
                values[key.replace("loss", "perplexity")] = math.exp(min(values[key], 700))
        self.library.log(values, step=step)

    def finish(self, checkpoints: list[Path]) -> None:
        """End the run, with a checkpoint folder as an artifact if there is one."""
        for folder in checkpoints:
            artifact = self.library.Artifact(self.name, type="model")
            artifact.add_dir(str(folder))
            self.library.log_artifact(artifact)
        self.library.finish()
