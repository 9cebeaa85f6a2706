"""What a run tells: the console line, metrics.jsonl, the plot, an optional tracker."""

import importlib
import json
import math
import re
from pathlib import Path
from typing import Any

import torch

from configurator import UserError

# One step: step, loss, lr, grad_norm, skipped (steps so far), tokens, tokens_per_s, dt_ms, mfu,
# peak_mem_gib; and where it was evaluated val_loss and val_bpb.
Record = dict[str, Any]
# Dense bf16 matrix products per second that the vendors' data sheets promise, in TFLOP/s.
PEAK_TFLOPS = {
    "A100": 312,
    "A10G": 70,
    "A40": 150,
    "A6000": 155,
    "B200": 2250,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "GH200": 989,
    "H200": 989,
    "H20": 148,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 3090": 71,
    "RTX 4090": 165,
    "RTX 5090": 210,
    "T4": 65,  # fp16
    "V100": 125,  # fp16
}


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s that a device's data sheet promises, or None where the table has none."""
    if device.type != "cuda":
        return None
    for name, tflops in PEAK_TFLOPS.items():  # "H100 PCIe" stands before "H100"
        if re.search(rf"\b{name}\b", torch.cuda.get_device_name(device)):
            return tflops * 1e12
    return None


def console_line(record: Record, max_steps: int, eta_s: float) -> str:
    """One line for a training step, in fixed fields and units."""
    digits = len(str(max_steps))
    mfu = "n/a" if record["mfu"] is None else f"{100 * record['mfu']:.1f}%"
    return (
        f"step {record['step']:0{digits}d}/{max_steps} | loss {record['loss']:.4f} | "
        f"lr {record['lr']:.2e} | norm {record['grad_norm']:.2f} | {record['dt_ms']:.0f} ms | "
        f"{compact(record['tokens_per_s'])} tok/s | mfu {mfu} | eta {duration(eta_s)}"
    )


def compact(number: float) -> str:
    """3 significant digits and a unit: 2.27M, 84.1k, 690."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= 0.9995 * size:
            scaled = float(f"{number / size:.2e}")
            return f"{scaled:.{max(0, 2 - math.floor(math.log10(scaled)))}f}{unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """1h12m, 3m20s or 8s."""
    minutes, seconds = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    return f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


class MetricsLog:
    """`metrics.jsonl`: one record a line, steps in order, none twice.

    Opening it drops the records after `first_step`, which a resumed run is about to make again.
    """

    def __init__(self, path: Path, first_step: int) -> None:
        self.path = path
        self.records = [r for r in read_records(path) if r["step"] <= first_step]
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)

    def add(self, record: Record) -> None:
        """Append a record; a number that is not finite becomes null, as JSON has none."""
        record = {key: finite(value) for key, value in record.items()}
        self.records.append(record)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def finite(value: float | None) -> float | None:
    """A number as JSON can carry it: None where it is not finite."""
    return value if value is None or math.isfinite(value) else None


def read_records(path: Path) -> list[Record]:
    """The records of a metrics.jsonl; a last line that a kill cut short is left out."""
    if not path.exists():
        return []
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except ValueError:
            if number < len(lines) - 1:
                raise UserError(f"{path}:{number + 1} is not JSON") from None
    return records


def plot(records: list[Record], path: Path) -> None:
    """Draw training and validation loss, learning rate and gradient norm over the steps, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # not at the top: 0.3 s
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 6), layout="constrained")
    losses, rates, norms = figure.subplots(3, sharex=True, height_ratios=(4, 1, 1))
    lines = [
        (losses, "loss", "training", "C0-"),
        (losses, "val_loss", "validation", "C1o-"),
        (rates, "lr", None, "C2-"),
        (norms, "grad_norm", None, "C3-"),
    ]
    for axes, key, label, style in lines:
        points = [(r["step"], r[key]) for r in records if r.get(key) is not None]
        if points:
            axes.plot(*zip(*points), style, label=label, markersize=3, linewidth=1)
        axes.grid(alpha=0.3)
    losses.set_ylabel("loss (nats per token)")
    if losses.lines:
        losses.legend()
    rates.set_ylabel("lr")
    norms.set(xlabel="step", ylabel="norm")
    partial = path.with_name(path.name + ".partial")
    FigureCanvasAgg(figure).print_png(str(partial))
    partial.replace(path)


class Tracker:
    """A run as wandb or trackio shows it: the two have the same calls."""

    def __init__(self, library: str, name: str, out_dir: Path, config: dict[str, Any]) -> None:
        """Start, or go on with, the run of that name. Raises UserError where the library is not
        installed, or does not start."""
        try:
            self.library = importlib.import_module(library)
        except ImportError:
            raise UserError(
                f"--tracker={library} needs a library that is not here: pip install {library}"
            ) from None
        self.name = re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)
        places = {"id": self.name, "dir": str(out_dir)} if library == "wandb" else {}
        try:
            self.library.init(
                project="plaingpt", name=self.name, config=config, resume="allow", **places
            )
        except Exception as error:  # of kinds that are the library's own
            raise UserError(f"--tracker={library} does not start: {error}") from error

    def log(self, record: Record) -> None:
        """The record of a step, and the perplexity of its losses."""
        values = {key: value for key, value in record.items() if finite(value) is not None}
        step = values.pop("step")
        for key in ("loss", "val_loss"):
            if key in values:
                values[key.replace("loss", "perplexity")] = math.exp(min(values[key], 700))
        self.library.log(values, step=step)

    def finish(self, checkpoint: Path | None) -> None:
        """End the run; the checkpoint folder goes with it, as an artifact."""
        if checkpoint:
            artifact = self.library.Artifact(self.name, type="model")
            artifact.add_dir(str(checkpoint))
            self.library.log_artifact(artifact)
        self.library.finish()
