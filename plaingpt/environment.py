"""Settings that PyTorch reads when it is loaded. This file is imported before torch."""

import os

SPINS = "2000"  # about 30 µs; GNU OpenMP's own 300,000 are several milliseconds


def wait_briefly() -> None:
    """Let idle threads sleep soon rather than spin, unless the environment already decides.

    As soon as any other program runs, a spinning thread takes a core from the very thread that it
    waits for: one busy program made a training step three times as long, at times twenty times
    (docs/benchmarks.md). GNU OpenMP, which PyTorch uses on Linux, reads the variable when torch is
    loaded.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def use_huge_pages() -> None:
    """Have PyTorch ask Linux for pages of 2 MB, unless the environment already decides: weights are
    then read some per cent faster. Training gains nothing from them (docs/benchmarks.md)."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
