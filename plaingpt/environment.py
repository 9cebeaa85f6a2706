"""What torchrun says about this process, and settings that PyTorch reads when it is loaded. This
file is imported before torch."""

import os
import re

from configurator import UserError

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


def rank_and_size() -> tuple[int, int]:
    """This process's rank, and how many processes there are. Raises UserError as
    `from_environment`."""
    size = from_environment("WORLD_SIZE", default=1, least=1)
    rank = from_environment("RANK", default=0 if size == 1 else None)
    if rank >= size:
        raise UserError(f"RANK={rank} is not below WORLD_SIZE={size}; torchrun sets both")
    return rank, size


def restartable() -> bool:
    """Whether torchrun starts the processes again when one has died (--max-restarts)."""
    return from_environment("TORCHELASTIC_MAX_RESTARTS", default=0) > 0


def from_environment(name: str, default: int | None = None, least: int = 0) -> int:
    """A number that torchrun sets. Raises UserError if it is missing or makes no sense."""
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text and re.fullmatch(r"\d{1,9}", text) and int(text) >= least:
        return int(text)
    problem = f"{name} is not set" if text is None else f"the environment has {name}={text!r}"
    raise UserError(f"{problem}: torchrun sets it for several processes; unset it for one")
