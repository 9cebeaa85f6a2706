"""Console output of a run: its step lines and its clock."""

import math
import time
from typing import Any

import msgspec

from plaingpt.files import Count
from plaingpt.runtime import Runtime, peak_memory_gib
from plaingpt.training.plan import Plan
from plaingpt.training.state import TrainState
from plaingpt.wording import compact, duration

Record = dict[str, Any]  # of one step: the fields of Metrics, and others that a newer version adds


class Metrics(msgspec.Struct, frozen=True):
    """A line of metrics.jsonl; null stands for a number that was not finite."""

    step: Count
    loss: float | None = None  # the mean since the line before, over the steps that were finite
    lr: float | None = None
    grad_norm: float | None = None  # of this step
    skipped: Count = 0  # steps so far
    tokens: Count = 0
    tokens_per_s: float | None = None
    dt_ms: float | None = None  # the mean since the line before, or since the run was resumed
    mfu: float | None = None
    peak_mem_gib: float | None = None
    val_loss: float | None = None  # after an evaluation
    val_bpb: float | None = None


def console_line(record: Record, max_steps: int) -> str:
    """One line for a training step, in fixed fields and units."""
    eta_s = (max_steps - record["step"]) * record["dt_ms"] / 1000
    digits = len(str(max_steps))
    mfu = "n/a" if record["mfu"] is None else f"{100 * record['mfu']:.1f}%"
    return (
        f"step {record['step']:0{digits}d}/{max_steps} | loss {record['loss']:.4f} | "
        f"lr {record['lr']:.2e} | norm {record['grad_norm']:.2f} | {record['dt_ms']:.0f} ms | "
        f"{compact(record['tokens_per_s'])} tok/s | mfu {mfu} | eta {duration(eta_s)}"
    )


def throughput(state: TrainState, plan: Plan, dt: float, rt: Runtime) -> Record:
    """The metrics of a step besides its loss; `dt` is its time in seconds."""
    peak = plan.device.peak_flops
    return {
        "skipped": state.skipped,
        "tokens": state.step * plan.tokens_per_step,
        "tokens_per_s": plan.tokens_per_step / dt,
        "dt_ms": 1000 * dt,
        "mfu": plan.flops_per_step / dt / (peak * rt.world_size) if peak else None,
        "peak_mem_gib": peak_memory_gib(rt.device),
    }


class Clock:
    """Times the steps of a run, and says after six of them how long the rest will take."""

    def __init__(self, steps: int) -> None:
        self.steps, self.done, self.timed = steps, 0, 0
        self.began = self.warm = self.seconds = 0.0

    def start(self) -> None:
        self.began = time.perf_counter()

    def stop(self) -> None:
        now = time.perf_counter()
        self.seconds += now - self.began
        self.timed += 1
        self.done += 1
        if self.done == 1:  # the first step is slower than the others
            self.warm = now
        if self.done == 6:
            left = (now - self.warm) / 5 * (self.steps - self.done)
            print(f"Time: about {duration(left)} for the remaining steps.")

    def read(self) -> float:
        """The mean seconds of a step since the last reading."""
        mean = self.seconds / self.timed
        self.seconds, self.timed = 0.0, 0
        return mean


def finite(value: float | None) -> float | None:
    """`value`, or None (null in JSON) if it is not finite."""
    return value if value is None or math.isfinite(value) else None
