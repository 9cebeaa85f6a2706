"""How PyTorch's threads wait for one another. This file is imported before torch."""

import os

SPINS = "2000"  # about 30 µs; GNU OpenMP's own 300,000 are several milliseconds


def wait_briefly() -> None:
    """Have idle threads sleep soon instead of keeping their core busy, unless the user decides.

    A thread that spins takes its core from the thread that it waits for as soon as any other
    program runs: one busy program made a training step three times as long, at times twenty
    (docs/benchmarks.md). GNU OpenMP, which PyTorch uses on Linux, reads the variable when torch is
    loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
