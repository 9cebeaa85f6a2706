"""Pure functions of the step: the learning rate, and when periodic work is due."""

import math
from dataclasses import dataclass
from typing import Literal

ScheduleName = Literal["cosine", "wsd"]


@dataclass(frozen=True)
class LearningRate:
    """The learning rate of each step, from 0 to max_steps - 1.

    Linear warm-up to `peak`, then "cosine" down to `min_lr`, or "wsd" (warm-up, stable, decay;
    arXiv 2404.06395): `peak` until the last `decay_fraction` of the steps, then linear.
    """

    max_steps: int
    peak: float
    min_lr: float
    warmup_steps: int
    schedule: ScheduleName
    decay_fraction: float

    def at(self, step: int) -> float:
        if step < self.warmup_steps:
            return self.peak * (step + 1) / self.warmup_steps
        start = self.warmup_steps
        if self.schedule == "wsd":
            start = max(start, round(self.max_steps * (1 - self.decay_fraction)))
        if step < start:
            return self.peak
        done = min((step - start + 1) / max(self.max_steps - start, 1), 1.0)  # in (0, 1]
        left = (1 + math.cos(math.pi * done)) / 2 if self.schedule == "cosine" else 1 - done
        return self.min_lr + (self.peak - self.min_lr) * left


@dataclass(frozen=True)
class Every:
    """Work that is due after every `steps` steps (0: never), and after the `last` one."""

    steps: int
    last: int | None = None

    def due(self, step: int) -> bool:
        """Whether it is due after `step` steps."""
        return step == self.last or (self.steps > 0 and step % self.steps == 0)

    def count(self, after: int, until: int) -> int:
        """How many times it is due after step `after`, up to and including step `until`."""
        regular = max(0, until // self.steps - after // self.steps) if self.steps else 0
        if self.last is None or not after < self.last <= until:
            return regular
        return regular + (not self.steps or self.last % self.steps > 0)
