"""The learning rate as a pure function of the step."""

import math
from typing import Literal

Schedule = Literal["cosine", "wsd"]


def learning_rate(
    step: int,
    *,
    max_steps: int,
    peak: float,
    min_lr: float,
    warmup_steps: int,
    schedule: Schedule,
    decay_fraction: float,
) -> float:
    """The learning rate of step 0, 1, …, max_steps - 1.

    Linear warm-up to `peak`, then "cosine" down to `min_lr`, or "wsd" (warm-up, stable, decay;
    arXiv 2404.06395): `peak` until the last `decay_fraction` of the steps, then linear.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    start = warmup_steps
    if schedule == "wsd":
        start = max(start, round(max_steps * (1 - decay_fraction)))
    if step < start:
        return peak
    done = min((step - start + 1) / max(max_steps - start, 1), 1.0)  # in (0, 1]
    left = (1 + math.cos(math.pi * done)) / 2 if schedule == "cosine" else 1 - done
    return min_lr + (peak - min_lr) * left
