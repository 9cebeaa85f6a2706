"""Programs that a benchmark runs in processes of their own."""

import os
import subprocess
from pathlib import Path

from configurator import UserError
from plaingpt import environment


def output_of(name: str, command: list[str], folder: str | Path) -> str:
    """What a program prints. Raises UserError with its last line if `name` fails.

    It starts with its own way of waiting for threads, not with the one that this process has set.
    """
    ours = ("GOMP_SPINCOUNT", environment.SPINS)
    inherited = {key: value for key, value in os.environ.items() if (key, value) != ours}
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=inherited)
    if run.returncode:
        lines = run.stderr.strip().splitlines() or [f"exit status {run.returncode}"]
        raise UserError(f"{name} failed: {lines[-1]}")
    return run.stdout
